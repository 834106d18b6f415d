"""Corruptions of text that an encoder-decoder learns to undo: BART's five, T5's spans, MASS's span.

`token_mask`, `token_deletion`, `text_infilling`, `sentence_permutation` and `document_rotation` are
those of Lewis et al., 2019 (arXiv 1910.13461, section 2.2); `sentinel_spans` is Raffel et al., 2019
(arXiv 1910.10683, section 3.1.4); `mass_spans` is Song et al., 2019 (arXiv 1905.02450).
The first five give new rows, and the rows before them are the target; the others give a `Pair`.

Axes: batch; time; written: tokens of a target; vocabulary. Real tokens come first in a row; what
stands behind them means nothing. `special` is True at the ids that are no text: [CLS], [SEP],
[MASK] and the like, but not the unknown token.

Where special tokens stand:
- They are never masked, deleted or part of a span. A span counts text tokens alone; what special
  tokens it meets stay, behind the token that replaces it.
- A special token at either end of a row keeps its place when sentences or the document move. Those
  inside move with the text, and a separator ends a sentence.

Deviations from the papers' code:
- Each row has exactly round(rate * its text tokens) chosen tokens, as in `masked_language`; BART's
  code rounds up.
- Spans of `text_infilling` never overlap, all their arrangements are equally likely, and a row does
  not grow: it has at most as many spans as chosen tokens, and the last takes what is left of them.
- `sentinel_spans` ends its target with the end token alone, as T5's code does: the paper's figure
  shows one sentinel more.
- A fragment of `mass_spans` begins anywhere with equal probability. The authors' code draws the two
  ends of a sentence more often.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Rows(NamedTuple):
    """Token ids, and which of them are real."""

    tokens: Int[Tensor, "batch time"]
    mask: Bool[Tensor, "batch time"]


class Pair(NamedTuple):
    """What is read, and what is to be written."""

    source: Rows
    target: Rows
    predicted: Bool[Tensor, "batch written"]  # of the target; a decoder is shown no others


def compacted(tokens: Int[Tensor, "batch time"], keep: Bool[Tensor, "batch time"]) -> Rows:
    """The tokens to keep, moved to the beginning of their row.

    >>> compacted(torch.tensor([[5, 6, 7]]), torch.tensor([[True, False, True]])).tokens.tolist()
    [[5, 7, 0]]
    """
    order = (~keep).byte().argsort(dim=1, stable=True)
    mask = _slots(tokens) < keep.sum(1, keepdim=True)
    return Rows(tokens.gather(1, order).masked_fill(~mask, 0), mask)


def drawn(
    candidates: Bool[Tensor, "batch time"],
    count: Int[Tensor, "batch 1"],
    generator: torch.Generator,
) -> Bool[Tensor, "batch time"]:
    """True at `count` of the candidates of each row, or at all where there are fewer."""
    key = _uniform(candidates, generator).masked_fill(~candidates, 2.0)
    return (key.argsort(1).argsort(1) < count) & candidates


def disguised(
    tokens: Int[Tensor, "batch time"],
    chosen: Bool[Tensor, "batch time"],
    mask_id: int,
    ordinary: Int[Tensor, " ordinary"],
    shares: tuple[float, float],
    generator: torch.Generator,
) -> Int[Tensor, "batch time"]:
    """The tokens with chosen ones masked, replaced or kept, as in BERT.

    Args:
        tokens: any.
        chosen: where something may change.
        mask_id: id of [MASK].
        ordinary: ids that replacements are drawn from.
        shares: of chosen tokens that become [MASK], and that become a random token.
        generator: source of randomness, on the device of `tokens`.
    """
    masked, random = shares
    draw = _uniform(tokens, generator)
    pick = torch.randint(len(ordinary), tokens.shape, generator=generator, device=tokens.device)
    changed = torch.where(draw < masked + random, ordinary[pick], tokens)
    changed = torch.where(draw < masked, mask_id, changed)
    return torch.where(chosen, changed, tokens)


def token_mask(
    rows: Rows,
    special: Bool[Tensor, " vocabulary"],
    mask_id: int,
    rate: float,
    generator: torch.Generator,
) -> Rows:
    """Random tokens become [MASK]."""
    text = _text(rows, special)
    chosen = drawn(text, _budget(text, rate), generator)
    return Rows(rows.tokens.masked_fill(chosen, mask_id), rows.mask)


def token_deletion(
    rows: Rows, special: Bool[Tensor, " vocabulary"], rate: float, generator: torch.Generator
) -> Rows:
    """Random tokens vanish; one of them always stays."""
    text = _text(rows, special)
    count = torch.minimum(_budget(text, rate), text.sum(1, keepdim=True) - 1)
    return compacted(rows.tokens, rows.mask & ~drawn(text, count, generator))


def text_infilling(
    rows: Rows,
    special: Bool[Tensor, " vocabulary"],
    mask_id: int,
    rate: float,
    span: float,
    generator: torch.Generator,
) -> Rows:
    """Spans, each of a length drawn from Poisson(span), become one [MASK] each.

    A span of no token is a [MASK] that is put in between.
    """
    text = _text(rows, special)
    slot, (size, time) = _slots(text), text.shape
    count, budget = text.sum(1, keepdim=True), _budget(text, rate)  # (batch, 1)
    num_slots = max(1, round(rate * time))  # of spans
    length = torch.poisson(torch.full((size, num_slots), span, device=text.device), generator)
    before = (length.cumsum(1) - length).long()  # tokens in the spans drawn before
    left = budget - before
    used = (slot[:num_slots] < budget) & (left > 0)
    length = torch.where(slot[:num_slots] == budget - 1, left, torch.minimum(length.long(), left))
    # Items of the new text: tokens that stay and spans, in random order.
    items = count - budget + used.sum(1, keepdim=True)
    order = _uniform(text, generator).masked_fill(slot >= items, 2.0).argsort(1)[:, :num_slots]
    is_span = torch.zeros_like(text).scatter(1, order, used)
    takes = torch.ones_like(rows.tokens).scatter(1, order, torch.where(used, length, 1))
    first = takes.cumsum(1) - takes  # number of the text token that an item begins with
    words = rows.tokens.gather(1, (~text).byte().argsort(dim=1, stable=True))  # text tokens alone
    words = words.gather(1, first.clamp(max=time - 1)).masked_fill(is_span, mask_id)
    # Special tokens stand behind all items that begin before them, the last ones behind all.
    passed = text.cumsum(1)  # text tokens before a special token
    place = torch.where(passed < count, 2 * passed - 1, 2 * passed + 1)
    key = torch.cat((2 * first, place), 1)
    real = torch.cat((slot < items, rows.mask & ~text), 1)  # (batch, 2 * time)
    order = key.masked_fill(~real, 4 * time).argsort(dim=1, stable=True)[:, :time]
    mask = slot < real.sum(1, keepdim=True)
    tokens = torch.cat((words, rows.tokens), 1).gather(1, order)
    return Rows(tokens.masked_fill(~mask, 0), mask)


def sentence_permutation(
    rows: Rows,
    special: Bool[Tensor, " vocabulary"],
    ends: Bool[Tensor, " vocabulary"],
    generator: torch.Generator,
) -> Rows:
    """The sentences of a row in random order; a sentence goes up to the last of its end marks.

    Args:
        rows: any.
        special: see the module's docstring.
        ends: True at ids that end a sentence.
        generator: source of randomness.
    """
    inside = _inside(rows, special)
    mark = ends[rows.tokens] & inside
    last = mark & ~F.pad(mark[:, 1:], (0, 1))
    number = last.cumsum(1) - last.long()  # of the sentence
    key = _uniform(inside, generator).gather(1, number)
    slot = _slots(inside)
    key = torch.where(inside, key, torch.where(slot == 0, -1.0, 2.0)).masked_fill(~rows.mask, 3.0)
    return Rows(rows.tokens.gather(1, key.argsort(dim=1, stable=True)), rows.mask)


def document_rotation(
    rows: Rows, special: Bool[Tensor, " vocabulary"], generator: torch.Generator
) -> Rows:
    """The text begins at a token that is chosen uniformly, and what was before it comes last."""
    inside = _inside(rows, special)
    slot, size = _slots(inside), inside.sum(1, keepdim=True)
    first = (rows.mask & ~inside)[:, :1].long()  # 1 behind a special token
    chosen = (_uniform(first, generator) * size).long()  # (batch, 1)
    moved = (slot - first + chosen) % size.clamp(min=1) + first
    return Rows(rows.tokens.gather(1, torch.where(inside, moved, slot)), rows.mask)


def span_counts(
    count: Int[Tensor, "*rows"], rate: float, span: float
) -> tuple[Int[Tensor, "*rows"], Int[Tensor, "*rows"]]:
    """How many of `count` tokens T5 hides, and in how many spans of mean length `span`.

    >>> [int(n) for n in span_counts(torch.tensor(512), 0.15, 3.0)]
    [77, 26]
    """
    hidden = torch.minimum((count * rate).round().clamp(min=1), count - 1).clamp(min=0)
    spans = torch.minimum((hidden / span).round().clamp(min=1), hidden)
    return hidden.long(), torch.minimum(spans, count - hidden).long()


def sentinel_spans(
    rows: Rows,
    special: Bool[Tensor, " vocabulary"],
    sentinels: Int[Tensor, " sentinels"],
    end: int,
    rate: float,
    span: float,
    generator: torch.Generator,
) -> Pair:
    """Spans are replaced by sentinels; the target is each sentinel and its span, then the end.

    A row of n text tokens has exactly round(rate * n) hidden tokens in exactly round(that / span)
    spans, at least one; between two spans and before the first there is at least one token, and the
    last span ends the row, as in T5's code.

    Args:
        rows: any.
        special: see the module's docstring.
        sentinels: ids, at least as many as `span_counts` says for a whole row.
        end: id that ends the target.
        rate: share of hidden tokens.
        span: mean length.
        generator: source of randomness.
    """
    text, time = _text(rows, special), rows.tokens.shape[1]
    count = text.sum(1, keepdim=True)
    hidden, spans = span_counts(count, rate, span)  # (batch, 1)
    lengths = _segments(hidden, spans, time, generator)  # (batch, time)
    starts = (lengths + _segments(count - hidden, spans, time, generator)).cumsum(1) - lengths
    used = (_slots(text) < spans).long()
    change = torch.zeros_like(F.pad(rows.tokens, (0, 1)))  # (batch, time + 1)
    start, stop = starts.clamp(max=time), (starts + lengths).clamp(max=time)
    change = change.scatter_add(1, start, used)
    inner = change.scatter_add(1, stop, -used).cumsum(1)  # 1 within a span
    rank = (text.cumsum(1) - 1).clamp(min=0)  # number of a text token
    noise = (inner.gather(1, rank) > 0) & text
    begins = (change.gather(1, rank) > 0) & text
    number = begins.cumsum(1) - 1  # of the span
    mark = sentinels[number.clamp(min=0)]
    source = compacted(torch.where(begins, mark, rows.tokens), rows.mask & (~noise | begins))
    width = 1 + sum(int(most) for most in span_counts(torch.tensor(time), rate, span))
    place = noise.cumsum(1) + number  # in the target
    target = torch.zeros_like(rows.tokens[:, :1]).repeat(1, width + 1)  # the last column is waste
    target = target.scatter(1, torch.where(noise, place, width), rows.tokens)
    target = target.scatter(1, torch.where(begins, place - 1, width), mark)
    target = target.scatter(1, hidden + spans, end)[:, :width]
    mask = _slots(target) <= hidden + spans
    return Pair(source, Rows(target, mask), mask)


def mass_spans(
    rows: Rows,
    special: Bool[Tensor, " vocabulary"],
    mask_id: int,
    ordinary: Int[Tensor, " ordinary"],
    rate: float,
    shares: tuple[float, float],
    generator: torch.Generator,
) -> Pair:
    """One fragment of a row is disguised and has to be written; the rest is in the source alone.

    Args:
        rows: any.
        special: see the module's docstring.
        mask_id: id of [MASK].
        ordinary: ids that replacements are drawn from.
        rate: share of the row's text in the fragment.
        shares: see `disguised`.
        generator: source of randomness.
    """
    text = _text(rows, special)
    count, size = text.sum(1, keepdim=True), _budget(text, rate).clamp(min=1)
    start = (_uniform(count, generator) * (count - size + 1)).long()  # (batch, 1)
    rank = text.cumsum(1) - 1
    fragment = text & (rank >= start) & (rank < start + size)
    source = disguised(rows.tokens, fragment, mask_id, ordinary, shares, generator)
    return Pair(Rows(source, rows.mask), rows, fragment)


def _slots(like: Tensor) -> Int[Tensor, " time"]:
    return torch.arange(like.shape[1], device=like.device)


def _uniform(like: Tensor, generator: torch.Generator) -> Float[Tensor, "batch time"]:
    return torch.rand(like.shape, generator=generator, device=like.device)


def _text(rows: Rows, special: Tensor) -> Bool[Tensor, "batch time"]:
    """What may be chosen."""
    return rows.mask & ~special[rows.tokens]


def _inside(rows: Rows, special: Tensor) -> Bool[Tensor, "batch time"]:
    """What may move: all but a special token at either end."""
    slot, last = _slots(rows.tokens), rows.mask.sum(1, keepdim=True) - 1
    return rows.mask & ~(special[rows.tokens] & ((slot == 0) | (slot == last)))


def _budget(text: Tensor, rate: float) -> Int[Tensor, "batch 1"]:
    return (text.sum(1, keepdim=True) * rate).round().long()


def _segments(
    items: Int[Tensor, "batch 1"],
    segments: Int[Tensor, "batch 1"],
    width: int,
    generator: torch.Generator,
) -> Int[Tensor, "batch width"]:
    """Lengths of so many random segments, none empty, that items in a row are cut into."""
    slot = torch.arange(width, device=items.device).expand(len(items), -1)
    cut = drawn(slot < items - 1, segments - 1, generator)  # behind an item
    number = F.pad(cut.cumsum(1)[:, :-1], (1, 0))  # of the segment, by item
    return torch.zeros_like(slot).scatter_add(1, number, (slot < items).long())
