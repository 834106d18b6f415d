"""What a prediction is worth: metrics as the benchmarks define them, over scikit-learn and SciPy.

`METRICS` holds those that compare truth and prediction and are 1 where all is right. Labels are in
their own form: class names, floats, for tagging one list of tag names per sentence, for questions
one list of right answers each. All give plain floats, and raise ValueError where truth and
prediction do not pair up.
"""

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy

from selfsup.evaluation.span_metrics import answer_f1, exact_match
from selfsup.evaluation.text_metrics import bleu, chrf, rouge_1, rouge_2, rouge_l

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

    from sklearn.metrics import f1_score

    truth, prediction = _flat(truth, prediction)
    return float(f1_score(truth, prediction, average="macro", zero_division=0.0))


def f1_binary(truth: Labels, prediction: Labels, positive: Any = None) -> float:
    """F1 of one class (GLUE: MRPC, QQP).

    Args:
        truth: labels.
        prediction: labels of the same examples.
        positive: the class in question; None: the greater one of those that occur, so "1" of "0"
            and "1".
    """

    from sklearn.metrics import f1_score

    truth, prediction = _flat(truth, prediction)
    if positive is None:
        positive = max({*truth, *prediction})
    found = [t == positive for t in truth], [p == positive for p in prediction]
    return float(f1_score(*found, zero_division=0.0))


def matthews(truth: Labels, prediction: Labels) -> float:
    """Matthews correlation, -1 to 1 (GLUE: CoLA); 0 where one side has a single class."""

    from sklearn.metrics import matthews_corrcoef

    truth, prediction = _flat(truth, prediction)
    if len({*truth}) < 2 or len({*prediction}) < 2:
        return 0.0
    return float(matthews_corrcoef(truth, prediction))


def pearson(truth: Labels, prediction: Labels) -> float:
    """Linear correlation, -1 to 1 (GLUE: STS-B); 0 where one side is constant."""
    truth, prediction = _flat(truth, prediction)
    if len(set(truth)) < 2 or len(set(prediction)) < 2:
        return 0.0
    return float(scipy.stats.pearsonr(truth, prediction).statistic)


def spearman(truth: Labels, prediction: Labels) -> float:
    """Correlation of the ranks, ties sharing their mean rank; 0 where one side is constant."""
    truth, prediction = _flat(truth, prediction)
    if len(set(truth)) < 2 or len(set(prediction)) < 2:
        return 0.0
    return float(scipy.stats.spearmanr(truth, prediction).statistic)


def mean_squared_error(truth: Labels, prediction: Labels) -> float:
    """Mean of the squared differences, in the labels' unit squared.

    >>> mean_squared_error([1.0, 2.0], [1.0, 4.0])
    2.0
    """

    from sklearn import metrics

    truth, prediction = _flat(truth, prediction)
    return float(metrics.mean_squared_error(truth, prediction))


def mean_absolute_error(truth: Labels, prediction: Labels) -> float:
    """Mean of the absolute differences, in the labels' unit.

    >>> mean_absolute_error([1.0, 2.0], [1.0, 4.0])
    1.0
    """

    from sklearn import metrics

    truth, prediction = _flat(truth, prediction)
    return float(metrics.mean_absolute_error(truth, prediction))


def area_under_roc(truth: Labels, scores: Labels, positive: Any = None) -> float:
    """Probability that a positive example scores above a negative one; a tie counts half.

    Args:
        truth: labels of two classes.
        scores: real numbers, the greater the likelier positive.
        positive: the class in question; None: the greater one of those that occur.

    Raises:
        ValueError: only one class occurs, or there are not as many scores as labels.
    """

    from sklearn.metrics import roc_auc_score

    found, scores = _detected(truth, scores, positive)
    return float(roc_auc_score(found, scores))


def average_precision(truth: Labels, scores: Labels, positive: Any = None) -> float:
    """Precision at every threshold, weighted by the recall that it adds; equal scores share one.

    Chance is the share of positives, not 0.5.

    Args:
        truth: labels of two classes.
        scores: real numbers, the greater the likelier positive.
        positive: the class in question; None: the greater one of those that occur.

    Raises:
        ValueError: only one class occurs, or there are not as many scores as labels.
    """

    from sklearn.metrics import average_precision_score

    found, scores = _detected(truth, scores, positive)
    return float(average_precision_score(found, scores))


def _detected(truth: Labels, scores: Labels, positive: Any) -> tuple[list[bool], list[float]]:
    truth, scores = _flat(truth, scores)
    positive = max(truth) if positive is None else positive
    found = [label == positive for label in truth]
    if all(found) or not any(found):
        raise ValueError(
            f"a ranking is judged on examples of two classes, but {sum(found)} of {len(found)} "
            f"labels are {positive!r}"
        )
    return found, scores


def threshold_for(normals: Sequence[float] | np.ndarray, false_alarm_rate: float) -> float:
    """The smallest threshold that at most such a share of normal examples lies above.

    A score strictly above the threshold raises the alarm. With n normals no rate below 1 / n can be
    told from 0, where the threshold is the greatest score.

    Args:
        normals: scores of normal validation examples, the greater the stranger.
        false_alarm_rate: from 0 to 1, where the threshold is minus infinity.

    Raises:
        ValueError: no scores, scores that are not numbers, or a rate outside [0, 1].

    >>> threshold_for([1.0, 2.0, 3.0, 4.0], 0.25)
    3.0
    """
    ordered = np.sort(np.asarray(normals, dtype=np.float64))
    if len(ordered) == 0 or np.isnan(ordered[-1]):  # NaN is sorted last
        raise ValueError(
            f"a threshold needs scores without NaN, got {len(ordered)} scores, "
            f"{np.isnan(ordered).sum()} of them NaN"
        )
    if not 0 <= false_alarm_rate <= 1:
        raise ValueError(f"a false alarm rate lies in [0, 1], got {false_alarm_rate}")
    # compared as shares: 0.29 * 100 is less than 29
    allowed = int(np.sum(np.arange(len(ordered) + 1) / len(ordered) <= false_alarm_rate)) - 1
    return float(ordered[-1 - allowed]) if allowed < len(ordered) else -math.inf


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


def all_right(truth: Labels, prediction: Labels) -> float:
    """Share of equal labels, each list of labels counted as one (SuperGLUE: MultiRC).

    >>> all_right([["1", "0"], ["0"]], [["1", "1"], ["0"]])
    0.5
    """
    _flat(truth, prediction)
    return statistics.fmean(t == p for t, p in zip(truth, prediction, strict=True))


# What chooses a setting takes the greatest value; so neither errors nor metrics of scores are here.
METRICS: dict[str, Callable[..., float]] = {
    "accuracy": accuracy,
    "all_right": all_right,
    "macro_f1": macro_f1,
    "f1": f1_binary,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
    "span_f1": span_f1,
    "bleu": bleu,
    "chrf": chrf,
    "rouge_1": rouge_1,
    "rouge_2": rouge_2,
    "rouge_l": rouge_l,
    "exact_match": exact_match,
    "answer_f1": answer_f1,
}
