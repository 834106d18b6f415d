"""How well an answer's text matches people's: exact match and F1 of words, as SQuAD defines them.

Texts are compared as the SQuAD script does (Rajpurkar et al. 2016, arXiv 1606.05250): in lower
case, without ASCII punctuation, without the articles a, an, the. A text with a Chinese or Japanese
character is compared as the MLQA script compares Chinese (Lewis et al. 2020, arXiv 1910.07475): no
punctuation of any script, articles stay, each such character is a word of its own, and so spaces
between them do not count. CMRC 2018 counts the longest common substring in place of common words,
which is never more. Every question counts with the right answer that is nearest, and all equally.
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from selfsup.data.tokenizer import CJK

ARTICLES = re.compile(r"\b(a|an|the)\b")
WORDS = re.compile(rf"[{CJK}]|[^\s{CJK}]+")
ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)

RightAnswers = Sequence[str | tuple[str, int]]
"""People's answers to a question, as texts or with their place; none where there is no answer."""


def answer_words(text: str) -> list[str]:
    """The words that two answers are compared by.

    >>> answer_words("The Denver Broncos!"), answer_words("《三国》 2 代")
    (['denver', 'broncos'], ['三', '国', '2', '代'])
    """
    text = text.lower().translate(ASCII_PUNCTUATION)
    if not re.search(f"[{CJK}]", text):
        return ARTICLES.sub(" ", text).split()
    kept = (sign for sign in text if not unicodedata.category(sign).startswith("P"))
    return WORDS.findall("".join(kept))


def exact_match(truth: Sequence[RightAnswers], prediction: Sequence[str]) -> float:
    """Share of questions whose answer has the words of a right one, in its order.

    Args:
        truth: the right answers of each question; an empty list where there is none, for which
            the empty text is right.
        prediction: one text for each question.

    >>> exact_match([["Denver Broncos", "Broncos"], []], ["the broncos", "Denver"])
    0.5
    """
    return _mean(truth, prediction, lambda right, given: float(right == given))


def answer_f1(truth: Sequence[RightAnswers], prediction: Sequence[str]) -> float:
    """Mean over questions of the F1 of words that an answer shares with the nearest right one.

    Args:
        truth, prediction: as for `exact_match`; an empty text scores 1 or 0.

    >>> answer_f1([["Denver Broncos"]], ["the Broncos of Denver"])
    0.8
    """
    return _mean(truth, prediction, _f1)


def _f1(right: list[str], given: list[str]) -> float:
    if not right or not given:
        return float(right == given)
    common = sum((Counter(right) & Counter(given)).values())
    return 2 * common / (len(right) + len(given))


def _mean(
    truth: Sequence[RightAnswers],
    prediction: Sequence[Any],
    score: Callable[[list[str], list[str]], float],
) -> float:
    if len(truth) == 0 or len(truth) != len(prediction):
        raise ValueError(f"{len(truth)} questions and {len(prediction)} answers do not pair up")
    total = 0.0
    for answers, text in zip(truth, prediction, strict=True):
        given = answer_words(text)
        texts = [answer if isinstance(answer, str) else answer[0] for answer in answers]
        # v2.0: a right answer without any word counts only where there is no other
        rights = [words for words in map(answer_words, texts) if words] or [[]]
        total += max(score(right, given) for right in rights)
    return total / len(truth)
