"""Pairs of a source and a target text, for tasks that write: translation, summaries, answers.

| given as                         | what                                                         |
|----------------------------------|--------------------------------------------------------------|
| .csv .tsv .jsonl .parquet        | a table with a column of sources and one of targets          |
| SOURCES:TARGETS                  | two files of plain text whose lines belong together          |
| FILE,FILE                        | several of these, one after the other                        |
| .toml                            | a mixture of labelled files, through prompts: `mixtures`     |

Each may end in .gz, .xz or .zst, except .parquet and .toml. In a table with a column `prefix`
("summarise:") its words stand before the source, so that one model learns several tasks (T5, Raffel
et al. 2019, arXiv 1910.10683). Where a target is a list of texts all of them are right, and the
first is learned.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
import torch

from selfsup.batch import Batch
from selfsup.data import mixtures
from selfsup.data.dataset import LabelledDataset, pad_mask, pad_rows
from selfsup.data.label_files import Record, find_column, has_usual, suffix_of, table, whole_text
from selfsup.data.labels import Labelled, Part
from selfsup.data.tokenizer import Tokenizer
from selfsup.errors import ConfigError, DataError

TASK = "generation"
PREFIX = "prefix"
IGNORED = -100
"""The label of a position that is not scored."""
MAX_TARGET = 128  # tokens, the end included, if nothing else is asked for

Target = str | list[str]


def read(
    path: str | Path,
    task: str = TASK,
    *,
    text: str | int | None = None,
    text_b: str | int | None = None,
    label: str | int | None = None,
    names: tuple[str, ...] | None = None,
) -> Labelled:
    """Reads pairs of texts.

    Args:
        path: what is read, as in the table above.
        task: generation.
        text, label: the columns of sources and of targets in a table; found by their usual names
            where not given, or the only two columns in their order. Numbers, from 1, name the
            columns of a .csv or .tsv without a header row.
        text_b: must be None: a source is one text.
        names: not used.

    Raises:
        DataError: a file cannot be read, a text is empty, or two files differ in their lines; file
            and line are named.
        ConfigError: columns for plain text, or another task.
    """
    if task != TASK:
        raise ConfigError(f"pairs of source and target are for {TASK}, not for {task}")
    if text_b is not None:
        raise ConfigError(f"{TASK} reads one source: give text and label, and leave text_b out")
    if Path(path).suffix == ".toml":
        if text is not None or label is not None:
            raise ConfigError(f"{path}: a mixture names the columns of its files: put them there")
        return mixtures.read(Path(path), task)
    pairs: list[tuple[str, Target]] = []
    parts = [str(path)] if Path(path).exists() else str(path).split(",")
    for part in parts:
        sources, _, targets = part.partition(":")
        if not targets or Path(part).exists():
            pairs += _of_table(Path(part), text, label)
        elif text is not None or label is not None:
            raise ConfigError(f"{part}: plain text has no columns; leave text and label out")
        else:
            pairs += _of_lines(Path(sources), Path(targets))
    if not pairs:
        raise DataError(f"{path}: holds no pair; give sources and targets")
    items, labels = (list(side) for side in zip(*pairs, strict=True))
    return Labelled(task, items, labels, (), str(path))


def _of_lines(sources: Path, targets: Path) -> list[tuple[str, Target]]:
    sides = [whole_text(path).removesuffix("\n").split("\n") for path in (sources, targets)]
    if len(sides[0]) != len(sides[1]):
        raise DataError(
            f"{sources} has {len(sides[0]):,} lines and {targets} {len(sides[1]):,}; lines of the "
            "same number must belong together"
        )
    for path, lines in zip((sources, targets), sides, strict=True):
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                raise DataError(f"{path}:{number}: the line is empty; take it out of both files")
    return [(a.strip(), b.strip()) for a, b in zip(*sides, strict=True)]


def _of_table(path: Path, text: Any, label: Any) -> list[tuple[str, Target]]:
    given = [str(name) for name in (text, label) if name is not None]
    numbered = suffix_of(path) in (".csv", ".tsv") and bool(given)
    columns, records = table(path, numbered and all(name.isdecimal() for name in given))
    usual = has_usual(columns, "source") or has_usual(columns, "target")
    if text is None and label is None and len(columns) == 2 and not usual:
        source, target = columns
    else:
        source = find_column(path, columns, "source", text)
        target = find_column(path, columns, "target", label)
    return [
        (_prefix(record) + _text(record, source), _targets(record, target)) for record in records
    ]


def _prefix(record: Record) -> str:
    prefix = record.cells.get(PREFIX)
    return f"{str(prefix).strip()} " if prefix else ""


def _text(record: Record, column: str) -> str:
    value = record.cells.get(column)
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if value is None or value == "" or (isinstance(value, str) and not value.strip()):
        raise DataError(f"{record.where}: {column!r} is empty; fill it in or remove the line")
    if not isinstance(value, str):
        raise DataError(f"{record.where}: {column!r} must be text, got {value!r}")
    return value.strip()


def _targets(record: Record, column: str) -> Target:
    value = record.cells.get(column)
    if not isinstance(value, list) or not value:
        return _text(record, column)
    return [_text(Record(record.where, {column: one}), column) for one in value]


def source_row(
    tokenizer: Tokenizer, ids: np.ndarray, max_length: int | None = None, kept: int = 0
) -> np.ndarray:
    """A source as it is read, which ends in the separator.

    Args:
        tokenizer: of the model.
        ids: the source's tokens.
        max_length: its most tokens, special ones included; None: all stay.
        kept: so many of the last tokens stay in a source that is too long.
    """
    tokens, _ = tokenizer.row(ids)
    end = tokenizer.vocabulary.sep
    row = tokens if len(tokens) and tokens[-1] == end else np.append(tokens, end)
    if max_length is None or len(row) <= max_length:
        return row
    room = max_length - len(row) + len(ids)
    kept = min(kept, room)
    return source_row(tokenizer, np.concatenate([ids[: room - kept], ids[len(ids) - kept :]]))


def question_length(tokenizer: Tokenizer, part: Part) -> int:
    """How many tokens a question takes at the end of a source."""
    return len(tokenizer.encode([part.question], parse_special=False)[0])


@final
class LabelledPairs(LabelledDataset):
    """Sources and targets as batches; everything is tokenised once, here.

    Batches hold `tokens`, `mask` and `index`, and where targets are known `label`: (batch, time)
    int64 ids that end in the separator, -100 where padded. Sources end in it, too.

    Args:
        labelled: texts, each with its target, several right ones, or None where it is not known.
        tokenizer: turns them into ids.
        max_length: longest source in tokens, special ones included; a longer one loses its end, or
            what stands before its question.
        max_target: likewise of targets.
        prefix: stands before each source as it is.

    Attributes:
        truncated: how many pairs lost tokens.

    Raises:
        ConfigError: a length leaves no room for text.
    """

    def __init__(
        self,
        labelled: Labelled,
        tokenizer: Tokenizer,
        max_length: int,
        max_target: int = MAX_TARGET,
        prefix: str = "",
    ):
        if min(max_length, max_target) < 3:
            raise ConfigError(
                f"sources and targets need room for at least 3 tokens, got max_length {max_length} "
                f"and max_target {max_target}"
            )
        self.task, self.labels, self.labelled = labelled.task, np.empty(0), labelled
        self.tokenizer, self.end = tokenizer, tokenizer.vocabulary.sep
        texts = tokenizer.encode([prefix + text for text in labelled.items], parse_special=False)
        questions = {part: question_length(tokenizer, part) for part in set(labelled.parts)}
        kept = [questions[part] for part in labelled.parts] or [0] * len(texts)
        self.sources = [
            source_row(tokenizer, ids, max_length, num_kept)
            for ids, num_kept in zip(texts, kept, strict=True)
        ]
        long = np.array([len(source_row(tokenizer, ids)) > max_length for ids in texts])
        self.targets: list[np.ndarray] = []
        self.fields: tuple[str, ...] = ("tokens", "mask", "index")
        if labelled.labels[0] is not None:
            self.fields = (*self.fields, "label")
            firsts = [one if isinstance(one, str) else one[0] for one in labelled.labels]
            encoded = tokenizer.encode(firsts, parse_special=False)
            long |= np.array([len(ids) >= max_target for ids in encoded])
            self.targets = [np.append(ids[: max_target - 1], self.end) for ids in encoded]
        self.truncated = int(long.sum())
        self.lengths = np.array([len(row) for row in self.sources])
        if self.targets:
            self.lengths += [len(row) for row in self.targets]

    def __len__(self) -> int:
        return len(self.sources)

    def batch(self, numbers: np.ndarray) -> Batch:
        """The pairs of those numbers as CPU tensors."""
        rows = [self.sources[i] for i in numbers]
        batch = {"tokens": pad_rows(rows, self.tokenizer.vocabulary.pad), **pad_mask(rows)}
        batch["index"] = torch.from_numpy(np.asarray(numbers, dtype=np.int64))
        if self.targets:
            batch["label"] = pad_rows([self.targets[i] for i in numbers], IGNORED)
        return batch

    def collect(
        self, values: Sequence[np.ndarray], scores: Sequence[np.ndarray]
    ) -> tuple[list[Any], list[Any]]:
        """The right texts, whole, and the written ones.

        Args:
            values: ids of each written text; what follows the first separator is not part of it.
            scores: not used.
        """
        written = []
        for row in values:
            ids = row.astype(np.int64).tolist()
            written.append(ids[: ids.index(self.end)] if self.end in ids else ids)
        return self.labelled.labels, [self.tokenizer.decode(ids) for ids in written]
