"""Recorded results: a number that a page quotes stands in docs/results/NAME.json."""

import datetime
from pathlib import Path
from typing import Any

from selfsup import environment
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
