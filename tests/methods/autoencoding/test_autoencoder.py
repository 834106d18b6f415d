"""Autoencoders: damage, errors against loops, missing values, and what the encoder is shown."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from selfsup.batch import Batch, ImageSpec, SeriesSpec, TableSpec, Vocabulary
from selfsup.errors import ConfigError
from selfsup.methods.autoencoding.autoencoder import (
    Autoencoder,
    Config,
    damaged,
    mean_errors,
    squared_errors,
)
from selfsup.models.encoder import Encoder, Features
from selfsup.objective import Reconstructs
from selfsup.randomness import isolated, seed_layers, torch_generator

ROWS = TableSpec(columns=("age", "city"), source=(0, 1, 1))
SERIES = SeriesSpec(channels=2, length=5)
PICTURES = ImageSpec(size=6, channels=2, mean=(0.4, 0.6), std=(0.2, 0.5))


class Flat(Encoder):
    """A linear map of four sums of the input; remembers what it was shown."""

    dim, num_layers = 4, 0

    def __init__(self, field: str):
        super().__init__()
        self.field, self.shown = field, list[Tensor]()
        self.linear = nn.Linear(4, 4)

    def forward(self, batch: Batch) -> Features:
        self.shown.append(batch[self.field])
        known = batch[self.field].float().nan_to_num().flatten(1)
        wide = nn.functional.pad(known, (0, -known.shape[1] % 4)).unflatten(1, (-1, 4)).sum(1)
        code = self.linear(wide)
        return Features((code.unsqueeze(1),), torch.ones(len(code), 1, dtype=torch.bool), code)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch_generator(seed, "values"))


def build(spec=ROWS, field: str = "row", **config) -> Autoencoder:
    with isolated():
        seed_layers(0, "model")
        return Autoencoder(Config(**{"width": 8, **config}), Flat(field), spec).eval()


def loss_of(objective: Autoencoder, batch: Batch, seed: int = 0):
    return objective.loss(batch, torch_generator(seed, "loss"))


def with_gaps(*shape: int) -> Tensor:
    values = draw(*shape)
    values[0, 1] = math.nan
    values[2, 0, 0] = math.nan
    return values


def test_errors_equal_loops():
    rebuilt, wanted = draw(4, 5, 2, seed=1), with_gaps(4, 5, 2)
    got, means = squared_errors(rebuilt, wanted), mean_errors(rebuilt, wanted)
    for b in range(4):
        found = []
        for t, c in np.ndindex(5, 2):
            error = (float(rebuilt[b, t, c]) - float(wanted[b, t, c])) ** 2
            assert got[b, t, c].item() == pytest.approx(0 if math.isnan(error) else error, rel=1e-5)
            found += [] if math.isnan(error) else [error]
        assert len(found) == (8, 10, 9, 10)[b]
        assert means[b].item() == pytest.approx(sum(found) / len(found), rel=1e-5)


def test_missing_values_have_no_gradient():
    rebuilt, wanted = draw(4, 5, 2, seed=1).requires_grad_(), with_gaps(4, 5, 2)
    mean_errors(rebuilt, wanted).sum().backward()
    assert torch.equal(rebuilt.grad == 0, wanted.isnan())
    assert rebuilt.grad.isfinite().all()


def test_an_input_without_values_has_no_error():
    assert mean_errors(draw(2, 3), torch.full((2, 3), math.nan)).tolist() == [0, 0]


def test_errors_are_float32_under_autocast():
    rebuilt, wanted = draw(3, 4).bfloat16(), draw(3, 4, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        got = mean_errors(rebuilt, wanted)
    assert torch.equal(got, mean_errors(rebuilt.float(), wanted))


@pytest.mark.parametrize(("drop", "expected"), [(0.25, 5), (0.01, 0), (0.5, 10)])
def test_an_exact_share_becomes_zero_in_every_input(drop, expected):
    values = draw(50, 4, 5)
    got = damaged(values, 0.0, drop, torch_generator(0, "damage"))
    hidden = got == 0
    assert (hidden.flatten(1).sum(1) == expected).all()
    assert torch.equal(got[~hidden], values[~hidden])
    if expected:  # no place is preferred
        assert hidden.float().mean(0).min() > 0.05


def test_noise_has_its_deviation():
    values = draw(200, 50)
    noise = damaged(values, 0.5, 0.0, torch_generator(0, "damage")) - values
    assert noise.mean().abs() < 0.02
    assert noise.std().item() == pytest.approx(0.5, rel=0.02)


def test_damage_leaves_missing_values_missing_and_the_input_alone():
    values = with_gaps(4, 5, 2)
    before = values.clone()
    got = damaged(values, 0.3, 0.9, torch_generator(0, "damage"))
    assert torch.equal(got.isnan(), values.isnan())
    assert torch.equal(values.nan_to_num(), before.nan_to_num())
    assert damaged(values, 0.0, 0.0, torch_generator(0, "damage")) is values


def standard(values: Tensor, spec) -> Tensor:
    if not isinstance(spec, ImageSpec):
        return values
    mean, std = (torch.tensor(each).view(-1, 1, 1) for each in (spec.mean, spec.std))
    scaled = values / 255 if values.dtype == torch.uint8 else values
    return (scaled - mean) / std


INPUTS = pytest.mark.parametrize(
    ("spec", "field", "values"),
    [
        (ROWS, "row", draw(3, 3)),
        (SERIES, "series", with_gaps(3, 5, 2)),
        (SERIES, "series", with_gaps(3, 4, 2)),  # shorter than the windows of the spec
        (PICTURES, "image", torch.arange(216, dtype=torch.uint8).view(3, 2, 6, 6)),
    ],
)


@INPUTS
def test_the_encoder_sees_the_damage_and_the_original_is_wanted(spec, field, values):
    objective = build(spec, field, noise=0.3, drop=0.5)
    output = loss_of(objective, {field: values})
    (shown,) = objective.encoder.shown
    wanted = standard(values, spec)
    expected = damaged(wanted, 0.3, 0.5, torch_generator(0, "loss"))
    assert not torch.allclose(expected.nan_to_num(), wanted.nan_to_num(), atol=0.1)
    torch.testing.assert_close(
        standard(shown, spec), expected, rtol=1e-4, atol=1e-5, equal_nan=True
    )
    rebuilt = objective.decoder(objective.encoder({field: shown}).pooled)[:, : values.shape[1]]
    errors = (rebuilt - wanted).square().flatten(1).nanmean(1)
    torch.testing.assert_close(output.loss, errors.mean())
    torch.testing.assert_close(output.metrics["rmse"], errors.sqrt().mean())
    assert output.weight == 3
    assert objective.fields == (field,)


@INPUTS
def test_errors_are_those_of_the_undamaged_input(spec, field, values):
    objective = build(spec, field, noise=0.3, drop=0.5)
    errors, rebuilt = objective.errors({field: values}), objective.reconstruct({field: values})
    assert all(shown is values for shown in objective.encoder.shown)
    length = values.shape[1]
    expected = (rebuilt[:, :length] - standard(values, spec)).square().nan_to_num()
    torch.testing.assert_close(errors[:, :length], expected, rtol=1e-4, atol=1e-5)
    assert not errors[:, length:].any()


def test_a_plain_autoencoder_draws_nothing_and_its_loss_is_the_mean_of_its_errors():
    objective, batch = build(), {"row": draw(6, 3)}
    generator = torch_generator(0, "loss")
    before = generator.get_state()
    loss = objective.loss(batch, generator).loss
    assert torch.equal(generator.get_state(), before)
    torch.testing.assert_close(loss, objective.errors(batch).mean())
    assert not objective.errors(batch).requires_grad
    assert isinstance(objective, Reconstructs)
    assert objective.reconstruct(batch).shape == (6, 3)


def test_text_is_refused():
    with pytest.raises(ConfigError, match="Vocabulary"):
        build(Vocabulary(size=9), "tokens")


@pytest.mark.parametrize(
    ("key", "value"),
    [("noise", -0.1), ("noise", math.inf), ("drop", 1.0), ("drop", math.nan), ("width", 0)],
)
def test_wrong_values_are_named(key, value):
    with pytest.raises(ValueError, match=key):
        Config(**{key: value})
