"""Recorded results: a number that a page quotes stands in docs/results/NAME.json."""

import datetime
import json
from pathlib import Path
from typing import Any

from selfsup import environment
from selfsup.config import read_toml
from selfsup.files import write_json

FOLDER = Path("docs/results")


def record(
    name: str, *, command: str, seeds: list[int], seconds: float, scores: Any, **more: Any
) -> Path:
    """Writes one result with all that is needed to make it again.

    Args:
        name: the file's name without .json, in docs/results below the current folder.
        command: the command line that made it.
        seeds: every seed that was used.
        seconds: wall-clock time of the command.
        scores: the numbers.
        more: further keys.
    """
    path = FOLDER / f"{name}.json"
    write_json(
        path,
        {
            "command": command,
            "date": datetime.date.today().isoformat(),
            "machine": environment.machine(),
            "versions": environment.versions(),
            "seeds": seeds,
            "seconds": round(seconds, 1),
            "scores": scores,
            **more,
        },
    )
    return path


def record_pretraining(name: str, run: Path) -> None:
    """Records the last held-out row of a pre-training run in docs/results."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    speed = [json.loads(line) for line in (run / "speed.jsonl").read_text().splitlines()]
    held_out = [row for row in rows if row["split"] == "valid"]
    seed = read_toml(run / "run.toml")["training"]["seed"]
    record(
        name,
        command=environment.command_line(),
        seeds=[seed],
        seconds=speed[-1]["seconds"],
        scores={"first": held_out[0], "last": held_out[-1]},
    )


def record_comparison(name: str, result: dict[str, Any]) -> None:
    """Records a comparison in docs/results."""
    keys = ("task", "metric", "test_size", "label_counts", "learning_rates", "baseline_names")
    record(
        name,
        command=result["command"],
        seeds=result["seeds"],
        seconds=result["seconds"],
        scores=result["arms"],
        tunings=result["tunings"],
        **{key: result[key] for key in keys},
    )


def record_probe(name: str, run: str, result: dict[str, Any]) -> None:
    """Records probes in docs/results, and how the run was pre-trained."""
    values = read_toml(Path(run) / "run.toml")
    speed = [json.loads(line) for line in (Path(run) / "speed.jsonl").read_text().splitlines()]
    record(
        name,
        command=result["command"],
        seeds=[values["training"]["seed"]],
        seconds=result["seconds"],
        scores=result["scores"],
        test_size=result["test_size"],
        pretraining={"command": values["command"]["line"], "seconds": speed[-1]["seconds"]},
    )


def record_alignment(name: str, run: str, result: dict[str, Any]) -> None:
    """Records an alignment of two languages in docs/results, and how the run was pre-trained."""
    values = read_toml(Path(run) / "run.toml")
    record(
        name,
        command=result["command"],
        seeds=[values["training"]["seed"]],
        seconds=result["seconds"],
        scores=result["scores"],
        pairs=result["pairs"],
        chance=result["chance"],
        languages=result["languages"],
        pretraining={"command": values["command"]["line"]},
    )


def record_suite(name: str, result: dict[str, Any], seconds: float) -> None:
    """Records a suite of tasks in docs/results."""
    record(
        name,
        command=result["command"],
        seeds=list(result["settings"]["seeds"]),
        seconds=seconds,
        scores={key: task for key, task in result["tasks"].items() if task["state"] == "done"},
        **{key: result[key] for key in ("suite", "overall", "lines", "settings")},
        missing=[key for key, task in result["tasks"].items() if task["state"] != "done"],
    )


def record_prompt(name: str, result: dict[str, Any]) -> None:
    """Records in-context learning in docs/results."""
    keys = ("template", "words", "normalise", "balanced", "test_size", "majority", "longest_prompt")
    record(
        name,
        command=result["command"],
        seeds=result["seeds"],
        seconds=result["seconds"],
        scores=result["scores"],
        **{key: result[key] for key in (*keys, "dropped_demonstrations")},
    )


def record_recall(name: str, index: str, scores: dict[str, Any], seconds: float) -> None:
    """Records what an index finds in docs/results, and what it is."""
    values = read_toml(Path(index) / "index.toml")
    keys = ("kind", "items", "dim", "dtype", "faiss")
    record(
        name,
        command=environment.command_line(),
        seeds=[0],
        seconds=seconds,
        scores=scores,
        index={key: values[key] for key in keys if key in values},
    )


def record_evaluation(name: str, run: str, scores: dict[str, float], seconds: float) -> None:
    """Records an evaluation in docs/results."""
    seed = read_toml(Path(run) / "run.toml")["training"]["seed"]
    record(name, command=environment.command_line(), seeds=[seed], seconds=seconds, scores=scores)
