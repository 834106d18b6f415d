"""Maths that several methods share: projection heads, teachers, similarities, collapse."""

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from selfsup.batch import Batch
from selfsup.models.batch_norm import BatchNorm
from selfsup.models.encoder import Features
from selfsup.objective import Output

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def projection_head(
    dims: Sequence[int], last_norm: bool = False, last_bias: bool = True
) -> nn.Sequential:
    """Linear layers with batch normalisation and ReLU between them.

    Args:
        dims: widths, input first: (512, 2048, 128) is one hidden layer.
        last_norm: also normalise the output, without factor and offset (SimSiam, MoCo v3).
        last_bias: the last layer has a bias, unless it is normalised.

    >>> projection_head((8, 16, 4))(torch.zeros(2, 8)).shape
    torch.Size([2, 4])
    """
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(dims[:-1]):
        layers += [nn.Linear(inputs, outputs, bias=False), BatchNorm(outputs), nn.ReLU()]
    layers.append(nn.Linear(dims[-2], dims[-1], bias=last_bias and not last_norm))
    if last_norm:
        layers.append(BatchNorm(dims[-1], affine=False))
    return nn.Sequential(*layers)


def frozen(module: AnyModule) -> AnyModule:
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


def soft_loss(
    student: Float[Tensor, "*item classes"],
    teacher: Float[Tensor, "*item classes"],
    temperature: float,
) -> Float[Tensor, "*item"]:
    """T^2 * KL(teacher || student) of the softened probabilities (nats), in float32.

    What a distilled student learns; T^2 keeps the size of the gradient (Hinton et al. 2015, arXiv
    1503.02531, section 2.1).
    """
    said = (teacher.float() / temperature).log_softmax(-1)
    guess = (student.float() / temperature).log_softmax(-1)
    return temperature**2 * F.kl_div(guess, said, reduction="none", log_target=True).sum(-1)


def target_deviation(features: Float[Tensor, "batch dim"]) -> Float[Tensor, ""]:
    """Mean over dimensions of the standard deviation of unit vectors, times sqrt(dim).

    1 for directions that are spread evenly, 0 for a collapsed network (Chen and He 2021, arXiv
    2011.10566, section 4.1).
    """
    unit = F.normalize(features.detach().float(), dim=1)
    return unit.std(0, unbiased=False).mean() * features.shape[1] ** 0.5


@torch.no_grad()
def alignment(x: Float[Tensor, "items dim"], y: Float[Tensor, "items dim"]) -> Float[Tensor, ""]:
    """Mean squared distance of two views of every item on the unit sphere; 0 is best.

    Wang and Isola 2020 (arXiv 2005.10242), section 4.1, with alpha = 2.
    """
    return (F.normalize(x.float(), dim=1) - F.normalize(y.float(), dim=1)).square().sum(1).mean()


@torch.no_grad()
def uniformity(x: Float[Tensor, "items dim"], t: float = 2.0) -> Float[Tensor, ""]:
    """Log of the mean over pairs of exp(-t * squared distance) on the unit sphere.

    0 where all items are one point, about -2 t on a sphere of many dimensions that is covered
    evenly; the lower the better. NaN for a single item. Wang and Isola 2020 (arXiv 2005.10242),
    section 4.1.
    """
    unit = F.normalize(x.float(), dim=1)
    with torch.autocast(x.device.type, enabled=False):  # it would round the cosines
        cosine = (unit @ unit.T).fill_diagonal_(-torch.inf)  # (items, items)
    if len(x) < 2:
        return cosine.new_tensor(math.nan)
    return (2 * t * (cosine - 1)).flatten().logsumexp(0) - math.log(len(x) * (len(x) - 1))


def view_diagnostics(
    first: Float[Tensor, "batch dim"], second: Float[Tensor, "batch dim"]
) -> dict[str, Tensor]:
    """Held-out metrics of methods with two views: do views meet, and do pictures keep apart?

    `uniformity` is the mean of both views', over the pictures of one batch and rank: batches of
    another size give slightly other values. Of a single picture there is only `alignment`.

    Args:
        first, second: projections of the online network, of any length; row i of both shows
            picture i.
    """
    found = {"alignment": alignment(first, second)}
    if len(first) > 1:
        found["uniformity"] = (uniformity(first) + uniformity(second)) / 2
    return found


def masked_loss(
    logits: Float[Tensor, "batch slot vocabulary"],
    target: Int[Tensor, "batch slot"],
    real: Bool[Tensor, "batch slot"],
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Mean cross entropy (nats) and accuracy over the real slots, in float32."""
    weight = real.flatten().float()
    total = weight.sum().clamp(min=1)
    loss = F.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), reduction="none")
    hit = (logits.detach().argmax(-1) == target).flatten().float()
    return (loss * weight).sum() / total, (hit * weight).sum() / total


def follows(batch: Batch) -> Bool[Tensor, "batch next"]:
    """True where a token and the one before it are real and of the same document.

    `next` is `time` - 1: every position that has another after it.

    >>> row = {"tokens": torch.tensor([[5, 6, 2, 7]]), "documents": torch.tensor([[0, 0, 0, 1]])}
    >>> follows(row).tolist()
    [[True, True, False]]
    """
    out = torch.ones_like(batch["tokens"][:, 1:], dtype=torch.bool)
    if "mask" in batch:
        out = batch["mask"][:, :-1] & batch["mask"][:, 1:]
    if "documents" in batch:
        out = out & (batch["documents"][:, :-1] == batch["documents"][:, 1:])
    return out


def token_scores(
    nats: Float[Tensor, " items"], real: Bool[Tensor, "batch next"]
) -> dict[str, Tensor]:
    """What `Scores.score` gives, of -log p of each token after the first, and which count."""
    nats = nats.view(real.shape)
    return {
        "log_probability": F.pad(torch.where(real, -nats, 0.0), (1, 0)),  # (batch, time)
        "scored": F.pad(real, (1, 0), value=False),
    }


def penalised(output: Output, *features: Features) -> Output:
    """Adds the losses and metrics of encoders, such as those of experts, to a method's own."""
    for found in features:
        if found.penalty is not None:
            metrics = {**output.metrics, **found.metrics}
            output = Output(output.loss + found.penalty, output.weight, metrics)
    return output
