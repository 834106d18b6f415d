"""A config.json of `transformers` and a configuration of ours: each from the other.

What ours cannot express is an error that names their key; what they cannot, one that names ours.
"""

from collections.abc import Mapping
from typing import Any

from selfsup.errors import ConfigError
from selfsup.interop import maps
from selfsup.interop.families import (
    ALBERT,
    BART,
    ESM,
    FAMILIES,
    GPT2,
    GPT_NEOX,
    ROBERTA,
    SWITCH,
)
from selfsup.interop.family import Family


def facts(config: Any) -> dict[str, Any]:
    """What the layouts of families speak of: values, and whether a width or a factor is special."""
    final = config.norm == "pre" if config.final_norm is None else config.final_norm
    return {
        **{key: getattr(config, key) for key in ("norm", "norm_kind", "positions", "causal")},
        **{key: getattr(config, key) for key in ("share_layers", "bias", "embedding_norm")},
        "segment_types": config.segment_types,
        "norm_eps": config.norm_eps,
        "tied": getattr(config, "tied", True),
        "final_norm": final,
        "experts": config.experts > 0,
        "head_width": config.head_dim * config.heads != config.dim,
        "embedding_dim": config.embedding_width != config.dim,
        "embedding_std": maps.factor(config) != 1.0,
    }


def family_of(values: Mapping[str, Any], where: str) -> Family:
    """The family that a config.json is of.

    Raises:
        ConfigError: it is none of those that can be read.
    """
    readable = {family.name: family for family in FAMILIES if family.imports}
    name = values.get("model_type")
    if name not in readable:
        raise ConfigError(
            f"{where}: model_type = {name!r} cannot be imported; {', '.join(sorted(readable))} can"
        )
    return readable[name]


def read_config(
    family: Family, values: Mapping[str, Any], where: str, *, pooled: bool, scaled: bool, tied: bool
) -> dict[str, Any]:
    """The [model] section for a config.json.

    Args:
        family: from `family_of`.
        values: the file's content.
        where: its path, for errors.
        pooled: whether the checkpoint holds a pooler.
        scaled: T5 and Switch: whether the output is divided by sqrt(dim).
        tied: T5 and Switch: whether the output's weights are the table.

    Raises:
        ConfigError: ours cannot express a value; its key is named.
    """
    for key, only in family.required.items():
        if key in values and values[key] not in (only, None):
            raise ConfigError(f"{where}: {key} = {values[key]!r} is not supported, only {only!r}")
    given = {key: values.get(key, default) for key, (_, default) in family.keys.items()}
    for key, other in family.also.items():
        if values.get(key, given[other]) != given[other]:
            raise ConfigError(
                f"{where}: {key} = {values[key]!r} is not supported where {other} = {given[other]}"
            )
    out = {ours: given[key] for key, (ours, _) in family.keys.items() if given[key] is not None}
    key, default, known = family.activation
    if values.get(key, default) not in known:
        raise ConfigError(
            f"{where}: {key} = {values[key]!r} is not supported; {', '.join(known)} are"
        )
    out["activation"] = known[values.get(key, default)]
    switches = {"experts", "head_width", "embedding_dim", "embedding_std", "segment_types", "tied"}
    out = {k: v for k, v in family.layout.items() if k not in switches} | out
    if "segment_types" in out:
        out["segment_types"] = max(2, out["segment_types"])  # one is given twice: see `tables`
    if "embedding_dim" in out:
        out = _narrow(family, out, where)
    out["max_length"] = out.get("max_length", 512) - skipped_inside(family, values)
    pooling = "last" if family.layout["causal"] else "bert" if pooled else "mean"
    out |= {"name": family.model, "pooling": pooling}
    if family.model == "encoder_decoder":
        out["tied"] = tied
    if family.layout["positions"] == "relative":
        out["init_std"] = out["dim"] ** -0.5
        out["embedding_std"] = 1.0 if tied and scaled else 0.0
    if family is SWITCH:
        out["expert_every"] = _expert_every(values, out, where)
    return out


def _narrow(family: Family, out: dict[str, Any], where: str) -> dict[str, Any]:
    if out["embedding_dim"] != out["dim"]:
        return out
    if family is ALBERT:
        raise ConfigError(
            f"{where}: embedding_size = {out['dim']} = hidden_size is not supported: ours projects "
            "a narrower table only"
        )
    return {**out, "embedding_dim": 0}


def _expert_every(values: Mapping[str, Any], out: dict[str, Any], where: str) -> int:
    """The step from one layer with experts to the next, which is 1 or 2 in both stacks."""
    steps = {}
    for side in ("encoder", "decoder"):
        layers = out["layers"] if side == "encoder" else out.get("decoder_layers", out["layers"])
        sparse = values.get(f"num_sparse_{side}_layers", 3)
        steps[side] = layers // sparse if sparse else 0
    if steps["encoder"] != steps["decoder"] or steps["encoder"] not in (1, 2):
        raise ConfigError(
            f"{where}: num_sparse_encoder_layers and num_sparse_decoder_layers put experts into "
            f"every {steps['encoder']}th and {steps['decoder']}th layer; every layer or every "
            "second one is supported, in both stacks alike"
        )
    return steps["encoder"]


def skipped(family: Family, pad: int) -> int:
    """Rows at the beginning of a table of positions that no token reads."""
    return pad + 1 if family is ROBERTA else 2 if family is BART else 0


def skipped_inside(family: Family, values: Mapping[str, Any]) -> int:
    """How many of them `max_position_embeddings` counts."""
    return skipped(family, values.get("pad_token_id", 1)) if family is ROBERTA else 0


def chosen(config: Any, model: str, kind: str, begins: bool) -> Family:
    """The family that a model of ours is written as.

    Args:
        config: of its encoder.
        model: its name in the registry.
        kind: name of its method or task.
        begins: whether its rows begin with <s>, as RoBERTa's do.

    Raises:
        ConfigError: there is none; the nearest one's differences are named.
    """
    if getattr(config, "heads_left", ()) or getattr(config, "feedforward_left", ()):
        raise ConfigError(
            "no architecture of transformers holds a pruned model; export the whole one"
        )
    found, mine = [], facts(config) if model in ("transformer", "encoder_decoder") else {}
    for family in FAMILIES:
        if family.model != model or kind not in family.heads or (family is ROBERTA and not begins):
            continue
        lacking = [key for key, value in family.layout.items() if mine[key] != value]
        if config.activation not in family.activation[2].values():
            lacking.append("activation")
        if not lacking:
            return family
        found.append((len(lacking), family.name, lacking))
    if not found:
        raise ConfigError(
            f"a {kind} model on {model!r} has no counterpart in transformers; masked_language, "
            "causal_language, replaced_token, denoising, classification, tagging, span_qa and "
            "generation on a transformer can be exported"
        )
    _, name, lacking = min(found)
    shown = ", ".join(f"model.{key} = {getattr(config, key, None)!r}" for key in lacking)
    raise ConfigError(
        f"no architecture of transformers computes this layout; {name} is nearest, but for "
        f"{shown}. The presets bert-*, gpt2-*, bart-*, t5-* and modern-* can be exported"
    )


def write_config(family: Family, config: Any, size: int, pad: int) -> dict[str, Any]:
    """The architecture's part of a config.json for one of our configurations.

    Args:
        family: from `chosen`.
        config: of the encoder.
        size: of the vocabulary.
        pad: id of the padding token.
    """
    resolved = {
        "attention_dropout": config.dropout
        if config.attention_dropout is None
        else config.attention_dropout,
        "feedforward_dim": config.feedforward_width,
        "embedding_dim": config.embedding_width,
        "head_width": config.head_dim,
        "decoder_layers": getattr(config, "decoder_layers", 0) or config.layers,
        "segment_types": max(1, config.segment_types),
    }
    out: dict[str, Any] = {"model_type": family.name, "vocab_size": size}
    for key, (ours, _) in family.keys.items():
        out[key] = resolved.get(ours, getattr(config, ours))
    out |= {key: out[other] for key, other in family.also.items()} | dict(family.required)
    key, _, known = family.activation
    out[key] = next(name for name, ours in known.items() if ours == config.activation)
    if family is ROBERTA:
        out["max_position_embeddings"] += skipped(family, pad)
    if family is GPT_NEOX:
        rope = {"rope_theta": config.rotary_base, "partial_rotary_factor": 1.0}
        out |= {
            "rope_parameters": {**rope, "rope_type": "default"},
            "max_position_embeddings": 2048,
        }
        out |= {"rotary_emb_base": config.rotary_base, "rotary_pct": 1.0}  # before version 5
    if family is ESM:
        out |= {"rope_theta": config.rotary_base}
    if family.layout["positions"] == "relative":
        divided = maps.output_is_divided(config)
        out |= {"tie_word_embeddings": divided, "initializer_factor": 1.0}
    if family is SWITCH:
        out |= {"num_sparse_encoder_layers": config.layers // config.expert_every}
        out |= {"num_sparse_decoder_layers": out["num_decoder_layers"] // config.expert_every}
        out |= {"expert_capacity": 2**20, "router_jitter_noise": 0.0}  # as ours outside training
    if family is GPT2:
        out["embd_pdrop"] = out["resid_pdrop"]
    return out
