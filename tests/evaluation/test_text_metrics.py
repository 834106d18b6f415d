"""BLEU, chrF and ROUGE by hand and against slow versions."""

import itertools
import math

import pytest

from selfsup.data.labels import Labelled
from selfsup.evaluation.baselines import fit_baseline
from selfsup.evaluation.metrics import METRICS
from selfsup.evaluation.text_baseline import candidates, lead
from selfsup.evaluation.text_metrics import (
    bleu,
    bleu_words,
    chrf,
    longest_common,
    rouge_1,
    rouge_2,
    rouge_l,
    words_of,
)
from selfsup.randomness import numpy_generator

NAMES = ("bleu", "chrf", "rouge_1", "rouge_2", "rouge_l")


@pytest.mark.parametrize("name", NAMES)
def test_one_where_all_is_right_and_nothing_where_nothing_is(name):
    texts = ["the cat sat on the mat", "it rained all day long"]
    assert METRICS[name](texts, texts) == pytest.approx(1.0)
    assert METRICS[name](texts, ["xyz qkw", "vvv zzz"]) == pytest.approx(0.0, abs=0.02)
    assert METRICS[name](texts, ["", ""]) == 0.0


def test_bleu_by_hand():
    # 1 to 4 words: 5/6, 3/5, 1/4, and 0 of 3, which sacrebleu smooths to 1 / (2 * 3)
    right, written = ["the cat sat on the mat"], ["the cat lay on the mat"]
    shares = (5 / 6, 3 / 5, 1 / 4, 1 / 6)
    assert bleu(right, written) == pytest.approx(math.prod(shares) ** 0.25, rel=1e-6)
    # the words are all right, but there are only four of six: brevity penalty
    assert bleu(right, ["the cat sat on"]) == pytest.approx(math.exp(1 - 6 / 4), rel=1e-6)


def test_bleu_counts_chinese_by_characters():
    assert bleu(["他昨天来到了北京。"], ["他昨天来到了上海。"]) > 0.4
    assert bleu_words(["他昨天来到了北京。", "OK"]) == "zh"
    assert bleu_words(["彼は昨日、東京に来ました。"]) == "char"
    assert bleu_words(["彼 は 昨日 、 東京 に 来 た 。"]) == "13a"
    assert bleu_words(["He came to 北京."]) == "13a"


def test_several_right_texts():
    right = [["a b c d e", "v w x y z"], "one two three four five"]
    written = ["v w x y z", "one two three four five"]
    for name in NAMES:
        assert METRICS[name](right, written) == pytest.approx(1.0)
        assert METRICS[name](["a b c d e", right[1]], written) < 0.9


def test_chrf_looks_at_characters():
    assert chrf(["translation"], ["translations"]) > 0.8 > bleu(["translation"], ["translations"])


def test_rouge_by_hand():
    right, written = ["Police killed the gunman."], ["police kill the gunman"]
    assert rouge_1(right, written) == pytest.approx(3 / 4)
    assert rouge_2(right, written) == pytest.approx(1 / 3)
    assert rouge_l(right, written) == pytest.approx(3 / 4)
    assert rouge_l(right, ["the gunman kill police"]) == pytest.approx(2 / 4)
    assert rouge_1(["a a b"], ["a c"]) == pytest.approx(2 * 1 / (3 + 2))
    assert rouge_2(["one"], ["one"]) == 0.0


def test_words():
    assert words_of("Don't\nstop-me_now: 3.5 漢字かな!") == [
        *("don", "t", "stop", "me", "now", "3", "5"), "漢", "字", "か", "な",
    ]  # fmt: skip


def slow_longest_common(a, b):
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, j in itertools.product(range(len(a)), range(len(b))):
        same = a[i] == b[j]
        table[i + 1][j + 1] = table[i][j] + 1 if same else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def test_longest_common_subsequence():
    generator = numpy_generator(0, "words")
    for _ in range(60):
        a, b = (generator.integers(0, 5, generator.integers(0, 80)).tolist() for _ in "ab")
        assert longest_common(a, b) == slow_longest_common(a, b)


def test_texts_must_pair_up():
    for name in NAMES:
        with pytest.raises(ValueError, match="do not pair up"):
            METRICS[name](["a"], ["a", "b"])


# The baseline


def test_baselines_of_generation():
    train = Labelled(
        "generation",
        ["a red house", "two old dogs", "a green tree"],
        ["das ist ein rotes Haus", ["das sind zwei alte Hunde", "zwei Hunde"], "das ist ein Baum"],
        (),
        "toy",
    )
    found = {
        name: predict(["two dogs run fast", "a red tree"]) for name, predict in candidates(train)
    }
    assert found["the source as it is"] == ["two dogs run fast", "a red tree"]
    assert found["the first 5 words"] == ["two dogs run fast", "a red tree"]
    assert found["translation memory"][0] == "das sind zwei alte Hunde"
    assert lead("他来了。今天", 3) == "他来了"
    assert lead("  ", 3) == "  "
    assert fit_baseline(train, train).name == "translation memory"
