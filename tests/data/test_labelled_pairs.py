"""Pairs of source and target: files, errors that name the line, rows."""

import gzip
import json
import lzma

import numpy as np
import pytest

from selfsup.data.labelled_pairs import LabelledPairs, read
from selfsup.data.labels import Labelled
from selfsup.data.text import read_labels
from selfsup.data.text_preprocessor import TextPreprocessor
from selfsup.data.tokenizer import Tokenizer, TokenizerConfig
from selfsup.errors import ConfigError, DataError

TEXTS = ["ab", "ba", "aab", "bba", "ab ba"]


def tokenizer(style="bert"):
    config = TokenizerConfig(kind="character", vocab_size=32, style=style)
    return Tokenizer.train(config, TEXTS)


@pytest.fixture
def write(tmp_path):
    def write(name: str, text: str):
        path = tmp_path / name
        opened = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
        with opened(path, "wt", encoding="utf-8") as file:
            file.write(text)
        return path

    return write


def test_tables(write):
    rows = [("source", "target"), ("a house", "ein Haus"), ("a dog", "ein Hund")]
    for suffix, mark in ((".csv", ","), (".tsv", "\t"), (".tsv.gz", "\t"), (".csv.xz", ",")):
        path = write(f"pairs{suffix}", "\n".join(mark.join(row) for row in rows))
        labelled = read_labels(path, "generation")
        assert labelled.items == ["a house", "a dog"]
        assert labelled.labels == ["ein Haus", "ein Hund"]
        assert labelled.names == ()
    headless = write("plain.tsv", "x\ta house\tein Haus\n")
    labelled = read(headless, text=2, label=3)
    assert (labelled.items, labelled.labels) == (["a house"], ["ein Haus"])


def test_usual_and_given_columns(write):
    lines = [{"classical": "吾", "modern": "我", "book": "x"}]
    path = write("zh.jsonl", "\n".join(map(json.dumps, lines)))
    assert read(path).labels == ["我"]
    assert read(path, text="modern", label="classical").labels == ["吾"]
    path = write("two.jsonl", json.dumps({"en": "dog", "de": "Hund"}))
    assert (read(path).items, read(path).labels) == (["dog"], ["Hund"])
    assert read(path, text="de", label="en").labels == ["dog"]
    path = write("three.jsonl", json.dumps({"en": "dog", "de": "Hund", "fr": "chien"}))
    with pytest.raises(DataError, match=r"three.jsonl:1: no source column .*text=NAME"):
        read(path)
    with pytest.raises(DataError, match=r"no column 'it' for label"):
        read(path, text="en", label="it")


def test_several_right_targets_and_prefixes(write):
    rows = [
        {"prefix": "summarise:", "text": "long", "summary": ["short", "brief"]},
        {"prefix": None, "text": "other", "summary": "else"},
    ]
    labelled = read(write("many.jsonl", "\n".join(map(json.dumps, rows))))
    assert labelled.items == ["summarise: long", "other"]
    assert labelled.labels == [["short", "brief"], "else"]
    data = LabelledPairs(labelled, tokenizer(), 16)
    assert data.collect([np.array([1.0])] * 2, [])[0] == labelled.labels


def test_plain_files_and_several_of_them(write):
    en = write("train.en.gz", "a house\na dog\n")
    de = write("train.de.gz", "ein Haus\nein Hund\n")
    more = write("more.tsv", "source\ttarget\na cat\teine Katze\n")
    labelled = read(f"{en}:{de},{more}")
    assert labelled.items == ["a house", "a dog", "a cat"]
    assert labelled.labels == ["ein Haus", "ein Hund", "eine Katze"]
    short = write("short.de", "ein Haus\n")
    with pytest.raises(DataError, match=r"train.en.gz has 2 lines and .*short.de 1"):
        read(f"{en}:{short}")
    gap = write("gap.de", "ein Haus\n \n")
    with pytest.raises(DataError, match=r"gap.de:2: the line is empty"):
        read(f"{en}:{gap}")
    with pytest.raises(ConfigError, match="plain text has no columns"):
        read(f"{en}:{de}", text="en")


def test_bad_tables(write):
    path = write("empty.tsv", "source\ttarget\na\tb\nc\t\n")
    with pytest.raises(DataError, match=r"empty.tsv:3: 'target' is empty"):
        read(path)
    path = write("number.jsonl", json.dumps({"source": {"a": 1}, "target": "b"}))
    with pytest.raises(DataError, match=r"number.jsonl:1: 'source' must be text"):
        read(path)
    path = write("list.jsonl", json.dumps({"source": "a", "target": ["b", ""]}))
    with pytest.raises(DataError, match=r"list.jsonl:1: 'target' is empty"):
        read(path)
    with pytest.raises(DataError, match="holds no pair"):
        read(write("none.tsv", "source\ttarget\n"))
    with pytest.raises(ConfigError, match="leave text_b out"):
        read(path, text_b="c")
    with pytest.raises(ConfigError, match="not for tagging"):
        read(path, "tagging")


def pairs(labels=("ba", "abab", "b")):
    return Labelled("generation", ["ab", "a", "abab"], list(labels), (), "toy")


@pytest.mark.parametrize("style", ["bert", "gpt"])
def test_rows(style):
    tok = tokenizer(style)
    a, b = (int(tok.encode([letter])[0][0]) for letter in "ab")
    end, pad = tok.vocabulary.sep, tok.vocabulary.pad
    first = [tok.vocabulary.cls] if style == "bert" else []
    data = LabelledPairs(pairs(), tok, 16)
    batch = data.batch(np.array([0, 1]))
    assert batch["tokens"].tolist() == [[*first, a, b, end], [*first, a, end, pad]]
    assert batch["mask"].tolist()[1] == [True] * (len(first) + 2) + [False]
    assert batch["label"].tolist() == [[b, a, end, -100, -100], [a, b, a, b, end]]
    assert batch["index"].tolist() == [0, 1]
    assert data.truncated == 0
    assert data.lengths.tolist() == [len(first) + n for n in (3 + 3, 2 + 5, 5 + 2)]


@pytest.mark.parametrize("style", ["bert", "gpt"])
def test_long_texts_are_cut_and_counted(style):
    tok = tokenizer(style)
    data = LabelledPairs(pairs(), tok, 4, max_target=4)
    end = tok.vocabulary.sep
    assert data.truncated == 2  # one source, one target
    assert len(data.sources[2]) == 4
    assert data.sources[2][-1] == end
    assert len(data.targets[1]) == 4
    assert data.targets[1][-1] == end
    with pytest.raises(ConfigError, match="at least 3 tokens"):
        LabelledPairs(pairs(), tok, 16, max_target=2)


def test_a_prefix_stands_before_each_source():
    tok = tokenizer()
    data = LabelledPairs(pairs(), tok, 16, prefix="bb")
    plain = Labelled("generation", ["bbab", "bba", "bbabab"], ["b"] * 3, (), "toy")
    for got, expected in zip(data.sources, LabelledPairs(plain, tok, 16).sources, strict=True):
        assert got.tolist() == expected.tolist()


def test_unknown_targets_and_what_was_written():
    tok = tokenizer()
    data = TextPreprocessor(tok, 16).labelled(pairs([None] * 3), prefix="a")
    batch = data.batch(np.arange(3))
    assert "label" not in batch
    assert "label" not in data.fields
    ids = [int(i) for i in tok.encode(["bab"])[0]]
    end, pad = tok.vocabulary.sep, tok.vocabulary.pad
    rows = [[*ids, end, pad], [*ids, end, ids[0]], [*ids, ids[0], ids[1]]]
    _, written = data.collect([np.array(row, dtype=np.float32) for row in rows], [])
    assert [text.replace(" ", "") for text in written] == ["bab", "bab", "babba"]
