"""Gradual unfreezing: the encoder's layers begin to learn one after the other, the last one first.

Howard and Ruder, "Universal Language Model Fine-tuning for Text Classification" (2018, arXiv
1801.06146), section 3.3: so the upper layers do not wash out, through a head that knows nothing
yet, what the lower ones hold. Frozen layers cost no backward pass.

Deviation: layers open at even distances over the first `share` of the training, not one an epoch;
and head and last layer begin together, where the paper's last layer is the head.
"""

from dataclasses import dataclass
from typing import final

import torch
from torch import nn

from selfsup.batch import Batch
from selfsup.objective import Output, Task
from selfsup.tuning.depth import moving
from selfsup.tuning.parts import Where
from selfsup.tuning.routine import Loss, Routine, attach


@dataclass(frozen=True, kw_only=True)
class Config:
    """When all of the encoder moves."""

    share: float = 0.5
    """Share of the training after which every layer is open; 0: all from the beginning."""

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise ValueError(f"share must lie in [0, 1), got {self.share}")


def num_open(step: int, total: int, groups: int, share: float) -> int:
    """How many groups, counted from the top, learn in a step.

    Args:
        step: from 0.
        total: steps of the training.
        groups: of weights: the layers and the embedding.
        share: of the training after which all are open.

    >>> [num_open(step, 60, 4, 0.5) for step in (0, 9, 10, 20, 29, 30, 59)]
    [1, 1, 2, 3, 3, 4, 4]
    """
    begun = step / (share * total) if share > 0 else 1.0
    return min(groups, 1 + int(begun * (groups - 1) + 1e-9))


@final
class Unfreezing(Routine):
    """Groups of weights that open one after the other.

    Args:
        groups: the weights by depth, the uppermost first.
        share: as in `num_open`.

    Attributes:
        opened: () int64, how many groups are open; a checkpoint keeps it.
    """

    opened: torch.Tensor

    def __init__(self, groups: list[list[nn.Parameter]], share: float):
        super().__init__()
        self.groups, self.share = groups, share
        self.register_buffer("opened", torch.tensor(num_open(0, 1, len(groups), share)))

    def loss(self, inner: Loss, batch: Batch, generator: torch.Generator) -> Output:
        """The task's own, with what is not open yet frozen.

        Here and not sooner: the optimizer must have seen every weight as one that is trained.
        """
        if self.training:
            for place, group in enumerate(self.groups):
                for parameter in group:
                    parameter.requires_grad_(place < int(self.opened))
        return inner(batch, generator)

    def after_step(self, step: int, total: int) -> None:
        """Opens what the next step trains."""
        self.opened.fill_(num_open(step + 1, total, len(self.groups), self.share))


def unfreezing(task: Task, config: Config, where: Where) -> None:
    """Lets what is trained of the encoder open from the top down."""
    by_depth: dict[int, list[nn.Parameter]] = {}
    for depth, parameter in moving(task, "unfreezing").values():
        by_depth.setdefault(depth, []).append(parameter)
    groups = [by_depth[depth] for depth in sorted(by_depth, reverse=True)]
    attach(task, "unfreezing", Unfreezing(groups, config.share))
