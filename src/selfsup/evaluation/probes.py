"""What frozen features are worth to a linear model: probes on plain arrays.

Everything here takes features that an encoder has already given, so it knows no model and no file.

| question                                       | function                                        |
|------------------------------------------------|-------------------------------------------------|
| can a hyperplane read it off?                  | `fit_linear_probe`, `ridge_probe` for numbers   |
| from which layer?                              | `layer_mix.fit_layer_mix`                       |
| what would the input alone have given?         | `pca_features`                                  |

Whatever has to be chosen (regularisation, learning rate) is chosen on validation data; test data
only ever meet `predict`. Of equally good settings the more regularised one is taken. Arrays may be
NumPy's or torch's; work is done where the tensors are. What needs no fitting is in `similarity.py`.

Axes: items; dim: width of a feature; layers; classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from selfsup.evaluation.features import Array, as_features, labelled_features
from selfsup.evaluation.metrics import METRICS

STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
RIDGE_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)


@dataclass(frozen=True)
class Standardiser:
    """Subtracts the training items' mean and divides by their standard deviation."""

    mean: Float[Tensor, "*layers dim"]
    std: Float[Tensor, "*layers #dim"]

    @classmethod
    def of(cls, features: Float[Tensor, "items *layers dim"]) -> "Standardiser":
        """Fitted in float64; a feature that is constant but for rounding is only centred."""
        exact = features.double()
        mean, std = exact.mean(0), exact.std(0, unbiased=False)
        rounding = torch.finfo(torch.float32).eps * mean.abs()
        return cls(mean, torch.where(std > rounding, std, 1.0))

    def __call__(self, values: Array) -> Tensor:
        """Standardised features, float64."""
        return (as_features(values).to(self.mean.device).double() - self.mean) / self.std


@dataclass(frozen=True)
class LinearProbe:
    """A multinomial logistic regression on standardised features.

    Attributes:
        classes: the training labels that occur, ascending.
        weight, bias: of standardised features, float64.
        standardise: fitted on the training items.
        strength: the L2 penalty that was best on the validation data.
        sweep: validation accuracy of every strength: at its edge, widen it.
    """

    classes: Int[Tensor, " classes"]
    weight: Float[Tensor, "dim classes"]
    bias: Float[Tensor, " classes"]
    standardise: Standardiser = field(repr=False)
    strength: float
    sweep: dict[float, float]

    @property
    def valid_accuracy(self) -> float:
        """Share of validation items that the chosen strength got right."""
        return self.sweep[self.strength]

    def scores(self, features: Float[Array, "items dim"]) -> Float[np.ndarray, "items classes"]:
        """Probabilities, in the order of `classes`."""
        logits = self.standardise(features) @ self.weight + self.bias
        return logits.softmax(1).cpu().numpy()

    def predict(self, features: Float[Array, "items dim"]) -> Int[np.ndarray, " items"]:
        """The likeliest class of every item, as the training labels name it."""
        return self.classes.cpu().numpy()[self.scores(features).argmax(1)]


@torch.inference_mode(False)  # or a caller that encodes without gradients could fit nothing
def fit_linear_probe(
    train: Float[Array, "items dim"],
    train_labels: Int[Array, " items"],
    valid: Float[Array, "valid dim"],
    valid_labels: Int[Array, " valid"],
    strengths: Sequence[float] = STRENGTHS,
) -> LinearProbe:
    """The logistic regression of frozen features whose L2 penalty is best on validation data.

    Alain and Bengio 2016 (arXiv 1610.01644); the sweep as in Kornblith et al. 2019 (arXiv
    1805.08974). Minimises mean cross-entropy + strength / 2 * |weight|^2, so scikit-learn's C is
    1 / (strength * items). The path from the strongest penalty down is walked in float32, each
    step from where the last one ended; the chosen one is then finished in float64. There is no
    randomness.

    Raises:
        DataError: no items, not as many labels as items, or features that are not finite.
    """
    known, labels = labelled_features(train, train_labels)
    new, truth = labelled_features(valid, valid_labels)
    truth = truth.to(known.device)
    standardise = Standardiser.of(known)
    x, x_valid = standardise(known), standardise(new)
    coarse = x.float()
    classes, target = labels.unique(return_inverse=True)
    curvature = torch.linalg.eigh(x.T @ x / len(x))
    weight, bias = x.new_zeros(x.shape[1], len(classes)), x.new_zeros(len(classes))
    path, sweep = {}, {}
    for strength in sorted(strengths, reverse=True):
        weight, bias = _minimise(coarse, target, strength, weight, bias, curvature, 1e-5)
        guess = classes[(x_valid @ weight + bias).argmax(1)]
        path[strength], sweep[strength] = (weight, bias), float((guess == truth).double().mean())
    best = max(sweep, key=sweep.__getitem__)
    weight, bias = _minimise(x, target, best, *path[best], curvature, 1e-7)
    sweep[best] = float((classes[(x_valid @ weight + bias).argmax(1)] == truth).double().mean())
    return LinearProbe(classes, weight, bias, standardise, best, sweep)


def _minimise(
    x: Float[Tensor, "items dim"],
    target: Int[Tensor, " items"],
    strength: float,
    weight: Float[Tensor, "dim classes"],
    bias: Float[Tensor, " classes"],
    curvature: tuple[Tensor, Tensor],
    tolerance: float,
) -> tuple[Tensor, Tensor]:
    """Weight and bias, float64, at which no entry of the gradient exceeds the tolerance.

    Frozen features have spectra over many decades, on which L-BFGS crawls. It works here along the
    features' principal axes, each divided by the root of its curvature; the minimum is the same.
    """
    values, axes = curvature
    root = (values.clamp(min=0) / weight.shape[1] + strength).sqrt()
    basis = (axes / root).to(x.dtype)
    inner = (root[:, None] * (axes.T @ weight)).to(x.dtype).requires_grad_()
    offset = bias.to(x.dtype, copy=True).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [inner, offset],
        max_iter=1000,
        tolerance_grad=tolerance,
        tolerance_change=1e-4 * tolerance,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        outer = basis @ inner
        penalty = strength / 2 * outer.square().sum()
        loss = F.cross_entropy(x @ outer + offset, target) + penalty
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[arg-type]
    return (basis @ inner).detach().double(), offset.detach().double()


@dataclass(frozen=True)
class RidgeProbe:
    """A ridge regression on standardised features.

    Attributes:
        weight, bias: of standardised features, float64.
        standardise: fitted on the training items.
        strength: the L2 penalty that was best on the validation data.
        sweep: validation score of every strength: at its edge, widen it.
    """

    weight: Float[Tensor, " dim"]
    bias: float
    standardise: Standardiser = field(repr=False)
    strength: float
    sweep: dict[float, float]

    @property
    def valid_score(self) -> float:
        """Correlation of the chosen strength on the validation items."""
        return self.sweep[self.strength]

    def predict(self, features: Float[Array, "items dim"]) -> Float[np.ndarray, " items"]:
        """One number per item, in the targets' unit."""
        return (self.standardise(features) @ self.weight + self.bias).cpu().numpy()


def ridge_probe(
    train: Float[Array, "items dim"],
    train_targets: Float[Array, " items"],
    valid: Float[Array, "valid dim"],
    valid_targets: Float[Array, " valid"],
    strengths: Sequence[float] = RIDGE_STRENGTHS,
    metric: Literal["spearman", "pearson"] = "spearman",
) -> RidgeProbe:
    """The ridge regression of frozen features whose L2 penalty is best on validation data.

    Minimises mean squared error + strength * |weight|^2 in closed form; scikit-learn's alpha is
    strength * items.

    Raises:
        DataError: no items, not as many targets as items, or features that are not finite.
    """
    known, targets = labelled_features(train, train_targets)
    new, truth = labelled_features(valid, valid_targets)
    standardise = Standardiser.of(known)
    x, x_valid, y = standardise(known), standardise(new), targets.double()
    values, axes = torch.linalg.eigh(x.T @ x / len(x))
    projected = axes.T @ (x.T @ (y - y.mean())) / len(x)
    path, sweep = {}, {}
    for strength in sorted(strengths, reverse=True):
        path[strength] = axes @ (projected / (values.clamp(min=0) + strength))
        guess = x_valid @ path[strength] + y.mean()
        sweep[strength] = METRICS[metric](truth.tolist(), guess.tolist())
    best = max(sweep, key=sweep.__getitem__)
    return RidgeProbe(path[best], float(y.mean()), standardise, best, sweep)


def pca_features(
    train: Float[Array, "items inputs"], dim: int
) -> Callable[[Array], Float[np.ndarray, "_ dim"]]:
    """Principal components of raw inputs: what features without any learning would be.

    Args:
        train: one flat row per item, say its pixels; the components are fitted on these.
        dim: components; as many as items or inputs where those are fewer.

    Returns:
        a function from rows to their components.
    """
    from sklearn.decomposition import PCA

    rows = as_features(train).cpu().numpy()
    fitted = PCA(min(dim, *rows.shape), random_state=0).fit(rows)
    return lambda values: fitted.transform(as_features(values).cpu().numpy())
