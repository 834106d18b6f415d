"""Where a run stands, and what follows from that and its budget."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from selfsup.objective import Output
from selfsup.training.config import TrainingConfig


@dataclass
class Position:
    """All that resuming needs beside weights and optimizer."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0
    evaluations: int = 0
    best_loss: float | None = None
    evaluations_since_best: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    """Weighted sums of loss and metrics since the last row."""
    weight: float = 0.0
    metrics_bytes: int = 0
    speed_bytes: int = 0
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        counts = self.step, self.tokens, self.evaluations, self.metrics_bytes, self.speed_bytes
        if min(counts) < 0 or type(self.sums) is not dict or type(self.warnings) is not list:
            raise ValueError("a count is negative, or sums or warnings are none")

    def progress(self, config: TrainingConfig) -> float:
        """Share of the budget that is spent, 0 to 1."""
        if config.steps is not None:
            return min(1.0, self.step / config.steps)
        if config.tokens is not None:
            return min(1.0, self.tokens / config.tokens)
        assert config.minutes is not None
        return min(1.0, self.seconds / (60 * config.minutes))

    def count(self, outputs: Sequence[Output], norm: float) -> None:
        """Adds a step's outputs, and its gradient norm, to the sums of the next row."""
        sums = self.sums
        for output in outputs:
            share = float(output.weight)
            for name, value in (("loss", output.loss), *output.metrics.items()):
                sums[name] = sums.get(name, 0.0) + float(value.detach()) * share
            sums["gradient_norm"] = sums.get("gradient_norm", 0.0) + norm * share
            self.weight += share

    def progress_of_step(self, config: TrainingConfig) -> float:
        """The share at which the next step is trained, so that the first is not lost to zero."""
        if config.steps is not None:  # step n of N, from 1, at n of N + 1
            return (self.step + 1) / (config.steps + 1)
        return max(self.progress(config), 1e-3)

    def total_steps(self, config: TrainingConfig) -> int:
        """Steps of the whole run: exact for a budget in steps, else an estimate."""
        if config.steps is not None:
            return config.steps
        done = self.step + 1
        return max(done, round(done / max(self.progress(config), 1e-3)))

    def evaluations_due(self, config: TrainingConfig) -> int:
        """How many of the evenly spaced evaluations there are up to here; one before any step."""
        return 1 + int(self.progress(config) * config.evaluations + 1e-9)

    def finished(self, config: TrainingConfig) -> bool:
        """Whether the budget is spent, or patience is."""
        impatient = bool(config.patience) and self.evaluations_since_best >= config.patience
        return impatient or self.progress(config) >= 1
