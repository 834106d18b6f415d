"""Questions that a span of a document answers, as batches of windows; span_files.py reads them.

A document that is longer than a row is read in overlapping windows (Devlin et al. 2018, arXiv
1810.04805, section 4.2, and its SQuAD script), each a row of its own:

    [CLS] question [SEP] the first tokens of the document [SEP]
    [CLS] question [SEP] tokens from `stride` on [SEP]

A row that does not hold the whole answer, and every row of a question without one, has [CLS] for
its answer. Of all windows the likeliest span is the answer to the question; that a token has more
context in one window than in another is not weighed, as it is in that script.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, final

import numpy as np
import torch

from selfsup.batch import Batch
from selfsup.data.dataset import LabelledDataset, pad_mask, pad_rows
from selfsup.data.labels import Labelled
from selfsup.data.span_files import NO_ANSWER
from selfsup.data.tokenizer import Tokenizer
from selfsup.errors import ConfigError

MAX_QUESTION, STRIDE = 64, 128  # tokens, as in BERT's script
IGNORED = -100
"""The label of a row whose answer is not known."""


class Window(NamedTuple):
    """Tokens `first` to `end` (exclusive) of a question's document."""

    question: int
    first: int
    end: int


@final
class LabelledSpans(LabelledDataset):
    """Questions with their documents as batches of windows.

    Batches hold `tokens`, `mask`, `segments` (1 from the document on), `index` and `label`:
    (batch, 2) int64, the first and the last token of the answer in the row, (0, 0) where the window
    does not hold it, (-100, -100) where no answer is known to have a place. Of several right
    answers the first that has a place is learned.

    Args:
        labelled: (question, document) pairs, each with its right answers, or None where they are
            not known; `names` holds `NO_ANSWER` where a question may have no answer.
        tokenizer: turns texts into ids.
        max_length: longest row in tokens, special ones included. A question takes 64 tokens, or
            half of the row, at most; the rest of it is cut off.
        stride: tokens from one window to the next; None: 128, or a third of a shorter row.

    Attributes:
        windows: one for each row, in the order of the questions.
        offsets: for each question (tokens, 2) first and end character of each document token.
        truncated: how many questions were cut.

    Raises:
        ConfigError: the tokenizer has no [CLS], or the rows or the stride are too short or long.
    """

    fields = ("tokens", "mask", "segments", "label", "index")

    def __init__(
        self,
        labelled: Labelled,
        tokenizer: Tokenizer,
        max_length: int,
        stride: int | None = None,
    ):
        if tokenizer.style != "bert":
            raise ConfigError(
                "span_qa needs a tokenizer with a [CLS] token, which stands for no answer; "
                'pre-train with data.tokenizer.style = "bert"'
            )
        if max_length < 8:
            raise ConfigError(f"span_qa needs rows of at least 8 tokens, got {max_length}")
        nothing = np.empty(0, dtype=np.int32)
        special, segments = tokenizer.row(nothing, nothing)  # [CLS] [SEP] [SEP], and RoBERTa's more
        self.before = int((segments == 0).sum())  # of them stand before the document
        room = max_length - len(special)
        question_room = min(MAX_QUESTION, room // 2)
        stride = min(STRIDE, max_length // 3) if stride is None else stride
        if not 0 < stride <= room - question_room:
            raise ConfigError(
                f"the stride must be from 1 to {room - question_room} tokens for rows of "
                f"{max_length}, or tokens would fall between two windows; got {stride}"
            )
        self.task, self.labels, self.labelled = labelled.task, np.empty(0), labelled
        self.tokenizer = tokenizer
        questions, documents = zip(*labelled.items, strict=True)
        encoded = tokenizer.encode(list(questions), parse_special=False)
        self.truncated = sum(len(ids) > question_room for ids in encoded)
        self.questions = [ids[:question_room] for ids in encoded]
        distinct = list(dict.fromkeys(documents))  # a document has many questions
        of_text = dict(zip(distinct, tokenizer.encode_with_offsets(distinct), strict=True))
        self.documents = [of_text[text][0] for text in documents]
        self.offsets = [of_text[text][1] for text in documents]
        self.windows = [
            Window(number, first, min(first + room - len(question), len(document)))
            for number, (question, document) in enumerate(
                zip(self.questions, self.documents, strict=True)
            )
            for first in _starts(len(document), room - len(question), stride)
        ]
        self.answers = [self._answer_tokens(number) for number in range(len(labelled))]
        self.lengths = np.array(
            [len(self.questions[w.question]) + w.end - w.first + len(special) for w in self.windows]
        )

    def _answer_tokens(self, number: int) -> tuple[int, int] | None:
        """First and last token, in the document, of the answer to learn; None: not known.

        (-1, -1) where there is no answer.
        """
        answers = self.labelled.labels[number]
        if answers == []:
            return (-1, -1)
        placed = [answer for answer in answers or [] if answer.start >= 0]
        if not placed:
            return None
        text, start = placed[0]
        offsets = self.offsets[number]
        inside = (offsets[:, 1] > start) & (offsets[:, 0] < start + len(text))
        found = np.flatnonzero(inside & (offsets[:, 1] > offsets[:, 0]))
        return (int(found[0]), int(found[-1])) if len(found) else None

    def _label(self, window: Window) -> tuple[int, int]:
        answer = self.answers[window.question]
        if answer is None:
            return (IGNORED, IGNORED)
        first, last = answer
        if not window.first <= first <= last < window.end:
            return (0, 0)
        shift = self._document_place(window) - window.first
        return (first + shift, last + shift)

    def _document_place(self, window: Window) -> int:
        """Where the document begins in the row, after [CLS] question [SEP]."""
        return len(self.questions[window.question]) + self.before

    def __len__(self) -> int:
        return len(self.windows)

    def batch(self, numbers: np.ndarray) -> Batch:
        """The windows of those numbers as CPU tensors."""
        windows = [self.windows[i] for i in numbers]
        rows = [
            self.tokenizer.row(
                self.questions[w.question], self.documents[w.question][w.first : w.end]
            )
            for w in windows
        ]
        tokens, segments = [list(side) for side in zip(*rows, strict=True)]
        return {
            "tokens": pad_rows(tokens, self.tokenizer.vocabulary.pad),
            "segments": pad_rows(segments, 0),
            **pad_mask(tokens),
            "label": torch.tensor([self._label(w) for w in windows]),
            "index": torch.from_numpy(np.asarray(numbers, dtype=np.int64)),
        }

    def collect(
        self, values: Sequence[np.ndarray], scores: Sequence[np.ndarray]
    ) -> tuple[list[Any], list[Any]]:
        """Right answers and one text for each question: its likeliest span over all windows.

        Where a question may have no answer, the text is "" if the windows' lowest score for [CLS]
        is above that of the likeliest span (BERT, section 4.3).

        Args:
            values: first and last token of each row's best span, as in `label`.
            scores: the score of that span, and that of [CLS].
        """
        best: list[tuple[float, str]] = [(-np.inf, "")] * len(self.labelled)
        nothing = np.full(len(self.labelled), np.inf)
        for window, value, (of_span, of_nothing) in zip(self.windows, values, scores, strict=True):
            number = window.question
            nothing[number] = min(nothing[number], of_nothing)
            if of_span > best[number][0]:
                best[number] = (float(of_span), self._text(window, value))
        refuses = NO_ANSWER in self.labelled.names
        guess = [
            "" if refuses and least > score else text
            for least, (score, text) in zip(nothing, best, strict=True)
        ]
        return self.labelled.labels, guess

    def _text(self, window: Window, value: np.ndarray) -> str:
        shift = window.first - self._document_place(window)
        offsets = self.offsets[window.question]
        first, last = offsets[int(value[0]) + shift][0], offsets[int(value[1]) + shift][1]
        return self.labelled.items[window.question][1][first:last]


def _starts(length: int, room: int, stride: int) -> range:
    """Where windows of `room` tokens begin; the last one reaches the end, and no other does.

    >>> list(_starts(10, 6, 3)), list(_starts(6, 6, 3))
    ([0, 3, 6], [0])
    """
    return range(0, max(length - room, 0) + stride, stride)
