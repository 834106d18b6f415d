"""A mixture of labelled files, each example written out by a prompt template: one task of many.

    cap = 5000                          # see below; T0's 500,000 where it is left out
    render = "all"                      # each example through all its templates; or "one", drawn
    seed = 0

    [[tasks]]
    data = "reviews.csv"                # beside this file; text, text_b, label: its columns
    templates = ["sentiment", "mine/stars.txt"]

    [[tasks]]
    name = "trec"                       # else the file's name
    data = "trec.tsv"
    templates = ["what-kind.txt"]
    words = {NUM = "number", HUM = "person"}   # in place of the templates' own
    cap = 1000                          # in place of the mixture's

A model that learns many tasks in words does others that it was never trained for (T0, Sanh et al.
2021, arXiv 2110.08207; FLAN, Wei et al. 2021, arXiv 2109.01652). Each example becomes a source, the
template's prompt without demonstrations, and a target, the word of its label. In proportion to
their sizes large tasks would drown small ones; so of a task with n templates each gives at most
cap / n examples (T0, section 4; Raffel et al. 2019, arXiv 1910.10683, section 3.5.2), and with
`render = "one"` the task at most cap.

Deviation: the examples above the cap are left out, those that stay drawn by the seed, for each
template others; T0 draws from all of them for as long as it trains.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from selfsup.config import from_mapping, read_toml
from selfsup.data import labelled_text, templates
from selfsup.data.labels import Labelled, Part, content_key
from selfsup.data.templates import Template
from selfsup.errors import ConfigError, DataError, nearest
from selfsup.randomness import numpy_generator

CAP = 500_000  # T0, section 4


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What holds for all tasks of a mixture."""

    cap: int = CAP
    """Most examples of a task."""
    render: Literal["all", "one"] = "all"
    """Through which of its templates an example goes; one: drawn by seed and position."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.cap < 1:
            raise ValueError(f"cap must be at least 1, got {self.cap}")


@dataclass(frozen=True, kw_only=True)
class Source:
    """One task of a mixture."""

    data: str
    """A labelled file of texts or of pairs of texts; its path begins where the mixture lies."""
    templates: tuple[str, ...]
    """Names of templates, or files."""
    name: str = ""
    """"": that of the file."""
    words: dict[str, str] = field(default_factory=dict)
    """The verbalizer of each label; {}: as in the templates."""
    text: str = ""
    text_b: str = ""
    label: str = ""
    cap: int | None = None

    def __post_init__(self) -> None:
        if not self.templates:
            raise ValueError("templates must name at least one")
        if self.cap is not None and self.cap < len(self.templates):
            raise ValueError(
                f"cap must be at least 1 for each template, got {self.cap} for "
                f"{len(self.templates)}"
            )
        if not isinstance(self.words, dict):
            raise ValueError(f"words must be a section label = word, got {self.words!r}")
        for label, word in self.words.items():
            if not isinstance(word, str) or len(word.strip().splitlines()) != 1:
                raise ValueError(f"words.{label} must be one line of text, got {word!r}")


def read(path: Path, task: str) -> Labelled:
    """Reads a mixture with all its files.

    Args:
        path: a TOML file, as above.
        task: what the examples are for.

    Returns:
        sources and targets, one task after the other; `parts` says whose each example is.

    Raises:
        ConfigError: a key or a template that does not fit; file, task and key are named.
        DataError: a file cannot be read, or does not fit its templates.
    """
    values = read_toml(path)
    given = values.pop("tasks", None)
    if not isinstance(given, list) or not given or not all(isinstance(one, dict) for one in given):
        raise ConfigError(f"{path}: a mixture lists its tasks, each under a line [[tasks]]")
    settings = from_mapping(Settings, values, str(path))
    items: list[str] = []
    labels: list[str] = []
    parts: list[Part] = []
    groups: list[str] = []  # an example stays on one side of a split in all its renderings
    names: list[str] = []
    for number, section in enumerate(given, start=1):
        source = from_mapping(Source, section, f"{path}: tasks {number}")
        name = source.name or Path(source.data).name.partition(".")[0]
        if name in names:
            raise ConfigError(
                f"{path}: tasks {number}: {name!r} is the name of an earlier one; give another name"
            )
        names.append(name)
        _add_task(path, source, name, settings, (items, labels, parts, groups))
    return Labelled(task, items, labels, (), str(path), tuple(groups), tuple(parts))


def _add_task(
    path: Path,
    source: Source,
    name: str,
    settings: Settings,
    rows: tuple[list[str], list[str], list[Part], list[str]],
) -> None:
    where = f"{path}: task {name!r}"
    columns = {key: getattr(source, key) or None for key in ("text", "text_b", "label")}
    labelled = labelled_text.read(path.parent / source.data, "classification", **columns)
    patterns = [_template(path, source, one, where) for one in source.templates]
    for pattern in patterns:
        pattern.check_items(labelled.items, labelled.source)
        for label in labelled.names:
            if label not in pattern.classes:
                raise DataError(
                    f"{labelled.source}: label {label!r} has no word in the template "
                    f"{pattern.name}{nearest(label, pattern.classes)}"
                )
    cap = source.cap if source.cap is not None else settings.cap
    for place, pattern in _chosen(len(labelled), patterns, cap, settings, name):
        item, label = labelled.items[place], labelled.labels[place]
        rows[0].append(source_of(pattern, item))
        rows[1].append(pattern.words[pattern.classes[label]])
        rows[2].append(Part(name, pattern.words, pattern.answer_context.rstrip()))
        rows[3].append(content_key(item))


def source_of(template: Template, item: Any) -> str:
    """What a model reads that writes the label: the prompt without demonstrations."""
    return template.prompt((), item).rstrip()


def _template(path: Path, source: Source, name: str, where: str) -> Template:
    beside = path.parent / name
    known = name in templates.paths() or not beside.is_file()
    text, shown = templates.text_of(name if known else beside), f"{where}: {name}"
    template = templates.parse(text, shown)
    if source.words:
        template = templates.parse(templates.with_words(text, source.words), f"{shown} with words")
    if template.reasons:
        raise ConfigError(
            f"{shown}: has {{reasoning}}, which the labelled file does not give; use another "
            "template"
        )
    return template


def _chosen(
    size: int, patterns: Sequence[Template], cap: int, settings: Settings, name: str
) -> list[tuple[int, Template]]:
    """(number of an example, its template), in the order of the file."""
    order = numpy_generator(settings.seed, f"mixture {name}")
    if settings.render == "one":
        drawn = order.integers(len(patterns), size=size).tolist()
        kept = sorted(order.permutation(size)[:cap].tolist())
        return [(place, patterns[drawn[place]]) for place in kept]
    each = max(1, cap // len(patterns))
    of_each = [sorted(order.permutation(size)[:each].tolist()) for _ in patterns]
    pairs = zip(of_each, patterns, strict=True)
    return [(place, pattern) for places, pattern in pairs for place in places]
