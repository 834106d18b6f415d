"""How deep each weight of an encoder lies: what treats lower layers otherwise than upper ones asks.

Axes: none; a depth is 0 for the embedding and the number of a layer, from 1, above it.
"""

import re

from torch import nn

from selfsup.errors import ConfigError
from selfsup.models.encoder import Encoder
from selfsup.objective import Task
from selfsup.tuning.parts import innermost

LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
ABOVE = ("final_norm", "pooler")
"""Modules that read the last layer: they belong to it."""


def depth_of(name: str, num_layers: int) -> int:
    """The depth of a weight by its name; what a tuning adds lies where its place does.

    >>> [depth_of(name, 4) for name in ("embedding.tokens.weight", "layers.0.attention.out.bias",
    ...     "final_norm.weight", "additions.own.layers/3/feedforward.adapter.up.weight")]
    [0, 1, 4, 4]
    """
    found = LAYER.search(name.replace("/", "."))
    if found:
        return int(found[1]) + 1
    return num_layers if name.partition(".")[0] in ABOVE else 0


def moving(task: Task, kind: str) -> dict[str, tuple[int, nn.Parameter]]:
    """Depth and weight of all that is trained of a task's encoder, by name.

    Args:
        task: after the tunings that say what is trained.
        kind: the tuning that asks, for messages.

    Raises:
        ConfigError: the encoder is no stack of layers of its own, or nothing of it is trained.
    """
    encoder = layered(task.encoder, kind)
    found = {
        name: (depth_of(name, encoder.num_layers), parameter)
        for name, parameter in encoder.named_parameters()
        if parameter.requires_grad
    }
    if not found:
        raise ConfigError(
            f"{kind} acts on what another tuning lets move, and stands after it: full+{kind}"
        )
    return found


def layered(encoder: Encoder, kind: str) -> Encoder:
    """The innermost encoder, if it is one stack of layers.

    Raises:
        ConfigError: it is not.
    """
    encoder = innermost(encoder)
    layers = getattr(encoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) != encoder.num_layers:
        raise ConfigError(
            f"{kind} needs an encoder of layers one above the other, each with weights of its own: "
            "a transformer or a recurrent one"
        )
    return encoder
