"""Token embeddings and positions: ids, their places and their segments become vectors.

The sum of the token, segment and learned position vectors is scaled, sinusoids (Vaswani et al.,
2017, arXiv 1706.03762) are added, the result is normalised (BERT), dropped out, and projected where
the table is narrower than the model (ALBERT, Lan et al., 2020, arXiv 1909.11942). Rotary positions
(RoFormer, Su et al., 2021, arXiv 2104.09864) enter in attention; their maths is here too.

A position is the number of real tokens before it in its document. So padding may stand on either
side, a packed row equals its documents alone, and generation goes on from prompts of unequal
length. BERT and GPT-2 count slots instead, which is equal when padding is on the right.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from selfsup.errors import DataError


class TokenEmbedding(nn.Module):
    """Ids, positions and segments to vectors.

    Args:
        vocabulary_size: number of token ids.
        dim: width of the result.
        width: width of the table; where it differs from `dim`, a linear layer projects.
        segment_types: number of segments; 0: segments are ignored.
        positions: "learned" and "sinusoidal" are added here; any other kind is left to attention.
        max_length: number of learned positions.
        scale: factor on the sum of the learned vectors.
        norm: a normalisation over `width`, or None.
        dropout: probability, after the normalisation.

    Attributes:
        tokens: the table; heads tie their weights to `tokens.weight`, (vocabulary, width).
        segments, positions, norm, projection: modules, or None where not asked for.

    >>> embedding = TokenEmbedding(100, dim=8)
    >>> embedding(torch.tensor([[5, 7, 2]]), torch.arange(3), None).shape
    torch.Size([1, 3, 8])
    """

    def __init__(
        self,
        vocabulary_size: int,
        dim: int,
        width: int = 0,
        segment_types: int = 0,
        positions: str = "none",
        max_length: int = 0,
        scale: float = 1.0,
        norm: nn.Module | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        width = width or dim
        self.max_length, self.scale = max_length, scale
        self.sinusoidal = positions == "sinusoidal"
        self.tokens = nn.Embedding(vocabulary_size, width)
        self.segments = nn.Embedding(segment_types, width) if segment_types else None
        self.positions = nn.Embedding(max_length, width) if positions == "learned" else None
        self.norm = norm
        self.dropout = nn.Dropout(dropout)
        self.projection = nn.Linear(width, dim) if width != dim else None

    def forward(
        self,
        tokens: Int[Tensor, "batch time"],
        positions: Int[Tensor, "*batch time"],
        segments: Int[Tensor, "batch time"] | None,
    ) -> Float[Tensor, "batch time dim"]:
        """Embeds one batch.

        Args:
            tokens: ids.
            positions: place of each token in its document, shared by all rows or one per row.
            segments: segment of each token; None: all zero.
        """
        out = self.tokens(tokens)  # (batch, time, width)
        if self.segments is not None:
            # one row broadcasts; a batch without the field is all sentence A, as published
            first = self.segments.weight[0]
            out = out + (first if segments is None else self.segments(segments))
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
            DataError: `length` tokens are more than the table of positions holds.
        """
        if self.positions is not None and length > self.max_length:
            raise DataError(
                f"a row of {length} tokens is longer than the {self.max_length} learned positions "
                f"of this model (model.max_length); shorten the rows, or pre-train with rotary "
                f"positions, which have no limit"
            )


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
    """Cosine and sine, each (1 or batch, 1, time, half), float32; half = head_dim / 2.

    Su et al. 2021, equation 15: pair i turns by position * base ** (-i / half).
    """
    even = torch.arange(0, head_dim, 2, device=positions.device)
    frequency = torch.exp(even * (-math.log(base) / head_dim))  # radians per position
    angle = torch.atleast_2d(positions)[:, None, :, None] * frequency  # (batch, 1, time, half)
    return angle.cos(), angle.sin()


def rotate(
    x: Float[Tensor, "*stack batch heads time head_dim"], cosine: Tensor, sine: Tensor
) -> Float[Tensor, "*stack batch heads time head_dim"]:
    """Turns the pair (i, i + half) of every head by its angle."""
    first, second = x.chunk(2, -1)  # (..., time, half)
    turned = (first * cosine - second * sine, second * cosine + first * sine)
    return torch.cat(turned, -1).to(x.dtype)
