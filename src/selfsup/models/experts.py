"""Experts: feed-forward layers of which each token passes one, as in the Switch Transformer.

Fedus, Zoph and Shazeer, "Switch Transformers: Scaling to Trillion Parameter Models with Simple and
Efficient Sparsity" (2021, arXiv 2101.03961). A router gives each token a probability for every
expert; the token goes to the likeliest one, and what comes out is weighed by that probability. In
training each expert has room for `capacity` * tokens / experts, in the order of the batch; tokens
that find no room pass by on the residual sum alone. A loss keeps the experts equally busy
(equation 4).

Axes: batch, time, token = real positions of the batch, expert, room, dim, inner.

Deviations from the paper:
- Outside training there is room for all, so that a result does not depend on its neighbours; the
  authors' code drops there too, from twice the mean.
- No noise on the router's input, and capacity is counted over the batch of one rank.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn


class Routing(NamedTuple):
    """Where the tokens of one layer went.

    Attributes:
        balance: experts * sum of (share of tokens * mean probability); 1 when all are equally busy.
        dropped: number of tokens that found no room.
        tokens: number of tokens.
    """

    balance: Float[Tensor, ""]
    dropped: Float[Tensor, ""]
    tokens: Float[Tensor, ""]


class Experts(nn.Module):
    """Feed-forward layers without biases, and the router that chooses among them.

    Args:
        dim, inner: widths.
        experts: how many.
        activation: between the two matrices of an expert.
        capacity: room in training, as a multiple of an equal share.

    Attributes:
        up: its weight is (experts * inner, dim), `down.weight` (experts * dim, inner).
    """

    def __init__(
        self,
        dim: int,
        inner: int,
        experts: int,
        activation: Callable[[Tensor], Tensor],
        capacity: float,
    ):
        super().__init__()
        self.experts, self.activation, self.capacity = experts, activation, capacity
        self.router = nn.Linear(dim, experts, bias=False)
        self.up = nn.Linear(dim, experts * inner, bias=False)
        self.down = nn.Linear(inner, experts * dim, bias=False)

    def forward(
        self, x: Float[Tensor, "batch time dim"], real: Bool[Tensor, "batch time"] | None
    ) -> tuple[Float[Tensor, "batch time dim"], Routing]:
        """Sends each real token through its expert; padding gives 0."""
        tokens = x.flatten(0, 1)  # (token, dim)
        device = "cpu" if x.is_meta else x.device.type
        with torch.autocast(device, enabled=False):  # the choice needs float32 (section 2.4)
            share = (tokens.float() @ self.router.weight.float().T).softmax(-1)  # (token, expert)
        weight, chosen = share.max(-1)
        taken = torch.nn.functional.one_hot(chosen, self.experts)  # (token, expert)
        if real is not None:
            taken = taken * real.flatten().unsqueeze(1)
        before = taken.cumsum(0) - taken  # tokens ahead in each expert's queue
        place = before.gather(1, chosen.unsqueeze(1)).squeeze(1)  # (token,)
        count = taken.sum(1)  # 1 where real
        if self.training:
            room = math.ceil(self.capacity * len(tokens) / self.experts)
        else:
            room = max(1, int(taken.sum(0).max()))
        served = (place < room) & (count > 0)
        # the last slot takes those that are not served
        slot = torch.where(served, chosen * room + place, self.experts * room)
        queues = tokens.new_zeros(self.experts * room + 1, tokens.shape[1])
        queues = queues.index_copy(0, slot, tokens)[:-1].unflatten(0, (self.experts, room))
        up = self.up.weight.unflatten(0, (self.experts, -1))  # (expert, inner, dim)
        down = self.down.weight.unflatten(0, (self.experts, -1))  # (expert, dim, inner)
        out = torch.bmm(self.activation(torch.bmm(queues, up.mT)), down.mT)  # (expert, room, dim)
        out = torch.cat([out.flatten(0, 1), out.new_zeros(1, out.shape[-1])])[slot]
        out = out * weight.to(out.dtype).unsqueeze(1)
        total = count.sum().clamp(min=1)
        busy = taken.sum(0) / total  # (expert,)
        likely = (share * count.unsqueeze(1)).sum(0) / total
        dropped = ((count > 0) & ~served).sum()
        routing = Routing(self.experts * (busy * likely).sum(), dropped.float(), total.float())
        return out.view_as(x), routing


def summed(
    routings: Sequence[Routing], weight: float
) -> tuple[Float[Tensor, ""] | None, dict[str, Tensor]]:
    """The loss that all layers add to a method's, and what is worth plotting.

    Returns:
        `weight` times the sum of `balance`, or None without experts; `balance` (mean over layers),
        `dropped_tokens` (all layers) and `dropped_share`.
    """
    if not routings:
        return None, {}
    balance, dropped, tokens = (torch.stack(part) for part in zip(*routings, strict=True))
    metrics = {
        "balance": balance.detach().mean(),
        "dropped_tokens": dropped.sum(),
        "dropped_share": dropped.sum() / tokens.sum(),
    }
    return weight * balance.sum(), metrics
