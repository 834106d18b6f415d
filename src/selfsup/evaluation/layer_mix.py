"""Which layer knows it: a linear classifier on a learned weighted sum of frozen layers.

Axes: items; layers; dim: width of a feature; classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from selfsup.evaluation.features import Array, as_features, labelled_features
from selfsup.evaluation.probes import Standardiser
from selfsup.randomness import Batches, Order

RATES = (1e-4, 1e-3, 1e-2, 1e-1)


@dataclass(frozen=True)
class LayerMix:
    """A linear classifier on a weighted sum of layers.

    Attributes:
        weights: share of every layer in the sum, adding up to 1: where the task's information lies.
        classes: the training labels that occur, ascending.
        rate: the learning rate that was best on the validation data.
        sweep: validation accuracy of every rate: at its edge, widen it.
    """

    weights: Float[np.ndarray, " layers"]
    classes: Int[Tensor, " classes"]
    head: Float[Tensor, "dim classes"] = field(repr=False)
    bias: Float[Tensor, " classes"] = field(repr=False)
    standardise: Standardiser = field(repr=False)
    rate: float
    sweep: dict[float, float]

    @property
    def valid_accuracy(self) -> float:
        """Share of validation items that the chosen rate got right."""
        return self.sweep[self.rate]

    def predict(
        self, layers: Float[Array, "items layers dim"] | Sequence[Array]
    ) -> Int[np.ndarray, " items"]:
        """The likeliest class of every item, as the training labels name it."""
        x = self.standardise(_stacked(layers)).float()
        share = torch.from_numpy(self.weights).to(x)
        logits = torch.einsum("ild,l->id", x, share) @ self.head + self.bias
        return self.classes[logits.argmax(1)].cpu().numpy()


def _stacked(layers: Array | Sequence[Array]) -> Array:
    """One array (items, layers, dim), also of one array (items, dim) per layer."""
    if isinstance(layers, np.ndarray | Tensor):
        return layers
    return torch.stack([as_features(layer) for layer in layers], dim=1)


@torch.inference_mode(False)
def fit_layer_mix(
    layers: Float[Array, "items layers dim"] | Sequence[Array],
    labels: Int[Array, " items"],
    valid_layers: Float[Array, "valid layers dim"] | Sequence[Array],
    valid_labels: Int[Array, " valid"],
    *,
    rates: Sequence[float] = RATES,
    steps: int = 500,
    batch_size: int = 256,
    seed: int = 0,
) -> LayerMix:
    """A softmax-weighted sum of all layers under a linear classifier, learned together.

    Yang et al. 2021 (SUPERB, arXiv 2105.01051), section 3: the weights start equal, the encoder is
    frozen, the learning rate is chosen on validation data. Mean over time and weighted sum commute,
    so every layer comes as its mean over the real frames (`masked_mean`). Deviation: a layer is
    centred and divided by one number, its root mean square, so that a weight tells of what a layer
    knows and not of how large its numbers are.

    Args:
        layers: pooled training features, or a sequence of one (items, dim) array per layer.
        labels: class numbers.
        valid_layers, valid_labels: chooses the rate; of equal ones that of the lower cross-entropy.
        rates: learning rates of Adam.
        steps: updates at every rate.
        batch_size: items per update.
        seed: decides the order of the items.

    Raises:
        DataError: no items, not as many labels as items, or features that are not finite.
    """
    known, names = labelled_features(_stacked(layers), labels)
    new, truth = labelled_features(_stacked(valid_layers), valid_labels)
    truth = truth.to(known.device)
    standardise = _layer_scale(known)
    x, x_valid = standardise(known).float(), standardise(new).float()
    classes, target = names.unique(return_inverse=True)
    batches = Batches(Order(len(x), seed), min(batch_size, len(x)))
    fits, sweep, ranking = {}, {}, {}
    for rate in sorted(rates):
        fits[rate] = _fit_mix(x, target, len(classes), rate, [batches[n] for n in range(steps)])
        logits = _mixed(x_valid, *fits[rate])
        sweep[rate] = float((classes[logits.argmax(1)] == truth).double().mean())
        # a label that no training item has is none of the classes, and counts for no rate
        right = (truth[:, None] == classes) * logits.log_softmax(1)
        ranking[rate] = sweep[rate], float(right.sum())
    best = max(ranking, key=ranking.__getitem__)
    mix, head, bias = fits[best]
    weights = mix.softmax(0).cpu().numpy()
    return LayerMix(weights, classes, head, bias, standardise, best, sweep)


def _layer_scale(features: Float[Tensor, "items layers dim"]) -> Standardiser:
    each = Standardiser.of(features)
    mean = each.mean
    rms = (features.double() - mean).square().mean((0, 2), keepdim=True)[0].sqrt()  # (layers, 1)
    rounding = torch.finfo(torch.float32).eps * mean.abs().amax(1, keepdim=True)
    return Standardiser(mean, torch.where(rms > rounding, rms, 1.0))


def _mixed(x: Tensor, mix: Tensor, head: Tensor, bias: Tensor) -> Float[Tensor, "items classes"]:
    return torch.einsum("ild,l->id", x, mix.softmax(0)) @ head + bias


def _fit_mix(
    x: Float[Tensor, "items layers dim"],
    target: Int[Tensor, " items"],
    num_classes: int,
    rate: float,
    batches: Sequence[np.ndarray],
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights before the softmax (layers,), head (dim, classes) and bias (classes,)."""
    sizes = ((x.shape[1],), (x.shape[2], num_classes), (num_classes,))
    parameters = [x.new_zeros(size).requires_grad_() for size in sizes]
    optimizer = torch.optim.Adam(parameters, lr=rate, fused=True)
    with torch.enable_grad():
        for numbers in batches:
            items = torch.from_numpy(numbers).to(x.device)
            optimizer.zero_grad()
            F.cross_entropy(_mixed(x[items], *parameters), target[items]).backward()
            optimizer.step()
    mix, head, bias = (parameter.detach() for parameter in parameters)
    return mix, head, bias
