"""One item in a hundred is corrupt: exactly so many are reported, and the rest is used."""

import io
import json
import wave

import numpy as np
import pytest

from selfsup.config import read_toml
from selfsup.data import audio, image, table
from selfsup.data.audio_features import Config as AudioConfig

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
    assert len(prepared.train) + len(prepared.valid) == ITEMS - CORRUPT


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


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv"])
def test_lines_of_text(selfsup, corpus, faults, tmp_path, kind):
    """A text file that is not whole is refused, never read in part: the place is named."""
    lines = [f"the film of row {number} was great and lovely ." for number in range(ITEMS)]
    path = tmp_path / f"text.{kind}"
    if kind == "jsonl":
        lines = [json.dumps({"text": line}) for line in lines]
        lines = [line[:-3] if n in BAD else line for n, line in enumerate(lines)]
    elif kind == "csv":
        lines = ["text", *(f"{line},{line}" if n in BAD else line for n, line in enumerate(lines))]
    content = "".join(f"{line}\n" for line in lines).encode()
    if kind == "txt":
        parts = content.split(b"\n")
        content = b"\n".join(
            b"\xff\xfe" + part if n in BAD else part for n, part in enumerate(parts)
        )
    path.write_bytes(content)
    with faults.trial("corrupt lines of text", "the file is refused, its first bad place named"):
        answer = selfsup("pretrain", corpus.masked, "--data", path, "--out", tmp_path / "run")
        assert answer.code == 3, answer.err
        first = min(BAD)
        offset = content.index(b"\xff") if kind == "txt" else 0
        place = {
            "txt": f"byte {offset} is 0xff",
            "jsonl": f"text.jsonl:{first + 1}: not JSON",
            "csv": f"text.csv:{first + 2}: 2 fields",
        }
        assert place[kind] in answer.err


def test_a_run_and_its_report_repeat_the_number(selfsup, faults, tmp_path):
    """The command line, from a table to report.html."""
    draw = np.random.Generator(np.random.PCG64(1))
    rows = [",".join(map(str, row)) for row in draw.normal(size=(300, 3)).round(6).tolist()]
    for number in (3, 137, 222):
        rows[number] = "1.0,#REF!,2.0"
    (tmp_path / "table.csv").write_text("\n".join(["a,b,c", *rows]) + "\n")
    run = tmp_path / "run"
    with faults.trial("corrupt items in a run", "counted in the log, run.toml and report.html"):
        answer = selfsup(
            *("pretrain", "autoencoder-table", "--data", tmp_path / "table.csv", "--out", run),
            *("--set", "training.steps=5", "training.device=cpu"),
        )
        assert answer.code == 0, answer.err
        assert "3 of 300 items cannot be used" in answer.err
        facts = read_toml(run / "run.toml")["facts"]
        assert facts["bad_items"] == 3
        assert "table.csv:139" in facts["bad_item_examples"][1]
        assert selfsup("report", run).code == 0
        report = (run / "report.html").read_text()
        assert "<dt>bad_items</dt><dd>3</dd>" in report
        assert "table.csv:139" in report
