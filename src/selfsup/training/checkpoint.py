"""Checkpoints: whole or not there, verified by hash, never read with pickle.

checkpoints/step-00001000/
    weights.safetensors      the objective's state: encoder, heads, teacher, queue, codebook
    optimizer.safetensors    one tensor per parameter and moment
    best.safetensors         the weights with the best validation loss, when they are kept
    state.json               position in the run: step, tokens, seconds, log sums
    manifest.json            sha256 of each file above
"""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from selfsup import console
from selfsup.errors import CheckpointError
from selfsup.files import sha256, whole_folder

FORMAT = 1


class Checkpoint(NamedTuple):
    """What a checkpoint folder holds."""

    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    best: dict[str, Tensor] | None
    state: dict[str, Any]


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes one safetensors file; the caller makes it durable."""
    path.write_bytes(save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Reads one safetensors file.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: damaged or not a safetensors file ({error})") from error


def load_weights(module: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Copies `tensors` into `module`, every name and shape checked.

    A buffer that is empty in `module` has no size yet (labels of all examples, whose number the
    data decide): it may get any, which the module's own `_load_from_state_dict` sees to.

    Raises:
        CheckpointError: names or shapes differ; the first ones are named.
    """
    own = module.state_dict()
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or extra:
        raise CheckpointError(
            f"{where}: does not fit this configuration; missing {missing[:3]}, unknown {extra[:3]}"
        )
    for name, tensor in tensors.items():
        unsized = own[name].numel() == 0 and own[name].ndim == tensor.ndim
        if own[name].shape != tensor.shape and not unsized:
            raise CheckpointError(
                f"{where}: {name} is {tuple(tensor.shape)}, here {tuple(own[name].shape)}"
            )
    module.load_state_dict(tensors)


def optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state under the names of the parameters: `encoder.x.weight|exp_avg`."""
    names: dict[Tensor, str] = {p: name for name, p in module.named_parameters()}
    return {
        f"{names[parameter]}|{key}": value
        for parameter, moments in optimizer.state.items()
        for key, value in moments.items()
    }


def load_optimizer(
    module: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    """Puts `optimizer_tensors` back."""
    parameters = dict(module.named_parameters())
    for name, tensor in tensors.items():
        parameter_name, _, key = name.rpartition("|")
        parameter = parameters[parameter_name]
        device = "cpu" if key == "step" and parameter.device.type == "cpu" else parameter.device
        optimizer.state[parameter][key] = tensor.to(device)


def save_checkpoint(folder: Path, step: int, checkpoint: Checkpoint, keep: int) -> Path:
    """Writes `folder/step-N` whole, then removes all but the newest `keep`.

    Raises:
        StorageError: no space; the older checkpoints are intact.
    """
    path = folder / f"step-{step:08d}"
    with whole_folder(path) as aside:
        save_tensors(aside / "weights.safetensors", checkpoint.weights)
        save_tensors(aside / "optimizer.safetensors", checkpoint.optimizer)
        if checkpoint.best is not None:
            save_tensors(aside / "best.safetensors", checkpoint.best)
        (aside / "state.json").write_text(json.dumps(checkpoint.state))
        hashes = {file.name: sha256(file) for file in sorted(aside.iterdir())}
        manifest = {"format": FORMAT, "sha256": hashes}
        (aside / "manifest.json").write_text(json.dumps(manifest, indent=1))
    for old in checkpoint_paths(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def checkpoint_paths(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted(p for p in folder.glob("step-*") if p.is_dir())


def verify(path: Path) -> None:
    """Holds every file of one checkpoint against its manifest.

    Raises:
        CheckpointError: a file is missing or changed; it is named.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        hashes = dict(manifest["sha256"].items())
        written = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: manifest.json is missing or damaged") from error
    if written != FORMAT:
        raise CheckpointError(f"{path}: format {written}, this version reads {FORMAT}")
    for name, wanted in hashes.items():
        if Path(name).name != name or not (path / name).is_file():
            raise CheckpointError(f"{path}: {name} is missing")
        if sha256(path / name) != wanted:
            raise CheckpointError(f"{path}: {name} is damaged (its sha256 differs)")
    for needed in ("weights.safetensors", "optimizer.safetensors", "state.json"):
        if needed not in hashes:
            raise CheckpointError(f"{path}: the manifest does not list {needed}")
    if (path / "best.safetensors").exists() and "best.safetensors" not in hashes:
        raise CheckpointError(f"{path}: the manifest does not list best.safetensors")


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads one checkpoint, verified.

    Raises:
        CheckpointError: a file is missing or damaged; it is named.
    """
    verify(path)
    best = path / "best.safetensors"
    return Checkpoint(
        weights=load_tensors(path / "weights.safetensors"),
        optimizer=load_tensors(path / "optimizer.safetensors"),
        best=load_tensors(best) if best.exists() else None,
        state=json.loads((path / "state.json").read_text()),
    )


def load_newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole; damaged ones are named and passed over.

    Returns None when there is none at all.

    Raises:
        CheckpointError: there are checkpoints, and every one is damaged.
    """
    paths = checkpoint_paths(folder)
    for path in reversed(paths):
        try:
            return load_checkpoint(path)
        except CheckpointError as error:
            console.warn(f"{error}; using the one before it")
    if paths:
        raise CheckpointError(
            f"{folder}: all {len(paths)} checkpoints are damaged; begin anew with another --out"
        )
    return None
