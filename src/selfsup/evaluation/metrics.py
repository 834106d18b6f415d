"""What a prediction is worth: metrics as the benchmarks define them, over scikit-learn and SciPy.

`METRICS` holds those that compare truth and prediction. Labels are in their own form: class names,
floats, or for tagging one list of tag names per sentence. All give plain floats, and raise
ValueError where truth and prediction do not pair up.
"""

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import stats
from sklearn import metrics as sklearn_metrics

# How other tagging schemes write inside, end and single; conlleval knows B I E S O.
SCHEMES = {"M": "I", "L": "E", "U": "S"}

Labels = Sequence[Any] | np.ndarray
Span = tuple[str, int, int]
"""Type, first word, last word."""


def _flat(truth: Labels, prediction: Labels) -> tuple[list[Any], list[Any]]:
    """Both as flat lists; lists of tags are joined, sentence by sentence."""
    if len(truth) == 0 or len(truth) != len(prediction):
        raise ValueError(f"{len(truth)} labels and {len(prediction)} predictions do not pair up")
    if not isinstance(truth[0], list | tuple):
        return list(truth), list(prediction)
    for number, (tags, predicted) in enumerate(zip(truth, prediction, strict=True)):
        if len(tags) != len(predicted):
            raise ValueError(
                f"sentence {number}: {len(tags)} tags, but {len(predicted)} predictions"
            )
    return list(itertools.chain(*truth)), list(itertools.chain(*prediction))


def accuracy(truth: Labels, prediction: Labels) -> float:
    """Share of equal labels; tag lists are counted word by word.

    >>> accuracy(["a", "b"], ["a", "a"])
    0.5
    """
    truth, prediction = _flat(truth, prediction)
    return float(np.mean([t == p for t, p in zip(truth, prediction, strict=True)]))


def macro_f1(truth: Labels, prediction: Labels) -> float:
    """Mean of the F1 of every class that occurs in truth or prediction; 0/0 counts as 0."""
    truth, prediction = _flat(truth, prediction)
    return float(sklearn_metrics.f1_score(truth, prediction, average="macro", zero_division=0.0))


def f1_binary(truth: Labels, prediction: Labels, positive: Any = None) -> float:
    """F1 of one class (GLUE: MRPC, QQP).

    Args:
        truth: labels.
        prediction: labels of the same examples.
        positive: the class in question; None: the greater one of those that occur, so "1" of "0"
            and "1".
    """
    truth, prediction = _flat(truth, prediction)
    if positive is None:
        positive = max({*truth, *prediction})
    found = [t == positive for t in truth], [p == positive for p in prediction]
    return float(sklearn_metrics.f1_score(*found, zero_division=0.0))


def matthews(truth: Labels, prediction: Labels) -> float:
    """Matthews correlation, -1 to 1 (GLUE: CoLA); 0 where one side has a single class."""
    truth, prediction = _flat(truth, prediction)
    if len({*truth}) < 2 or len({*prediction}) < 2:
        return 0.0
    return float(sklearn_metrics.matthews_corrcoef(truth, prediction))


def pearson(truth: Labels, prediction: Labels) -> float:
    """Linear correlation, -1 to 1 (GLUE: STS-B); 0 where one side is constant."""
    truth, prediction = _flat(truth, prediction)
    if len(set(truth)) < 2 or len(set(prediction)) < 2:
        return 0.0
    return float(stats.pearsonr(truth, prediction).statistic)


def spearman(truth: Labels, prediction: Labels) -> float:
    """Correlation of the ranks, ties sharing their mean rank; 0 where one side is constant."""
    truth, prediction = _flat(truth, prediction)
    if len(set(truth)) < 2 or len(set(prediction)) < 2:
        return 0.0
    return float(stats.spearmanr(truth, prediction).statistic)


def spans(tags: Sequence[str]) -> set[Span]:
    """The entities that a sentence's tags mark, by the rules of conlleval.

    A tag is O, or a scheme letter, with a type (B-PER) or without. B I, B I E S, B M E S and
    B I L U are read. An inside tag without a beginning, or with another type than the one before
    it, begins an entity. The empty string, for a word that was not predicted, is outside.

    >>> sorted(spans(["B-PER", "I-PER", "O", "I-LOC"]))
    [('LOC', 3, 3), ('PER', 0, 1)]

    Raises:
        ValueError: a tag of another form.
    """
    found: set[Span] = set()
    previous, kind, start = "O", "", 0
    for place, tag in enumerate([*tags, "O"]):
        letter, _, new_kind = (tag or "O").partition("-")
        letter = SCHEMES.get(letter, letter)
        if letter not in ("B", "I", "E", "S", "O"):
            raise ValueError(f"tag {tag!r} marks no span; expected O, or B-TYPE, I-TYPE, ...")
        begins = letter in ("B", "S") or previous in ("O", "E", "S") or new_kind != kind
        if previous != "O" and (letter == "O" or begins):
            found.add((kind, start, place - 1))
        if letter != "O" and begins:
            start = place
        previous, kind = letter, new_kind
    return found


def span_f1(truth: Labels, prediction: Labels) -> float:
    """Entity F1 over all sentences, as conlleval: type and both ends must be right; 0/0 is 0.

    Args:
        truth: one list of tags per sentence, as `spans` reads them.
        prediction: as many tags per sentence.
    """
    _flat(truth, prediction)
    right = expected = given = 0
    for tags, predicted in zip(truth, prediction, strict=True):
        true_spans, predicted_spans = spans(tags), spans(predicted)
        right += len(true_spans & predicted_spans)
        expected += len(true_spans)
        given += len(predicted_spans)
    return 2 * right / (expected + given) if right else 0.0


def perplexity(log_probabilities: Sequence[float]) -> float:
    """exp of the mean negative log-probability (nats) of the scored tokens.

    >>> round(perplexity([math.log(0.25), math.log(0.25)]), 6)
    4.0
    """
    return math.exp(-statistics.fmean(log_probabilities))


METRICS: dict[str, Callable[[Labels, Labels], float]] = {
    "accuracy": accuracy,
    "macro_f1": macro_f1,
    "f1": f1_binary,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
    "span_f1": span_f1,
}
