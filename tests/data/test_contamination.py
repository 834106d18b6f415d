"""N-gram overlap by worked examples and against sets of word tuples."""

import json

import numpy as np
import pytest

from selfsup.data.contamination import contamination
from selfsup.data.ngrams import words
from selfsup.errors import ConfigError, DataError


def write(path, texts):
    path.write_text("".join(json.dumps({"text": t, "id": i}) + "\n" for i, t in enumerate(texts)))
    return path


def measure(tmp_path, corpus, test, n, **more):
    pair = write(tmp_path / "corpus.jsonl", corpus), write(tmp_path / "test.jsonl", test)
    return contamination(*pair, n=n, **more)


def test_a_worked_example(tmp_path):
    found = measure(
        tmp_path,
        ["It was: the QUICK brown fox, jumps!", "over the lazy dog"],
        [
            "the quick brown fox ran",  # 2 of its 3 trigrams
            "jumps over the lazy",  # "over the lazy" but not across documents: 1 of 2
            "a fox jumps",
            "lazy dog",  # short: the whole of it
            "dog lazy",
            "?!",
        ],
        n=3,
    )
    assert found["shares"] == {"0": 0.6667, "1": 0.5, "3": 1.0}
    assert (found["items"], found["contaminated"], found["wholly_found"]) == (6, 3, 1)
    assert (found["short_items"], found["contaminated_short"]) == (3, 1)
    assert (found["corpus_documents"], found["corpus_words"]) == (2, 11)
    assert [worst["share"] for worst in found["worst"]] == [1.0, 0.6667, 0.5]
    assert found["worst"][0]["origin"].endswith("test.jsonl:4")
    assert found["worst"][0]["text"] == "lazy dog"


@pytest.mark.parametrize("n", [1, 4])
def test_against_sets_of_tuples(tmp_path, n):
    draw = np.random.default_rng(n)
    corpus, test = (
        [" ".join(draw.choice(list("abcdef"), draw.integers(1, 9))) for _ in range(count)]
        for count in (30, 40)
    )

    def grams(text, length):
        found = words(text)
        return [tuple(found[i : i + length]) for i in range(len(found) - length + 1)]

    expected = {}
    for i, text in enumerate(test):
        length = min(n, len(words(text)))
        known = {gram for document in corpus for gram in grams(document, length)}
        share = np.mean([gram in known for gram in grams(text, length)])
        if share:
            expected[str(i)] = round(float(share), 4)
    found = measure(tmp_path, corpus, test, n)
    assert found["shares"] == expected
    assert 0 < found["contaminated"] == len(expected)


def test_ngrams_cross_the_parts_of_a_long_document(tmp_path):
    numbers = [f"w{i}" for i in range(60_000)]  # 400,000 characters: read in several parts
    text = " ".join(numbers)
    test = [" ".join(numbers[i : i + 13]) for i in range(0, len(numbers) - 13, 7)]
    found = measure(tmp_path, [text], test, 13)
    assert found["contaminated"] == found["items"] == len(test)


def test_characters_are_the_words_of_scripts_without_spaces(tmp_path):
    found = measure(tmp_path, ["昨天我们，去看电影了。"], ["我们去看电影", "我们去吃晚饭"], n=4)
    assert found["shares"] == {"0": 1.0}


def test_clean_items_are_written_with_their_columns(tmp_path):
    out = tmp_path / "clean.jsonl"
    measure(tmp_path, ["a b c d"], ["x a b c", "q r s", "b c d"], n=3, clean_out=out)
    assert [json.loads(line) for line in out.read_text().splitlines()] == [
        {"text": "q r s", "id": 1}
    ]
    with pytest.raises(ConfigError, match=r"clean\.jsonl exists"):
        measure(tmp_path, ["a"], ["a"], n=3, clean_out=out)


def test_bad_input(tmp_path):
    with pytest.raises(DataError, match="no test item"):
        measure(tmp_path, ["a b c"], [], n=3)
    with pytest.raises(ConfigError, match="n must be at least 1"):
        measure(tmp_path, ["a"], ["a"], n=0)
    with pytest.raises(DataError, match="no column 'sentence'"):
        measure(tmp_path, ["a"], ["a"], n=3, test_column="sentence")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a"\n')
    with pytest.raises(DataError, match=r"broken\.jsonl:1"):
        contamination(broken, write(tmp_path / "t.jsonl", ["a"]), n=1)


def test_items_without_a_word_are_never_found(tmp_path):
    found = measure(tmp_path, ["a b", "..."], ["...", ""], n=2)
    assert (found["items"], found["contaminated"]) == (2, 0)
