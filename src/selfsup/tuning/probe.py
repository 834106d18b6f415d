"""Linear probe: the encoder is frozen and only the head learns, which shows what it already knows.

Alain and Bengio 2016 (arXiv 1610.01644) call linear classifiers on frozen features probes. The
frozen encoder also computes without dropout: a task's `train` leaves it in eval mode.
"""

from selfsup.objective import Task


def probe(task: Task) -> None:
    """Freezes the encoder; everything else of the task is trained."""
    task.requires_grad_(True)
    task.encoder.requires_grad_(False)
    task.train(task.training)  # takes the encoder out of training mode now
