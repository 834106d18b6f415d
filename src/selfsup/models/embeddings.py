"""Embeddings and positions: tokens, patches, frames and series become vectors in their places.

The sum of the token, segment and learned position vectors is scaled, sinusoids (Vaswani et al.,
2017, arXiv 1706.03762) are added, the result is normalised (BERT), dropped out, and projected where
the table is narrower than the model (ALBERT, Lan et al., 2020, arXiv 1909.11942). Rotary positions
(RoFormer, Su et al., 2021, arXiv 2104.09864) enter in attention; their maths is here too.

A position is the number of real tokens before it in its document. So padding may stand on either
side, a packed row equals its documents alone, and generation goes on from prompts of unequal
length. BERT and GPT-2 count slots instead, which is equal when padding is on the right.
"""

import math
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from selfsup.batch import AudioSpec, Batch, ImageSpec, SeriesSpec
from selfsup.errors import ConfigError, DataError
from selfsup.models.dropout import Dropout


class InputEmbedding(nn.Module):
    """What enters a transformer: content vectors, then their places.

    Every kind of input is a subclass: it builds what `vectors` needs, then calls `build_places`;
    `place` is the same for all. In between a method may put other vectors where it hides something.

    Attributes:
        field: name of the batch field that it reads.
        width: of `vectors`.
        positions, norm, projection: modules, or None where not asked for.
    """

    field: str
    width: int

    def build_places(
        self,
        dim: int,
        width: int = 0,
        positions: str = "none",
        max_length: int = 0,
        scale: float = 1.0,
        norm: nn.Module | None = None,
        dropout: float = 0.0,
    ) -> None:
        """Makes what `place` needs.

        Args:
            dim: width of the result.
            width: width of the content vectors; where it differs from `dim`, a linear layer
                projects; 0: `dim`.
            positions: "learned" and "sinusoidal" are added; any other kind is left to attention.
            max_length: number of learned positions.
            scale: factor on the sum of the learned vectors.
            norm: a normalisation over `width`, or None.
            dropout: probability, after the normalisation.
        """
        width = width or dim
        self.width, self.max_length, self.scale = width, max_length, scale
        self.sinusoidal = positions == "sinusoidal"
        self.positions = nn.Embedding(max_length, width) if positions == "learned" else None
        self.norm = norm
        self.dropout = Dropout(dropout)
        self.projection = nn.Linear(width, dim) if width != dim else None

    def vectors(self, batch: Batch) -> Float[Tensor, "batch time width"]:
        """The content of every position."""
        raise TypeError(f"{type(self).__name__} does not define vectors")

    def real(self, batch: Batch) -> Bool[Tensor, "batch time"] | None:
        """True at the real positions of `vectors`; None where all are."""
        return batch.get("mask")

    def place(
        self,
        vectors: Float[Tensor, "batch time width"],
        positions: Int[Tensor, "*batch time"],
        real: Bool[Tensor, "batch time"] | None = None,
    ) -> Float[Tensor, "batch time dim"]:
        """Scales, adds positions, normalises, drops out, projects.

        Args:
            vectors: from `vectors`.
            positions: place of each vector in its document, shared by all rows or one per row.
            real: from `real`, for an embedding whose places read their neighbours.
        """
        out = vectors
        if self.positions is not None:
            out = out + self.positions(positions)
        out = out * self.scale
        if self.sinusoidal:
            out = out + sinusoids(positions, out.shape[-1]).to(out.dtype)
        if self.norm is not None:
            out = self.norm(out)
        out = self.dropout(out)
        if self.projection is None:
            return out
        # back to the table's precision: under autocast the residual stream begins here
        return self.projection(out).to(self.projection.weight.dtype)  # (batch, time, dim)

    def check_length(self, length: int) -> None:
        """Refuses rows that the learned positions do not reach.

        Raises:
            DataError: `length` positions are more than the table of positions holds.
        """
        if self.positions is not None and length > self.max_length:
            raise DataError(
                f"a row of {length} tokens is longer than the {self.max_length} learned positions "
                f"of this model (model.max_length); shorten the rows, or pre-train with rotary "
                f"positions, which have no limit"
            )


class TokenEmbedding(InputEmbedding):
    """Ids and segments to vectors.

    Args:
        vocabulary_size: number of token ids.
        dim: width of the result.
        segment_types: number of segments; 0: segments are ignored.
        options: of `build_places`; `width` is that of the table.

    Attributes:
        tokens: the table; heads tie their weights to `tokens.weight`, (vocabulary, width).
        segments: a table, or None.

    >>> embedding = TokenEmbedding(100, dim=8)
    >>> embedding.vectors({"tokens": torch.tensor([[5, 7, 2]])}).shape
    torch.Size([1, 3, 8])
    """

    field = "tokens"

    def __init__(self, vocabulary_size: int, dim: int, segment_types: int = 0, **options: Any):
        super().__init__()
        width = options.get("width") or dim
        self.tokens = nn.Embedding(vocabulary_size, width)
        self.segments = nn.Embedding(segment_types, width) if segment_types else None
        self.build_places(dim, **options)

    def vectors(self, batch: Batch) -> Float[Tensor, "batch time width"]:
        """Token vectors, plus segment vectors."""
        out = self.tokens(batch["tokens"])  # (batch, time, width)
        if self.segments is None:
            return out
        # one row broadcasts; a batch without the field is all sentence A, as published
        segments = batch.get("segments")
        return out + (self.segments.weight[0] if segments is None else self.segments(segments))


class PatchEmbedding(InputEmbedding):
    """A picture's square patches, each a linear map of its standardised pixels.

    The vision transformer (Dosovitskiy et al., 2020, arXiv 2010.11929), without a class token:
    the pooled vector is the mean.

    Args:
        spec: size, channels and their statistics; reads `image`, uint8 or float in [0, 1].
        patch: pixels of a patch's side.
        dim: width of the result.
        options: of `build_places`.
    """

    field = "image"
    mean: Tensor
    std: Tensor

    def __init__(self, spec: ImageSpec, patch: int, dim: int, **options: Any):
        if spec.size % patch:
            raise ConfigError(f"model.patch = {patch} does not divide the pictures' {spec.size}")
        super().__init__()
        self.patch = patch
        self.linear = nn.Linear(spec.channels * patch**2, options.get("width") or dim)
        self.build_places(dim, **options)
        self.register_buffer("mean", torch.tensor(spec.mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(-1, 1, 1), persistent=False)

    def vectors(self, batch: Batch) -> Float[Tensor, "batch time width"]:
        """Patches in reading order."""
        image = batch["image"]
        scaled = image.float() / 255 if image.dtype == torch.uint8 else image
        return self.linear(patches((scaled - self.mean) / self.std, self.patch))

    def real(self, batch: Batch) -> None:
        """Every patch is."""


def patches(
    image: Float[Tensor, "batch channel height width"], size: int
) -> Float[Tensor, "batch patch pixels"]:
    """Square patches in reading order, each flattened as (channel, row, column).

    >>> patches(torch.arange(16.0).view(1, 1, 4, 4), 2)[0, 1].tolist()
    [2.0, 3.0, 6.0, 7.0]
    """
    rows = image.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # (batch, channel, h, s, w, s)
    return rows.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


class FrameEmbedding(InputEmbedding):
    """Log-mel frames, `stack` of them to a position, each through a linear map.

    The last frames of a row that do not fill a position are left out.

    Args:
        spec: width of a frame; reads `frames`.
        stack: frames per position.
        dim: width of the result.
        options: of `build_places`.

    Attributes:
        hop: samples from one position to the next.
    """

    field = "frames"

    def __init__(self, spec: AudioSpec, stack: int, dim: int, **options: Any):
        super().__init__()
        self.stack, self.hop = stack, stack * spec.hop
        self.linear = nn.Linear(spec.mel * stack, options.get("width") or dim)
        self.build_places(dim, **options)

    def vectors(self, batch: Batch) -> Float[Tensor, "batch time width"]:
        """Stacked frames, mapped."""
        return self.linear(stacked(batch["frames"], self.stack))

    def real(self, batch: Batch) -> Bool[Tensor, "batch time"] | None:
        """A position is real when all its frames are."""
        if "mask" not in batch:
            return None
        return stacked(batch["mask"].unsqueeze(-1), self.stack).all(-1)


def stacked(
    frames: Shaped[Tensor, "batch time width"], count: int
) -> Shaped[Tensor, "batch position stacked"]:
    """Every `count` neighbouring frames as one; a rest that is too short is left out."""
    if count == 1:
        return frames
    whole = frames.shape[1] // count * count
    return frames[:, :whole].unflatten(1, (-1, count)).flatten(2)


class SeriesEmbedding(InputEmbedding):
    """Patches of a time series: `patch` steps of all channels, each through a linear map.

    Missing values enter as 0 with a flag beside them, so a hidden or missing step can be told from
    a zero.

    Args:
        spec: channels; reads `series`, NaN where missing.
        patch: time steps per position.
        dim: width of the result.
        options: of `build_places`.
    """

    field = "series"

    def __init__(self, spec: SeriesSpec, patch: int, dim: int, **options: Any):
        super().__init__()
        self.patch = patch
        self.linear = nn.Linear(2 * spec.channels * patch, options.get("width") or dim)
        self.build_places(dim, **options)

    def vectors(self, batch: Batch) -> Float[Tensor, "batch time width"]:
        """Patches with their flags, mapped."""
        series = batch["series"]
        missing = series.isnan()
        known = torch.where(missing, 0.0, series)
        flagged = torch.cat([known, missing.to(known.dtype)], -1)  # (batch, time, 2 channel)
        return self.linear(stacked(flagged, self.patch))

    def real(self, batch: Batch) -> Bool[Tensor, "batch time"] | None:
        """A position is real when all its steps are."""
        if "mask" not in batch:
            return None
        return stacked(batch["mask"].unsqueeze(-1), self.patch).all(-1)


def sinusoids(positions: Int[Tensor, "*batch time"], dim: int) -> Float[Tensor, "*batch time dim"]:
    """Fixed position vectors: sine and cosine at dim / 2 wavelengths, 2 pi to 10,000 * 2 pi.

    Vaswani et al. 2017, section 3.5. `dim` is even.
    """
    even = torch.arange(0, dim, 2, device=positions.device)
    frequency = torch.exp(even * (-math.log(10000.0) / dim))  # radians per position
    angle = positions.unsqueeze(-1) * frequency  # (*batch, time, dim / 2)
    return torch.stack((angle.sin(), angle.cos()), -1).flatten(-2)  # (*batch, time, dim)


def document_positions(
    mask: Bool[Tensor, "batch read"], documents: Int[Tensor, "batch read"] | None
) -> Int[Tensor, "batch read"]:
    """The number of real tokens before each one in its document.

    >>> mask = torch.tensor([[False, True, True, True, True]])
    >>> document_positions(mask, torch.tensor([[0, 0, 0, 1, 1]])).tolist()
    [[0, 0, 1, 0, 1]]
    """
    before = mask.cumsum(1) - mask.long()  # real tokens before, in the row
    if documents is None:
        return before
    starts = documents != documents.roll(1, 1)
    return before - torch.where(starts, before, 0).cummax(1).values


def rotary_angles(
    positions: Int[Tensor, "*batch time"], head_dim: int, base: float
) -> tuple[Tensor, Tensor]:
    """Cosine, and sine with the signs that `rotate` needs: (1 or batch, 1, time, head_dim) float32.

    Su et al. 2021, equation 15: pair (i, i + half) turns by position * base ** (-i / half), with
    half = head_dim / 2.
    """
    even = torch.arange(0, head_dim, 2, device=positions.device)
    frequency = torch.exp(even * (-math.log(base) / head_dim))  # radians per position
    angle = torch.atleast_2d(positions)[:, None, :, None] * frequency  # (batch, 1, time, half)
    sine = angle.sin()
    return torch.cat((angle, angle), -1).cos(), torch.cat((-sine, sine), -1)


def rotate(
    x: Float[Tensor, "*stack batch heads time head_dim"], cosine: Tensor, sine: Tensor
) -> Float[Tensor, "*stack batch heads time head_dim"]:
    """Turns the pair (i, i + half) of every head by its angle."""
    first, second = x.chunk(2, -1)  # (..., time, half)
    return torch.addcmul(x * cosine, torch.cat((second, first), -1), sine).to(x.dtype)
