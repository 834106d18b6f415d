"""Prefix tuning: learned keys and values that every position of every layer sees.

Li and Liang, "Prefix-Tuning: Optimizing Continuous Prompts for Generation" (2021, arXiv
2101.00190), section 4: in each layer keys and values of a number of slots stand before those that
the layer makes of its items, and only these are trained. With `projection` they come out of an MLP
over a smaller table (their section 4.3, for stability), which is kept with the run. An
encoder-decoder has one prefix for each stack; its cross-attention has none, as the memory is made
of items.

Positions: the keys enter as they are, so rotary positions do not turn them, and distances (relative
positions) to them count nothing. The items' own positions begin at 0, as in pre-training; with
`shift_positions` they begin behind the prefix, as where a prefix is a cache of tokens.

Axes: batch; prefix: slots; layer; heads; head_dim; width: keys and values of all layers:
sum over layers of 2 * heads * head_dim.

Deviations:
- The table begins as Normal(0, init_std), not as the activations of real words.
- The MLP is not thrown away after training.
"""

from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from selfsup.models import view
from selfsup.models.transformer import TransformerEncoder
from selfsup.objective import Task
from selfsup.tuning.parts import Additions, Part, Where, add, additions_of, innermost, stacks


@dataclass(frozen=True, kw_only=True)
class Config:
    """How long the prefix is, and what it is made of."""

    length: int = 10
    """Slots of every layer."""
    projection: int = 0
    """Inner width of the MLP that makes keys and values; 0: they are trained themselves."""
    init_std: float = 0.02
    """Of the initial table, of `projection`'s or of keys and values."""
    shift_positions: bool = False
    """The items' positions begin at `length`."""

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"length must be at least 1, got {self.length}")
        for name in ("projection", "init_std"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")


@final
class Prefix(Part):
    """Keys and values of all layers of one stack.

    Args:
        stack: whose layers they are for.
        config: length and kind.

    Attributes:
        table: (prefix, width): layer by layer its keys, then its values, each (heads, head_dim);
            with a projection (prefix, dim).
    """

    def __init__(self, stack: TransformerEncoder, config: Config):
        super().__init__()
        blocks: list[Any] = [*stack.layers] * (stack.num_layers // len(stack.layers))
        self.heads: list[int] = [block.attention.heads for block in blocks]
        self.head_dim, self.shift = stack.config.head_dim, config.shift_positions
        width = 2 * sum(self.heads) * self.head_dim
        like = next(stack.parameters())
        where: Any = {"device": like.device, "dtype": like.dtype}
        inner = config.projection
        self.table = nn.Parameter(like.new_empty(config.length, stack.dim if inner else width))
        nn.init.normal_(self.table, std=config.init_std)
        self.project: nn.Module = nn.Identity()
        if inner:
            self.project = nn.Sequential(
                nn.Linear(stack.dim, inner, **where), nn.Tanh(), nn.Linear(inner, width, **where)
            )

    def layers(self) -> list[Float[Tensor, "two heads prefix head_dim"]]:
        """Keys and values of each layer."""
        widths = [2 * heads * self.head_dim for heads in self.heads]
        return [
            part.unflatten(1, (2, heads, self.head_dim)).permute(1, 2, 0, 3)
            for part, heads in zip(
                self.project(self.table).split(widths, 1), self.heads, strict=True
            )
        ]


class Prefixes:
    """What a stack asks for the prefixes at work.

    Args:
        additions: of the encoder that the stack is, or belongs to.
        place: of the prefixes.
    """

    def __init__(self, additions: Additions, place: str):
        self.additions, self.place = additions, place

    def __call__(self, num_rows: int) -> view.Prefix | None:
        """Those of all active sets, one behind the other; a row sees those of its own sets."""
        working = list(self.additions.working(self.place, num_rows))
        if not working:
            return None
        of_layers = zip(*(part.layers() for _, part in working), strict=True)
        layers = []
        for parts in of_layers:
            keys, values = torch.cat(parts, 2).unsqueeze(1).expand(-1, num_rows, -1, -1, -1)
            layers.append((keys, values))
        lengths = [len(part.table) for _, part in working]
        shifts = [length * part.shift for length, (_, part) in zip(lengths, working, strict=True)]
        device = working[0][1].table.device
        if all(rows is None for rows, _ in working):
            shift = torch.tensor([[sum(shifts)]], device=device) if any(shifts) else None
            return view.Prefix(layers, None, shift)
        seen = torch.zeros(num_rows, len(working), dtype=torch.bool, device=device)
        for number, (rows, _) in enumerate(working):
            seen[slice(None) if rows is None else rows, number] = True
        shift = (seen * torch.tensor(shifts, device=device)).sum(1, keepdim=True)
        real = seen.repeat_interleave(torch.tensor(lengths, device=device), 1)
        return view.Prefix(layers, real, shift if any(shifts) else None)


def prefix(task: Task, config: Config, where: Where) -> None:
    """Puts a prefix before what each layer reads.

    Raises:
        ConfigError: the encoder is no transformer.
    """
    encoder = innermost(task.encoder)
    for name, stack in stacks(encoder, "prefix").items():
        place = f"{name}layers"
        add(encoder, where.name, "prefix", place, Prefix(stack, config))
        stack.prefix = Prefixes(additions_of(encoder), place.replace(".", "/"))
