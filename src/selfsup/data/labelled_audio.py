"""Labelled sounds: which file has which label, and their batches."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
import torch

from selfsup.batch import Batch
from selfsup.data.audio_features import collate, compiled_pattern
from selfsup.data.audio_files import find, path_says
from selfsup.data.dataset import LabelledDataset
from selfsup.data.label_files import Record, find_column, suffix_of, table
from selfsup.data.labels import Labelled, check_known, finite_number, label_numbers, names_of
from selfsup.errors import ConfigError, DataError

TASKS = ("classification", "regression")
PATH_COLUMNS = ("file", "path", "audio", "filename")
GROUP_COLUMNS = ("group", "speaker")


def read_labels(
    path: str | Path,
    task: str,
    *,
    text: str | int | None = None,
    text_b: str | int | None = None,
    label: str | int | None = None,
    names: tuple[str, ...] | None = None,
) -> Labelled:
    """Reads which sound has which label, from a table or from the paths of a folder.

    Args:
        path: a .csv, .tsv, .jsonl or .parquet table with a column of paths, relative to the table's
            folder, and a column of labels; a column `group` or `speaker` gives the groups. Or a
            folder of sounds.
        task: classification or regression.
        text: the column of the paths; file, path, audio or filename where not given.
        text_b: not for sounds.
        label: of a table, the column of the labels. Of a folder, a regular expression that is
            searched in each path relative to it, with the named group `label`, and `group` if there
            is one (a speaker); None: the first-level sub-folder's name is the label.
        names: the training data's `names`, when this is validation or test data. None: this is
            training data, and there must be at least two different labels.

    Raises:
        DataError: the table cannot be read, a sound is missing, or a label does not fit the task.
        ConfigError: another task, or an option that this source does not have.
    """
    path = Path(path).expanduser()
    if task not in TASKS:
        raise ConfigError(f"sounds are labelled for {' or '.join(TASKS)}, not for {task!r}")
    if text_b is not None:
        raise ConfigError("a sound has no second text; leave text_b out")
    if path.is_dir():
        if text is not None:
            raise ConfigError(f"{path} is a folder: there is no column to name; leave text out")
        rows = _folder_rows(path, None if label is None else str(label))
    else:
        rows = _table_rows(path, text, label)
    labels = [_label(row, task, names) for row in rows]
    if names is None:
        names = names_of(labels, task, str(path))
    groups = tuple(row.group for row in rows)
    sounds = [row.sound for row in rows]
    return Labelled(task, sounds, labels, names, str(path), groups if all(groups) else ())


class _Row(NamedTuple):
    """Where it stands, which sound, its label as it is written, its group or ""."""

    where: str
    sound: str
    label: str
    group: str = ""


def _label(row: _Row, task: str, names: tuple[str, ...] | None) -> Any:
    if task == "regression":
        return finite_number(row.label, row.where)
    if names is not None:
        check_known(row.label, names, row.where)
    return row.label


def _folder_rows(folder: Path, label: str | None) -> list[_Row]:
    pattern = re.compile(r"^(?P<label>[^/]+)/")
    if label is not None:
        pattern = compiled_pattern(label, "label")
        if "label" not in pattern.groupindex:
            raise ConfigError(f"label = {label!r} must name the group (?P<label>...)")
    rows = []
    for path, relative in find(folder).items():
        if label is None and "/" not in relative:
            raise DataError(
                f"{path}: lies in no sub-folder that could be its label; move it into one, or say "
                "how to find the label in its path with label='(?P<label>...)'"
            )
        says = path_says(pattern, relative, str(path))
        if not says["label"]:
            raise DataError(f"{path}: the pattern {label!r} finds an empty label in {relative!r}")
        rows.append(_Row(str(path), str(path), **says))
    return rows


def _table_rows(path: Path, text: str | int | None, label: str | int | None) -> list[_Row]:
    given = [str(name) for name in (text, label) if name is not None]
    numbered = suffix_of(path) in (".csv", ".tsv") and bool(given)
    columns, records = table(path, numbered and all(name.isdecimal() for name in given))
    if text is None:
        usual = [name for name in columns if name.lower() in PATH_COLUMNS]
        if len(usual) != 1:
            raise DataError(
                f"{path}:1: expected one column of paths ({', '.join(PATH_COLUMNS)}), found "
                f"{', '.join(usual) or 'none'}; say which with text=NAME; "
                f"columns: {', '.join(columns)}"
            )
        text = usual[0]
    sounds = find_column(path, columns, "text", text)
    answers = find_column(path, columns, "label", label)
    group = next((name for name in columns if name.lower() in GROUP_COLUMNS), None)
    rows = []
    for record in records:
        sound = path.parent / _cell(record, sounds)
        if not sound.is_file():
            raise DataError(f"{record.where}: no file {sound}")
        says = _cell(record, group) if group not in (None, sounds, answers) else ""
        rows.append(_Row(record.where, str(sound), _cell(record, answers), says))
    if not rows:
        raise DataError(f"{path}: the table holds no example; give rows with a path and a label")
    return rows


def _cell(record: Record, column: str) -> str:
    value = record.cells.get(column)  # JSON lines may differ in their keys
    if isinstance(value, bool | int | float):
        value = json.dumps(value)  # true, 1, 0.5: as JSON writes it
    if not isinstance(value, str) or not value.strip():
        raise DataError(
            f"{record.where}: {column!r} must be text or a number, got {value!r}; "
            "fill it in or remove the line"
        )
    return value.strip()


@final
class LabelledSounds(LabelledDataset):
    """Labelled sounds as batches; every file is read once, here, and its features stay in memory.

    Batches hold the fields of `Sounds` and `label`: (batch,) int64 class numbers, or (batch,)
    float32 for regression.

    Args:
        labelled: paths, or what else `AudioPreprocessor.batches` takes, and their labels.
        preprocessor: the encoder's `AudioPreprocessor`.

    Attributes:
        labels: (examples,) class numbers or numbers.
        truncated: how many sounds were cut.

    Raises:
        DataError: a sound cannot be used; it is named.
    """

    def __init__(self, labelled: Labelled, preprocessor: Any):
        self.task = labelled.task
        found = preprocessor.rows(labelled.items, f"{labelled.source}: item")
        self.examples, self.truncated = found
        self.labels = label_numbers(labelled)
        main, *others = preprocessor.features.widths
        self.fields = (main, "mask", "index", *others, "label")
        self.lengths = np.array([len(row[main]) for row in self.examples])

    def __len__(self) -> int:
        return len(self.examples)

    def batch(self, numbers: np.ndarray) -> Batch:
        """The examples of those numbers as CPU tensors."""
        batch = collate([self.examples[i] for i in numbers])
        batch["index"] = torch.from_numpy(np.asarray(numbers, dtype=np.int64))
        label = torch.from_numpy(self.labels[numbers])
        batch["label"] = label.float() if self.task == "regression" else label.long()
        return batch
