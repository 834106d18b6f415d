"""Vector quantization: every vector is replaced by the nearest entry of a codebook.

van den Oord, Vinyals and Kavukcuoglu, "Neural Discrete Representation Learning" (VQ-VAE, 2017,
arXiv 1711.00937). Gradients pass the replacement unchanged (straight-through), a commitment loss
keeps vectors near their codes, and the codebook follows the vectors by exponential moving averages
of their counts and sums (appendix A.1), not by gradient. A code that hardly any vector chooses is
put in the place of a random vector of the batch, as in Jukebox (Dhariwal et al., 2020, arXiv
2005.00341, section 3.1).

The codebook moves in `after_step` alone, from what the batches of that step have added up, so
`forward` may be called in evaluation and under gradient accumulation.

Axes: batch: any leading axes; vector: those of all ranks and positions; code; dim.

Deviations: the commitment is a mean over dimensions too, as in the authors' code (equation 3: a
sum). Counts are smoothed by epsilon as there. A revived code gets the mean count, so it stays for
some steps before it may be replaced again (Jukebox: until it is used, in each step anew).
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from selfsup import ranks
from selfsup.randomness import torch_generator


class Quantized(NamedTuple):
    """What a quantizer gives.

    Attributes:
        vectors: codes in the place of the vectors; their gradient is that of the vectors.
        codes: numbers of the codes.
        commitment: mean squared distance from vectors to their codes, with gradient to the vectors.
        perplexity: exp of the entropy of the codes of this batch, 1 to the number of codes.
    """

    vectors: Float[Tensor, "*batch dim"]
    codes: Int[Tensor, "*batch"]
    commitment: Float[Tensor, ""]
    perplexity: Float[Tensor, ""]


def nearest_codes(
    vectors: Float[Tensor, "vector dim"], codebook: Float[Tensor, "code dim"]
) -> Int[Tensor, " vector"]:
    """Number of the code with the smallest Euclidean distance; of equal ones the first."""
    # |v - c|^2 without |v|^2, which is the same for all codes of a vector
    distance = codebook.square().sum(1) - 2 * vectors @ codebook.T  # (vector, code)
    return distance.argmin(1)


def code_means(
    counts: Float[Tensor, " code"], sums: Float[Tensor, "code dim"], epsilon: float
) -> Float[Tensor, "code dim"]:
    """Sum / count of each code (equation 8), with Laplace smoothing of the counts."""
    total = counts.sum()
    smoothed = (counts + epsilon) / (total + len(counts) * epsilon) * total
    return sums / smoothed.unsqueeze(1)


def perplexity(counts: Float[Tensor, " code"]) -> Float[Tensor, ""]:
    """exp of the entropy of the shares of the codes."""
    return torch.special.entr(counts / counts.sum()).sum().exp()


class VectorQuantizer(nn.Module):
    """A codebook that follows the vectors which it replaces.

    Args:
        num_codes: size of the codebook.
        dim: width of vectors and codes.
        decay: what moving averages keep at each step.
        epsilon: smoothing of the counts.
        revive_below: a code whose moving count is below this share of the mean is replaced.

    Attributes:
        codebook: (num_codes, dim), equal on all ranks.
        counts, sums: moving averages of how many vectors choose a code, and of their sum.
        idle: steps since a code was last chosen.
        window: steps for which a chosen code counts as used: those that the averages look back.

    >>> quantizer = VectorQuantizer(num_codes=8, dim=4)
    >>> quantized = quantizer(torch.zeros(2, 5, 4))
    >>> quantized.vectors.shape, quantized.codes.shape
    (torch.Size([2, 5, 4]), torch.Size([2, 5]))
    """

    codebook: Tensor
    counts: Tensor
    sums: Tensor
    idle: Tensor
    seed: Tensor
    new_counts: Tensor
    new_sums: Tensor

    def __init__(
        self,
        num_codes: int,
        dim: int,
        decay: float = 0.99,
        epsilon: float = 1e-5,
        revive_below: float = 0.05,
    ):
        super().__init__()
        self.decay, self.epsilon, self.revive_below = decay, epsilon, revive_below
        self.window = round(1 / (1 - decay))
        codebook = torch.randn(num_codes, dim)
        self.register_buffer("codebook", codebook)
        self.register_buffer("counts", torch.ones(num_codes))
        self.register_buffer("sums", codebook.clone())
        self.register_buffer("idle", torch.full((num_codes,), self.window))
        self.register_buffer("seed", torch.randint(2**62, ()))
        # of this step's batches, until the optimizer has stepped
        self.register_buffer("new_counts", torch.zeros(num_codes), persistent=False)
        self.register_buffer("new_sums", torch.zeros(num_codes, dim), persistent=False)
        self.new_vectors: list[Tensor] = []

    def forward(self, vectors: Float[Tensor, "*batch dim"]) -> Quantized:
        """Nearest codes; in training mode they are also added up for `after_step`."""
        with torch.autocast(vectors.device.type, enabled=False):
            vectors = vectors.float()
            codes = self.codes(vectors)
            counts = torch.bincount(codes.flatten(), minlength=len(self.codebook)).float()
            if self.training:
                self._add(vectors.detach().flatten(0, -2), codes.flatten(), counts)
            chosen = self.codebook[codes]
            commitment = (vectors - chosen).square().mean()
            straight = vectors + (chosen - vectors).detach()
        return Quantized(straight, codes, commitment, perplexity(counts))

    @torch.no_grad()
    def codes(self, vectors: Float[Tensor, "*batch dim"]) -> Int[Tensor, "*batch"]:
        """Numbers of the nearest codes; nothing is added up."""
        with torch.autocast(vectors.device.type, enabled=False):
            return nearest_codes(vectors.float().flatten(0, -2), self.codebook).view(
                vectors.shape[:-1]
            )

    def lookup(self, codes: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch dim"]:
        """The codebook's vectors of those numbers."""
        return self.codebook[codes]

    def usage(self) -> Float[Tensor, ""]:
        """Share of the codes that were chosen in training during the last `window` steps."""
        return (self.idle < self.window).float().mean()

    def forget(self) -> None:
        """Drops what was added up: the batches of a step that was passed over."""
        self.new_counts.zero_()
        self.new_sums.zero_()
        self.new_vectors.clear()

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Moves the codebook (equations 6 to 8) and revives dead codes; `step` decides chance."""
        counts, sums = ranks.total(self.new_counts), ranks.total(self.new_sums)
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        self.codebook.copy_(code_means(self.counts, self.sums, self.epsilon))
        self.idle.add_(1).masked_fill_(counts > 0, 0)
        dead = self.counts < self.revive_below * self.counts.mean()
        if dead.any():
            self._revive(dead, step)
        self.forget()

    @torch.no_grad()
    def initialise(self, vectors: Float[Tensor, "vector dim"], generator: torch.Generator) -> None:
        """Puts codes in the places of random vectors; with too few, the last codes stay."""
        order = torch.randperm(len(vectors), generator=generator, device=generator.device)
        chosen = vectors[order[: len(self.codebook)]].float()
        self.codebook[: len(chosen)] = chosen
        self.counts.fill_(1)
        self.sums.copy_(self.codebook)
        self.forget()

    @torch.no_grad()
    def _add(
        self,
        vectors: Float[Tensor, "vector dim"],
        codes: Int[Tensor, " vector"],
        counts: Float[Tensor, " code"],
    ) -> None:
        # a matrix product, because index_add_ sums in any order on a GPU
        one_hot = torch.zeros(len(vectors), len(self.codebook), device=vectors.device)
        one_hot.scatter_(1, codes.unsqueeze(1), 1.0)
        self.new_counts += counts
        self.new_sums += one_hot.T @ vectors
        self.new_vectors.append(vectors)

    def _revive(self, dead: Bool[Tensor, " code"], step: int) -> None:
        vectors = ranks.gather(torch.cat(self.new_vectors))
        generator = torch_generator(int(self.seed), "revive", step)
        order = torch.randperm(len(vectors), generator=generator).to(vectors.device)
        places = dead.nonzero().squeeze(1)[: len(vectors)]
        chosen, count = vectors[order[: len(places)]], self.counts.mean()
        self.codebook[places], self.counts[places] = chosen, count
        self.sums[places] = count * chosen
