"""A bag of words: every token is its vector, and a text is the mean of its words' vectors.

The encoder of word2vec (Mikolov et al., 2013, arXiv 1301.3781): a table and no layers, so a vector
knows nothing of its neighbours. `pooled` leaves special tokens out, which no word vector stands
for; a text without any word is the zero vector.

Axes: batch, time, dim.
"""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from selfsup.batch import Batch, Vocabulary
from selfsup.models.embeddings import TokenEmbedding
from selfsup.models.encoder import Encoder, Features, masked_mean


@dataclass(frozen=True, kw_only=True)
class Config:
    """The shape of a bag of words; the default is that of the published English vectors."""

    dim: int = 300  # width of the word vectors

    def __post_init__(self) -> None:
        if self.dim <= 0:
            raise ValueError(f"dim must be above 0, got {self.dim}")


@final
class BagEncoder(Encoder):
    """Tokens to `Features` by a table alone; reads `tokens` and, where present, `mask`.

    Attributes:
        embedding: `tokens.weight` is the table, uniform in +-0.5 / dim at the start, as in the
            authors' code.

    >>> encoder = BagEncoder(Config(dim=8), Vocabulary(size=100))
    >>> features = encoder({"tokens": torch.tensor([[5, 7, 2]])})
    >>> features.pooled.shape, len(features.hidden)
    (torch.Size([1, 8]), 1)
    """

    reads = ("text",)
    special: Tensor  # (vocabulary,) bool

    def __init__(self, config: Config, spec: Vocabulary):
        super().__init__()
        self.config, self.spec = config, spec
        self.dim, self.num_layers = config.dim, 0
        self.embedding = TokenEmbedding(spec.size, config.dim)
        nn.init.uniform_(self.embedding.tokens.weight, -0.5 / config.dim, 0.5 / config.dim)
        special = torch.zeros(spec.size, dtype=torch.bool)
        special[list(spec.special)] = True
        self.register_buffer("special", special, persistent=False)

    def forward(self, batch: Batch) -> Features:
        """Looks up every token."""
        hidden = self.embedding.vectors(batch)  # (batch, time, dim)
        real = self.embedding.real(batch)
        mask = torch.ones_like(batch["tokens"], dtype=torch.bool) if real is None else real
        words = mask & ~self.special[batch["tokens"]]
        return Features((hidden,), mask, masked_mean(hidden, words))
