"""One tag for every word: parts of speech, named entities, chunks.

A linear layer on the first token of each word, as BERT tags entities (Devlin et al. 2018, arXiv
1810.04805, section 5.3); the word's other tokens are read, but neither scored nor predicted.

Axes: batch; time: tokens of a row; word: words of a sentence; tags: as many as `names`.
"""

from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from selfsup.batch import Batch
from selfsup.models.dropout import Dropout
from selfsup.models.encoder import Encoder, Features
from selfsup.objective import Output, Predictions, Task

IGNORED = -100
"""The label of a position that is not scored."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """What the papers vary: very little."""

    dropout: float = 0.1
    """Dropout before the head."""

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")


def tagging_loss(
    logits: Float[Tensor, "batch time tags"], label: Int[Tensor, "batch time"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Int[Tensor, ""]]:
    """Mean cross entropy (nats), accuracy and number of the scored words, in float32.

    Positions whose label is -100 are not scored; without any other the loss is 0.
    """
    scored = label != IGNORED
    count = scored.sum()
    total = F.cross_entropy(
        logits.flatten(0, 1).float(), label.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    hits = ((logits.detach().argmax(-1) == label) & scored).sum()
    return total / count.clamp(min=1), hits / count.clamp(min=1), count


@final
class Tagging(Task):
    """A linear tagger on an encoder.

    Args:
        config: dropout.
        encoder: gives one vector per token.
        names: the tags, in the order of their numbers.
    """

    fields = ("label", "words")
    kept = ("encoder", "head")
    metric = "accuracy"

    def __init__(self, config: Config, encoder: Encoder, names: tuple[str, ...]):
        super().__init__()
        self.config, self.encoder, self.names = config, encoder, names
        self.dropout = Dropout(config.dropout)
        self.head = nn.Linear(encoder.dim, len(names))
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def loss(self, batch: Batch, generator: torch.Generator) -> Output:
        """Cross entropy of `label` (batch, time) at first tokens; `generator` is not used."""
        loss, accuracy, count = tagging_loss(self.read(self.encoder(batch)), batch["label"])
        return Output(loss, count, {"accuracy": accuracy})

    @torch.no_grad()
    def predict(self, batch: Batch) -> Predictions:
        """One tag for each word that `words` (batch, time) shows, without dropout.

        Returns:
            values: (batch, word) int64; -1 where a sentence has no such word, or the word lies
                beyond the end of a truncated row, which a metric must count as wrong.
            scores: (batch, word, tags) probabilities; 0 there.
        """
        training = self.training
        self.eval()
        scores = self.read(self.encoder(batch)).softmax(-1)
        self.train(training)
        row, column = torch.nonzero(batch["words"] >= 0, as_tuple=True)
        word = batch["words"][row, column]
        num_words = int(batch["words"].max()) + 1
        by_word = scores.new_zeros(len(scores), num_words, len(self.names))
        by_word[row, word] = scores[row, column]
        values = torch.full(by_word.shape[:2], -1, device=scores.device)
        values[row, word] = scores[row, column].argmax(-1)
        return Predictions(values, by_word)

    def read(self, features: Features) -> Float[Tensor, "batch time tags"]:
        """Logits, float32, of what the encoder gave."""
        return self.head(self.dropout(features.last)).float()
