"""The one training loop: it knows `Objective` and a numbered data set, and nothing else."""

import math
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selfsup import console, ranks
from selfsup.batch import Batch
from selfsup.config import from_mapping
from selfsup.data.dataset import Dataset
from selfsup.errors import CheckpointError, ConfigError, DivergedError, Interrupted
from selfsup.objective import Objective, Output
from selfsup.randomness import Batches, Order, isolated, seed_layers, torch_generator
from selfsup.training import guard
from selfsup.training.checkpoint import (
    Checkpoint,
    load_newest,
    load_optimizer,
    load_weights,
    optimizer_tensors,
)
from selfsup.training.config import TrainingConfig
from selfsup.training.device import (
    autocast,
    keep_freed_memory,
    pick_device,
    pick_dtype,
    to_device,
)
from selfsup.training.distributed import Spread
from selfsup.training.evaluate import evaluate
from selfsup.training.folder import RunFolder
from selfsup.training.optim import learning_rate_share, optimizer
from selfsup.training.position import Position
from selfsup.training.record import Record
from selfsup.training.saving import Saver

Watch = Callable[[Any], dict[str, float]]
"""Further numbers for an evaluation, of the objective that trains; it must change nothing."""
UNITS = {"tokens": "tokens", "frames": "frames", "waveform": "samples"}
"""What `_num_tokens` counts, for people, by a field of the data."""


def train(
    objective: Objective,
    data: Dataset,
    valid: Dataset | None,
    config: TrainingConfig,
    folder: RunFolder | None = None,
    title: str = "training",
    watch: Watch | None = None,
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
        watch: further numbers for each evaluation row (a task's metric, a probe's accuracy).

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
            step = run.agree(outputs, micro_batches, signals)
            norm = run.average_and_clip(step)
            if run.is_finite(step, norm):
                run.optimizer.step()
                run.objective.after_step(position.step, position.total_steps(config))
                position.count(outputs, norm)
            run.optimizer.zero_grad(set_to_none=True)
            run.advance(step)
            if position.step % config.log_every == 0 or position.finished(config):
                run.log(bar)
            if position.evaluations < position.evaluations_due(config):
                run.evaluate()
            asked = signals.received if run.spread.world == 1 else step.signal
            if asked:
                raise run.interrupted(asked)
            if position.finished(config):
                break
            if position.step % config.checkpoint_every == 0:
                run.save()
        return run.end()


class Step(NamedTuple):
    """What all ranks know of one step."""

    weight: float  # items that the loss is a mean over
    tokens: float
    seconds: float  # of the run
    loss: float  # the sum of the passes' losses: not finite where one of them is not
    signal: int  # that asks to stop, or 0


class _Run:
    """The state of one `train` call; each method is one line of the loop."""

    def __init__(
        self,
        objective: Objective,
        data: Dataset,
        valid: Dataset | None,
        config: TrainingConfig,
        folder: RunFolder | None,
        watch: Watch | None,
    ):
        self.data, self.valid = data, valid
        self.config, self.folder, self.watch = config, folder, watch
        self.device = pick_device(config.device)
        if self.device.type == "cpu":
            keep_freed_memory()
            torch.set_flush_denormal(True)  # numbers below 1e-38, which may take half of the time
        self.dtype = pick_dtype(config.precision, self.device)
        self.spread = Spread(objective, config, self.device)
        self.objective = objective = self.spread.objective
        objective.train()
        self.loss = torch.compile(objective.loss) if config.compile else objective.loss
        self.weighs = config.accumulate * ranks.count() > 1
        self.saves = bool(self.spread.sums(float(folder is not None))[0])
        self.optimizer = optimizer(objective, config)
        self.position, self.best = Position(), dict[str, Tensor]()
        saving = config.checkpoints, config.keep_every, config.async_save
        self.saver = Saver(folder.checkpoints if folder else None, *saving)
        self._resume()
        unit = next((unit for name, unit in UNITS.items() if name in data.fields), "examples")
        self.record = Record(folder, config, self.position, unit)
        self.saved_step = self.position.step
        self.started = time.monotonic() - self.position.seconds

    def _resume(self) -> None:
        found = load_newest(self.folder.checkpoints) if self.folder else None
        found = self.spread.restored(found)
        if found is None:
            return
        where = str(self.folder.checkpoints) if self.folder else "the first rank's checkpoint"
        load_weights(self.objective, found.weights, where)
        load_optimizer(self.objective, self.optimizer, found.optimizer)
        try:
            self.position = position = from_mapping(Position, found.state, "state.json")
        except ConfigError as error:
            raise CheckpointError(f"{where}: {error}") from error
        if not found.optimizer and position.step > position.skipped:
            raise CheckpointError(
                f"{where}/step-{position.step:08d}: optimizer.safetensors is empty; remove this "
                "checkpoint to go on from the one before it"
            )
        if not ranks.first():  # the first holds the sums of all
            position.sums, position.weight = {}, 0.0
        if self.config.keep == "best":
            self.best = {k: v.clone() for k, v in (found.best or {}).items()}
            if found.best is None:  # the run was begun with keep = "last": the best begins here
                position.best_loss = None
        # a prolonged budget is looked at as often as one that was so long from the beginning
        position.evaluations = min(position.evaluations, position.evaluations_due(self.config))
        if self.folder is not None:
            console.say(f"resuming {self.folder.path} at step {self.position.step}")

    def fetch(self) -> Iterator[list[Batch]]:
        """Batches from the current step on, built one step ahead in a thread of their own."""
        order = Order(len(self.data), self.config.seed)
        numbers = Batches(order, self.config.batch_size, self.data.lengths)
        accumulate, share = self.config.accumulate, self.spread.share

        def load(step: int) -> list[Batch]:
            passes = [numbers[step * accumulate + i] for i in share.passes]
            return [self.data.batch(examples[share.rows]) for examples in passes]

        with ThreadPoolExecutor(1, thread_name_prefix="data") as executor:
            ahead = executor.submit(load, self.position.step)
            while not self.position.finished(self.config):
                asked = time.perf_counter()
                batches = ahead.result()
                self.record.wait += time.perf_counter() - asked
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
        generator = self._generator("refresh", step)
        self.spread.refresh(batches, generator)

    def set_learning_rate(self) -> None:
        """The rate of this step, from the share of the budget that is spent."""
        config = self.config
        self.learning_rate = config.lr * learning_rate_share(
            self.position.progress_of_step(config),
            warmup=config.warmup,
            schedule=config.schedule,
            decay=config.decay,
            final=config.final_lr,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * group["lr_scale"]

    def forward_backward(self, place: int, batch: Batch) -> Output:
        """Forward and backward of one of this rank's passes."""
        share = self.spread.share
        numbers = (self.position.step, share.passes[place], *share.seeds)
        seed_layers(self.config.seed, "dropout", *numbers)
        generator = self._generator("loss", *numbers)

        def forward() -> Output:
            with autocast(self.device, self.dtype):
                return self.loss(to_device(batch, self.device), generator)

        output = self.spread.compute(forward, last=place == len(share.passes) - 1)
        scaled = output.loss * output.weight if self.weighs else output.loss
        scaled.backward()
        return output

    def agree(self, outputs: list[Output], batches: list[Batch], signals: guard.Signals) -> Step:
        """What ranks have to know of each other, in one message."""
        clock = time.monotonic() - self.started if ranks.first() else 0.0
        weight, tokens, seconds, loss, signum = self.spread.sums(
            sum(float(output.weight) for output in outputs),
            sum(map(_num_tokens, batches)),
            clock * self.config.tensor_parallel,  # the first rank's, which the sum divides
            sum(float(output.loss.detach()) for output in outputs),
            0 if signals.received is None else signals.received,
        )
        if signum and self.spread.world > 1:  # some or all of them were told
            signum = signal.SIGTERM if signals.received is None else signals.received
        return Step(weight, tokens, seconds, loss, int(signum))

    def average_and_clip(self, step: Step) -> float:
        """Makes the gradient a mean over items; gives its norm before clipping."""
        if self.weighs:
            self.spread.average(step.weight)
        return float(self.spread.clip(self.config.clip))

    def is_finite(self, step: Step, norm: float) -> bool:
        """Whether this step may touch the weights; counts it or stops the run if not."""
        if math.isfinite(norm) and math.isfinite(step.loss):
            return True
        self.position.skipped += 1
        if self.config.nonfinite == "stop":
            raise DivergedError(
                f"step {self.position.step}: loss {step.loss}, gradient norm {norm}: not finite. "
                "The weights were left as they were. Resume with a lower training.lr or "
                "training.clip, in float32 (training.precision), or pass over such steps "
                "(training.nonfinite='skip')."
            )
        console.warn(f"step {self.position.step}: loss or gradient is not finite; step passed over")
        return False

    def gather_sums(self) -> None:
        """Brings the sums of all ranks to the first."""
        if self.spread.world == 1:
            return
        sums = self.position.sums
        names = list(sums)
        found = self.spread.sums(self.position.weight, *(sums[name] for name in names))
        first = float(ranks.first())
        self.position.weight = found[0] * first
        self.position.sums = {k: v * first for k, v in zip(names, found[1:], strict=True)}

    def advance(self, step: Step) -> None:
        """One step further."""
        self.position.step += 1
        self.position.tokens += int(step.tokens)
        self.position.seconds = step.seconds
        self.saver.check()

    def log(self, bar: console.Progress) -> None:
        """One row of what the steps since the last one gave."""
        self.gather_sums()
        self.record.train(self.position, self.learning_rate, bar)

    @torch.no_grad()
    def evaluate(self) -> None:
        """Held-out loss over fixed batches with fixed masks, and the health of the features."""
        if self.valid is None or self.config.evaluations == 0:
            return
        position = self.position
        self.objective.eval()
        try:
            row = self.spread.look(self._look)
        finally:
            self.objective.train()
        position.evaluations = position.evaluations_due(self.config)
        self.record.add({"step": position.step, "split": "valid", **row})
        if position.best_loss is None or row["loss"] < position.best_loss:
            position.best_loss, position.evaluations_since_best = row["loss"], 0
            if self.config.keep == "best":
                self.best = {k: v.clone() for k, v in self.objective.state_dict().items()}
        else:
            position.evaluations_since_best += 1
        progress = position.progress(self.config)
        chance = self.objective.chance_loss
        self.record.warn(position, "plateau", guard.plateau_warning(row["loss"], chance, progress))
        if "effective_rank" in row:
            health = row["effective_rank"], row["spread"]
            self.record.warn(position, "collapse", guard.collapse_warning(*health, progress))

    def _look(self) -> dict[str, float]:
        assert self.valid is not None
        with autocast(self.device, self.dtype):
            row = evaluate(self.objective, self.valid, self.config, self.device)
        return row if self.watch is None else row | self.watch(self.objective)

    def save(self) -> None:
        """A checkpoint of this step, or its beginning; nothing without a folder."""
        if not self.saves:
            return
        self.gather_sums()
        self.record.flush(self.position)
        checkpoint = Checkpoint(
            weights=self.spread.whole(self.objective.state_dict()),
            optimizer=self.spread.whole(optimizer_tensors(self.objective, self.optimizer)),
            best=self.spread.whole(self.best) if self.best else None,
            state=asdict(self.position),
        )
        self.saver.save(self.position.step, checkpoint)
        self.saved_step = self.position.step

    def interrupted(self, signum: int) -> Interrupted:
        """Saves, and gives the error that says so."""
        self.save()
        self.saver.wait()
        name = signal.Signals(signum).name
        where = f"saved in {self.folder.path}; go on with --resume" if self.folder else "not saved"
        return Interrupted(f"{name} at step {self.position.step}: {where}", signum)

    def end(self) -> list[dict[str, Any]]:
        """The last checkpoint; the best weights if they are the ones to keep."""
        if self.saved_step != self.position.step:
            self.save()
        self.saver.wait()
        if self.best:
            self.objective.load_state_dict(self.best)
        self.spread.finish()
        self.spread.given.eval()
        return self.record.metrics.rows

    def close(self) -> None:
        """Lets the files go, however the run ended, when the save under way is done."""
        torch.set_flush_denormal(False)
        self.saver.close()
        self.record.close()

    def _generator(self, purpose: str, *numbers: int) -> torch.Generator:
        return torch_generator(self.config.seed, purpose, *numbers, device=self.device)


def _num_tokens(batch: Batch) -> int:
    if "mask" in batch:
        return int(batch["mask"].sum())
    found = next((batch[name] for name in UNITS if name in batch), batch["index"])
    return found.shape[:2].numel()
