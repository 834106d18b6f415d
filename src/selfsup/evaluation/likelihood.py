"""How likely continuations are after their contexts, under a causal language model.

What contexts share at their beginning (the demonstrations of a prompt) is read once, and what is
one context's own once for all its continuations: keys and values are kept in a `Cache`.

Axes: rows: contexts; ends: the continuations of each; time.
"""

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int

from selfsup.batch import Batch
from selfsup.data.dataset import pad_mask, pad_rows
from selfsup.data.tokenizer import Tokenizer
from selfsup.errors import DataError
from selfsup.models.view import Cache
from selfsup.training.device import autocast, to_device

if TYPE_CHECKING:
    from selfsup.model import Model


class Row(NamedTuple):
    """A context of at least one token, and the ways in which it may go on."""

    context: Int[np.ndarray, " time"]
    ends: list[np.ndarray]

    @property
    def length(self) -> int:
        """Tokens of the context with its longest end."""
        return len(self.context) + max(len(end) for end in self.ends)


def rows_of(tokenizer: Tokenizer, contexts: Sequence[str], ends: Sequence[str]) -> list[Row]:
    """Each context as ids with each of `ends` behind it.

    Context and end are encoded together, since tokens may reach across their border ("it is " and
    "good" are the tokens "is" and " good"). A row's context is what all its ends leave as it is.

    Raises:
        DataError: an end has no token, or two have the same.
    """
    texts = [text for context in contexts for text in (context, *(context + end for end in ends))]
    encoded = tokenizer.encode(texts, parse_special=False)
    cls, sep = [tokenizer.vocabulary.cls], [tokenizer.vocabulary.sep]
    size, rows = len(ends) + 1, []
    for at in range(0, len(encoded), size):
        variants = encoded[at : at + size]
        border = common_prefix(variants)
        tails = [ids[border:].astype(np.int64) for ids in variants[1:]]
        check_ends(tails, ends)
        # as in `Model.generate`, what nothing stands before comes after the end of a document
        first = cls if tokenizer.style == "bert" else [] if border else sep
        rows.append(Row(np.concatenate([first, variants[0][:border]]).astype(np.int64), tails))
    return rows


def check_ends(tails: Sequence[np.ndarray], ends: Sequence[str]) -> None:
    """Refuses texts that the model cannot tell apart by their tokens.

    Raises:
        DataError: one has no token, or two have the same.
    """
    seen: dict[bytes, str] = {}
    for tail, end in zip(tails, ends, strict=True):
        if not len(tail):
            raise DataError(f"{end!r} is no token of this model: choose another word for the label")
        other = seen.setdefault(tail.tobytes(), end)
        if other is not end:
            raise DataError(
                f"{other!r} and {end!r} are the same tokens to this model: choose other words"
            )


def common_prefix(rows: Sequence[np.ndarray]) -> int:
    """How many leading ids all rows share.

    >>> common_prefix([np.array([1, 2, 3]), np.array([1, 2]), np.array([1, 2, 4])])
    2
    """
    length = min(map(len, rows))
    same = np.all([row[:length] == rows[0][:length] for row in rows], axis=0)
    return length if same.all() else int(same.argmin())


@torch.inference_mode()
def log_likelihoods(
    model: "Model", rows: Sequence[Row], batch_size: int = 16
) -> Float[np.ndarray, "rows ends"]:
    """Log-probability (nats) of each end after its context, summed over the end's tokens.

    Args:
        model: a causal language model (`targets.writer_of` tells).
        rows: all with the same number of ends.
        batch_size: contexts per forward pass.

    Raises:
        DataError: a row longer than the model's learned positions.
    """
    objective: Any = model.objective
    # the last token of a context goes with its ends: it predicts their first
    shared = common_prefix([row.context[:-1] for row in rows])
    num_ends = len(rows[0].ends)
    out = np.empty((len(rows), num_ends))
    order = np.argsort([len(row.context) for row in rows], kind="stable")
    with autocast(model.device, model.dtype):
        prefix = Cache()
        if shared:
            model.encoder(padded(model, [rows[0].context[:shared]]), prefix)
        for at in range(0, len(rows), batch_size):
            numbers = order[at : at + batch_size]
            chosen = [rows[i] for i in numbers]
            cache = copy.deepcopy(prefix)
            cache.select(torch.zeros(len(chosen), dtype=torch.long, device=model.device))
            own = [row.context[shared:-1] for row in chosen]
            if any(map(len, own)):
                model.encoder(padded(model, own), cache)
            tails = [np.concatenate([row.context[-1:], end]) for row in chosen for end in row.ends]
            owner = torch.arange(len(chosen), device=model.device).repeat_interleave(num_ends)
            cache.select(owner)
            scored = objective.score(padded(model, tails), cache)
            sums = scored["log_probability"].double().sum(1)
            out[numbers] = sums.view(len(chosen), num_ends).cpu().numpy()
    return out


def padded(model: "Model", rows: Sequence[np.ndarray]) -> Batch:
    """Rows of ids as a batch on the model's device."""
    pad = model.preprocessor.tokenizer.vocabulary.pad
    return to_device({"tokens": pad_rows(rows, pad), **pad_mask(rows)}, model.device)
