"""Masked language modelling, with next-sentence or sentence-order prediction: BERT and its heirs.

Devlin, Chang, Lee and Toutanova, "BERT: Pre-training of Deep Bidirectional Transformers for
Language Understanding" (2018, arXiv 1810.04805). Some tokens of a text are chosen; most of them
are replaced by [MASK], some by a random token, some are kept; the model predicts the original at
those positions from both sides. Masks are drawn anew each time a row is seen, as in RoBERTa (Liu
et al. 2019, arXiv 1907.11692).

Sentence objectives, added to the masked loss: `nsp` (BERT): did B follow A, or come from another
document; `sop` (ALBERT, Lan et al. 2019, arXiv 1909.11942): are A and B in their order, or swapped.

Axes: batch, time, slot (a position that may be chosen), vocabulary, dim.

Deviations from the papers:
- Each row has exactly round(mask_rate * its ordinary tokens) chosen tokens, so that the vocabulary
  projection, which runs at chosen positions only, has a fixed shape: no wait for the device.
- The negative B of `nsp` comes from another row of the batch.
- Random replacements are drawn from the ordinary tokens, never a special one.
- Under gradient accumulation the sentence loss weighs by masked tokens, not by rows.

Reference results: docs/results/demo.json and bert-mini-english.json, with their commands.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from selfsup.batch import Batch, Vocabulary
from selfsup.errors import ConfigError
from selfsup.methods.ops import penalised
from selfsup.methods.surprisal import mean_surprisal
from selfsup.models.transformer import TransformerEncoder
from selfsup.models.vocabulary_head import VocabularyHead
from selfsup.objective import Objective, Output


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is hidden, and what is asked about sentences. Defaults are BERT's."""

    mask_rate: float = 0.15
    """Share of ordinary tokens that are predicted."""
    final_mask_rate: float | None = None
    """Mask rate at the end, reached linearly (GPT-BERT: 0.3 to 0.15); None: constant."""
    mask_share: float = 0.8
    """Share of chosen tokens that become [MASK]."""
    random_share: float = 0.1
    """Share of chosen tokens that become a random token; the rest stays as it is."""
    whole_word: bool = False
    """Choose whole words instead of single tokens."""
    sentence: Literal["none", "nsp", "sop"] = "none"
    """Sentence objective; needs data.rows = 'pairs'."""
    head: Literal["bert", "tied"] = "bert"
    """bert: dense, activation, norm, tied projection with bias; tied: the projection alone."""

    def __post_init__(self) -> None:
        rates = {"mask_rate": self.mask_rate, "final_mask_rate": self.final_mask_rate}
        for name, rate in rates.items():
            if rate is not None and not 0 < rate < 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {rate}")
        if min(self.mask_share, self.random_share) < 0 or self.mask_share + self.random_share > 1:
            raise ValueError("mask_share and random_share must be shares that sum to at most 1")


class Chosen(NamedTuple):
    """Positions to predict, in a fixed number of slots per row."""

    positions: Int[Tensor, "batch slot"]
    real: Bool[Tensor, "batch slot"]  # False: a slot that this row does not use


def choose(
    maskable: Bool[Tensor, "batch time"],
    rate: float,
    generator: torch.Generator,
    continues: Bool[Tensor, "batch time"] | None = None,
) -> Chosen:
    """Draws the positions to predict: round(rate * maskable) per row, at least one if there is any.

    Args:
        maskable: True at ordinary tokens; special and padded ones are never chosen.
        rate: share of maskable positions.
        generator: source of randomness, on the device of `maskable`.
        continues: True where a token goes on with the word before it. Then whole words are taken,
            in random order, as long as they fit into the number of tokens; the first drawn word is
            always begun.
    """
    num_slots = max(1, math.ceil(rate * maskable.shape[1]))
    budget = (maskable.sum(1, keepdim=True) * rate).round().clamp(min=1)  # (batch, 1)
    key = torch.rand(maskable.shape, generator=generator, device=maskable.device)
    if continues is None:
        key = key.masked_fill(~maskable, 2.0)
        drawn = key.topk(num_slots, dim=1, largest=False)
        rank = torch.arange(num_slots, device=key.device)
        return Chosen(drawn.indices, (rank < budget) & (drawn.values < 2.0))
    begins = F.pad(~continues[:, 1:], (1, 0), value=True)  # a row may begin inside a word
    word = begins.cumsum(1) - 1  # number of the word in its row
    key = key.gather(1, word).masked_fill(~maskable, 2.0)  # one key per word
    order = key.argsort(dim=1, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    size = torch.zeros_like(word).scatter_add_(1, word, maskable.long()).gather(1, word)
    begin = torch.full_like(word, key.shape[1])
    begin = begin.scatter_reduce(1, word, rank, "amin").gather(1, word)
    fits = (begin + size <= budget) | (begin == 0)
    taken = (fits & (rank < budget) & maskable).gather(1, order)[:, :num_slots]
    return Chosen(order[:, :num_slots], taken)


def corrupt(
    tokens: Int[Tensor, "batch time"],
    chosen: Chosen,
    config: Config,
    mask_id: int,
    ordinary: Int[Tensor, " ordinary"],
    generator: torch.Generator,
) -> Int[Tensor, "batch time"]:
    """The tokens with chosen ones masked, replaced or kept (BERT, section 3.1)."""
    original = tokens.gather(1, chosen.positions)  # (batch, slot)
    draw = torch.rand(original.shape, generator=generator, device=tokens.device)
    pick = torch.randint(len(ordinary), original.shape, generator=generator, device=tokens.device)
    replaced = torch.where(draw < config.mask_share + config.random_share, ordinary[pick], original)
    replaced = torch.where(draw < config.mask_share, mask_id, replaced)
    return tokens.scatter(1, chosen.positions, torch.where(chosen.real, replaced, original))


def rearrange_pairs(
    batch: Batch,
    swap: Bool[Tensor, " batch"],
    partner: Int[Tensor, " batch"],
    vocabulary: Vocabulary,
) -> Batch:
    """Builds [CLS] first [SEP] second [SEP] rows anew.

    Args:
        batch: rows [CLS] A [SEP] B [SEP] with `segments`, padded at the end.
        swap: rows whose sentences change places.
        partner: the row that B is taken from, cut at its end where the new row would be longer
            than the longest of the batch; a row's own number leaves it alone.
        vocabulary: ids of the special tokens.
    """
    tokens, segments = batch["tokens"], batch["segments"]
    real = batch.get("mask", torch.ones_like(tokens, dtype=torch.bool))
    length_a = (real & (segments == 0)).sum(1) - 2  # without [CLS] and [SEP]
    own_length_b = (real & (segments == 1)).sum(1) - 1
    row = torch.arange(len(tokens), device=tokens.device)
    room = real.sum(1).max() - 3 - length_a  # a borrowed B may be longer than the own one
    length_b = torch.minimum(own_length_b[partner], room)
    first = torch.where(swap, length_b, length_a).unsqueeze(1)  # (batch, 1)
    second = torch.where(swap, length_a, length_b).unsqueeze(1)
    time = torch.arange(int((first + second).max()) + 3, device=tokens.device).unsqueeze(0)
    in_first = (time >= 1) & (time <= first)
    in_second = (time >= first + 2) & (time <= first + second + 1)
    from_b = (in_first & swap.unsqueeze(1)) | (in_second & ~swap.unsqueeze(1))
    offset = torch.where(in_first, time - 1, time - first - 2)
    start = torch.where(from_b, length_a[partner].unsqueeze(1) + 2, 1)
    source_row = torch.where(from_b, partner.unsqueeze(1), row.unsqueeze(1))
    column = (start + offset).clamp(0, tokens.shape[1] - 1)
    out = tokens[source_row, column]
    end = first + second + 2
    out = torch.where((time == first + 1) | (time == end), vocabulary.sep, out)
    out = torch.where(time == 0, vocabulary.cls, out)
    mask = time <= end
    return {
        **batch,
        "tokens": torch.where(mask, out, vocabulary.pad),
        "segments": ((time > first + 1) & mask).long(),
        "mask": mask,
    }


@final
class MaskedLanguage(Objective):
    """Predicts hidden tokens; see the module's docstring.

    Raises:
        ConfigError: the vocabulary has no mask token, or the encoder sees one side only.
    """

    fields: tuple[str, ...] = ("tokens",)
    kept = ("encoder", "head", "sentence_head")
    adds_penalty = True
    encoder: TransformerEncoder
    ordinary: Tensor  # ids that may be predicted or drawn
    special: Tensor  # (vocabulary,) bool
    continues: Tensor  # (vocabulary,) bool
    mask_rate: Tensor  # where a moving rate stands

    def __init__(self, config: Config, encoder: TransformerEncoder, vocabulary: Vocabulary):
        super().__init__()
        if vocabulary.mask < 0:
            raise ConfigError("masked_language needs a tokenizer with a mask token (style 'bert')")
        if encoder.config.causal:
            raise ConfigError(
                "masked_language needs model.causal = false: it predicts from both sides"
            )
        self.config, self.encoder, self.vocabulary = config, encoder, vocabulary
        self.head = VocabularyHead(encoder, transform=config.head == "bert")
        paired = config.sentence != "none"
        self.sentence_head = nn.Linear(encoder.dim, 2) if paired else nn.Identity()
        self.fields = ("tokens", "segments") if paired else ("tokens",)
        if vocabulary.unigram_entropy:
            self.chance_loss = vocabulary.unigram_entropy + (math.log(2) if paired else 0.0)
        special = set(vocabulary.special)
        ordinary = torch.tensor([i for i in range(vocabulary.size) if i not in special])
        continues = torch.zeros(vocabulary.size, dtype=torch.bool)
        continues[list(vocabulary.continues)] = True
        self.register_buffer("ordinary", ordinary, persistent=False)
        self.register_buffer("continues", continues, persistent=False)
        is_special = torch.ones(vocabulary.size, dtype=torch.bool)
        is_special[ordinary] = False
        self.register_buffer("special", is_special, persistent=False)
        self.register_buffer("mask_rate", torch.tensor(config.mask_rate, dtype=torch.float64))

    def loss(self, batch: Batch, generator: torch.Generator) -> Output:
        """Corrupts, encodes, predicts, compares."""
        label = None
        if self.config.sentence != "none":
            batch, label = self._make_pairs(batch, generator)
        tokens = batch["tokens"]
        maskable = ~self.special[tokens]
        if "mask" in batch:
            maskable = maskable & batch["mask"]
        continues = self.continues[tokens] if self.config.whole_word else None
        # only a moving rate is read from its buffer: on a GPU that waits for the device
        moving = self.config.final_mask_rate is not None
        rate = self.mask_rate.item() if moving else self.config.mask_rate
        chosen = choose(maskable, rate, generator, continues)
        corrupted = corrupt(
            tokens, chosen, self.config, self.vocabulary.mask, self.ordinary, generator
        )
        batch = {**batch, "tokens": corrupted}
        if label is None:
            features = self.encoder(batch, slots=chosen.positions)
            hidden = features.last  # (batch, slot, dim)
        else:  # reads `pooled` as well
            features = self.encoder(batch)
            hidden = features.last.take_along_dim(chosen.positions.unsqueeze(2), 1)
        loss, accuracy = mean_surprisal(
            self.head.project(hidden, self.encoder.embedding),
            tokens.gather(1, chosen.positions),
            chosen.real,
        )
        metrics = {"mlm_loss": loss, "mlm_accuracy": accuracy}
        if label is not None:
            answer = self.sentence_head(features.pooled).float()
            sentence_loss = F.cross_entropy(answer, label)
            metrics["sentence_loss"] = sentence_loss
            metrics["sentence_accuracy"] = (answer.argmax(-1) == label).float().mean()
            loss = loss + sentence_loss
        return penalised(Output(loss, chosen.real.sum(), metrics), features)

    def after_step(self, step: int, total: int) -> None:
        """Moves the mask rate towards its final value."""
        if self.config.final_mask_rate is not None:
            through = min(1.0, (step + 1) / total)
            start, end = self.config.mask_rate, self.config.final_mask_rate
            self.mask_rate.fill_(start + (end - start) * through)

    def _make_pairs(self, batch: Batch, generator: torch.Generator) -> tuple[Batch, Tensor]:
        """Half of the rows become negative; label 1 is the original text (nsp: is next)."""
        size, device = len(batch["tokens"]), batch["tokens"].device
        if self.config.sentence == "nsp" and size < 2:
            raise ConfigError("nsp takes its negatives from the batch: training.batch_size >= 2")
        negative = torch.rand(size, generator=generator, device=device) < 0.5
        row = torch.arange(size, device=device)
        nothing = torch.zeros_like(negative)
        if self.config.sentence == "sop":
            return rearrange_pairs(batch, negative, row, self.vocabulary), (~negative).long()
        shift = torch.randint(1, size, (size,), generator=generator, device=device)
        partner = torch.where(negative, (row + shift) % size, row)
        return rearrange_pairs(batch, nothing, partner, self.vocabulary), (~negative).long()

    @torch.no_grad()
    def fill(self, batch: Batch) -> Float[Tensor, "blank vocabulary"]:
        """Log-probabilities of every token at every [MASK], in reading order, float32."""
        hidden = self.encoder(batch).last[batch["tokens"] == self.vocabulary.mask]
        return self.head(hidden, self.encoder.embedding).float().log_softmax(-1)
