"""Batch normalisation over the batch of all ranks (Ioffe and Szegedy, 2015, arXiv 1502.03167).

torch's own `SyncBatchNorm` does this on GPUs only; this layer does it on any device, through
`selfsup.ranks`. In training with several ranks it sums the values, then the squared deviations from
the common mean: two small sums over ranks, and no difference of two large numbers. With one rank,
and in evaluation, it is torch's batch norm and nothing else.

Axes: batch; features (channels of a picture); space: any number of axes behind them.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from selfsup import ranks


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """Normalises each feature over the batch of all ranks and over space.

    Parameters and buffers are named as torch's: `weight`, `bias`, `running_mean`, `running_var`
    (unbiased) and `num_batches_tracked`. Ranks may bring batches of different size. Statistics of
    several ranks are float32 (float64 for float64), whatever the precision of the input.

    Args:
        num_features: size of the second axis.
        eps: added to the variance.
        momentum: weight of the newest batch in the running statistics.
        affine: learn a factor and an offset per feature; False leaves `weight` and `bias` None.

    >>> BatchNorm(8)(torch.zeros(4, 8)).shape, BatchNorm(3)(torch.zeros(4, 3, 5, 5)).shape
    (torch.Size([4, 8]), torch.Size([4, 3, 5, 5]))
    """

    whole_batch = True
    momentum: float  # torch's class also allows None here, and no running statistics
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self, num_features: int, eps: float = 1e-5, momentum: float = 0.1, affine: bool = True
    ):
        super().__init__(num_features, eps, momentum, affine)

    def forward(
        self, x: Float[Tensor, "batch features *space"]
    ) -> Float[Tensor, "batch features *space"]:
        """Normalises; in training mode it also moves the running statistics."""
        if not self.training or ranks.count() == 1:
            return super().forward(x)
        broadcast = (1, -1) + (1,) * (x.ndim - 2)
        wide = x if x.dtype == torch.float64 else x.float()
        mean, variance, count = rank_statistics(wide)
        self._track(mean.detach(), variance.detach(), count)
        centred = wide - mean.view(broadcast)
        out = centred * torch.rsqrt(variance + self.eps).view(broadcast)
        if self.affine:
            out = out * self.weight.view(broadcast) + self.bias.view(broadcast)
        return out.to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        rate, unbiased = self.momentum, variance * count / (count - 1)
        self.running_mean.mul_(1 - rate).add_(mean, alpha=rate)
        self.running_var.mul_(1 - rate).add_(unbiased, alpha=rate)
        self.num_batches_tracked.add_(1)

    def _check_input_dim(self, input: Tensor) -> None:
        """Any (batch, features, ...) will do."""


def rank_statistics(
    x: Float[Tensor, "batch features *space"],
) -> tuple[Float[Tensor, " features"], Float[Tensor, " features"], Float[Tensor, ""]]:
    """Mean, biased variance and number of values per feature over all ranks, with gradient."""
    axes = (0, *range(2, x.ndim))
    here = x.new_tensor([x.numel() // x.shape[1]])
    sums = ranks.total(torch.cat((x.sum(axes), here)))  # (features + 1,): one message
    count = sums[-1].detach()
    mean = sums[:-1] / count
    deviations = x - mean.view(1, -1, *(1,) * len(axes[1:]))
    return mean, ranks.total(deviations.square().sum(axes)) / count, count
