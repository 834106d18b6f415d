"""The six kinds of tokenizer: their pipelines, their special tokens, their training.

| kind      | pieces                                          | as published in               |
|-----------|-------------------------------------------------|-------------------------------|
| wordpiece | words, `##` goes on; one per Chinese character  | BERT, Devlin et al. 2018      |
| word      | frequent words and marks, whole                 | -                             |
| bpe       | merges of bytes, `Ġ` begins a word              | GPT-2, Radford et al. 2019    |
| unigram   | likeliest pieces, `▁` begins a word             | SentencePiece, Kudo 2018      |
| byte      | the 256 bytes                                   | ByT5, Xue et al. 2021         |
| character | characters                                      | -                             |

The same text gives the same tokenizer, save for `unigram`: the library's trainer adds up in an
order that changes.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import tokenizers as library
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from selfsup.errors import ConfigError, DataError

BERT_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
END = "<|endoftext|>"
SENTINEL = "<extra_id_{}>"  # T5's name of a mark that stands for a hidden span


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Which tokenizer to train, or which file to take.

    Attributes:
        kind: see the table at the top of this file.
        vocab_size: ids including special tokens; a corpus with little text gives fewer, one whose
            alphabet alone is larger gives more. `byte` ignores it.
        lowercase: lower-cases the text first, in every kind; wordpiece and word then also strip
            accents.
        style: special tokens and how rows are built: "bert" has [CLS], [SEP], [MASK], "gpt" one
            end-of-text token.
        file: a ready tokenizer.json, or a folder that holds one; the other keys are then ignored.
        train_chars: characters of the corpus that are read for training.
        sentinels: special tokens that stand for hidden spans (T5: 100).
    """

    kind: Literal["wordpiece", "word", "bpe", "unigram", "byte", "character"] = "wordpiece"
    vocab_size: int = 8000
    lowercase: bool = True
    style: Literal["bert", "gpt"] = "bert"
    file: str | None = None
    train_chars: int = 50_000_000
    sentinels: int = 0

    def __post_init__(self) -> None:
        if self.vocab_size < 16:
            raise ConfigError(f"tokenizer.vocab_size must be at least 16, got {self.vocab_size}")
        if self.train_chars < 1:
            raise ConfigError(f"tokenizer.train_chars must be positive, got {self.train_chars}")
        if not 0 <= self.sentinels <= self.vocab_size // 2:
            raise ConfigError(
                f"tokenizer.sentinels must lie between 0 and half of vocab_size, got "
                f"{self.sentinels}"
            )


def trained_json(config: TokenizerConfig, texts: Iterable[str]) -> str:
    """The tokenizer.json of a tokenizer trained on the first `config.train_chars` characters.

    Raises:
        DataError: there is no text.
    """
    if config.kind == "byte":
        return _byte_level(config).to_str()
    sample = list(_beginning(texts, config.train_chars))
    if not any(sample):
        raise DataError("a tokenizer cannot be trained on a corpus without text; add documents")
    wrapped, trainer = _pipeline(config, sample)
    wrapped.train_from_iterator(sample, trainer)
    description = json.loads(wrapped.to_str())
    special = set(_special_tokens(config))
    added = [entry for entry in description["added_tokens"] if entry["content"] in special]
    return json.dumps({**description, "added_tokens": added}, ensure_ascii=False)


def _beginning(texts: Iterable[str], limit: int) -> Iterator[str]:
    """Texts until `limit` characters are reached; the last one is cut there."""
    for text in texts:
        yield text[:limit]
        limit -= len(text)
        if limit <= 0:
            return


def _special_tokens(config: TokenizerConfig) -> list[str]:
    """The special tokens in the order of their ids."""
    sentinels = [SENTINEL.format(number) for number in range(config.sentinels)]
    if config.style == "bert":
        return [*BERT_SPECIALS, *sentinels]
    return [END, *sentinels] if config.kind in ("bpe", "byte") else [END, "<unk>", *sentinels]


def _pipeline(config: TokenizerConfig, sample: list[str]) -> tuple[library.Tokenizer, Any]:
    """An untrained tokenizer and its trainer."""
    specials = _special_tokens(config)
    unknown = "[UNK]" if config.style == "bert" else "<unk>"
    common: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "special_tokens": specials,
        "show_progress": False,
    }
    lower = [normalizers.Lowercase()] if config.lowercase else []
    if config.kind == "wordpiece":
        wrapped = library.Tokenizer(models.WordPiece(unk_token=unknown))
        wrapped.normalizer = normalizers.BertNormalizer(lowercase=config.lowercase)
        wrapped.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        wrapped.decoder = decoders.WordPiece()
        # Three quarters at most: rare characters become unknown rather than crowd the pieces out.
        room = max(16, config.vocab_size * 3 // 4)
        letters, inner = _alphabet(sample, wrapped, room)
        common["special_tokens"] = specials + inner
        return wrapped, trainers.WordPieceTrainer(
            initial_alphabet=letters, limit_alphabet=len(letters), **common
        )
    if config.kind == "word":
        wrapped = library.Tokenizer(models.WordLevel(unk_token=unknown))
        wrapped.normalizer = normalizers.BertNormalizer(lowercase=config.lowercase)
        wrapped.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        wrapped.decoder = decoders.WordPiece()
        return wrapped, trainers.WordLevelTrainer(**common)
    if config.kind == "unigram":
        wrapped = library.Tokenizer(models.Unigram())
        wrapped.normalizer = normalizers.Sequence([normalizers.NFKC(), *lower])
        wrapped.pre_tokenizer = pre_tokenizers.Metaspace()
        wrapped.decoder = decoders.Metaspace()
        return wrapped, trainers.UnigramTrainer(unk_token=unknown, **common)
    if config.kind == "character":
        wrapped = library.Tokenizer(models.WordLevel(unk_token=unknown))
        wrapped.normalizer = normalizers.Sequence(lower)
        wrapped.pre_tokenizer = pre_tokenizers.Split(library.Regex(r"[\s\S]"), "isolated")
        wrapped.decoder = decoders.Fuse()
        return wrapped, trainers.WordLevelTrainer(**common)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _byte_level(config), trainers.BpeTrainer(initial_alphabet=alphabet, **common)


def _byte_level(config: TokenizerConfig) -> library.Tokenizer:
    """GPT-2's pipeline with the 256 bytes and no merges yet."""
    specials = _special_tokens(config)
    pieces = specials + sorted(pre_tokenizers.ByteLevel.alphabet())
    wrapped = library.Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    wrapped.add_special_tokens(specials)
    wrapped.normalizer = normalizers.Sequence([normalizers.Lowercase()] if config.lowercase else [])
    wrapped.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    wrapped.decoder = decoders.ByteLevel()
    return wrapped


def _alphabet(
    sample: list[str], wrapped: library.Tokenizer, room: int
) -> tuple[list[str], list[str]]:
    """The most frequent characters, and "##" before those that occur inside words.

    The trainer would find both itself, but number "##" pieces in the order of a hash map, which
    changes from run to run, and break ties between merges by those numbers. Given to it in a fixed
    order (the second list in the guise of special tokens), the same text gives the same file.
    """
    raw = np.zeros(sys.maxunicode + 1, np.int64)
    text = "".join(sample)
    for start in range(0, len(text), 1 << 20):
        block = text[start : start + (1 << 20)].encode("utf-32-le", "surrogatepass")
        raw += np.bincount(np.frombuffer(block, "<u4"), minlength=len(raw))
    counts: Counter[str] = Counter()
    for point in np.flatnonzero(raw):
        for letter in "".join(wrapped.normalizer.normalize_str(chr(point)).split()):
            counts[letter] += int(raw[point])
    letters: list[str] = []
    inner: list[str] = []
    for letter in sorted(counts, key=lambda one: (-counts[one], one)):
        word = wrapped.normalizer.normalize_str(f"a{letter}")
        goes_on = len(wrapped.pre_tokenizer.pre_tokenize_str(word)) == 1
        room -= 2 if goes_on else 1
        if room < 0:
            break
        letters.append(letter)
        inner += [f"##{letter}"] if goes_on else []
    return letters, inner
