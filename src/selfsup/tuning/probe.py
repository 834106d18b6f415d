"""Linear probe: the encoder is frozen and only the head learns, which shows what it already knows.

Alain and Bengio 2016 (arXiv 1610.01644) call linear classifiers on frozen features probes. The
frozen encoder also computes without dropout: a task's `train` leaves it in eval mode.
"""

from dataclasses import dataclass

from selfsup.objective import Task
from selfsup.tuning.parts import Where


@dataclass(frozen=True, kw_only=True)
class Config:
    """Nothing to choose."""


def probe(task: Task, config: Config, where: Where) -> None:
    """Lets nothing of the encoder move."""
