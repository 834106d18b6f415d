"""The contract between what is learned and how it is trained.

Pre-training methods and downstream tasks are both an `Objective`: something that owns an encoder
and turns a batch into a loss. The training loop knows this file and nothing of any method.
"""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, Self, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from selfsup.batch import Batch
from selfsup.models.encoder import Encoder


class Output(NamedTuple):
    """What one batch gave.

    Attributes:
        loss: scalar, float32, a mean over `weight` items.
        weight: how many items the mean is over, an int or a scalar tensor: gradient accumulation
            and ranks weigh by it. A batch in which nothing was to be predicted has weight 0.
        metrics: scalars worth plotting (accuracy, perplexity, target std, code usage); means over
            the same items.
    """

    loss: Float[Tensor, ""]
    weight: int | Tensor
    metrics: dict[str, Tensor]


class Objective(nn.Module):
    """All that the training loop knows of methods and tasks.

    Attributes:
        encoder: what a user keeps.
        fields: names of the batch fields that `loss` reads.
        kept: names of the submodules that go to the run's `model/` folder.
        refresh_every: steps between two calls of `refresh`; None: never, 0: once, before step 0.
        chance_loss: the loss of a guess that ignores its input, where that is known; the guard
            warns when training sits on it.
        whole_batch: whether `loss` compares the examples of a batch, those of all ranks; a module
            that does so has this too.
        adds_penalty: whether `loss` adds `Features.penalty` of an encoder that has one.
        predicts_next: whether a blank is told from the position to its left, as a next token is.
    """

    encoder: Encoder
    fields: tuple[str, ...] = ()
    kept: tuple[str, ...] = ("encoder",)
    refresh_every: int | None = None
    chance_loss: float | None = None
    whole_batch: bool = False
    adds_penalty: bool = False
    predicts_next: bool = False

    def loss(self, batch: Batch, generator: torch.Generator) -> Output:
        """One batch to one loss; all randomness (masks, views, negatives) from `generator`."""
        raise TypeError(f"{type(self).__name__} does not define loss")

    def after_step(self, step: int, total: int) -> None:
        """Called after the optimizer's step: moves a teacher, a queue, a codebook."""

    def refresh(self, batches: Iterable[Batch], generator: torch.Generator) -> None:
        """A pass over the data: cluster labels, data-driven initialisation."""


@runtime_checkable
class FillsBlanks(Protocol):
    """A method whose model can fill masked positions."""

    def fill(self, batch: Batch) -> Float[Tensor, "blank vocabulary"]:
        """Log-probabilities of every token at every [MASK] of the batch, in reading order."""
        ...


@runtime_checkable
class Generates(Protocol):
    """A method whose model can write on."""

    def generate(
        self, batch: Batch, num_tokens: int, generator: torch.Generator, **options: float
    ) -> Tensor:
        """Continues each row by `num_tokens` ids: (batch, num_tokens) int64."""
        ...


@runtime_checkable
class Scores(Protocol):
    """A method whose model gives each real token a log-probability."""

    def score(self, batch: Batch) -> Mapping[str, Tensor]:
        """`log_probability` (batch, time) float32 and `scored` (batch, time) bool."""
        ...


@runtime_checkable
class Reconstructs(Protocol):
    """A method whose model can rebuild its input."""

    def reconstruct(self, batch: Batch) -> Tensor:
        """The inputs as the model rebuilds them, (batch, ...), on the standardised scale."""
        ...


@runtime_checkable
class Samples(Protocol):
    """A method whose model can draw new inputs."""

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """New inputs, (count, ...), on the standardised scale."""
        ...


@runtime_checkable
class Interpolates(Protocol):
    """A method whose model has inputs between two others."""

    def interpolate(self, batch_a: Batch, batch_b: Batch, steps: int) -> Tensor:
        """From each input of `batch_a` to that of `batch_b`, both ends as the model rebuilds them.

        (batch, steps, ...), on the standardised scale.
        """
        ...


class Restoration(NamedTuple):
    """A sequence with parts hidden, and what a model says stood there.

    Attributes:
        hidden: True where the model saw nothing; never where padded.
        restored: what the model says of every place, on the scale of the batch.

    `time` leaves out a rest at the end that fills no position of the model.
    """

    hidden: Bool[Tensor, "batch time channel"]
    restored: Float[Tensor, "batch time channel"]


@runtime_checkable
class Restores(Protocol):
    """A method that hides parts of a sequence (frames, series) and restores them."""

    def restore(self, batch: Batch, generator: torch.Generator) -> Restoration:
        """Hides as much as in training, and restores it."""
        ...


@runtime_checkable
class LooksAhead(Protocol):
    """A method that predicts each place of a sequence from the places up to some steps before."""

    def look_ahead(self, batch: Batch) -> tuple[Float[Tensor, "batch time channel"], int]:
        """The sequence as predicted, and the steps; the first so many places are as given."""
        ...


@runtime_checkable
class Taught(Protocol):
    """A method that learns from a finished run, its teacher, which `config.teacher` names.

    A model folder holds the student alone and is loaded without the teacher.

    Attributes:
        config: the method's own.
        teachers: names of the methods whose runs can teach it.
    """

    config: Any
    teachers: tuple[str, ...]

    def take_teacher(self, teacher: Objective) -> None:
        """Learns from this one from now on; before training, and before a checkpoint is loaded."""
        ...


class Predictions(NamedTuple):
    """What a task says about one batch.

    Attributes:
        values: (batch, ...) class numbers, tag numbers per word, or real values.
        scores: (batch, ..., classes) probabilities; for regression the values again.
    """

    values: Tensor
    scores: Tensor


class Task(Objective):
    """An objective that reads labels: adds a prediction and names its metric.

    Attributes:
        metric: a name of `evaluation.metrics.METRICS`.
        gives_text: whether its answers are texts, which the data set's `collect` makes of its
            predictions, and not names or numbers.
        max_watched: so many held-out examples are predicted while training; None: all.
        row_options: what its data set is told, beside the examples.
        own_rows: whether items without labels, too, need its data set to become rows.
    """

    metric: str
    gives_text: bool = False
    max_watched: int | None = None
    row_options: Mapping[str, Any] = MappingProxyType({})
    own_rows: bool = False

    def train(self, mode: bool = True) -> Self:
        """As in every module, but an encoder that is wholly frozen stays without dropout."""
        super().train(mode)
        self.encoder.train(mode and any(p.requires_grad for p in self.encoder.parameters()))
        return self

    def predict(self, batch: Batch) -> Predictions:
        """Predictions for one batch, without gradient or dropout."""
        raise TypeError(f"{type(self).__name__} does not define predict")
