"""The rules of C4 for lines and documents, and what each of them dropped.

Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer",
2019, arXiv 1910.10683, section 2.2; numbers and order are those of the code that made the corpus
(`c4_utils.py` in TensorFlow Datasets), which datatrove's `C4QualityFilter` repeats. As there, the
rules for whole pages look only at lines that no earlier rule dropped.

Deviations: line ends of other scripts count (。！？”」 and more), as do sentences that end with
them; a line is stripped again after its citation marks are removed; half the characters are the
words of scripts without spaces; bad words come from the user's file alone; a language needs the
probability of FineWeb (0.65, arXiv 2406.17557), because C4's 0.99 was for another detector: this
one shares the probability among close relatives (English and Nigerian Pidgin, Mandarin and Wu).
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from selfsup.data.ngrams import UNSPACED_CHARACTER, sentences
from selfsup.data.unpacking import decoded_text
from selfsup.errors import ConfigError, nearest

LINE_ENDS = tuple('.?!"。！？｡”」』؟۔।॥')
ELLIPSES = ("...", "…")
CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
POLICIES = (
    *("terms of use", "privacy policy", "cookie policy"),
    *("uses cookies", "use of cookies", "use cookies"),
)
SCRIPTS = (
    *("latin", "han", "hiragana", "katakana", "hangul", "cyrillic", "greek", "arabic"),
    *("hebrew", "devanagari", "bengali", "tamil", "telugu", "thai", "georgian", "armenian"),
)
NUM_EXAMPLES, EXAMPLE_CHARS = 3, 100
RULES = {
    "long_word": "lines with a word that is too long",
    "citations": "marks like [1], [edit], [citation needed]",
    "no_line_end": "lines without a terminal mark of punctuation, or with an ellipsis",
    "short_line": "lines with too few words",
    "lorem_ipsum": "documents with 'lorem ipsum'",
    "javascript": "lines with 'javascript'",
    "curly_bracket": "documents with '{'",
    "policy": "lines on terms of use, privacy and cookies",
    "bad_words": "documents with a word of the user's list",
    "empty": "documents without text, or of which no line is left",
    "few_sentences": "documents with too few sentences",
    "few_words": "documents with too few words",
    "many_words": "documents with too many words",
    "scripts": "documents with too few letters of the wanted scripts",
    "language": "documents in another language, or in none that is sure",
    "exact_duplicates": "documents equal to an earlier one",
    "near_duplicates": "documents nearly equal to an earlier one",
    "repeated_spans": "runs of sentences that an earlier document has",
    "white_space": "blank lines, and space at the ends of lines",
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """One key for each rule; the defaults are C4's, and FineWeb's for near duplicates."""

    line_ends: bool = True  # drop lines that do not end in terminal punctuation
    min_line_words: int = 5  # drop lines with fewer words
    max_word_chars: int = 1000  # drop lines with a longer word; 0: keep them
    javascript: bool = True  # drop lines that have the word
    policy: bool = True  # drop lines about terms of use, privacy, cookies
    citations: bool = True  # remove [1], [edit], [citation needed]
    lorem_ipsum: bool = True  # drop documents that have it
    curly_bracket: bool = True  # drop documents that have one: they hold code
    bad_words: str = ""  # a file, one word or phrase a line: drop documents that have one
    min_sentences: int = 3  # drop documents with fewer
    min_words: int = 0  # drop documents with fewer
    max_words: int = 0  # drop documents with more; 0: none
    scripts: tuple[str, ...] = ()  # wanted scripts: latin, han, ...; empty: all
    script_share: float = 0.5  # drop documents with a smaller share of letters of these scripts
    language: str = ""  # wanted language, ISO 639-1: en, zh, ...; needs selfsup[language]
    language_probability: float = 0.65  # drop documents that are less surely of this language
    exact_duplicates: bool = True  # drop documents equal to an earlier one
    near_duplicates: bool = True  # drop documents nearly equal to an earlier one
    shingle_words: int = 5  # words of a shingle
    bands: int = 14  # bands of a signature
    rows: int = 8  # hashes of a band
    span_sentences: int = 3  # remove all but the first of equal runs of so many sentences; 0: none

    def __post_init__(self) -> None:
        least = {"shingle_words": 1, "bands": 1, "rows": 1}
        for key, value in vars(self).items():
            if isinstance(value, int) and value < least.get(key, 0):
                raise ValueError(f"{key} must be at least {least.get(key, 0)}, got {value}")
        for key in ("script_share", "language_probability"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"{key} must be in 0..1, got {getattr(self, key)}")
        for script in self.scripts:
            if script not in SCRIPTS:
                raise ValueError(f"unknown script {script!r}{nearest(script, SCRIPTS)}")
        if self.max_words and self.max_words < self.min_words:
            raise ValueError("max_words is smaller than min_words")


@dataclass
class Dropped:
    """What one rule dropped."""

    documents: int = 0
    lines: int = 0
    characters: int = 0
    examples: list[str] = field(default_factory=list)


class Counts(dict[str, Dropped]):
    """What every rule dropped, by its name; each character is counted once."""

    def __init__(self) -> None:
        super().__init__((rule, Dropped()) for rule in RULES)

    def drop(
        self, rule: str, characters: int, example: str, *, documents: int = 0, lines: int = 0
    ) -> None:
        """Counts what a rule dropped; the first examples are kept, cut short."""
        found = self[rule]
        found.documents += documents
        found.lines += lines
        found.characters += characters
        if example and len(found.examples) < NUM_EXAMPLES:
            found.examples.append(" ".join(example[: 4 * EXAMPLE_CHARS].split())[:EXAMPLE_CHARS])


class Rules:
    """The rules that need no other document, as a configuration has them.

    >>> counts = Counts()
    >>> Rules(Config(min_sentences=1)).cleaned("Menu\\nThis line is kept as it is.[1]\\n", counts)
    'This line is kept as it is.'
    >>> counts["no_line_end"].lines, counts["citations"].characters
    (1, 3)
    """

    def __init__(self, config: Config):
        self.config = config
        self.bad_words = read_bad_words(Path(config.bad_words)) if config.bad_words else None
        self.detect = language_detector(config.language) if config.language else None

    def cleaned(self, text: str, counts: Counts) -> str:
        """The text that is left; "" where the document is dropped."""
        kept, taken = [], 0  # taken: characters that rules for lines took
        refused = ""
        for raw in text.splitlines(keepends=True):
            line = raw.strip()
            if not line:
                continue
            bare = CITATION.sub("", line).rstrip() if self.config.citations else line
            refused, whole = self._refusal(bare)
            if refused and whole:
                break
            if refused:
                counts.drop(refused, len(raw), line, lines=1)
                taken += len(raw)
                continue
            if bare != line:
                counts.drop("citations", len(line) - len(bare), line)
                taken += len(line) - len(bare)
            kept.append(bare)
        else:
            refused = self._document_refusal(kept)
        left = "\n".join(kept)
        if refused:
            counts.drop(refused, len(text) - taken, text, documents=1)
            return ""
        counts.drop("white_space", len(text) - taken - len(left), "")
        return left

    def _refusal(self, line: str) -> tuple[str, bool]:
        """The rule that drops a line, or "", and whether it drops the whole document."""
        config = self.config
        if config.max_word_chars and len(line) > config.max_word_chars:
            longest = max(map(len, UNSPACED_CHARACTER.sub(" ", line).split()), default=0)
            if longest > config.max_word_chars:
                return "long_word", False
        if config.line_ends and (not line.endswith(LINE_ENDS) or line.endswith(ELLIPSES)):
            return "no_line_end", False
        if num_words(line) < config.min_line_words:
            return "short_line", False
        lower = line.lower()
        if config.lorem_ipsum and "lorem ipsum" in lower:
            return "lorem_ipsum", True
        if config.javascript and "javascript" in lower:
            return "javascript", False
        if config.curly_bracket and "{" in line:
            return "curly_bracket", True
        if config.policy and any(policy in lower for policy in POLICIES):
            return "policy", False
        if self.bad_words and self.bad_words.search(lower):
            return "bad_words", True
        return "", False

    def _document_refusal(self, lines: list[str]) -> str:
        """The rule that drops a document of these lines, or ""."""
        config = self.config
        if not lines:
            return "empty"
        if sum(len(sentences(line)) for line in lines) < config.min_sentences:
            return "few_sentences"
        if config.min_words or config.max_words:
            count = sum(map(num_words, lines))
            if count < config.min_words:
                return "few_words"
            if config.max_words and count > config.max_words:
                return "many_words"
        text = "\n".join(lines)
        if config.scripts and script_share(text, config.scripts) < config.script_share:
            return "scripts"
        if self.detect and self.detect(text) < config.language_probability:
            return "language"
        return ""


def num_words(text: str) -> float:
    """Words between white space; in scripts without spaces two characters count as one word.

    >>> num_words("Tom - and Eve"), num_words("我们去看电影 today")
    (4, 4.0)
    """
    unspaced = 0 if text.isascii() else len(UNSPACED_CHARACTER.findall(text))
    if not unspaced:
        return len(text.split())
    others = UNSPACED_CHARACTER.sub(" ", text).split()
    return unspaced / 2 + sum(any(map(str.isalnum, word)) for word in others)


def script_share(text: str, scripts: tuple[str, ...]) -> float:
    """The share of letters that belong to one of the scripts; 0 where there are no letters.

    >>> script_share("abc 中", ("latin",))
    0.75
    """
    counts: Counter[str] = Counter()
    for character, count in Counter(text).items():
        if character.isalpha():
            counts[_script(character)] += count
    return sum(counts[script] for script in scripts) / max(1, counts.total())


@lru_cache(maxsize=1 << 16)
def _script(letter: str) -> str:
    """The first word of the letter's Unicode name, which is its script but for Han."""
    first = unicodedata.name(letter, "unnamed").split()[0].lower()
    return "han" if first == "cjk" else first


def read_bad_words(path: Path) -> re.Pattern[str]:
    """Matches any word of a file in a lower-cased line; spaced words only as whole words.

    Raises:
        ConfigError: the file holds no word.
        DataError: it cannot be read.
    """
    with decoded_text(path) as stream:
        found = sorted({line.strip().lower() for line in stream} - {""})
    if not found:
        raise ConfigError(f"bad_words: {path} holds no word; give a file with one a line")
    unspaced = [re.escape(word) for word in found if UNSPACED_CHARACTER.search(word)]
    spaced = [re.escape(word) for word in found if not UNSPACED_CHARACTER.search(word)]
    whole = rf"(?<!\w)(?:{'|'.join(spaced)})(?!\w)"
    return re.compile("|".join([*unspaced, *([whole] if spaced else [])]))


def language_detector(language: str) -> Callable[[str], float]:
    """Gives the probability that a text is of the language, 0 where another is likelier.

    py3langid, after Lui and Baldwin, "langid.py: An Off-the-shelf Language Identification Tool",
    ACL 2012; C4 used langdetect. No download: the model lies in the package.

    Raises:
        ConfigError: the package is missing, or it does not know the language.
    """
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise ConfigError(
            "language needs the package `py3langid`: pip install 'selfsup[language]'; or choose "
            "documents by script: --set 'scripts=[\"latin\"]'"
        ) from error
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    if language not in identifier.labels:
        known = nearest(language, identifier.labels)
        raise ConfigError(f"unknown language {language!r}; give a code such as en or zh{known}")

    def probability(text: str) -> float:
        found, share = identifier.classify(text)
        return float(share) if found == language else 0.0

    return probability
