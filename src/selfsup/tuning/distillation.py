"""Knowledge distillation: a small student learns from what a fine-tuned teacher says of examples.

Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (2015, arXiv 1503.02531).
At a temperature T above 1 the probabilities that a teacher gives to wrong classes tell how alike
the classes are; the student learns them beside the labels:

    (1 - alpha) * cross entropy of the label + alpha * T^2 * KL(teacher at T || student at T)

T^2 keeps the size of the gradient (section 2). For regression both parts are squared errors, of
the label and of the teacher's value, and there is no temperature. An item without a label is taught
by the teacher alone, with the whole weight. Two more losses, off by default, let the student's
layers follow the teacher's (TinyBERT, Jiao et al. 2019, arXiv 1909.10351, section 3.1): squared
differences of hidden states, through a learned projection where widths differ, and of attention
scores before the softmax. Its layer m follows the teacher's layer m * teacher's layers / its own
(their "uniform" map), and the embeddings each other.

Axes: batch; time; item: an example, or for tagging a word; classes; dim; heads; query, read:
positions.

Deviations from TinyBERT:
- All losses are minimised together; there the layers learn first, then the predictions.
- The squared differences of scores are means over pairs of real positions; there padding counts.
- The projection is one for all layers and the embeddings, as in the authors' code; the paper gives
  the embeddings their own (equation 9).
- Batches weigh by their items, not by the positions that the losses of the layers are means over.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self, final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from selfsup.batch import Batch
from selfsup.errors import ConfigError
from selfsup.methods.ops import soft_loss
from selfsup.models.attention import Attention
from selfsup.models.attention_scores import attention_scores
from selfsup.models.encoder import Encoder, Features
from selfsup.objective import Output, Predictions, Task
from selfsup.tasks.classification import Classification
from selfsup.tasks.regression import Regression
from selfsup.tasks.tagging import IGNORED, Tagging

TASKS = (Classification, Regression, Tagging)


@dataclass(frozen=True, kw_only=True)
class Config:
    """How much the teacher says, and about what."""

    alpha: float = 0.5
    """Share of the teacher in the loss of an item with a label; 0: the label alone."""
    temperature: float = 2.0
    """Both sides' logits are divided by it."""
    hidden_weight: float = 0.0
    """Weight of the squared difference of hidden states; 0: not computed."""
    attention_weight: float = 0.0
    """Weight of the squared difference of attention scores; 0: not computed."""

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be from 0 to 1, got {self.alpha}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")
        for name in ("hidden_weight", "attention_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")


def layers_followed(teacher: int, student: int) -> tuple[int, ...]:
    """The teacher's hidden state that each of the student's follows; number 0 is the embedding.

    >>> layers_followed(12, 4), layers_followed(4, 2)
    ((0, 3, 6, 9, 12), (0, 2, 4))
    """
    return tuple(round(layer * teacher / student) for layer in range(student + 1))


def hidden_loss(
    student: Sequence[Float[Tensor, "batch time dim"]],
    teacher: Sequence[Float[Tensor, "batch time dim"]],
    mask: Bool[Tensor, "batch time"],
) -> Float[Tensor, ""]:
    """Mean squared difference over layers, real positions and dimensions, in float32."""
    return torch.stack(
        [
            torch.where(mask, (own.float() - other.float()).square().mean(-1), 0.0).sum()
            for own, other in zip(student, teacher, strict=True)
        ]
    ).mean() / mask.sum().clamp(min=1)


def attention_loss(
    student: Sequence[Float[Tensor, "batch heads query read"]],
    teacher: Sequence[Float[Tensor, "batch heads query read"]],
    mask: Bool[Tensor, "batch query"],
) -> Float[Tensor, ""]:
    """Mean squared difference of scores over layers, heads and what real positions may see.

    Scores are -inf where nothing may be seen.
    """
    losses = []
    for own, other in zip(student, teacher, strict=True):
        seen = other.isfinite() & mask[:, None, :, None]
        difference = torch.where(seen, own - other, 0.0)
        losses.append(difference.square().sum() / seen.sum().clamp(min=1))
    return torch.stack(losses).mean()


class Told(NamedTuple):
    """What a task makes of a batch."""

    output: Tensor  # (*item, classes) logits; regression: (item,) standardised
    features: Features
    scores: Mapping[int, Tensor]  # attention scores by layer, where they are asked for


class Items(NamedTuple):
    """Losses of single items, and which of them count."""

    label: Float[Tensor, "*item"]
    soft: Float[Tensor, "*item"]
    known: Bool[Tensor, "*item"]  # there is a label
    counted: Bool[Tensor, "*item"]  # there is something to predict


@final
class Distillation(Task):
    """A student beside its teacher, which stays as it is; `student` is what a user keeps.

    Batches are those of the task; a label of -100, for regression NaN, is not known.

    Args:
        config: shares and weights.
        student: the task that is trained.
        teacher: a trained one of the same task and classes.

    Raises:
        ConfigError: the two do not fit each other.
    """

    kept = ("student",)

    def __init__(self, config: Config, student: Task, teacher: Task):
        super().__init__()
        check_pair(config, student, teacher)
        self.config, self.student = config, student
        self.teacher = teacher.requires_grad_(False).eval()
        self.fields, self.metric = student.fields, student.metric
        vars(self)["encoder"] = student.encoder  # saved and counted once, with its task
        own, other = student.encoder, teacher.encoder
        widths_differ = config.hidden_weight > 0 and own.dim != other.dim
        self.projection = (
            nn.Linear(own.dim, other.dim, bias=False) if widths_differ else nn.Identity()
        )
        self.followed = layers_followed(other.num_layers, own.num_layers)

    def train(self, mode: bool = True) -> Self:
        """As in every task, but the teacher stays without dropout."""
        super().train(mode)
        self.teacher.eval()
        return self

    def loss(self, batch: Batch, generator: torch.Generator) -> Output:
        """Labels and teacher together; `generator` is not used."""
        alpha, attended = self.config.alpha, self.config.attention_weight > 0
        with torch.no_grad():
            layers = [layer - 1 for layer in self.followed[1:]] if attended else []
            said = tell(self.teacher, batch, layers)
        guess = tell(self.student, batch, range(len(layers)))
        items = self._items(batch, guess, said)
        count = items.counted.sum()
        mixed = torch.where(items.known, (1 - alpha) * items.label + alpha * items.soft, items.soft)
        means = [
            torch.where(where, losses, 0.0).sum() / count.clamp(min=1)
            for where, losses in (
                (items.counted, mixed),
                (items.counted & items.known, items.label),
                (items.counted, items.soft),
            )
        ]
        loss = means[0]
        metrics = {"label_loss": means[1], "soft_loss": means[2]}
        for name, (weight, value) in self._layer_losses(guess, said, layers).items():
            loss, metrics[name] = loss + weight * value, value
        return Output(loss, count, metrics)

    def predict(self, batch: Batch) -> Predictions:
        """As the student predicts."""
        return self.student.predict(batch)

    def _items(self, batch: Batch, guess: Told, said: Told) -> Items:
        label = batch["label"]
        if isinstance(self.student, Regression) and isinstance(self.teacher, Regression):
            own, other = self.student.head, self.teacher.head
            taught = (other.mean + other.std * said.output - own.mean) / own.std
            known = ~label.isnan()
            target = torch.where(known, (label - own.mean) / own.std, 0.0)
            losses = [(guess.output - goal).square() for goal in (target, taught)]
            return Items(losses[0], losses[1], known, torch.ones_like(known))
        nats = F.cross_entropy(
            guess.output.flatten(0, -2), label.flatten(), ignore_index=IGNORED, reduction="none"
        )
        soft = soft_loss(guess.output, said.output, self.config.temperature)
        known = label != IGNORED
        tagging = isinstance(self.student, Tagging)
        counted = batch["words"] >= 0 if tagging else torch.ones_like(known)
        return Items(nats.view(label.shape), soft, known, counted)

    def _layer_losses(
        self, guess: Told, said: Told, layers: Sequence[int]
    ) -> dict[str, tuple[float, Tensor]]:
        """Weight and value of each loss of the layers that is asked for."""
        out, mask = {}, guess.features.mask
        if self.config.hidden_weight:
            own = [self.projection(hidden) for hidden in guess.features.hidden]
            others = [said.features.hidden[layer] for layer in self.followed]
            out["hidden_loss"] = self.config.hidden_weight, hidden_loss(own, others, mask)
        if layers:
            own = [guess.scores[layer] for layer in range(len(layers))]
            others = [said.scores[layer] for layer in layers]
            out["attention_loss"] = self.config.attention_weight, attention_loss(own, others, mask)
        return out


def tell(task: Any, batch: Batch, layers: Sequence[int]) -> Told:
    """One pass through a task, with the attention scores of some layers."""
    with attention_scores(task.encoder, layers) as scores:
        features = task.encoder(batch)
    return Told(task.read(features), features, scores)


def check_pair(config: Config, student: Task, teacher: Task) -> None:
    """Refuses a teacher that has nothing to say to this student.

    Raises:
        ConfigError: another task or other classes, or layers that cannot follow each other.
    """
    if not isinstance(student, TASKS) or type(student) is not type(teacher):
        raise ConfigError(
            f"a {_name(student)} student cannot learn from a {_name(teacher)} teacher: both must "
            f"be runs of one task: {', '.join(task.__name__.lower() for task in TASKS)}"
        )
    if getattr(student, "exits", None) is not None:
        raise ConfigError("a student has no early exits: use task.exits.training = 'none'")
    if student.names != teacher.names:  # type: ignore[union-attr]
        raise ConfigError(
            f"the teacher knows {_listed(teacher)}, the student {_listed(student)}: "  # type: ignore[arg-type]
            "they must have the same classes in the same order"
        )
    if not config.hidden_weight and not config.attention_weight:
        return
    own, other = student.encoder, teacher.encoder
    if own.num_layers > other.num_layers:
        raise ConfigError(
            f"{own.num_layers} layers cannot follow {other.num_layers}: a student has at most as "
            "many as its teacher, or hidden_weight = 0 and attention_weight = 0"
        )
    heads = _heads(own)
    if config.attention_weight and (heads != _heads(other) or len(heads) != 1 or 0 in heads):
        raise ConfigError(
            f"attention_weight compares heads one by one: the student has {heads or 'none'}, "
            f"the teacher {_heads(other) or 'none'}; use attention_weight = 0, or as many in every "
            "layer"
        )


def _heads(encoder: Encoder) -> list[int]:
    """The numbers of heads that the layers have."""
    return sorted({part.heads for part in encoder.modules() if isinstance(part, Attention)})


def _name(task: Task) -> str:
    return type(task).__name__.lower()


def _listed(task: Any) -> str:
    shown = ", ".join(task.names[:5])
    return shown + ", ..." * (len(task.names) > 5)
