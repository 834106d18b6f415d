"""A run's `model/` folder, what a user keeps: how it is written and read.

model/config.toml        format, encoder, method or task, label names, the weights' sha256
model/model.safetensors  the weights of the modules in `kept`; of a run that was tuned without
                         moving the encoder's weights, only those that its base does not have
model/tokenizer.json     or another preprocessor's file
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from selfsup import registry
from selfsup.building import at_most, build_encoder, build_objective
from selfsup.config import from_mapping, overridden, read_toml, write_toml
from selfsup.errors import CheckpointError, ConfigError
from selfsup.files import read_steadily, sha256, whole_folder
from selfsup.model import Model
from selfsup.models.encoder import Encoder
from selfsup.objective import Objective
from selfsup.training.checkpoint import load_tensors, load_weights, save_tensors
from selfsup.tuning.parts import OWN, Where, wrapped

T = TypeVar("T")
FORMAT = 1
SLACK = 8
"""Numbers of a network for each one in its file, which may hold several in a byte."""
HEADS = {"tasks": 1 << 22, "methods": 1 << 28}
"""Numbers that heads may have, whatever the file holds: most of those of methods are not kept."""
SECTIONS = ("data", "model", "method", "task", "labels", "tuning", "base", "sha256")
BASE_KEYS = ("path", "absolute", "sha256")


def kept_weights(objective: Objective) -> dict[str, torch.Tensor]:
    """The part of the state that goes to `model/`."""
    prefixes = tuple(f"{name}." for name in objective.kept)
    return {k: v for k, v in objective.state_dict().items() if k.startswith(prefixes)}


def save_model(
    path: Path,
    objective: Objective,
    values: dict[str, Any],
    preprocessor: Any,
    base: "Base | None" = None,
) -> None:
    """Writes the folder whole.

    Args:
        path: the `model/` folder.
        objective: a trained method or task.
        values: sections `data` (its name), `model` and `method` or `task`, and for a task `labels`
            and `tuning` (`names`, the oldest first).
        preprocessor: what a user's items go through.
        base: whose weights are not written again where they are the same.
    """
    weights = kept_weights(objective)
    if base is not None:
        values = {**values, "base": base.values(path)}
        weights = without_base(weights, objective.encoder, base.model.encoder)
    with whole_folder(path) as aside:
        hashes = {"model.safetensors": save_tensors(aside / "model.safetensors", weights)}
        document = {"format": FORMAT, **values, "sha256": hashes}
        (aside / "config.toml").write_text(write_toml(document))
        preprocessor.save(aside)


def without_base(
    weights: dict[str, torch.Tensor], encoder: Encoder, base: Encoder
) -> dict[str, torch.Tensor]:
    """The weights that differ from those of the base that the encoder began as."""
    prefix = _place_of(base, encoder)
    known = {prefix + name: value for name, value in base.state_dict().items()}
    return {
        key: value
        for key, value in weights.items()
        if key not in known or not torch.equal(value.cpu(), known[key].cpu())
    }


def _place_of(base: Encoder, encoder: Encoder) -> str:
    """What a task calls the base's weights, its `encoder` being the base or around it."""
    depth = len(list(wrapped(encoder))) - len(list(wrapped(base)))
    return "encoder." * (depth + 1)


class Base(NamedTuple):
    """The run that another one was tuned from."""

    run: Path
    model: Model

    def values(self, path: Path) -> dict[str, Any]:
        """How a `model/` folder names it: from there, absolutely, and by its weights' sha256."""
        return {
            "path": os.path.relpath(self.run, path),
            "absolute": str(self.run.resolve()),
            "sha256": self.sha256,
        }

    @property
    def sha256(self) -> str:
        """Of its weights."""
        return self.model.values["sha256"]["model.safetensors"]


def load_base(path: Path, section: dict[str, str]) -> Model:
    """The base of the run whose `model/` folder is `path`.

    Raises:
        CheckpointError: it is not there, has other weights, or was itself tuned from this run.
    """
    found = find_base(path, section)
    _check_chain(path, found)
    base = Base(found, load_model(found, "cpu"))
    check_base(path, section, base)
    return base.model


def _check_chain(path: Path, base: Path) -> None:
    """Follows the bases of bases: none of them may be the `model/` folder `path` again."""
    seen = {path.resolve()}
    while True:
        inner, values = read_folder(base)
        if inner.resolve() in seen:
            raise CheckpointError(f"{path / 'config.toml'}: says under [base] that it is its own")
        if "base" not in values:
            return
        seen.add(inner.resolve())
        base = find_base(inner, values["base"])


def find_base(path: Path, section: dict[str, str]) -> Path:
    """Where the base of the run whose `model/` folder is `path` lies.

    Raises:
        CheckpointError: it is not there.
    """
    places = [path / section["path"], Path(section["absolute"])]
    found = next((place for place in places if place.is_dir()), None)
    if found is None:
        raise CheckpointError(
            f"{path}: was tuned from {section['absolute']}, which is not there; put it back, or "
            f"name its new place as `absolute` under [base] in {path / 'config.toml'}"
        )
    return found


def check_base(path: Path, section: dict[str, str], base: Base) -> None:
    """Refuses a base with other weights than the run whose `model/` folder is `path` began as.

    Raises:
        CheckpointError: the sha256 of the weights differ.
    """
    known, given = section["sha256"], base.sha256
    if known != given:
        raise CheckpointError(
            f"{path}: was tuned from another model than {base.run} holds now: its weights' sha256 "
            f"was {known[:12]}..., this one's is {given[:12]}..."
        )


def load_model(
    run: str | Path, device: str = "auto", settings: dict[str, Any] | None = None
) -> Model:
    """Loads a run's folder, or its `model/` folder, which may be replaced meanwhile.

    Args:
        run: the folder.
        device: auto, cpu or cuda.
        settings: changes to what a task does when it predicts: {"task.num_beams": 4}.

    Raises:
        CheckpointError: there is no finished model, or it is damaged.
        ConfigError: a setting of something else.
    """

    def read(path: Path, values: dict[str, Any]) -> Model:
        for key in settings or {}:
            if not key.startswith("task.") or "task" not in values:
                raise ConfigError(
                    f"--set {key}: of a finished run only keys of its task can be set"
                )
        values = overridden(values, settings or {})
        base = load_base(path, values["base"]) if "base" in values else None
        return assemble(path, values, base, device)

    return read_whole(run, read)


def read_whole(run: str | Path, read: Callable[[Path, dict[str, Any]], T]) -> T:
    """What `read` makes of a run's `model/` folder and of its config.toml, both of one save.

    Raises:
        CheckpointError: as `read_folder` does.
    """
    inner = Path(run) / "model"
    return read_steadily(inner if inner.is_dir() else Path(run), lambda: read(*read_folder(run)))


def read_folder(run: str | Path) -> tuple[Path, dict[str, Any]]:
    """The `model/` folder of a run, and what its config.toml says.

    Raises:
        CheckpointError: there is no finished model, or another version wrote it.
    """
    run = Path(run)
    path = run / "model" if (run / "model").is_dir() else run
    if not (path / "config.toml").is_file():
        unfinished = (run / "checkpoints").is_dir()
        hint = "the run is not finished: go on with --resume" if unfinished else "no run is there"
        raise CheckpointError(f"{run}: holds no model; {hint}")
    values = read_toml(path / "config.toml")
    if values.get("format") != FORMAT:
        raise CheckpointError(
            f"{path / 'config.toml'}: format {values.get('format')}, this version reads {FORMAT}"
        )
    for name in SECTIONS:
        if not isinstance(values.get(name, {}), dict):
            raise CheckpointError(
                f"{path / 'config.toml'}: {name} is a section, got {values[name]!r}"
            )
    for name in ("labels", "tuning"):
        names = values.get(name, {"names": []}).get("names")
        if not isinstance(names, list) or not all(isinstance(one, str) for one in names):
            raise CheckpointError(f"{path / 'config.toml'}: {name}.names must be a list of texts")
    for key in BASE_KEYS if "base" in values else ():
        if not isinstance(values["base"].get(key), str):
            raise CheckpointError(f"{path / 'config.toml'}: base.{key} must be a text")
    return path, values


def assemble(
    path: Path, values: dict[str, Any], base: Model | None, device: str, name: str = OWN
) -> Model:
    """The model of a folder, around the encoder of its base where it has one.

    Args:
        path: the `model/` folder.
        values: what its config.toml says.
        base: the run that it was tuned from; its encoder is taken as it is and not copied.
        device: auto, cpu or cuda.
        name: of the set that its additions become in the encoder.
    """
    try:
        data_name, model = values["data"]["name"], dict(values["model"])
        kind = "methods" if "method" in values else "tasks"
        section = dict(values[kind[:-1]])
        data_module = registry.module_of(registry.DATA, "data", data_name)
        model_name, objective_name = model.pop("name"), section.pop("name")
    except KeyError as error:
        raise CheckpointError(
            f"{path / 'config.toml'}: section or key {error} is missing"
        ) from None
    preprocessor = data_module.load_preprocessor(path)
    model_module = registry.module_of(registry.MODELS, "model", model_name)
    config = from_mapping(model_module.Config, model, "model")
    weights = _verified_weights(path, values)
    size = sum(tensor.numel() for tensor in weights.values())
    if base:
        encoder = base.encoder
    else:
        with at_most(SLACK * size, path / "config.toml"):
            encoder = build_encoder(model_name, config, preprocessor.spec, seed=0)
    of_base = list(encoder.state_dict()) if base else []
    names = tuple(values.get("labels", {}).get("names", ()))
    module = registry.module_of(registry.TABLES[kind], kind[:-1], objective_name)
    size += sum(parameter.numel() for parameter in encoder.parameters())
    with at_most(max(SLACK * size, HEADS[kind]), path / "config.toml"):
        objective = build_objective(
            kind,
            objective_name,
            from_mapping(module.Config, section, kind[:-1]),
            encoder,
            preprocessor.spec if kind == "methods" else names,
            seed=0,
        )
        if "tuning" in values:
            retune(objective, values["tuning"], preprocessor, name)
    if name != OWN:
        own, wanted = f".additions.{OWN}.", f".additions.{name}."
        weights = {key.replace(own, wanted, 1): value for key, value in weights.items()}
    kept = set(kept_weights(objective))
    if base:
        kept -= {_place_of(encoder, objective.encoder) + name for name in of_base}
        values["tuning"] = joined(base.values.get("tuning"), values["tuning"])
    others = {k: v for k, v in objective.state_dict().items() if k not in kept}
    load_weights(objective, {**others, **weights}, str(path / "model.safetensors"))
    return Model(objective, preprocessor, names, values, device)


def joined(before: dict[str, Any] | None, after: dict[str, Any]) -> dict[str, Any]:
    """One section of tunings out of those of a base and those that came later."""
    before = before or {"names": []}
    return {**before, **after, "names": [*before["names"], *after["names"]]}


def retune(task: Any, section: dict[str, Any], preprocessor: Any, name: str = OWN) -> None:
    """Adds to the encoder of a task (or method) what tunings, named in a configuration, added."""
    from selfsup.tuning.choice import Tuning, tune  # its tunings import tasks

    for one in section["names"]:
        if one in registry.PASSING:
            continue
        options = {one: section[one]} if one in section else {}
        tune(task, Tuning.of(one, options), Where(name, preprocessor))


def _verified_weights(path: Path, values: dict[str, Any]) -> dict[str, torch.Tensor]:
    file = path / "model.safetensors"
    tensors = load_tensors(file)
    if values.get("sha256", {}).get(file.name) != sha256(file):
        raise CheckpointError(f"{file}: damaged: its sha256 differs from the one in config.toml")
    return tensors
