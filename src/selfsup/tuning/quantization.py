"""Int8 weights for inference on a CPU: a quarter of their memory, and faster products.

Dynamic quantization: the weights of the blocks' linear layers are rounded to 8 bits beforehand,
each output with its own scale; what a layer reads is rounded as it comes, and the product is one of
integers. Embeddings, norms, attention scores and heads stay in float32.

The kernel is torch's own with packed weights (`torch.ops.quantized`). It has one scale for a whole
batch, so what is computed for one row depends a little on its neighbours. Torch 2.13 warns that the
tensors it is packed from will be removed; where they are gone the product is `torch._int_mm`, with
a scale for each row: more exact, and faster than float32 in wide layers only.

Axes: outputs, inputs of a linear layer.
"""

import copy
import warnings
from typing import Any

import torch
from jaxtyping import Float, Int8
from torch import Tensor, nn

from selfsup.errors import ConfigError
from selfsup.model import Model
from selfsup.models.block import Block
from selfsup.models.encoder import Encoder
from selfsup.models.experts import Experts

CAN_PACK = hasattr(torch, "quantize_per_channel") and any(
    engine != "none" for engine in torch.backends.quantized.supported_engines
)


class Int8Linear(nn.Module):
    """A linear layer with int8 weights, on a CPU and without gradients.

    Args:
        layer: in float32; it stays as it is.
        packed: multiply with packed weights.

    Attributes:
        weight: (outputs, inputs) int8.
        scale: (outputs,) float32; the weights are `weight * scale`.
        bias: (outputs,) float32, or None.
    """

    weight: Int8[Tensor, "outputs inputs"]
    scale: Float[Tensor, " outputs"]
    bias: Float[Tensor, " outputs"] | None

    def __init__(self, layer: nn.Linear, packed: bool = CAN_PACK):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        weight = layer.weight.detach().float()
        scale = weight.abs().amax(1).clamp(min=1e-8) / 127
        self.register_buffer("weight", (weight / scale.unsqueeze(1)).round().to(torch.int8))
        self.register_buffer("scale", scale)
        bias = None if layer.bias is None else layer.bias.detach().float().clone()
        self.register_buffer("bias", bias)
        self.packed = packed
        self._kernel: Any = None  # the packed form, made of the three when it is first used

    def forward(self, x: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        """The product of integers, scaled back to float32.

        Raises:
            ConfigError: a gradient is asked for.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            raise ConfigError("int8 weights are for inference alone: train the float32 run")
        if not self.packed:
            return self._row_by_row(x)
        if self._kernel is None:
            self._kernel = self._pack()
        return torch.ops.quantized.linear_dynamic(x.float(), self._kernel, True)

    def _row_by_row(self, x: Tensor) -> Tensor:
        rows = x.float().flatten(0, -2)  # (row, inputs)
        step = rows.abs().amax(1, keepdim=True).clamp(min=1e-8) / 127
        whole = torch._int_mm((rows / step).round_().to(torch.int8), self.weight.T)
        out = (whole * self.scale).mul_(step)
        return (out if self.bias is None else out.add_(self.bias)).unflatten(0, x.shape[:-1])

    def _pack(self) -> Any:
        exact = self.weight.float() * self.scale.unsqueeze(1)
        zero = torch.zeros(len(self.scale), dtype=torch.long)
        with warnings.catch_warnings():  # of what the docstring above says
            warnings.simplefilter("ignore", UserWarning)
            tensor = torch.quantize_per_channel(exact, self.scale.double(), zero, 0, torch.qint8)
            return torch.ops.quantized.linear_prepack(tensor, self.bias)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kernel": None}

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self._kernel = None
        super()._load_from_state_dict(*arguments)


def to_int8(encoder: Encoder) -> None:
    """Rounds the weights of all blocks, in place.

    Raises:
        ConfigError: the encoder has no such blocks, or a tuning has added parts to it.
    """
    modules = list(encoder.modules())
    blocks = [part for part in modules if isinstance(part, Block)]
    if not blocks:
        raise ConfigError(
            f"{type(encoder).__name__} has no transformer blocks: only their weights become int8"
        )
    if any(hasattr(part, "additions") for part in modules):
        raise ConfigError("this run's tuning added parts to the encoder: merge them first")
    for block in blocks:
        for part in list(block.modules()):
            for name, layer in list(part.named_children()):
                if type(layer) is nn.Linear and layer.weight.numel() and type(part) is not Experts:
                    setattr(part, name, Int8Linear(layer))


def quantized(model: Model) -> Model:
    """A copy of a model that computes with int8 weights on the CPU; the original stays as it is.

    Raises:
        ConfigError: its encoder has no transformer blocks, or a tuning has added parts to it.
    """
    objective = copy.deepcopy(model.objective).cpu().requires_grad_(False)
    to_int8(objective.encoder)
    return Model(objective, model.preprocessor, model.names, model.values, "cpu")


def stored_bytes(module: nn.Module) -> int:
    """What the parameters and buffers of a module take in memory, and about what in a file."""
    return sum(value.numel() * value.element_size() for value in module.state_dict().values())
