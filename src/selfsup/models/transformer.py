"""The transformer: one file for BERT's and GPT-2's published layouts and for small modern ones.

A stack of blocks (Vaswani et al., 2017, arXiv 1706.03762) over a `TokenEmbedding`, bidirectional or
causal. Post-norm with learned positions is BERT (Devlin et al., 2019, arXiv 1810.04805), pre-norm
with learned positions is GPT-2 (Radford et al., 2019), shared layers with a narrow table are ALBERT
(Lan et al., 2020, arXiv 1909.11942). `embeddings.py` has the positions, `presets.toml` the sizes.

Axes: batch; time: tokens of a row; read: those and the ones before them in a cache; heads;
head_dim = dim / heads; half = head_dim / 2. Padding may stand on either side of a row. The last
entry of `Features.hidden` is after `final_norm`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from selfsup.batch import Batch, Vocabulary
from selfsup.errors import ConfigError, DataError
from selfsup.models.embeddings import TokenEmbedding, document_positions, rotary_angles, rotate
from selfsup.models.encoder import Encoder, Features, masked_mean

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "swiglu": F.silu,  # of the gate
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """The shape of a transformer; each key is explained beside it."""

    dim: int = 256  # width of the hidden states
    layers: int = 4
    heads: int = 4
    # inner width of the feed-forward layer; 0: 4 * dim, but for swiglu, which has three matrices,
    # 8/3 * dim rounded up to a multiple of 64
    feedforward_dim: int = 0
    norm: Literal["pre", "post"] = "pre"  # before each half of a block, or after its residual sum
    norm_kind: Literal["layer", "rms"] = "layer"
    norm_eps: float = 1e-5  # added to the variance
    positions: Literal["learned", "sinusoidal", "rotary", "none"] = "rotary"
    rotary_base: float = (
        10000.0  # the slowest pair turns in 2 pi * base tokens; 100 suits rows of 64
    )
    activation: Literal["gelu", "gelu_tanh", "relu", "swiglu"] = "gelu"
    causal: bool = False  # a token sees only itself and those before it
    share_layers: bool = False  # one set of weights, used `layers` times (ALBERT)
    embedding_dim: int = 0  # width of the token table; 0: dim
    segment_types: int = 0  # 0: the batch's segments are ignored
    max_length: int = 512  # number of learned positions; the other kinds have no limit
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
        for name in ("dim", "layers", "heads", "max_length", "norm_eps", "init_std"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("feedforward_dim", "embedding_dim", "segment_types", "embedding_std"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("dropout", "attention_dropout"):
            if not 0 <= (getattr(self, name) or 0.0) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        rules = {
            f"dim = {self.dim} is not a multiple of heads = {self.heads}": self.dim % self.heads,
            f"rotary positions turn pairs: dim / heads must be even, got {self.head_dim}": (
                self.positions == "rotary" and self.head_dim % 2
            ),
            f"rotary_base must be above 1, got {self.rotary_base}": self.rotary_base <= 1,
            f"sinusoidal positions need an even embedding width, got {self.embedding_width}": (
                self.positions == "sinusoidal" and self.embedding_width % 2
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
        return self.dim // self.heads

    @property
    def embedding_width(self) -> int:
        """Width of the token table."""
        return self.embedding_dim or self.dim

    @property
    def feedforward_width(self) -> int:
        """Inner width of the feed-forward layer."""
        if self.activation == "swiglu":
            return self.feedforward_dim or 64 * math.ceil(8 * self.dim / 3 / 64)
        return self.feedforward_dim or 4 * self.dim

    def build_norm(self, width: int) -> nn.Module:
        """A normalisation over `width` features."""
        if self.norm_kind == "rms":
            return nn.RMSNorm(width, self.norm_eps)
        return nn.LayerNorm(width, self.norm_eps, bias=self.bias)


class Cache:
    """Keys and values of what a causal encoder has read, so that it can go on from there.

    Make an empty one and give it to every call, with only the new tokens in the batch. Prompts of
    unequal length may be padded on either side. `mask` is True where a cached token is real.
    """

    mask: Bool[Tensor, "batch read"] | None = None

    def __init__(self):
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def extend(self, mask: Bool[Tensor, "batch time"]) -> Bool[Tensor, "batch read"]:
        """Adds the mask of new tokens and returns the mask of all."""
        self.mask = mask if self.mask is None else torch.cat((self.mask, mask), 1)
        return self.mask

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Adds one layer's (batch, heads, time, head_dim) and returns (batch, heads, read, ...)."""
        if layer in self.layers:
            old_keys, old_values = self.layers[layer]
            keys, values = torch.cat((old_keys, keys), 2), torch.cat((old_values, values), 2)
        self.layers[layer] = keys, values
        return keys, values


class View(NamedTuple):
    """What every layer's attention shares: rotary angles, who sees whom, and the cache."""

    rotation: tuple[Tensor, Tensor] | None  # cosine, sine: (1 or batch, 1, time, half)
    allowed: Bool[Tensor, "batch 1 time read"] | None
    causal: bool  # the kernel hides the future itself
    cache: Cache | None


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection."""

    def __init__(self, config: Config):
        super().__init__()
        rate = config.attention_dropout
        self.heads, self.dropout = config.heads, config.dropout if rate is None else rate
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=config.bias)
        self.out = nn.Linear(config.dim, config.dim, bias=config.bias)

    def forward(
        self, x: Float[Tensor, "batch time dim"], view: View, layer: int
    ) -> Float[Tensor, "batch time dim"]:
        """Mixes the positions that `view` allows; `layer` is the place in the cache."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (batch, time, 3, heads, head_dim)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, batch, heads, time, head_dim)
        queries, keys, values = qkv
        if view.rotation is not None:
            queries, keys = rotate(qkv[:2], *view.rotation)
        if view.cache is not None:
            keys, values = view.cache.append(layer, keys, values)
        mixed = F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=view.allowed,
            is_causal=view.causal,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.out(mixed.transpose(1, 2).flatten(2))  # (batch, time, dim)


class Feedforward(nn.Module):
    """Two linear layers around an activation; swiglu gates the inner one (arXiv 2002.05202)."""

    def __init__(self, config: Config):
        super().__init__()
        inner = config.feedforward_width
        self.gated = config.activation == "swiglu"
        self.activation = ACTIVATIONS[config.activation]
        self.up = nn.Linear(config.dim, inner * (2 if self.gated else 1), bias=config.bias)
        self.down = nn.Linear(inner, config.dim, bias=config.bias)

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Transforms each position by itself."""
        x = self.up(x)
        if self.gated:
            gate, x = x.chunk(2, -1)
            return self.down(self.activation(gate) * x)
        return self.down(self.activation(x))


class Block(nn.Module):
    """Attention, then feed-forward, each with its residual sum and normalisation."""

    def __init__(self, config: Config):
        super().__init__()
        self.pre = config.norm == "pre"
        self.attention, self.attention_norm = Attention(config), config.build_norm(config.dim)
        self.feedforward, self.feedforward_norm = Feedforward(config), config.build_norm(config.dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Float[Tensor, "batch time dim"], view: View, layer: int
    ) -> Float[Tensor, "batch time dim"]:
        """One layer."""
        if self.pre:
            x = x + self.dropout(self.attention(self.attention_norm(x), view, layer))
            return x + self.dropout(self.feedforward(self.feedforward_norm(x)))
        x = self.attention_norm(x + self.dropout(self.attention(x, view, layer)))
        return self.feedforward_norm(x + self.dropout(self.feedforward(x)))


class TransformerEncoder(Encoder):
    """Tokens to `Features`, bidirectional or causal.

    Reads `tokens` and, where present, `mask`, `documents` and (with `segment_types`) `segments`.

    Attributes:
        embedding: the `TokenEmbedding`; `embedding.tokens.weight` is the table.
        layers: the blocks (one, when shared).
        final_norm, pooler: modules, or None where the configuration asks for none.

    >>> encoder = TransformerEncoder(Config(dim=8, layers=2, heads=2), Vocabulary(size=100))
    >>> encoder({"tokens": torch.tensor([[5, 7, 2]])}).last.shape
    torch.Size([1, 3, 8])
    """

    def __init__(self, config: Config, vocabulary: Vocabulary):
        super().__init__()
        self.config, self.vocabulary = config, vocabulary
        self.dim, self.num_layers = config.dim, config.layers
        self.embedding = TokenEmbedding(
            vocabulary.size,
            config.dim,
            width=config.embedding_width,
            segment_types=config.segment_types,
            positions=config.positions,
            max_length=config.max_length,
            scale=config.embedding_std / config.init_std if config.embedding_std else 1.0,
            norm=config.build_norm(config.embedding_width) if config.embedding_norm else None,
            dropout=config.dropout,
        )
        blocks = [Block(config) for _ in range(1 if config.share_layers else config.layers)]
        self.layers = nn.ModuleList(blocks)
        ends_in_norm = config.norm == "pre" if config.final_norm is None else config.final_norm
        self.final_norm = config.build_norm(config.dim) if ends_in_norm else None
        self.pooler = nn.Linear(config.dim, config.dim) if config.pooling == "bert" else None
        initialise(self, config.init_std)
        if config.norm == "pre":  # GPT-2: the residual sum of 2 * layers terms keeps its variance
            std = config.init_std / (2 * config.layers) ** 0.5
            for block in blocks:
                nn.init.normal_(block.attention.out.weight, std=std)
                nn.init.normal_(block.feedforward.down.weight, std=std)

    def forward(self, batch: Batch, cache: Cache | None = None) -> Features:
        """Encodes one batch.

        Args:
            batch: `tokens` (batch, time), and optionally the fields above.
            cache: what was read before; the new tokens go on from there and are added to it.

        Raises:
            DataError: rows longer than the learned positions, or a cache with packed rows.
            ConfigError: a cache for a bidirectional model.
        """
        tokens, documents = batch["tokens"], batch.get("documents")
        real = batch.get("mask")
        mask = torch.ones_like(tokens, dtype=torch.bool) if real is None else real
        read = mask if cache is None else self._extend(cache, mask, documents)
        self.embedding.check_length(read.shape[1])
        time = tokens.shape[1]
        if real is None and documents is None and cache is None:  # no mask: the fastest kernels
            positions, allowed = torch.arange(time, device=tokens.device), None
        else:
            positions = document_positions(read, documents)[:, -time:]
            allowed = attention_mask(read, documents, time, self.config.causal)
        x = self.embedding(tokens, positions, batch.get("segments"))
        in_kernel = self.config.causal and allowed is None
        view = View(self._rotation(positions), allowed, in_kernel, cache)
        hidden = [x]
        for layer in range(self.num_layers):
            x = self.layers[layer % len(self.layers)](x, view, layer)
            hidden.append(x)
        if self.final_norm is not None:
            hidden[-1] = self.final_norm(x)
        return Features(tuple(hidden), mask, self._pool(hidden[-1], mask))

    def _extend(self, cache: Cache, mask: Tensor, documents: Tensor | None) -> Tensor:
        if not self.config.causal:
            raise ConfigError("a cache needs a causal model (model.causal = true)")
        if documents is not None:
            raise DataError("a cache takes one document per row; leave `documents` out")
        return cache.extend(mask)

    def _rotation(self, positions: Int[Tensor, "*batch time"]) -> tuple[Tensor, Tensor] | None:
        if self.config.positions != "rotary":
            return None
        return rotary_angles(positions, self.config.head_dim, self.config.rotary_base)

    def _pool(
        self, x: Float[Tensor, "batch time dim"], mask: Bool[Tensor, "batch time"]
    ) -> Float[Tensor, "batch dim"]:
        if self.config.pooling == "mean":
            return masked_mean(x, mask)
        slot = torch.arange(mask.shape[1], device=mask.device)
        if self.config.pooling == "last":
            chosen = torch.where(mask, slot, 0).amax(1)  # (batch,)
        else:
            chosen = torch.where(mask, slot, mask.shape[1] - 1).amin(1)  # (batch,)
        row = x[torch.arange(len(x), device=x.device), chosen]  # (batch, dim)
        return row if self.pooler is None else torch.tanh(self.pooler(row))


class VocabularyHead(nn.Module):
    """Hidden vectors to logits over the vocabulary, with the weights of the token table.

    The table is given at each call and is no part of the head, so it is saved, copied and averaged
    once, with its encoder. Give only the positions that the loss needs.

    Args:
        encoder: whose configuration and vocabulary size to follow.
        transform: BERT's head (dense, activation, norm, tied table, bias); False: GPT-2's (the tied
            table alone, through the transposed projection where the table is narrower).

    >>> encoder = TransformerEncoder(Config(dim=8, layers=1, heads=2), Vocabulary(size=100))
    >>> head = VocabularyHead(encoder, transform=True)
    >>> head(torch.zeros(3, 8), encoder.embedding).shape
    torch.Size([3, 100])
    """

    def __init__(self, encoder: TransformerEncoder, transform: bool):
        super().__init__()
        config = encoder.config
        self.transform = transform
        if transform:
            self.dense = nn.Linear(config.dim, config.embedding_width)
            self.activation = ACTIVATIONS[config.activation]
            self.norm = config.build_norm(config.embedding_width)
            self.bias = nn.Parameter(torch.zeros(encoder.vocabulary.size))
            initialise(self, config.init_std)

    def forward(
        self, hidden: Float[Tensor, "*items dim"], embedding: TokenEmbedding
    ) -> Float[Tensor, "*items vocabulary"]:
        """Logits of every token, in the autocast precision: lift them to float32 for the loss."""
        if self.transform:
            inner = self.activation(self.dense(hidden)).to(self.bias.dtype)
            return F.linear(self.norm(inner), embedding.tokens.weight, self.bias)
        if embedding.projection is not None:
            hidden = hidden @ embedding.projection.weight  # (*items, width)
        return F.linear(hidden, embedding.tokens.weight)


def initialise(module: nn.Module, std: float) -> None:
    """Normal(0, std) for linear layers and tables, zero for their biases, as BERT and GPT-2 do."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=std)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)


def attention_mask(
    mask: Bool[Tensor, "batch read"],
    documents: Int[Tensor, "batch read"] | None,
    num_queries: int,
    causal: bool,
) -> Bool[Tensor, "batch 1 query read"]:
    """What each of the last `num_queries` sees: real tokens of its document, not of its future.

    Every position also sees itself, so a padded one has something to average and gives no NaN.
    """
    slot = torch.arange(mask.shape[1], device=mask.device)
    query = slot[-num_queries:].unsqueeze(1)  # (query, 1)
    allowed = mask.unsqueeze(1)  # (batch, 1, read)
    if documents is not None:
        here = documents[:, -num_queries:].unsqueeze(2)  # (batch, query, 1)
        allowed = allowed & (here == documents.unsqueeze(1))
    if causal:
        allowed = allowed & (slot <= query)
    return (allowed | (slot == query)).unsqueeze(1)
