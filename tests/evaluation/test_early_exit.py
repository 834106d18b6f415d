"""Thresholds by hand and by brute force, what validation data may choose, and what is measured."""

import json

import numpy as np
import pytest
import torch

from selfsup.batch import Vocabulary
from selfsup.errors import ConfigError
from selfsup.evaluation.early_exit import (
    Settings,
    calibrate,
    calibrated_thresholds,
    layers_used,
    measure,
    table,
)
from selfsup.models import transformer
from selfsup.models.transformer import TransformerEncoder
from selfsup.randomness import isolated, seed_layers
from selfsup.tasks import classification, regression
from selfsup.tasks.exits import Config

QUICK = Settings(tolerances=(0.5,), speeds=(0.999,), timed=2, repeats=1)


def yes(*values):
    return np.array(values, dtype=bool)


# Thresholds


def test_an_exit_takes_items_up_to_the_first_that_would_cost_too_much():
    unsure = np.array([[0.8, 0.1, 0.4, 0.2, 0.6]])
    right = np.array([yes(1, 1, 0, 1, 1)])
    full = yes(1, 1, 1, 0, 0)
    # the surest first: 0.1 ties, 0.2 mends an error, 0.4 adds one, 0.6 mends one, 0.8 ties
    assert calibrated_thresholds(unsure, right, full, 0.0) == [pytest.approx(0.9)]
    # without the errors that are mended
    assert calibrated_thresholds(unsure, right, yes(1, 1, 1, 1, 1), 0.0) == [pytest.approx(0.3)]
    assert calibrated_thresholds(unsure, ~yes(1, 1, 1, 1, 1)[None], full, 0.0) == [0.0]


def test_items_that_are_equally_sure_leave_together():
    unsure, right = np.array([[0.2, 0.2, 0.5]]), np.array([yes(1, 0, 1)])
    assert calibrated_thresholds(unsure, right, yes(1, 1, 1), 0.0) == [0.0]
    assert calibrated_thresholds(unsure, right, yes(1, 0, 1), 0.0) == [pytest.approx(0.75)]


def test_the_tolerance_is_shared_out_over_the_exits():
    """Four errors of the full model and tolerance 0.5: two may be added, the first by exit 1."""
    unsure = np.tile(np.linspace(0.05, 0.95, 10), (2, 1))
    right = np.array([yes(1, 1, 0, 1, 0, 1, 1, 1, 1, 1), yes(1, 1, 1, 1, 1, 0, 0, 1, 0, 0)])
    full = yes(1, 1, 1, 1, 1, 1, 0, 0, 0, 0)
    # exit 1: the item at 0.25 is the one that it may add, that at 0.45 is too much - until those
    # from 0.65 on, where it is right and the full model is not
    assert calibrated_thresholds(unsure, right, full, 0.5) == [pytest.approx(0.975), 0.0]
    right[0, 6:] = False
    first, second = calibrated_thresholds(unsure, right, full, 0.5)
    assert first == pytest.approx(0.4)
    # exit 2 gets what is left: 0.45 is right, 0.55 is the second error, 0.75 mends one
    assert second == pytest.approx(0.975)


@pytest.mark.parametrize("tolerance", [0.0, 0.1, 0.6])
def test_thresholds_equal_brute_force_and_keep_their_promise(tolerance):
    draw = np.random.default_rng(7)
    for _ in range(20):
        exits, items = 3, 40
        unsure = draw.integers(0, 30, (exits, items)) / 30
        right, full = draw.random((exits, items)) < 0.7, draw.random(items) < 0.8
        found = calibrated_thresholds(unsure, right, full, tolerance)
        here, added = np.ones(items, bool), 0
        for number in range(exits):
            best = 0.0
            for threshold in np.arange(31) / 30 + 1 / 60:
                leaving = here & (unsure[number] < threshold)
                more = int((full[leaving].astype(int) - right[number][leaving]).sum())
                if added + more <= tolerance * (~full).sum() * (number + 1) / exits:
                    best = threshold
            leaving = here & (unsure[number] < found[number])
            assert np.array_equal(leaving, here & (unsure[number] < best))
            added += int((full[leaving].astype(int) - right[number][leaving]).sum())
            here &= ~leaving
        assert added <= tolerance * (~full).sum()


# Tasks


class Rows:
    """Random tokens; the label is the parity of the first, which a random model half knows."""

    task, truncated, fields = "classification", 0, ("tokens", "label")

    def __init__(self, count, seed, numbers=False):
        draw = np.random.default_rng(seed)
        self.lengths = draw.integers(2, 9, count)
        self.rows = [draw.integers(1, 30, n) for n in self.lengths]
        self.labels = np.array([row[0] % 2 for row in self.rows])
        if numbers:
            self.labels = np.array([float(row.sum()) for row in self.rows])

    def __len__(self):
        return len(self.rows)

    def batch(self, numbers):
        longest = max(self.lengths[numbers])
        tokens = np.array([np.pad(self.rows[i], (0, longest - self.lengths[i])) for i in numbers])
        mask = np.arange(longest) < self.lengths[numbers][:, None]
        arrays = {"tokens": tokens, "mask": mask, "label": self.labels[numbers]}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def build(module, exits, layers=4):
    with isolated():
        seed_layers(1, "task")
        config = transformer.Config(dim=16, layers=layers, heads=2, init_std=0.25)
        encoder = TransformerEncoder(config, Vocabulary(size=30))
        task_class = {classification: classification.Classification}.get(
            module, regression.Regression
        )
        task = task_class(module.Config(exits=exits), encoder, ("a", "b"))
        for name, parameter in task.named_parameters():
            if not name.startswith("encoder") and parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.7)
    return task.eval()


def test_calibrated_exits_keep_their_promise_on_the_data_that_chose_them():
    task, valid = build(classification, Config(training="joint", tolerance=0.2)), Rows(200, 0)
    full, layers = layers_used(task, valid)
    assert set(layers.tolist()) == {4}  # nothing is calibrated yet
    thresholds = calibrate(task, valid)
    assert thresholds == pytest.approx(task.exits.thresholds.tolist())
    score, layers = layers_used(task, valid)
    assert 1 - score <= (1 - full) * 1.2 + 1e-9
    assert layers.mean() < 4
    batch = valid.batch(np.arange(200))
    assert score == float((task.predict(batch).values == batch["label"]).double().mean())


def test_measuring_a_classifier():
    exits = Config(training="joint", rule="entropy", threshold=0.1)
    task, valid, test = build(classification, exits), Rows(120, 0), Rows(40, 1)
    task.exits.thresholds.fill_(0.25)
    found = measure(task, valid, test, QUICK)
    assert task.exits.config == exits
    assert task.exits.thresholds.tolist() == [0.25] * 3
    assert json.loads(json.dumps(found)) == found
    assert [row["rule"] for row in found["settings"]] == [
        "calibrated",
        "speed",
        *["patience"] * 2,
    ]
    assert found["full"]["test"]["layers"] == 4
    assert found["full"]["test"]["leaving"] == [0, 0, 0, 1]
    for row in found["settings"]:
        for part in ("valid", "test"):
            shares = row[part]["leaving"]
            assert sum(shares) == pytest.approx(1, abs=1e-3)
            by_hand = sum(n * share for n, share in enumerate(shares, 1))
            assert row[part]["layers"] == pytest.approx(by_hand, abs=1e-3)
        assert all(speedup > 0 for speedup in row["speedup"].values())
    task.exits.config = Config(training="joint", rule="patience", patience=1)
    score, layers = layers_used(task, test)
    row = next(row for row in found["settings"] if row.get("patience") == 1)
    assert row["test"]["accuracy"] == pytest.approx(score, abs=1e-5)
    assert row["test"]["layers"] == pytest.approx(layers.mean(), abs=1e-4)
    assert len(list(table(found))) == 2 + len(found["settings"])
    assert len({len(cells) for cells in table(found)}) == 1


def test_the_test_data_choose_nothing():
    task, valid = build(classification, Config(training="joint")), Rows(120, 0)
    one, other = (measure(task, valid, Rows(40, seed), QUICK) for seed in (1, 2))
    assert [row["test"] for row in one["settings"]] != [row["test"] for row in other["settings"]]
    assert one["chosen"] == other["chosen"]
    for a, b in zip(one["settings"], other["settings"], strict=True):
        assert a["valid"] == b["valid"]
        assert a.get("thresholds") == b.get("thresholds")
    least = one["full"]["valid"]["accuracy"] - 0.01
    good = [row["valid"] for row in one["settings"] if row["valid"]["accuracy"] >= least]
    chosen = one["settings"][one["chosen"]]["valid"]
    assert chosen in good
    assert chosen["layers"] == min(row["layers"] for row in good)


def test_measuring_a_regression():
    exits = Config(training="joint", rule="patience")
    task, valid = build(regression, exits), Rows(40, 0, numbers=True)
    settings = Settings(closeness=(0.2, 5.0), patiences=(1,), timed=2, repeats=1)
    found = measure(task, valid, Rows(20, 1, numbers=True), settings)
    assert found["metric"] == "spearman"
    assert [(row["patience"], row["threshold"]) for row in found["settings"]] == [
        (1, 0.2),
        (1, 5.0),
    ]
    assert found["settings"][1]["test"]["leaving"][1] > found["settings"][0]["test"]["leaving"][1]


def test_a_task_without_exits_cannot_be_measured():
    task = build(classification, Config())
    with pytest.raises(ConfigError, match=r"no exits: finetune with --set task.exits.training"):
        measure(task, Rows(8, 0), Rows(8, 1), QUICK)
