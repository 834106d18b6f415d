"""Waveforms become vectors: the convolutions of wav2vec 2.0, and its convolution for positions.

Baevski, Zhou, Mohamed and Auli, "wav2vec 2.0: A Framework for Self-Supervised Learning of Speech
Representations" (2020, arXiv 2006.11477, sections 2 and 4.2); HuBERT and its heirs read sound with
the same layers. Seven convolutions without padding make one vector of every 320 samples, each of
which reads 400 of them (20 and 25 ms at 16 kHz). `vectors` gives what comes out of them, where a
method may hide some; layer normalisation and the linear map to the model's width are part of
`place`, as is a wide convolution over positions, which takes the place of position vectors.

Padding changes nothing: a real position reads real samples alone, and means and variances over time
leave padding out. Published implementations count it in, so there a sound's features depend on
the length of the others in its batch. Padding stands at the end of a row.

Axes: batch; samples; time: positions behind a convolution; channel; width = channels of `vectors`.

Deviation: every waveform is brought to mean 0 and variance 1; the authors do so for their larger
model ("layer"). Under "group" the first normalisation would undo it anyway.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from selfsup.batch import Batch
from selfsup.errors import DataError
from selfsup.models.embeddings import InputEmbedding

QUIET = 1e-7  # added to a waveform's variance
EPSILON = 1e-5  # added to a channel's variance
POSITION_GROUPS = 16


class WaveformEmbedding(InputEmbedding):
    """Samples to vectors by convolutions.

    Args:
        dim: width of the result.
        channels: of every convolution.
        kernels: of the convolutions, first to last, in positions of what is below.
        strides: the same.
        conv_norm: "group": of the first convolution's output each channel is normalised over time;
            "layer": behind every convolution each position is, over channels, and the convolutions
            have biases.
        conv_positions: kernel of the convolution over positions; 0: none.
        options: of `build_places`.

    Attributes:
        hop: samples from one position to the next.
        reach: samples that a position reads.

    >>> embedding = WaveformEmbedding(8, channels=4)
    >>> embedding.vectors({"waveform": torch.randn(2, 16000)}).shape, embedding.hop
    (torch.Size([2, 49, 4]), 320)
    """

    field = "waveform"

    def __init__(
        self,
        dim: int,
        channels: int = 512,
        kernels: Sequence[int] = (10, 3, 3, 3, 3, 2, 2),
        strides: Sequence[int] = (5, 2, 2, 2, 2, 2, 2),
        conv_norm: Literal["group", "layer"] = "group",
        conv_positions: int = 0,
        **options: Any,
    ):
        super().__init__()
        self.steps = list(zip(kernels, strides, strict=True))
        self.hop, self.reach = math.prod(strides), 1
        for kernel, stride in reversed(self.steps):
            self.reach = (self.reach - 1) * stride + kernel
        later: Literal["layer", "none"] = "layer" if conv_norm == "layer" else "none"
        self.layers = nn.ModuleList(
            ConvLayer(channels if i else 1, channels, kernel, stride, later if i else conv_norm)
            for i, (kernel, stride) in enumerate(self.steps)
        )
        self.content_norm = nn.LayerNorm(channels)
        self.linear = nn.Linear(channels, dim)
        self.conv_positions = ConvPositions(dim, conv_positions) if conv_positions else None
        self.build_places(dim, **options)
        self.width = channels

    def vectors(self, batch: Batch) -> Float[Tensor, "batch time width"]:
        """What the last convolution gives.

        Raises:
            DataError: the batch is shorter than what one position reads.
        """
        waveform, mask = batch["waveform"], batch.get("mask")
        if waveform.shape[1] < self.reach:
            raise DataError(
                f"a waveform of {waveform.shape[1]} samples is shorter than the {self.reach} that "
                f"one position reads; leave such sounds out (data.min_seconds)"
            )
        x = standardised(waveform.unsqueeze(1).float(), mask, QUIET)
        for number, layer in enumerate(self.layers, 1):
            x = layer(x, None if mask is None else self._covered(mask, number))
        return x.transpose(1, 2)

    def real(self, batch: Batch) -> Bool[Tensor, "batch time"] | None:
        """A position is real when all the samples that it reads are."""
        return self._covered(batch["mask"], len(self.steps)) if "mask" in batch else None

    def place(
        self,
        vectors: Float[Tensor, "batch time width"],
        positions: Int[Tensor, "*batch time"],
        real: Bool[Tensor, "batch time"] | None = None,
    ) -> Float[Tensor, "batch time dim"]:
        """Normalises, projects, adds the convolution over positions; then as every embedding."""
        out = self.linear(self.content_norm(vectors)).to(self.linear.weight.dtype)
        if self.conv_positions is not None:
            out = out + self.conv_positions(out, real)
        return super().place(out, positions)

    def _covered(self, mask: Tensor, layers: int) -> Tensor:
        """(batch, time) True behind so many layers where all samples are real."""
        time, length = mask.shape[1], mask.sum(1, keepdim=True)  # (batch, 1)
        for kernel, stride in self.steps[:layers]:
            time, length = (time - kernel) // stride + 1, (length - kernel) // stride + 1
        return torch.arange(time, device=mask.device) < length


def standardised(
    x: Float[Tensor, "batch channel time"],
    real: Bool[Tensor, "batch time"] | None,
    epsilon: float,
) -> Float[Tensor, "batch channel time"]:
    """Every channel of every row with mean 0 and variance 1 over its real time; 0 where padded.

    Args:
        x: what to normalise, whatever stands where it is padded.
        real: True where it is real; None: everywhere.
        epsilon: added to the variance.
    """
    if real is None:
        variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
        return (x - mean) * (variance + epsilon).rsqrt()
    real = real.unsqueeze(1)
    count = real.sum(-1, keepdim=True).clamp(min=1)
    mean = torch.where(real, x, 0.0).sum(-1, keepdim=True) / count
    centred = torch.where(real, x - mean, 0.0)
    variance = centred.square().sum(-1, keepdim=True) / count
    return centred * (variance + epsilon).rsqrt()


class TimeNorm(nn.Module):
    """Normalises each channel over the real time; group normalisation with a group per channel."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(
        self, x: Float[Tensor, "batch channel time"], real: Bool[Tensor, "batch time"] | None
    ) -> Float[Tensor, "batch channel time"]:
        """In float32; where it is padded anything may stand."""
        x = x.float()
        if real is None:
            return self._whole(x)
        if x.device.type == "cpu":  # several times faster than masked sums, which a GPU prefers
            lengths = real.sum(1).tolist()
            if min(lengths) > 1:  # fewer than two are refused there
                rows = [self._whole(row[None, :, :n]) for row, n in zip(x, lengths, strict=True)]
                return torch.cat([F.pad(row, (0, x.shape[2] - row.shape[2])) for row in rows])
        out = standardised(x, real, EPSILON)
        return out * self.weight.unsqueeze(1) + self.bias.unsqueeze(1)

    def _whole(self, x: Float[Tensor, "batch channel time"]) -> Float[Tensor, "batch channel time"]:
        return F.group_norm(x, len(self.weight), self.weight, self.bias, EPSILON)


class ConvLayer(nn.Module):
    """A convolution over time, a normalisation or none, GELU."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        stride: int,
        norm: Literal["group", "layer", "none"],
    ):
        super().__init__()
        self.convolution = nn.Conv1d(inputs, outputs, kernel, stride, bias=norm == "layer")
        nn.init.kaiming_normal_(self.convolution.weight)
        self.time_norm = TimeNorm(outputs) if norm == "group" else None
        self.channel_norm = nn.LayerNorm(outputs) if norm == "layer" else None

    def forward(
        self, x: Float[Tensor, "batch below samples"], real: Bool[Tensor, "batch time"] | None
    ) -> Float[Tensor, "batch channel time"]:
        """`real` is of the result."""
        x = self.convolution(x)
        if self.time_norm is not None:
            x = self.time_norm(x, real)
        if self.channel_norm is not None:
            x = self.channel_norm(x.transpose(1, 2)).transpose(1, 2)
        return F.gelu(x)


class ConvPositions(nn.Module):
    """Tells a position where it stands by what stands around it: a wide grouped convolution.

    As long as its input; the kernel's length is a weight of its own at every place of it (weight
    normalisation, Salimans and Kingma, 2016, arXiv 1602.07868), which keeps training stable.

    Attributes:
        gain: (kernel,) lengths; `direction`: (dim, dim / groups, kernel) of any length.
    """

    def __init__(self, dim: int, kernel: int):
        super().__init__()
        self.groups = math.gcd(POSITION_GROUPS, dim)
        std = 2 / (kernel * dim) ** 0.5
        self.direction = nn.Parameter(std * torch.randn(dim, dim // self.groups, kernel))
        self.gain = nn.Parameter(torch.linalg.vector_norm(self.direction.detach(), dim=(0, 1)))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(
        self, x: Float[Tensor, "batch time dim"], real: Bool[Tensor, "batch time"] | None
    ) -> Float[Tensor, "batch time dim"]:
        """What to add to every position; padding counts as 0."""
        if real is not None:
            x = x.masked_fill(~real.unsqueeze(-1), 0.0)
        length = torch.linalg.vector_norm(self.direction, dim=(0, 1))  # (kernel,)
        weight, kernel = self.direction * (self.gain / length), len(self.gain)
        padding = kernel // 2
        out = F.conv1d(x.transpose(1, 2), weight, self.bias, padding=padding, groups=self.groups)
        return F.gelu(out[..., : x.shape[1]]).transpose(1, 2)  # an even kernel gives one too many
