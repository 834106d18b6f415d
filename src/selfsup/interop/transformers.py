"""Models of the `transformers` library: a checkpoint becomes a run, a run becomes a checkpoint.

Import reads config.json, safetensors and the tokenizer's files, and makes a finished run folder, so
that every verb works on it. Export writes what `AutoModel...from_pretrained` and `AutoTokenizer`
load without code of their own. `families.py` has the architectures, `maps.py` their weights,
`configurations.py`, `checkpoints.py` and `tokenizers.py` their files; the library itself is not
needed. Nothing is read with pickle.
"""

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from selfsup import console, registry
from selfsup.building import at_most, build_encoder, build_objective
from selfsup.config import from_mapping, to_mapping
from selfsup.data import text
from selfsup.data.text_preprocessor import TextPreprocessor
from selfsup.errors import ConfigError
from selfsup.files import whole_folder, write_json
from selfsup.interop import maps, weights
from selfsup.interop import tokenizers as tokens
from selfsup.interop.checkpoints import WEIGHTS, Checkpoint, fetched, read_folder
from selfsup.interop.configurations import chosen, read_config, skipped, write_config
from selfsup.interop.family import Family, Head
from selfsup.model import Model
from selfsup.model_folder import HEADS, SLACK, kept_weights, load_model, save_model
from selfsup.objective import Objective
from selfsup.run_start import write_run
from selfsup.training.checkpoint import load_weights
from selfsup.training.config import TrainingConfig
from selfsup.training.folder import RunFolder

UNLIMITED = 512  # longest row, where positions set no limit


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
    path = Path(source) if Path(source).is_dir() else fetched(str(source))
    found = read_folder(path)
    tokenizer = tokens.load(path, found.values)
    objective, sections = _objective(found, tokenizer)
    preprocessor = TextPreprocessor(tokenizer, sections["data"]["row_length"])
    with closing(RunFolder(Path(out))) as folder:
        training = TrainingConfig(steps=1)  # no step was made; what `evaluate` needs to know
        given = f"transformers:{source}"
        facts = {"imported": found.family.name, "tokenizer": tokenizer.fingerprint}
        run = {**sections, "training": to_mapping(training)}
        write_run(folder.path, run, training, objective, facts, given)
        save_model(folder.path / "model", objective, sections, preprocessor)
    return folder.path


def export_run(run: str | Path, out: str | Path) -> Path:
    """Writes a run's model as a folder that `transformers` loads.

    Args:
        run: a run folder: masked_language, causal_language, replaced_token, denoising,
            classification, tagging, span_qa or generation on a transformer.
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
    if any(".additions." in name for name in model.objective.state_dict()):
        raise ConfigError(
            f"{run}: holds {model.values['tuning']['names'][-1]} beside the encoder's weights: put "
            "it into them (selfsup merge), or export it by itself (--to peft)"
        )
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
    if section["name"] in ("classification", "tagging"):
        values["id2label"] = {str(i): name for i, name in enumerate(model.names)}
        values["label2id"] = {name: i for i, name in enumerate(model.names)}
    limit = config.max_length if config.positions == "learned" else model.preprocessor.max_length
    with whole_folder(path) as aside:
        write_json(aside / "config.json", values)
        (aside / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
        tokens.save(tokenizer, aside, limit, segments=config.segment_types > 0)
        if section["name"] in ("causal_language", "denoising", "generation"):
            ids = {key: value for key, value in values.items() if key.endswith("_token_id")}
            write_json(aside / "generation_config.json", ids | _search(section))
    return path


def _search(section: Mapping[str, Any]) -> dict[str, Any]:
    """How a generation task writes, under the names of a generation_config.json."""
    names = {"max_target": "max_new_tokens", "no_repeat": "no_repeat_ngram_size"}
    names |= {key: key for key in ("num_beams", "length_penalty")}
    return {names[key]: value for key, value in section.items() if key in names}


def _objective(found: Checkpoint, tokenizer: Any) -> tuple[Objective, dict[str, Any]]:
    """The method (or task) with the checkpoint's weights, and the sections of its config.toml."""
    family, values, tensors = found.family, found.values, found.tensors
    kind = _kind(found)
    head = family.heads[kind]
    has = {name: _any(getattr(head, name), tensors) for name in ("rules", "sentence")}
    pooler = head.pooler or family.pooler
    if pooler != family.pooler:  # RoBERTa's own, which some files hold though nothing reads it
        tensors = {k: v for k, v in tensors.items() if not k.startswith(f"{family.pooler}.")}
    pooled = bool(pooler) and f"{pooler}.weight" in tensors
    model = read_config(
        *(family, values, found.config),
        pooled=pooled,
        scaled=found.scaled,
        tied=found.tied,
    )
    sections = _sections(found, kind, model, tokenizer, has["sentence"])
    module = registry.module_of(registry.MODELS, "model", model["name"])
    config = from_mapping(
        module.Config, {k: v for k, v in model.items() if k != "name"}, found.config
    )
    size = sum(tensor.numel() for tensor in tensors.values())
    with at_most(SLACK * size + HEADS["tasks"], Path(found.config)):
        objective = _built(kind, sections, config, tokenizer)
    rules = family.rules(config, skipped(family, values.get("pad_token_id", 1)), family.prefix)
    rules += weights.linear("encoder.pooler", pooler) if pooled else []
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
                f"{found.config}: decoder_start_token_id = {first!r} is not supported; the "
                "tokenizer's padding, beginning or end is"
            )
        model["start"] = ids[first]
    out = {"data": {"name": "text", **to_mapping(data)}, "model": model}
    if kind in registry.METHODS:
        return {**out, "method": {"name": kind, **section}}
    names = found.values.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    labels = [str(names[number]) for number in sorted(names, key=int)]
    if kind == "classification":
        section["pooling"] = "encoder"
        if len(labels) == 1 or found.values.get("problem_type") == "multi_label_classification":
            raise ConfigError(
                f"{found.config}: a head that gives a number, or several labels at once, cannot be "
                "imported; one that gives one of several classes can"
            )
    if kind == "span_qa":
        labels = []
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
        console.say(
            f"{size - known} of {size} rows of the token table belong to no token: left out"
        )


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
            f"transformers, which needs {wanted!r}: train with --set {name}={wanted}"
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
    if config.pooling == "bert" and (pooler := head.pooler or family.pooler):
        rules += weights.linear("encoder.pooler", pooler)
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
