"""What the training loop itself costs, beside the work that it is there for.

`loop_4x256`: seconds of a step of masked language modelling, 4 layers x 256 with 32 rows of 128
tokens, by the whole loop (data, learning rate, agreement, log, metrics file, checkpoints of every
ten steps) against the forward and backward pass, clipping and the optimizer's step alone, all taken
in one run: 1.02x is an overhead of 2%. The loop's wait for data is in it.

`start`: seconds from `selfsup pretrain` on the demo's corpus, with nothing cached, to the first
finished step, against those of a bare `import torch`.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.timing import Pair
from selfsup import console
from selfsup.batch import Batch, Vocabulary
from selfsup.methods.generative.masked_language import Config as MaskedConfig
from selfsup.methods.generative.masked_language import MaskedLanguage
from selfsup.models.transformer import Config, TransformerEncoder
from selfsup.training import loop
from selfsup.training.config import TrainingConfig
from selfsup.training.folder import RunFolder

DEMO = Path(__file__).parent.parent / "demo" / "unlabeled"
WORK = ("forward_backward", "average_and_clip")


class Rows:
    """Packed rows of drawn tokens."""

    fields, lengths, labels = ("tokens",), None, None

    def __init__(self, rows: int, time_: int, vocabulary: int):
        self.rows = np.random.default_rng(0).integers(5, vocabulary, (rows, time_))

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, numbers: np.ndarray) -> Batch:
        tokens = torch.from_numpy(self.rows[numbers])
        return {"tokens": tokens, "index": torch.as_tensor(numbers)}


@contextmanager
def timed(owner: Any, names: tuple[str, ...]) -> Iterator[list[float]]:
    """Adds up, in a list of one number, the seconds inside these methods."""
    spent, kept = [0.0], {name: getattr(owner, name) for name in names}

    def watched(method: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        try:
            return method(*arguments, **options)
        finally:
            spent[0] += time.perf_counter() - started

    for name, method in kept.items():
        setattr(
            owner, name, lambda *given, _method=method, **more: watched(_method, *given, **more)
        )
    try:
        yield spent
    finally:
        for name, method in kept.items():
            setattr(owner, name, method)


def overhead(dim: int, layers: int, batch: int, time_: int, steps: int) -> Pair:
    """Seconds per step of the loop, and of what it calls to learn."""
    spec = Vocabulary(size=30_000, pad=0, unk=1, cls=2, sep=3, mask=4)
    shape = Config(dim=dim, layers=layers, heads=dim // 64, dropout=0.0)
    objective = MaskedLanguage(MaskedConfig(), TransformerEncoder(shape, spec), spec)
    config = TrainingConfig(
        steps=steps, batch_size=batch, evaluations=0, log_every=10, checkpoint_every=10
    )
    with (
        tempfile.TemporaryDirectory() as folder,
        closing(RunFolder(Path(folder) / "run")) as run,
        console.quiet(),
        timed(loop._Run, WORK) as work,
        timed(torch.optim.AdamW, ("step",)) as update,
    ):
        loop.train(objective, Rows(4 * batch, time_, spec.size), None, config, run)
        rows = (run.path / "speed.jsonl").read_text().splitlines()
        whole = json.loads(rows[-1])["seconds"]
    inside = work[0] + update[0]
    return whole / steps, inside / steps, "s per step, less is better"


def start() -> Pair:
    """Seconds until the first step of the demo is done."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        environment = {**os.environ, "SELFSUP_CACHE": str(Path(folder) / "cache")}
        words = ["pretrain", "bert-tiny-english", "--data", str(DEMO), "--out", str(out)]
        settings = ["--set", "training.steps=1", "training.log_every=1", "training.evaluations=0"]
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "selfsup", *words, *settings],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        speed = out / "speed.jsonl"
        while process.poll() is None and not (speed.exists() and speed.stat().st_size):
            time.sleep(0.02)
        seconds = time.perf_counter() - started
        if process.wait():
            raise RuntimeError("the demo's pre-training failed")
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return seconds, time.perf_counter() - started, "s, less is better"


BENCHMARKS: dict[str, Callable[[], Pair]] = {
    "loop_4x256": partial(overhead, 256, 4, 32, 128, 40),
    "start": start,
}
