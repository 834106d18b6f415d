"""Rows out of a token stream: windows of it, or pairs of neighbouring spans.

`stream` is one side of a store (`store.py`): documents separated by [SEP] [CLS] in style bert, by
the end token in style gpt.
"""

from typing import final

import numpy as np
import torch

from selfsup.batch import Batch, Vocabulary
from selfsup.data.dataset import Dataset, pad_mask, pad_rows
from selfsup.data.sharded import JoinedStream
from selfsup.randomness import derive

MIN_PAIR_TOKENS = 8  # a document with fewer gives no pair


@final
class PackedRows(Dataset):
    """Windows of the stream, without padding; the last one is shifted back so that none is short.

    Style bert: row r is [CLS], window r of `row_length` - 2 tokens, [SEP]. Style gpt: window r of
    `row_length` tokens.

    Args:
        stream: (tokens,) ids of one side, at least one window long.
        vocabulary: special ids.
        row_length: tokens in a row.
        bert: the style.
        across_documents: never gives the field `documents`.
    """

    def __init__(
        self,
        stream: np.ndarray | JoinedStream,
        vocabulary: Vocabulary,
        row_length: int,
        bert: bool,
        across_documents: bool = False,
    ):
        self.stream = np.asarray(stream) if isinstance(stream, np.ndarray) else stream
        self.vocabulary, self.bert = vocabulary, bert
        self.across_documents = across_documents
        self.window = row_length - 2 if bert else row_length
        self.fields: tuple[str, ...] = ("tokens", "index")
        if not across_documents:
            self.fields = ("tokens", "documents", "index")

    def __len__(self) -> int:
        return -(-len(self.stream) // self.window)

    def batch(self, numbers: np.ndarray) -> Batch:
        """Rows as `tokens` (batch, row_length), `index`, and `documents` where a row has several.

        `documents` counts from 0 in each row; a separator belongs to the document it ends.
        """
        numbers = np.asarray(numbers, dtype=np.int64)
        starts = np.minimum(numbers * self.window, len(self.stream) - self.window)
        if isinstance(self.stream, JoinedStream):
            tokens = np.stack([self.stream[s : s + self.window] for s in starts.tolist()])
        else:
            tokens = self.stream[starts[:, None] + np.arange(self.window)]
        tokens = tokens.astype(np.int64)
        if self.bert:
            ends = (self.vocabulary.cls, self.vocabulary.sep)
            tokens = np.pad(tokens, ((0, 0), (1, 1)))
            tokens[:, 0], tokens[:, -1] = ends
        out = {"tokens": torch.from_numpy(tokens), "index": torch.from_numpy(numbers)}
        if not self.across_documents:
            begins = np.zeros_like(tokens)
            if self.bert:
                begins[:, 1:] = tokens[:, 1:] == self.vocabulary.cls
            else:
                begins[:, 1:] = tokens[:, :-1] == self.vocabulary.sep
            if begins.any():
                out["documents"] = torch.from_numpy(begins.cumsum(1))  # (batch, row_length)
        return out


@final
class PairRows(Dataset):
    """[CLS] A [SEP] B [SEP]: two spans of one document, B directly after A.

    A document is cut into blocks of two spans; the last block is shifted back so that it is full.
    Where a block is split into A and B varies with the row number, and is the same every time.

    Args:
        stream: (tokens,) ids of one side, documents separated by [SEP] [CLS].
        vocabulary: special ids.
        row_length: longest row; a span has at most (row_length - 3) // 2 tokens.

    Attributes:
        num_skipped: documents too short for a pair.
    """

    fields: tuple[str, ...] = ("tokens", "segments", "mask", "index")
    lengths: np.ndarray  # tokens of both spans

    def __init__(self, stream: np.ndarray | JoinedStream, vocabulary: Vocabulary, row_length: int):
        self.stream, self.vocabulary = stream, vocabulary
        self.span = (row_length - 3) // 2
        ends = _positions(stream, vocabulary.sep)
        first = np.concatenate([[0], ends + 2])  # a document begins after [SEP] [CLS]
        length = np.concatenate([ends, [len(stream)]]) - first
        long_enough = length >= min(MIN_PAIR_TOKENS, 2 * self.span)
        self.num_skipped = int((~long_enough).sum()) if len(stream) else 0
        first, length = first[long_enough], length[long_enough]
        block = 2 * self.span
        num_blocks = -(-length // block)
        number = np.arange(num_blocks.sum()) - np.repeat(
            num_blocks.cumsum() - num_blocks, num_blocks
        )
        shift = np.minimum(number * block, np.repeat(np.maximum(length - block, 0), num_blocks))
        self.starts = np.repeat(first, num_blocks) + shift  # (rows,)
        self.lengths = np.repeat(np.minimum(length, block), num_blocks)  # (rows,)

    def __len__(self) -> int:
        return len(self.starts)

    def batch(self, numbers: np.ndarray) -> Batch:
        """Rows as `tokens` and `segments` (batch, longest), `index`, `mask` where any is padded."""
        numbers = np.asarray(numbers, dtype=np.int64)
        rows, segments = zip(*(self._row(int(number)) for number in numbers), strict=True)
        return {
            "tokens": pad_rows(rows, self.vocabulary.pad),
            "segments": pad_rows(segments, 0),
            "index": torch.from_numpy(numbers),
            **pad_mask(rows),
        }

    def _row(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        start, length = int(self.starts[number]), int(self.lengths[number])
        # Between a quarter and three quarters of the block.
        split = start + length // 4 + derive(0, "pair split", number) % (length // 2 + 1)
        split = min(max(split, start + 1), start + length - 1)
        a = self.stream[max(start, split - self.span) : split]
        b = self.stream[split : min(start + length, split + self.span)]
        cls, sep = [self.vocabulary.cls], [self.vocabulary.sep]
        tokens = np.concatenate([cls, a, sep, b, sep]).astype(np.int64)
        segments = np.repeat(np.array([0, 1]), [len(a) + 2, len(b) + 1])
        return tokens, segments


def _positions(stream: np.ndarray | JoinedStream, id: int) -> np.ndarray:
    """Where `id` stands in a stream that may be larger than the memory."""
    step = 1 << 22
    found = [
        np.flatnonzero(stream[at : at + step] == id) + at for at in range(0, len(stream), step)
    ]
    return np.concatenate([np.zeros(0, dtype=np.int64), *found])
