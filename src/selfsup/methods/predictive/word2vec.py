"""word2vec: skip-gram and continuous bag of words (CBOW), with negative sampling.

Mikolov, Chen, Corrado and Dean, "Efficient Estimation of Word Representations in Vector Space"
(2013, arXiv 1301.3781), and Mikolov, Sutskever, Chen, Corrado and Dean, "Distributed
Representations of Words and Phrases and their Compositionality" (2013, arXiv 1310.4546). A word's
vector predicts the words around it (skip-gram), or the mean of the vectors around a place predicts
the word there (CBOW). Predicting means telling the true word from a few words drawn by chance.

Every word has two vectors: one in the encoder's table, which is what is learned, and one in an
output table that is left behind. Frequent words are dropped at random before the windows are laid,
so windows reach further across them; words closer to the centre are taken more often. As in the
authors' code, a negative that is the true word itself does not count.

Axes: batch, time; word (the kept words of all rows in one line), side (a place beside a word: twice
the window), pair (a prediction: a pair of words, in CBOW a whole window), negative, dim.

Deviations from the papers:
- The loss is a mean over the pairs of a batch, for the toolkit's optimizer, where the authors take
  a step of plain gradient descent for every pair.
- A window ends where its row ends, and does not cross from one document into the next.
- Words are tokens: a rare word that the tokenizer cuts into pieces has no vector of its own.

Reference result: none is recorded yet. Recipe: skip-gram-english.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from selfsup.batch import Batch, Vocabulary
from selfsup.errors import ConfigError, DataError
from selfsup.models.bag import BagEncoder
from selfsup.models.encoder import Encoder, masked_mean
from selfsup.objective import Objective, Output

NOISE_POWER = 0.75  # of the counts, for the negatives (1310.4546, section 2.2)


@dataclass(frozen=True, kw_only=True)
class Config:
    """What predicts what, and against how many negatives."""

    architecture: Literal["skip_gram", "cbow"] = "skip_gram"
    """skip_gram: the centre predicts each word around it; cbow: their mean predicts the centre."""
    window: int = 5
    """Words to either side, at most: each centre draws its own reach from 1 to this."""
    negatives: int = 5
    """Words drawn by chance per pair: 5 to 20 for small data, 2 to 5 for large."""
    subsample: float = 1e-5
    """Share of all words above which a word is dropped at times; 0: none is. 1e-5 is for billions
    of words, 1e-3 (the default of the authors' code) for millions."""

    def __post_init__(self) -> None:
        if min(self.window, self.negatives) < 1:
            raise ValueError(
                f"window and negatives must be at least 1, got {self.window} and {self.negatives}"
            )
        if not 0 <= self.subsample <= 1:
            raise ValueError(f"subsample must lie between 0 and 1, got {self.subsample}")


def keep_probability(
    counts: Int[Tensor, " vocabulary"], threshold: float
) -> Float[Tensor, " vocabulary"]:
    """How likely each word stays: min(1, sqrt(threshold / its share)), 1310.4546, equation 5.

    Args:
        counts: how often each word occurs.
        threshold: words with a smaller share always stay; 0: all do.
    """
    if threshold == 0:
        return torch.ones_like(counts, dtype=torch.float32)
    share = counts.float() / counts.sum()
    return (threshold / share).sqrt().clamp(max=1)  # infinite, so 1, for words that never occur


def neighbours(
    text: Int[Tensor, " word"], reach: Int[Tensor, " word"], window: int
) -> tuple[Int[Tensor, "word side"], Bool[Tensor, "word side"]]:
    """The places around every word, and which of them belong to its window.

    Args:
        text: number of the text that each word stands in; a window stays inside one.
        reach: how many words to either side each centre looks, at most `window`.
        window: half the number of sides.

    >>> place, real = neighbours(torch.tensor([0, 0, 0, 1]), torch.tensor([1, 1, 2, 1]), window=2)
    >>> [p[r].tolist() for p, r in zip(place, real)]
    [[1], [0, 2], [0, 1], []]
    """
    offset = torch.arange(-window, window + 1, device=text.device)
    offset = offset[offset != 0]  # (side,)
    place = torch.arange(len(text), device=text.device).unsqueeze(1) + offset  # (word, side)
    inside = (place >= 0) & (place < len(text))
    place = place.clamp(0, max(len(text) - 1, 0))
    real = inside & (text[place] == text.unsqueeze(1)) & (offset.abs() <= reach.unsqueeze(1))
    return place, real


def negative_sampling_loss(
    vectors: Float[Tensor, "pair dim"],
    output: Float[Tensor, "vocabulary dim"],
    target: Int[Tensor, " pair"],
    negatives: Int[Tensor, "pair negative"],
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Mean over pairs of 1310.4546, equation 4, negated (nats), and the accuracy; in float32.

    Args:
        vectors: what predicts.
        output: output vector of every word.
        target: the true words.
        negatives: the words drawn by chance; one that equals the true word does not count.

    Returns:
        the loss, and the share of pairs whose true word scores above all negatives; 0 of no pairs.
    """
    candidates = torch.cat([target.unsqueeze(1), negatives], 1)  # (pair, 1 + negative)
    with torch.autocast(vectors.device.type, enabled=False):  # it would round the products
        score = torch.bmm(F.embedding(candidates, output), vectors.unsqueeze(-1)).squeeze(-1)
    true, false = score[:, 0], score[:, 1:]
    clash = negatives == target.unsqueeze(1)
    against = F.logsigmoid(-false).masked_fill(clash, 0.0).sum(1)  # (pair,)
    beaten = (true.unsqueeze(1) > false) | clash
    total = max(len(target), 1)
    loss = -(F.logsigmoid(true) + against).sum() / total
    return loss, beaten.all(1).sum() / total


@final
class Word2Vec(Objective):
    """Learns a vector for every word; see the module's docstring.

    Raises:
        ConfigError: the encoder is more than a table of word vectors.
    """

    fields: tuple[str, ...] = ("tokens",)
    refresh_every = 0
    encoder: BagEncoder
    counts: Tensor  # (vocabulary,) int64, 0 for special tokens; all alike until `refresh`

    def __init__(self, config: Config, encoder: Encoder, vocabulary: Vocabulary):
        super().__init__()
        if not isinstance(encoder, BagEncoder):
            raise ConfigError("word2vec trains a table of word vectors: use model.name = 'bag'")
        self.config, self.encoder, self.vocabulary = config, encoder, vocabulary
        self.output = nn.Embedding(vocabulary.size, encoder.dim)
        nn.init.zeros_(self.output.weight)  # as in the authors' code
        self.register_buffer("counts", (~encoder.special).long())

    @torch.no_grad()
    def refresh(self, batches: Iterable[Batch], generator: torch.Generator) -> None:
        """Counts the words, once, before the first step.

        Raises:
            DataError: there is none: every token is a special one.
        """
        counts = torch.zeros_like(self.counts)
        for batch in batches:
            words = batch["tokens"][self._words(batch)]
            counts += words.bincount(minlength=len(counts))
        if not counts.any():
            raise DataError("the text holds no word that the tokenizer knows, only special tokens")
        self.counts.copy_(counts)

    def loss(self, batch: Batch, generator: torch.Generator) -> Output:
        """Drops frequent words, lays windows, draws negatives, compares."""
        words, text = self._subsampled(batch, generator)
        window, device = self.config.window, words.device
        reach = torch.randint(1, window + 1, words.shape, generator=generator, device=device)
        place, real = neighbours(text, reach, window)
        table = self.encoder.embedding.tokens
        if self.config.architecture == "skip_gram":
            centre, side = real.nonzero(as_tuple=True)  # (pair,) each
            vectors, target = table(words[centre]), words[place[centre, side]]
        else:
            used = real.any(1)
            vectors, target = masked_mean(table(words[place[used]]), real[used]), words[used]
        negatives = self._negatives(len(target), generator)
        loss, accuracy = negative_sampling_loss(vectors, self.output.weight, target, negatives)
        return Output(loss, len(target), {"accuracy": accuracy})

    def _words(self, batch: Batch) -> Bool[Tensor, "batch time"]:
        """True where a token is neither padding nor special."""
        words = ~self.encoder.special[batch["tokens"]]
        return words & batch["mask"] if "mask" in batch else words

    def _subsampled(
        self, batch: Batch, generator: torch.Generator
    ) -> tuple[Int[Tensor, " word"], Int[Tensor, " word"]]:
        """The words that stay, row after row, and the number of the text that each stands in."""
        tokens = batch["tokens"]
        likely = keep_probability(self.counts, self.config.subsample)[tokens]  # (batch, time)
        draw = torch.rand(tokens.shape, generator=generator, device=tokens.device)
        kept = self._words(batch) & (draw < likely)
        text = torch.arange(len(tokens), device=tokens.device).unsqueeze(1).expand_as(tokens)
        if "documents" in batch:  # numbered anew in each row, below its length
            text = text * tokens.shape[1] + batch["documents"]
        return tokens[kept], text[kept]

    def _negatives(
        self, num_pairs: int, generator: torch.Generator
    ) -> Int[Tensor, "pair negative"]:
        """Words drawn in proportion to their counts to the power of 0.75."""
        num_draws = num_pairs * self.config.negatives
        noise = self.counts.float() ** NOISE_POWER
        # the library draws at least one
        drawn = noise.multinomial(max(num_draws, 1), replacement=True, generator=generator)
        return drawn[:num_draws].view(num_pairs, self.config.negatives)
