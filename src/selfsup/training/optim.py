"""The optimizer and the learning-rate schedule."""

import math

import torch
from torch import nn

from selfsup.training.config import Optimizer, Schedule, TrainingConfig
from selfsup.training.optimizers import adafactor
from selfsup.training.optimizers.adamw import AdamW
from selfsup.training.optimizers.groups import parameter_groups
from selfsup.training.optimizers.lamb import Lamb
from selfsup.training.optimizers.lars import Lars

MOMENTS: dict[type[torch.optim.Optimizer], set[str]] = {
    AdamW: {"step", "exp_avg", "exp_avg_sq"},
    adafactor.Adafactor: {"step", "row", "column", "variance"},
    Lamb: {"step", "exp_avg", "exp_avg_sq"},
    Lars: {"momentum_buffer"},
}
"""What an optimizer keeps for a parameter."""


def optimizer(module: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """The optimizer that the configuration names, over the trainable parameters."""
    lr, betas = config.lr, (config.betas[0], config.betas[1])
    groups = parameter_groups(module, config.weight_decay)
    match config.optimizer:
        case "adamw":
            return adamw(
                module, lr=lr, betas=betas, eps=config.eps, weight_decay=config.weight_decay
            )
        case "adafactor":
            return adafactor.Adafactor(groups, lr=lr, relative_step=config.relative_step)
        case "lamb":
            return Lamb(groups, lr=lr, betas=betas, eps=config.eps)
        case "lars":
            return Lars(groups, lr=lr, momentum=betas[0])


def num_moments(shape: torch.Size, name: Optimizer) -> int:
    """How many numbers an optimizer keeps for a parameter of this shape.

    >>> [num_moments(torch.Size([30, 20]), name) for name in ("adamw", "lars", "adafactor")]
    [1200, 600, 50]
    """
    if name == "adafactor":
        return adafactor.num_moments(shape)
    return (1 if name == "lars" else 2) * shape.numel()


def adamw(
    module: nn.Module, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> AdamW:
    """Fused AdamW over the trainable parameters."""
    groups = parameter_groups(module, weight_decay)
    return AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def learning_rate_share(
    progress: float, *, warmup: float, schedule: Schedule, decay: float, final: float
) -> float:
    """The share of the peak learning rate at `progress` (0 to 1) of the budget.

    Args:
        progress: how much of the budget is spent, whether counted in steps, tokens or minutes.
        warmup: share of the budget over which the rate rises linearly from 0.
        schedule: `linear` and `cosine` fall from the end of warm-up to the end; `wsd` (warm-up,
            stable, decay; Hu et al. 2024, arXiv 2404.06395) stays at the peak and falls linearly
            over the last `decay` of the budget; `constant` stays.
        decay: share of the budget in which `wsd` falls.
        final: share of the peak at the end.

    >>> [learning_rate_share(p, warmup=0.5, schedule="linear", decay=0.0, final=0.0)
    ...  for p in (0.25, 0.5, 0.75, 1.0)]
    [0.5, 1.0, 0.5, 0.0]
    """
    if progress < warmup:
        return progress / warmup
    if schedule == "constant":
        return 1.0
    start = 1.0 - decay if schedule == "wsd" else warmup
    through = min(1.0, max(0.0, (progress - start) / max(1e-9, 1.0 - start)))
    falling = 0.5 * (1 + math.cos(math.pi * through)) if schedule == "cosine" else 1 - through
    return final + (1 - final) * falling


def clip_gradient(module: nn.Module, limit: float) -> torch.Tensor:
    """Scales the gradient to an L2 norm of at most `limit`; gives the norm before, float32.

    A limit of 0 only measures.
    """
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if limit > 0:
        torch.nn.utils.clip_grads_with_norm_(
            (p for p in module.parameters() if p.grad is not None), limit, norm
        )
    return norm.float()
