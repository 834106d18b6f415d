"""What training with a tuning costs: numbers that move, seconds, memory, and bytes to keep.

Memory is counted from the tensors, not read from the machine, so it is the same number on a CPU and
on a GPU: what one step keeps for its backward pass, gradients and the optimizer's moments of all
that is trained, and all weights. What a GPU really took stands beside it where there is one.
"""

import time
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from selfsup.batch import Batch
from selfsup.data.dataset import LabelledDataset
from selfsup.model_folder import kept_weights, without_base
from selfsup.models.encoder import Encoder
from selfsup.objective import Task
from selfsup.randomness import isolated, seed_layers, torch_generator
from selfsup.training.config import Optimizer, TrainingConfig
from selfsup.training.device import autocast, pick_dtype, to_device
from selfsup.training.optim import num_moments
from selfsup.tuning.choice import Tuning
from selfsup.tuning.parts import trained

TIMED = 5  # passes whose shortest is the time of a step: what else runs only makes one longer


class Cost(NamedTuple):
    """What one training cost.

    Attributes:
        trained: numbers that were trained.
        share: of all numbers.
        seconds: wall-clock time of the training, its looks at held-out examples included.
        step_seconds: of one step, forward and backward, the shortest of several.
        memory: bytes of a step, `step_memory`.
        file_bytes: of the weights that a run of this tuning would save.
        gpu_memory: most bytes that the GPU held while training; None without one.
    """

    trained: int
    share: float
    seconds: float
    step_seconds: float
    memory: int
    file_bytes: int
    gpu_memory: int | None = None


def measured(
    task: Task,
    base: Encoder,
    tuning: Tuning,
    data: LabelledDataset,
    training: TrainingConfig,
    seconds: float,
    gpu_memory: int | None = None,
) -> Cost:
    """The cost of a training that is done; moves running statistics, so score the task before.

    Args:
        task: as the training has left it.
        base: the encoder that the task's began as.
        tuning: how it was trained.
        data: what it was trained on; a step of its longest examples is measured.
        training: batch size, precision, steps.
        seconds: what the training took.
        gpu_memory: what it took of a GPU, bytes.
    """
    moved, every = trained(task)
    lengths = np.zeros(len(data)) if data.lengths is None else data.lengths
    longest = np.argsort(-lengths, kind="stable")[: training.batch_size]
    device = next(task.parameters()).device
    batch = to_device(data.batch(longest), device)
    with autocast(device, pick_dtype(training.precision, device)):
        memory, shortest = step_memory(task, batch, training.optimizer), step_seconds(task, batch)
    file_bytes = saved_bytes(task, base, tuning)
    return Cost(moved, moved / every, seconds, shortest, memory, file_bytes, gpu_memory)


def step_memory(task: Task, batch: Batch, optimizer: Optimizer = "adamw") -> int:
    """Bytes of one training step: kept for backward, gradients, moments, and all weights.

    Kept for backward is what autograd saves, each storage once, without the weights and the batch.
    """
    task.train()
    weights = storages([*task.parameters(), *task.buffers()])
    known, kept = weights.keys() | storages(batch.values()).keys(), dict[int, int]()

    def note(tensor: Tensor) -> Tensor:
        kept.update(storages([tensor]))
        return tensor

    with isolated(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        seed_layers(0, "memory")
        device = next(iter(batch.values())).device
        task.loss(batch, torch_generator(0, "memory", device=device))
    activations = sum(size for place, size in kept.items() if place not in known)
    moving = [p for p in task.parameters() if p.requires_grad]
    moments = sum(p.itemsize * num_moments(p.shape, optimizer) for p in moving)
    task.eval()
    return activations + sum(p.nbytes for p in moving) + moments + sum(weights.values())


def step_seconds(task: Task, batch: Batch) -> float:
    """Wall-clock seconds of forward and backward, the shortest of a few."""
    task.train()
    device, times = next(iter(batch.values())).device, []
    with isolated():
        for _ in range(TIMED):
            seed_layers(0, "time")
            started = time.perf_counter()
            task.loss(batch, torch_generator(0, "time", device=device)).loss.backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - started)
            task.zero_grad(set_to_none=True)
    task.eval()
    return min(times)


def storages(tensors) -> dict[int, int]:
    """Bytes of each storage that some tensors lie in, by its address."""
    found = [tensor.untyped_storage() for tensor in tensors if isinstance(tensor, Tensor)]
    return {storage.data_ptr(): storage.nbytes() for storage in found}


def saved_bytes(task: Task, base: Encoder, tuning: Tuning) -> int:
    """Bytes of the weights in a run's `model/`: all of them, or those that the base has not."""
    weights = kept_weights(task)
    if not tuning.whole:
        weights = without_base(weights, task.encoder, base)
    return sum(weight.nbytes for weight in weights.values())
