"""One item in a hundred is corrupt: exactly so many are reported, and the rest is used."""

import io
import json
import wave

import numpy as np
import pytest

from selfsup.config import read_toml
from selfsup.data import audio, image, sharded, table, text
from selfsup.data.audio_features import Config as AudioConfig
from selfsup.data.tokenizer import TokenizerConfig
from selfsup.workers import Workers

pytestmark = pytest.mark.fault

ITEMS, CORRUPT = 10_000, 100
BAD = set(range(37, ITEMS, ITEMS // CORRUPT))
NOTE = "all 100 of 10,000 counted, in the log and in the facts of the run"


def said_and_counted(prepared, said: str) -> None:
    """The log and the facts, which run.toml and the report repeat, name the same number."""
    assert len(BAD) == CORRUPT
    assert f"{CORRUPT} of {ITEMS:,} items cannot be used" in said
    assert said.count("warning: ") == 1
    assert prepared.facts["bad_items"] == CORRUPT
    assert len(prepared.facts["bad_item_examples"]) == 5


def picture(number: int) -> bytes:
    """A PNG of 4 x 4; a bad one is cut off, no picture at all, or empty."""
    from PIL import Image

    pixels = np.random.Generator(np.random.PCG64(number)).integers(0, 256, (4, 4, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    content = file.getvalue()
    if number not in BAD:
        return content
    return (content[: len(content) // 2], b"no picture" * 9, b"")[number // 100 % 3]


def test_pictures(faults, tmp_path, capsys):
    import pyarrow
    from pyarrow import parquet

    rows = [{"bytes": picture(number)} for number in range(ITEMS)]
    parquet.write_table(pyarrow.table({"image": rows}), tmp_path / "pictures.parquet")
    with faults.trial("corrupt pictures", NOTE):
        config = image.Config(size=4)
        prepared = image.prepare(config, str(tmp_path / "pictures.parquet"), tmp_path / "cache")
        said_and_counted(prepared, capsys.readouterr().err)
        assert len(prepared.train) + len(prepared.valid) == ITEMS - CORRUPT


def sound(number: int) -> bytes:
    """A WAV of 40 ms at 8 kHz; a bad one is no sound, cut in its header, or empty."""
    draw = np.random.Generator(np.random.PCG64(number))
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setparams((1, 2, 8000, 0, "NONE", ""))
        out.writeframes(draw.integers(-9000, 9000, 320, np.int16).tobytes())
    content = file.getvalue()
    if number not in BAD:
        return content
    return (content[:20], b"no sound" * 9, b"")[number // 100 % 3]


def test_sounds(faults, tmp_path, capsys):
    folder = tmp_path / "sounds"
    folder.mkdir()
    for number in range(ITEMS):
        (folder / f"{number:05d}.wav").write_bytes(sound(number))
    with faults.trial("corrupt sounds", NOTE):
        config = AudioConfig(rate=8000, features="waveform", min_seconds=0.03)
        prepared = audio.prepare(config, str(folder), tmp_path / "cache")
        said_and_counted(prepared, capsys.readouterr().err)
        assert len(prepared.train) + len(prepared.valid) == ITEMS - CORRUPT


def test_rows_of_a_table(faults, tmp_path, capsys):
    """A text in a column of numbers."""
    draw = np.random.Generator(np.random.PCG64(0))
    lines = ["a,b,c"]
    for number, row in enumerate(draw.normal(size=(ITEMS, 3)).round(6).tolist()):
        lines.append(
            ",".join(["#REF!" if number in BAD and i == 1 else str(x) for i, x in enumerate(row)])
        )
    (tmp_path / "table.csv").write_text("\n".join(lines) + "\n")
    with faults.trial("corrupt rows of a table", NOTE):
        prepared = table.prepare(table.Config(), str(tmp_path / "table.csv"))
        said_and_counted(prepared, capsys.readouterr().err)
        assert len(prepared.train) + len(prepared.valid) == ITEMS - CORRUPT


def cut(line: str, number: int) -> str:
    """JSON that ends too early; a record without text; bytes that are not UTF-8."""
    return (line[:-3], '{"txt": "none"}', line[:-3] + "\udcff\udcfe" + line[-3:])[number // 100 % 3]


def broken_row(line: str, number: int) -> str:
    """A field too many; a quote that is never closed; bytes that are not UTF-8."""
    return (f"{line},{line}", f'"{line}', f"\udcff{line}")[number // 100 % 3]


KINDS = {
    "txt": (lambda text: text, lambda line, number: f"\udcff\udcfe{line}", []),
    "jsonl": (lambda text: json.dumps({"text": text}), cut, []),
    "csv": (lambda text: text, broken_row, ["text"]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("jobs", [0, 1, 2], ids=["one pass", "shards", "shards by 2 processes"])
def test_lines_of_text(faults, tmp_path, capsys, monkeypatch, kind, jobs):
    """Those that are left are learned from, and no others."""
    write, spoil, head = KINDS[kind]
    texts = [f"the film of row {number} was great and lovely ." for number in range(ITEMS)]
    lines = [write(text) for text in texts]
    lines = [spoil(line, n) if n in BAD else line for n, line in enumerate(lines)]
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(5):  # files, neighbours in a shard
        part = [*head, *lines[number * ITEMS // 5 : (number + 1) * ITEMS // 5]]
        content = "".join(f"{line}\n" for line in part)
        (folder / f"{number}.{kind}").write_bytes(content.encode("utf-8", "surrogateescape"))
    if jobs:
        monkeypatch.setattr(sharded, "SHARD_BYTES", 150_000)
    with faults.trial("corrupt lines of text", NOTE):
        config = text.Config(split_documents="line", tokenizer=TokenizerConfig(vocab_size=300))
        workers = Workers(jobs=max(1, jobs))
        prepared = text.prepare(config, str(folder), tmp_path / "cache", workers)
        said_and_counted(prepared, capsys.readouterr().err)
        assert ("shards" in prepared.facts) == bool(jobs)
        assert prepared.facts["documents"] == ITEMS - CORRUPT
        kept = [one for n, one in enumerate(texts) if n not in BAD]
        characters = sum(prepared.facts[side]["characters"] for side in ("train", "valid"))
        assert characters == sum(map(len, kept))


def test_lines_of_text_to_embed(selfsup, masked_run, faults, tmp_path):
    """Answers belong to lines, so none may be missing: the first bad one is an error."""
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "the film was great"}\n' * 99 + '{"text": \n')
    out = tmp_path / "vectors.npy"
    with faults.trial("corrupt line of text to embed", "exit code 3, the line named; no vectors"):
        answer = selfsup("embed", masked_run, "--data", path, "--out", out)
        assert answer.code == 3, answer.err
        assert "texts.jsonl:100: not JSON" in answer.err
        assert not out.exists()


def test_a_run_and_its_report_repeat_the_number(selfsup, corpus, faults, tmp_path):
    """The command line, from a table, and from lines of text, to report.html."""
    draw = np.random.Generator(np.random.PCG64(1))
    rows = [",".join(map(str, row)) for row in draw.normal(size=(300, 3)).round(6).tolist()]
    lines = [json.dumps({"text": f"the film of row {number} was great"}) for number in range(300)]
    for number in (3, 137, 222):
        rows[number], lines[number] = "1.0,#REF!,2.0", lines[number][:-1]
    (tmp_path / "table.csv").write_text("\n".join(["a,b,c", *rows]) + "\n")
    (tmp_path / "text.jsonl").write_text("\n".join(lines) + "\n")
    for recipe, name, second in (
        ("autoencoder-table", "table.csv", 139),
        (corpus.masked, "text.jsonl", 138),
    ):
        run = tmp_path / f"run of {name}"
        with faults.trial("corrupt items in a run", "counted in the log, run.toml and report.html"):
            answer = selfsup(
                *("pretrain", recipe, "--data", tmp_path / name, "--out", run),
                *("--set", "training.steps=5", "training.device=cpu"),
            )
            assert answer.code == 0, answer.err
            assert "3 of 300 items cannot be used" in answer.err
            facts = read_toml(run / "run.toml")["facts"]
            assert facts["bad_items"] == 3
            assert f"{name}:{second}" in facts["bad_item_examples"][1]
            assert selfsup("report", run).code == 0
            report = (run / "report.html").read_text()
            assert "<dt>bad_items</dt><dd>3</dd>" in report
            assert f"{name}:{second}" in report
