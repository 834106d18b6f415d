"""Files of questions whose answers are spans of a document, read strictly.

| suffix                       | what                                                              |
|------------------------------|-------------------------------------------------------------------|
| .json                        | SQuAD v1.1 (Rajpurkar et al. 2016, arXiv 1606.05250) or v2.0      |
|                              | (2018, arXiv 1806.03822), and what has their form: DRCD, CMRC     |
| .jsonl .parquet .csv .tsv    | a row for each question: `question`, `context`, `answers`, and    |
|                              | where there is one a `title`: rows that a split keeps together    |

In a row `answers` (or `answer`) is a list of {"text", "answer_start"}, one such object, a text, a
list of texts, or {"text": [...], "answer_start": [...]}. A text without a place is taken where it
stands first. Each may end in .gz, .xz or .zst, except .parquet.
"""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from selfsup import console
from selfsup.data.label_files import COMPRESSED, TABLES, Record, find_column, table, whole_text
from selfsup.data.labels import Labelled
from selfsup.errors import ConfigError, DataError

TASK = "span_qa"
NO_ANSWER = "no answer"
"""The one name of a data set in which some question has no answer; else there are no names."""

QUESTION, CONTEXT, ANSWERS = ("question",), ("context",), ("answers", "answer", "label")


class Answer(NamedTuple):
    """A right answer: its text, and its first character in the document; -1: nowhere in it."""

    text: str
    start: int


class _Question(NamedTuple):
    item: tuple[str, str]
    answers: list[Answer]
    group: str


def read(
    path: str | Path,
    task: str = TASK,
    *,
    text: str | None = None,
    text_b: str | None = None,
    label: str | None = None,
    names: tuple[str, ...] | None = None,
) -> Labelled:
    """Reads one file of questions.

    An answer must stand where the file says. Two ways of being beside it are put right, and said:
    places that are counted in UTF-16 units, and answers that differ by white space alone. A place
    of -1 says that people's answer is not a span (CMRC 2018): it counts as right, but is not
    learned.

    Args:
        path: a file of one of the formats above.
        task: span_qa.
        text, text_b, label: the columns of the question, the document and the answers, in formats
            with columns; found by their usual names where not given.
        names: the training data's `names`, when this is validation or test data; None: `NO_ANSWER`
            where a question here has no answer.

    Returns:
        (question, document) pairs, each with a list of `Answer`, empty where there is no answer;
        `groups` are the titles of articles, or the documents where there are no titles.

    Raises:
        DataError: the file cannot be read, or a question is not as it must be; file and question
            are named.
        ConfigError: columns for a format without, or another task.
    """
    path = Path(path)
    if task != TASK:
        raise ConfigError(f"questions with documents are for the task {TASK}, not {task!r}")
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() not in COMPRESSED]
    suffix = suffixes[-1] if suffixes else ""
    mended: Counter[str] = Counter()
    if suffix == ".json":
        if text is not None or text_b is not None or label is not None:
            raise ConfigError(f"{path}: a .json file has no columns; leave text and label out")
        questions = _squad(path, mended)
    elif suffix in TABLES:
        questions = _rows(path, (text, text_b, label), mended)
    else:
        raise DataError(
            f"{path}: the suffix does not name a known format; for {TASK} give a .json file as "
            f"SQuAD, or a {', '.join(TABLES)} file"
        )
    if not questions:
        raise DataError(f"{path}: the file holds no question")
    for what, count in mended.items():
        console.say(f"{path}: {count:,} answers {what}")
    if names is None:
        names = () if all(question.answers for question in questions) else (NO_ANSWER,)
    items, answers, groups = zip(*questions, strict=True)
    return Labelled(TASK, list(items), list(answers), names, str(path), groups)


def _squad(path: Path, mended: Counter[str]) -> list[_Question]:
    try:
        document = json.loads(whole_text(path))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}: not JSON ({error}); one object a line is called .jsonl"
        ) from error
    out = []
    for number, article in enumerate(_part(document, "data", list, str(path))):
        where = f"{path}: data[{number}]"
        title = article.get("title") if isinstance(article, dict) else None
        for place, paragraph in enumerate(_part(article, "paragraphs", list, where)):
            there = f"{where}.paragraphs[{place}]"
            context = _filled(paragraph, "context", there)
            group = str(title) if title else context
            for nth, asked in enumerate(_part(paragraph, "qas", list, there)):
                where_asked = f"{there}.qas[{nth}]"
                if isinstance(asked, dict) and "id" in asked:
                    where_asked = f"{path}: question {asked['id']}"
                if isinstance(asked, dict) and asked.get("question") == "":  # CMRC's trial part
                    mended["belong to an empty question, and are left out"] += 1
                    continue
                question = _filled(asked, "question", where_asked)
                given = _part(asked, "answers", list, where_asked)
                if asked.get("is_impossible"):
                    given = []  # v2.0 keeps plausible answers elsewhere
                elif not given and "is_impossible" not in asked:
                    raise DataError(
                        f"{where_asked}: has no answer; say is_impossible = true where the "
                        "document does not answer it"
                    )
                answers = [_answer(one, context, where_asked, mended) for one in given]
                out.append(_Question((question, context), answers, group))
    return out


def _rows(
    path: Path, given: tuple[str | None, str | None, str | None], mended: Counter[str]
) -> list[_Question]:
    columns, records = table(path)
    usual = zip((QUESTION, CONTEXT, ANSWERS), ("text", "text_b", "label"), given, strict=True)
    question, context, answers = (
        _column(path, columns, names, what, name) for names, what, name in usual
    )
    out = []
    for record in records:
        item = (
            _filled(record.cells, question, record.where),
            _filled(record.cells, context, record.where),
        )
        found = [_answer(one, item[1], record.where, mended) for one in _given(record, answers)]
        group = str(record.cells.get("title") or item[1])
        out.append(_Question(item, found, group))
    return out


def _column(
    path: Path, columns: list[str], usual: tuple[str, ...], what: str, given: str | None
) -> str:
    if given is None:
        found = [column for column in columns if column.lower() in usual]
        if len(found) == 1:
            return found[0]
        shown = ", ".join(map(repr, columns))
        number = "several columns" if found else "no column"
        raise DataError(
            f"{path}: {number} called {' or '.join(usual)}; say which with {what}=NAME; "
            f"columns: {shown}"
        )
    return find_column(path, columns, what, given)


def _given(record: Record, column: str) -> list[Any]:
    """The answers of a row, each an object or a text."""
    value = record.cells.get(column)
    if isinstance(value, dict) and isinstance(value.get("text"), list):
        places = value.get("answer_start", [None] * len(value["text"]))
        if not isinstance(places, list) or len(places) != len(value["text"]):
            raise DataError(f"{record.where}: {column!r} has not as many places as texts")
        pairs = zip(value["text"], places, strict=True)
        return [{"text": text, "answer_start": place} for text, place in pairs]
    if column not in record.cells or value is None:
        raise DataError(
            f"{record.where}: {column!r} is missing; write [] where the document has no answer"
        )
    return value if isinstance(value, list) else [value]


def _part(value: Any, key: str, kind: type, where: str) -> Any:
    if not isinstance(value, dict) or not isinstance(value.get(key), kind):
        raise DataError(
            f"{where}: expected an object with a {kind.__name__} {key!r}, as in SQuAD, "
            f"got {json.dumps(value, ensure_ascii=False, default=str)[:60]}"
        )
    return value[key]


def _filled(value: Any, key: str, where: str) -> str:
    found = _part(value, key, str, where)
    if not found.strip():
        raise DataError(f"{where}: {key!r} is empty; fill it in or remove the question")
    return found


def _answer(given: Any, context: str, where: str, mended: Counter[str]) -> Answer:
    """A right answer where it stands in the document; what had to be put right is counted."""
    if isinstance(given, str):
        given = {"text": given}
    text, start = _filled(given, "text", f"{where}: an answer"), given.get("answer_start")
    if start is None:
        start = context.find(text)
        if start < 0:
            raise DataError(f"{where}: the answer {text!r} is not in its document")
        if context.find(text, start + 1) >= 0:
            mended["without a place stand several times; the first is taken"] += 1
        return Answer(text, start)
    if not isinstance(start, int) or isinstance(start, bool):
        raise DataError(f"{where}: answer_start must be a whole number, got {start!r}")
    if start == -1:
        mended["are no span of their document, and are scored but not learned"] += 1
        return Answer(text, -1)
    if start < 0:
        raise DataError(f"{where}: answer_start must be at least 0, or -1, got {start}")
    if context.startswith(text, start):
        return Answer(text, start)
    in_utf16 = len(context.encode("utf-16-le")[: 2 * start].decode("utf-16-le", "ignore"))
    if context.startswith(text, in_utf16):
        mended["have places counted in UTF-16 units, now in characters"] += 1
        return Answer(text, in_utf16)
    first = start + len(context[start:]) - len(context[start:].lstrip())
    loose = re.compile(r"\s*".join(re.escape(sign) for sign in text if not sign.isspace()))
    found = loose.match(context, first)
    if found:
        mended["differed by white space, and are now as their document has them"] += 1
        return Answer(found[0], found.start())
    elsewhere = context.find(text)
    there = f"; it stands at {elsewhere}" if elsewhere >= 0 else "; it is nowhere in the document"
    raise DataError(
        f"{where}: the answer {text!r} is not at answer_start = {start}, where the document has "
        f"{context[start : start + len(text)]!r}{there}; count characters from 0"
    )
