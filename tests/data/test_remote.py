"""Addresses, with the file system that fsspec keeps in memory, and one that fails."""

import gzip
import io
import lzma

import fsspec
import numpy as np
import pytest
import zstandard

from selfsup.data import image_files, sharded
from selfsup.data.reading import document_records, documents, resolve
from selfsup.data.remote import RemoteFile, is_address
from selfsup.data.sources import size_of, source_fingerprint
from selfsup.data.store import StoreConfig, build_or_open
from selfsup.data.tokenizer import Tokenizer, TokenizerConfig
from selfsup.errors import DataError

TEXT = b'{"text": "the cat sat"}\n{"text": "on the mat"}\n'


@pytest.fixture
def memory():
    """An empty file system; by name of a file its content."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]

    def put(**content):
        for name, data in content.items():
            path = "/" + name.replace("__", "/").replace("_", ".")
            system.pipe_file(path, data)

    yield put
    system.store.clear()


def test_what_is_an_address():
    assert all(map(is_address, ["s3://b/x.txt", "memory://a", "hf://datasets/x/y.jsonl"]))
    assert not any(map(is_address, ["hf:a/b", "a/b", "en=a.txt", "C:\\a", "", "./s3:/a"]))


def test_files_folders_and_patterns_at_addresses(memory, capsys):
    memory(in__b_jsonl=TEXT, in__a__c_txt=b"a text", in__x_md=b"", in__ab_txt=b"two")
    found = [str(place) for place in resolve("memory://in")]
    assert found == ["memory:///in/a/c.txt", "memory:///in/ab.txt", "memory:///in/b.jsonl"]
    assert "1 files are not read (unknown extension): x.md" in capsys.readouterr().err
    assert [d.text for d in documents("memory://in/*.jsonl")] == ["the cat sat", "on the mat"]
    assert [d.text for d in documents("memory://in/**/*.txt")] == ["a text", "two"]
    (place,) = resolve("memory://in/b.jsonl")
    assert (place.name, size_of(place)) == ("b.jsonl", len(TEXT))
    assert [d.origin for d in documents(place)] == [f"{place}:1", f"{place}:2"]
    assert [record for _, record in document_records(place)][1] == {"text": "on the mat"}


def test_packed_files_are_unpacked_by_their_names(memory, tmp_path):
    import pyarrow as arrow
    from pyarrow import parquet

    parquet.write_table(arrow.table({"text": ["the cat sat", "on the mat"]}), tmp_path / "a")
    memory(
        c__a_jsonl_gz=gzip.compress(TEXT, mtime=0),
        c__b_jsonl_xz=lzma.compress(TEXT),
        c__c_jsonl_zst=zstandard.compress(TEXT),
        c__d_parquet=(tmp_path / "a").read_bytes(),
        c__e_parquet_gz=gzip.compress((tmp_path / "a").read_bytes()),
    )
    assert [d.text for d in documents("memory://c")] == ["the cat sat", "on the mat"] * 5


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a_jsonl", b"{", r"memory:///a\.jsonl:1: not JSON"),
        ("a_txt", b"caf\xe9", r"memory:///a\.txt:1: not UTF-8 \(byte 0xe9"),
        (
            "a_jsonl_gz",
            gzip.compress(TEXT * 99, mtime=0)[:-20],
            r"a\.jsonl\.gz: cannot be read .*cut off",
        ),
        ("a_jsonl_zst", zstandard.compress(TEXT * 99)[:-9], r"a\.jsonl\.zst: cannot be read"),
    ],
)
def test_bad_content_is_named_with_its_address(name, content, message, memory):
    memory(**{name: content})
    with pytest.raises(DataError, match=message):
        list(documents("memory://" + name.replace("_", ".")))


def test_addresses_that_give_nothing(memory):
    memory(a__x_md=b"")
    for address, message in (
        ("memory://none.txt", r"no file or folder memory://none\.txt"),
        ("memory://none/*.txt", r"the address memory://none/\*\.txt gives no file to read"),
        ("memory://a", r"the address memory://a gives no file to read; .* 1 other files: x\.md"),
        ("memory://a/x.md", r"memory://a/x\.md: unknown extension"),
        ("nosuch://a/x.txt", r"nosuch://a/x\.txt: cannot be read \(ValueError: Protocol"),
    ):
        with pytest.raises(DataError, match=message):
            resolve(address)
    memory(a__p_png=b"")
    with pytest.raises(DataError, match="only text is read from addresses"):
        image_files.find("memory://a")


def test_a_store_that_fails_in_the_middle_is_a_data_error(monkeypatch):
    class Cut(io.RawIOBase):
        def readable(self):
            return True

        def read(self, size=-1):
            raise RuntimeError("connection reset")

    monkeypatch.setattr(RemoteFile, "open", lambda self, mode="rb": Cut())
    with pytest.raises(DataError, match=r"a\.txt: cannot be read \(RuntimeError: connection reset"):
        list(documents(RemoteFile("s3://b/a.txt")))


def test_a_file_address_is_a_path(tmp_path):
    (tmp_path / "a.txt").write_text("a text")
    assert resolve(f"file://{tmp_path}/*.txt") == [tmp_path / "a.txt"]


def test_a_fingerprint_holds_the_version_of_a_file():
    one, other = RemoteFile("s3://b/a.txt", 3, "v1"), RemoteFile("s3://b/a.txt", 3, "v2")
    assert source_fingerprint([one], {}) == source_fingerprint([one], {})
    assert source_fingerprint([one], {}) != source_fingerprint([other], {})


def test_tokens_from_an_address_are_those_of_the_files(memory, tmp_path, monkeypatch):
    monkeypatch.setattr(sharded, "SHARD_BYTES", 1)
    (tmp_path / "in").mkdir()
    for number in range(4):
        lines = "".join(f'{{"text": "the cat sat {number} {i}"}}\n' for i in range(20)).encode()
        memory(**{f"in__{number}_jsonl_zst": zstandard.compress(lines)})
        (tmp_path / "in" / f"{number}.jsonl").write_bytes(lines)
    tokenizer = Tokenizer.train(TokenizerConfig(kind="wordpiece", vocab_size=90), ["the cat sat 0"])
    config = StoreConfig(valid_fraction=0.2)
    sources = tmp_path / "in", "memory://in/*.jsonl.zst"
    here, there = (build_or_open(s, tokenizer, config, tmp_path / "cache") for s in sources)
    assert here.meta == there.meta
    assert np.array_equal(here.train[:], there.train[:])
