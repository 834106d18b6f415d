"""The transformer: one file for BERT's and GPT-2's published layouts and for small modern ones.

A stack of blocks (Vaswani et al., 2017, arXiv 1706.03762) over a `TokenEmbedding`, bidirectional or
causal. Post-norm with learned positions is BERT (Devlin et al., 2019, arXiv 1810.04805), pre-norm
with learned positions is GPT-2 (Radford et al., 2019), shared layers with a narrow table are ALBERT
(Lan et al., 2020, arXiv 1909.11942), experts in every second block are Switch (Fedus et al., 2021,
arXiv 2101.03961). `embeddings.py` has the positions, `presets.toml` the sizes, `attention.py` the
attention, `experts.py` the experts, and `encoder_decoder.py` makes two such stacks into one model.

Axes: batch, time, dim. Padding may stand on either side of a row. The last entry of
`Features.hidden` is after `final_norm`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from selfsup.batch import AudioSpec, Batch, ImageSpec, SeriesSpec, Spec, Vocabulary
from selfsup.errors import ConfigError, DataError
from selfsup.models.attention import (
    Attention,
    Cache,
    CrossAttention,
    Memory,
    Prefix,
    RelativeBias,
    View,
    attention_mask,
    linear,
    past,
)
from selfsup.models.dropout import Dropout
from selfsup.models.embeddings import (
    FrameEmbedding,
    InputEmbedding,
    PatchEmbedding,
    SeriesEmbedding,
    TokenEmbedding,
    document_positions,
    rotary_angles,
)
from selfsup.models.encoder import Encoder, Features, masked_mean
from selfsup.models.experts import Experts, Routing, summed
from selfsup.models.waveform import WaveformEmbedding

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "swiglu": F.silu,  # of the gate
    "geglu": partial(F.gelu, approximate="tanh"),  # of the gate (T5 1.1)
}
GATED = ("swiglu", "geglu")


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


class Feedforward(nn.Module):
    """Two linear layers around an activation, which may gate the inner one (arXiv 2002.05202)."""

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
    ) -> tuple[Float[Tensor, "batch time dim"], Routing | None]:
        """One layer, and where its experts' tokens went."""
        x = self.attend(x, view, layer)
        y = self.feedforward_norm(x) if self.pre else x
        y, routing = self.feedforward(y, view.real) if self.routed else (self.feedforward(y), None)
        x = x + self.dropout(y)
        return x if self.pre else self.feedforward_norm(x), routing

    def attend(self, x: Tensor, view: View, layer: int) -> Tensor:
        """The first half."""
        return self._residual(x, self.attention_norm, lambda y: self.attention(y, view, layer))

    def _residual(self, x: Tensor, norm: nn.Module, part: Callable[[Tensor], Tensor]) -> Tensor:
        if self.pre:
            return x + self.dropout(part(norm(x)))
        return norm(x + self.dropout(part(x)))


class DecoderBlock(Block):
    """A block that also attends to what an encoder has read, between its two halves."""

    def __init__(self, config: Config, layer: int):
        super().__init__(config, layer)
        self.cross = CrossAttention(*self.shape)
        self.cross_norm = config.build_norm(config.dim)

    def attend(self, x: Tensor, view: View, layer: int) -> Tensor:
        """Self-attention, then attention to the source."""
        x = super().attend(x, view, layer)
        return self._residual(x, self.cross_norm, lambda y: self.cross(y, view, layer))


class TransformerEncoder(Encoder):
    """Tokens, patches, frames or series to `Features`, bidirectional or causal.

    Reads the field that its spec stands for and, where present, `mask`, `documents` and (with
    `segment_types`) `segments`.

    Attributes:
        embedding: of the kind that the spec asks for; in a `TokenEmbedding` `tokens.weight` is the
            table.
        layers: the blocks (one, when shared).
        final_norm, pooler: modules, or None where the configuration asks for none.
        prefix: gives the learned keys and values for a number of rows; set by prefix tuning.
        prompt: puts learned vectors before those of the items; set by the tuning of soft prompts.

    >>> encoder = TransformerEncoder(Config(dim=8, layers=2, heads=2), Vocabulary(size=100))
    >>> encoder({"tokens": torch.tensor([[5, 7, 2]])}).last.shape
    torch.Size([1, 3, 8])
    """

    reads = ("text", "image", "audio", "series")

    block: type[Block] = Block
    prefix: Callable[[int], Prefix | None] | None = None
    prompt: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]] | None = None

    def __init__(self, config: Config, spec: Spec):
        super().__init__()
        self.config, self.spec = config, spec
        self.dim, self.num_layers, self.causal = config.dim, config.layers, config.causal
        self.has_penalty = config.experts > 0
        self.embedding: Any = self.build_embedding()
        blocks = [self.block(config, i) for i in range(1 if config.share_layers else config.layers)]
        self.layers = nn.ModuleList(blocks)
        relative = config.heads, config.relative_buckets, config.relative_reach, config.causal
        self.relative = RelativeBias(*relative) if config.positions == "relative" else None
        ends_in_norm = config.norm == "pre" if config.final_norm is None else config.final_norm
        self.final_norm = config.build_norm(config.dim) if ends_in_norm else None
        self.pooler = nn.Linear(config.dim, config.dim) if config.pooling == "bert" else None
        initialise(self, config.init_std)
        if config.norm == "pre":  # GPT-2: the residual sum of 2 * layers terms keeps its variance
            std = config.init_std / (2 * config.layers) ** 0.5
            for block in blocks:
                ends = [block.attention.out.weight, block.feedforward.down.weight]
                if isinstance(block, DecoderBlock):
                    ends.append(block.cross.out.weight)
                for weight in ends:
                    nn.init.normal_(weight, std=std)

    def build_embedding(self) -> InputEmbedding:
        """The embedding of the kind that the spec asks for."""
        return build_embedding(self.config, self.spec)

    def forward(
        self,
        batch: Batch,
        cache: Cache | None = None,
        vectors: Tensor | None = None,
        memory: Memory | None = None,
        causal: bool | None = None,
    ) -> Features:
        """Encodes one batch.

        Args:
            batch: the fields above.
            cache: what was read before; the new tokens go on from there and are added to it.
            vectors: (batch, time, width), taken instead of `embedding.vectors(batch)`: a method
                that hides positions puts its mask vector there.
            memory: for a decoder: what its encoder has read.
            causal: whether to hide the future in this call; None: as configured.

        Raises:
            DataError: rows longer than the learned positions, or a cache with packed rows.
            ConfigError: a cache for a bidirectional model.
        """
        x, view, mask = self.begin(batch, cache, vectors, memory, causal)
        hidden, routings = [x], []
        for layer in range(self.num_layers):
            x, routing = self.step(x, view, layer)
            hidden.append(x)
            if routing is not None:
                routings.append(routing)
        hidden[-1] = self.end(x)
        if view.num_prompt:
            hidden, mask = [x[:, view.num_prompt :] for x in hidden], mask[:, view.num_prompt :]
        penalty, metrics = summed(routings, self.config.balance_weight)
        return Features(tuple(hidden), mask, self.pool(hidden[-1], mask), penalty, metrics)

    def begin(
        self,
        batch: Batch,
        cache: Cache | None = None,
        vectors: Tensor | None = None,
        memory: Memory | None = None,
        causal: bool | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], View, Bool[Tensor, "batch time"]]:
        """What the first layer reads, what all layers share, and the mask; `forward` has the rest.

        Whoever goes through the layers one by one calls `begin`, `step` for each of them, `end`,
        and leaves out the first `View.num_prompt` slots.
        """
        causal = self.config.causal if causal is None else causal
        vectors = self.embedding.vectors(batch) if vectors is None else vectors
        documents, real = batch.get("documents"), self.embedding.real(batch)
        num_items = vectors.shape[1]
        if self.prompt is not None and (cache is None or cache.num_read == 0):
            self._check_prompted(documents)
            vectors, real = self.prompt(vectors, real)
        mask = vectors.new_ones(vectors.shape[:2], dtype=torch.bool) if real is None else real
        time, device = vectors.shape[1], vectors.device
        plain = real is None and documents is None
        known: Tensor | None = None if plain else mask  # of all that was read
        read = time
        if cache is not None:
            self._check_cached(documents, causal)
            known = cache.extend(mask, padded=real is not None)
            read = cache.num_read
        prefix = None if self.prefix is None else self.prefix(len(mask))
        shift = None if prefix is None else prefix.shift
        self.embedding.check_length(read if shift is None else read + int(shift.max()))
        allowed: Tensor | None = None
        if known is not None:
            positions = document_positions(known, documents)[:, -time:]
            allowed = attention_mask(known, documents, time, causal)
        else:  # nothing is padded; without a mask the kernels are fastest
            positions = torch.arange(read - time, read, device=device)
            if 1 < time < read:
                allowed = past(time, read, device)
        if shift is not None:
            positions = positions + shift
        x = self.embedding.place(vectors, positions, real)
        if self.relative is not None:
            allowed = self._with_distances(allowed, time, read, causal)
        in_kernel = causal and allowed is None and time == read
        if prefix is not None:
            allowed = prefix.seen(past(time, read, device) if in_kernel else allowed, read)
            in_kernel = False
        view = View(self._rotation(positions), allowed, in_kernel, cache, real, memory, prefix)
        if time != num_items:
            view = view._replace(num_prompt=time - num_items)
        return x, view, mask

    def step(
        self, x: Float[Tensor, "batch time dim"], view: View, layer: int
    ) -> tuple[Float[Tensor, "batch time dim"], Routing | None]:
        """One layer, from 0 to `num_layers` - 1, and where its experts' tokens went."""
        return self.layers[layer % len(self.layers)](x, view, layer)

    def end(self, x: Float[Tensor, "batch time dim"]) -> Float[Tensor, "batch time dim"]:
        """What heads read of the last layer's output."""
        return x if self.final_norm is None else self.final_norm(x)

    def _with_distances(self, allowed: Tensor | None, time: int, read: int, causal: bool) -> Tensor:
        """What is added to the attention scores: numbers by distance, -inf where unseen."""
        assert self.relative is not None
        bias = self.relative(time, read)
        if allowed is None and causal and time > 1:
            allowed = past(time, read, bias.device)
        return bias if allowed is None else bias.masked_fill(~allowed, -torch.inf)

    def _check_cached(self, documents: Tensor | None, causal: bool) -> None:
        if not causal:
            raise ConfigError("a cache needs a causal model (model.causal = true)")
        if documents is not None:
            raise DataError("a cache takes one document per row; leave `documents` out")

    def _check_prompted(self, documents: Tensor | None) -> None:
        if documents is not None:
            raise DataError("a soft prompt takes one document per row; leave `documents` out")

    def _rotation(self, positions: Int[Tensor, "*batch time"]) -> tuple[Tensor, Tensor] | None:
        if self.config.positions != "rotary":
            return None
        return rotary_angles(positions, self.config.head_dim, self.config.rotary_base)

    def pool(
        self, x: Float[Tensor, "batch time dim"], mask: Bool[Tensor, "batch time"]
    ) -> Float[Tensor, "batch dim"]:
        """One vector of each row, as `pooling` says."""
        if self.config.pooling == "mean":
            return masked_mean(x, mask)
        slot = torch.arange(mask.shape[1], device=mask.device)
        if self.config.pooling == "last":
            chosen = torch.where(mask, slot, 0).amax(1)  # (batch,)
        else:
            chosen = torch.where(mask, slot, mask.shape[1] - 1).amin(1)  # (batch,)
        row = x[torch.arange(len(x), device=x.device), chosen]  # (batch, dim)
        return row if self.pooler is None else torch.tanh(self.pooler(row))


def repacked(
    x: Float[Tensor, "batch time dim"],
    view: View,
    mask: Bool[Tensor, "batch time"],
    rows: Int[Tensor, " chosen"],
) -> tuple[Tensor, View, Tensor]:
    """These rows of a batch alone, between two steps, without padding that all of them end in.

    What all rows share (angles, distances) stays shared. For a view without cache and memory.
    What a tuning has added for some rows only is not told of the new numbers, and refuses them.
    """
    num_rows, num_slots = mask.shape

    def chosen(part: Tensor) -> Tensor:
        return part[rows] if len(part) == num_rows else part

    x, mask = x[rows], mask[rows]
    rotation, allowed, real = view.rotation, view.allowed, view.real
    if rotation is not None:
        rotation = chosen(rotation[0]), chosen(rotation[1])
    if allowed is not None:
        allowed = chosen(allowed)
    if real is not None:
        num_left = int(mask.any(0).nonzero()[-1]) + 1
        x, mask = x[:, :num_left], mask[:, :num_left]
        real = None if bool(mask.all()) else mask
        if rotation is not None:
            rotation = rotation[0][..., :num_left, :], rotation[1][..., :num_left, :]
        if allowed is not None:  # the slots of this batch are the last ones that are read
            num_read = allowed.shape[-1] - num_slots + num_left
            allowed = allowed[..., :num_left, :num_read]
            if real is None and allowed.dtype == torch.bool and bool(allowed.all()):
                allowed = None
    prefix = None if view.prefix is None else view.prefix.select(rows)
    return x, view._replace(rotation=rotation, allowed=allowed, real=real, prefix=prefix), mask


def build_embedding(config: Config, spec: Spec) -> InputEmbedding:
    """The embedding for the kind of data that `spec` stands for.

    Raises:
        ConfigError: a transformer does not read that kind.
    """
    options = {
        "width": config.embedding_width,
        "positions": config.positions,
        "max_length": config.max_length,
        "scale": config.embedding_std / config.init_std if config.embedding_std else 1.0,
        "norm": config.build_norm(config.embedding_width) if config.embedding_norm else None,
        "dropout": config.dropout,
    }
    match spec:
        case Vocabulary():
            return TokenEmbedding(spec.size, config.dim, config.segment_types, **options)
        case ImageSpec():
            return PatchEmbedding(spec, config.patch, config.dim, **options)
        case AudioSpec(mel=0):
            return _waveform_embedding(config, options)
        case AudioSpec():
            return FrameEmbedding(spec, config.patch, config.dim, **options)
        case SeriesSpec():
            return SeriesEmbedding(spec, config.patch, config.dim, **options)
    raise ConfigError(f"a transformer does not read {type(spec).__name__}; use model.name = 'mlp'")


def _waveform_embedding(config: Config, options: dict[str, Any]) -> WaveformEmbedding:
    if config.causal or config.embedding_width != config.dim:
        raise ConfigError(
            "waveforms are read from both sides and projected to model.dim: they need "
            "model.causal = false and model.embedding_dim = 0"
        )
    return WaveformEmbedding(
        config.dim,
        config.conv_channels,
        config.conv_kernels,
        config.conv_strides,
        config.conv_norm,
        config.conv_positions,
        **options,
    )


class Projection(NamedTuple):
    """What is multiplied to give logits; the loss would rather not see them all at once."""

    hidden: Float[Tensor, "*items width"]
    weight: Float[Tensor, "vocabulary width"]
    bias: Float[Tensor, " vocabulary"] | None = None

    @property
    def logits(self) -> Float[Tensor, "*items vocabulary"]:
        """Scores of every token, in the autocast precision: lift them to float32 for a loss."""
        return F.linear(*self)


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
            self.bias = nn.Parameter(torch.zeros(len(encoder.embedding.tokens.weight)))
            initialise(self, config.init_std)

    def forward(
        self, hidden: Float[Tensor, "*items dim"], embedding: TokenEmbedding
    ) -> Float[Tensor, "*items vocabulary"]:
        """Logits of every token, in the autocast precision: lift them to float32 for the loss."""
        return self.project(hidden, embedding).logits

    def project(self, hidden: Float[Tensor, "*items dim"], embedding: TokenEmbedding) -> Projection:
        """The last product that gives the logits, not yet carried out."""
        if self.transform:
            inner = self.activation(self.dense(hidden)).to(self.bias.dtype)
            return Projection(self.norm(inner), embedding.tokens.weight, self.bias)
        if embedding.projection is not None:
            hidden = hidden @ embedding.projection.weight  # (*items, width)
        return Projection(hidden, embedding.tokens.weight)


def initialise(module: nn.Module, std: float) -> None:
    """Normal(0, std) for linear layers and tables, zero for their biases, as BERT and GPT-2 do."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=std)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)
