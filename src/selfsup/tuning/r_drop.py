"""R-Drop: two passes through the same dropout give two answers, which are drawn together.

Liang et al., "R-Drop: Regularized Dropout for Neural Networks" (2021, arXiv 2106.14448): every
batch is read twice, and beside both cross entropies stands the Kullback-Leibler divergence of the
two predictions, a mean of both ways.

Axes: item: an example, or for tagging a word; classes.

Deviation: the mean of the two cross entropies is taken, as in the example of the authors' README,
and not their sum, as in the paper and in their training code. So `alpha` weighs twice as much, and
the learning rate keeps its meaning. The default is that of their code for sentences.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from selfsup.batch import Batch
from selfsup.errors import ConfigError
from selfsup.objective import Output, Task
from selfsup.tasks.classification import Classification
from selfsup.tasks.tagging import IGNORED, Tagging
from selfsup.tuning.parts import Where
from selfsup.tuning.routine import Loss, Routine, attach


@dataclass(frozen=True, kw_only=True)
class Config:
    """How strongly the two are drawn together."""

    alpha: float = 1.0
    """Weight of the divergence."""

    def __post_init__(self) -> None:
        if not self.alpha >= 0:
            raise ValueError(f"alpha must not be negative, got {self.alpha}")


def divergence(
    one: Float[Tensor, "*item classes"],
    two: Float[Tensor, "*item classes"],
    counted: Bool[Tensor, "*item"],
) -> Float[Tensor, ""]:
    """Mean over the counted items of half of KL(one || two) + KL(two || one), nats, of logits."""
    p, q = one.float().log_softmax(-1), two.float().log_softmax(-1)
    both = [F.kl_div(a, b, reduction="none", log_target=True).sum(-1) for a, b in ((q, p), (p, q))]
    sums = torch.where(counted, both[0] + both[1], 0.0).sum()
    return sums / 2 / counted.sum().clamp(min=1)


@final
class RDrop(Routine):
    """Reads every batch twice while training."""

    def __init__(self, alpha: float):
        super().__init__()
        self.alpha = alpha
        self.logits: list[Tensor] = []

    def note(self, read: Any, features: Any) -> Tensor:
        """The logits that the task reads, kept for `loss`."""
        logits = read(features)
        if self.training:
            self.logits.append(logits)
        return logits

    def loss(self, inner: Loss, batch: Batch, generator: torch.Generator) -> Output:
        """Mean of the task's losses in two passes, and their divergence."""
        if not self.training:
            return inner(batch, generator)
        self.logits.clear()
        first, second = inner(batch, generator), inner(batch, generator)
        one, two = self.logits
        self.logits.clear()
        apart = divergence(one, two, batch["label"] != IGNORED)
        loss = (first.loss + second.loss) / 2 + self.alpha * apart
        return Output(loss, first.weight, {**first.metrics, "divergence": apart})


def r_drop(task: Task, config: Config, where: Where) -> None:
    """Lets the task read every batch twice."""
    if not isinstance(task, Classification | Tagging) or getattr(task, "exits", None):
        raise ConfigError(
            "r_drop compares probabilities of classes: it is for classification without exits, "
            "and for tagging"
        )
    routine = RDrop(config.alpha)
    vars(task)["read"] = partial(routine.note, task.read)
    attach(task, "r_drop", routine)
