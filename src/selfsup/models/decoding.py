"""Writing text with a trained model: the likeliest token each time, a drawn one, or beam search.

A `Writer` gives the logits after what is written and forgets nothing between two calls. There is
one for the encoder-decoder and one for causal stacks; `sample` and `beam_search` know no model.

Beam search keeps the likeliest beginnings of each text and gives the finished one of the greatest
log-probability / length ** length_penalty (Wu et al. 2016, arXiv 1609.08144, section 7, with the
plain length in place of their formula). When it stops follows `transformers`, so that its results
are the same.

Axes: row: texts written side by side; beam: beginnings of one text; candidate: 2 * beams, so that
enough of them go on when as many end; best: finished texts of a row; written: tokens; vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import (
    Concatenate,
    Literal,
    NamedTuple,
    ParamSpec,
    Protocol,
    TypeVar,
    final,
    runtime_checkable,
)

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from selfsup.batch import Batch, Vocabulary
from selfsup.errors import ConfigError
from selfsup.models.encoder import Encoder, Features
from selfsup.models.encoder_decoder import EncoderDecoder
from selfsup.models.view import Cache
from selfsup.models.vocabulary_head import VocabularyHead
from selfsup.models.weight_layout import by_column


@runtime_checkable
class Writer(Protocol):
    """A model in the middle of writing several rows."""

    @property
    def parts(self) -> Sequence[nn.Module]:
        """Modules that are read for every token."""
        ...

    def next_logits(self, newest: Int[Tensor, " row"] | None) -> Float[Tensor, "row vocabulary"]:
        """Logits (float32) of what follows `newest`, the tokens written last; None: the first."""
        ...

    def select(self, rows: Int[Tensor, " chosen"]) -> None:
        """Goes on with these rows in this order; a row may be taken several times."""
        ...


@final
class DecoderWriter:
    """Writes the targets of sources that an encoder-decoder has read.

    Args:
        model: which writes.
        read: the sources, from its `forward`.
        unwritten: tokens that are never written.
    """

    def __init__(
        self,
        model: EncoderDecoder,
        read: Features,
        unwritten: Bool[Tensor, " vocabulary"] | None = None,
    ):
        self.model, self.read, self.unwritten = model, read, places(unwritten)
        self.parts = (model,)
        self.cache = Cache()

    def next_logits(self, newest: Int[Tensor, " row"] | None) -> Float[Tensor, "row vocabulary"]:
        """As `Writer.next_logits`; the first token follows the model's `start`."""
        if newest is None:
            mask = self.read.mask
            newest = torch.full((len(mask),), self.model.start, device=mask.device)
        hidden = self.model.decode(newest.unsqueeze(1), self.read, cache=self.cache).last[:, -1]
        return without(self.model.logits(hidden).float(), self.unwritten)

    def select(self, rows: Int[Tensor, " chosen"]) -> None:
        """As `Writer.select`."""
        self.cache.select(rows)


@final
class CausalWriter:
    """Writes prompts on.

    Args:
        encoder: a stack that has learned to see the past alone.
        head: turns its hidden states into logits.
        prompts: of at least one token, padded anywhere, with `mask` where their lengths differ.
        unwritten: tokens that are never written.
    """

    def __init__(
        self,
        encoder: Encoder,
        head: VocabularyHead,
        prompts: Batch,
        unwritten: Bool[Tensor, " vocabulary"] | None = None,
    ):
        self.encoder, self.head, self.prompts = encoder, head, prompts
        self.unwritten = places(unwritten)
        self.parts = encoder, head
        self.cache = Cache()

    def next_logits(self, newest: Int[Tensor, " row"] | None) -> Float[Tensor, "row vocabulary"]:
        """As `Writer.next_logits`; the first token follows the last real one of each prompt."""
        batch = self.prompts if newest is None else {"tokens": newest.unsqueeze(1)}
        hidden = last_real(self.encoder(batch, self.cache, causal=True))
        logits = self.head(hidden, self.encoder.embedding).float()
        return without(logits, self.unwritten)

    def select(self, rows: Int[Tensor, " chosen"]) -> None:
        """As `Writer.select`."""
        self.cache.select(rows)


def last_real(features: Features) -> Float[Tensor, "batch dim"]:
    """The last layer at the last real position of each row."""
    slot = torch.arange(features.mask.shape[1], device=features.mask.device)
    last = torch.where(features.mask, slot, 0).amax(1)  # (batch,)
    return features.last[torch.arange(len(last), device=last.device), last]


def places(unwritten: Bool[Tensor, " vocabulary"] | None) -> Int[Tensor, " token"] | None:
    """The tokens that are True; None where there are none."""
    return unwritten.nonzero().squeeze(1) if unwritten is not None and unwritten.any() else None


def without(
    logits: Float[Tensor, "row vocabulary"], unwritten: Int[Tensor, " token"] | None
) -> Float[Tensor, "row vocabulary"]:
    """The logits, changed in place: -inf at tokens that are never written."""
    return logits if unwritten is None else logits.index_fill_(1, unwritten, -torch.inf)


def never_written(vocabulary: Vocabulary) -> Bool[Tensor, " vocabulary"]:
    """True at special tokens but the one that ends a text."""
    out = torch.zeros(vocabulary.size, dtype=torch.bool)
    out[[i for i in vocabulary.special if i != vocabulary.sep]] = True
    return out


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What a written text may be.

    Attributes:
        max_tokens: its greatest length, the end token included.
        end: the token that ends it.
        pad: what follows the end.
        min_tokens: so many tokens come before the end.
        no_repeat: no sequence of so many tokens is written twice; 0: all may be.
    """

    max_tokens: int
    end: int
    pad: int
    min_tokens: int = 0
    no_repeat: int = 0

    @staticmethod
    def of(vocabulary: Vocabulary, max_tokens: int, no_repeat: int = 0) -> "Rules":
        """Texts of a tokenizer: they end with its separator."""
        end = vocabulary.sep
        pad = end if vocabulary.pad < 0 else vocabulary.pad
        return Rules(max_tokens=max_tokens, end=end, pad=pad, no_repeat=no_repeat)

    def apply(
        self,
        scores: Float[Tensor, "row vocabulary"],
        written: Int[Tensor, "row written"],
    ) -> Float[Tensor, "row vocabulary"]:
        """Scores of the next token, with -inf where it would break a rule."""
        if written.shape[1] < self.min_tokens:
            scores = scores.index_fill(
                1, torch.tensor([self.end], device=scores.device), -torch.inf
            )
        if 0 < self.no_repeat <= written.shape[1]:
            runs = written.unfold(1, self.no_repeat, 1)  # (row, start, no_repeat)
            newest = written[:, written.shape[1] - self.no_repeat + 1 :]
            known = (runs[:, :, :-1] == newest.unsqueeze(1)).all(-1)  # (row, start)
            count = torch.zeros_like(scores).scatter_add(1, runs[:, :, -1], known.to(scores.dtype))
            scores = scores.masked_fill(count > 0, -torch.inf)
        return scores


def filtered(
    logits: Float[Tensor, "batch vocabulary"], top_k: int, top_p: float
) -> Float[Tensor, "batch vocabulary"]:
    """Logits with -inf at unlikely tokens; the likeliest one always stays.

    Args:
        logits: any scale.
        top_k: how many of the likeliest tokens stay (Fan et al. 2018, arXiv 1805.04833); 0: all.
        top_p: then the smallest set of likeliest tokens that holds this share of the probability
            stays (nucleus, Holtzman et al. 2019, arXiv 1904.09751); 1.0: all.
    """
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]  # (batch, 1)
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p < 1.0:
        share, order = logits.softmax(-1).sort(dim=-1, descending=True)
        before = share.cumsum(-1) - share  # of the tokens likelier than this one
        unlikely = (before >= top_p).gather(1, order.argsort(-1))  # back in the vocabulary's order
        logits = logits.masked_fill(unlikely, -torch.inf)
    return logits


Options = ParamSpec("Options")
Written = TypeVar("Written")


def writing(
    write: Callable[Concatenate[Writer, Options], Written],
) -> Callable[Concatenate[Writer, Options], Written]:
    """Without gradients, and with weights that lie well for a few rows at a time."""

    @wraps(write)
    def inside(writer: Writer, *args: Options.args, **options: Options.kwargs) -> Written:
        with torch.inference_mode(), by_column(*writer.parts):
            written = write(writer, *args, **options)
        return tree_map(torch.clone, written)  # as tensors that training may read

    return inside


@writing
def sample(
    writer: Writer,
    rules: Rules,
    generator: torch.Generator | None = None,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Int[Tensor, "row written"]:
    """One text for each row, token by token, padded to `rules.max_tokens`.

    Args:
        writer: has written nothing yet.
        rules: when a text ends.
        generator: source of randomness, on the writer's device; not needed at temperature 0.
        temperature: logits are divided by it; 0 always takes the likeliest token.
        top_k: draw from this many likeliest tokens; 0: from all.
        top_p: draw from the likeliest tokens that hold this share of the probability.

    Raises:
        ConfigError: an option out of range.
    """
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ConfigError(
            "generation needs temperature >= 0, top_k >= 0 and 0 < top_p <= 1, got "
            f"temperature={temperature}, top_k={top_k}, top_p={top_p}"
        )
    logits = writer.next_logits(None)
    written = torch.full((len(logits), rules.max_tokens), rules.pad, device=logits.device)
    going = torch.ones(len(logits), dtype=torch.bool, device=logits.device)  # (row,)
    for place in range(rules.max_tokens):
        if place > 0:  # an ended row goes on reading padding; what it draws then is thrown away
            logits = writer.next_logits(written[:, place - 1])
        logits = rules.apply(logits, written[:, :place])
        if temperature == 0:
            token = logits.argmax(-1)  # (row,)
        else:
            share = filtered(logits / temperature, top_k, top_p).softmax(-1)
            token = torch.multinomial(share, 1, generator=generator).squeeze(1)
        written[:, place] = torch.where(going, token, written[:, place])
        going = going & (token != rules.end)
        if not going.any():
            break
    return written


class Best(NamedTuple):
    """Finished texts, the best first.

    Attributes:
        tokens: padded.
        scores: log-probability / length ** length_penalty; -inf where there is none.
    """

    tokens: Int[Tensor, "row best written"]
    scores: Float[Tensor, "row best"]

    def joined(self, tokens: Int[Tensor, "row more written"], scores: Tensor) -> "Best":
        """As many texts as before, the best of these and of others."""
        every = torch.cat((self.scores, scores), 1)
        scores, chosen = every.topk(self.scores.shape[1])
        return Best(_taken(torch.cat((self.tokens, tokens), 1), chosen), scores)


def _taken(tokens: Tensor, beams: Int[Tensor, "row chosen"]) -> Int[Tensor, "row chosen written"]:
    return tokens.gather(1, beams.unsqueeze(2).expand(-1, -1, tokens.shape[2]))


@writing
def beam_search(
    writer: Writer,
    rules: Rules,
    num_beams: int,
    *,
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
    num_best: int = 1,
) -> Best:
    """The likeliest texts that are found by following `num_beams` beginnings of each row.

    Args:
        writer: has written nothing yet.
        rules: when a text ends.
        num_beams: beginnings that are followed.
        length_penalty: 0 compares log-probabilities, 1 their mean over tokens; more prefers long
            texts.
        early_stopping: True: as soon as `num_beams` texts are finished; False: when the best
            beginning is no better than the worst finished text would be at this length; "never":
            at any length that it may still have.
        num_best: how many texts to return for each row.

    Raises:
        ConfigError: an option out of range.
    """
    if not 1 <= num_best <= num_beams:
        raise ConfigError(f"beam search gives 1 to num_beams = {num_beams} texts, got {num_best}")
    logits = writer.next_logits(None)
    rows, size = logits.shape
    first = torch.arange(rows, device=logits.device).unsqueeze(1) * num_beams  # (row, 1)
    every = first.div(num_beams, rounding_mode="floor").expand(-1, num_beams).flatten()
    writer.select(every)
    logits = logits[every]
    tokens = torch.full((rows, num_beams, rules.max_tokens), rules.pad, device=logits.device)
    total = logits.new_full((rows, num_beams), -torch.inf)
    total[:, 0] = 0.0  # all beams of a row are one beginning yet
    best = Best(tokens.clone(), total.new_full(total.shape, -torch.inf))
    going = torch.ones(rows, dtype=torch.bool, device=logits.device)  # its texts can get better
    for place in range(rules.max_tokens):
        if place > 0:
            logits = writer.next_logits(tokens[:, :, place - 1].flatten())
        nats = rules.apply(logits.log_softmax(-1), tokens[:, :, :place].flatten(0, 1))
        candidate = (total.unsqueeze(2) + nats.view(rows, num_beams, size)).flatten(1)
        score, at = candidate.topk(2 * num_beams)  # (row, candidate)
        parent, token = at // size, at % size
        longer = _taken(tokens, parent)
        longer[:, :, place] = token
        ended = (token == rules.end) | (place + 1 == rules.max_tokens)
        counts = ended & going.unsqueeze(1)
        counts[:, num_beams:] = False  # they only stand in for those that ended
        reached = score / (place + 1) ** length_penalty
        best = best.joined(longer, reached.masked_fill(~counts, -torch.inf))
        total, kept = score.masked_fill(ended, -torch.inf).topk(num_beams)
        tokens, parent = _taken(longer, kept), parent.gather(1, kept)
        worst = best.scores[:, -1]
        to_come = early_stopping == "never" and length_penalty > 0
        length = rules.max_tokens if to_come else place + 1
        going = going & (total[:, 0] / length**length_penalty > worst)
        if early_stopping is True:
            going = going & worst.isneginf()
        if not going.any():
            break
        writer.select((first + parent).flatten())
    return Best(best.tokens[:, :num_best], best.scores[:, :num_best])
