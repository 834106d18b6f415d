"""What every kind of data becomes: numbered examples that can be fetched by number."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from selfsup.batch import Batch, Spec
from selfsup.data.labels import Labelled


class Dataset(Protocol):
    """Numbered examples. `batch` is a pure function of the numbers: no state, no randomness.

    Attributes:
        fields: names of the batch fields it gives.
        lengths: (examples,) sizes, where they differ: examples of similar size then share a batch.
        labels: (examples,) class numbers where the corpus happens to have them: training never
            sees them, a probe may.
    """

    fields: tuple[str, ...]
    lengths: np.ndarray | None = None
    labels: Any = None

    def __len__(self) -> int:
        """Number of examples."""
        ...

    def batch(self, numbers: np.ndarray) -> Batch:
        """The examples of those numbers as CPU tensors; `index` holds the numbers."""
        ...


class LabelledDataset(Dataset, Protocol):
    """Labelled examples as batches, with `label`; what a preprocessor's `labelled` gives.

    Attributes:
        task: a name of `registry.TASKS`.
        labels: (examples,) class numbers or numbers; empty where labels are of another form.
        truncated: how many examples lost something because they were too long.
    """

    task: str
    labels: Any
    truncated: int

    def collect(
        self, values: Sequence[np.ndarray], scores: Sequence[np.ndarray]
    ) -> tuple[list[Any], list[Any]]:
        """Truth and guess, as the task's metric reads them, of what a task predicts for all rows.

        Here each row is one example; a data set that gives several rows for one, or many labels
        in a row, says in its own `collect` what its rows come to.

        Args:
            values: the task's `Predictions.values` of every row, in the order of the rows.
            scores: likewise its `Predictions.scores`.
        """
        return np.asarray(self.labels).tolist(), np.stack(values).tolist()


class Preprocessor(Protocol):
    """What turns a user's items (texts, pictures) into a batch; saved beside the model."""

    @property
    def spec(self) -> Spec:
        """What a model must know of its input."""
        ...

    def save(self, folder: Path) -> None:
        """Writes what is needed to load it again."""
        ...

    def batches(self, items: Iterable[Any], batch_size: int) -> Iterable[tuple[list[int], Batch]]:
        """Groups items of similar length: (numbers of the items, their batch)."""
        ...

    def labelled(self, labelled: Labelled) -> LabelledDataset:
        """Labelled items as a data set."""
        ...

    def limited(self, max_length: int | None) -> "Preprocessor":
        """The same for items of at most that length; None: what this kind of data usually takes.

        Itself where length has no meaning.
        """
        ...

    def raw(self) -> "Preprocessor":
        """The same without normalising single items away: what a baseline should see."""
        ...


@dataclass(frozen=True)
class Prepared:
    """A corpus that is ready for training.

    Attributes:
        train, valid: disjoint parts of the corpus, split by document.
        spec: what the model must know of the data (for text a `Vocabulary`).
        preprocessor: what a user's items go through later.
        facts: counts for people and for `run.toml`: documents, duplicates, tokens, fingerprint.
    """

    train: Dataset
    valid: Dataset
    spec: Spec
    preprocessor: Preprocessor
    facts: dict[str, Any] = field(default_factory=dict)


def pad_rows(rows: Sequence[np.ndarray], value: int) -> Tensor:
    """Rows of different length as one (batch, longest) int64 tensor, filled with `value`."""
    out = np.full((len(rows), max(len(row) for row in rows)), value, dtype=np.int64)
    for place, row in zip(out, rows, strict=True):
        place[: len(row)] = row
    return torch.from_numpy(out)


def pad_mask(rows: Sequence[np.ndarray]) -> dict[str, Tensor]:
    """The batch's `mask`, True where real; empty when all rows have one length."""
    lengths = torch.tensor([len(row) for row in rows])
    longest = int(lengths.max())
    if bool((lengths == longest).all()):
        return {}
    return {"mask": torch.arange(longest) < lengths.unsqueeze(1)}  # (batch, time)
