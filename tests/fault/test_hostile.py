"""Run folders made to do harm: refused with the right exit code, and nothing is executed."""

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from selfsup.config import read_toml, write_toml
from selfsup.files import sha256
from selfsup.training.checkpoint import checkpoint_paths, load_tensors, save_tensors

pytestmark = pytest.mark.fault

MEGABYTES = 100
STEPS = "training.steps=12"
CANARY = "canary"  # made in the working folder by whatever is executed
# One process, in place of its own command line, answers many, and says what each one cost.
ANSWERS = """
import contextlib, io, json, resource, sys, traceback
from pathlib import Path
from selfsup.cli import main

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

found = {{}}
for name, words in json.loads(Path({asked!r}).read_text()).items():
    before, said = peak(), io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        try:
            code = main(words)
        except BaseException:
            code = traceback.format_exc()
    found[name] = code, said.getvalue(), peak() - before
    Path({told!r}).write_text(json.dumps(found))
sys.exit(0)
"""


@pytest.fixture(scope="module")
def run(pretrain, finished, tmp_path_factory) -> Path:
    """A finished run with one checkpoint; tests change copies."""
    path = tmp_path_factory.mktemp("hostile") / "run"
    finished(pretrain(path, STEPS, "training.checkpoints=1", "training.keep=best"))
    return path


@pytest.fixture
def refused(launch, faults, tmp_path):
    """Holds command lines against the exit codes that they may have.

    None may raise, execute anything, or let the process grow by 100 MB.
    """

    def refused(
        fault: str,
        note: str,
        commands: dict[str, list[object]],
        codes: dict[str, tuple[int, ...]],
    ) -> None:
        asked, told = tmp_path / "asked.json", tmp_path / "told.json"
        words = {name: list(map(str, command)) for name, command in commands.items()}
        asked.write_text(json.dumps(words))
        child = launch("--version", setup=ANSWERS.format(asked=str(asked), told=str(told)))
        assert child.wait(1200) == 0, child.err.read_text()
        answers = json.loads(told.read_text())
        assert answers.keys() == codes.keys()
        failed = []
        for name, (code, said, growth) in answers.items():
            try:
                with faults.trial(fault, note):
                    assert code in codes[name], f"{code}\n{said[-500:]}"
                    assert said.splitlines()[-1].startswith("error: ")
                    assert growth < MEGABYTES
                    assert not (tmp_path / CANARY).exists()
            except AssertionError as error:
                failed.append(f"{name}: {error}")
        assert not failed, "\n".join(failed)

    return refused


class Trap:
    """A pickle of it makes the canary when it is loaded."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def described(tensors: dict[str, tuple[list[int], list[int]]], size: int) -> bytes:
    """A safetensors file of zeros: shapes and offsets by name."""
    header = {
        name: {"dtype": "F32", "shape": shape, "data_offsets": offsets}
        for name, (shape, offsets) in tensors.items()
    }
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(size)


def tensor_files(canary: Path) -> dict[str, bytes]:
    """What may stand in place of a safetensors file."""
    return {
        "pickle": pickle.dumps(Trap(canary)),
        "a torch file": torch_file(canary),
        "header longer than memory": struct.pack("<Q", 2**62) + b"{}",
        "header of a terabyte": struct.pack("<Q", 2**40) + b"{}",
        "header of 50 MB": struct.pack("<Q", 50 * 10**6) + b"[" * (50 * 10**6),
        "header nested deeply": struct.pack("<Q", 10**6) + b"[" * 10**6,
        "overlapping tensors": described({"a": ([4], [0, 16]), "b": ([4], [8, 24])}, 24),
        "tensor beyond the end": described({"a": ([4], [0, 16])}, 8),
        "tensor of 4 TB": described({"a": ([2**40], [0, 2**42])}, 16),
        "shape that overflows": described({"a": ([2**62, 8], [0, 16])}, 16),
        "negative shape": described({"a": ([-4], [0, 16])}, 16),
        "unknown names": described({"../../canary": ([4], [0, 16])}, 16),
        "nothing": b"",
    }


def torch_file(canary: Path) -> bytes:
    import io

    file = io.BytesIO()
    torch.save({"weights": Trap(canary)}, file)
    return file.getvalue()


def rehashed(checkpoint: Path) -> None:
    """The manifest is right about every file: what is in them must be refused."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["sha256"] = {name: sha256(checkpoint / name) for name in manifest["sha256"]}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def named(name: str) -> Callable[[Path], None]:
    """The manifest lists a file elsewhere."""

    def change(checkpoint: Path) -> None:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        manifest["sha256"][name] = "0" * 64
        (checkpoint / "manifest.json").write_text(json.dumps(manifest))

    return change


def state_with(**keys: object) -> Callable[[Path], None]:
    """state.json with other keys or values, and its hash."""

    def change(checkpoint: Path) -> None:
        path = checkpoint / "state.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))
        rehashed(checkpoint)

    return change


def written(name: str, content: bytes) -> Callable[[Path], None]:
    """A file with another content, and its hash."""

    def change(checkpoint: Path) -> None:
        (checkpoint / name).write_bytes(content)
        if name != "manifest.json":
            rehashed(checkpoint)

    return change


def moments_of_another_shape(checkpoint: Path) -> None:
    path = checkpoint / "optimizer.safetensors"
    tensors = {k: torch.zeros(3) if v.ndim else v for k, v in load_tensors(path).items()}
    save_tensors(path, tensors)
    rehashed(checkpoint)


def half_of_the_moments(checkpoint: Path) -> None:
    path = checkpoint / "optimizer.safetensors"
    tensors = {k: v for k, v in load_tensors(path).items() if not k.endswith("exp_avg_sq")}
    save_tensors(path, {k: v.clone() for k, v in tensors.items()})
    rehashed(checkpoint)


def checkpoints_of(canary: Path) -> dict[str, Callable[[Path], None]]:
    """Hostile checkpoints."""
    nested = b"[" * 10**6
    found = {
        f"{name} as {file}": written(file, content)
        for name, content in tensor_files(canary).items()
        for file in ("weights.safetensors", "optimizer.safetensors")
    }
    names = ("../../../canary", str(canary), "..", "sub/x", "\0")
    found |= {f"manifest names {name!r}": named(name) for name in names}
    return found | {
        "manifest nested deeply": written("manifest.json", nested),
        "manifest is a list": written("manifest.json", b"[]"),
        "manifest of another type": written("manifest.json", b'{"format": 1, "sha256": {"a": 1}}'),
        "state nested deeply": written("state.json", nested),
        "state is no JSON": written("state.json", b"\x80\x04K\x01."),
        "state is a list": written("state.json", b"[1]"),
        "state with an unknown key": state_with(__class__="os.system"),
        "state with a step in words": state_with(step="os.system"),
        "state with a negative step": state_with(step=-5),
        "state with an endless step": state_with(step=1e999),
        "state with sums that are none": state_with(sums=3),
        "state with negative bytes": state_with(metrics_bytes=-7),
        "moments of another shape": moments_of_another_shape,
        "half of the moments": half_of_the_moments,
        "no moments": written("optimizer.safetensors", described({}, 0)),
    }


def test_checkpoints(run, refused, corpus, tmp_path):
    """The only checkpoint of a run is hostile: --resume refuses it."""
    # more steps than were made, so that the moments would be used
    settings = ("--set", "training.steps=14", "training.keep=best", "training.log_every=1")
    commands, codes = {}, {}
    for number, (name, change) in enumerate(checkpoints_of(tmp_path / CANARY).items()):
        copy = tmp_path / str(number)
        shutil.copytree(run, copy)
        (checkpoint,) = checkpoint_paths(copy / "checkpoints")
        change(checkpoint)
        begin = ("pretrain", corpus.masked, "--data", corpus.text, "--out", copy, "--resume")
        commands[name], codes[name] = [*begin, *settings], (5,)
    note = "exit code 5; nothing executed; less than 100 MB"
    refused("hostile checkpoint", note, commands, codes)


def settled(**keys: object) -> Callable[[Path], None]:
    """config.toml with other values: `section__key`."""

    def change(model: Path) -> None:
        values = read_toml(model / "config.toml")
        for dotted, value in keys.items():
            section, _, key = dotted.partition("__")
            if key:
                values.setdefault(section, {})[key] = value
            else:
                values[section] = value
        (model / "config.toml").write_text(write_toml(values))

    return change


def described_as(name: str, content: bytes) -> Callable[[Path], None]:
    """A file with another content, its hash where config.toml has one."""

    def change(model: Path) -> None:
        (model / name).write_bytes(content)
        if name == "model.safetensors":
            settled(sha256={name: sha256(model / name)})(model)

    return change


def models_of(canary: Path) -> dict[str, tuple[Callable[[Path], None], tuple[int, ...]]]:
    """Hostile model folders, and the exit codes that fit."""
    touch = f"__import__('os').system('touch {canary}')"
    nested = b"x = " + b"[" * 10**5
    found: dict[str, tuple[Callable[[Path], None], tuple[int, ...]]] = {
        f"weights: {name}": (described_as("model.safetensors", content), (5,))
        for name, content in tensor_files(canary).items()
    }
    for section in ("data", "model", "method"):
        for name in ("os:system", "os.system", "../../canary", touch):
            found[f"{section}.name = {name!r}"] = (settled(**{f"{section}__name": name}), (2,))
        found[f"{section} is a number"] = (settled(**{section: 3}), (2, 5))
        found[f"{section}.name is a list"] = (settled(**{f"{section}__name": ["x"]}), (2, 5))
    return found | {
        "unknown key": (settled(model__hook=touch), (2,)),
        "unknown key of the method": (settled(method____class__="os.system"), (2,)),
        "a value of another type": (settled(model__dim="os.system"), (2,)),
        "format 2": (settled(format=2), (5,)),
        "hashes that are none": (settled(sha256=3), (5,)),
        "a width of 2^40": (settled(model__dim=2**40), (2, 5)),
        "a width of a terabyte": (settled(model__dim=2**18), (2, 5)),
        "a million layers": (settled(model__layers=10**6), (2, 5)),
        "a negative width": (settled(model__dim=-32), (2, 5)),
        "tunings that are none": (settled(tuning__names=["os:system"]), (2, 5)),
        "tuned from itself": (settled(base=base_of("..")), (5,)),
        "tuned from /etc": (settled(base=base_of("/etc")), (5,)),
        "base that is no section": (settled(base="os:system"), (5,)),
        "config.toml nested deeply": (described_as("config.toml", nested), (2,)),
        "config.toml is a pickle": (described_as("config.toml", pickle.dumps(Trap(canary))), (2,)),
        "config.toml is empty": (described_as("config.toml", b""), (5,)),
        "tokenizer is a pickle": (described_as("tokenizer.json", pickle.dumps(Trap(canary))), (3,)),
        "tokenizer nested deeply": (described_as("tokenizer.json", b"[" * 10**6), (3,)),
        "tokenizer is a list": (described_as("tokenizer.json", b"[]"), (3,)),
        "preprocessor nested deeply": (described_as("preprocessor.toml", nested), (3,)),
        "preprocessor in words": (
            described_as("preprocessor.toml", b'max_length = "os.system"'),
            (3,),
        ),
    }


def base_of(path: str) -> dict[str, str]:
    return {"path": path, "absolute": path, "sha256": "0" * 64}


def test_model_folders(run, refused, tmp_path):
    commands, codes = {}, {}
    for number, (name, (change, allowed)) in enumerate(models_of(tmp_path / CANARY).items()):
        copy = tmp_path / str(number)
        shutil.copytree(run, copy)
        change(copy / "model")
        commands[name], codes[name] = ["fill", copy, "the [MASK] was great"], allowed
    note = "exit code 2, 3 or 5; nothing executed; less than 100 MB"
    refused("hostile model folder", note, commands, codes)


def test_tuned_model_folders(run, launch, finished, refused, corpus, tmp_path):
    """Heads, and what a tuning adds, that are larger than the file: refused before they exist."""
    tuned = tmp_path / "tuned"
    begin = ("finetune", run, "--task", "classification", "--data", corpus.labelled)
    finished(launch(*begin, "--tuning", "lora", "--out", tuned, "--set", "training.steps=2"))
    changes = {
        "a million classes": settled(labels__names=[""] * 10**6),
        "classes that are a number": settled(labels__names=10**9),
        "classes that are numbers": settled(labels__names=[1, 2]),
        "a rank of ten million": settled(tuning__lora={"rank": 10**7}),
        "a rank of a trillion": settled(tuning__lora={"rank": 10**12}),
        "tunings that are a number": settled(tuning__names=10**9),
        "no names of tunings": settled(tuning={"lora": {"rank": 8}}),
    }
    commands, codes = {}, {}
    for number, (name, change) in enumerate(changes.items()):
        copy = tmp_path / str(number)
        shutil.copytree(tuned, copy)
        change(copy / "model")
        commands[name] = ["predict", copy, "--data", corpus.test, "--text", "text"]
        codes[name] = (5,)
    note = "exit code 2, 3 or 5; nothing executed; less than 100 MB"
    refused("hostile model folder", note, commands, codes)


def configurations_of(canary: Path, values: dict[str, Any]) -> dict[str, bytes]:
    """Hostile files in place of one that holds `values`."""
    touch = f"__import__('os').system('touch {canary}')"
    changes = {
        "import path": {"method": {**values["method"], "name": "os:system"}},
        "path": {"data": {**values["data"], "name": "../../canary"}},
        "code": {"method": {**values["method"], "mask_rate": touch}},
        "unknown key": {"model": {**values["model"], "hook": "os:system"}},
        "unknown key of training": {"training": {**values["training"], "hook": touch}},
        "sections that are numbers": {"method": 3, "model": 4, "data": 5},
        "training that is a number": {"training": 3},
        "name that is a list": {"method": {**values["method"], "name": ["os", "system"]}},
        "a width in words": {"model": {**values["model"], "dim": touch}},
    }
    return {
        "pickle": pickle.dumps(Trap(canary)),
        "nested deeply": b"x = " + b"[" * 10**5,
        **{name: write_toml({**values, **change}).encode() for name, change in changes.items()},
    }


def test_run_descriptions(run, refused, corpus, tmp_path):
    """run.toml is compared by --resume; what training may change in it is not read."""
    commands: dict[str, list[object]] = {}
    found = configurations_of(tmp_path / CANARY, read_toml(run / "run.toml"))
    found["facts that are none"] = write_toml({**read_toml(run / "run.toml"), "facts": 3}).encode()
    for number, (name, content) in enumerate(found.items()):
        if "training" in name:
            continue
        copy = tmp_path / str(number)
        shutil.copytree(run, copy)
        (copy / "run.toml").write_bytes(content)
        begin = ("pretrain", corpus.masked, "--data", corpus.text, "--out", copy, "--resume")
        settings = ("--set", STEPS, "training.keep=best", "training.log_every=1")
        commands[name] = [*begin, *settings]
    codes = dict.fromkeys(commands, (2,))
    refused("hostile run.toml", "exit code 2; nothing executed", commands, codes)


def test_recipes(run, refused, corpus, tmp_path):
    commands: dict[str, list[object]] = {}
    values = read_toml(run / "run.toml")
    values = {name: values[name] for name in ("data", "model", "method", "training")}
    for number, (name, content) in enumerate(configurations_of(tmp_path / CANARY, values).items()):
        recipe = tmp_path / f"{number}.toml"
        recipe.write_bytes(content)
        new = tmp_path / f"new{number}"
        commands[name] = ["pretrain", recipe, "--data", corpus.text, "--out", new]
    codes = dict.fromkeys(commands, (2,))
    refused("hostile recipe", "exit code 2; nothing executed", commands, codes)
