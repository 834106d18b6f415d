"""Files of a suite as questions: the layouts of GLUE and SuperGLUE, and what each is cast to.

| layout   | one question is                                  | cast to                            |
|----------|--------------------------------------------------|------------------------------------|
| labelled | whatever the run's own kind of data reads        | the task's own form, read strictly |
| tsv      | a line of GLUE, or one without header row        | a text or a pair, and its class    |
| jsonl    | a JSON object of SuperGLUE: BoolQ, CB, RTE, AX   | likewise                           |
| wic      | WiC: one word in two sentences                   | "word: sentence 1" with sentence 2 |
| wsc      | WSC: a noun phrase and a pronoun of one text     | the text, the pronoun *starred*,   |
|          |                                                  | with the phrase                    |
| copa     | COPA: two alternatives                           | premise and question with each     |
| multirc  | MultiRC: a question with any right answers       | paragraph with question and each   |
|          |                                                  | answer                             |
| record   | ReCoRD: a query with a gap, and entities         | passage with the query, the gap    |
|          |                                                  | filled with each entity            |

Choices are scored one by one by a classifier of right ("1") and wrong ("0"): of COPA's and ReCoRD's
the likeliest is the answer, of MultiRC's each one is judged. That is no softmax over the choices of
a question, as the papers have it; the other casts keep to the text and mark in it what the papers'
models read off as spans (Wang et al. 2018, arXiv 1804.07461; 2019, arXiv 1905.00537).

A quote in a .tsv is a character. In a labelled file a line that lacks a cell or has no known label
is left out and counted, as in the benchmark's own reader; a file without labels keeps every line.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from selfsup import registry
from selfsup.data.label_files import Record, suffix_of, table, whole_text
from selfsup.data.labels import Labelled, content_key, finite_number
from selfsup.errors import DataError, nearest

Item = Any
Columns = tuple[str, str, str]
"""Of the text, the second text and the label; "" where there is none."""
EMPTY = "."  # a text of a file without labels that has no characters
MAX_LEFT_OUT = 0.01  # share of a labelled file
FEW = 3  # lines that may be left out of a small one
STEPS = {"cause": "What was the cause?", "effect": "What happened as a result?"}
BULLET = re.compile(r"\s*@highlight\s*")


class Question(NamedTuple):
    """What a suite scores as one.

    Attributes:
        index: what a submission calls it.
        items: one, or one for each choice.
        labels: of the items, to learn from; none in a file without labels.
        truth: what a guess is compared with.
        options: what each choice is called in a submission; () where the label is the answer.
        group: questions of one group are on one side of a split.
    """

    index: Any
    items: tuple[Item, ...]
    labels: tuple[Any, ...]
    truth: Any
    options: tuple[Any, ...] = ()
    group: str = ""


@dataclass(frozen=True)
class Questions:
    """One file.

    Attributes:
        rows: the questions in the order of the file.
        names: classes or tags, as in `Labelled`.
        left_out: how many lines had no label or lacked a cell.
        source: the file, for messages.
    """

    rows: list[Question]
    names: tuple[str, ...]
    left_out: int
    source: str


class Layout(NamedTuple):
    """How a file is read and answered.

    Attributes:
        questions: those of a record, given its columns and its number; KeyError, TypeError or
            ValueError where it is of another form. None: `read_labels` of the kind of data.
        answer: its label; the `best` choice, or `each` choice's label.
    """

    questions: Callable[[Record, Columns, int], Iterator[Question]] | None
    answer: Literal["label", "best", "each"] = "label"


class _Unlabelled(ValueError):
    """A record that cannot be learned from or scored."""


def _plain(record: Record, columns: Columns, number: int) -> Iterator[Question]:
    first, second, label = columns
    texts = tuple(_text(record.cells[name]) for name in (first, second) if name)
    yield _one(record, number, texts if second else texts[0], _label(record, label))


def _wic(record: Record, columns: Columns, number: int) -> Iterator[Question]:
    word, first, second = (_text(record.cells[k]) for k in ("word", "sentence1", "sentence2"))
    yield _one(record, number, (f"{word}: {first}", second), _label(record, "label"))


def _wsc(record: Record, columns: Columns, number: int) -> Iterator[Question]:
    target = record.cells["target"]
    place, pronoun = int(target["span2_index"]), str(target["span2_text"])
    words = str(record.cells["text"]).split()
    end = place + len(pronoun.split())
    marked = [*words[:place], f"*{' '.join(words[place:end])}*", *words[end:]]
    item = (" ".join(marked), _text(target["span1_text"]))
    yield _one(record, number, item, _label(record, "label"))


def _copa(record: Record, columns: Columns, number: int) -> Iterator[Question]:
    cells = record.cells
    asked = f"{_text(cells['premise'])} {STEPS[cells['question']]}"
    items = tuple((asked, _text(cells[name])) for name in ("choice1", "choice2"))
    right = cells.get("label")
    if right not in (None, 0, 1):
        raise ValueError(f"label {right!r} is not 0 or 1")
    labels = () if right is None else tuple(str(int(n == right)) for n in (0, 1))
    yield Question(cells.get("idx", number), items, labels, right, (0, 1), asked)


def _multirc(record: Record, columns: Columns, number: int) -> Iterator[Question]:
    passage, paragraph = record.cells["passage"], record.cells.get("idx", number)
    text = _text(passage["text"])
    for nth, asked in enumerate(passage["questions"]):
        answers = asked["answers"]
        words = _text(asked["question"])
        items = tuple((text, f"{words} {_text(answer['text'])}") for answer in answers)
        labels = tuple(str(int(answer["label"])) for answer in answers if "label" in answer)
        options = tuple(answer.get("idx", n) for n, answer in enumerate(answers))
        yield Question(
            (paragraph, asked.get("idx", nth)), items, labels, list(labels), options, text
        )


def _record(record: Record, columns: Columns, number: int) -> Iterator[Question]:
    passage = record.cells["passage"]
    text = str(passage["text"])
    spans = [(int(e["start"]), int(e["end"]) + 1) for e in passage["entities"]]
    entities = tuple(dict.fromkeys(text[start:end] for start, end in spans))  # ends are inclusive
    shown = BULLET.sub(". ", text).strip()
    for asked in record.cells["qas"]:
        given = asked.get("answers")
        right = None if given is None else list(dict.fromkeys(answer["text"] for answer in given))
        items = tuple(
            (shown, _text(asked["query"]).replace("@placeholder", name)) for name in entities
        )
        labels = () if right is None else tuple(str(int(name in right)) for name in entities)
        yield Question(asked.get("idx", number), items, labels, right, entities, text)


LAYOUTS = {
    "labelled": Layout(None),
    "tsv": Layout(_plain),
    "jsonl": Layout(_plain),
    "wic": Layout(_wic),
    "wsc": Layout(_wsc),
    "copa": Layout(_copa, "best"),
    "multirc": Layout(_multirc, "each"),
    "record": Layout(_record, "best"),
}
CHOICES = ("0", "1")
"""The classes of a choice: wrong and right."""


def _one(record: Record, number: int, item: Item, label: str | None) -> Question:
    index = record.cells.get("index", record.cells.get("idx", number))
    labels = () if label is None else (label,)
    return Question(index, (item,), labels, label, (), content_key(item))


def _text(value: Any) -> str:
    return value.strip() if isinstance(value, str) else json.dumps(value)


def _label(record: Record, column: str) -> str | None:
    """The label as the benchmark writes it; None where the column is not there or empty."""
    return (_text(record.cells[column]) or None) if record.cells.get(column) is not None else None


def read(
    path: Path,
    layout: str,
    task: str,
    columns: Columns,
    classes: Sequence[str] = (),
    *,
    kind: str = "text",
    hidden: bool = False,
) -> Questions:
    """Reads one file of a suite.

    Args:
        path: the file.
        layout: a name of `LAYOUTS`.
        task: a name of `registry.TASKS`.
        columns: as the layout needs them.
        classes: those that are allowed; (): all that occur, for a training part.
        kind: a name of `registry.DATA`, for the layout `labelled`.
        hidden: the file has no labels, and every line of it is answered.

    Raises:
        DataError: it cannot be read, is of another layout, or more of its lines than
            `MAX_LEFT_OUT` (and than `FEW`) have no label.
        ConfigError: a column that this kind of file does not have.
    """
    known = LAYOUTS[layout]
    if known.questions is None:
        return _labelled(path, task, columns, classes, kind)
    if known.answer != "label":
        classes = CHOICES
    rows: list[Question] = []
    left_out: list[str] = []
    for number, record in enumerate(_records(path, columns)):
        try:
            found = list(known.questions(record, columns, number))
            if not hidden:
                found = [_checked(question, task, classes, record.where) for question in found]
        except _Unlabelled as error:
            left_out.append(f"{record.where}: {error}")
            continue
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise DataError(
                f"{record.where}: not of the layout {layout!r} "
                f"({type(error).__name__}: {error}); see selfsup/evaluation/suite_files.py"
            ) from error
        rows += [_filled(question) for question in found] if hidden else found
    if len(left_out) > max(FEW, MAX_LEFT_OUT * (len(rows) + len(left_out))):
        raise DataError(
            f"{len(left_out):,} lines without a label or a cell, more than {MAX_LEFT_OUT:.0%}; the "
            f"first: {left_out[0]}"
        )
    if not rows:
        raise DataError(f"{path}: the file holds no example")
    names = tuple(classes)
    if task == "classification" and not names:
        names = tuple(sorted({label for row in rows for label in row.labels}))
    return Questions(rows, names, len(left_out), str(path))


def _checked(question: Question, task: str, classes: Sequence[str], where: str) -> Question:
    """With labels of the task's form, and no text that is empty."""
    if not question.items or len(question.labels) != len(question.items):
        raise _Unlabelled("the label is missing")
    for label in question.labels:
        if task == "classification" and classes and label not in classes:
            raise _Unlabelled(f"label {label!r} is not among {', '.join(classes)}")
    if not all(_texts(item) for item in question.items):
        raise _Unlabelled("a text is empty")
    if task != "regression":
        return question
    value = finite_number(question.labels[0], where)
    return question._replace(labels=(value,), truth=value)


def _texts(item: Item) -> bool:
    return all(item) if isinstance(item, tuple) else bool(item)


def _filled(question: Question) -> Question:
    """An empty text would be no item; a hidden label is asked for all the same."""
    items = tuple(
        tuple(text or EMPTY for text in item) if isinstance(item, tuple) else item or EMPTY
        for item in question.items
    )
    return question._replace(items=items, labels=(), truth=None)


def _records(path: Path, columns: Columns) -> Iterator[Record]:
    """Rows of a table; of a .tsv also those with fewer or more cells than the header."""
    if suffix_of(path) != ".tsv":
        yield from table(path)[1]
        return
    needed = [name for name in columns if name]
    lines = [line.removesuffix("\r") for line in whole_text(path).split("\n")]
    numbered = [(n, line.split("\t")) for n, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise DataError(f"{path}: the file is empty")
    if needed and all(name.isdecimal() for name in needed):
        names = [str(place) for place in range(1, 1 + max(len(cells) for _, cells in numbered))]
    else:
        names = [name.strip() for name in numbered.pop(0)[1]]
    for name in needed:
        if name not in names:
            shown = ", ".join(map(repr, names))
            raise DataError(f"{path}:1: no column {name!r}{nearest(name, names)}; columns: {shown}")
    for number, cells in numbered:
        padded = [*cells, *[""] * (len(names) - len(cells))]
        yield Record(f"{path}:{number}", dict(zip(names, padded, strict=False)))


def _labelled(
    path: Path, task: str, columns: Columns, classes: Sequence[str], kind: str
) -> Questions:
    """What the kind of data reads by itself, an item a question."""
    given = {
        key: value for key, value in zip(("text", "text_b", "label"), columns, strict=True) if value
    }
    read_labels = registry.module_of(registry.DATA, "data", kind).read_labels
    # a tag that training has not seen can be in a scored part, and no answer is right there
    names = None if task == "tagging" else tuple(classes) or None
    labelled = read_labels(path, task, names=names, **given)
    groups = labelled.groups or tuple(content_key(item) for item in labelled.items)
    rows = [
        Question(number, (item,), (label,), label, (), group)
        for number, (item, label, group) in enumerate(
            zip(labelled.items, labelled.labels, groups, strict=True)
        )
    ]
    return Questions(rows, labelled.names, 0, str(path))


def as_labelled(
    questions: Sequence[Question], task: str, names: tuple[str, ...], source: str
) -> Labelled:
    """The items of the questions, all in one list, as labelled examples to learn from."""
    items = [item for question in questions for item in question.items]
    labels = [label for question in questions for label in question.labels]
    return Labelled(task, items, labels, names, source)
