"""How two things are compared: timed by turns in one run, the best of five turns of each."""

import time
from collections.abc import Callable

import torch
from torch import nn

from selfsup.training.device import autocast
from selfsup.training.optim import adamw, clip_gradient

Pair = tuple[float, float, str]
"""What ours and the peer reach, and its unit: amounts per second where nothing else is said."""

LONGEST_STEP = 60.0  # seconds; a machine on which one takes longer is no place to measure it


class NotMeasuredError(Exception):
    """Something is missing on this machine, the message says what; or it is far too slow."""


def best_rates(
    ours: Callable[[], float], peer: Callable[[], float], amount: float
) -> tuple[float, float]:
    """Amount per second of both: best of five turns after one to warm up.

    Args:
        ours: takes one turn and gives its seconds per step.
        peer: the same.
        amount: what one step gets done.

    Raises:
        NotMeasuredError: a step takes more than `LONGEST_STEP` while warming up.
    """
    warming = ours(), peer()
    if max(warming) > LONGEST_STEP:
        raise NotMeasuredError(
            f"a step takes {warming[0]:.0f} s here, the peer's {warming[1]:.0f} s"
        )
    turns = [(ours(), peer()) for _ in range(5)]
    return amount / min(turn[0] for turn in turns), amount / min(turn[1] for turn in turns)


def turn(step: Callable[[], object], times: int = 3) -> Callable[[], float]:
    """The turn that takes a step so many times."""

    def take() -> float:
        started = time.perf_counter()
        for _ in range(times):
            step()
        return (time.perf_counter() - started) / times

    return take


def stepper(
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[], torch.Tensor],
    dtype: torch.dtype,
) -> Callable[[], None]:
    """One optimizer step as a function."""
    device = next(objective.parameters()).device

    def step() -> None:
        with autocast(device, dtype):
            value = loss()
        value.backward()
        clip_gradient(objective, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def peer_adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Fused AdamW, which transformers' Trainer takes by default."""
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def own_adamw(objective: nn.Module) -> torch.optim.Optimizer:
    """Ours with the defaults of `training`."""
    return adamw(objective, lr=1e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01)


def unit(amount: str, dtype: torch.dtype) -> str:
    """Such as `tokens/s, bfloat16`."""
    return f"{amount}/s, {str(dtype).removeprefix('torch.')}"


def num_parameters(*modules: nn.Module) -> int:
    """Trainable numbers of all of them together."""
    return sum(p.numel() for module in modules for p in module.parameters() if p.requires_grad)
