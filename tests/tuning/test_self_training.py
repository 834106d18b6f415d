"""Which items are taken, rounds with a toy classifier, and the verb."""

import json

import numpy as np
import pytest

from selfsup.data.labels import Labelled
from selfsup.errors import ConfigError, DataError
from selfsup.tuning.self_training import Config, self_train, taken

LABELLED = Labelled("classification", ["-9", "9"], ["low", "high"], ("low", "high"), "few.csv")
ITEMS = [str(number) for number in range(-8, 9) if number]
TRUTH = ["low" if int(item) < 0 else "high" for item in ITEMS]


class Nearest:
    """Says the class of the nearest example, the surer the nearer."""

    def __init__(self, examples: Labelled):
        self.examples = examples

    def scores(self, items) -> np.ndarray:
        def distance(item, name):
            pairs = zip(self.examples.items, self.examples.labels, strict=True)
            return min(abs(int(item) - int(other)) for other, label in pairs if label == name)

        far = np.array([[distance(i, n) for n in LABELLED.names] for i in items], dtype=float)
        near = -np.log(far + 0.5)
        return near - np.logaddexp.reduce(near, axis=1, keepdims=True)


def scores_of(task, labelled):
    return task.scores(labelled.items)


def run(**config):
    seen: list[Labelled] = []

    def train(examples, number):
        assert number == len(seen)
        seen.append(examples)
        return Nearest(examples)

    task, rounds = self_train(train, scores_of, LABELLED, ITEMS, Config(**config), TRUTH)
    return task, rounds, seen


def test_taken_by_loops():
    scores = np.log(np.random.default_rng(0).dirichlet([0.4, 0.4, 0.4], 90))
    every, some = taken(scores, 0.8, False), taken(scores, 0.8, True)
    assert every.tolist() == [bool(row.max() >= 0.8) for row in np.exp(scores)]
    counts = [int((every & (scores.argmax(1) == c)).sum()) for c in range(3)]
    assert min(counts) > 2
    for number in range(3):
        own = [i for i in range(90) if every[i] and scores[i].argmax() == number]
        own.sort(key=lambda i: -scores[i].max())
        assert set(own[: min(counts)]) == {i for i in own if some[i]}
    assert not taken(np.log([[0.9, 0.1], [0.95, 0.05]]), 0.8, True).any()  # one class alone
    assert not (some & ~every).any()


def test_rounds_go_on_from_the_labelled_examples_until_nothing_changes():
    task, rounds, seen = run(threshold=0.75, rounds=9)
    assert len(seen[0]) == 2
    for examples, told in zip(seen[1:], rounds, strict=False):
        assert examples.items[:2] == LABELLED.items
        assert len(examples) == 2 + told["pseudo_labels"]
        assert sum(told["by_class"].values()) == told["pseudo_labels"]
        assert told["right"] == 1.0
    taken = [told["pseudo_labels"] for told in rounds]
    assert taken == [8, 12, 14, 14]
    assert len(seen) == len(rounds)  # the last round found nothing new, and was not trained
    assert task.examples is seen[-1]


def test_rounds_are_limited_and_none_may_be_sure():
    _, rounds, seen = run(threshold=0.75, rounds=1)
    assert (len(rounds), len(seen)) == (1, 2)
    _, rounds, seen = run(threshold=1.0, rounds=3)
    assert (len(rounds), len(seen)) == (1, 1)
    assert rounds[0]["pseudo_labels"] == 0
    assert rounds[0]["right"] is None


def test_bad_input():
    with pytest.raises(DataError, match="there is none"):
        self_train(None, None, LABELLED, [], Config())
    numbers = Labelled("regression", ["a"], [0.5], (), "numbers.csv")
    with pytest.raises(ConfigError, match="is for classification, not for regression"):
        self_train(None, None, numbers, ["b"], Config())
    for values in ({"threshold": 0.0}, {"threshold": 1.5}, {"rounds": 0}):
        with pytest.raises(ValueError, match=next(iter(values))):
            Config(**values)


def test_the_verb(corpus, masked_run, selfsup, tmp_path):
    lines = corpus.labelled.read_text().splitlines(True)
    (tmp_path / "few.csv").write_text("".join(lines[:25]))
    (tmp_path / "texts.txt").write_text("".join(corpus.text.read_text().splitlines(True)[:100]))
    answer = selfsup(
        *("self-train", masked_run, "--data", tmp_path / "few.csv", "--out", tmp_path / "run"),
        *("--unlabelled", tmp_path / "texts.txt", "--set", "training.steps=25", "training.lr=5e-3"),
        *("self_training.rounds=1", "self_training.threshold=0.7"),
    )
    assert answer.code == 0, answer.err
    told = json.loads((tmp_path / "run" / "self_training.json").read_text())
    assert len(told["rounds"]) == 1
    assert told["rounds"][0]["pseudo_labels"] > 20
    answer = selfsup("evaluate", tmp_path / "run", "--data", corpus.test)
    found = dict(line.split() for line in answer.out.splitlines())
    assert float(found["accuracy"]) > 0.8
