"""Panels about models of time series: held-out windows, and what the model says of them.

A cell is {"series": {...}} with the numbers of one channel, for the report to draw:

| key      | value                                                         |
|----------|---------------------------------------------------------------|
| `name`   | what is measured, "" where that is not known                  |
| `true`   | the values as they are, null where missing                    |
| `model`  | what the model says of each, null where it says nothing; the  |
|          | last ones may be left out                                     |
| `hidden` | [first, stop) of every stretch that was hidden from the model |
"""

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from selfsup.batch import Batch, SeriesSpec
from selfsup.data.dataset import Dataset
from selfsup.evaluation.gallery_parts import Cell, Panel, held_out_numbers
from selfsup.model import Model
from selfsup.objective import Reconstructs, Restores
from selfsup.randomness import torch_generator
from selfsup.training.device import to_device

SHOWN = 6


def series_panels(model: Model, held_out: Dataset, spec: SeriesSpec) -> list[Panel]:
    """Every panel that the model's method can show."""
    batch = held_out.batch(held_out_numbers(held_out, SHOWN))
    panels = (_filled(model, batch), _rebuilt(model, batch))
    return [panel for panel in panels if panel]


@torch.inference_mode()
def _filled(model: Model, batch: Batch) -> Panel | None:
    """Windows with stretches hidden, as in training."""
    if not isinstance(model.objective, Restores):
        return None
    generator = torch_generator(0, "gallery", device=model.device)
    found = model.objective.restore(to_device(batch, model.device), generator)
    hidden, restored = found.hidden.cpu(), found.restored.cpu()
    lead = (
        "Windows that training never saw, standardised. Grey: the true line. Shaded: what was "
        "hidden from the model. Blue: what the model says stood there."
    )
    said = restored.masked_fill(~hidden, torch.nan)
    return {"title": "Filled in", "lead": lead, "rows": _rows(model, batch, said, hidden)}


@torch.inference_mode()
def _rebuilt(model: Model, batch: Batch) -> Panel | None:
    if not isinstance(model.objective, Reconstructs):
        return None
    rebuilt = model.objective.reconstruct(to_device(batch, model.device)).cpu()
    lead = (
        "Windows that training never saw, standardised. Grey: the true line. Blue: the same as the "
        "model rebuilds it."
    )
    nothing = torch.zeros_like(rebuilt, dtype=torch.bool)
    return {"title": "Rebuilt", "lead": lead, "rows": _rows(model, batch, rebuilt, nothing)}


def _rows(
    model: Model, batch: Batch, said: Tensor, hidden: Bool[Tensor, "row time channel"]
) -> list[list[Cell]]:
    """One channel of each window: the first of the first, the second of the second, and so on."""
    preprocessor, series = model.preprocessor, batch["series"]
    names = ("",) if preprocessor.independent else preprocessor.columns
    cells = []
    for row in range(len(series)):
        channel = row % series.shape[2]
        stop = int(batch["mask"][row].sum()) if "mask" in batch else series.shape[1]
        numbers = {
            "name": names[channel],
            "true": _listed(series[row, :stop, channel]),
            "model": _listed(said[row, :stop, channel]),
            "hidden": _stretches(hidden[row, :stop, channel].numpy()),
        }
        cells.append({"series": numbers})
    return [cells]


def _listed(values: Tensor) -> list[float | None]:
    return [round(value, 4) if np.isfinite(value) else None for value in values.tolist()]


def _stretches(hidden: Bool[np.ndarray, " time"]) -> list[list[int]]:
    """[first, stop) of every run of True.

    >>> _stretches(np.array([True, True, False, True]))
    [[0, 2], [3, 4]]
    """
    edges = np.flatnonzero(np.diff(np.pad(hidden.astype(np.int8), 1)))
    return edges.reshape(-1, 2).tolist()
