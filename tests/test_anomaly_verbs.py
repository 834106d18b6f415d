"""Anomalies from end to end: pretrain, evaluate beside controls, predict with reasons."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from selfsup import api
from selfsup.config import read_toml
from selfsup.errors import ConfigError
from selfsup.evaluation.anomaly import histogram
from selfsup.randomness import numpy_generator

RECIPE = """
[recipe]
summary = "an autoencoder of the tests"
[data]
name = "table"
normal = "state=ok"
[model]
name = "mlp"
dims = [16]
dim = 2
[method]
name = "METHOD"
[training]
steps = 250
batch_size = 32
lr = 1e-2
log_every = 50
evaluations = 1
precision = "float32"
device = "cpu"
"""
METHODS = {"autoencoder": '"autoencoder"', "vae": '"vae"\nlatent_dim = 2\nbeta = 0.05'}
DETECTORS = ["reconstruction error", "latent density", "PCA", "kNN", "isolation forest", "z-score"]
METRICS = ["auroc", "average_precision", "normals_flagged", "anomalies_caught"]


def write_rows(path, normals: int, anomalies: int, seed: int) -> None:
    """Height is twice the width, and the colour goes with its sign; in anomalies it is not."""
    draw, lines = numpy_generator(seed, "anomalies"), ["width,height,colour,state"]
    for number in range(normals + anomalies):
        size, ok = draw.normal(), number < normals
        height = 100 + 10 * (2 * size * (1 if ok else -1) + 0.05 * draw.normal())
        colour = "red" if (size > 0) == ok else "blue"
        lines.append(f"{size:.3f},{height:.2f},{colour},{'ok' if ok else 'broken'}")
    path.write_text("\n".join(lines))


@pytest.fixture(scope="module")
def folder(selfsup, tmp_path_factory):
    """Two files of rows and a run of each method."""
    folder = tmp_path_factory.mktemp("anomalies")
    write_rows(folder / "train.csv", 600, 20, seed=0)
    write_rows(folder / "test.csv", 100, 40, seed=1)
    for method in ("autoencoder", "vae"):
        (folder / f"{method}.toml").write_text(RECIPE.replace('"METHOD"', METHODS[method]))
        answer = selfsup(
            *("pretrain", folder / f"{method}.toml", "--data", folder / "train.csv"),
            *("--out", folder / method),
        )
        assert answer.code == 0, answer.err
    assert "selfsup predict" in answer.err
    return folder


@pytest.mark.parametrize("method", ["autoencoder", "vae"])
def test_evaluate_prints_a_line_per_detector(folder, selfsup, method, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer = selfsup(
        *("evaluate", folder / method, "--data", folder / "test.csv", "--label", "state"),
        *("--record", "rows"),
    )
    assert answer.code == 0, answer.err
    assert "100 normal (ok), 40 anomalies" in answer.err
    lines = [line.split("\t") for line in answer.out.splitlines()]
    assert [cells[0].strip() for cells in lines] == DETECTORS
    assert [cell.split()[0] for cell in lines[0][1:]] == METRICS
    scores = json.loads((tmp_path / "docs" / "results" / "rows.json").read_text())["scores"]
    assert lines[2][1] == f"auroc {scores['PCA']['auroc']:.4f}"
    ours = scores["reconstruction error"]
    assert ours["auroc"] > 0.9
    assert ours["normals_flagged"] < 0.1 < ours["anomalies_caught"]


def test_evaluate_leaves_what_the_report_draws(folder, selfsup, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(folder / "autoencoder", run)
    scores = api.evaluate(run, folder / "test.csv", {"label": "state"})
    found = json.loads((run / "anomaly.json").read_text())
    assert found["scores"] == scores
    assert (found["normal"], found["normals"], found["anomalies"]) == ("ok", 100, 40)
    assert list(found["histograms"]) == DETECTORS
    for name, drawn in found["histograms"].items():
        edges, threshold = np.array(drawn["edges"]), drawn["threshold"]
        assert (np.diff(edges) > 0).all()
        assert edges[0] <= threshold <= edges[-1]
        for part, count, key in (
            ("normal", 100, "normals_flagged"),
            ("abnormal", 40, "anomalies_caught"),
        ):
            counts = np.array(drawn[part])
            assert counts.sum() == count
            above = counts[edges[:-1] >= threshold].sum() / count
            here = counts[(edges[:-1] < threshold) & (edges[1:] > threshold)].sum() / count
            assert above <= scores[name][key] + 1e-9 <= above + here + 2e-9
    threshold = read_toml(run / "run.toml")["anomaly"]["threshold"]
    assert found["histograms"]["reconstruction error"]["threshold"] == pytest.approx(threshold)
    assert selfsup("report", run).code == 0
    html = (run / "report.html").read_text()
    assert "Normal items and anomalies" in html
    assert "isolation forest" in html


def test_scores_far_apart_are_counted_on_a_logarithmic_scale():
    strange = np.array([False] * 4 + [True])
    found = histogram(np.array([0.0, 1e-9, 0.5, 0.9, 1000.0]), strange, 1.0)
    assert found["log"]
    edges = np.array(found["edges"])
    assert (edges[0], edges[-1]) == (pytest.approx(1e-3), pytest.approx(1000))
    assert np.ptp(np.log(edges[1:] / edges[:-1])) < 1e-9
    assert (found["normal"][0], sum(found["normal"])) == (2, 4)
    assert (found["abnormal"][-1], sum(found["abnormal"])) == (1, 1)


@pytest.mark.parametrize("scores", [[0.0, 0.0, 0.0], [2.0, 2.0, 2.0], [-3.0, -0.5, -1.0]])
def test_equal_and_negative_scores_have_a_histogram(scores):
    found = histogram(np.array(scores), np.array([False, True, True]), scores[0])
    assert not found["log"]
    assert (sum(found["normal"]), sum(found["abnormal"])) == (1, 2)
    assert found["edges"][0] < found["edges"][-1]


def test_the_normal_label_can_be_turned_round(folder):
    run, columns = folder / "autoencoder", {"label": "state"}
    right = api.evaluate(run, folder / "test.csv", columns)["PCA"]["auroc"]
    wrong = api.evaluate(run, folder / "test.csv", columns, normal="broken")["PCA"]["auroc"]
    assert wrong == pytest.approx(1 - right)


def test_without_a_label_evaluate_gives_the_loss_as_before(folder, selfsup):
    answer = selfsup("evaluate", folder / "autoencoder")
    assert answer.out.startswith("loss\t")


def test_predict_says_which_rows_are_unusual_and_why(folder, selfsup):
    run, data = folder / "autoencoder", folder / "test.csv"
    answer = selfsup("predict", run, "--data", data)
    assert answer.code == 0, answer.err
    lines = [line.split("\t") for line in answer.out.splitlines()]
    assert len(lines) == 140
    assert [cells[2] for cells in lines] == [f"{data}:{2 + number}" for number in range(140)]
    assert all((cells[0] == "anomaly") == (float(cells[1]) > 1) for cells in lines)
    flagged = [cells[0] == "anomaly" for cells in lines]
    assert sum(flagged[:100]) < 10
    assert sum(flagged[100:]) > 15
    cells = data.read_text().splitlines()[101].split(",")
    assert f"colour {cells[2]} (expected " in lines[100][3]
    assert f"height {cells[1]} (expected " in lines[100][3]


def test_a_model_folder_alone_still_knows_its_threshold(folder, tmp_path):
    shutil.copytree(folder / "vae" / "model", tmp_path / "copied")
    rows = [{"width": "1", "height": "120", "colour": "red"}, ["1", "60", "blue"]]
    usual, odd = api.load(tmp_path / "copied").anomalies(rows)
    assert odd.unusual
    assert odd.ratio > 1 > usual.ratio
    assert not usual.unusual
    assert sum(column.share for column in odd.columns) == pytest.approx(1)
    height = next(column for column in odd.columns if column.name == "height")
    assert height.value == "60"
    assert isinstance(height.expected, float)
    threshold = read_toml(tmp_path / "copied" / "config.toml")["anomaly"]
    assert threshold == read_toml(folder / "vae" / "run.toml")["anomaly"]
    assert odd.ratio == pytest.approx(odd.score / threshold["threshold"])


def test_a_finished_run_can_be_resumed_with_its_threshold(folder, selfsup, tmp_path):
    shutil.copytree(folder / "autoencoder", tmp_path / "run")
    before = read_toml(tmp_path / "run" / "run.toml")["anomaly"]
    answer = selfsup(
        *("pretrain", folder / "autoencoder.toml", "--data", folder / "train.csv"),
        *("--out", tmp_path / "run", "--resume"),
    )
    assert answer.code == 0, answer.err
    assert read_toml(tmp_path / "run" / "run.toml")["anomaly"] == before


def test_wrong_use_is_named(folder, masked_run, selfsup):
    run, data = folder / "autoencoder", folder / "test.csv"
    for arguments, said in (
        ((masked_run, "--data", data, "--label", "state"), "a masked_language run does not tell"),
        ((run, "--normal", "ok"), "give --data"),
        ((run, "--data", data, "--label", "state", "--normal", "okay"), "did you mean 'ok'"),
        ((run, "--data", data, "--label", "colour"), "labels: blue, red"),
    ):
        answer = selfsup("evaluate", *arguments)
        assert answer.code == ConfigError.exit_code
        assert said in answer.err


PICTURES = """
[recipe]
summary = "an autoencoder of pictures"
[data]
name = "image"
size = 8
valid_fraction = 0.2
[model]
name = "mlp"
dims = [32]
dim = 4
[method]
name = "autoencoder"
width = 16
[training]
steps = 100
batch_size = 32
lr = 1e-2
log_every = 50
evaluations = 1
precision = "float32"
device = "cpu"
"""


def test_pictures_are_told_apart_too(selfsup, tmp_path):
    draw = numpy_generator(0, "pictures")
    for part, name, count in (("train", "", 200), ("test", "normal", 30), ("test", "dent", 20)):
        (tmp_path / part / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = np.linspace(0, 100, 64).reshape(8, 8) + draw.integers(0, 30, (8, 8))
            if name == "dent":
                pixels[2:6, 2:6] = 255
            picture = Image.fromarray(pixels.astype(np.uint8))
            picture.save(tmp_path / part / name / f"{number}.png")
    (tmp_path / "recipe.toml").write_text(PICTURES)
    run = tmp_path / "run"
    answer = selfsup(
        "pretrain", tmp_path / "recipe.toml", "--data", tmp_path / "train", "--out", run
    )
    assert answer.code == 0, answer.err
    answer = selfsup("evaluate", run, "--data", tmp_path / "test", "--normal", "normal")
    assert answer.code == 0, answer.err
    assert [line.split("\t")[0].strip() for line in answer.out.splitlines()] == DETECTORS
    assert float(answer.out.splitlines()[0].split("\t")[1].split()[1]) > 0.95
    lines = selfsup("predict", run, "--data", tmp_path / "test" / "dent").out.splitlines()
    assert [len(line.split("\t")) for line in lines] == [3] * 20
    assert sum(line.startswith("anomaly\t") for line in lines) > 15
