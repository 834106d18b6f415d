"""Adapters of the PEFT library: a tuned run becomes a folder of theirs, and theirs a tuned run.

A folder of PEFT is adapter_config.json and adapter_model.safetensors: what was added to a model of
`transformers`, which is not in it. Ours goes with the export of its base (`selfsup export BASE --to
transformers`); theirs is read over a run of that model (`--base`). LoRA, (IA)3, prefix tuning and
prompt tuning are known on both sides. The library itself is not needed.

Where PEFT has a class for the task (BERT's classifier of a pooled vector, a tagger), the head goes
with it; else only what was added to the encoder does, and `task_type` is FEATURE_EXTRACTION. PEFT
keeps no names of labels.
"""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from selfsup import console, registry
from selfsup.config import from_mapping, to_mapping
from selfsup.errors import CheckpointError, ConfigError
from selfsup.files import whole_folder, write_json
from selfsup.interop import adapters, weights
from selfsup.interop.checkpoints import PICKLED
from selfsup.interop.configurations import chosen, skipped
from selfsup.interop.families import Family
from selfsup.model_folder import (
    Base,
    Model,
    build_objective,
    find_base,
    load_model,
    read_folder,
    save_model,
)
from selfsup.objective import Objective, Task
from selfsup.run_start import write_run
from selfsup.training.checkpoint import load_tensors
from selfsup.training.config import TrainingConfig
from selfsup.training.folder import RunFolder
from selfsup.tuning.choice import Tuning, tune
from selfsup.tuning.parts import OWN, Where, innermost

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
TYPES = {
    "LORA": "lora",
    "IA3": "ia3",
    "PREFIX_TUNING": "prefix",
    "PROMPT_TUNING": "soft_prompt",
}
PROMPTS = ("prefix", "soft_prompt")
HEADS = {"SEQ_CLS": "classification", "TOKEN_CLS": "tagging"}
WHOLE = {
    "causal_language": "CAUSAL_LM",
    "denoising": "SEQ_2_SEQ_LM",
    "masked_language": None,
    "replaced_token": None,
}
"""Methods whose head is in the base: the adapter goes around that model as it is."""
# of a LoRA that computes something else than scale * B A
UNKNOWN = ("use_dora", "lora_bias", "trainable_token_indices", "target_parameters")


def is_adapter(source: str | Path) -> bool:
    """Whether a folder is one of PEFT."""
    return (Path(source) / CONFIG).is_file()


# Export


def export_adapter(run: str | Path, out: str | Path) -> Path:
    """Writes what a run has added to its base.

    Args:
        run: a run tuned with lora, ia3, prefix or soft_prompt over a base that can be exported.
        out: the folder to make.

    Returns:
        the folder: `PeftModel.from_pretrained(model, folder)` loads it, with `model` from the
        exported base.

    Raises:
        ConfigError: the run has no base, or PEFT has no counterpart of its tuning.
    """
    path, values = read_folder(run)
    place = Path(out)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise ConfigError(f"{place} exists already: give another --out")
    if "base" not in values:
        raise ConfigError(
            f"{run}: adds nothing to a base; a whole run is exported with --to transformers"
        )
    base = find_base(path, values["base"])
    if "tuning" in read_folder(base)[1]:
        raise ConfigError(f"{run}: its base {base} was tuned too: make it whole (selfsup merge)")
    model = load_model(run, "cpu")
    kind = _kind(run, model)
    family = _family(load_model(base, "cpu"))
    encoder: Any = innermost(model.encoder)
    task_type, head = _task_type(family, model)
    name = "" if task_type == "FEATURE_EXTRACTION" else family.prefix
    rules = _rules(family, model, name)
    parts = {place: part for place, _, part in adapters.of_kind(encoder, OWN)}
    config, tensors = WRITERS[kind](parts, rules, encoder)
    if kind not in PROMPTS:
        config |= {"fan_in_fan_out": family.name == "gpt2"}
        config |= {"modules_to_save": sorted({n.partition(".")[0] for n in head}) or None}
        tensors = {f"{PREFIX}{name}": tensor for name, tensor in tensors.items()}
    tensors |= {f"{PREFIX}{name}": tensor for name, tensor in head.items()}
    types = {ours: theirs for theirs, ours in TYPES.items()}
    given = {"peft_type": types[kind], "task_type": task_type, "inference_mode": True}
    contiguous = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    with whole_folder(place) as aside:
        write_json(aside / CONFIG, {**given, "base_model_name_or_path": None, **config})
        (aside / WEIGHTS).write_bytes(save(contiguous, metadata={"format": "pt"}))
    if task_type == "FEATURE_EXTRACTION":
        console.say("PEFT has no class for this head: only what was added to the encoder is there")
    console.say(f"it goes with: selfsup export {base} --to transformers --out FOLDER")
    return place


def _kind(run: str | Path, model: Model) -> str:
    """The one tuning of a run, which PEFT has too."""
    names = [name for name in model.values["tuning"]["names"] if name != "probe"]
    if len(names) != 1 or names[0] not in TYPES.values():
        shown = "+".join(names) or "probe"
        raise ConfigError(
            f"{run}: tuned with {shown}; a folder of PEFT holds one of "
            f"{', '.join(TYPES.values())}. selfsup merge makes a whole run of any"
        )
    return names[0]


def _family(base: Model) -> Family:
    """The architecture that a base is exported as."""
    if base.values["data"]["name"] != "text":
        raise ConfigError(f"PEFT: a base of {base.values['data']['name']}, only text is known")
    section = base.values.get("method") or base.values["task"]
    vocabulary, tokenizer = base.preprocessor.spec, base.preprocessor.tokenizer
    begins = vocabulary.cls >= 0 and tokenizer.token(vocabulary.cls) == "<s>"
    begins = begins and vocabulary.pad not in (-1, vocabulary.sep)
    config = innermost(base.encoder).config
    return chosen(config, base.values["model"]["name"], section["name"], begins)


def _rules(family: Family, model: Model, prefix: str) -> dict[str, weights.Rule]:
    encoder = innermost(model.encoder)
    rules = family.rules(encoder.config, skipped(family, model.preprocessor.spec.pad), prefix)
    return adapters.linear_rules(rules, encoder)


def _task_type(family: Family, model: Model) -> tuple[str | None, dict[str, Tensor]]:
    """PEFT's name for what a run does, and the tensors of a head that goes with the adapter."""
    objective, names = model.objective, model.values["tuning"]["names"]
    if not isinstance(objective, Task):
        return WHOLE[model.values["method"]["name"]], {}
    name = model.values["task"]["name"]
    for task_type, task in HEADS.items():
        fits = name == task and task in family.heads and not set(names) & set(PROMPTS)
        if task == "classification":
            fits = fits and getattr(objective.config, "pooling", "") == "encoder"
            fits = fits and model.encoder.config.pooling == "bert"
            fits = fits and getattr(objective, "exits", None) is None
        if fits:
            rules = list(family.heads[task].rules)
            state = objective.state_dict()
            return task_type, weights.write(rules, {rule.ours: state[rule.ours] for rule in rules})
    if name == "generation":
        return ("CAUSAL_LM" if model.encoder.causal else "SEQ_2_SEQ_LM"), {}
    return "FEATURE_EXTRACTION", {}


def _write_lora(parts: dict[str, Any], rules: Any, encoder: Any) -> tuple[dict, dict]:
    changes = adapters.write_lora(parts, rules)
    tensors, ranks, alphas = {}, {}, {}
    for name, change in changes.items():
        tensors |= {f"{name}.lora_A.weight": change.a, f"{name}.lora_B.weight": change.b}
        ranks[name], alphas[name] = len(change.a), change.scale * len(change.a)
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    part = next(iter(parts.values()))
    return {
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": part.dropout.p,
        "bias": "none",
        "target_modules": sorted(changes),
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
    }, tensors


def _write_ia3(parts: dict[str, Any], rules: Any, encoder: Any) -> tuple[dict, dict]:
    factors, inputs = adapters.write_ia3(parts, rules)
    names = {"target_modules": sorted(factors), "feedforward_modules": sorted(inputs)}
    return names, {f"{name}.ia3_l": value for name, value in factors.items()}


def _write_prefix(parts: dict[str, Any], rules: Any, encoder: Any) -> tuple[dict, dict]:
    if len(parts) != 1:
        raise ConfigError("PEFT has one prefix, and an encoder-decoder has two: selfsup merge it")
    (part,) = parts.values()
    if not part.shift and encoder.config.positions not in ("none", "relative"):
        raise ConfigError(
            "PEFT counts positions on from the prefix: train with --set "
            "tuning.prefix.shift_positions=true"
        )
    table = part.project(part.table)
    return _prompt_config(encoder, len(table)) | {"prefix_projection": False}, {
        "prompt_embeddings": table
    }


def _write_prompt(parts: dict[str, Any], rules: Any, encoder: Any) -> tuple[dict, dict]:
    (part,) = parts.values()
    config = {**_prompt_config(encoder, len(part.vectors)), "prompt_tuning_init": "RANDOM"}
    config["token_dim"] = part.vectors.shape[1]
    return config, {"prompt_embeddings": adapters.written_prompt(part.vectors, encoder)}


def _prompt_config(encoder: Any, length: int) -> dict[str, Any]:
    config = encoder.config
    return {
        "num_virtual_tokens": length,
        "token_dim": config.heads * config.head_dim,
        "num_attention_heads": config.heads,
        "num_layers": config.layers,
        "num_transformer_submodules": 1,
    }


WRITERS = {
    "lora": _write_lora,
    "ia3": _write_ia3,
    "prefix": _write_prefix,
    "soft_prompt": _write_prompt,
}


# Import


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
    family = _family(start.model)
    head, tensors = _split_head(family, config, tensors)
    objective, sections = _objective(start.model, family, config, head)
    rules = _rules(family, start.model, family.prefix)
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
    folder = RunFolder(Path(out))
    try:
        training = TrainingConfig(steps=1)
        facts = {"imported": f"PEFT {config['peft_type']}"}
        run = {k: v for k, v in sections.items() if k != "tuning"} | {
            "tuning": {"name": tuning.text, "base": str(base)},
            "training": to_mapping(training),
        }
        write_run(folder.path, run, training, objective, facts, f"peft:{source}")
        save_model(folder.path / "model", objective, sections, start.model.preprocessor, start)
    finally:
        folder.close()
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
    plain = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    task = HEADS.get(config.get("task_type") or "")
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
    table = tensors["prompt_embeddings"].float()
    options = {"length": len(table), "shift_positions": True}
    tuning, parts = _tuned(objective, "prefix", options)
    (part,) = parts.values()
    _fill(part.table, table)
    return tuning


def _read_prompt(config: Any, tensors: dict[str, Tensor], rules: Any, objective: Any) -> Tuning:
    vectors = tensors["prompt_embeddings"].float()
    tuning, parts = _tuned(objective, "soft_prompt", {"length": len(vectors)})
    (part,) = parts.values()
    _fill(part.vectors, adapters.read_prompt(vectors, innermost(objective.encoder)))
    return tuning


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
