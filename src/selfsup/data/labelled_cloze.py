"""Labelled texts inside a template, with a blank where the label's word belongs.

    [CLS] a gorgeous , witty film . it was [MASK] . [SEP]

With demonstrations (Gao, Fisch and Chen, 2020, arXiv 2012.15723, section 6) labelled examples
follow, one of each class, each with its word:

    [CLS] a gorgeous , witty film . it was [MASK] . [SEP] a mess . it was bad . [SEP] ... [SEP]

The blank has as many [MASK]s as the longest verbalizer has tokens. Template and texts are tokenised
piece by piece, so no token reaches across a border; a row that is too long loses tokens of its
texts alone, the longest first.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, final

import numpy as np
import torch
from jaxtyping import Int

from selfsup.batch import Batch
from selfsup.data import labelled_text
from selfsup.data.dataset import LabelledDataset, pad_mask, pad_rows
from selfsup.data.labels import Labelled, content_key, label_numbers
from selfsup.data.templates import PLACE, Template, parse
from selfsup.data.tokenizer import Tokenizer
from selfsup.errors import ConfigError
from selfsup.randomness import numpy_generator

TASK = "cloze"
NO_TOKEN = -1
SeveralTokens = Literal["sum", "mean", "refuse"]


def read(path: str | Path, task: str = TASK, **columns: Any) -> Labelled:
    """Reads texts or pairs with a class each, as `labelled_text.read` does.

    Raises:
        DataError: the file cannot be read, or a line is not text and label.
    """
    return replace(labelled_text.read(path, "classification", **columns), task=task)


class Piece(NamedTuple):
    """A part of a row: the template's own tokens, or those of a text, which may be cut."""

    ids: Int[np.ndarray, " length"]
    is_text: bool


class Pattern:
    """A template's pattern, tokenised: what stands around its places.

    White space before a place goes to what fills it, since tokenizers may tell "good" from " good".

    Args:
        text: of the pattern, with places.
        tokenizer: turns it into ids.

    Attributes:
        places: their names, in order.
        spaced: whether white space stands before each of them.
    """

    def __init__(self, text: str, tokenizer: Tokenizer):
        *around, tail = PLACE.split(text)
        before, self.places = around[::2], around[1::2]
        self.spaced = [part != part.rstrip() for part in before]
        literals = [part.rstrip() for part in before] + [tail]
        self.literals = tokenizer.encode(literals, parse_special=False)

    def lead(self, place: str) -> str:
        """The white space before a place."""
        return " " if self.spaced[self.places.index(place)] else ""

    def pieces(self, filled: dict[str, Int[np.ndarray, " length"]]) -> list[Piece]:
        """The pattern with ids at its places."""
        out = []
        for literal, place in zip(self.literals, self.places, strict=False):
            out += [Piece(literal, False), Piece(filled[place], place != "label")]
        return [*out, Piece(self.literals[-1], False)]


def shares(lengths: Sequence[int], room: int) -> list[int]:
    """How many tokens each text keeps so that all fit into `room`; the longest lose first.

    >>> shares([10, 3, 8], 15), shares([10, 3, 8], 30)
    ([6, 3, 6], [10, 3, 8])
    """
    if sum(lengths) <= room:
        return list(lengths)
    level = next(n for n in range(room, -1, -1) if sum(min(k, n) for k in lengths) <= room)
    kept = [min(length, level) for length in lengths]
    for number in [i for i, length in enumerate(lengths) if length > level][: room - sum(kept)]:
        kept[number] += 1
    return kept


def verbalizers(
    tokenizer: Tokenizer, words: Sequence[str], lead: str, several_tokens: SeveralTokens
) -> Int[np.ndarray, "classes slots"]:
    """The ids of each word, -1 where it has fewer than the longest.

    Args:
        tokenizer: of the model.
        words: one for each class.
        lead: what stands before the blank: "" or " ".
        several_tokens: "refuse": each word must be one token.

    Raises:
        ConfigError: the vocabulary lacks a word, a word has several tokens and may not, or two are
            the same.
    """
    unknown, seen = tokenizer.vocabulary.unk, dict[bytes, str]()
    rows = tokenizer.encode([lead + word for word in words], parse_special=False)
    for word, ids in zip(words, rows, strict=True):
        if not len(ids) or unknown in ids:
            raise ConfigError(
                f"this model's vocabulary has no pieces for the word {word!r}, only its unknown "
                "token; choose another word for the label"
            )
        if several_tokens == "refuse" and len(ids) > 1:
            pieces = " ".join(map(tokenizer.token, ids.tolist()))
            raise ConfigError(
                f"the word {word!r} is {len(ids)} tokens to this model: {pieces}; choose a word of "
                "one token, or allow several: task.several_tokens = 'sum' or 'mean'"
            )
        other = seen.setdefault(ids.tobytes(), word)
        if other is not word:
            raise ConfigError(
                f"{other!r} and {word!r} are the same tokens to this model: choose other words"
            )
    return pad_rows(rows, NO_TOKEN).numpy()


@final
class LabelledCloze(LabelledDataset):
    """Texts in a template as batches; everything is tokenised once, here.

    Batches hold `tokens`: (batch * draws, time) int64, the draws of one example one after another,
    each with a blank; `mask` where padded; `index` (batch,); `verbalizers`: (classes, slots) int64,
    -1 where a word has fewer tokens; and where labels are known `label` (batch,) int64.

    Args:
        labelled: texts or pairs with class names, or None where they are not known.
        tokenizer: of the model; it has a mask token.
        max_length: longest row in tokens, special ones included.
        template: the text of a template.
        several_tokens: see `verbalizers`.
        pool: examples to demonstrate with, each a JSON list of label and text or texts.
        draws: rows per example, each with other demonstrations; 0: one row without any.

    Attributes:
        truncated: how many examples have a row that lost tokens.

    Raises:
        ConfigError: no template, a word that does not do, or `max_length` leaves no room for text.
        DataError: labels or items do not fit the template.
    """

    def __init__(
        self,
        labelled: Labelled,
        tokenizer: Tokenizer,
        max_length: int,
        template: str = "",
        several_tokens: SeveralTokens = "sum",
        pool: Sequence[str] = (),
        draws: int = 0,
    ):
        if not template:
            raise ConfigError(
                "cloze needs a template: task.template = a name of `selfsup list templates`, or a "
                "text file"
            )
        parsed = parse(template, "task.template", cloze=True)
        parsed.check_items(labelled.items, labelled.source)
        self.task, self.tokenizer, self.max_length = labelled.task, tokenizer, max_length
        start = f"{parsed.instruction}\n" if parsed.instruction else ""
        self.query = Pattern(start + parsed.example, tokenizer)
        self.shown = Pattern(parsed.example, tokenizer)
        words = parsed.words_of(labelled.names, labelled.source)
        self.words = verbalizers(tokenizer, words, self.query.lead("label"), several_tokens)
        self.blank = np.full(self.words.shape[1], tokenizer.vocabulary.mask)
        known = len(labelled) > 0 and labelled.labels[0] is not None
        self.labels = label_numbers(labelled) if known else np.empty(0, dtype=np.int64)
        self.draws, self.truncated = max(1, draws), 0
        examples = self._examples(labelled, parsed, pool) if draws else {}
        self.rows: list[np.ndarray] = []
        texts = self._encoded(labelled.items, self.query)
        for item, filled in zip(labelled.items, texts, strict=True):
            rows = [self._row(filled, some) for some in self._drawn(item, examples, draws)]
            self.rows += [row for row, _ in rows]
            self.truncated += any(cut for _, cut in rows)
        self.fields = ("tokens", "mask", "index", "verbalizers", *["label"] * known)
        lengths = np.array([len(row) for row in self.rows]).reshape(-1, self.draws)
        self.lengths = lengths.max(1, initial=0)

    def _encoded(self, items: Sequence[Any], pattern: Pattern) -> list[dict[str, np.ndarray]]:
        """The ids of each item's texts by place."""
        places = [place for place in ("text", "text_b") if place in pattern.places]
        columns = []
        for number, place in enumerate(places):
            texts = [item if isinstance(item, str) else item[number] for item in items]
            texts = [pattern.lead(place) + text for text in texts]
            columns.append(self.tokenizer.encode(texts, parse_special=False))
        return [dict(zip(places, ids, strict=True)) for ids in zip(*columns, strict=True)]

    def _examples(
        self, labelled: Labelled, template: Template, pool: Sequence[str]
    ) -> dict[str, list[tuple[str, list[Piece]]]]:
        """By label: the contents and the pieces of what may be shown."""
        given = [json.loads(one) for one in pool]
        items = [texts[0] if len(texts) == 1 else tuple(texts) for _, *texts in given]
        out: dict[str, list[tuple[str, list[Piece]]]] = {name: [] for name in labelled.names}
        lead = self.shown.lead("label")
        words = [lead + word for word in template.words]
        answers = self.tokenizer.encode(words, parse_special=False)
        encoded = self._encoded(items, self.shown)
        for (label, *_), item, filled in zip(given, items, encoded, strict=True):
            answer = answers[template.classes[label]]
            pieces = self.shown.pieces({**filled, "label": answer})
            out[label].append((content_key(item), pieces))
        return out

    def _drawn(
        self, item: Any, examples: dict[str, list[tuple[str, list[Piece]]]], draws: int
    ) -> Iterator[list[Piece]]:
        """What follows an item in each of its rows; the item itself is never shown to it."""
        own = content_key(item)
        others = {
            label: [pieces for content, pieces in of_label if content != own]
            for label, of_label in examples.items()
        }
        sep = Piece(np.array([self.tokenizer.vocabulary.sep]), False)
        for draw in range(draws):
            generator = numpy_generator(draw, f"demonstrations {own}")
            chosen: list[Piece] = []
            for some in filter(None, others.values()):
                chosen += [sep, *some[generator.integers(len(some))]]
            yield chosen
        if not draws:
            yield []

    def _row(self, filled: dict[str, np.ndarray], shown: list[Piece]) -> tuple[np.ndarray, bool]:
        """One row, and whether a text lost tokens."""
        pieces = [*self.query.pieces({**filled, "label": self.blank}), *shown]
        lengths = [len(piece.ids) for piece in pieces if piece.is_text]
        nothing = np.empty(0, dtype=np.int32)
        fixed = sum(len(piece.ids) for piece in pieces) - sum(lengths)
        fixed += len(self.tokenizer.row(nothing)[0])
        room = self.max_length - fixed
        if room < len(lengths):
            raise ConfigError(
                f"the template{' and its demonstrations' * bool(shown)} take {fixed} tokens, and a "
                f"row has at most {self.max_length}: no room is left for text; raise --max-length "
                "or write less around it"
            )
        kept = iter(shares(lengths, room))
        ids = [piece.ids[: next(kept)] if piece.is_text else piece.ids for piece in pieces]
        return self.tokenizer.row(np.concatenate(ids))[0], sum(lengths) > room

    def __len__(self) -> int:
        return len(self.rows) // self.draws

    def batch(self, numbers: np.ndarray) -> Batch:
        """The examples of those numbers as CPU tensors."""
        rows = [self.rows[i * self.draws + draw] for i in numbers for draw in range(self.draws)]
        batch = {"tokens": pad_rows(rows, self.tokenizer.vocabulary.pad), **pad_mask(rows)}
        batch["index"] = torch.from_numpy(np.asarray(numbers, dtype=np.int64))
        batch["verbalizers"] = torch.from_numpy(self.words)
        if "label" in self.fields:
            batch["label"] = torch.from_numpy(self.labels[numbers])
        return batch
