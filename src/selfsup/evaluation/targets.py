"""How likely targets are after their sources: the answer is the likeliest of the texts to choose.

Rank classification (Brown et al. 2020, arXiv 2005.14165, section 2.4; T0, Sanh et al. 2021, arXiv
2110.08207, section 6.1) for models that read a source and write a target: an encoder-decoder,
pre-trained or fine-tuned, and a causal model that was fine-tuned to write. Source and target are
encoded each by itself, and the end of the target counts too: a word is not likelier for being the
beginning of a longer one. Causal language models, which write a text on, are in `likelihood.py`;
`prompt_rows` and `prompt_scores` know which is which.

Axes: rows: sources; ends: the targets of each.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float

from selfsup.data.dataset import pad_mask, pad_rows
from selfsup.data.labelled_pairs import question_length, source_row
from selfsup.data.labels import Labelled
from selfsup.data.tokenizer import Tokenizer
from selfsup.errors import ConfigError
from selfsup.evaluation.likelihood import Row, check_ends, log_likelihoods, rows_of
from selfsup.models.encoder_decoder import EncoderDecoder
from selfsup.objective import Generates, Scores, Task
from selfsup.tasks.generation import IGNORED, Config, Generation
from selfsup.training.device import autocast, pick_dtype, to_device

if TYPE_CHECKING:
    from selfsup.model import Model


def pair_rows(
    tokenizer: Tokenizer,
    sources: Sequence[str],
    targets: Sequence[str],
    max_length: int | None = None,
    kept: int = 0,
) -> list[Row]:
    """Each source with all targets, as `LabelledPairs` makes rows of them.

    Args:
        tokenizer: turns them into ids.
        sources: what stands at their end is no space.
        targets: what may follow each source.
        max_length, kept: of a source that is too long, as for `source_row`.

    Raises:
        DataError: a target has no token, or two have the same.
    """
    end = tokenizer.vocabulary.sep
    encoded = tokenizer.encode(list(targets), parse_special=False)
    check_ends(encoded, targets)
    ends = [np.append(ids, end).astype(np.int64) for ids in encoded]
    texts = tokenizer.encode([source.rstrip() for source in sources], parse_special=False)
    contexts = [source_row(tokenizer, ids, max_length, kept).astype(np.int64) for ids in texts]
    return [Row(context, ends) for context in contexts]


@torch.inference_mode()
def target_log_likelihoods(
    task: Generation, rows: Sequence[Row], batch_size: int = 16
) -> list[Float[np.ndarray, " ends"]]:
    """Log-probability (nats) of each end after its source, summed over the end's tokens.

    Args:
        task: which writes.
        rows: sources, each with its ends.
        batch_size: sources per forward pass.
    """
    pad, out = task.encoder.spec.pad, [np.empty(0)] * len(rows)
    device = next(task.parameters()).device
    order = np.argsort([row.length for row in rows], kind="stable")
    with autocast(device, pick_dtype("auto", device)):
        for first in range(0, len(rows), batch_size):
            numbers = order[first : first + batch_size]
            chosen = [rows[number] for number in numbers]
            sources = [row.context for row in chosen for _ in row.ends]
            batch = {"tokens": pad_rows(sources, max(pad, 0)), **pad_mask(sources)}
            batch["label"] = pad_rows([end for row in chosen for end in row.ends], IGNORED)
            found = task.log_probability(to_device(batch, device)).double().cpu().numpy()
            borders = np.cumsum([len(row.ends) for row in chosen])[:-1]
            for number, scores in zip(numbers, np.split(found, borders), strict=True):
                out[number] = scores
    return out


def part_accuracies(task: Generation, preprocessor: Any, labelled: Labelled) -> dict[str, float]:
    """The accuracy of each task of a mixture by its name, its choices being ranked.

    Args:
        task: fine-tuned, or on its way.
        preprocessor: of its encoder, `limited` to the length of a source.
        labelled: a mixture (`data.mixtures`).
    """
    tokenizer = preprocessor.tokenizer
    hits: dict[str, list[bool]] = {part.name: [] for part in labelled.parts}
    for part in dict.fromkeys(labelled.parts):
        some = labelled.take(i for i, other in enumerate(labelled.parts) if other == part)
        sources = [task.config.prefix + item for item in some.items]
        kept = question_length(tokenizer, part)
        rows = pair_rows(tokenizer, sources, part.choices, preprocessor.max_length, kept)
        for scores, label in zip(target_log_likelihoods(task, rows), some.labels, strict=True):
            hits[part.name].append(part.choices[int(scores.argmax())] == label)
    return {name: float(np.mean(right)) for name, right in hits.items()}


# Prompts, for models of either kind


def writer_of(model: "Model") -> Generation | None:
    """What writes a target for a source; None for a causal language model, which writes on.

    Raises:
        ConfigError: the model does neither.
    """
    objective = model.objective
    if isinstance(objective, Generation):
        return objective
    if isinstance(objective, Generates) and isinstance(objective, Scores):
        return None
    if isinstance(objective.encoder, EncoderDecoder) and not isinstance(objective, Task):
        writer = Generation(Config(max_target=3), objective.encoder)  # without weights of its own
        writer.eval()
        return writer
    section = model.values.get("method") or model.values["task"]
    raise ConfigError(
        f"a {section['name']} model cannot be prompted; use a causal_language run, an "
        "encoder-decoder, or one that was fine-tuned for generation"
    )


def prompt_rows(model: "Model", contexts: Sequence[str], ends: Sequence[str]) -> list[Row]:
    """Prompts and the words that may follow them, as the model reads them.

    Raises:
        DataError: a word has no token, or two have the same.
    """
    tokenizer, writer = model.preprocessor.tokenizer, writer_of(model)
    if writer is None:
        return rows_of(tokenizer, contexts, ends)
    return pair_rows(tokenizer, [writer.config.prefix + context for context in contexts], ends)


def prompt_scores(
    model: "Model", rows: Sequence[Row], batch_size: int = 16
) -> Float[np.ndarray, "rows ends"]:
    """Log-probability (nats) of each end after its prompt; all rows have equally many."""
    writer = writer_of(model)
    if writer is None:
        return log_likelihoods(model, rows, batch_size)
    return np.stack(target_log_likelihoods(writer, rows, batch_size))
