"""Which tuning, or which together: "lora", "lora+bias", each with its options."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from selfsup import registry
from selfsup.config import from_mapping, to_mapping
from selfsup.errors import ConfigError
from selfsup.objective import Task
from selfsup.randomness import isolated, seed_layers
from selfsup.tuning.parts import Where

WHERE = Where()


@dataclass(frozen=True)
class Tuning:
    """Tunings that train together.

    Attributes:
        configs: the `Config` of each name of `registry.TUNINGS`, in the order of application.
    """

    configs: dict[str, Any]

    @staticmethod
    def of(text: str, options: Mapping[str, Any] | None = None) -> "Tuning":
        """Reads names that are joined by "+", and the options of each.

        Args:
            text: "lora", "adapter+bias".
            options: keys of the tunings' `Config`s by name: {"lora": {"rank": 4}}.

        Raises:
            ConfigError: an unknown name or option, a name given twice, or options of a tuning that
                was not chosen.
        """
        names, options = text.split("+"), options or {}
        if len(set(names)) < len(names):
            raise ConfigError(f"tuning {text!r} names one of them twice")
        for name in options:
            if name not in names:
                raise ConfigError(f"options of tuning {name!r}, but the tuning is {text!r}")
        configs = {}
        for name in names:
            config = registry.module_of(registry.TUNINGS, "tuning", name).Config
            configs[name] = from_mapping(config, options.get(name, {}), f"tuning.{name}")
        return Tuning(configs)

    @property
    def text(self) -> str:
        """The names, joined by "+"."""
        return "+".join(self.configs)

    @property
    def whole(self) -> bool:
        """Whether the encoder's own weights move."""
        return "full" in self.configs

    def values(self) -> dict[str, Any]:
        """What a run's configuration says: `names`, and a section for each that has options."""
        sections = {name: to_mapping(config) for name, config in self.configs.items()}
        return {"names": list(self.configs), **{n: keys for n, keys in sections.items() if keys}}


def tune(task: Task, tuning: Tuning, where: Where = WHERE, seed: int = 0) -> None:
    """Freezes the encoder, then lets each tuning free or add what it trains.

    Args:
        task: its encoder is changed; everything else of it is trained.
        tuning: what to apply.
        where: which set of parts they go to.
        seed: decides the initial weights of what is added.

    Raises:
        ConfigError: a tuning that this encoder cannot have.
    """
    task.requires_grad_(True)
    task.encoder.requires_grad_(False)
    with isolated():
        seed_layers(seed, "tuning")
        for one, config in tuning.configs.items():
            registry.resolve(registry.TUNINGS, "tuning", one)(task, config, where)
    task.train(task.training)  # takes an encoder that is frozen wholly out of training mode now
