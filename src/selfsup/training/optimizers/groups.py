"""What every optimizer shares: which parameters it moves, how fast, and in which precision."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters: matrices, which are decayed, apart from vectors, which are not.

    Biases, norms and other vectors are not decayed, as in BERT and GPT-2. A parameter that has the
    attribute `lr_scale` learns at that many times the rate; each such group says it too. What is
    spread over ranks in different ways, or not at all, cannot be moved in one operation.
    """
    by_kind: dict[tuple[float, Any], list[nn.Parameter]] = {}
    for parameter in module.parameters():
        if parameter.requires_grad:
            kind = getattr(parameter, "lr_scale", 1.0), getattr(parameter, "device_mesh", None)
            by_kind.setdefault(kind, []).append(parameter)
    return [
        {"params": part, "weight_decay": decay, "lr_scale": scale}
        for (scale, _), trained in by_kind.items()
        for part, decay in (
            ([p for p in trained if p.ndim >= 2], weight_decay),
            ([p for p in trained if p.ndim < 2], 0.0),
        )
    ]


def moving(group: dict[str, Any]) -> list[nn.Parameter]:
    """The parameters of a group that have a gradient in this step, and any content."""
    return [p for p in group["params"] if p.grad is not None and p.numel()]


@contextmanager
def wide(parameters: list[nn.Parameter]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Values, to be changed in place, and gradients: float32, or wider where they are.

    Values of narrower parameters are copies; these parameters get them back rounded.
    """
    types = [torch.promote_types(p.dtype, torch.float32) for p in parameters]
    values = [p.detach().to(dtype) for p, dtype in zip(parameters, types, strict=True)]
    gradients = [
        p.grad.to(v.dtype) for p, v in zip(parameters, values, strict=True) if p.grad is not None
    ]
    yield values, gradients
    for parameter, value in zip(parameters, values, strict=True):
        if parameter.dtype != value.dtype:
            parameter.copy_(value)


def zeros(parameter: nn.Parameter, *shape: int) -> Tensor:
    """A moment before the first step: float32 or wider; of the parameter's shape unless told."""
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    like = parameter.detach()
    return like.new_zeros(shape, dtype=dtype) if shape else torch.zeros_like(like, dtype=dtype)


def trust_ratios(values: list[Tensor], updates: list[Tensor], trust: float = 1.0) -> list[Tensor]:
    """`trust` times the length of each value over that of its update; 1 where either is 0."""
    weights, lengths = (torch.stack(torch._foreach_norm(part)) for part in (values, updates))
    ratios = torch.where((weights > 0) & (lengths > 0), trust * weights / lengths, 1.0)
    return list(ratios.unbind())
