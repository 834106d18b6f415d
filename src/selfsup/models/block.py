"""A block of the transformer: attention, then a feed-forward layer, each on the residual sum.

Vaswani et al., 2017 (arXiv 1706.03762), section 3.1; pre-norm is that of GPT-2 (Radford et al.,
2019), gated feed-forward layers are those of Shazeer, 2020 (arXiv 2002.05202). A decoder's block
has a third part between the two, attention to what an encoder has read.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from selfsup.models.attention import Attention, CrossAttention, linear
from selfsup.models.dropout import Dropout
from selfsup.models.experts import Experts, Routing
from selfsup.models.transformer_config import GATED, Config
from selfsup.models.view import View

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "swiglu": F.silu,  # of the gate
    "geglu": partial(F.gelu, approximate="tanh"),  # of the gate (T5 1.1)
}


class Feedforward(nn.Module):
    """Two linear layers around an activation, which may gate the inner one."""

    def __init__(self, config: Config, inner: int):
        super().__init__()
        self.gated = config.activation in GATED
        self.activation = ACTIVATIONS[config.activation]
        self.up = linear(config.dim, inner * (2 if self.gated else 1), config.bias)
        self.down = linear(inner, config.dim, config.bias)

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Transforms each position by itself."""
        x = self.up(x)
        if self.gated:
            gate, x = x.chunk(2, -1)
            return self.down(self.activation(gate) * x)
        return self.down(self.activation(x))


class Block(nn.Module):
    """Attention, then feed-forward or experts, each with its residual sum and normalisation.

    Args:
        config: the shape.
        layer: number of the block, from 0.
    """

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.pre = config.norm == "pre"
        rate = config.attention_dropout
        self.shape = (
            config.dim,
            config.heads,
            config.head_dim,
            config.dropout if rate is None else rate,
            config.bias,
        )
        heads, inner = config.left(layer)
        self.attention = Attention(config.dim, heads, *self.shape[2:])
        if config.positions == "relative" and heads < config.heads:
            self.attention.register_buffer("kept", torch.arange(heads))
        self.attention_norm = config.build_norm(config.dim)
        self.routed = config.experts > 0 and (layer + 1) % config.expert_every == 0
        self.feedforward: Feedforward | Experts = (
            Experts(
                config.dim,
                config.feedforward_width,
                config.experts,
                ACTIVATIONS[config.activation],
                config.expert_capacity,
            )
            if self.routed
            else Feedforward(config, inner)
        )
        self.feedforward_norm = config.build_norm(config.dim)
        self.dropout = Dropout(config.dropout)

    def forward(
        self, x: Float[Tensor, "batch time dim"], view: View, layer: int
    ) -> tuple[Float[Tensor, "batch kept dim"], Routing | None]:
        """One layer, at the slots that `view` wants, and where its experts' tokens went."""
        x = self.attend(x, view, layer)
        y = self._entering(x, self.feedforward_norm)
        y, routing = self.feedforward(y, view.real) if self.routed else (self.feedforward(y), None)
        return self._added(x, y, self.feedforward_norm), routing

    def attend(self, x: Tensor, view: View, layer: int) -> Tensor:
        """The first half."""
        y = self.attention(self._entering(x, self.attention_norm), view, layer)
        return self._added(view.wanted(x), y, self.attention_norm)

    def _entering(self, x: Tensor, norm: nn.Module) -> Tensor:
        return norm(x) if self.pre else x

    def _added(self, x: Tensor, y: Tensor, norm: nn.Module) -> Tensor:
        x = x + self.dropout(y)
        return x if self.pre else norm(x)


class DecoderBlock(Block):
    """A block that also attends to what an encoder has read, between its two halves."""

    def __init__(self, config: Config, layer: int):
        super().__init__(config, layer)
        self.cross = CrossAttention(*self.shape)
        self.cross_norm = config.build_norm(config.dim)

    def attend(self, x: Tensor, view: View, layer: int) -> Tensor:
        """Self-attention, then attention to the source."""
        x = super().attend(x, view, layer)
        y = self.cross(self._entering(x, self.cross_norm), view, layer)
        return self._added(x, y, self.cross_norm)
