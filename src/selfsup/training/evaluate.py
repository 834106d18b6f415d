"""Held-out loss and the health of the features."""

from dataclasses import replace

import torch

from selfsup.data.corpora import MixedRows
from selfsup.data.dataset import Dataset
from selfsup.errors import DivergedError
from selfsup.objective import Objective
from selfsup.randomness import Order, torch_generator
from selfsup.training import guard
from selfsup.training.config import TrainingConfig
from selfsup.training.device import to_device


def evaluate(
    objective: Objective, data: Dataset, config: TrainingConfig, device: torch.device
) -> dict[str, float]:
    """Weighted mean of loss and metrics over the first `valid_batches` batches of a fixed order.

    Also `effective_rank` and `spread` of the pooled features of the first batch. The caller chooses
    eval mode, autocast and no_grad.

    Raises:
        DivergedError: the loss is not finite.
    """
    order = Order(len(data), config.seed)
    sums: dict[str, float] = {}
    total = 0.0
    health: dict[str, float] = {}
    for number in range(min(config.valid_batches, -(-len(data) // config.batch_size))):
        first = number * config.batch_size
        if 0 < first == len(data) - 1:
            break  # a single left-over example has nothing to be compared with: it joined the rest
        last = min(first + config.batch_size, len(data))
        last += last == len(data) - 1
        batch = data.batch(order[first:last])
        batch = to_device(batch, device)
        generator = torch_generator(config.seed, "valid", number, device=device)
        output = objective.loss(batch, generator)
        if not output.loss.isfinite():
            raise DivergedError(
                f"the held-out loss is {float(output.loss)}: the weights are of no use any more. "
                "Begin anew, or resume from an earlier checkpoint, with a lower training.lr."
            )
        weight = float(output.weight)
        for name, value in (("loss", output.loss), *output.metrics.items()):
            sums[name] = sums.get(name, 0.0) + float(value) * weight
        total += weight
        if number == 0 and len(batch["index"]) >= 8:
            pooled = objective.encoder.pooled(batch)
            health = {
                "effective_rank": float(guard.effective_rank(pooled)),
                "spread": float(guard.spread(pooled)),
            }
    return {k: v / max(total, 1.0) for k, v in sums.items()} | health


def evaluate_corpora(
    objective: Objective, data: MixedRows, config: TrainingConfig, device: torch.device
) -> dict[str, dict[str, float]]:
    """`evaluate` of each corpus by its name; they divide `valid_batches` among themselves."""
    share = replace(config, valid_batches=max(1, config.valid_batches // len(data.parts)))
    return {name: evaluate(objective, part, share, device) for name, part in data.parts.items()}
