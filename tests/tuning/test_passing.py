"""Tunings that act while training alone: together in a real run, resumed, and gone when loaded."""

import shutil

import pytest
import torch

import selfsup as package
from selfsup import registry

TUNING = "full+layer_decay+unfreezing+reinit+mixout+r_drop"


@pytest.fixture(scope="module")
def arguments(masked_run, corpus):
    return (
        *("finetune", masked_run, "--task", "classification", "--data", corpus.labelled),
        *("--tuning", TUNING, "--set", "training.steps=8", "training.checkpoint_every=4"),
        "tuning.mixout.p=0.5",
    )


@pytest.fixture(scope="module")
def run(selfsup, arguments, tmp_path_factory):
    run = tmp_path_factory.mktemp("passing") / "run"
    answer = selfsup(*arguments, "--out", run)
    assert answer.code == 0, answer.err
    return run


def test_a_loaded_run_is_a_plain_task(run, corpus):
    model = package.load(run)
    assert model.values["tuning"]["names"] == TUNING.split("+")
    plain = package.load(run).untrained_encoder()
    assert model.encoder.state_dict().keys() == plain.state_dict().keys()
    assert not {"loss", "after_step", "read"} & vars(model.objective).keys()
    assert not any("forward" in vars(module) for module in model.encoder.modules())
    assert model.predict(["the film was great ."])[0] in ("good", "bad")


def test_a_resumed_run_ends_in_the_same_weights(run, selfsup, arguments, tmp_path):
    again = tmp_path / "run"
    shutil.copytree(run, again)
    shutil.rmtree(again / "model")
    shutil.rmtree(again / "checkpoints" / "step-00000008")
    answer = selfsup(*arguments, "--out", again, "--resume")
    assert answer.code == 0, answer.err
    assert "at step 4" in answer.err
    one, two = (package.load(folder).objective.state_dict() for folder in (run, again))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_every_one_of_them_can_be_asked_for():
    assert set(registry.PASSING) <= set(registry.TUNINGS)
