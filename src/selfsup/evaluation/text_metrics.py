"""How close written texts are to people's: BLEU, chrF and ROUGE.

BLEU (Papineni et al., 2002) and chrF (Popović, 2015) are those of `sacrebleu` (Post 2018, arXiv
1804.08771). ROUGE (Lin, 2004) is the mean F1 over texts as the package `rouge-score` has it,
without stemming: of shared words, of shared pairs of words, or of the longest common subsequence.

Every function takes the right texts (each a string, or a list of strings that are all right) and
as many written ones, and gives 1 where all is right: what papers print, divided by 100.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from selfsup.data.tokenizer import CJK

References = Sequence[str | list[str]]

WORD = re.compile(rf"[{CJK}]|[^\W_{CJK}]+")
EAST_ASIAN, KANA = re.compile(f"[{CJK}]"), re.compile("[\u3040-\u30ff]")
SPACED = 0.05  # share of white space above which a text is written with spaces between words


def _lists(truth: References, written: Sequence[str]) -> list[list[str]]:
    if len(truth) == 0 or len(truth) != len(written):
        raise ValueError(f"{len(truth)} right texts and {len(written)} written do not pair up")
    return [[right] if isinstance(right, str) else list(right) for right in truth]


def bleu_words(texts: Sequence[str]) -> str:
    """What BLEU's words are, by the name that sacrebleu has for it.

    "zh" for Chinese (a character is a word), "char" for Japanese written without spaces, else
    "13a", which the campaigns of machine translation use.

    >>> bleu_words(["他来了。"]), bleu_words(["he came"])
    ('zh', '13a')
    """
    whole = "".join(texts)
    east_asian = len(EAST_ASIAN.findall(whole))
    if 2 * east_asian <= len(whole) or sum(map(str.isspace, whole)) > SPACED * len(whole):
        return "13a"
    return "char" if 10 * len(KANA.findall(whole)) > east_asian else "zh"


def bleu(truth: References, written: Sequence[str]) -> float:
    """BLEU of all texts together, up to four words, divided by 100."""
    from sacrebleu import corpus_bleu

    references = _lists(truth, written)
    words = bleu_words([text for right in references for text in right])
    return corpus_bleu(list(written), _streams(references), tokenize=words).score / 100


def chrf(truth: References, written: Sequence[str]) -> float:
    """chrF2: F of shared runs of up to six characters, recall counting twice, divided by 100."""
    from sacrebleu import corpus_chrf

    return corpus_chrf(list(written), _streams(_lists(truth, written))).score / 100


def _streams(references: list[list[str]]) -> list[Any]:
    """First, second, ... right text of all, as sacrebleu wants them; None where there is none."""
    most = max(map(len, references))
    return [[right[i] if i < len(right) else None for right in references] for i in range(most)]


def words_of(text: str) -> list[str]:
    """Words in lower case without punctuation; each Chinese or Japanese character is a word.

    >>> words_of("It's 漢字!")
    ['it', 's', '漢', '字']
    """
    return WORD.findall(text.lower())


def rouge_1(truth: References, written: Sequence[str]) -> float:
    """Mean F1 of the words that a text shares with a right one: the nearest, if there are more."""
    return _mean_f1(truth, written, lambda a, b: _shared(a, b, 1))


def rouge_2(truth: References, written: Sequence[str]) -> float:
    """As `rouge_1`, of pairs of neighbouring words."""
    return _mean_f1(truth, written, lambda a, b: _shared(a, b, 2))


def rouge_l(truth: References, written: Sequence[str]) -> float:
    """As `rouge_1`, of the longest common subsequence of words."""

    def shared(a: list[str], b: list[str]) -> tuple[int, int, int]:
        return longest_common(a, b), len(a), len(b)

    return _mean_f1(truth, written, shared)


def _mean_f1(
    truth: References,
    written: Sequence[str],
    shared: Callable[[list[str], list[str]], tuple[int, int, int]],
) -> float:
    """`shared` gives how much two texts have in common, and how much each of them has."""
    scores = []
    for right, text in zip(_lists(truth, written), written, strict=True):
        given = words_of(text)
        counts = [shared(words_of(one), given) for one in right]
        scores.append(max(2 * both / (a + b) if both else 0.0 for both, a, b in counts))
    return sum(scores) / len(scores)


def _shared(a: list[str], b: list[str], num_words: int) -> tuple[int, int, int]:
    of_a, of_b = (
        Counter(zip(*(words[i:] for i in range(num_words)), strict=False)) for words in (a, b)
    )
    return (of_a & of_b).total(), of_a.total(), of_b.total()


def longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, by bits (Hyyrö 2004).

    >>> longest_common("nematode", "empty")
    3
    """
    places: dict[str, int] = {}
    for place, item in enumerate(a):
        places[item] = places.get(item, 0) | 1 << place
    every = (1 << len(a)) - 1
    unmatched = every
    for item in b:
        hit = unmatched & places.get(item, 0)
        unmatched = ((unmatched + hit) | (unmatched - hit)) & every
    return len(a) - unmatched.bit_count()
