"""Self- and cross-attention, and the numbers of relative positions.

Scaled dot-product attention of several heads (Vaswani et al., 2017, arXiv 1706.03762, section 3.2).
Relative positions enter as a learned number for each head and distance (T5, Raffel et al., 2019,
arXiv 1910.10683, section 2.1).

Axes: batch; time: tokens of a row; read: those and the ones before them in a cache, and in front of
all a tuning's learned ones; kept: those of time whose outputs are wanted, mostly all; source:
tokens that a decoder's encoder has read; heads; head_dim.
"""

import math
import warnings

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from selfsup.models.dropout import dropout
from selfsup.models.embeddings import rotate
from selfsup.models.view import View, past


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
    ) -> Float[Tensor, "batch kept dim"]:
        """Mixes the positions that `view` allows; `layer` is the place in the cache."""
        if self.heads == 0:
            return self.out(view.wanted(x)[..., :0])
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
        mixed = mix(view.wanted(queries), keys, values, allowed, view.causal, rate)
        return self.out(mixed.transpose(1, 2).flatten(2))  # (batch, kept, dim)


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
