"""Checkpoints: what was saved comes back bit-equal, and damage is found, named and passed over."""

import errno
import json
import os
import pickle
import shutil
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

from selfsup import files
from selfsup.errors import CheckpointError, StorageError
from selfsup.files import sha256
from selfsup.training import checkpoint as training_checkpoint
from selfsup.training.checkpoint import (
    Checkpoint,
    checkpoint_paths,
    load_checkpoint,
    load_newest,
    load_optimizer,
    load_tensors,
    load_weights,
    optimizer_tensors,
    save_checkpoint,
    save_tensors,
    verify,
)
from selfsup.training.optimizers.adamw import AdamW

FILES = (
    "weights.safetensors",
    "optimizer.safetensors",
    "best.safetensors",
    "state.json",
    "manifest.json",
)


def checkpoint(step: int, size: int = 3) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    weights = {
        "float": torch.randn(size, 4, generator=generator),
        "half": torch.randn(5, generator=generator).to(torch.bfloat16),
        "count": torch.tensor(2**40 + step),
        "flag": torch.tensor([True, False]),
        "turned": torch.randn(3, 2, generator=generator).T,
        "none": torch.zeros(0, 3),
        "odd": torch.tensor([float("nan"), -0.0, float("inf"), 1e-45]),
    }
    moments = {"float|exp_avg": torch.randn(size, 4, generator=generator)}
    state = {"step": step, "sums": {"loss": 0.1 + 0.2}, "warnings": ["søk"], "best_loss": None}
    return Checkpoint(weights, moments, {"float": torch.ones(2)}, state)


def bits(tensors: dict[str, torch.Tensor]) -> dict[str, tuple]:
    """Type, shape and bytes of each: NaN equals NaN, 0.0 is not -0.0."""
    return {
        name: (t.dtype, t.shape, t.contiguous().flatten().view(torch.uint8).tolist())
        for name, t in tensors.items()
    }


def same(got: Checkpoint, expected: Checkpoint) -> None:
    for ours, theirs in zip(got[:3], expected[:3], strict=True):
        assert bits(ours) == bits(theirs)
    assert got.state == expected.state


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three checkpoints, the newest of step 30."""
    for step in (10, 20, 30):
        save_checkpoint(tmp_path / "checkpoints", step, checkpoint(step), keep=3)
    return tmp_path / "checkpoints"


def test_a_checkpoint_comes_back_bit_equal(tmp_path):
    path = save_checkpoint(tmp_path, 7, checkpoint(7), keep=1)
    assert path == tmp_path / "step-00000007"
    assert sorted(p.name for p in path.iterdir()) == sorted(FILES)
    same(load_newest(tmp_path), checkpoint(7))


def test_without_best_there_is_no_best(tmp_path):
    save_checkpoint(tmp_path, 7, checkpoint(7)._replace(best=None), keep=1)
    assert load_newest(tmp_path).best is None


def test_no_checkpoint_at_all_is_none(tmp_path):
    assert load_newest(tmp_path / "nothing") is None


def test_only_the_newest_are_kept(tmp_path):
    for step in (5, 10, 15, 20):
        save_checkpoint(tmp_path, step, checkpoint(step), keep=2)
        (tmp_path / ".step-00000099.1.tmp").mkdir(exist_ok=True)  # a half-written one is no count
    assert [p.name for p in checkpoint_paths(tmp_path)] == ["step-00000015", "step-00000020"]
    assert load_newest(tmp_path).state["step"] == 20


def names(folder: Path) -> list[str]:
    return [p.name for p in checkpoint_paths(folder)]


def test_every_so_many_steps_one_stays_for_good(tmp_path):
    for step in range(5, 45, 5):
        save_checkpoint(tmp_path, step, checkpoint(step), keep=2, keep_every=15)
    assert names(tmp_path) == [f"step-000000{step}" for step in (15, 30, 35, 40)]


def test_steps_are_numbers_and_not_words(tmp_path):
    for step in (99_999_999, 100_000_000, 100_000_001):
        save_checkpoint(tmp_path, step, checkpoint(step), keep=2)
    (tmp_path / "step-of-mine").mkdir()
    assert names(tmp_path) == ["step-100000000", "step-100000001"]


def test_a_damaged_later_one_does_not_cost_the_new_one(tmp_path):
    """The run went on from the one before it."""
    for step in (20, 30):
        save_checkpoint(tmp_path, step, checkpoint(step), keep=2)
    empty(tmp_path / "step-00000030" / "weights.safetensors")
    save_checkpoint(tmp_path, 25, checkpoint(25), keep=1)
    same(load_newest(tmp_path), checkpoint(25))
    save_checkpoint(tmp_path, 30, checkpoint(30), keep=1)
    assert names(tmp_path) == ["step-00000030"]
    same(load_newest(tmp_path), checkpoint(30))


def test_a_step_that_is_saved_again_replaces_the_old_one(tmp_path):
    for size in (3, 9):
        save_checkpoint(tmp_path, 5, checkpoint(5, size), keep=2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000005"]
    assert load_newest(tmp_path).weights["float"].shape == (9, 4)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def halve(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [cut, halve, empty, lengthen, Path.unlink])
def test_damage_is_found_named_and_the_one_before_is_used(folder, capsys, name, damage):
    damage(folder / "step-00000030" / name)
    with pytest.raises(CheckpointError, match=name) as caught:
        verify(folder / "step-00000030")
    assert "step-00000030" in str(caught.value)
    same(load_newest(folder), checkpoint(20))
    said = capsys.readouterr().err
    assert said.startswith("warning: ")
    assert "step-00000030" in said
    assert name in said
    assert "using the one before it" in said


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_anywhere_is_found(folder, name):
    """The first and the last bit, and many between."""
    path = folder / "step-00000030" / name
    content = path.read_bytes()
    count = len(content) * 8
    every = 13 if name == "manifest.json" else 61
    for bit in sorted({0, count - 1, *range(0, count, every)}):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError):
            load_checkpoint(folder / "step-00000030")
    path.write_bytes(content)
    same(load_newest(folder), checkpoint(30))


def test_two_damaged_ones_are_passed_over(folder):
    for step in (20, 30):
        empty(folder / f"step-000000{step}" / "state.json")
    same(load_newest(folder), checkpoint(10))


def test_when_all_are_damaged_it_says_so(folder):
    for path in checkpoint_paths(folder):
        (path / "weights.safetensors").unlink()
    with pytest.raises(CheckpointError, match="all 3 checkpoints are damaged"):
        load_newest(folder)


def rewritten(path: Path, **changes) -> None:
    """A manifest that is consistent in itself, with some keys changed."""
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, **changes}))


class Trap:
    """A pickle of it runs a command when it is loaded."""

    def __reduce__(self):
        return os.system, ("touch sprung",)


def test_a_pickle_in_disguise_is_refused_and_never_run(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = folder / "step-00000030"
    (path / "weights.safetensors").write_bytes(pickle.dumps(Trap()))
    hashes = {p.name: sha256(p) for p in path.iterdir() if p.name != "manifest.json"}
    rewritten(path, sha256=hashes)
    verify(path)  # the manifest is right: the file itself must be refused
    with pytest.raises(CheckpointError, match=r"weights\.safetensors: damaged or not a safetens"):
        load_checkpoint(path)
    same(load_newest(folder), checkpoint(20))
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["../x", "/etc/hostname", "..", "sub/x", "", "../step-00000020"])
def test_a_manifest_cannot_name_files_elsewhere(folder, name):
    (folder / "x").write_bytes(b"secret")
    path = folder / "step-00000030"
    hashes = json.loads((path / "manifest.json").read_text())["sha256"]
    rewritten(path, sha256={**hashes, name: sha256(folder / "x")})
    with pytest.raises(CheckpointError, match="is missing"):
        verify(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "format 2, this version reads 1"),
        ({"sha256": {}}, "does not list weights"),
        ({"sha256": []}, "missing or damaged"),
        ({"sha256": None}, "missing or damaged"),
    ],
)
def test_a_strange_manifest_is_refused(folder, changes, message):
    rewritten(folder / "step-00000030", **changes)
    with pytest.raises(CheckpointError, match=message):
        verify(folder / "step-00000030")


def test_best_weights_that_the_manifest_does_not_list_are_refused(folder):
    path = folder / "step-00000030"
    hashes = json.loads((path / "manifest.json").read_text())["sha256"]
    rewritten(path, sha256={k: v for k, v in hashes.items() if k != "best.safetensors"})
    with pytest.raises(CheckpointError, match=r"does not list best"):
        verify(path)


def test_a_full_disk_leaves_the_older_checkpoint_and_no_debris(tmp_path):
    """A real file system with 256 KiB of room."""
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        save_checkpoint(tmp_path, 10, checkpoint(10), keep=1)
        with pytest.raises(StorageError, match="step-00000020: no space left"):
            save_checkpoint(tmp_path, 20, checkpoint(20, size=50_000), keep=1)
        assert [p.name for p in tmp_path.iterdir()] == ["step-00000010"]
        same(load_newest(tmp_path), checkpoint(10))
        save_checkpoint(tmp_path, 20, checkpoint(20), keep=1)  # and there is room again
        assert [p.name for p in tmp_path.iterdir()] == ["step-00000020"]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_full_disk_is_tried_again_with_a_warning_each_time(tmp_path, monkeypatch, capsys):
    slept, left = [], [2]

    def fsync(_descriptor: int) -> None:
        if left[0]:
            left[0] -= 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(training_checkpoint, "WAITS", (2.0, 4.0, 8.0))
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(os, "fsync", fsync)
    save_checkpoint(tmp_path, 10, checkpoint(10), keep=1)
    assert slept == [2.0, 4.0]
    said = capsys.readouterr().err.splitlines()
    assert [line.rpartition("; ")[2] for line in said] == [
        "trying again in 2 s",
        "trying again in 4 s",
    ]
    assert all("step-00000010: no space left on the device" in line for line in said)
    same(load_newest(tmp_path), checkpoint(10))


def test_a_place_that_refuses_is_not_tried_again(tmp_path, monkeypatch, capsys):
    def fsync(_descriptor: int) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(StorageError, match="cannot be written"):
        save_checkpoint(tmp_path, 10, checkpoint(10), keep=1)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("room", "damaged", "stay", "given_up"),
    [
        (2, [], [30, 40], "step-00000010, step-00000020"),
        (3, [30], [30, 40], "step-00000010"),  # up to the newest that is whole
        (1, [], [30], "step-00000010, step-00000020"),  # that was not enough
        (2, [30], [20, 30], "step-00000010"),
        (1, [10, 20, 30], [10, 20, 30], None),
    ],
)
def test_older_ones_are_given_up_for_room_but_the_newest_whole(
    tmp_path, monkeypatch, capsys, room, damaged, stay, given_up
):
    """A disk that is full as long as so many checkpoints are there."""
    for step in (10, 20, 30):
        save_checkpoint(tmp_path, step, checkpoint(step), keep=3)
    for step in damaged:
        empty(tmp_path / f"step-000000{step}" / "weights.safetensors")

    def fsync(_descriptor: int) -> None:
        if len([name for name in names(tmp_path) if name != "step-00000040"]) >= room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with nullcontext() if 40 in stay else pytest.raises(StorageError, match="no space left"):
        save_checkpoint(tmp_path, 40, checkpoint(40), keep=2)
    assert [p.name for p in sorted(tmp_path.iterdir())] == [f"step-000000{step}" for step in stay]
    said = capsys.readouterr().err
    assert f"giving up {given_up} for room" in said if given_up else "giving up" not in said


def test_what_stays_for_good_is_not_given_up(tmp_path, monkeypatch):
    for step in (10, 20, 30):
        save_checkpoint(tmp_path, step, checkpoint(step), keep=3)

    def fsync(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(StorageError):
        save_checkpoint(tmp_path, 40, checkpoint(40), keep=3, keep_every=10)
    assert names(tmp_path) == ["step-00000010", "step-00000020", "step-00000030"]


@pytest.mark.parametrize("swaps", [True, False])
def test_readers_never_fail_while_saves_replace_and_remove(tmp_path, monkeypatch, capsys, swaps):
    """The newest is removed by the next save but one; a step is saved twice."""
    if not swaps:
        monkeypatch.setattr(files, "exchange", lambda one, other: False)
    save_checkpoint(tmp_path, 1, checkpoint(1), keep=1)
    written = iter(range(2, 10**6))
    ended = threading.Event()

    def write() -> None:
        while not ended.is_set():
            step = next(written)
            for _ in range(2 if swaps else 1):
                save_checkpoint(tmp_path, step, checkpoint(step), keep=1)

    with ThreadPoolExecutor(1) as executor:
        writing = executor.submit(write)
        steps = []
        try:
            while not steps or len(set(steps)) < 10:
                found = load_newest(tmp_path)
                same(found, checkpoint(found.state["step"]))
                steps.append(found.state["step"])
        finally:
            ended.set()
        writing.result()
    assert steps == sorted(steps)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("after", range(6))
def test_a_disk_that_fills_at_any_flush_leaves_the_older_one(tmp_path, monkeypatch, after):
    save_checkpoint(tmp_path, 10, checkpoint(10), keep=1)
    calls = []

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(StorageError):
        save_checkpoint(tmp_path, 20, checkpoint(20), keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000010"]
    same(load_newest(tmp_path), checkpoint(10))


def test_load_weights_names_what_does_not_fit():
    module = nn.Linear(3, 2)
    weights = module.state_dict()
    with pytest.raises(CheckpointError, match=r"here: .*missing \['bias'\], unknown \['bios'\]"):
        load_weights(module, {"weight": weights["weight"], "bios": weights["bias"]}, "here")
    with pytest.raises(CheckpointError, match=r"bias is \(5,\), here \(2,\)"):
        load_weights(module, {**weights, "bias": torch.zeros(5)}, "here")


class Sized(nn.Module):
    """A buffer whose size the data decide."""

    def __init__(self, values: list[int]):
        super().__init__()
        self.register_buffer("numbers", torch.tensor(values, dtype=torch.long))

    def _load_from_state_dict(self, state, prefix, *others):
        self.numbers = self.numbers.new_empty(state[f"{prefix}numbers"].shape)
        super()._load_from_state_dict(state, prefix, *others)


def test_a_buffer_that_is_empty_here_gets_the_size_of_the_checkpoint():
    module = Sized([])
    load_weights(module, {"numbers": torch.arange(3)}, "here")
    assert module.numbers.tolist() == [0, 1, 2]
    with pytest.raises(CheckpointError, match=r"numbers is \(4,\), here \(3,\)"):
        load_weights(module, {"numbers": torch.arange(4)}, "here")
    with pytest.raises(CheckpointError, match=r"numbers is \(1, 1\), here \(0,\)"):
        load_weights(Sized([]), {"numbers": torch.zeros(1, 1, dtype=torch.long)}, "here")


def test_a_file_that_is_no_safetensors_file_is_named(tmp_path):
    save_tensors(tmp_path / "a", {"x": torch.ones(2)})
    shutil.copy(tmp_path / "a", tmp_path / "b")
    halve(tmp_path / "b")
    assert load_tensors(tmp_path / "a")["x"].tolist() == [1, 1]
    for name in ("b", "none"):
        with pytest.raises(CheckpointError, match=name):
            load_tensors(tmp_path / name)


def test_the_optimizers_state_comes_back_bit_equal():
    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
        return module, AdamW(module.parameters(), lr=0.1, fused=True)

    def step(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        module(torch.arange(6.0).reshape(2, 3)).square().sum().backward()
        optimizer.step()

    with torch.random.fork_rng():
        (module, optimizer), (other, other_optimizer) = build(), build()
    for _ in range(3):
        step(module, optimizer)
    saved = {k: v.clone() for k, v in optimizer_tensors(module, optimizer).items()}
    assert "0.weight|exp_avg_sq" in saved
    assert saved["1.bias|step"] == 3
    load_weights(other, {k: v.clone() for k, v in module.state_dict().items()}, "here")
    load_optimizer(other, other_optimizer, saved)
    for net, its in ((module, optimizer), (other, other_optimizer)):
        step(net, its)
    assert bits(other.state_dict()) == bits(module.state_dict())
    assert bits(optimizer_tensors(other, other_optimizer)) == bits(
        optimizer_tensors(module, optimizer)
    )
