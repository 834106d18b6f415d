"""Recurrent networks: frames or tokens read one after another by GRU or LSTM layers.

The encoder of autoregressive predictive coding (Chung et al., 2019, arXiv 1904.03240): layers of
GRUs (Cho et al., 2014, arXiv 1406.1078) or LSTMs (Hochreiter and Schmidhuber, 1997) with a residual
sum around each. One direction makes a causal encoder. With two, each layer reads its input from
both sides and joins two halves of width dim / 2, so here the directions meet in every layer; in
ELMo (Peters et al., 2018, arXiv 1802.05365) they never do.

Every hidden state has width `dim`, so frames enter through a linear layer; in the paper the first
GRU reads them as they are, and has no residual sum.

Axes: batch, time, dim. Padding stands at the end of a row.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from selfsup.batch import AudioSpec, Batch, Vocabulary
from selfsup.models.dropout import Dropout
from selfsup.models.embeddings import FrameEmbedding, TokenEmbedding
from selfsup.models.encoder import Encoder, Features, masked_mean

KINDS = {"gru": nn.GRU, "lstm": nn.LSTM}


@dataclass(frozen=True, kw_only=True)
class Config:
    """The shape of a recurrent network; the defaults are those of the APC paper."""

    kind: Literal["gru", "lstm"] = "gru"
    dim: int = 512  # width of the hidden states; two directions have half of it each
    layers: int = 3
    residual: bool = True  # add a layer's input to its output
    bidirectional: bool = False  # read from both sides; then nothing can be predicted from the past
    dropout: float = 0.0  # on the embedding and on every layer's output, before the residual sum

    def __post_init__(self):
        if min(self.dim, self.layers) < 1:
            raise ValueError(f"dim and layers must be above 0, got {self.dim} and {self.layers}")
        if self.bidirectional and self.dim % 2:
            raise ValueError(f"two directions share dim, so it must be even, got {self.dim}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")


class Layer(nn.Module):
    """One recurrent layer, forwards or in both directions, with its residual sum.

    Attributes:
        forwards, backwards: a GRU or LSTM each; `backwards` is None in one direction.
    """

    def __init__(self, config: Config):
        super().__init__()
        kind, width = KINDS[config.kind], config.dim // (1 + config.bidirectional)
        self.residual = config.residual
        self.forwards = kind(config.dim, width, batch_first=True)
        self.backwards = kind(config.dim, width, batch_first=True) if config.bidirectional else None
        self.dropout = Dropout(config.dropout)

    def forward(
        self, x: Float[Tensor, "batch time dim"], turned: Int[Tensor, "batch time"] | None
    ) -> Float[Tensor, "batch time dim"]:
        """One layer.

        Args:
            x: its input.
            turned: from `turned_around`; read only in two directions.
        """
        out, _ = self.forwards(x)  # (batch, time, width)
        if self.backwards is not None:
            assert turned is not None
            back, _ = self.backwards(rearranged(x, turned))
            out = torch.cat([out, rearranged(back, turned)], -1)  # (batch, time, dim)
        out = self.dropout(out)
        return x + out if self.residual else out


class RecurrentEncoder(Encoder):
    """Frames or tokens to `Features`, from the past alone or from both sides.

    Reads `frames` where `spec` is an `AudioSpec`, and `tokens` where it is a `Vocabulary`; `mask`
    where present. `pooled` is the mean over the real positions.

    Attributes:
        config: the shape of the network.
        spec: the data that it was made for.
        embedding: a linear layer on frames, or a table of tokens.
        layers: one `Layer` each.

    >>> encoder = RecurrentEncoder(Config(dim=8, layers=2), AudioSpec(rate=8000, mel=4, hop=80))
    >>> features = encoder({"frames": torch.zeros(2, 5, 4)})
    >>> features.last.shape, len(features.hidden), encoder.causal
    (torch.Size([2, 5, 8]), 3, True)
    """

    reads = ("audio", "text")

    def __init__(self, config: Config, spec: AudioSpec | Vocabulary):
        super().__init__()
        self.config, self.spec = config, spec
        self.dim, self.num_layers = config.dim, config.layers
        self.causal = not config.bidirectional
        self.embedding: Any = (
            FrameEmbedding(spec, 1, config.dim, dropout=config.dropout)
            if isinstance(spec, AudioSpec)
            else TokenEmbedding(spec.size, config.dim, dropout=config.dropout)
        )
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))

    def forward(self, batch: Batch, vectors: Tensor | None = None) -> Features:
        """Encodes one batch.

        Args:
            batch: the fields above.
            vectors: (batch, time, dim), taken instead of `embedding.vectors(batch)`: a method that
                hides positions puts its mask vector there.
        """
        vectors = self.embedding.vectors(batch) if vectors is None else vectors
        real = self.embedding.real(batch)
        mask = vectors.new_ones(vectors.shape[:2], dtype=torch.bool) if real is None else real
        turned = turned_around(mask) if self.config.bidirectional else None
        positions = torch.arange(vectors.shape[1], device=vectors.device)
        hidden = [self.embedding.place(vectors, positions)]
        for layer in self.layers:
            hidden.append(layer(hidden[-1], turned))
        return Features(tuple(hidden), mask, masked_mean(hidden[-1], mask))


def turned_around(mask: Bool[Tensor, "batch time"]) -> Int[Tensor, "batch time"]:
    """For each position the one that takes its place when a row's real part is read backwards.

    Padding stays where it is. Applied twice, every position is back in its place.

    >>> turned_around(torch.tensor([[True, True, True, False]]))[0].tolist()
    [2, 1, 0, 3]
    """
    slot = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask, mask.sum(1, keepdim=True) - 1 - slot, slot)


def rearranged(
    x: Float[Tensor, "batch time dim"], source: Int[Tensor, "batch time"]
) -> Float[Tensor, "batch time dim"]:
    """Position `source[row, time]` of each row at every `time`."""
    return x.gather(1, source.unsqueeze(-1).expand_as(x))
