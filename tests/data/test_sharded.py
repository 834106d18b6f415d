import json
import os
import random
import threading
import time
from multiprocessing import active_children

import numpy as np
import pytest
import torch

from selfsup.cli import main
from selfsup.data import sharded
from selfsup.data.reading import document_records, documents
from selfsup.data.rows import PackedRows, PairRows
from selfsup.data.shard_files import write_group, write_shards
from selfsup.data.sharded import JoinedStream, grouped, manifest, write_shard
from selfsup.data.store import StoreConfig, build_or_open
from selfsup.data.tokenizer import Tokenizer, TokenizerConfig
from selfsup.errors import ConfigError, DataError, StorageError
from selfsup.workers import Workers

WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "in", "mat", "big", "it", "was"]
MANY = {
    style: Tokenizer.train(
        TokenizerConfig(kind=kind, style=style, vocab_size=300), [" ".join(WORDS)] * 3
    )
    for style, kind in (("bert", "wordpiece"), ("gpt", "byte"))
}
CONFIG = StoreConfig(valid_fraction=0.2)
BOTH = ("train", "valid")


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def corpus(folder, num_files=6, seed=0):
    """Files of 30 documents, some empty, some the same in two files, one long, one file empty."""
    rng = random.Random(seed)
    folder.mkdir(exist_ok=True)
    for number in range(num_files):
        texts = [" ".join(rng.choices(WORDS, k=rng.randint(5, 30))) for _ in range(30)]
        write(folder / f"{number}.jsonl", ["", "the cat sat", *texts])
    write(folder / "3.jsonl", [])
    write(folder / "4.jsonl", [" ".join(rng.choices(WORDS, k=40_000)), *texts, " "])
    return folder


@pytest.fixture
def small(monkeypatch):
    """Every file of the test's corpora is a shard; an empty one shares that of the next."""
    monkeypatch.setattr(sharded, "SHARD_BYTES", 1)


def in_shards(folder, cache, style="bert", config=CONFIG, **more):
    return build_or_open(folder, MANY[style], config, cache, **more)


def shards_of(cache):
    return sorted(cache.glob("shard-*"))


@pytest.mark.parametrize("style", ["bert", "gpt"])
def test_shards_give_the_rows_of_one_pass(style, tmp_path, monkeypatch):
    folder = corpus(tmp_path / "in")
    whole = build_or_open(folder, MANY[style], CONFIG, tmp_path / "whole")
    monkeypatch.setattr(sharded, "SHARD_BYTES", 1)
    monkeypatch.setattr(sharded, "MAPPED", 2)
    monkeypatch.setattr(sharded, "BUCKET", 20)  # several passes over the hashes
    parts = in_shards(folder, tmp_path / "parts", style)
    assert len(shards_of(tmp_path / "parts")) == 5
    assert isinstance(parts.train, JoinedStream)
    assert parts.meta == {**whole.meta, "shards": 5}
    assert parts.meta["duplicates"] >= 5
    for side in BOTH:
        one, other = getattr(whole, side), getattr(parts, side)
        assert np.array_equal(one, other[:])
        assert one.dtype == other.dtype
    vocabulary = MANY[style].vocabulary
    kinds = [lambda stream: PackedRows(stream, vocabulary, 16, style == "bert")]
    if style == "bert":
        kinds.append(lambda stream: PairRows(stream, vocabulary, 24))
    for make in kinds:
        one, other = make(whole.train), make(parts.train)
        numbers = np.random.default_rng(0).permutation(len(one))
        assert len(one) == len(other) > 100
        expected, found = one.batch(numbers), other.batch(numbers)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("jobs", [1, 2])
def test_bad_lines_are_counted_as_in_one_pass(jobs, tmp_path, monkeypatch, capsys):
    folder = corpus(tmp_path / "in")
    one, path = folder / "1.jsonl", folder / "5.jsonl"
    one.write_text('{"txt": 1}\n' + one.read_text() + "{\n")
    path.write_text(path.read_text() + "{\n")
    whole = build_or_open(folder, MANY["bert"], CONFIG, tmp_path / "whole")
    once = capsys.readouterr().err
    assert "3 of 163 items cannot be used" in once
    assert "1.jsonl:1: no column 'text'" in once
    monkeypatch.setattr(sharded, "SHARD_BYTES", 1)
    parts = in_shards(folder, tmp_path / "parts", workers=Workers(jobs=jobs))
    assert parts.meta == {**whole.meta, "shards": 5}
    assert parts.meta["bad_items"] == len(parts.meta["bad_item_examples"]) == 3
    assert capsys.readouterr().err.splitlines()[-1] == once.splitlines()[-1]
    assert np.array_equal(parts.train[:], whole.train)
    path.write_text(path.read_text() + "{")  # one more, and there are too many
    with pytest.raises(DataError, match=r"4 of 164 items cannot be used .* More than 2%"):
        in_shards(folder, tmp_path / "parts")


def test_a_stream_of_shards_is_their_concatenation(tmp_path):
    rng = np.random.default_rng(0)
    parts = [rng.integers(0, 900, size).astype(np.uint16) for size in (0, 5, 1, 0, 0, 7, 3, 0)]
    paths = [tmp_path / f"{number}.bin" for number in range(len(parts))]
    for path, part in zip(paths, parts, strict=True):
        part.tofile(path)
    sizes = [len(part) for part in parts]
    for surplus in (0, 2):
        whole = np.concatenate(parts)[: 16 - surplus]
        stream = JoinedStream(paths, sizes, np.dtype(np.uint16), surplus)
        assert len(stream) == len(whole)
        for first in range(17):
            for last in range(17):
                assert np.array_equal(stream[first:last], whole[first:last])
    assert len(JoinedStream([], [], np.dtype(np.uint16), 2)) == 0
    assert len(JoinedStream(paths[:1], [0], np.dtype(np.uint16), 2)[:]) == 0


def test_neighbouring_files_share_a_shard_until_it_is_full(tmp_path):
    paths = []
    for number, size in enumerate([3, 3, 9, 1, 1, 0]):
        paths.append(tmp_path / f"{number}.txt")
        paths[-1].write_text("x" * size)
    names = [[int(path.stem) for path in group] for group in grouped(paths, 5)]
    assert names == [[0, 1], [2], [3, 4, 5]]
    assert grouped(paths) == [paths]


@pytest.mark.parametrize(
    ("files", "config"),
    [([["a b c d"] * 3] * 4, CONFIG), (None, StoreConfig(drop_duplicates=True))],
)
def test_what_only_one_pass_can_do_is_done_in_one(files, config, tmp_path, small):
    folder = tmp_path / "in"
    if files is None:
        corpus(folder)
    else:  # 12 documents: too few to hold out whole ones
        folder.mkdir()
        for number, texts in enumerate(files):
            write(folder / f"{number}.jsonl", [f"{text} {number} the cat" * 9 for text in texts])
    store = in_shards(folder, tmp_path / "cache", config=config)
    assert not shards_of(tmp_path / "cache")
    assert "shards" not in store.meta
    assert min(len(store.train), len(store.valid)) > 0


def test_finished_shards_are_kept(tmp_path, small, capsys):
    folder, cache = corpus(tmp_path / "in"), tmp_path / "cache"
    good = (folder / "2.jsonl").read_text()
    (folder / "2.jsonl").write_text("{\n" * 32)
    with pytest.raises(DataError, match=r"1 of 5 shards failed twice: shard 3 of 5 .*2\.jsonl:1: "):
        in_shards(folder, cache)
    said = capsys.readouterr().err
    assert said.count("warning: shard 3 of 5") == 2
    assert "it is tried again at the end" in said
    kept = {path: path.stat().st_mtime_ns for path in shards_of(cache)}
    assert len(kept) == len(list(cache.iterdir())) == 4  # nothing half-written
    (folder / "2.jsonl").write_text(good)
    store = in_shards(folder, cache)
    assert "4 of 5 shards are there already" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    corpus(tmp_path / "in2")
    again = in_shards(tmp_path / "in2", tmp_path / "other")
    assert store.meta == again.meta
    assert np.array_equal(store.train[:], again.train[:])


@pytest.mark.parametrize("kind", ["shard-0", "text-0"])
def test_what_killed_workers_left_goes_with_the_next_corpus(kind, tmp_path):
    cache, number = tmp_path / "cache", 2**22  # above the highest number of a process
    half = cache / f".{kind}.{number}.tmp"
    half.mkdir(parents=True)
    (half / "train.bin").write_bytes(b"half")
    os.utime(half / "train.bin", (0, 0))
    os.utime(half, (0, 0))
    in_shards(corpus(tmp_path / "in"), cache)
    assert [path.name[:5] for path in cache.iterdir()] == ["text-"]


@pytest.mark.parametrize("damage", ["short", "one byte", "gone", "manifest"])
def test_a_damaged_shard_alone_is_made_again(damage, tmp_path, small, capsys):
    folder, cache = corpus(tmp_path / "in"), tmp_path / "cache"
    store = in_shards(folder, cache)
    before = {side: getattr(store, side)[:].copy() for side in BOTH}
    shard = shards_of(cache)[1]
    times = {path: path.stat().st_mtime_ns for path in shards_of(cache)}
    if damage == "short":
        os.truncate(shard / "valid.bin", 2)
    elif damage == "one byte":
        ids = np.fromfile(shard / "documents.bin", np.uint8)
        ids[3] ^= 1
        ids.tofile(shard / "documents.bin")
    elif damage == "gone":
        (shard / "train.bin").unlink()
    else:
        (shard / ".manifest.json").write_text("{}")
    assert manifest(shard, check=True) is None
    after = in_shards(folder, cache, check=True)
    assert "the tokenized corpus is damaged" in capsys.readouterr().err
    assert after.meta == store.meta
    assert all(np.array_equal(getattr(after, side)[:], before[side]) for side in BOTH)
    changed = {path for path in times if path.stat().st_mtime_ns != times[path]}
    assert changed == {shard}


def test_a_manifest_tells_what_a_shard_is(tmp_path):
    write(tmp_path / "a.jsonl", ["the cat sat", "", "the dog"])
    arguments = [tmp_path / "a.jsonl"], MANY["bert"].to_json(), CONFIG, {"version": 1}
    write_shard(tmp_path / "shard", *arguments)
    said = manifest(tmp_path / "shard", check=True)
    assert said["settings"] == {"version": 1}
    assert said["sources"] == [str(tmp_path / "a.jsonl")]
    assert (said["documents"], said["empty"]) == (2, 1)
    names = ["documents.bin", "occurrences.bin", "train.bin", "valid.bin"]
    assert sorted(said["files"]) == names
    assert said["files"]["documents.bin"]["size"] == 16


def test_a_shard_that_nobody_here_sees_is_a_storage_error(tmp_path):
    with pytest.raises(StorageError, match="all machines must share this folder"):
        sharded.make_missing(lambda folder: None, {"a": (tmp_path / "a",)}, Workers(), "shards")


# Another process is killed in the middle


@pytest.mark.fault
def test_the_shard_of_a_killed_process_is_named_and_made_again(tmp_path, small, capsys):
    """Two processes; the first to start is killed: the rest goes on, and its shard comes again."""
    folder = corpus(tmp_path / "in", num_files=5)
    killed = []

    def kill():
        while not killed:
            for child in active_children()[:1]:
                child.kill()
                killed.append((child.pid, time.monotonic()))
            time.sleep(0.01)

    killer = threading.Thread(target=kill)
    killer.start()
    parts = in_shards(folder, tmp_path / "parts", workers=Workers(jobs=2))
    killer.join()
    said = capsys.readouterr().err
    assert f"its process {killed[0][0]} was killed by signal 9" in said
    assert said.count("it is tried again at the end") == 1
    assert len(list((tmp_path / "parts").iterdir())) == 4 + 1
    alone = in_shards(folder, tmp_path / "alone")
    assert parts.meta == alone.meta
    for one, other in zip(
        shards_of(tmp_path / "parts"), shards_of(tmp_path / "alone"), strict=True
    ):
        assert one.name == other.name
        for path in one.iterdir():
            assert path.read_bytes() == (other / path.name).read_bytes()


# prep shard and prep tokens


def test_a_corpus_written_in_shards_is_the_same_corpus(tmp_path):
    folder, out = corpus(tmp_path / "in"), tmp_path / "out"
    before = list(document_records(folder))
    places = sorted(folder.iterdir())
    write_group(out / "0", places[:2], "text", "file", 1000)
    write_group(out / "1", places[2:], "text", "file", 1000)
    said = manifest(out / "0", check=True)
    assert len(said["files"]) > 3
    assert said["documents"] == 64
    assert [record for _, record in document_records(out)] == [record for _, record in before]
    for line in (d.text for d in documents(out / "1" / "part-00001.jsonl.zst")):
        assert len(line) < 1000


def test_writing_shards_goes_on_where_it_stopped(tmp_path, capsys):
    folder, out = corpus(tmp_path / "in"), tmp_path / "out"
    first = write_shards(folder, out, megabytes=1)
    assert first == {**first, "documents": 6 * 32 - 32 - 32 + 32, "files": 1, "folders": 1}
    time_of = (out / "000000").stat().st_mtime_ns
    assert write_shards(folder, out, megabytes=1) == first
    assert first["bad_items"] == 0
    assert (out / "000000").stat().st_mtime_ns == time_of
    assert "1 of 1 shards are there already" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="another corpus or with other settings"):
        write_shards(folder, out, megabytes=2)
    with pytest.raises(ConfigError, match="is not empty"):
        write_shards(folder, folder)
    with pytest.raises(ConfigError, match="at least 1 megabyte"):
        write_shards(folder, out, megabytes=0)


def test_bad_lines_are_left_out_of_what_is_written(tmp_path, capsys):
    folder, out = corpus(tmp_path / "in"), tmp_path / "out"
    path = folder / "1.jsonl"
    before = [record for _, record in document_records(folder)]
    path.write_text("{\n" + path.read_text() + '{"txt": 1}\n')
    (folder / "6.txt").write_bytes(b"plain\n\xff\ntext\n")
    found = write_shards(folder, out, megabytes=1)
    assert (found["documents"], found["bad_items"]) == (161, 3)
    said = capsys.readouterr().err
    assert "3 of 165 items cannot be used" in said
    assert "1.jsonl:34: no column" in said
    after = [record for _, record in document_records(out)]
    assert after == [*before, {"text": "plain\ntext\n"}]
    with pytest.raises(DataError, match=r"1\.jsonl:1: not JSON"):
        list(document_records(folder))
    path.write_text("{\n" + path.read_text())
    with pytest.raises(DataError, match="4 of 166 items"):
        write_shards(folder, tmp_path / "more", megabytes=1)


def test_prep_makes_what_pretrain_opens(tmp_path, small, monkeypatch, capsys):
    monkeypatch.setenv("SELFSUP_CACHE", str(tmp_path / "cache"))
    folder = corpus(tmp_path / "in")
    tokens = ["prep", "tokens", "bert-tiny-english", "--data", str(folder), "--jobs", "1"]
    assert main(["prep", "shard", "--data", str(folder), "--out", str(tmp_path / "shards")]) == 0
    assert "documents\t160" in capsys.readouterr().out
    assert main([*tokens, "--set", "data.tokenizer.vocab_size=300"]) == 0
    said = capsys.readouterr().out
    assert "shards\t5" in said
    made = shards_of(tmp_path / "cache")
    assert len(made) == 5
    assert main([*tokens, "--set", "data.tokenizer.vocab_size=300", "--check"]) == 0
    assert capsys.readouterr().out == said
    assert shards_of(tmp_path / "cache") == made
    assert main(["prep", "tokens", "moco-small", "--data", str(folder)]) == 2
