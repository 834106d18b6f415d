"""Early exit measured: thresholds from validation data, then score, layers and seconds on test.

Axes: items; exit: the layers before the last.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from selfsup import environment, registry
from selfsup.batch import Batch
from selfsup.data.dataset import LabelledDataset
from selfsup.errors import ConfigError
from selfsup.evaluation.adapt import rows_of
from selfsup.evaluation.metrics import METRICS
from selfsup.files import write_json
from selfsup.model_folder import load_model
from selfsup.objective import Task
from selfsup.randomness import Order
from selfsup.tasks.classification import Classification
from selfsup.tasks.exits import Config, Exits, entropy
from selfsup.training.device import autocast, pick_dtype, to_device

FULL = Config(training="joint", rule="patience", patience=0)
BATCH_SIZES = (1, 32)
WITHIN = 0.01  # of the full model's score, which a chosen setting must reach on validation data


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured.

    Attributes:
        tolerances: of `calibrated`, each calibrated anew.
        speeds: thresholds of `speed`; `entropy` is the same, times the logarithm of the classes.
        patiences: of `patience`; (): every number that can let an example leave.
        closeness: threshold of a regression's patience.
        timed: so many items are timed.
        repeats: measurements of every time; the shortest counts.
    """

    tolerances: tuple[float, ...] = (0.0, 0.02, 0.05, 0.1, 0.2)
    speeds: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    patiences: tuple[int, ...] = ()
    closeness: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4)
    timed: int = 256
    repeats: int = 5


def calibrated_thresholds(
    uncertainty: Float[np.ndarray, "exit items"],
    right: Bool[np.ndarray, "exit items"],
    full_right: Bool[np.ndarray, " items"],
    tolerance: float,
) -> list[float]:
    """The highest threshold of every exit that keeps the errors within what is tolerated.

    One exit after another takes as many of the items that have come so far as it can, the surest
    first, so that by then no more errors are added to those of the full model than the exit's share
    of `tolerance` times their number: a third of it behind the first of three exits, and so on.
    Errors that an exit mends count for it.

    Args:
        uncertainty: entropy of each exit's answer as a share of its maximum.
        right: whether the answer is right.
        full_right: whether that of the full model is.
        tolerance: share of the full model's errors that may be added.

    Returns:
        an exit's threshold lies between its last item and the next one; 0: it takes none.

    >>> sure, right = np.array([[0.1, 0.2, 0.6, 0.8]]), np.array([[True, True, True, False]])
    >>> calibrated_thresholds(sure, right, np.array([True, True, True, True]), 0.0)
    [0.7]
    """
    thresholds, added = [], 0
    here = np.ones(len(full_right), dtype=bool)
    for number, (unsure, hits) in enumerate(zip(uncertainty, right, strict=True), 1):
        allowed = tolerance * (~full_right).sum() * number / len(uncertainty)
        items = np.flatnonzero(here)
        items = items[np.argsort(unsure[items], kind="stable")]
        rising = unsure[items]
        total = added + np.cumsum(full_right[items].astype(int) - hits[items])
        apart = np.append(rising[1:] > rising[:-1], True) if len(items) else np.zeros(0, bool)
        ends = np.flatnonzero((total <= allowed) & apart)
        if not len(ends):
            thresholds.append(0.0)
            continue
        last = ends[-1]
        above = rising[last + 1] if last + 1 < len(rising) else 1.0
        thresholds.append(float((rising[last] + above) / 2))
        added = int(total[last])
        here[items[: last + 1]] = False
    return thresholds


def exits_of(task: Task) -> Exits:
    """The exits of a task.

    Raises:
        ConfigError: it has none.
    """
    exits = getattr(task, "exits", None)
    if not isinstance(exits, Exits):
        raise ConfigError(
            "this run has no exits: finetune with --set task.exits.training=joint (or two_stage, "
            "distilled)"
        )
    return exits


@torch.inference_mode()
def all_answers(
    task: Classification, data: LabelledDataset
) -> tuple[Float[np.ndarray, "layer items"], Bool[np.ndarray, "layer items"]]:
    """Entropy of every head's answer as a share of its maximum, and whether the answer is right."""
    exits, task = exits_of(task), task.eval()
    shape = (task.encoder.num_layers, len(data))
    unsure, right = np.empty(shape, dtype=np.float32), np.empty(shape, dtype=bool)
    for numbers, batch in _batches(task, data, 64):
        with _autocast(task):
            answers = exits.every(task.encoder, task.encoder(batch), task.head)
        for layer, answer in enumerate(answers):
            unsure[layer, numbers] = (entropy(answer) / np.log(exits.outputs)).cpu().numpy()
            right[layer, numbers] = (answer.argmax(1) == batch["label"]).cpu().numpy()
    return unsure, right


def calibrate(task: Classification, valid: LabelledDataset) -> list[float]:
    """Gives the exits of a task their thresholds, chosen on validation data, and returns them."""
    exits = exits_of(task)
    unsure, right = all_answers(task, valid)
    found = calibrated_thresholds(unsure[:-1], right[:-1], right[-1], exits.config.tolerance)
    exits.thresholds.copy_(torch.tensor(found))
    return found


@torch.inference_mode()
def layers_used(task: Any, data: LabelledDataset) -> tuple[float, Int[np.ndarray, " items"]]:
    """The task's metric as its exits are set, and the layer behind which each item left."""
    exits, head = exits_of(task.eval()), task.head
    if not isinstance(task, Classification):
        head = head.linear
    layers = np.empty(len(data), dtype=np.int64)
    answers = np.empty((len(data), exits.outputs), dtype=np.float32)
    for numbers, batch in _batches(task, data, 64):
        with _autocast(task):
            answer, layer = exits.leave(task.encoder, batch, head)
        answers[numbers], layers[numbers] = answer.cpu().numpy(), layer.cpu().numpy()
    guess = answers[:, 0] if exits.outputs == 1 else answers.argmax(1)
    truth = np.asarray(data.labels).tolist()
    return float(METRICS[task.metric](truth, guess.tolist())), layers


def measure(
    task: Task, valid: LabelledDataset, test: LabelledDataset, settings: Settings | None = None
) -> dict[str, Any]:
    """Score, layers and seconds of every setting of the exits, beside the full model.

    Validation data set the thresholds of `calibrated` and choose among all settings: the one of
    fewest layers whose score is within `WITHIN` of the full model's. Test data choose nothing.

    Args:
        task: with exits; they are left as they were.
        valid, test: labelled examples.
        settings: what to try.

    Returns:
        `full`, `settings` (each with rule, `valid`, `test` and `speedup` by batch size) and
        `chosen`, the number of a setting, or None.
    """
    settings = settings or Settings()
    exits = exits_of(task)
    before = exits.config, exits.thresholds.clone()
    try:
        return _measure(task, exits, valid, test, settings)
    finally:
        exits.config = before[0]
        exits.thresholds.copy_(before[1])


def _measure(
    task: Task, exits: Exits, valid: LabelledDataset, test: LabelledDataset, settings: Settings
) -> dict[str, Any]:
    tried = [(FULL, exits.thresholds.clone()), *_settings(task, exits, valid, settings)]
    seconds = {size: _seconds(task, exits, test, tried, size, settings) for size in BATCH_SIZES}
    rows = []
    for number, (config, thresholds) in enumerate(tried):
        _set(exits, config, thresholds)
        row: dict[str, Any] = {"rule": config.rule}
        row |= {name: getattr(config, name) for name in _keys(config, exits)}
        for name, data in (("valid", valid), ("test", test)):
            score, layers = layers_used(task, data)
            shares = np.bincount(layers, minlength=len(exits.heads) + 2)[1:] / len(layers)
            row[name] = {
                task.metric: round(score, 5),
                "layers": round(float(layers.mean()), 4),
                "leaving": [round(float(share), 4) for share in shares],
            }
        row["seconds_per_item"] = {str(size): seconds[size][number] for size in BATCH_SIZES}
        row["speedup"] = {
            str(size): round(seconds[size][0] / seconds[size][number], 3) for size in BATCH_SIZES
        }
        if config.rule == "calibrated":
            row["thresholds"] = [round(share, 5) for share in thresholds.tolist()]
        rows.append(row)
    full, *rows = rows
    least = full["valid"][task.metric] - WITHIN
    good = [n for n, row in enumerate(rows) if row["valid"][task.metric] >= least]
    return {
        "metric": task.metric,
        "training": exits.config.training,
        "valid_size": len(valid),
        "test_size": len(test),
        "full": {key: full[key] for key in ("valid", "test", "seconds_per_item")},
        "settings": rows,
        "within": WITHIN,
        "chosen": min(good, key=lambda n: rows[n]["valid"]["layers"]) if good else None,
    }


def _settings(
    task: Task, exits: Exits, valid: LabelledDataset, settings: Settings
) -> Iterator[tuple[Config, Tensor]]:
    """Each with its thresholds."""
    trained, unset = exits.config, torch.zeros_like(exits.thresholds)
    patiences = settings.patiences or tuple(range(1, len(exits.heads)))
    if not isinstance(task, Classification):
        for patience in patiences:
            for threshold in settings.closeness:
                yield replace(trained, patience=patience, threshold=threshold), unset
        return
    unsure, right = all_answers(task, valid)
    for tolerance in settings.tolerances:
        found = calibrated_thresholds(unsure[:-1], right[:-1], right[-1], tolerance)
        yield replace(trained, rule="calibrated", tolerance=tolerance), unset.new_tensor(found)
    for speed in settings.speeds:
        yield replace(trained, rule="speed", threshold=speed), unset
    for patience in patiences:
        yield replace(trained, rule="patience", patience=patience), unset


def _keys(config: Config, exits: Exits) -> tuple[str, ...]:
    if config.rule == "patience":
        return ("patience",) if exits.outputs > 1 else ("patience", "threshold")
    return ("tolerance",) if config.rule == "calibrated" else ("threshold",)


def _set(exits: Exits, config: Config, thresholds: Tensor) -> None:
    exits.config = replace(config, training=exits.config.training)
    exits.thresholds.copy_(thresholds)


@torch.inference_mode()
def _seconds(
    task: Task,
    exits: Exits,
    data: LabelledDataset,
    tried: Sequence[tuple[Config, Tensor]],
    size: int,
    settings: Settings,
) -> list[float]:
    """Seconds per item of each setting: of every batch the shortest of several passes.

    Settings take turns, so that what else the machine does falls on all of them.
    """
    task.eval()
    count = min(settings.timed, len(data))
    drawn = Order(len(data), seed=0)[0:count]
    batches = [batch for _, batch in _batches(task, data, size, drawn)]
    best = np.full((len(tried), len(batches)), np.inf)
    for repeat in range(settings.repeats + 1):  # the first one warms up
        for number, setting in enumerate(tried):
            _set(exits, *setting)
            for place, batch in enumerate(batches):
                _synchronise(task)
                started = time.perf_counter()
                with _autocast(task):
                    task.predict(batch)
                _synchronise(task)
                if repeat:
                    taken = time.perf_counter() - started
                    best[number, place] = min(best[number, place], taken)
    return (best.sum(1) / count).tolist()


def _batches(
    task: Task, data: LabelledDataset, size: int, numbers: np.ndarray | None = None
) -> Iterator[tuple[np.ndarray, Batch]]:
    """Batches of items of similar length, on the task's device."""
    numbers = np.arange(len(data)) if numbers is None else np.asarray(numbers)
    if data.lengths is not None:
        numbers = numbers[np.argsort(np.asarray(data.lengths)[numbers], kind="stable")]
    device = next(task.parameters()).device
    for first in range(0, len(numbers), size):
        chosen = numbers[first : first + size]
        yield chosen, to_device(data.batch(chosen), device)


def _autocast(task: Task) -> Any:
    device = next(task.parameters()).device
    return autocast(device, pick_dtype("auto", device))


def _synchronise(task: Task) -> None:
    if next(task.parameters()).is_cuda:
        torch.cuda.synchronize()


def measure_run(
    run: str | Path,
    valid: str | Path,
    test: str | Path,
    columns: dict[str, Any] | None = None,
    settings: Settings | None = None,
) -> dict[str, Any]:
    """`measure` for a fine-tuned run and labelled files; writes early_exit.json into the run.

    Raises:
        ConfigError: the run has no exits.
    """
    started = time.monotonic()
    model = load_model(run)
    task: Any = model.objective
    exits_of(task)
    name = model.values["task"]["name"]
    read = registry.module_of(registry.DATA, "data", model.values["data"]["name"]).read_labels
    watched, scored = (
        rows_of(
            task, model.preprocessor, read(path, name, names=model.names or None, **(columns or {}))
        )
        for path in (valid, test)
    )
    result = {
        **measure(task, watched, scored, settings),
        "seconds": round(time.monotonic() - started, 1),
        "command": environment.command_line(),
    }
    write_json(Path(run) / "early_exit.json", result)
    return result


def table(result: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """The rows of a table for people: score and layers on test, and how much faster it is."""
    metric, full = result["metric"], result["full"]["test"]
    sizes = tuple(result["full"]["seconds_per_item"])
    yield ("setting", metric, "layers", *(f"speed-up at batch {size}" for size in sizes))
    yield ("full model", f"{full[metric]:.3f}", f"{full['layers']:.2f}", *("1.00" for _ in sizes))
    for number, row in enumerate(result["settings"]):
        keys = [f"{k} {row[k]:g}" for k in ("tolerance", "threshold", "patience") if k in row]
        name = " ".join([row["rule"] if row["rule"] != "patience" else "", *keys]).strip()
        name += "  (chosen on validation data)" if number == result["chosen"] else ""
        found = row["test"]
        speeds = (f"{row['speedup'][size]:.2f}" for size in sizes)
        yield (name, f"{found[metric]:.3f}", f"{found['layers']:.2f}", *speeds)
