"""The processes of one training: who they are, and sums and concatenations over them.

`torchrun --nproc-per-node N -m selfsup pretrain ...` starts N of them. A method that compares the
examples of a batch (negatives, batch statistics, cross-correlations) must see the batch of all
ranks, or two ranks would learn something else than one. Each function does nothing when there is
one process. The loop averages gradients over ranks; so that this average is one rank's gradient,
the backward pass of each function sums over ranks.

With tensor parallelism several processes compute one batch together; `count` and `number` are of
those that have batches of their own.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class _State:
    """What this process knows of the others."""

    group: Any = None  # those that have batches of their own; None: all
    alone: bool = False


_state = _State()


def launched() -> bool:
    """Whether torchrun, or what sets the same variables, started several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def first() -> bool:
    """Whether this process writes files and speaks: the first of all, or the only one."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return not launched() or os.environ.get("RANK") == "0"


def world() -> int:
    """Number of processes that train together; 1 without torch.distributed."""
    joined = dist.is_available() and dist.is_initialized() and not _state.alone
    return dist.get_world_size() if joined else 1


def count() -> int:
    """Number of ranks: of processes that have batches of their own."""
    return dist.get_world_size(_state.group) if world() > 1 else 1


def number() -> int:
    """Number of this rank, from 0."""
    return dist.get_rank(_state.group) if count() > 1 else 0


def set_group(group: Any) -> None:
    """The processes that have batches of their own; None: all of them."""
    _state.group = group


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process is one of one: what all compute alike needs no sums."""
    before, _state.alone = _state.alone, True
    try:
        yield
    finally:
        _state.alone = before


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
        dist.all_reduce(out, group=_state.group)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        out = gradients[0].clone()
        dist.all_reduce(out, group=_state.group)
        return out


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(count())]
        dist.all_gather(parts, x.contiguous(), group=_state.group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        out = gradients[0].clone()
        dist.all_reduce(out, group=_state.group)
        return out.chunk(count())[number()]
