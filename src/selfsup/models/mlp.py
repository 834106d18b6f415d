"""The multilayer perceptron: table rows or small pictures to one code each.

Linear layers with a normalisation, a non-linearity and dropout behind each, and a last linear layer
that gives the code: the encoder of autoencoders (Hinton and Salakhutdinov, 2006, Science 313), of
SCARF (Bahri et al., 2022, arXiv 2106.15147) and of one-class networks on tables. A row is one
position, so `Features.hidden` holds the code alone, with a time axis of one.

Axes: batch; column of an encoded row, or pixel of a flattened picture; dim: width of the code.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from selfsup.batch import Batch, ImageSpec, TableSpec
from selfsup.errors import DataError
from selfsup.models.batch_norm import BatchNorm
from selfsup.models.dropout import Dropout
from selfsup.models.encoder import Encoder, Features

NORMS = {"none": nn.Identity, "layer": nn.LayerNorm, "batch": BatchNorm}
ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU}


@dataclass(frozen=True, kw_only=True)
class Config:
    """The shape of a multilayer perceptron; each key is explained beside it."""

    dims: tuple[int, ...] = (256, 256)  # widths of the layers before the code; may be empty
    dim: int = 64  # width of the code
    dropout: float = 0.0  # behind each of `dims`
    norm: Literal["none", "layer", "batch"] = "none"  # between a layer and its non-linearity
    activation: Literal["relu", "gelu"] = "relu"

    def __post_init__(self):
        if min(self.dim, *self.dims, 1) < 1:
            raise ValueError(f"dim and dims must be above 0, got {self.dim} and {self.dims}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")


class MLPEncoder(Encoder):
    """Rows or pictures to `Features` of one position: the code, which is `pooled` too.

    Reads `row` where `spec` is a `TableSpec`, and `image` where it is an `ImageSpec`: uint8, or
    float in [0, 1], of exactly `spec.size`, standardised with the mean and deviation of `spec`.
    `num_layers` is 0: only the code has width `dim`.

    Attributes:
        config: the shape of the network.
        spec: the data that it was made for.
        layers: everything from the flat input to the code.

    >>> spec = TableSpec(columns=("age", "city"), source=(0, 1, 1))
    >>> encoder = MLPEncoder(Config(dims=(8,), dim=4), spec)
    >>> features = encoder({"row": torch.zeros(2, 3)})
    >>> features.last.shape, features.pooled.shape
    (torch.Size([2, 1, 4]), torch.Size([2, 4]))
    """

    reads = ("table", "image")
    mean: Tensor
    std: Tensor

    def __init__(self, config: Config, spec: TableSpec | ImageSpec):
        super().__init__()
        self.config, self.spec = config, spec
        self.dim, self.num_layers = config.dim, 0
        if isinstance(spec, ImageSpec):
            for name, values in (("mean", spec.mean), ("std", spec.std)):
                self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)
            width = spec.channels * spec.size**2
        else:
            width = len(spec.source)
        layers: list[nn.Module] = []
        for outputs in config.dims:
            layers += [
                nn.Linear(width, outputs),
                NORMS[config.norm](outputs),
                ACTIVATIONS[config.activation](),
                Dropout(config.dropout),
            ]
            width = outputs
        self.layers = nn.Sequential(*layers, nn.Linear(width, config.dim))

    def forward(self, batch: Batch) -> Features:
        """Encodes one batch.

        Raises:
            DataError: pictures of another size than the model was made for.
        """
        flat = self._pixels(batch["image"]) if isinstance(self.spec, ImageSpec) else batch["row"]
        code = self.layers(flat)  # (batch, dim)
        mask = torch.ones(len(code), 1, dtype=torch.bool, device=code.device)
        return Features((code.unsqueeze(1),), mask, code)

    def _pixels(self, image: Tensor) -> Float[Tensor, "batch pixel"]:
        assert isinstance(self.spec, ImageSpec)
        expected = (self.spec.channels, self.spec.size, self.spec.size)
        if image.shape[1:] != expected:
            raise DataError(
                f"an mlp reads pictures of one size, here {expected} (channels, height, width), "
                f"got {tuple(image.shape[1:])}; resize them, or use a convolutional model"
            )
        scaled = image.to(self.mean.dtype)
        if image.dtype == torch.uint8:
            scaled = scaled / 255
        return ((scaled - self.mean) / self.std).flatten(1)
