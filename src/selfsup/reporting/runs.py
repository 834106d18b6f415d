"""Reads a run folder for the report: what is there, checked once, and a note for what is not."""

import json
import math
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfsup.errors import CheckpointError

Row = dict[str, Any]


@dataclass(frozen=True)
class Compare:
    """One comparison of arms (pre-trained, scratch, baseline) by number of labels.

    Attributes:
        name: the file it came from.
        task, metric: what was learned, and what is measured.
        scores: arm -> number of labels -> one score per seed.
        tunings: the pre-trained arm by tuning: `scores` as above, `seconds` in the same form, and
            what it costs: `trained`, `share`, `step_seconds`, `memory`, `file_bytes`.
        curves: fine-tuning curves: `arm`, `labels`, `seed`, `step`, `loss`, perhaps `score`.
        raw: the whole file.
    """

    name: str
    task: str
    metric: str
    scores: dict[str, dict[int, list[float]]]
    tunings: dict[str, Row]
    curves: list[Row]
    raw: Row

    @property
    def label_counts(self) -> list[int]:
        """Every number of labels that some arm was scored with, ascending."""
        return sorted({count for by_count in self.scores.values() for count in by_count})

    @property
    def unit(self) -> str:
        """What one labelled example is called."""
        return str(self.raw.get("unit", "examples"))


@dataclass(frozen=True)
class Run:
    """What a run folder says.

    Attributes:
        folder: as the caller gave it; it is shown in commands.
        values: the sections of `run.toml`.
        metrics, speed: rows in the order of their steps, one per (split, step).
        compares: the `compare*.json` files by name.
        fills, samples, pictures, probe, alignment, anomaly, embeddings: the content of those files,
            None where there is none.
        suites: the `suite*/suite.json` files by name.
        warnings: what a reader must see first.
    """

    folder: Path
    values: Row
    metrics: list[Row]
    speed: list[Row]
    compares: list[Compare]
    fills: list[Row] | None
    samples: list[Row] | None
    pictures: list[Row] | None
    probe: Row | None
    alignment: Row | None
    anomaly: Row | None
    embeddings: Row | None
    suites: list[Row]
    warnings: list[str]

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.name or self.folder.resolve().name

    @property
    def kind(self) -> str:
        """The method's or the task's name; empty where `run.toml` names neither."""
        for section in ("method", "task"):
            part = self.values.get(section, {})
            if part:
                return str(part.get("name", "")) if isinstance(part, dict) else str(part)
        return ""

    def curve(self, key: str, split: str = "train") -> tuple[list[float], list[float]]:
        """Steps and finite values of one metric on one split."""
        rows = [r for r in self.metrics if r.get("split", "train") == split and finite(r.get(key))]
        return [r["step"] for r in rows], [r[key] for r in rows]


def finite(value: Any) -> bool:
    """Whether a value from a file is a number that can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_run(folder: Path) -> Run:
    """Everything that the report shows of one run folder.

    Raises:
        CheckpointError: the folder or its `run.toml` is missing, or a file in it is damaged.
    """
    path = folder / "run.toml"
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}). Give run folders, such as runs/first; "
            "`selfsup pretrain` makes one."
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not a TOML file ({error})") from error
    warnings = [str(text) for text in _json(folder / "warnings.json", list) or []]
    metrics, cut_metrics = _rows(folder / "metrics.jsonl")
    speed, cut_speed = _rows(folder / "speed.jsonl")
    return Run(
        folder=folder,
        values=values,
        metrics=metrics,
        speed=speed,
        compares=[read_compare(file) for file in sorted(folder.glob("compare*.json"))],
        fills=_json(folder / "fills.json", list, ("text", "blanks")),
        samples=_json(folder / "samples.json", list, ("prompt", "text")),
        pictures=_json(folder / "pictures.json", list, ("title", "rows")),
        probe=_json(folder / "probe.json", dict, ("scores",)),
        alignment=_alignment(folder / "alignment.json"),
        anomaly=_anomaly(folder / "anomaly.json"),
        embeddings=_embeddings(folder / "embeddings.json"),
        suites=[_suite(file) for file in sorted(folder.glob("suite*/suite.json"))],
        warnings=warnings + cut_metrics + cut_speed,
    )


def read_compare(path: Path) -> Compare:
    """A comparison, its scores checked.

    Raises:
        CheckpointError: not JSON, a key is missing, or a score is not a finite number.
    """
    raw = _json(path, dict, ("metric", "arms"))
    if raw is None:
        raise CheckpointError(f"{path}: no such file; `selfsup compare RUN ...` makes it")
    scores = _by_seed(path, "arms", raw["arms"])
    for place, row in enumerate(raw.get("curves") or []):
        lacking = [key for key in ("arm", "labels", "step", "loss") if key not in row]
        if lacking:
            raise CheckpointError(f"{path}: curves[{place}]: missing key {', '.join(lacking)}")
    scores = {arm: by_count for arm, by_count in scores.items() if by_count}
    if not scores:
        raise CheckpointError(f'{path}: "arms" holds no scores; run `selfsup compare` again')
    return Compare(
        name=path.name,
        task=str(raw.get("task", "")),
        metric=str(raw["metric"]),
        scores=scores,
        tunings=_tunings(path, raw.get("tunings") or {}),
        curves=list(raw.get("curves") or []),
        raw=raw,
    )


def _by_seed(path: Path, key: str, found: Any) -> dict[str, dict[int, list[float]]]:
    """Scores by name, number of labels and seed, checked."""
    try:
        scores = {
            str(name): {int(count): list(seeds) for count, seeds in by_count.items() if seeds}
            for name, by_count in found.items()
        }
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f'{path}: "{key}" must hold arm -> number of labels -> one score per seed ({error})'
        ) from error
    for name, by_count in scores.items():
        for count, seeds in by_count.items():
            if count < 1 or not all(map(finite, seeds)):
                raise CheckpointError(f"{path}: {key}.{name}.{count} = {seeds}: not finite scores")
    return scores


def _tunings(path: Path, found: dict[str, Row]) -> dict[str, Row]:
    """Scores and costs of tunings, their numbers checked."""
    costs = ("trained", "share", "step_seconds", "memory", "file_bytes")
    for name, tuning in found.items():
        if not all(finite(tuning.get(key)) and tuning[key] > 0 for key in costs):
            raise CheckpointError(
                f"{path}: tunings.{name} must hold numbers above 0: {', '.join(costs)}; run "
                "`selfsup compare` again"
            )
    by_key = {
        key: _by_seed(path, "tunings", {name: tuning.get(key) for name, tuning in found.items()})
        for key in ("scores", "seconds")
    }
    for name in found:
        if (
            by_key["scores"][name].keys() != by_key["seconds"][name].keys()
            or not found[name]["scores"]
        ):
            raise CheckpointError(f"{path}: tunings.{name} lacks scores, or seconds for them")
    return {
        name: {**tuning, **{key: by_key[key][name] for key in by_key}}
        for name, tuning in found.items()
    }


def _embeddings(path: Path) -> Row | None:
    """A map of points, its lists checked against each other."""
    found = _json(path, dict, ("points", "labels"))
    if found is None:
        return None
    number = len(found["points"])
    for key in ("labels", "texts", "untrained_points"):
        if found.get(key) and len(found[key]) != number:
            raise CheckpointError(
                f"{path}: {len(found[key])} {key} for {number} points; run `selfsup embed` again"
            )
    for point in found["points"] + (found.get("untrained_points") or []):
        if len(point) != 2 or not all(map(finite, point)):
            raise CheckpointError(f"{path}: a point is {point}, must be two finite numbers")
    return found


def _alignment(path: Path) -> Row | None:
    """Scores of two languages by layer, their numbers checked."""
    found = _json(path, dict, ("languages", "pairs", "chance", "scores"))
    for name, layers in (found or {"scores": {}})["scores"].items():
        for layer, scores in enumerate(layers):
            keys = [f"{start}mrr{end}" for start in ("", "centred_") for end in ("", "_back")]
            if not all(finite(scores.get(key)) for key in keys):
                raise CheckpointError(
                    f"{path}: scores.{name}[{layer}] must hold the numbers {', '.join(keys)}; run "
                    "`selfsup align` again"
                )
    return found


def _suite(path: Path) -> Row:
    """The scores of a suite of tasks, their numbers checked."""
    found: Row = _json(path, dict, ("title", "overall", "tasks", "lines"))
    for name, task in found["tasks"].items():
        scores = task.get("score", []) if task.get("state") == "done" else [0.0]
        if not scores or not all(map(finite, scores)):
            raise CheckpointError(
                f"{path}: tasks.{name}.score = {scores}: not finite scores; run `selfsup evaluate` "
                "again"
            )
    return found


def _anomaly(path: Path) -> Row | None:
    """Scores and histograms of detectors, their numbers checked."""
    found = _json(path, dict, ("scores", "histograms"))
    for name, histogram in (found or {"histograms": {}})["histograms"].items():
        edges, threshold = histogram.get("edges", []), histogram.get("threshold")
        counts = [histogram.get(part, []) for part in ("normal", "abnormal")]
        numbers = [threshold, *edges, *counts[0], *counts[1]]
        if not edges or {len(part) + 1 for part in counts} != {len(edges)}:
            raise CheckpointError(
                f"{path}: histograms.{name} must hold one edge more than counts; run "
                "`selfsup evaluate` again"
            )
        if not all(map(finite, numbers)):
            raise CheckpointError(f"{path}: histograms.{name} holds what is no finite number")
    return found


def _json(path: Path, kind: type, keys: tuple[str, ...] = ()) -> Any:
    """The content of a JSON file, or None where there is no such file."""
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable JSON file ({error})") from error
    if not isinstance(content, kind):
        raise CheckpointError(f"{path}: must hold a {kind.__name__}")
    items: list[Any] = [content] if kind is dict else list(content)  # type: ignore[call-overload]
    for number, item in enumerate(items if keys else []):
        lacking = [key for key in keys if not isinstance(item, dict) or key not in item]
        if lacking:
            place = f"item {number}: " if kind is list else ""
            raise CheckpointError(f"{path}: {place}missing key {', '.join(lacking)}")
    return content


def _rows(path: Path) -> tuple[list[Row], list[str]]:
    """Rows of a JSONL file, and a note where its last line was cut off.

    A resumed run writes the steps after its checkpoint again: the later row counts.
    """
    if not path.exists():
        return [], []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rows: dict[tuple[str, float], Row] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not finite(row["step"]):
                raise ValueError(f"step = {row['step']}")
            rows[str(row.get("split", "train")), row["step"]] = row
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if number == len(lines):  # a run that was killed while it wrote
                return _ordered(rows), [f"{path.name}: its last line is cut off and left out."]
            raise CheckpointError(
                f'{path}:{number}: not a JSON object with a "step" ({error})'
            ) from error
    return _ordered(rows), []


def _ordered(rows: dict[tuple[str, float], Row]) -> list[Row]:
    return sorted(rows.values(), key=lambda row: row["step"])
