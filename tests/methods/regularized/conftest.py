"""What the tests of methods that regularise the statistics of two views share."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.linalg import hadamard
from torch import Tensor, nn

from selfsup.batch import ImageSpec
from selfsup.models.encoder import Encoder, Features
from selfsup.objective import Objective
from selfsup.randomness import isolated, seed_layers, torch_generator

SPEC = ImageSpec(size=8, channels=3, mean=(0.5,) * 3, std=(0.25,) * 3)


class Quarters(Encoder):
    """The mean colours of each quarter of a picture; remembers what it was shown."""

    dim, num_layers = 12, 0

    def __init__(self):
        super().__init__()
        self.shown: list[Tensor] = []

    def forward(self, batch):
        self.shown.append(batch["image"])
        pooled = nn.functional.adaptive_avg_pool2d(batch["image"], 2).flatten(1)
        mask = torch.ones(len(pooled), 1, dtype=torch.bool)
        return Features((pooled.unsqueeze(1),), mask, pooled)


@pytest.fixture
def build() -> Callable[[Any], Objective]:
    """`build(BarlowTwins, config)`: the method with an encoder of quarters."""

    def build(method: Any, config: Any) -> Objective:
        with isolated():
            seed_layers(0, "model")
            return method(config, Quarters(), SPEC)

    return build


@pytest.fixture
def pictures() -> Callable[..., Tensor]:
    """`pictures(size)`: noise."""

    def pictures(size: int = 10) -> Tensor:
        draw = torch_generator(0, "pictures")
        return torch.randint(256, (size, 3, 8, 8), dtype=torch.uint8, generator=draw)

    return pictures


@pytest.fixture
def balanced() -> Callable[[int, int], Tensor]:
    """`balanced(size, dim)`: columns of +1 and -1, of mean 0 and orthogonal to each other."""
    return lambda size, dim: torch.tensor(hadamard(size)[:, 1 : dim + 1], dtype=torch.float32)
