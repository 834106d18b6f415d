"""Causal language modelling: each token is predicted from the ones before it, as in GPT.

Radford, Narasimhan, Salimans and Sutskever, "Improving Language Understanding by Generative
Pre-Training" (2018); Radford et al., "Language Models are Unsupervised Multitask Learners" (2019).
A model that sees only the past gives a probability to every next token at once, so nothing is
hidden or replaced, and every token but a text's first is learned from. The same probabilities write
on (`generate`) and say how likely a text is (`score`).

Axes: batch, time, next = time - 1 (every position that has another after it), items = batch * next,
vocabulary.

Deviations from the papers:
- In a packed row the first token of a document is not predicted from the document before it, and
  attention stays inside a document (GPT-2 reads across). The token that ends one is a target.
- Written text holds no special token but the one that ends it: padding and [CLS] are never targets,
  so their probabilities mean nothing.

Reference result: docs/results/gpt-mini-english.json, with its command.
"""

from dataclasses import dataclass
from typing import Literal, final

import torch
from jaxtyping import Int
from torch import Tensor

from selfsup.batch import Batch, Vocabulary
from selfsup.errors import ConfigError
from selfsup.methods.ops import follows, penalised, token_scores
from selfsup.methods.surprisal import mean_surprisal, surprisal
from selfsup.models.decoding import CausalWriter, Rules, never_written, sample
from selfsup.models.encoder import Features
from selfsup.models.transformer import TransformerEncoder
from selfsup.models.view import Cache
from selfsup.models.vocabulary_head import Projection, VocabularyHead
from selfsup.objective import Objective, Output


@dataclass(frozen=True, kw_only=True)
class Config:
    """How hidden states become tokens. The default is GPT's."""

    head: Literal["tied", "bert"] = "tied"
    """tied: the token table alone; bert: dense, activation, norm, tied projection with bias."""


@final
class CausalLanguage(Objective):
    """Predicts the next token; see the module's docstring.

    Raises:
        ConfigError: the encoder sees the tokens that are to be predicted.

    >>> from selfsup.models.transformer import Config as Model
    >>> vocabulary = Vocabulary(size=100, sep=0)
    >>> encoder = TransformerEncoder(Model(dim=8, layers=1, heads=2, causal=True), vocabulary)
    >>> method = CausalLanguage(Config(), encoder, vocabulary).eval()
    >>> prompt = {"tokens": torch.tensor([[5, 7, 2]])}
    >>> method.generate(prompt, 4, torch.Generator(), temperature=0.0).shape
    torch.Size([1, 4])
    """

    fields = ("tokens",)
    kept = ("encoder", "head")
    adds_penalty = True
    encoder: TransformerEncoder
    unwritten: Tensor  # (vocabulary,) bool: never generated

    def __init__(self, config: Config, encoder: TransformerEncoder, vocabulary: Vocabulary):
        super().__init__()
        if not encoder.config.causal:
            raise ConfigError(
                "causal_language needs model.causal = true: a model that reads the next token has "
                "nothing to predict"
            )
        self.config, self.encoder, self.vocabulary = config, encoder, vocabulary
        self.head = VocabularyHead(encoder, transform=config.head == "bert")
        if vocabulary.unigram_entropy:
            self.chance_loss = vocabulary.unigram_entropy
        self.register_buffer("unwritten", never_written(vocabulary), persistent=False)

    def loss(self, batch: Batch, generator: torch.Generator) -> Output:
        """Encodes, predicts, compares; nothing is random but the encoder's dropout."""
        target, real = batch["tokens"][:, 1:], follows(batch)
        features = self.encoder(batch)
        loss, accuracy = mean_surprisal(self._projection(features), target, real)
        return penalised(Output(loss, real.sum(), {"accuracy": accuracy}), features)

    def _projection(self, features: Features) -> Projection:
        """Of every position but the last, after which nothing comes: (batch, next, dim)."""
        return self.head.project(features.last[:, :-1], self.encoder.embedding)

    @torch.no_grad()
    def score(self, batch: Batch, cache: Cache | None = None) -> dict[str, Tensor]:
        """How likely each token is after the ones before it in its document.

        Args:
            batch: the texts; with a cache, how they go on.
            cache: what was read before; the batch's first tokens go unscored, as the cache holds no
                prediction of them: leave a text's last token to the batch.

        Returns:
            `log_probability` (batch, time) float32, in nats, 0 where there is none; `scored`
            (batch, time) bool, False at padding and at the first token of a document. The
            perplexity per word is exp(-sum of log_probability / number of words).
        """
        real = follows(batch)
        projection = self._projection(self.encoder(batch, cache))
        return token_scores(surprisal(projection, batch["tokens"][:, 1:], real.float()).nats, real)

    @torch.no_grad()
    def generate(
        self,
        batch: Batch,
        num_tokens: int,
        generator: torch.Generator,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> Int[Tensor, "batch num_tokens"]:
        """Writes each row on by up to `num_tokens` tokens.

        Args:
            batch: prompts of at least one token, padded on either side with `mask` where their
                lengths differ.
            num_tokens: how many ids to write; a row that ends earlier is padded.
            generator: source of randomness, on the device of the batch.
            temperature: logits are divided by it; 0 always takes the likeliest token.
            top_k: draw from this many likeliest tokens; 0: from all.
            top_p: draw from the likeliest tokens that hold this share of the probability.

        Raises:
            ConfigError: an option out of range.
            DataError: more tokens than the model has learned positions, or packed rows.
        """
        writer = CausalWriter(self.encoder, self.head, batch, self.unwritten)
        rules = Rules.of(self.vocabulary, num_tokens)
        return sample(writer, rules, generator, temperature=temperature, top_k=top_k, top_p=top_p)
