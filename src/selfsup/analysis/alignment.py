"""Cross-lingual alignment: does a sentence lie close to its translation, layer by layer?

Every item of one language looks for its translation among all items of the other, by the cosine
of their vectors. A multilingual encoder puts each language into a region of its own; without the
mean of its language a vector loses most of that (Libovický, Rosa and Fraser 2019, "How
Language-Neutral is Multilingual BERT?", arXiv 1911.03310), and what is left shows whether meanings
agree. Sentences and single words are read alike.

Axes: queries, targets: different items of the two languages; layers: the embedding first.

Deviation: the mean of a language is taken over the items at hand, not over another corpus.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

SIMILARITIES = 2**22  # of all pairs, so many are held at once


class Pairs(NamedTuple):
    """Translation pairs as numbers of different items.

    Attributes:
        first, second: the different items of each language, in the order of their first pair.
        numbers: (pairs, 2) int64, an item of `first` and one of `second`.
    """

    first: list[str]
    second: list[str]
    numbers: Int[np.ndarray, "pairs 2"]


class Retrieval(NamedTuple):
    """How well translations are found.

    Attributes:
        mrr: mean over queries of 1 / rank of the nearest right target.
        precision: share of queries whose nearest target is right (precision at 1).
    """

    mrr: float
    precision: float


def unique_pairs(pairs: Sequence[tuple[str, str]]) -> Pairs:
    """Different items and who translates whom: an item with two translations has two right answers.

    >>> unique_pairs([("dog", "狗"), ("hound", "狗"), ("dog", "犬")]).numbers.tolist()
    [[0, 0], [1, 0], [0, 1]]
    """
    first, second = (dict.fromkeys(side) for side in zip(*pairs, strict=True))
    places = [{text: i for i, text in enumerate(side)} for side in (first, second)]
    numbers = {(places[0][a], places[1][b]): None for a, b in pairs}
    return Pairs(list(first), list(second), np.array(list(numbers), dtype=np.int64))


def centred(vectors: Float[Tensor, "items dim"]) -> Float[Tensor, "items dim"]:
    """The vectors without the mean of their language."""
    return vectors - vectors.mean(0)


def retrieval(
    queries: Float[Tensor, "queries dim"],
    targets: Float[Tensor, "targets dim"],
    pairs: Int[np.ndarray, "pairs 2"],
) -> Retrieval:
    """Looks for each query's translation among all targets, by cosine.

    The rank of a query is one more than the number of wrong targets that are as near as its nearest
    right one or nearer: with equal vectors everywhere nothing is found.

    Args:
        queries: vectors of the items that ask.
        targets: vectors of the items that are looked through.
        pairs: (query, target) that translate each other; every query is in one at least.
    """
    unit, others = F.normalize(queries.double(), dim=1), F.normalize(targets.double(), dim=1)
    right = torch.zeros(len(queries), len(targets), dtype=torch.bool)
    right[pairs[:, 0], pairs[:, 1]] = True
    rows = max(1, SIMILARITIES // len(targets))
    ranks = torch.cat(
        [
            _ranks(unit[first : first + rows] @ others.T, right[first : first + rows])
            for first in range(0, len(queries), rows)
        ]
    )
    return Retrieval(float((1 / ranks.double()).mean()), float((ranks == 1).double().mean()))


def chance(count: int) -> float:
    """The mean of 1 / rank in random order, with one right target of `count`: about ln(n) / n.

    >>> chance(2)
    0.75
    """
    return sum(1 / rank for rank in range(1, count + 1)) / count


def _ranks(
    similarity: Float[Tensor, "rows targets"], right: Bool[Tensor, "rows targets"]
) -> Int[Tensor, " rows"]:
    best = similarity.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    return 1 + ((similarity >= best) & ~right).sum(1)


def both_ways(
    first: Float[Tensor, "first dim"],
    second: Float[Tensor, "second dim"],
    pairs: Int[np.ndarray, "pairs 2"],
) -> dict[str, float]:
    """`mrr` and `precision` from the first language to the second, and `..._back`; and as centred.

    Returns:
        mrr, mrr_back, precision, precision_back, and the same names with `centred_` before them.
    """
    out = {}
    for prefix, a, b in (("", first, second), ("centred_", centred(first), centred(second))):
        for suffix, found in (
            ("", retrieval(a, b, pairs)),
            ("_back", retrieval(b, a, pairs[:, ::-1])),
        ):
            out[f"{prefix}mrr{suffix}"] = found.mrr
            out[f"{prefix}precision{suffix}"] = found.precision
    return out


def by_layer(
    first: Float[Tensor, "first layers dim"],
    second: Float[Tensor, "second layers dim"],
    pairs: Int[np.ndarray, "pairs 2"],
) -> list[dict[str, float]]:
    """`both_ways` of every layer, the embedding first."""
    return [both_ways(a, b, pairs) for a, b in zip(first.unbind(1), second.unbind(1), strict=True)]


def shared_tokens(
    first: Sequence[Int[np.ndarray, " tokens"]], second: Sequence[Int[np.ndarray, " tokens"]]
) -> tuple[Float[Tensor, "first shared"], Float[Tensor, "second shared"]]:
    """Bags of the tokens that occur in both languages: numbers, names, foreign words.

    What an encoder finds beyond them, it has not read off the surface. Counts are weighted by
    log(items / items that hold the token).

    Args:
        first, second: token ids of every item, without special ones.

    Returns:
        (items, tokens in both languages) of each; with no such token one column of zeros.
    """
    both = np.intersect1d(np.concatenate(first), np.concatenate(second))
    bags = []
    for side in (first, second):
        counts = torch.zeros(len(side), max(1, len(both)))
        for row, ids in enumerate(side):
            known = ids[np.isin(ids, both)]
            counts[row] += torch.from_numpy(
                np.bincount(np.searchsorted(both, known), minlength=counts.shape[1])
            )
        bags.append(counts)
    holding = sum((bag > 0).sum(0) for bag in bags)
    weight = ((len(first) + len(second)) / torch.as_tensor(holding).clamp(min=1)).log()
    return bags[0] * weight, bags[1] * weight
