"""One number for a whole example: similarity of a pair, stability of a protein.

A linear layer on one vector per example, trained on standardised labels, so that learning rate and
loss do not depend on the labels' unit. A pair of texts is one row with `segments`.

Axes: batch; time: tokens of a row; dim: width of the encoder.

Deviation: BERT's STS-B fine-tuning regresses on the raw scores 0 to 5.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from selfsup.batch import Batch
from selfsup.errors import DataError
from selfsup.models.encoder import Encoder, masked_mean
from selfsup.objective import Output, Predictions, Task


@dataclass(frozen=True, kw_only=True)
class Config:
    """How an example becomes one vector."""

    dropout: float = 0.1
    """Dropout before the head."""
    pooling: Literal["encoder", "mean", "cls"] = "mean"
    """The encoder's own `pooled`, the mean over real positions, or the first position."""

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")


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
    kept = ("encoder", "head")
    metric = "spearman"

    def __init__(self, config: Config, encoder: Encoder, names: tuple[str, ...] = ()):
        super().__init__()
        self.config, self.encoder, self.names = config, encoder, names
        self.dropout = nn.Dropout(config.dropout)
        self.head = Head(encoder.dim)

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
        loss, error = regression_loss(
            self._standardised(batch), label, self.head.mean, self.head.std
        )
        return Output(loss, len(label), {"absolute_error": error})

    @torch.no_grad()
    def predict(self, batch: Batch) -> Predictions:
        """Values in the labels' unit (batch,), twice, without dropout."""
        training = self.training
        self.eval()
        values = self.head.mean + self.head.std * self._standardised(batch)
        self.train(training)
        return Predictions(values, values)

    def _standardised(self, batch: Batch) -> Float[Tensor, " batch"]:
        features = self.encoder(batch)
        match self.config.pooling:
            case "encoder":
                vector = features.pooled
            case "mean":
                vector = masked_mean(features.last, features.mask)
            case "cls":
                vector = features.last[:, 0]
        return self.head(self.dropout(vector)).float()
