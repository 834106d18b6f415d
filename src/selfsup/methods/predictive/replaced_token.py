"""Replaced-token detection: the encoder tells which tokens a small generator put in (ELECTRA).

Clark, Luong, Le and Manning, "ELECTRA: Pre-training Text Encoders as Discriminators Rather Than
Generators" (2020, arXiv 2003.10555). Some tokens of a text are masked, and a small masked language
model, the generator, draws a token for each of those places from what it predicts. The encoder, the
discriminator, reads the result and says of every token whether it is the original. It learns from
all tokens, not from the masked ones alone, and never sees a [MASK].

The generator learns by its own masked loss: no gradient passes through the draw. It is the
encoder's layout made narrower, and both read the same token, segment and position tables and
embedding normalisation, which the generator projects to its own width (section 3.2). In a
small model `init_std = 1 / sqrt(dim)` lets that projection keep the variance of what it reads.

Axes: batch, time, slot (a position that may be chosen), vocabulary, dim.

The loss is the generator's mean over chosen tokens plus `discriminator_weight` times the
discriminator's mean over real tokens. Batches weigh by their real tokens, under gradient
accumulation and across ranks: the discriminator's part is then that of one large batch, and so is
the generator's where each batch has the same share of chosen tokens.

Deviations from the paper:
- Each row has exactly round(mask_rate * its ordinary tokens) chosen tokens, all different. The
  authors' code draws with repetition, and counts special tokens in the share.
- Every chosen token is [MASK] to the generator, as the paper says (section 2). In the authors' code
  15% of them stay as they are.

Reference result: none is recorded yet.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple, final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from selfsup.batch import Batch, Vocabulary
from selfsup.errors import ConfigError
from selfsup.methods.ops import masked_loss
from selfsup.models.transformer import Config as Model
from selfsup.models.transformer import TransformerEncoder, initialise
from selfsup.models.vocabulary_head import VocabularyHead
from selfsup.objective import Objective, Output


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is replaced, and by how large a generator. Defaults are ELECTRA-Small's."""

    mask_rate: float = 0.15
    """Share of ordinary tokens that the generator draws anew. Large: 0.25."""
    generator_scale: float = 0.25
    """Width of the generator over that of the encoder; as many layers. Base: 1/3."""
    discriminator_weight: float = 50.0
    """Factor on the discriminator's loss, which is much smaller than the generator's."""

    def __post_init__(self) -> None:
        if not 0 < self.mask_rate < 1:
            raise ValueError(f"mask_rate must lie between 0 and 1, got {self.mask_rate}")
        if not 0 < self.generator_scale <= 1:
            raise ValueError(
                f"generator_scale must be above 0 and at most 1, got {self.generator_scale}"
            )
        if not self.discriminator_weight > 0:
            raise ValueError(
                f"discriminator_weight must be above 0, got {self.discriminator_weight}"
            )


class Chosen(NamedTuple):
    """Positions that the generator fills, in a fixed number of slots per row."""

    positions: Int[Tensor, "batch slot"]
    real: Bool[Tensor, "batch slot"]  # False: a slot that this row does not use


class Detection(NamedTuple):
    """How well replaced tokens are told: scalars over the real tokens of a batch."""

    loss: Float[Tensor, ""]  # mean binary cross entropy, nats
    accuracy: Float[Tensor, ""]
    precision: Float[Tensor, ""]  # share of the replaced among those called so; 0 if there are none
    recall: Float[Tensor, ""]  # share of those called so among the replaced; 0 if there are none


def generator_config(model: Model, scale: float) -> Model:
    """The model with its width, heads and feed-forward width scaled, on a table as wide as before.

    The size of a head stays where `scale * heads` is a whole number; it is even in any case.

    >>> small = generator_config(Model(dim=768, heads=12), 1 / 3)
    >>> small.dim, small.heads, small.embedding_width
    (256, 4, 768)
    """
    heads = max(1, round(model.heads * scale))
    return replace(
        model,
        dim=heads * 2 * max(1, round(model.dim * scale / heads / 2)),
        heads=heads,
        feedforward_dim=math.ceil(model.feedforward_dim * scale),
        embedding_dim=model.embedding_width,
        pooling="mean",  # read by none: no pooler without a gradient
    )


def choose(maskable: Bool[Tensor, "batch time"], rate: float, generator: torch.Generator) -> Chosen:
    """Draws round(rate * maskable) positions of each row, at least one if there is any.

    Args:
        maskable: True at ordinary tokens; special and padded ones are never chosen.
        rate: share of maskable positions.
        generator: source of randomness, on the device of `maskable`.
    """
    num_slots = max(1, math.ceil(rate * maskable.shape[1]))
    budget = (maskable.sum(1, keepdim=True) * rate).round().clamp(min=1)  # (batch, 1)
    key = torch.rand(maskable.shape, generator=generator, device=maskable.device)
    drawn = key.masked_fill(~maskable, 2.0).topk(num_slots, dim=1, largest=False)
    rank = torch.arange(num_slots, device=key.device)
    return Chosen(drawn.indices, (rank < budget) & (drawn.values < 2.0))


@torch.no_grad()
def sample(
    logits: Float[Tensor, "batch slot vocabulary"], generator: torch.Generator
) -> Int[Tensor, "batch slot"]:
    """One token per slot from the softmax of its logits, by the Gumbel-max trick.

    Unlike `torch.multinomial` this does not wait for the device.
    """
    uniform = torch.rand(logits.shape, generator=generator, device=logits.device)
    return (logits.float() - (-uniform.log()).log()).argmax(-1)


def detection_loss(
    logits: Float[Tensor, "batch time"],
    replaced: Bool[Tensor, "batch time"],
    real: Bool[Tensor, "batch time"],
) -> Detection:
    """The discriminator's loss over all real tokens (section 2), and how right it is, in float32.

    Args:
        logits: above 0 where a token is called replaced.
        replaced: where a token differs from the original.
        real: where a row is not padded.
    """
    logits, target = logits.float(), replaced.float()
    total = real.sum().clamp(min=1)
    nats = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    called, actual = (logits > 0) & real, replaced & real
    right = (called & actual).sum()
    return Detection(
        torch.where(real, nats, 0.0).sum() / total,
        ((called == actual) & real).sum() / total,
        right / called.sum().clamp(min=1),
        right / actual.sum().clamp(min=1),
    )


@final
class ReplacedToken(Objective):
    """Tells replaced tokens from original ones; see the module's docstring.

    Attributes:
        encoder: the discriminator.
        head: one logit per position: above 0 where a token is called replaced.
        generator: a narrower encoder on the tables of `encoder`.
        generator_head: its predictions, tied to the same token table.

    Raises:
        ConfigError: the vocabulary has no mask token, or the encoder sees one side only.

    >>> vocabulary = Vocabulary(size=100, mask=4)
    >>> encoder = TransformerEncoder(Model(dim=8, layers=1, heads=2), vocabulary)
    >>> method = ReplacedToken(Config(), encoder, vocabulary)
    >>> batch = {"tokens": torch.tensor([[5, 7, 2]])}
    >>> int(method.loss(batch, torch.Generator()).weight)
    3
    """

    fields = ("tokens",)
    kept = ("encoder", "head")
    special: Tensor  # (vocabulary,) bool

    def __init__(self, config: Config, encoder: TransformerEncoder, vocabulary: Vocabulary):
        super().__init__()
        if vocabulary.mask < 0:
            raise ConfigError("replaced_token needs a tokenizer with a mask token (style 'bert')")
        if encoder.config.causal:
            raise ConfigError("replaced_token needs model.causal = false: it reads both sides")
        self.config, self.encoder, self.vocabulary = config, encoder, vocabulary
        self.head = nn.Sequential(
            nn.Linear(encoder.dim, encoder.dim), nn.GELU(), nn.Linear(encoder.dim, 1)
        )
        initialise(self.head, encoder.config.init_std)
        small = generator_config(encoder.config, config.generator_scale)
        self.generator = TransformerEncoder(small, vocabulary)
        self.generator_head = VocabularyHead(self.generator, transform=True)
        _share_tables(self.generator, encoder)
        special = torch.zeros(vocabulary.size, dtype=torch.bool)
        special[list(vocabulary.special)] = True
        self.register_buffer("special", special, persistent=False)

    def loss(self, batch: Batch, generator: torch.Generator) -> Output:
        """Masks, draws what the generator predicts, and asks the encoder of every token."""
        tokens = batch["tokens"]
        real = batch.get("mask", torch.ones_like(tokens, dtype=torch.bool))
        chosen = choose(real & ~self.special[tokens], self.config.mask_rate, generator)
        original = tokens.gather(1, chosen.positions)  # (batch, slot)
        logits = self._predict(batch, chosen)
        drawn = torch.where(chosen.real, sample(logits, generator), original)
        corrupted = tokens.scatter(1, chosen.positions, drawn)
        replaced = corrupted != tokens  # an original that was drawn again is one
        features = self.encoder({**batch, "tokens": corrupted})
        detection = detection_loss(self.head(features.last).squeeze(-1), replaced, real)
        masked, accuracy = masked_loss(logits, original, chosen.real)
        loss = masked + self.config.discriminator_weight * detection.loss
        weight = real.sum()
        metrics = {
            "generator_loss": masked,
            "generator_accuracy": accuracy,
            "replaced_share": replaced.sum() / weight.clamp(min=1),
            **{f"discriminator_{name}": value for name, value in detection._asdict().items()},
        }
        return Output(loss, weight, metrics)

    def _predict(self, batch: Batch, chosen: Chosen) -> Float[Tensor, "batch slot vocabulary"]:
        """The generator's logits at the chosen positions, which it sees as [MASK]."""
        tokens = batch["tokens"]
        shown = torch.where(
            chosen.real, self.vocabulary.mask, tokens.gather(1, chosen.positions)
        )  # (batch, slot)
        masked = tokens.scatter(1, chosen.positions, shown)
        hidden = self.generator({**batch, "tokens": masked}, slots=chosen.positions).last
        return self.generator_head(hidden, self.encoder.embedding)


def _share_tables(generator: TransformerEncoder, encoder: TransformerEncoder) -> None:
    """Lets the generator read the encoder's tables, as plain attributes and not submodules.

    So they are saved, counted and moved once, with their encoder.
    """
    for name in ("tokens", "segments", "positions", "norm"):
        delattr(generator.embedding, name)
        vars(generator.embedding)[name] = getattr(encoder.embedding, name)
