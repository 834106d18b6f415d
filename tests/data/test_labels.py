import gzip
import json
import lzma
from collections import Counter

import numpy as np
import pyarrow
import pytest
import torch
import zstandard
from pyarrow import parquet

from selfsup.data.labelled_text import LabelledText, read
from selfsup.data.labels import (
    Labelled,
    check_known,
    finite_number,
    label_numbers,
    names_of,
    split,
    subset,
)
from selfsup.data.tokenizer import Tokenizer, TokenizerConfig
from selfsup.errors import ConfigError, DataError

CONLLU = """# sent_id = 1
1-2\tdon't\t_\t_\t_\t_\t_\t_\t_\t_
1\tdo\tdo\tAUX\tVBP\tNumber=Sing|Person=1\t0\taux\t_\t_
2\tnot\tnot\tPART\tRB\t_\t1\tadvmod\t_\t_
2.1\tgo\tgo\tVERB\tVB\t_\t_\t_\t_\t_

# sent_id = 2
1\tcats\tcat\tNOUN\tNNS\tNumber=Plur\t0\troot\t_\t_
"""


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# Formats


def test_csv_has_quotes_and_line_breaks_in_cells(tmp_path):
    content = 'label,review\r\n1,"good, ""very"" good\nindeed"\r\n\r\n0,bad\r\n'
    data = read(write(tmp_path, "a.csv", content), "classification")
    assert data.items == ['good, "very" good\nindeed', "bad"]
    assert data.labels == ["1", "0"]
    assert data.names == ("0", "1")


def test_tsv_takes_a_quote_as_a_character_and_strips_the_byte_order_mark(tmp_path):
    content = '\ufefflabel\ttext_a\ttext_b\n1\t"open\tshut\n0\tit\'s "so"\tno\n'
    data = read(write(tmp_path, "a.tsv", content), "classification")
    assert data.items == [('"open', "shut"), ('it\'s "so"', "no")]


@pytest.mark.parametrize("separator", [";", "\t"])
def test_other_separators_are_not_taken_for_one_column(tmp_path, separator):
    lines = "\n".join(separator.join(cells) for cells in (("text", "label"), ("a", "x")))
    with pytest.raises(DataError, match=r"a\.csv:1: one column.*commas between cells"):
        read(write(tmp_path, "a.csv", lines), "classification")


def test_a_folder_of_texts_is_no_labelled_file(tmp_path):
    (tmp_path / "good").mkdir()
    with pytest.raises(DataError, match="is a folder; give one file"):
        read(tmp_path, "classification")


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [(".gz", gzip.compress), (".xz", lzma.compress), (".zst", zstandard.compress)],
)
def test_compressed_files(tmp_path, suffix, pack):
    packed = pack(b"text\tlabel\na\tx\nb\ty\n")
    assert read(write(tmp_path, f"a.tsv{suffix}", packed), "classification").labels == ["x", "y"]
    with pytest.raises(DataError, match=f"not a whole {suffix} file"):
        read(write(tmp_path, f"cut.tsv{suffix}", packed[:-9]), "classification")


def test_zst_of_two_frames(tmp_path):
    packed = zstandard.compress(b"text\tlabel\na\tx\n") + zstandard.compress(b"b\ty\n")
    assert read(write(tmp_path, "a.tsv.zst", packed), "classification").items == ["a", "b"]


def test_jsonl_labels_are_named_as_json_writes_them(tmp_path):
    lines = [{"sentence": "a\u2028b", "label": True}, {"sentence": "c", "label": 2}]
    content = "\n".join(json.dumps(x, ensure_ascii=False) for x in lines)
    data = read(write(tmp_path, "a.jsonl", content), "classification")
    assert data.items == ["a\u2028b", "c"]
    assert data.labels == ["true", "2"]


def test_parquet_for_each_task(tmp_path):
    path = tmp_path / "a.parquet"
    columns = {
        "tokens": [["a", "b"], ["c"]],
        "tags": [[1, 0], [1]],
        "seq": ["MK", "AL"],
        "target": [1.5, -2.0],
    }
    parquet.write_table(pyarrow.table(columns), path)
    tagged = read(path, "tagging", text="tokens", label="tags")
    assert (tagged.items, tagged.labels) == ([["a", "b"], ["c"]], [["1", "0"], ["1"]])
    numbers = read(path, "regression")
    assert (numbers.items, numbers.labels, numbers.names) == (["MK", "AL"], [1.5, -2.0], ())


def test_parquet_that_is_none(tmp_path):
    with pytest.raises(DataError, match="not a Parquet file"):
        read(write(tmp_path, "a.parquet", "text,label"), "classification")


@pytest.mark.parametrize(
    ("label", "tags"),
    [
        (None, [["AUX", "PART"], ["NOUN"]]),
        ("xpos", [["VBP", "RB"], ["NNS"]]),
        ("deprel", [["aux", "advmod"], ["root"]]),
        ("feats:Number", [["Sing", "_"], ["Plur"]]),
    ],
)
def test_conllu_skips_ranges_and_empty_nodes(tmp_path, label, tags):
    data = read(write(tmp_path, "a.conllu", CONLLU), "tagging", label=label)
    assert data.items == [["do", "not"], ["cats"]]
    assert data.labels == tags


def test_two_columns_and_more(tmp_path):
    content = "-DOCSTART- -X- O\n\nEU NNP B-ORG\nrejects VBZ O\n\n\nhere RB O\n"
    data = read(write(tmp_path, "a.conll", content), "tagging")
    assert data.items == [["EU", "rejects"], ["here"]]
    assert data.labels == [["B-ORG", "O"], ["O"]]
    by_number = read(tmp_path / "a.conll", "tagging", label="2")
    assert by_number.labels == [["NNP", "VBZ"], ["RB"]]


def test_ideographic_space_is_a_word(tmp_path):
    data = read(write(tmp_path, "a.bmes", "高 B-NAME\n\u3000 O\n勇\tE-NAME\n"), "tagging")
    assert data.items == [["高", "\u3000", "勇"]]


def test_tagging_from_a_table_of_strings(tmp_path):
    data = read(write(tmp_path, "a.csv", "words,tags\nthe cat,D N\n"), "tagging")
    assert (data.items, data.labels) == ([["the", "cat"]], [["D", "N"]])


def test_columns_by_number_mean_no_header_row(tmp_path):
    path = write(tmp_path, "a.tsv", "gj04\t1\t\tfirst\ngj04\t0\t*\tsecond\n")
    data = read(path, "classification", text=4, label="2")
    assert (data.items, data.labels) == (["first", "second"], ["1", "0"])


def test_a_named_text_column_is_taken_alone(tmp_path):
    path = write(tmp_path, "a.csv", "premise,hypothesis,label\np,h,0\nq,i,1\n")
    assert read(path, "classification").items == [("p", "h"), ("q", "i")]
    assert read(path, "classification", text="hypothesis").items == ["h", "i"]


def test_numbers_of_classes_are_sorted_as_numbers(tmp_path):
    path = write(tmp_path, "a.csv", "text,label\na,10\nb,2\nc,other\n")
    assert read(path, "classification").names == ("2", "10", "other")


def test_validation_data_keeps_the_training_names(tmp_path):
    path = write(tmp_path, "a.csv", "text,label\na,pos\n")
    assert read(path, "classification", names=("neg", "pos")).names == ("neg", "pos")


# Bad input: every message names the file and says what is wrong.

T = "classification"
BAD = {
    "missing column": ("a.csv", "text,mark\na,1\n", T, {}, ":1: no label column .*'text', 'mark'"),
    "named column": ("a.csv", "text,label\na,1\n", T, {"text": "txt"}, "did you mean 'text'"),
    "ambiguous": ("a.csv", "text,review,label\na,b,1\n", T, {}, "'text' and 'review' could each"),
    "two pairs": ("a.csv", "text,text_b,hypothesis,label\na,b,c,1\n", T, {}, "'text_b' and 'hyp"),
    "twin columns": ("a.csv", "text,text\na,1\n", T, {}, "a.csv:1: two columns share a name"),
    "JSON key": (
        "a.jsonl",
        '{"text": "a", "label": 1}\n{"text": "b"}',
        T,
        {},
        ":2: column 'label'",
    ),
    "empty text": ("a.csv", 'text,label\n"a\nb",1\n  ,2\n', T, {}, "a.csv:4: 'text' is empty"),
    "empty second": ("a.tsv", "premise\thypothesis\tlabel\na\t\t1\n", T, {}, ":2: 'hypothesis' is"),
    "null text": ("a.jsonl", '{"text": null, "label": 1}', T, {}, "a.jsonl:1: 'text' is empty"),
    "empty label": ("a.tsv", "text\tlabel\na\t1\nb\t \n", T, {}, "a.tsv:3: 'label' is empty"),
    "list label": ("a.jsonl", '{"text": "a", "label": [1]}', T, {}, ":1: 'label' must be text or"),
    "unknown label": (
        *("a.csv", "text,label\na,positiv\n", T),
        *({"names": ("negative", "positive")}, ":2: label 'positiv' .* did you mean 'positive'"),
    ),
    "unknown tag": (
        "a.bio",
        "a B-X\n",
        "tagging",
        {"names": ("O", "B-Y")},
        ":1: label 'B-X' .of the word 'a'",
    ),
    "word as number": (
        "a.csv",
        "text,score\na,1\nb,big\n",
        "regression",
        {},
        ":3: 'score' must be",
    ),
    "infinite": ("a.csv", "text,score\na,1\nb,inf\n", "regression", {}, "finite number, got 'inf'"),
    "NaN": ("a.jsonl", '{"text": "a", "score": NaN}', "regression", {}, "finite number, got 'NaN'"),
    "tag count": ("a.csv", "words,tags\na b,X\n", "tagging", {}, ":2: 2 words .* 1 tags"),
    "no tag": ("a.conll", "a X\nb\n", "tagging", {}, "a.conll:2: a word without its tag"),
    "tag column": ("a.conll", "a X\n", "tagging", {"label": 3}, "a.conll:1: .* none in place 3"),
    "no word list": (
        "a.jsonl",
        '{"words": 3, "tags": "X"}',
        "tagging",
        {},
        "'words' must be a list",
    ),
    "CoNLL-U cells": ("a.conllu", "1\tdo\tAUX\n", "tagging", {}, ":1: .* 10 cells .* got 3"),
    "not UTF-8": ("a.csv", b"text,label\na,1\n\xe9t\xe9,2\n", T, {}, ":3: not UTF-8 .byte 0xe9"),
    "empty file": ("a.csv", "", T, {}, "a.csv: the file is empty"),
    "only a header": ("a.csv", "text,label\n", T, {}, "a.csv: the file holds no example"),
    "empty sentences": ("a.conll", "\n\n", "tagging", {}, "a.conll: the file holds no example"),
    "empty JSON lines": ("a.jsonl", "\n", T, {}, "a.jsonl: the file is empty"),
    "one class": ("a.csv", "text,label\na,1\nb,1\n", T, {}, "every label is '1'"),
    "one tag": ("a.bio", "a O\nb O\n", "tagging", {}, "every label is 'O'"),
    "one number": ("a.csv", "text,label\na,1\nb,1.0\n", "regression", {}, "every label is 1.0"),
    "cells": ("a.tsv", "text\tlabel\na\tb\t1\n", T, {}, "a.tsv:2: 3 cells, but 2 columns"),
    "open quote": ("a.csv", 'text,label\na,1\n"b,2\nc,3\n', T, {}, "a.csv:3: not CSV"),
    "not JSON": ("a.jsonl", '{"text": "a"\n', T, {}, "a.jsonl:1: not JSON"),
    "no object": ("a.jsonl", "[1]\n", T, {}, "a.jsonl:1: expected a JSON object"),
    "words for classes": ("a.conll", "a X\n", T, {}, "only tagging reads"),
    "unknown format": ("a.xlsx", "", T, {}, "does not name a known format"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data(tmp_path, case):
    name, content, task, options, message = BAD[case]
    with pytest.raises(DataError, match=message) as caught:
        read(write(tmp_path, name, content), task, **options)
    assert name in str(caught.value)


def test_missing_file(tmp_path):
    for name in ("none.csv", "none.parquet"):
        with pytest.raises(DataError, match="cannot be read"):
            read(tmp_path / name, "classification")


@pytest.mark.parametrize(
    ("name", "task", "options", "message"),
    [
        ("a.csv", "classify", {}, "did you mean 'classification'"),
        ("a.csv", "tagging", {"text_b": "x"}, "leave text_b out"),
        ("a.conllu", "tagging", {"label": "upso"}, "did you mean 'upos'"),
        ("a.bio", "tagging", {"label": "upos"}, "number of its column"),
        ("a.bio", "tagging", {"text": "word"}, "leave text out"),
    ],
)
def test_wrong_use(tmp_path, name, task, options, message):
    with pytest.raises(ConfigError, match=message):
        read(write(tmp_path, name, "a O\n"), task, **options)


# Splitting and sampling


def toy(labels, items=None):
    items = items or [f"text {i}" for i in range(len(labels))]
    return Labelled("classification", items, labels, tuple(sorted(set(labels))), "toy.csv")


def test_split_keeps_equal_texts_together_and_ignores_the_order():
    items = [f"text {i % 60}" for i in range(100)]
    data = toy(["a"] * 100, items)
    train, valid = split(data, (0.8, 0.2), seed=1)
    assert not set(train.items) & set(valid.items)
    assert Counter(train.items + valid.items) == Counter(items)
    assert abs(len(valid) - 20) <= 1
    again = split(toy(["a"] * 100, items[::-1]), (0.8, 0.2), seed=1)
    assert set(again[1].items) == set(valid.items)
    assert set(split(data, (0.8, 0.2), seed=2)[1].items) != set(valid.items)


def test_split_of_pairs_and_words():
    pairs = Labelled("regression", [("a", str(i)) for i in range(9)], [0.0] * 9, (), "pairs")
    words = Labelled("tagging", [["a", str(i)] for i in range(9)], [["X", "Y"]] * 9, (), "words")
    for data in (pairs, words):
        assert [len(part) for part in split(data, (1 / 3, 1 / 3, 1 / 3), seed=0)] == [3, 3, 3]


def test_split_refuses_empty_parts_and_wrong_shares():
    with pytest.raises(DataError, match="1 different examples cannot be split"):
        split(toy(["a"] * 9, ["same"] * 9), (0.5, 0.5), seed=0)
    for wrong in [(0.5, 0.4), (1.2, -0.2)]:
        with pytest.raises(ConfigError, match="add up to 1"):
            split(toy(["a", "b"]), wrong, seed=0)


def test_subset_is_stratified_nested_and_seeded():
    data = toy(["a"] * 80 + ["b"] * 15 + ["c"] * 5)
    before: set[str] = set()
    for count in range(1, 101):
        sample = subset(data, count, seed=3)
        assert len(sample) == count
        assert before <= set(sample.items)
        before = set(sample.items)
        found = Counter(sample.labels)
        assert len(found) == min(count, 3)
        for name, size in (("a", 80), ("b", 15), ("c", 5)):
            assert abs(found[name] - count * size / 100) <= 2
    assert subset(data, 20, seed=3).items == subset(data, 20, seed=3).items
    assert subset(data, 20, seed=4).items != subset(data, 20, seed=3).items


def test_subset_of_other_tasks_is_plain_and_nested():
    data = Labelled("regression", [str(i) for i in range(50)], list(map(float, range(50))), (), "x")
    assert set(subset(data, 5, seed=0).items) < set(subset(data, 20, seed=0).items)
    for wrong in (0, 51):
        with pytest.raises(DataError, match=f"a sample of {wrong} out of 50"):
            subset(data, wrong, seed=0)


# Batches


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TokenizerConfig(kind="character", vocab_size=64), ["abcdefgh [MASK]"])


def test_classification_batch(tokenizer):
    data = LabelledText(toy(["no", "yes", "no"], ["abc", "a", "b" * 20]), tokenizer, 8)
    batch = data.batch(np.array([1, 2]))
    vocabulary = tokenizer.vocabulary
    assert batch["tokens"].dtype == torch.int64
    assert batch["tokens"].shape == (2, 8)
    first = [vocabulary.cls, tokenizer.id("a"), vocabulary.sep, *[vocabulary.pad] * 5]
    assert batch["tokens"][0].tolist() == first
    assert batch["mask"].sum(1).tolist() == [3, 8]
    assert batch["label"].tolist() == [1, 0]
    assert batch["label"].dtype == torch.int64
    assert batch["index"].tolist() == [1, 2]
    assert data.truncated == 1
    assert data.fields == ("tokens", "mask", "label")
    assert set(batch) == {*data.fields, "index"}


def test_special_tokens_in_a_text_are_text(tokenizer):
    data = LabelledText(toy(["0"], ["[MASK]"]), tokenizer, 16)
    assert tokenizer.vocabulary.mask not in data.batch(np.array([0]))["tokens"]


def test_pair_batch_has_segments(tokenizer):
    pairs = Labelled("regression", [("abc", "de"), ("a", "b" * 9)], [1.5, 2.0], (), "pairs")
    data = LabelledText(pairs, tokenizer, 8)
    batch = data.batch(np.array([0, 1]))
    assert batch["segments"].tolist() == [[0] * 5 + [1] * 3, [0] * 3 + [1] * 5]
    assert batch["label"].tolist() == [1.5, 2.0]
    assert batch["label"].dtype == torch.float32
    assert "mask" not in batch  # both rows have eight tokens
    assert data.truncated == 1
    assert "segments" in data.fields


def test_tagging_batch_scores_first_tokens_only(tokenizer):
    items = [["ab", "c"], ["abc", "de", "f", "g"]]
    labelled = Labelled("tagging", items, [["X", "Y"], ["Y", "X", "X", "Y"]], ("X", "Y"), "tags")
    data = LabelledText(labelled, tokenizer, 6)
    batch = data.batch(np.array([0, 1]))
    assert batch["words"].tolist() == [[-1, 0, -1, 1, -1, -1], [-1, 0, -1, -1, 1, -1]]
    assert batch["label"].tolist() == [
        [-100, 0, -100, 1, -100, -100],
        [-100, 1, -100, -100, 0, -100],
    ]
    assert data.truncated == 1
    assert [labels.tolist() for labels in data.word_labels] == [[0, 1], [1, 0, 0, 1]]


def test_gpt_rows_have_no_margin():
    tokenizer = Tokenizer.train(
        TokenizerConfig(kind="wordpiece", vocab_size=64, style="gpt"), ["ab cd ef"] * 3
    )
    labelled = Labelled("tagging", [["ab", "cd"]], [["X", "Y"]], ("X", "Y"), "tags")
    batch = LabelledText(labelled, tokenizer, 8).batch(np.array([0]))
    assert batch["words"][0, 0] == 0
    assert batch["label"][batch["words"] >= 0].tolist() == [0, 1]
    # a text that vanishes in the tokenizer still gives a row that can be encoded
    vanished = LabelledText(toy(["0"], ["\u200b"]), tokenizer, 8).batch(np.array([0]))
    assert vanished["tokens"].tolist() == [[tokenizer.vocabulary.sep]]


def test_rows_need_room(tokenizer):
    with pytest.raises(ConfigError, match="at least 5"):
        LabelledText(toy(["0"]), tokenizer, 4)


# What every kind of data checks


def test_a_label_that_the_training_data_do_not_have():
    check_known("film", ("book", "film"), "a.csv:3")
    message = (
        r"^a\.csv:3: label 'flim' \(of 7\) is not among the training labels; did you mean 'film'"
    )
    with pytest.raises(DataError, match=message):
        check_known("flim", ("book", "film"), "a.csv:3", " (of 7)")


def test_numbers_of_regression():
    assert finite_number("-1e-3", "a.csv:3") == -0.001
    for text in ("inf", "nan", "x", ""):
        with pytest.raises(DataError, match=rf"^a:3: 'y' must be a finite number, got '{text}'$"):
            finite_number(text, "a:3", "'y'")


def test_names_and_numbers_of_training_labels():
    assert names_of(iter(["10", "2", "b", "2"]), "classification", "a") == ("2", "10", "b")
    assert names_of([0.5, 1.0], "regression", "a") == ()
    with pytest.raises(DataError, match=r"^a: every label is 'x'; tagging needs at least two"):
        names_of(["x", "x"], "tagging", "a")
    films = Labelled("classification", ["a", "b"], ["x", "2"], ("2", "x"), "a")
    assert label_numbers(films).tolist() == [1, 0]
    assert label_numbers(films).dtype == np.int64
    prices = Labelled("regression", ["a", "b"], [0.25, 3.0], (), "a")
    assert label_numbers(prices).tolist() == [0.25, 3.0]
    assert label_numbers(prices).dtype == np.float64
