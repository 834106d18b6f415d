"""Text to token ids and back: six kinds of tokenizer behind one class, kept as tokenizer.json.

Encoding runs in the Rust library `tokenizers`; this file fixes what the rest of selfsup may ask.
The kinds and their training stand in `tokenizer_training.py`. Any text can be encoded: `bpe` and
`byte` know every byte, the other kinds fall back to their unknown token.
"""

import hashlib
import json
import re
from collections.abc import Container, Iterable, Iterator
from functools import cached_property
from itertools import count, takewhile
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import tokenizers as library

from selfsup import files
from selfsup.batch import Vocabulary
from selfsup.data.tokenizer_training import SENTINEL, TokenizerConfig, trained_json
from selfsup.data.word_memory import WordMemory, serves
from selfsup.errors import ConfigError, DataError, nearest

FILE_NAME = "tokenizer.json"
# What published tokenizers call their special tokens; the first that exists is taken.
USUAL_NAMES = {
    "pad": ("[PAD]", "<pad>"),
    "unk": ("[UNK]", "<unk>"),
    "cls": ("[CLS]", "<s>"),
    "sep": ("[SEP]", "</s>", "<|endoftext|>"),
    "mask": ("[MASK]", "<mask>"),
}
SENTENCE_ENDS = {mark.encode() for mark in ".?!。！？"}
# Han, kana, and the full-width forms and punctuation written between them: no space belongs there.
CJK = "\u3000-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff"
CJK_GAP = re.compile(f"(?<=[{CJK}]) (?=[{CJK}])")
# BERT cuts "it's" and "3.5" into three words each.
CUT_WORD = re.compile(r"(?<=\w) ?(['’]) (?=(?:s|t|re|ve|ll|d|m)\b)|(?<=\d)(\.) (?=\d)")
# How byte-level BPE writes bytes: visible ones as Latin-1 does, the others from U+0100 on.
SEEN = [*range(33, 127), *range(161, 173), *range(174, 256)]
UNSEEN = [byte for byte in range(256) if byte not in SEEN]
SIGN_BYTES = {chr(byte): byte for byte in SEEN} | {
    chr(256 + place): byte for place, byte in enumerate(UNSEEN)
}


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
        return Tokenizer(trained_json(config, texts))

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

    @cached_property
    def _memory(self) -> WordMemory | None:
        return WordMemory(self._plain) if serves(self._description) else None

    def encode(self, texts: list[str], *, parse_special: bool = True) -> list[np.ndarray]:
        """Ids of each text, without special tokens around it.

        Args:
            texts: any strings; encoded in parallel.
            parse_special: whether "[MASK]" written in a text means the special token. A corpus is
                read without, so that it cannot forge the end of a document.

        Returns:
            One (length,) int32 array per text; empty where a text holds nothing but space.
        """
        if self._memory is not None and not parse_special:
            return self._memory.encode(texts)
        wrapped = self._wrapped if parse_special else self._plain
        encoded = wrapped.encode_batch_fast(texts, add_special_tokens=False)
        out = [np.fromiter(one.ids, np.int32, len(one)) for one in encoded]
        return out if parse_special else [self._without_special(ids) for ids in out]

    def _without_special(self, ids: np.ndarray) -> np.ndarray:
        if self._description["model"]["type"] == "Unigram":
            # special tokens are pieces like any other to a unigram model
            ids[np.isin(ids, self._hidden)] = self.vocabulary.unk
        return ids

    def encode_with_offsets(self, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Ids of each text, as without `parse_special`, and where its tokens stand in it.

        A text that the tokenizer makes vanish is one unknown token (the end token where there is
        none), so every text has a token.

        Returns:
            Per text (ids, offsets): (length,) and (length, 2) int32; the first and the end
            (exclusive) character of each token, without white space around it. Tokens share a
            character where they are bytes of it.
        """
        encoded = self._plain.encode_batch(texts, add_special_tokens=False)
        stand_in = self.vocabulary.unk if self.vocabulary.unk >= 0 else self.vocabulary.sep
        out = []
        for text, one in zip(texts, encoded, strict=True):
            ids, places = one.ids or [stand_in], one.offsets if one.ids else [(0, len(text))]
            trimmed = [_trimmed(text, first, end) for first, end in places]
            tokens = self._without_special(np.array(ids, dtype=np.int32))
            out.append((tokens, np.array(trimmed, dtype=np.int32)))
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

        Style bert gives [CLS] a [SEP], and b [SEP] after it; RoBERTa's has two separators between
        them, and T5's no [CLS]. Style gpt gives a, or a, the end token and b: there is nothing at
        the end, so a model can write on. What is longer than `max_length` loses tokens at the end
        of the longer of the two.

        Returns:
            (tokens, segments), both (length,) int32; segments are 0 up to the separator after a,
            then 1.
        """
        cls, sep = ([self.vocabulary.cls], [self.vocabulary.sep])
        first = cls if self.style == "bert" else []
        of_t5 = self.style == "gpt" and bool(self.vocabulary.sentinels)
        of_roberta = self.style == "bert" and self.token(self.vocabulary.sep) == "</s>"
        ends = sep if self.style == "bert" or of_t5 else []
        between = sep if b is not None and (not ends or of_roberta) else []
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
        if (self._description["decoder"] or {}).get("type") == "WordPiece":
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
        size = max(known.values()) + 1  # given files may leave out numbers
        sentinels = tuple(known[name] for name in _sentinel_names(known))
        spellings = [b""] * size
        for piece, number in known.items():
            if number not in (*special.values(), *sentinels):
                spellings[number] = self._spelled(piece)
        return Vocabulary(
            size=size,
            continues=self._continuing(set(special.values())),
            spellings=tuple(spellings),
            sentinels=sentinels,
            sentence_ends=tuple(i for i, text in enumerate(spellings) if text in SENTENCE_ENDS),
            **special,
        )

    def _spelled(self, piece: str) -> bytes:
        """The text behind a piece, without the space before it or the mark that it goes on."""
        start = self._piece_start
        text = piece.removeprefix(start)
        if start == "Ġ" and all(sign in SIGN_BYTES for sign in text):
            return bytes(SIGN_BYTES[sign] for sign in text)
        return text.encode()

    def _continuing(self, special: set[int]) -> tuple[int, ...]:
        start = self._piece_start
        added = {entry["id"] for entry in self._description["added_tokens"]}
        pieces = ((i, p) for p, i in self._wrapped.get_vocab().items() if i not in special | added)
        if start == "":
            return ()
        if start == "##":
            return tuple(sorted(i for i, piece in pieces if piece.startswith("##")))
        return tuple(sorted(i for i, piece in pieces if not piece.startswith(start)))


def _sentinel_names(known: Container[str]) -> Iterator[str]:
    """T5's names of sentinels, as many as there are."""
    return takewhile(known.__contains__, map(SENTINEL.format, count()))


def _truncated(
    a: np.ndarray, b: np.ndarray | None, room: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """The two cut at their ends, the longer one first, until both fit into `room` tokens."""
    if b is None:
        return a[:room], None
    of_a = max(room - len(b), min(len(a), room - room // 2))  # an odd token goes to a
    return a[:of_a], b[: max(0, room - len(a[:of_a]))]


def _trimmed(text: str, first: int, end: int) -> tuple[int, int]:
    while first < end and text[first].isspace():
        first += 1
    while first < end and text[end - 1].isspace():
        end -= 1
    return first, end
