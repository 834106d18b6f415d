"""Our tunings against PEFT, number for number: hidden states, and gradients of what is tuned.

Weights and tuned parameters are copied; all is computed in float64.
"""

import pytest
import torch
from torch import Tensor, nn

from selfsup.batch import Vocabulary
from selfsup.building import build_encoder
from selfsup.interop import weights
from selfsup.interop.checkpoints import read_folder
from selfsup.interop.configurations import read_config, skipped
from selfsup.models.encoder_decoder import Config as EncoderDecoderConfig
from selfsup.models.transformer import Config
from selfsup.objective import Objective
from selfsup.randomness import isolated, torch_generator
from selfsup.tuning.choice import Tuning, tune
from selfsup.tuning.parts import OWN

peft = pytest.importorskip("peft")
# PEFT asks transformers 5 by an old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

SIZE, LENGTH = 61, 5
BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 26,
}
CASES = {
    "bert": ("BertModel", BERT),
    "roberta": ("RobertaModel", {**BERT, "type_vocab_size": 1}),
    "gpt2": ("GPT2Model", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 26}),
    "t5": (
        "T5ForConditionalGeneration",
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
        | {"relative_attention_max_distance": 20, "relative_attention_num_buckets": 8}
        | {"decoder_start_token_id": 0},
    ),
}
GROW = 8**0.5  # our attention divides the queries of T5 by the root of a head's width
Pair = tuple[Tensor, Tensor, float]
"""Ours, theirs, and what theirs is multiplied by to be ours."""


def randomised(model: nn.Module, seed: str) -> nn.Module:
    generator = torch_generator(0, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model.eval()


def close(got: Tensor, expected: Tensor) -> None:
    atol = 1e-5 * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


@pytest.fixture(params=CASES)
def case(request) -> str:
    return request.param


def both(case: str, folder) -> tuple[Objective, nn.Module]:
    """An encoder of ours, and theirs with the same weights."""
    import transformers

    name, values = CASES[case]
    cls = getattr(transformers, name)
    with isolated():
        theirs = randomised(cls(cls.config_class(vocab_size=SIZE, **values)), "base")
    theirs.save_pretrained(folder)
    found = read_folder(folder)
    pooled = bool(found.family.pooler)
    options = {"pooled": pooled, "scaled": found.scaled, "tied": found.tied}
    model = read_config(found.family, found.values, found.config, **options)
    kind = model.pop("name")
    model |= {"start": "pad"} if case == "t5" else {}
    config = (EncoderDecoderConfig if case == "t5" else Config)(**model)
    pad = 1 if case == "roberta" else 0
    ours = Objective()
    ours.encoder = build_encoder(kind, config, Vocabulary(size=SIZE, pad=pad), 0)
    rules = found.family.rules(config, skipped(found.family, pad), found.family.prefix)
    rules += weights.linear("encoder.pooler", found.family.pooler) if pooled else []
    shapes = {name: value.shape for name, value in ours.state_dict().items()}
    filled = weights.read(rules, found.tensors, shapes, SIZE, str(folder))
    ours.load_state_dict(filled)
    return ours.eval().double(), theirs.double()


def tuned(ours: Objective, name: str, **options) -> dict[str, nn.Module]:
    tune(ours, Tuning.of(name, {name: options} if options else {}))
    parts = ours.encoder.additions.every(OWN)
    return {place.replace("/", "."): part for place, _, part in parts}


def copied(pairs: list[Pair]) -> None:
    with torch.no_grad():
        for ours, theirs, factor in pairs:
            ours.copy_(theirs * factor)


def batch_of(case: str) -> dict[str, Tensor]:
    tokens = torch.randint(5, SIZE, (3, 9), generator=torch_generator(0, "tokens"))
    return {"tokens": tokens, "mask": torch.arange(9) < torch.tensor([[9], [7], [2]])}


def theirs_of(case: str, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    given = {"input_ids": batch["tokens"], "attention_mask": batch["mask"].long()}
    if case == "roberta":  # it tells padding by the id
        given["input_ids"] = batch["tokens"].masked_fill(~batch["mask"], 1)
    if case == "t5":
        return model(**given, labels=batch["tokens"].flip(0)).logits
    return model(**given).last_hidden_state


def ours_of(case: str, model: Objective, batch: dict[str, Tensor]) -> Tensor:
    encoder = model.encoder
    features = encoder(batch)
    if case == "t5":
        shifted = encoder.shifted(batch["tokens"].flip(0))
        return encoder.logits(encoder.decode(shifted, features).last)
    return features.last


def gradient_of(tensor: Tensor) -> Tensor:
    """Of a parameter, or of a part of one."""
    whole = tensor if tensor._base is None else tensor._base
    assert whole.grad is not None
    return whole.grad.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())


def same(case: str, ours: Objective, theirs: nn.Module, plain: Tensor, pairs: list[Pair]) -> None:
    """The outputs at real positions, and the gradients of both sides of every pair."""
    batch = batch_of(case)
    real = torch.ones_like(batch["mask"]) if case == "t5" else batch["mask"]
    got, expected = ours_of(case, ours, batch)[real], theirs_of(case, theirs, batch)
    expected = expected[:, -9:][real]  # behind the prompt, where there is one
    close(got, expected)
    assert not torch.allclose(got, plain[real], atol=1e-2)
    weight = torch.randn(got.shape, generator=torch_generator(0, "loss"), dtype=got.dtype)
    for one in (got, expected):
        (one * weight).sum().backward()
    for mine, other, factor in pairs:
        gradient, expected = gradient_of(mine) * factor, gradient_of(other).to(mine.dtype)
        assert expected.abs().max() > 0
        close(gradient, expected.view_as(gradient))


def lora_pairs(case: str, parts: dict[str, nn.Module], theirs: nn.Module) -> list[Pair]:
    """Query and value of every layer; GPT-2's one projection."""
    names = {
        "bert": ("layers.{i}.attention.qkv", "encoder.layer.{i}.attention.self.", "query value"),
        "roberta": ("layers.{i}.attention.qkv", "encoder.layer.{i}.attention.self.", "query value"),
        "gpt2": ("layers.{i}.attention.qkv", "h.{i}.attn.", "c_attn"),
    }
    stacks = [names[case]] if case in names else []
    if case == "t5":
        stacks = [
            (
                f"{own}.layers.{{i}}.attention.qkv",
                f"{name}.block.{{i}}.layer.0.SelfAttention.",
                "q v",
            )
            for own, name in (("source", "encoder"), ("target", "decoder"))
        ]
    out = []
    for place, there, modules in stacks:
        for i in range(2):
            part = parts[place.format(i=i)]
            for k, module in enumerate(modules.split()):
                layer = theirs.base_model.model.get_submodule(there.format(i=i) + module)
                factor = GROW if module == "q" else 1.0
                out.append((part.a[k], layer.lora_A["default"].weight, 1.0))
                out.append((part.b[k], layer.lora_B["default"].weight, factor))
    return out


def test_lora(case, tmp_path):
    ours, theirs = both(case, tmp_path)
    with torch.no_grad():
        plain = ours_of(case, ours, batch_of(case))
    targets = {"gpt2": ["c_attn"], "t5": r".*SelfAttention\.(q|v)"}.get(case, ["query", "value"])
    given = {"r": 3, "lora_alpha": 6, "lora_dropout": 0.1, "fan_in_fan_out": case == "gpt2"}
    with isolated():
        other = peft.get_peft_model(theirs, peft.LoraConfig(**given, target_modules=targets))
    chosen = ["qkv"] if case == "gpt2" else ["query", "value"]
    parts = tuned(ours, "lora", rank=3, alpha=6.0, dropout=0.1, targets=chosen)
    pairs = lora_pairs(case, parts, other)
    moved = [p for p in other.parameters() if p.requires_grad]
    assert len(moved) == len(pairs)
    for i, parameter in enumerate(moved):
        nn.init.normal_(parameter, std=0.3, generator=torch_generator(i, "lora"))
    copied(pairs)
    same(case, ours.eval(), other.eval(), plain, pairs)


@pytest.mark.parametrize("case", ["bert", "gpt2"])
def test_ia3(case, tmp_path):
    ours, theirs = both(case, tmp_path)
    with torch.no_grad():
        plain = ours_of(case, ours, batch_of(case))
    if case == "bert":
        targets = r".*(self\.key|self\.value|layer\.\d\.output\.dense)"
        inputs = r".*layer\.\d\.output\.dense"
    else:
        targets, inputs = r".*(attn\.c_attn|mlp\.c_proj)", r".*mlp\.c_proj"
    config = peft.IA3Config(
        target_modules=targets, feedforward_modules=inputs, fan_in_fan_out=case == "gpt2"
    )
    with isolated():
        other = peft.get_peft_model(theirs, config)
    generator = torch_generator(0, "ia3")
    for parameter in (p for p in other.parameters() if p.requires_grad):
        nn.init.uniform_(parameter, 0.5, 1.5, generator=generator)
    parts, pairs = tuned(ours, "ia3"), []
    for i in range(2):
        both_kinds = parts[f"layers.{i}.attention.qkv"].factors
        keys, values = both_kinds[:32], both_kinds[32:]
        inner = parts[f"layers.{i}.feedforward.down"].factors
        layers = other.base_model.model
        if case == "bert":
            layer = layers.encoder.layer[i]
            key, value = (
                getattr(layer.attention.self, n).ia3_l["default"] for n in ("key", "value")
            )
            last = layer.output.dense.ia3_l["default"]
        else:
            whole = layers.h[i].attn.c_attn.ia3_l["default"]
            with torch.no_grad():
                whole[:32] = 1  # ours has no factors on queries
            key, value = whole[32:64], whole[64:]
            last = layers.h[i].mlp.c_proj.ia3_l["default"]
        pairs += [(keys, key, 1.0), (values, value, 1.0), (inner, last, 1.0)]
    with torch.no_grad():
        for mine, factors, _ in pairs:
            mine.copy_(factors.flatten())
    same(case, ours.eval(), other.eval(), plain, pairs)


@pytest.mark.parametrize("case", ["bert", "roberta", "gpt2"])
@pytest.mark.parametrize("kind", ["prefix", "soft_prompt"])
def test_prefixes_and_prompts(case, kind, tmp_path):
    ours, theirs = both(case, tmp_path)
    with torch.no_grad():
        plain = ours_of(case, ours, batch_of(case))
    common = {"task_type": "FEATURE_EXTRACTION", "num_virtual_tokens": LENGTH}
    if kind == "prefix":
        config = peft.PrefixTuningConfig(**common)
        (part,) = tuned(ours, "prefix", length=LENGTH, shift_positions=True).values()
        mine = part.table
    else:
        config = peft.PromptTuningConfig(**common)
        (part,) = tuned(ours, "soft_prompt", length=LENGTH).values()
        mine = part.vectors
    with isolated():
        other = peft.get_peft_model(theirs, config)
    table = other.prompt_encoder["default"].embedding.weight
    nn.init.normal_(table, std=0.5, generator=torch_generator(0, "prompt"))
    copied([(mine, table, 1.0)])
    segments = ours.encoder.embedding.segments
    if kind == "soft_prompt" and segments is not None:  # theirs adds it to the prompt
        with torch.no_grad():
            mine.add_(segments.weight[0])
    same(case, ours.eval(), other.eval(), plain, [(mine, table, 1.0)])
