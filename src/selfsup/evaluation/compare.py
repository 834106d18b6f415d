"""What was the pre-training worth: pre-trained, the same network from scratch, and a classical one.

Every arm sees the same labelled subsets, test part and number of steps. Learning rates are chosen
for each arm and each number of labels on validation data, with the first seed; the test part
chooses nothing. Several tunings may be compared: the first trains every arm, the others the
pre-trained network alone, and what each costs stands beside what it scores.
"""

import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import torch

from selfsup import console, registry
from selfsup.data.labels import Labels, split, subset
from selfsup.errors import ConfigError, DataError, Interrupted, LimitError
from selfsup.evaluation.adapt import (
    default_training,
    fit,
    new_task,
    num_rows,
    rows_of,
    score,
)
from selfsup.evaluation.baselines import fit_baseline
from selfsup.evaluation.cost import Cost, measured
from selfsup.evaluation.metrics import METRICS
from selfsup.model_folder import Model, load_model
from selfsup.models.encoder import Encoder
from selfsup.randomness import Order
from selfsup.tuning.choice import Tuning

ARMS = ("pretrained", "scratch")
WHOLE_LRS, ADDED_LRS = (5e-4, 1e-3, 2e-3), (1e-3, 3e-3, 1e-2)
"""Peak learning rates that are tried where the encoder's own weights move, and where they do not:
what begins anew, and is little, wants larger ones."""
MAX_VALID = 500  # examples that choose a learning rate; more would only cost time
MAX_WATCHED, CURVE_POINTS = 64, 8  # held-out examples and evaluations of a fine-tuning curve


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a comparison is made.

    Attributes:
        task: a name of `registry.TASKS`.
        label_counts: sizes of the labelled subsets.
        seeds: each seed draws another subset, other initial weights and another order.
        lrs: peak learning rates that every arm and tuning tries; None: `WHOLE_LRS` or `ADDED_LRS`.
        steps: optimizer steps per run; None: `adapt.default_training`.
        tuning: names of `registry.TUNINGS` as `Tuning.of` reads them; commas separate several, of
            which the first trains all arms and the others the pre-trained one.
        tuning_options: keys of the tunings' `Config`s by name: {"lora": {"rank": 4}}.
        max_length: longest item (a text in tokens); None: what this kind of data usually takes.
        jobs: processes that train side by side, one thread each; 1: this process, all threads.
        controls: also train from scratch and fit the classical baseline; False: a study that has
            them already measures the pre-trained network alone.
    """

    task: str
    label_counts: tuple[int, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    lrs: tuple[float, ...] | None = None
    steps: int | None = None
    tuning: str = "full"
    tuning_options: Mapping[str, Any] = field(default_factory=dict)
    max_length: int | None = None
    jobs: int = 1
    controls: bool = True

    @property
    def arms(self) -> tuple[str, ...]:
        """The arms that are trained."""
        return ARMS if self.controls else ARMS[:1]

    @property
    def tunings(self) -> dict[str, Tuning]:
        """By name, the first one first."""
        options = self.tuning_options
        return {
            text: Tuning.of(text, {k: v for k, v in options.items() if k in text.split("+")})
            for text in self.tuning.split(",")
        }

    @property
    def trials(self) -> list[tuple[str, str]]:
        """What has a learning rate to choose: tuning and arm."""
        first, *others = self.tunings
        return [*((first, arm) for arm in self.arms), *((other, ARMS[0]) for other in others)]

    def rates(self, tuning: str) -> tuple[float, ...]:
        """The learning rates that a tuning tries."""
        return self.lrs or (WHOLE_LRS if self.tunings[tuning].whole else ADDED_LRS)

    def __post_init__(self) -> None:
        if not self.label_counts or not self.seeds or self.lrs == ():
            raise ConfigError("compare needs at least one label count, one seed and one rate")
        if list(self.label_counts) != sorted(set(self.label_counts)):
            raise ConfigError(f"label counts must rise, got {list(self.label_counts)}")
        least = {"label count": self.label_counts[0], "jobs": self.jobs, "steps": self.steps}
        for name, value in least.items():
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if self.lrs and not min(self.lrs) > 0:
            raise ConfigError(f"learning rates must be above 0, got {list(self.lrs)}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds must differ, got {list(self.seeds)}")
        if len(self.tunings) < len(self.tuning.split(",")):
            raise ConfigError(f"tuning {self.tuning!r} names one of them twice")
        for name in self.tuning_options:
            if not any(name in tuning.configs for tuning in self.tunings.values()):
                raise ConfigError(f"options of tuning {name!r}, but the tuning is {self.tuning!r}")


def default_jobs() -> int:
    """One training per core, at most 8; where there is a GPU, one that has it for itself."""
    return 1 if torch.cuda.is_available() else min(8, len(os.sched_getaffinity(0)))


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


def read_labels(
    kind: str,
    task: str,
    data: str | Path,
    valid: str | Path | None = None,
    test: str | Path | None = None,
    **columns: Any,
) -> Labels:
    """Reads the labelled files; parts that are not given are split off by content, seed 0.

    `kind` is a name of `registry.DATA`: what the files hold.

    Raises:
        DataError: a file cannot be read, or does not fit the task.
    """
    read = registry.module_of(registry.DATA, "data", kind).read_labels
    train = read(data, task, **columns)
    if test is not None:
        test_part = read(test, task, names=train.names or None, **columns)
    else:
        train, test_part = split(train, (0.75, 0.25), seed=0)
    if valid is not None:
        valid_part = read(valid, task, names=train.names or None, **columns)
    else:
        train, valid_part = split(train, (0.8, 0.2), seed=1)
    keep = Order(len(valid_part), seed=0)[0 : min(MAX_VALID, len(valid_part))]
    return Labels(train=train, valid=valid_part.take(sorted(keep.tolist())), test=test_part)


def compare(run: str | Path, labels: Labels, settings: Settings) -> dict[str, Any]:
    """Trains all arms and gives what compare.json holds.

    Args:
        run: a pre-trained run.
        labels: the labelled data.
        settings: label counts, seeds, learning rates.

    Raises:
        DataError: fewer labelled examples than the largest count.
    """
    started = time.monotonic()
    if max(settings.label_counts) > len(labels.train):
        raise DataError(
            f"{labels.train.source}: {len(labels.train)} labelled examples remain for training; "
            f"--labels asks for {max(settings.label_counts)}"
        )
    first, *others = settings.seeds
    counts = settings.label_counts
    classical = [
        Cell("baseline", count, seed)
        for count in counts
        for seed in settings.seeds
        if settings.controls
    ]
    sweep = [
        Cell(arm, count, first, lr, tuning)
        for count in counts
        for tuning, arm in settings.trials
        for lr in settings.rates(tuning)
    ]
    num_rest = len(settings.trials) * len(counts) * len(others) + len(classical)
    with (
        _workers(run, labels, settings) as workers,
        console.progress("comparing", len(sweep) + num_rest) as bar,
    ):
        swept = _collect(workers, sweep, bar)
        best = {
            (*trial, count): _best(swept, *trial, count)
            for trial in settings.trials
            for count in counts
        }
        rest = [
            Cell(arm, count, seed, best[tuning, arm, count].cell.lr, tuning)
            for count in counts
            for tuning, arm in settings.trials
            for seed in others
        ]
        results = [*best.values(), *_collect(workers, rest + classical, bar)]
    main = next(iter(settings.tunings))
    places = {arm: (main, arm) for arm in settings.arms}
    places |= {"baseline": ("", "baseline")} if settings.controls else {}
    return {
        "task": settings.task,
        "metric": registry.resolve(registry.TASKS, "task", settings.task).metric,
        "test_size": len(labels.test),
        "unit": "sentences" if settings.task == "tagging" else "examples",
        "label_counts": list(counts),
        "arms": {arm: _scores(results, *place, settings) for arm, place in places.items()},
        "seconds": round(time.monotonic() - started, 1),
        "seeds": list(settings.seeds),
        "tuning": main,
        "tunings": {name: _of_tuning(results, name, settings) for name in settings.tunings},
        "baseline_names": {
            str(n): [r.name for r in results if r.name and r.cell.labels == n] for n in counts
        },
        "learning_rates": {
            arm: {str(n): best[main, arm, n].cell.lr for n in counts} for arm in settings.arms
        },
        "sweep": [{**vars(r.cell), "valid": r.valid} for r in swept],
        "curves": [
            {**vars(r.cell), **r.curve}
            for r in sorted(results, key=_place)
            if r.curve and r.cell.tuning == main
        ],
    }


def _place(result: Result) -> tuple[str, str, int, int]:
    return result.cell.tuning, result.cell.arm, result.cell.labels, result.cell.seed


def _best(results: Sequence[Result], tuning: str, arm: str, count: int) -> Result:
    mine = (r for r in results if _place(r)[:3] == (tuning, arm, count))
    return max(mine, key=lambda r: r.valid)


def _scores(
    results: Sequence[Result], tuning: str, arm: str, settings: Settings
) -> dict[str, list[float]]:
    by_place = {_place(r): r.test for r in results}
    return {
        str(count): [round(by_place[tuning, arm, count, seed], 5) for seed in settings.seeds]
        for count in settings.label_counts
    }


def _of_tuning(results: Sequence[Result], tuning: str, settings: Settings) -> dict[str, Any]:
    """Scores of one tuning of the pre-trained network, and what its trainings cost.

    `seconds` are of one training, seed by seed; of its other costs the most that was met counts,
    but of `step_seconds` the least, which is furthest from what else the machine does.
    """
    mine = {_place(r)[2:]: r for r in results if _place(r)[:2] == (tuning, ARMS[0])}
    costs = {place: result.cost for place, result in mine.items() if result.cost is not None}
    most = {
        key: max(getattr(cost, key) for cost in costs.values())
        for key in ("trained", "share", "memory", "file_bytes")
    }
    peaks = [cost.gpu_memory for cost in costs.values() if cost.gpu_memory is not None]
    counts, seeds = settings.label_counts, settings.seeds
    options = {k: v for k, v in settings.tunings[tuning].values().items() if k != "names"}
    return {
        "scores": _scores(results, tuning, ARMS[0], settings),
        "learning_rates": {str(n): mine[n, seeds[0]].cell.lr for n in counts},
        "options": options,
        **most,
        "seconds": {str(n): [round(costs[n, seed].seconds, 3) for seed in seeds] for n in counts},
        "step_seconds": round(min(cost.step_seconds for cost in costs.values()), 6),
        **({"gpu_memory": max(peaks)} if peaks else {}),
    }


class _Trainer:
    """Trains one cell after another; one per process."""

    def __init__(self, run: str | Path, labels: Labels, settings: Settings):
        self.model: Model = load_model(run)
        self.labels, self.settings = labels, settings
        self.preprocessor = self.model.preprocessor.limited(settings.max_length)
        self.valid = self.preprocessor.labelled(labels.valid)
        self.test = self.preprocessor.labelled(labels.test)
        self.watched = labels.valid.take(range(min(MAX_WATCHED, len(labels.valid))))

    def encoder(self, cell: Cell) -> Encoder:
        """The run's encoder, or a fresh one of the same shape."""
        if cell.arm == "pretrained":
            return self.model.encoder
        return self.model.untrained_encoder(cell.seed)

    def __call__(self, cell: Cell) -> Result:
        """Trains and scores one cell."""
        settings, data = self.settings, subset(self.labels.train, cell.labels, cell.seed)
        if cell.lr is None:
            fitted = fit_baseline(data, self.labels.valid, self.preprocessor)
            guess = fitted.predict(self.labels.test.items)
            metric = METRICS[registry.resolve(registry.TASKS, "task", settings.task).metric]
            test = metric(self.labels.test.labels, guess)
            return Result(cell, fitted.score, test, name=fitted.name)
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
        module = registry.module_of(registry.TASKS, "task", settings.task)
        tuning = settings.tunings[cell.tuning]
        task = new_task(
            self.encoder(cell),
            settings.task,
            module.Config(),
            data,
            tuning=tuning,
            seed=cell.seed,
            preprocessor=self.preprocessor,
        )
        on_gpu = self.model.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.model.device)
        started = time.perf_counter()
        rows = fit(
            task,
            self.preprocessor,
            data,
            training,
            valid=self.watched,
        )
        seconds = time.perf_counter() - started
        peak = torch.cuda.max_memory_allocated(self.model.device) if on_gpu else None
        curve = {
            "step": [row["step"] for row in rows],
            "loss": [row["loss"] if row["split"] == "train" else None for row in rows],
            "score": [row.get("score") for row in rows],
        }
        valid, test = score(task, self.valid), score(task, self.test)
        cost = None
        if cell.arm == ARMS[0]:
            read = rows_of(task, self.preprocessor, data)
            cost = measured(task, self.model.encoder, tuning, read, training, seconds, peak)
        return Result(cell, valid, test, curve, cost=cost)


class _workers:
    """Runs cells in this process, or in `jobs` processes of one thread each."""

    def __init__(self, run: str | Path, labels: Labels, settings: Settings):
        self.arguments = run, labels, settings

    def __enter__(self):
        settings: Settings = self.arguments[2]
        if settings.jobs == 1:
            trainer = _Trainer(*self.arguments)
            return lambda cells: map(_quietly(trainer), cells)
        self.pool = ProcessPoolExecutor(
            settings.jobs, get_context("spawn"), _start_worker, self.arguments
        )
        return lambda cells: self.pool.map(_train_in_worker, cells)

    def __exit__(self, *_: object) -> None:
        if self.arguments[2].jobs > 1:
            self.pool.shutdown(cancel_futures=True)


_worker: list[_Trainer] = []


def _start_worker(*arguments: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the parent says what there is to say
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _worker[:] = [_Trainer(*arguments)]


def _end_with_parent() -> None:
    """Ends this worker when its parent was killed: it would train on for nobody."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _train_in_worker(cell: Cell) -> Result:
    try:
        return _quietly(_worker[0])(cell)
    except Interrupted as stop:
        os._exit(stop.exit_code)


def _quietly(trainer: _Trainer):
    def run(cell: Cell) -> Result:
        with console.quiet():
            return trainer(cell)

    return run


def _collect(workers, cells: list[Cell], bar: console.Progress) -> list[Result]:
    results = []
    try:
        for result in workers(cells):
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
