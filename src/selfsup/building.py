"""Fresh networks: what a configuration asks for, with weights that depend on a seed alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook

from selfsup import registry
from selfsup.errors import CheckpointError, ConfigError
from selfsup.models.encoder import Encoder
from selfsup.randomness import isolated, seed_layers


def build_encoder(name: str, config: Any, spec: Any, seed: int) -> Encoder:
    """A fresh encoder whose weights depend on the seed alone.

    Raises:
        ConfigError: this model does not read that kind of data.
    """
    encoder = registry.resolve(registry.MODELS, "model", name)
    if spec.kind not in encoder.reads:
        raise ConfigError(
            f"model.name = {name!r} reads {', '.join(encoder.reads)}, and the data are {spec.kind}"
        )
    with isolated():
        seed_layers(seed, "encoder")
        return encoder(config, spec)


def build_objective(table: str, name: str, config: Any, encoder: Encoder, extra: Any, seed: int):
    """A fresh method or task around an encoder; `extra` is the spec or the label names."""
    with isolated():
        seed_layers(seed, "objective")
        return registry.resolve(registry.TABLES[table], table[:-1], name)(config, encoder, extra)


@contextmanager
def at_most(limit: int, config: Path) -> Iterator[None]:
    """Inside, no network of more than `limit` numbers is built.

    So a configuration that does not belong to the weights beside it cannot ask for all memory.

    Raises:
        CheckpointError: it was asked for; the file `config` is named.
    """
    built = 0

    def count(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        nonlocal built
        built += parameter.numel() if parameter is not None else 0
        if built > limit:
            raise CheckpointError(
                f"{config}: describes a network much larger than the weights beside it"
            )

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # a tensor that no memory could hold
        raise CheckpointError(f"{config}: {error}") from error
    finally:
        hook.remove()
