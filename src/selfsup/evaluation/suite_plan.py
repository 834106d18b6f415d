"""Suites: a list of tasks in a TOML file, what each is trained on, scored on and scored by.

`selfsup evaluate RUN --suite NAME` takes a suite of `selfsup/suites/`, `--suite FILE` a user's:

    title = "My tasks"

    [tasks.reviews]
    task = "classification"             # a name of `registry.TASKS`
    train = "reviews/train.csv"         # below --data
    scored = "reviews/test.csv"         # labelled; it chooses nothing
    metrics = ["accuracy", "macro_f1"]  # their mean is the task's score

    [tasks.names]
    task = "tagging"
    train = ["names/train.bio", "names/train.txt"]   # the first of them that is there
    scored = "names/test.bio"
    metrics = ["span_f1"]

A file is found in any case of letters, and as .gz, .xz or .zst. Further keys of a task:

| key                 | what                                                                    |
|---------------------|-------------------------------------------------------------------------|
| title               | its name for people                                                     |
| text, text_b, label | columns; by default their usual names; numbers where no header row      |
| classes             | the classes in their order; by default those of the training part       |
| layout              | how files are read, a name of `suite_files.LAYOUTS`                     |
| range               | [least, greatest] prediction that a submission of a regression may hold |
| max_length          | longest item; texts: in tokens                                          |

`scored` can be several parts, [tasks.x.scored.PART] with a `file` and, where they differ, columns
and metrics; parts count equally, and one with `counts = false` is a diagnosis that does not count.
[tasks.x.hidden."NAME.tsv"] names a file without labels, the predictions for which become
that file of a submission. [lines.x] holds what others reached: a title, a source, and scores by
task, in percent, one for each metric (with several parts for each metric of each part that counts).
"""

from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from selfsup import registry
from selfsup.config import from_mapping, read_toml
from selfsup.data.label_files import COMPRESSED
from selfsup.errors import ConfigError, nearest
from selfsup.evaluation import suite_files
from selfsup.evaluation.metrics import METRICS

COLUMNS = ("text", "text_b", "label")


@dataclass(frozen=True, kw_only=True)
class Part:
    """A file of a task.

    Attributes:
        file: names of the file below the data folder, the first that is there being taken.
        text, text_b, label: its columns; "": as usual.
        metrics: names of metrics; (): not scored.
        counts: whether its metrics count for the task's score.
    """

    file: tuple[str, ...]
    text: str = ""
    text_b: str = ""
    label: str = ""
    metrics: tuple[str, ...] = ()
    counts: bool = True


@dataclass(frozen=True, kw_only=True)
class SuiteTask:
    """One task of a suite; the module's docstring says what the keys are."""

    task: str
    train: Part
    scored: dict[str, Part]
    metrics: tuple[str, ...]
    hidden: dict[str, Part] = field(default_factory=dict)
    title: str = ""
    text: str = ""
    text_b: str = ""
    label: str = ""
    classes: tuple[str, ...] = ()
    layout: str = "labelled"
    range: tuple[float, ...] = ()
    max_length: int = 0

    def score(self, values: dict[str, float]) -> float:
        """The mean of all metrics that count.

        Args:
            values: by name: a metric's, or PART.metric where there are several parts.
        """
        return fmean(values[name] for name in self.counted)

    @property
    def counted(self) -> tuple[str, ...]:
        """Names of the metrics that count, as in `score`."""
        return tuple(
            self.metric_name(place, metric)
            for place, part in self.scored.items()
            if part.counts
            for metric in part.metrics
        )

    def metric_name(self, place: str, metric: str) -> str:
        """What a part's metric is called among all of the task."""
        return metric if len(self.scored) == 1 else f"{place}.{metric}"


@dataclass(frozen=True, kw_only=True)
class Line:
    """What others reached.

    Attributes:
        title: who.
        source: where it was published, and on what part it was measured.
        scores: percent by task, as many as metrics that count.
    """

    title: str
    source: str
    scores: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Tasks, and lines to compare with.

    Attributes:
        name: of the file.
        title: of the whole, which only a mean over all of its tasks may bear.
        summary: what it is about.
        note: what a reader of its scores must know.
        tasks, lines: by name.
    """

    name: str
    title: str
    tasks: dict[str, SuiteTask]
    lines: dict[str, Line]
    summary: str = ""
    note: str = ""


def load(name: str | Path) -> Suite:
    """Reads a suite by its name or from a file.

    Raises:
        ConfigError: no such suite or file, not TOML, or a key or a value that does not fit.
    """
    path = registry.suite_paths().get(str(name), Path(name))
    if not path.is_file():
        hint = nearest(str(name), registry.suite_paths())
        raise ConfigError(f"no suite and no file is called {str(name)!r}{hint}")
    values = read_toml(path)
    if not values.get("tasks"):
        raise ConfigError(f"{path}: a suite needs at least one [tasks.NAME]")
    tasks = {key: _task(given, f"tasks.{key}") for key, given in _sections(values, "tasks")}
    lines = {
        key: from_mapping(Line, given, f"lines.{key}") for key, given in _sections(values, "lines")
    }
    for key, line in lines.items():
        _check_line(line, tasks, f"lines.{key}.scores")
    plain = {"name": path.stem, "title": path.stem, **values, "tasks": tasks, "lines": lines}
    return from_mapping(Suite, plain, str(path))


def _sections(values: dict[str, Any], key: str) -> list[tuple[str, dict[str, Any]]]:
    given = values.get(key, {})
    if not isinstance(given, dict) or not all(isinstance(v, dict) for v in given.values()):
        raise ConfigError(f"{key} must hold sections [{key}.NAME], got {given!r}")
    return list(given.items())


def _task(given: dict[str, Any], where: str) -> SuiteTask:
    shared = {key: given[key] for key in COLUMNS if key in given}
    metrics = given.get("metrics", [])
    parts = dict(given)
    if "train" in given:
        parts["train"] = _part_values(given["train"], shared)
    scored = given.get("scored")
    if scored is not None:
        several = scored if isinstance(scored, dict) else {"scored": scored}
        parts["scored"] = {
            name: _part(one, f"{where}.scored.{name}", {**shared, "metrics": metrics})
            for name, one in several.items()
        }
    hidden = given.get("hidden", {})
    if not isinstance(hidden, dict):
        raise ConfigError(f'{where}.hidden must name a submission: hidden."NAME.tsv" = {hidden!r}')
    parts["hidden"] = {
        name: _part(one, f"{where}.hidden.{name}", shared) for name, one in hidden.items()
    }
    task = from_mapping(SuiteTask, parts, where)
    _check(task, where)
    return task


def _part(given: Any, where: str, shared: dict[str, Any]) -> Part:
    return from_mapping(Part, _part_values(given, shared), where)


def _part_values(given: Any, shared: dict[str, Any]) -> dict[str, Any]:
    """A part as it may be given: a name, alternative names, or a section."""
    values = dict(given) if isinstance(given, dict) else {"file": given}
    if isinstance(values.get("file"), str):
        values["file"] = [values["file"]]
    return {**shared, **values}


def _check(task: SuiteTask, where: str) -> None:
    if task.task not in registry.TASKS:
        raise ConfigError(f"{where}.task = {task.task!r}{nearest(task.task, registry.TASKS)}")
    if task.layout not in suite_files.LAYOUTS:
        raise ConfigError(
            f"{where}.layout = {task.layout!r}{nearest(task.layout, suite_files.LAYOUTS)}"
        )
    if task.layout != "labelled" and task.task not in ("classification", "regression"):
        raise ConfigError(f"{where}: layout {task.layout!r} is for classification and regression")
    if "train" in task.scored:
        raise ConfigError(f"{where}.scored: call the part otherwise than train")
    if not task.counted:
        raise ConfigError(f'{where}: no metric counts; give metrics, such as ["accuracy"]')
    for part in task.scored.values():
        for metric in part.metrics:
            if metric not in METRICS:
                raise ConfigError(f"{where}: unknown metric {metric!r}{nearest(metric, METRICS)}")
    if task.range and (len(task.range) != 2 or task.range[0] >= task.range[1]):
        raise ConfigError(f"{where}.range must be [least, greatest], got {list(task.range)}")
    for name in task.hidden:
        if task.layout == "labelled" or not name.endswith((".tsv", ".jsonl")):
            raise ConfigError(
                f"{where}.hidden.{name}: a submission is a .tsv or .jsonl file, and its task needs "
                "a layout (tsv, jsonl, ...)"
            )


def _check_line(line: Line, tasks: dict[str, SuiteTask], where: str) -> None:
    for name, values in line.scores.items():
        if name not in tasks:
            raise ConfigError(f"{where}: no task {name!r}{nearest(name, tasks)}")
        numbers = values if isinstance(values, list) else [values]
        if len(numbers) != len(tasks[name].counted) or not all(
            isinstance(value, int | float) for value in numbers
        ):
            raise ConfigError(
                f"{where}.{name} must be {len(tasks[name].counted)} number(s), for "
                f"{', '.join(tasks[name].counted)}; got {values!r}"
            )


def line_score(values: Any) -> float:
    """A line's score of a task, from 0 to 1."""
    return fmean(values if isinstance(values, list) else [values]) / 100


def find(folder: Path, names: tuple[str, ...], but: Path | None = None) -> Path | None:
    """The first of the files that is there, in any case of letters, perhaps packed.

    Args:
        folder: where they are looked for.
        names: one file's names in several layouts, the best first.
        but: a file that is taken already, and not taken again where there are several names.
    """
    for name in names:
        for suffix in ("", *COMPRESSED):
            place: Path | None = folder
            for step in Path(f"{name}{suffix}").parts:
                place = _step(place, step) if place else None
            if place and place.is_file() and (place != but or len(names) == 1):
                return place
    return None


def _step(folder: Path, name: str) -> Path | None:
    """An entry of a folder, spelled exactly so where there are several."""
    if (folder / name).exists() or name in ("/", ".", ".."):
        return folder / name
    if not folder.is_dir():
        return None
    found = [path for path in sorted(folder.iterdir()) if path.name.lower() == name.lower()]
    return found[0] if found else None
