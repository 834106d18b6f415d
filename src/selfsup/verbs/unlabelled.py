"""Items without labels, of the same form as labelled ones."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selfsup import registry
from selfsup.data import label_files
from selfsup.data.labels import Labelled
from selfsup.errors import DataError
from selfsup.model import Model

Sources = str | Path | Sequence[str]
TAGGED = (".conllu", ".conll", ".bio", ".bmes")
"""Files whose words may be read without their tags."""


def read_unlabelled(
    model: Model, source: Sources, like: Labelled, columns: dict[str, Any]
) -> list[Any]:
    """Texts, pairs of texts, lists of words, pictures: whatever the labelled items are.

    Args:
        model: a run of this kind of data.
        source: what the kind of data reads, one or several; for pairs tables; for tagging also
            files of tagged words, and texts that are split at spaces.
        like: the labelled examples.
        columns: names of the columns `text` and `text_b`, where they are not the usual.

    Raises:
        DataError: nothing is there, or one of two texts is empty.
    """
    paths = [source] if isinstance(source, str | Path) else list(source)
    items: list[Any]
    if isinstance(like.items[0], tuple):
        items = [pair for path in paths for pair in _pairs(Path(path), columns)]
    elif like.task == "tagging":
        tagged = [Path(path) for path in paths if label_files.suffix_of(Path(path)) in TAGGED]
        items = [list(s.words) for path in tagged for s in label_files.sentences(path)]
        others = [path for path in paths if Path(path) not in tagged]
        items += [text.split() for text in _items(model, others, columns)] if others else []
    else:
        items = _items(model, paths, columns)
    if not items:
        raise DataError(f"{', '.join(map(str, paths))}: no unlabelled item is there")
    return items


def _items(model: Model, paths: list[Any], columns: dict[str, Any]) -> list[Any]:
    module = registry.module_of(registry.DATA, "data", model.values["data"]["name"])
    source = paths[0] if len(paths) == 1 else paths
    return [item for _, item in module.read_items(source, columns.get("text"), model.preprocessor)]


def _pairs(path: Path, columns: dict[str, Any]) -> list[tuple[str, str]]:
    names, records = label_files.table(path)
    first, second = (
        label_files.find_column(path, names, what, columns.get(what)) for what in ("text", "text_b")
    )
    return [(_text(record, first), _text(record, second)) for record in records]


def _text(record: label_files.Record, column: str) -> str:
    value = record.cells.get(column)
    if value is None or not str(value).strip():
        raise DataError(f"{record.where}: {column!r} is empty; fill it in or remove the line")
    return str(value).strip()
