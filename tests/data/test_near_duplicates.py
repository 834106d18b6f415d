"""MinHash against true Jaccard similarities, bands against their curve, clusters by hand."""

import numpy as np
import pytest

from selfsup.data.near_duplicates import NearDuplicates, meeting_probability, shingles
from selfsup.data.ngrams import hash64, ngram_hashes, sentences, word_hashes, words


def overlapping(draw: np.random.Generator, size: int, shared: int) -> tuple[np.ndarray, np.ndarray]:
    """Two random sets of `size` with `shared` elements in common."""
    values = draw.integers(0, 2**64, 2 * size - shared, np.uint64)
    return values[:size], values[size - shared :]


@pytest.mark.parametrize("shared", [0, 100, 160, 200])
def test_the_share_of_equal_hashes_estimates_jaccard(shared):
    near = NearDuplicates(bands=64, rows=64)  # 4096 hashes: a standard error of 0.008 at most
    a, b = overlapping(np.random.default_rng(shared), 200, shared)
    similarity = len(np.intersect1d(a, b)) / len(np.union1d(a, b))
    estimate = (near.signature(a) == near.signature(b)).mean()
    assert estimate == pytest.approx(similarity, abs=0.03)


def test_signatures_do_not_depend_on_order_or_on_blocks():
    near = NearDuplicates()
    many = np.random.default_rng(0).integers(0, 2**64, 3000, np.uint64)
    slow = (many[:, None] * near.a + near.b).min(axis=0) >> np.uint64(32)
    np.testing.assert_array_equal(near.signature(many), slow)
    np.testing.assert_array_equal(near.signature(many[::-1]), slow)


def test_pairs_meet_as_often_as_the_curve_says():
    draw = np.random.default_rng(1)
    near = NearDuplicates(bands=5, rows=3)
    for shared, size in ((20, 60), (40, 60), (50, 60)):
        met = 0
        for _ in range(400):
            a, b = overlapping(draw, size, shared)
            one, two = (near.signature(x).reshape(5, 3) for x in (a, b))
            met += bool((one == two).all(axis=1).any())
        similarity = np.array([shared / (2 * size - shared)])
        expected = meeting_probability(similarity, 5, 3)[0]
        assert met / 400 == pytest.approx(expected, abs=4 * np.sqrt(0.25 / 400))


def test_the_curve_by_hand():
    found = meeting_probability(np.array([0.0, 0.5, 1.0]), 2, 2)
    np.testing.assert_allclose(found, [0, 1 - (1 - 0.25) ** 2, 1])


def sentence(draw: np.random.Generator, count: int) -> str:
    return " ".join(f"w{i}" for i in draw.integers(0, 10_000, count))


def test_clusters_keep_their_first_document():
    draw = np.random.default_rng(2)
    texts = [sentence(draw, 200) for _ in range(4)]
    near = NearDuplicates()
    for text in (
        *(texts[0], texts[1], texts[1] + " and one more", texts[2]),
        *("", "!!! ???", texts[0].upper() + "!", texts[3]),
    ):
        near.add(text)
    # nothing is near to a document without words, not even another one
    assert near.first_of_cluster().tolist() == [0, 1, 1, 3, 4, 5, 0, 7]


def test_no_documents_and_only_empty_ones():
    near = NearDuplicates()
    assert near.first_of_cluster().tolist() == []
    near.add("")
    assert near.first_of_cluster().tolist() == [0]


def test_scripts_without_spaces_are_compared_by_characters():
    text = "".join(chr(0x4E00 + i) for i in np.random.default_rng(3).integers(0, 5000, 300))
    near = NearDuplicates()
    near.add(text)
    near.add(text[:150] + "，" + text[150:] + "了")
    near.add(text[::-1])
    assert near.first_of_cluster().tolist() == [0, 0, 2]


def test_shingles_of_long_and_short_texts():
    assert len(shingles("a b c d e f", 5)) == 2
    assert len(shingles("a b a b a b a b", 2)) == 2  # a set: "a b", "b a"
    assert len(shingles("a b", 5)) == 1
    assert len(shingles("...", 5)) == 0
    assert shingles("a b", 5)[0] != shingles("b a", 5)[0]


def test_ngram_hashes_tell_order_and_length_and_repeat_nowhere():
    hashes = word_hashes(["a", "b", "a", "b", "c"])
    two = ngram_hashes(hashes, 2)
    assert two[0] == two[2]
    assert len(set(two.tolist())) == 3
    assert len(ngram_hashes(hashes, 6)) == 0
    assert not set(ngram_hashes(hashes, 1).tolist()) & set(two.tolist())
    np.testing.assert_array_equal(ngram_hashes(hashes[1:4], 3), ngram_hashes(hashes, 3)[1:2])
    many = np.arange(200_000, dtype=np.uint64)  # neighbours collide first where mixing is weak
    assert len(np.unique(ngram_hashes(many, 3))) == len(many) - 2


def test_hashes_are_the_same_on_every_machine():
    assert hash64("selfsup") == 4072906296109254949


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three?", ["One. ", "Two! ", "Three?"]),
        ('He said "Go." Then he went.', ['He said "Go." ', "Then he went."]),
        ('"Go!" he said.', ['"Go!" he said.']),
        ("Dr. J. S. Bach died. So it is.", ["Dr. J. S. Bach died. ", "So it is."]),
        ("It costs 3.50 today. Yes.", ["It costs 3.50 today. ", "Yes."]),
        ("你好。她问：“去吗？”我说去！", ["你好。", "她问：“去吗？”", "我说去！"]),
        ("no stop", ["no stop"]),
        ("", []),
    ],
)
def test_sentences(text, expected):
    assert sentences(text) == expected
    assert "".join(sentences(text)) == text


def test_words_of_many_scripts():
    assert words("It’s 3 o'clock, isn't it?") == ["it's", "3", "o'clock", "isn't", "it"]
    assert words("用GPT模型") == ["用", "gpt", "模", "型"]
    assert words("Ünïcode_wörds") == ["ünïcode", "wörds"]
