"""Unusual items: how badly a model that learned to rebuild usual ones rebuilds them, and where.

Replicator networks (Hawkins, He, Williams and Baxter, 2002, "Outlier Detection Using Replicator
Neural Networks", DaWaK). The score of an item is its squared reconstruction error on the
standardised scale, summed over its values. For a table row the encoded columns of one table column
(its categories; a number and whether it is missing) are summed first, so the score is a sum over
table columns, and the greatest of them say what is unusual.

Pre-training ends with `calibration`: the threshold above which at most 1% of the held-out rows lie.
It stands in the model's config.toml, section [anomaly], so a model folder that is copied elsewhere
still knows it. It holds for items that are drawn as the corpus was; with fewer than 100 held-out
items it is the greatest of their scores.

Scores are computed in float32 on every device, whatever the training's precision was: a threshold
must mean the same everywhere.

Axes: items; encoded column of a row (`TableSpec.source`); column of the table.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from selfsup.batch import Batch, ImageSpec, TableSpec
from selfsup.data.dataset import Dataset
from selfsup.data.table_columns import CategoricalColumn, Column, NumericColumn
from selfsup.data.table_files import parsed
from selfsup.errors import ConfigError
from selfsup.evaluation.frozen import extract
from selfsup.evaluation.metrics import threshold_for
from selfsup.methods.autoencoding.autoencoder import squared_errors
from selfsup.model import Model
from selfsup.models.decoders import target
from selfsup.objective import Reconstructs
from selfsup.randomness import Order
from selfsup.training.device import to_device

FALSE_ALARM_RATE = 0.01
MAX_NORMALS = 20_000  # held-out items that the threshold is computed from
BATCH_SIZE = 256
MAX_COLUMNS = 3  # that an explanation names
MISSING, OTHER = "missing", "another value"
BINS = 40  # of a histogram
WIDE = 20.0  # greatest by smallest score, above which bins are even on a logarithmic scale
DECADES = 3  # below the threshold, where such bins begin; lower scores fall into the first


class UnusualColumn(NamedTuple):
    """One table column of an unusual row.

    Attributes:
        name: of the column.
        share: of the row's score, 0 to 1.
        value: the cell as it was given.
        expected: the rebuilt value on the column's own scale, or the likeliest category.
    """

    name: str
    share: float
    value: Any
    expected: float | str


class Anomaly(NamedTuple):
    """What a model says about one item.

    Attributes:
        unusual: whether the score is above the threshold.
        score: squared error on the standardised scale, summed.
        ratio: score / threshold.
        columns: of a table row the most unusual ones, the first first; else empty.
    """

    unusual: bool
    score: float
    ratio: float
    columns: tuple[UnusualColumn, ...]


def detects(model: Model) -> bool:
    """Whether a model rebuilds table rows or pictures."""
    return isinstance(model.objective, Reconstructs) and isinstance(
        model.preprocessor.spec, TableSpec | ImageSpec
    )


@torch.inference_mode()
def rebuild(model: Model, batch: Batch) -> tuple[Tensor, Tensor]:
    """The items as rebuilt, (items, *value), and their squared errors, in the same shape."""
    assert isinstance(model.objective, Reconstructs)
    batch = to_device(batch, model.device)
    rebuilt = model.objective.reconstruct(batch)
    return rebuilt, squared_errors(rebuilt, target(batch, model.preprocessor.spec))


def error_scores(model: Model) -> Callable[[Batch], Float[Tensor, " items"]]:
    """A function for `frozen.extract`: the squared error of each item, summed."""
    return lambda batch: rebuild(model, batch)[1].flatten(1).sum(1)


def column_errors(
    errors: Float[Tensor, "items encoded"], source: Sequence[int], num_columns: int
) -> Float[Tensor, "items {num_columns}"]:
    """Errors of encoded columns, summed by the table column that they come from.

    >>> column_errors(torch.tensor([[1.0, 2.0, 4.0]]), source=(1, 0, 1), num_columns=2)
    tensor([[2., 5.]])
    """
    joined = errors.new_zeros(len(errors), num_columns)
    return joined.index_add(1, torch.tensor(source, device=errors.device), errors)


def calibration(model: Model, held_out: Dataset) -> dict[str, Any]:
    """The section [anomaly] of a model that detects anomalies; empty for others.

    Args:
        model: as pre-trained.
        held_out: items that training did not see.
    """
    if not detects(model):
        return {}
    numbers = Order(len(held_out), seed=0)[0 : min(MAX_NORMALS, len(held_out))]
    scores = extract(held_out, error_scores(model), numbers)
    return {
        "anomaly": {
            "threshold": threshold_for(scores, FALSE_ALARM_RATE),
            "false_alarm_rate": FALSE_ALARM_RATE,
            "held_out": len(numbers),
        }
    }


def histogram(
    scores: Float[np.ndarray, " items"], strange: Bool[np.ndarray, " items"], threshold: float
) -> dict[str, Any]:
    """How often scores are how high, for the report.

    Args:
        scores: of items, the greater the stranger.
        strange: whether an item is an anomaly.
        threshold: above which an item counts as one.

    Returns:
        `edges` of the bins, one more than bins; how many `normal` and `abnormal` items lie in each
        bin; `threshold`; `log`, whether the bins are even on a logarithmic scale.

    >>> scores, strange = np.array([1.0, 2.0, 3.0]), np.array([False, False, True])
    >>> found = histogram(scores, strange, 2.0)
    >>> found["edges"][0], found["edges"][-1], sum(found["normal"]), found["abnormal"][-1]
    (1.0, 3.0, 2, 1)
    """
    low = min(float(scores.min()), threshold)
    high = max(float(scores.max()), threshold)
    logarithmic = threshold > 0 and high > WIDE * max(low, 0.0)
    if logarithmic:
        low = max(low, threshold / 10**DECADES)
    elif high == low:
        high = low + 1.0
    space = np.geomspace if logarithmic else np.linspace
    edges = space(low, high, BINS + 1)
    inside = np.clip(scores, edges[0], edges[-1])  # the ends of a geometric row are not exact
    counts = [np.histogram(inside[part], edges)[0].tolist() for part in (~strange, strange)]
    return {
        "edges": edges.tolist(),
        "normal": counts[0],
        "abnormal": counts[1],
        "threshold": threshold,
        "log": logarithmic,
    }


def anomalies(model: Model, items: Sequence[Any], batch_size: int = BATCH_SIZE) -> list[Anomaly]:
    """How unusual each item is, and in which columns.

    Args:
        model: pre-trained by a method that rebuilds its input.
        items: table rows (dictionaries or sequences) or pictures.
        batch_size: items per forward pass.

    Raises:
        ConfigError: the model has no threshold: it rebuilds neither table rows nor pictures.
        DataError: an item cannot be read; its number is named.
    """
    if "anomaly" not in model.values:
        raise ConfigError(
            "the model has no threshold for anomalies: pre-train an autoencoder or a vae on table "
            "rows or pictures (selfsup pretrain autoencoder-table ...)"
        )
    threshold = model.values["anomaly"]["threshold"]
    out: dict[int, Anomaly] = {}
    for numbers, batch in model.preprocessor.batches(items, batch_size):
        rebuilt, errors = rebuild(model, batch)
        scores = errors.flatten(1).sum(1).tolist()
        columns: list[tuple[UnusualColumn, ...]] = [()] * len(numbers)
        if isinstance(model.preprocessor.spec, TableSpec):
            rows = [items[number] for number in numbers]
            columns = _explained(model.preprocessor, rows, rebuilt, errors)
        for number, score, unusual in zip(numbers, scores, columns, strict=True):
            out[number] = Anomaly(score > threshold, score, score / threshold, unusual)
    return [out[number] for number in range(len(out))]


def _explained(
    preprocessor: Any, rows: list[Any], rebuilt: Tensor, errors: Tensor
) -> list[tuple[UnusualColumn, ...]]:
    spec: TableSpec = preprocessor.spec
    joined = column_errors(errors, spec.source, len(spec.columns))
    order = joined.argsort(stable=True, dim=1, descending=True)[:, :MAX_COLUMNS].tolist()
    shares = (joined / joined.sum(1, keepdim=True)).tolist()
    places = [[i for i, s in enumerate(spec.source) if s == c] for c in range(len(spec.columns))]
    values = rebuilt.cpu().double().numpy()
    out = []
    for row, cells in enumerate(rows):
        named = cells if isinstance(cells, dict) else dict(zip(spec.columns, cells, strict=True))
        found = [
            UnusualColumn(
                spec.columns[c],
                shares[row][c],
                named[spec.columns[c]],
                expected_cell(preprocessor.columns[c], values[row, places[c]]),
            )
            for c in order[row]
        ]
        out.append(tuple(found))
    return out


def expected_cell(column: Column, rebuilt: Float[np.ndarray, " encoded"]) -> float | str:
    """What a model says should stand in a cell.

    Args:
        column: a fitted column.
        rebuilt: its encoded columns as rebuilt: the number, then the indicator of missing values
            where there is one; or one value for each category.

    >>> age = NumericColumn("age", mean=40.0, std=10.0, missing=False)
    >>> expected_cell(age, np.array([-1.5]))
    25.0
    >>> expected_cell(CategoricalColumn("city", ("Bonn",), missing=False), np.array([0.7, 0.1]))
    'Bonn'
    """
    if isinstance(column, CategoricalColumn):
        names = (*column.values, *[MISSING] * column.missing, OTHER)
        return names[int(rebuilt.argmax())]
    return MISSING if column.missing and rebuilt[1] > 0.5 else original(column, float(rebuilt[0]))


def original(column: NumericColumn, encoded: float) -> float:
    """A standardised number on the column's own scale: the inverse of `NumericColumn.encode`."""
    if column.quantiles:
        ranks = np.linspace(0, 1, len(column.quantiles))
        return float(np.interp(scipy.special.ndtr(encoded), ranks, column.quantiles))
    return column.mean + column.std * encoded


def line(name: str, found: Anomaly) -> str:
    """One item for people: verdict, ratio, its name, and what was unusual with what was expected.

    >>> age = UnusualColumn("age", 0.9, "210", 41.527)
    >>> line("new.csv:7", Anomaly(True, 12.0, 3.0, (age,))).split("\\t")
    ['anomaly', '3', 'new.csv:7', 'age 210 (expected 41.53)']
    """
    verdict = "anomaly" if found.unusual else "normal"
    columns = [f"{c.name} {_shown(c.value)} (expected {_shown(c.expected)})" for c in found.columns]
    explanation = [", ".join(columns)] if columns else []
    return "\t".join((verdict, f"{found.ratio:.4g}", name, *explanation))


def _shown(cell: Any) -> str:
    if isinstance(cell, float):
        return f"{cell:.0f}" if 1e4 <= abs(cell) < 1e15 else f"{cell:.4g}"
    return MISSING if parsed(cell) is None else " ".join(str(cell).split())
