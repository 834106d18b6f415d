"""Which labelled examples a prompt shows, and which items it is tried on.

The two never share an item, whatever the files hold. `in_context.py` makes prompts of them.
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from selfsup import console
from selfsup.data.label_files import table
from selfsup.data.labelled_text import read
from selfsup.data.labels import Labelled, content_key, split, subset
from selfsup.data.templates import Template
from selfsup.errors import ConfigError, DataError, nearest
from selfsup.randomness import numpy_generator

Item = str | tuple[str, str]


class Example(NamedTuple):
    """A labelled item, with the reasoning that leads to its label where a template asks for it."""

    item: Item
    label: str
    reasoning: str = ""


def read_examples(
    path: str | Path, template: Template, columns: dict[str, Any], demonstrates: bool
) -> Labelled:
    """A labelled file whose items are `Example`s.

    Args:
        path: a csv, tsv, jsonl or parquet file; for a template with `{reasoning}` with a column
            `reasoning`, where it is to demonstrate.
        template: gives every label its word.
        columns: names of `text`, `text_b` and `label`, where they are not the usual.
        demonstrates: whether demonstrations are drawn from it.

    Raises:
        DataError: the file or a label does not fit the template.
    """
    labelled = read(path, "classification", **columns)
    for label in labelled.names:
        if label not in template.classes:
            raise DataError(
                f"{path}: label {label!r} has no word in the template {template.name}"
                f"{nearest(label, template.classes)}"
            )
    template.check_items(labelled.items, str(path))
    reasons = [""] * len(labelled)
    if template.reasons and demonstrates:
        reasons = _reasons(Path(path), template)
    examples = map(Example, labelled.items, labelled.labels, reasons)
    return replace(labelled, items=list(examples))


def _reasons(path: Path, template: Template) -> list[str]:
    columns, records = table(path)
    if "reasoning" not in columns:
        raise DataError(
            f"{path}: has no column 'reasoning', which demonstrations of the template "
            f"{template.name} need; columns: {', '.join(columns)}; or ask for --shots 0"
        )
    out = []
    for record in records:
        value = record.cells.get("reasoning")
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{record.where}: 'reasoning' is empty; fill it in or remove the line")
        out.append(" ".join(value.split()))  # one line, as the model's own reasoning
    return out


def draw(pool: Labelled, count: int, seed: int, balanced: bool = False) -> list[Example]:
    """`count` examples of the pool in random order; more shots of a seed keep those of fewer.

    Raises:
        DataError: the pool is smaller.
    """
    if count > len(pool):
        raise DataError(f"{pool.source}: {count} demonstrations out of {len(pool)} examples")
    generator = numpy_generator(seed, "demonstrations")
    order = generator.permutation(len(pool)).tolist()
    if balanced:  # one of each class, then a second one of each, ...
        turn = dict(zip(pool.names, generator.permutation(len(pool.names)).tolist(), strict=True))
        taken: Counter[str] = Counter()
        places = {}
        for number in order:
            label = pool.labels[number]
            places[number] = (taken[label], turn[label])
            taken[label] += 1
        order.sort(key=places.__getitem__)
    shuffled = numpy_generator(seed, "demonstration order", count).permutation(count)
    return [pool.items[order[place]] for place in shuffled]


def read_parts(
    template: Template,
    data: str | Path | None,
    test: str | Path | None,
    columns: dict[str, Any],
    limit: int | None,
) -> tuple[Labelled | None, Labelled]:
    """The examples that demonstrate and those that are scored; no item is among both.

    Args:
        template: see `read_examples`.
        data: file of demonstrations; None: there are none.
        test: file that is scored; None: a quarter of `data` is split off.
        columns: see `read_examples`.
        limit: most test items.

    Raises:
        ConfigError: neither file is given.
        DataError: see `read_examples`.
    """
    if data is None and test is None:
        raise ConfigError("nothing to score: give --test FILE, or --data FILE, or items")
    pool = None if data is None else read_examples(data, template, columns, demonstrates=True)
    if test is not None:
        scored = read_examples(test, template, columns, demonstrates=False)
    else:
        assert pool is not None
        pool, scored = split(pool, (0.75, 0.25), seed=0)
    if limit is not None and limit < len(scored):
        scored = subset(scored, limit, seed=0)
    if pool is not None:
        asked = {content_key(example.item) for example in scored.items}
        keep = [i for i, e in enumerate(pool.items) if content_key(e.item) not in asked]
        if len(keep) < len(pool):
            console.warn(f"{len(pool) - len(keep)} examples of {data} are test items: left out")
        pool = pool.take(keep)
    return pool, scored
