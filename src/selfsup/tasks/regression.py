"""One number for a whole example: similarity of a pair, stability of a protein.

A linear layer on one vector per example, trained on standardised labels, so that learning rate and
loss do not depend on the labels' unit. A pair of texts is one row with `segments`.

Axes: batch; time: tokens of a row; dim: width of the encoder.

Deviation: BERT's STS-B fine-tuning regresses on the raw scores 0 to 5.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, final

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from selfsup.batch import Batch
from selfsup.errors import DataError
from selfsup.models.dropout import Dropout
from selfsup.models.encoder import Encoder, Features, masked_mean
from selfsup.objective import Output, Predictions, Task
from selfsup.tasks.exits import Config as ExitConfig
from selfsup.tasks.exits import Exits


@dataclass(frozen=True, kw_only=True)
class Config:
    """How an example becomes one vector."""

    dropout: float = 0.1
    """Dropout before the head."""
    pooling: Literal["encoder", "mean", "cls"] = "mean"
    """The encoder's own `pooled`, the mean over real positions, or the first position."""
    exits: ExitConfig = field(default_factory=lambda: ExitConfig(rule="patience"))
    """Heads behind the earlier layers, so that easy examples leave early: `tasks.exits`."""

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")
        if self.exits.rule != "patience" or self.exits.training == "distilled":
            raise ValueError(
                "numbers have no entropy: exits.rule must be 'patience', and exits.training "
                "'joint' or 'two_stage'"
            )


def regression_loss(
    standardised: Float[Tensor, " batch"],
    label: Float[Tensor, " batch"],
    mean: Float[Tensor, ""],
    std: Float[Tensor, ""],
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Mean squared error in units of `std`, and mean absolute error in the labels' unit."""
    error = standardised.float() - (label - mean) / std
    return F.mse_loss(error, torch.zeros_like(error)), error.detach().abs().mean() * std


class Head(nn.Module):
    """A linear layer to standardised labels; `mean` and `std` turn its output into labels."""

    mean: Tensor
    std: Tensor

    def __init__(self, dim: int):
        super().__init__()
        self.linear = nn.Linear(dim, 1)
        nn.init.normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)
        self.register_buffer("mean", torch.tensor(0.0))
        self.register_buffer("std", torch.tensor(1.0))

    def forward(self, vector: Float[Tensor, "batch dim"]) -> Float[Tensor, " batch"]:
        """The standardised label."""
        return self.linear(vector).squeeze(-1)


@final
class Regression(Task):
    """A linear regression on an encoder. Call `fit_labels` before training.

    Args:
        config: pooling and dropout.
        encoder: gives one vector per example.
        names: not used; every task is built from the same three.
    """

    fields = ("label",)
    kept = ("encoder", "head", "exits")
    metric = "spearman"

    def __init__(self, config: Config, encoder: Encoder, names: tuple[str, ...] = ()):
        super().__init__()
        self.config, self.encoder, self.names = config, encoder, names
        self.dropout = Dropout(config.dropout)
        self.head = Head(encoder.dim)
        self.exits = (
            Exits(config.exits, encoder, 1, config.pooling, config.dropout)
            if config.exits.training != "none"
            else None
        )

    def fit_labels(self, labels: Sequence[float]) -> None:
        """Sets the mean and standard deviation of the training labels, kept with the head.

        Raises:
            DataError: the labels are all equal.
        """
        values = np.asarray(labels, dtype=np.float64)
        if values.max() == values.min():
            raise DataError(f"all {len(values)} training labels are {values[0]}: nothing to learn")
        self.head.mean.fill_(float(values.mean()))
        self.head.std.fill_(float(values.std()))

    def loss(self, batch: Batch, generator: torch.Generator) -> Output:
        """Squared error of standardised `label` (batch,) float32; `generator` is not used."""
        label = batch["label"]
        scale = self.head.mean, self.head.std
        if self.exits is None:
            loss, error = regression_loss(self._answer(batch), label, *scale)
        else:
            loss, answer = self.exits.loss(
                self,
                batch,
                self.head.linear,
                lambda answer: regression_loss(answer.squeeze(1), label, *scale)[0],
            )
            _, error = regression_loss(answer.squeeze(1), label, *scale)
        return Output(loss, len(label), {"absolute_error": error})

    def after_step(self, step: int, total: int) -> None:
        """Tells the exits how far training is."""
        if self.exits is not None:
            self.exits.after_step(step, total)

    @torch.no_grad()
    def predict(self, batch: Batch) -> Predictions:
        """Values in the labels' unit (batch,), twice, without dropout."""
        training = self.training
        if training:
            self.eval()
        if self.exits is None:
            standardised = self._answer(batch)
        else:
            answer, _ = self.exits.leave(self.encoder, batch, self.head.linear)
            standardised = answer.squeeze(1)
        if training:
            self.train()
        values = self.head.mean + self.head.std * standardised
        return Predictions(values, values)

    def _answer(self, batch: Batch) -> Float[Tensor, " batch"]:
        if self.config.pooling == "encoder":
            return self.head(self.dropout(self.encoder.pooled(batch))).float()
        return self.read(self.encoder(batch))

    def read(self, features: Features) -> Float[Tensor, " batch"]:
        """Standardised labels, float32, of what the encoder gave."""
        match self.config.pooling:
            case "encoder":
                vector = features.pooled
            case "mean":
                vector = masked_mean(features.last, features.mask)
            case "cls":
                vector = features.last[:, 0]
        return self.head(self.dropout(vector)).float()
