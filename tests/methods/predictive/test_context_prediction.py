"""Context prediction: where patches lie, what they lose, and the loss against loops."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from selfsup.batch import ImageSpec
from selfsup.errors import ConfigError
from selfsup.methods.predictive.context_prediction import (
    Config,
    ContextPrediction,
    Grid,
    cut,
    draw_corners,
    drop_colours,
    grid_of,
)
from selfsup.models.encoder import Encoder, Features
from selfsup.randomness import isolated, seed_layers, torch_generator

SPEC = ImageSpec(size=32, channels=3, mean=(0.2, 0.5, 0.7), std=(0.25,) * 3)
GREY = ImageSpec(size=32, channels=1, mean=(0.5,), std=(0.25,))
NEIGHBOURS = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1), (2, 2)]  # row, column


class Quarters(Encoder):
    """The mean colours of each quarter of a picture; remembers what it was shown."""

    dim, num_layers = 12, 0

    def __init__(self):
        super().__init__()
        self.shown: list[Tensor] = []

    def forward(self, batch):
        self.shown.append(batch["image"])
        pooled = nn.functional.adaptive_avg_pool2d(batch["image"], 2).flatten(1)
        mask = torch.ones(len(pooled), 1, dtype=torch.bool)
        return Features((pooled.unsqueeze(1),), mask, pooled)


def build(spec: ImageSpec = SPEC, **config) -> ContextPrediction:
    with isolated():
        seed_layers(0, "model")
        encoder = Quarters()
        encoder.dim = 4 * spec.channels
        return ContextPrediction(Config(**({"hidden_dim": 16} | config)), encoder, spec)


def pictures(size: int, channels: int = 3) -> Tensor:
    shape = (size, channels, 32, 32)
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch_generator(0, "pictures"))


def coordinates(size: int, pixels: int = 32) -> Tensor:
    """Pictures whose first channel holds the row and whose second holds the column, in 255ths."""
    row = torch.arange(pixels, dtype=torch.uint8).view(-1, 1).expand(pixels, pixels)
    return torch.stack([row, row.T, torch.full_like(row, 9)]).repeat(size, 1, 1, 1)


# ---- the grid -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [3, 5, 16, 28, 32, 96, 224])
@pytest.mark.parametrize(("gap", "jitter"), [(0.5, 0.0729), (0.0, 0.0), (0.3, 0.2)])
def test_the_patch_is_the_largest_that_fits(size, gap, jitter):
    def extent(patch: int) -> int:
        return 3 * patch + 2 * math.ceil(gap * patch) + 2 * math.ceil(jitter * patch)

    fitting = [patch for patch in range(1, size) if extent(patch) <= size]
    config = Config(gap=gap, jitter=jitter)
    if not fitting:
        with pytest.raises(ConfigError, match=rf"more than the pictures' {size} pixels"):
            grid_of(config, size)
        return
    grid = grid_of(config, size)
    assert grid.patch == max(fitting)
    assert grid.slack == size - extent(grid.patch)


def test_sizes_of_the_paper():
    assert grid_of(Config(patch=96), 448) == Grid(patch=96, stride=144, jitter=7, slack=50)
    assert grid_of(Config(), 224).patch == 54
    with pytest.raises(ConfigError, match=r"3 patches of 9 pixels.* 32 pixels.*method\.patch"):
        grid_of(Config(patch=9), 32)


def test_corners_without_chance_are_those_of_the_grid():
    grid, place = Grid(patch=4, stride=6, jitter=0, slack=0), torch.arange(8)
    middle, there = draw_corners(grid, place, torch_generator(0, "corners"))
    assert middle.tolist() == [[6, 6]] * 8
    assert there.tolist() == [[6 * row, 6 * column] for row, column in NEIGHBOURS]


def test_corners_move_as_far_as_they_may_and_stay_inside():
    grid, place = grid_of(Config(patch=5, jitter=0.4), 32), torch.arange(8).repeat(2000)
    assert (grid.jitter, grid.slack, grid.stride) == (2, 7, 8)
    middle, there = draw_corners(grid, place, torch_generator(0, "corners"))
    cells = torch.tensor(NEIGHBOURS)[place]
    # a corner's way from its cell: 0 to 7 for the whole grid, and 0 to 4 for each patch alone
    for corner, cell in ((middle, torch.ones_like(cells)), (there, cells)):
        moved = corner - grid.stride * cell
        for axis in (0, 1):
            assert sorted(set(moved[:, axis].tolist())) == list(range(12))
        assert corner.min() >= 0
        assert corner.max() + grid.patch <= 32
    apart = there - middle - grid.stride * (cells - 1)
    for axis in (0, 1):  # each moved by -2 to 2, the grid with both
        counts = (apart[:, axis] + 4).bincount()
        expected = torch.tensor([1, 2, 3, 4, 5, 4, 3, 2, 1]) / 25
        torch.testing.assert_close(counts / counts.sum(), expected, rtol=0, atol=0.02)
    outside = ((there - middle).abs() >= grid.patch).any(1)
    assert not outside.all(), "this jitter is larger than half the gap: some patches overlap"


def test_patches_of_the_default_grid_keep_a_gap():
    grid, place = grid_of(Config(), 32), torch.arange(8).repeat(200)
    middle, there = draw_corners(grid, place, torch_generator(0, "corners"))
    gap = ((there - middle).abs() - grid.patch).amax(1)
    assert gap.min() == 2  # 4 pixels, less what both may move
    assert gap.max() == 6


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_cut_equals_slices(dtype):
    image = pictures(4).to(dtype)
    corner = torch.tensor([[0, 0], [25, 3], [7, 25], [11, 12]])
    got = cut(image, corner, 7)
    assert got.dtype == dtype
    for patch, picture, (top, left) in zip(got, image, corner.tolist(), strict=True):
        assert torch.equal(patch, picture[:, top : top + 7, left : left + 7])


# ---- colours ------------------------------------------------------------------------------------


def test_dropping_colours_equals_loops():
    draw = torch_generator(0, "colours")
    patch, noise = torch.rand(5, 3, 4, 4, generator=draw), torch.randn(5, 3, 4, 4, generator=draw)
    kept = torch.tensor([0, 1, 2, 0, 1]).unsqueeze(1) == torch.arange(3)
    kept[4] = True
    mean = [0.2, 0.5, 0.7]
    got = drop_colours(patch, kept, torch.tensor(mean).view(3, 1, 1), noise).double().numpy()
    for b in range(5):
        deviations = [patch[b, c].double().numpy().std() for c in range(3) if kept[b, c]]
        for c in range(3):
            if kept[b, c]:
                assert np.array_equal(got[b, c], patch[b, c])
                continue
            expected = mean[c] + 0.01 * deviations[0] * noise[b, c].double().numpy()
            np.testing.assert_allclose(got[b, c], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_patches_lose_two_colours_with_that_probability(share):
    objective, image = build(drop_colour=share).eval(), coordinates(500)
    objective.loss({"image": image}, torch_generator(0, "loss"))
    (shown,) = objective.encoder.shown
    original = torch.isclose(shown * 255, (shown * 255).round(), atol=1e-3, rtol=0).all((2, 3))
    counts = original.sum(1).bincount(minlength=4)
    # the third channel is flat, so that noise about the mean has no extent where it alone is kept
    flat = (shown[:, 0] - 0.2).abs().amax((1, 2)) < 1e-6
    assert original[flat, 2].all()
    if share == 1.0:
        assert counts[3] == 0
        assert flat.float().mean().item() == pytest.approx(1 / 3, abs=0.06)
    else:
        assert counts[3].item() / 1000 == pytest.approx(0.7, abs=0.06)


def test_without_dropping_and_for_grey_pictures_patches_are_the_pictures_own():
    for spec, config in ((SPEC, {"drop_colour": 0.0}), (GREY, {})):
        objective, image = build(spec, **config).eval(), pictures(6, spec.channels)
        objective.loss({"image": image}, torch_generator(0, "loss"))
        (shown,) = objective.encoder.shown
        windows = image.unfold(2, 7, 1).unfold(3, 7, 1).permute(0, 2, 3, 1, 4, 5) / 255
        for patch, own in zip(shown, windows.repeat(2, 1, 1, 1, 1, 1), strict=True):
            assert (own == patch).flatten(2).all(2).any()


# ---- the method ---------------------------------------------------------------------------------


def test_loss_tells_the_place_of_the_second_patch_from_the_first():
    objective = build(drop_colour=0.0, jitter=0.0).eval()
    output = objective.loss({"image": coordinates(300)}, torch_generator(0, "loss"))
    (shown,) = objective.encoder.shown
    corner = (shown[:, :2, 0, 0] * 255).round().long()
    apart = (corner[300:] - corner[:300]) // objective.grid.stride + 1
    place = [NEIGHBOURS.index((row, column)) for row, column in apart.tolist()]
    assert np.bincount(place, minlength=8).min() > 15  # of 37 expected, with a deviation of 6
    with torch.no_grad():
        pooled = objective.encoder({"image": shown}).pooled
        logits = objective.head(torch.cat([pooled[:300], pooled[300:]], 1)).double().tolist()
    losses = [
        math.log(sum(math.exp(x) for x in row)) - row[own]
        for row, own in zip(logits, place, strict=True)
    ]
    right = [row[own] == max(row) for row, own in zip(logits, place, strict=True)]
    assert output.loss.item() == pytest.approx(sum(losses) / 300, rel=1e-5)
    assert output.metrics["accuracy"].item() == pytest.approx(sum(right) / 300)
    assert output.weight == 300
    assert objective.chance_loss == pytest.approx(math.log(8))


def test_patches_are_resized_for_the_encoder():
    for resize, size in ((0, 7), (16, 16)):
        objective = build(resize=resize).eval()
        objective.loss({"image": pictures(2)}, torch_generator(0, "loss"))
        assert objective.encoder.shown[0].shape == (4, 3, size, size)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("patch", -1),
        ("gap", -0.1),
        ("gap", math.inf),
        ("jitter", math.nan),
        ("drop_colour", 1.1),
        ("resize", -1),
        ("hidden_dim", 0),
    ],
)
def test_impossible_values_are_refused(key, value):
    with pytest.raises(ValueError, match=key):
        Config(**{key: value})
