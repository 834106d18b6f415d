"""Weight maps: one table that reads another program's tensors into ours and writes ours back.

A `Rule` ties one tensor of ours to one or several of theirs. Import and export follow the same
rules in opposite directions, so they cannot disagree. Every tensor must be accounted for on both
sides: what no rule names is an error.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from selfsup.errors import CheckpointError


@dataclass(frozen=True)
class Rule:
    """One tensor of ours, and what it is on the other side.

    Attributes:
        ours: name in the objective's state.
        theirs: names there; several are stacked along the first axis, all of one size.
        scales: ours is theirs times this, for each of `theirs`; empty: 1.
        transposed: matrices are kept as (in, out) there.
        heads: above 0: rows there are in the order (head, part, width), ours (part, head, width),
            with the three parts query, key and value.
        skip: rows that theirs has in front, for positions that are never used; written as zeros.
        flipped: the order of the rows is the other way round.
        repeated: where theirs has one row, ours has two alike.
        vocabulary: rows are token ids; rows beyond our vocabulary are left out.
        identical: ours is written there a second time, and not read.
    """

    ours: str
    theirs: tuple[str, ...]
    scales: tuple[float, ...] = ()
    transposed: bool = False
    heads: int = 0
    skip: int = 0
    flipped: bool = False
    repeated: bool = False
    vocabulary: bool = False
    identical: bool = False

    def read(self, parts: list[Tensor], rows: int) -> Tensor:
        """Our tensor from theirs; `rows` is the size of our vocabulary."""
        parts = [part.float().T if self.transposed else part.float() for part in parts]
        if self.scales:
            parts = [part * scale for part, scale in zip(parts, self.scales, strict=True)]
        whole = torch.cat(parts)[self.skip :]
        if self.heads:
            whole = whole.unflatten(0, (self.heads, 3, -1)).transpose(0, 1).flatten(0, 2)
        if self.repeated and len(whole) == 1:
            whole = torch.cat([whole, whole])
        if self.vocabulary:
            whole = whole[:rows]
        return (whole.flip(0) if self.flipped else whole).contiguous()

    def write(self, whole: Tensor) -> list[Tensor]:
        """Their tensors from ours."""
        whole = whole.flip(0) if self.flipped else whole
        if self.heads:
            whole = whole.unflatten(0, (3, self.heads, -1)).transpose(0, 1).flatten(0, 2)
        if self.skip:
            whole = torch.cat([whole.new_zeros(self.skip, *whole.shape[1:]), whole])
        parts = list(whole.chunk(len(self.theirs)))
        if self.scales:
            parts = [part / scale for part, scale in zip(parts, self.scales, strict=True)]
        return [(part.T if self.transposed else part).contiguous() for part in parts]


def linear(
    ours: str,
    *theirs: str,
    bias: bool = True,
    transposed: bool = False,
    heads: int = 0,
    flipped: bool = False,
) -> list[Rule]:
    """A linear layer, or one of ours that joins several of theirs; also a normalisation."""
    weight = Rule(
        f"{ours}.weight",
        tuple(f"{name}.weight" for name in theirs),
        transposed=transposed,
        heads=heads,
        flipped=flipped,
    )
    if not bias:
        return [weight]
    names = tuple(f"{name}.bias" for name in theirs)
    return [weight, replace(weight, ours=f"{ours}.bias", theirs=names, transposed=False)]


def repeated(rules: Iterable[Rule], layers: int) -> list[Rule]:
    """The rules of every layer, from templates with `{i}` in the names."""
    templates = list(rules)
    return [
        replace(
            rule,
            ours=rule.ours.replace("{i}", str(i)),
            theirs=tuple(name.replace("{i}", str(i)) for name in rule.theirs),
        )
        for i in range(layers)
        for rule in templates
    ]


def read(
    rules: list[Rule],
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, torch.Size],
    rows: int,
    where: str,
) -> dict[str, Float[Tensor, "..."]]:
    """Our tensors from theirs, float32.

    Args:
        rules: the map.
        tensors: theirs, without those that are derived from others.
        shapes: what is to be filled.
        rows: size of our vocabulary.
        where: what to call their file in an error.

    Raises:
        CheckpointError: a tensor is missing, is of another shape, or is named by no rule.
    """
    rules = [rule for rule in rules if not rule.identical]
    wanted = {name for rule in rules for name in rule.theirs}
    missing, extra = sorted(wanted - tensors.keys()), sorted(tensors.keys() - wanted)
    if missing:
        raise CheckpointError(f"{where}: tensors are missing: {_some(missing)}")
    if extra:
        raise CheckpointError(
            f"{where}: tensors that this layout has no place for: {_some(extra)}; this is another "
            "model than config.json says"
        )
    out = {}
    for rule in rules:
        try:
            value = rule.read([tensors[name] for name in rule.theirs], rows)
        except RuntimeError as error:
            raise CheckpointError(f"{where}: {_some(rule.theirs)}: {error}") from error
        if rule.ours not in shapes or value.shape != shapes[rule.ours]:
            given = [tuple(tensors[name].shape) for name in rule.theirs]
            raise CheckpointError(
                f"{where}: {_some(rule.theirs)} of shape {given[0]} does not fit {rule.ours}, "
                f"{tuple(shapes.get(rule.ours, ()))}; config.json belongs to other weights"
            )
        out[rule.ours] = value
    assert out.keys() == shapes.keys(), sorted(out.keys() ^ shapes.keys())[:5]
    return out


def write(rules: list[Rule], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors from ours; every tensor of `state` is named by a rule."""
    named = {rule.ours for rule in rules}
    assert named == state.keys(), sorted(named ^ state.keys())[:5]
    out: dict[str, Tensor] = {}
    for rule in rules:
        whole = state[rule.ours].detach().cpu().float()
        out |= dict(zip(rule.theirs, rule.write(whole), strict=True))
    return out


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
