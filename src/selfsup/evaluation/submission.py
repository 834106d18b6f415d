"""Predictions as the benchmarks' own pages take them: GLUE's .tsv, SuperGLUE's .jsonl, in one zip.

GLUE: a header `index<TAB>prediction`, a line for each example, similarities with three decimals.
SuperGLUE: an object {"idx": ..., "label": ...} a line; WSC's labels are "True" and "False", COPA's
numbers, and MultiRC keeps the nesting of paragraph, questions and answers (the files that the
benchmarks' baseline code writes).
"""

import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selfsup.evaluation.suite_files import Question
from selfsup.files import write_bytes, write_text

EPOCH = (1980, 1, 1, 0, 0, 0)  # the date of all files in the zip: equal content, equal bytes


def write(
    path: Path,
    layout: str,
    questions: Sequence[Question],
    guesses: Sequence[Any],
    limits: tuple[float, ...] = (),
) -> None:
    """Writes the predictions for one file.

    Args:
        path: NAME.tsv or NAME.jsonl.
        layout: a name of `suite_files.LAYOUTS`: how the questions were read.
        questions: in the order of their file.
        guesses: one for each.
        limits: least and greatest number; (): none.
    """
    if path.suffix == ".tsv":
        rows = [
            f"{question.index}\t{_cell(guess, limits)}"
            for question, guess in zip(questions, guesses, strict=True)
        ]
        write_text(path, "\n".join(["index\tprediction", *rows]) + "\n")
        return
    objects = (
        _paragraphs(questions, guesses)
        if layout == "multirc"
        else [
            {"idx": question.index, "label": guess.capitalize() if layout == "wsc" else guess}
            for question, guess in zip(questions, guesses, strict=True)
        ]
    )
    write_text(path, "".join(f"{json.dumps(one, ensure_ascii=False)}\n" for one in objects))


def _cell(guess: Any, limits: tuple[float, ...]) -> str:
    if not isinstance(guess, float):
        return str(guess)
    if limits:
        guess = min(max(guess, limits[0]), limits[1])
    return f"{guess:.3f}"


def _paragraphs(questions: Sequence[Question], guesses: Sequence[Any]) -> list[dict[str, Any]]:
    """MultiRC's objects, one for each paragraph; a guess is a list of "0" and "1"."""
    by_paragraph: dict[Any, list[dict[str, Any]]] = {}
    for question, guess in zip(questions, guesses, strict=True):
        paragraph, number = question.index
        answers = [
            {"idx": name, "label": int(label)}
            for name, label in zip(question.options, guess, strict=True)
        ]
        by_paragraph.setdefault(paragraph, []).append({"idx": number, "answers": answers})
    return [
        {"idx": paragraph, "passage": {"questions": found}}
        for paragraph, found in by_paragraph.items()
    ]


def pack(folder: Path, names: Sequence[str], out: Path) -> None:
    """All files of a submission in one zip, without folders.

    Args:
        folder: where they lie.
        names: of the files, in their order.
        out: the .zip.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(zipfile.ZipInfo(name, EPOCH), (folder / name).read_bytes())
    write_bytes(out, buffer.getvalue())
