"""Randomness that can be computed again: every generator is derived from (seed, purpose, numbers).

No global random state is read anywhere, so a resumed run has no random state to restore, and
changing the number of workers changes nothing.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive(seed: int, purpose: str, *numbers: int) -> int:
    """A 63-bit seed that is a pure function of its arguments.

    >>> derive(0, "mask", 1) == derive(0, "mask", 1), derive(0, "mask", 1) == derive(0, "mask", 2)
    (True, False)
    """
    text = ":".join([str(seed), purpose, *map(str, numbers)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def torch_generator(
    seed: int, purpose: str, *numbers: int, device: str | torch.device = "cpu"
) -> torch.Generator:
    """A fresh torch generator for one purpose, at one step, on one rank."""
    return torch.Generator(device).manual_seed(derive(seed, purpose, *numbers))


def numpy_generator(seed: int, purpose: str, *numbers: int) -> np.random.Generator:
    """A fresh NumPy generator for one purpose."""
    return np.random.Generator(np.random.PCG64(derive(seed, purpose, *numbers)))


def seed_layers(seed: int, purpose: str, *numbers: int) -> None:
    """Seeds the state that torch's own initialisers and dropout read; only inside `isolated`."""
    number = derive(seed, purpose, *numbers)
    torch.default_generator.manual_seed(number)  # torch.random.manual_seed is 200 times slower
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(number)


@contextmanager
def isolated() -> Iterator[None]:
    """Gives the caller's global random state back, whatever `seed_layers` did inside."""
    with torch.random.fork_rng():
        yield


class Order:
    """The order in which examples are read: a pure function of (seed, position).

    Position p lies in pass p // size over the data; each pass is another permutation, computed with
    a four-round Feistel network and cycle walking: no table of indices is held, however large the
    data set.

    >>> order = Order(5, seed=0)
    >>> sorted(order[0:5].tolist()), sorted(order[5:10].tolist())
    ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4])
    """

    def __init__(self, size: int, seed: int, shuffle: bool = True):
        if size < 1:
            raise ValueError(f"an order needs at least one example, got {size}")
        self.size, self.seed, self.shuffle = size, seed, shuffle
        self.half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))

    def __getitem__(self, positions: slice) -> np.ndarray:
        """Example numbers (int64) at positions [start, stop)."""
        position = np.arange(positions.start, positions.stop, dtype=np.int64)
        epoch, place = position // self.size, position % self.size
        if not self.shuffle:
            return place
        out = np.empty_like(place)
        for number in np.unique(epoch):
            here = epoch == number
            out[here] = self._permute(place[here].astype(np.uint64), int(number))
        return out

    def _permute(self, place: np.ndarray, epoch: int) -> np.ndarray:
        keys = numpy_generator(self.seed, "order", epoch).integers(0, 2**63, 4, dtype=np.uint64)
        outside = np.ones(len(place), dtype=bool)
        while outside.any():  # cycle walking: the network permutes the next even power of two
            place[outside] = self._feistel(place[outside], keys)
            outside = place >= self.size
        return place.astype(np.int64)

    def _feistel(self, place: np.ndarray, keys: np.ndarray) -> np.ndarray:
        low_mask = (np.uint64(1) << self.half_bits) - np.uint64(1)
        left, right = place >> self.half_bits, place & low_mask
        for key in keys:
            mixed = (right + key) * np.uint64(0x9E3779B97F4A7C15)  # wraps around, as it should
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & low_mask)
        return (left << self.half_bits) | right


class Batches:
    """The example numbers of each batch: a pure function of (seed, batch number).

    With `lengths`, examples of similar length share a batch, so that little is padded: the order is
    cut into windows of up to 32 batches (never more than one pass, or a batch would hold the same
    example twice), each window is sorted by length, and its batches come in random order. The
    lengths are blurred by a tenth first, so that few examples do not always meet the same others.

    >>> lengths = np.array([9, 1, 9, 1, 9, 1, 9, 1])
    >>> batches = Batches(Order(8, seed=0), 2, lengths)
    >>> sorted(lengths[batches[k]].tolist() for k in range(4))
    [[1, 1], [1, 1], [9, 9], [9, 9]]
    """

    def __init__(self, order: Order, size: int, lengths: np.ndarray | None = None):
        self.order, self.size, self.lengths = order, size, lengths
        self.window = max(1, min(32, order.size // size))

    def __getitem__(self, number: int) -> np.ndarray:
        """The examples (int64) of one batch."""
        if self.lengths is None:
            return self.order[number * self.size : (number + 1) * self.size]
        window, place = divmod(number, self.window)
        first = window * self.window * self.size
        examples = self.order[first : first + self.window * self.size]
        generator = numpy_generator(self.order.seed, "window", window)
        blurred = self.lengths[examples] * generator.uniform(0.9, 1.1, len(examples))
        examples = examples[np.argsort(blurred, kind="stable")]
        turn = generator.permutation(self.window)
        return examples[turn[place] * self.size :][: self.size]
