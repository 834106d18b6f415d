"""Barlow Twins against loops, NumPy and limits that can be told by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from selfsup.methods.regularized.barlow_twins import (
    BarlowTwins,
    Config,
    cross_correlation,
    distance_to_identity,
)
from selfsup.methods.views import NO_CHANGE
from selfsup.randomness import torch_generator

SMALL = Config(
    hidden_dim=16, projection_dim=6, views_a=NO_CHANGE, views_b=replace(NO_CHANGE, flip=1.0)
)


def embeddings(size: int, dim: int) -> tuple[Tensor, Tensor]:
    """Two views that agree in part, with dimensions that do as well, far from zero."""
    draw = torch_generator(0, "embeddings")
    common, *own = (torch.randn(size, dim, generator=draw) for _ in range(3))
    mix = torch.randn(dim, dim, generator=draw)
    first, second = ((common + 0.5 * noise) @ mix + 3 for noise in own)
    return first, second


def slow_correlation(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Equation 2, one entry after another, with 1e-5 added to each variance."""
    size, dim = first.shape
    out = np.zeros((dim, dim))
    for i in range(dim):
        for j in range(dim):
            x, y = first[:, i] - sum(first[:, i]) / size, second[:, j] - sum(second[:, j]) / size
            product = sum(x[b] * y[b] for b in range(size)) / size
            spreads = [sum(z[b] ** 2 for b in range(size)) / size + 1e-5 for z in (x, y)]
            out[i, j] = product / np.sqrt(spreads[0] * spreads[1])
    return out


def slow_terms(matrix: np.ndarray) -> tuple[float, float]:
    """The two sums of equation 1, one entry after another."""
    on = off = 0.0
    for i in range(len(matrix)):
        for j in range(len(matrix)):
            if i == j:
                on += (1 - matrix[i, j]) ** 2
            else:
                off += matrix[i, j] ** 2
    return on, off


def terms(first: Tensor, second: Tensor) -> tuple[float, float]:
    on, off = distance_to_identity(cross_correlation(first, second))
    return on.item(), off.item()


@pytest.mark.parametrize(("size", "dim"), [(2, 3), (9, 1), (12, 5), (5, 12)])
def test_terms_equal_loops(size, dim):
    first, second = embeddings(size, dim)
    matrix = cross_correlation(first, second)
    expected = slow_correlation(first.double().numpy(), second.double().numpy())
    np.testing.assert_allclose(matrix, expected, rtol=0, atol=2e-6)
    np.testing.assert_allclose(terms(first, second), slow_terms(expected), rtol=1e-5, atol=1e-6)


def test_matrix_holds_pearson_correlations_with_rows_of_the_first_view():
    first, second = embeddings(40, 5)
    expected = np.corrcoef(first.double().T, second.double().T)[:5, 5:]
    np.testing.assert_allclose(cross_correlation(first, second), expected, rtol=0, atol=2e-5)
    assert abs(expected - expected.T).max() > 0.1, "a transposed matrix must not pass"


def test_gradient_equals_finite_differences():
    first, second = (x.requires_grad_() for x in embeddings(7, 3))
    on, off = distance_to_identity(cross_correlation(first, second))
    (on + 0.3 * off).backward()

    def value(flat: np.ndarray) -> float:
        on, off = slow_terms(slow_correlation(*flat.reshape(2, 7, 3)))
        return on + 0.3 * off

    here = torch.stack([first, second]).detach().double().numpy().ravel()
    steps = 1e-5 * np.eye(len(here))
    expected = [(value(here + step) - value(here - step)) / 2e-5 for step in steps]
    got = torch.stack([first.grad, second.grad]).flatten()
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


def test_equal_views_without_redundancy_are_perfect(balanced):
    on, off = terms(balanced(8, 5), balanced(8, 5))
    assert on < 1e-9
    assert off < 1e-9


def test_a_constant_embedding_correlates_with_nothing():
    first = torch.full((6, 4), 7.0, requires_grad=True)
    on, off = distance_to_identity(cross_correlation(first, torch.full((6, 4), -2.0)))
    assert (on.item(), off.item()) == (4.0, 0.0)
    (on + off).backward()
    assert first.grad.isfinite().all()


def test_dimensions_that_say_the_same_are_all_off_the_diagonal(balanced):
    same = balanced(8, 1).expand(8, 5)
    np.testing.assert_allclose(terms(same, same), (0, 5 * 4), rtol=0, atol=1e-3)


def test_opposite_views_are_worse_than_unrelated_ones(balanced):
    np.testing.assert_allclose(terms(balanced(8, 3), -balanced(8, 3)), (4 * 3, 0), atol=1e-3)
    unrelated = balanced(8, 7)[:, 4:]
    np.testing.assert_allclose(terms(balanced(8, 3), unrelated), (3, 0), atol=1e-6)


def test_only_directions_count():
    first, second = embeddings(12, 5)
    stretch = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    got = cross_correlation(first * stretch - 4, 10 * second + stretch)
    torch.testing.assert_close(got, cross_correlation(first, second), rtol=0, atol=1e-4)


def test_matrix_is_float32_under_autocast():
    first, second = (x.bfloat16() for x in embeddings(12, 5))
    with torch.autocast("cpu", torch.bfloat16):
        got = cross_correlation(first, second)
    assert got.dtype == torch.float32
    assert torch.equal(got, cross_correlation(first.float(), second.float()))


def test_loss_is_the_formula_for_the_two_views(build, pictures):
    objective = build(BarlowTwins, replace(SMALL, redundancy_weight=0.3, scale=0.024)).eval()
    image = pictures()
    output = objective.loss({"image": image}, torch_generator(0, "loss"))
    views = [image / 255, image.flip(-1) / 255]
    with torch.no_grad():
        pair = [objective.head(objective.encoder({"image": view}).pooled) for view in views]
    on, off = slow_terms(slow_correlation(*(z.double().numpy() for z in pair)))
    assert output.weight == 10
    assert output.loss.item() == pytest.approx(0.024 * (on + 0.3 * off), rel=1e-4)
    assert output.metrics["on_diagonal"].item() == pytest.approx(on, rel=1e-4)
    assert output.metrics["off_diagonal"].item() == pytest.approx(off, rel=1e-4)
    unit = pair[0].double() / pair[0].double().norm(dim=1, keepdim=True)
    spread = unit.std(0, correction=0).mean() * 6**0.5
    assert output.metrics["target_deviation"].item() == pytest.approx(spread.item(), rel=1e-4)
    assert not any(metric.requires_grad for metric in output.metrics.values())


def test_defaults_are_the_papers():
    config = Config()
    assert (config.redundancy_weight, config.scale) == (0.0051, 1.0)


@pytest.mark.parametrize(("name", "value"), [("redundancy_weight", -0.1), ("scale", 0.0)])
def test_wrong_values_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .*, got {value}"):
        Config(**{name: value})
