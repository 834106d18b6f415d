"""VICReg against loops, NumPy and limits that can be told by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from selfsup.methods.regularized.vicreg import (
    Config,
    VICReg,
    squared_covariances,
    variance_hinge,
    vicreg_terms,
)
from selfsup.methods.views import NO_CHANGE
from selfsup.randomness import torch_generator

SMALL = Config(
    hidden_dim=16, projection_dim=6, views_a=NO_CHANGE, views_b=replace(NO_CHANGE, flip=1.0)
)


def embeddings(size: int, dim: int) -> tuple[Tensor, Tensor]:
    """Two views that agree in part; deviations lie on both sides of 1, means far from 0."""
    draw = torch_generator(0, "embeddings")
    common, *own = (torch.randn(size, dim, generator=draw) for _ in range(3))
    mix = torch.randn(dim, dim, generator=draw) + torch.eye(dim)
    stretch = torch.linspace(0.1, 1.0, dim)
    first, second = ((common + 0.5 * noise) @ mix * stretch + 3 for noise in own)
    return first, second


def slow_variance(embedding: np.ndarray) -> float:
    """Equations 1 and 2, one dimension after another."""
    size, dim = embedding.shape
    total = 0.0
    for j in range(dim):
        mean = sum(embedding[:, j]) / size
        variance = sum((x - mean) ** 2 for x in embedding[:, j]) / (size - 1)
        total += max(0.0, 1 - (variance + 1e-4) ** 0.5)
    return total / dim


def slow_covariance(embedding: np.ndarray) -> float:
    """Equations 3 and 4, one pair of dimensions after another."""
    size, dim = embedding.shape
    total = 0.0
    for i in range(dim):
        for j in range(dim):
            x, y = (embedding[:, k] - sum(embedding[:, k]) / size for k in (i, j))
            if i != j:
                total += (sum(x[b] * y[b] for b in range(size)) / (size - 1)) ** 2
    return total / dim


def slow_terms(first: np.ndarray, second: np.ndarray) -> tuple[float, float, float]:
    """Invariance, variance and covariance of two views, as the authors' code has them."""
    distances = [(x - y) ** 2 for x, y in zip(first.flat, second.flat, strict=True)]
    return (
        sum(distances) / len(distances),
        (slow_variance(first) + slow_variance(second)) / 2,
        slow_covariance(first) + slow_covariance(second),
    )


def terms(first: Tensor, second: Tensor) -> list[float]:
    return [term.item() for term in vicreg_terms(first, second)]


@pytest.mark.parametrize(("size", "dim"), [(2, 3), (9, 1), (12, 5), (5, 12)])
def test_terms_equal_loops(size, dim):
    pair = embeddings(size, dim)
    expected = slow_terms(*(z.double().numpy() for z in pair))
    np.testing.assert_allclose(terms(*pair), expected, rtol=2e-5, atol=1e-6)


def test_each_view_is_measured_as_numpy_does():
    for embedding in embeddings(40, 5):
        z = embedding.double().numpy()
        deviation = np.sqrt(z.var(0, ddof=1) + 1e-4)
        assert (deviation < 0.9).any()
        assert (deviation > 1.1).any()
        hinge = np.maximum(0, 1 - deviation).mean()
        assert variance_hinge(embedding).item() == pytest.approx(hinge, rel=1e-5)
        covariance = np.cov(z.T)
        np.fill_diagonal(covariance, 0)
        expected = np.square(covariance).sum() / 5
        assert squared_covariances(embedding).item() == pytest.approx(expected, rel=1e-5)


def test_gradient_equals_finite_differences():
    first, second = (x.requires_grad_() for x in embeddings(7, 3))
    weights = (25, 25, 1)
    sum(w * term for w, term in zip(weights, vicreg_terms(first, second), strict=True)).backward()

    def value(flat: np.ndarray) -> float:
        return float(np.dot(weights, slow_terms(*flat.reshape(2, 7, 3))))

    here = torch.stack([first, second]).detach().double().numpy().ravel()
    steps = 1e-5 * np.eye(len(here))
    expected = [(value(here + step) - value(here - step)) / 2e-5 for step in steps]
    got = torch.stack([first.grad, second.grad]).flatten()
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_equal_views_that_are_spread_and_uncorrelated_are_perfect(balanced):
    assert terms(balanced(8, 5), balanced(8, 5)) == [0, 0, 0]


def test_a_collapsed_embedding_has_only_a_variance_term():
    first, second = (torch.full((6, 4), 7.0, requires_grad=True) for _ in range(2))
    found = vicreg_terms(first, second)
    # not quite 1: epsilon counts as a variance of 1e-4
    torch.testing.assert_close(torch.stack(found), torch.tensor([0, 0.99, 0]), rtol=0, atol=1e-6)
    sum(found).backward()
    assert first.grad.isfinite().all()


def test_the_hinge_lets_go_where_the_deviation_is_1(balanced):
    unit = balanced(8, 3) * (7 / 8) ** 0.5  # of variance 1
    for factor in (0.1, 0.5, 0.9):
        expected = 1 - (factor**2 + 1e-4) ** 0.5
        assert variance_hinge(factor * unit).item() == pytest.approx(expected, abs=1e-6)
    wide = (2 * unit).requires_grad_()
    variance_hinge(wide).backward()
    assert not wide.grad.any()


def test_dimensions_that_say_the_same_have_all_covariances(balanced):
    same = balanced(8, 1).expand(8, 5) * (7 / 8) ** 0.5
    np.testing.assert_allclose(terms(same, same), (0, 0, 2 * 4), rtol=0, atol=1e-5)


def test_a_shift_of_one_view_costs_invariance_alone():
    first, _ = embeddings(12, 5)
    shift = torch.arange(5.0)
    moved, still = vicreg_terms(first + shift, first), vicreg_terms(first, first)
    assert moved[0].item() == pytest.approx((0 + 1 + 4 + 9 + 16) / 5, rel=1e-5)
    assert still[0] == 0
    torch.testing.assert_close(moved[1:], still[1:], rtol=1e-5, atol=1e-6)


def test_terms_are_float32_under_autocast():
    first, second = (x.bfloat16() for x in embeddings(12, 5))
    with torch.autocast("cpu", torch.bfloat16):
        got = vicreg_terms(first, second)
    assert {term.dtype for term in got} == {torch.float32}
    assert all(map(torch.equal, got, vicreg_terms(first.float(), second.float())))


def test_loss_is_the_formula_for_the_two_views(build, pictures):
    config = replace(SMALL, invariance_weight=3.0, variance_weight=0.5, covariance_weight=20.0)
    objective, image = build(VICReg, config).eval(), pictures()
    with torch.no_grad():
        objective.head[-1].weight.mul_(100)  # or every embedding would be nearly the same
    output = objective.loss({"image": image}, torch_generator(0, "loss"))
    views = [image / 255, image.flip(-1) / 255]
    with torch.no_grad():
        pair = [objective.head(objective.encoder({"image": view}).pooled) for view in views]
    expected = slow_terms(*(z.double().numpy() for z in pair))
    assert min(expected) > 0.01
    assert output.weight == 10
    assert output.loss.item() == pytest.approx(np.dot((3, 0.5, 20), expected), rel=1e-4)
    for name, term in zip(("invariance", "variance", "covariance"), expected, strict=True):
        assert output.metrics[name].item() == pytest.approx(term, rel=1e-4)
    unit = pair[0].double() / pair[0].double().norm(dim=1, keepdim=True)
    spread = unit.std(0, correction=0).mean() * 6**0.5
    assert output.metrics["target_deviation"].item() == pytest.approx(spread.item(), rel=1e-4)
    assert not any(metric.requires_grad for metric in output.metrics.values())


def test_defaults_are_the_papers():
    config = Config()
    weights = (config.invariance_weight, config.variance_weight, config.covariance_weight)
    assert weights == (25, 25, 1)


@pytest.mark.parametrize("term", ["invariance", "variance", "covariance"])
def test_wrong_values_are_named(term):
    with pytest.raises(ValueError, match=f"{term}_weight must be at least 0, got -1"):
        Config(**{f"{term}_weight": -1.0})
