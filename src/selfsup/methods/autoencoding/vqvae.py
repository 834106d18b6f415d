"""VQ-VAE: a picture becomes a map of words from a learned codebook, and is rebuilt from them.

van den Oord, Vinyals and Kavukcuoglu, "Neural Discrete Representation Learning" (2017, arXiv
1711.00937). An encoder gives a map of vectors, each is replaced by the nearest entry of a codebook,
and a decoder rebuilds the picture from these codes alone. Gradients pass the replacement unchanged,
a commitment loss keeps the encoder near its codes, and the codebook follows by moving averages.

Axes: batch; position: places of the encoder's last map, row by row; grid: side of that map; dim:
of the encoder; code_dim.

The encoder's stride decides how many codes a picture has: a residual network with stem "cifar" and
two stages gives (size / 2)^2, with four stages (size / 8)^2. The paper's is size / 4.

Deviations from the paper: codes begin as vectors of the first batches, and unused ones are revived
(`models/quantizers.py`, with the other deviations of the codebook). The error is that of
standardised pixels. The decoder upsamples without transposed convolutions (`models/decoders.py`).
No prior over codes is learned here. AdamW takes the place of Adam.

Reference result: CIFAR-10, 19,000 pictures, 1,000 steps of 64, 64 codes each (docs/results/vqvae-
small.json): held-out error 0.067 of the variance, all 512 codes used, perplexity 418; one seed.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from selfsup.batch import Batch, ImageSpec
from selfsup.models.decoders import build_decoder, grid_of, target
from selfsup.models.encoder import Encoder
from selfsup.models.quantizers import VectorQuantizer
from selfsup.objective import Objective, Output

FIRST_BATCHES = 16  # whose vectors the codebook begins with


@dataclass(frozen=True, kw_only=True)
class Config:
    """Codebook, commitment and decoder. Defaults are the paper's, and those of its code."""

    num_codes: int = 512
    """Size of the codebook."""
    code_dim: int = 64
    """Width of a code."""
    commitment: float = 0.25
    """Weight of the squared distance from vectors to their codes (beta)."""
    decay: float = 0.99
    """What the codebook's moving averages keep at each step."""
    revive_below: float = 0.05
    """A code that is chosen less often than this share of the mean is replaced; 0: never."""
    width: int = 256
    """Channels of the decoder's smallest map."""

    def __post_init__(self) -> None:
        for name in ("num_codes", "code_dim", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.commitment < float("inf"):
            raise ValueError(f"commitment must be at least 0 and finite, got {self.commitment}")
        for name in ("decay", "revive_below"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be from 0 up to 1, 1 excluded, got {getattr(self, name)}"
                )


@final
class VQVAE(Objective):
    """Rebuilds pictures from a map of discrete codes; see the module's docstring.

    Attributes:
        grid: side of the map of codes.
    """

    fields = ("image",)
    kept = ("encoder", "projection", "quantizer", "decoder")
    refresh_every = 0

    def __init__(self, config: Config, encoder: Encoder, spec: ImageSpec):
        super().__init__()
        self.config, self.encoder, self.spec = config, encoder, spec
        self.grid = grid_of(encoder, spec)
        self.projection = nn.Linear(encoder.dim, config.code_dim)
        self.quantizer = VectorQuantizer(
            config.num_codes, config.code_dim, config.decay, revive_below=config.revive_below
        )
        self.decoder = build_decoder(spec, config.code_dim, config.width, self.grid)

    def loss(self, batch: Batch, generator: torch.Generator) -> Output:
        """Encode, quantize, decode; squared error and commitment (equation 3)."""
        # Without a gradient this is a step's first batch: what was added up belongs to a step that
        # was passed over because it was not finite.
        if self.training and self.projection.weight.grad is None:
            self.quantizer.forget()
        quantized = self.quantizer(self.vectors(batch))
        rebuilt = self._decode(quantized.vectors)
        reconstruction = F.mse_loss(rebuilt.float(), target(batch, self.spec))
        loss = reconstruction + self.config.commitment * quantized.commitment
        metrics = {
            "reconstruction": reconstruction.detach(),
            "perplexity": quantized.perplexity,
            "code_usage": self.quantizer.usage(),
        }
        return Output(loss, len(rebuilt), metrics)

    def after_step(self, step: int, total: int) -> None:
        """Moves the codebook towards the vectors of this step's batches."""
        self.quantizer.after_step(step)

    @torch.no_grad()
    def refresh(self, batches: Iterable[Batch], generator: torch.Generator) -> None:
        """Before step 0: codes begin as random vectors of the first batches."""
        # in training mode: the running statistics of batch normalisation are not those of data yet
        vectors = [self.vectors(batch).flatten(0, 1) for batch in islice(batches, FIRST_BATCHES)]
        self.quantizer.initialise(torch.cat(vectors), generator)

    def vectors(self, batch: Batch) -> Float[Tensor, "batch position code_dim"]:
        """What is quantized: one vector for each position of the encoder's last map."""
        return self.projection(self.encoder(batch).last)

    @torch.no_grad()
    def reconstruct(self, batch: Batch) -> Float[Tensor, "batch channel height width"]:
        """The pictures as rebuilt from their codes, on the standardised scale."""
        return self._decode(self.quantizer.lookup(self.codes(batch)).flatten(1, 2)).float()

    @torch.no_grad()
    def interpolate(
        self, batch_a: Batch, batch_b: Batch, steps: int
    ) -> Float[Tensor, "batch {steps} channel height width"]:
        """From the codes nearest to points on the lines between two pictures' vectors."""
        first, second = self.vectors(batch_a), self.vectors(batch_b)
        share = torch.linspace(0, 1, steps, device=first.device).view(-1, 1, 1)
        vectors = torch.lerp(first.unsqueeze(1), second.unsqueeze(1), share)
        codes = self.quantizer.codes(vectors.flatten(0, 1))  # (batch * steps, position)
        return self._decode(self.quantizer.lookup(codes)).float().unflatten(0, (-1, steps))

    @torch.no_grad()
    def codes(self, batch: Batch) -> Int[Tensor, "batch grid grid"]:
        """The number of the code at each place of the map."""
        return self.quantizer.codes(self.vectors(batch)).unflatten(1, (self.grid, self.grid))

    def _decode(self, vectors: Float[Tensor, "batch position code_dim"]) -> Tensor:
        return self.decoder(vectors.transpose(1, 2).unflatten(2, (self.grid, self.grid)))
