"""Labelled data: examples with labels, split and sampled; each kind of data reads its own files.

Every kind of data has a function `read_labels` that gives a `Labelled` (`labelled_text.py`,
`image.py`, ...), and its preprocessor turns that into a
`dataset.LabelledDataset`.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from selfsup import console
from selfsup.errors import ConfigError, DataError, nearest
from selfsup.randomness import derive, numpy_generator


class Part(NamedTuple):
    """Where an example of a mixture comes from.

    Attributes:
        name: of its task in the mixture.
        choices: the texts of which its target is one.
        question: what its source ends with, which stays where a long source is cut.
    """

    name: str
    choices: tuple[str, ...]
    question: str = ""


@dataclass(frozen=True)
class Labelled:
    """Labelled examples in the order of their file.

    >>> films = Labelled("classification", ["good", "bad"], ["1", "0"], ("0", "1"), "films.csv")
    >>> films.take([1]).items
    ['bad']

    Attributes:
        task: classification, regression, tagging, span_qa, generation or cloze.
        items: what the kind of data reads: texts, (text, text) pairs, for tagging lists of words,
            paths of pictures or sounds, table rows, windows.
        labels: class names, or for regression finite floats, or for tagging lists of tag names, or
            for span_qa lists of `span_files.Answer`.
        names: every class or tag of the training data, in the order of their numbers; empty for
            regression.
        source: the file, for messages.
        groups: for each example a name that must not be on both sides of a split (a speaker, say);
            empty where there is none.
        parts: of a mixture of tasks (`data.mixtures`) where each example comes from; else empty.
    """

    task: str
    items: list[Any]
    labels: list[Any]
    names: tuple[str, ...]
    source: str
    groups: tuple[str, ...] = ()
    parts: tuple[Part, ...] = ()

    def __len__(self) -> int:
        return len(self.items)

    def take(self, numbers: Iterable[int]) -> "Labelled":
        """The examples of those numbers, in that order; `names` stays whole."""
        numbers = list(numbers)
        items, labels = [self.items[i] for i in numbers], [self.labels[i] for i in numbers]
        groups = tuple(self.groups[i] for i in numbers) if self.groups else ()
        parts = tuple(self.parts[i] for i in numbers) if self.parts else ()
        return replace(self, items=items, labels=labels, groups=groups, parts=parts)

    def facts(self) -> dict[str, Any]:
        """For `run.toml`: how many there are, and a hash that says whether others are the same."""
        digest = hashlib.blake2b(digest_size=16)
        for item, label in zip(self.items, self.labels, strict=True):
            digest.update(f"{content_key(item)} {content_key(label)}\n".encode())
        return {"labelled_examples": len(self), "fingerprint": digest.hexdigest()}


@dataclass(frozen=True, kw_only=True)
class Labels:
    """The labelled data of a comparison or a probe.

    Attributes:
        train: the pool that labelled subsets are drawn from.
        valid: chooses learning rates, and the baseline's settings.
        test: scored once per trained model.
    """

    train: Labelled
    valid: Labelled
    test: Labelled


def split(labelled: Labelled, fractions: Sequence[float], seed: int) -> tuple[Labelled, ...]:
    """Parts of the given sizes; equal items, and the items of one group, are always in one part.

    Examples are ordered by a hash of (seed, content), so their order in the file does not matter.

    Args:
        labelled: the examples.
        fractions: positive shares that add up to 1.
        seed: another seed gives another split.

    Raises:
        ConfigError: the fractions are not shares of one whole.
        DataError: too few different examples: a part would be empty.
    """
    if min(fractions) <= 0 or not math.isclose(sum(fractions), 1, abs_tol=1e-6):
        raise ConfigError(f"fractions must be positive and add up to 1, got {list(fractions)}")
    contents = labelled.groups or [content_key(item) for item in labelled.items]
    keys = [derive(seed, f"split {content}") for content in contents]
    ends = np.cumsum(fractions)[:-1] * len(labelled)
    part_of: dict[int, int] = {}
    for place, key in enumerate(sorted(keys)):
        part_of.setdefault(key, int(np.searchsorted(ends, place + 0.5)))
    parts: list[list[int]] = [[] for _ in fractions]
    for number, key in enumerate(keys):
        parts[part_of[key]].append(number)
    if not all(parts):
        raise DataError(
            f"{labelled.source}: {len(part_of)} different examples cannot be split by "
            f"{list(fractions)} without an empty part; add examples or use fewer parts"
        )
    return tuple(labelled.take(part) for part in parts)


# What every `read_labels` checks


def check_known(label: str, names: Sequence[str], where: str, about: str = "") -> None:
    """Refuses a label of validation or test data that the training data do not have.

    Args:
        label: a class or tag.
        names: those of the training data.
        where: the label's place, for the message.
        about: what it is the label of, where the place does not say it.

    Raises:
        DataError: it is not among the names.
    """
    if label not in names:
        raise DataError(
            f"{where}: label {label!r}{about} is not among the training labels"
            f"{nearest(label, names)}"
        )


def with_known_first(labelled: Labelled, names: Sequence[str]) -> Labelled:
    """Tagged words with `names` as the first numbers, and after them the tags that are not known.

    Another language may have tags that training has not seen: no answer can be right there, so they
    count as wrong, and a warning names them.

    >>> toy = Labelled("tagging", [["ha"]], [["INTJ"]], ("INTJ",), "toy")
    >>> with_known_first(toy, ("INTJ", "NOUN")).names
    ('INTJ', 'NOUN')

    Raises:
        DataError: no tag is known: it is another set of tags.
    """
    every = [tag for tags in labelled.labels for tag in tags]
    unknown = tuple(name for name in labelled.names if name not in names)
    missed = sum(tag in unknown for tag in every)
    if missed == len(every):
        raise DataError(
            f"{labelled.source}: none of its tags ({', '.join(labelled.names[:5])}, ...) is among "
            f"those of training ({', '.join(names[:5])}, ...); choose the column of the tags"
        )
    if missed:
        console.warn(
            f"{labelled.source}: {missed:,} of {len(every):,} words have a tag that training has "
            f"not seen, and count as wrong: {', '.join(unknown)}"
        )
    return replace(labelled, names=(*names, *unknown))


def finite_number(text: str, where: str, what: str = "the label") -> float:
    """A label of regression.

    >>> finite_number("0.5", "films.csv:2")
    0.5

    Raises:
        DataError: it is no number, or NaN or infinite.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"{where}: {what} must be a finite number, got {text!r}")
    return value


def names_of(labels: Iterable[Any], task: str, source: str) -> tuple[str, ...]:
    """`Labelled.names` of training data: its classes or tags in their order; () for regression.

    Raises:
        DataError: all labels are equal, so there is nothing to learn.
    """
    found = set(labels)
    if len(found) < 2:
        raise DataError(
            f"{source}: every label is {found.pop()!r}; {task} needs at least two different ones"
        )
    return () if task == "regression" else tuple(sorted(found, key=class_order))


def label_numbers(labelled: Labelled) -> np.ndarray:
    """The labels as class numbers (int64) or, for regression, as they are (float64)."""
    if labelled.task == "regression":
        return np.array(labelled.labels, dtype=np.float64)
    numbers = {name: number for number, name in enumerate(labelled.names)}
    return np.array([numbers[name] for name in labelled.labels], dtype=np.int64)


def class_order(name: str) -> tuple[float, str]:
    """A sorting key for class names: "2" before "10" where classes are numbers.

    >>> sorted(["10", "cat", "2"], key=class_order)
    ['2', '10', 'cat']
    """
    return (int(name) if name.isdecimal() else math.inf, name)


def content_key(item: Any) -> str:
    """A string that is equal for equal items: texts, lists, rows, paths, encoded or decoded files.

    >>> content_key(["the", "cat"]), content_key(b"abc") == content_key(b"abc")
    ('["the", "cat"]', True)
    """
    if isinstance(item, np.ndarray):
        item = item.tobytes()
    if isinstance(item, bytes):
        return hashlib.blake2b(item, digest_size=16).hexdigest()
    return json.dumps(item, default=str)


def subset(labelled: Labelled, count: int, seed: int) -> Labelled:
    """A sample of `count` examples; a larger sample of the same seed contains a smaller one.

    For classification the classes keep their shares, and each class has at least one example as
    soon as `count` allows; the most frequent classes come first.

    >>> toy = Labelled("classification", list("abcdef"), list("001001"), ("0", "1"), "toy")
    >>> sorted(subset(toy, 3, seed=0).labels)
    ['0', '0', '1']

    Raises:
        DataError: `count` is below one, or there are fewer examples.
    """
    if not 0 < count <= len(labelled):
        raise DataError(
            f"{labelled.source}: asked for a sample of {count} out of {len(labelled)} examples"
        )
    order = numpy_generator(seed, "subset").permutation(len(labelled)).tolist()
    if labelled.task in ("classification", "cloze"):
        sizes = Counter(labelled.labels)
        ranks = {name: i for i, (name, _) in enumerate(sizes.most_common())}
        taken: Counter[str] = Counter()
        keys = {}
        for number in order:
            name = labelled.labels[number]
            # Each class evenly spaced over (0, 1), its first example before all others.
            place = (taken[name] + 0.5) / sizes[name] if taken[name] else 0.0
            keys[number] = (place, ranks[name])
            taken[name] += 1
        order.sort(key=keys.__getitem__)
    return labelled.take(sorted(order[:count]))
