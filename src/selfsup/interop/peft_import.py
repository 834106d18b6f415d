"""Adapters of the PEFT library: a folder of theirs becomes a tuned run; `peft.py`: and back."""

import copy
import json
import re
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selfsup import registry
from selfsup.building import build_objective
from selfsup.config import from_mapping, to_mapping
from selfsup.errors import CheckpointError, ConfigError
from selfsup.interop import adapters, weights
from selfsup.interop.checkpoints import PICKLED
from selfsup.interop.family import Family
from selfsup.interop.peft import (
    CONFIG,
    HEADS,
    PROMPTS,
    TYPES,
    WEIGHTS,
    family_of_base,
    rules_of,
)
from selfsup.model import Model
from selfsup.model_folder import Base, load_model, save_model
from selfsup.objective import Objective
from selfsup.run_start import write_run
from selfsup.training.checkpoint import load_tensors
from selfsup.training.config import TrainingConfig
from selfsup.training.folder import RunFolder
from selfsup.tuning.choice import Tuning, tune
from selfsup.tuning.parts import OWN, Where, innermost

BEFORE = re.compile(r"base_model\.(model\.)?")  # the short one where the tuning is a prompt
# of a LoRA that computes something else than scale * B A
UNKNOWN = ("use_dora", "lora_bias", "trainable_token_indices", "target_parameters")


def import_adapter(source: str | Path, base: str | Path, out: str | Path) -> Path:
    """Makes a tuned run of a folder of PEFT.

    A saved head of SEQ_CLS or TOKEN_CLS makes it a classifier or a tagger, whose labels are
    LABEL_0, LABEL_1, ...; without one the run does what its base does.

    Args:
        source: a folder with adapter_config.json and adapter_model.safetensors.
        base: a run of the model that it was trained over.
        out: the run folder to make.

    Returns:
        the run folder.

    Raises:
        ConfigError: a type or an option of PEFT that ours has no counterpart of.
        CheckpointError: tensors are missing, or belong to another model.
    """
    source = Path(source)
    config = read_config(source)
    start = Base(Path(base), load_model(base, "cpu"))
    tensors = _read_tensors(source)
    family = family_of_base(start.model)
    head, tensors = _split_head(family, config, tensors)
    objective, sections = _objective(start.model, family, config, head)
    rules = rules_of(family, start.model, family.prefix)
    kind, tensors = TYPES[config["peft_type"]], _named(tensors, family)
    known = tuple(f"{adapters.module_of(n)}." for rule in rules.values() for n in rule.theirs)
    if kind not in PROMPTS and not any(name.startswith(known) for name in tensors):
        raise ConfigError(
            f"{source}: none of its layers is one of {base}: it was trained over another model "
            f"(base_model_name_or_path = {config.get('base_model_name_or_path')!r})"
        )
    try:
        tuning = READERS[kind](config, tensors, rules, objective)
    except (RuntimeError, KeyError) as error:
        raise CheckpointError(
            f"{source / WEIGHTS}: does not fit {base}: {error}; was it trained over another model?"
        ) from error
    sections["tuning"] = tuning.values()
    with closing(RunFolder(Path(out))) as folder:
        training = TrainingConfig(steps=1)
        facts = {"imported": f"PEFT {config['peft_type']}"}
        run = {k: v for k, v in sections.items() if k != "tuning"} | {
            "tuning": {"name": tuning.text, "base": str(base)},
            "training": to_mapping(training),
        }
        write_run(folder.path, run, training, objective, facts, f"peft:{source}")
        save_model(folder.path / "model", objective, sections, start.model.preprocessor, start)
    return folder.path


def read_config(source: Path) -> dict[str, Any]:
    """adapter_config.json, if ours can do what it says.

    Raises:
        ConfigError: there is none, or what it says has no counterpart.
    """
    where = source / CONFIG
    try:
        config = json.loads(where.read_text(encoding="utf-8"))
    except OSError:
        raise ConfigError(f"{source}: no {CONFIG}; is it a folder of PEFT?") from None
    except ValueError as error:
        raise ConfigError(f"{where}: not a JSON file ({error})") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind not in TYPES:
        raise ConfigError(f"{where}: peft_type = {kind!r}; {', '.join(TYPES)} can be imported")
    for key in UNKNOWN:
        if config.get(key):
            raise ConfigError(f"{where}: {key} = {config[key]!r} is not supported")
    if config.get("bias", "none") != "none":
        raise ConfigError(f"{where}: bias = {config['bias']!r} is not supported, only 'none'")
    if kind == "PREFIX_TUNING" and config.get("num_transformer_submodules", 1) != 1:
        raise ConfigError(f"{where}: a prefix of an encoder-decoder is not supported")
    return config


def _read_tensors(source: Path) -> dict[str, Tensor]:
    if (source / WEIGHTS).is_file():
        return load_tensors(source / WEIGHTS)
    if any(file for pattern in PICKLED for file in source.glob(pattern)):
        raise ConfigError(f"{source}: a pickle can run code as it is read; only {WEIGHTS} is")
    raise ConfigError(f"{source}: there is no {WEIGHTS}")


def _split_head(
    family: Family, config: Mapping[str, Any], tensors: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of a saved head, named as `transformers` does, and all others."""
    plain = {BEFORE.sub("", name): tensor for name, tensor in tensors.items()}
    task = HEADS.get(config.get("task_type") or "", "")
    known = family.heads[task].rules if task in family.heads else ()
    wanted = {name for rule in known for name in rule.theirs}
    return (
        {name: plain[name] for name in wanted & plain.keys()},
        {name: tensor for name, tensor in plain.items() if name not in wanted},
    )


def _objective(
    base: Model, family: Family, config: Mapping[str, Any], head: dict[str, Tensor]
) -> tuple[Objective, dict[str, Any]]:
    """The task of a saved head, or what the base does; and the sections of config.toml."""
    keep = ("data", "model") if head else ("data", "model", "method", "task", "labels")
    sections = {key: base.values[key] for key in keep if key in base.values}
    if not head:
        return copy.deepcopy(base.objective), sections
    task = HEADS[config["task_type"]]
    if task == "classification" and config["peft_type"] == "PROMPT_TUNING":
        raise ConfigError(
            "a classifier over a prompt: PEFT's reads the first vector of the prompt, ours the "
            "text's own; remove the head's tensors to import the prompt alone"
        )
    if task == "classification" and base.encoder.config.pooling != "bert":
        raise ConfigError(
            f"a {family.name} classifier of PEFT reads BERT's pooler, which the base does not have "
            f"(model.pooling = {base.encoder.config.pooling!r}): import it with its pooler"
        )
    module = registry.module_of(registry.TASKS, "task", task)
    options = {"pooling": "encoder"} if task == "classification" else {}
    given = from_mapping(module.Config, options, "task")
    names = tuple(f"LABEL_{i}" for i in range(len(next(iter(head.values())))))
    objective = build_objective("tasks", task, given, copy.deepcopy(base.encoder), names, seed=0)
    rules = list(family.heads[task].rules)
    shapes = {rule.ours: objective.state_dict()[rule.ours].shape for rule in rules}
    filled = weights.read(rules, head, shapes, 0, WEIGHTS)
    objective.load_state_dict(filled, strict=False)
    sections |= {"task": {"name": task, **to_mapping(given)}, "labels": {"names": list(names)}}
    return objective, sections


def _named(tensors: dict[str, Tensor], family: Family) -> dict[str, Tensor]:
    """The same tensors, named as in a model with a head."""
    if any(name.startswith(family.prefix) for name in tensors) or "prompt_embeddings" in tensors:
        return tensors
    return {family.prefix + name: tensor for name, tensor in tensors.items()}


def _tuned(objective: Any, kind: str, options: dict[str, Any]) -> tuple[Tuning, dict[str, Any]]:
    """Adds one of our tunings; gives it and its parts by place."""
    tuning = Tuning.of(kind, {kind: options})
    tune(objective, tuning, Where())
    encoder = innermost(objective.encoder)
    return tuning, {place: part for place, _, part in adapters.of_kind(encoder, OWN)}


def _endings(tensors: dict[str, Tensor], *endings: str) -> dict[str, dict[str, Tensor]]:
    """Tensors by their ending and their module; any other name is an error."""
    out: dict[str, dict[str, Tensor]] = {ending: {} for ending in endings}
    for name, tensor in tensors.items():
        ending = next((one for one in endings if name.endswith(one)), None)
        if ending is None:
            raise ConfigError(f"the adapter holds {name}, which ours has no place for")
        out[ending][name.removesuffix(ending)] = tensor.float()
    return out


def _read_lora(config: Any, tensors: dict[str, Tensor], rules: Any, objective: Any) -> Tuning:
    a, b = _endings(tensors, ".lora_A.weight", ".lora_B.weight").values()
    changes = {
        name: adapters.Change(a[name], b[name], adapters.scales(config, name, len(a[name])))
        for name in a
    }
    encoder = innermost(objective.encoder)
    dropout = float(config.get("lora_dropout") or 0.0)
    options, filled = adapters.read_lora(changes, rules, encoder, dropout)
    tuning, parts = _tuned(objective, "lora", options)
    for place, (some_a, some_b) in filled.items():
        adapters.fill_lora(parts[place], some_a, some_b)
    return tuning


def _read_ia3(config: Any, tensors: dict[str, Tensor], rules: Any, objective: Any) -> Tuning:
    (factors,) = _endings(tensors, ".ia3_l").values()
    filled = adapters.read_ia3(factors, rules, innermost(objective.encoder))
    tuning, parts = _tuned(objective, "ia3", {})
    for place, values in filled.items():
        factors_here = parts[place].factors
        _fill(factors_here, values[-len(factors_here) :])
    return tuning


def _read_prefix(config: Any, tensors: dict[str, Tensor], rules: Any, objective: Any) -> Tuning:
    table = _vectors(tensors)
    options = {"length": len(table), "shift_positions": True}
    tuning, parts = _tuned(objective, "prefix", options)
    (part,) = parts.values()
    _fill(part.table, table)
    return tuning


def _read_prompt(config: Any, tensors: dict[str, Tensor], rules: Any, objective: Any) -> Tuning:
    vectors = _vectors(tensors)
    adapters.check_prompt(innermost(objective.encoder))
    tuning, parts = _tuned(objective, "soft_prompt", {"length": len(vectors)})
    (part,) = parts.values()
    _fill(part.vectors, adapters.read_prompt(vectors, innermost(objective.encoder)))
    return tuning


def _vectors(tensors: dict[str, Tensor]) -> Tensor:
    (found,) = _endings(tensors, "prompt_embeddings").values()
    return found[""]


@torch.no_grad()
def _fill(parameter: Tensor, value: Tensor) -> None:
    """Like `copy_`, but it does not stretch what is of another shape."""
    if parameter.shape != value.shape:
        raise RuntimeError(f"{tuple(value.shape)} where {tuple(parameter.shape)} is expected")
    parameter.copy_(value)


READERS = {
    "lora": _read_lora,
    "ia3": _read_ia3,
    "prefix": _read_prefix,
    "soft_prompt": _read_prompt,
}
