"""Peak memory of a pre-training step against `transformers`, each side in a process of its own.

    python -m benchmarks.memory selfsup 256 4 32 128 30522    one side alone: bytes

Counted is by how much the process has grown at its largest since just before the model was built:
weights, gradients, the optimizer's moments and all that three steps keep at a time.
"""

import resource
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.text import (
    draw,
    own_masked,
    own_masked_step,
    peer_masked,
    peer_masked_step,
)
from benchmarks.timing import NotMeasuredError, Pair
from selfsup.training.device import keep_freed_memory

SIDES = ("selfsup", "peer")


def masked(*shape: int) -> Pair:
    """MiB of an MLM step; `shape` is dim, layers, batch, time and vocabulary."""
    if sys.platform != "linux":
        raise NotMeasuredError("the largest size of a process is read on Linux alone")
    ours, peer = (int(_output(side, shape)) / 2**20 for side in SIDES)
    return ours, peer, "MiB, float32; less is better"


def _output(side: str, shape: tuple[int, ...]) -> str:
    command = [sys.executable, "-m", "benchmarks.memory", side, *map(str, shape)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def grown(side: str, dim: int, layers: int, batch: int, time_: int, vocabulary: int) -> int:
    """Bytes by which three steps of one side make this process grow."""
    import transformers.models.bert.modeling_bert  # noqa: F401  (the libraries do not count)

    if side == "selfsup":
        keep_freed_memory()  # as its training loop does
    tokens, before = draw(batch, time_, vocabulary), _largest()
    if side == "selfsup":
        step = own_masked_step(own_masked(dim, layers, vocabulary), tokens, torch.float32)
    else:
        step = peer_masked_step(peer_masked(dim, layers, vocabulary), tokens, torch.float32)
    for _ in range(3):
        step()
    return _largest() - before


def _largest() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


BENCHMARKS: dict[str, Callable[[], Pair]] = {
    "mlm_4x256_memory": partial(masked, 256, 4, 32, 128, 30522),
}

if __name__ == "__main__":
    print(grown(sys.argv[1], *map(int, sys.argv[2:])))
