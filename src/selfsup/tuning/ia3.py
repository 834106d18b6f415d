"""(IA)3: learned factors on keys, values and the inner feed-forward activations of every block.

Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context
Learning" (2022, arXiv 2205.05638), section 3.3: "infused adapter by inhibiting and amplifying inner
activations". Each number of a key, of a value and of what the second feed-forward matrix reads is
multiplied by a factor of its own, in self- and cross-attention. Factors begin at 1, so the first
step starts from the pre-trained model; the paper's learning rate is 3e-3. With a gated activation
the factors come behind the gate. Afterwards they can be merged into the weights.

Axes: in, out: of a linear layer; width: of keys, and of values: heads * head_dim.
"""

from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfsup.models.block import DecoderBlock
from selfsup.objective import Task
from selfsup.tuning.parts import Part, Where, add, blocks, innermost


@dataclass(frozen=True, kw_only=True)
class Config:
    """Nothing to choose."""


@final
class OutputFactors(Part):
    """Factors on the last outputs of a linear layer: the keys and values of a fused one.

    Args:
        layer: whose outputs are multiplied.
        count: how many of them, from the end.

    >>> layer = nn.Linear(4, 6)
    >>> x = torch.randn(2, 4)
    >>> torch.equal(OutputFactors(layer, 4)(x, layer(x)), layer(x))
    True
    """

    def __init__(self, layer: nn.Linear, count: int):
        super().__init__()
        self.num_plain = layer.out_features - count
        self.factors = nn.Parameter(layer.weight.new_ones(count))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Multiplies them."""
        return y * F.pad(self.factors, (self.num_plain, 0), value=1.0).to(y.dtype)

    @torch.no_grad()
    def merge(self, module: nn.Module, sign: int = 1) -> None:
        """Multiplies the rows of the weights, and the biases."""
        assert isinstance(module, nn.Linear)
        factors = self.factors**sign
        module.weight[self.num_plain :].mul_(factors.unsqueeze(1))
        if module.bias is not None:
            module.bias[self.num_plain :].mul_(factors)


@final
class InputFactors(Part):
    """Factors on what a linear layer reads.

    Args:
        layer: whose inputs are multiplied.
    """

    on_input = True

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.factors = nn.Parameter(layer.weight.new_ones(layer.in_features))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Multiplies it."""
        return x * self.factors.to(x.dtype)

    @torch.no_grad()
    def merge(self, module: nn.Module, sign: int = 1) -> None:
        """Multiplies the columns of the weights."""
        assert isinstance(module, nn.Linear)
        module.weight.mul_(self.factors**sign)


def ia3(task: Task, config: Config, where: Where) -> None:
    """Adds factors to every block.

    Raises:
        ConfigError: the encoder has no transformer blocks, or experts in them.
    """
    encoder = innermost(task.encoder)
    for name, block in blocks(encoder, "ia3").items():
        qkv, down = block.attention.qkv, block.feedforward.down
        parts: dict[str, Part] = {
            "attention.qkv": OutputFactors(qkv, qkv.out_features // 3 * 2),
            "feedforward.down": InputFactors(down),
        }
        if isinstance(block, DecoderBlock):
            kv = block.cross.kv
            parts["cross.kv"] = OutputFactors(kv, kv.out_features)
        for place, part in parts.items():
            add(encoder, where.name, "ia3", f"{name}.{place}", part)
