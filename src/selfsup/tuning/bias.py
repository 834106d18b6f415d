"""BitFit: only the biases move, of every linear layer and layer normalisation of the encoder.

Ben Zaken, Goldberg and Ravfogel, "BitFit: Simple Parameter-efficient Fine-tuning for
Transformer-based Masked Language-models" (2021, arXiv 2106.10199). What is learned is kept as an
offset to each bias, from zero, so that several tasks can share one encoder; merging adds it to the
bias. Layers without a bias are left alone. The authors' code learns at 1e-3, far above the rates of
full fine-tuning.

Axes: width: of a layer's output.
"""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from selfsup.errors import ConfigError
from selfsup.objective import Task
from selfsup.tuning.parts import Part, Where, add, innermost


@dataclass(frozen=True, kw_only=True)
class Config:
    """Nothing to choose."""


@final
class Offset(Part):
    """What is added to a bias.

    Args:
        bias: (width,), of a layer.

    >>> y = torch.randn(2, 3)
    >>> torch.equal(Offset(torch.zeros(3))(y, y), y)
    True
    """

    def __init__(self, bias: Tensor):
        super().__init__()
        self.offset = nn.Parameter(torch.zeros_like(bias))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Adds it."""
        return y + self.offset.to(y.dtype)

    @torch.no_grad()
    def merge(self, module: nn.Module, sign: int = 1) -> None:
        """Adds it to the layer's bias."""
        assert isinstance(module, nn.Linear | nn.LayerNorm)
        module.bias.add_(self.offset, alpha=sign)


def bias(task: Task, config: Config, where: Where) -> None:
    """Adds an offset to every linear layer and layer normalisation that has a bias.

    Raises:
        ConfigError: none has.
    """
    encoder = innermost(task.encoder)
    layers = {
        name: module
        for name, module in encoder.named_modules()
        if isinstance(module, nn.Linear | nn.LayerNorm) and not name.startswith("additions.")
    }
    layers = {name: layer for name, layer in layers.items() if layer.bias is not None}
    if not layers:
        raise ConfigError(
            "no linear layer or norm of this encoder has a bias (model.bias = false): tune it with "
            "lora or ia3"
        )
    for name, layer in layers.items():
        add(encoder, where.name, "bias", name, Offset(layer.bias))
