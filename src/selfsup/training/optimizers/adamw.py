"""AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101), as torch has it, begun at once."""

import inspect
from typing import final

import torch


@final
class AdamW(torch.optim.AdamW):
    """`torch.optim.AdamW`, number for number.

    torch keeps these methods out of `torch.compile`, and imports its compiler for it whether
    anything is compiled or not: two seconds before the first step.
    """

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))
