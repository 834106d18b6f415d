"""BEST-RQ: hidden sound is predicted as the codes of a quantizer that nobody trained.

Chiu, Qin, Zhang, Yu and Wu, "Self-Supervised Learning with Random-Projection Quantizer for Speech
Recognition" (2022, arXiv 2202.01855). A random matrix projects the frames; the nearest vector of a
random codebook is their label. Both stay as they were drawn. Stretches of frames are replaced by
noise, and the encoder predicts the labels there with a cross entropy. Labels need no
representation, so nothing can collapse, and causal encoders may learn so too.

Axes: batch; time: frames; position: of the encoder, the `patch` frames that a transformer stacks;
item: a hidden position; codebook; code; width: numbers in a position; dim of a code.

Deviations from the paper:
- Only positions whose frames are all hidden are predicted.
- Frames are normalised as the data are (`data.cmvn`), by utterance. Without, a few codes take all:
  watch `code_perplexity`.
- `num_codebooks` above 1 follows later work (Zhang et al., 2023, arXiv 2303.01037): a projection
  and a softmax for each; the loss is their mean.

The defaults are for utterances of ten seconds and more; 400 ms hide a spoken word entirely. For
words, a span of 8 to 16 frames that begins with probability 0.03 to 0.05 leaves something to
predict from.

Reference result: free spoken digits, 22 minutes of six voices, less than ten CPU minutes
(docs/results/best-rq-small.json): the digit is told for a voice left out with accuracy 0.646 by a
linear probe; untrained 0.550, mean log-mel 0.534; one seed.
"""

from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from selfsup.batch import AudioSpec, Batch
from selfsup.methods.spans import begun_spans
from selfsup.models.embeddings import stacked
from selfsup.models.quantizers import nearest_codes, perplexity
from selfsup.models.recurrent import RecurrentEncoder
from selfsup.models.transformer import TransformerEncoder
from selfsup.objective import Objective, Output


@dataclass(frozen=True, kw_only=True)
class Config:
    """Codebook and masks. Defaults are the paper's, with 10 ms from frame to frame."""

    num_codes: int = 8192
    """Vectors in a codebook."""
    code_dim: int = 16
    """Width of a code."""
    num_codebooks: int = 1
    """How many labels a position has."""
    start_probability: float = 0.01
    """Of a span of noise to begin at a frame."""
    span: int = 40
    """Frames in a span; spans may overlap, and end with the utterance."""
    noise: float = 0.1
    """Standard deviation of the noise that takes the place of hidden frames."""

    def __post_init__(self) -> None:
        for name, least in {"num_codes": 2, "code_dim": 1, "num_codebooks": 1, "span": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 < self.start_probability <= 1:
            raise ValueError(
                f"start_probability must be above 0 and at most 1, got {self.start_probability}"
            )
        if not self.noise >= 0:
            raise ValueError(f"noise must not be negative, got {self.noise}")


def label(
    vectors: Float[Tensor, "item width"],
    projections: Float[Tensor, "codebook width dim"],
    codes: Float[Tensor, "codebook code dim"],
) -> Int[Tensor, "item codebook"]:
    """The number of the code nearest to each projected vector, both on the unit sphere.

    Under autocast too it is computed in float32, or labels would differ.
    """
    with torch.autocast(vectors.device.type, enabled=False):
        found = [
            nearest_codes(F.normalize(vectors.float() @ projection, dim=1), codebook)
            for projection, codebook in zip(projections, codes, strict=True)
        ]
    return torch.stack(found, 1)


def usage(numbers: Int[Tensor, "item codebook"], num_codes: int) -> Float[Tensor, ""]:
    """Perplexity of the codes that occur, 1 to `num_codes`; the mean over codebooks."""
    counts = [torch.bincount(column, minlength=num_codes).float() for column in numbers.T]
    return torch.stack([perplexity(count) for count in counts]).mean()


@final
class BestRQ(Objective):
    """Predicts the random codes of hidden sound; see the module's docstring.

    Attributes:
        projections: (codebook, width, dim); `codes`: (codebook, code, dim), unit vectors. Drawn
            once, never trained, saved with the weights.

    >>> from selfsup.models.transformer import Config as Model
    >>> spec = AudioSpec(rate=8000, mel=4, hop=80)
    >>> encoder = TransformerEncoder(Model(dim=8, layers=1, heads=2, patch=4), spec)
    >>> method = BestRQ(Config(start_probability=1.0), encoder, spec)
    >>> method.loss({"frames": torch.randn(2, 20, 4)}, torch.Generator()).weight
    10
    """

    fields = ("frames",)
    encoder: RecurrentEncoder | TransformerEncoder
    projections: Tensor
    codes: Tensor

    def __init__(
        self, config: Config, encoder: RecurrentEncoder | TransformerEncoder, spec: AudioSpec
    ):
        super().__init__()
        self.config, self.encoder = config, encoder
        width = spec.mel * encoder.embedding.stack
        projections = torch.empty(config.num_codebooks, width, config.code_dim)
        for projection in projections:
            nn.init.xavier_uniform_(projection)
        codes = torch.randn(config.num_codebooks, config.num_codes, config.code_dim)
        self.register_buffer("projections", projections)
        self.register_buffer("codes", F.normalize(codes, dim=-1))
        self.head = nn.Linear(encoder.dim, config.num_codebooks * config.num_codes)

    def loss(self, batch: Batch, generator: torch.Generator) -> Output:
        """Labels, hides, encodes, predicts, compares; a mean over hidden positions."""
        frames, stack, config = batch["frames"], self.encoder.embedding.stack, self.config
        real = batch.get("mask", frames.new_ones(frames.shape[:2], dtype=torch.bool))
        hidden = begun_spans(real, config.start_probability, config.span, generator)
        noise = torch.randn(frames.shape, generator=generator, device=frames.device)
        shown = torch.where(hidden.unsqueeze(-1), config.noise * noise, frames)
        chosen = stacked(hidden.unsqueeze(-1), stack).all(-1)  # (batch, position)
        target = label(stacked(frames, stack)[chosen], self.projections, self.codes)
        last = self.encoder({**batch, "frames": shown}).last[chosen]  # (item, dim)
        logits = self.head(last).unflatten(1, (config.num_codebooks, -1)).float()
        if len(target) == 0:  # no span began in the whole batch
            nothing = logits.sum()
            zero = nothing.detach()
            names = ("accuracy", "code_perplexity", "prediction_perplexity")
            return Output(nothing, 0, dict.fromkeys(names, zero))
        guess = logits.detach().argmax(-1)  # (item, codebook)
        metrics = {
            "accuracy": (guess == target).float().mean(),
            "code_perplexity": usage(target, config.num_codes),
            "prediction_perplexity": usage(guess, config.num_codes),
        }
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten())
        return Output(loss, len(target), metrics)
