"""Similar features: neighbours, retrieval, verification and diagnostics on plain arrays.

Everything here takes features that an encoder has already given, so it knows no model and no file.

| question                                       | function                                        |
|------------------------------------------------|-------------------------------------------------|
| is a class a neighbourhood?                    | `knn_accuracy`, `recall_at_k`,                  |
|                                                | `mean_average_precision`                        |
| do two recordings share a speaker?             | `trial_pairs`, `cosine_scores`,                 |
|                                                | `equal_error_rate`                              |
| are the features spread out, or collapsed?     | `alignment`, `uniformity`, `code_perplexity`    |

Arrays may be NumPy's or torch's; work is done where the tensors are, and all-pairs similarities
are held a few rows at a time, but for `uniformity`, which is made for batches. What has to be
learned from the features is in `probes.py`.

Axes: items; dim: width of a feature; codes; pairs.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from selfsup.errors import DataError
from selfsup.evaluation.features import Array, as_features, labelled_features
from selfsup.methods.ops import alignment as alignment
from selfsup.methods.ops import uniformity as uniformity

SIMILARITIES = 2**22  # of all pairs, so many are held at once: some 200 MB with their ranks


def _unit(values: Array) -> Float[Tensor, "items dim"]:
    return F.normalize(as_features(values), dim=1)


def _similarities(
    queries: Float[Tensor, "items dim"], bank: Float[Tensor, "bank dim"] | None = None
) -> Iterator[tuple[int, Float[Tensor, "rows bank"]]]:
    """Dot products a few rows at a time, each with the number of its first row.

    Without a bank the queries are held against each other, and an item's similarity to itself is
    minus infinity.
    """
    others = queries if bank is None else bank
    rows = max(1, SIMILARITIES // len(others))
    for first in range(0, len(queries), rows):
        similarity = queries[first : first + rows] @ others.T  # (rows, bank)
        if bank is None:
            similarity.diagonal(first).fill_(-torch.inf)
        yield first, similarity


# Neighbours


def knn_predict(
    bank: Float[Array, "bank dim"],
    bank_labels: Int[Array, " bank"],
    queries: Float[Array, "items dim"],
    k: int = 20,
    temperature: float = 0.1,
    num_classes: int | None = None,
) -> Int[np.ndarray, " items"]:
    """Class numbers by a vote of the nearest items, weighted by exp(cosine / temperature).

    Wu et al. 2018 (arXiv 1805.01978), section 3.4, with k = 200 and temperature 0.07 for ImageNet's
    1,300 pictures of a class. k should stay well below the size of a class: beyond it, other
    classes vote however good the features are. Hence 20 here, and a temperature that trusts so few
    neighbours a little more evenly.

    Args:
        bank: features of known items.
        bank_labels: their class numbers, from 0.
        queries: features of the items to be classified.
        k: neighbours that vote; the whole bank where it is smaller.
        temperature: of the weights.
        num_classes: None: the greatest number in `bank_labels`, plus one.

    Returns:
        the class with the most votes; of equal ones the lowest number.
    """
    known, labels = labelled_features(bank, bank_labels)
    known, labels = F.normalize(known, dim=1), labels.long()
    num_classes = num_classes or int(labels.max()) + 1
    guesses = []
    for _, similarity in _similarities(_unit(queries).to(known.device), known):
        near = similarity.topk(min(k, len(known)), dim=1)
        # relative to the nearest: exp of 1 / temperature need not be a finite number
        weight = ((near.values - near.values[:, :1]) / temperature).exp()
        votes = weight.new_zeros(len(weight), num_classes)
        guesses.append(votes.scatter_add_(1, labels[near.indices], weight).argmax(1))
    return torch.cat(guesses).cpu().numpy()


def knn_accuracy(
    bank: Float[Array, "bank dim"],
    bank_labels: Int[Array, " bank"],
    queries: Float[Array, "items dim"],
    labels: Int[Array, " items"],
    k: int = 20,
    temperature: float = 0.1,
) -> float:
    """Share of queries whose class `knn_predict` finds."""
    asked, truth = labelled_features(queries, labels)
    guess = knn_predict(bank, bank_labels, asked, k, temperature)
    return float(np.mean(guess == truth.cpu().numpy()))


def nearest_neighbours(features: Float[Array, "items dim"], k: int) -> Int[np.ndarray, "items k"]:
    """Numbers of the k items of the greatest cosine, nearest first, never the item itself.

    There are fewer than k columns where there are not k other items.
    """
    x = _unit(features)
    k = min(k, len(x) - 1)
    near = [similarity.topk(k, dim=1).indices for _, similarity in _similarities(x)]
    return torch.cat(near).cpu().numpy()


def _relevant(
    features: Array, labels: Array
) -> Iterator[tuple[Float[Tensor, "rows items"], Bool[Tensor, "rows items"]]]:
    """Similarities of rows that have another item of their class, and which items those are."""
    x, classes = labelled_features(features, labels)
    x = F.normalize(x, dim=1)
    if len(classes.unique()) == len(classes):
        raise DataError(
            f"none of the {len(classes)} items shares its label with another one: there is nothing "
            "to retrieve; give at least two items of some class"
        )
    for first, similarity in _similarities(x):
        same = classes[first : first + len(similarity), None] == classes  # (rows, items)
        same.diagonal(first).fill_(False)
        keep = same.any(1)
        yield similarity[keep], same[keep]


def recall_at_k(
    features: Float[Array, "items dim"],
    labels: Int[Array, " items"],
    ks: Sequence[int] = (1, 5, 10),
) -> dict[int, float]:
    """Share of items that have one of their class among their k nearest others by cosine.

    An equally near item of another class counts as nearer, so that collapsed features score 0
    whatever the order of the items. Items that are alone in their class ask for nothing and are
    left out.

    Returns:
        recall by k (Jégou et al. 2011, "Product quantization for nearest neighbor search").

    Raises:
        DataError: no two items share a label.
    """
    nearer = []
    for similarity, same in _relevant(features, labels):
        best = similarity.masked_fill(~same, -torch.inf).amax(1, keepdim=True)
        nearer.append(((similarity >= best) & ~same).sum(1))
    before = torch.cat(nearer)  # (queries,) items of other classes ahead of the first right one
    return {k: float((before < k).double().mean()) for k in ks}


def mean_average_precision(
    features: Float[Array, "items dim"], labels: Int[Array, " items"]
) -> float:
    """Mean over items of the average precision of all others, ranked by cosine.

    Equally near items share the last of their ranks, as in `metrics.average_precision`. Items that
    are alone in their class are left out. Takes a sort of all pairs: seconds for 10,000 items.

    Raises:
        DataError: no two items share a label.
    """
    precisions = []
    for similarity, same in _relevant(features, labels):
        ordered, order = similarity.sort(dim=1, descending=True)
        hits = same.gather(1, order)
        count = ordered.shape[1]
        rank = torch.arange(count, device=ordered.device)
        changes = F.pad(ordered[:, 1:] != ordered[:, :-1], (0, 1), value=True)
        last_tied = torch.where(changes, rank, count).flip(1).cummin(1).values.flip(1)
        precision = hits.cumsum(1).gather(1, last_tied).double() / (last_tied + 1)
        precisions.append((precision * hits).sum(1) / hits.sum(1))
    return float(torch.cat(precisions).mean())


# Verification


def trial_pairs(
    labels: Int[Array, " items"],
    count: int,
    generator: np.random.Generator,
    groups: Int[Array, " items"] | None = None,
) -> tuple[Int[np.ndarray, "pairs 2"], Bool[np.ndarray, " pairs"]]:
    """Pairs of items for verification, half of the same label, half of different ones.

    No pair comes twice. The items stand in a random circle, and each is paired with its next
    neighbour, its second next and so on until there are enough: so every item takes part about
    equally often.

    Args:
        labels: whom an item is of, say speakers.
        count: pairs in all; of an odd number one more is of different labels.
        generator: decides the circle and the order.
        groups: what the items of a pair must not share, of the same label or not: say the digit
            that is spoken, lest a pair be told by its words.

    Returns:
        item numbers, and whether a pair shares its label.

    Raises:
        DataError: there are not so many pairs.
    """
    who = np.asarray(labels)
    wanted = {True: count // 2, False: count - count // 2}
    found: dict[bool, list[np.ndarray]] = {True: [], False: []}
    have = {True: 0, False: 0}
    circle = generator.permutation(len(who))
    for step in range(1, len(who) // 2 + 1):
        # half a turn of an even circle meets every pair twice
        once = len(who) // 2 if 2 * step == len(who) else len(who)
        pairs = np.stack([circle, np.roll(circle, -step)], axis=1)[:once]
        if groups is not None:
            of_group = np.asarray(groups)[pairs]
            pairs = pairs[of_group[:, 0] != of_group[:, 1]]
        same = who[pairs[:, 0]] == who[pairs[:, 1]]
        for kind in (True, False):
            found[kind].append(pairs[same == kind][: wanted[kind] - have[kind]])
            have[kind] += len(found[kind][-1])
        if have == wanted:
            break
    if have != wanted:
        raise DataError(
            f"of {len(who)} items {have[True]} pairs of the same label and {have[False]} of "
            f"different ones can be made, but {wanted[True]} and {wanted[False]} are asked for; "
            "ask for fewer pairs"
        )
    pairs = np.concatenate([*found[True], *found[False]])
    order = generator.permutation(count)
    return pairs[order], (np.arange(count) < wanted[True])[order]


def cosine_scores(
    features: Float[Array, "items dim"], pairs: Int[np.ndarray, "pairs 2"]
) -> Float[np.ndarray, " pairs"]:
    """Cosine of the two items of every pair."""
    x = _unit(features)
    first, second = torch.from_numpy(np.array(pairs, dtype=np.int64)).to(x.device).unbind(1)
    return (x[first] * x[second]).sum(1).cpu().numpy()


def equal_error_rate(
    scores: Float[np.ndarray, " pairs"], same: Bool[np.ndarray, " pairs"]
) -> tuple[float, float]:
    """The error rate at which as many impostors are accepted as true pairs are rejected.

    A pair is accepted where its score reaches the threshold. Between two thresholds the error rates
    lie on the straight line that joins them, as under the area of a ROC curve, so that equal scores
    are worth 0.5 whatever their order.

    Returns:
        the rate, 0 to 1, and the score at which both error rates come closest to each other.

    Raises:
        DataError: pairs of only one kind, or scores that are not numbers.
    """
    scores, same = np.asarray(scores), np.asarray(same, dtype=bool)
    if same.all() or not same.any() or np.isnan(scores).any():
        raise DataError(
            f"an equal error rate needs pairs of both kinds and scores that are numbers, got "
            f"{same.sum()} same and {(~same).sum()} different pairs, {np.isnan(scores).sum()} "
            "without a score"
        )
    order = np.argsort(-scores, kind="stable")
    ordered, true = scores[order], same[order]
    last_tied = np.append(ordered[1:] != ordered[:-1], True)
    accepted = np.append(0, np.cumsum(true)[last_tied])
    impostors = np.append(0, np.cumsum(~true)[last_tied])
    # in whole numbers, since the two rates may meet exactly: impostors / n - rejected / m, times nm
    gap = impostors * accepted[-1] - (accepted[-1] - accepted) * impostors[-1]
    after = int(np.argmax(gap >= 0))
    share = -gap[after - 1] / (gap[after] - gap[after - 1])
    between = impostors[after - 1] + share * (impostors[after] - impostors[after - 1])
    # the first place accepts nothing: it is no score
    closest = int(np.argmin(np.abs(gap[1:])))
    return float(between / impostors[-1]), float(ordered[last_tied][closest])


# Diagnostics


@torch.no_grad()
def code_perplexity(counts: Int[Tensor, "*groups codes"]) -> Float[Tensor, "*groups"]:
    """exp of the entropy of how often each code is used: 1 (one code) to codes (all alike)."""
    share = counts.float() / counts.sum(-1, keepdim=True).clamp(min=1)
    return torch.special.entr(share).sum(-1).exp()
