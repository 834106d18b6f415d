"""Re-initialised layers: the last layers forget, for they know the pre-training's task best.

Zhang et al., "Revisiting Few-sample BERT Fine-tuning" (2020, arXiv 2006.05987), section 5: with few
labels, fine-tuning is steadier from new weights in the pooler and in the last one to six layers.
"""

from dataclasses import dataclass

import torch

from selfsup.errors import ConfigError
from selfsup.objective import Task
from selfsup.tuning.depth import depth_of, layered, moving
from selfsup.tuning.parts import Where


@dataclass(frozen=True, kw_only=True)
class Config:
    """How much is forgotten."""

    layers: int = 1
    """How many of the last layers begin anew."""

    def __post_init__(self) -> None:
        if self.layers < 1:
            raise ValueError(f"layers must be at least 1, got {self.layers}")


@torch.no_grad()
def reinit(task: Task, config: Config, where: Where) -> None:
    """Gives the last layers, and what reads them, the weights of a fresh encoder."""
    encoder, found = layered(task.encoder, "reinit"), moving(task, "reinit")
    if config.layers > encoder.num_layers:
        raise ConfigError(
            f"tuning.reinit.layers = {config.layers}, and the encoder has {encoder.num_layers}"
        )
    lowest = encoder.num_layers - config.layers + 1
    fresh = type(encoder)(encoder.config, encoder.spec)  # type: ignore[call-arg]
    for name, parameter in fresh.named_parameters():
        if depth_of(name, encoder.num_layers) >= lowest and name in found:
            found[name][1].copy_(parameter)
