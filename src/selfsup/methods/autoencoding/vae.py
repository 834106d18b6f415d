"""VAE: a code with a known distribution, from which inputs can be rebuilt, and drawn anew.

Kingma and Welling, "Auto-Encoding Variational Bayes" (2013, arXiv 1312.6114). The encoder gives a
Gaussian for each input, a code is drawn from it, and the decoder gives a Gaussian over inputs. The
evidence lower bound (ELBO) asks that the input be likely under the decoder, and that the codes'
distribution stay near a standard normal one. So codes of unseen inputs lie where the decoder has
learned to work. beta other than 1: Higgins et al., 2017, "beta-VAE" (ICLR).

The decoder's deviation is one learned scalar for all values (sigma-VAE, Rybkin et al., 2020, arXiv
2006.13202): with a fixed one, beta would have to be tuned in its place, and the ELBO would be no
likelihood that one can compare.

Axes: batch; latent: of the code; value: the axes of one input (see `models/decoders.py`).

Units. `kl` and `reconstruction` are nats per input, on the standardised scale. The loss is minus
the ELBO divided by the number of values of an input, which moves no optimum and keeps gradients of
the size that `training.clip` expects. `bits_per_dimension` is minus the ELBO (beta 1) per value, in
bits. For pictures it is that of the 256 levels of a pixel: a level's probability is the density
times the distance to the next level, which adds -log(1 / (255 std)) nats per value. That holds
while sigma is well above this distance (0.016 for a std of 0.25). For rows and series it is that
of the density, and may be negative. Missing values are left out, which for a Gaussian without
correlations is to integrate over them.

Deviations from the paper: the code is a linear map of the encoder's pooled vector; one code is
drawn per input, as there; AdamW takes the place of Adagrad.

Reference result: MNIST, 9,500 digits, 1,000 steps of 64 (docs/results/vae-small.json): 7.25 bits
per dimension on held-out digits, all 64 units active; one seed.
"""

import math
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from selfsup.batch import Batch, Spec
from selfsup.models.decoders import build_decoder, input_field, log_spacing, target
from selfsup.models.encoder import Encoder
from selfsup.objective import Objective, Output

LEAST_LOG_SIGMA = -6.0  # of a learned deviation; the sigma-VAE authors' own bound
ACTIVE = 0.01  # variance of the posterior mean above which a unit is active (arXiv 1509.00519)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Code, likelihood and decoder."""

    latent_dim: int = 128
    """Width of the code."""
    beta: float = 1.0
    """Weight of the divergence from the standard normal distribution."""
    sigma: float = 0.0
    """Deviation of the decoder's Gaussian, standardised scale; 0: learned, as one scalar."""
    width: int = 256
    """Width of the decoder; for pictures, channels of its smallest map."""

    def __post_init__(self) -> None:
        for name in ("latent_dim", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("beta", "sigma"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, got {getattr(self, name)}")


def divergence(
    mean: Float[Tensor, "batch latent"], log_variance: Float[Tensor, "batch latent"]
) -> Float[Tensor, " batch"]:
    """KL of a diagonal Gaussian from the standard normal one, nats (appendix B)."""
    return (mean.square() + log_variance.exp() - 1 - log_variance).sum(1) / 2


def negative_log_likelihood(
    values: Float[Tensor, " batch *value"],
    mean: Float[Tensor, " batch *value"],
    log_sigma: Float[Tensor, ""],
) -> Float[Tensor, " batch"]:
    """-log N(values; mean, sigma^2), summed over the values that are there (not NaN), nats."""
    missing = values.isnan()
    error = (mean - torch.where(missing, mean, values)) * torch.exp(-log_sigma)
    each = error.square() / 2 + log_sigma + math.log(2 * math.pi) / 2
    return each.masked_fill(missing, 0.0).flatten(1).sum(1)


class Likelihood(nn.Module):
    """The deviation of the decoder's Gaussian, learned or fixed.

    Args:
        sigma: the fixed one; 0: learned, from 1 on.
    """

    raw: Tensor

    def __init__(self, sigma: float):
        super().__init__()
        self.learned = sigma == 0
        value = torch.tensor([math.log(sigma or 1.0)])  # a list of one can be spread over ranks
        if self.learned:
            self.raw = nn.Parameter(value)
        else:
            self.register_buffer("raw", value)

    def log_sigma(self) -> Float[Tensor, ""]:
        """log of the deviation; a learned one is softly kept above exp(-6)."""
        if not self.learned:
            return self.raw.squeeze()
        return LEAST_LOG_SIGMA + F.softplus(self.raw.squeeze() - LEAST_LOG_SIGMA)


@final
class VAE(Objective):
    """Learns a code that can be drawn from; see the module's docstring."""

    kept = ("encoder", "mean", "log_variance", "decoder", "likelihood")

    def __init__(self, config: Config, encoder: Encoder, spec: Spec):
        super().__init__()
        self.config, self.encoder, self.spec = config, encoder, spec
        self.fields = (input_field(spec),)
        self.mean = nn.Linear(encoder.dim, config.latent_dim)
        self.log_variance = nn.Linear(encoder.dim, config.latent_dim)
        self.decoder = build_decoder(spec, config.latent_dim, config.width)
        self.likelihood = Likelihood(config.sigma)

    def loss(self, batch: Batch, generator: torch.Generator) -> Output:
        """One code per input, drawn; minus the ELBO (equation 10) per value."""
        values = target(batch, self.spec)
        mean, log_variance = self.posterior(batch)
        noise = torch.empty_like(mean).normal_(generator=generator)
        rebuilt = self.decoder(mean + (log_variance / 2).exp() * noise).float()
        log_sigma = self.likelihood.log_sigma()
        reconstruction = negative_log_likelihood(values, rebuilt, log_sigma)  # (batch)
        kl = divergence(mean, log_variance)
        loss = (reconstruction + self.config.beta * kl).mean() / values[0].numel()
        num_values = (~values.isnan()).flatten(1).sum(1).clamp(min=1)
        nats = (reconstruction + kl) / num_values - log_spacing(self.spec)
        metrics = {
            "kl": kl.mean(),
            "reconstruction": reconstruction.mean(),
            "bits_per_dimension": nats.mean() / math.log(2),
            "active_units": (mean.var(0, unbiased=False) > ACTIVE).float().sum(),
            "sigma": log_sigma.exp(),
        }
        return Output(loss, len(values), {name: value.detach() for name, value in metrics.items()})

    def posterior(
        self, batch: Batch
    ) -> tuple[Float[Tensor, "batch latent"], Float[Tensor, "batch latent"]]:
        """Mean and log variance of each input's code, float32."""
        pooled = self.encoder.pooled(batch)
        return self.mean(pooled).float(), self.log_variance(pooled).float()

    @torch.no_grad()
    def reconstruct(self, batch: Batch) -> Float[Tensor, " batch *value"]:
        """The inputs as rebuilt from the means of their codes, on the standardised scale."""
        return self.decoder(self.posterior(batch)[0]).float()

    @torch.no_grad()
    def sample(self, count: int, generator: torch.Generator) -> Float[Tensor, " {count} *value"]:
        """New inputs: the decoder's means for random codes, on the standardised scale."""
        shape = (count, self.config.latent_dim)
        code = torch.randn(shape, generator=generator, device=generator.device)
        return self.decoder(code).float()

    @torch.no_grad()
    def interpolate(
        self, batch_a: Batch, batch_b: Batch, steps: int
    ) -> Float[Tensor, "batch {steps} *value"]:
        """On the line from each code of `batch_a` to that of `batch_b`, both ends included."""
        first, second = self.posterior(batch_a)[0], self.posterior(batch_b)[0]
        share = torch.linspace(0, 1, steps, device=first.device).view(-1, 1)
        code = torch.lerp(first.unsqueeze(1), second.unsqueeze(1), share)  # (batch, steps, latent)
        return self.decoder(code.flatten(0, 1)).float().unflatten(0, (-1, steps))
