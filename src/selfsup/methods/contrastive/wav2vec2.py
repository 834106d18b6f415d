"""wav2vec 2.0: the code of a hidden stretch of sound is told from codes of other hidden ones.

Baevski, Zhou, Mohamed and Auli, "wav2vec 2.0: A Framework for Self-Supervised Learning of Speech
Representations" (2020, arXiv 2006.11477). Spans of what the front end gives are replaced by one
learned vector; a transformer reads the rest. At each hidden step its output must be more like the
quantized front end output of that step than like those of other hidden steps of the utterance. The
codes are learned at the same time; a second loss keeps all of them in use.

The front end is the encoder's embedding, whatever that reads: the targets are
`encoder.embedding.vectors(batch)`, convolutions of a waveform or stacked log-mel frames.

Axes: batch; time: steps of the encoder; negative; dim of what is compared; group and code: see
`models/product_quantizer.py`.

Deviations from the paper:
- The mask vector stands before the layer normalisation and the linear map of the front end, which
  make of it what the paper's mask vector is.
- The quantizer reads the front end's output normalised without factor and offset, for which the
  linear map to its logits makes up; the authors share those with the transformer's input.
- There is no dropout of the quantizer's input and no dropping of layers.
- The feature penalty, in the authors' code alone, leaves padding out, which they count in.

A short utterance needs shorter spans: fewer than two hidden steps in one give it no loss.

Reference result: free spoken digits, 22 minutes of six voices, 700 steps of eight clips of 3 s
(docs/results/wav2vec2-small.json): the digit is told for a voice left out with accuracy 0.436 by a
linear probe; untrained 0.369, mean log-mel 0.216; one seed. Its losses equal those of
`transformers` number for number (tests).
"""

import math
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from selfsup import ranks
from selfsup.batch import AudioSpec, Batch
from selfsup.methods.spans import span_mask
from selfsup.models.product_quantizer import ProductCodes, ProductQuantizer, group_perplexities
from selfsup.models.recurrent import RecurrentEncoder
from selfsup.models.transformer import TransformerEncoder
from selfsup.objective import Objective, Output


@dataclass(frozen=True, kw_only=True)
class Config:
    """Masks, codes, negatives, weights. Defaults are those of the paper's BASE model."""

    start_probability: float = 0.065
    """Share of steps at which a hidden span starts; spans overlap, so about half is hidden."""
    span: int = 10
    """Steps in a span: 200 ms of a waveform."""
    groups: int = 2
    """Codebooks."""
    num_codes: int = 320
    """Codes in each."""
    code_dim: int = 256
    """Width of the codes of all groups together."""
    projection_dim: int = 256
    """Width in which predictions and targets are compared."""
    num_negatives: int = 100
    """Other hidden steps of the same utterance that a step is compared with, drawn with return."""
    temperature: float = 0.1
    """Divides the cosines."""
    gumbel_temperature: float = 2.0
    """Of the quantizer at the start."""
    gumbel_decay: float = 0.999995
    """Factor on it at each step."""
    final_gumbel_temperature: float = 0.5
    """Where it stays."""
    diversity_weight: float = 0.1
    """Of the loss that keeps codes in use."""
    feature_penalty: float = 10.0
    """Weight of the mean square of what the front end gives."""
    front_end_gradient: float = 0.1
    """Factor on the gradient that reaches the front end."""

    def __post_init__(self) -> None:
        counts = ("span", "groups", "code_dim", "projection_dim", "num_negatives")
        for name, least in {**dict.fromkeys(counts, 1), "num_codes": 2}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("start_probability", "gumbel_decay"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, got {getattr(self, name)}")
        for name in ("temperature", "final_gumbel_temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("diversity_weight", "feature_penalty", "front_end_gradient"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not self.gumbel_temperature >= self.final_gumbel_temperature:
            raise ValueError(
                f"final_gumbel_temperature = {self.final_gumbel_temperature} is above "
                f"gumbel_temperature = {self.gumbel_temperature}, from where it falls"
            )
        if self.code_dim % self.groups:
            raise ValueError(f"groups = {self.groups} does not divide code_dim = {self.code_dim}")


def draw_negatives(
    hidden: Bool[Tensor, "batch time"], count: int, generator: torch.Generator
) -> Int[Tensor, "batch time {count}"]:
    """For every hidden step the places of `count` other hidden steps of its row, with return.

    Args:
        hidden: two or more in a row, or none; elsewhere the places mean nothing.
        count: negatives of each step.
        generator: source of randomness, on the device of `hidden`.
    """
    draw = torch.rand(*hidden.shape, count, generator=generator, device=hidden.device)
    number = hidden.cumsum(1).unsqueeze(-1) - 1  # of each hidden step in its row
    others = hidden.sum(1).clamp(min=1)[:, None, None] - 1
    pick = (draw * others).long()
    pick = pick + (pick >= number)  # steps over the step itself
    places = (~hidden).long().argsort(dim=1, stable=True)  # the hidden ones come first
    return places.gather(1, pick.flatten(1).clamp(max=hidden.shape[1] - 1)).view_as(pick)


def contrastive_loss(
    prediction: Float[Tensor, "batch time dim"],
    target: Float[Tensor, "batch time dim"],
    codes: Int[Tensor, "batch time group"],
    hidden: Bool[Tensor, "batch time"],
    negatives: Int[Tensor, "batch time negative"],
    temperature: float,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Equation 3 as a mean over the hidden steps, and how often the target is nearest.

    A negative with the codes of the target is left out. A step whose negatives all are counts as
    not found: one code for everything finds nothing.

    Args:
        prediction: what the encoder makes of each step.
        target: the quantized step.
        codes: of `target`.
        hidden: the steps that count; 0 is given where there is none.
        negatives: for each step the places of others in its row.
        temperature: divides the cosines.
    """
    with torch.autocast(prediction.device.type, enabled=False):  # it would round the cosines
        predicted, wanted = (F.normalize(x.float(), dim=-1) for x in (prediction, target))
        cosine = predicted @ wanted.transpose(1, 2) / temperature  # (batch, time, time)
    positive = cosine.diagonal(dim1=1, dim2=2).unsqueeze(-1)
    places = negatives.flatten(1).unsqueeze(-1).expand(-1, -1, codes.shape[-1])
    of_negatives = codes.gather(1, places).unflatten(1, negatives.shape[1:])
    same = (of_negatives == codes.unsqueeze(2)).all(-1)  # (batch, time, negative)
    others = cosine.gather(2, negatives).masked_fill(same, -math.inf)
    each = torch.cat([positive, others], -1).logsumexp(-1) - positive.squeeze(-1)  # (batch, time)
    found = (positive > others).all(-1) & ~same.all(-1)
    count = hidden.sum().clamp(min=1)
    return torch.where(hidden, each, 0.0).sum() / count, (found & hidden).sum() / count


def diversity_loss(share: Float[Tensor, "group code"]) -> Float[Tensor, ""]:
    """The part of the codes that is not in use, 0 to 1 (equation 4 as in the authors' code).

    Args:
        share: mean probability of each code over the hidden steps.
    """
    return 1 - group_perplexities(share).sum() / share.numel()


def mean_square(
    vectors: Float[Tensor, "batch time width"], real: Bool[Tensor, "batch time"]
) -> Float[Tensor, ""]:
    """Mean over the real steps and over width, in float32."""
    squares = vectors.float().square().mean(-1)
    return torch.where(real, squares, 0.0).sum() / real.sum().clamp(min=1)


@final
class Wav2Vec2(Objective):
    """Tells the codes of hidden steps apart; see the module's docstring.

    Attributes:
        mask_vector: (width,) stands where a step is hidden.

    >>> from selfsup.models.transformer import Config as Model
    >>> spec = AudioSpec(rate=8000, mel=4, hop=80)
    >>> encoder = TransformerEncoder(Model(dim=8, layers=1, heads=2, patch=1), spec)
    >>> method = Wav2Vec2(Config(start_probability=1.0), encoder, spec)
    >>> int(method.loss({"frames": torch.randn(2, 20, 4)}, torch.Generator()).weight)
    40
    """

    fields: tuple[str, ...] = ()
    whole_batch = True
    encoder: RecurrentEncoder | TransformerEncoder

    def __init__(
        self, config: Config, encoder: RecurrentEncoder | TransformerEncoder, spec: AudioSpec
    ):
        super().__init__()
        self.config, self.encoder, self.spec = config, encoder, spec
        self.fields = (encoder.embedding.field,)
        width = encoder.embedding.width
        self.mask_vector = nn.Parameter(torch.rand(width))
        self.quantizer = ProductQuantizer(
            width, config.code_dim, config.groups, config.num_codes, config.gumbel_temperature
        )
        self.prediction_head = nn.Linear(encoder.dim, config.projection_dim)
        self.target_head = nn.Linear(config.code_dim, config.projection_dim)

    def loss(self, batch: Batch, generator: torch.Generator) -> Output:
        """Hides spans, draws negatives, compares; `weight` is the number of hidden steps."""
        config, real = self.config, self._real(batch)
        rate = config.start_probability * config.span
        hidden = span_mask(real, rate, config.span, generator, min_masks=2)
        hidden = hidden & (hidden.sum(1, keepdim=True) > 1)  # else there is no negative
        negatives = draw_negatives(hidden, config.num_negatives, generator)
        return self.compare(batch, hidden, negatives, generator)

    def compare(
        self,
        batch: Batch,
        hidden: Bool[Tensor, "batch time"],
        negatives: Int[Tensor, "batch time negative"],
        generator: torch.Generator,
    ) -> Output:
        """The loss for given hidden steps and negatives; `generator` draws the codes."""
        config = self.config
        vectors = self.encoder.embedding.vectors(batch)
        vectors = vectors.detach() + config.front_end_gradient * (vectors - vectors.detach())
        shown = torch.where(hidden.unsqueeze(-1), self.mask_vector.to(vectors.dtype), vectors)
        context = self.encoder(batch, vectors=shown).last
        quantized = self.quantizer(F.layer_norm(vectors.float(), vectors.shape[-1:]), generator)
        contrastive, accuracy = contrastive_loss(
            self.prediction_head(context),
            self.target_head(quantized.vectors),
            quantized.codes,
            hidden,
            negatives,
            config.temperature,
        )
        share, used = self._shares(quantized, hidden)
        diversity = diversity_loss(share)
        penalty = mean_square(vectors, self._real(batch))
        loss = contrastive + config.diversity_weight * diversity + config.feature_penalty * penalty
        metrics = {
            "contrastive": contrastive.detach(),
            "diversity": diversity.detach(),
            "code_perplexity": group_perplexities(used).sum(),
            "accuracy": accuracy,
        }
        return Output(loss, hidden.sum(), metrics)

    @torch.no_grad()
    def after_step(self, step: int, total: int) -> None:
        """Lowers the temperature of the drawn codes."""
        config = self.config
        falling = config.gumbel_temperature * config.gumbel_decay ** (step + 1)
        self.quantizer.temperature.fill_(max(falling, config.final_gumbel_temperature))

    def _real(self, batch: Batch) -> Tensor:
        """(batch, time) True at the real steps, also where the batch has no mask."""
        content = batch[self.encoder.embedding.field]
        everywhere = content.new_ones(content.shape[:2], dtype=torch.bool)
        return self.encoder.embedding.real({"mask": batch.get("mask", everywhere)})

    @staticmethod
    def _shares(quantized: ProductCodes, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Of each code over the hidden steps of all ranks: mean probability, share of choices."""
        probability = torch.where(hidden[..., None, None], quantized.probability, 0.0)
        chosen = F.one_hot(quantized.codes[hidden], probability.shape[-1])  # (step, group, code)
        count = ranks.total(hidden.sum().float()).clamp(min=1)
        mean = ranks.total(probability.sum((0, 1))) / count
        return mean, ranks.total(chosen.sum(0).float()) / count
