"""Mixout: while training, weights drop back by chance to what they were before fine-tuning.

Lee et al., "Mixout: Effective Regularization to Finetune Large-scale Pretrained Language Models"
(2019, arXiv 1909.11299): in every step each weight w is with probability p its pre-trained value u,
and the whole is scaled so that its mean stays w:

    (p-masked u + the others w - p u) / (1 - p)  =  u + dropout(w - u)

so it holds w near u, as dropout holds it near 0. The paper finds 0.7, 0.8 and 0.9 best, and has 0.7
in its main results. It acts on the matrices of the encoder's linear layers, not on biases, norms,
tables or the head.

Deviation: the encoder's dropout stays as it is; the authors put mixout in its place.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from selfsup.errors import ConfigError
from selfsup.models.dropout import dropout
from selfsup.objective import Task
from selfsup.tuning.parts import Where, innermost


@dataclass(frozen=True, kw_only=True)
class Config:
    """How often a weight drops back."""

    p: float = 0.7
    """Probability; 0: never, 1: always, so that nothing is learned."""

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise ValueError(f"p must lie from 0 to 1, got {self.p}")


def mixed(
    weight: Float[Tensor, "out in"], before: Float[Tensor, "out in"], p: float
) -> Float[Tensor, "out in"]:
    """Weights of one step: each is `before` with probability `p`; their mean is `weight`."""
    return before + dropout(weight - before, p)


class Mixed:
    """Stands for the `forward` of a linear layer; `layer.before` are its weights as they were."""

    def __init__(self, layer: nn.Linear, p: float):
        self.layer, self.p = layer, p
        layer.register_buffer("before", layer.weight.detach().clone(), persistent=False)

    def __call__(self, x: Tensor) -> Tensor:
        """With mixed weights while training, else as the layer does."""
        layer, weight = self.layer, self.layer.weight
        if layer.training:
            weight = mixed(weight, layer.before, self.p)  # type: ignore[arg-type]
        return F.linear(x, weight, layer.bias)


def mixout(task: Task, config: Config, where: Where) -> None:
    """Mixes the matrices of the encoder's linear layers that are trained."""
    layers = [
        module
        for name, module in innermost(task.encoder).named_modules()
        if isinstance(module, nn.Linear)
        and module.weight.requires_grad
        and not name.startswith("additions.")
    ]
    if not layers:
        raise ConfigError(
            "mixout acts on matrices that another tuning lets move, and stands after it: "
            "full+mixout"
        )
    for layer in layers:
        vars(layer)["forward"] = Mixed(layer, config.p)
