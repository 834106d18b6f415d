"""The processes of one training: sums and concatenations over all ranks, with their gradients.

A method that compares the examples of a batch (negatives, batch statistics, cross-correlations)
must see the batch of all ranks, or two ranks would learn something else than one. Each function
does nothing when there is one process. The loop averages gradients over ranks; so that this average
is one rank's gradient, the backward pass of each function sums over ranks.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def count() -> int:
    """Number of ranks; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def number() -> int:
    """Number of this rank, from 0."""
    return dist.get_rank() if count() > 1 else 0


def total(x: Tensor) -> Tensor:
    """The sum over ranks of tensors of equal shape, with gradient."""
    return _Total.apply(x) if count() > 1 else x


def gather(x: Tensor) -> Tensor:
    """The rows of all ranks in rank order, (ranks * batch, ...), with gradient.

    Every rank brings the same number of rows.
    """
    return _Gather.apply(x) if count() > 1 else x


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = x.clone()
        dist.all_reduce(out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        out = gradients[0].clone()
        dist.all_reduce(out)
        return out


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(count())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        out = gradients[0].clone()
        dist.all_reduce(out)
        return out.chunk(count())[number()]
