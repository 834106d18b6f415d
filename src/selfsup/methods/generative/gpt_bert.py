"""GPT-BERT: one stack that learns masked and causal language modelling at once.

Charpentier and Samuel, "GPT or BERT: why not both?" (2024, arXiv 2410.24159). Some rows of a batch
are read from left to right, and each token is predicted from those before it; in the others tokens
are masked and predicted from both sides. In both the prediction of a token stands one position to
its left (masked next-token prediction), so that nothing but the attention mask tells the two apart.
The trained model fills blanks, and with the future hidden it writes and scores texts.

Axes: batch; time; next = time - 1 (every position that has another after it); slot (a position that
may be masked); vocabulary.

The loss is the mean over the causal rows' tokens and the mean over the masked ones, weighed by
their rows, and batches weigh by all their rows. In the paper a device has rows of one kind alone.

Deviations from the paper:
- Single tokens are masked, exactly round(mask_rate * a row's ordinary tokens) of them; the authors'
  code masks spans of one to three, in preference where a text has been masked less often before.
- Random replacements are ordinary tokens, never special ones.
- The model is any bidirectional transformer; the paper's gated attention and weighted layers, and
  the z-loss of its code, are left out.

Reference result: none is recorded yet.
"""

import math
from dataclasses import dataclass
from typing import Literal, final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from selfsup.batch import Batch, Vocabulary
from selfsup.errors import ConfigError
from selfsup.methods.generative.corruptions import disguised, drawn
from selfsup.methods.ops import follows, penalised, token_scores
from selfsup.methods.surprisal import mean_surprisal, surprisal
from selfsup.models.decoding import CausalWriter, Rules, never_written, sample
from selfsup.models.encoder import Encoder, Features
from selfsup.models.transformer import TransformerEncoder
from selfsup.models.view import Cache
from selfsup.models.vocabulary_head import VocabularyHead
from selfsup.objective import Objective, Output


@dataclass(frozen=True, kw_only=True)
class Config:
    """How much is read which way, and what is hidden. Defaults are the paper's."""

    causal_share: float = 1 / 16
    """Share of a batch's rows that are read from left to right; the paper tries 1/16 to 15/16."""
    mask_rate: float = 0.3
    """Share of ordinary tokens of the other rows that are predicted, at the beginning."""
    final_mask_rate: float = 0.15
    """Mask rate at the end, reached linearly."""
    mask_share: float = 0.8
    """Share of chosen tokens that become [MASK]."""
    random_share: float = 0.1
    """Share of chosen tokens that become a random token; the rest stays as it is."""
    head: Literal["bert", "tied"] = "bert"
    """bert: dense, activation, norm, tied projection with bias; tied: the projection alone."""

    def __post_init__(self) -> None:
        for name in ("causal_share", "mask_rate", "final_mask_rate"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")
        if min(self.mask_share, self.random_share) < 0 or self.mask_share + self.random_share > 1:
            raise ValueError("mask_share and random_share must be shares that sum to at most 1")


@final
class GPTBERT(Objective):
    """Predicts next tokens and masked ones; see the module's docstring.

    Raises:
        ConfigError: the vocabulary has no mask token, or the encoder cannot read both ways.

    >>> from selfsup.models.transformer import Config as Model
    >>> vocabulary = Vocabulary(size=100, sep=3, mask=4)
    >>> encoder = TransformerEncoder(Model(dim=8, layers=1, heads=2), vocabulary)
    >>> method = GPTBERT(Config(), encoder, vocabulary).eval()
    >>> method.fill({"tokens": torch.tensor([[5, 7, 4, 9]])}).shape
    torch.Size([1, 100])
    """

    fields = ("tokens",)
    kept = ("encoder", "head")
    adds_penalty = True
    predicts_next = True
    encoder: TransformerEncoder
    ordinary: Tensor  # ids that may be predicted or drawn
    special: Tensor  # (vocabulary,) bool
    unwritten: Tensor  # (vocabulary,) bool: never generated
    mask_rate: Tensor  # where the moving rate stands

    def __init__(self, config: Config, encoder: Encoder, vocabulary: Vocabulary):
        super().__init__()
        if vocabulary.mask < 0:
            raise ConfigError("gpt_bert needs a tokenizer with a mask token (style 'bert')")
        if not isinstance(encoder, TransformerEncoder) or encoder.config.causal:
            raise ConfigError(
                "gpt_bert needs model.name = 'transformer' with causal = false: it hides the "
                "future itself where a row is read from left to right"
            )
        self.config, self.encoder, self.vocabulary = config, encoder, vocabulary
        self.head = VocabularyHead(encoder, transform=config.head == "bert")
        if vocabulary.unigram_entropy:
            self.chance_loss = vocabulary.unigram_entropy
        special = torch.zeros(vocabulary.size, dtype=torch.bool)
        special[[*vocabulary.special]] = True
        self.register_buffer("special", special, persistent=False)
        self.register_buffer("ordinary", (~special).nonzero().squeeze(1), persistent=False)
        self.register_buffer("unwritten", never_written(vocabulary), persistent=False)
        self.register_buffer("mask_rate", torch.tensor(config.mask_rate, dtype=torch.float64))

    def loss(self, batch: Batch, generator: torch.Generator) -> Output:
        """Reads the first rows causally, masks the others, predicts, compares."""
        rows = len(batch["tokens"])
        num_causal = min(max(1, round(self.config.causal_share * rows)), rows - 1)
        causal = {name: field[:num_causal] for name, field in batch.items()}
        masked = {name: field[num_causal:] for name, field in batch.items()}
        metrics: dict[str, Tensor] = {}
        loss, seen = torch.zeros((), device=batch["tokens"].device), []
        if num_causal:
            metrics["causal_loss"], metrics["causal_accuracy"], features = self._next(causal)
            loss = loss + metrics["causal_loss"] * (num_causal / rows)
            seen.append(features)
        found = self._masked(masked, generator)
        metrics["masked_loss"], metrics["masked_accuracy"], features = found
        loss = loss + metrics["masked_loss"] * (1 - num_causal / rows)
        return penalised(Output(loss, rows, metrics), *seen, features)

    def after_step(self, step: int, total: int) -> None:
        """Moves the mask rate towards its final value."""
        through = min(1.0, (step + 1) / total)
        start, end = self.config.mask_rate, self.config.final_mask_rate
        self.mask_rate.fill_(start + (end - start) * through)

    def _next(self, batch: Batch) -> tuple[Tensor, Tensor, Features]:
        """Loss and accuracy of every next token, without a look at the future."""
        features = self.encoder(batch, causal=True)
        hidden, target = features.last[:, :-1], batch["tokens"][:, 1:]
        return *self._compare(hidden, target, follows(batch)), features

    def _masked(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor, Features]:
        """Loss and accuracy of masked tokens, each predicted one position to its left."""
        tokens = batch["tokens"]
        maskable = F.pad(follows(batch), (1, 0)) & ~self.special[tokens]
        rate = self.mask_rate.item()
        count = (maskable.sum(1, keepdim=True) * rate).round().long().clamp(min=1)
        chosen = drawn(maskable, count, generator)
        shares = self.config.mask_share, self.config.random_share
        corrupted = disguised(
            tokens, chosen, self.vocabulary.mask, self.ordinary, shares, generator
        )
        real, place = chosen.long().topk(max(1, math.ceil(rate * tokens.shape[1])))  # (batch, slot)
        before = (place - 1).clamp(min=0)
        features = self.encoder({**batch, "tokens": corrupted}, slots=before)
        return *self._compare(features.last, tokens.gather(1, place), real > 0), features

    def _compare(
        self,
        hidden: Float[Tensor, "rows slot dim"],
        target: Int[Tensor, "rows slot"],
        real: Bool[Tensor, "rows slot"],
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Mean surprisal (nats) and accuracy over the real slots."""
        return mean_surprisal(self.head.project(hidden, self.encoder.embedding), target, real)

    @torch.no_grad()
    def fill(self, batch: Batch) -> Float[Tensor, "blank vocabulary"]:
        """Log-probabilities of every token at every [MASK], in reading order, float32.

        A row's first token has nothing to its left that could predict it: what stands for it there
        is no prediction.
        """
        hidden = F.pad(self.encoder(batch).last, (0, 0, 1, 0))[:, :-1]  # one to the left
        hidden = hidden[batch["tokens"] == self.vocabulary.mask]  # (blank, dim)
        return self.head(hidden, self.encoder.embedding).float().log_softmax(-1)

    @torch.no_grad()
    def score(self, batch: Batch, cache: Cache | None = None) -> dict[str, Tensor]:
        """How likely each token is after the ones before it in its document.

        Args:
            batch: the texts; with a cache, how they go on.
            cache: what was read before; the batch's first tokens go unscored.

        Returns:
            `log_probability` (batch, time) float32, in nats, 0 where there is none; `scored`
            (batch, time) bool, False at padding and at the first token of a document.
        """
        hidden = self.encoder(batch, cache, causal=True).last
        real, projection = follows(batch), self.head.project(hidden[:, :-1], self.encoder.embedding)
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
