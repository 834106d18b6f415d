"""What was the pre-training worth: pre-trained, the same network from scratch, and a classical one.

Every arm sees the same labelled subsets, test part and number of steps. Learning rates are chosen
for each arm and each number of labels on validation data, with the first seed; the test part
chooses nothing. Several tunings may be compared: the first trains every arm, the others the
pre-trained network alone, and what each costs stands beside what it scores.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selfsup import console, registry
from selfsup.data.labels import Labels, split
from selfsup.errors import DataError
from selfsup.evaluation.compare_cells import Cell, Result, collect, trainers
from selfsup.evaluation.compare_settings import ARMS, Settings
from selfsup.randomness import Order

MAX_VALID = 500  # examples that choose a learning rate; more would only cost time


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
    swept, results = _train_all(run, labels, settings)
    seconds = round(time.monotonic() - started, 1)
    main, counts = next(iter(settings.tunings)), settings.label_counts
    rates = {_place(r): r.cell.lr for r in results}
    places = {arm: (main, arm) for arm in settings.arms}
    places |= {"baseline": ("", "baseline")} if settings.controls else {}
    return {
        "task": settings.task,
        "metric": registry.resolve(registry.TASKS, "task", settings.task).metric,
        "test_size": len(labels.test),
        "unit": "sentences" if settings.task == "tagging" else "examples",
        "label_counts": list(counts),
        "arms": {arm: _scores(results, *place, settings) for arm, place in places.items()},
        "seconds": seconds,
        "seeds": list(settings.seeds),
        **({"task_options": dict(settings.task_options)} if settings.task_options else {}),
        "tuning": main,
        "tunings": {name: _of_tuning(results, name, settings) for name in settings.tunings},
        "baseline_names": {
            str(n): [r.name for r in results if r.name and r.cell.labels == n] for n in counts
        },
        "learning_rates": {
            arm: {str(n): rates[main, arm, n, settings.seeds[0]] for n in counts}
            for arm in settings.arms
        },
        "sweep": [{**vars(r.cell), "valid": r.valid} for r in swept],
        "curves": [
            {**vars(r.cell), **r.curve}
            for r in sorted(results, key=_place)
            if r.curve and r.cell.tuning == main
        ],
    }


def _train_all(
    run: str | Path, labels: Labels, settings: Settings
) -> tuple[list[Result], list[Result]]:
    """The sweep over learning rates with the first seed, and the results that count."""
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
        trainers(run, labels, settings) as train,
        console.progress("comparing", len(sweep) + num_rest) as bar,
    ):
        swept = collect(train, sweep, bar)
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
        return swept, [*best.values(), *collect(train, rest + classical, bar)]


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
