"""What flows from data to methods: a `Batch` of named tensors, and the facts about its tokens.

| field       | shape                 | what                                                       |
|-------------|-----------------------|------------------------------------------------------------|
| `tokens`    | (batch, time) int64   | token ids                                                  |
| `mask`      | (batch, time) bool    | True where real; absent when nothing is padded             |
| `documents` | (batch, time) int64   | number of the document in a packed row: attention stays    |
|             |                       | inside a document; absent when every row is one document   |
| `segments`  | (batch, time) int64   | 0 in sentence A, 1 in sentence B                           |
| `words`     | (batch, time) int64   | the word number at a word's first token, -1 elsewhere      |
| `index`     | (batch,) int64        | the example's number in its data set                       |
| `label`     | the task's own        | only in labelled data                                      |
"""

from dataclasses import dataclass

from torch import Tensor

Batch = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What a model and a method need to know of a tokenizer: sizes and special ids, no text.

    Attributes:
        size: number of token ids.
        pad, unk, cls, sep, mask: ids of the special tokens; -1 where the tokenizer has none.
            `sep` also ends a document.
        continues: ids of the tokens that go on with the word before them, for whole-word masks.
        unigram_entropy: nats per token of a model that knows only how often each token occurs in
            the training corpus: the plateau on which a masked language model can get stuck. 0.0
            when it is not known.
    """

    size: int
    pad: int = -1
    unk: int = -1
    cls: int = -1
    sep: int = -1
    mask: int = -1
    continues: tuple[int, ...] = ()
    unigram_entropy: float = 0.0

    @property
    def special(self) -> tuple[int, ...]:
        """The special ids that exist, ascending."""
        return tuple(
            sorted({i for i in (self.pad, self.unk, self.cls, self.sep, self.mask) if i >= 0})
        )
