"""What all layers of a stack share in one call: who sees whom, and the cache of what was read.

In front of the keys and values a tuning may have put learned ones.

Axes: batch; time: tokens of a row; read: those and the ones before them in a cache; source: tokens
that a decoder's encoder has read; heads; head_dim.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


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
    slots: Int[Tensor, "batch kept"] | None = None  # whose outputs are wanted; None: all

    def narrowed(self, slots: Int[Tensor, "batch kept"], time: int) -> "View":
        """The view of a layer of which only these of `time` slots are wanted."""
        allowed = past(time, time, slots.device) if self.causal else self.allowed
        if allowed is not None:
            allowed = allowed[(None,) * (4 - allowed.dim())]  # (1 or batch, 1 or heads, time, read)
            allowed = allowed.take_along_dim(slots[:, None, :, None], 2)
        return self._replace(allowed=allowed, causal=False, slots=slots)

    def wanted(self, x: Float[Tensor, "*batch time dim"]) -> Float[Tensor, "*batch kept dim"]:
        """What lies at `slots`."""
        if self.slots is None:
            return x
        slots = self.slots if x.dim() == 3 else self.slots.unsqueeze(1)
        return x.take_along_dim(slots.unsqueeze(-1), -2)


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
