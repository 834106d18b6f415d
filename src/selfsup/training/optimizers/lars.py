"""LARS (You et al. 2017, arXiv 1708.03888): momentum with a rate for each matrix.

The step of a matrix is scaled by `trust` times the ratio of its length to the length of its decayed
gradient, so that no layer moves by a larger share of itself than the others. The usual choice for
SimCLR (Chen et al. 2020, arXiv 2002.05709) and BYOL (Grill et al. 2020, arXiv 2006.07733) with
batches of thousands of pictures.

As in SimCLR, the ratio is taken after gradient and decay are added, where the paper adds their
lengths, and vectors (biases, norms) are neither decayed nor scaled.
"""

from typing import Any, final

import torch
from torch import Tensor, nn

from selfsup.training.optimizers.groups import moving, trust_ratios, wide, zeros


@final
class Lars(torch.optim.Optimizer):
    """LARS over parameter groups.

    Args:
        groups: of `parameter_groups`.
        lr: the rate.
        momentum: share of the last step that is made again.
        trust: how far a matrix moves at a rate of 1, as a share of its L2 norm.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        momentum: float,
        trust: float = 0.001,
    ):
        defaults = {"lr": lr, "momentum": momentum, "trust": trust, "weight_decay": 0.0}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One step of all parameters that have a gradient."""
        for group in self.param_groups:
            parameters = moving(group)
            if parameters:
                with wide(parameters) as (values, gradients):
                    self._step(group, [self._momentum(p) for p in parameters], values, gradients)

    def _momentum(self, parameter: nn.Parameter) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = zeros(parameter)
        return state["momentum_buffer"]

    def _step(
        self,
        group: dict[str, Any],
        momenta: list[Tensor],
        values: list[Tensor],
        gradients: list[Tensor],
    ) -> None:
        updates = gradients
        if values[0].ndim >= 2:
            updates = list(torch._foreach_add(gradients, values, alpha=group["weight_decay"]))
            torch._foreach_mul_(updates, trust_ratios(values, updates, group["trust"]))
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, updates, alpha=group["lr"])
        torch._foreach_sub_(values, momenta)
