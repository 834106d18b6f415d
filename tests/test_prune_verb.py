"""`selfsup prune`: whole runs of a smaller shape, and errors of one line."""

import json
import tomllib

import numpy as np
import pytest
import torch

import selfsup as library
from selfsup.batch import AudioSpec, ImageSpec, SeriesSpec, Vocabulary
from selfsup.models.transformer import Config, TransformerEncoder
from selfsup.verbs.pruning import LENGTH, example_batch, seconds_per_batch


@pytest.fixture(scope="module")
def deep_run(selfsup, corpus, tmp_path_factory):
    """A pre-trained run of three layers."""
    run = tmp_path_factory.mktemp("deep") / "run"
    settings = ("model.layers=3", "training.steps=4", "training.evaluations=0")
    answer = selfsup(
        *("pretrain", corpus.masked, "--data", corpus.text, "--out", run, "--set", *settings)
    )
    assert answer.code == 0, answer.err
    return run


def lines(path):
    return [line.rpartition(",")[0] for line in path.read_text().splitlines()[1:]]


def test_a_run_without_its_least_important_heads(selfsup, corpus, tuned_run, tmp_path):
    out = tmp_path / "heads"
    answer = selfsup(
        *("prune", tuned_run, "--heads", 0.5, "--data", corpus.labelled, "--test", corpus.test),
        *("--out", out),
    )
    assert answer.code == 0, answer.err
    found = json.loads((out / "pruning.json").read_text())
    (gone,) = found["removed"]["0"]
    (importance,) = found["importance"]
    assert importance[gone] == min(importance)
    assert f"layer 0 loses 1 heads: {gone}" in answer.out
    assert [row["share"] for row in found["curve"]] == [tenth / 10 for tenth in range(10)]
    assert found["curve"][0]["score"] == found["score"]["before"]
    assert found["curve"][5]["score"] == found["score"]["after"]
    assert found["curve"][9]["parameters"] < found["parameters"]["after"]
    assert found["parameters"]["before"] - found["parameters"]["after"] == 4 * 16 * 32 + 3 * 16
    assert found["seconds_per_batch"]["after"] > 0
    lengths = [batch["tokens"][1] for batch in found["batches"]]  # of the scored sentences
    assert lengths == sorted(lengths)
    assert max(lengths) < LENGTH
    # the run is whole
    model, before = library.load(out), library.load(tuned_run)
    assert model.encoder.config.heads_left == (1,)
    texts = lines(corpus.test)
    share = np.array(model.predict_proba(texts))
    assert np.array_equal(share, np.array(library.load(out).predict_proba(texts)))
    assert np.abs(share - np.array(before.predict_proba(texts))).max() > 1e-4
    score = library.evaluate(out, corpus.test)["accuracy"]
    assert score == pytest.approx(found["score"]["after"])
    run = tomllib.loads((out / "run.toml").read_text())
    assert run["model"]["heads_left"] == [1]
    assert run["pruning"]["kind"] == "heads"
    assert run["facts"]["parameters"] == found["parameters"]["after"]


def test_a_pruned_run_is_fine_tuned_again(selfsup, corpus, tuned_run, tmp_path):
    out = tmp_path / "units"
    answer = selfsup("prune", tuned_run, "--units", 0.75, "--data", corpus.labelled, "--out", out)
    assert answer.code == 0, answer.err
    again = selfsup(
        *("finetune", out, "--task", "classification", "--data", corpus.labelled),
        *("--out", tmp_path / "again", "--set", "training.steps=3"),
    )
    assert again.code == 0, again.err
    assert library.load(tmp_path / "again").encoder.config.feedforward_left == (32,)


def test_a_pretrained_run_without_layers(selfsup, corpus, deep_run, tmp_path):
    for option, value, gone in (("--layers", "0,2", [0, 2]), ("--top-layers", 1, [2])):
        out = tmp_path / option.strip("-")
        answer = selfsup("prune", deep_run, option, value, "--out", out)
        assert answer.code == 0, answer.err
        found = json.loads((out / "pruning.json").read_text())
        assert found["removed"] == gone
        model = library.load(out)
        assert model.encoder.num_layers == 3 - len(gone)
        assert "score" not in found
        assert library.evaluate(out)["loss"] > 0
        before = library.load(deep_run).encoder
        kept = next(layer for layer in range(3) if layer not in gone)
        assert torch.equal(
            model.encoder.layers[0].attention.qkv.weight, before.layers[kept].attention.qkv.weight
        )
    assert len(found["curve"]) == 3
    assert selfsup("report", out).code == 0


def test_zeros_make_a_file_that_compresses(selfsup, deep_run, tmp_path):
    out = tmp_path / "zeros"
    answer = selfsup("prune", deep_run, "--weights", 0.8, "--out", out)
    assert answer.code == 0, answer.err
    assert "80.0% of the blocks' weights are zeros: the file compresses" in answer.out
    found = json.loads((out / "pruning.json").read_text())
    assert found["compressed_bytes"]["after"] < 0.8 * found["compressed_bytes"]["before"]
    assert found["bytes"]["after"] > 0.9 * found["bytes"]["before"]
    assert found["parameters"]["after"] == found["parameters"]["before"]


def test_movement_trains_on_while_it_prunes(selfsup, corpus, tuned_run, tmp_path):
    out = tmp_path / "movement"
    answer = selfsup(
        *("prune", tuned_run, "--movement", 0.5, "--data", corpus.labelled, "--test", corpus.test),
        *("--out", out, "--set", "training.steps=20", "training.lr=2e-3"),
    )
    assert answer.code == 0, answer.err
    found = json.loads((out / "pruning.json").read_text())
    assert found["zeros"] == pytest.approx(0.5, abs=0.01)
    assert library.evaluate(out, corpus.test)["accuracy"] == pytest.approx(found["score"]["after"])
    assert found["score"]["after"] > 0.8
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--heads", "0.5"], "pruning heads needs labelled examples"),
        (["--movement", "0.5"], "pruning movement needs labelled examples"),
        (["--heads", "0.5", "--data", "DATA"], "a pre-trained run has no labels"),
        (["--layers", "5"], "there is no layer 5: the layers are 0 to 2"),
        (["--layers", "0,1,2"], "all 3 layers would be dropped"),
        (["--layers", "a"], "--layers a: expected numbers"),
        (["--top-layers", "3"], "of 3 layers, 1 to 2 can be dropped"),
        (["--weights", "2"], "must lie in [0, 1), got 2.0"),
    ],
)
def test_what_cannot_be_pruned_is_one_clear_error(
    selfsup, corpus, deep_run, tmp_path, options, message
):
    options = [str(corpus.labelled) if word == "DATA" else word for word in options]
    answer = selfsup("prune", deep_run, "--out", tmp_path / "out", *options)
    assert answer.code == 2
    assert message in answer.err
    assert len(answer.err.splitlines()) == 1


@pytest.mark.parametrize("options", [["--heads", "1.5"], ["--movement", "1.0"]])
def test_a_share_is_a_share(selfsup, corpus, tuned_run, tmp_path, options):
    data = ("--data", corpus.labelled)
    answer = selfsup("prune", tuned_run, "--out", tmp_path / "out", *options, *data)
    assert answer.code == 2
    assert "the share to prune must lie in" in answer.err


@pytest.mark.parametrize(
    ("spec", "keys"),
    [
        (Vocabulary(size=9), {"positions": "learned", "max_length": 8}),
        (ImageSpec(size=8, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3), {}),
        (AudioSpec(rate=8000, mel=5, hop=80), {"patch": 2}),
        (AudioSpec(rate=8000, mel=0, hop=0), {"conv_channels": 8}),
        (SeriesSpec(channels=2, length=24), {}),
    ],
)
def test_every_kind_of_input_can_be_timed(spec, keys):
    encoder = TransformerEncoder(Config(dim=8, layers=1, heads=2, **keys), spec)
    encoder.train()
    batch = example_batch(encoder, rows=2, length=10)
    seconds = seconds_per_batch([encoder, encoder], [batch, batch], rounds=2)
    assert min(seconds) > 0
    assert encoder.training
    assert encoder.eval()(batch).last.shape[0] == 2
