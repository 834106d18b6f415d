"""Context prediction: a network tells where one patch of a picture lies beside another.

Doersch, Gupta and Efros, "Unsupervised Visual Representation Learning by Context Prediction" (2015,
arXiv 1505.05192). From a grid of three by three patches the middle one and one of its eight
neighbours go through the same encoder; a head that sees both results names the neighbour's place.
To say where a patch belongs one must know of what it is a part. Edges that go on from patch to
patch, and the lens's colour fringes, would give the place away without that; a gap between patches,
a random shift of each, and the loss of two of its three colours take these shortcuts away.

Axes: batch: pictures; patch: height and width of a patch, before `resize`; dim: of the encoder.

Sizes follow from the picture where `patch = 0`: the largest with which the grid and the shifts fit,
7 pixels of 32 and 54 of 224. The encoder sees nothing but patches: small ones want the `cifar` stem
of a residual network, or `resize`, which enlarges them first.

Deviations from the paper:
- A picture gives one pair per step, not all the pairs of its grid.
- The largest patch is for small pictures. The paper's has 96 pixels, in pictures of 150,000 to
  450,000: `patch = 96`.
- The head has one hidden layer (the paper: fc7 and fc8), with batch normalisation.
- Of the paper's two ways with colour this is dropping; there is no projection. Dropped colours
  become noise about the channel's mean over the data, as there. Patches are not made blurred.
- AdamW takes the place of SGD.

Reference result: 4 CPU minutes on 19,000 pictures of CIFAR-10 with a narrow ResNet
(docs/results/context-prediction-small.json): frozen features tell 5,000 test pictures with kNN
0.315 and linear 0.377; untrained 0.257 and 0.301, raw pixels 0.327 and 0.396; one seed.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from selfsup.batch import Batch, ImageSpec
from selfsup.errors import ConfigError
from selfsup.methods.ops import projection_head
from selfsup.models.encoder import Encoder
from selfsup.objective import Objective, Output

NUM_PLACES = 8
NOISE = 0.01  # of a dropped colour, in standard deviations of the colour that is kept


@dataclass(frozen=True, kw_only=True)
class Config:
    """Patches, what hides their shortcuts, and the head. Defaults are the paper's."""

    patch: int = 0
    """Height and width of a patch in pixels; 0: the largest that the picture allows."""
    gap: float = 0.5
    """Distance between patches of the grid, as a share of the patch; rounded up to pixels."""
    jitter: float = 0.0729
    """How far each patch may move each way, as a share of it (7 / 96); rounded up to pixels."""
    drop_colour: float = 1.0
    """Probability that a patch keeps one channel alone; pictures of other than 3 keep all."""
    resize: int = 0
    """Height and width to which patches are resized for the encoder; 0: they stay as they are."""
    hidden_dim: int = 4096
    """Width of the head's hidden layer."""

    def __post_init__(self) -> None:
        for name, least in (("patch", 0), ("gap", 0), ("jitter", 0), ("resize", 0)):
            if not least <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.hidden_dim < 1:
            raise ValueError(f"hidden_dim must be at least 1, got {self.hidden_dim}")
        if not 0 <= self.drop_colour <= 1:
            raise ValueError(f"drop_colour is a probability, from 0 to 1, got {self.drop_colour}")


class Grid(NamedTuple):
    """Three by three patches in pixels.

    Attributes:
        patch: height and width of each.
        stride: from the edge of one to the edge of the next.
        jitter: how far each may move each way.
        slack: how far the whole grid may move down and to the right.
    """

    patch: int
    stride: int
    jitter: int
    slack: int


def grid_of(config: Config, size: int) -> Grid:
    """The grid for pictures of `size` x `size` pixels.

    Raises:
        ConfigError: it does not fit.

    >>> grid_of(Config(), 32)
    Grid(patch=7, stride=11, jitter=1, slack=1)
    """
    for patch in [config.patch] if config.patch else range(size // 3, 0, -1):
        gap, jitter = math.ceil(config.gap * patch), math.ceil(config.jitter * patch)
        slack = size - 3 * patch - 2 * gap - 2 * jitter
        if slack >= 0:
            return Grid(patch, patch + gap, jitter, slack)
    wanted = f"3 patches of {config.patch or 1} pixels, 2 gaps of {config.gap} of that and shifts"
    raise ConfigError(
        f"context_prediction: {wanted} of {config.jitter} need more than the pictures' {size} "
        "pixels; set a smaller method.patch (0: the largest that fits), gap or jitter, or larger "
        "pictures"
    )


def draw_corners(
    grid: Grid, place: Int[Tensor, " batch"], generator: torch.Generator
) -> tuple[Int[Tensor, "batch 2"], Int[Tensor, "batch 2"]]:
    """Top and left of the middle patch and of its neighbour at `place` (0 to 7, row by row)."""

    def draw(least: int, most: int) -> Tensor:
        shape = (len(place), 2)
        return torch.randint(least, most + 1, shape, generator=generator, device=place.device)

    corner = draw(0, grid.slack) + grid.jitter
    cell = place + (place >= NUM_PLACES // 2)  # of nine: the fifth is the middle
    there = torch.stack((cell // 3, cell % 3), 1)  # (batch, 2)
    shifts = [draw(-grid.jitter, grid.jitter) for _ in range(2)]
    return corner + grid.stride + shifts[0], corner + grid.stride * there + shifts[1]


def cut(
    image: Shaped[Tensor, "batch channel height width"], corner: Int[Tensor, "batch 2"], patch: int
) -> Shaped[Tensor, "batch channel {patch} {patch}"]:
    """The square of `patch` pixels from (top, left) `corner` on, out of each picture."""
    along = torch.arange(patch, device=image.device)
    row = (corner[:, :1] + along).unsqueeze(2)  # (batch, patch, 1)
    column = (corner[:, 1:] + along).unsqueeze(1)  # (batch, 1, patch)
    number = torch.arange(len(image), device=image.device).view(-1, 1, 1)
    return image[number, :, row, column].permute(0, 3, 1, 2)


def drop_colours(
    patch: Float[Tensor, "batch channel height width"],
    kept: Bool[Tensor, "batch channel"],
    mean: Float[Tensor, "channel 1 1"],
    noise: Float[Tensor, "batch channel height width"],
) -> Float[Tensor, "batch channel height width"]:
    """Keeps some channels of each patch; the rest becomes its mean and a hundredth of noise.

    Args:
        patch: in [0, 1].
        kept: True for channels that stay.
        mean: of each channel over the data.
        noise: standard normal; it is scaled by the standard deviation of what is kept.
    """
    kept = kept.view(*kept.shape, 1, 1)
    deviation = patch.std((2, 3), keepdim=True, correction=0)  # (batch, channel, 1, 1)
    remaining = (deviation * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True)
    return torch.where(kept, patch, mean + NOISE * remaining * noise)


@final
class ContextPrediction(Objective):
    """Tells where a patch lies beside another; see the module's docstring."""

    fields = ("image",)
    chance_loss = math.log(NUM_PLACES)
    mean: Tensor

    def __init__(self, config: Config, encoder: Encoder, spec: ImageSpec):
        super().__init__()
        self.config, self.encoder = config, encoder
        self.grid = grid_of(config, spec.size)
        self.head = projection_head((2 * encoder.dim, config.hidden_dim, NUM_PLACES))
        self.register_buffer("mean", torch.tensor(spec.mean).view(-1, 1, 1), persistent=False)

    def loss(self, batch: Batch, generator: torch.Generator) -> Output:
        """Two patches of each picture, one forward pass, cross entropy over the eight places."""
        image = batch["image"]
        place = torch.randint(NUM_PLACES, image.shape[:1], generator=generator, device=image.device)
        corners = draw_corners(self.grid, place, generator)
        patches = torch.cat([cut(image, corner, self.grid.patch) for corner in corners])
        pooled = self.encoder.pooled({"image": self._hidden_colours(patches, generator)})
        logits = self.head(torch.cat(pooled.chunk(2), 1)).float()  # (batch, place)
        accuracy = (logits.detach().argmax(1) == place).float().mean()
        return Output(F.cross_entropy(logits, place), len(image), {"accuracy": accuracy})

    def _hidden_colours(self, patch: Tensor, generator: torch.Generator) -> Tensor:
        """Patches as the encoder gets them: in [0, 1], some colours dropped, resized."""
        patch = patch / 255 if patch.dtype == torch.uint8 else patch.float()
        count, channels = patch.shape[:2]
        if self.config.drop_colour and channels == 3:
            device = patch.device
            draw = torch.rand(count, 1, generator=generator, device=device)
            channel = torch.randint(3, (count, 1), generator=generator, device=device)
            kept = (channel == torch.arange(3, device=device)) | (draw >= self.config.drop_colour)
            noise = torch.randn(patch.shape, generator=generator, device=device)
            patch = drop_colours(patch, kept, self.mean, noise)
        if self.config.resize:
            patch = F.interpolate(patch, size=self.config.resize, mode="bilinear", antialias=True)
        return patch
