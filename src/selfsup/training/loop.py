"""The one training loop: it knows `Objective` and a numbered data set, and nothing else."""

import math
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from selfsup import console
from selfsup.batch import Batch
from selfsup.data.dataset import Dataset
from selfsup.errors import ConfigError, DivergedError, Interrupted
from selfsup.objective import Objective, Output
from selfsup.randomness import Batches, Order, isolated, seed_layers, torch_generator
from selfsup.training import guard
from selfsup.training.checkpoint import (
    Checkpoint,
    load_newest,
    load_optimizer,
    load_weights,
    optimizer_tensors,
    save_checkpoint,
)
from selfsup.training.config import TrainingConfig
from selfsup.training.device import (
    autocast,
    keep_freed_memory,
    pick_device,
    pick_dtype,
    to_device,
)
from selfsup.training.evaluate import evaluate
from selfsup.training.folder import Rows, RunFolder
from selfsup.training.optim import adamw, clip_gradient, learning_rate_share

UNITS = {"tokens": "tokens", "frames": "frames", "waveform": "samples"}
"""What `_num_tokens` counts, for people, by a field of the data."""


@dataclass
class Position:
    """Where a run stands: all that resuming needs beside weights and optimizer."""

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

    def progress(self, config: TrainingConfig) -> float:
        """Share of the budget that is spent, 0 to 1."""
        if config.steps is not None:
            return min(1.0, self.step / config.steps)
        if config.tokens is not None:
            return min(1.0, self.tokens / config.tokens)
        assert config.minutes is not None
        return min(1.0, self.seconds / (60 * config.minutes))


def train(
    objective: Objective,
    data: Dataset,
    valid: Dataset | None,
    config: TrainingConfig,
    folder: RunFolder | None = None,
    title: str = "training",
    watch: Callable[[], dict[str, float]] | None = None,
) -> list[dict[str, Any]]:
    """Trains `objective` in place, to the end of its budget.

    Args:
        objective: a method or a task.
        data: training examples.
        valid: held-out examples, or None for no evaluation.
        config: budget, optimizer, safety.
        folder: where metrics and checkpoints go; its newest whole checkpoint is gone on from. None:
            nothing is written.
        title: what the progress line says.
        watch: further numbers for each evaluation row (a task's metric, a probe's accuracy); it
            must change nothing.

    Returns:
        the rows of metrics.jsonl.

    Raises:
        DivergedError: loss or gradient is not finite and `nonfinite` is `stop`.
        Interrupted: SIGTERM or SIGINT came; a checkpoint was saved if there is a folder.
        StorageError: no space for metrics or a checkpoint; older checkpoints are intact.
    """
    with (
        isolated(),
        guard.Signals() as signals,
        console.progress(title, 1.0) as bar,
        closing(_Run(objective, data, valid, config, folder, watch)) as run,
    ):
        position = run.position
        if position.step == 0:
            run.evaluate()
        for micro_batches in run.fetch():
            run.refresh_if_due()
            run.set_learning_rate()
            outputs = [run.forward_backward(i, b) for i, b in enumerate(micro_batches)]
            weight = run.average_gradient(outputs)
            norm = float(clip_gradient(objective, config.clip))
            if run.is_finite(outputs, norm):
                run.optimizer.step()
                objective.after_step(position.step, run.total_steps())
                run.count(outputs, weight, norm)
            run.optimizer.zero_grad(set_to_none=True)
            run.advance(micro_batches)
            if position.step % config.log_every == 0 or run.finished():
                run.log(bar)
            if run.evaluation_due():
                run.evaluate()
            if signals.received is not None:
                raise run.interrupted(signals.received)
            if run.finished():
                break
            if position.step % config.checkpoint_every == 0:
                run.save()
        return run.end()


class _Run:
    """The state of one `train` call; each method is one line of the loop."""

    def __init__(
        self,
        objective: Objective,
        data: Dataset,
        valid: Dataset | None,
        config: TrainingConfig,
        folder: RunFolder | None,
        watch: Callable[[], dict[str, float]] | None,
    ):
        self.objective, self.data, self.valid = objective, data, valid
        self.config, self.folder, self.watch = config, folder, watch
        self.device = pick_device(config.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.dtype = pick_dtype(config.precision, self.device)
        objective.to(self.device).train()
        self.loss = torch.compile(objective.loss) if config.compile else objective.loss
        self.optimizer = adamw(
            objective,
            lr=config.lr,
            betas=(config.betas[0], config.betas[1]),
            eps=config.eps,
            weight_decay=config.weight_decay,
        )
        self.position, self.best = Position(), dict[str, Tensor]()
        self._resume()
        path = folder.path if folder else None
        self.metrics = Rows(path and path / "metrics.jsonl", self.position.metrics_bytes)
        self.speed = Rows(path and path / "speed.jsonl", self.position.speed_bytes)
        self.tensorboard = _tensorboard(folder) if config.tensorboard and folder else None
        self.unit = next((unit for name, unit in UNITS.items() if name in data.fields), "examples")
        self.saved_step = self.position.step
        self.started = time.monotonic() - self.position.seconds
        self.window = (time.monotonic(), self.position.tokens)
        self.wait = 0.0

    def _resume(self) -> None:
        found = load_newest(self.folder.checkpoints) if self.folder else None
        if found is None:
            return
        assert self.folder is not None
        load_weights(self.objective, found.weights, str(self.folder.checkpoints))
        load_optimizer(self.objective, self.optimizer, found.optimizer)
        self.best = found.best or {}
        self.position = position = Position(**found.state)
        # a prolonged budget is looked at as often as one that was so long from the beginning
        due = 1 + int(position.progress(self.config) * self.config.evaluations + 1e-9)
        position.evaluations = min(position.evaluations, due)
        console.say(f"resuming {self.folder.path} at step {self.position.step}")

    def fetch(self) -> Iterator[list[Batch]]:
        """Batches from the current step on, built one step ahead in a thread of their own."""
        order = Order(len(self.data), self.config.seed)
        numbers = Batches(order, self.config.batch_size, self.data.lengths)
        accumulate = self.config.accumulate

        def load(step: int) -> list[Batch]:
            return [self.data.batch(numbers[step * accumulate + i]) for i in range(accumulate)]

        with ThreadPoolExecutor(1, thread_name_prefix="data") as executor:
            ahead = executor.submit(load, self.position.step)
            while not self.finished():
                asked = time.perf_counter()
                batches = ahead.result()
                self.wait += time.perf_counter() - asked
                ahead = executor.submit(load, self.position.step + 1)
                yield batches

    def refresh_if_due(self) -> None:
        """The objective's own pass over the data, before the steps it asks for."""
        every, step = self.objective.refresh_every, self.position.step
        if every is None or (step > 0 and (every == 0 or step % every)):
            return
        size = self.config.batch_size
        order = Order(len(self.data), self.config.seed, shuffle=False)
        starts = range(0, len(self.data), size)
        batches = (
            to_device(self.data.batch(order[i : min(i + size, len(self.data))]), self.device)
            for i in starts
        )
        seed_layers(self.config.seed, "refresh", step)  # dropout, if it leaves that switched on
        self.objective.refresh(batches, self._generator("refresh", step))

    def set_learning_rate(self) -> None:
        """The rate of this step, from the share of the budget that is spent."""
        config = self.config
        self.learning_rate = config.lr * learning_rate_share(
            self._progress_of_step(),
            warmup=config.warmup,
            schedule=config.schedule,
            decay=config.decay,
            final=config.final_lr,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * group["lr_scale"]

    def _progress_of_step(self) -> float:
        # Step n of N is trained with the rate at n + 1, so that the first step is not lost to zero.
        if self.config.steps is not None:
            return (self.position.step + 1) / (self.config.steps + 1)
        return max(self.position.progress(self.config), 1e-3)

    def total_steps(self) -> int:
        """Steps of the whole run: exact for a budget in steps, else an estimate."""
        if self.config.steps is not None:
            return self.config.steps
        done = self.position.step + 1
        return max(done, round(done / max(self.position.progress(self.config), 1e-3)))

    def forward_backward(self, micro: int, batch: Batch) -> Output:
        """Forward and backward of one micro-batch."""
        step = self.position.step
        seed_layers(self.config.seed, "dropout", step, micro)
        with autocast(self.device, self.dtype):
            output = self.loss(to_device(batch, self.device), self._generator("loss", step, micro))
        scaled = output.loss * output.weight if self.config.accumulate > 1 else output.loss
        scaled.backward()
        return output

    def average_gradient(self, outputs: list[Output]) -> float:
        """Turns the sum over micro-batches into a mean over items; gives the number of items."""
        weight = float(sum(float(output.weight) for output in outputs))
        if len(outputs) > 1:
            for parameter in self.objective.parameters():
                if parameter.grad is not None:
                    parameter.grad.div_(max(weight, 1.0))
        return weight

    def is_finite(self, outputs: list[Output], norm: float) -> bool:
        """Whether this step may touch the weights; counts it or stops the run if not."""
        losses = [float(output.loss.detach()) for output in outputs]
        if all(map(math.isfinite, [norm, *losses])):
            return True
        self.position.skipped += 1
        if self.config.nonfinite == "stop":
            raise DivergedError(
                f"step {self.position.step}: loss {losses[0]}, gradient norm {norm}: not finite. "
                "The weights were left as they were. Resume with a lower training.lr or "
                "training.clip, in float32 (training.precision), or pass over such steps "
                "(training.nonfinite='skip')."
            )
        console.warn(f"step {self.position.step}: loss or gradient is not finite; step passed over")
        return False

    def count(self, outputs: list[Output], weight: float, norm: float) -> None:
        """Adds this step to the sums of the next row."""
        sums = self.position.sums
        for output in outputs:
            share = float(output.weight)
            for name, value in (("loss", output.loss), *output.metrics.items()):
                sums[name] = sums.get(name, 0.0) + float(value.detach()) * share
        sums["gradient_norm"] = sums.get("gradient_norm", 0.0) + norm * weight
        self.position.weight += weight

    def advance(self, batches: list[Batch]) -> None:
        """One step further."""
        self.position.step += 1
        self.position.tokens += sum(map(_num_tokens, batches))
        self.position.seconds = time.monotonic() - self.started

    def log(self, bar: console.Progress) -> None:
        """One row of metrics, one of speed, one line for people."""
        position, now = self.position, time.monotonic()
        means = {k: v / max(position.weight, 1.0) for k, v in position.sums.items()}
        counts = {"lr": self.learning_rate, "tokens": position.tokens, "skipped": position.skipped}
        row = {"step": position.step, "split": "train", **means, **counts}
        self._add_row(row)
        seconds = max(now - self.window[0], 1e-9)
        rate = (position.tokens - self.window[1]) / seconds
        self.speed.add(
            {
                "step": position.step,
                "seconds": round(position.seconds, 3),
                "tokens_per_second": round(rate, 1),
                "data_wait": round(self.wait / seconds, 5),
            }
        )
        self.window, self.wait = (now, position.tokens), 0.0
        position.sums, position.weight = {}, 0.0
        loss = means.get("loss", math.nan)
        note = f"step {position.step}  loss {loss:.3f}  {rate:,.0f} {self.unit}/s"
        bar.move(position.progress(self.config), note)

    def _add_row(self, row: dict[str, Any]) -> None:
        self.metrics.add(row)
        if self.tensorboard is not None:
            for name, value in row.items():
                if isinstance(value, int | float) and name != "step":
                    self.tensorboard.add_scalar(f"{row['split']}/{name}", value, row["step"])

    def evaluation_due(self) -> bool:
        """Whether the budget has passed the next of the evenly spaced evaluations."""
        if self.valid is None or self.config.evaluations == 0:
            return False
        due = 1 + int(self.position.progress(self.config) * self.config.evaluations + 1e-9)
        return self.position.evaluations < due

    @torch.no_grad()
    def evaluate(self) -> None:
        """Held-out loss over fixed batches with fixed masks, and the health of the features."""
        if self.valid is None or self.config.evaluations == 0:
            return
        position = self.position
        self.objective.eval()
        try:
            with autocast(self.device, self.dtype):
                row = evaluate(self.objective, self.valid, self.config, self.device)
            if self.watch is not None:
                row |= self.watch()
        finally:
            self.objective.train()
        position.evaluations = 1 + int(
            position.progress(self.config) * self.config.evaluations + 1e-9
        )
        self._add_row({"step": position.step, "split": "valid", **row})
        if position.best_loss is None or row["loss"] < position.best_loss:
            position.best_loss, position.evaluations_since_best = row["loss"], 0
            if self.config.keep == "best":
                self.best = {k: v.clone() for k, v in self.objective.state_dict().items()}
        else:
            position.evaluations_since_best += 1
        progress = position.progress(self.config)
        chance = self.objective.chance_loss
        self._warn("plateau", guard.plateau_warning(row["loss"], chance, progress))
        if "effective_rank" in row:
            health = row["effective_rank"], row["spread"]
            self._warn("collapse", guard.collapse_warning(*health, progress))

    def _warn(self, kind: str, text: str | None) -> None:
        if text is None or any(w.startswith(f"{kind}: ") for w in self.position.warnings):
            return
        console.warn(text)
        self.position.warnings.append(f"{kind}: {text}")
        if self.folder is not None:
            self.folder.warnings(self.position.warnings)

    def finished(self) -> bool:
        """Whether the budget is spent, or patience is."""
        patience = self.config.patience
        impatient = bool(patience) and self.position.evaluations_since_best >= patience
        return impatient or self.position.progress(self.config) >= 1

    def save(self) -> None:
        """A checkpoint of this step; nothing without a folder."""
        if self.folder is None:
            return
        self.position.metrics_bytes = self.metrics.flushed_size()
        self.position.speed_bytes = self.speed.flushed_size()
        checkpoint = Checkpoint(
            weights=self.objective.state_dict(),
            optimizer=optimizer_tensors(self.objective, self.optimizer),
            best=self.best or None,
            state=asdict(self.position),
        )
        save_checkpoint(
            self.folder.checkpoints, self.position.step, checkpoint, self.config.checkpoints
        )
        self.saved_step = self.position.step

    def interrupted(self, signum: int) -> Interrupted:
        """Saves, and gives the error that says so."""
        self.save()
        name = signal.Signals(signum).name
        where = f"saved in {self.folder.path}; go on with --resume" if self.folder else "not saved"
        return Interrupted(f"{name} at step {self.position.step}: {where}", signum)

    def end(self) -> list[dict[str, Any]]:
        """The last checkpoint; the best weights if they are the ones to keep."""
        if self.saved_step != self.position.step:
            self.save()
        if self.best:
            self.objective.load_state_dict(self.best)
        self.objective.eval()
        return self.metrics.rows

    def close(self) -> None:
        """Lets the files go, however the run ended."""
        self.metrics.close()
        self.speed.close()
        if self.tensorboard is not None:
            self.tensorboard.close()

    def _generator(self, purpose: str, *numbers: int) -> torch.Generator:
        return torch_generator(self.config.seed, purpose, *numbers, device=self.device)


def _num_tokens(batch: Batch) -> int:
    if "mask" in batch:
        return int(batch["mask"].sum())
    found = next((batch[name] for name in UNITS if name in batch), batch["index"])
    return found.shape[:2].numel()


def _tensorboard(folder: RunFolder) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError(
            "training.tensorboard needs the extra: pip install 'selfsup[tensorboard]'"
        ) from None
    return SummaryWriter(str(folder.path / "tensorboard"))
