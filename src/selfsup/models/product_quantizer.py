"""Product quantization by Gumbel softmax: a vector picks one code of each of several codebooks.

Baevski, Zhou, Mohamed and Auli, wav2vec 2.0 (2020, arXiv 2006.11477, section 2, "Quantization
module"), after Jang, Gu and Poole, "Categorical Reparameterization with Gumbel-Softmax" (2016,
arXiv 1611.01144). A linear map gives every code a logit. In training the choice is drawn, with
noise, and passed on as if it were the softmax (straight-through), so gradients reach logits and
codes; in evaluation the largest logit wins. G codebooks of V codes tell V ** G things apart with
G * V vectors.

Axes: batch: any leading axes; group: codebook; code; width of what is quantized; dim of the result.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class ProductCodes(NamedTuple):
    """What the quantizer gives.

    Attributes:
        vectors: the chosen codes of all groups, one behind the other.
        codes: number of the code in each group.
        probability: softmax of the logits, without noise and at temperature 1.
    """

    vectors: Float[Tensor, "*batch dim"]
    codes: Int[Tensor, "*batch group"]
    probability: Float[Tensor, "*batch group code"]


class ProductQuantizer(nn.Module):
    """Vectors to codes; see the module's docstring.

    Args:
        width: of the vectors.
        dim: of the result, a multiple of `groups`.
        groups: number of codebooks.
        num_codes: codes in each.
        temperature: of the softmax behind the drawn choices at the start.

    Attributes:
        codebooks: (group, code, dim / groups), trained by gradient.
        temperature: a scalar buffer for the method to lower in `after_step`.

    >>> quantizer = ProductQuantizer(width=4, dim=6, groups=2, num_codes=5)
    >>> out = quantizer(torch.randn(3, 4), torch.Generator())
    >>> out.vectors.shape, out.codes.shape, out.probability.shape
    (torch.Size([3, 6]), torch.Size([3, 2]), torch.Size([3, 2, 5]))
    """

    temperature: Tensor

    def __init__(
        self,
        width: int,
        dim: int,
        groups: int = 2,
        num_codes: int = 320,
        temperature: float = 2.0,
    ):
        super().__init__()
        self.groups = groups
        self.logits = nn.Linear(width, groups * num_codes)
        nn.init.normal_(self.logits.weight)  # as in the authors' code
        nn.init.zeros_(self.logits.bias)
        self.codebooks = nn.Parameter(torch.rand(groups, num_codes, dim // groups))
        self.register_buffer("temperature", torch.tensor(temperature))

    def forward(
        self, vectors: Float[Tensor, "*batch width"], generator: torch.Generator
    ) -> ProductCodes:
        """Chooses; `generator`, on the device of `vectors`, is read in training mode alone."""
        with torch.autocast(vectors.device.type, enabled=False):
            logits = self.logits(vectors.float()).unflatten(-1, (self.groups, -1))
            if self.training:
                choice = straight_through_choice(logits, self.temperature, generator)
            else:
                choice = one_hot_of_largest(logits)
            chosen = torch.einsum("...gc,gcd->...gd", choice, self.codebooks).flatten(-2)
        return ProductCodes(chosen, choice.argmax(-1), logits.softmax(-1))


def straight_through_choice(
    logits: Float[Tensor, "*batch code"],
    temperature: Float[Tensor, ""],
    generator: torch.Generator,
) -> Float[Tensor, "*batch code"]:
    """One-hot draws from the softmax of `logits`, with the gradient of a noisy softmax.

    Jang et al. 2016, equations 1 and 2 and section 2.2.
    """
    gumbel = -torch.empty_like(logits).exponential_(generator=generator).log()
    soft = ((logits + gumbel) / temperature).softmax(-1)
    return one_hot_of_largest(soft) + soft - soft.detach()


def one_hot_of_largest(scores: Float[Tensor, "*batch code"]) -> Float[Tensor, "*batch code"]:
    """1 at the largest score, the first of equal ones, else 0; without gradient."""
    return torch.zeros_like(scores).scatter(-1, scores.argmax(-1, keepdim=True), 1.0)


def group_perplexities(share: Float[Tensor, "group code"]) -> Float[Tensor, " group"]:
    """exp of the entropy of each group's shares: how many codes are in use, 1 to all of them."""
    # finite gradient where a share is 0
    return torch.exp(-(share * share.clamp(min=1e-30).log()).sum(-1))
