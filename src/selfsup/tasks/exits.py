"""Early exit: a head behind every layer, and an example goes no further than it needs to.

Most examples are easy and are decided after a few layers. The exits are trained in one of three
ways. `joint` trains all heads and the encoder at once, each loss weighted by the number of its
layer (PABEE, Zhou et al., 2020, arXiv 2006.04152). `two_stage` trains the full model first, then
freezes it and trains the exits (DeeBERT, Xin et al., 2020, arXiv 2004.12993, section 3.1).
`distilled` does the same, and the exits learn what the last head says instead of the labels
(FastBERT, Liu et al., 2020, arXiv 2004.02178, equations 5 and 6).

An example leaves when an exit is sure enough: when the entropy of its answer is below a threshold
(DeeBERT), when that entropy as a share of its maximum is (FastBERT's `speed`, equation 7), or below
the threshold that each exit was given on validation data (`calibrated`); or when so many exits one
after another have repeated the answer before theirs (PABEE's `patience`). Those that leave are
taken out of the batch, so a batch gives the answers that its examples give alone.

Axes: batch; time; dim; layer: counted from 1; exit: layers 1 to the last but one; out: classes, or
1 for a regression.

Deviations: the exits are linear layers on the normalised vector of the whole example, where DeeBERT
and PABEE have BERT's pooler below and FastBERT a small attention layer. The two stages share one
schedule of the learning rate and have half of the steps each.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from selfsup.batch import Batch
from selfsup.errors import ConfigError
from selfsup.models.dropout import Dropout
from selfsup.models.encoder import Encoder, Features, masked_mean
from selfsup.models.transformer import TransformerEncoder, initialise
from selfsup.models.view import repacked
from selfsup.objective import Task

Head = Callable[[Tensor], Tensor]
"""What makes answers (batch, out) of vectors (batch, dim)."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """How exits are trained, and what lets an example leave; `evaluate` may change the latter."""

    training: Literal["none", "joint", "two_stage", "distilled"] = "none"
    """`none`: there are no exits."""
    rule: Literal["calibrated", "entropy", "speed", "patience"] = "calibrated"
    """What lets an example leave. Without validation data `calibrated` lets none."""
    threshold: float = 0.0
    """Of `entropy` in nats, of `speed` a share; for the `patience` of a regression how close two
    answers must be, in standard deviations of the labels. 0: none leaves early."""
    patience: int = 0
    """How many times in a row an answer must be repeated. 0: none leaves early."""
    tolerance: float = 0.05
    """By what share calibrated exits may add to the errors that the full model makes."""

    def __post_init__(self) -> None:
        for name in ("threshold", "patience", "tolerance"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"exits.{name} must not be negative, got {getattr(self, name)}")
        if self.rule == "speed" and self.threshold > 1:
            raise ValueError(
                f"exits.threshold is a share of the highest entropy for rule = 'speed': at most 1, "
                f"got {self.threshold}"
            )


def joint_loss(losses: Sequence[Float[Tensor, ""]]) -> Float[Tensor, ""]:
    """The mean over layers, weighted by their numbers: sum of j * loss_j over sum of j."""
    weights = torch.arange(1, len(losses) + 1, device=losses[0].device)
    return (weights * torch.stack(list(losses))).sum() / weights.sum()


def distillation_loss(
    student: Float[Tensor, "batch classes"], teacher: Float[Tensor, "batch classes"]
) -> Float[Tensor, ""]:
    """KL(student || teacher) of two answers before the softmax, a mean over the batch, in nats."""
    own, other = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    return F.kl_div(other, own, reduction="batchmean", log_target=True)


def entropy(logits: Float[Tensor, "batch classes"]) -> Float[Tensor, " batch"]:
    """The entropy of the answer, in nats."""
    return torch.special.entr(logits.softmax(-1)).sum(-1)


@final
class Exits(nn.Module):
    """The heads of all layers but the last, and the way through the layers with them.

    The last head is the task's own and is given at each call.

    Args:
        config: training and rule.
        encoder: behind whose layers they stand.
        outputs: numbers in an answer: classes, or 1 for a regression.
        pooling: how an example becomes one vector: encoder, mean or cls.
        dropout: before every head.

    Attributes:
        heads: normalisation, dropout and a linear layer for each layer but the last.
        thresholds: (exit,), the entropy as a share of its maximum below which `calibrated` lets an
            example go; 0 until they are chosen.
        frozen: whether the first of two stages is over.

    Raises:
        ConfigError: the encoder is no transformer, or has one layer only.
    """

    thresholds: Tensor
    frozen: Tensor

    def __init__(
        self, config: Config, encoder: Encoder, outputs: int, pooling: str, dropout: float
    ):
        super().__init__()
        if not isinstance(encoder, TransformerEncoder) or encoder.num_layers < 2:
            raise ConfigError(
                "task.exits stand between the layers of a transformer: they need model.name = "
                "'transformer' with at least 2 layers"
            )
        self.config, self.outputs, self.pooling = config, outputs, pooling
        self.dropout = Dropout(dropout)
        self.heads = nn.ModuleList(
            nn.Sequential(
                encoder.config.build_norm(encoder.dim),
                self.dropout,
                nn.Linear(encoder.dim, outputs),
            )
            for _ in range(encoder.num_layers - 1)
        )
        initialise(self.heads, 0.02)
        self.register_buffer("thresholds", torch.zeros(len(self.heads)))
        self.register_buffer("frozen", torch.tensor(False))

    # Training

    def loss(self, task: Task, batch: Batch, last: Head, each: Head) -> tuple[Tensor, Tensor]:
        """The loss of one batch, and the answers of the last head (batch, out).

        Out of training it is the joint loss whatever the stage, so that its values compare.

        Args:
            task: whose encoder reads the batch.
            batch: one batch.
            last: the task's head.
            each: the task's loss of one head's answers.
        """
        frozen = self.training and bool(self.frozen)
        if frozen:
            task.eval()  # what is frozen computes without dropout
            self.train()
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            features = task.encoder(batch)
        answers = self.every(task.encoder, features, last)
        *early, full = answers
        if self.config.training == "joint" or not self.training:
            return joint_loss([each(answer) for answer in answers]), full
        if not frozen:
            return each(full), full
        full = full.detach()
        if self.config.training == "distilled":
            losses = [distillation_loss(answer, full) for answer in early]
        else:
            losses = [each(answer) for answer in early]
        return torch.stack(losses).sum(), full

    def after_step(self, step: int, total: int) -> None:
        """Freezes the full model after half of the steps where training has two stages."""
        if self.config.training != "joint" and 2 * (step + 1) >= total:
            self.frozen.fill_(True)

    def every(
        self, encoder: Encoder, features: Features, last: Head
    ) -> list[Float[Tensor, "batch out"]]:
        """The answers of all heads in the order of the layers, in float32."""
        inner = self._layers_of(encoder)
        *vectors, full = [self._vector(inner, x, features.mask) for x in features.hidden[1:]]
        answers = [head(vector) for head, vector in zip(self.heads, vectors, strict=True)]
        answers.append(last(full if self.frozen else self.dropout(full)))
        return [answer.float() for answer in answers]

    # Leaving

    def leave(
        self, encoder: Encoder, batch: Batch, last: Head
    ) -> tuple[Float[Tensor, "batch out"], Int[Tensor, " batch"]]:
        """Answers in float32, and the layer behind which each was given.

        Call it in eval mode. Where no example can leave early, the encoder runs as without exits.
        """
        inner, limits = self._layers_of(encoder), self._limits()
        if self._never(limits):
            if self.pooling == "encoder":
                vector = encoder.pooled(batch)
            else:
                features = encoder(batch)
                vector = self._vector(inner, features.last, features.mask)
            answers = last(vector).float()
            return answers, _layers(answers, inner.num_layers)
        x, view, mask = inner.begin(batch)
        answers = x.new_empty((len(x), self.outputs), dtype=torch.float32)
        layers = _layers(answers, inner.num_layers)
        rows = torch.arange(len(x), device=x.device)  # of those that are still here
        skip = view.num_prompt
        patient = self.config.rule == "patience"
        before, streak = answers, torch.zeros_like(rows)
        for exit_, head in enumerate(self.heads):
            x, _ = inner.step(x, view, exit_)
            if not patient and limits[exit_] <= 0:
                continue
            known = None if view.real is None else mask[:, skip:]
            answer = head(self._vector(inner, x[:, skip:], known)).float()
            if patient:
                if exit_:
                    streak = (streak + 1) * self._repeats(answer, before)
                leaving = streak >= self.config.patience
                before = answer
            else:
                leaving = entropy(answer) < limits[exit_]
            count = int(leaving.sum())
            if not count:
                continue
            answers[rows[leaving]], layers[rows[leaving]] = answer[leaving], exit_ + 1
            if count == len(rows):
                return answers, layers
            stay = (~leaving).nonzero().squeeze(1)
            x, view, mask = repacked(x, view, mask, stay)
            rows, before, streak = rows[stay], before[stay], streak[stay]
        x = inner.end(inner.step(x, view, len(self.heads))[0])
        answers[rows] = last(self._vector(inner, x[:, skip:], mask[:, skip:])).float()
        return answers, layers

    def _repeats(self, answer: Tensor, before: Tensor) -> Tensor:
        if self.outputs == 1:
            return ((answer - before).abs() < self.config.threshold).squeeze(1)
        return answer.argmax(1) == before.argmax(1)

    def _limits(self) -> list[float]:
        """The entropy (nats) below which each exit lets an example go; for patience 0."""
        highest = math.log(self.outputs)
        if self.config.rule == "calibrated":
            return [share * highest for share in self.thresholds.tolist()]
        factor = {"entropy": 1.0, "speed": highest}.get(self.config.rule, 0.0)
        return [self.config.threshold * factor] * len(self.heads)

    def _never(self, limits: list[float]) -> bool:
        if self.config.rule != "patience":
            return max(limits) <= 0
        blind = self.outputs == 1 and self.config.threshold == 0
        return blind or not 0 < self.config.patience < len(self.heads)

    def _vector(self, encoder: TransformerEncoder, x: Tensor, mask: Tensor | None) -> Tensor:
        """(batch, dim) of (batch, time, dim); without a mask all positions are real."""
        if self.pooling == "cls":
            return x[:, 0]
        if self.pooling == "encoder":
            return encoder.pool(
                x, x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
            )
        return x.float().mean(1) if mask is None else masked_mean(x, mask)

    def _layers_of(self, encoder: Encoder) -> TransformerEncoder:
        """The encoder, which a tuning may have put another one around."""
        if not isinstance(encoder, TransformerEncoder):
            raise ConfigError(
                "task.exits read a transformer layer by layer, and this tuning puts another "
                "encoder around it: use another tuning, such as full"
            )
        return encoder


def _layers(answers: Tensor, number: int) -> Int[Tensor, " batch"]:
    return torch.full((len(answers),), number, device=answers.device)
