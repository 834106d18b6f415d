"""Layer mix: the task reads a learned weighted sum of a frozen encoder's layers, as from ELMo.

Peters et al., "Deep contextualized word representations" (2018, arXiv 1802.05365), equation 1:
gamma * sum over layers j of softmax(s)_j * h_j. The weights s begin at 0 and gamma at 1: the mean
of all layers. What a task needs may lie in lower layers than the last (there, parts of speech in
the first, senses in the second). The encoder computes without dropout.

Axes: batch; time; dim; layer: the embedding and every layer after it.

Deviation: the task reads the mix alone; in the paper it is joined to the task's own word vectors.
"""

from dataclasses import dataclass
from typing import Self, final

import torch
import torch.nn.functional as F
from torch import nn

from selfsup.batch import Batch
from selfsup.models.encoder import Encoder, Features, masked_mean
from selfsup.objective import Task
from selfsup.tuning.parts import Where


@dataclass(frozen=True, kw_only=True)
class Config:
    """How the layers are mixed."""

    layer_norm: bool = False
    """Normalise each layer at each position first (section 3.2: "in some cases it also helped")."""


@final
class MixedEncoder(Encoder):
    """An encoder with one more layer: the mix of all others.

    `pooled` is the mean of the mix over the real positions.

    Args:
        encoder: whose layers are mixed; all are of one width.
        layer_norm: normalise each layer at each position first.

    Attributes:
        scores: (layer,), the weights before the softmax.
        gamma: scale of the whole.
    """

    def __init__(self, encoder: Encoder, layer_norm: bool = False):
        super().__init__()
        self.encoder, self.layer_norm = encoder, layer_norm
        self.config, self.reads, self.causal = encoder.config, encoder.reads, encoder.causal
        self.dim, self.num_layers = encoder.dim, encoder.num_layers + 1
        self.scores = nn.Parameter(torch.zeros(encoder.num_layers + 1))
        self.gamma = nn.Parameter(torch.ones(()))

    def train(self, mode: bool = True) -> Self:
        """As in every module, but an encoder that is wholly frozen stays without dropout."""
        super().train(mode)
        self.encoder.train(mode and any(p.requires_grad for p in self.encoder.parameters()))
        return self

    def forward(self, batch: Batch) -> Features:
        """Encodes one batch, and mixes."""
        features = self.encoder(batch)
        layers = torch.stack(features.hidden)  # (layer, batch, time, dim)
        if self.layer_norm:
            layers = F.layer_norm(layers, layers.shape[-1:])
        share = self.scores.softmax(0).to(layers.dtype)
        mix = self.gamma * torch.einsum("lbtd,l->btd", layers, share)
        return features._replace(
            hidden=(*features.hidden, mix), pooled=masked_mean(mix, features.mask)
        )


def layer_mix(task: Task, config: Config, where: Where) -> None:
    """Puts a mix of the encoder's layers between it and the head."""
    task.encoder = MixedEncoder(task.encoder, config.layer_norm)
