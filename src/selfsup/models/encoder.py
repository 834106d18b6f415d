"""The `Encoder` contract: a batch goes in, `Features` of every layer come out."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor, nn

from selfsup.batch import Batch


class Features(NamedTuple):
    """What an encoder gives.

    Attributes:
        hidden: outputs of the embedding and of every layer, in that order, each (batch, time, dim).
            The last one is what heads read.
        mask: (batch, time), True where real.
        pooled: (batch, dim), one vector for the whole example.
        penalty: a loss of the encoder's own, which a method adds to its own; None: there is none.
        metrics: scalars of the encoder worth plotting.
    """

    hidden: tuple[Float[Tensor, "batch time dim"], ...]
    mask: Bool[Tensor, "batch time"]
    pooled: Float[Tensor, "batch dim"]
    penalty: Float[Tensor, ""] | None = None
    metrics: Mapping[str, Tensor] = MappingProxyType({})

    @property
    def last(self) -> Float[Tensor, "batch time dim"]:
        """The output of the last layer."""
        return self.hidden[-1]


class Encoder(nn.Module):
    """Turns a batch into `Features`.

    Attributes:
        reads: the kinds of data that it can be built for: `kind` of their spec.
        config: the `Config` that it was built from.
        dim: width of every hidden state and of `pooled`.
        num_layers: number of layers; `Features.hidden` holds one more (the embedding).
        causal: whether a position knows nothing of those behind it, so that they can be predicted.
        has_penalty: whether `Features.penalty` is a loss that training needs.
    """

    reads: tuple[str, ...] = ()
    config: Any
    dim: int
    num_layers: int
    causal: bool = False
    has_penalty: bool = False

    def forward(self, batch: Batch) -> Features:
        """Encodes one batch."""
        raise TypeError(f"{type(self).__name__} does not define forward")

    def pooled(self, batch: Batch) -> Float[Tensor, "batch dim"]:
        """`Features.pooled` alone: an encoder may leave out what it does not need for it."""
        return self(batch).pooled


def masked_mean(
    hidden: Float[Tensor, "batch time dim"], mask: Bool[Tensor, "batch time"]
) -> Float[Tensor, "batch dim"]:
    """The mean over the real positions of each row, in float32."""
    weight = mask.unsqueeze(-1).float()  # (batch, time, 1)
    return (hidden.float() * weight).sum(1) / weight.sum(1).clamp(min=1)
