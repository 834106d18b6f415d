"""Prompt templates: plain text files that turn labelled examples into prompts.

    Say whether the review is good or bad.

    {examples}
    Review: {text}
    Sentiment: {label}

    --- labels
    0, negative = bad
    1, positive = good

Above the line `{examples}` stands the instruction, below it one example. A demonstration is the
example with everything filled in, and the query is the example up to `{label}`; all these are
joined by blank lines. Without `{examples}` there is no instruction. A pair's second text goes to
`{text_b}`. With `{reasoning}` the model writes a line of reasoning there before it answers.

Under `--- labels` each line is a class: its names in labelled files, and the word that stands for
it, its verbalizer (Schick and Schütze, 2020, arXiv 2001.07676), which may be several tokens long.
A name that holds "," or "=" is written as a JSON string: "acq, usa" = company.

A masked language model reads both sides of the label, so a template for the task `cloze` may have
texts behind it, "Just {label}! {text}"; the line `{examples}` and demonstrations it does not need.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfsup.errors import ConfigError, DataError, nearest

FOLDER = Path(__file__).parent.parent / "templates"
PLACES = ("examples", "text", "text_b", "reasoning", "label")
PLACE = re.compile(r"\{(\w+)\}")
SECTION = re.compile(r"--- +(\S.*)")
LABEL = re.compile(r'\s*("(?:[^"\\]|\\.)*"|[^",=][^,=]*?)\s*([,=])')


@dataclass(frozen=True)
class Template:
    """A parsed template.

    Attributes:
        name: what the user called it, for messages.
        instruction: comes first in every prompt; may be empty.
        example: the pattern of a demonstration and of the query.
        words: the verbalizers, one per class.
        classes: the class number of each label name.

    >>> template = parse("{text} It was {label}.\\n--- labels\\n0 = bad\\n1 = good", "films")
    >>> template.prompt([template.demonstration("A mess.", "0")], "I wept.")
    'A mess. It was bad.\\n\\nI wept. It was '
    """

    name: str
    instruction: str
    example: str
    words: tuple[str, ...]
    classes: dict[str, int]

    @property
    def paired(self) -> bool:
        """Whether an item is a pair of texts."""
        return "{text_b}" in self.example

    @property
    def reasons(self) -> bool:
        """Whether reasoning comes before the label."""
        return "{reasoning}" in self.example

    @property
    def answer_context(self) -> str:
        """The fixed text right before the label: "Sentiment: "."""
        before = self.example.partition("{label}")[0]
        return PLACE.split(before)[-1].rpartition("\n")[2]

    @property
    def summary(self) -> str:
        """One line for a list: the instruction, or else the pattern."""
        return " ".join((self.instruction or self.example).split())

    def words_of(self, names: Sequence[str], source: str) -> list[str]:
        """The word of each label of the training data; each has its own, and no word is left over.

        Raises:
            DataError: they do not fit; `source` is named.
        """
        for name in names:
            if name not in self.classes:
                raise DataError(
                    f"{source}: label {name!r} has no word in the template {self.name}"
                    f"{nearest(name, self.classes)}"
                )
        for number, word in enumerate(self.words):
            given = [name for name in names if self.classes[name] == number]
            known = [name for name, other in self.classes.items() if other == number]
            if len(given) > 1:
                raise DataError(
                    f"{source}: the labels {' and '.join(map(repr, given))} have the same word "
                    f"{word!r} in the template {self.name}; give each its own line and word"
                )
            if not given:
                raise DataError(
                    f"{source}: no example has the label {' or '.join(map(repr, known))}, for "
                    f"which the template {self.name} has the word {word!r}; add examples, or take "
                    "that line out of the template"
                )
        return [self.words[self.classes[name]] for name in names]

    def check_items(self, items: Sequence[Any], source: str) -> None:
        """Refuses pairs where the template takes one text, and the other way round.

        Raises:
            DataError: the first item does not fit.
        """
        if items and self.paired == isinstance(items[0], str):
            has, gives = ("{text_b}", "one text") if self.paired else ("no {text_b}", "pairs")
            raise DataError(
                f"{source}: the template {self.name} has {has}, but the items are {gives}; name "
                "the columns with --text and --text-b, or choose another template"
            )

    def demonstration(self, item: Any, label: str, reasoning: str = "") -> str:
        """An example with its answer; `item` is a text or a pair."""
        word = self.words[self.classes[label]]
        return _filled(self.example, item, label=word, reasoning=reasoning)

    def prompt(self, demonstrations: Sequence[str], item: Any, reasoning: str | None = None) -> str:
        """Everything before the label, or before the reasoning where none is given yet."""
        stop = "{reasoning}" if self.reasons and reasoning is None else "{label}"
        pattern = self.example.partition(stop)[0]
        query = _filled(pattern, item, reasoning=reasoning or "")
        return "\n\n".join([*filter(None, [self.instruction]), *demonstrations, query])


def _filled(pattern: str, item: Any, **values: str) -> str:
    text, text_b = (item, "") if isinstance(item, str) else item
    values |= {"text": text, "text_b": text_b}
    return PLACE.sub(lambda place: values[place[1]], pattern)  # a "{label}" in a text stays


def paths() -> dict[str, Path]:
    """The named templates: one text file each."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.txt"))}


def load(name: str | Path, cloze: bool = False) -> Template:
    """Reads a named template or a file.

    Args:
        name: of a template, or the path of a file.
        cloze: whether texts may stand behind the label.

    Raises:
        ConfigError: no such template, or a line that does not fit; it is named.
    """
    return parse(text_of(name), str(name), cloze)


def text_of(name: str | Path) -> str:
    """The text of a named template or a file.

    Raises:
        ConfigError: there is none, or it is no text.
    """
    path = paths().get(str(name), Path(name))
    try:
        return path.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, IsADirectoryError):
        hint = nearest(str(name), paths())
        raise ConfigError(f"no template and no file is called {str(name)!r}{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text ({error})") from error


def parse(text: str, name: str, cloze: bool = False) -> Template:
    """Reads a template's text.

    Args:
        text: what the file holds.
        name: stands in messages.
        cloze: whether texts may stand behind the label.

    Raises:
        ConfigError: a place, a section or a label that does not fit; its line is named.
    """
    lines = text.splitlines()
    sections = []
    for i, line in enumerate(lines):
        if found := SECTION.match(line):
            sections.append(i)
            if found[1].strip() != "labels":
                hint = nearest(found[1].strip(), ["labels"])
                raise ConfigError(f"{name}:{i + 1}: unknown section {line.strip()!r}{hint}")
    if len(sections) != 1:
        raise ConfigError(
            f"{name}: needs one line '--- labels' and below it lines 'label = word', "
            f"found {len(sections)}"
        )
    end = sections[0]
    places = [(i, place) for i in range(end) for place in PLACE.findall(lines[i])]
    start = _check_places(name, lines, places, cloze)
    words, classes = _labels(name, lines, end + 1)
    instruction = "\n".join(lines[: max(start, 0)]).strip()
    return Template(name, instruction, "\n".join(lines[start + 1 : end]).strip(), words, classes)


def _check_places(name: str, lines: list[str], places: list[tuple[int, str]], cloze: bool) -> int:
    """The number of the line `{examples}`, counted from 0; -1: there is none."""
    start, seen = -1, set[str]()
    for i, place in places:
        where = f"{name}:{i + 1}"
        if place not in PLACES:
            raise ConfigError(f"{where}: unknown place {{{place}}}{nearest(place, PLACES)}")
        if place in seen:
            raise ConfigError(f"{where}: {{{place}}} stands here a second time; once is enough")
        if place == "examples":
            if lines[i].strip() != "{examples}":
                raise ConfigError(f"{where}: {{examples}} needs a line of its own")
            if seen:
                raise ConfigError(
                    f"{where}: {{{sorted(seen)[0]}}} stands above {{examples}}, where the "
                    "instruction is; move it below"
                )
            start = i
        elif "label" in seen and not cloze:
            raise ConfigError(
                f"{where}: {{{place}}} stands behind {{label}}, and the model reads only what is "
                "before it; move it up"
            )
        seen.add(place)
    for place in ("text", "label"):
        if place not in seen:
            raise ConfigError(f"{name}: has no place {{{place}}}; write it where that belongs")
    return start


def _labels(name: str, lines: list[str], first: int) -> tuple[tuple[str, ...], dict[str, int]]:
    words: list[str] = []
    classes: dict[str, int] = {}
    for i in range(first, len(lines)):
        if not lines[i].strip():
            continue
        known, word = _names_and_word(lines[i])
        if not word or not all(known):
            raise ConfigError(
                f"{name}:{i + 1}: expected 'label = word' or 'label, label = word' (a label with "
                f"a comma or an equals sign in double quotes), got {lines[i]!r}"
            )
        for label in known:
            if label in classes:
                raise ConfigError(f"{name}:{i + 1}: label {label!r} has a word already")
            classes[label] = len(words)
        if word in words:
            raise ConfigError(
                f"{name}:{i + 1}: the word {word!r} stands for another class already; write both "
                "labels on one line, separated by a comma, or choose another word"
            )
        words.append(word)
    if len(words) < 2:
        raise ConfigError(
            f"{name}: '--- labels' names {len(words)} classes; at least two are needed"
        )
    return tuple(words), classes


def _names_and_word(line: str) -> tuple[list[str], str]:
    """What stands before the equals sign and behind it; no word: the line is of another form."""
    known, end = [], 0
    while found := LABEL.match(line, end):
        try:
            known.append(json.loads(found[1]) if found[1].startswith('"') else found[1])
        except ValueError:
            break
        end = found.end()
        if found[2] == "=":
            return known, line[end:].strip()
    return [], ""


def _written(label: str) -> str:
    """A label as `_names_and_word` reads it."""
    plain = _names_and_word(f"{label} = word") == ([label], "word")
    return label if plain and label.splitlines() == [label] else json.dumps(label)


def with_words(text: str, words: dict[str, str]) -> str:
    """A template's text with other verbalizers.

    >>> print(with_words("{text} {label}\\n--- labels\\n0 = a\\n1 = b", {"0": "bad", "1": "good"}))
    {text} {label}
    --- labels
    0 = bad
    1 = good
    """
    lines = text.splitlines()
    end = next(i for i, line in enumerate(lines) if SECTION.match(line))
    written = [f"{_written(label)} = {word}" for label, word in words.items()]
    return "\n".join([*lines[: end + 1], *written])
