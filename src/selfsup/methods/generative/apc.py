"""Autoregressive predictive coding: from the sound so far, the frame some steps ahead.

Chung, Hsu, Tang and Glass, "An Unsupervised Autoregressive Model for Speech Representation
Learning" (2019, arXiv 1904.03240). A causal encoder reads log-mel frames; a linear layer predicts
from each hidden state the frame `shift` steps later, with an L1 loss. The next frame is nearly the
present one, so the shift decides whether local smoothness will do or what is spoken must be known.

Axes: batch; time: frames; next = time - shift: positions that have a frame to predict; mel.

Deviations from the paper: the loss is a mean over mel channels too (there: a sum over them).
The first recurrent layer reads frames through a linear layer (see `models/recurrent.py`), and
frames are normalised as the data are, by utterance rather than by speaker. A causal transformer may
take the place of the recurrent network, as in Chung and Glass (2019, arXiv 1910.12607).

Reference result: free spoken digits, 22 minutes of six voices, less than ten CPU minutes
(docs/results/apc-small.json): the digit is told for a voice left out with accuracy 0.722 by a
linear probe; untrained 0.681, mean log-mel 0.534; one seed.
"""

from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from selfsup.batch import AudioSpec, Batch
from selfsup.errors import ConfigError
from selfsup.models.recurrent import RecurrentEncoder
from selfsup.models.transformer import TransformerEncoder
from selfsup.objective import Objective, Output


@dataclass(frozen=True, kw_only=True)
class Config:
    """How far to look ahead."""

    shift: int = 5
    """Steps from a frame to the one that is predicted from it; 1 asks for little but smoothness."""

    def __post_init__(self) -> None:
        if self.shift < 1:
            raise ValueError(f"shift must be at least 1 frame, got {self.shift}")


class Errors(NamedTuple):
    """Mean absolute errors over predicted frames and their channels."""

    predicted: Float[Tensor, ""]
    copied: Float[Tensor, ""]  # of saying that the frame will be as the present one
    total: Tensor  # how many frames were predicted


def future_errors(
    predictions: Float[Tensor, "batch time mel"],
    frames: Float[Tensor, "batch time mel"],
    mask: Bool[Tensor, "batch time"],
    shift: int,
) -> Errors:
    """The L1 loss and what copying the last known frame would give, in float32.

    Args:
        predictions: at each position for the frame `shift` steps later.
        frames: what was read.
        mask: True where real; a row of at most `shift` real frames has nothing to predict.
        shift: steps ahead.
    """
    real = mask[:, shift:]  # (batch, next)
    total = real.sum()

    def error(guess: Tensor) -> Tensor:
        distance = (guess.float() - frames[:, shift:].float()).abs().mean(-1)  # (batch, next)
        return torch.where(real, distance, 0.0).sum() / total.clamp(min=1)

    return Errors(error(predictions[:, :-shift]), error(frames[:, :-shift]), total)


@final
class APC(Objective):
    """Predicts the frame some steps ahead; see the module's docstring.

    Raises:
        ConfigError: the encoder sees what is to be predicted, or puts several frames into one
            position.

    >>> from selfsup.models.recurrent import Config as Model
    >>> spec = AudioSpec(rate=8000, mel=4, hop=80)
    >>> method = APC(Config(), RecurrentEncoder(Model(dim=8, layers=1), spec), spec)
    >>> int(method.loss({"frames": torch.zeros(2, 9, 4)}, torch.Generator()).weight)
    8
    """

    fields = ("frames",)
    encoder: RecurrentEncoder | TransformerEncoder

    def __init__(
        self, config: Config, encoder: RecurrentEncoder | TransformerEncoder, spec: AudioSpec
    ):
        super().__init__()
        if not encoder.causal:
            raise ConfigError(
                "apc needs a model that does not see what it predicts: model.bidirectional = false "
                "with model.name = 'recurrent', model.causal = true with 'transformer'"
            )
        if encoder.embedding.stack != 1:
            raise ConfigError(
                f"apc predicts single frames: model.patch must be 1, got {encoder.embedding.stack}"
            )
        self.config, self.encoder = config, encoder
        self.head = nn.Linear(encoder.dim, spec.mel)

    def loss(self, batch: Batch, generator: torch.Generator) -> Output:
        """Encodes, predicts, compares; nothing is random but the encoder's dropout."""
        features = self.encoder(batch)
        predictions = self.head(features.last)  # (batch, time, mel)
        errors = future_errors(predictions, batch["frames"], features.mask, self.config.shift)
        metrics = {"l1": errors.predicted.detach(), "l1_copy": errors.copied}
        return Output(errors.predicted, errors.total, metrics)

    @torch.no_grad()
    def look_ahead(self, batch: Batch) -> tuple[Float[Tensor, "batch time mel"], int]:
        """Each frame as predicted `shift` frames before, and the shift."""
        frames, shift = batch["frames"].clone(), self.config.shift
        frames[:, shift:] = self.head(self.encoder(batch).last)[:, :-shift].float()
        return frames, shift
