import json
import random

import numpy as np
import pytest
import torch

from selfsup.config import from_mapping, to_mapping
from selfsup.data.rows import PackedRows, PairRows
from selfsup.data.store import StoreConfig, build_or_open
from selfsup.data.text import Config, prepare
from selfsup.data.text_preprocessor import TextPreprocessor
from selfsup.data.tokenizer import Tokenizer, TokenizerConfig
from selfsup.errors import ConfigError, DataError

WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "in", "mat", "big", "it", "was"]
BERT = Tokenizer.train(TokenizerConfig(vocab_size=300), [" ".join(WORDS)] * 3)
GPT = Tokenizer.train(TokenizerConfig(kind="byte", style="gpt"), [])
SMALL = {"vocab_size": 300}


def corpus(path, num_documents=80, longest=60):
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, longest))) for _ in range(num_documents)]
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return corpus(tmp_path_factory.mktemp("corpus") / "a.jsonl")


def config(style="bert", **keys):
    kind = "wordpiece" if style == "bert" else "byte"
    return Config(tokenizer=TokenizerConfig(kind=kind, style=style, vocab_size=300), **keys)


def stream_of(path, tokenizer, cache):
    return build_or_open(path, tokenizer, StoreConfig(), cache).train


@pytest.mark.parametrize("row_length", [8, 31, 128])
@pytest.mark.parametrize("style", ["bert", "gpt"])
def test_packing_loses_no_token(style, row_length, path, tmp_path):
    tokenizer = BERT if style == "bert" else GPT
    stream = stream_of(path, tokenizer, tmp_path)
    rows = PackedRows(stream, tokenizer.vocabulary, row_length, style == "bert")
    tokens = rows.batch(np.arange(len(rows)))["tokens"].numpy()
    assert tokens.shape == (len(rows), row_length)
    assert tokens.dtype == np.int64
    if style == "bert":
        assert (tokens[:, 0] == tokenizer.vocabulary.cls).all()
        assert (tokens[:, -1] == tokenizer.vocabulary.sep).all()
        tokens = tokens[:, 1:-1]
    left = len(stream) - tokens[:-1].size  # what only the last row, shifted back, holds
    assert 0 < left <= tokens.shape[1]
    together = np.concatenate([tokens[:-1].ravel(), tokens[-1][-left:]])
    assert np.array_equal(together, stream)


@pytest.mark.parametrize("style", ["bert", "gpt"])
def test_documents_of_a_row(style, path, tmp_path):
    tokenizer = BERT if style == "bert" else GPT
    vocabulary = tokenizer.vocabulary
    stream = stream_of(path, tokenizer, tmp_path)
    rows = PackedRows(stream, vocabulary, 64, style == "bert")
    batch = rows.batch(np.arange(len(rows)))
    for tokens, documents in zip(
        batch["tokens"].tolist(), batch["documents"].tolist(), strict=True
    ):
        expected, number = [], 0
        for place, token in enumerate(tokens):
            if style == "bert":
                number += place > 0 and token == vocabulary.cls
                expected.append(number)
            else:
                expected.append(number)
                number += token == vocabulary.sep
        assert documents == expected
    assert batch["documents"].max() > 0


@pytest.mark.parametrize("style", ["bert", "gpt"])
def test_documents_are_left_out_where_every_row_is_one_document(style):
    vocabulary = (BERT if style == "bert" else GPT).vocabulary
    sep = [vocabulary.sep, vocabulary.cls] if style == "bert" else [vocabulary.sep]
    stream = np.array([40] * 100 + sep + [41] * 100, dtype=np.uint16)
    rows = PackedRows(stream, vocabulary, 20, style == "bert")
    assert "documents" in rows.fields
    assert set(rows.batch(np.array([0, 1]))) == {"tokens", "index"}
    assert set(rows.batch(np.array([0, 5]))) == {"tokens", "index", "documents"}
    across = PackedRows(stream, vocabulary, 20, style == "bert", across_documents=True)
    assert set(across.batch(np.array([0, 5]))) == {"tokens", "index"} == set(across.fields)


def test_a_batch_is_a_function_of_the_numbers(path, tmp_path):
    prepared = prepare(config(row_length=16), path, tmp_path)
    pairs = prepare(config(row_length=32, rows="pairs"), path, tmp_path)
    for rows in (prepared.train, prepared.valid, pairs.train):
        some = np.array([2, 0, 1])
        batch, again = rows.batch(some), rows.batch(some)
        assert batch["index"].tolist() == [2, 0, 1]
        assert set(batch) <= set(rows.fields)
        assert all(torch.equal(batch[name], again[name]) for name in batch)
        one = rows.batch(np.array([0]))["tokens"][0]
        assert torch.equal(batch["tokens"][1, : len(one)], one)


@pytest.mark.parametrize("row_length", [8, 33, 64])
def test_pairs_are_neighbours_in_one_document(row_length, path, tmp_path):
    stream = stream_of(path, BERT, tmp_path)
    vocabulary = BERT.vocabulary
    rows = PairRows(stream, vocabulary, row_length)
    documents = " ".join(map(str, stream.tolist())).split(f" {vocabulary.sep} {vocabulary.cls} ")
    batch = rows.batch(np.arange(len(rows)))
    real = batch.get("mask", torch.ones_like(batch["tokens"], dtype=torch.bool))
    sizes = set()
    for tokens, segments, mask in zip(batch["tokens"], batch["segments"], real, strict=True):
        ids, sides = tokens[mask].tolist(), segments[mask].tolist()
        assert (tokens[~mask] == vocabulary.pad).all()
        middle = ids.index(vocabulary.sep)
        a, b = ids[1:middle], ids[middle + 1 : -1]
        assert ids == [vocabulary.cls, *a, vocabulary.sep, *b, vocabulary.sep]
        assert sides == [0] * (len(a) + 2) + [1] * (len(b) + 1)
        assert min(len(a), len(b)) >= 1
        assert max(len(a), len(b)) <= (row_length - 3) // 2
        joined = " ".join(map(str, a + b))
        assert any(f" {joined} " in f" {document} " for document in documents)
        sizes.add((len(a), len(b)))
    assert len(sizes) > 1  # the split point varies
    short = sum(len(d.split()) < min(8, 2 * rows.span) for d in documents)
    assert rows.num_skipped == short


def test_every_document_that_is_long_enough_gives_pairs():
    cls, sep = BERT.vocabulary.cls, BERT.vocabulary.sep
    stream = np.array([10] * 9 + [sep, cls] + [11] * 3 + [sep, cls] + [12] * 25, dtype=np.uint16)
    rows = PairRows(stream, BERT.vocabulary, 23)  # blocks of 20
    assert rows.starts.tolist() == [0, 16, 21]
    assert rows.lengths.tolist() == [9, 20, 20]
    assert rows.num_skipped == 1


def test_prepare_gives_facts_and_reuses_the_tokenizer(path, tmp_path, capsys):
    first = prepare(config(row_length=16), path, tmp_path)
    assert "training a wordpiece tokenizer" in capsys.readouterr().err
    again = prepare(config(row_length=16), path, tmp_path)
    assert "training" not in capsys.readouterr().err
    assert first.facts == again.facts
    assert first.spec == again.spec
    assert first.facts["documents"] == 80
    assert first.facts["train_rows"] == len(first.train)
    assert first.spec.unigram_entropy == first.facts["unigram_entropy"] > 1.0
    json.dumps(first.facts)
    (tokenizer,) = tmp_path.glob("tokenizer-*/tokenizer.json")
    tokenizer.write_text("{")
    third = prepare(config(row_length=16), path, tmp_path)
    assert "it is trained again" in capsys.readouterr().err
    assert third.facts == first.facts


def test_a_given_tokenizer_is_taken(path, tmp_path):
    BERT.save(tmp_path / "mine")
    given = Config(row_length=16, tokenizer=TokenizerConfig(file=str(tmp_path / "mine")))
    prepared = prepare(given, path, tmp_path / "cache")
    assert prepared.facts["tokenizer"] == BERT.fingerprint


def test_a_tokenizer_is_trained_on_every_file(tmp_path):
    (tmp_path / "a.txt").write_text("cat " * 2000)
    (tmp_path / "b.txt").write_text("学习 " * 1000)
    chosen = TokenizerConfig(vocab_size=300, train_chars=1000)
    prepared = prepare(Config(row_length=16, tokenizer=chosen), tmp_path, tmp_path / "cache")
    assert prepared.preprocessor.tokenizer.id("学") > 4
    assert prepared.facts["unk_share"] == 0.0


def test_a_small_corpus_says_what_to_change(tmp_path):
    path = corpus(tmp_path / "a.jsonl", num_documents=30, longest=5)
    with pytest.raises(DataError, match=r"gave \d+ train tokens, fewer.*lower data\.row_length"):
        prepare(config(row_length=512), path, tmp_path)
    with pytest.raises(DataError, match=r"valid tokens.*at most \d+, raise data\.valid_fraction"):
        prepare(config(row_length=64), path, tmp_path)
    short = tmp_path / "b.jsonl"
    short.write_text('{"text": "the cat sat"}\n' * 2 + '{"text": "a dog"}\n' * 2)
    with pytest.raises(DataError, match=r"no document has 8 tokens.*data\.split_documents"):
        prepare(config(rows="pairs"), corpus(short, 40, longest=4), tmp_path)
    with pytest.raises(ConfigError, match=r'"pairs" needs data\.tokenizer\.style = "bert"'):
        prepare(config("gpt", rows="pairs"), path, tmp_path)


def test_configuration_survives_a_round_trip():
    full = config(row_length=64, rows="pairs", drop_duplicates=True)
    assert from_mapping(Config, to_mapping(full), "data") == full
    for wrong in ({"row_length": 4}, {"valid_fraction": 0.0}, {"valid_fraction": 0.9}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Config(**wrong)


@pytest.fixture
def preprocessor():
    return TextPreprocessor(BERT, 16)


def test_preprocessor_sorts_pads_and_numbers(preprocessor):
    items = ["the cat sat on the mat", "a dog", "the big mat", "it was"]
    batches = list(preprocessor.batches(iter(items), 2))
    assert [numbers for numbers, _ in batches] == [[1, 3], [2, 0]]
    assert set(batches[0][1]) == {"tokens"}
    assert set(batches[1][1]) == {"tokens", "mask"}
    for numbers, batch in batches:
        for row, number in enumerate(numbers):
            mask = batch.get("mask", torch.ones_like(batch["tokens"], dtype=torch.bool))[row]
            ids = batch["tokens"][row][mask].numpy()
            assert BERT.decode(ids) == items[number]
            assert (ids[0], ids[-1]) == (BERT.vocabulary.cls, BERT.vocabulary.sep)


def test_preprocessor_pairs(preprocessor):
    ((numbers, batch),) = preprocessor.batches([("the cat", "a dog ran"), ("it", "was")], 8)
    assert numbers == [1, 0]
    assert batch["segments"].tolist() == [[0, 0, 0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1]]
    assert batch["mask"].sum(1).tolist() == [5, 8]


def test_preprocessor_words(preprocessor):
    ((_, batch),) = preprocessor.batches([["the", "cats", ""], ["dog"]], 8)
    long = batch["words"][1].tolist()
    assert long[0] == long[-1] == -1
    assert [n for n in long if n >= 0] == [0, 1, 2]
    assert batch["words"][0].tolist() == [-1, 0] + [-1] * (len(long) - 2)
    ((_, gpt),) = TextPreprocessor(GPT, 4).batches([["the", "cat"]], 1)
    assert gpt["words"].tolist() == [[0, -1, -1, 1]]


def test_preprocessor_cuts_with_a_warning(preprocessor, capsys):
    fits = " ".join(["cat"] * 14)
    list(preprocessor.batches([fits], 1))
    assert capsys.readouterr().err == ""
    ((_, batch),) = preprocessor.batches([fits + " dog", "a"], 2)
    assert batch["tokens"].shape == (2, 16)
    assert "1 of 2 items were cut: the model reads at most 16 tokens" in capsys.readouterr().err


def test_preprocessor_takes_many_items_as_they_come(preprocessor):
    items = [" ".join(["cat"] * (1 + i % 5)) for i in range(150)]
    numbers = [n for some, _ in preprocessor.batches(iter(items), 1) for n in some]
    assert sorted(numbers) == list(range(150))
    assert list(preprocessor.batches([], 4)) == []


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["a", " \u200b"], "item 1 is empty"),
        ([("a", "b"), ("a", "")], "item 1 is empty"),
        ([["a"], []], "item 1 is empty"),
        (["a", ["b"]], "item 1 is list"),
        ([("a", "b", "c")], "item 0 has 3 texts"),
        ([5], "item 0 is int"),
    ],
)
def test_preprocessor_names_the_bad_item(items, message, preprocessor):
    with pytest.raises(DataError, match=message):
        list(preprocessor.batches(items, 4))


def test_preprocessor_names_the_bad_item_in_a_later_window(preprocessor):
    with pytest.raises(DataError, match="item 100 is empty"):
        list(preprocessor.batches(["a"] * 100 + [""], 1))


def test_preprocessor_survives_saving(preprocessor, tmp_path):
    preprocessor.save(tmp_path)
    loaded = TextPreprocessor.load(tmp_path)
    assert loaded.max_length == 16
    assert loaded.tokenizer.fingerprint == BERT.fingerprint
    (tmp_path / "preprocessor.toml").write_text("max_length = 'x'")
    with pytest.raises(DataError, match=r"preprocessor\.toml: not the preprocessor"):
        TextPreprocessor.load(tmp_path)
