"""From hidden vectors to logits over the vocabulary."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from selfsup.models.block import ACTIVATIONS
from selfsup.models.embeddings import TokenEmbedding
from selfsup.models.transformer import TransformerEncoder, initialise


class Projection(NamedTuple):
    """What is multiplied to give logits; the loss would rather not see them all at once."""

    hidden: Float[Tensor, "*items width"]
    weight: Float[Tensor, "vocabulary width"]
    bias: Float[Tensor, " vocabulary"] | None = None

    @property
    def logits(self) -> Float[Tensor, "*items vocabulary"]:
        """Scores of every token, in the autocast precision: lift them to float32 for a loss."""
        return F.linear(*self)


class VocabularyHead(nn.Module):
    """Hidden vectors to logits over the vocabulary, with the weights of the token table.

    The table is given at each call and is no part of the head, so it is saved, copied and averaged
    once, with its encoder. Give only the positions that the loss needs.

    Args:
        encoder: whose configuration and vocabulary size to follow.
        transform: BERT's head (dense, activation, norm, tied table, bias); False: GPT-2's (the tied
            table alone, through the transposed projection where the table is narrower).

    >>> from selfsup.batch import Vocabulary
    >>> from selfsup.models.transformer import Config
    >>> encoder = TransformerEncoder(Config(dim=8, layers=1, heads=2), Vocabulary(size=100))
    >>> head = VocabularyHead(encoder, transform=True)
    >>> head(torch.zeros(3, 8), encoder.embedding).shape
    torch.Size([3, 100])
    """

    def __init__(self, encoder: TransformerEncoder, transform: bool):
        super().__init__()
        config = encoder.config
        self.transform = transform
        if transform:
            self.dense = nn.Linear(config.dim, config.embedding_width)
            self.activation = ACTIVATIONS[config.activation]
            self.norm = config.build_norm(config.embedding_width)
            self.bias = nn.Parameter(torch.zeros(len(encoder.embedding.tokens.weight)))
            initialise(self, config.init_std)

    def forward(
        self, hidden: Float[Tensor, "*items dim"], embedding: TokenEmbedding
    ) -> Float[Tensor, "*items vocabulary"]:
        """Logits of every token, in the autocast precision: lift them to float32 for the loss."""
        return self.project(hidden, embedding).logits

    def project(self, hidden: Float[Tensor, "*items dim"], embedding: TokenEmbedding) -> Projection:
        """The last product that gives the logits, not yet carried out."""
        if self.transform:
            inner = self.activation(self.dense(hidden)).to(self.bias.dtype)
            return Projection(self.norm(inner), embedding.tokens.weight, self.bias)
        if embedding.projection is not None:
            hidden = hidden @ embedding.projection.weight  # (*items, width)
        return Projection(hidden, embedding.tokens.weight)
