import pytest

from selfsup.data.labels import Labelled
from selfsup.data.span_files import NO_ANSWER, Answer
from selfsup.evaluation.baselines import fit_baseline
from selfsup.evaluation.metrics import METRICS
from selfsup.evaluation.span_baseline import answer_by_overlap, candidates
from selfsup.evaluation.span_metrics import answer_f1, answer_words, exact_match


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The  Denver\tBroncos.", ["denver", "broncos"]),
        ("a b, an c; the d", ["b", "c", "d"]),
        ("Theatre another", ["theatre", "another"]),  # articles are whole words
        ("it's 3.5%", ["its", "35"]),  # punctuation goes without leaving a space
        ("the", []),
        ("U.S.-based", ["usbased"]),
        ("1990–1995", ["1990–1995"]),  # the script knows ASCII punctuation only
        ("Zoë", ["zoë"]),
        (
            "《战国无双3》是由光荣和ω-force开发的",
            [*"战国无双", "3", *"是由光荣和", "ωforce", *"开发的"],
        ),
        ("1990年–1995年", ["1990", "年", "1995", "年"]),
        ("中 国", ["中", "国"]),
        ("維生素 A，", [*"維生素", "a"]),  # no article there
        ("“ありがとう”", list("ありがとう")),
        ("", []),
    ],
)
def test_words_that_answers_are_compared_by(text, words):
    assert answer_words(text) == words


@pytest.mark.parametrize(
    ("right", "given", "exact", "f1"),
    [
        (["Denver Broncos"], "the Denver Broncos!", 1, 1),
        (["Denver Broncos"], "Broncos Denver", 0, 1),
        (["Denver Broncos"], "Denver", 0, 2 / 3),
        (["Denver Broncos"], "Carolina", 0, 0),
        # common words count as often as in both: "to to be" and "to be or" share two
        (["to to be"], "to be or", 0, 2 / 3),
        # the nearest of several
        (["Levi's Stadium", "Stadium in the Bay Area", "Santa Clara"], "the stadium", 0, 2 / 3),
        (["Santa Clara", "santa clara california"], "Santa Clara, California", 1, 1),
        # no answer
        ([], "", 1, 1),
        ([], "Denver", 0, 0),
        (["Denver"], "", 0, 0),
        ([], "the", 1, 1),  # no word is left
        (["the", "Denver"], "", 0, 0),  # "the" counts only where there is nothing else
        # Chinese by character: 4 of 5, 4 of 4
        (["光荣和特库"], "光荣和特", 0, 8 / 9),
        (["2009年12月3日"], "2009 年 12 月 3 日", 1, 1),
        (["光荣"], "荣光", 0, 1),
    ],
)
def test_worked_examples(right, given, exact, f1):
    assert exact_match([right], [given]) == exact
    assert answer_f1([right], [given]) == pytest.approx(f1)
    placed = [Answer(text, 7) for text in right]
    assert answer_f1([placed], [given]) == pytest.approx(f1)


def test_all_questions_count_equally():
    truth = [["a b c d"], ["x", "y"], []]
    guess = ["b", "z", ""]
    assert METRICS["exact_match"](truth, guess) == pytest.approx(1 / 3)
    assert METRICS["answer_f1"](truth, guess) == pytest.approx((2 * 1 / 4 + 0 + 1) / 3)
    with pytest.raises(ValueError, match="1 questions and 2 answers"):
        exact_match([["a"]], ["a", "b"])
    with pytest.raises(ValueError, match="0 questions"):
        answer_f1([], [])


# The baseline

RIVER = "The town is old. The river Rhine runs north. Ann Lee lives in Basel, near the river."


@pytest.mark.parametrize(
    ("question", "context", "length", "answer"),
    [
        ("Where does Ann live in?", RIVER, 1, "Lee"),  # between the words of the question
        ("Which river runs north?", RIVER, 1, "Rhine"),
        ("Zzz?", "One two. Three", 2, "One two"),  # nothing in common: the first span
        ("谁写了这本书？", "天很蓝。这本书是王明写了的。", 3, "是王明"),
        ("Who?", "!!!", 1, "!!!"),
        ("What is old?", "It is old.", 9, "It is old"),
    ],
)
def test_the_span_nearest_to_the_words_of_the_question(question, context, length, answer):
    assert answer_by_overlap(question, context, length) == answer


def toy(labels, names=()):
    items = [("Which river runs north?", RIVER)] * len(labels)
    return Labelled("span_qa", items, labels, names, "toy")


def test_the_baseline_learns_the_length_and_takes_the_best_on_valid():
    train = toy([[Answer("Rhine", 27)], [Answer("Rhine", 27)], [Answer("river Rhine", 21)]])
    assert [name for name, _ in candidates(train)] == [
        "sliding window, 1 words",
        "sliding window, 2 words",
    ]
    fitted = fit_baseline(train, toy([[Answer("Rhine", 27)]]))
    assert (fitted.name, fitted.score) == ("sliding window, 1 words", 1.0)
    assert fitted.predict(train.items) == ["Rhine"] * 3


def test_the_baseline_may_answer_nothing_where_that_occurs():
    train = toy([[], [], [Answer("Rhine", 27)]], (NO_ANSWER,))
    fitted = fit_baseline(train, toy([[], [], [Answer("Rhine", 27)]], (NO_ANSWER,)))
    assert fitted.name == "never an answer"
    assert fitted.score == pytest.approx(2 / 3)
    assert fitted.predict(train.items) == ["", "", ""]
