import math

import numpy as np
import pytest

from selfsup.evaluation.metrics import (
    METRICS,
    accuracy,
    area_under_roc,
    average_precision,
    f1_binary,
    macro_f1,
    matthews,
    mean_absolute_error,
    mean_squared_error,
    pearson,
    perplexity,
    span_f1,
    spans,
    spearman,
    threshold_for,
)
from selfsup.randomness import numpy_generator

TRUTH = ["1", "1", "1", "0", "0", "0", "0", "0"]
GUESS = ["1", "1", "0", "1", "0", "0", "0", "0"]  # 2 true positives, 1 missed, 1 false, 4 right


def test_accuracy_by_hand():
    assert accuracy(TRUTH, GUESS) == 6 / 8
    assert accuracy([["A", "B"], ["C"]], [["A", "A"], ["C"]]) == pytest.approx(2 / 3)
    assert accuracy([1, 2], np.array([1, 3])) == 0.5


def test_f1_by_hand():
    positive, negative = 2 * 2 / (2 * 2 + 1 + 1), 2 * 4 / (2 * 4 + 1 + 1)
    assert f1_binary(TRUTH, GUESS) == pytest.approx(positive)
    assert f1_binary(TRUTH, GUESS, positive="0") == pytest.approx(negative)
    assert macro_f1(TRUTH, GUESS) == pytest.approx((positive + negative) / 2)
    assert f1_binary(["0", "1"], ["0", "0"]) == 0.0
    assert macro_f1(["a", "b"], ["a", "a"]) == pytest.approx((2 / 3 + 0) / 2)


def test_matthews_by_hand():
    tp, fn, fp, tn = 2, 1, 1, 4
    expected = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert matthews(TRUTH, GUESS) == pytest.approx(expected)
    assert matthews(TRUTH, TRUTH) == pytest.approx(1.0)
    assert matthews(TRUTH, ["0"] * 8) == 0.0
    assert matthews(["0"] * 2, ["0"] * 2) == 0.0


def test_correlations_by_hand():
    truth, guess = [1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 5.0]
    x = [t - 2.5 for t in truth]
    y = [g - 2.75 for g in guess]
    covariance = sum(a * b for a, b in zip(x, y, strict=True))
    norm = math.sqrt(sum(a * a for a in x) * sum(b * b for b in y))
    assert pearson(truth, guess) == pytest.approx(covariance / norm)
    assert spearman(truth, guess) == pytest.approx(1 - 6 * 2 / (4 * 15))  # 1 - 6 sum d^2 / n(n^2-1)
    # ties share a rank: 1, 2.5, 2.5, 4 against 1, 2, 3, 4
    tied = spearman([0.0, 1.0, 1.0, 2.0], truth)
    assert tied == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    for correlation in (pearson, spearman):
        assert correlation(truth, [3.0] * 4) == 0.0
        assert correlation([3.0] * 4, truth) == 0.0


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O B-X I-X O", {("X", 1, 2)}),
        ("B-X B-X", {("X", 0, 0), ("X", 1, 1)}),
        ("I-X I-X O I-X", {("X", 0, 1), ("X", 3, 3)}),  # IOB1
        ("B-X I-Y I-Y", {("X", 0, 0), ("Y", 1, 2)}),  # another type begins anew
        ("B-X M-X E-X S-X", {("X", 0, 2), ("X", 3, 3)}),  # BMES
        ("B-X L-X U-Y", {("X", 0, 1), ("Y", 2, 2)}),  # BILOU
        ("B-X E-X E-X I-X", {("X", 0, 1), ("X", 2, 2), ("X", 3, 3)}),
        ("S-X I-X", {("X", 0, 0), ("X", 1, 1)}),
        ("B-X-Y I-X-Y", {("X-Y", 0, 1)}),
        ("B M E S", {("", 0, 2), ("", 3, 3)}),  # word segmentation
        ("O O", set()),
    ],
)
def test_spans(tags, expected):
    assert spans(tags.split()) == expected


def conlleval_spans(tags):
    """The rules of conlleval as its tables of tag pairs, apart from the code under test."""
    ends = {"BB", "BO", "BS", "IB", "IO", "IS", "EE", "EI", "EO", "EB", "ES"}
    ends |= {"SE", "SI", "SO", "SB", "SS"}
    begins = {"BB", "IB", "OB", "SB", "EB", "OI", "OE", "EE", "EI", "SE", "SI"}
    begins |= {"OS", "BS", "IS", "ES", "SS"}
    found, start = [], None
    previous = ("O", "")
    for place, tag in enumerate([*tags, "O"]):
        current = (tag[0], tag[2:])
        pair, differ = previous[0] + current[0], previous[1] != current[1]
        if start is not None and (pair in ends or (previous[0] != "O" and differ)):
            found.append((previous[1], start, place - 1))
            start = None
        if pair in begins or (current[0] != "O" and differ):
            start = place
        previous = current
    return set(found)


def test_spans_follow_conlleval_on_any_tags():
    generator = numpy_generator(0, "tags")
    kinds = ["O", *[f"{letter}-{kind}" for letter in "BIES" for kind in "XY"]]
    for _ in range(300):
        tags = [kinds[i] for i in generator.integers(0, len(kinds), 8)]
        assert spans(tags) == conlleval_spans(tags), tags


def test_span_f1_by_hand():
    truth = [["B-X", "I-X", "O"], ["B-Y", "O"], ["O"]]
    guess = [["B-X", "I-X", "B-X"], ["B-X", ""], ["O"]]  # 1 right of 3 given, 2 expected
    assert span_f1(truth, guess) == pytest.approx(2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2))
    assert span_f1(truth, truth) == 1.0
    assert span_f1([["O"]], [["O"]]) == 0.0
    with pytest.raises(ValueError, match="'NOUN' marks no span"):
        span_f1([["NOUN"]], [["O"]])


OF_TEXTS = ("exact_match", "answer_f1", "bleu", "chrf", "rouge_1", "rouge_2", "rouge_l")
OF_LABELS = {name: metric for name, metric in METRICS.items() if name not in OF_TEXTS}


def test_metrics_refuse_unequal_lengths():
    for name, metric in OF_LABELS.items():
        if name not in ("pearson", "spearman"):
            with pytest.raises(ValueError, match="sentence 0: 2 tags, but 1 predictions"):
                metric([["O", "O"]], [["O"]])
        with pytest.raises(ValueError, match="2 labels and 3 predictions do not pair up"):
            metric([1.0, 2.0], [1.0, 2.0, 3.0])


def test_metrics_give_plain_floats():
    for name, metric in OF_LABELS.items():
        values = [["B-X"], ["O"]] if name == "span_f1" else [0.0, 1.0]
        assert type(metric(values, values)) is float
        assert metric(values, values) == pytest.approx(1.0)


def test_perplexity():
    assert perplexity([math.log(0.5), math.log(0.125)]) == pytest.approx(4.0)


def test_errors_by_hand():
    assert mean_squared_error([1.0, 2.0, 4.0], [1.0, 4.0, 1.0]) == pytest.approx((4 + 9) / 3)
    assert mean_absolute_error([1.0, 2.0, 4.0], [1.0, 4.0, 1.0]) == pytest.approx(5 / 3)
    for error in (mean_squared_error, mean_absolute_error):
        assert type(error([1, 2], np.array([1, 2]))) is float
        assert error([1.0, 2.0], [1.0, 2.0]) == 0.0
        with pytest.raises(ValueError, match="2 labels and 1 predictions do not pair up"):
            error([1.0, 2.0], [1.0])


def test_nothing_in_metrics_is_better_when_smaller():
    """A sweep takes the greatest value of these, so being right must beat being wrong."""
    for name, metric in OF_LABELS.items():
        truth = [["B-X", "O"], ["O", "O"]] if name == "span_f1" else [0.0, 1.0, 1.0]
        wrong = [["O", "O"], ["B-X", "O"]] if name == "span_f1" else [1.0, 0.0, 1.0]
        assert metric(truth, truth) > metric(truth, wrong)


def test_metrics_of_texts_compare_each_with_its_right_ones():
    texts = ["one two three four", "five six seven eight"]
    for name in OF_TEXTS:
        metric, truth = METRICS[name], [[text] for text in texts]
        assert type(metric(truth, texts)) is float
        assert metric(truth, texts) == pytest.approx(1.0)
        assert metric(truth, ["one two three four", "nine"]) < 1.0
        with pytest.raises(ValueError, match=r"2 .* and 1 .* do not pair up"):
            metric(truth, texts[:1])


def slow_area_under_roc(positives, negatives):
    wins = sum((p > n) + (p == n) / 2 for p in positives for n in negatives)
    return wins / (len(positives) * len(negatives))


def slow_average_precision(positives, negatives):
    total, before = 0.0, 0.0
    for threshold in sorted({*positives, *negatives}, reverse=True):
        right = sum(p >= threshold for p in positives)
        recall = right / len(positives)
        total += (recall - before) * right / (right + sum(n >= threshold for n in negatives))
        before = recall
    return total


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_metrics_of_scores_count_every_pair(levels):
    generator = numpy_generator(0, "scores", levels)
    for _ in range(20):
        truth = generator.integers(0, 2, 25)
        truth[:2] = 0, 1
        scores = (generator.integers(0, levels, 25) + truth * levels // 3).astype(float)
        sides = scores[truth == 1].tolist(), scores[truth == 0].tolist()
        assert area_under_roc(truth, scores) == pytest.approx(slow_area_under_roc(*sides))
        assert average_precision(truth, scores) == pytest.approx(slow_average_precision(*sides))


def test_metrics_of_scores_by_hand():
    names, scores = ["ok", "broken", "ok", "broken"], [0.1, 0.9, 0.4, 0.3]
    assert area_under_roc(names, scores, positive="broken") == 3 / 4
    assert area_under_roc(names, scores) == 1 / 4  # "ok" is the greater name
    assert average_precision(names, scores, positive="broken") == pytest.approx((1 + 2 / 3) / 2)
    constant = [0.5] * 4
    assert area_under_roc(names, constant) == 0.5
    assert average_precision(names[:3], constant[:3], positive="broken") == pytest.approx(1 / 3)
    for metric in (area_under_roc, average_precision):
        assert type(metric([0, 1], [0.0, 1.0])) is float
        with pytest.raises(ValueError, match="two classes, but 3 of 3 labels are 'ok'"):
            metric(["ok"] * 3, [0.1, 0.2, 0.3])
        with pytest.raises(ValueError, match="two classes, but 0 of 2 labels are 'gone'"):
            metric(["ok", "bad"], [0.1, 0.2], positive="gone")
        with pytest.raises(ValueError, match="2 labels and 3 predictions do not pair up"):
            metric([0, 1], [0.1, 0.2, 0.3])


def test_threshold_is_the_smallest_that_keeps_the_rate():
    generator = numpy_generator(0, "normals")
    for levels in (3, 1000):  # with ties and without
        normals = generator.integers(0, levels, 100).astype(float)
        for rate in (0.0, 0.005, 0.01, 0.07, 0.29, 0.5, 0.99):
            threshold = threshold_for(normals, rate)
            assert sum(normals > threshold) / 100 <= rate
            smaller = [n for n in (*normals, -1.0) if n < threshold]
            assert all(sum(normals > n) / 100 > rate for n in smaller)
    assert threshold_for(np.arange(100.0), 0.29) == 70.0  # 0.29 * 100 is 28.999999999999996
    assert threshold_for([3.0, 1.0, 2.0], 0.0) == 3.0
    assert threshold_for([3.0, 1.0, 2.0], 1.0) == -math.inf
    assert threshold_for([5.0], 0.5) == 5.0


def test_threshold_refuses_what_it_cannot_use():
    with pytest.raises(ValueError, match="got 0 scores"):
        threshold_for([], 0.1)
    with pytest.raises(ValueError, match="got 2 scores, 1 of them NaN"):
        threshold_for([math.nan, 1.0], 0.1)
    with pytest.raises(ValueError, match=r"lies in \[0, 1\], got 5"):
        threshold_for([1.0], 5)
