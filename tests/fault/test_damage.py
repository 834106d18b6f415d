"""Files of a checkpoint that are cut, changed or lost: always found, named, and passed over."""

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from selfsup.errors import CheckpointError
from selfsup.training.checkpoint import checkpoint_paths, load_newest, verify

pytestmark = pytest.mark.fault

NAMES = (
    *("weights.safetensors", "optimizer.safetensors", "best.safetensors"),
    *("state.json", "manifest.json"),
)


@pytest.fixture(scope="module")
def run(pretrain, finished, tmp_path_factory) -> Path:
    """A finished run with two checkpoints; tests damage copies."""
    path = tmp_path_factory.mktemp("damage") / "run"
    finished(
        pretrain(path, "training.steps=20", "training.checkpoint_every=10", "training.keep=best")
    )
    return path


def truncated(path: Path, draw: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(len(content))])


def flipped(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    bit = draw.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def removed(path: Path, draw: random.Random) -> None:
    path.unlink()


KINDS: dict[str, tuple[Callable[[Path, random.Random], None], int]] = {
    "truncated": (truncated, 4),
    "bit-flipped": (flipped, 8),
    "removed": (removed, 1),
}


def damages() -> Iterator[tuple[str, str, int]]:
    """(kind, file, number of the trial)."""
    for kind, (_, count) in KINDS.items():
        for name in NAMES:
            for number in range(count):
                yield kind, name, number


def test_every_damage_is_found(run, selfsup, faults, tmp_path, capsys):
    """By loading, which goes on with the checkpoint before, and by `selfsup doctor`."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    before, newest = checkpoint_paths(copy / "checkpoints")
    for kind, name, number in damages():
        whole = (newest / name).read_bytes()
        with faults.trial(
            f"file of a checkpoint {kind}", "named; the checkpoint before is used; doctor says so"
        ):
            KINDS[kind][0](newest / name, random.Random(f"{kind} {name} {number}"))
            with pytest.raises(CheckpointError, match=newest.name) as caught:
                verify(newest)
            # a manifest that is readable but changed accuses the file that it describes
            assert name in str(caught.value) or name == "manifest.json"
            capsys.readouterr()
            found = load_newest(copy / "checkpoints")
            assert found is not None
            assert found.state["step"] == 10
            said = capsys.readouterr().err
            assert newest.name in said
            assert "using the one before it" in said
            answer = selfsup("doctor", copy)
            said = answer.out + answer.err
            assert "DAMAGED" in said
            assert newest.name in said
            assert name in said or name == "manifest.json"
            assert answer.code == 5
        (newest / name).write_bytes(whole)
    for name in NAMES:
        (before / name).write_bytes(b"")
        (newest / name).unlink()
    assert selfsup("doctor", copy).code == 5
    with pytest.raises(CheckpointError, match="all 2 checkpoints are damaged"):
        load_newest(copy / "checkpoints")


def test_the_weights_of_a_model_folder(run, selfsup, faults, tmp_path):
    """Its configuration holds their hash."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    weights = copy / "model" / "model.safetensors"
    whole = weights.read_bytes()
    for kind, (damage, count) in KINDS.items():
        for number in range(count):
            with faults.trial(f"weights of a model folder {kind}", "refused; exit code 5"):
                damage(weights, random.Random(f"{kind} {number}"))
                for words in (("fill", copy, "the [MASK] was"), ("doctor", copy)):
                    answer = selfsup(*words)
                    assert answer.code == 5, answer.err
                    assert "model.safetensors" in answer.err + answer.out
            weights.write_bytes(whole)
    assert selfsup("fill", copy, "the [MASK] was").code == 0
