"""The trainings of a comparison, one after another or side by side in processes of their own."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path

import torch

from selfsup import console, registry
from selfsup.data.dataset import LabelledDataset
from selfsup.data.labels import Labelled, Labels, subset
from selfsup.errors import Interrupted, LimitError
from selfsup.evaluation.adapt import default_training, fit, new_task, num_rows, rows_of, score
from selfsup.evaluation.baselines import fit_baseline
from selfsup.evaluation.compare_settings import ARMS, Settings
from selfsup.evaluation.cost import Cost, measured
from selfsup.evaluation.metrics import METRICS
from selfsup.model_folder import load_model
from selfsup.models.encoder import Encoder
from selfsup.objective import Task

MAX_WATCHED, CURVE_POINTS = 64, 8  # held-out examples and evaluations of a fine-tuning curve


@dataclass(frozen=True)
class Cell:
    """One trained model of the comparison; the classical baseline has no learning rate."""

    arm: str
    labels: int
    seed: int
    lr: float | None = None
    tuning: str = ""


@dataclass(frozen=True)
class Result:
    """What one cell gave: scores, training curve, cost if pre-trained, a baseline's name."""

    cell: Cell
    valid: float
    test: float
    curve: dict[str, list[float | None]] = field(default_factory=dict)
    name: str = ""
    cost: Cost | None = None


Train = Callable[[Iterable[Cell]], Iterable[Result]]


class Trainer:
    """Trains one cell after another; one per process."""

    def __init__(self, run: str | Path, labels: Labels, settings: Settings):
        self.model = load_model(run)
        self.labels, self.settings = labels, settings
        self.preprocessor = self.model.preprocessor.limited(settings.max_length)
        self.read: dict[str, LabelledDataset] = {}
        self.watched = labels.valid.take(range(min(MAX_WATCHED, len(labels.valid))))

    def __call__(self, cell: Cell) -> Result:
        """Trains and scores one cell, and says nothing."""
        data = subset(self.labels.train, cell.labels, cell.seed)
        with console.quiet():
            return self._baseline(cell, data) if cell.lr is None else self._trained(cell, data)

    def _baseline(self, cell: Cell, data: Labelled) -> Result:
        fitted = fit_baseline(data, self.labels.valid, self.preprocessor)
        guess = fitted.predict(self.labels.test.items)
        metric = METRICS[registry.resolve(registry.TASKS, "task", self.settings.task).metric]
        test = metric(self.labels.test.labels, guess)
        return Result(cell, fitted.score, test, name=fitted.name)

    def _encoder(self, cell: Cell) -> Encoder:
        """The run's encoder, or a fresh one of the same shape."""
        if cell.arm == "pretrained":
            return self.model.encoder
        return self.model.untrained_encoder(cell.seed)

    def _rows(self, task: Task, part: str) -> LabelledDataset:
        """A part that is scored: read once, unless the task has rows of its own."""
        if part in self.read:
            return self.read[part]
        rows = rows_of(task, self.preprocessor, getattr(self.labels, part))
        return rows if task.row_options else self.read.setdefault(part, rows)

    def _trained(self, cell: Cell, data: Labelled) -> Result:
        assert cell.lr is not None
        settings = self.settings
        count = num_rows(self.preprocessor, data)
        training = default_training(count, self.model.encoder.dim, settings.task)
        training = replace(
            training,
            seed=cell.seed,
            lr=cell.lr,
            steps=settings.steps or training.steps,
            evaluations=CURVE_POINTS,
            log_every=5,
        )
        tuning = settings.tunings[cell.tuning]
        task = new_task(
            self._encoder(cell),
            settings.task,
            settings.task_config,
            data,
            tuning=tuning,
            seed=cell.seed,
            preprocessor=self.preprocessor,
            method=self.model.objective if cell.arm == ARMS[0] else None,
        )
        on_gpu = self.model.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.model.device)
        started = time.perf_counter()
        rows = fit(task, self.preprocessor, data, training, valid=self.watched)
        seconds = time.perf_counter() - started
        peak = torch.cuda.max_memory_allocated(self.model.device) if on_gpu else None
        curve = {
            "step": [row["step"] for row in rows],
            "loss": [row["loss"] if row["split"] == "train" else None for row in rows],
            "score": [row.get("score") for row in rows],
        }
        valid, test = (score(task, self._rows(task, part)) for part in ("valid", "test"))
        cost = None
        if cell.arm == ARMS[0]:
            read = rows_of(task, self.preprocessor, data)
            cost = measured(task, self.model.encoder, tuning, read, training, seconds, peak)
        return Result(cell, valid, test, curve, cost=cost)


@contextmanager
def trainers(run: str | Path, labels: Labels, settings: Settings) -> Iterator[Train]:
    """Who trains cells: this process, or `jobs` processes of one thread each."""
    if settings.jobs == 1:
        yield partial(map, Trainer(run, labels, settings))
        return
    pool = ProcessPoolExecutor(
        settings.jobs, get_context("spawn"), _start_worker, (run, labels, settings)
    )
    try:
        yield partial(pool.map, _train_in_worker)
    finally:
        pool.shutdown(cancel_futures=True)


_worker: list[Trainer] = []


def _start_worker(run: str | Path, labels: Labels, settings: Settings) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the parent says what there is to say
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _worker[:] = [Trainer(run, labels, settings)]


def _end_with_parent() -> None:
    """Ends this worker when its parent was killed: it would train on for nobody."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _train_in_worker(cell: Cell) -> Result:
    try:
        return _worker[0](cell)
    except Interrupted as stop:
        os._exit(stop.exit_code)


def collect(train: Train, cells: list[Cell], bar: console.Progress) -> list[Result]:
    """The results of cells, in their order.

    Raises:
        LimitError: a process was killed.
    """
    results = []
    try:
        for result in train(cells):
            results.append(result)
            cell = result.cell
            who = f"{cell.arm} {cell.tuning}".strip()
            what = f"{who}, {cell.labels} labels, seed {cell.seed}"
            bar.advance(1, f"{what}: {result.valid:.3f}")
    except BrokenProcessPool as error:
        time.sleep(0.5)  # a Ctrl-C that ended them comes here too, and says more
        raise LimitError(
            "a training process was killed, perhaps for lack of memory; use fewer --jobs"
        ) from error
    return results
