"""Masks of consecutive positions: the spans that methods on sound and on series hide.

`span_mask` draws a number of spans per row, as wav2vec 2.0 does (Baevski et al., 2020, arXiv
2006.11477, appendix A; fairseq's `compute_mask_indices`): the number is set beforehand, only its
fraction is left to chance, and starts are drawn without replacement. `begun_spans` lets every
position begin a span on its own, as in BEST-RQ (Chiu et al., 2022, arXiv 2202.01855).

Axes: batch; time: positions of the model, or frames. The real positions of a row come first.

Deviations from fairseq:
- A span may end at the last real position; there it never covers that one.
- A row that is shorter than a span has none; there its spans become shorter.
- Rows may have unequal numbers of masked positions; there spans are thinned out to the fewest.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool
from torch import Tensor


def span_mask(
    real: Bool[Tensor, "batch time"],
    rate: float,
    span: int,
    generator: torch.Generator,
    min_masks: int = 0,
    overlap: bool = True,
) -> Bool[Tensor, "batch time"]:
    """True at the positions of spans that lie within the real part of each row.

    A row of n real positions has floor(rate * n / span + u) spans, u uniform in [0, 1): on average
    rate * n / span, and no more than there is room for.

    Args:
        real: True at real positions.
        rate: share of positions that the spans would cover if none overlapped.
        span: positions in a span.
        generator: source of randomness, on the device of `real`.
        min_masks: least number of spans in a row that has room for them.
        overlap: whether spans may cover each other. If not, all arrangements are equally likely,
            and rows that have room cover `rate` of their positions on average.

    >>> real = torch.ones(1, 20, dtype=torch.bool)
    >>> int(span_mask(real, 0.5, 5, torch.Generator(), overlap=False).sum())
    10
    """
    device, time = real.device, real.shape[1]
    length = real.sum(1, keepdim=True)  # (batch, 1)
    chance = torch.rand(len(real), 1, generator=generator, device=device)
    count = (length * (rate / span) + chance).floor().long().clamp(min=min_masks)
    if overlap:
        places = length - span + 1  # where a span may begin
        count = count.clamp(max=places.clamp(min=0))
    else:  # each span but for its start is taken out of the row, and put back behind its start
        count = torch.minimum(count, length // span)
        places = length - count * (span - 1)
    slot = torch.arange(time, device=device)
    key = torch.rand(real.shape, generator=generator, device=device)
    order = key.masked_fill(slot >= places, 2.0).argsort(1)  # places in random order, then the rest
    begins = torch.zeros_like(real).scatter(1, order, slot < count)
    if not overlap:
        moved = slot + (begins.cumsum(1) - 1).clamp(min=0) * (span - 1)  # (batch, time)
        moved = moved.clamp(max=time - 1)  # a place that goes beyond the row is no start
        begins = torch.zeros_like(order).scatter_add(1, moved, begins.long()) > 0
    return covered(begins, span)


def begun_spans(
    real: Bool[Tensor, "batch time"], probability: float, span: int, generator: torch.Generator
) -> Bool[Tensor, "batch time"]:
    """True at real positions of spans that begin anywhere with equal probability.

    A span may overlap others and may reach beyond the row's end, which cuts it. After the first
    `span` positions a share of 1 - (1 - probability) ** span is covered.

    Args:
        real: True at real positions.
        probability: of a span to begin at a position.
        span: positions in a span.
        generator: source of randomness, on the device of `real`.
    """
    key = torch.rand(real.shape, generator=generator, device=real.device)
    return covered(key < probability, span) & real


def covered(begins: Bool[Tensor, "batch time"], span: int) -> Bool[Tensor, "batch time"]:
    """True at each beginning and the `span` - 1 positions behind it.

    >>> covered(torch.tensor([[False, True, False, False, True]]), 2)[0].tolist()
    [False, True, True, False, True]
    """
    so_far = begins.cumsum(1)  # spans begun up to here
    over = F.pad(so_far, (span, 0))[:, : begins.shape[1]]  # those that have ended before here
    return so_far > over
