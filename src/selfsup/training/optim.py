"""The optimizer and the learning-rate schedule."""

import math

import torch
from torch import nn

from selfsup.training.config import Schedule


def adamw(
    module: nn.Module, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> torch.optim.AdamW:
    """Fused AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) over the trainable parameters.

    Biases, norms and other vectors are not decayed, as in BERT and GPT-2. A parameter that has the
    attribute `lr_scale` learns at that many times the rate; each such group says it too.
    """
    by_scale: dict[float, list[nn.Parameter]] = {}
    for parameter in module.parameters():
        if parameter.requires_grad:
            by_scale.setdefault(getattr(parameter, "lr_scale", 1.0), []).append(parameter)
    groups = [
        {"params": part, "weight_decay": decay, "lr_scale": scale}
        for scale, trained in by_scale.items()
        for part, decay in (
            ([p for p in trained if p.ndim >= 2], weight_decay),
            ([p for p in trained if p.ndim < 2], 0.0),
        )
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


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
