"""Autoencoder: the input is rebuilt from its code; denoising: from the code of a damaged input.

Hinton and Salakhutdinov, "Reducing the Dimensionality of Data with Neural Networks" (2006, Science
313); Vincent, Larochelle, Bengio and Manzagol, "Extracting and Composing Robust Features with
Denoising Autoencoders" (2008, ICML; no arXiv id). An encoder maps the input to a code, a decoder
maps the code back, and the squared error is made small. With a code that is narrower than the
input, or an input that is damaged first, copying is not enough: what is kept is what inputs have in
common. Inputs that the model rebuilds badly are unlike those it learned from.

Axes: batch; value: the axes of one input, of which a table row has one (column), a series two
(time, channel) and a picture three (channel, height, width).

Damage is done on the standardised scale: Gaussian noise, then a share of the values becomes 0,
which is their mean. Damaged pictures are not clamped to [0, 1]. Missing values stay missing, and
are not compared.

Deviations from the papers: the squared error takes the place of the cross entropy of values in
[0, 1] (2008, equation 2). Encoder and decoder share no weights, and are trained at once, not layer
by layer. The code of a convolutional encoder is its pooled vector. AdamW takes the place of SGD.

Reference result: NSL-KDD, trained on normal connections, recipe autoencoder-table
(docs/results/nsl-kdd.json): AUROC 0.969; PCA 0.954, kNN 0.948, isolation forest 0.943; one seed.
"""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from selfsup.batch import Batch, Spec
from selfsup.models.decoders import (
    build_decoder,
    input_batch,
    input_field,
    standardised,
    target,
)
from selfsup.models.encoder import Encoder
from selfsup.objective import Objective, Output


@dataclass(frozen=True, kw_only=True)
class Config:
    """Damage and decoder. The defaults are a plain autoencoder; 2008: `drop = 0.25`."""

    noise: float = 0.0
    """Standard deviation of the Gaussian noise, in standard deviations of the data."""
    drop: float = 0.0
    """Share of the values of each input that become 0, their mean."""
    width: int = 256
    """Width of the decoder; for pictures, channels of its smallest map."""

    def __post_init__(self) -> None:
        if not 0 <= self.noise < float("inf"):
            raise ValueError(f"noise must be at least 0 and finite, got {self.noise}")
        if not 0 <= self.drop < 1:
            raise ValueError(f"drop is a share, from 0 up to 1, 1 excluded, got {self.drop}")
        if self.width < 1:
            raise ValueError(f"width must be at least 1, got {self.width}")


def damaged(
    values: Float[Tensor, " batch *value"], noise: float, drop: float, generator: torch.Generator
) -> Float[Tensor, " batch *value"]:
    """Values with noise, a share of them 0, exact to one value per input; NaN stays NaN."""
    if noise:
        drawn = torch.empty_like(values).normal_(generator=generator)
        values = values + noise * drawn
    if drop:
        chance = torch.rand(values.shape, generator=generator, device=values.device).flatten(1)
        hidden = chance.argsort(1).argsort(1) < round(drop * chance.shape[1])  # (batch, values)
        values = values.masked_fill(hidden.view_as(values) & ~values.isnan(), 0.0)
    return values


def squared_errors(
    rebuilt: Float[Tensor, " batch *value"], wanted: Float[Tensor, " batch *value"]
) -> Float[Tensor, " batch *value"]:
    """Squared differences, float32; 0 where there is no value (NaN)."""
    rebuilt = rebuilt.float()
    # compared with itself, a missing value has neither error nor gradient
    return (rebuilt - torch.where(wanted.isnan(), rebuilt, wanted)).square()


def mean_errors(
    rebuilt: Float[Tensor, " batch *value"], wanted: Float[Tensor, " batch *value"]
) -> Float[Tensor, " batch"]:
    """The mean of each input's squared errors over the values that it has."""
    errors = squared_errors(rebuilt, wanted).flatten(1).sum(1)
    return errors / (~wanted.isnan()).flatten(1).sum(1).clamp(min=1)


@final
class Autoencoder(Objective):
    """Rebuilds pictures, rows or series from their code; see the module's docstring."""

    kept = ("encoder", "decoder")

    def __init__(self, config: Config, encoder: Encoder, spec: Spec):
        super().__init__()
        self.config, self.encoder, self.spec = config, encoder, spec
        self.fields = (input_field(spec),)
        self.decoder = build_decoder(spec, encoder.dim, config.width)

    def loss(self, batch: Batch, generator: torch.Generator) -> Output:
        """Damage, one forward pass, the mean squared error to what was there before."""
        values, config = standardised(batch, self.spec), self.config
        shown = input_batch(batch, damaged(values, config.noise, config.drop, generator), self.spec)
        errors = mean_errors(self._rebuild(shown), target(batch, self.spec))  # (batch)
        return Output(errors.mean(), len(errors), {"rmse": errors.detach().sqrt().mean()})

    @torch.no_grad()
    def reconstruct(self, batch: Batch) -> Float[Tensor, " batch *value"]:
        """The inputs as rebuilt from their undamaged selves, on the standardised scale."""
        return self._rebuild(batch).float()

    @torch.no_grad()
    def errors(self, batch: Batch) -> Float[Tensor, " batch *value"]:
        """Squared errors of every value, standardised scale; 0 where there is no value.

        For table rows, column i of the result belongs to table column `spec.source[i]`.
        """
        return squared_errors(self._rebuild(batch), target(batch, self.spec))

    def _rebuild(self, batch: Batch) -> Tensor:
        return self.decoder(self.encoder.pooled(batch))
