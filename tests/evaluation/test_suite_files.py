"""Files of GLUE and SuperGLUE: odd quotes, gaps and line ends; what each layout is cast to."""

import json
from pathlib import Path
from typing import Any

import pytest

from selfsup.errors import DataError
from selfsup.evaluation.suite_files import Question, as_labelled, read


def tsv(folder: Path, *lines: str, end: str = "\n", name: str = "part.tsv") -> Path:
    path = folder / name
    path.write_bytes("".join(f"{line}{end}" for line in lines).encode())
    return path


def jsonl(folder: Path, *records: dict[str, Any]) -> Path:
    path = folder / "part.jsonl"
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


def cast(folder: Path, layout: str, record: dict[str, Any], hidden: bool = False) -> list[Question]:
    columns = ("text", "text_b", "" if hidden else "label")
    return read(jsonl(folder, record), layout, "classification", columns, hidden=hidden).rows


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_quote_is_a_character_and_lines_end_as_they_like(tmp_path: Path, end: str) -> None:
    lines = ['gj04\t1\t\t"Yes," he said.', 'gj04\t0\t*\tA " alone', "", "gj04\t1\t\t'Tis 5\" long"]
    found = read(tsv(tmp_path, *lines, end=end), "tsv", "classification", ("4", "", "2"))
    texts = ['"Yes," he said.', 'A " alone', "'Tis 5\" long"]
    assert [row.items for row in found.rows] == [(text,) for text in texts]
    assert [row.truth for row in found.rows] == ["1", "0", "1"]
    assert (found.names, found.left_out) == (("0", "1"), 0)


def test_a_byte_order_mark_is_no_part_of_a_column(tmp_path: Path) -> None:
    path = tsv(tmp_path, "\ufeffQuality\t#1 String\t#2 String", "1\ta\tb")
    found = read(path, "tsv", "classification", ("#1 String", "#2 String", "Quality"))
    assert found.rows[0].items == (("a", "b"),)


def test_gaps_are_left_out_and_counted_but_never_in_a_hidden_part(tmp_path: Path) -> None:
    lines = ["id\tquestion1\tquestion2\tis_duplicate", "1\ta\tb\t1", "2\tc\td", "3\te\t\t0"]
    path = tsv(tmp_path, *lines, "4\tf\tg\t7", "5\th\ti\t0\tand more")
    columns = ("question1", "question2", "is_duplicate")
    found = read(path, "tsv", "classification", columns, ("0", "1"))
    assert [row.items[0] for row in found.rows] == [("a", "b"), ("h", "i")]
    assert found.left_out == 3
    hidden = read(path, "tsv", "classification", ("question1", "question2", ""), hidden=True)
    assert [row.items[0] for row in hidden.rows][2] == ("e", ".")
    assert [row.index for row in hidden.rows] == [0, 1, 2, 3, 4]
    assert all(row.truth is None and not row.labels for row in hidden.rows)


def test_a_file_with_many_gaps_is_another_file(tmp_path: Path) -> None:
    path = tsv(tmp_path, "sentence\tlabel", "good\t1", *["bad"] * 4)
    with pytest.raises(DataError, match=r"part\.tsv:3: the label is missing"):
        read(path, "tsv", "classification", ("sentence", "", "label"))


def test_the_index_is_the_files_own(tmp_path: Path) -> None:
    path = tsv(tmp_path, "index\tsentence", "7\tx", "9\ty")
    found = read(path, "tsv", "classification", ("sentence", "", ""), hidden=True)
    assert [row.index for row in found.rows] == ["7", "9"]


def test_scores_are_numbers(tmp_path: Path) -> None:
    columns = ("s1", "s2", "score")
    path = tsv(tmp_path, "s1\ts2\tscore", "a\tb\t2.400", "c\td\t0")
    assert [row.truth for row in read(path, "tsv", "regression", columns).rows] == [2.4, 0.0]
    path = tsv(tmp_path, "s1\ts2\tscore", "a\tb\tnan")
    with pytest.raises(DataError, match=r"part\.tsv:2.*finite number.*'nan'"):
        read(path, "tsv", "regression", columns)


def test_a_column_that_is_not_there(tmp_path: Path) -> None:
    path = tsv(tmp_path, "sentence\tlabel", "x\t1")
    with pytest.raises(DataError, match="no column 'sentense'; did you mean 'sentence'"):
        read(path, "tsv", "classification", ("sentense", "", "label"))


def test_booleans_are_written_as_json_has_them(tmp_path: Path) -> None:
    record = {"text": "is it", "text_b": "It is.", "label": True, "idx": 4}
    (row,) = cast(tmp_path, "jsonl", record)
    assert (row.items, row.truth, row.index) == ((("is it", "It is."),), "true", 4)


def test_wic_and_wsc_mark_the_word(tmp_path: Path) -> None:
    record = {"word": "run", "sentence1": "Run!", "sentence2": "A long run.", "label": False}
    (row,) = cast(tmp_path, "wic", record)
    assert (row.items, row.truth) == ((("run: Run!", "A long run."),), "false")
    target = {"span1_index": 0, "span1_text": "Ann", "span2_index": 3, "span2_text": "her"}
    record = {"text": "Ann lost  a her hat .", "target": target, "label": True, "idx": 1}
    (row,) = cast(tmp_path, "wsc", record)
    assert row.items == (("Ann lost a *her* hat .", "Ann"),)


def test_copa_is_two_choices(tmp_path: Path) -> None:
    record = {
        "premise": "It rained.",
        "choice1": "It was wet.",
        "choice2": "It sang.",
        "question": "effect",
        "label": 1,
        "idx": 3,
    }
    (row,) = cast(tmp_path, "copa", record)
    asked = "It rained. What happened as a result?"
    assert row.items == ((asked, "It was wet."), (asked, "It sang."))
    assert (row.labels, row.truth, row.options, row.index) == (("0", "1"), 1, (0, 1), 3)
    del record["label"]
    (row,) = cast(tmp_path, "copa", record, hidden=True)
    assert (row.labels, row.truth) == ((), None)
    with pytest.raises(DataError, match=r"part\.jsonl:1: not of the layout 'copa'"):
        cast(tmp_path, "copa", {**record, "question": "why"})


def test_multirc_judges_each_answer(tmp_path: Path) -> None:
    answers = [{"text": "four", "idx": 8, "label": 1}, {"text": "five", "idx": 9, "label": 0}]
    asked = {"question": "How many?", "idx": 5, "answers": answers}
    record = {"idx": 2, "passage": {"text": "There are 4.", "questions": [asked]}}
    (row,) = cast(tmp_path, "multirc", record)
    assert row.items == (("There are 4.", "How many? four"), ("There are 4.", "How many? five"))
    assert (row.labels, row.truth) == (("1", "0"), ["1", "0"])
    assert (row.index, row.options, row.group) == ((2, 5), (8, 9), "There are 4.")


def test_record_fills_the_gap_with_each_entity(tmp_path: Path) -> None:
    text = "Rome fell. Rome burns\n@highlight\nGoths came"
    entities = [{"start": 0, "end": 3}, {"start": 11, "end": 14}, {"start": 33, "end": 37}]
    asked = {"query": "@placeholder won", "idx": 6, "answers": [{"text": "Goths"}] * 2}
    record = {"idx": 1, "passage": {"text": text, "entities": entities}, "qas": [asked]}
    (row,) = cast(tmp_path, "record", record)
    shown = "Rome fell. Rome burns. Goths came"
    assert row.items == ((shown, "Rome won"), (shown, "Goths won"))
    assert (row.labels, row.truth, row.options) == (("0", "1"), ["Goths"], ("Rome", "Goths"))


def test_choices_are_learned_one_by_one(tmp_path: Path) -> None:
    rows = [
        Question(0, ("a", "b"), ("0", "1"), 1, (0, 1)),
        Question(1, ("c", "d"), ("1", "0"), 0, (0, 1)),
    ]
    labelled = as_labelled(rows, "classification", ("0", "1"), "here")
    assert (labelled.items, labelled.labels) == (["a", "b", "c", "d"], ["0", "1", "1", "0"])
