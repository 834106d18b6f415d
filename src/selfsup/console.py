"""What a person sees while selfsup works: a live bar on a terminal, plain lines everywhere else.

Everything goes to the standard error, so the standard output holds results alone.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_state: dict[str, Any] = {"quiet": False, "silent": False, "warnings": None}
PLAIN_INTERVAL = 10.0  # seconds between two plain progress lines


@contextmanager
def quiet() -> Iterator[None]:
    """Says nothing inside the block; warnings are still given."""
    before, _state["quiet"] = _state["quiet"], True
    try:
        yield
    finally:
        _state["quiet"] = before


@contextmanager
def silent() -> Iterator[None]:
    """As `quiet`, and gives no warnings: they are given elsewhere."""
    before, _state["silent"] = _state["silent"], True
    try:
        with quiet():
            yield
    finally:
        _state["silent"] = before


@contextmanager
def overheard() -> Iterator[list[str]]:
    """As `quiet`; yields a list to which warnings go: another process gives them."""
    before, _state["warnings"] = _state["warnings"], []
    try:
        with quiet():
            yield _state["warnings"]
    finally:
        _state["warnings"] = before


def is_terminal() -> bool:
    """Whether a person is watching."""
    return sys.stderr.isatty()


def say(text: str) -> None:
    """One plain line."""
    if not _state["quiet"]:
        print(text, file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """One line that a person must see."""
    if _state["silent"]:
        return
    if _state["warnings"] is not None:
        _state["warnings"].append(text)
    else:
        print(f"warning: {text}", file=sys.stderr, flush=True)


class Progress:
    """A counter that shows itself: `advance` moves it, `note` is the text at its end."""

    def __init__(self, title: str, total: float | None):
        self.title, self.total, self.done, self.note = title, total, 0.0, ""
        self.started = self.shown = time.monotonic()

    def advance(self, amount: float, note: str = "") -> None:
        """Moves on by `amount` of `total`."""
        self.move(self.done + amount, note)

    def move(self, done: float, note: str = "") -> None:
        """Moves to `done` of `total`."""
        self.done, self.note = done, note
        if time.monotonic() - self.shown >= PLAIN_INTERVAL:
            self.shown = time.monotonic()
            share = f"{100 * done / self.total:3.0f}% " if self.total else ""
            say(f"{self.title}: {share}{note}")


class _Bar(Progress):
    def __init__(self, title: str, total: float | None, bar, task):
        super().__init__(title, total)
        self.bar, self.task = bar, task

    def move(self, done: float, note: str = "") -> None:
        self.done, self.note = done, note
        self.bar.update(self.task, completed=done, note=note)


@contextmanager
def progress(title: str, total: float | None = None) -> Iterator[Progress]:
    """A progress display: a rich bar on a terminal, a plain line every ten seconds elsewhere."""
    if _state["quiet"] or not is_terminal():
        yield Progress(title, total)
        return
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        TaskProgressColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}"),
    )
    with RichProgress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield _Bar(title, total, bar, bar.add_task(title, total=total, note=""))
