"""How two things are compared: timed by turns in one run, the best of three turns of each."""

import time
from collections.abc import Callable

import torch
from torch import nn

from selfsup.training.device import autocast
from selfsup.training.optim import clip_gradient

Pair = tuple[float, float, str]
"""Amount per second of ours and of the peer, and the unit of the amount."""


class NotMeasuredError(Exception):
    """The peer is missing on this machine; the message says what to do."""


def best_rates(
    ours: Callable[[], float], peer: Callable[[], float], amount: float
) -> tuple[float, float]:
    """Amount per second of both: best of three turns after one to warm up.

    Args:
        ours: takes one turn and gives its seconds per step.
        peer: the same.
        amount: what one step gets done.
    """
    turns = [(ours(), peer()) for _ in range(4)][1:]
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

    def step() -> None:
        with autocast(torch.device("cpu"), dtype):
            value = loss()
        value.backward()
        clip_gradient(objective, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def num_parameters(*modules: nn.Module) -> int:
    """Trainable numbers of all of them together."""
    return sum(p.numel() for module in modules for p in module.parameters() if p.requires_grad)
