"""What heads and feed-forward units are worth, so that the least important ones can be pruned.

A head is worth what the loss of an example would change with a mask on its output, in absolute
value and on average (Michel, Levy and Neubig, "Are Sixteen Heads Really Better than One?", 2019,
arXiv 1905.10650): the mask is 1 everywhere, and the gradient at it says so for all heads in one
backward pass. The units of feed-forward layers are judged in the same way. `pruning.py` cuts out.

Axes: layer: blocks, one where all layers share it; batch; part: heads of a layer, or units of its
feed-forward layer, each with its gate.

Deviation: the gradient is taken once for each example, as in the paper's formula; its published
code takes it at every position.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from selfsup.batch import Batch
from selfsup.errors import ConfigError
from selfsup.objective import Objective
from selfsup.randomness import torch_generator
from selfsup.tuning.pruning import attentions, feedforwards


def head_importance(
    objective: Objective, batches: Iterable[Batch], normalise: bool = True
) -> Float[Tensor, "layer part"]:
    """What each attention head is worth: the mean over examples of |d loss / d mask|.

    Args:
        objective: a fine-tuned task, which is not changed.
        batches: labelled examples, on its device. Where a loss is a mean over words, that of an
            example is the sum over its words.
        normalise: divide by the L2 norm of each layer, as the paper does.

    Returns:
        float32; NaN beyond the end of a layer that has fewer heads than others.

    Raises:
        ConfigError: the encoder cannot be pruned, or there is no batch.
    """
    ends = [(attention.out, attention.heads) for attention in attentions(objective.encoder)]
    return _importance(objective, batches, ends, normalise)


def unit_importance(
    objective: Objective, batches: Iterable[Batch], normalise: bool = True
) -> Float[Tensor, "layer part"]:
    """The same for the units of the feed-forward layers."""
    ends = [(layer.down, layer.down.in_features) for layer in feedforwards(objective.encoder)]
    return _importance(objective, batches, ends, normalise)


def least_important(importance: Float[Tensor, "layer part"], share: float) -> dict[int, list[int]]:
    """The least important `share` of all parts, whatever layers they are in.

    >>> least_important(torch.tensor([[0.3, 0.1], [0.2, 0.9]]), 0.5)
    {0: [1], 1: [0]}

    Raises:
        ConfigError: the share is not between 0 and 1.
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"the share to prune must lie in [0, 1], got {share}")
    known = int((~importance.isnan()).sum())
    order = importance.nan_to_num(nan=torch.inf).flatten().argsort(stable=True)
    out: dict[int, list[int]] = {}
    for place in sorted(order[: round(share * known)].tolist()):
        out.setdefault(place // importance.shape[1], []).append(place % importance.shape[1])
    return out


def _importance(
    objective: Objective,
    batches: Iterable[Batch],
    ends: Sequence[tuple[nn.Linear, int]],
    normalise: bool,
) -> Float[Tensor, "layer part"]:
    """`ends` are the linear layers that read the parts, and the numbers of these."""
    device = next(objective.parameters()).device
    masks: dict[int, Tensor] = {}
    hooks = [
        end.register_forward_pre_hook(_masked_by(masks, layer, parts))
        for layer, (end, parts) in enumerate(ends)
        if parts
    ]
    total = torch.full((len(ends), max(parts for _, parts in ends)), torch.nan, device=device)
    for layer, (_, parts) in enumerate(ends):
        total[layer, :parts] = 0
    was_training, examples = objective.training, 0
    objective.eval()
    try:
        for number, batch in enumerate(batches if hooks else ()):
            masks.clear()
            output = objective.loss(batch, torch_generator(0, "importance", number, device=device))
            gradients = torch.autograd.grad(output.loss * output.weight, list(masks.values()))
            for layer, gradient in zip(masks, gradients, strict=True):
                total[layer, : ends[layer][1]] += gradient.abs().sum(0)
            examples += len(gradients[0])
    finally:
        for hook in hooks:
            hook.remove()
        objective.train(was_training)
    if not examples:
        raise ConfigError("importance needs heads or units that are left, and labelled examples")
    total /= examples
    if normalise:
        total /= total.nan_to_num().norm(dim=1, keepdim=True).clamp(min=1e-20)
    return total


def _masked_by(masks: dict[int, Tensor], layer: int, parts: int) -> Callable[..., tuple[Tensor]]:
    def masked(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        (x,) = inputs  # (batch, time, width of all parts)
        if layer not in masks:  # a shared layer is read several times
            masks[layer] = x.new_ones(len(x), parts).requires_grad_()
        return ((x.unflatten(-1, (parts, -1)) * masks[layer][:, None, :, None]).flatten(-2),)

    return masked
