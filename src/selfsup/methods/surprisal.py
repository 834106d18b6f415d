"""How surprising tokens are: projection onto the vocabulary and cross entropy in one.

The scores of all tokens at all positions are the largest thing in a language model's step. They
are computed for some positions at a time, and turned into the gradient at once, while they are at
hand: nothing of that size is kept, filled or read again. (The idea of "Cut Your Losses in
Large-Vocabulary Language Models", Wijmans et al. 2024, arXiv 2411.09009, without its kernels.)

Axes: items: positions that predict; dim; vocabulary.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from selfsup.models.vocabulary_head import Projection

MAX_LOGITS = {"cpu": 2**24}  # held at once: 64 MiB in float32, which the caches like
MAX_LOGITS_ELSEWHERE = 2**27


class Surprisal(NamedTuple):
    """What `surprisal` gives.

    Attributes:
        loss: the weighted sum of `nats`, the only one with a gradient.
        nats: (items,) -log p(target), float32.
        hit: (items,) whether no token was likelier than the target.
    """

    loss: Float[Tensor, ""]
    nats: Float[Tensor, " items"]
    hit: Bool[Tensor, " items"]


def mean_surprisal(
    projection: Projection, target: Int[Tensor, "*items"], real: Bool[Tensor, "*items"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Mean cross entropy (nats) and accuracy over the real items, in float32."""
    total = real.sum().clamp(min=1)
    found = surprisal(projection, target, real / total)
    return found.loss, (found.hit & real.flatten()).sum() / total


def surprisal(
    projection: Projection, target: Int[Tensor, "*items"], share: Float[Tensor, "*items"]
) -> Surprisal:
    """The cross entropy of every item, and their weighted sum.

    Args:
        projection: (*items, dim) hidden states, and what turns them into logits.
        target: token ids.
        share: the items' weights in the loss; no gradient reaches them.
    """
    hidden, weight, bias = projection
    hidden = hidden.flatten(0, -2)
    limit = MAX_LOGITS.get(hidden.device.type, MAX_LOGITS_ELSEWHERE)
    size = max(1, limit // len(weight))
    return Surprisal(
        *_Surprisal.apply(hidden, weight, bias, target.flatten(), share.flatten(), size)
    )


class _Surprisal(torch.autograd.Function):
    """The gradient is made on the way forward, for a loss of gradient 1."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Float[Tensor, "items dim"],
        weight: Float[Tensor, "vocabulary dim"],
        bias: Float[Tensor, " vocabulary"] | None,
        target: Int[Tensor, " items"],
        share: Float[Tensor, " items"],
        size: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        table = weight.to(dtype)
        offset = None if bias is None else bias.to(dtype)
        needed = ctx.needs_input_grad[:3]
        exact = torch.promote_types(torch.float32, hidden.dtype)  # float32, float64 in tests
        nats, hit = hidden.new_empty(len(hidden), dtype=exact), torch.empty_like(target).bool()
        share = share.to(exact)
        gradients = [
            torch.empty_like(hidden) if needed[0] else None,
            torch.zeros_like(weight) if needed[1] else None,
            torch.zeros_like(bias) if bias is not None and needed[2] else None,
        ]
        with torch.autocast(kind, enabled=False):
            for start in range(0, len(hidden), size):
                piece = slice(start, start + size)
                read = hidden[piece].to(dtype)
                scores = F.linear(read, table, offset).to(exact)  # (piece, vocabulary)
                right = target[piece].unsqueeze(1)
                of_target, top = scores.gather(1, right), scores.amax(-1, keepdim=True)
                hit[piece] = (of_target == top).squeeze(1)
                shares = scores.sub_(top).exp_()  # of the probability, but for a factor
                total = shares.sum(-1)
                nats[piece] = total.log() + (top - of_target).squeeze(1)
                if not any(needed):
                    continue
                shares.mul_((share[piece] / total).unsqueeze(1))
                shares.scatter_add_(1, right, -share[piece].unsqueeze(1))
                _add(gradients, piece, shares, read, table)
        ctx.gradients = gradients
        ctx.mark_non_differentiable(nats, hit)
        return (nats * share).sum(), nats, hit

    @staticmethod
    def backward(ctx: Any, outer: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        # ours alone, so it may be scaled in place
        scaled = [g if g is None else g.mul_(outer) for g in ctx.gradients]
        ctx.gradients = None
        return *scaled, None, None, None


def _add(
    gradients: list[Tensor | None],
    piece: slice,
    of_scores: Float[Tensor, "piece vocabulary"],
    read: Float[Tensor, "piece dim"],
    table: Float[Tensor, "vocabulary dim"],
) -> None:
    """Adds what some items give to the gradients of hidden states, weights and bias."""
    of_hidden, of_weight, of_bias = gradients
    if of_bias is not None:
        of_bias += of_scores.sum(0)
    of_scores = of_scores.to(table.dtype)
    if of_hidden is not None:
        of_hidden[piece] = of_scores @ table
    if of_weight is not None and of_weight.dtype == table.dtype:
        of_weight.addmm_(of_scores.T, read)
    elif of_weight is not None:
        of_weight += of_scores.T @ read
