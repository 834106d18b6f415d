"""A suite in the report: one figure with a row for each task, a table, and what is missing."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from selfsup.errors import CheckpointError
from selfsup.reporting import write_report
from selfsup.reporting.suite import dots, headline, overall

EVIL = "<script>alert('x')</script>"


def found(**first: Any) -> dict[str, Any]:
    """Two tasks that are done, one that is missing, one that this run cannot do."""
    done = {"state": "done", "metrics": {"f1": [0.5, 0.6], "accuracy": [0.7, 0.8]}}
    done |= {"score": [0.6, 0.7], "majority": 0.55, "examples": {"scored": 1234}}
    done |= {"train_examples": 160, "left_out": {"QQP/train.tsv": 3}}
    done |= {"files": {"train": "QQP/train.tsv", "scored": "QQP/dev.tsv"}}
    below = {**done, "score": [-0.1, -0.14], "majority": None, "left_out": {}}
    return {
        "title": "GLUE",
        "note": EVIL,
        "overall": {"name": "mean of 2 of 4 tasks", "tasks": ["a", "b"], "score": [0.25, 0.28]},
        "tasks": {
            "a": {"title": "QQP", **done, **first},
            "b": {"title": EVIL, **below},
            "c": {"title": "RTE", "state": "missing", "missing": ["RTE/train.tsv"]},
            "d": {"title": "DRCD", "state": "not supported", "why": "no [CLS] token"},
        },
        "lines": {
            "human": {
                "title": "people",
                "source": "a paper",
                "same_tasks": 0.9,
                "scores": {"a": 0.8, "b": 1.0, "c": 0.936},
            },
            "old": {"title": "old", "source": EVIL, "same_tasks": None, "scores": {"a": 0.5}},
        },
        "settings": {"labels": 200, "seeds": [0, 1]},
        "command": "selfsup evaluate runs/first --suite glue",
    }


def write_run(folder: Path, suite: dict[str, Any]) -> Path:
    (folder / "suite-glue").mkdir(parents=True)
    (folder / "run.toml").write_text('[method]\nname = "masked_language"\n')
    (folder / "suite-glue" / "suite.json").write_text(json.dumps(suite))
    return folder


def test_the_mean_keeps_its_own_name() -> None:
    others = "On the same tasks: people 90.0."
    assert overall(found()) == f"mean of 2 of 4 tasks: 26.5 ± 19.1. {others}"
    first, second = headline(found())
    assert first == "GLUE: mean of 2 of 4 tasks 26.5 ± 19.1"
    assert second == f"{others} Missing: RTE; not supported: DRCD."
    nothing = found(state="missing", missing=["QQP/train.tsv"])
    nothing["tasks"] = {"a": nothing["tasks"]["a"]}
    assert headline(nothing) == ("GLUE: no task was measured", "Missing: QQP.")


@pytest.mark.parametrize("width", [920, 390])
def test_every_task_has_a_row(width: int) -> None:
    figure = ElementTree.fromstring(dots(found(), width))
    shown = {element.text: element for element in figure.iter("text")}
    assert {"QQP", "RTE", "DRCD", EVIL} <= set(shown)
    assert "missing: RTE/train.tsv" in shown
    places = [float(shown[name].get("y", "")) for name in ("QQP", EVIL, "RTE", "DRCD")]
    assert places == sorted(places)
    assert len(set(places)) == 4
    tips = [element.text for element in figure.iter("title")]
    assert f"this run, {EVIL}: -12.0" in tips  # a correlation can be below 0
    assert "this run, QQP: 65.0" in tips
    assert "QQP, seed 2: 70.0" in tips
    assert "people, RTE: 93.6" in tips
    assert "most frequent class, QQP: 55.0" in tips
    _, _, right, low = map(float, figure.get("viewBox", "").split())
    for element in figure.iter("text"):
        assert 0 <= float(element.get("x", "")) <= right
        assert 0 <= float(element.get("y", "")) <= low


def test_the_report_shows_it(tmp_path: Path) -> None:
    run = write_run(tmp_path / "first", found())
    page = write_report([run], tmp_path / "report.html").read_text()
    assert "<script" not in page
    assert '<a href="#suites">Suites</a>' in page
    part = page[page.index('<section id="suites"') :]
    part = part[: part.index("</section>")]
    assert '<th scope="row">mean of 2 of 4 tasks</th><td><b>26.5 ± 19.1</b>' in part
    assert "RTE: no file RTE/train.tsv." in part
    assert "DRCD: no [CLS] token." in part
    assert "3 lines without a label or a cell left out of QQP/train.tsv" in part
    assert "f1 55.0, accuracy 75.0" in part
    assert part.count("<svg viewBox") == 4 + 2  # the legend, and the figure in both widths
    assert "people: a paper." in part


@pytest.mark.parametrize("score", [[], [None], [float("nan")]])
def test_a_damaged_suite_is_named(tmp_path: Path, score: list) -> None:
    run = write_run(tmp_path / "first", found(score=score))
    with pytest.raises(CheckpointError, match=r"suite\.json: tasks\.a\.score"):
        write_report([run], tmp_path / "report.html")
