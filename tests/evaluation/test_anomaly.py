"""Scores of anomalies: columns against loops, detectors against slow versions, what is expected."""

import math

import numpy as np
import pytest
import torch
from sklearn.covariance import LedoitWolf

from selfsup.data.table import TablePreprocessor
from selfsup.data.table_columns import CategoricalColumn, NumericColumn, Rows, fit_column
from selfsup.errors import ConfigError
from selfsup.evaluation.anomaly import (
    Anomaly,
    UnusualColumn,
    anomalies,
    calibration,
    column_errors,
    expected_cell,
    line,
    original,
)
from selfsup.evaluation.detectors import (
    CONTROLS,
    NEIGHBOURS,
    all_scores,
    gaussian,
    judged,
    largest_deviation,
    neighbours,
    normal_label,
    principal,
)
from selfsup.methods.autoencoding.autoencoder import Autoencoder
from selfsup.methods.autoencoding.autoencoder import Config as Method
from selfsup.methods.autoencoding.vae import VAE
from selfsup.methods.autoencoding.vae import Config as VAEConfig
from selfsup.model import Model
from selfsup.models.mlp import Config as Network
from selfsup.models.mlp import MLPEncoder
from selfsup.randomness import isolated, numpy_generator, seed_layers

COLUMNS = (
    NumericColumn("age", mean=40.0, std=10.0, missing=True),
    CategoricalColumn("city", ("Bonn", "Rom"), missing=False),
    NumericColumn("size", mean=2.0, std=0.5, missing=False),
)
NAMES = ("age", "city", "size")
SOURCE = (0, 2, 1, 1, 1, 0)  # numbers, categories, indicators: as TablePreprocessor lays them out


def model(method: str = "autoencoder") -> Model:
    """An untrained model of rows of age, city and size."""
    preprocessor = TablePreprocessor(COLUMNS)
    with isolated():
        seed_layers(0, "model")
        encoder = MLPEncoder(Network(dims=(8,), dim=3), preprocessor.spec)
        objective = (
            Autoencoder(Method(width=8), encoder, preprocessor.spec)
            if method == "autoencoder"
            else VAE(VAEConfig(width=8, latent_dim=3), encoder, preprocessor.spec)
        )
    return Model(objective, preprocessor, (), {"method": {"name": method}}, "cpu")


def rows(count: int, seed: int = 0, width: int = 6) -> np.ndarray:
    """Correlated rows, float32."""
    draw = numpy_generator(seed, "rows")
    return (draw.normal(size=(count, 3)) @ draw.normal(size=(3, width))).astype(np.float32)


def test_errors_of_encoded_columns_are_joined_by_table_column():
    errors = torch.from_numpy(rows(7)).square()
    slow = np.zeros((7, 3))
    for row in range(7):
        for place, column in enumerate(SOURCE):
            slow[row, column] += float(errors[row, place])
    np.testing.assert_allclose(column_errors(errors, SOURCE, 3), slow, rtol=1e-6)


@pytest.mark.parametrize("method", ["autoencoder", "vae"])
def test_scores_shares_and_the_order_of_columns(method):
    judge = model(method)
    judge.values["anomaly"] = {"threshold": 2.0}
    cells = (["55", "Rom", 2.5], ["", "Oslo", "-1"])
    items = [dict(zip(NAMES, cells[0], strict=True)), cells[1]]
    found = anomalies(judge, items, batch_size=1)
    encoded = torch.from_numpy(judge.preprocessor.encode(items))
    with torch.no_grad():
        rebuilt = judge.objective.reconstruct({"row": encoded})
    for number, one in enumerate(found):
        errors = [float(rebuilt[number, i] - encoded[number, i]) ** 2 for i in range(6)]
        by_column = {
            name: sum(errors[i] for i in range(6) if SOURCE[i] == column)
            for column, name in enumerate(NAMES)
        }
        assert one.score == pytest.approx(sum(errors), rel=1e-5)
        assert one.ratio == pytest.approx(one.score / 2)
        assert one.unusual == (one.score > 2)
        assert [c.name for c in one.columns] == sorted(by_column, key=lambda n: -by_column[n])
        for column in one.columns:
            assert column.share == pytest.approx(by_column[column.name] / sum(errors), rel=1e-5)
            assert column.value == cells[number][NAMES.index(column.name)]
    for one, same in zip(found, anomalies(judge, items, batch_size=2), strict=True):
        assert same.score == pytest.approx(one.score, rel=1e-5)
        assert [c.name for c in same.columns] == [c.name for c in one.columns]


def test_at_most_one_percent_of_the_held_out_rows_lie_above_the_threshold():
    judge, held_out = model(), rows(450)
    section = calibration(judge, Rows(held_out))["anomaly"]
    encoded = torch.from_numpy(held_out)
    with torch.no_grad():
        scores = (judge.objective.reconstruct({"row": encoded}) - encoded).square().sum(1)
    assert section["held_out"] == 450
    assert section["false_alarm_rate"] == 0.01
    assert int((scores > section["threshold"] * (1 + 1e-6)).sum()) == 4
    assert section["threshold"] == pytest.approx(float(scores.sort().values[-5]), rel=1e-5)


def test_a_model_without_a_threshold_says_what_to_do():
    with pytest.raises(ConfigError, match="pre-train an autoencoder or a vae"):
        model().anomalies([["30", "Bonn", "2"]])


@pytest.mark.parametrize("scale", ["standard", "quantile"])
def test_a_rebuilt_number_comes_back_on_its_own_scale(scale):
    values = numpy_generator(0, "values").lognormal(size=500).tolist()
    column = fit_column("price", True, values, 64, scale)
    assert isinstance(column, NumericColumn)
    for value in sorted(values)[5:-5:30]:
        assert original(column, float(column.encode([value])[0])) == pytest.approx(value, rel=1e-3)


def test_what_the_model_expects_in_a_cell():
    city = CategoricalColumn("city", ("Bonn", "Rom"), missing=True)
    assert expected_cell(city, np.array([0.1, 0.7, 0.1, 0.0])) == "Rom"
    assert expected_cell(city, np.array([0.1, 0.2, 0.6, 0.0])) == "missing"
    assert expected_cell(city, np.array([0.1, 0.2, 0.3, 0.4])) == "another value"
    assert expected_cell(COLUMNS[0], np.array([1.0, 0.2])) == 50.0
    assert expected_cell(COLUMNS[0], np.array([1.0, 0.8])) == "missing"


def test_huge_numbers_are_shown_short():
    huge = UnusualColumn("a", 0.9, 1.5e30, 12345.6)
    assert line("x", Anomaly(True, 9.0, 3.0, (huge,))).endswith("a 1.5e+30 (expected 12346)")


def test_a_line_stays_one_line():
    odd = UnusualColumn("note", 0.6, "a\tb\nc", "missing")
    empty = UnusualColumn("bytes", 0.4, " ", 123456.7)
    said = line("new.csv:3", Anomaly(False, 0.25, 0.125, (odd, empty)))
    assert said.split("\t") == [
        *("normal", "0.125", "new.csv:3"),
        "note a b c (expected missing), bytes missing (expected 123457)",
    ]
    assert line("a.png", Anomaly(True, 9.0, 3.0, ())) == "anomaly\t3\ta.png"


def test_latent_density_is_the_mahalanobis_distance():
    train, new = rows(200).astype(np.float64) + 3, rows(5, seed=1).astype(np.float64)
    inverse = np.linalg.inv(LedoitWolf().fit(train).covariance_)
    centre = train.mean(0)
    slow = [math.sqrt((row - centre) @ inverse @ (row - centre)) for row in new]
    np.testing.assert_allclose(gaussian(train, 0)(new), slow, rtol=1e-6)


def test_pca_leaves_what_its_components_do_not_hold():
    train = rows(200).astype(np.float64) + 0.1 * numpy_generator(2, "noise").normal(size=(200, 6))
    new, centre = rows(5, seed=1).astype(np.float64), train.mean(0)
    values, axes = np.linalg.eigh(np.cov(train.T))
    values, axes = values[::-1], axes[:, ::-1]
    count = 1 + int(np.sum(np.cumsum(values) / values.sum() < 0.95))
    assert 0 < count < 6
    kept = axes[:, :count]
    slow = [np.sum((r - centre - kept @ (kept.T @ (r - centre))) ** 2) for r in new]
    np.testing.assert_allclose(principal(train, 0)(new), slow, rtol=1e-6)


def test_distance_to_the_fifth_neighbour():
    train, new = rows(60), rows(7, seed=1)
    slow = [sorted(np.linalg.norm(train - row, axis=1))[NEIGHBOURS - 1] for row in new]
    np.testing.assert_allclose(neighbours(train, 0)(new), slow, rtol=1e-4)
    few = neighbours(train[:3], 0)(new)  # fewer than five: the farthest
    np.testing.assert_allclose(few, [np.linalg.norm(train[:3] - r, axis=1).max() for r in new])


def test_the_largest_deviation_counts_values_that_never_changed():
    train = rows(50).astype(np.float64)
    train[:, 2] = 0
    new = rows(4, seed=1).astype(np.float64)
    std = np.where(np.arange(6) == 2, 1, train.std(0))
    slow = [max(abs(v) for v in (row - train.mean(0)) / std) for row in new]
    np.testing.assert_allclose(largest_deviation(train, 0)(new), slow)


def test_the_forest_depends_on_its_seed_alone():
    train, new = rows(80), np.concatenate([rows(10, seed=1), np.full((1, 6), 50.0)])
    first = CONTROLS["isolation forest"](train, 3)(new)
    np.testing.assert_array_equal(first, CONTROLS["isolation forest"](train, 3)(new))
    assert first.argmax() == 10


def test_every_detector_scores_every_item():
    found = all_scores(model(), Rows(rows(80)), (Rows(rows(9, 1)), Rows(rows(5, 2))), seed=0)
    assert list(found) == ["reconstruction error", "latent density", *CONTROLS]
    for parts in found.values():
        assert [part.shape for part in parts] == [(9,), (5,)]
        assert all(np.isfinite(part).all() for part in parts)


def test_what_lies_above_the_threshold_is_counted_by_side():
    scores = np.array([1.0, 2.0, 3.0, 2.0, 5.0])
    strange = np.array([False, False, False, True, True])
    said = judged(scores, strange, threshold=2.0)
    assert said["auroc"] == (1.5 + 3) / 6  # of six pairs; a tie counts half
    assert said["normals_flagged"] == pytest.approx(1 / 3)
    assert said["anomalies_caught"] == 0.5


@pytest.mark.parametrize(
    ("names", "given", "learned", "chosen"),
    [
        (("0", "1"), None, "", "0"),
        (("0", "1"), None, "y=1", "1"),
        (("dos", "normal"), None, "", "normal"),
        (("bad", "ok"), "ok", "", "ok"),
        (("bad", "ok"), None, "class=ok", "ok"),
    ],
)
def test_which_label_is_normal(names, given, learned, chosen):
    assert normal_label(names, given, learned) == chosen


def test_an_unclear_normal_label_is_asked_for():
    with pytest.raises(ConfigError, match=r"--normal VALUE; labels: 0, 1, 2"):
        normal_label(("0", "1", "2"), None, "")
    with pytest.raises(ConfigError, match="no such label; did you mean 'normal'"):
        normal_label(("attack", "normal"), "normale", "")
