"""`probe --task forecasting`: from a table of time series to scores beside the baselines."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from selfsup.errors import ConfigError, DataError
from selfsup.evaluation.frozen_forecasts import split_settings
from selfsup.randomness import numpy_generator

RECIPE = """
[recipe]
summary = "masked patches of the tests"
[data]
name = "series"
window = 24
stride = 4
independent = true
split_rows = [600, 100, 150]
[model]
name = "transformer"
dim = 8
layers = 1
heads = 2
patch = 6
init_std = 0.3
[method]
name = "masked_series"
[training]
steps = 12
batch_size = 32
lr = 1e-2
evaluations = 2
precision = "float32"
device = "cpu"
"""
NAMES = [
    "pretrained",
    "pretrained + lags",
    "untrained",
    "untrained + lags",
    "ridge on 24 lags",
    "ridge on 24 lags, by channel",
    "ridge on 512 lags",
    "ridge on 512 lags, by channel",
    "last value",
]


def rows() -> np.ndarray:
    """(900, 2): noisy waves of two lengths, far from standardised."""
    noise = numpy_generator(0, "waves").normal(size=(900, 2))
    step = np.arange(900)[:, None]
    return 20 + 5 * np.sin(step * 2 * np.pi / [24, 10]) + noise


@pytest.fixture(scope="module")
def folder(selfsup, tmp_path_factory) -> Path:
    """waves.csv, run/ pre-trained on its first 600 rows, and the same rows under another name."""
    path = tmp_path_factory.mktemp("waves")
    lines = [f"{i},{a:.4f},{b:.4f}" for i, (a, b) in enumerate(rows())]
    (path / "waves.csv").write_text("\n".join(["time,load,heat", *lines, ""]))
    (path / "recipe.toml").write_text(RECIPE)
    answer = selfsup(
        *("pretrain", path / "recipe.toml", "--data", path / "waves.csv", "--out", path / "run")
    )
    assert answer.code == 0, answer.err
    return path


def test_features_and_baselines_are_scored_on_every_test_window(
    folder, selfsup, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    answer = selfsup(
        *("probe", folder / "run", "--task", "forecasting", "--data", folder / "waves.csv"),
        *("--horizon", 8, "--record", "waves"),
    )
    assert answer.code == 0, answer.err
    assert "pre-training read" not in answer.err
    assert [line.split("\t")[0].strip() for line in answer.out.splitlines()] == NAMES
    found = json.loads((folder / "run" / "probe.json").read_text())
    assert list(found["scores"]) == NAMES
    assert found["rows"] == {"train": 600, "valid": 100, "test": 150}
    assert (found["history"], found["horizon"], found["test_size"]) == (24, 8, 143)
    assert found["columns"] == ["load", "heat"]
    assert found["seconds"] > 0

    values = rows()[:850].round(4)
    values = (values - values[:600].mean(0)) / values[:600].std(0)
    errors = [values[at : at + 8] - values[at - 1] for at in range(700, 850 - 8 + 1)]
    last = found["scores"]["last value"]
    assert last["mse"] == pytest.approx(np.square(errors).mean(), rel=1e-4)
    assert last["mae"] == pytest.approx(np.abs(errors).mean(), rel=1e-4)
    for name in NAMES[:-1]:
        assert found["scores"][name]["mse"] < 0.5 * last["mse"]
    assert found["scores"]["pretrained"] != found["scores"]["untrained"]

    recorded = json.loads((tmp_path / "docs/results/waves.json").read_text())
    assert recorded["scores"] == found["scores"]
    assert recorded["test_size"] == 143


def test_a_model_that_has_seen_the_test_rows_is_told_of(folder, selfsup, tmp_path):
    def errors_of(data: Path, splits: str) -> str:
        answer = selfsup(
            *("probe", folder / "run", "--task", "forecasting", "--data", data),
            *("--horizon", 4, "--splits", splits),
        )
        assert answer.code == 0, answer.err
        return answer.err

    said = errors_of(folder / "waves.csv", "500,90,100")
    assert "pre-training read 600 rows and the test part begins behind row 590" in said
    assert "--set data.split_rows=[500,90,100]" in said
    assert "pre-training read" not in errors_of(folder / "waves.csv", "0.6,0.1,0.3")  # 540, 630
    assert "pre-training read 600" in errors_of(folder / "waves.csv", "0.5,0.1,0.4")
    other = shutil.copy(folder / "waves.csv", tmp_path / "other.csv")
    assert "pre-training read" not in errors_of(other, "0.5,0.1,0.4")


def test_a_short_table_goes_without_the_longer_ridge(folder, selfsup):
    answer = selfsup(
        *("probe", folder / "run", "--task", "forecasting", "--data", folder / "waves.csv"),
        *("--horizon", 4, "--splits", "0.5,0.1,0.4"),
    )
    assert "ridge on 24 lags" in answer.out
    assert "512" not in answer.out


def test_splits_are_a_name_shares_or_rows():
    assert split_settings("") == {}
    assert split_settings("ett") == {"split_rows": (12 * 720, 4 * 720, 4 * 720)}
    assert split_settings("0.7,0.1,0.2") == {"splits": (0.7, 0.1, 0.2), "split_rows": ()}
    assert split_settings("34560, 11520, 11520") == {"split_rows": (34560, 11520, 11520)}
    with pytest.raises(ConfigError, match="splits = 'etth': give ett, or shares"):
        split_settings("etth")


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (("--horizon", 0.5), ConfigError, "--horizon: invalid int"),
        (("--horizon", -3), ConfigError, "horizon must be at least 1 row, got -3"),
        (("--splits", "0.7,0.3"), ConfigError, "data.splits must be three shares"),
        (("--splits", "0.7,0.3,0.2"), ConfigError, "data.splits must add up to 1"),
        (("--splits", "ett"), DataError, "900 rows cannot be split by data.split_rows"),
        (("--splits", "0.8,0.1,0.1"), DataError, "the valid part has 90 rows and 720 before it"),
        (("--splits", "0.9,0.1,0.0", "--horizon", 9), DataError, "the test part has 0 rows"),
        (("--test", "waves.csv"), ConfigError, "it takes data, horizon and splits"),
        (("--task", "regression", "--horizon", 4), ConfigError, "are for --task forecasting"),
    ],
)
def test_wrong_use(folder, selfsup, options, kind, message):
    answer = selfsup(
        *("probe", folder / "run", "--task", "forecasting", "--data", folder / "waves.csv"),
        *options,
    )
    assert answer.code == kind.exit_code
    assert message in answer.err


def test_another_kind_of_run_does_not_forecast(folder, selfsup, masked_run):
    answer = selfsup(
        *("probe", masked_run, "--task", "forecasting", "--data", folder / "waves.csv")
    )
    assert answer.code == ConfigError.exit_code
    assert "forecasting reads the features of a masked_series run" in answer.err
