"""Adapters of the PEFT library: a tuned run becomes a folder of theirs (`peft_import.py`: back).

A folder of PEFT is adapter_config.json and adapter_model.safetensors: what was added to a model of
`transformers`, which is not in it. Ours goes with the export of its base (`selfsup export BASE --to
transformers`); theirs is read over a run of that model (`--base`). LoRA, (IA)3, prefix tuning and
prompt tuning are known on both sides. The library itself is not needed.

Where PEFT has a class for the task (BERT's classifier of a pooled vector, a tagger), the head goes
with it; else only what was added to the encoder does, and `task_type` is FEATURE_EXTRACTION. PEFT
keeps no names of labels.
"""

from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from selfsup import console
from selfsup.errors import ConfigError
from selfsup.files import whole_folder, write_json
from selfsup.interop import adapters, weights
from selfsup.interop.configurations import chosen, skipped
from selfsup.interop.family import Family
from selfsup.model import Model
from selfsup.model_folder import find_base, load_model, read_folder
from selfsup.objective import Task
from selfsup.tuning.parts import OWN, innermost

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


def is_adapter(source: str | Path) -> bool:
    """Whether a folder is one of PEFT."""
    return (Path(source) / CONFIG).is_file()


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
    place = Path(out)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise ConfigError(f"{place} exists already: give another --out")
    model = load_model(run, "cpu")
    if "base" not in model.values:
        raise ConfigError(
            f"{run}: adds nothing to a base; a whole run is exported with --to transformers"
        )
    base = find_base(read_folder(run)[0], model.values["base"])
    base_model = load_model(base, "cpu")
    if "tuning" in base_model.values:
        raise ConfigError(f"{run}: its base {base} was tuned too: make it whole (selfsup merge)")
    kind = _kind(run, model)
    family = family_of_base(base_model)
    encoder: Any = innermost(model.encoder)
    task_type, head = _task_type(family, model)
    name = "" if task_type == "FEATURE_EXTRACTION" else family.prefix
    rules = rules_of(family, model, name)
    parts = {place: part for place, _, part in adapters.of_kind(encoder, OWN)}
    config, tensors = WRITERS[kind](parts, rules, encoder)
    if kind not in PROMPTS:
        config |= {"fan_in_fan_out": family.name == "gpt2"}
        config |= {"modules_to_save": sorted({n.partition(".")[0] for n in head}) or None}
        tensors = {f"{PREFIX}{name}": tensor for name, tensor in tensors.items()}
    before = "base_model." if kind in PROMPTS else PREFIX
    tensors |= {f"{before}{name}": tensor for name, tensor in head.items()}
    types = {ours: theirs for theirs, ours in TYPES.items()}
    given = {"peft_type": types[kind], "task_type": task_type, "inference_mode": True}
    contiguous = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    with whole_folder(place) as aside:
        write_json(aside / CONFIG, {**given, "base_model_name_or_path": None, **config})
        (aside / WEIGHTS).write_bytes(save(contiguous, metadata={"format": "pt"}))
    if task_type == "FEATURE_EXTRACTION":
        console.say("PEFT has no class for this head: only what was added to the encoder is there")
    console.say(f"it goes with: selfsup export {base.resolve()} --to transformers --out FOLDER")
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


def family_of_base(base: Model) -> Family:
    """The architecture that a base is exported as."""
    if base.values["data"]["name"] != "text":
        raise ConfigError(f"PEFT: a base of {base.values['data']['name']}, only text is known")
    section = base.values.get("method") or base.values["task"]
    vocabulary, tokenizer = base.preprocessor.spec, base.preprocessor.tokenizer
    begins = vocabulary.cls >= 0 and tokenizer.token(vocabulary.cls) == "<s>"
    begins = begins and vocabulary.pad not in (-1, vocabulary.sep)
    config = innermost(base.encoder).config
    return chosen(config, base.values["model"]["name"], section["name"], begins)


def rules_of(family: Family, model: Model, prefix: str) -> dict[str, weights.Rule]:
    """The rule of each linear layer of a model's encoder, by its place; `prefix` is their name."""
    encoder = innermost(model.encoder)
    rules = family.rules(encoder.config, skipped(family, model.preprocessor.spec.pad), prefix)
    if encoder.config.pooling == "bert" and family.pooler:
        pooler = prefix + family.pooler.removeprefix(family.prefix)
        rules += weights.linear("encoder.pooler", pooler)
    return adapters.linear_rules(rules, encoder)


def _task_type(family: Family, model: Model) -> tuple[str | None, dict[str, Tensor]]:
    """PEFT's name for what a run does, and the tensors of a head that goes with the adapter."""
    objective, names = model.objective, model.values["tuning"]["names"]
    if not isinstance(objective, Task):
        return WHOLE[model.values["method"]["name"]], {}
    name = model.values["task"]["name"]
    for task_type, task in HEADS.items():
        fits = name == task and task in family.heads and "soft_prompt" not in names
        if task == "classification":
            fits = fits and not family.heads[task].pooler  # else the base would have to hold it
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
    tensors: dict[str, Tensor] = {}
    ranks, alphas = {}, {}
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
    adapters.check_prompt(encoder)
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
