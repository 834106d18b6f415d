"""Full fine-tuning: every parameter of encoder and head is trained."""

from torch import nn

from selfsup.objective import Task


def full(task: Task) -> None:
    """Lets every parameter of the task move."""
    task.requires_grad_(True)


def trained_parameters(module: nn.Module) -> tuple[int, int]:
    """How many numbers are trained, and how many there are; shared weights count once.

    >>> layer = nn.Linear(3, 2)
    >>> _ = layer.bias.requires_grad_(False)
    >>> trained_parameters(layer)
    (6, 8)
    """
    parameters = list(module.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)
