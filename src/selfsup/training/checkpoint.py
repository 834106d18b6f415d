"""Checkpoints: whole or not there, verified by hash, never read with pickle.

checkpoints/step-00001000/
    weights.safetensors      the objective's state: encoder, heads, teacher, queue, codebook
    optimizer.safetensors    one tensor per parameter and moment
    best.safetensors         the weights with the best validation loss, when they are kept
    state.json               position in the run: step, tokens, seconds, log sums
    manifest.json            sha256 of each file above
"""

import json
import re
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from selfsup import console
from selfsup.errors import CheckpointError, StorageError
from selfsup.files import is_full, read_steadily, remove_folder, sha256, whole_folder
from selfsup.training.optim import MOMENTS
from selfsup.training.tensor_files import load_tensors, save_tensors

FORMAT = 1
WAITS = (2.0, 4.0, 8.0)
"""Seconds between the attempts at a save that finds the disk full."""


class Checkpoint(NamedTuple):
    """What a checkpoint folder holds."""

    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    best: dict[str, Tensor] | None
    state: dict[str, Any]


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
    """Puts `optimizer_tensors` back.

    Raises:
        CheckpointError: a tensor of no parameter that is trained here, or of another optimizer; or
            a parameter has some of its moments only.
    """
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    parameters = {name: p for name, p in module.named_parameters() if id(p) in trained}
    for name, tensor in tensors.items():
        parameter_name, _, key = name.rpartition("|")
        if parameter_name not in parameters:
            raise CheckpointError(
                f"optimizer.safetensors: {name!r} is of no parameter that is trained here"
            )
        if key not in MOMENTS[type(optimizer)]:
            raise CheckpointError(
                f"optimizer.safetensors: {key!r} is of another optimizer; resume with the "
                "training.optimizer that the run was begun with"
            )
        parameter = parameters[parameter_name]
        # a moment has the shape of its parameter, but for sides that are reduced to one
        pairs = zip(tensor.shape, parameter.shape, strict=False)
        if tensor.ndim and (
            tensor.ndim != parameter.ndim or any(have not in (1, full) for have, full in pairs)
        ):
            raise CheckpointError(
                f"optimizer.safetensors: {name!r} is {tuple(tensor.shape)}, the parameter "
                f"{tuple(parameter.shape)}"
            )
        device = "cpu" if key == "step" and parameter.device.type == "cpu" else parameter.device
        # a copy, or the file would stay mapped as long as the run
        optimizer.state[parameter][key] = tensor.to(device, copy=True)
    known = MOMENTS[type(optimizer)]
    # Adafactor keeps rows and columns of a matrix, the variance itself of a vector
    whole = [known - {"variance"}, known - {"row", "column"}] if "variance" in known else [known]
    for name, parameter in parameters.items():
        if parameter in optimizer.state and set(optimizer.state[parameter]) not in whole:
            raise CheckpointError(
                f"optimizer.safetensors: {name!r} has only {sorted(optimizer.state[parameter])}"
            )


def on_host(checkpoint: Checkpoint) -> Checkpoint:
    """A copy of weights and moments in host memory (pinned, if they lie on a GPU), to be written
    while training goes on. The best weights are not copied: nobody writes to them.
    """
    copy = checkpoint._replace(
        weights={name: _host_copy(x) for name, x in checkpoint.weights.items()},
        optimizer={name: _host_copy(x) for name, x in checkpoint.optimizer.items()},
    )
    if any(x.is_cuda for x in checkpoint.weights.values()):
        torch.cuda.synchronize()  # the copies are whole
    return copy


def _host_copy(tensor: Tensor) -> Tensor:
    if tensor.device.type == "cpu":
        return tensor.detach().clone()
    out = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return out.copy_(tensor.detach(), non_blocking=True)


def save_checkpoint(
    folder: Path, step: int, checkpoint: Checkpoint, keep: int, keep_every: int = 0
) -> Path:
    """Writes `folder/step-N` whole, then removes the older ones but the newest `keep`.

    On a full disk it is tried again, `WAITS` seconds apart; at last the older checkpoints but the
    newest whole one are given up for room. Each of these is said before.

    Args:
        folder: where checkpoints lie.
        step: the number of this one.
        checkpoint: what to write.
        keep: how many of the newest stay.
        keep_every: checkpoints of steps that this divides stay for good; 0: none does.

    Raises:
        StorageError: no space; the newest older checkpoint is intact.
    """
    path = folder / f"step-{step:08d}"
    for wait in WAITS:
        try:
            _write(path, checkpoint)
            break
        except StorageError as error:
            if not is_full(error):
                raise
            console.warn(f"{path}: no space left on the device; trying again in {wait:.0f} s")
            time.sleep(wait)
    else:
        _write_in_need(path, checkpoint, keep_every)
    for old in _passing(path, keep_every)[:-keep]:
        try:
            remove_folder(old)
        except StorageError as error:  # the new one is safe all the same
            console.warn(str(error))
    return path


def _write(path: Path, checkpoint: Checkpoint) -> None:
    with whole_folder(path) as aside:
        hashes = {
            f"{name}.safetensors": save_tensors(aside / f"{name}.safetensors", tensors)
            for name, tensors in (
                ("best", checkpoint.best),
                ("optimizer", checkpoint.optimizer),
                ("weights", checkpoint.weights),
            )
            if tensors is not None
        }
        (aside / "state.json").write_text(json.dumps(checkpoint.state))
        hashes["state.json"] = sha256(aside / "state.json")
        manifest = {"format": FORMAT, "sha256": dict(sorted(hashes.items()))}
        (aside / "manifest.json").write_text(json.dumps(manifest, indent=1))


def _write_in_need(path: Path, checkpoint: Checkpoint, keep_every: int) -> None:
    """The last attempt on a full disk: at the cost of all older checkpoints but one."""
    try:
        _write(path, checkpoint)
    except StorageError as error:
        older = [p for p in _passing(path, keep_every) if p != path]
        newest = next((p for p in reversed(checkpoint_paths(path.parent)) if _is_whole(p)), None)
        spare = [p for p in older if newest is not None and step_of(p) < step_of(newest)]
        if not is_full(error) or not spare:
            raise
        names = ", ".join(p.name for p in spare)
        console.warn(f"{path}: no space left on the device; giving up {names} for room")
        for old in spare:
            remove_folder(old)
        _write(path, checkpoint)


def _passing(path: Path, keep_every: int) -> list[Path]:
    """Checkpoints up to the one at `path` that need not stay for good, oldest first."""
    paths = [p for p in checkpoint_paths(path.parent) if step_of(p) <= step_of(path)]
    return [p for p in paths if not keep_every or step_of(p) % keep_every]


def checkpoint_paths(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""

    def look() -> list[Path]:
        found = folder.glob("step-*")
        return [p for p in found if re.fullmatch(r"step-\d+", p.name) and p.is_dir()]

    # a folder that changes while it is listed may show neither the new one nor the old one
    return sorted(read_steadily(folder, look), key=step_of)


def step_of(path: Path) -> int:
    """The step of a checkpoint, by the name of its folder."""
    return int(path.name.removeprefix("step-"))


def _is_whole(path: Path) -> bool:
    try:
        read_steadily(path, lambda: verify(path))
    except CheckpointError:
        return False
    return True


def verify(path: Path) -> None:
    """Holds every file of one checkpoint against its manifest.

    Raises:
        CheckpointError: a file is missing or changed; it is named.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        hashes = dict(manifest["sha256"].items())
        written = manifest["format"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: manifest.json is missing or damaged") from error
    if written != FORMAT:
        raise CheckpointError(f"{path}: format {written}, this version reads {FORMAT}")
    for name, wanted in hashes.items():
        if Path(name).name != name or not (path / name).is_file():
            raise CheckpointError(f"{path}: {name} is missing")
        try:
            found = sha256(path / name)
        except OSError as error:
            raise CheckpointError(f"{path}: {name} cannot be read ({error.strerror})") from error
        if found != wanted:
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

    def read() -> Checkpoint:
        verify(path)
        best = path / "best.safetensors"
        return Checkpoint(
            weights=load_tensors(path / "weights.safetensors"),
            optimizer=load_tensors(path / "optimizer.safetensors"),
            best=load_tensors(best) if best.exists() else None,
            state=load_state(path),
        )

    return read_steadily(path, read)


def load_state(path: Path) -> dict[str, Any]:
    """The position in the run of one checkpoint.

    Raises:
        CheckpointError: state.json cannot be read, or is of another step.
    """
    try:
        state = dict(json.loads((path / "state.json").read_text()).items())
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: state.json is missing or damaged") from error
    if state.get("step") != step_of(path):
        raise CheckpointError(f"{path}: state.json is of step {state.get('step')!r}")
    return state


def load_newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole; damaged ones are named and passed over.

    One that a save removes meanwhile is no damage: the folder is looked at again. Returns None when
    there is none at all.

    Raises:
        CheckpointError: there are checkpoints, and every one is damaged.
    """
    damaged: set[Path] = set()
    while paths := [p for p in checkpoint_paths(folder) if p not in damaged]:
        try:
            return load_checkpoint(paths[-1])
        except CheckpointError as error:
            if paths[-1].exists():
                damaged.add(paths[-1])
                console.warn(f"{error}; using the one before it")
    if damaged:
        raise CheckpointError(
            f"{folder}: all {len(damaged)} checkpoints are damaged; begin anew with another --out"
        )
    return None
