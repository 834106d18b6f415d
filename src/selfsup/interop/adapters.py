"""What a tuning has added, as PEFT keeps it: LoRA, (IA)3, prefixes and prompts, in both directions.

The rules of the encoder (`maps.py`) say which modules of `transformers` a linear layer of ours is.
Where ours is fused and theirs are three, each share is one of theirs; where both are fused (GPT-2),
the shares become one change of as many times the rank. What is read may differ in form and computes
the same: see `read_lora` and `read_ia3`.

Axes: rank; in, out: of one of their modules; share: query, key and value of a fused layer.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from selfsup.errors import ConfigError
from selfsup.interop import maps
from selfsup.interop.weights import Rule
from selfsup.models.encoder import Encoder
from selfsup.tuning import lora
from selfsup.tuning.parts import linear_places

SHARES = ("query", "key", "value")


class Change(NamedTuple):
    """A low-rank change of one of their modules: scale * b @ a."""

    a: Tensor  # (rank, in)
    b: Tensor  # (out, rank)
    scale: float


def linear_rules(rules: list[Rule], encoder: Encoder) -> dict[str, Rule]:
    """The rule of each linear layer, by its place in the encoder."""
    out = {}
    for rule in rules:
        place, _, last = rule.ours.removeprefix("encoder.").rpartition(".")
        if last == "weight" and not rule.identical:
            try:
                layer = encoder.get_submodule(place)
            except AttributeError:  # a head's
                continue
            if isinstance(layer, nn.Linear):
                out[place] = replace(rule, transposed=False)
    return out


def layer_at(encoder: Encoder, place: str) -> nn.Linear:
    """The linear layer at a place."""
    layer = encoder.get_submodule(place)
    assert isinstance(layer, nn.Linear)
    return layer


def module_of(name: str) -> str:
    """The module that a weight belongs to."""
    return name.removesuffix(".weight")


def write_lora(places: Mapping[str, lora.LoRA], rules: Mapping[str, Rule]) -> dict[str, Change]:
    """Changes of their modules, by name.

    Raises:
        ConfigError: a layer that their model does not have.
    """
    out = {}
    if lost := sorted(places.keys() - rules.keys()):
        raise ConfigError(f"LoRA on {', '.join(lost)}: their model has no such linear layer")
    for place, part in places.items():
        rule, a, b = rules[place], part.a.detach(), part.b.detach()
        names, fused = [module_of(name) for name in rule.theirs], 3 * part.width
        if not part.fused:
            for name, rows in zip(names, rule.write(b[0]), strict=True):
                out[name] = Change(a[0], rows, part.scale)
            continue
        spread = _spread(b, part.shares, fused)
        if len(names) == 1:
            out[names[0]] = Change(a.flatten(0, 1), rule.write(spread)[0], part.scale)
            continue
        columns = zip(part.shares, a, spread.split(b.shape[2], 1), strict=True)
        for share, matrix, some in columns:
            out[names[share]] = Change(matrix, rule.write(some)[share], part.scale)
    return out


def _spread(b: Tensor, shares: tuple[int, ...], rows: int) -> Tensor:
    """(share, width, rank) as (rows, share * rank): each share in rows and columns of its own."""
    out = b.new_zeros(rows, len(shares) * b.shape[2])
    for number, share in enumerate(shares):
        down, right = share * b.shape[1], number * b.shape[2]
        out[down : down + b.shape[1], right : right + b.shape[2]] = b[number]
    return out


def scales(values: Mapping[str, Any], name: str, rank: int) -> float:
    """What PEFT multiplies the change of a module by."""
    alpha = values.get("lora_alpha", 8)
    for pattern, other in (values.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            alpha = other
    return alpha / (rank**0.5 if values.get("use_rslora") else rank)


def read_lora(
    changes: Mapping[str, Change], rules: Mapping[str, Rule], encoder: Encoder, dropout: float
) -> tuple[dict[str, Any], dict[str, tuple[Tensor, Tensor]]]:
    """The options of our tuning, and A (share, rank, in) and B (share, width, rank) of each place.

    Ours has one rank, one scale and one choice of layers for all blocks. So a smaller rank is
    filled up with zeros in B, a layer that PEFT leaves alone is one whose B is zero, and another
    scale is a factor of B.

    Raises:
        ConfigError: a module is no linear layer of ours.
    """
    if not changes:
        raise ConfigError("the adapter holds no lora_A and lora_B")
    found: dict[str, tuple[tuple[int, ...], Tensor, Tensor]] = {}
    known = {module_of(name) for rule in rules.values() for name in rule.theirs}
    lost = sorted(changes.keys() - known)
    if lost:
        raise ConfigError(f"LoRA on {', '.join(lost[:3])}: the base has no such linear layer")
    scale = Counter(change.scale for change in changes.values()).most_common(1)[0][0]
    for place, rule in rules.items():
        mine = {i: changes.get(module_of(name)) for i, name in enumerate(rule.theirs)}
        here = {i: change for i, change in mine.items() if change is not None}
        if not here:
            continue
        width = layer_at(encoder, place).out_features // len(mine)
        scaled = {i: change.b * (change.scale / scale) for i, change in here.items()}
        blank = next(iter(scaled.values()))
        parts: dict[int, Tensor] = {}  # each change alone, in our rows
        for i, b in scaled.items():
            rows = [b if j == i else blank.new_zeros(width, b.shape[1]) for j in mine]
            parts[i] = rule.read(rows, 0)
        if len(mine) == 3:
            rank = max(b.shape[1] for b in scaled.values())
            a = torch.stack([_grown(change.a, rank, 0) for change in here.values()])
            b = torch.stack([_grown(parts[i].chunk(3)[i], rank, 1) for i in here])
            found[place] = (tuple(here), a, b)
        else:  # one, or two that ours joins: the ranks stand side by side
            a = torch.cat([change.a for change in here.values()])
            found[place] = ((), a.unsqueeze(0), torch.cat(list(parts.values()), 1).unsqueeze(0))
    rank = max(a.shape[1] for _, a, _ in found.values())
    targets = sorted(
        {name for place, (shares, _, _) in found.items() for name in _words(place, shares)}
    )
    options = {"rank": rank, "alpha": scale * rank, "targets": targets, "dropout": dropout}
    placed = {}
    for place, shares in linear_places(encoder, targets).items():
        if place in found:
            own, a, b = found[place]
            placed[place] = (_shared(own, shares, a), _shared(own, shares, b))
    return options, placed


def _words(place: str, shares: tuple[int, ...]) -> list[str]:
    return [SHARES[share] for share in shares] or [place.rpartition(".")[2]]


def _grown(matrix: Tensor, rank: int, axis: int) -> Tensor:
    shape = list(matrix.shape)
    shape[axis] = rank - shape[axis]
    return torch.cat((matrix, matrix.new_zeros(shape)), axis)


def _shared(own: tuple[int, ...], shares: tuple[int, ...], given: Tensor) -> Tensor:
    """The matrices of the shares that there are, zeros for those that are not changed."""
    if not shares:
        return given
    zeros = torch.zeros_like(given[0])
    return torch.stack([given[own.index(s)] if s in own else zeros for s in shares])


def fill_lora(part: lora.LoRA, a: Tensor, b: Tensor) -> None:
    """Puts A and B of at most its rank into a part; what is left of A stays as it began."""
    with torch.no_grad():
        part.b.zero_()
        part.a[:, : a.shape[1]] = a
        part.b[:, :, : b.shape[2]] = b


def write_ia3(
    places: Mapping[str, Any], rules: Mapping[str, Rule]
) -> tuple[dict[str, Tensor], list[str]]:
    """Factors of their modules by name, (out, 1) or (1, in), and which of them are on the input."""
    out, inputs = {}, []
    for place, part in places.items():
        rule, factors = replace(rules[place], scales=()), part.factors.detach()
        names = [module_of(name) for name in rule.theirs]
        if part.on_input:
            out[names[0]] = factors.unsqueeze(0)
            inputs.append(names[0])
            continue
        whole = torch.cat((factors.new_ones(part.num_plain), factors)).unsqueeze(1)  # (out, 1)
        for name, rows in zip(names, rule.write(whole), strict=True):
            if len(names) != 3 or name != names[0]:  # a query has none
                out[name] = rows
    return out, inputs


def read_ia3(
    factors: Mapping[str, Tensor], rules: Mapping[str, Rule], encoder: Encoder
) -> dict[str, Tensor]:
    """The factors of each place of our (IA)3.

    Ours are on keys, values and on what the second feed-forward matrix reads. A factor on a query
    is one on the key that it meets, and a factor on what attention's output matrix reads is one on
    the values, so these are moved there.

    Raises:
        ConfigError: a factor that no other can stand for.
    """
    left, lost = dict(factors), []
    out: dict[str, Tensor] = {}
    moved: dict[str, Tensor] = {}
    for place, rule in rules.items():
        rule, last = replace(rule, scales=()), place.rpartition(".")[2]
        names = [module_of(name) for name in rule.theirs]
        if not any(name in left for name in names):
            continue
        layer = layer_at(encoder, place)
        blank = torch.ones(layer.out_features // len(names), 1)
        given = [left.pop(name, blank) for name in names]
        on_input = given[0].shape == (1, layer.in_features)
        if last == "down" and on_input:
            out[place] = given[0].flatten()
        elif last in ("qkv", "kv") and all(x.shape[1] == 1 for x in given):
            out[place] = rule.read(given, 0).flatten()
        elif last == "out" and on_input:
            moved[place] = given[0].flatten()
        else:
            lost.append(names[0])
    lost += left
    if lost:
        raise ConfigError(f"(IA)3 on {', '.join(sorted(lost)[:3])}: ours has no factor there")
    for place, values in moved.items():
        start = place.removesuffix("out")
        source = f"{start}qkv" if f"{start}qkv" in rules else f"{start}kv"
        whole = out.get(source, torch.ones(layer_at(encoder, source).out_features))
        out[source] = torch.cat((whole[: -len(values)], whole[-len(values) :] * values))
    for place in [place for place in out if place.endswith("qkv")]:
        queries, keys, values = out[place].chunk(3)
        if encoder.config.positions == "rotary" and not bool((queries == 1).all()):
            raise ConfigError("(IA)3 on queries: where positions turn them it is none on keys")
        out[place] = torch.cat((queries * keys, values))
    return out


def check_prompt(encoder: Any) -> None:
    """Refuses an encoder-decoder.

    Raises:
        ConfigError: in PEFT its decoder sees what the encoder makes of the prompt, in ours not.
    """
    if hasattr(encoder, "source"):
        raise ConfigError(
            "a soft prompt of an encoder-decoder: in PEFT the decoder sees what the encoder makes "
            "of the prompt, in ours it does not"
        )


def written_prompt(vectors: Tensor, encoder: Any) -> Tensor:
    """A soft prompt on the scale of their token table: (prompt, width)."""
    return (vectors.detach() - _segment(encoder)) * maps.factor(encoder.config)


def read_prompt(vectors: Tensor, encoder: Any) -> Tensor:
    """The inverse of `written_prompt`."""
    return vectors / maps.factor(encoder.config) + _segment(encoder)


def _segment(encoder: Any) -> Tensor | float:
    """What they add to every vector of a prompt, and ours holds in it."""
    table = encoder.embedding.segments
    return 0.0 if table is None else table.weight[0].detach()


def of_kind(encoder: Encoder, name: str) -> Iterator[tuple[str, str, Any]]:
    """Place (with dots), tuning and part of a set of an encoder's additions."""
    additions: Any = encoder.additions
    for place, kind, part in additions.every(name):
        yield place.replace("/", "."), kind, part
