"""Rotation: turns against NumPy, the loss against loops, and what the encoder is shown."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from selfsup.batch import ImageSpec
from selfsup.methods.predictive.rotation import Config, Rotation, rotate, rotation_loss
from selfsup.methods.views import NO_CHANGE, ViewConfig, augment
from selfsup.models.encoder import Encoder, Features
from selfsup.randomness import isolated, seed_layers, torch_generator

SPEC = ImageSpec(size=6, channels=3, mean=(0.5,) * 3, std=(0.25,) * 3)
CROPS = ViewConfig(crop_scale=(0.5, 1.0), jitter=0.0, grey=0.0, blur=0.0)


class Flat(Encoder):
    """All pixels of a picture as its features; remembers what it was shown."""

    dim, num_layers = 108, 0

    def __init__(self):
        super().__init__()
        self.shown: list[Tensor] = []

    def forward(self, batch):
        self.shown.append(batch["image"])
        pooled = batch["image"].flatten(1)
        mask = torch.ones(len(pooled), 1, dtype=torch.bool)
        return Features((pooled.unsqueeze(1),), mask, pooled)


def build(**config) -> Rotation:
    with isolated():
        seed_layers(0, "model")
        return Rotation(Config(**({"views": NO_CHANGE} | config)), Flat(), SPEC)


def pictures(size: int = 5) -> Tensor:
    shape = (size, 3, 6, 6)
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch_generator(0, "pictures"))


def slow_loss(logits: np.ndarray, turns: list[int]) -> tuple[float, float]:
    """Equations 2 and 3 one picture after another, and the share of right answers."""
    total, right = 0.0, 0
    for row, turn in zip(logits.tolist(), turns, strict=True):
        total -= row[turn] - math.log(sum(math.exp(x) for x in row))
        right += row[turn] == max(row)
    return total / len(turns), right / len(turns)


def test_rotate_moves_pixels_as_numpy_does():
    image, turns = pictures(8) / 255, torch.tensor([0, 1, 2, 3, 3, 1, 0, 2])
    for got, picture, number in zip(rotate(image, turns), image, turns.tolist(), strict=True):
        assert np.array_equal(got.numpy(), np.rot90(picture.numpy(), number, axes=(1, 2)))


def test_a_quarter_turn_is_anticlockwise():
    image = torch.zeros(1, 1, 3, 3)
    image[0, 0, 0, 2] = 1  # top right goes to top left
    assert rotate(image, torch.tensor([1]))[0, 0, 0, 0] == 1


def test_loss_equals_loops():
    draw = torch_generator(0, "logits")
    logits, turns = torch.randn(12, 4, generator=draw), torch.arange(12) % 4
    loss, accuracy = rotation_loss(logits, turns)
    expected, right = slow_loss(logits.double().numpy(), turns.tolist())
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert accuracy.item() == pytest.approx(right)
    assert 0 < right < 1
    assert rotation_loss(torch.zeros(4, 4), turns[:4])[0].item() == pytest.approx(
        Rotation.chance_loss
    )


def test_every_picture_is_shown_at_all_four_turns():
    objective, image = build(), pictures()
    output = objective.loss({"image": image}, torch_generator(0, "loss"))
    (shown,) = objective.encoder.shown
    expected = [np.rot90(image.numpy() / np.float32(255), k, axes=(2, 3)) for k in range(4)]
    assert np.array_equal(shown.numpy(), np.concatenate(expected))
    assert output.weight == 5
    with torch.no_grad():
        logits = objective.head(shown.flatten(1)).double().numpy()
    loss, accuracy = slow_loss(logits, [k for k in range(4) for _ in range(5)])
    assert output.loss.item() == pytest.approx(loss, rel=1e-5)
    assert output.metrics["accuracy"].item() == pytest.approx(accuracy)


def test_one_rotation_each_is_drawn_evenly_and_named():
    objective, image = build(rotations_per_image=1), pictures(400)
    output = objective.loss({"image": image}, torch_generator(0, "loss"))
    (shown,) = objective.encoder.shown
    every = torch.stack([(image / 255).rot90(k, (2, 3)) for k in range(4)], 1)
    same = (every == shown.unsqueeze(1)).flatten(2).all(2)  # (batch, 4)
    assert (same.sum(1) == 1).all()
    turns = same.int().argmax(1)
    assert turns.bincount().min() > 70  # of 100 expected, with a deviation of 9
    with torch.no_grad():
        logits = objective.head(shown.flatten(1)).double().numpy()
    assert output.loss.item() == pytest.approx(slow_loss(logits, turns.tolist())[0], rel=1e-5)
    assert output.weight == 400


def test_turns_follow_the_view():
    objective, image = build(views=CROPS), pictures()
    objective.loss({"image": image}, torch_generator(0, "loss"))
    view = augment(image, CROPS, torch_generator(0, "loss"))
    (shown,) = objective.encoder.shown
    assert torch.equal(shown[:5], view)
    assert torch.equal(shown[10:15], view.flip(2, 3))


def test_loss_is_a_mean_over_pictures():
    objective, image = build(), pictures(8)
    parts = [objective.loss({"image": x}, torch_generator(0, "loss")) for x in image.split([3, 5])]
    whole = objective.loss({"image": image}, torch_generator(0, "loss"))
    mean = (3 * parts[0].loss + 5 * parts[1].loss) / 8
    assert whole.loss.item() == pytest.approx(mean.item(), rel=1e-5)


def test_default_views_only_crop_and_flip():
    views = Config().views
    assert (views.jitter, views.grey, views.blur, views.solarise) == (0, 0, 0, 0)
    assert views.flip == 0.5
    assert views.crop_scale == (0.08, 1.0)


@pytest.mark.parametrize("number", [0, 2, 3, 5])
def test_impossible_values_are_refused(number):
    with pytest.raises(ValueError, match="rotations_per_image must be 1 or 4"):
        Config(rotations_per_image=number)
