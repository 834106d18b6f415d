"""The shape of a transformer: every key of a [model] section, and which of them go together."""

import math
from dataclasses import dataclass
from typing import Literal

from torch import nn

GATED = ("swiglu", "geglu")
"""Activations of which one half of the inner vector gates the other."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """The shape of a transformer; each key is explained beside it."""

    dim: int = 256  # width of the hidden states
    layers: int = 4
    heads: int = 4
    head_width: int = 0  # width of one attention head; 0: dim / heads
    # inner width of the feed-forward layer; 0: 4 * dim, but for swiglu and geglu, which have three
    # matrices, 8/3 * dim rounded up to a multiple of 64
    feedforward_dim: int = 0
    norm: Literal["pre", "post"] = "pre"  # before each half of a block, or after its residual sum
    norm_kind: Literal["layer", "rms"] = "layer"
    norm_eps: float = 1e-5  # added to the variance
    positions: Literal["learned", "sinusoidal", "rotary", "relative", "none"] = "rotary"
    rotary_base: float = (
        10000.0  # the slowest pair turns in 2 pi * base tokens; 100 suits rows of 64
    )
    relative_buckets: int = 32  # of distances, for relative positions
    relative_reach: int = 128  # tokens; all that is farther away shares a bucket
    activation: Literal["gelu", "gelu_tanh", "relu", "swiglu", "geglu"] = "gelu"
    causal: bool = False  # a token sees only itself and those before it
    share_layers: bool = False  # one set of weights, used `layers` times (ALBERT)
    experts: int = 0  # feed-forward layers to choose from in every `expert_every`-th block; 0: none
    expert_every: int = 2  # the blocks of numbers expert_every - 1, 2 * expert_every - 1, ...
    # in training an expert takes at most capacity * tokens / experts; the others pass it by
    expert_capacity: float = 1.25
    balance_weight: float = 0.01  # of the loss that spreads tokens over experts
    embedding_dim: int = 0  # width of the token table; 0: dim
    segment_types: int = 0  # 0: the batch's segments are ignored
    # pixels of a patch's side, frames or time steps per position; not for tokens and waveforms
    patch: int = 4
    # for waveforms alone: wav2vec 2.0's convolutions, one vector of every 320 samples
    conv_channels: int = 512
    conv_kernels: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    conv_strides: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    # over time behind the first convolution (base), or over channels behind each (large)
    conv_norm: Literal["group", "layer"] = "group"
    conv_positions: int = 0  # kernel of a convolution that tells positions (128); 0: none
    max_length: int = 512  # number of learned positions; the other kinds have no limit
    # what pruning has left: heads and inner width of each layer (shared layers: one); (): all
    heads_left: tuple[int, ...] = ()
    feedforward_left: tuple[int, ...] = ()
    dropout: float = 0.1  # on the embedding and on both halves of a block
    attention_dropout: float | None = None  # on the attention weights; None: the same as `dropout`
    bias: bool = True  # in the blocks' linear layers and in every layer normalisation
    embedding_norm: bool = False  # normalise the embedding (BERT)
    final_norm: bool | None = None  # normalise the last layer; None: yes for pre-norm, else no
    init_std: float = 0.02  # of every initial weight matrix and table
    # standard deviation of token vectors as they enter the stack, by a factor on the whole table;
    # 0: no factor. 1.0 with init_std = 1 / sqrt(dim) gets small masked language models off their
    # plateau.
    embedding_std: float = 0.0
    # `Features.pooled`: the mean of the real positions, the first or the last of them, or the first
    # through BERT's dense layer and tanh
    pooling: Literal["mean", "cls", "last", "bert"] = "mean"

    def __post_init__(self):
        above_zero = ("dim", "layers", "heads", "patch", "max_length", "norm_eps", "init_std")
        of_experts = ("expert_every", "expert_capacity")
        for name in (*above_zero, "conv_channels", "relative_reach", *of_experts):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        not_negative = ("feedforward_dim", "embedding_dim", "segment_types", "embedding_std")
        for name in (*not_negative, "conv_positions", "head_width", "experts", "balance_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("dropout", "attention_dropout"):
            if not 0 <= (getattr(self, name) or 0.0) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        kernels, strides = self.conv_kernels, self.conv_strides
        blocks = 1 if self.share_layers else self.layers
        width = self.feedforward_width
        rules = {
            f"conv_kernels and conv_strides must be as many positive numbers, got {kernels} and "
            f"{strides}": (
                len(kernels) != len(strides) or not kernels or min(*kernels, *strides) < 1
            ),
            f"dim = {self.dim} is not a multiple of heads = {self.heads}; give head_width": (
                not self.head_width and self.dim % self.heads
            ),
            f"relative_buckets must be at least 4 and below relative_reach, got "
            f"{self.relative_buckets} and {self.relative_reach}": (
                not 4 <= self.relative_buckets < self.relative_reach
            ),
            "experts must be at least 2, or 0 for none, got 1": self.experts == 1,
            "experts are plain feed-forward layers, and layers with experts cannot be shared: use "
            "activation = 'relu' or 'gelu' and share_layers = false": (
                self.experts > 0 and (self.activation in GATED or self.share_layers)
            ),
            f"rotary positions turn pairs: a head's width must be even, got {self.head_dim}": (
                self.positions == "rotary" and self.head_dim % 2
            ),
            f"rotary_base must be above 1, got {self.rotary_base}": self.rotary_base <= 1,
            f"sinusoidal positions need an even embedding width, got {self.embedding_width}": (
                self.positions == "sinusoidal" and self.embedding_width % 2
            ),
            f"heads_left needs a number from 0 to heads = {self.heads} for each of {blocks} "
            f"layers, got {self.heads_left}": not _fits(self.heads_left, blocks, self.heads),
            f"feedforward_left needs a width from 0 to {width} for each of {blocks} layers, and "
            f"experts = 0, got {self.feedforward_left}": (
                bool(self.feedforward_left)
                and (self.experts > 0 or not _fits(self.feedforward_left, blocks, width))
            ),
            f"pooling = {self.pooling!r} reads the first token, which in a causal model sees "
            f"nothing else; use 'mean' or 'last'": (
                self.causal and self.pooling in ("cls", "bert")
            ),
        }
        for message, broken in rules.items():
            if broken:
                raise ValueError(message)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.head_width or self.dim // self.heads

    @property
    def embedding_width(self) -> int:
        """Width of the token table."""
        return self.embedding_dim or self.dim

    @property
    def feedforward_width(self) -> int:
        """Inner width of the feed-forward layer."""
        if self.activation in GATED:
            return self.feedforward_dim or 64 * math.ceil(8 * self.dim / 3 / 64)
        return self.feedforward_dim or 4 * self.dim

    def left(self, layer: int) -> tuple[int, int]:
        """How many heads, and what inner width, one layer has."""
        heads = self.heads_left[layer] if self.heads_left else self.heads
        if not self.feedforward_left:
            return heads, self.feedforward_width
        return heads, self.feedforward_left[layer]

    def build_norm(self, width: int) -> nn.Module:
        """A normalisation over `width` features."""
        if self.norm_kind == "rms":
            return nn.RMSNorm(width, self.norm_eps)
        return nn.LayerNorm(width, self.norm_eps, bias=self.bias)


def _fits(left: tuple[int, ...], blocks: int, most: int) -> bool:
    return not left or (len(left) == blocks and 0 <= min(left) <= max(left) <= most)
