"""What flows from data to methods: a `Batch` of named tensors, and the facts about its contents.

| field       | shape                          | what                                              |
|-------------|--------------------------------|---------------------------------------------------|
| `tokens`    | (batch, time) int64            | token ids                                         |
| `image`     | (batch, channel, height, width)| uint8 as decoded, or float32 views in [0, 1]      |
| `waveform`  | (batch, samples) float32       | sound at the data's rate, in [-1, 1]              |
| `frames`    | (batch, time, mel) float32     | log-mel frames of the sound                       |
| `series`    | (batch, time, channel) float32 | NaN where missing                                 |
| `row`       | (batch, column) float32        | an encoded table row                              |
| `mask`      | (batch, time or samples) bool  | True where real; absent when nothing is padded    |
| `documents` | (batch, time) int64            | number of the document in a packed row: attention |
|             |                                | stays inside it; absent: a row is one document    |
| `segments`  | (batch, time) int64            | 0 in sentence A, 1 in sentence B                  |
| `words`     | (batch, time) int64            | the word number at a word's first token, else -1  |
| `index`     | (batch,) int64                 | the example's number in its data set              |
| `label`     | the task's own                 | only in labelled data                             |

What a model must know of its data is a small frozen `spec` without the data themselves: a
`Vocabulary`, an `ImageSpec`, ...
"""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

Batch = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What a model and a method need to know of a tokenizer: sizes, special ids, spellings.

    Attributes:
        size: number of token ids.
        pad, unk, cls, sep, mask: ids of the special tokens; -1 where the tokenizer has none.
            `sep` also ends a document.
        continues: ids of the tokens that go on with the word before them, for whole-word masks.
        unigram_entropy: nats per token of a model that knows only how often each token occurs in
            the training corpus: the plateau on which a masked language model can get stuck. 0.0
            when it is not known.
        spellings: the text of each token as UTF-8, b"" for special ones, for models that read
            letters; empty when it is not known.
        sentinels: ids of the marks that stand for hidden spans, in the order of their numbers.
        sentence_ends: ids of the marks that end a sentence.
    """

    kind: ClassVar[str] = "text"
    size: int
    pad: int = -1
    unk: int = -1
    cls: int = -1
    sep: int = -1
    mask: int = -1
    continues: tuple[int, ...] = ()
    unigram_entropy: float = 0.0
    spellings: tuple[bytes, ...] = field(default=(), repr=False)
    sentinels: tuple[int, ...] = ()
    sentence_ends: tuple[int, ...] = ()

    @property
    def special(self) -> tuple[int, ...]:
        """The special ids that exist, ascending."""
        named = (self.pad, self.unk, self.cls, self.sep, self.mask)
        return tuple(sorted({i for i in (*named, *self.sentinels) if i >= 0}))


@dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """What a model needs to know of pictures.

    Attributes:
        size: height and width in pixels.
        channels: 3 for colour, 1 for grey.
        mean, std: per channel over the training part, on the scale 0 to 1; encoders standardise
            with them.
    """

    kind: ClassVar[str] = "image"
    size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class AudioSpec:
    """What a model needs to know of sound.

    Attributes:
        rate: samples per second.
        mel: width of a log-mel frame; 0 where batches bring waveforms only.
        hop: samples from one frame to the next.
    """

    kind: ClassVar[str] = "audio"
    rate: int
    mel: int
    hop: int


@dataclass(frozen=True, kw_only=True)
class SeriesSpec:
    """What a model needs to know of time series.

    Attributes:
        channels: measured quantities.
        length: time steps in a window.
    """

    kind: ClassVar[str] = "series"
    channels: int
    length: int


@dataclass(frozen=True, kw_only=True)
class TableSpec:
    """What a model needs to know of table rows.

    Attributes:
        columns: names of the table's columns.
        source: for every encoded column the number of the table column that it comes from; its
            length is the width of `row`.
    """

    kind: ClassVar[str] = "table"
    columns: tuple[str, ...]
    source: tuple[int, ...]


Spec = Vocabulary | ImageSpec | AudioSpec | SeriesSpec | TableSpec
