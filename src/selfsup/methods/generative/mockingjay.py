"""Mockingjay: hidden stretches of sound are restored from both sides.

Liu, Yang, Chi, Hsu and Lee, "Mockingjay: Unsupervised Speech Representation Learning with Deep
Bidirectional Transformer Encoders" (2020, arXiv 1910.12638). Spans of frames are chosen; in most
utterances they become zero, in some they are replaced by other frames, in some they are kept; a
head restores the original there, with an L1 loss. Spans rather than single frames, because a single
one is nearly the mean of its neighbours.

`channel_mask` adds TERA's other axis (Liu, Li and Lee, 2021, arXiv 2007.06028): a band of mel
channels becomes zero in the whole utterance, and is restored too.

Axes: batch; position: of the encoder, one frame, or the `patch` frames that a transformer stacks;
width: numbers in a position, mel * frames in it; channel: mel.

Deviations from the papers:
- Spans do not overlap, so that a fixed share of the positions is chosen: an utterance has
  mask_rate * positions / span spans, rounded up or down by chance.
- A random replacement is drawn for each chosen frame anew, from the same utterance.
- An utterance that is shorter than a span has nothing chosen.
- Targets are the frames that were read; the paper's larger model restores linear spectrograms.

Reference result: free spoken digits, 22 minutes of six voices, less than ten CPU minutes
(docs/results/mockingjay-small.json): the digit is told for a voice left out with accuracy 0.641 by
a linear probe; untrained 0.550, mean log-mel 0.534; one seed.
"""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from selfsup.batch import AudioSpec, Batch
from selfsup.errors import ConfigError
from selfsup.methods.spans import span_mask
from selfsup.models.embeddings import stacked
from selfsup.models.recurrent import RecurrentEncoder
from selfsup.models.transformer import TransformerEncoder
from selfsup.objective import Objective, Output, Restoration


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is hidden, and how. Defaults are the paper's for unstacked frames."""

    mask_rate: float = 0.15
    """Share of positions that are chosen."""
    span: int = 7
    """Neighbouring positions that are chosen together; fewer for a transformer that stacks."""
    mask_share: float = 0.8
    """Share of utterances whose chosen frames become zero."""
    random_share: float = 0.1
    """Share of utterances whose chosen frames are replaced; in the rest they stay as they are."""
    channel_mask: int = 0
    """Widest band of mel channels that becomes zero; 0: none (TERA: a fifth of the channels)."""

    def __post_init__(self) -> None:
        if not 0 < self.mask_rate <= 1:
            raise ValueError(f"mask_rate must be above 0 and at most 1, got {self.mask_rate}")
        if self.span < 1 or self.channel_mask < 0:
            raise ValueError(
                f"span must be at least 1 and channel_mask at least 0, got {self.span} and "
                f"{self.channel_mask}"
            )
        if min(self.mask_share, self.random_share) < 0 or self.mask_share + self.random_share > 1:
            raise ValueError("mask_share and random_share must be shares that sum to at most 1")


def corrupt(
    frames: Float[Tensor, "batch position width"],
    chosen: Bool[Tensor, "batch position"],
    real: Bool[Tensor, "batch position"],
    config: Config,
    generator: torch.Generator,
) -> Float[Tensor, "batch position width"]:
    """The frames with chosen ones zero, replaced or kept: one fate per utterance."""
    fate = torch.rand(len(frames), 1, 1, generator=generator, device=frames.device)
    draw = torch.rand(chosen.shape, generator=generator, device=frames.device)
    length = real.sum(1, keepdim=True)  # (batch, 1)
    source = (draw * length).long()  # (batch, position)
    other = frames.gather(1, source.unsqueeze(-1).expand_as(frames))
    replaced = torch.where(fate < config.mask_share + config.random_share, other, frames)
    replaced = torch.where(fate < config.mask_share, 0.0, replaced)
    return torch.where(chosen.unsqueeze(-1), replaced, frames)


def channel_bands(
    size: int, channels: int, widest: int, generator: torch.Generator
) -> Bool[Tensor, "{size} {channels}"]:
    """One band of neighbouring channels per row; widths 0 to `widest` are equally likely."""
    draw = torch.rand(2, size, 1, generator=generator, device=generator.device)
    width = (draw[0] * (widest + 1)).long()
    first = (draw[1] * (channels - width + 1)).long()
    channel = torch.arange(channels, device=generator.device)
    return (channel >= first) & (channel < first + width)


def masked_l1(
    restored: Float[Tensor, "batch position width"],
    target: Float[Tensor, "batch position width"],
    hidden: Bool[Tensor, "batch position width"],
) -> Float[Tensor, ""]:
    """Mean absolute error over the hidden numbers, in float32; 0 where nothing is hidden."""
    error = (restored.float() - target.float()).abs()
    return torch.where(hidden, error, 0.0).sum() / hidden.sum().clamp(min=1)


@final
class Mockingjay(Objective):
    """Restores hidden frames; see the module's docstring.

    Raises:
        ConfigError: the encoder sees one side only, or bands are wider than a frame.

    >>> from selfsup.models.transformer import Config as Model
    >>> spec = AudioSpec(rate=8000, mel=4, hop=80)
    >>> encoder = TransformerEncoder(Model(dim=8, layers=1, heads=2, patch=1), spec)
    >>> method = Mockingjay(Config(mask_rate=0.5, span=5), encoder, spec)
    >>> int(method.loss({"frames": torch.zeros(2, 20, 4)}, torch.Generator()).weight)
    80
    """

    fields = ("frames",)
    encoder: RecurrentEncoder | TransformerEncoder

    def __init__(
        self, config: Config, encoder: RecurrentEncoder | TransformerEncoder, spec: AudioSpec
    ):
        super().__init__()
        if encoder.causal:
            raise ConfigError(
                "mockingjay restores from both sides: it needs model.causal = false with "
                "model.name = 'transformer', model.bidirectional = true with 'recurrent'"
            )
        if config.channel_mask > spec.mel:
            raise ConfigError(
                f"method.channel_mask = {config.channel_mask} is more than the {spec.mel} channels "
                f"of a frame (data.mel)"
            )
        self.config, self.encoder, self.spec = config, encoder, spec
        self.head = nn.Sequential(  # two layers with a normalisation between them, as published
            nn.Linear(encoder.dim, encoder.dim),
            nn.GELU(),
            nn.LayerNorm(encoder.dim),
            nn.Linear(encoder.dim, spec.mel * encoder.embedding.stack),
        )

    def loss(self, batch: Batch, generator: torch.Generator) -> Output:
        """Hides, encodes, restores, compares.

        `weight` is the number of hidden numbers. `l1_mean` is the error of saying the utterance's
        mean of each channel everywhere.
        """
        target, config = stacked(batch["frames"], self.encoder.embedding.stack), self.config
        real = self._real(batch, target)
        chosen = span_mask(real, config.mask_rate, config.span, generator, overlap=False)
        shown = corrupt(target, chosen, real, config, generator)
        banded = self._banded(real, generator)
        shown, hidden = shown.masked_fill(banded, 0.0), chosen.unsqueeze(-1) | banded
        restored = self._restored(batch, shown)
        loss = masked_l1(restored, target, hidden)
        weight = real.unsqueeze(-1).float()
        mean = (target * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)
        guess = masked_l1(mean.expand_as(target), target, hidden)
        return Output(loss, hidden.sum(), {"l1": loss.detach(), "l1_mean": guess})

    @torch.no_grad()
    def restore(self, batch: Batch, generator: torch.Generator) -> Restoration:
        """Makes zero what the loss would choose, and restores it: never replaced, never kept."""
        target, config = stacked(batch["frames"], self.encoder.embedding.stack), self.config
        real = self._real(batch, target)
        chosen = span_mask(real, config.mask_rate, config.span, generator, overlap=False)
        hidden = chosen.unsqueeze(-1) | self._banded(real, generator)
        restored = self._restored(batch, target.masked_fill(hidden, 0.0)).float()
        return Restoration(self._frames(hidden), self._frames(restored))

    def _real(self, batch: Batch, target: Tensor) -> Bool[Tensor, "batch position"]:
        real = self.encoder.embedding.real(batch)
        return target.new_ones(target.shape[:2], dtype=torch.bool) if real is None else real

    def _banded(
        self, real: Bool[Tensor, "batch position"], generator: torch.Generator
    ) -> Bool[Tensor, "batch position width"]:
        """True in the hidden bands of channels; False everywhere where none are hidden."""
        stack, widest = self.encoder.embedding.stack, self.config.channel_mask
        if not widest:
            return real.new_zeros(*real.shape, self.spec.mel * stack)
        bands = channel_bands(len(real), self.spec.mel, widest, generator)
        return bands.repeat(1, stack).unsqueeze(1) & real.unsqueeze(-1)

    def _frames(
        self, positions: Shaped[Tensor, "batch position width"]
    ) -> Shaped[Tensor, "batch time mel"]:
        return positions.unflatten(2, (self.encoder.embedding.stack, -1)).flatten(1, 2)

    def _restored(
        self, batch: Batch, shown: Float[Tensor, "batch position width"]
    ) -> Float[Tensor, "batch position width"]:
        return self.head(self.encoder({**batch, "frames": self._frames(shown)}).last)
