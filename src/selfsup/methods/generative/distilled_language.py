"""Masked language modelling with a teacher: a smaller student of a finished run (DistilBERT).

Sanh, Debut, Chaumond and Wolf, "DistilBERT, a distilled version of BERT: smaller, faster, cheaper
and lighter" (2019, arXiv 1910.01108). The student predicts masked tokens, and at the same places it
learns the probabilities that its teacher gives to all tokens, softened by a temperature on both
sides; its hidden states learn to point where the teacher's do. It begins with every other layer of
the teacher, and with its embedding and head.

The teacher is a run of `masked_language`, or of this method, with the same tokenizer. What is kept
is the student alone: a finished run is used without its teacher, and its loss is then the masked
one.

Axes: batch, time, slot (a position that may be chosen), vocabulary, dim.

The loss is masked_weight * cross entropy + soft_weight * T^2 * KL(teacher || student) +
hidden_weight * (1 - cosine of the last hidden states). Weights and temperature are those of the
authors' code.

Deviations from the paper:
- The KL divergence is taken at the chosen tokens, in the authors' code by default at every token.
- The cosine is a mean over ordinary tokens, there over special ones too.
- Each row has exactly round(mask_rate * its ordinary tokens) chosen tokens, all equally likely; the
  authors' code prefers rare ones.
- Batches weigh by their chosen tokens, also in the mean of cosines.

Reference result: none is recorded yet.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from selfsup.batch import Batch, Vocabulary
from selfsup.errors import ConfigError
from selfsup.methods.generative.corruptions import disguised, drawn
from selfsup.methods.ops import cosine_similarity, frozen, masked_loss, penalised, soft_loss
from selfsup.models.encoder import Encoder, Features
from selfsup.models.shallower import take_layers
from selfsup.models.transformer import TransformerEncoder
from selfsup.models.vocabulary_head import VocabularyHead
from selfsup.objective import Objective, Output


@dataclass(frozen=True, kw_only=True)
class Config:
    """Who teaches, and how much of what. Defaults are DistilBERT's."""

    teacher: str
    """A run of masked_language, or of this method."""
    start: Literal["teacher", "fresh"] = "teacher"
    """Initial weights: every other layer of the teacher, or random ones; another shape than the
    teacher's is only possible with the latter."""
    temperature: float = 2.0
    """Both sides' logits are divided by it."""
    masked_weight: float = 2.0
    """Weight of the cross entropy of masked tokens."""
    soft_weight: float = 5.0
    """Weight of the divergence from the teacher's probabilities."""
    hidden_weight: float = 1.0
    """Weight of 1 - cosine of the last hidden states; needs the teacher's width."""
    mask_rate: float = 0.15
    """Share of ordinary tokens that are predicted."""
    mask_share: float = 0.8
    """Share of chosen tokens that become [MASK]."""
    random_share: float = 0.1
    """Share of chosen tokens that become a random token; the rest stays as it is."""
    head: Literal["bert", "tied"] = "bert"
    """bert: dense, activation, norm, tied projection with bias; tied: the projection alone."""

    def __post_init__(self) -> None:
        if not 0 < self.mask_rate < 1:
            raise ValueError(f"mask_rate must lie between 0 and 1, got {self.mask_rate}")
        if min(self.mask_share, self.random_share) < 0 or self.mask_share + self.random_share > 1:
            raise ValueError("mask_share and random_share must be shares that sum to at most 1")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")
        weights = (self.masked_weight, self.soft_weight, self.hidden_weight)
        if min(weights) < 0 or not sum(weights):
            raise ValueError(f"weights must not be negative, and not all 0, got {weights}")


def direction_loss(
    student: Float[Tensor, "batch time dim"],
    teacher: Float[Tensor, "batch time dim"],
    mask: Bool[Tensor, "batch time"],
) -> Float[Tensor, ""]:
    """Mean of 1 - cosine over the positions of the mask, in float32."""
    angles = torch.where(mask, 1 - cosine_similarity(student, teacher), 0.0)
    return angles.sum() / mask.sum().clamp(min=1)


@final
class DistilledLanguage(Objective):
    """Predicts hidden tokens as its teacher does; see the module's docstring.

    Raises:
        ConfigError: the vocabulary has no mask token, or the encoder sees one side only.
    """

    fields = ("tokens",)
    kept = ("encoder", "head")
    teachers = ("masked_language", "distilled_language")
    adds_penalty = True
    encoder: TransformerEncoder
    ordinary: Tensor  # ids that may be predicted or drawn
    special: Tensor  # (vocabulary,) bool

    def __init__(self, config: Config, encoder: Encoder, vocabulary: Vocabulary):
        super().__init__()
        if vocabulary.mask < 0:
            raise ConfigError(
                "distilled_language needs a tokenizer with a mask token (style 'bert')"
            )
        if not isinstance(encoder, TransformerEncoder) or encoder.config.causal:
            raise ConfigError(
                "distilled_language needs model.name = 'transformer' with causal = false: it "
                "predicts from both sides"
            )
        self.config, self.encoder, self.vocabulary = config, encoder, vocabulary
        self.head = VocabularyHead(encoder, transform=config.head == "bert")
        self.teacher: Objective | None = None
        special = torch.zeros(vocabulary.size, dtype=torch.bool)
        special[[*vocabulary.special]] = True
        self.register_buffer("special", special, persistent=False)
        self.register_buffer("ordinary", (~special).nonzero().squeeze(1), persistent=False)

    def take_teacher(self, teacher: Objective) -> None:
        """Learns from this one from now on, and begins with its weights if that is asked for.

        Raises:
            ConfigError: another tokenizer, or another shape.
        """
        config, given = self.config, teacher.vocabulary
        assert isinstance(given, Vocabulary)
        if replace(given, unigram_entropy=0.0) != replace(self.vocabulary, unigram_entropy=0.0):
            raise ConfigError(
                f"the teacher {config.teacher} has another tokenizer: take its own with "
                f"data.tokenizer.file = '{config.teacher}/model'"
            )
        if config.hidden_weight and teacher.encoder.dim != self.encoder.dim:
            raise ConfigError(
                f"model.dim is {self.encoder.dim}, the teacher's {teacher.encoder.dim}: hidden "
                "states have no cosine; use the same, or method.hidden_weight = 0"
            )
        if config.start == "teacher":
            self._begin_with(teacher)
        self.teacher = frozen(teacher).eval()  # type: ignore[assignment]

    def _begin_with(self, teacher: Objective) -> None:
        try:
            take_layers(self.encoder, teacher.encoder)
        except ConfigError as error:
            raise ConfigError(f"{error} (method.start = 'fresh')") from None
        given = teacher.get_submodule("head").state_dict()
        if given.keys() != self.head.state_dict().keys():
            raise ConfigError(
                f"method.head = {self.config.head!r} is not the teacher's: use its own, or "
                "method.start = 'fresh'"
            )
        self.head.load_state_dict(given)

    def train(self, mode: bool = True) -> "DistilledLanguage":
        """As in every module, but the teacher stays without dropout."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def loss(self, batch: Batch, generator: torch.Generator) -> Output:
        """Corrupts, encodes on both sides, predicts, compares with the tokens and the teacher."""
        config, tokens = self.config, batch["tokens"]
        maskable = ~self.special[tokens]
        if "mask" in batch:
            maskable = maskable & batch["mask"]
        count = (maskable.sum(1, keepdim=True) * config.mask_rate).round().long().clamp(min=1)
        chosen = drawn(maskable, count, generator)
        shares = config.mask_share, config.random_share
        corrupted = disguised(
            tokens, chosen, self.vocabulary.mask, self.ordinary, shares, generator
        )
        num_slots = max(1, math.ceil(config.mask_rate * tokens.shape[1]))
        found, place = chosen.long().topk(num_slots)  # (batch, slot)
        real, seen = found > 0, {**batch, "tokens": corrupted}
        features, logits = _predicted(self, seen, place)
        masked, accuracy = masked_loss(logits, tokens.gather(1, place), real)
        metrics = {"mlm_loss": masked, "mlm_accuracy": accuracy}
        loss = masked
        if self.teacher is not None:
            with torch.no_grad():
                taught, said = _predicted(self.teacher, seen, place)
            nats = soft_loss(logits, said, config.temperature)  # (batch, slot)
            soft = torch.where(real, nats, 0.0).sum() / real.sum().clamp(min=1)
            metrics["soft_loss"] = soft
            loss = config.masked_weight * masked + config.soft_weight * soft
            if config.hidden_weight:
                direction = direction_loss(features.last, taught.last, maskable)
                metrics["hidden_loss"] = direction
                loss = loss + config.hidden_weight * direction
        return penalised(Output(loss, real.sum(), metrics), features)

    @torch.no_grad()
    def fill(self, batch: Batch) -> Float[Tensor, "blank vocabulary"]:
        """Log-probabilities of every token at every [MASK], in reading order, float32."""
        hidden = self.encoder(batch).last[batch["tokens"] == self.vocabulary.mask]
        return self.head(hidden, self.encoder.embedding).float().log_softmax(-1)


def _predicted(side: Any, batch: Batch, place: Tensor) -> tuple[Features, Tensor]:
    """Features of student or teacher, and logits (batch, slot, vocabulary) at the places."""
    features = side.encoder(batch)
    index = place.unsqueeze(-1).expand(-1, -1, features.last.shape[-1])
    return features, side.head(features.last.gather(1, index), side.encoder.embedding)
