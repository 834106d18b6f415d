import json

import numpy as np
import pyarrow
import pytest
import soundfile
from PIL import Image
from pyarrow import parquet

from selfsup import doctor
from selfsup.errors import ConfigError, DataError


def facts(path, **options):
    """The findings by name, and what ended them."""
    found, error = {}, ""
    try:
        for line in doctor.examine(str(path), **options):
            name, value = line.split(maxsplit=1)
            found[name] = [*found.get(name, []), value]
    except DataError as raised:
        error = str(raised)
    single = {name: values[0] if len(values) == 1 else values for name, values in found.items()}
    return single, error


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, Image.Image):
        content.save(path)
    elif isinstance(content, tuple):
        soundfile.write(path, *content)
    else:
        path.write_text(content)
    return path


def picture(seed, width=20, height=10, mode="RGB"):
    shape = (height, width, 3)
    values = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    return Image.fromarray(values).convert(mode)


def noise(seed, seconds, rate=16000):
    draw = np.random.default_rng(seed)
    return draw.uniform(-0.5, 0.5, round(seconds * rate)).astype(np.float32), rate


# Kinds


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("a.txt", "words", "text"),
        ("a.jsonl", '{"text": "words"}\n', "text"),
        ("a.csv", "label,text\n1,words\n", "text"),
        ("a.csv", 'label,"text"\n1,words\n', "text"),
        ("a.tsv", "label\ttext\n1\twords\n", "text"),
        ("a.csv", "a,b\n1,2\n", "table"),
        ("a.csv", "texts,b\n1,2\n", "table"),
        ("a.csv", "Date,b\n2024-01-01,2\n2024-01-02,2\n", "series"),
        ("a.ts", "@data\n1,2,3\n", "series"),
        ("a.png", picture(0), "image"),
        ("a.wav", noise(0, 0.2), "audio"),
    ],
)
def test_the_kind_is_guessed(name, content, kind, tmp_path):
    found, _ = facts(write(tmp_path / name, content))
    assert found["kind"].startswith(f"{kind}, by the ")
    assert found["kind"].endswith("; for another one say --kind")


def test_a_column_of_almost_that_name_is_taken_for_text(tmp_path):
    found, error = facts(write(tmp_path / "a.csv", "label,Text\n1,words\n"))
    assert found == {}
    assert "no column 'text'; did you mean 'Text'" in error
    found, error = facts(tmp_path / "a.csv", text_column="Text")
    assert (found["documents"], error) == ("1", "")


def test_the_kind_of_parquet_files(tmp_path):
    for columns, kind in (
        ({"text": ["a", "b"]}, "text"),
        ({"image": [b"", b""], "label": [0, 1]}, "image"),
        ({"timestamp": [1, 2], "load": [0.5, 1.0]}, "series"),
        ({"age": [1, 2]}, "table"),
    ):
        parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
        found, _ = facts(tmp_path / "a.parquet")
        assert found["kind"].startswith(f"{kind}, by the columns of a.parquet")


def test_most_files_decide_and_the_kind_can_be_given(tmp_path, capsys):
    for i in range(3):
        write(tmp_path / f"{i}.png", picture(i))
    write(tmp_path / "labels.csv", "a,b\n1,2\n")
    write(tmp_path / "notes.md", "notes")
    found, error = facts(tmp_path)
    assert found["kind"].startswith("image, by the names of 3 of 5 files")
    assert (found["pictures"], error) == ("3", "")
    assert "2 files are not read (unknown extension): labels.csv, notes.md" in (
        capsys.readouterr().err
    )
    found, _ = facts(tmp_path, kind="table")
    assert found["kind"] == "table, as given"
    assert found["rows"] == "1"
    with pytest.raises(ConfigError, match="--kind imag: unknown; did you mean 'image'"):
        list(doctor.examine(str(tmp_path), kind="imag"))


def test_nothing_that_could_be_read(tmp_path):
    assert "no file or folder" in facts(tmp_path / "none")[1]
    write(tmp_path / "a.md", "notes")
    assert "no kind of data reads files like a.md" in facts(tmp_path)[1]


# Texts


def test_long_documents_are_told_apart_by_all_their_parts(tmp_path):
    long = "word " * 30_000
    texts = [long + "one", long + "two", long + "one", " ", ""]
    write(tmp_path / "a.jsonl", "\n".join(json.dumps({"text": text}) for text in texts))
    found, _ = facts(tmp_path)
    assert (found["documents"], found["empty"], found["duplicates"]) == ("5", "2", "1")
    assert found["characters"].startswith(f"{sum(map(len, texts)):,} ")


def test_bad_lines_of_text_are_named(tmp_path):
    good = [json.dumps({"text": f"text {number}"}) for number in range(99)]
    write(tmp_path / "a.jsonl", "\n".join(["{", *good]))
    found, error = facts(tmp_path)
    assert (found["readable"], found["documents"], error) == ("99 of 100", "99", "")
    assert found["not"].startswith(f"usable     {tmp_path}/a.jsonl:1: not JSON")
    write(tmp_path / "a.jsonl", "\n".join(["{"] * 3 + good))
    found, error = facts(tmp_path)
    assert found["readable"] == "99 of 102"
    assert "3 of 102 items cannot be used" in error


# Pictures


def test_pictures(tmp_path):
    write(tmp_path / "cat" / "1.png", picture(1))
    write(tmp_path / "cat" / "2.png", picture(2, 300, 8))
    write(tmp_path / "dog" / "1.png", picture(1))
    write(tmp_path / "dog" / "2.bmp", picture(3, 20, 10, "L"))
    first, second = picture(5).convert("P"), picture(6).convert("P")
    first.save(tmp_path / "dog" / "3.gif", save_all=True, append_images=[second])
    found, error = facts(tmp_path)
    assert error == ""
    assert found == {
        "kind": "image, by the names of 5 of 5 files; for another one say --kind",
        "readable": "yes, all of it",
        "pictures": "5",
        "duplicates": "1",
        "classes": "2: cat 2, dog 3",
        "width": "20 to 300 pixels",
        "height": "8 to 10 pixels",
        "sizes": "2 different",
        "modes": found["modes"],
        "animated": "1",
    }
    assert set(found["modes"].split(", ")) == {"RGB 3", "L 1", "P 1"}


def test_bad_pictures_are_named_by_reason(tmp_path):
    for i in range(3):
        write(tmp_path / f"good{i}.png", picture(i))
    whole = write(tmp_path / "cut0.png", picture(9, 64, 64)).read_bytes()
    for i, size in enumerate((3000, 4000)):
        (tmp_path / f"cut{i}.png").write_bytes(whole[:size])
    for i in range(4):
        (tmp_path / f"none{i}.png").write_bytes(b"no picture")
    found, error = facts(tmp_path)
    assert found["readable"] == "3 of 9"
    assert found["pictures"] == "3"
    none, cut = found["not"]
    folder = str(tmp_path)
    assert none == (
        "usable     4: it is not a JPEG, PNG, WebP, BMP, GIF or TIFF picture "
        f"({folder}/none0.png, {folder}/none1.png, {folder}/none2.png, ...)"
    )
    assert cut == f"usable     2: image file is truncated ({folder}/cut0.png, {folder}/cut1.png)"
    assert "6 of 9 items cannot be used" in error
    assert "More than 2%: mend or remove them." in error


def test_few_bad_pictures_are_warned_of(tmp_path, capsys):
    for i in range(60):
        write(tmp_path / f"good{i}.png", picture(i))
    (tmp_path / "bad.png").write_bytes(b"no picture")
    found, error = facts(tmp_path)
    assert (found["readable"], error) == ("60 of 61", "")
    assert "1 of 61 items cannot be used" in capsys.readouterr().err


def test_classes_of_numbers_and_pictures_without_one(tmp_path):
    cells = []
    for i in range(4):
        write(tmp_path / "x.png", picture(i, mode="L"))
        cells.append((tmp_path / "x.png").read_bytes())
    table = pyarrow.table({"image": cells, "label": [10, 2, None, 2]})
    parquet.write_table(table, tmp_path / "a.parquet")
    found, _ = facts(tmp_path / "a.parquet")
    assert found["classes"] == "2: 2 2, 10 1"
    assert found["without"] == "class  1"
    assert found["modes"] == "L 4"


# Sounds


def test_sounds(tmp_path):
    write(tmp_path / "a" / "1.wav", noise(1, 0.5))
    write(tmp_path / "a" / "2.flac", noise(2, 2.0, 8000))
    write(tmp_path / "b" / "1.wav", noise(1, 0.5))
    found, error = facts(tmp_path)
    assert error == ""
    assert found == {
        "kind": "audio, by the names of 3 of 3 files; for another one say --kind",
        "readable": "yes, all of it",
        "sounds": "3",
        "duplicates": "1",
        "classes": "2: a 2, b 1",
        "seconds": "3.0 in all (0.00 hours)",
        "length": "0.50 to 2.00 seconds",
        "rates": "16,000 Hz 2, 8,000 Hz 1",
    }


def test_bad_sounds_are_named_by_reason(tmp_path):
    write(tmp_path / "1.wav", noise(1, 0.5))
    for i in range(3):
        write(tmp_path / f"short{i}.wav", noise(i, 0.01 * (i + 1)))
    (tmp_path / "none.wav").write_bytes(b"no sound")
    found, error = facts(tmp_path)
    short, none = found["not"]
    names = ", ".join(f"{tmp_path}/short{i}.wav" for i in range(3))
    reason = "N s long, shorter than data.min_seconds = 0.1"
    assert short == f"usable     3: {reason} ({names})"
    assert none == f"usable     1: cannot be decoded ({tmp_path}/none.wav)"
    assert "4 of 5 items cannot be used" in error
    assert "classes" not in found


# Tables


def test_tables(tmp_path):
    rows = [f"{i % 50},{'' if i < 7 else i},{'red' if i % 2 else 'blue'},{i}" for i in range(200)]
    rows[40] = "40,none,red,40"
    rows += rows[100:102]
    write(tmp_path / "1.csv", "\n".join(["a,b,colour,d", *rows[:150]]))
    write(tmp_path / "2.csv", "\n".join(["a,b,colour,d", *rows[150:]]))
    found, error = facts(tmp_path)
    assert error == ""
    assert found == {
        "kind": "table, by the columns of 1.csv; for another one say --kind",
        "readable": "yes, all of it",
        "rows": "202",
        "duplicates": "2",
        "columns": "3 numeric, 1 other",
        "missing": "7 of 808 cells",
        "b": f"numeric, 7 missing, 1 hold text ({tmp_path}/1.csv:42: 'none')",
        "colour": "categorical, 2 different values",
    }


def test_a_column_that_is_neither_numbers_nor_text(tmp_path):
    rows = ["many" if i < 10 else str(i) for i in range(200)]
    found, error = facts(write(tmp_path / "a.csv", "\n".join(["a", *rows])))
    assert found["a"].startswith("UNCLEAR: 95.0% are numbers")
    assert "not clear whether numbers or text: a" in error
    write(tmp_path / "b.csv", "c\n1\n")
    assert "b.csv: columns c, but" in facts(tmp_path)[1]


def test_many_categories(tmp_path):
    rows = [f"x{i}" for i in range(1500)]
    found, _ = facts(write(tmp_path / "a.csv", "\n".join(["a", *rows])))
    assert found["a"] == "categorical, more than 1,000 different values"


# Series


def hours(first, count):
    return [f"2024-01-{1 + i // 24:02} {i % 24:02}:00:00" for i in range(first, first + count)]


def test_series_with_a_gap(tmp_path):
    stamps = hours(0, 30) + hours(34, 30)
    rows = [f"{stamp},{'' if i == 3 else i}" for i, stamp in enumerate(stamps)]
    path = write(tmp_path / "a.csv", "\n".join(["date,load", *rows]))
    found, error = facts(path)
    assert error == ""
    assert found == {
        "kind": "series, by the columns of a.csv; for another one say --kind",
        "readable": "yes, all of it",
        "series": "1",
        "rows": "60",
        "columns": "1 numeric, 0 other",
        "missing": "1 of 60 cells",
        "load": "numeric, 1 missing",
        "time": "date",
        "step": "1:00:00",
        "gaps": f"1 (5:00:00 before {path}:32: 2024-01-02 10:00:00)",
    }


def test_time_that_does_not_rise(tmp_path):
    rows = ["1,1", "2,1", "2,1", "noon,1", "4,1"]
    found, error = facts(write(tmp_path / "a.csv", "\n".join(["time,load", *rows])))
    assert found["step"] == "1"
    bad = found["bad"]
    assert bad.startswith("time       2 (")
    assert "a.csv:5: 'noon' is no time stamp" in bad
    assert "a.csv:4: 2 does not lie after the row before" in bad
    assert "2 time stamps cannot be used" in error


def test_months_are_no_gaps_and_series_need_no_time(tmp_path):
    rows = [f"2024-{month:02}-01,{month}" for month in range(2, 8)]
    found, _ = facts(write(tmp_path / "a.csv", "\n".join(["date,load", *rows])))
    assert (found["step"], found["gaps"]) == ("30 days, 0:00:00", "0")
    found, error = facts(write(tmp_path / "b.csv", "load\n1\n2\n"), kind="series")
    assert error == ""
    assert found["time"].startswith("no column of a usual name")
    assert "step" not in found


def test_labelled_series(tmp_path):
    content = "@classLabel true a b\n@data\n1,2,3:?,5,6:a\n1,2:3,4:b\n1,2:3,4:b\n"
    found, error = facts(write(tmp_path / "x.ts", content))
    assert error == ""
    assert found == {
        "kind": "series, by the names of 1 of 1 files; for another one say --kind",
        "readable": "yes, all of it",
        "series": "3",
        "duplicates": "1",
        "classes": "2: a 1, b 2",
        "channels": "2",
        "length": "2 to 3 steps",
        "missing": "1 of 14 values",
    }
    write(tmp_path / "a.csv", "time,load\n1,2\n")
    assert "a.csv: a table among .ts files" in facts(tmp_path, kind="series")[1]


def test_doctor_on_the_command_line(selfsup, tmp_path):
    write(tmp_path / "1.wav", noise(1, 0.5))
    answer = selfsup("doctor", tmp_path)
    assert answer.code == 0
    assert answer.out.splitlines()[0].startswith("kind           audio, by the names of 1 of 1")
    write(tmp_path / "2.wav", noise(1, 0.01))
    answer = selfsup("doctor", tmp_path, "--kind", "audio")
    assert answer.code == 3
    assert "readable       1 of 2" in answer.out
    assert "error: " in answer.err
