"""A long run holds no more memory at its end than at its beginning."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read as on Linux"),
]

STEPS = 10_000
MOST = 4.0  # MiB: rows of the log that wait to be written, pages that the allocator keeps
SETTINGS = {
    "model.dim": 16,
    "model.layers": 1,
    "model.heads": 1,
    "data.row_length": 16,
    "data.tokenizer.vocab_size": 64,
    "training.steps": STEPS,
    "training.batch_size": 4,
    "training.evaluations": 20,
    "training.log_every": 10,
    "training.checkpoint_every": 200,
}


def resident(process: int) -> float:
    """MiB that a process holds."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * 4096 / 2**20


def last_step(metrics: Path) -> int:
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError):  # a line that is being written, or a summary
            continue
    return 0


def test_memory_is_flat_over_ten_thousand_steps(tmp_path):
    texts = [" ".join(f"w{i * j % 50}" for j in range(1, 40)) for i in range(400)]
    (tmp_path / "texts.txt").write_text("\n\n".join(texts))
    out = tmp_path / "run"
    given = [f"{key}={value}" for key, value in SETTINGS.items()]
    verb = ["pretrain", "bert-tiny-english", "--data", str(tmp_path / "texts.txt")]
    process = subprocess.Popen(
        [sys.executable, "-m", "selfsup", *verb, "--out", str(out), "--set", *given],
        stdout=subprocess.DEVNULL,
    )
    held: list[tuple[int, float]] = []
    while process.poll() is None:
        step = last_step(out / "metrics.jsonl")
        try:
            held.append((step, resident(process.pid)))
        except (OSError, IndexError):  # it has just ended
            break
        time.sleep(0.2)
    assert process.wait() == 0
    early = [size for step, size in held if 0.1 * STEPS < step < 0.2 * STEPS]
    late = [size for step, size in held if 0.9 * STEPS < step < STEPS]
    assert min(len(early), len(late)) > 5, held[-5:]
    assert max(late) - max(early) < MOST, (max(early), max(late))
