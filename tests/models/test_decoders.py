"""Decoders: shapes for every kind of data; the scale on which inputs are rebuilt, and back."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from selfsup.batch import AudioSpec, ImageSpec, SeriesSpec, TableSpec, Vocabulary
from selfsup.errors import ConfigError, DataError
from selfsup.models.decoders import (
    ResidualBlock,
    build_decoder,
    grid_of,
    input_batch,
    input_field,
    input_shape,
    log_spacing,
    standardised,
    target,
    upsampled_sides,
)
from selfsup.models.encoder import Encoder, Features
from selfsup.models.mlp import Config as MLP
from selfsup.models.mlp import MLPEncoder
from selfsup.models.resnet import Config as ResNet
from selfsup.models.resnet import ResNetEncoder
from selfsup.randomness import isolated, seed_layers, torch_generator

PICTURES = ImageSpec(size=6, channels=2, mean=(0.4, 0.6), std=(0.2, 0.5))
ROWS = TableSpec(columns=("age", "city"), source=(0, 1, 1))
SERIES = SeriesSpec(channels=2, length=5)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch_generator(0, "values"))


def pictures(size: int = 3) -> Tensor:
    generator = torch_generator(0, "pictures")
    return torch.randint(256, (size, 2, 6, 6), dtype=torch.uint8, generator=generator)


def decoder(*arguments, **options) -> nn.Module:
    with isolated():
        seed_layers(0, "model")
        return build_decoder(*arguments, **options)


@pytest.mark.parametrize("spec", [PICTURES, ROWS, SERIES])
def test_a_vector_becomes_an_input(spec):
    module = decoder(spec, dim=4, width=8)
    out = module(draw(3, 4))
    assert out.shape == (3, *input_shape(spec))
    out.square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(("size", "grid"), [(6, 6), (7, 3), (28, 4), (32, 4), (96, 3), (16, 5)])
def test_a_map_of_codes_becomes_a_picture_of_exactly_the_size(size, grid):
    spec = ImageSpec(size=size, channels=1, mean=(0.5,), std=(0.25,))
    out = decoder(spec, dim=4, width=8, grid=grid)(draw(2, 4, grid, grid))
    assert out.shape == (2, 1, size, size)


@pytest.mark.parametrize("last", range(1, 100))
def test_sides_at_most_double(last):
    for first in range(1, last + 1):
        sides = [first, *upsampled_sides(first, last)]
        assert sides[-1] == last
        assert all(a < b <= 2 * a for a, b in zip(sides[:-1], sides[1:], strict=True))


def test_what_a_code_says_stays_near_its_place():
    module = decoder(ImageSpec(size=32, channels=1, mean=(0.5,), std=(0.2,)), 4, width=8, grid=8)
    code = draw(1, 4, 8, 8)
    other = code.clone()
    other[:, :, 0, 0] += 1
    changed = (module(code) != module(other))[0, 0]
    assert changed[:4, :4].all()
    assert not changed[-4:, -4:].any()


def test_widths_halve_down_to_16():
    module = decoder(ImageSpec(size=64, channels=1, mean=(0.5,), std=(0.2,)), 4, width=64)
    widths = [
        part.spatial.out_channels for part in module.modules() if isinstance(part, ResidualBlock)
    ]
    assert widths == [64, 64, 32, 16, 16, 16]


def test_residual_block_is_the_papers():
    with isolated():
        seed_layers(0, "model")
        block = ResidualBlock(3)
    x = draw(2, 3, 4, 4).double()
    block = block.double()
    padded = nn.functional.pad(x.clamp(min=0), (1, 1, 1, 1))
    expected = x.clone()
    for b, i, j in np.ndindex(2, 4, 4):
        window = padded[b, :, i : i + 3, j : j + 3]
        inner = [(block.spatial.weight[k] * window).sum() + block.spatial.bias[k] for k in range(3)]
        mixed = block.mixing.weight[:, :, 0, 0] @ torch.stack(inner).clamp(min=0)
        expected[b, :, i, j] += mixed + block.mixing.bias
    torch.testing.assert_close(block(x), expected)


def test_pictures_are_standardised_per_channel():
    image = pictures()
    expected = np.zeros((3, 2, 6, 6))
    for b, c, i, j in np.ndindex(*expected.shape):
        expected[b, c, i, j] = (float(image[b, c, i, j]) / 255 - PICTURES.mean[c]) / PICTURES.std[c]
    got = target({"image": image}, PICTURES)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(target({"image": image / 255}, PICTURES), got, rtol=0, atol=1e-6)


def test_rows_and_series_are_taken_as_they_are():
    row, series = draw(4, 3), draw(4, 5, 2)
    series[0, 1, 1] = math.nan
    assert torch.equal(target({"row": row}, ROWS), row)
    got = target({"series": series}, SERIES)
    torch.testing.assert_close(got, series, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("spec", "batch"),
    [
        (PICTURES, {"image": pictures()}),
        (ROWS, {"row": draw(3, 3)}),
        (SERIES, {"series": draw(3, 5, 2)}),
    ],
)
def test_an_encoder_reads_the_values_that_it_is_given(spec, batch):
    batch = {**batch, "index": torch.arange(3)}
    values = 3 * draw(3, *input_shape(spec))  # pictures leave [0, 1]
    shown = input_batch(batch, values, spec)
    assert shown.keys() == batch.keys()
    assert shown["index"] is batch["index"]
    torch.testing.assert_close(standardised(shown, spec), values, rtol=1e-5, atol=1e-5)
    # itself, if nothing is changed
    same = input_batch(batch, standardised(batch, spec), spec)[input_field(spec)]
    given = batch[input_field(spec)]
    given = given / 255 if given.dtype == torch.uint8 else given
    torch.testing.assert_close(same, given, rtol=1e-5, atol=1e-6)


def test_a_shorter_series_is_missing_at_its_end():
    series = draw(2, 3, 2)
    got = target({"series": series}, SERIES)
    assert got.shape == (2, 5, 2)
    assert torch.equal(got[:, :3], series)
    assert got[:, 3:].isnan().all()
    assert torch.equal(standardised({"series": series}, SERIES), series)


@pytest.mark.parametrize(
    ("spec", "batch"),
    [(PICTURES, {"image": torch.zeros(1, 2, 8, 8)}), (SERIES, {"series": torch.zeros(1, 6, 2)})],
)
def test_inputs_of_another_size_are_refused(spec, batch):
    with pytest.raises(DataError, match=r"of shape \(.*\), got \((2, 8, 8|6, 2)\)"):
        target(batch, spec)


@pytest.mark.parametrize("spec", [Vocabulary(size=5), AudioSpec(rate=8000, mel=40, hop=80)])
def test_other_kinds_of_data_are_refused(spec):
    with pytest.raises(ConfigError, match=type(spec).__name__):
        input_field(spec)
    with pytest.raises(ConfigError, match=type(spec).__name__):
        input_shape(spec)


def test_log_spacing_is_that_of_pixel_levels():
    levels = torch.arange(256, dtype=torch.uint8).repeat(2, 1).view(1, 2, 16, 16)
    spec = ImageSpec(size=16, channels=2, mean=(0.4, 0.6), std=(0.2, 0.5))
    values = target({"image": levels}, spec).flatten(2).double()
    spacing = values.diff(dim=2)
    assert log_spacing(spec) == pytest.approx(spacing.log().mean().item(), abs=1e-4)
    assert log_spacing(ROWS) == log_spacing(SERIES) == 0


@pytest.mark.parametrize(("stem", "blocks", "grid"), [("cifar", 2, 14), ("imagenet", 4, 1)])
def test_the_grid_is_the_encoders_own(stem, blocks, grid):
    spec = ImageSpec(size=28, channels=1, mean=(0.5,), std=(0.25,))
    encoder = ResNetEncoder(ResNet(blocks=(1,) * blocks, widths=(4,) * blocks, stem=stem), spec)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    assert grid_of(encoder, spec) == grid
    assert encoder.training
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert grid_of(MLPEncoder(MLP(dims=(), dim=3), spec), spec) == 1


def test_positions_that_are_no_square_are_refused():
    class Strip(Encoder):
        dim, num_layers = 1, 0

        def forward(self, batch):
            mask = torch.ones(1, 6, dtype=torch.bool)
            return Features((torch.zeros(1, 6, 1),), mask, torch.zeros(1, 1))

    with pytest.raises(ConfigError, match="6 positions"):
        grid_of(Strip(), PICTURES)
