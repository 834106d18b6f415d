"""What a run writes and says while it trains: rows of numbers, warnings, a line for people."""

import math
import time
from typing import Any

from selfsup import console
from selfsup.errors import ConfigError
from selfsup.training.config import TrainingConfig
from selfsup.training.folder import Rows, RunFolder
from selfsup.training.position import Position


class Record:
    """The rows of one run, in memory and, with a folder, in its files.

    Args:
        folder: where metrics.jsonl, speed.jsonl, warnings.json and TensorBoard's files go, or None.
        config: of the training.
        position: where it begins; what the files say of later steps is cut off.
        unit: what a token is here, for people.
    """

    def __init__(
        self, folder: RunFolder | None, config: TrainingConfig, position: Position, unit: str
    ):
        self.folder, self.config, self.unit = folder, config, unit
        path = folder.path if folder else None
        self.metrics = Rows(path and path / "metrics.jsonl", position.metrics_bytes)
        self.speed = Rows(path and path / "speed.jsonl", position.speed_bytes)
        self.tensorboard = _tensorboard(folder) if config.tensorboard and folder else None
        self.since = time.monotonic(), position.tokens
        self.wait = 0.0  # seconds that the loop has waited for data since the last row

    def train(self, position: Position, learning_rate: float, bar: console.Progress) -> None:
        """One row of metrics, one of speed, one line for people; begins new sums."""
        now = time.monotonic()
        means = {k: v / max(position.weight, 1.0) for k, v in position.sums.items()}
        counts = {"lr": learning_rate, "tokens": position.tokens, "skipped": position.skipped}
        self.add({"step": position.step, "split": "train", **means, **counts})
        started, tokens = self.since
        seconds = max(now - started, 1e-9)
        rate = (position.tokens - tokens) / seconds
        self.speed.add(
            {
                "step": position.step,
                "seconds": round(position.seconds, 3),
                "tokens_per_second": round(rate, 1),
                "data_wait": round(self.wait / seconds, 5),
            }
        )
        self.since, self.wait = (now, position.tokens), 0.0
        position.sums, position.weight = {}, 0.0
        loss = means.get("loss", math.nan)
        note = f"step {position.step}  loss {loss:.3f}  {rate:,.0f} {self.unit}/s"
        bar.move(position.progress(self.config), note)

    def add(self, row: dict[str, Any]) -> None:
        """One row of metrics."""
        self.metrics.add(row)
        if self.tensorboard is not None:
            for name, value in row.items():
                if isinstance(value, int | float) and name != "step":
                    self.tensorboard.add_scalar(f"{row['split']}/{name}", value, row["step"])

    def warn(self, position: Position, kind: str, text: str | None) -> None:
        """A warning, the first of its kind; None: there is nothing to warn of."""
        if text is None or any(w.startswith(f"{kind}: ") for w in position.warnings):
            return
        console.warn(text)
        position.warnings.append(f"{kind}: {text}")
        if self.folder is not None:
            self.folder.warnings(position.warnings)

    def flush(self, position: Position) -> None:
        """Makes all rows durable, and notes how many bytes of them belong to `position`."""
        position.metrics_bytes = self.metrics.flushed_size()
        position.speed_bytes = self.speed.flushed_size()

    def close(self) -> None:
        """Lets the files go."""
        self.metrics.close()
        self.speed.close()
        if self.tensorboard is not None:
            self.tensorboard.close()


def _tensorboard(folder: RunFolder) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError(
            "training.tensorboard needs the extra: pip install 'selfsup[tensorboard]'"
        ) from None
    return SummaryWriter(str(folder.path / "tensorboard"))
