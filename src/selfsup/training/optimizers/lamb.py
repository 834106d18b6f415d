"""LAMB (You et al. 2019, arXiv 1904.00962): Adam whose step is a share of each matrix's length.

With batches of thousands the best rates differ from layer to layer. LAMB takes Adam's direction and
the decay, and gives every matrix a step as long as the matrix itself times the rate (algorithm 2,
with the identity as phi).

As in the authors' training of BERT, vectors (biases, norms) are neither decayed nor scaled.
"""

from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from selfsup.training.optimizers.groups import moving, trust_ratios, wide, zeros


@final
class Lamb(torch.optim.Optimizer):
    """LAMB over parameter groups.

    Args:
        groups: of `parameter_groups`.
        lr: the rate, which for matrices is a share of their L2 norm.
        betas: decays of the two moments.
        eps: added to the root of the second moment.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
    ):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One step of all parameters that have a gradient."""
        for group in self.param_groups:
            parameters = moving(group)
            if parameters:
                with wide(parameters) as (values, gradients):
                    self._step(group, [self._state(p) for p in parameters], values, gradients)

    def _state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = zeros(parameter), zeros(parameter)
        return state

    def _step(
        self,
        group: dict[str, Any],
        states: list[dict[str, Tensor]],
        values: list[Tensor],
        gradients: list[Tensor],
    ) -> None:
        matrices = values[0].ndim >= 2
        updates = [torch.zeros_like(value) for value in values] if matrices else values
        adam(
            updates,
            gradients,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=1.0 if matrices else group["lr"],
            weight_decay=0.0,
            eps=group["eps"],
            maximize=False,
        )
        if matrices:
            torch._foreach_sub_(updates, values, alpha=group["weight_decay"])
            torch._foreach_mul_(updates, trust_ratios(values, updates))
            torch._foreach_add_(values, updates, alpha=group["lr"])
