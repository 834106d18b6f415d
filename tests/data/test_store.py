import json
import math
import os
import random
import subprocess
from collections import Counter

import numpy as np
import pytest

from selfsup.data.store import StoreConfig, build_or_open, default_cache, num_words
from selfsup.data.tokenizer import Tokenizer, TokenizerConfig
from selfsup.errors import DataError, StorageError

WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "in", "mat", "big", "it", "was"]
MANY = {
    style: Tokenizer.train(
        TokenizerConfig(kind=kind, style=style, vocab_size=300), [" ".join(WORDS)] * 3
    )
    for style, kind in (("bert", "wordpiece"), ("gpt", "byte"))
}


def corpus(path, num_documents=200, seed=0, repeat=1):
    """Documents, one per line of a .jsonl file; every text `repeat` times."""
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(5, 30))) for _ in range(num_documents)]
    texts = [text for text in texts for _ in range(repeat)]
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return texts


def build(path, cache, style="bert", **config):
    return build_or_open(path, MANY[style], StoreConfig(**config), cache)


def cut_apart(stream, style):
    """The texts between the separators of a stream."""
    vocabulary = MANY[style].vocabulary
    found, here, ids = [], [], iter(stream.tolist())
    for token in ids:
        if token == vocabulary.sep:
            found.append(here)
            here = []
            if style == "bert":
                assert next(ids) == vocabulary.cls
        else:
            here.append(token)
    return [MANY[style].decode(one) for one in [*found, here]]


@pytest.mark.parametrize("style", ["bert", "gpt"])
def test_the_streams_hold_every_document_once(style, tmp_path):
    texts = corpus(tmp_path / "a.jsonl")
    store = build(tmp_path / "a.jsonl", tmp_path / "cache", style)
    sides = [cut_apart(stream, style) for stream in (store.train, store.valid)]
    assert store.meta["split_by"] == "document"
    assert sorted(sides[0] + sides[1]) == sorted(texts)
    in_valid = set(sides[1])
    assert sides[0] == [t for t in texts if t not in in_valid]  # in the order of the source
    assert 2 <= len(sides[1]) <= 25


def test_counts(tmp_path):
    texts = ["the cat sat", "", "我喜欢 deep learning。", "the cat sat", " \n"] + [
        f"dog {i}" for i in range(40)
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": t}) for t in texts))
    store = build(path, tmp_path, valid_fraction=0.3)
    meta = store.meta
    assert (meta["documents"], meta["empty"], meta["duplicates"]) == (43, 2, 1)
    sides = meta["train"], meta["valid"]
    assert sum(side["words"] for side in sides) == 3 + 5 + 3 + 80
    assert sum(side["characters"] for side in sides) == sum(map(len, texts)) - 2
    assert [side["tokens"] for side in sides] == [len(store.train), len(store.valid)]
    assert meta["unk_share"] > 0.05


def test_unigram_entropy_is_that_of_the_training_tokens(tmp_path):
    corpus(tmp_path / "a.jsonl")
    store = build(tmp_path / "a.jsonl", tmp_path)
    special = MANY["bert"].vocabulary.special
    counts = Counter(i for i in store.train.tolist() if i not in special)
    total = sum(counts.values())
    expected = -sum(n / total * math.log(n / total) for n in counts.values())
    assert store.meta["unigram_entropy"] == pytest.approx(expected, rel=1e-12)
    assert store.meta["unk_share"] == 0.0


def test_equal_texts_fall_on_one_side(tmp_path):
    corpus(tmp_path / "a.jsonl", num_documents=60, repeat=3)
    store = build(tmp_path / "a.jsonl", tmp_path, valid_fraction=0.3)
    train, valid = (set(cut_apart(s, "bert")) for s in (store.train, store.valid))
    assert train
    assert valid
    assert not train & valid
    assert store.meta["duplicates"] == 120


def test_duplicates_are_dropped_when_asked(tmp_path):
    once = corpus(tmp_path / "once.jsonl", num_documents=60)
    corpus(tmp_path / "thrice.jsonl", num_documents=60, repeat=3)
    for style in MANY:
        a = build(tmp_path / "once.jsonl", tmp_path / "c", style, valid_fraction=0.3)
        b = build(
            tmp_path / "thrice.jsonl",
            tmp_path / "c",
            style,
            valid_fraction=0.3,
            drop_duplicates=True,
        )
        assert np.array_equal(a.train, b.train)
        assert np.array_equal(a.valid, b.valid)
        assert (b.meta["documents"], b.meta["duplicates"]) == (3 * len(once), 2 * len(once))
        assert a.meta["train"] == b.meta["train"]
        assert a.meta["fingerprint"] == b.meta["fingerprint"]


def test_long_duplicates_are_taken_back_whole(tmp_path):
    rng = random.Random(0)
    long = " ".join(rng.choices(WORDS, k=30_000))  # several parts
    texts = [long, "the end", long, *(" ".join(["dog"] * i) for i in range(1, 30))]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": t}) for t in texts))
    store = build(path, tmp_path, drop_duplicates=True, valid_fraction=0.3)
    found = cut_apart(store.train, "bert") + cut_apart(store.valid, "bert")
    assert sorted(found) == sorted({*texts})
    assert store.meta["parts"] > store.meta["documents"] - 1


@pytest.mark.parametrize("num_documents", [1, 3])
@pytest.mark.parametrize("style", ["bert", "gpt"])
def test_few_documents_are_split_by_parts(style, num_documents, tmp_path):
    rng = random.Random(1)
    texts = [" ".join(rng.choices(WORDS, k=900)) for _ in range(num_documents)]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
    store = build(f"{tmp_path}/*.txt", tmp_path / "cache", style)
    assert store.meta["split_by"] == "part"
    assert store.meta["documents"] == num_documents
    train, valid = (cut_apart(s, style) for s in (store.train, store.valid))
    pieces = [piece.strip() for piece in train + valid]
    assert sum(len(piece.split()) for piece in pieces) == 900 * num_documents
    for piece in pieces:  # each lies in one document as it is, and on one side
        assert sum(piece in text for text in texts) == 1
    share = len(store.valid) / (len(store.train) + len(store.valid))
    assert 0.02 < share < 0.12


def test_one_short_document_still_gives_both_sides(tmp_path):
    (tmp_path / "a.txt").write_text(" ".join(WORDS * 3))
    store = build(tmp_path / "a.txt", tmp_path)
    assert 0 < len(store.valid) < len(store.train)


def test_many_documents_of_which_none_is_held_out_are_split_by_parts(tmp_path):
    texts = corpus(tmp_path / "a.jsonl", num_documents=25)
    store = build(tmp_path / "a.jsonl", tmp_path, valid_fraction=1e-9)
    assert store.meta["split_by"] == "part"
    assert len(store.valid) > 0
    assert store.meta["documents"] == len(texts)


def test_a_store_is_reused_and_made_again_when_something_changed(tmp_path):
    path, cache = tmp_path / "a.jsonl", tmp_path / "cache"
    corpus(path)
    first = build(path, cache)
    stamp = (first.folder / "train.bin").stat().st_mtime_ns
    assert build(path, cache).folder == first.folder
    assert (first.folder / "train.bin").stat().st_mtime_ns == stamp
    folders = {first.folder}
    folders.add(build(path, cache, valid_fraction=0.1).folder)
    folders.add(build(path, cache, "gpt").folder)
    os.utime(path, ns=(1, 1))
    folders.add(build(path, cache).folder)
    corpus(path, seed=1)
    folders.add(build(path, cache).folder)
    assert len(folders) == 5
    assert sorted(p.name for p in cache.iterdir()) == sorted(p.name for p in folders)


@pytest.mark.parametrize("damage", ["short", "gone", "no meta", "bad meta"])
def test_a_damaged_store_is_made_again_with_a_warning(damage, tmp_path, capsys):
    corpus(tmp_path / "a.jsonl")
    before = build(tmp_path / "a.jsonl", tmp_path)
    train, folder = before.train.copy(), before.folder
    if damage == "short":
        os.truncate(folder / "train.bin", 100)
    elif damage == "gone":
        (folder / "valid.bin").unlink()
    elif damage == "no meta":
        (folder / "meta.json").unlink()
    else:
        (folder / "meta.json").write_text('{"dtype": "uint')
    capsys.readouterr()
    after = build(tmp_path / "a.jsonl", tmp_path)
    assert f"warning: {folder}: the tokenized corpus is damaged" in capsys.readouterr().err
    assert np.array_equal(after.train, train)
    assert after.meta == before.meta


def test_ids_are_as_small_as_they_can_be(tmp_path):
    corpus(tmp_path / "a.jsonl")
    small = build(tmp_path / "a.jsonl", tmp_path)
    assert isinstance(small.train, np.memmap)
    assert small.train.dtype == small.valid.dtype == np.uint16
    path = tmp_path / "large.json"
    letters = [chr(0x20000 + i) for i in range(66_000)]
    description = json.loads(
        Tokenizer.train(TokenizerConfig(kind="character"), [" ".join(WORDS)]).to_json()
    )
    vocab = description["model"]["vocab"]
    vocab.update({c: len(vocab) + i for i, c in enumerate(letters)})
    path.write_text(json.dumps(description))
    large = Tokenizer.load(path)
    (tmp_path / "b.txt").write_text("".join(letters[-500:]))
    store = build_or_open(tmp_path / "b.txt", large, StoreConfig(), tmp_path)
    assert store.train.dtype == np.uint32
    assert store.train.max() > 65_536


def test_a_corpus_without_text_is_a_data_error(tmp_path):
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(DataError, match=r"a\.txt: too little text.* 0 documents .* 1 empty"):
        build(tmp_path / "a.txt", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_more_than_one_bad_line_in_fifty_leaves_nothing_behind(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    corpus(path)
    good = path.read_text()
    path.write_text(good + "{\n" * 5)
    named = r"a\.jsonl: 5 of 205 items cannot be used .*a\.jsonl:201: not JSON"
    with pytest.raises(DataError, match=rf"{named}.* More than 2%: mend or remove them\."):
        build(path, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    path.write_text(good + "{\n" * 4)
    store = build(path, tmp_path / "cache")
    assert "4 of 204 items cannot be used" in capsys.readouterr().err
    assert store.meta["documents"] == 200
    assert store.meta["bad_items"] == len(store.meta["bad_item_examples"]) == 4
    assert build(path, tmp_path / "cache").meta == store.meta


def test_a_cache_that_cannot_be_written_is_a_storage_error(tmp_path):
    corpus(tmp_path / "a.jsonl")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        build(tmp_path / "a.jsonl", tmp_path / "file")


def test_default_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SELFSUP_CACHE", str(tmp_path))
    assert default_cache() == tmp_path
    monkeypatch.delenv("SELFSUP_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache() == tmp_path / ".cache" / "selfsup"


def test_words():
    assert num_words("日本語の words, und más") == 4 + 3


def test_a_full_disk_leaves_nothing_half_written(tmp_path):
    """A real file system with 256 KiB of room; what lay there before stays."""
    cache = tmp_path / "cache"
    cache.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(cache)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        (cache / "other").write_text("kept")
        text = tmp_path / "corpus.txt"
        text.write_text("a cat sat on the mat and then it went away again\n" * 20_000)
        with pytest.raises(StorageError, match="no space left on the device"):
            build_or_open(text, MANY["gpt"], StoreConfig(split_documents="line"), cache)
        assert [p.name for p in cache.iterdir()] == ["other"]
        assert (cache / "other").read_text() == "kept"
    finally:
        subprocess.run(["umount", str(cache)], check=True)
