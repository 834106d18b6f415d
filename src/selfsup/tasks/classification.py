"""One class for a whole example: sentiment, topic, entailment of a pair.

A linear layer on one vector per example, as BERT is fine-tuned (Devlin et al. 2018, arXiv
1810.04805, section 4.1). A pair of texts is one row with `segments`; it needs no head of its own.

Axes: batch; time: tokens of a row; dim: width of the encoder; classes: as many as `names`.

Deviation: the vector is by default the mean over real positions, which also suits encoders that
were never taught to put anything into [CLS].
"""

from dataclasses import dataclass, field
from typing import Literal, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from selfsup.batch import Batch
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
    exits: ExitConfig = field(default_factory=ExitConfig)
    """Heads behind the earlier layers, so that easy examples leave early: `tasks.exits`."""

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")


def classification_loss(
    logits: Float[Tensor, "batch classes"], label: Int[Tensor, " batch"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Mean cross entropy (nats) and accuracy, in float32."""
    loss = F.cross_entropy(logits.float(), label)
    return loss, (logits.detach().argmax(-1) == label).float().mean()


@final
class Classification(Task):
    """A linear classifier on an encoder.

    Args:
        config: pooling and dropout.
        encoder: gives one vector per example.
        names: the classes, in the order of their numbers.
    """

    fields = ("label",)
    kept = ("encoder", "head", "exits")
    metric = "accuracy"

    def __init__(self, config: Config, encoder: Encoder, names: tuple[str, ...]):
        super().__init__()
        self.config, self.encoder, self.names = config, encoder, names
        self.dropout = Dropout(config.dropout)
        self.head = nn.Linear(encoder.dim, len(names))
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        self.exits = (
            Exits(config.exits, encoder, len(names), config.pooling, config.dropout)
            if config.exits.training != "none"
            else None
        )

    def loss(self, batch: Batch, generator: torch.Generator) -> Output:
        """Cross entropy of `label` (batch,) int64; `generator` is not used."""
        label = batch["label"]
        if self.exits is None:
            loss, accuracy = classification_loss(self._logits(batch), label)
        else:
            loss, logits = self.exits.loss(
                self, batch, self.head, lambda logits: classification_loss(logits, label)[0]
            )
            _, accuracy = classification_loss(logits, label)
        return Output(loss, len(label), {"accuracy": accuracy})

    def after_step(self, step: int, total: int) -> None:
        """Tells the exits how far training is."""
        if self.exits is not None:
            self.exits.after_step(step, total)

    @torch.no_grad()
    def predict(self, batch: Batch) -> Predictions:
        """Class numbers (batch,) and probabilities (batch, classes), without dropout."""
        training = self.training
        if training:
            self.eval()
        if self.exits is None:
            logits = self._logits(batch)
        else:
            logits, _ = self.exits.leave(self.encoder, batch, self.head)
        if training:
            self.train()
        scores = logits.softmax(-1)
        return Predictions(scores.argmax(-1), scores)

    def _logits(self, batch: Batch) -> Float[Tensor, "batch classes"]:
        if self.config.pooling == "encoder":
            return self.head(self.dropout(self.encoder.pooled(batch))).float()
        return self.read(self.encoder(batch))

    def read(self, features: Features) -> Float[Tensor, "batch classes"]:
        """Logits, float32, of what the encoder gave."""
        match self.config.pooling:
            case "encoder":
                vector = features.pooled
            case "mean":
                vector = masked_mean(features.last, features.mask)
            case "cls":
                vector = features.last[:, 0]
        return self.head(self.dropout(vector)).float()
