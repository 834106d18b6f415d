"""Bidirectional language modelling: from the left the next word, from the right the one before.

Peters et al., "Deep contextualized word representations" (2018, arXiv 1802.05365), section 3.1. Two
language models share the vectors of words and the softmax, and have LSTMs of their own; the sum of
their log-likelihoods is maximised. A task then reads a learned mix of all layers of both (the
tuning `layer_mix`).

Axes: batch; time; next = time - 1: neighbouring positions; items = batch * next; vocabulary.

Deviations from the paper:
- The loss is the mean of both directions, not their sum.
- The softmax is over the whole vocabulary; the paper's, over 793,471 words, is estimated from 8,192
  sampled ones.
- Nothing is predicted across the border of two documents; there, of two sentences.

Reference result: none is recorded yet. Film reviews in the recipe elmo-mini-english with
training.steps=250 (256,000 tokens, about three minutes of one core): 5.71 nats a token held out,
5.78 forwards and 5.64 backwards; knowing only how often each token occurs gives 6.52.
"""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from selfsup.batch import Batch, Vocabulary
from selfsup.errors import ConfigError
from selfsup.methods.ops import follows, token_scores
from selfsup.methods.surprisal import Surprisal, surprisal
from selfsup.models.elmo import ElmoEncoder
from selfsup.models.encoder import Encoder
from selfsup.models.vocabulary_head import Projection
from selfsup.objective import Objective, Output


@dataclass(frozen=True, kw_only=True)
class Config:
    """Nothing: the paper varies the model alone."""


@final
class BidirectionalLanguage(Objective):
    """Predicts each word from both sides, one after the other; see the module's docstring.

    Raises:
        ConfigError: the encoder's two directions meet, so that it sees what it is to predict.

    >>> from selfsup.models.elmo import Config as Model
    >>> vocabulary = Vocabulary(size=3, spellings=(b"a", b"so", b"it"))
    >>> encoder = ElmoEncoder(Model(dim=4, cell=8, filters=(2, 2)), vocabulary)
    >>> method = BidirectionalLanguage(Config(), encoder, vocabulary).eval()
    >>> output = method.loss({"tokens": torch.tensor([[0, 2, 1]])}, torch.Generator())
    >>> int(output.weight), sorted(output.metrics)
    (2, ['backward_loss', 'forward_loss'])
    """

    fields = ("tokens",)
    kept = ("encoder", "head")
    encoder: ElmoEncoder

    def __init__(self, config: Config, encoder: Encoder, vocabulary: Vocabulary):
        super().__init__()
        if not isinstance(encoder, ElmoEncoder):
            raise ConfigError(
                "bidirectional_language needs two directions that never meet: use model.name = "
                "'elmo'"
            )
        self.config, self.encoder, self.vocabulary = config, encoder, vocabulary
        self.head = nn.Linear(encoder.config.dim, vocabulary.size)
        nn.init.normal_(self.head.weight, std=encoder.config.dim**-0.5)
        nn.init.zeros_(self.head.bias)
        if vocabulary.unigram_entropy:
            self.chance_loss = vocabulary.unigram_entropy

    def loss(self, batch: Batch, generator: torch.Generator) -> Output:
        """Reads in both directions, predicts, compares; only dropout is random."""
        real = follows(batch)
        total = real.sum()
        share = real / total.clamp(min=1)
        forward, backward = (found.loss for found in self._surprisals(batch, share))
        metrics = {"forward_loss": forward.detach(), "backward_loss": backward.detach()}
        return Output((forward + backward) / 2, total, metrics)

    def _surprisals(
        self, batch: Batch, share: Float[Tensor, "batch next"]
    ) -> tuple[Surprisal, Surprisal]:
        """Of each next token from the left, and of each one before from the right."""
        tokens = batch["tokens"]
        left, right = self.encoder.dropout(self.encoder(batch).last).chunk(2, -1)
        return (
            surprisal(self._projection(left[:, :-1]), tokens[:, 1:], share),
            surprisal(self._projection(right[:, 1:]), tokens[:, :-1], share),
        )

    def _projection(self, hidden: Float[Tensor, "batch next dim"]) -> Projection:
        return Projection(hidden, self.head.weight, self.head.bias)

    @torch.no_grad()
    def score(self, batch: Batch) -> dict[str, Tensor]:
        """How likely each token is after the ones before it in its document: forwards alone.

        Returns:
            `log_probability` (batch, time) float32, in nats, 0 where there is none; `scored`
            (batch, time) bool, False at padding and at the first token of a document.
        """
        real = follows(batch)
        return token_scores(self._surprisals(batch, real.float())[0].nats, real)
