"""MoCo: a view is told from a queue of earlier pictures, which a slow teacher encoded.

He, Fan, Wu, Xie and Girshick, "Momentum Contrast for Unsupervised Visual Representation Learning"
(2019, arXiv 1911.05722); v2: Chen, Fan, Girshick and He, "Improved Baselines with Momentum
Contrastive Learning" (2020, arXiv 2003.04297). The encoder maps one view of a picture to a query,
its moving average (the teacher) maps another view to a key. A query must pick out its key among the
keys of earlier batches. Those wait in a queue, so there are many negatives whatever the batch size,
and the teacher moves so slowly that old keys and new ones can be compared.

As in the authors' code, each view goes through a network by itself, with batch statistics of its
own. So it is in the teacher, whose running statistics come from its own passes: the encoder's would
not fit its weights.

Axes: batch: pictures of this rank, twice that when symmetric; keys: places of the queue; dim.

The defaults are v1's. v2 is `hidden_dim = 2048`, `temperature = 0.2` and `views.MOCO_V2`. Small
pictures (the authors' CIFAR demo): a queue of 4096, momentum 0.99, temperature 0.1, no blur.

Deviations from the paper:
- There is no shuffling BN. Batch normalisation here spans all ranks, and to shuffle pictures among
  them would change nothing. A query and its key may therefore share what the batch statistics tell
  of their batch, which the queue does not: the authors lost 4 points so on CIFAR-10, at 800 epochs.
  The head has no batch normalisation.
- The symmetric loss, an option, is the demo's, but the mean of both directions, not their sum.
- AdamW takes the place of SGD.

Reference result: 7 CPU minutes on 19,000 pictures of CIFAR-10 with a narrow ResNet
(docs/results/moco-small.json): frozen features tell 5,000 test pictures with kNN 0.379 and linear
0.421; untrained 0.257 and 0.301, raw pixels 0.327 and 0.396; one seed.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from selfsup import ranks
from selfsup.batch import Batch, ImageSpec
from selfsup.methods.ops import frozen, move_average, view_diagnostics
from selfsup.methods.views import MOCO_V1, ViewConfig, view_pair
from selfsup.models.encoder import Encoder
from selfsup.objective import Objective, Output


@dataclass(frozen=True, kw_only=True)
class Config:
    """Queue, teacher, head and views. Defaults are those of MoCo v1 for ImageNet."""

    queue_size: int = 65536
    """Number of keys of earlier batches: the negatives."""
    momentum: float = 0.999
    """What the teacher keeps of itself at each step."""
    temperature: float = 0.07
    """Divides the cosines; smaller looks at the hardest negatives more. v2: 0.2."""
    hidden_dim: int = 0
    """Width of the head's hidden layer; 0: the head is one linear layer. v2: 2048."""
    projection_dim: int = 128
    """Width of queries and keys."""
    symmetric: bool = False
    """Let each view be the query once, and both be keys: twice the work of a step."""
    views: ViewConfig = MOCO_V1
    """How both views are made."""

    def __post_init__(self) -> None:
        for name, least in (("queue_size", 1), ("hidden_dim", 0), ("projection_dim", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be from 0 up to 1, 1 excluded, got {self.momentum}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")


def info_nce(
    query: Float[Tensor, "batch dim"],
    key: Float[Tensor, "batch dim"],
    queue: Float[Tensor, "keys dim"],
    temperature: float,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """InfoNCE (v1, equation 1), and how often the key is nearer than the whole queue.

    Args:
        query: of any length; row i belongs to row i of `key`.
        key: unit vectors, the positives.
        queue: unit vectors, the negatives of every query.
        temperature: divides the cosines.
    """
    with torch.autocast(query.device.type, enabled=False):  # it would round the cosines
        query = F.normalize(query.float(), dim=1)
        positive = (query * key).sum(1, keepdim=True)
        logits = torch.cat([positive, query @ queue.T], 1) / temperature  # (batch, 1 + keys)
    target = torch.zeros(len(query), dtype=torch.long, device=query.device)
    accuracy = (logits.detach().argmax(1) == target).float().mean()
    return F.cross_entropy(logits, target), accuracy


@final
class MoCo(Objective):
    """Finds the other view among the keys of earlier pictures; see the module's docstring.

    Attributes:
        queue: (queue_size, projection_dim) unit vectors, equal on all ranks.
        pointer: the place of the oldest key, which the next one replaces.
    """

    fields = ("image",)
    whole_batch = True
    queue: Tensor
    pointer: Tensor

    def __init__(self, config: Config, encoder: Encoder, spec: ImageSpec):
        super().__init__()
        self.config, self.encoder = config, encoder
        self.head = _head(encoder.dim, config.hidden_dim, config.projection_dim)
        self.teacher_encoder = frozen(copy.deepcopy(encoder))
        self.teacher_head = frozen(copy.deepcopy(self.head))
        queue = F.normalize(torch.randn(config.queue_size, config.projection_dim), dim=1)
        self.register_buffer("queue", queue)
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))
        self.new_keys: list[Tensor] = []  # of this step's batches, until the optimizer has stepped

    def loss(self, batch: Batch, generator: torch.Generator) -> Output:
        """Two views, one of them (or each in turn) the query, InfoNCE against the queue."""
        views = view_pair(batch["image"], self.config.views, self.config.views, generator)
        of_queries: Sequence[Tensor] = views if self.config.symmetric else views[:1]
        of_keys: Sequence[Tensor] = views[::-1] if self.config.symmetric else views[1:]
        queries = [self._query(view) for view in of_queries]
        key = torch.cat([self._keys(view) for view in of_keys])
        if self.training:
            self._remember(key)
        loss, accuracy = info_nce(torch.cat(queries), key, self.queue, self.config.temperature)
        metrics = {"found": accuracy}
        if not self.training:
            metrics |= view_diagnostics(queries[0], self._query(views[1]))
        return Output(loss, len(batch["image"]), metrics)

    @torch.no_grad()
    def after_step(self, step: int, total: int) -> None:
        """Moves the teacher (v1, equation 2); this step's keys take the place of the oldest."""
        student = [*self.encoder.parameters(), *self.head.parameters()]
        teacher = [*self.teacher_encoder.parameters(), *self.teacher_head.parameters()]
        move_average(teacher, student, self.config.momentum)
        self._enqueue(ranks.gather(torch.cat(self.new_keys)))
        self.new_keys.clear()

    def _query(self, view: Tensor) -> Tensor:
        return self.head(self.encoder.pooled({"image": view}))

    @torch.no_grad()
    def _keys(self, view: Tensor) -> Tensor:
        key = self.teacher_head(self.teacher_encoder.pooled({"image": view}))
        return F.normalize(key.float(), dim=1)

    def _remember(self, key: Tensor) -> None:
        # Without a gradient this is a step's first batch: keys that are left are those of a step
        # that was passed over because it was not finite.
        if next(self.head.parameters()).grad is None:
            self.new_keys.clear()
        self.new_keys.append(key)

    def _enqueue(self, keys: Tensor) -> None:
        size = len(self.queue)
        keys = keys[-size:]
        places = (self.pointer + torch.arange(len(keys), device=keys.device)) % size
        self.queue[places] = keys
        self.pointer.copy_((self.pointer + len(keys)) % size)


def _head(inputs: int, hidden: int, outputs: int) -> nn.Module:
    if hidden == 0:
        return nn.Linear(inputs, outputs)
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))
