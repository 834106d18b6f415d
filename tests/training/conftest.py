"""A toy objective and its data: everything the loop touches, in milliseconds."""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from selfsup.batch import Batch
from selfsup.data.dataset import Dataset, pad_mask, pad_rows
from selfsup.models.encoder import Encoder, Features, masked_mean
from selfsup.objective import Objective, Output
from selfsup.randomness import isolated, numpy_generator, seed_layers
from selfsup.training import checkpoint
from selfsup.training.config import TrainingConfig

WORDS, DIM = 12, 8


class Rows(Dataset):
    """Rows of 3 to 6 ids; the label is the largest id of the row."""

    fields = ("tokens", "mask", "label", "index")

    def __init__(self, size: int, seed: int = 0):
        draw = numpy_generator(seed, "toy rows")
        self.rows = [draw.integers(1, WORDS, draw.integers(3, 7)) for _ in range(size)]

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, numbers: np.ndarray) -> Batch:
        rows = [self.rows[i] for i in numbers]
        out = {"tokens": pad_rows(rows, 0), **pad_mask(rows)}
        label = torch.tensor([int(row.max()) for row in rows])
        return {**out, "label": label, "index": torch.as_tensor(numbers)}


class Bag(Encoder):
    """The mean of the vectors of a row's ids."""

    dim, num_layers = DIM, 1

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, DIM)
        self.linear = nn.Linear(DIM, DIM)

    def forward(self, batch: Batch) -> Features:
        mask = batch.get("mask", torch.ones_like(batch["tokens"], dtype=torch.bool))
        hidden = self.table(batch["tokens"])  # (batch, time, dim)
        last = torch.tanh(self.linear(hidden))
        return Features((hidden, last), mask, masked_mean(last, mask))


class Largest(Objective):
    """Names the largest id of a row; some of its hidden numbers are dropped at random.

    Args:
        dropout: share of hidden numbers that the layer's own dropout drops.
        noise: strength of the noise that is drawn from the generator.
    """

    fields = ("tokens", "label")

    def __init__(self, dropout: float = 0.1, noise: float = 0.1):
        super().__init__()
        self.encoder, self.head = Bag(), nn.Linear(DIM, WORDS)
        self.dropout, self.noise = nn.Dropout(dropout), noise
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.steps: list[tuple[int, int]] = []

    def loss(self, batch: Batch, generator: torch.Generator) -> Output:
        pooled = self.dropout(self.encoder(batch).pooled)
        pooled = pooled + self.noise * torch.randn(pooled.shape, generator=generator)
        logits = self.head(pooled).float()
        loss = nn.functional.cross_entropy(logits, batch["label"])
        hit = (logits.argmax(-1) == batch["label"]).float().mean()
        return Output(loss, len(batch["label"]), {"accuracy": hit})

    def after_step(self, step: int, total: int) -> None:
        self.seen += 1
        self.steps.append((step, total))


def build(seed: int = 0, kind: Callable[..., Objective] = Largest, **keys) -> Objective:
    """A fresh objective whose weights depend on the seed alone."""
    with isolated():
        seed_layers(seed, "toy")
        return kind(**keys)


def config(**keys) -> TrainingConfig:
    """Small, float32, on the processor; a budget of 20 steps if none is given."""
    if not keys.keys() & {"steps", "tokens", "minutes"}:
        keys["steps"] = 20
    return TrainingConfig(
        **{"batch_size": 4, "precision": "float32", "device": "cpu", "log_every": 1, **keys}
    )


def same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Bit-equal."""
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


def weights(objective: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the state."""
    return {name: tensor.clone() for name, tensor in objective.state_dict().items()}


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch) -> None:
    """A save that finds the disk full is tried again at once."""
    monkeypatch.setattr(checkpoint, "WAITS", (0.0, 0.0, 0.0))


@pytest.fixture(scope="session")
def toy() -> SimpleNamespace:
    """Everything above by name: test modules cannot import a conftest."""
    return SimpleNamespace(
        Rows=Rows, Largest=Largest, build=build, config=config, same=same, weights=weights
    )
