"""Submission files, byte by byte as GLUE and SuperGLUE take them."""

import json
import zipfile
from pathlib import Path

from selfsup.evaluation import submission
from selfsup.evaluation.suite_files import Question


def plain(*indexes: object) -> list[Question]:
    return [Question(index, ("x",), (), None) for index in indexes]


def test_glue(tmp_path: Path) -> None:
    path = tmp_path / "RTE.tsv"
    submission.write(path, "tsv", plain("0", "1"), ["entailment", "not_entailment"])
    assert path.read_text() == "index\tprediction\n0\tentailment\n1\tnot_entailment\n"


def test_similarities_are_clipped_and_have_three_decimals(tmp_path: Path) -> None:
    path = tmp_path / "STS-B.tsv"
    submission.write(path, "tsv", plain(0, 1, 2), [5.2, -0.1, 2.34567], (0.0, 5.0))
    assert path.read_text().splitlines()[1:] == ["0\t5.000", "1\t0.000", "2\t2.346"]


def test_superglue(tmp_path: Path) -> None:
    path = tmp_path / "WSC.jsonl"
    submission.write(path, "wsc", plain(0, 1), ["true", "false"])
    assert path.read_text() == '{"idx": 0, "label": "True"}\n{"idx": 1, "label": "False"}\n'
    submission.write(path, "jsonl", plain(0), ["true"])
    assert json.loads(path.read_text()) == {"idx": 0, "label": "true"}
    submission.write(path, "copa", plain(3), [1])
    assert json.loads(path.read_text()) == {"idx": 3, "label": 1}


def test_multirc_keeps_its_nesting(tmp_path: Path) -> None:
    path = tmp_path / "MultiRC.jsonl"
    rows = [
        Question((0, 0), ("a", "b"), (), None, (0, 1)),
        Question((0, 1), ("c",), (), None, (2,)),
        Question((4, 2), ("d",), (), None, (3,)),
    ]
    submission.write(path, "multirc", rows, [["1", "0"], ["0"], ["1"]])
    first = {
        "idx": 0,
        "passage": {
            "questions": [
                {"idx": 0, "answers": [{"idx": 0, "label": 1}, {"idx": 1, "label": 0}]},
                {"idx": 1, "answers": [{"idx": 2, "label": 0}]},
            ]
        },
    }
    last = {
        "idx": 4,
        "passage": {"questions": [{"idx": 2, "answers": [{"idx": 3, "label": 1}]}]},
    }
    assert [json.loads(line) for line in path.read_text().splitlines()] == [first, last]


def test_equal_files_give_an_equal_zip(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("index\n")
    (tmp_path / "b.tsv").write_text("index\n")
    for out in ("1.zip", "2.zip"):
        submission.pack(tmp_path, ["b.tsv", "a.tsv"], tmp_path / out)
    assert (tmp_path / "1.zip").read_bytes() == (tmp_path / "2.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "1.zip") as archive:
        assert archive.namelist() == ["b.tsv", "a.tsv"]
        assert archive.read("a.tsv") == b"index\n"
