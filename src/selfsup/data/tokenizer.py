"""Text to token ids and back: five kinds of tokenizer behind one class, kept as tokenizer.json.

| kind      | pieces                                          | as published in               |
|-----------|-------------------------------------------------|-------------------------------|
| wordpiece | words, `##` goes on; one per Chinese character  | BERT, Devlin et al. 2018      |
| bpe       | merges of bytes, `Ġ` begins a word              | GPT-2, Radford et al. 2019    |
| unigram   | likeliest pieces, `▁` begins a word             | SentencePiece, Kudo 2018      |
| byte      | the 256 bytes                                   | ByT5, Xue et al. 2021         |
| character | characters                                      | -                             |

Training and encoding run in the Rust library `tokenizers`; this file fixes the pipelines, the
special tokens and what the rest of selfsup may ask. Any text can be encoded: `bpe` and `byte` know
every byte, the other kinds fall back to their unknown token. The same text gives the same
tokenizer, save for `unigram`: the library's trainer adds up in an order that changes.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import tokenizers as library
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from selfsup import files
from selfsup.batch import Vocabulary
from selfsup.errors import ConfigError, DataError, nearest

FILE_NAME = "tokenizer.json"
BERT_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
END = "<|endoftext|>"
# What published tokenizers call their special tokens; the first that exists is taken.
USUAL_NAMES = {
    "pad": ("[PAD]", "<pad>"),
    "unk": ("[UNK]", "<unk>"),
    "cls": ("[CLS]", "<s>"),
    "sep": ("[SEP]", "</s>", END),
    "mask": ("[MASK]", "<mask>"),
}
# Han, kana, and the full-width forms and punctuation written between them: no space belongs there.
CJK = "\u3000-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff"
CJK_GAP = re.compile(f"(?<=[{CJK}]) (?=[{CJK}])")
# BERT cuts "it's" and "3.5" into three words each.
CUT_WORD = re.compile(r"(?<=\w) ?(['’]) (?=(?:s|t|re|ve|ll|d|m)\b)|(?<=\d)([.,]) (?=\d)")


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Which tokenizer to train, or which file to take.

    Attributes:
        kind: see the table at the top of this file.
        vocab_size: ids including special tokens; a corpus with little text gives fewer, one whose
            alphabet alone is larger gives more. `byte` ignores it.
        lowercase: lower-cases the text first, in every kind; wordpiece then also strips accents.
        style: special tokens and how rows are built: "bert" has [CLS], [SEP], [MASK], "gpt" one
            end-of-text token.
        file: a ready tokenizer.json, or a folder that holds one; the other keys are then ignored.
        train_chars: characters of the corpus that are read for training.
    """

    kind: Literal["wordpiece", "bpe", "unigram", "byte", "character"] = "wordpiece"
    vocab_size: int = 8000
    lowercase: bool = True
    style: Literal["bert", "gpt"] = "bert"
    file: str | None = None
    train_chars: int = 50_000_000

    def __post_init__(self) -> None:
        if self.vocab_size < 16:
            raise ConfigError(f"tokenizer.vocab_size must be at least 16, got {self.vocab_size}")
        if self.train_chars < 1:
            raise ConfigError(f"tokenizer.train_chars must be positive, got {self.train_chars}")


@final
class Tokenizer:
    """A trained or given tokenizer.

    >>> tokenizer = Tokenizer.train(TokenizerConfig(vocab_size=64), ["the cat sat on the mat"] * 9)
    >>> ids = tokenizer.encode(["The cat sat."])[0]
    >>> tokenizer.decode(ids)
    'the cat sat [UNK]'

    Attributes:
        vocabulary: sizes and special ids; `unigram_entropy` is 0.0 until a store has counted.
        style: "bert" where the tokenizer has a [CLS] token, else "gpt".
    """

    def __init__(self, text: str):
        # The text is kept, not written anew: the library does not give every float back as it was,
        # and the fingerprint must survive saving and loading.
        self._text = text
        self._wrapped = library.Tokenizer.from_str(text)
        self._wrapped.no_padding()
        self._wrapped.no_truncation()
        self._description: dict[str, Any] = json.loads(text)
        self.vocabulary = self._read_vocabulary()
        self.style: Literal["bert", "gpt"] = "bert" if self.vocabulary.cls >= 0 else "gpt"

    @staticmethod
    def train(config: TokenizerConfig, texts: Iterable[str]) -> "Tokenizer":
        """Trains on the first `config.train_chars` characters of `texts`.

        Raises:
            DataError: there is no text.
        """
        if config.kind == "byte":
            return Tokenizer(_byte_level(config).to_str())
        sample = list(_beginning(texts, config.train_chars))
        if not any(sample):
            raise DataError("a tokenizer cannot be trained on a corpus without text; add documents")
        wrapped, trainer = _pipeline(config, sample)
        wrapped.train_from_iterator(sample, trainer)
        description = json.loads(wrapped.to_str())
        special = set(_special_tokens(config))
        added = [entry for entry in description["added_tokens"] if entry["content"] in special]
        return Tokenizer(json.dumps({**description, "added_tokens": added}, ensure_ascii=False))

    @staticmethod
    def load(folder_or_file: str | Path) -> "Tokenizer":
        """Reads a tokenizer.json, or the one in a folder.

        Raises:
            DataError: the file is missing, is not a tokenizer, or has no separator token.
        """
        path = Path(folder_or_file)
        path = path / FILE_NAME if path.is_dir() else path
        try:
            tokenizer = Tokenizer(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(f"{path}: the tokenizer cannot be read ({error.strerror})") from error
        except Exception as error:  # the Rust library raises plain Exception
            raise DataError(f"{path}: not a tokenizer.json of `tokenizers` ({error})") from error
        if tokenizer.vocabulary.sep < 0:
            names = ", ".join(USUAL_NAMES["sep"])
            raise DataError(f"{path}: has no token that ends a document; one of {names} is needed")
        return tokenizer

    def save(self, folder: Path) -> None:
        """Writes `folder`/tokenizer.json whole.

        Raises:
            StorageError: the disk is full or the folder cannot be written.
        """
        files.write_text(Path(folder) / FILE_NAME, self.to_json())

    def to_json(self) -> str:
        """The content of tokenizer.json."""
        return self._text

    @cached_property
    def fingerprint(self) -> str:
        """The SHA-256 of `to_json`, in hexadecimal."""
        return hashlib.sha256(self._text.encode()).hexdigest()

    @cached_property
    def _plain(self) -> library.Tokenizer:
        """A twin for which "[MASK]" in a text is seven characters, not a special token."""
        twin = library.Tokenizer.from_str(self._text)
        twin.encode_special_tokens = True
        return twin

    def encode(self, texts: list[str], *, parse_special: bool = True) -> list[np.ndarray]:
        """Ids of each text, without special tokens around it.

        Args:
            texts: any strings; encoded in parallel.
            parse_special: whether "[MASK]" written in a text means the special token. A corpus is
                read without, so that it cannot forge the end of a document.

        Returns:
            One (length,) int32 array per text; empty where a text holds nothing but space.
        """
        wrapped = self._wrapped if parse_special else self._plain
        encoded = wrapped.encode_batch_fast(texts, add_special_tokens=False)
        out = [np.fromiter(one.ids, np.int32, len(one)) for one in encoded]
        if not parse_special and self._description["model"]["type"] == "Unigram":
            for ids in out:  # special tokens are pieces like any other to a unigram model
                ids[np.isin(ids, self._hidden)] = self.vocabulary.unk
        return out

    def encode_words(self, sentences: list[list[str]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Ids of sentences that are split into words already, for tagging.

        Every word gives at least one token: the unknown token stands in for a word that the
        tokenizer makes vanish (the end token where there is none).

        Returns:
            Per sentence (ids, words), both (length,) int32: `words[i]` is the number of the word
            whose first token is i, else -1.
        """
        if self._piece_start == "Ġ":  # a word inside a sentence carries the space before it
            sentences = [[f" {w}" if i and w else w for i, w in enumerate(s)] for s in sentences]
        encoded = self._wrapped.encode_batch(
            sentences, is_pretokenized=True, add_special_tokens=False
        )
        return [
            self._first_tokens(one.ids, one.word_ids, len(sentence))
            for one, sentence in zip(encoded, sentences, strict=True)
        ]

    def _first_tokens(
        self, ids: list[int], owners: list[int | None], num_words: int
    ) -> tuple[np.ndarray, np.ndarray]:
        token, owner = np.array(ids, dtype=np.int32), np.array(owners, dtype=np.int32)
        lost = np.setdiff1d(np.arange(num_words, dtype=np.int32), owner)
        stand_in = self.vocabulary.unk if self.vocabulary.unk >= 0 else self.vocabulary.sep
        place = np.searchsorted(owner, lost)  # owners ascend, so each lost word finds its place
        token, owner = np.insert(token, place, stand_in), np.insert(owner, place, lost)
        first = np.diff(owner, prepend=-1) != 0
        return token, np.where(first, owner, -1).astype(np.int32)

    def row(
        self, a: np.ndarray, b: np.ndarray | None = None, max_length: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """One row of a model's input.

        Style bert gives [CLS] a [SEP], and b [SEP] after it; style gpt gives a, or a, the end token
        and b: there is nothing at the end, so a model can write on. What is longer than
        `max_length` loses tokens at the end of the longer of the two.

        Returns:
            (tokens, segments), both (length,) int32; segments are 0 up to the separator after a,
            then 1.
        """
        cls, sep = ([self.vocabulary.cls], [self.vocabulary.sep])
        ends = sep if self.style == "bert" else []
        first = cls if self.style == "bert" else []
        between = [] if b is None else sep if self.style == "gpt" else []
        if max_length is not None:
            num_special = len(first) + len(between) + len(ends) * (1 if b is None else 2)
            a, b = _truncated(a, b, max(0, max_length - num_special))
        head = np.concatenate([first, a, ends, between]).astype(np.int32)
        if b is None:
            return head, np.zeros_like(head)
        tail = np.concatenate([b, ends]).astype(np.int32)
        segments = np.repeat(np.array([0, 1], dtype=np.int32), [len(head), len(tail)])
        return np.concatenate([head, tail]), segments

    def decode(self, ids: Iterable[int]) -> str:
        """Readable text; special tokens are left out, except the unknown one."""
        shown = [int(i) for i in ids if int(i) not in self._hidden]
        text = self._wrapped.decode(shown, skip_special_tokens=False)
        if self._piece_start == "##":
            text = CUT_WORD.sub(lambda cut: cut[1] or cut[2], CJK_GAP.sub("", text))
        return text

    def token(self, id: int) -> str:
        """The piece behind an id.

        Raises:
            ConfigError: there is no such id.
        """
        # The library reads ids as unsigned: a negative one would be an OverflowError.
        piece = self._wrapped.id_to_token(int(id)) if id >= 0 else None
        if piece is None:
            raise ConfigError(f"no token has id {id}; ids go from 0 to {self.vocabulary.size - 1}")
        return piece

    def id(self, token: str) -> int:
        """The id of a piece.

        Raises:
            ConfigError: the vocabulary has no such piece; the nearest one is named.
        """
        number = self._wrapped.token_to_id(token)
        if number is None:
            near = [p for p in self._wrapped.get_vocab() if p[:1] == token[:1]][:2000]
            hint = nearest(token, near) if near and len(near) < 2000 else ""
            raise ConfigError(f"the vocabulary has no token {token!r}{hint[:200]}")
        return number

    @cached_property
    def _hidden(self) -> list[int]:
        """The special ids that stand for no text at all."""
        return [i for i in self.vocabulary.special if i != self.vocabulary.unk]

    @cached_property
    def _piece_start(self) -> str:
        """How pieces show where words are: "##" goes on, "Ġ" and "▁" begin, "" neither."""
        if self._description["model"]["type"] == "WordPiece":
            return "##"
        stages = json.dumps([self._description["pre_tokenizer"], self._description["decoder"]])
        if '"ByteLevel"' in stages:
            return "Ġ"
        return "▁" if '"Metaspace"' in stages else ""

    def _read_vocabulary(self) -> Vocabulary:
        known = self._wrapped.get_vocab()
        special = {
            field: next((known[name] for name in names if name in known), -1)
            for field, names in USUAL_NAMES.items()
        }
        if special["pad"] < 0:
            special["pad"] = special["sep"]
        return Vocabulary(
            size=max(known.values()) + 1,  # given files may leave out numbers
            continues=self._continuing(set(special.values())),
            **special,
        )

    def _continuing(self, special: set[int]) -> tuple[int, ...]:
        start = self._piece_start
        added = {entry["id"] for entry in self._description["added_tokens"]}
        pieces = ((i, p) for p, i in self._wrapped.get_vocab().items() if i not in special | added)
        if start == "":
            return ()
        if start == "##":
            return tuple(sorted(i for i, piece in pieces if piece.startswith("##")))
        return tuple(sorted(i for i, piece in pieces if not piece.startswith(start)))


def _beginning(texts: Iterable[str], limit: int) -> Iterator[str]:
    """Texts until `limit` characters are reached; the last one is cut there."""
    for text in texts:
        yield text[:limit]
        limit -= len(text)
        if limit <= 0:
            return


def _truncated(
    a: np.ndarray, b: np.ndarray | None, room: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """The two cut at their ends, the longer one first, until both fit into `room` tokens."""
    if b is None:
        return a[:room], None
    of_a = max(room - len(b), min(len(a), room - room // 2))  # an odd token goes to a
    return a[:of_a], b[: max(0, room - len(a[:of_a]))]


def _special_tokens(config: TokenizerConfig) -> list[str]:
    """The special tokens in the order of their ids."""
    if config.style == "bert":
        return list(BERT_SPECIALS)
    return [END] if config.kind in ("bpe", "byte") else [END, "<unk>"]


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
    raw: Counter[str] = Counter()
    for text in sample:
        raw.update(text)
    counts: Counter[str] = Counter()
    for char, count in raw.items():
        for letter in "".join(wrapped.normalizer.normalize_str(char).split()):
            counts[letter] += count
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
