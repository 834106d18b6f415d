"""A suite of tasks on one run: GLUE, SuperGLUE, a user's own; what is missing is said.

Each task fine-tunes the run's encoder on its training part. A fifth of that part, at most 1,000
questions, is kept back and chooses the learning rate, with the first seed; the part that is scored
chooses nothing. For GLUE and SuperGLUE that is the official development part, as the labels of the
test parts are hidden; the first seed's predictions for those are written for a submission.

The overall score is the mean over tasks, each the mean of its metrics, as GLUE has it (Wang et al.
2018, arXiv 1804.07461). Where a task is missing the mean is called what it is, a mean of some tasks
of so many, and so is what others reached on the same tasks.

A task that is done is kept in tasks/NAME.json and not done again; then nothing that decides its
score may have changed.
"""

from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from selfsup import console, environment, registry
from selfsup.errors import CheckpointError, ConfigError
from selfsup.evaluation import submission, suite_plan
from selfsup.evaluation.suite_plan import Suite
from selfsup.evaluation.suite_task import Settings, TaskRun
from selfsup.files import write_json
from selfsup.model_folder import load_model
from selfsup.objective import Task
from selfsup.tuning.choice import Tuning


def evaluate_suite(
    run: str | Path,
    suite: str | Path,
    data: str | Path | None = None,
    out: str | Path | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Runs every task that has its data; writes suite.json and, for hidden parts, submissions.

    Args:
        run: a pre-trained run.
        suite: a name of `registry.suite_paths()`, or a TOML file.
        data: the folder that the suite's files lie below; None: that of the TOML file.
        out: where results go; None: suite-NAME in the run folder, where `report` finds them.
        settings: fields of `Settings`.

    Returns:
        what suite.json holds: `overall`, `tasks` by name with their `state`, and `lines`.

    Raises:
        ConfigError: no such suite, or a key of it is wrong; or a task was done before with other
            settings, data or weights.
        DataError: a file is damaged, or there is no data folder; tasks before it are kept.
        CheckpointError: the run is fine-tuned already.
    """
    plan, chosen = suite_plan.load(suite), Settings(**settings)
    Tuning.of(chosen.tuning)  # says what is wrong with it
    folder = _data_folder(plan, suite, data)
    model = load_model(run)
    if isinstance(model.objective, Task):
        raise CheckpointError(f"{run} is fine-tuned already; a suite needs a pre-trained run")
    place = Path(out) if out else Path(run) / f"suite-{plan.name}"
    tasks: dict[str, Any] = {}
    for number, (name, task) in enumerate(plan.tasks.items(), start=1):
        console.say(f"{plan.title}, task {number} of {len(plan.tasks)}: {task.title or name}")
        tasks[name] = TaskRun(model, name, task, folder, place, chosen).result()
        result = _collected(plan, tasks, chosen, str(run))
        write_json(place / "suite.json", result)
    written = [name for found in tasks.values() for name in found.get("submission", ())]
    if written:
        submission.pack(place / "submission", written, place / "submission.zip")
    return result


def _data_folder(plan: Suite, suite: str | Path, data: str | Path | None) -> Path:
    if data is None and str(suite) in registry.suite_paths():
        raise ConfigError(f"the suite {plan.name} needs --data, the folder with its files")
    folder = Path(data) if data is not None else Path(suite).parent
    if not folder.is_dir():
        raise ConfigError(f"{folder}: not a folder; --data is the folder of the suite's files")
    return folder


def _collected(plan: Suite, tasks: dict[str, Any], settings: Settings, run: str) -> dict[str, Any]:
    """What suite.json holds so far."""
    waiting = {
        name: {"title": task.title or name, "task": task.task, "state": "not yet run"}
        for name, task in plan.tasks.items()
        if name not in tasks
    }
    done = [name for name, found in tasks.items() if found["state"] == "done"]
    whole = len(done) == len(plan.tasks)
    called = f"{plan.title} score"
    if not whole:
        called = f"mean of {len(done)} of {len(plan.tasks)} tasks"
    elif settings.labels:
        called = f"{plan.title} with {settings.labels:,} labels a task"
    scores = [tasks[name]["score"] for name in done]
    lines = {}
    for key, line in plan.lines.items():
        known = {name: suite_plan.line_score(values) for name, values in line.scores.items()}
        shared = [known[name] for name in done if name in known]
        whole_line = bool(done) and len(shared) == len(done)
        lines[key] = {
            "title": line.title,
            "source": line.source,
            "scores": known,
            "same_tasks": fmean(shared) if whole_line else None,
        }
    return {
        "suite": plan.name,
        "title": plan.title,
        "summary": plan.summary,
        "note": plan.note,
        "run": run,
        "overall": {
            "name": called,
            "tasks": done,
            "of": len(plan.tasks),
            "score": [fmean(column) for column in zip(*scores, strict=True)],
        },
        "tasks": {name: {**tasks, **waiting}[name] for name in plan.tasks},
        "lines": lines,
        "settings": asdict(settings),
        "command": environment.command_line(),
    }
