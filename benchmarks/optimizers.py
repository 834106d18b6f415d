"""A step of each optimizer against torch's AdamW that goes over lists of tensors (`foreach`).

The weights are those of a transformer of 4 layers x 256 with a vocabulary of 30,000; gradients are
drawn once, and both sides change weights of their own. `adafactor_torch` is against torch's own
Adafactor.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from benchmarks.timing import Pair, best_rates, num_parameters, turn
from selfsup.batch import Vocabulary
from selfsup.models.transformer import Config, TransformerEncoder
from selfsup.training.config import Optimizer, TrainingConfig
from selfsup.training.device import keep_freed_memory
from selfsup.training.optim import optimizer


def weights(seed: int = 0) -> nn.Module:
    """An encoder whose weights all have a gradient."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = TransformerEncoder(Config(dim=256, layers=4, heads=4), Vocabulary(size=30_000))
        for parameter in encoder.parameters():
            parameter.grad = 1e-3 * torch.randn_like(parameter)
    return encoder


def step(name: Optimizer, peer: Callable[..., torch.optim.Optimizer]) -> Pair:
    """Millions of weights that one step of each moves in a second."""
    keep_freed_memory()
    ours, theirs = weights(), weights()
    own = optimizer(ours, TrainingConfig(steps=1, optimizer=name))
    other = peer(theirs.parameters(), lr=1e-3)
    amount = num_parameters(ours) / 1e6
    return *best_rates(turn(own.step), turn(other.step), amount), "million weights/s, float32"


LISTS = partial(torch.optim.AdamW, foreach=True, fused=False)
BENCHMARKS: dict[str, Callable[[], Pair]] = {
    "adamw_step": partial(step, "adamw", LISTS),
    "adafactor_step": partial(step, "adafactor", LISTS),
    "lamb_step": partial(step, "lamb", LISTS),
    "lars_step": partial(step, "lars", LISTS),
    "adafactor_torch": partial(step, "adafactor", torch.optim.Adafactor),
}
