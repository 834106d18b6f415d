"""ELMo: words spelled letter by letter, then read by LSTMs in two directions that never meet.

Peters et al., "Deep contextualized word representations" (2018, arXiv 1802.05365). A word's vector
comes from its characters: convolutions over their vectors, the maximum of each filter over the
word, highway layers (Srivastava et al., 2015, arXiv 1505.00387) and a projection, as in Kim et al.
(2015, arXiv 1508.06615) and Jozefowicz et al. (2016, arXiv 1602.02410). One stack of LSTMs with a
projection (Sak et al., 2014, arXiv 1402.1128) reads the words forwards, another one backwards. A
hidden state joins the two, so it is 2 * `dim` wide; layer 0 is the word's vector twice.

Axes: batch; time; dim: of one direction; word: the different tokens of a batch; char; filter; run:
documents of a batch, each apart; place: in a run.

Deviations from the authors' code:
- A filter's maximum is over windows that begin inside the word and hang over its end onto zeros.
  There, padding has a vector, and windows of padding count too.
- A piece that goes on with the word before it lacks the mark at its beginning, and each special
  token has a character of its own. The unknown token is one of these: unknown words look alike.
- Every document starts with empty states; there, a batch goes on where the last one ended.
- Cells and projections are not clipped (there at 3).

Padding may stand on either side of a row.
"""

import warnings
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from selfsup.batch import Batch, Vocabulary
from selfsup.errors import ConfigError
from selfsup.models.dropout import Dropout
from selfsup.models.embeddings import document_positions
from selfsup.models.encoder import Encoder, Features, masked_mean
from selfsup.models.recurrent import rearranged, turned_around

# Characters are the 256 bytes of UTF-8, these, and one for each special token.
BEGIN, END, PAD, FIRST_SPECIAL = 256, 257, 258, 259
SPECIAL = ("pad", "unk", "cls", "sep", "mask")
NUM_CHARACTERS = FIRST_SPECIAL + len(SPECIAL)


@dataclass(frozen=True, kw_only=True)
class Config:
    """The shape of the network; the defaults are the published ones."""

    dim: int = 512  # width of one direction: of a word's vector and of each LSTM's projection
    cell: int = 4096  # width of the LSTMs' cells
    layers: int = 2
    residual: bool = True  # from the second layer on, add a layer's input to its output
    filters: tuple[int, ...] = (32, 32, 64, 128, 256, 512, 1024)  # of width 1, 2, ... characters
    char_dim: int = 16  # width of a character's vector
    highways: int = 2  # highway layers
    max_chars: int = 50  # bytes of a word with the marks at both ends; the rest is cut off
    dropout: float = 0.1  # on what a layer reads, and on what predicts

    def __post_init__(self):
        if min(self.dim, self.layers, self.char_dim) < 1 or min(self.filters, default=0) < 1:
            raise ValueError("dim, layers, char_dim and every number of filters must be above 0")
        if self.cell < self.dim:
            raise ValueError(f"cell must be at least dim, got {self.cell} and {self.dim}")
        if self.highways < 0 or self.max_chars < 3:
            raise ValueError("highways must be at least 0 and max_chars at least 3")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")


def spelled(vocabulary: Vocabulary, max_chars: int) -> Int[Tensor, "vocabulary char"]:
    """The characters of every token, int16: a mark, its bytes, a mark, padding.

    >>> spelled(Vocabulary(size=2, unk=0, spellings=(b"", b"to")), 5).tolist()
    [[256, 260, 257, 258, 258], [256, 116, 111, 257, 258]]
    """
    special = {
        getattr(vocabulary, name): FIRST_SPECIAL + place for place, name in enumerate(SPECIAL)
    }
    inside = set(vocabulary.continues)
    table = torch.full((vocabulary.size, max_chars), PAD, dtype=torch.int16)
    for token, spelling in enumerate(vocabulary.spellings):
        text = [special[token]] if token in special else list(spelling)
        begun = text if token in inside else [BEGIN, *text]
        chars = [*begun[: max_chars - 1], END]
        table[token, : len(chars)] = torch.tensor(chars, dtype=torch.int16)
    return table


class Highway(nn.Module):
    """A gate between a layer's output and its input; at first it lets most of the input pass."""

    def __init__(self, dim: int):
        super().__init__()
        self.gate, self.change = nn.Linear(dim, dim), nn.Linear(dim, dim)
        for linear, bias in ((self.gate, -2.0), (self.change, 0.0)):
            nn.init.normal_(linear.weight, std=dim**-0.5)
            nn.init.constant_(linear.bias, bias)

    def forward(self, x: Float[Tensor, "word dim"]) -> Float[Tensor, "word dim"]:
        """gate * relu(change) + (1 - gate) * x."""
        return x + torch.sigmoid(self.gate(x)) * (F.relu(self.change(x)) - x)


def convolution(char_dim: int, count: int, width: int) -> nn.Conv1d:
    """`count` filters over `width` characters, as Kim et al. (2015) begin."""
    layer = nn.Conv1d(char_dim, count, width)
    nn.init.uniform_(layer.weight, -0.05, 0.05)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class SpelledEmbedding(nn.Module):
    """Token ids to vectors by way of their characters; each different token is computed once.

    Weights begin as in the authors' code.

    Attributes:
        spelling: from `spelled`.
        characters: a table, zero at padding.
        convolutions: one per width.
        highways: `Highway` layers.
        projection: from filters to `dim`.
    """

    spelling: Tensor  # (vocabulary, char) int16

    def __init__(self, config: Config, vocabulary: Vocabulary):
        super().__init__()
        table = spelled(vocabulary, config.max_chars)
        self.register_buffer("spelling", table, persistent=False)
        self.characters = nn.Embedding(NUM_CHARACTERS, config.char_dim, padding_idx=PAD)
        nn.init.uniform_(self.characters.weight, -1, 1)
        self.characters.weight.data[PAD] = 0
        self.convolutions = nn.ModuleList(
            convolution(config.char_dim, count, width)
            for width, count in enumerate(config.filters, start=1)
        )
        total = sum(config.filters)
        self.highways = nn.ModuleList(Highway(total) for _ in range(config.highways))
        self.projection = nn.Linear(total, config.dim)
        nn.init.normal_(self.projection.weight, std=total**-0.5)
        nn.init.zeros_(self.projection.bias)

    def forward(self, tokens: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time dim"]:
        """The vector of every token."""
        words, place = tokens.unique(return_inverse=True)  # (word,), (batch, time)
        chars = self.spelling[words].long()  # (word, char)
        chars = chars[:, : int((chars != PAD).sum(1).max())]
        x = self.characters(chars).transpose(1, 2)  # (word, char_dim, char)
        outside = (chars == PAD).unsqueeze(1)
        found = []
        for over_the_end, filters in enumerate(self.convolutions):
            matches = filters(F.pad(x, (0, over_the_end)))  # (word, filter, char)
            found.append(matches.masked_fill(outside, -torch.inf).amax(-1))
        vectors = F.relu(torch.cat(found, -1))  # (word, filters)
        for highway in self.highways:
            vectors = highway(vectors)
        return F.embedding(place, self.projection(vectors))


class Layer(nn.Module):
    """One LSTM with projection, in one direction."""

    def __init__(self, config: Config, residual: bool):
        super().__init__()
        projected = config.dim if config.cell > config.dim else 0
        self.lstm = nn.LSTM(config.dim, config.cell, batch_first=True, proj_size=projected)
        biases = {k: p for k, p in self.lstm.named_parameters() if k.startswith("bias")}
        for bias in biases.values():
            nn.init.zeros_(bias)
        forget = slice(config.cell, 2 * config.cell)
        biases["bias_ih_l0"].data[forget] = 1.0  # so that cells remember from the start
        self.dropout, self.residual = Dropout(config.dropout), residual

    def forward(self, x: Float[Tensor, "run place dim"]) -> Float[Tensor, "run place dim"]:
        """Reads from the first place to the last."""
        x = self.dropout(x)
        with warnings.catch_warnings():  # on CPUs the projection costs speed, which is known
            warnings.filterwarnings("ignore", "LSTM with projections is not supported with oneDNN")
            out, _ = self.lstm(x)
        return x + out if self.residual else out


@final
class ElmoEncoder(Encoder):
    """Tokens to `Features`; reads `tokens` and, where present, `mask` and `documents`.

    `pooled` is the mean over the real positions.

    Attributes:
        embedding: a `SpelledEmbedding`.
        forwards, backwards: the layers of each direction.

    Raises:
        ConfigError: the spelling of the tokens is not known.

    >>> vocabulary = Vocabulary(size=3, spellings=(b"a", b"so", b"it"))
    >>> encoder = ElmoEncoder(Config(dim=4, cell=8, filters=(2, 2)), vocabulary)
    >>> features = encoder({"tokens": torch.tensor([[0, 2, 1]])})
    >>> features.last.shape, len(features.hidden)
    (torch.Size([1, 3, 8]), 3)
    """

    reads = ("text",)

    def __init__(self, config: Config, spec: Vocabulary):
        super().__init__()
        if len(spec.spellings) != spec.size:
            raise ConfigError(
                f"elmo reads the letters of every token, and the vocabulary has {spec.size} tokens "
                f"with {len(spec.spellings)} spellings; take it from a tokenizer"
            )
        self.config, self.spec = config, spec
        self.dim, self.num_layers = 2 * config.dim, config.layers
        self.embedding = SpelledEmbedding(config, spec)
        self.forwards, self.backwards = (
            nn.ModuleList(Layer(config, config.residual and n > 0) for n in range(config.layers))
            for _ in range(2)
        )
        self.dropout = Dropout(config.dropout)

    def forward(self, batch: Batch) -> Features:
        """Encodes one batch."""
        words = self.embedding(batch["tokens"])  # (batch, time, dim)
        real = batch.get("mask")
        mask = torch.ones_like(batch["tokens"], dtype=torch.bool) if real is None else real
        runs = documents_apart(mask, batch.get("documents"))
        turned = turned_around(runs.real)
        ahead = words.flatten(0, 1)[runs.source]  # (run, place, dim)
        back = rearranged(ahead, turned)
        hidden = [torch.cat([words, words], -1)]
        for forwards, backwards in zip(self.forwards, self.backwards, strict=True):
            ahead, back = forwards(ahead), backwards(back)
            both = torch.cat([ahead, rearranged(back, turned)], -1)  # (run, place, 2 dim)
            hidden.append(both.flatten(0, 1)[runs.home])  # (batch, time, 2 dim)
        return Features(tuple(hidden), mask, masked_mean(hidden[-1], mask))


class Runs(NamedTuple):
    """The documents of a batch as rows of their own, padded at their ends."""

    source: Int[Tensor, "run place"]  # where it stands in the flattened batch
    real: Bool[Tensor, "run place"]
    home: Int[Tensor, "batch time"]  # where a position stands in the flattened runs; padding: 0


def documents_apart(
    mask: Bool[Tensor, "batch time"], documents: Int[Tensor, "batch time"] | None
) -> Runs:
    """Takes packed rows apart.

    >>> runs = documents_apart(torch.ones(1, 3, dtype=torch.bool), torch.tensor([[0, 0, 1]]))
    >>> runs.source.tolist(), runs.real.tolist(), runs.home.tolist()
    ([[0, 1], [2, 0]], [[True, True], [True, False]], [[0, 1, 2]])
    """
    begins = torch.zeros_like(mask)
    begins[:, 0] = True
    if documents is not None:
        begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    number = begins.flatten().cumsum(0).view_as(mask) - 1  # of its run
    place = torch.where(mask, document_positions(mask, documents), 0)
    longest = int(place.max()) + 1
    home = torch.where(mask, number * longest + place, 0)
    source = home.new_zeros(int(number[-1, -1]) + 1, longest)
    real = torch.zeros_like(source, dtype=torch.bool)
    source.view(-1)[home[mask]] = mask.flatten().nonzero().squeeze(1)
    real.view(-1)[home[mask]] = True
    return Runs(source, real, home)
