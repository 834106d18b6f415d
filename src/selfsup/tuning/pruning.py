"""Pruning heads, feed-forward units and layers: they leave the network, which is then faster.

Attention heads and units go by what they are worth (`importance.py`), layers by their place: Sajjad
et al., "On the Effect of Dropping Layers of Pre-trained Transformer Models" (2020, arXiv
2004.03844) find that of the last ones BERT needs few.

What is pruned is cut out of the matrices. `Config` says what is left (`heads_left`,
`feedforward_left`, `layers`), so that a saved run gets its new shape back. A layer may lose all of
its heads, and its attention is then the output's bias.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from jaxtyping import Int
from torch import Tensor, nn

from selfsup.errors import ConfigError, nearest
from selfsup.models.attention import Attention
from selfsup.models.block import Block, Feedforward
from selfsup.models.encoder import Encoder
from selfsup.models.transformer import TransformerEncoder

Parts = Mapping[int, Collection[int]]
"""Layer -> numbers of its heads or units, as they are now."""


def prunable(encoder: Encoder) -> TransformerEncoder:
    """The encoder, if it is one that can be pruned.

    Raises:
        ConfigError: it is no transformer, or a tuning has put something into it or around it.
    """
    if not isinstance(encoder, TransformerEncoder):
        raise ConfigError(
            f"{type(encoder).__name__} cannot be pruned: only a transformer can "
            "(model.name = 'transformer'), pre-trained or tuned with full or probe"
        )
    if hasattr(encoder, "additions"):
        raise ConfigError("this run's tuning added parts to the encoder: merge them before pruning")
    return encoder


@torch.no_grad()
def prune_heads(encoder: Encoder, heads: Parts) -> None:
    """Removes attention heads; the encoder then has other, smaller parameters.

    Args:
        encoder: changed in place. Cross-attention, where it has any, keeps its heads.
        heads: which, by layer.

    Raises:
        ConfigError: the encoder cannot be pruned, or has no such layer or head.
    """
    layers, encoder = attentions(encoder), prunable(encoder)
    config = encoder.config
    kept = _kept(heads, [attention.heads for attention in layers], "head")
    for layer, left in kept.items():
        attention = layers[layer]
        place = torch.arange(attention.heads * config.head_dim).view(attention.heads, -1)
        columns = place[left].flatten()
        rows = torch.cat([columns + part * place.numel() for part in range(3)])
        _keep(attention.qkv, rows, 0)
        _keep(attention.out, columns, 1)
        if encoder.relative is not None:
            known = torch.arange(config.heads) if attention.kept is None else attention.kept
            attention.kept = known[left.to(known.device)].to(attention.qkv.weight.device)
        attention.heads = len(left)
    left_over = _left([attention.heads for attention in layers], config.heads)
    encoder.config = replace(config, heads_left=left_over)


@torch.no_grad()
def prune_units(encoder: Encoder, units: Parts) -> None:
    """Removes units of the feed-forward layers, with their gates.

    Args:
        encoder: changed in place.
        units: which, by layer.

    Raises:
        ConfigError: the encoder cannot be pruned, has experts, or has no such layer or unit.
    """
    layers, encoder = feedforwards(encoder), prunable(encoder)
    kept = _kept(units, [layer.down.in_features for layer in layers], "unit")
    for number, left in kept.items():
        layer = layers[number]
        gates = [left + layer.down.in_features] if layer.gated else []
        _keep(layer.up, torch.cat([left, *gates]), 0)
        _keep(layer.down, left, 1)
    widths = [layer.down.in_features for layer in layers]
    left_over = _left(widths, encoder.config.feedforward_width)
    encoder.config = replace(encoder.config, feedforward_left=left_over)


def prune_layers(encoder: Encoder, layers: Collection[int]) -> None:
    """Removes whole layers; where all share one, it is used less often.

    Args:
        encoder: changed in place.
        layers: their numbers, from 0.

    Raises:
        ConfigError: the encoder cannot be pruned, has experts or no such layer, or none would be
            left.
    """
    encoder = prunable(encoder)
    config = encoder.config
    known = range(config.layers)
    for layer in layers:
        if layer not in known:
            raise ConfigError(f"there is no layer {layer}: the layers are 0 to {known[-1]}")
    if config.experts:
        raise ConfigError("layers with experts stand at fixed places: no layer can be dropped")
    kept = [layer for layer in known if layer not in layers]
    if not kept:
        raise ConfigError(f"all {config.layers} layers would be dropped: keep at least one")
    shape: dict[str, object] = {"layers": len(kept)}
    if not config.share_layers:
        encoder.layers = nn.ModuleList(encoder.layers[layer] for layer in kept)
        left = [config.left(layer) for layer in kept]
        shape["heads_left"] = _left([heads for heads, _ in left], config.heads)
        shape["feedforward_left"] = _left([width for _, width in left], config.feedforward_width)
    encoder.config = replace(config, **shape)  # type: ignore[arg-type]
    encoder.num_layers = len(kept)


def layers_to_drop(strategy: str, count: int, num_layers: int) -> list[int]:
    """Which layers the strategies of Sajjad et al. drop.

    Args:
        strategy: top: the last ones, which the paper finds best; alternate: every other one, from
            the last one downward (where the layers are even in number its "even alternate");
            symmetric: those in the middle; bottom: the first ones. Its "odd alternate" and
            "contribution-based" dropping are left out.
        count: how many.
        num_layers: of how many.

    >>> [layers_to_drop(how, 2, 6) for how in ("top", "alternate", "symmetric", "bottom")]
    [[4, 5], [3, 5], [2, 3], [0, 1]]

    Raises:
        ConfigError: no such strategy, or too many layers.
    """
    first = (num_layers - count) // 2
    strategies = {
        "top": range(num_layers - count, num_layers),
        "alternate": range(num_layers + 1 - 2 * count, num_layers, 2),
        "symmetric": range(first, first + count),
        "bottom": range(count),
    }
    if strategy not in strategies:
        raise ConfigError(f"unknown strategy {strategy!r}{nearest(strategy, strategies)}")
    most = (num_layers + 1) // 2 if strategy == "alternate" else num_layers - 1
    if not 1 <= count <= min(most, num_layers - 1):
        raise ConfigError(
            f"of {num_layers} layers, 1 to {min(most, num_layers - 1)} can be dropped "
            f"({strategy}), got {count}"
        )
    return list(strategies[strategy])


def attentions(encoder: Encoder) -> list[Attention]:
    """The self-attention of every layer."""
    return [cast(Block, block).attention for block in prunable(encoder).layers]


def feedforwards(encoder: Encoder) -> list[Feedforward]:
    """The feed-forward layers, refused where they hold experts."""
    every = [cast(Block, block).feedforward for block in prunable(encoder).layers]
    layers = [layer for layer in every if isinstance(layer, Feedforward)]
    if len(layers) < len(every):
        raise ConfigError("feed-forward layers with experts cannot be pruned; heads can")
    return layers


def _kept(gone: Parts, sizes: Sequence[int], name: str) -> dict[int, Int[Tensor, " part"]]:
    """The parts that stay, of the layers that lose some."""
    for layer, numbers in gone.items():
        if not 0 <= layer < len(sizes):
            raise ConfigError(f"there is no layer {layer}: the layers are 0 to {len(sizes) - 1}")
        for number in numbers:
            if not 0 <= number < sizes[layer]:
                raise ConfigError(
                    f"layer {layer} has no {name} {number}: it has {sizes[layer]}, from 0"
                )
    return {
        layer: torch.tensor([i for i in range(sizes[layer]) if i not in numbers], dtype=torch.long)
        for layer, numbers in ((layer, set(numbers)) for layer, numbers in gone.items())
        if numbers
    }


def _keep(layer: nn.Linear, numbers: Int[Tensor, " kept"], axis: int) -> None:
    """Keeps these outputs (axis 0) or inputs (axis 1) of a linear layer."""
    weight, bias, numbers = layer.weight, layer.bias, numbers.to(layer.weight.device)
    layer.weight = nn.Parameter(weight.index_select(axis, numbers), weight.requires_grad)
    layer.out_features, layer.in_features = layer.weight.shape
    if bias is not None and axis == 0:
        layer.bias = nn.Parameter(bias[numbers], bias.requires_grad)


def _left(sizes: Sequence[int], whole: int) -> tuple[int, ...]:
    """The key of `Config` for these sizes."""
    return () if all(size == whole for size in sizes) else tuple(sizes)
