"""Self- and cross-attention, who may see whom, and the cache of what was read.

Scaled dot-product attention of several heads (Vaswani et al., 2017, arXiv 1706.03762, section 3.2).
Relative positions enter as a learned number for each head and distance (T5, Raffel et al., 2019,
arXiv 1910.10683, section 2.1). In front of the keys and values a tuning may have put learned ones.

Axes: batch; time: tokens of a row; read: those and the ones before them in a cache; source: tokens
that a decoder's encoder has read; heads; head_dim; half = head_dim / 2.
"""

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from selfsup.models.dropout import dropout
from selfsup.models.embeddings import rotate


class Cache:
    """Keys and values of what a causal stack has read, so that it can go on from there.

    Make an empty one and give it to every call, with only the new tokens in the batch. Prompts of
    unequal length may be padded on either side. `mask` is True where a cached token is real, None
    as long as all of them are. Not for training: new entries are written into the buffers of the
    old ones.
    """

    mask: Bool[Tensor, "batch read"] | None = None
    num_read: int = 0  # tokens of a row

    def __init__(self):
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}  # with room for more than was read
        self.length: dict[int, int] = {}  # what was read, by layer
        self.source: dict[int, tuple[Tensor, Tensor]] = {}  # of cross-attention
        self.memory: Memory | None = None

    def extend(
        self, mask: Bool[Tensor, "batch time"], padded: bool
    ) -> Bool[Tensor, "batch read"] | None:
        """Adds the mask of new tokens, True everywhere unless `padded`; returns that of all."""
        if self.mask is None and padded:
            self.mask = mask.new_ones(len(mask), self.num_read)
        if self.mask is not None:
            self.mask = torch.cat((self.mask, mask), 1)
        self.num_read += mask.shape[1]
        return self.mask

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Adds one layer's (batch, heads, time, head_dim) and returns (batch, heads, read, ...)."""
        start = self.length.get(layer, 0)
        end = start + keys.shape[2]
        if layer not in self.layers or self.layers[layer][0].shape[2] < end:
            self.layers[layer] = tuple(  # type: ignore[assignment]
                self._grown(layer, part, new) for part, new in enumerate((keys, values))
            )
        self.length[layer] = end
        for buffer, new in zip(self.layers[layer], (keys, values), strict=True):
            buffer[:, :, start:end] = new
        old_keys, old_values = self.layers[layer]
        return old_keys[:, :, :end], old_values[:, :, :end]

    def _grown(self, layer: int, part: int, new: Tensor) -> Tensor:
        """A buffer of twice the length that is needed, so that copying stays rare."""
        read = self.length.get(layer, 0)
        shape = (*new.shape[:2], max(16, 2 * (read + new.shape[2])), new.shape[3])
        buffer = new.new_empty(shape)
        if read:
            buffer[:, :, :read] = self.layers[layer][part][:, :, :read]
        return buffer

    def select(self, rows: Int[Tensor, " chosen"]) -> None:
        """Keeps these rows in this order; a row may be taken several times (beam search)."""
        for table in (self.layers, self.source):
            for layer, (keys, values) in table.items():
                table[layer] = keys[rows], values[rows]
        self.mask = None if self.mask is None else self.mask[rows]
        if self.memory is not None:
            hidden, allowed = self.memory
            self.memory = Memory(hidden[rows], None if allowed is None else allowed[rows])


class Memory(NamedTuple):
    """What an encoder has read, for a decoder to look at."""

    hidden: Float[Tensor, "batch source dim"]
    allowed: Bool[Tensor, "batch 1 1 source"] | None  # None: all of it is real


class Prefix(NamedTuple):
    """Learned keys and values in front of those of every layer; they are in no cache.

    Attributes:
        layers: keys and values of each layer, (batch, heads, prefix, head_dim).
        real: True where a row has this slot; None: everywhere.
        shift: by how much each row's positions begin later; None: by nothing.
    """

    layers: Sequence[tuple[Tensor, Tensor]]
    real: Bool[Tensor, "batch prefix"] | None
    shift: Int[Tensor, "rows 1"] | None

    def seen(self, allowed: Tensor | None, read: int) -> Tensor | None:
        """`View.allowed` of `read` slots with this prefix before them, which every query sees."""
        if allowed is None and self.real is None:
            return None
        keys = self.layers[0][0]
        front = keys.new_ones(1, keys.shape[2]) if self.real is None else self.real
        front = front.bool()[:, None, None]  # (batch or 1, 1, 1, prefix)
        if allowed is None:
            allowed = front.new_ones(1, 1, 1, read)
        if allowed.dtype != torch.bool:
            front = torch.zeros_like(front, dtype=allowed.dtype).masked_fill(~front, -torch.inf)
        shape = torch.broadcast_shapes(front.shape[:-1], allowed.shape[:-1])
        return torch.cat((front.expand(*shape, -1), allowed.expand(*shape, -1)), -1)

    def before(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, (batch, heads, prefix + read, head_dim)."""
        learned = (part.to(keys.dtype) for part in self.layers[layer])
        joined = [torch.cat(pair, 2) for pair in zip(learned, (keys, values), strict=True)]
        return joined[0], joined[1]

    def select(self, rows: Int[Tensor, " chosen"]) -> "Prefix":
        """That of these rows."""
        layers = [(keys[rows], values[rows]) for keys, values in self.layers]
        return self._replace(layers=layers, real=None if self.real is None else self.real[rows])


class View(NamedTuple):
    """What all layers share: rotary angles, who sees whom, the cache, an encoder's output."""

    rotation: tuple[Tensor, Tensor] | None  # of `rotary_angles`: (1 or batch, 1, time, head_dim)
    # True where seen, (batch, 1, time, read); or float, added to the scores, (..., heads, ...)
    allowed: Tensor | None
    causal: bool  # the kernel hides the future itself
    cache: Cache | None
    real: Bool[Tensor, "batch time"] | None = None  # None: nothing is padded
    memory: Memory | None = None
    prefix: Prefix | None = None  # `allowed` has its slots in front
    num_prompt: int = 0  # learned vectors before each row's items


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection; without heads only the output's bias.

    Attributes:
        kept: (heads,) where heads were pruned and positions are relative: which of the distances'
            numbers are these heads' own. None: all.
    """

    kept: Tensor | None

    def __init__(self, dim: int, heads: int, head_dim: int, dropout: float, bias: bool):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = linear(dim, 3 * heads * head_dim, bias)
        self.out = linear(heads * head_dim, dim, bias)
        self.register_buffer("kept", None)

    def forward(
        self, x: Float[Tensor, "batch time dim"], view: View, layer: int
    ) -> Float[Tensor, "batch time dim"]:
        """Mixes the positions that `view` allows; `layer` is the place in the cache."""
        if self.heads == 0:
            return self.out(x[..., :0])
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (batch, time, 3, heads, head_dim)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, batch, heads, time, head_dim)
        queries, keys, values = qkv
        if view.rotation is not None:
            queries, keys = rotate(qkv[:2], *view.rotation)
        if view.cache is not None:
            keys, values = view.cache.append(layer, keys, values)
        if view.prefix is not None:
            keys, values = view.prefix.before(layer, keys, values)
        allowed = view.allowed
        if self.kept is not None and allowed is not None:
            allowed = allowed[:, self.kept]
        rate = self.dropout if self.training else 0.0
        mixed = mix(queries, keys, values, allowed, view.causal, rate)
        return self.out(mixed.transpose(1, 2).flatten(2))  # (batch, time, dim)


def linear(inputs: int, outputs: int, bias: bool) -> nn.Linear:
    """A linear layer of which pruning may have left no inputs or no outputs."""
    with warnings.catch_warnings():  # torch warns of tensors that it cannot fill
        warnings.simplefilter("ignore", UserWarning)
        return nn.Linear(inputs, outputs, bias=bias)


class CrossAttention(nn.Module):
    """Attention of a decoder's positions to what the encoder has read."""

    def __init__(self, dim: int, heads: int, head_dim: int, dropout: float, bias: bool):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(dim, heads * head_dim, bias=bias)
        self.kv = nn.Linear(dim, 2 * heads * head_dim, bias=bias)
        self.out = nn.Linear(heads * head_dim, dim, bias=bias)

    def forward(
        self, x: Float[Tensor, "batch time dim"], view: View, layer: int
    ) -> Float[Tensor, "batch time dim"]:
        """Mixes the source positions; their keys and values are computed once for a cache."""
        assert view.memory is not None
        kept = None if view.cache is None else view.cache.source.get(layer)
        if kept is None:
            kv = self.kv(view.memory.hidden).unflatten(-1, (2, self.heads, -1))
            keys, values = kv.permute(2, 0, 3, 1, 4)  # (batch, heads, source, head_dim)
            if view.cache is not None:
                view.cache.source[layer] = keys, values
        else:
            keys, values = kept
        queries = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        rate = self.dropout if self.training else 0.0
        mixed = mix(queries, keys, values, view.memory.allowed, causal=False, rate=rate)
        return self.out(mixed.transpose(1, 2).flatten(2))  # (batch, time, dim)


def mix(
    queries: Float[Tensor, "batch heads query head_dim"],
    keys: Float[Tensor, "batch heads read head_dim"],
    values: Float[Tensor, "batch heads read head_dim"],
    allowed: Tensor | None,
    causal: bool,
    rate: float,
) -> Float[Tensor, "batch heads query head_dim"]:
    """Attention with dropout of its weights; `allowed` is bool, or numbers added to the scores."""
    if rate == 0 or queries.device.type != "cpu":
        return F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=allowed, is_causal=causal, dropout_p=rate
        )
    # torch forms the weights as well where it drops some, with its slower dropout
    scores = (queries * queries.shape[-1] ** -0.5) @ keys.transpose(-1, -2)
    if causal:
        allowed = past(scores.shape[-2], scores.shape[-1], scores.device)
    if allowed is not None and allowed.dtype == torch.bool:
        scores = scores.masked_fill(~allowed, -torch.inf)
    elif allowed is not None:
        scores = scores + allowed
    weights = scores.softmax(-1, dtype=torch.float32).to(values.dtype)
    return dropout(weights, rate) @ values


class RelativeBias(nn.Module):
    """A learned number for each head and bucket of distances, added to the attention scores.

    Half of the buckets are single distances, the others grow logarithmically up to `reach`; all
    that lies beyond shares the last one. From both sides, each side has half of the buckets.
    """

    def __init__(self, heads: int, buckets: int, reach: int, causal: bool):
        super().__init__()
        self.reach, self.causal = reach, causal
        self.table = nn.Embedding(buckets, heads)

    def forward(self, num_queries: int, num_read: int) -> Float[Tensor, "1 heads query read"]:
        """The numbers for the last `num_queries` of `num_read` slots."""
        slot = torch.arange(num_read, device=self.table.weight.device)
        distance = slot - slot[num_read - num_queries :].unsqueeze(1)  # (query, read)
        bucket = distance_bucket(distance, self.table.num_embeddings, self.reach, self.causal)
        return self.table(bucket).permute(2, 0, 1).unsqueeze(0)


def distance_bucket(
    distance: Int[Tensor, "query read"], buckets: int, reach: int, causal: bool
) -> Int[Tensor, "query read"]:
    """The bucket of each distance (read slot minus query slot), from 0 to `buckets` - 1.

    >>> distance_bucket(torch.tensor([[-200, -9, -1, 0, 1]]), 32, 128, causal=False).tolist()
    [[15, 8, 1, 0, 17]]
    """
    if causal:
        side, distance = torch.zeros_like(distance), (-distance).clamp(min=0)
    else:
        buckets //= 2
        side, distance = (distance > 0).long() * buckets, distance.abs()
    exact = buckets // 2
    growth = (distance.float() / exact).clamp(min=1).log() / math.log(reach / exact)
    far = (exact + (growth * (buckets - exact)).long()).clamp(max=buckets - 1)
    return side + torch.where(distance < exact, distance, far)


def past(time: int, read: int, device: torch.device) -> Bool[Tensor, "query read"]:
    """What each of the last `time` of `read` slots sees where only the future is hidden.

    >>> past(2, 3, torch.device("cpu")).tolist()
    [[True, True, False], [True, True, True]]
    """
    return torch.ones(time, read, dtype=torch.bool, device=device).tril(read - time)


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
