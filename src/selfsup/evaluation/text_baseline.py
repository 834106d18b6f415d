"""Classical baselines for tasks that write: a translation memory, the lead, the source itself.

A translation memory gives the target of the training source that is nearest by TF-IDF of character
n-grams. The lead is the first words of the source, as many as a training target usually has: hard
to beat for news (Nallapati et al. 2017, arXiv 1611.04230). The source as it is says how much of a
task is copying. Nothing is random.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from selfsup.data.labels import Labelled
from selfsup.data.tokenizer import CJK

WORD = re.compile(rf"[{CJK}]|[^\s{CJK}]+")
MAX_FEATURES = 200_000
ROWS = 256  # sources that are compared with all others at once

Predict = Callable[[list[Any]], list[Any]]


def candidates(train: Labelled) -> Iterator[tuple[str, Predict]]:
    """Names and predictors: the source, its first words, and the nearest training source."""
    yield "the source as it is", list
    targets = [one if isinstance(one, str) else one[0] for one in train.labels]
    usual = max(1, round(float(np.median([len(WORD.findall(text)) for text in targets]))))
    yield f"the first {usual} words", lambda items: [lead(text, usual) for text in items]
    yield "translation memory", _memory(train.items, targets)


def lead(text: str, num_words: int) -> str:
    """The beginning of a text; each Chinese or Japanese character is a word.

    >>> lead("It rained. We stayed.", 2), lead("他来了。", 2)
    ('It rained.', '他来')
    """
    words = list(WORD.finditer(text))[:num_words]
    return text[: words[-1].end()] if words else text


def _memory(sources: list[str], targets: list[str]) -> Predict:
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(
        analyzer="char_wb", ngram_range=(1, 4), sublinear_tf=True, max_features=MAX_FEATURES
    )
    known = vectorizer.fit_transform(sources).T.tocsr()  # (features, sources)

    def predict(items: list[Any]) -> list[Any]:
        out = []
        for first in range(0, len(items), ROWS):
            likeness = vectorizer.transform(items[first : first + ROWS]) @ known
            out += [targets[i] for i in likeness.toarray().argmax(1)]
        return out

    return predict
