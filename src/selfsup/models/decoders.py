"""Decoders: from a code back to the input, and the input on the scale on which it is rebuilt.

Every choice by kind of data that methods with a decoder need is made here, so they have none. All
of them work on standardised values: pictures as (pixel / 255 - mean) / std with the statistics of
their spec, rows and series as they are, for their preprocessors have standardised them.

| spec         | field    | value                    | decoder                                   |
|--------------|----------|--------------------------|-------------------------------------------|
| `TableSpec`  | `row`    | (column,)                | multilayer perceptron                     |
| `SeriesSpec` | `series` | (time, channel)          | multilayer perceptron                     |
| `ImageSpec`  | `image`  | (channel, height, width) | residual blocks, upsampling, convolutions |

The picture decoder is that of the VQ-VAE (van den Oord et al., 2017, arXiv 1711.00937, section
4.1) with two differences: each transposed convolution is a nearest-neighbour upsampling and a 3x3
convolution, which leaves no checkerboard (Odena et al., 2016, "Deconvolution and Checkerboard
Artifacts"), and maps become narrower as they grow, which halves the work of each doubling.

Axes: batch; dim of the code; grid: none (a vector) or height and width of a map of codes; value:
the axes of one input, as in the table above.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from selfsup.batch import Batch, ImageSpec, SeriesSpec, Spec, TableSpec
from selfsup.errors import ConfigError, DataError
from selfsup.models.encoder import Encoder

SMALLEST_SIDE = 4  # of the map that a vector becomes
LEAST_WIDTH = 16  # of the widest maps


def input_field(spec: Spec) -> str:
    """The batch field that is rebuilt.

    Raises:
        ConfigError: that kind of data has no decoder.
    """
    match spec:
        case ImageSpec():
            return "image"
        case SeriesSpec():
            return "series"
        case TableSpec():
            return "row"
    raise ConfigError(
        f"a method that rebuilds its input needs pictures, table rows or series (data.name), got "
        f"{type(spec).__name__}; for text there is masked_language"
    )


def input_shape(spec: Spec) -> tuple[int, ...]:
    """The shape of one input; (length, channels) for a series.

    >>> input_shape(SeriesSpec(channels=2, length=96))
    (96, 2)
    """
    match spec:
        case ImageSpec():
            return spec.channels, spec.size, spec.size
        case SeriesSpec():
            return spec.length, spec.channels
        case TableSpec():
            return (len(spec.source),)
    raise ConfigError(f"no input shape for {type(spec).__name__}")


def standardised(batch: Batch, spec: Spec) -> Float[Tensor, " batch *value"]:
    """The input on the standardised scale, float32; NaN where a series has no value."""
    values = batch[input_field(spec)]
    if not isinstance(spec, ImageSpec):
        return values.float()
    scaled = values.float() / 255 if values.dtype == torch.uint8 else values.float()
    mean, std = _statistics(spec, values.device)
    return (scaled - mean) / std


def input_batch(batch: Batch, values: Float[Tensor, " batch *value"], spec: Spec) -> Batch:
    """The batch with other values, given on the standardised scale: what an encoder can read.

    Pictures become floats that are not clamped to [0, 1]: encoders standardise them again.
    """
    if isinstance(spec, ImageSpec):
        mean, std = _statistics(spec, values.device)
        values = values * std + mean
    return {**batch, input_field(spec): values}


def target(batch: Batch, spec: Spec) -> Float[Tensor, " batch *value"]:
    """What a decoder should give, in its shape; NaN where a series has no value or has ended.

    Raises:
        DataError: the input has another shape than the decoder was made for.
    """
    values, shape = standardised(batch, spec), input_shape(spec)
    if isinstance(spec, SeriesSpec) and values.shape[1] < spec.length:
        values = F.pad(values, (0, 0, 0, spec.length - values.shape[1]), value=math.nan)
    if values.shape[1:] != shape:
        raise DataError(
            f"the decoder rebuilds inputs of shape {shape}, got {tuple(values.shape[1:])}; resize "
            "pictures or cut series to the size that the model was trained on"
        )
    return values


def log_spacing(spec: Spec) -> float:
    """Mean log distance between neighbouring values on the standardised scale.

    Pictures have 256 levels per channel, 1 / (255 std) apart; other values are continuous: 0. Minus
    this is what turns nats of a density into nats of the probability of a level.
    """
    if not isinstance(spec, ImageSpec):
        return 0.0
    return -sum(math.log(255 * std) for std in spec.std) / len(spec.std)


def grid_of(encoder: Encoder, spec: ImageSpec) -> int:
    """The side of the square map of positions in an encoder's last layer.

    Raises:
        ConfigError: the positions are not a square map.
    """
    training = encoder.training
    with torch.no_grad():
        features = encoder.eval()({"image": torch.zeros(1, spec.channels, spec.size, spec.size)})
    encoder.train(training)
    count = features.last.shape[1]
    if math.isqrt(count) ** 2 != count:
        raise ConfigError(
            f"the encoder gives {count} positions, which are not a square map; use a residual "
            "network or a transformer over patches (model.name)"
        )
    return math.isqrt(count)


def build_decoder(spec: Spec, dim: int, width: int = 256, grid: int = 0) -> nn.Module:
    """From codes to standardised values of shape (batch, *input_shape(spec)).

    Args:
        spec: the data that are rebuilt.
        dim: width of a code.
        width: of the hidden layers; for pictures, channels of the smallest map.
        grid: 0: a code is one vector (batch, dim); for pictures it may also be a map of that side,
            (batch, dim, grid, grid).

    >>> spec = TableSpec(columns=("age", "city"), source=(0, 1, 1))
    >>> build_decoder(spec, dim=4, width=8)(torch.zeros(2, 4)).shape
    torch.Size([2, 3])
    """
    if isinstance(spec, ImageSpec):
        return ImageDecoder(spec, dim, width, grid)
    shape = input_shape(spec)
    return nn.Sequential(
        *(nn.Linear(dim, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()),
        *(nn.Linear(width, math.prod(shape)), nn.Unflatten(1, shape)),
    )


class ResidualBlock(nn.Module):
    """ReLU, 3x3 convolution, ReLU, 1x1 convolution, beside the identity (VQ-VAE, section 4.1)."""

    def __init__(self, width: int):
        super().__init__()
        self.spatial = nn.Conv2d(width, width, 3, padding=1)
        self.mixing = nn.Conv2d(width, width, 1)

    def forward(
        self, x: Float[Tensor, "batch channel height width"]
    ) -> Float[Tensor, "batch channel height width"]:
        """One block."""
        return x + self.mixing(F.relu(self.spatial(F.relu(x))))


class ImageDecoder(nn.Module):
    """Codes to pictures: two residual blocks on the smallest map, then upsampling to full size.

    Args:
        spec: size and channels of the pictures.
        dim: width of a code.
        width: channels of the smallest map; each doubling halves them, down to 16.
        grid: side of the map of codes; 0: a code is one vector.

    >>> spec = ImageSpec(size=28, channels=1, mean=(0.5,), std=(0.25,))
    >>> ImageDecoder(spec, dim=8, width=32, grid=0)(torch.zeros(2, 8)).shape
    torch.Size([2, 1, 28, 28])
    """

    def __init__(self, spec: ImageSpec, dim: int, width: int, grid: int):
        super().__init__()
        if grid:
            self.start: nn.Module = nn.Conv2d(dim, width, 3, padding=1)
        else:
            grid = spec.size
            while grid > SMALLEST_SIDE:
                grid = -(-grid // 2)
            inner = nn.Linear(dim, width * grid**2)
            self.start = nn.Sequential(inner, nn.Unflatten(1, (width, grid, grid)))
        self.blocks = nn.Sequential(ResidualBlock(width), ResidualBlock(width))
        self.sides = upsampled_sides(grid, spec.size)
        widths = [max(width >> k, min(width, LEAST_WIDTH)) for k in range(len(self.sides) + 1)]
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.ReLU(), nn.Conv2d(inputs, outputs, 3, padding=1), ResidualBlock(outputs)
            )
            for inputs, outputs in pairwise(widths)
        )
        self.end = nn.Sequential(nn.ReLU(), nn.Conv2d(widths[-1], spec.channels, 3, padding=1))

    def forward(
        self, code: Float[Tensor, "batch dim *grid"]
    ) -> Float[Tensor, "batch channel size size"]:
        """Standardised pictures."""
        x = self.blocks(self.start(code))
        for side, stage in zip(self.sides, self.stages, strict=True):
            x = stage(F.interpolate(x, size=(side, side), mode="nearest"))
        return self.end(x)


def upsampled_sides(first: int, last: int) -> list[int]:
    """Sides of the maps after the first, each at most twice the one before, up to `last`.

    >>> upsampled_sides(4, 28), upsampled_sides(8, 8)
    ([7, 14, 28], [])
    """
    sides: list[int] = []
    while last > first:
        sides.append(last)
        last = -(-last // 2)
    return sides[::-1]


def _statistics(spec: ImageSpec, device: torch.device) -> Float[Tensor, "2 channel 1 1"]:
    return torch.tensor((spec.mean, spec.std), device=device).view(2, -1, 1, 1)
