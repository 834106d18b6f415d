"""The study of methods: every recipe is complete, what was done is kept, results are collected."""

import json
from pathlib import Path

import pytest

from selfsup import api
from selfsup.config import run_config
from selfsup.errors import ConfigError
from selfsup.studies import language_methods as study


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SELFSUP_DATA", "/data")


def test_every_method_has_a_complete_recipe(place: None) -> None:
    values = study.plan()
    assert values["corpus"] == "/data/text/english/imdb_unsup.jsonl.xz"
    rows = set()
    for name in values["methods"]:
        config = run_config(study.recipe(values, name, 3.0))
        assert config.training.minutes == 3.0
        assert config.model.dim in (64, 128), name
        rows.add((config.data.tokenizer, config.data.row_length, config.training.batch_size))
    assert len(rows) == 1, "the same tokens and rows for all"


def test_arms_are_run_once_and_collected(
    place: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[tuple] = []

    def pretrain(recipe: Path, data: str, out: Path) -> None:
        assert Path(recipe).is_file()
        calls.append(("pretrain", out.name))
        (out / "model").mkdir(parents=True)

    def compare(run: Path, task: str, data: str, *, out: Path, **settings) -> None:
        calls.append(("compare", run.name, out.name, settings["tuning"], settings["controls"]))
        arms = {"pretrained": {"300": [0.5, 0.6]}, "scratch": {"300": [0.4, 0.5]}}
        out.write_text(json.dumps({"arms": arms}))

    monkeypatch.setattr(api, "pretrain", pretrain)
    monkeypatch.setattr(api, "compare", compare)
    found = study.run(tmp_path, only=["mlm"], minutes=1.0, seeds=(0, 1))
    assert len(calls) == 1 + 4 * 2
    assert ("compare", "mlm", "compare-rte-probe.json", "probe", True) in calls
    assert found["scores"]["mlm"]["sst2"]["full"]["pretrained"] == [0.5, 0.6]
    study.run(tmp_path, only=["mlm"])
    assert len(calls) == 9, "nothing is done twice"
    assert list(study.run(tmp_path, only=["cbow"])["scores"]) == ["mlm", "cbow"]


def test_wrong_questions(place: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="mlm-nsp"):
        study.run(tmp_path, only=["mlm_nsp"])
    monkeypatch.delenv("SELFSUP_DATA")
    with pytest.raises(ConfigError, match="SELFSUP_DATA"):
        study.run(tmp_path)
