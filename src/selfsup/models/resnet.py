"""Residual networks for pictures, in the layout of the public ResNet weights.

Stages of residual blocks (He et al., 2015, arXiv 1512.03385); each stage after the first halves the
map and widens it. Parameters are named as torchvision's (`conv1`, `layer1.0.bn2`, `layer2.0.
downsample.0`), so public weights load without their `fc`. As in those weights, a bottleneck halves
the map in its 3x3 convolution ("v1.5"), where the paper does it in the first 1x1. The `cifar` stem
is that of small pictures in SimCLR (Chen et al., 2020, arXiv 2002.05709, appendix B.9); `strided`
is a quarter of its work and is our own. `presets.toml` has the sizes.

Stages have different widths, so `Features.hidden` holds the last map alone and `num_layers` is 0.

Axes: batch; channel of the picture; height, width of a picture or map; dim: width of the last map;
position: height * width of the last map, row by row.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from selfsup.batch import Batch, ImageSpec
from selfsup.models.batch_norm import BatchNorm
from selfsup.models.encoder import Encoder, Features


@dataclass(frozen=True, kw_only=True)
class Config:
    """The shape of a residual network; the defaults are ResNet-18."""

    block: Literal["basic", "bottleneck"] = "basic"  # two 3x3; or 1x1, 3x3, 1x1 and 4 times as wide
    blocks: tuple[int, ...] = (2, 2, 2, 2)  # number of blocks in each stage
    widths: tuple[int, ...] = (64, 128, 256, 512)  # of each stage's 3x3 convolutions
    # what comes before the stages. imagenet: 7x7 with stride 2 and a max-pool, a map of size / 4;
    # cifar: 3x3, all of the size; strided: 3x3 with stride 2, size / 2
    stem: Literal["imagenet", "cifar", "strided"] = "imagenet"
    stem_width: int = 0  # channels that the stem gives; 0: the first stage's width
    channels_last: bool = True  # keep maps channel by channel in memory: faster, the same result
    zero_init_residual: bool = True  # each block begins as the identity (arXiv 1706.02677, 5.1)

    def __post_init__(self):
        if not self.blocks or min(self.blocks) < 1:
            raise ValueError(f"blocks needs a number above 0 for each stage, got {self.blocks}")
        if len(self.widths) != len(self.blocks) or min(self.widths) < 1:
            raise ValueError(
                f"widths needs a number above 0 for each of the {len(self.blocks)} stages in "
                f"blocks = {self.blocks}, got {self.widths}"
            )
        if self.stem_width < 0:
            raise ValueError(f"stem_width must not be negative, got {self.stem_width}")

    @property
    def expansion(self) -> int:
        """How much wider a block's output is than its 3x3 convolution."""
        return 4 if self.block == "bottleneck" else 1

    @property
    def stem_channels(self) -> int:
        """Channels that the stem gives."""
        return self.stem_width or self.widths[0]


def convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    """A size x size convolution that keeps height and width, divided by `stride`."""
    return Convolution(inputs, outputs, size, stride, padding=size // 2, bias=False)


class Convolution(nn.Conv2d):
    """A convolution that is quick on tiny maps too.

    Where the result has at most 2 x 2 positions, most of a kernel lies on the border's zeros, which
    the CPU's kernels multiply all the same. One matrix product per position, over the taps that hit
    the map, takes a third of the time (256 channels, 256 pictures, one thread).
    """

    def forward(
        self, x: Float[Tensor, "batch inputs height width"]
    ) -> Float[Tensor, "batch outputs height_out width_out"]:
        """As in every convolution."""
        rows, columns = (
            hits(length, self.kernel_size[0], self.stride[0]) for length in x.shape[2:]
        )
        tiny = max(len(rows), len(columns)) <= 2 < self.kernel_size[0]
        last = x.is_contiguous(memory_format=torch.channels_last)
        if x.device.type != "cpu" or not tiny or not last:
            return super().forward(x)
        maps, taps = x.permute(0, 2, 3, 1), self.weight.permute(2, 3, 1, 0)
        outs = [
            maps[:, row, column].flatten(1) @ taps[row_taps, column_taps].flatten(0, 2)
            for row, row_taps in rows
            for column, column_taps in columns
        ]
        out = torch.stack(outs, 1).unflatten(1, (len(rows), len(columns)))
        return out.permute(0, 3, 1, 2)


def hits(length: int, kernel: int, stride: int) -> list[tuple[slice, slice]]:
    """For every output position along one side: the inputs it reads, and the taps that read them.

    >>> hits(2, 3, 1)
    [(slice(0, 2, None), slice(1, 3, None)), (slice(0, 2, None), slice(0, 2, None))]
    """
    pad, found = kernel // 2, []
    for start in range(-pad, length + pad - kernel + 1, stride):
        low, high = max(start, 0), min(start + kernel, length)
        found.append((slice(low, high), slice(low - start, high - start)))
    return found


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al., figure 5, left)."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = convolution(inputs, width, 3, stride), BatchNorm(width)
        self.conv2, self.bn2 = convolution(width, width, 3), BatchNorm(width)
        self.downsample = shortcut(inputs, width, stride)

    @property
    def last_norm(self) -> BatchNorm:
        """The normalisation just before the sum."""
        return self.bn2

    def forward(
        self, x: Float[Tensor, "batch inputs height width"]
    ) -> Float[Tensor, "batch outputs height_out width_out"]:
        """One block."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        return F.relu(out.add_(x if self.downsample is None else self.downsample(x)), inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut (He et al., figure 5, right)."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = convolution(inputs, width, 1), BatchNorm(width)
        self.conv2, self.bn2 = convolution(width, width, 3, stride), BatchNorm(width)
        self.conv3, self.bn3 = convolution(width, 4 * width, 1), BatchNorm(4 * width)
        self.downsample = shortcut(inputs, 4 * width, stride)

    @property
    def last_norm(self) -> BatchNorm:
        """The normalisation just before the sum."""
        return self.bn3

    def forward(
        self, x: Float[Tensor, "batch inputs height width"]
    ) -> Float[Tensor, "batch outputs height_out width_out"]:
        """One block."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        return F.relu(out.add_(x if self.downsample is None else self.downsample(x)), inplace=True)


def shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    """A projection where the block changes the shape, else None (He et al., option B)."""
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(convolution(inputs, outputs, 1, stride), BatchNorm(outputs))


class ResNetEncoder(Encoder):
    """Pictures to `Features`: one vector per position of the last map.

    Reads `image`: uint8, or float in [0, 1]; it is standardised with the mean and deviation of
    `spec`. Any height and width will do. `num_layers` is 0: only the last map has width `dim`.

    Attributes:
        config: the shape of the network.
        spec: the pictures that it was made for.

    >>> spec = ImageSpec(size=32, channels=3, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
    >>> encoder = ResNetEncoder(Config(blocks=(1, 1), widths=(4, 8), stem="cifar"), spec)
    >>> features = encoder({"image": torch.zeros(2, 3, 32, 32, dtype=torch.uint8)})
    >>> features.last.shape, features.pooled.shape
    (torch.Size([2, 256, 8]), torch.Size([2, 8]))
    """

    reads = ("image",)
    mean: Tensor
    std: Tensor

    def __init__(self, config: Config, spec: ImageSpec):
        super().__init__()
        self.config, self.spec = config, spec
        self.dim, self.num_layers = config.widths[-1] * config.expansion, 0
        for name, values in (("mean", spec.mean), ("std", spec.std)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)
        size, stride = (7 if config.stem == "imagenet" else 3), (1 if config.stem == "cifar" else 2)
        self.conv1 = convolution(spec.channels, config.stem_channels, size, stride)
        self.bn1 = BatchNorm(config.stem_channels)
        self.stages = [f"layer{number + 1}" for number in range(len(config.blocks))]
        inputs = config.stem_channels
        for name, num_blocks, width in zip(self.stages, config.blocks, config.widths, strict=True):
            stride = 1 if name == "layer1" else 2
            self.add_module(name, build_stage(config, inputs, width, num_blocks, stride))
            inputs = width * config.expansion
        self._initialise()

    def _initialise(self) -> None:
        """He et al., 2015, arXiv 1502.01852; batch norms begin as the identity already."""
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
            if self.config.zero_init_residual and isinstance(part, BasicBlock | Bottleneck):
                nn.init.zeros_(part.last_norm.weight)

    def feature_map(self, batch: Batch) -> Float[Tensor, "batch dim height width"]:
        """The last map of each picture, before any pooling."""
        x = self._standardise(batch["image"])
        if self.config.channels_last:  # weights need not be: kernels reorder them, they are small
            x = x.contiguous(memory_format=torch.channels_last)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        if self.config.stem == "imagenet":
            x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
        for name in self.stages:
            x = self.get_submodule(name)(x)
        return x

    def forward(self, batch: Batch) -> Features:
        """Encodes one batch; `pooled` is the mean over positions, in float32."""
        x = self.feature_map(batch)
        hidden = x.flatten(2).transpose(1, 2)  # (batch, position, dim)
        mask = torch.ones(hidden.shape[:2], dtype=torch.bool, device=x.device)
        return Features((hidden,), mask, x.float().mean((2, 3)))

    def _standardise(self, image: Tensor) -> Float[Tensor, "batch channel height width"]:
        scaled = image.to(self.mean.dtype)
        if image.dtype == torch.uint8:
            scaled = scaled / 255
        return (scaled - self.mean) / self.std


def build_stage(
    config: Config, inputs: int, width: int, num_blocks: int, stride: int
) -> nn.Sequential:
    """The blocks of one stage; the first takes `inputs` channels and has the stride."""
    kind = Bottleneck if config.block == "bottleneck" else BasicBlock
    first = kind(inputs, width, stride)
    later = [kind(width * config.expansion, width, 1) for _ in range(num_blocks - 1)]
    return nn.Sequential(first, *later)
