"""One class for a whole example, as the word that belongs into a blank.

Pattern-exploiting training (Schick and Schütze, 2020, arXiv 2001.07676, section 3.1): a template
makes a text into a cloze, "{text} It was {label}.", and each class has a word, its verbalizer. The
head of masked language modelling scores the words, so nothing begins from random weights, and few
labels suffice; without any training the answer is zero-shot. With `demonstrations` labelled
examples stand behind the text, drawn several times, and the answers are averaged (LM-BFF: Gao,
Fisch and Chen, 2020, arXiv 2012.15723).

A word's score is its log-probability in the blank. Words of one token are so compared by their
logits, as in the paper. Those of several tokens are read from several blanks at once, and a shorter
word from the first of these; the sum (or mean) of the tokens' log-probabilities is the score.

Axes: batch; rows: batch * draws of demonstrations; time; slots: blanks of a row; classes;
vocabulary.

Deviations: there is no auxiliary language modelling loss. Schick and Schütze (2020, arXiv
2009.07118) fill the blanks of a longer word one after another when they predict; here they are
read at once, as they do in training, and the loss is the cross entropy of all classes, not a hinge
loss. A pair is one text to the model, without segments. Gao et al. demonstrate with the
examples that are most like the text; here all are drawn alike.
"""

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from selfsup.batch import Batch
from selfsup.data import templates
from selfsup.errors import ConfigError
from selfsup.models.encoder import Encoder
from selfsup.models.transformer import TransformerEncoder
from selfsup.models.vocabulary_head import VocabularyHead
from selfsup.objective import FillsBlanks, Objective, Output, Predictions, Task
from selfsup.tasks.classification import classification_loss


@dataclass(frozen=True, kw_only=True)
class Config:
    """The template, and how words are scored."""

    template: str = ""
    """A named template or a text file; kept is its text."""
    several_tokens: Literal["sum", "mean", "refuse"] = "sum"
    """What the log-probabilities of a word's tokens come to; refuse: words are single tokens."""
    demonstrations: int = 0
    """How many times labelled examples, one of each class, are drawn to stand behind a text."""
    pool: tuple[str, ...] = ()
    """What they are drawn from, each a JSON list of label and text: the training examples."""
    head: Literal["bert", "tied"] = "bert"
    """As in masked_language; taken from the pre-trained run."""
    predicts_next: bool = False
    """Whether a blank is told one position to its left (gpt_bert); taken from the run."""

    def __post_init__(self) -> None:
        if self.demonstrations < 0:
            raise ValueError(f"demonstrations must not be negative, got {self.demonstrations}")
        if not self.template:
            raise ConfigError(
                "cloze needs a template: task.template = a name of `selfsup list templates`, or a "
                "text file"
            )
        text, name = self.template, "the template"
        if "\n" not in text:
            text, name = templates.text_of(text), text
        if templates.parse(text, name, cloze=True).reasons:
            raise ValueError(f"{name}: a blank takes no {{reasoning}}; leave that place out")
        object.__setattr__(self, "template", text)


def verbalizer_scores(
    log_probabilities: Float[Tensor, "rows slots vocabulary"],
    verbalizers: Int[Tensor, "classes slots"],
    mean: bool = False,
) -> Float[Tensor, "rows classes"]:
    """The log-probability (nats) of each word, its token j in blank j.

    Args:
        log_probabilities: of every token in every blank.
        verbalizers: ids of the words, -1 behind the end of a shorter one.
        mean: divide by the number of a word's tokens.
    """
    slot, real = torch.arange(verbalizers.shape[1], device=verbalizers.device), verbalizers >= 0
    chosen = log_probabilities[:, slot, verbalizers.clamp(min=0)]  # (rows, classes, slots)
    total = torch.where(real, chosen, 0.0).sum(-1)
    return total / real.sum(-1) if mean else total


@final
class Cloze(Task):
    """Classes as words in a blank.

    Args:
        config: template and scores.
        encoder: a bidirectional transformer of text with a mask token.
        names: the classes, in the order of their numbers.

    Raises:
        ConfigError: the encoder cannot fill blanks.
    """

    fields = ("tokens", "verbalizers", "label")
    kept = ("encoder", "head")
    metric = "accuracy"
    own_rows = True
    encoder: Any  # a TransformerEncoder

    def __init__(self, config: Config, encoder: Encoder, names: tuple[str, ...]):
        super().__init__()
        fits = isinstance(encoder, TransformerEncoder) and not encoder.causal
        if not fits or getattr(encoder.spec, "mask", -1) < 0:
            raise ConfigError(
                "cloze fills a blank from both sides: it needs a masked_language or gpt_bert run "
                "with a transformer, and a tokenizer with a mask token (style 'bert')"
            )
        self.config, self.encoder, self.names = config, encoder, names
        self.head = VocabularyHead(self.encoder, transform=config.head == "bert")

    @property
    def row_options(self) -> dict[str, Any]:  # type: ignore[override]
        """What the data set is told."""
        return {
            "template": self.config.template,
            "several_tokens": self.config.several_tokens,
            "pool": self.config.pool,
            "draws": self.config.demonstrations,
        }

    def begin(self, method: Objective | None, items: Sequence[Any], labels: Sequence[str]) -> None:
        """Before training: takes a pre-trained head, and the examples that demonstrate.

        Args:
            method: of the run that the encoder is from; None: the head stays untrained.
            items, labels: the training examples.

        Raises:
            ConfigError: the method has no head of masked language modelling.
        """
        if method is not None:
            head = getattr(method, "head", None)
            if not isinstance(method, FillsBlanks) or not isinstance(head, VocabularyHead):
                raise ConfigError(
                    "this run was pre-trained without filling blanks, so no head knows words: "
                    "cloze needs a masked_language or gpt_bert run (or use --task classification)"
                )
            self.head = copy.deepcopy(head)
            kind: Literal["bert", "tied"] = "bert" if head.transform else "tied"
            self.config = replace(self.config, head=kind, predicts_next=method.predicts_next)
        if self.config.demonstrations:
            texts = [[item] if isinstance(item, str) else list(item) for item in items]
            pairs = zip(labels, texts, strict=True)
            pool = tuple(json.dumps([label, *text], ensure_ascii=False) for label, text in pairs)
            self.config = replace(self.config, pool=pool)

    def loss(self, batch: Batch, generator: torch.Generator) -> Output:
        """Cross entropy of `label` (batch,) int64 over the words; `generator` is not used."""
        scores = self._scores(batch)
        draws = len(scores) // len(batch["label"])
        loss, accuracy = classification_loss(scores, batch["label"].repeat_interleave(draws))
        return Output(loss, len(batch["label"]), {"accuracy": accuracy})

    @torch.no_grad()
    def predict(self, batch: Batch) -> Predictions:
        """Class numbers (batch,) and probabilities (batch, classes), a mean over the draws."""
        training = self.training
        self.eval()
        by_row = self._scores(batch).softmax(-1)
        self.train(training)
        scores = by_row.view(len(batch["index"]), -1, by_row.shape[-1]).mean(1)
        return Predictions(scores.argmax(-1), scores)

    def _scores(self, batch: Batch) -> Float[Tensor, "rows classes"]:
        words = batch["verbalizers"]
        logits = self._logits(batch)
        if words.shape[1] == 1:
            # The vocabulary's sum would cancel but for rounding errors; Adam divides those by their
            # own size, so they would move the row of every word.
            return logits[:, 0, words[:, 0]]
        return verbalizer_scores(
            logits.log_softmax(-1), words, self.config.several_tokens == "mean"
        )

    def blanks(self, batch: Batch) -> Float[Tensor, "rows slots vocabulary"]:
        """Log-probabilities of every token in every blank, float32."""
        return self._logits(batch).log_softmax(-1)

    def _logits(self, batch: Batch) -> Float[Tensor, "rows slots vocabulary"]:
        tokens = batch["tokens"]
        first = (tokens == self.encoder.spec.mask).int().argmax(1, keepdim=True)  # (rows, 1)
        slot = torch.arange(batch["verbalizers"].shape[1], device=tokens.device)
        place = first + slot - int(self.config.predicts_next)  # (rows, slots)
        return self.head(self.encoder(batch, slots=place).last, self.encoder.embedding).float()
