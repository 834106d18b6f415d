"""Denoising: an encoder-decoder reads a corrupted text and writes the original (BART, T5, MASS).

Lewis et al., "BART: Denoising Sequence-to-Sequence Pre-training for Natural Language Generation,
Translation, and Comprehension" (2019, arXiv 1910.13461); Raffel et al., "Exploring the Limits of
Transfer Learning with a Unified Text-to-Text Transformer" (2019, arXiv 1910.10683); Song et al.,
"MASS: Masked Sequence to Sequence Pre-training for Language Generation" (2019, arXiv 1905.02450).
The encoder sees a row after one or several corruptions; the decoder is shown the target up to each
token and predicts it. The corruptions alone make the three methods (`corruptions.py`):

| method | corruptions                                  | rate | target                          |
|--------|----------------------------------------------|------|---------------------------------|
| BART   | `sentence_permutation`, `text_infilling`     | 0.3  | the whole row                   |
| T5     | `sentinel_spans`                             | 0.15 | the hidden spans                |
| MASS   | `mass_spans`                                 | 0.5  | the fragment, in its place      |

Axes: batch; time: tokens of a row; written: tokens of a target; vocabulary.

Deviations from the papers:
- A packed row is one text here, also where it holds several documents: attention goes across.
- Targets end with the separator, which is a target too. Those of MASS end where the fragment does.
- What the corruptions do differently stands in `corruptions.py`.

Reference result: none is recorded yet.
"""

from dataclasses import dataclass
from typing import Literal, final

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from selfsup.batch import Batch, Vocabulary
from selfsup.errors import ConfigError
from selfsup.methods.generative import corruptions
from selfsup.methods.generative.corruptions import Pair, Rows
from selfsup.methods.ops import penalised
from selfsup.methods.surprisal import mean_surprisal
from selfsup.models.decoding import DecoderWriter, Rules, sample
from selfsup.models.encoder import Encoder
from selfsup.models.encoder_decoder import EncoderDecoder
from selfsup.objective import Objective, Output

# Shares of tokens as published; BART's paper names none but that of its final model.
RATES = {
    "token_mask": 0.15,
    "token_deletion": 0.15,
    "text_infilling": 0.3,
    "sentinel_spans": 0.15,
    "mass_spans": 0.5,
}
MASKS = ("token_mask", "text_infilling", "mass_spans")
LAST = ("sentinel_spans", "mass_spans")  # they make a target of their own


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is done to a text before it is read. Defaults are those of BART's final model."""

    corruptions: tuple[
        Literal[
            "token_mask",
            "token_deletion",
            "text_infilling",
            "sentence_permutation",
            "document_rotation",
            "sentinel_spans",
            "mass_spans",
        ],
        ...,
    ] = ("sentence_permutation", "text_infilling")
    """In the order in which they are applied."""
    rate: float | None = None
    """Share of tokens that each of them masks, deletes or hides; None: as published."""
    span: float = 3.0
    """Mean tokens in a span of `text_infilling` and `sentinel_spans`."""
    mask_share: float = 0.8
    """Share of a `mass_spans` fragment that the encoder sees as [MASK]."""
    random_share: float = 0.1
    """Share of it that becomes a random token; the rest stays as it is."""

    def __post_init__(self) -> None:
        if not self.corruptions:
            raise ValueError("corruptions must name at least one")
        if set(self.corruptions[:-1]) & set(LAST):
            raise ValueError(
                "sentinel_spans and mass_spans make the target: each can only be the last of "
                f"corruptions, got {list(self.corruptions)}"
            )
        if self.rate is not None and not 0 < self.rate < 1:
            raise ValueError(f"rate must lie between 0 and 1, got {self.rate}")
        if self.span < 1:
            raise ValueError(f"span must be at least 1, got {self.span}")
        if min(self.mask_share, self.random_share) < 0 or self.mask_share + self.random_share > 1:
            raise ValueError("mask_share and random_share must be shares that sum to at most 1")


def ended(rows: Rows, end: int) -> Rows:
    """The rows with `end` behind them where they do not end with it.

    >>> ended(Rows(torch.tensor([[5, 6]]), torch.ones(1, 2, dtype=torch.bool)), 3).tokens.tolist()
    [[5, 6, 3]]
    """
    length = rows.mask.sum(1, keepdim=True)
    last = rows.tokens.gather(1, (length - 1).clamp(min=0))
    missing = (last != end) | (length == 0)  # (batch, 1)
    slot = torch.arange(rows.tokens.shape[1] + 1, device=rows.tokens.device)
    tokens = F.pad(rows.tokens, (0, 1)).masked_fill(missing & (slot == length), end)
    return Rows(tokens, slot < length + missing)


@final
class Denoising(Objective):
    """Writes what a corrupted text was; see the module's docstring.

    Raises:
        ConfigError: the model has no decoder, or the tokenizer lacks the tokens that the
            corruptions put in.

    >>> from selfsup.models.encoder_decoder import Config as Model
    >>> vocabulary = Vocabulary(size=100, sep=3, mask=4)
    >>> model = EncoderDecoder(Model(dim=8, layers=1, heads=2), vocabulary)
    >>> row = {"tokens": torch.tensor([[5, 7, 12, 8, 9, 3]])}
    >>> int(Denoising(Config(), model, vocabulary).loss(row, torch.Generator()).weight)
    6
    """

    fields = ("tokens",)
    kept = ("encoder",)
    adds_penalty = True
    encoder: EncoderDecoder
    ordinary: Tensor  # ids that may be drawn
    special: Tensor  # (vocabulary,) bool: no text
    ends: Tensor  # (vocabulary,) bool: ends a sentence
    sentinels: Tensor

    def __init__(self, config: Config, encoder: Encoder, vocabulary: Vocabulary):
        super().__init__()
        if not isinstance(encoder, EncoderDecoder):
            raise ConfigError(
                "denoising needs a model that reads and writes: use model.name = 'encoder_decoder'"
            )
        masking = [name for name in config.corruptions if name in MASKS]
        if masking and vocabulary.mask < 0:
            raise ConfigError(
                f"{masking[0]} needs a tokenizer with a mask token (data.tokenizer.style = 'bert')"
            )
        self.config, self.encoder, self.vocabulary = config, encoder, vocabulary
        if "sentinel_spans" in config.corruptions:
            self._check_sentinels(1)
        elif vocabulary.unigram_entropy:
            self.chance_loss = vocabulary.unigram_entropy
        special, ends = torch.zeros(2, vocabulary.size, dtype=torch.bool)
        special[[*vocabulary.special]] = True
        self.register_buffer("ordinary", (~special).nonzero().squeeze(1), persistent=False)
        special[[i for i in (vocabulary.unk,) if i >= 0]] = False
        ends[[*vocabulary.sentence_ends, vocabulary.sep]] = True
        self.register_buffer("special", special, persistent=False)
        self.register_buffer("ends", ends, persistent=False)
        self.register_buffer("sentinels", torch.tensor(vocabulary.sentinels), persistent=False)

    def loss(self, batch: Batch, generator: torch.Generator) -> Output:
        """Corrupts, reads, writes, compares."""
        tokens = batch["tokens"]
        mask = batch.get("mask", torch.ones_like(tokens, dtype=torch.bool))
        source, target, predicted = self.corrupt(corruptions.compacted(tokens, mask), generator)
        read = self.encoder({"tokens": source.tokens, "mask": source.mask})
        known = target.mask & ~predicted  # of MASS: the encoder sees them
        shown = target.tokens.masked_fill(known, self.vocabulary.mask)
        written = self.encoder.decode(self.encoder.shifted(shown), read, target.mask)
        loss, accuracy = mean_surprisal(
            self.encoder.project(written.last), target.tokens, predicted
        )
        return penalised(Output(loss, predicted.sum(), {"accuracy": accuracy}), read, written)

    @torch.no_grad()
    def generate(
        self,
        batch: Batch,
        num_tokens: int,
        generator: torch.Generator,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> Int[Tensor, "batch num_tokens"]:
        """Writes what each text was before it was corrupted, or what the model makes of it.

        Arguments and errors are those of `causal_language`; here special tokens are written, too.
        """
        writer = DecoderWriter(self.encoder, self.encoder(batch))
        rules = Rules.of(self.vocabulary, num_tokens)
        return sample(writer, rules, generator, temperature=temperature, top_k=top_k, top_p=top_p)

    def corrupt(self, rows: Rows, generator: torch.Generator) -> Pair:
        """What the encoder reads of these rows, and what the decoder has to write."""
        target = rows if self.vocabulary.cls >= 0 else ended(rows, self.vocabulary.sep)
        for name in self.config.corruptions:
            rate = self.config.rate or RATES.get(name, 0.0)
            match name:
                case "token_mask":
                    rows = corruptions.token_mask(
                        rows, self.special, self.vocabulary.mask, rate, generator
                    )
                case "token_deletion":
                    rows = corruptions.token_deletion(rows, self.special, rate, generator)
                case "text_infilling":
                    rows = corruptions.text_infilling(
                        *(rows, self.special, self.vocabulary.mask, rate, self.config.span),
                        generator,
                    )
                case "sentence_permutation":
                    rows = corruptions.sentence_permutation(
                        rows, self.special, self.ends, generator
                    )
                case "document_rotation":
                    rows = corruptions.document_rotation(rows, self.special, generator)
                case "sentinel_spans":
                    return self._hide_spans(rows, rate, generator)
                case "mass_spans":
                    shares = self.config.mask_share, self.config.random_share
                    return corruptions.mass_spans(
                        *(rows, self.special, self.vocabulary.mask, self.ordinary, rate, shares),
                        generator,
                    )
        return Pair(rows, target, target.mask)

    def _hide_spans(self, rows: Rows, rate: float, generator: torch.Generator) -> Pair:
        span, time = self.config.span, rows.tokens.shape[1]
        self._check_sentinels(int(corruptions.span_counts(torch.tensor(time), rate, span)[1]))
        end = self.vocabulary.sep
        return corruptions.sentinel_spans(
            rows, self.special, self.sentinels, end, rate, span, generator
        )

    def _check_sentinels(self, needed: int) -> None:
        found = len(self.vocabulary.sentinels)
        if found < needed:
            raise ConfigError(
                f"sentinel_spans needs {needed} sentinels for rows of this length, and the "
                f"tokenizer has {found}: set data.tokenizer.sentinels, or hide fewer spans with "
                "method.rate and method.span"
            )
