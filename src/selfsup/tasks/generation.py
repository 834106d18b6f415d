"""A text for a text: translation, summaries, answers in words.

An encoder-decoder (Vaswani et al. 2017, arXiv 1706.03762) reads the source and learns each token of
the target from the right ones before it; its decoder comes with the encoder, so a pre-trained one
is there already. A causal stack reads source and target as one row, source [SEP] target [SEP], and
learns the target alone (Radford et al. 2018, without their second objective). With a prefix before
each source one model does several tasks (T5, Raffel et al. 2019, arXiv 1910.10683).

Axes: batch; source: tokens read; time: tokens of a target; items: real ones of all targets;
vocabulary.
"""

from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from selfsup.batch import Batch
from selfsup.errors import ConfigError
from selfsup.models.decoding import (
    CausalWriter,
    DecoderWriter,
    Rules,
    Writer,
    beam_search,
    last_real,
    never_written,
    sample,
)
from selfsup.models.encoder import Encoder
from selfsup.models.encoder_decoder import EncoderDecoder
from selfsup.models.transformer import TransformerEncoder
from selfsup.models.vocabulary_head import VocabularyHead
from selfsup.objective import Output, Predictions, Task

IGNORED = -100
"""The label of a position that is not scored."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """How targets are learned and written."""

    label_smoothing: float = 0.1
    """Share of each target's probability that is spread over all tokens (Vaswani et al.)."""
    max_target: int = 128
    """Most tokens in a target, the end included; longer ones are cut, and none is written."""
    prefix: str = ""
    """Stands before each source as it is: "translate English to German: "."""
    num_beams: int = 4
    """Beginnings that beam search follows; 1: the likeliest token each time."""
    length_penalty: float = 1.0
    """Power of the length that log-probabilities are divided by; more prefers long texts."""
    no_repeat: int = 0
    """No sequence of so many tokens is written twice; 0: all may be."""

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {self.label_smoothing}")
        for name, least in (("max_target", 3), ("num_beams", 1), ("no_repeat", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")


def generation_loss(
    logits: Float[Tensor, "items vocabulary"], target: Int[Tensor, " items"], smoothing: float
) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, ""]]:
    """Smoothed cross entropy, plain cross entropy (nats) and accuracy, means in float32.

    The smoothed one is held against (1 - smoothing) * target + smoothing / vocabulary.
    """
    count = max(1, len(target))
    log_share = logits.float().log_softmax(-1)  # (items, vocabulary)
    plain = -log_share.gather(1, target.unsqueeze(1)).sum() / count
    spread = -log_share.mean(-1).sum() / count
    hits = (logits.detach().argmax(-1) == target).sum() / count
    return (1 - smoothing) * plain + smoothing * spread, plain.detach(), hits


@final
class Generation(Task):
    """Writes a target for each source.

    Args:
        config: the loss and the search.
        encoder: an encoder-decoder, or a causal transformer.
        names: not used.

    Raises:
        ConfigError: the encoder writes nothing, or not as much as `max_target`.
    """

    fields = ("tokens", "label")
    kept = ("encoder", "head")
    metric = "bleu"
    gives_text = True
    max_watched = 64
    encoder: Any  # an EncoderDecoder, or a TransformerEncoder
    head: Any  # of the latter
    unwritten: Tensor  # (vocabulary,) bool

    def __init__(self, config: Config, encoder: Encoder, names: tuple[str, ...] = ()):
        super().__init__()
        decodes = isinstance(encoder, EncoderDecoder)
        if not decodes and not (isinstance(encoder, TransformerEncoder) and encoder.causal):
            raise ConfigError(
                "generation needs a model that writes: model.name = 'encoder_decoder', or a "
                "transformer with model.causal = true"
            )
        shape = encoder.config
        if shape.positions == "learned" and config.max_target > shape.max_length:
            raise ConfigError(
                f"task.max_target = {config.max_target} is more than the model's "
                f"{shape.max_length} learned positions; set it to at most {shape.max_length}"
            )
        self.config, self.encoder, self.names = config, encoder, names
        self.head = None if decodes else VocabularyHead(self.encoder, transform=False)
        self.row_options = {"max_target": config.max_target, "prefix": config.prefix}
        self.register_buffer("unwritten", never_written(self.encoder.spec), persistent=False)

    def loss(self, batch: Batch, generator: torch.Generator) -> Output:
        """Cross entropy of `label` (batch, time), -100 where padded; `generator` is not used."""
        logits, target = self._told(batch)
        loss, nats, accuracy = generation_loss(logits, target, self.config.label_smoothing)
        return Output(loss, len(target), {"nats": nats, "accuracy": accuracy})

    @torch.no_grad()
    def log_probability(self, batch: Batch) -> Float[Tensor, " batch"]:
        """How likely each whole target is after its source, in nats, float32, without dropout.

        Args:
            batch: `tokens`, `mask` and `label`, as for `loss`.
        """
        training = self.training
        self.eval()
        logits, target = self._told(batch)
        nats = F.cross_entropy(logits.float(), target, reduction="none")  # (items,)
        self.train(training)
        row = (batch["label"] != IGNORED).nonzero()[:, 0]  # (items,)
        return nats.new_zeros(len(batch["label"])).index_add(0, row, -nats)

    def _told(
        self, batch: Batch
    ) -> tuple[Float[Tensor, "items vocabulary"], Int[Tensor, " items"]]:
        """What the model says of every token of the targets, and these tokens."""
        label = batch["label"]
        real = label != IGNORED
        if isinstance(self.encoder, EncoderDecoder):
            hidden = self._decoded(batch, label.where(real, 0), real)
        else:
            hidden = self._continued(batch, label.where(real, 0), real)
        return self._logits(hidden[real]), label[real]

    def _decoded(
        self, batch: Batch, target: Int[Tensor, "batch time"], real: Bool[Tensor, "batch time"]
    ) -> Float[Tensor, "batch time dim"]:
        """Hidden states from which the decoder tells each token of the target."""
        return self.encoder.decode(self.encoder.shifted(target), self.encoder(batch), real).last

    def _continued(
        self, batch: Batch, target: Int[Tensor, "batch time"], real: Bool[Tensor, "batch time"]
    ) -> Float[Tensor, "batch time dim"]:
        """Likewise from one row: the source's last token tells the first of the target."""
        source = batch["tokens"]
        mask = batch.get("mask", torch.ones_like(source, dtype=torch.bool))
        row = {
            "tokens": torch.cat((source, target[:, :-1]), 1),
            "mask": torch.cat((mask, real[:, :-1]), 1),
        }
        features = self.encoder(row)
        of_source = features._replace(hidden=(features.last[:, : source.shape[1]],), mask=mask)
        first = last_real(of_source).unsqueeze(1)  # (batch, 1, dim)
        return torch.cat((first, features.last[:, source.shape[1] :]), 1)

    def _logits(self, hidden: Float[Tensor, "items dim"]) -> Float[Tensor, "items vocabulary"]:
        if self.head is None:
            return self.encoder.logits(hidden)
        return self.head(hidden, self.encoder.embedding)

    @torch.no_grad()
    def predict(self, batch: Batch) -> Predictions:
        """The written texts, without dropout.

        Returns:
            values: (batch, max_target) int64 token ids, padded behind the end.
            scores: the same.
        """
        training = self.training
        self.eval()
        rules = Rules.of(self.encoder.spec, self.config.max_target, self.config.no_repeat)
        if self.config.num_beams == 1:
            written = sample(self._writer(batch), rules)
        else:
            written = beam_search(
                self._writer(batch),
                rules,
                self.config.num_beams,
                length_penalty=self.config.length_penalty,
            ).tokens[:, 0]
        self.train(training)
        return Predictions(written, written)

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
        """Draws an answer to each source; arguments as in `causal_language`."""
        rules = Rules.of(self.encoder.spec, num_tokens, self.config.no_repeat)
        writer = self._writer(batch)
        return sample(writer, rules, generator, temperature=temperature, top_k=top_k, top_p=top_p)

    def _writer(self, batch: Batch) -> Writer:
        if isinstance(self.encoder, EncoderDecoder):
            return DecoderWriter(self.encoder, self.encoder(batch), self.unwritten)
        prompts: Batch = {name: batch[name] for name in ("tokens", "mask") if name in batch}
        return CausalWriter(self.encoder, self.head, prompts, self.unwritten)
