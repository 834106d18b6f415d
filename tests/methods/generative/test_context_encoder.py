"""Context encoder: what is hidden, what is shown, and the weighted error against loops."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from selfsup.batch import Batch, ImageSpec
from selfsup.methods.generative.context_encoder import (
    ChannelwiseLinear,
    Config,
    ContextEncoder,
    central_square,
    random_blocks,
    rim_weights,
    weighted_errors,
)
from selfsup.models.resnet import Config as Model
from selfsup.models.resnet import ResNetEncoder
from selfsup.objective import Reconstructs
from selfsup.randomness import isolated, seed_layers, torch_generator

SPEC = ImageSpec(size=16, channels=3, mean=(0.5, 0.4, 0.6), std=(0.25, 0.2, 0.3))
MODEL = Model(blocks=(1, 1), widths=(4, 6), stem="strided", zero_init_residual=False)


class Recorder(ResNetEncoder):
    """Remembers the pictures that it was shown."""

    def forward(self, batch):
        self.shown = batch["image"]
        return super().forward(batch)


def build(**config) -> ContextEncoder:
    with isolated():
        seed_layers(0, "model")
        return ContextEncoder(Config(width=8, **config), Recorder(MODEL, SPEC), SPEC).eval()


def pictures(size: int = 4, seed: int = 0) -> Batch:
    generator = torch_generator(seed, "pictures")
    return {"image": torch.randint(256, (size, 3, 16, 16), generator=generator, dtype=torch.uint8)}


def standard(image: Tensor) -> Tensor:
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (SPEC.mean, SPEC.std))
    return (image / 255 - mean) / std


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch_generator(seed, "values"))


@pytest.mark.parametrize(
    ("size", "share", "first", "side"),
    [(128, 0.25, 32, 64), (16, 0.25, 4, 8), (7, 0.25, 1, 4), (8, 0.01, 3, 1), (8, 0.99, 0, 7)],
)
def test_the_central_square_has_its_share(size, share, first, side):
    expected = np.zeros((size, size), dtype=bool)
    expected[first : first + side, first : first + side] = True
    got = central_square(size, share)
    assert got.shape == (1, 1, size, size)
    assert np.array_equal(got[0, 0], expected)


@pytest.mark.parametrize(("size", "share", "blocks"), [(16, 0.25, 4), (32, 0.5, 8), (10, 0.01, 1)])
def test_random_blocks_are_squares_at_most_the_share(size, share, blocks):
    hidden = random_blocks(1000, size, share, torch_generator(0, "blocks"))
    side = size // 4
    covered = hidden.flatten(1).sum(1)
    assert hidden.shape == (1000, 1, size, size)
    assert covered.max() <= blocks * side**2
    assert covered.min() >= side**2
    # every hidden pixel lies in a hidden square of the side of a block
    squares = torch.nn.functional.avg_pool2d(hidden.float(), side, stride=1) == 1
    for picture, square in zip(hidden[:20, 0], squares[:20, 0], strict=True):
        grown = torch.zeros_like(picture)
        for y, x in square.nonzero().tolist():
            grown[y : y + side, x : x + side] = True
        assert torch.equal(grown, picture)
    assert hidden.any(0).all(), "some place is never hidden"
    assert len({tuple(row) for row in hidden.flatten(1).tolist()}) > 40
    if blocks > 1:
        assert covered.float().mean() > 0.6 * blocks * side**2


@pytest.mark.parametrize("rim", [0, 1, 2])
def test_rim_weights_equal_loops(rim):
    hidden = random_blocks(3, 12, 0.15, torch_generator(0, "blocks"))
    got = rim_weights(hidden, rim)
    for b, y, x in np.ndindex(3, 12, 12):
        near = hidden[b, 0, max(0, y - rim) : y + rim + 1, max(0, x - rim) : x + rim + 1].any()
        expected = 1 if hidden[b, 0, y, x] else 10 if near else 0
        assert got[b, 0, y, x] == expected


def test_weighted_errors_equal_loops():
    painted, wanted = draw(3, 2, 5, 4), draw(3, 2, 5, 4, seed=1)
    weight = 10 * draw(3, 1, 5, 4, seed=2).clamp(min=0)
    got = weighted_errors(painted, wanted, weight)
    for b in range(3):
        total = weights = 0.0
        for c, y, x in np.ndindex(2, 5, 4):
            w = float(weight[b, 0, y, x])
            total += w * (float(painted[b, c, y, x]) - float(wanted[b, c, y, x])) ** 2
            weights += w
        assert got[b].item() == pytest.approx(total / weights, rel=1e-5)
    shared = weighted_errors(painted, wanted, weight[:1])
    torch.testing.assert_close(
        shared, weighted_errors(painted, wanted, weight[:1].expand(3, -1, -1, -1))
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert weighted_errors(painted.bfloat16(), wanted, weight).dtype == torch.float32


def test_channelwise_linear_equals_loops():
    with isolated():
        seed_layers(0, "model")
        layer = ChannelwiseLinear(3, 4).requires_grad_(False)
    x = draw(2, 3, 2, 2)
    got = layer(x)
    for b, c, q in np.ndindex(2, 3, 4):
        expected = sum(float(x[b, c].flatten()[p]) * float(layer.weight[c, p, q]) for p in range(4))
        assert got[b, c].flatten()[q].item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_the_encoder_sees_the_mean_colour_in_the_hidden_part():
    objective, batch = build(), pictures()
    objective.loss(batch, torch_generator(0, "loss"))
    shown, original = objective.encoder.shown, batch["image"] / 255
    inside = central_square(16, 0.25).expand_as(shown)
    mean = torch.tensor(SPEC.mean).view(3, 1, 1).expand_as(shown)
    torch.testing.assert_close(shown[inside], mean[inside], rtol=0, atol=1e-6)
    torch.testing.assert_close(shown[~inside], original[~inside], rtol=0, atol=1e-6)


@pytest.mark.parametrize("mask", ["centre", "random"])
def test_loss_is_the_weighted_error_of_what_is_hidden(mask):
    objective, batch = build(mask=mask), pictures()
    output = objective.loss(batch, torch_generator(0, "loss"))
    wanted = standard(batch["image"])
    hidden = central_square(16, 0.25).expand(4, -1, -1, -1)
    if mask == "random":
        hidden = random_blocks(4, 16, 0.25, torch_generator(0, "loss"))
    shown = {"image": objective.encoder.shown}
    vectors = objective.encoder(shown).last.transpose(1, 2).reshape(4, 6, 4, 4)
    painted = objective.decoder(objective.mixing(vectors))
    squares = (painted - wanted).square()
    weight = rim_weights(hidden, 1).expand_as(squares)  # 7 of 128 pixels is 1 of 16
    errors = [(w * s).sum() / w.sum() for w, s in zip(weight, squares, strict=True)]
    torch.testing.assert_close(output.loss, torch.stack(errors).mean())
    inside = [s[h.expand_as(s)].mean() for h, s in zip(hidden, squares, strict=True)]
    torch.testing.assert_close(output.metrics["hidden_error"], torch.stack(inside).mean())
    assert output.weight == 4


def test_the_rim_is_a_share_of_the_side():
    assert Config().rim * 128 == 7
    assert build().rim == 1
    assert build(rim=0.0).rim == 0
    objective, batch = build(rim=0.0), pictures()
    output = objective.loss(batch, torch_generator(0, "loss"))
    torch.testing.assert_close(output.loss, output.metrics["hidden_error"])


def test_the_hidden_part_decides_nothing_of_what_is_painted():
    objective, batch = build(), pictures()
    other = {"image": batch["image"].clone()}
    other["image"][:, :, 4:12, 4:12] = 255 - other["image"][:, :, 4:12, 4:12]
    first, second = objective.reconstruct(batch), objective.reconstruct(other)
    assert torch.equal(first[:, :, 4:12, 4:12], second[:, :, 4:12, 4:12])
    other["image"][:, :, 0, 0] = 255 - other["image"][:, :, 0, 0]
    third = objective.reconstruct(other)
    assert not torch.equal(first[:, :, 4:12, 4:12], third[:, :, 4:12, 4:12])


def test_reconstruction_keeps_what_is_visible():
    objective, batch = build(mask="random"), pictures()
    got, wanted = objective.reconstruct(batch), standard(batch["image"])
    inside = central_square(16, 0.25).expand_as(got)
    torch.testing.assert_close(got[~inside], wanted[~inside], rtol=1e-5, atol=1e-5)
    assert not torch.isclose(got[inside], wanted[inside], atol=1e-3).all()
    assert isinstance(objective, Reconstructs)


def test_what_is_kept_is_all_that_is_needed_to_paint():
    objective = build()
    assert {name.partition(".")[0] for name in objective.state_dict()} == set(objective.kept)


@pytest.mark.parametrize(
    ("key", "value"),
    [("share", 0.0), ("share", 1.0), ("rim", -0.1), ("rim", 0.5), ("rim", math.nan), ("width", 0)],
)
def test_wrong_values_are_named(key, value):
    with pytest.raises(ValueError, match=key):
        Config(**{key: value})
