"""The span of a document that answers a question: reading comprehension.

A linear layer gives each token a score for the first and one for the last of the answer, as BERT
reads SQuAD (Devlin et al. 2018, arXiv 1810.04805, sections 4.2 and 4.3). Rows are [CLS] question
[SEP] document [SEP]; the places that may answer are the tokens of the document, and [CLS] where the
row holds no answer.

Deviation: spans of several rows are compared by log-probability, not by the sum of their scores:
what a row's scores have in common is never learned, so only differences within a row mean anything.

Axes: batch; time: tokens of a row; 2: first and last token.
"""

from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from selfsup.batch import Batch
from selfsup.models.dropout import Dropout
from selfsup.models.encoder import Encoder
from selfsup.objective import Output, Predictions, Task

IGNORED = -100
"""The label of a row whose answer is not known."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """What the papers vary: very little."""

    dropout: float = 0.1
    """Dropout before the head."""
    max_answer: int = 30
    """Most tokens in an answer that is predicted."""

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")
        if self.max_answer < 1:
            raise ValueError(f"max_answer must be at least 1, got {self.max_answer}")


def document_tokens(batch: Batch) -> Bool[Tensor, "batch time"]:
    """Where the document stands: segment 1 without the separator that ends it."""
    segments = batch["segments"]
    return (segments == 1) & F.pad(segments[:, 1:] == 1, (0, 1))


def span_loss(
    log_probabilities: Float[Tensor, "batch time 2"], label: Int[Tensor, "batch 2"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Int[Tensor, ""]]:
    """Mean of both cross entropies (nats), share of rows with both ends right, rows scored.

    Rows whose label is -100 are not scored; without any other the loss is 0.
    """
    known = label[:, 0] != IGNORED
    count = known.sum()
    total = F.nll_loss(
        log_probabilities.movedim(1, -1).flatten(0, 1),  # (batch * 2, time)
        label.flatten(),
        ignore_index=IGNORED,
        reduction="sum",
    )
    right = (log_probabilities.detach().argmax(1) == label).all(1)  # (batch,)
    least = count.clamp(min=1)
    return total / (2 * least), (right & known).sum() / least, count


def best_spans(
    log_probabilities: Float[Tensor, "batch time 2"],
    document: Bool[Tensor, "batch time"],
    max_answer: int,
) -> tuple[Int[Tensor, "batch 2"], Float[Tensor, " batch"]]:
    """The likeliest span of at most `max_answer` document tokens, and its log-probability.

    Where spans are equally likely, the first one, and of those the shortest.
    """
    first, last = log_probabilities.masked_fill(~document.unsqueeze(2), -torch.inf).unbind(2)
    ends = F.pad(last, (0, max_answer - 1), value=-torch.inf).unfold(1, max_answer, 1)
    score, place = (first.unsqueeze(2) + ends).flatten(1).max(1)  # over (time, length)
    start = place // max_answer
    return torch.stack([start, start + place % max_answer], 1), score


@final
class SpanQA(Task):
    """A linear layer that points at the first and the last token of the answer.

    Args:
        config: dropout, and how long an answer may be.
        encoder: gives one vector per token.
        names: not used; the data set keeps there whether a question may have no answer.
    """

    fields = ("label", "segments")
    kept = ("encoder", "head")
    metric = "answer_f1"
    gives_text = True

    def __init__(self, config: Config, encoder: Encoder, names: tuple[str, ...] = ()):
        super().__init__()
        self.config, self.encoder = config, encoder
        self.dropout = Dropout(config.dropout)
        self.head = nn.Linear(encoder.dim, 2)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def loss(self, batch: Batch, generator: torch.Generator) -> Output:
        """Mean cross entropy of `label` (batch, 2): both ends; `generator` is not used."""
        loss, accuracy, count = span_loss(self._log_probabilities(batch), batch["label"])
        return Output(loss, count, {"accuracy": accuracy})

    @torch.no_grad()
    def predict(self, batch: Batch) -> Predictions:
        """The best span of each row's document, without dropout.

        Returns:
            values: (batch, 2) int64, first and last token of the row.
            scores: (batch, 2) log-probabilities, of that span and of no answer in this row.
        """
        training = self.training
        self.eval()
        scores = self._log_probabilities(batch)
        self.train(training)
        spans, score = best_spans(scores, document_tokens(batch), self.config.max_answer)
        return Predictions(spans, torch.stack([score, scores[:, 0].sum(1)], 1))

    def _log_probabilities(self, batch: Batch) -> Float[Tensor, "batch time 2"]:
        """-inf at tokens that cannot answer: the question, separators, padding."""
        scores = self.head(self.dropout(self.encoder(batch).last)).float()
        possible = document_tokens(batch)
        possible[:, 0] = True  # [CLS]
        return scores.masked_fill(~possible.unsqueeze(2), -torch.inf).log_softmax(1)
