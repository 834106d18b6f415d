"""A classical baseline for questions about a document: the window most like the question.

The sliding window of Richardson et al. (2013, MCTest) as it stands beside SQuAD (Rajpurkar et al.
2016, arXiv 1606.05250, section 5.1): a sentence is chosen by the weight of the words that it shares
with the question, each weighing log(1 + 1 / its count in the document), and in it the span of few
words that is nearest to them and holds none: a word counts by its weight over its distance from the
span, and against the span where it is inside. Only the length of a span is
learned, from the training answers; there is no randomness.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from selfsup.data.labels import Labelled
from selfsup.data.span_files import NO_ANSWER
from selfsup.data.tokenizer import CJK

WORD = re.compile(rf"[{CJK}]|[^\W{CJK}]+")
SENTENCE_END = re.compile(r"[.!?]\s+|[。！？!?；\n]+")
QUANTILES = (0.5, 0.75)  # of the lengths of the training answers

Predict = Callable[[list[Any]], list[Any]]


def candidates(train: Labelled) -> Iterator[tuple[str, Predict]]:
    """Names and predictors: spans of one length or another, and, where it occurs, no answer."""
    if NO_ANSWER in train.names:
        yield "never an answer", lambda items: [""] * len(items)
    lengths = [len(WORD.findall(answer.text)) for golds in train.labels for answer in golds[:1]]
    for length in sorted({max(1, round(np.quantile(lengths or [1], q))) for q in QUANTILES}):
        yield f"sliding window, {length} words", _predictor(length)


def _predictor(length: int) -> Predict:
    return lambda items: [answer_by_overlap(a, b, length) for a, b in items]


def answer_by_overlap(question: str, context: str, length: int) -> str:
    """The span of `length` words, in one sentence, whose surroundings share most with the question.

    >>> answer_by_overlap("Where did Ann sleep?", "Bob ran. Ann did sleep in Rome. It rained.", 1)
    'in'
    """
    words = list(WORD.finditer(context))
    if not words:
        return context.strip()
    plain = [word[0].lower() for word in words]
    counts = Counter(plain)
    asked = {word.lower() for word in WORD.findall(question)}
    weight = np.array([math.log1p(1 / counts[word]) if word in asked else 0.0 for word in plain])
    best, found = (-math.inf, -math.inf), (0, 0)
    for first, end in _sentences(context, [word.start() for word in words]):
        of_sentence = sum({plain[i]: weight[i] for i in range(first, end)}.values())
        start = np.arange(first, max(first, end - length) + 1)
        stop = np.minimum(start + length, end)
        word = np.arange(first, end)
        away = np.maximum(start[:, None] - word, word - stop[:, None] + 1)  # (span, word)
        score = np.where(away > 0, 1 / np.maximum(away, 1), -1.0) @ weight[first:end]
        place = int(score.argmax())
        if (of_sentence, score[place]) > best:
            best, found = (of_sentence, score[place]), (start[place], stop[place])
    return context[words[found[0]].start() : words[found[1] - 1].end()]


def _sentences(context: str, starts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first, end) numbers of the words of each sentence."""
    cuts = [match.end() for match in SENTENCE_END.finditer(context)]
    ends = [*np.searchsorted(starts, cuts).tolist(), len(starts)]
    for first, end in zip([0, *ends], ends, strict=False):
        if end > first:
            yield first, end
