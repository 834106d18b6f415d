"""Self-attention, who may see whom, and the cache of what was read.

Scaled dot-product attention of several heads (Vaswani et al., 2017, arXiv 1706.03762, section 3.2).

Axes: batch; time: tokens of a row; read: those and the ones before them in a cache; heads;
head_dim = dim / heads; half = head_dim / 2.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from selfsup.models.embeddings import rotate


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

    def __init__(self, dim: int, heads: int, dropout: float, bias: bool):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.out = nn.Linear(dim, dim, bias=bias)

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
