"""Maths that several methods share: projection heads, moving averages, similarities."""

from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from selfsup.models.batch_norm import BatchNorm


def projection_head(dims: Sequence[int], last_norm: bool = False) -> nn.Sequential:
    """Linear layers with batch normalisation and ReLU between them.

    Args:
        dims: widths, input first: (512, 2048, 128) is one hidden layer.
        last_norm: also normalise the output, without factor and offset (SimSiam, MoCo v3).

    >>> projection_head((8, 16, 4))(torch.zeros(2, 8)).shape
    torch.Size([2, 4])
    """
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(dims[:-1]):
        layers += [nn.Linear(inputs, outputs, bias=False), BatchNorm(outputs), nn.ReLU()]
    layers.append(nn.Linear(dims[-2], dims[-1], bias=not last_norm))
    if last_norm:
        layers.append(BatchNorm(dims[-1], affine=False))
    return nn.Sequential(*layers)


def frozen(module: nn.Module) -> nn.Module:
    """The same module, out of the optimizer's reach: a teacher."""
    return module.requires_grad_(False)


@torch.no_grad()
def move_average(
    teacher: Iterable[nn.Parameter], student: Iterable[nn.Parameter], momentum: float
) -> None:
    """teacher = momentum * teacher + (1 - momentum) * student, for every parameter.

    Buffers are left alone: a teacher in training mode keeps the batch statistics of its own passes,
    and the student's would not fit its weights.
    """
    for slow, fast in zip(teacher, student, strict=True):
        slow.lerp_(fast, 1 - momentum)


def cosine_similarity(
    x: Float[Tensor, "*batch dim"], y: Float[Tensor, "*batch dim"]
) -> Float[Tensor, "*batch"]:
    """Cosine of the angle between pairs of vectors, in float32."""
    return F.cosine_similarity(x.float(), y.float(), dim=-1)


def target_deviation(features: Float[Tensor, "batch dim"]) -> Float[Tensor, ""]:
    """Mean over dimensions of the standard deviation of unit vectors, times sqrt(dim).

    1 for directions that are spread evenly, 0 for a collapsed network (Chen and He 2021, arXiv
    2011.10566, section 4.1).
    """
    unit = F.normalize(features.detach().float(), dim=1)
    return unit.std(0, unbiased=False).mean() * features.shape[1] ** 0.5
