import csv
import gzip
import io
import json
import lzma
import re
import sys
import tracemalloc

import pyarrow as arrow
import pytest
import zstandard
from pyarrow import parquet

from selfsup.data.bad_items import BadItems
from selfsup.data.reading import PART_CHARS, Document, documents, resolve
from selfsup.data.sources import HubDataset
from selfsup.errors import DataError

TEXTS = [
    "plain words",
    'with "quotes", commas\tand tabs',
    "two\nlines",
    "",
    "我喜欢学习 🎉",
    "last",
]
PACK = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.compress}


def content(extension, texts=TEXTS):
    """A file's bytes, written by the standard libraries."""
    records = [{"n": i, "text": text} for i, text in enumerate(texts)]
    if extension == ".jsonl":
        return "\n".join(json.dumps(r, ensure_ascii=False) for r in records).encode()
    if extension == ".json":
        return json.dumps(records, indent=1).encode()
    if extension == ".parquet":
        out = io.BytesIO()
        parquet.write_table(arrow.Table.from_pylist(records), out)
        return out.getvalue()
    if extension == ".tsv":
        return "\n".join(["n\ttext", *(f"{r['n']}\t{r['text']}" for r in records)]).encode()
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerows([["n", "text"], *([r["n"], r["text"]] for r in records)])
    return text.getvalue().encode()


def texts_of(source, **keys):
    return [document.text for document in documents(source, **keys)]


@pytest.mark.parametrize("compression", PACK)
@pytest.mark.parametrize("extension", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_formats_with_columns(extension, compression, tmp_path):
    path = tmp_path / f"corpus{extension}{compression}"
    # in .tsv a quote is a character, and a text cannot hold a line break or a tab
    texts = [t for t in TEXTS if extension != ".tsv" or not {"\n", "\t"} & {*t}]
    path.write_bytes(PACK[compression](content(extension, texts)))
    found = list(documents(path))
    assert [d.text for d in found] == texts
    assert [d.number for d in found] == list(range(len(texts)))
    assert {d.part for d in found} == {0}
    assert texts_of(str(path), text_column="text", split="line") == texts


@pytest.mark.parametrize("compression", PACK)
def test_plain_text(compression, tmp_path):
    path = tmp_path / f"corpus.TXT{compression}"
    text = "\ufeffone\r\ntwo\n\n \t\nthree\nfour\n\n\n我\n"
    path.write_bytes(PACK[compression](text.encode()))
    whole = "one\ntwo\n\n \t\nthree\nfour\n\n\n我\n"
    assert list(documents(path)) == [Document(whole, str(path), 0)]
    assert texts_of(path, split="line") == whole.split("\n")[:-1]
    blank = list(documents(path, split="blank_line"))
    assert [d.text for d in blank] == ["one\ntwo", "three\nfour", "我"]
    assert [d.origin for d in blank] == [f"{path}:{line}" for line in (1, 5, 9)]


def test_origins_name_the_line(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(content(".csv"))
    assert [d.origin for d in documents(path)] == [f"{path}:{i}" for i in (2, 3, 4, 6, 7, 8)]


def test_empty_documents_are_given(tmp_path):
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.txt").write_text("\n")
    (tmp_path / "c.jsonl").write_text('{"text": null}\n\n{"text": ""}\n"bare"\n')
    assert texts_of(tmp_path) == ["", "\n", "", "", "bare"]


def test_json_lines_under_the_name_json_and_across_chunks(tmp_path):
    texts = [f"{i} " + "long " * 20_000 for i in range(3)]
    path = tmp_path / "a.json"
    path.write_text("\n".join(json.dumps({"text": t}) for t in texts))
    assert texts_of(path, part_chars=10**6) == texts
    path.write_text(json.dumps(texts))
    assert texts_of(path, part_chars=10**6) == texts


def test_half_a_surrogate_pair_becomes_a_character(tmp_path):
    (tmp_path / "a.jsonl").write_text(r'{"text": "a\ud800b"}')
    assert texts_of(tmp_path) == ["a\ufffdb"]


def test_folder_glob_and_list(tmp_path, capsys):
    for name in ("b.txt", "a.txt", "deep/er/c.txt", ".hidden/d.txt", "notes.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts_of(tmp_path) == ["a.txt", "b.txt", "deep/er/c.txt"]
    assert "1 files are not read (unknown extension): notes.md" in capsys.readouterr().err
    assert texts_of(f"{tmp_path}/**/*.txt") == ["a.txt", "b.txt", "deep/er/c.txt"]
    assert texts_of(f"{tmp_path}/[b]*") == ["b.txt"]
    both = [tmp_path / "b.txt", str(tmp_path / "b.txt"), f"{tmp_path}/?.txt"]
    assert [d.number for d in documents(both)] == [0, 1]
    assert texts_of(both) == ["b.txt", "a.txt"]
    odd = tmp_path / "x[1].txt"
    odd.write_text("odd")
    assert texts_of(str(odd)) == ["odd"]


@pytest.mark.parametrize("split", ["file", "line", "blank_line"])
def test_one_long_line_comes_in_parts_with_flat_memory(split, tmp_path):
    line = "some words here " * 200_000  # 3.2 million characters
    path = tmp_path / "long.txt"
    path.write_text(line)
    tracemalloc.start()
    sizes = []
    for number, document in enumerate(documents(path, split=split)):
        assert (document.number, document.part) == (0, number)
        sizes.append(len(document.text))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_500_000
    assert max(sizes) <= PART_CHARS
    parts = texts_of(path, split=split)
    assert "".join(parts) == line
    assert all(part.startswith(" ") for part in parts[1:])  # cut at white space


def test_parts_without_spaces_are_cut_after_a_sentence_or_hard(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("我喜欢学习。" * 50 + "字" * 200)
    parts = texts_of(path, part_chars=64)
    assert "".join(parts) == path.read_text()
    assert all(len(part) <= 64 for part in parts)
    assert all(part.endswith("。") for part in parts[:4])


def test_a_long_field_comes_in_parts_too(tmp_path):
    text = "word " * 50_000
    for extension in (".jsonl", ".csv"):
        path = tmp_path / f"a{extension}"
        path.write_bytes(content(extension, ["first", text]))
        found = list(documents(path))
        assert [(d.number, d.part) for d in found] == [(0, 0), (1, 0), (1, 1), (1, 2)]
        assert "".join(d.text for d in found[1:]) == text


BAD = {
    "unknown extension": ("a.doc", b"x", r"a\.doc: unknown extension; known: \.txt"),
    "not UTF-8": (
        "a.txt",
        "é".encode() * 60_000 + b"caf\xe9 and",
        r"a\.txt:1: not UTF-8 \(byte 0xe9 at character 60004, see iconv\)",
    ),
    "cut off UTF-8": ("a.txt", "\nab我".encode()[:-1], r"a\.txt:2: .*0xe6 at character 3,"),
    "UTF-16": ("a.txt", "word".encode("utf-16"), "byte 0 is 0xff.*iconv -f utf-16"),
    "not UTF-8 inside gz": ("a.jsonl.gz", gzip.compress(b'"\xff"'), r"gz:1: not UTF-8 \(byte 0xff"),
    "missing column": ("a.csv", b"id,texts\n1,x\n", r"a\.csv:1: no column 'text'.*'texts'.*--text"),
    "missing key": (
        "a.jsonl",
        b'{"text":"a"}\n{"test":1}',
        r"a\.jsonl:2: no column 'text'.*'test'",
    ),
    "bad JSON line": ("a.jsonl", b'{"text":"a"}\n\n{"text":', r"a\.jsonl:3: not JSON \(.*column"),
    "not a string": ("a.jsonl", b'{"text": 5}', r"a\.jsonl:1: the text is int, expected a string"),
    "not an object": ("a.jsonl", b"[1]", r"a\.jsonl:1: the text is list"),
    "bad JSON": ("a.json", b'[{"text":"a"},\n{"text":x}]', r"a\.json:2: not JSON"),
    "open JSON list": ("a.json", b'[{"text":"a"},\n', r"a\.json:2: not JSON"),
    "short row": ("a.csv", b"id,text\n1,x\n2\n", r"a\.csv:3: 1 fields, but the first row names 2"),
    "open quote": ("a.csv", b'id,text\n1,"x\n2,y\n', r"a\.csv:2: .*quotes"),
    "open quote in the first row": ("a.csv", b'"id,text\n1,x\n', r"a\.csv:1: .*quotes"),
    "not UTF-8 in .json": ("a.json", b'["a", "\xff"]', r"a\.json: element 2: not UTF-8"),
    "not UTF-8 in .csv": ("a.csv", b"text\nx\n\xff\n", r"a\.csv:3: not UTF-8"),
    "JSON nested deeply": ("a.jsonl", b"[" * 10**5, r"a\.jsonl:1: JSON that cannot be read"),
    "number without end": ("a.json", b"[" + b"9" * 5000 + b"]", r"a\.json:1: JSON that cannot"),
    "truncated gz": (
        "a.txt.gz",
        gzip.compress(b"word " * 999)[:-9],
        r"a\.txt\.gz: cannot.*cut off",
    ),
    "truncated xz": (
        "a.txt.xz",
        lzma.compress(b"word " * 999)[:-9],
        r"a\.txt\.xz: cannot.*cut off",
    ),
    "truncated zst": ("a.txt.zst", zstandard.compress(b"word " * 999)[:-3], "cannot.*cut off"),
    "not gz": ("a.txt.gz", b"words", "cannot be read"),
    "not xz": ("a.txt.xz", b"words", "cannot be read"),
    "not zst": ("a.txt.zst", b"words", "cannot be read"),
    "not parquet": ("a.parquet", b"words", "not a readable Parquet file"),
    "truncated parquet": ("a.parquet", content(".parquet")[:-20], "not a readable Parquet file"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_name_the_place(case, tmp_path):
    name, raw, message = BAD[case]
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(DataError, match=message):
        list(documents(tmp_path / name))


def left_out(path, **keys):
    """(texts that are left, the line of each that is not, items in all)."""
    bad = BadItems(str(path))
    texts = [document.text for document in documents(path, bad=bad, **keys)]
    lines = [re.match(r".*?(?::| element )(\d+): ", example)[1] for example in bad.examples]
    assert bad.count == len(lines)
    return texts, [int(line) for line in lines], bad.total


SPOILED = {
    "a.jsonl": (b'{"text": "a"}\n\n{"text": "b"\n{"txt": 1}\n"\xe9"\n"e"', "ae", [3, 4, 5], 5),
    "a.json": (b'["a", 2, {"text": "c"}, "\xe9", {"txt": 1}]', "ac", [2, 4, 5], 5),
    "a.csv": (b'text,n\na,1\nb\n"\xe9\n",2\n"d""",3\n"e,3\nf,4\ng,"5"\n', 'ad"fg', [3, 4, 7], 7),
    "a.tsv": (b'text\tn\n"a\t1\nb\nc\t\xe9\nd\t3\n', '"ad', [3, 4], 4),
}


@pytest.mark.parametrize("name", SPOILED)
def test_damaged_records_are_left_out_and_counted(name, tmp_path):
    raw, texts, lines, total = SPOILED[name]
    (tmp_path / name).write_bytes(raw)
    found, places, count = left_out(tmp_path / name)
    assert ("".join(found), places, count) == (texts, lines, total)


def test_a_forgotten_quote_costs_its_own_line(tmp_path):
    rows = [f"text {number},{number}" for number in range(100)]
    rows[40], rows[99] = '"text 40,40', '"text 99,99'
    rows[70] = '"text 70",70'
    path = tmp_path / "a.csv"
    path.write_text("\n".join(["text,n", *rows]))
    texts, lines, total = left_out(path)
    assert texts == [f"text {number}" for number in range(99) if number != 40]
    assert (lines, total) == ([42, 101], 100)


@pytest.mark.parametrize("split", ["file", "line", "blank_line"])
def test_damaged_lines_of_plain_text_are_left_out(split, tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xe9\n" + "é\x85\u2028 one\ntwo\n".encode() * 9 + b"x\xe9\n\nlast")
    texts, lines, total = left_out(path, split=split)
    assert "".join(texts).replace("\n", "") == "é\x85\u2028 onetwo" * 9 + "last"
    assert lines == [1, 20]
    assert total == (22 if split != "blank_line" else 21)
    path.write_bytes(b"\xe9\n" * 3)
    assert left_out(path, split=split) == ([], [1, 2, 3], 3)
    path.write_bytes(b"")
    assert left_out(path, split=split)[1] == []


def test_a_file_of_records_without_a_good_one_is_refused(tmp_path):
    """Then the column is wrong; it is said before the whole of a large file was read."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"txt": "a"}\n{"txt": "b"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:1: no column 'text'; did you mean 'txt'"):
        left_out(path)
    path.write_text('{"txt": "a"}\n' * 100 + '"good"\n')
    with pytest.raises(DataError, match=r"a\.jsonl:1: no column 'text'"):
        left_out(path)
    path.write_text('{"txt": "a"}\n' * 99 + '"good"\n' + "{\n" * 500)
    bad = BadItems("a.jsonl")
    assert [document.text for document in documents(path, bad=bad)] == ["good"]
    assert (bad.count, len(bad.examples), bad.total) == (599, 5, 600)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.json"])
def test_utf_16_is_refused_whatever_is_counted(name, tmp_path):
    (tmp_path / name).write_bytes('["text"]\n'.encode("utf-16"))
    with pytest.raises(DataError, match=r"not UTF-8: byte 0 is 0xff.*iconv -f utf-16"):
        left_out(tmp_path / name)


def test_missing_column_in_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(content(".parquet"))
    with pytest.raises(DataError, match="no column 'texts'; did you mean 'text'"):
        list(documents(path, text_column="texts"))
    with pytest.raises(DataError, match="row 1: the text is int"):
        list(documents(path, text_column="n"))


def test_nothing_found(tmp_path):
    (tmp_path / "wiki.txt").write_text("x")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.md").write_text("x")
    with pytest.raises(DataError, match=r"no file or folder .*wik\.txt; did you mean 'wiki\.txt'"):
        resolve(tmp_path / "wik.txt")
    with pytest.raises(DataError, match=r"looked for \.txt .*\.zst; it gives 1 other files: a\.md"):
        resolve(tmp_path / "deep")
    with pytest.raises(DataError, match=r"the pattern .*\*\.csv gives no file"):
        resolve(f"{tmp_path}/*.csv")
    with pytest.raises(DataError, match="list of sources is empty"):
        resolve([])


def test_names_of_hub_datasets():
    assert resolve("hf:owner/name") == [HubDataset("owner/name")]
    assert resolve("hf:owner/name:en:test") == [HubDataset("owner/name", "en", "test")]
    assert resolve("owner-of/data.set") == [HubDataset("owner-of/data.set")]
    assert resolve(["hf:a", "hf:a"]) == [HubDataset("a")]
    with pytest.raises(DataError, match="write hf:owner/name"):
        resolve("hf:a:b:c:d")


def test_hub_dataset_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        DataError, match=r"needs the package `datasets`: pip install 'selfsup\[hub\]'"
    ):
        list(documents("hf:owner/name"))


@pytest.mark.slow  # importing `datasets` takes seconds
def test_hub_dataset_is_streamed(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(content(".jsonl"))
    found = list(documents(f"hf:{folder}"))
    assert [d.text for d in found] == TEXTS
    assert found[1].origin == f"hf:{folder}::train:2"
    with pytest.raises(DataError, match="row 1: no column 'body'"):
        list(documents(f"hf:{folder}", text_column="body"))
    with pytest.raises(DataError, match="cannot be opened"):
        list(documents(f"hf:{folder}::test"))
