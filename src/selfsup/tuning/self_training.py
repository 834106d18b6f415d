"""Self-training: a classifier labels items by itself, and learns from those it is sure of.

Scudder, "Probability of error of some adaptive pattern-recognition machines" (1965); Yarowsky,
"Unsupervised word sense disambiguation rivaling supervised methods" (1995). A classifier is trained
on the labelled examples and says what it thinks of the others; those whose likeliest class reaches
a threshold join the labelled ones as if that were their label, and a new classifier is trained on
all, from the pre-trained encoder again. That is repeated; every round labels all items anew, so an
early error need not stay.

Axes: items.

Deviation: nothing disturbs the student on purpose (Noisy Student, Xie et al. 2020, arXiv
1911.04252): it has the task's dropout and no other noise.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from selfsup.data.labels import Labelled
from selfsup.errors import ConfigError, DataError
from selfsup.objective import Task
from selfsup.tuning.pseudo_labels import confident, with_pseudo_labels, without_labels

Train = Callable[[Labelled, int], Task]
"""Trains a new classifier on examples; the number is that of the round, from 0."""
Score = Callable[[Task, Labelled], Float[np.ndarray, "items classes"]]
"""The logarithm of the probability that a classifier gives to each class of each item."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which items are learned, and how often they are labelled anew."""

    threshold: float = 0.9
    """Least probability of the likeliest class."""
    rounds: int = 3
    """Most classifiers after the first."""
    balanced: bool = True
    """As many of each class as of the class with fewest sure items, the surest of each; False: all
    that are sure."""

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold must be above 0 and at most 1, got {self.threshold}")
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {self.rounds}")


def taken(
    scores: Float[np.ndarray, "items classes"], threshold: float, balanced: bool
) -> Bool[np.ndarray, " items"]:
    """Which items are learned with their likeliest class.

    >>> scores = np.log([[0.99, 0.01], [0.95, 0.05], [0.05, 0.95], [0.6, 0.4]])
    >>> taken(scores, 0.9, True).tolist(), taken(scores, 0.9, False).tolist()
    ([True, False, True, False], [True, True, True, False])
    """
    sure, guess = confident(scores, threshold), scores.argmax(1)
    if not balanced:
        return sure
    count = min(int((sure & (guess == number)).sum()) for number in range(scores.shape[1]))
    chosen = np.zeros(len(scores), dtype=bool)
    for number in range(scores.shape[1]):
        of_class = np.flatnonzero(sure & (guess == number))
        best = np.argsort(-scores[of_class, number], kind="stable")[:count]
        chosen[of_class[best]] = True
    return chosen


def self_train(
    train: Train,
    score: Score,
    labelled: Labelled,
    items: Sequence[Any],
    config: Config,
    truth: Sequence[str] | None = None,
) -> tuple[Task, list[dict[str, Any]]]:
    """The last classifier, and what each round took.

    It ends before `rounds` when a round would learn what the one before learned.

    Args:
        train: makes a classifier; it must not go on from the one before.
        score: says what it thinks of items.
        labelled: examples with labels, always learned.
        items: examples without.
        config: see there.
        truth: the items' labels, where they are known after all: the rounds then say how many
            pseudo labels are right. Nothing is chosen by them.

    Returns:
        the classifier, and for each round `pseudo_labels` (how many), `by_class` and, with
        `truth`, `right` (their share, None where there is none).

    Raises:
        DataError: there is no item.
    """
    if not items:
        raise DataError("self-training needs unlabelled items, and there is none")
    if labelled.task != "classification":
        raise ConfigError(f"self-training is for classification, not for {labelled.task}")
    task, rounds = train(labelled, 0), list[dict[str, Any]]()
    pool = without_labels(items, labelled, labelled.task)
    before: bytes | None = None
    for number in range(1, config.rounds + 1):
        scores = score(task, pool)
        chosen, guess = taken(scores, config.threshold, config.balanced), scores.argmax(1)
        places = np.flatnonzero(chosen)
        rounds.append(_told(labelled, guess, places, truth))
        learned = np.where(chosen, guess, -1).tobytes()
        if not len(places) or learned == before:
            break
        before = learned
        more = [pool.items[place] for place in places]
        task = train(with_pseudo_labels(labelled, more, guess[places]), number)
    return task, rounds


def _told(
    labelled: Labelled, guess: np.ndarray, places: np.ndarray, truth: Sequence[str] | None
) -> dict[str, Any]:
    counts = np.bincount(guess[places], minlength=len(labelled.names)).tolist()
    out: dict[str, Any] = {
        "pseudo_labels": len(places),
        "by_class": dict(zip(labelled.names, counts, strict=True)),
    }
    if truth is not None:
        hits = [labelled.names[guess[place]] == truth[place] for place in places]
        out["right"] = float(np.mean(hits)) if hits else None
    return out
