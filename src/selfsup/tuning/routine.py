"""What a tuning does while a task trains: around its loss, and between its steps."""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from selfsup.batch import Batch
from selfsup.objective import Output, Task

Loss = Callable[[Batch, torch.Generator], Output]


class Routine(nn.Module):
    """Acts while training alone. Its buffers go to checkpoints, and not to a saved run."""

    def loss(self, inner: Loss, batch: Batch, generator: torch.Generator) -> Output:
        """The loss, of which `inner` is the task's own."""
        return inner(batch, generator)

    def after_step(self, step: int, total: int) -> None:
        """Called after the optimizer's step, as an objective is."""


def attach(task: Task, name: str, routine: Routine) -> None:
    """From now on the task computes its loss through the routine, and tells it of every step."""
    task.add_module(name, routine)
    # in the instance alone: the class, and so a run that is loaded, knows of no routine
    vars(task)["loss"] = partial(routine.loss, task.loss)
    vars(task)["after_step"] = partial(_each, task.after_step, routine.after_step)


def _each(
    before: Callable[[int, int], None], then: Callable[[int, int], None], step: int, total: int
) -> None:
    before(step, total)
    then(step, total)
