"""How a comparison is made: what `selfsup compare` may be told."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from selfsup import registry
from selfsup.config import from_mapping
from selfsup.cores import cores
from selfsup.errors import ConfigError
from selfsup.tuning.choice import Tuning

ARMS = ("pretrained", "scratch")
WHOLE_LRS, ADDED_LRS = (5e-4, 1e-3, 2e-3), (1e-3, 3e-3, 1e-2)
"""Peak learning rates that are tried where the encoder's own weights move, and where they do not:
what begins anew, and is little, wants larger ones."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a comparison is made.

    Attributes:
        task: a name of `registry.TASKS`.
        label_counts: sizes of the labelled subsets.
        seeds: each seed draws another subset, other initial weights and another order.
        lrs: peak learning rates that every arm and tuning tries; None: `WHOLE_LRS` or `ADDED_LRS`.
        steps: optimizer steps per run; None: `adapt.default_training`.
        tuning: names of `registry.TUNINGS` as `Tuning.of` reads them; commas separate several, of
            which the first trains all arms and the others the pre-trained one.
        tuning_options: keys of the tunings' `Config`s by name: {"lora": {"rank": 4}}.
        task_options: keys of the task's `Config`: {"template": "topic.txt"} of a cloze.
        max_length: longest item (a text in tokens); None: what this kind of data usually takes.
        jobs: processes that train side by side, one thread each; 1: this process, all threads.
        controls: also train from scratch and fit the classical baseline; False: a study that has
            them already measures the pre-trained network alone.
    """

    task: str
    label_counts: tuple[int, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    lrs: tuple[float, ...] | None = None
    steps: int | None = None
    tuning: str = "full"
    tuning_options: Mapping[str, Any] = field(default_factory=dict)
    task_options: Mapping[str, Any] = field(default_factory=dict)
    max_length: int | None = None
    jobs: int = 1
    controls: bool = True

    @property
    def arms(self) -> tuple[str, ...]:
        """The arms that are trained."""
        return ARMS if self.controls else ARMS[:1]

    @property
    def task_config(self) -> Any:
        """The task's `Config`."""
        module = registry.module_of(registry.TASKS, "task", self.task)
        return from_mapping(module.Config, dict(self.task_options), "task")

    @property
    def tunings(self) -> dict[str, Tuning]:
        """By name, the first one first."""
        options = self.tuning_options
        return {
            text: Tuning.of(text, {k: v for k, v in options.items() if k in text.split("+")})
            for text in self.tuning.split(",")
        }

    @property
    def trials(self) -> list[tuple[str, str]]:
        """What has a learning rate to choose: tuning and arm."""
        first, *others = self.tunings
        return [*((first, arm) for arm in self.arms), *((other, ARMS[0]) for other in others)]

    def rates(self, tuning: str) -> tuple[float, ...]:
        """The learning rates that a tuning tries."""
        return self.lrs or (WHOLE_LRS if self.tunings[tuning].whole else ADDED_LRS)

    def __post_init__(self) -> None:
        _ = self.task_config  # says what is wrong with it
        if not self.label_counts or not self.seeds or self.lrs == ():
            raise ConfigError("compare needs at least one label count, one seed and one rate")
        if list(self.label_counts) != sorted(set(self.label_counts)):
            raise ConfigError(f"label counts must rise, got {list(self.label_counts)}")
        least = {"label count": self.label_counts[0], "jobs": self.jobs, "steps": self.steps}
        for name, value in least.items():
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if self.lrs and not min(self.lrs) > 0:
            raise ConfigError(f"learning rates must be above 0, got {list(self.lrs)}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds must differ, got {list(self.seeds)}")
        if len(self.tunings) < len(self.tuning.split(",")):
            raise ConfigError(f"tuning {self.tuning!r} names one of them twice")
        for name in self.tuning_options:
            if not any(name in tuning.configs for tuning in self.tunings.values()):
                raise ConfigError(f"options of tuning {name!r}, but the tuning is {self.tuning!r}")


def default_jobs() -> int:
    """One training per core, at most 8; where there is a GPU, one that has it for itself."""
    return 1 if torch.cuda.is_available() else min(8, cores())
