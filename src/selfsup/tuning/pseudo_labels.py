"""Labels that models give to items which have none, and a task that learns them.

A model's scores are the logarithms of its class probabilities. Learned softly, all classes at once,
they are what a distilled student sees (Hinton et al. 2015, arXiv 1503.02531); the likeliest class
alone is a pseudo label.

Axes: items; classes.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from selfsup.batch import Batch
from selfsup.data.dataset import LabelledDataset
from selfsup.data.labels import Labelled
from selfsup.methods.ops import soft_loss
from selfsup.objective import Output, Predictions, Task
from selfsup.tasks.classification import Classification


@final
class SoftLabelled(LabelledDataset):
    """Rows whose label is a score for each class.

    Args:
        data: the rows; their own labels are not given on.
        scores: logits or log-probabilities.
    """

    def __init__(self, data: LabelledDataset, scores: Float[np.ndarray, "items classes"]):
        self.data, self.scores = data, torch.from_numpy(np.asarray(scores, dtype=np.float32))
        self.fields, self.lengths, self.task = data.fields, data.lengths, data.task
        self.labels, self.truncated = data.labels, data.truncated

    def __len__(self) -> int:
        return len(self.data)

    def batch(self, numbers: np.ndarray) -> Batch:
        """The rows of those numbers; `label` is (batch, classes) float32."""
        return {**self.data.batch(numbers), "label": self.scores[torch.as_tensor(numbers)]}

    def collect(
        self, values: Sequence[np.ndarray], scores: Sequence[np.ndarray]
    ) -> tuple[list[Any], list[Any]]:
        """The scores that the labels are, and those that a task gives."""
        return list(self.scores.numpy()), list(scores)


@final
class SoftClassification(Task):
    """A classifier that learns scores of the classes; `student` is what a user keeps.

    The loss is T^2 * KL(scores at T || student at T), a mean over the batch, in nats.

    Args:
        student: the classifier.
        temperature: T, by which both sides' logits are divided.
    """

    fields = ("label",)
    kept = ("student",)
    metric = "accuracy"

    def __init__(self, student: Classification, temperature: float):
        super().__init__()
        self.student, self.temperature = student, temperature
        vars(self)["encoder"] = student.encoder  # saved and counted once, with its task

    def loss(self, batch: Batch, generator: torch.Generator) -> Output:
        """Divergence from `label` (batch, classes), for class numbers the student's own loss."""
        if not batch["label"].is_floating_point():
            return self.student.loss(batch, generator)
        logits, label = self.student.read(self.student.encoder(batch)), batch["label"]
        agree = (logits.detach().argmax(-1) == label.argmax(-1)).float().mean()
        loss = soft_loss(logits, label, self.temperature).mean()
        return Output(loss, len(label), {"agreement": agree})

    def predict(self, batch: Batch) -> Predictions:
        """As the student predicts."""
        return self.student.predict(batch)


def without_labels(items: Sequence[Any], like: Labelled, task: str) -> Labelled:
    """Items of the same classes as `like`; their labels only fill the place."""
    filler = [like.names[0]] * len(items)
    return Labelled(task, list(items), filler, like.names, "unlabelled items")


def softened(
    scores: Float[np.ndarray, "items classes"], temperature: float = 1.0
) -> Float[np.ndarray, "items classes"]:
    """Probabilities of scores that are divided by a temperature.

    >>> softened(np.log([[0.9, 0.1]]), 2.0).round(2).tolist()
    [[0.75, 0.25]]
    """
    scaled = scores / temperature
    shares = np.exp(scaled - scaled.max(1, keepdims=True))
    return shares / shares.sum(1, keepdims=True)


def confident(
    scores: Float[np.ndarray, "items classes"], threshold: float
) -> Bool[np.ndarray, " items"]:
    """Which items have a class of at least this probability."""
    return softened(scores).max(1) >= threshold


def with_pseudo_labels(
    labelled: Labelled, items: Sequence[Any], classes: Int[np.ndarray, " items"]
) -> Labelled:
    """The labelled examples, and behind them items with the classes that models gave them."""
    names = [labelled.names[number] for number in classes]
    return replace(
        labelled, items=[*labelled.items, *items], labels=[*labelled.labels, *names], groups=()
    )
