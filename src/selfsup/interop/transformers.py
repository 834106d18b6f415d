"""Models of the `transformers` library: a checkpoint becomes a run, a run becomes a checkpoint.

Import reads config.json, safetensors and the tokenizer's files, and makes a finished run folder, so
that every verb works on it. Export writes what `AutoModel...from_pretrained` and `AutoTokenizer`
load without code of their own. `families.py` has the architectures, `maps.py` their weights,
`tokenizers.py` the tokenizers; the library itself is not needed. Nothing is read with pickle.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from selfsup import console, registry
from selfsup.config import from_mapping, to_mapping
from selfsup.data import text
from selfsup.errors import CheckpointError, ConfigError
from selfsup.files import whole_folder, write_json
from selfsup.interop import maps, weights
from selfsup.interop import tokenizers as tokens
from selfsup.interop.families import (
    Family,
    Head,
    chosen,
    family_of,
    read_config,
    skipped,
    write_config,
)
from selfsup.model_folder import (
    Model,
    build_encoder,
    build_objective,
    kept_weights,
    load_model,
    save_model,
)
from selfsup.objective import Objective, Task
from selfsup.run_start import write_run
from selfsup.training.checkpoint import load_tensors, load_weights
from selfsup.training.config import TrainingConfig
from selfsup.training.folder import RunFolder

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
UNLIMITED = 512  # longest row, where positions set no limit


class Checkpoint(NamedTuple):
    """A folder of `transformers`, read: its tensors have the names of a model with a head."""

    family: Family
    values: dict[str, Any]  # of config.json
    tensors: dict[str, Tensor]
    where: str  # the weights' path, for errors
    tied: bool  # the output's weights are the token table


def import_run(source: str | Path, out: str | Path) -> Path:
    """Makes a run of a checkpoint.

    Args:
        source: a folder with config.json and *.safetensors, or a name on the Hugging Face Hub.
        out: the run folder to make.

    Returns:
        the run folder.

    Raises:
        ConfigError: there is no such checkpoint, or ours cannot express it.
        CheckpointError: the weights are damaged, or are not those of config.json.
        DataError: the tokenizer cannot be read.
    """
    path = Path(source) if Path(source).is_dir() else _fetched(str(source))
    found = _read_folder(path)
    tokenizer = tokens.load(path, found.values)
    objective, sections = _objective(found, tokenizer)
    preprocessor = text.TextPreprocessor(tokenizer, sections["data"]["row_length"])
    folder = RunFolder(Path(out))
    try:
        training = TrainingConfig(steps=1)  # no step was made; what `evaluate` needs to know
        given = f"transformers:{source}"
        facts = {"imported": found.family.name, "tokenizer": tokenizer.fingerprint}
        run = {**sections, "training": to_mapping(training)}
        write_run(folder.path, run, training, objective, facts, given)
        save_model(folder.path / "model", objective, sections, preprocessor)
    finally:
        folder.close()
    return folder.path


def export_run(run: str | Path, out: str | Path) -> Path:
    """Writes a run's model as a folder that `transformers` loads.

    Args:
        run: a run folder: masked_language, causal_language, replaced_token, denoising,
            classification or tagging on a transformer.
        out: the folder to make.

    Returns:
        the folder.

    Raises:
        ConfigError: no architecture of theirs computes this model; what stands in the way is named.
    """
    model, path = load_model(run, device="cpu"), Path(out)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{path} exists already: give another --out")
    section = model.values.get("method") or model.values["task"]
    if model.values["data"]["name"] != "text":
        raise ConfigError(
            f"{run}: reads {model.values['data']['name']}, and only models of text can be exported"
        )
    config, tokenizer = model.encoder.config, model.preprocessor.tokenizer
    vocabulary = tokenizer.vocabulary
    begins = vocabulary.cls >= 0 and tokenizer.token(vocabulary.cls) == "<s>"
    begins = begins and vocabulary.pad not in (-1, vocabulary.sep)  # its padding has no position
    family = chosen(config, model.values["model"]["name"], section["name"], begins)
    head = family.heads[section["name"]]
    _check_head(family, section, config)
    rules, state = _export_rules(family, head, model)
    tensors = weights.write(rules, state)
    tensors |= maps.constants(family.name, config, vocabulary.size, family.prefix)
    architecture = head.architecture
    if any(rule.ours.startswith("sentence_head") for rule in rules):
        architecture = architecture.replace("MaskedLM", "PreTraining")
    values = {
        "architectures": [architecture],
        "torch_dtype": "float32",
        **write_config(family, config, vocabulary.size, vocabulary.pad),
        **_ids(vocabulary, family, config),
    }
    if isinstance(model.objective, Task):
        values["id2label"] = {str(i): name for i, name in enumerate(model.names)}
        values["label2id"] = {name: i for i, name in enumerate(model.names)}
    limit = config.max_length if config.positions == "learned" else model.preprocessor.max_length
    with whole_folder(path) as aside:
        write_json(aside / "config.json", values)
        (aside / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
        tokens.save(tokenizer, aside, limit, segments=config.segment_types > 0)
        if section["name"] in ("causal_language", "denoising"):
            ids = {key: value for key, value in values.items() if key.endswith("_token_id")}
            write_json(aside / "generation_config.json", ids)
    return path


def _fetched(name: str) -> Path:
    """The folder of a model of the Hugging Face Hub, from its cache or the network."""
    if not HUB_NAME.fullmatch(name):
        raise ConfigError(f"{name}: there is no such folder")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ConfigError(
            f"{name}: there is no such folder, and fetching it from the Hugging Face Hub needs "
            "huggingface_hub: pip install 'selfsup[hub]'"
        ) from None
    wanted = ["*.json", "*.safetensors", "vocab.txt", "merges.txt", *tokens.PIECES]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # of the network, the Hub, the cache: many kinds
        reason = str(error).strip().splitlines()
        raise ConfigError(
            f"{name}: there is no such folder, and the Hugging Face Hub did not give it "
            f"({reason[0] if reason else type(error).__name__}). Offline, fetch it elsewhere and "
            "give the folder with config.json, model.safetensors and the tokenizer"
        ) from error


def _read_folder(path: Path) -> Checkpoint:
    where = path / "config.json"
    try:
        values = json.loads(where.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{where}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ConfigError(f"{where}: not a JSON file ({error})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: must hold an object")
    family = family_of(values, str(where))
    tensors, file = _read_tensors(path)
    tensors = _named(family, tensors)
    tied = _drop_repeated(family, tensors, str(file))
    return Checkpoint(family, values, tensors, str(file), tied)


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], Path]:
    """All tensors of a folder, and the file that errors name."""
    if (path / WEIGHTS).is_file():
        return load_tensors(path / WEIGHTS), path / WEIGHTS
    if (path / INDEX).is_file():
        try:
            names = set(json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{path / INDEX}: not an index of shards ({error!r})") from error
        out: dict[str, Tensor] = {}
        for name in sorted(names):
            if Path(name).name != name or not (path / name).is_file():
                raise CheckpointError(f"{path / INDEX}: the shard {name} is missing")
            out |= load_tensors(path / name)
        return out, path / INDEX
    pickled = [file.name for pattern in PICKLED for file in sorted(path.glob(pattern))]
    if pickled:
        raise ConfigError(
            f"{path / pickled[0]}: a file of this kind can run code as it is read, so only "
            "safetensors are. Where you trust it, convert it with transformers: "
            f"AutoModel.from_pretrained({str(path)!r}).save_pretrained(FOLDER), with the class that "
            'config.json names under "architectures"'
        )
    raise ConfigError(f"{path}: there is neither {WEIGHTS} nor {INDEX}")


def _named(family: Family, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, named as in a model with a head; those that hold no numbers left out."""
    old = {".gamma": ".weight", ".beta": ".bias"}  # of normalisations, before 2019
    renamed = {
        name.removesuffix(end) + old[end] if (end := name[name.rfind(".") :]) in old else name: tensor
        for name, tensor in tensors.items()
        if not name.endswith(family.dropped or ("\0",))
    }
    if any(name.startswith(family.prefix) for name in renamed):
        return renamed
    return {family.prefix + name: tensor for name, tensor in renamed.items()}


def _drop_repeated(family: Family, tensors: dict[str, Tensor], where: str) -> bool:
    """Takes out tensors that repeat others; whether the output's weights do."""
    for name, other in family.tied.items():
        repeated = tensors.pop(name, None)
        if repeated is None:
            continue
        if other not in tensors:
            tensors[other] = repeated
        elif not torch.equal(tensors[other], repeated):
            raise CheckpointError(f"{where}: {name} differs from {other}; only tied ones are read")
    zeros = tensors.pop("final_logits_bias", None)
    if zeros is not None and zeros.any():
        raise CheckpointError(f"{where}: final_logits_bias is not zero; ours has no place for it")
    if "lm_head.weight" in tensors and "shared.weight" in tensors:
        if not torch.equal(tensors["lm_head.weight"], tensors["shared.weight"]):
            return False
        del tensors["lm_head.weight"]
    return True


def _objective(found: Checkpoint, tokenizer: Any) -> tuple[Objective, dict[str, Any]]:
    """The method (or task) with the checkpoint's weights, and the sections of its config.toml."""
    family, values, tensors = found.family, found.values, found.tensors
    kind = _kind(found)
    head = family.heads[kind]
    has = {name: _any(getattr(head, name), tensors) for name in ("rules", "sentence")}
    pooled = bool(family.pooler) and f"{family.pooler}.weight" in tensors
    model = read_config(
        *(family, values, _config_path(found)),
        pooled=pooled,
        scaled=_scaled(family, values),
        tied=found.tied,
    )
    sections = _sections(found, kind, model, tokenizer, has["sentence"])
    module = registry.module_of(registry.MODELS, "model", model["name"])
    config = from_mapping(
        module.Config, {k: v for k, v in model.items() if k != "name"}, _config_path(found)
    )
    objective = _built(kind, sections, config, tokenizer)
    rules = family.rules(config, skipped(family, values.get("pad_token_id", 1)), family.prefix)
    rules += weights.linear("encoder.pooler", family.pooler) if pooled else []
    rules += [rule for name, there in has.items() if there for rule in getattr(head, name)]
    state = objective.state_dict()
    size = len(tensors.get(rules[0].theirs[0], ()))
    _check_vocabulary(size, tokenizer, found.where)
    fresh = tuple(f"{part}." for part in _fresh(objective, head, has))
    shapes = {k: v.shape for k, v in kept_weights(objective).items() if not k.startswith(fresh)}
    filled = weights.read(rules, tensors, shapes, tokenizer.vocabulary.size, found.where)
    load_weights(objective, {**state, **filled}, found.where)
    if fresh:
        console.warn(
            f"{found.where} has no weights for {', '.join(name[:-1] for name in fresh)} of {kind}: "
            "the encoder is whole, the head is untrained, and `fill` and `generate` would guess"
        )
    return objective.eval(), sections


def _kind(found: Checkpoint) -> str:
    """The method or task that a checkpoint was trained with."""
    heads = found.family.heads
    for name in found.values.get("architectures") or ():
        for kind, head in heads.items():
            if name == head.architecture:
                return kind
    for kind, head in heads.items():
        if kind in registry.METHODS and _any((*head.rules, *head.sentence), found.tensors):
            return kind
    return next(iter(heads))


def _any(rules: tuple[weights.Rule, ...], tensors: Mapping[str, Tensor]) -> bool:
    return any(name in tensors for rule in rules for name in rule.theirs)


def _fresh(objective: Objective, head: Head, has: Mapping[str, bool]) -> list[str]:
    """Modules of ours for which the checkpoint has no weights."""
    out = []
    for part in objective.kept:
        name = "sentence" if part == "sentence_head" else "rules"
        mapped = any(rule.ours.startswith(f"{part}.") for rule in getattr(head, name))
        empty = not any(key.startswith(f"{part}.") for key in objective.state_dict())
        if part != "encoder" and not empty and not (mapped and has[name]):
            out.append(part)
    return out


def _scaled(family: Family, values: Mapping[str, Any]) -> bool:
    """Whether the output of T5 or Switch is divided by sqrt(dim)."""
    tied = values.get("tie_word_embeddings", True) is not False
    return bool(values.get("scale_decoder_outputs", tied)) if family.name == "t5" else tied


def _config_path(found: Checkpoint) -> str:
    return str(Path(found.where).with_name("config.json"))


def _sections(
    found: Checkpoint, kind: str, model: dict[str, Any], tokenizer: Any, sentence: bool
) -> dict[str, Any]:
    """What config.toml says of the imported model."""
    vocabulary, family = tokenizer.vocabulary, found.family
    limit = model["max_length"] if family.layout["positions"] == "learned" else UNLIMITED
    data = text.Config(row_length=limit, rows="pairs" if sentence else "packed")
    section: dict[str, Any] = {}
    if kind == "masked_language" and sentence:
        section["sentence"] = family.sentence
    if kind == "denoising":
        hides = "token_deletion" if vocabulary.mask < 0 else "text_infilling"
        section["corruptions"] = ["sentinel_spans" if vocabulary.sentinels else hides]
        ids = {getattr(vocabulary, name): name for name in ("cls", "pad", "sep")}
        first = found.values.get("decoder_start_token_id", vocabulary.pad)
        if first not in ids:
            raise ConfigError(
                f"{_config_path(found)}: decoder_start_token_id = {first!r} is not supported; the "
                "tokenizer's padding, beginning or end is"
            )
        model["start"] = ids[first]
    out = {"data": {"name": "text", **to_mapping(data)}, "model": model}
    if kind in registry.METHODS:
        return {**out, "method": {"name": kind, **section}}
    if kind == "classification":
        section["pooling"] = "encoder"
    names = found.values.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    labels = [str(names[number]) for number in sorted(names, key=int)]
    return {**out, "task": {"name": kind, **section}, "labels": {"names": labels}}


def _built(kind: str, sections: dict[str, Any], config: Any, tokenizer: Any) -> Objective:
    encoder = build_encoder(sections["model"]["name"], config, tokenizer.vocabulary, seed=0)
    table = "methods" if "method" in sections else "tasks"
    section = sections[table[:-1]]
    module = registry.module_of(registry.TABLES[table], table[:-1], kind)
    given = from_mapping(module.Config, {k: v for k, v in section.items() if k != "name"}, kind)
    names = tuple(sections.get("labels", {}).get("names", ()))
    extra = tokenizer.vocabulary if table == "methods" else names
    section |= to_mapping(given)
    sections["model"] |= to_mapping(config)
    return build_objective(table, kind, given, encoder, extra, seed=0)


def _check_vocabulary(size: int, tokenizer: Any, where: str) -> None:
    known = tokenizer.vocabulary.size
    if size and known > size:
        raise ConfigError(
            f"{where}: the table has {size} tokens, and the tokenizer {known}; they do not belong "
            "together"
        )
    if known < size:
        console.say(f"{size - known} of {size} rows of the token table belong to no token: left out")


def _check_head(family: Family, section: Mapping[str, Any], config: Any) -> None:
    """Refuses heads of ours that compute something else.

    Raises:
        ConfigError: the key that stands in the way is named.
    """
    fits = {
        "masked_language": ("head", "bert", "method.head"),
        "causal_language": ("head", "tied", "method.head"),
        "classification": ("pooling", "encoder", "task.pooling"),
    }
    key, wanted, name = fits.get(section["name"], ("", None, ""))
    if key and section.get(key, wanted if name == "method.head" else "mean") != wanted:
        raise ConfigError(
            f"{name} = {section.get(key, 'mean')!r} has no counterpart in {family.name} of "
            f"transformers, which needs {wanted!r}"
        )
    if section["name"] == "classification" and config.pooling != "bert":
        raise ConfigError(
            f"model.pooling = {config.pooling!r}: a classifier of {family.name} reads BERT's pooler"
        )


def _export_rules(
    family: Family, head: Head, model: Model
) -> tuple[list[weights.Rule], dict[str, Tensor]]:
    """The rules that apply to a model, and the tensors that they speak of."""
    config, vocabulary = model.encoder.config, model.preprocessor.spec
    state = kept_weights(model.objective)
    rules = family.rules(config, skipped(family, vocabulary.pad), family.prefix)
    if config.pooling == "bert" and family.pooler:
        rules += weights.linear("encoder.pooler", family.pooler)
    rules += head.rules
    if (model.values.get("method") or {}).get("sentence", "none") == family.sentence:
        rules += head.sentence
    named = {rule.ours for rule in rules}
    lost = sorted({k.rpartition(".")[0] for k in state if k not in named})
    if any(name not in ("sentence_head", "encoder.pooler") for name in lost):
        raise ConfigError(f"{', '.join(lost)} of this run have no counterpart in {family.name}")
    if lost:
        console.say(f"{', '.join(lost)}: {family.name} has no place for it, left out")
    return rules, {name: tensor for name, tensor in state.items() if name in named}


def _ids(vocabulary: Any, family: Family, config: Any) -> dict[str, int]:
    """The special ids, under the names of a config.json."""
    ids = {"pad_token_id": vocabulary.pad, "eos_token_id": vocabulary.sep}
    ids["bos_token_id"] = vocabulary.cls if vocabulary.cls >= 0 else vocabulary.sep
    if family.name == "esm":
        ids["mask_token_id"] = vocabulary.mask
    if family.model == "encoder_decoder":
        ids["decoder_start_token_id"] = getattr(vocabulary, config.start)
    return {key: number for key, number in ids.items() if number >= 0}
