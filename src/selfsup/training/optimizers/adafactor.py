"""Adafactor (Shazeer and Stern 2018, arXiv 1804.04235): Adam in the memory of plain descent.

The second moment of an n x m matrix is kept as the means of its n rows and its m columns, which
takes n + m numbers in place of n * m (algorithm 4). There is no first moment; an update is scaled
down where its root mean square passes 1 (section 6), the decay of the second moment rises to 1 as
1 - t^-0.8 (section 7.2), and the rate is a share of each parameter's own size (section 8).

Where a tensor has more than two axes the two largest are factored, so that convolutions and experts
profit too. The rate follows the run's schedule, where the paper has min(0.01, 1 / sqrt(t)); weight
decay is decoupled from the gradient, as in AdamW. The paper has none.
"""

from typing import Any, final

import torch
from torch import Tensor, nn

from selfsup.training.optimizers.groups import moving, wide, zeros

DECAY = 0.8
FLOOR, LEAST_SIZE = 1e-30, 1e-3  # epsilon 1 and 2 of the paper
CLIP = 1.0


@final
class Adafactor(torch.optim.Optimizer):
    """Adafactor over parameter groups.

    Args:
        groups: of `parameter_groups`.
        lr: the rate.
        relative_step: the rate is a share of each parameter's root mean square, of at least 1e-3.
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, relative_step: bool = True):
        defaults = {"lr": lr, "relative_step": relative_step, "weight_decay": 0.0}
        super().__init__(groups, defaults)

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
            if parameter.ndim < 2:
                state["variance"] = zeros(parameter)
            else:
                rows, columns = factored_axes(parameter.shape)
                state["row"] = zeros(parameter, *_without(parameter.shape, columns))
                state["column"] = zeros(parameter, *_without(parameter.shape, rows))
        return state

    def _step(
        self,
        group: dict[str, Any],
        states: list[dict[str, Tensor]],
        values: list[Tensor],
        gradients: list[Tensor],
    ) -> None:
        steps = [state["step"].add_(1) for state in states]
        shares = torch.stack(steps).double().pow(-DECAY).to(values[0].dtype)
        updates = [
            _scaled_vector(gradient, state, share)
            if gradient.ndim < 2
            else _scaled_matrix(gradient, state, share)
            for gradient, state, share in zip(gradients, states, shares, strict=True)
        ]
        rates = group["lr"] / _root_mean_squares(updates).div_(CLIP).clamp_(min=1.0)
        if group["relative_step"]:
            rates *= _root_mean_squares(values).clamp_(min=LEAST_SIZE)
        if group["weight_decay"]:
            torch._foreach_mul_(values, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_mul_(updates, list(rates.unbind()))
        torch._foreach_sub_(values, updates)


def factored_axes(shape: torch.Size) -> tuple[int, int]:
    """The two largest axes, in their order; the last ones among equals.

    >>> factored_axes(torch.Size([64, 32, 3, 3])), factored_axes(torch.Size([8, 8, 8]))
    ((0, 1), (1, 2))
    """
    rows, columns = sorted(sorted(range(len(shape)), key=lambda axis: shape[axis])[-2:])
    return rows, columns


def num_moments(shape: torch.Size) -> int:
    """How many numbers are kept for a parameter.

    >>> num_moments(torch.Size([30, 20])), num_moments(torch.Size([20]))
    (50, 20)
    """
    if len(shape) < 2:
        return shape.numel()
    return sum(torch.Size(_without(shape, axis)).numel() for axis in factored_axes(shape))


def _without(shape: torch.Size, axis: int) -> list[int]:
    return [1 if place == axis else size for place, size in enumerate(shape)]


def _scaled_vector(gradient: Tensor, state: dict[str, Tensor], share: Tensor) -> Tensor:
    variance = state["variance"].lerp_(gradient.square().add_(FLOOR), share)
    return variance.rsqrt().mul_(gradient)


def _scaled_matrix(gradient: Tensor, state: dict[str, Tensor], share: Tensor) -> Tensor:
    """Gradient over the root of row times column over the mean of the rows."""
    rows, columns = factored_axes(gradient.shape)
    squares = gradient.square()
    row = state["row"].lerp_(squares.mean(columns, keepdim=True).add_(FLOOR), share)
    column = state["column"].lerp_(squares.mean(rows, keepdim=True).add_(FLOOR), share)
    # each factor by itself: their quotient and product could leave the range of float32
    by_row = row.rsqrt().mul_(row.mean(rows, keepdim=True).sqrt_())
    return (gradient * by_row).mul_(column.rsqrt())


def _root_mean_squares(tensors: list[Tensor]) -> Tensor:
    """(tensor,)"""
    return torch.stack(
        [
            norm / tensor.numel() ** 0.5
            for norm, tensor in zip(torch._foreach_norm(tensors), tensors, strict=True)
        ]
    )
