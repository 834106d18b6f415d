"""Context encoder: a hidden part of a picture is painted from what surrounds it.

Pathak, Krähenbühl, Donahue, Darrell and Efros, "Context Encoders: Feature Learning by Inpainting"
(2016, arXiv 1604.07379). The middle of a picture, or random blocks of it, are replaced by the mean
colour; an encoder reads what is left, each channel of its map is mixed over all positions, and a
decoder paints the picture. Only the hidden part is compared, and a rim around it, where errors
weigh ten times, so that the painted part fits its surroundings.

Axes: batch; channel; height, width of the picture; grid: height and width of the encoder's last
map; position: grid * grid; dim.

Deviations from the paper:
- The adversarial loss is left out: the authors use it for sharp pictures, and train their features
  for other tasks without it.
- The decoder paints the whole picture, not the hidden square alone, so that random blocks need no
  other decoder; what it paints elsewhere is not compared.
- The error of a picture is the weighted mean over what is compared, so that it does not depend on
  how much blocks overlap.
- Random blocks have a side of a quarter of the picture's. They may overlap, so they hide at most
  `share`. The paper's random regions of any shape are left out.
- The encoder is any that gives a square map of positions (the paper: AlexNet). AdamW takes the
  place of Adam.

Reference result: 4 CPU minutes on 19,000 pictures of CIFAR-10 with a narrow ResNet
(docs/results/context-encoder-small.json): frozen features tell 5,000 test pictures with kNN 0.332
and linear 0.389; untrained 0.257 and 0.301, raw pixels 0.327 and 0.396; one seed.
"""

from dataclasses import dataclass
from typing import Literal, final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from selfsup.batch import Batch, ImageSpec
from selfsup.models.decoders import build_decoder, grid_of, input_batch, target
from selfsup.models.encoder import Encoder
from selfsup.objective import Objective, Output

RIM_WEIGHT = 10.0
BLOCK = 4  # the picture's side in sides of a random block


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is hidden, and the decoder. Defaults are the paper's."""

    mask: Literal["centre", "random"] = "centre"
    """Hide a square in the middle, or blocks at random places."""
    share: float = 0.25
    """Share of the picture's area that is hidden; of random blocks, at most."""
    rim: float = 7 / 128
    """Width of the rim that is painted too, as a share of the picture's side; 0: none."""
    width: int = 256
    """Channels of the decoder's smallest map."""

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"share must lie between 0 and 1, got {self.share}")
        if not 0 <= self.rim < 0.5:
            raise ValueError(f"rim must be from 0 up to 0.5, 0.5 excluded, got {self.rim}")
        if self.width < 1:
            raise ValueError(f"width must be at least 1, got {self.width}")


def central_square(size: int, share: float) -> Bool[Tensor, "1 1 {size} {size}"]:
    """True in the middle, in a square with that share of the area (rounded to whole pixels)."""
    side = min(max(1, round(size * share**0.5)), size - 1)
    first = (size - side) // 2
    hidden = torch.zeros(1, 1, size, size, dtype=torch.bool)
    hidden[:, :, first : first + side, first : first + side] = True
    return hidden


def random_blocks(
    count: int, size: int, share: float, generator: torch.Generator
) -> Bool[Tensor, "{count} 1 {size} {size}"]:
    """True in squares of a quarter of the side, that share of the area together, at random places.

    Args:
        count: number of pictures, each with blocks of its own.
        size: height and width in pixels.
        share: hidden at most, in steps of a block (1/16), of which there is one at least.
        generator: on the device of the result.
    """
    side = max(1, size // BLOCK)
    shape = (count, max(1, int(share * BLOCK**2)), 2)
    first = torch.randint(
        size - side + 1, shape, generator=generator, device=generator.device
    ).unsqueeze(-1)  # (batch, block, axis, 1)
    place = torch.arange(size, device=generator.device)
    rows, columns = ((place >= first) & (place < first + side)).unbind(2)  # (batch, block, size)
    return (rows.unsqueeze(3) & columns.unsqueeze(2)).any(1, keepdim=True)


def rim_weights(
    hidden: Bool[Tensor, "batch 1 height width"], rim: int
) -> Float[Tensor, "batch 1 height width"]:
    """1 in the hidden part, 10 in the visible rim of that many pixels around it, else 0."""
    inside = hidden.float()
    reached = F.max_pool2d(inside, 2 * rim + 1, stride=1, padding=rim)
    return inside + RIM_WEIGHT * (reached - inside)


def weighted_errors(
    painted: Float[Tensor, "batch channel height width"],
    wanted: Float[Tensor, "batch channel height width"],
    weight: Float[Tensor, "#batch 1 height width"],
) -> Float[Tensor, " batch"]:
    """The weighted mean of each picture's squared errors, in float32."""
    errors = (painted.float() - wanted).square().mean(1, keepdim=True)  # (batch, 1, height, width)
    return (weight * errors).sum((1, 2, 3)) / weight.sum((1, 2, 3))


class ChannelwiseLinear(nn.Module):
    """Mixes the positions of each channel by a matrix of its own.

    Args:
        channels: number of matrices.
        positions: rows and columns of each.
    """

    def __init__(self, channels: int, positions: int):
        super().__init__()
        bound = positions**-0.5
        self.weight = nn.Parameter(
            torch.empty(channels, positions, positions).uniform_(-bound, bound)
        )

    def forward(
        self, x: Float[Tensor, "batch channel height width"]
    ) -> Float[Tensor, "batch channel height width"]:
        """Every position from all positions of its channel."""
        return torch.einsum("bcp,cpq->bcq", x.flatten(2), self.weight).view_as(x)


@final
class ContextEncoder(Objective):
    """Paints what is hidden of a picture; see the module's docstring.

    Attributes:
        rim: width of the rim in pixels.
    """

    fields = ("image",)
    kept = ("encoder", "mixing", "decoder")

    def __init__(self, config: Config, encoder: Encoder, spec: ImageSpec):
        super().__init__()
        self.config, self.encoder, self.spec = config, encoder, spec
        self.grid, self.rim = grid_of(encoder, spec), round(config.rim * spec.size)
        self.mixing = ChannelwiseLinear(encoder.dim, self.grid**2)
        self.decoder = build_decoder(spec, encoder.dim, config.width, self.grid)

    def loss(self, batch: Batch, generator: torch.Generator) -> Output:
        """Hide, paint, compare the hidden part and its rim."""
        wanted, config = target(batch, self.spec), self.config
        if config.mask == "random":
            hidden = random_blocks(len(wanted), self.spec.size, config.share, generator)
        else:
            hidden = self._centre(wanted)
        painted = self._paint(batch, wanted, hidden)
        errors = weighted_errors(painted, wanted, rim_weights(hidden, self.rim))
        hidden_error = weighted_errors(painted.detach(), wanted, hidden.float()).mean()
        return Output(errors.mean(), len(wanted), {"hidden_error": hidden_error})

    @torch.no_grad()
    def reconstruct(self, batch: Batch) -> Float[Tensor, "batch channel height width"]:
        """The pictures with their middle hidden and painted anew, on the standardised scale."""
        wanted = target(batch, self.spec)
        hidden = self._centre(wanted)
        return torch.where(hidden, self._paint(batch, wanted, hidden).float(), wanted)

    def _centre(self, like: Tensor) -> Tensor:
        return central_square(self.spec.size, self.config.share).to(like.device)

    def _paint(self, batch: Batch, values: Tensor, hidden: Tensor) -> Tensor:
        shown = input_batch(batch, values.masked_fill(hidden, 0.0), self.spec)
        vectors = self.encoder(shown).last  # (batch, position, dim)
        grid = vectors.transpose(1, 2).unflatten(2, (self.grid, self.grid))
        return self.decoder(self.mixing(grid))
