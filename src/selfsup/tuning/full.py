"""Full fine-tuning: every parameter of encoder and head is trained."""

from dataclasses import dataclass

from selfsup.objective import Task
from selfsup.tuning.parts import Where


@dataclass(frozen=True, kw_only=True)
class Config:
    """Nothing to choose."""


def full(task: Task, config: Config, where: Where) -> None:
    """Lets every parameter of the encoder move."""
    task.encoder.requires_grad_(True)
