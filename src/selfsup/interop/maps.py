"""Where each tensor of a published architecture lies in ours, family by family.

Each function gives the rules of its encoder (or encoder-decoder) for one configuration of ours;
heads have rules of their own. Names are those of `transformers`; `{i}` stands for the layer.

Axes of every weight: (out, in), as PyTorch keeps a linear layer.
"""

import math
from typing import Any

import torch
from torch import Tensor

from selfsup.interop.weights import Rule, linear, repeated

EMBEDDING = "encoder.embedding"


def tables(config: Any, there: str, skip: int, narrow: str) -> list[Rule]:
    """The embedding of BERT and its heirs; `skip` rows of positions are never used."""
    segments = f"{there}.token_type_embeddings.weight"
    positions = f"{there}.position_embeddings.weight"
    rules = [
        Rule(f"{EMBEDDING}.tokens.weight", (f"{there}.word_embeddings.weight",), vocabulary=True),
        Rule(f"{EMBEDDING}.positions.weight", (positions,), skip=skip),
        *linear(f"{EMBEDDING}.norm", f"{there}.LayerNorm"),
    ]
    if config.segment_types:
        rules.append(Rule(f"{EMBEDDING}.segments.weight", (segments,), repeated=True))
    if config.embedding_width != config.dim:
        rules += linear(f"{EMBEDDING}.projection", narrow)
    return rules


def bert(config: Any, skip: int, prefix: str) -> list[Rule]:
    """BERT, RoBERTa and ELECTRA."""
    layer, ours = f"{prefix}encoder.layer.{{i}}", "encoder.layers.{i}"
    attention = f"{layer}.attention"
    return [
        *tables(config, f"{prefix}embeddings", skip, f"{prefix}embeddings_project"),
        *repeated(
            [
                *linear(
                    f"{ours}.attention.qkv",
                    *(f"{attention}.self.{part}" for part in ("query", "key", "value")),
                ),
                *linear(f"{ours}.attention.out", f"{attention}.output.dense"),
                *linear(f"{ours}.attention_norm", f"{attention}.output.LayerNorm"),
                *linear(f"{ours}.feedforward.up", f"{layer}.intermediate.dense"),
                *linear(f"{ours}.feedforward.down", f"{layer}.output.dense"),
                *linear(f"{ours}.feedforward_norm", f"{layer}.output.LayerNorm"),
            ],
            config.layers,
        ),
    ]


def albert(config: Any, skip: int, prefix: str) -> list[Rule]:
    """ALBERT: one layer for all, and a narrow table."""
    layer = f"{prefix}encoder.albert_layer_groups.0.albert_layers.0"
    ours, narrow = "encoder.layers.0", f"{prefix}encoder.embedding_hidden_mapping_in"
    return [
        *tables(config, f"{prefix}embeddings", skip, narrow),
        *linear(
            f"{ours}.attention.qkv",
            *(f"{layer}.attention.{part}" for part in ("query", "key", "value")),
        ),
        *linear(f"{ours}.attention.out", f"{layer}.attention.dense"),
        *linear(f"{ours}.attention_norm", f"{layer}.attention.LayerNorm"),
        *linear(f"{ours}.feedforward.up", f"{layer}.ffn"),
        *linear(f"{ours}.feedforward.down", f"{layer}.ffn_output"),
        *linear(f"{ours}.feedforward_norm", f"{layer}.full_layer_layer_norm"),
    ]


def gpt2(config: Any, skip: int, prefix: str) -> list[Rule]:
    """GPT-2, whose matrices are kept as (in, out)."""
    there, ours = f"{prefix}h.{{i}}", "encoder.layers.{i}"
    return [
        Rule(f"{EMBEDDING}.tokens.weight", (f"{prefix}wte.weight",), vocabulary=True),
        Rule(f"{EMBEDDING}.positions.weight", (f"{prefix}wpe.weight",)),
        *repeated(
            [
                *linear(f"{ours}.attention_norm", f"{there}.ln_1"),
                *linear(f"{ours}.attention.qkv", f"{there}.attn.c_attn", transposed=True),
                *linear(f"{ours}.attention.out", f"{there}.attn.c_proj", transposed=True),
                *linear(f"{ours}.feedforward_norm", f"{there}.ln_2"),
                *linear(f"{ours}.feedforward.up", f"{there}.mlp.c_fc", transposed=True),
                *linear(f"{ours}.feedforward.down", f"{there}.mlp.c_proj", transposed=True),
            ],
            config.layers,
        ),
        *linear("encoder.final_norm", f"{prefix}ln_f"),
    ]


def gpt_neox(config: Any, skip: int, prefix: str) -> list[Rule]:
    """Small causal layouts with rotary positions; the scaled table is written apart."""
    there, ours = f"{prefix}layers.{{i}}", "encoder.layers.{i}"
    tokens = f"{EMBEDDING}.tokens.weight"
    return [
        Rule(tokens, (f"{prefix}embed_in.weight",), scales=(1 / factor(config),)),
        Rule(tokens, ("lm_head.weight",), identical=True),
        *repeated(
            [
                *linear(f"{ours}.attention_norm", f"{there}.input_layernorm"),
                *linear(
                    f"{ours}.attention.qkv",
                    f"{there}.attention.query_key_value",
                    heads=config.heads,
                ),
                *linear(f"{ours}.attention.out", f"{there}.attention.dense"),
                *linear(f"{ours}.feedforward_norm", f"{there}.post_attention_layernorm"),
                *linear(f"{ours}.feedforward.up", f"{there}.mlp.dense_h_to_4h"),
                *linear(f"{ours}.feedforward.down", f"{there}.mlp.dense_4h_to_h"),
            ],
            config.layers,
        ),
        *linear("encoder.final_norm", f"{prefix}final_layer_norm"),
    ]


def esm(config: Any, skip: int, prefix: str) -> list[Rule]:
    """Small bidirectional layouts with rotary positions; the scaled table is written apart."""
    there, ours = f"{prefix}encoder.layer.{{i}}", "encoder.layers.{i}"
    attention = f"{there}.attention"
    tokens = f"{EMBEDDING}.tokens.weight"
    table = f"{prefix}embeddings.word_embeddings.weight"
    return [
        Rule(tokens, (table,), scales=(1 / factor(config),)),
        *repeated(
            [
                *linear(f"{ours}.attention_norm", f"{attention}.LayerNorm"),
                *linear(
                    f"{ours}.attention.qkv",
                    *(f"{attention}.self.{part}" for part in ("query", "key", "value")),
                ),
                *linear(f"{ours}.attention.out", f"{attention}.output.dense"),
                *linear(f"{ours}.feedforward_norm", f"{there}.LayerNorm"),
                *linear(f"{ours}.feedforward.up", f"{there}.intermediate.dense"),
                *linear(f"{ours}.feedforward.down", f"{there}.output.dense"),
            ],
            config.layers,
        ),
        *linear("encoder.final_norm", f"{prefix}encoder.emb_layer_norm_after"),
    ]


def bart(config: Any, skip: int, prefix: str) -> list[Rule]:
    """BART: both stacks have positions and an embedding normalisation of their own."""
    shared = f"{prefix}shared.weight"
    rules = [Rule("encoder.source.embedding.tokens.weight", (shared,), vocabulary=True)]
    for stack, name in (("source", "encoder"), ("target", "decoder")):
        there, ours = f"{prefix}{name}.layers.{{i}}", f"encoder.{stack}.layers.{{i}}"
        positions = f"encoder.{stack}.embedding.positions.weight"
        parts = ("q_proj", "k_proj", "v_proj")
        layer = [
            *linear(f"{ours}.attention.qkv", *(f"{there}.self_attn.{part}" for part in parts)),
            *linear(f"{ours}.attention.out", f"{there}.self_attn.out_proj"),
            *linear(f"{ours}.attention_norm", f"{there}.self_attn_layer_norm"),
            *linear(f"{ours}.feedforward.up", f"{there}.fc1"),
            *linear(f"{ours}.feedforward.down", f"{there}.fc2"),
            *linear(f"{ours}.feedforward_norm", f"{there}.final_layer_norm"),
        ]
        if stack == "target":
            cross = f"{there}.encoder_attn"
            layer += linear(f"{ours}.cross.query", f"{cross}.q_proj")
            layer += linear(f"{ours}.cross.kv", f"{cross}.k_proj", f"{cross}.v_proj")
            layer += linear(f"{ours}.cross.out", f"{cross}.out_proj")
            layer += linear(f"{ours}.cross_norm", f"{cross}_layer_norm")
        rules += [
            Rule(positions, (f"{prefix}{name}.embed_positions.weight",), skip=skip),
            *linear(f"encoder.{stack}.embedding.norm", f"{prefix}{name}.layernorm_embedding"),
            *repeated(layer, _depth(config, stack)),
        ]
    return rules


def t5(config: Any, skip: int, prefix: str) -> list[Rule]:
    """T5 and Switch: no biases, and scores that are not divided by the root of a head's width.

    Our attention divides, so its queries are multiplied. T5's shared table is sqrt(dim) times ours
    where our `embedding_std` says so; its output, divided by sqrt(dim), is then the same table.
    """
    tokens = "encoder.source.embedding.tokens.weight"
    rules = [Rule(tokens, ("shared.weight",), scales=(1 / factor(config),), vocabulary=True)]
    if not config.tied:
        rules.append(Rule("encoder.output.weight", ("lm_head.weight",), vocabulary=True))
    elif not output_is_divided(config):
        rules.append(Rule(tokens, ("lm_head.weight",), identical=True))
    if config.experts and not output_is_divided(config):  # then Switch ties nothing, unlike T5
        scales = (1 / factor(config),)
        copies = [f"{stack}.embed_tokens.weight" for stack in ("encoder", "decoder")]
        rules += [Rule(tokens, (name,), scales=scales, identical=True) for name in copies]
    grow = math.sqrt(config.head_dim)
    for stack, name in (("source", "encoder"), ("target", "decoder")):
        for i in range(_depth(config, stack)):
            rules += _t5_layer(config, stack, f"{name}.block.{i}", i, grow)
        bias = f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        rules.append(Rule(f"encoder.{stack}.relative.table.weight", (bias,)))
        rules += linear(f"encoder.{stack}.final_norm", f"{name}.final_layer_norm", bias=False)
    return rules


def _t5_layer(config: Any, stack: str, there: str, i: int, grow: float) -> list[Rule]:
    ours, own = f"encoder.{stack}.layers.{i}", f"{there}.layer.0.SelfAttention"
    rules = [
        Rule(
            f"{ours}.attention.qkv.weight",
            tuple(f"{own}.{part}.weight" for part in "qkv"),
            scales=(grow, 1.0, 1.0),
        ),
        *linear(f"{ours}.attention.out", f"{own}.o", bias=False),
        *linear(f"{ours}.attention_norm", f"{there}.layer.0.layer_norm", bias=False),
    ]
    if stack == "target":
        cross = f"{there}.layer.1.EncDecAttention"
        rules += [
            Rule(f"{ours}.cross.query.weight", (f"{cross}.q.weight",), scales=(grow,)),
            *linear(f"{ours}.cross.kv", f"{cross}.k", f"{cross}.v", bias=False),
            *linear(f"{ours}.cross.out", f"{cross}.o", bias=False),
            *linear(f"{ours}.cross_norm", f"{there}.layer.1.layer_norm", bias=False),
        ]
    last = f"{there}.layer.{2 if stack == 'target' else 1}"
    rules += linear(f"{ours}.feedforward_norm", f"{last}.layer_norm", bias=False)
    if config.experts and (i + 1) % config.expert_every == 0:
        rules += linear(f"{ours}.feedforward.router", f"{last}.mlp.router.classifier", bias=False)
        experts = [f"{last}.mlp.experts.expert_{number}" for number in range(config.experts)]
        up, down = [f"{name}.wi" for name in experts], [f"{name}.wo" for name in experts]
    else:
        inside = f"{last}.{'mlp' if config.experts else 'DenseReluDense'}"
        gated = config.activation in ("swiglu", "geglu")
        up = [f"{inside}.wi_0", f"{inside}.wi_1"] if gated else [f"{inside}.wi"]
        down = [f"{inside}.wo"]
    rules += linear(f"{ours}.feedforward.up", *up, bias=False)
    return rules + linear(f"{ours}.feedforward.down", *down, bias=False)


def vocabulary_head(dense: str, norm: str, bias: str) -> list[Rule]:
    """BERT's head over the vocabulary."""
    return [
        *linear("head.dense", dense),
        *linear("head.norm", norm),
        Rule("head.bias", (bias,), vocabulary=True),
    ]


def factor(config: Any) -> float:
    """What the token table is multiplied with as it enters the model."""
    return config.embedding_std / config.init_std if config.embedding_std else 1.0


def output_is_divided(config: Any) -> bool:
    """Whether a tied model is T5's own: the table enters sqrt(dim) times as large."""
    return bool(config.tied and math.isclose(factor(config), math.sqrt(config.dim), rel_tol=1e-9))


def _depth(config: Any, stack: str) -> int:
    return config.layers if stack == "source" else config.decoder_layers or config.layers


def constants(name: str, config: Any, size: int, prefix: str) -> dict[str, Tensor]:
    """Tensors that an architecture wants, and of which ours has none."""
    out = {}
    if name in ("bert", "roberta", "albert", "electra") and not config.segment_types:
        zeros = torch.zeros(1, config.embedding_width)
        out[f"{prefix}embeddings.token_type_embeddings.weight"] = zeros
    if name == "bart":
        out["final_logits_bias"] = torch.zeros(1, size)
    if name == "esm":  # its angles, which versions before 5 read from the weights
        even = torch.arange(0, config.head_dim, 2).float()
        turns = config.rotary_base ** (-even / config.head_dim)
        for i in range(config.layers):
            place = f"{prefix}encoder.layer.{i}.attention.self.rotary_embeddings.inv_freq"
            out[place] = turns.clone()
        contacts = f"{prefix}contact_head.regression"
        out[f"{contacts}.weight"] = torch.zeros(1, config.layers * config.heads)
        out[f"{contacts}.bias"] = torch.zeros(1)
    return out
