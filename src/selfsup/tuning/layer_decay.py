"""Layer decay: lower layers, which hold what is common to tasks, learn at smaller rates.

Howard and Ruder, "Universal Language Model Fine-tuning for Text Classification" (2018, arXiv
1801.06146), section 3.2, "discriminative fine-tuning": the rate of each layer is that of the layer
above it times a factor. ELECTRA (Clark et al. 2020, arXiv 2003.10555) is fine-tuned so, with 0.8
and its Large model with 0.9.

The head learns at the rate of the training, the last layer at `factor` times that, the embedding
below n layers at `factor` to the power n + 1. In ELECTRA's code all of these but the head have one
power more.
"""

from dataclasses import dataclass

from selfsup.objective import Task
from selfsup.tuning.depth import moving
from selfsup.tuning.parts import Where, innermost


@dataclass(frozen=True, kw_only=True)
class Config:
    """How fast the rates fall."""

    factor: float = 0.8
    """Rate of a layer over that of the one above it; ULMFiT: 1 / 2.6."""

    def __post_init__(self) -> None:
        if not 0 < self.factor <= 1:
            raise ValueError(f"factor must lie in (0, 1], got {self.factor}")


def layer_decay(task: Task, config: Config, where: Where) -> None:
    """Scales the learning rate of all that is trained of the encoder by its depth."""
    top = innermost(task.encoder).num_layers + 1
    for depth, parameter in moving(task, "layer_decay").values():
        parameter.lr_scale = config.factor ** (top - depth)  # type: ignore[attr-defined]
