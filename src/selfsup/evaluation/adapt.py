"""Adapting an encoder to a task: build the head, choose what trains, run the one loop, score."""

import copy
from statistics import fmean
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from selfsup import console
from selfsup.building import build_objective
from selfsup.data.dataset import LabelledDataset, Preprocessor
from selfsup.data.labels import Labelled
from selfsup.errors import ConfigError
from selfsup.evaluation.metrics import METRICS
from selfsup.evaluation.targets import part_accuracies
from selfsup.models.encoder import Encoder
from selfsup.objective import Objective, Task
from selfsup.randomness import Order
from selfsup.training.config import TrainingConfig
from selfsup.training.device import autocast, pick_dtype, to_device
from selfsup.training.folder import RunFolder
from selfsup.training.loop import Watch, train
from selfsup.tuning.choice import Tuning, tune
from selfsup.tuning.parts import Where
from selfsup.tuning.pseudo_labels import SoftLabelled

PASSES = 5  # over the labels, once there are many
MAX_WRITING_STEPS = 10_000


def num_rows(preprocessor: Preprocessor, labelled: Labelled) -> int:
    """How many rows the examples make: a question has one for each window of its document."""
    return len(preprocessor.labelled(labelled)) if labelled.task == "span_qa" else len(labelled)


def default_training(count: int, dim: int, task: str = "") -> TrainingConfig:
    """A fine-tuning schedule by number of labelled rows (`num_rows`) and width of the encoder.

    At least 200 steps of 16 rows, or five passes over them all; the learning rate falls with
    the width, 1e-3 at 128 (small encoders) to 5e-5 at 768 and above (BERT, section A.3). Writing
    takes batches of 32 and is given at most 10,000 steps.
    """
    size = 32 if task == "generation" else 16
    steps = max(200, -(-PASSES * count // size))
    if task == "generation":
        steps = min(steps, MAX_WRITING_STEPS)
    lr = 1e-3 if dim <= 256 else 2e-4 if dim < 768 else 5e-5
    return TrainingConfig(
        steps=steps,
        batch_size=size,
        lr=lr,
        warmup=0.1,
        evaluations=0,
        log_every=10,
        betas=(0.9, 0.999),
        checkpoint_every=1000,
    )


def new_task(
    encoder: Encoder,
    name: str,
    config: Any,
    train_data: Labelled,
    *,
    tuning: str | Tuning,
    seed: int,
    preprocessor: Any = None,
    method: Objective | None = None,
) -> Task:
    """A task on a copy of an encoder, ready to be trained.

    Args:
        encoder: copied, so the caller's weights stay as they are.
        name: a task of `registry.TASKS`.
        config: that task's `Config`.
        train_data: labelled examples: their names, or mean and spread of their numbers.
        tuning: which parameters move: names of `registry.TUNINGS`, or with options.
        seed: decides the initial weights of the head, and of what the tuning adds.
        preprocessor: the encoder's own, for tunings that begin from words.
        method: what the encoder was pre-trained with, for tasks that keep its head.
    """
    if isinstance(tuning, str):
        tuning = Tuning.of(tuning)
    task = build_objective("tasks", name, config, copy.deepcopy(encoder), train_data.names, seed)
    if name == "regression":
        task.fit_labels(train_data.labels)
    if name == "cloze":
        task.begin(method, train_data.items, train_data.labels)
    if name == "generation" and tuning.text in ("probe", "layer_mix"):
        raise ConfigError(
            f"generation has no head beside the encoder, and tuning {tuning.text!r} freezes that: "
            "use full or lora"
        )
    if name == "cloze" and tuning.text == "layer_mix":
        raise ConfigError("the head of a cloze reads the last layer, not a mix: use another tuning")
    tune(task, tuning, Where(preprocessor=preprocessor), seed)
    return task


def rows_of(task: Task, preprocessor: Preprocessor, labelled: Labelled) -> LabelledDataset:
    """Labelled examples as the data set that a task reads."""
    return preprocessor.labelled(labelled, **task.row_options)  # type: ignore[call-arg]


def fit(
    task: Task,
    preprocessor: Preprocessor,
    train_data: Labelled,
    training: TrainingConfig,
    *,
    valid: Labelled | None = None,
    folder: RunFolder | None = None,
    title: str = "fine-tuning",
) -> list[dict[str, Any]]:
    """Trains a task on labelled data; gives the rows of its metrics.

    Args:
        task: from `new_task`.
        preprocessor: the encoder's own, `limited` to the length of an item.
        train_data: labelled examples.
        training: budget and optimizer.
        valid: held-out examples whose loss and metric are followed while training.
        folder: where the run is kept.
        title: what the progress line says.
    """
    data = rows_of(task, preprocessor, train_data)
    if data.truncated:
        share = f"{data.truncated:,} of {len(data):,} training examples"
        console.say(f"{share} are too long and were cut")
    held_out = rows_of(task, preprocessor, valid) if valid else None
    watch = _watch(task, preprocessor, valid, held_out, training.seed) if valid else None
    return train(task, data, held_out, training, folder, title, watch)


def _watch(task: Task, preprocessor: Preprocessor, valid: Labelled, rows: Any, seed: int) -> Watch:
    """The metric of held-out examples; of a mixture the accuracy of each task and their mean."""
    most = task.max_watched
    if not valid.parts:
        if most is not None and len(valid) > most:
            chosen = Order(len(valid), seed)[0:most]
            rows = rows_of(task, preprocessor, valid.take(sorted(chosen.tolist())))
        return lambda trained: {"score": score(trained, rows)}
    numbers: dict[str, list[int]] = {}
    for number in Order(len(valid), seed)[0 : len(valid)].tolist():
        numbers.setdefault(valid.parts[number].name, []).append(number)
    watched = valid.take(number for some in numbers.values() for number in some[:most])

    def watch(trained: Any) -> dict[str, float]:
        found = part_accuracies(trained, preprocessor, watched)
        by_task = {f"score_{name}": value for name, value in found.items()}
        return {"score": fmean(found.values()), **by_task}

    return watch


@torch.inference_mode()
def answers(task: Task, data: LabelledDataset, batch_size: int = 64) -> tuple[list[Any], list[Any]]:
    """Truth and guess as the task's metric reads them: the data set's `collect` of all rows."""
    device = next(task.parameters()).device
    dtype = pick_dtype("auto", device)
    lengths = np.zeros(len(data)) if data.lengths is None else data.lengths
    order = np.argsort(lengths, kind="stable")
    values: list[np.ndarray] = [np.empty(0)] * len(data)
    scores: list[np.ndarray] = [np.empty(0)] * len(data)
    was_training = task.training
    task.eval()
    for first in range(0, len(order), batch_size):
        numbers = order[first : first + batch_size]
        batch = to_device(data.batch(numbers), device)
        with autocast(device, dtype):
            predicted = task.predict(batch)
        of_batch = [rows.float().cpu().numpy() for rows in predicted]
        for row, number in enumerate(numbers):
            values[number], scores[number] = (rows[row] for rows in of_batch)
    task.train(was_training)
    return data.collect(values, scores)


def class_scores(
    task: Task, preprocessor: Preprocessor, labelled: Labelled
) -> Float[np.ndarray, "items classes"]:
    """The logarithm of the probability that a task gives to each class of each item, float64."""
    rows = rows_of(task, preprocessor, labelled)
    nothing = np.zeros((len(labelled), len(labelled.names)))
    _, shares = answers(task, SoftLabelled(rows, nothing))
    return np.log(np.maximum(np.stack(shares).astype(np.float64), np.finfo(np.float32).tiny))


def score(task: Task, data: LabelledDataset) -> float:
    """The task's metric over all examples."""
    return float(METRICS[task.metric](*answers(task, data)))
