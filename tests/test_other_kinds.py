"""Pictures and table rows go through the verbs that text goes through, from end to end."""

import base64
import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from selfsup import api
from selfsup.errors import ConfigError, DataError
from selfsup.randomness import numpy_generator

PICTURES = """
[recipe]
summary = "SimCLR of the tests"
[data]
name = "image"
size = 12
valid_fraction = 0.2
[model]
name = "resnet"
blocks = [1, 1]
widths = [8, 16]
stem = "cifar"
[method]
name = "simclr"
temperature = 0.2
hidden_dim = 16
projection_dim = 8
[method.views]
crop_scale = [0.5, 1.0]
jitter = 0.0
grey = 0.0
blur = 0.0
[training]
steps = 30
batch_size = 32
lr = 5e-3
log_every = 10
evaluations = 2
precision = "float32"
device = "cpu"
"""
ROWS = """
[recipe]
summary = "an autoencoder of the tests"
[data]
name = "table"
leave_out = ["label"]
[model]
name = "mlp"
dims = [16]
dim = 4
[method]
name = "autoencoder"
[training]
steps = 60
batch_size = 32
lr = 1e-2
log_every = 10
evaluations = 2
precision = "float32"
device = "cpu"
"""


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Two folders of classes, red and blue stripes, 150 pictures each; 20 more to test with."""
    folder = tmp_path_factory.mktemp("photos")
    draw = numpy_generator(0, "photos")
    for part, count in (("train", 150), ("test", 20)):
        for channel, name in ((0, "red"), (2, "blue")):
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = draw.integers(0, 120, (14, 12, 3))
                pixels[:, draw.integers(12) :, channel] += 100
                picture = Image.fromarray(pixels.astype(np.uint8))
                picture.save(folder / part / name / f"{number}.png")
    (folder / "simclr.toml").write_text(PICTURES)
    return folder


@pytest.fixture(scope="session")
def picture_run(photos, selfsup, tmp_path_factory):
    run = tmp_path_factory.mktemp("pictures") / "run"
    answer = selfsup("pretrain", photos / "simclr.toml", "--data", photos / "train", "--out", run)
    assert answer.code == 0, answer.err
    return run


def test_the_online_probe_looks_and_changes_nothing(picture_run):
    rows = [json.loads(line) for line in (picture_run / "metrics.jsonl").read_text().splitlines()]
    looked = [row["knn_accuracy"] for row in rows if row["split"] == "valid"]
    assert len(looked) == 3
    assert all(0.5 <= value <= 1 for value in looked)
    assert all("knn_accuracy" not in row for row in rows if row["split"] == "train")


def test_probe_compares_with_an_untrained_network_and_raw_pixels(picture_run, photos, selfsup):
    answer = selfsup(*("probe", picture_run, "--data", photos / "train", "--test", photos / "test"))
    assert answer.code == 0, answer.err
    scores = json.loads((picture_run / "probe.json").read_text())["scores"]
    assert list(scores) == ["pretrained", "untrained", "raw input"]
    assert scores["pretrained"]["linear"] > 0.9
    assert all(0 <= v <= 1 for row in scores.values() for v in row.values())
    assert [line.split("\t")[0].strip() for line in answer.out.splitlines()] == list(scores)


def test_finetune_predict_embed_compare_report(picture_run, photos, selfsup, tmp_path):
    tuned = tmp_path / "tuned"
    answer = selfsup(
        *("finetune", picture_run, "--task", "classification", "--data", photos / "train"),
        *("--out", tuned, "--set", "training.steps=40", "training.lr=5e-3"),
    )
    assert answer.code == 0, answer.err
    assert f"selfsup predict {tuned} PICTURE" in answer.err
    answer = selfsup("predict", tuned, "--data", photos / "test")
    lines = [line.split("\t") for line in answer.out.splitlines()]
    assert len(lines) == 40
    right = sum(f"/{name}/" in path for name, _, path in lines)
    assert right >= 36
    one = next((photos / "test" / "red").iterdir())
    assert selfsup("predict", tuned, one).out.split("\t")[0] == api.load(tuned).predict([one])[0]
    assert selfsup("evaluate", tuned, "--data", photos / "test").out.startswith("examples\t40")
    answer = selfsup("embed", picture_run, "--data", photos / "test", "--out", tmp_path / "v.npy")
    assert answer.code == 0, answer.err
    assert np.load(tmp_path / "v.npy").shape == (40, 16)
    index = tmp_path / "index"
    answer = selfsup("embed", picture_run, "--data", photos / "test", "--out", index)
    assert answer.out == f"{index}\t40 x 16 float32\n"
    found = [line.split("\t") for line in selfsup("search", index, one).out.splitlines()]
    assert len(found) == 10
    assert "1.0000" in {score for _, score, path in found if path == str(one)}
    assert sum("/red/" in path for _, _, path in found) >= 9
    answer = selfsup(
        *("compare", picture_run, "--task", "classification", "--data", photos / "train"),
        *("--labels", 20, "--seeds", 0, 1, "--lrs", "5e-3", "--steps", 10, "--jobs", 1),
    )
    assert answer.code == 0, answer.err
    arms = json.loads((picture_run / "compare.json").read_text())["arms"]
    assert set(arms) == {"pretrained", "scratch", "baseline"}
    assert min(arms["baseline"]["20"]) > 0.6


def test_the_report_shows_pictures_and_probes(picture_run, photos, selfsup, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(picture_run, run)
    (run / "probe.json").unlink(missing_ok=True)
    panels = json.loads((run / "pictures.json").read_text())
    assert [panel["title"] for panel in panels] == ["Views", "Nearest neighbours"]
    for panel in panels:
        assert [len(row) for row in panel["rows"]] == [8] * 6
    png = panels[0]["rows"][0][0]["png"].partition(",")[2]
    first = Image.open(io.BytesIO(base64.b64decode(png)))
    assert first.size == (12, 12)
    assert selfsup("report", run).code == 0
    assert "Frozen features" not in (run / "report.html").read_text()
    answer = selfsup("probe", run, "--data", photos / "train", "--test", photos / "test")
    assert answer.code == 0, answer.err
    assert selfsup("report", run).code == 0
    html = (run / "report.html").read_text()
    assert html.count('src="data:image/png;base64,') == 2 * 6 * 8
    assert "Frozen features" in html
    assert "40 test examples" in html
    assert "40 pictures and their labels" in html
    assert "filled blanks" not in html, "pictures have none: nothing to ask for"


def test_too_many_damaged_pictures_stop_with_exit_code_3(photos, selfsup, tmp_path):
    for number in range(20):
        (tmp_path / "in").mkdir(exist_ok=True)
        content = (photos / "train" / "red" / f"{number}.png").read_bytes()
        (tmp_path / "in" / f"{number}.png").write_bytes(content[: 200 if number < 2 else None])
    answer = selfsup(
        "pretrain", photos / "simclr.toml", "--data", tmp_path / "in", "--out", tmp_path / "run"
    )
    assert answer.code == DataError.exit_code == 3
    assert "2 of 20 items cannot be used" in answer.err
    assert "0.png" in answer.err


def test_a_method_of_another_kind_of_data_is_refused(photos, selfsup, tmp_path):
    recipe = tmp_path / "wrong.toml"
    recipe.write_text(PICTURES.replace('"simclr"', '"masked_language"'))
    recipe.write_text(recipe.read_text().partition("temperature")[0] + "[training]\nsteps = 2\n")
    answer = selfsup("pretrain", recipe, "--data", photos / "train", "--out", tmp_path / "run")
    assert answer.code == ConfigError.exit_code
    assert "masked_language reads tokens" in answer.err


def test_a_table_from_rows_to_vectors(selfsup, tmp_path):
    draw = numpy_generator(0, "rows")
    lines = ["width,height,colour,label"]
    for _ in range(300):
        size = draw.normal()
        colour = "red" if size > 0 else "blue"
        lines.append(f"{size:.3f},{2 * size + 0.1 * draw.normal():.3f},{colour},{int(size > 0)}")
    (tmp_path / "rows.csv").write_text("\n".join(lines))
    (tmp_path / "rows.toml").write_text(ROWS)
    run = tmp_path / "run"
    answer = selfsup(
        "pretrain", tmp_path / "rows.toml", "--data", tmp_path / "rows.csv", "--out", run
    )
    assert answer.code == 0, answer.err
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["split"] == "valid"]
    assert losses[-1] < 0.5 * losses[0]
    answer = selfsup("probe", run, "--data", tmp_path / "rows.csv")
    assert answer.code == 0, answer.err
    scores = json.loads((run / "probe.json").read_text())["scores"]
    assert scores["pretrained"]["linear"] > 0.9
    answer = selfsup("embed", run, "--data", tmp_path / "rows.csv", "--out", tmp_path / "v.npy")
    assert np.load(tmp_path / "v.npy").shape == (300, 4)


def test_a_model_of_another_kind_of_data_is_refused(photos, selfsup, tmp_path):
    recipe = tmp_path / "wrong.toml"
    lines = PICTURES.replace('name = "resnet"', 'name = "recurrent"').splitlines()
    dropped = ("blocks", "widths", "stem")
    recipe.write_text("\n".join(line for line in lines if not line.startswith(dropped)))
    answer = selfsup("pretrain", recipe, "--data", photos / "train", "--out", tmp_path / "run")
    assert answer.code == ConfigError.exit_code
    assert "model.name = 'recurrent' reads audio, text, and the data are image" in answer.err
