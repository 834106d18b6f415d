import itertools
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from selfsup.batch import Batch, Vocabulary
from selfsup.config import from_mapping, preset_values, presets, to_mapping
from selfsup.errors import ConfigError, DataError
from selfsup.models import transformer
from selfsup.models.embeddings import (
    TokenEmbedding,
    document_positions,
    rotary_angles,
    rotate,
    sinusoids,
)
from selfsup.models.transformer import Config, TransformerEncoder
from selfsup.models.view import Cache
from selfsup.models.vocabulary_head import VocabularyHead
from selfsup.randomness import isolated, seed_layers, torch_generator

VOCABULARY = Vocabulary(size=50)
SMALL = Config(dim=16, layers=2, heads=2, dropout=0.0, max_length=32, init_std=0.3)
POSITIONS = ("learned", "sinusoidal", "rotary", "none")
PRESETS = sorted(presets()["transformer"])


def build(config: Config, vocabulary: Vocabulary = VOCABULARY) -> TransformerEncoder:
    with isolated():
        seed_layers(0, "model")
        return TransformerEncoder(config, vocabulary).eval()


def random_tokens(*shape: int) -> Tensor:
    return torch.randint(0, VOCABULARY.size, shape, generator=torch_generator(0, "tokens"))


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def pad(rows: list[Tensor], side: str) -> Batch:
    """Rows of different length in one batch, with rubbish where padded."""
    longest = max(map(len, rows))
    tokens = torch.full((len(rows), longest), 7)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        tokens[i, place], mask[i, place] = row, True
    return {"tokens": tokens, "mask": mask}


# Positions


def test_sinusoids_equal_the_formula_entry_by_entry():
    got = sinusoids(torch.arange(9), 6)
    for position in range(9):
        for i in range(3):
            angle = position / 10000 ** (2 * i / 6)
            assert got[position, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert got[position, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_rotation_equals_complex_multiplication_pair_by_pair():
    x = torch.randn(2, 3, 5, 8, generator=torch_generator(0, "x"))  # (batch, heads, time, head_dim)
    positions = torch.tensor([[0, 1, 2, 3, 4], [0, 1, 0, 1, 2]])
    got = rotate(x, *rotary_angles(positions, 8, 100.0))
    for row, head, time in torch.cartesian_prod(*map(torch.arange, (2, 3, 5))).tolist():
        for i in range(4):
            pair = complex(x[row, head, time, i], x[row, head, time, i + 4])
            angle = positions[row, time].item() * 100.0 ** (-2 * i / 8)
            turned = pair * complex(math.cos(angle), math.sin(angle))
            assert got[row, head, time, i].item() == pytest.approx(turned.real, abs=1e-5)
            assert got[row, head, time, i + 4].item() == pytest.approx(turned.imag, abs=1e-5)


def test_document_positions_equal_a_loop():
    generator = torch_generator(0, "documents")
    mask = torch.rand(6, 12, generator=generator) < 0.8
    documents = (torch.rand(6, 12, generator=generator) < 0.3).cumsum(1)
    expected = torch.zeros(6, 12, dtype=torch.long)
    for row in range(6):
        for i in range(12):
            same = documents[row, :i] == documents[row, i]
            expected[row, i] = (same & mask[row, :i]).sum()
    assert torch.equal(document_positions(mask, documents), expected)


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rotary"])
def test_order_matters_with_positions(positions):
    encoder = build(replace(SMALL, positions=positions, pooling="mean"))
    tokens = random_tokens(1, 6)
    change = encoder({"tokens": tokens}).pooled - encoder({"tokens": tokens.flip(1)}).pooled
    assert change.abs().max() > 1e-3


def test_without_positions_a_bidirectional_model_reads_a_bag_of_tokens():
    encoder = build(replace(SMALL, positions="none"))
    tokens = random_tokens(1, 6)
    close(encoder({"tokens": tokens}).pooled, encoder({"tokens": tokens.flip(1)}).pooled)


def test_rows_beyond_the_learned_positions_are_refused():
    encoder = build(replace(SMALL, positions="learned", max_length=8))
    assert encoder({"tokens": random_tokens(1, 8)}).last.shape == (1, 8, 16)
    with pytest.raises(DataError, match="9 tokens is longer than the 8 learned positions"):
        encoder({"tokens": random_tokens(1, 9)})


# Attention


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("norm_kind", ["layer", "rms"])
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_real_position(side, positions, norm_kind, norm, causal):
    config = replace(
        SMALL, positions=positions, norm_kind=norm_kind, norm=norm, causal=causal, pooling="last"
    )
    encoder = build(config)
    rows = [random_tokens(9), random_tokens(4) + 1, random_tokens(1)]
    batch = pad(rows, side)
    batch["tokens"] = batch["tokens"] % VOCABULARY.size
    features = encoder(batch)
    for i, row in enumerate(rows):
        alone = encoder({"tokens": row.unsqueeze(0) % VOCABULARY.size})
        for got, expected in zip(features.hidden, alone.hidden, strict=True):
            close(got[i, batch["mask"][i]], expected[0])
        close(features.pooled[i], alone.pooled[0])


@pytest.mark.parametrize("pooling", ["mean", "cls", "bert", "last"])
def test_padding_changes_no_pooled_vector(pooling):
    encoder = build(replace(SMALL, pooling=pooling))
    rows = [random_tokens(6), random_tokens(3)]
    for side in ("left", "right"):
        pooled = encoder(pad(rows, side)).pooled
        for i, row in enumerate(rows):
            close(pooled[i], encoder({"tokens": row.unsqueeze(0)}).pooled[0])


@pytest.mark.parametrize("causal", [False, True])
def test_a_row_of_nothing_but_padding_is_finite_and_gives_finite_gradients(causal):
    encoder = build(replace(SMALL, causal=causal))
    mask = torch.tensor([[True, True, False], [False, False, False]])
    features = encoder({"tokens": random_tokens(2, 3), "mask": mask})
    assert all(hidden.isfinite().all() for hidden in features.hidden)
    features.pooled.sum().backward()
    assert all(p.grad.isfinite().all() for p in encoder.parameters() if p.grad is not None)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("positions", POSITIONS)
def test_packed_documents_equal_the_documents_alone(positions, causal):
    encoder = build(replace(SMALL, positions=positions, causal=causal))
    rows = [random_tokens(5), random_tokens(2), random_tokens(4)]
    packed = {
        "tokens": torch.cat([*rows, torch.tensor([7, 7])]).unsqueeze(0),
        "documents": torch.tensor([[0] * 5 + [1] * 2 + [2] * 4 + [2] * 2]),
        "mask": torch.tensor([[True] * 11 + [False] * 2]),
    }
    got = encoder(packed).last[0, :11].split([5, 2, 4])
    for part, row in zip(got, rows, strict=True):
        close(part, encoder({"tokens": row.unsqueeze(0)}).last[0])


@pytest.mark.parametrize("masked", [False, True])
def test_a_causal_model_does_not_see_the_future_and_a_bidirectional_one_does(masked):
    tokens = random_tokens(2, 8)
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % VOCABULARY.size
    extra = {"mask": torch.ones(2, 8, dtype=torch.bool)} if masked else {}
    for causal in (True, False):
        encoder = build(replace(SMALL, causal=causal))
        before = encoder({"tokens": tokens, **extra}).last
        after = encoder({"tokens": changed, **extra}).last
        assert torch.equal(before[:, :5], after[:, :5]) is causal
        assert not torch.equal(before[:, 5:], after[:, 5:])


def test_a_mask_of_ones_equals_no_mask():
    for causal in (True, False):
        encoder = build(replace(SMALL, causal=causal))
        tokens = random_tokens(2, 6)
        ones = torch.ones(2, 6, dtype=torch.bool)
        got = encoder({"tokens": tokens, "mask": ones})
        close(got.last, encoder({"tokens": tokens}).last)


def test_attention_equals_loops():
    encoder = build(replace(SMALL, layers=1, positions="none"))
    attention = encoder.layers[0].attention
    x = torch.randn(1, 4, 16, generator=torch_generator(0, "x"))
    queries, keys, values = attention.qkv(x)[0].split(16, dim=-1)
    expected = torch.zeros(4, 16)
    for head in (slice(0, 8), slice(8, 16)):
        for i in range(4):
            scores = torch.stack([queries[i, head] @ keys[j, head] / 8**0.5 for j in range(4)])
            weights = scores.exp() / scores.exp().sum()
            expected[i, head] = sum(weights[j] * values[j, head] for j in range(4))
    got = attention(x, transformer.View(None, None, False, None), 0)
    close(got[0], attention.out(expected))


# The cache


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("share_layers", [False, True])
def test_reading_through_a_cache_equals_reading_at_once(positions, share_layers):
    encoder = build(replace(SMALL, causal=True, positions=positions, share_layers=share_layers))
    tokens = random_tokens(2, 9)
    cache, parts = Cache(), []
    for part in tokens.split([4, 1, 3, 1], dim=1):
        parts.append(encoder({"tokens": part}, cache).last)
    close(torch.cat(parts, 1), encoder({"tokens": tokens}).last)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_cache_goes_on_from_prompts_of_unequal_length(side, positions):
    encoder = build(replace(SMALL, causal=True, positions=positions))
    prompts, written = [random_tokens(6), random_tokens(3), random_tokens(1)], random_tokens(3, 4)
    cache = Cache()
    encoder(pad(prompts, side), cache)
    got = torch.cat([encoder({"tokens": t}, cache).last for t in written.split(1, dim=1)], 1)
    for i, prompt in enumerate(prompts):
        alone = encoder({"tokens": torch.cat([prompt, written[i]]).unsqueeze(0)}).last
        close(got[i], alone[0, -4:])


def test_a_cache_is_refused_where_it_would_be_wrong():
    batch = {"tokens": random_tokens(1, 3)}
    with pytest.raises(ConfigError, match="causal"):
        build(SMALL)(batch, Cache())
    with pytest.raises(DataError, match="documents"):
        build(replace(SMALL, causal=True))({**batch, "documents": batch["tokens"]}, Cache())


# Parameters


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_shared_layers_have_the_parameters_of_one_and_the_depth_of_all():
    one, shared = (
        build(replace(SMALL, layers=1)),
        build(replace(SMALL, layers=5, share_layers=True)),
    )
    assert count(shared) == count(one)
    assert len(shared({"tokens": random_tokens(1, 3)}).hidden) == 6
    assert count(build(replace(SMALL, layers=5))) > 3 * count(one.layers)


def test_a_factorised_table_is_narrow_and_its_head_ties_through_the_projection():
    encoder = build(replace(SMALL, embedding_dim=4))
    assert encoder.embedding.tokens.weight.shape == (50, 4)
    hidden = torch.randn(3, 16, generator=torch_generator(0, "hidden"))
    plain = VocabularyHead(encoder, transform=False)
    assert count(plain) == 0
    table = encoder.embedding.tokens.weight @ encoder.embedding.projection.weight.T
    close(plain(hidden, encoder.embedding), hidden @ table.T)
    full = VocabularyHead(encoder, transform=True)
    assert full(hidden.view(1, 3, 16), encoder.embedding).shape == (1, 3, 50)


CONFIGS = [
    replace(SMALL, positions="learned", segment_types=2, norm="post", embedding_norm=True),
    replace(SMALL, activation="swiglu", norm_kind="rms", bias=False, embedding_dim=4),
    replace(SMALL, share_layers=True, pooling="bert", activation="relu", final_norm=False),
    replace(SMALL, causal=True, positions="sinusoidal", activation="gelu_tanh", pooling="last"),
]


@pytest.mark.parametrize("transform", [False, True])
@pytest.mark.parametrize("config", CONFIGS)
def test_gradients_reach_every_parameter(config, transform):
    encoder = build(replace(config, dropout=0.1)).train()
    head = VocabularyHead(encoder, transform=transform)
    segments = torch.tensor([[0, 0, 0, 1, 1, 1]]).repeat(2, 1)
    with isolated():
        seed_layers(0, "dropout")
        features = encoder({"tokens": random_tokens(2, 6), "segments": segments})
    logits = head(features.last.flatten(0, 1), encoder.embedding)
    (logits.logsumexp(-1).sum() + features.pooled.square().sum()).backward()
    for name, parameter in [*encoder.named_parameters(), *head.named_parameters()]:
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_initial_weights_have_the_published_spread():
    encoder = build(Config(dim=128, layers=8, heads=2, init_std=0.02))
    assert encoder.layers[0].attention.qkv.weight.std().item() == pytest.approx(0.02, rel=0.02)
    residual = 0.02 / math.sqrt(16)
    assert encoder.layers[3].attention.out.weight.std().item() == pytest.approx(residual, rel=0.02)
    assert encoder.layers[3].feedforward.down.weight.std().item() == pytest.approx(
        residual, rel=0.02
    )
    assert not encoder.layers[0].attention.qkv.bias.any()
    post = build(Config(dim=128, layers=8, heads=2, init_std=0.02, norm="post"))
    assert post.layers[3].attention.out.weight.std().item() == pytest.approx(0.02, rel=0.02)


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_embedding_std_is_the_spread_of_what_enters_the_stack(positions):
    config = Config(dim=64, layers=1, heads=2, embedding_std=1.0, positions=positions)
    encoder = build(config, Vocabulary(size=500))
    tokens = torch.arange(500).view(1, 500)
    parts = 2 if positions == "learned" else 1  # a sum of independent vectors
    entering = encoder({"tokens": tokens}).hidden[0]
    assert entering.var().item() == pytest.approx(parts, rel=0.05)
    assert encoder.embedding.tokens.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_absent_segments_mean_sentence_a():
    embedding = TokenEmbedding(50, 8, segment_types=2)
    tokens = random_tokens(2, 3)
    zeros = torch.zeros_like(tokens)
    absent, first, second = (
        embedding.vectors({"tokens": tokens, **segments})
        for segments in ({}, {"segments": zeros}, {"segments": zeros + 1})
    )
    assert torch.equal(absent, first)
    assert not torch.equal(first, second)


# Precision and compilation


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("positions", [*POSITIONS, "relative"])
@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        *itertools.product([{}, {"experts": 2}], ["mean", "cls", "last", "bert"]),
        *itertools.product([{"norm": "pre", "causal": True}], ["mean", "last"]),
    ],
)
def test_a_last_layer_of_some_slots_gives_what_the_whole_one_gives(
    config, positions, pooling, side
):
    encoder = build(replace(SMALL, positions=positions, pooling=pooling, **config))
    batch = {"tokens": random_tokens(2, 7)}
    if side is not None:
        batch = pad([random_tokens(7), random_tokens(3)], side)
    slots = torch.tensor([[5, 0, 6], [3, 6, 0]])
    whole, some = encoder(batch), encoder(batch, slots=slots)
    close(some.last, whole.last.take_along_dim(slots.unsqueeze(2), 1))
    assert torch.equal(some.mask, whole.mask.gather(1, slots))
    close(encoder.pooled(batch), whole.pooled)


def test_a_last_layer_of_some_slots_gives_the_same_gradients():
    whole, some = build(SMALL), build(SMALL)
    tokens, slots = random_tokens(2, 7), torch.tensor([[5, 0], [3, 6]])
    whole({"tokens": tokens}).last.take_along_dim(slots.unsqueeze(2), 1).square().sum().backward()
    some({"tokens": tokens}, slots=slots).last.square().sum().backward()
    for (name, one), other in zip(whole.named_parameters(), some.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=1e-4, msg=name)


@pytest.mark.parametrize("config", CONFIGS)
def test_bf16_autocast_stays_close_to_float32(config):
    encoder = build(replace(config, init_std=0.1))  # larger weights: scores that saturate, and jump
    head = VocabularyHead(encoder, transform=True)
    batch = pad([random_tokens(7), random_tokens(3)], "right")
    expected = head(encoder(batch).last, encoder.embedding)
    with torch.autocast("cpu", torch.bfloat16):
        got = head(encoder(batch).last, encoder.embedding)
    assert got.isfinite().all()
    assert (got - expected).norm() / expected.norm() < 0.03


def test_dropout_acts_only_in_training():
    encoder = build(replace(SMALL, dropout=0.5))
    batch = {"tokens": random_tokens(2, 5)}
    assert torch.equal(encoder(batch).last, encoder(batch).last)
    encoder.train()
    with isolated():
        seed_layers(0, "dropout")
        first, second = encoder(batch).last, encoder(batch).last
    assert not torch.equal(first, second)


# Configuration


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dim": 10, "heads": 4}, "dim = 10 is not a multiple of heads = 4"),
        ({"dim": 12, "heads": 4}, "must be even, got 3"),
        ({"layers": 0}, "layers must be above 0, got 0"),
        ({"segment_types": -1}, "segment_types must not be negative"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"attention_dropout": -0.1}, "attention_dropout must be in"),
        ({"positions": "sinusoidal", "embedding_dim": 7}, "even embedding width, got 7"),
        ({"causal": True, "pooling": "cls"}, "pooling = 'cls' reads the first token"),
        ({"rotary_base": 0.5}, "rotary_base must be above 1"),
    ],
)
def test_contradictions_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        from_mapping(Config, values, "model")


def test_swiglu_keeps_the_parameter_budget():
    config = Config(dim=768, heads=12, activation="swiglu")
    assert config.feedforward_width == 2048
    assert replace(config, feedforward_dim=100).feedforward_width == 100
    assert replace(config, activation="gelu").feedforward_width == 3072


PUBLISHED = {  # millions of parameters, pooler and tied table included
    "bert-tiny": (30522, 4.386),
    "bert-mini": (30522, 11.17),
    "bert-small": (30522, 28.76),
    "bert-medium": (30522, 41.37),
    "bert-base": (30522, 109.5),
    "bert-large": (30522, 335.1),
    "gpt2-small": (50257, 124.4),
    "gpt2-medium": (50257, 354.8),
    "gpt2-large": (50257, 774.0),
    "gpt2-xl": (50257, 1557.6),
    # without RoBERTa's pooler and its two unused positions, and ELECTRA's head
    "roberta-base": (50265, 124.05),
    "albert-base": (30000, 11.68),
    "albert-large": (30000, 17.68),
    "electra-small": (30522, 13.48),
    "megatron-8b": (51200, 8317.0),
    "turing-nlg-17b": (50257, 17176.8),
    "gpt3-175b": (50257, 174604.3),
}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_and_has_the_published_size(name):
    config = from_mapping(Config, preset_values("transformer", name), "model")
    assert from_mapping(Config, to_mapping(config), "model") == config
    assert presets()["transformer"][name]["summary"]
    size, millions = PUBLISHED.get(name, (8192, None))
    with torch.device("meta"):
        encoder = TransformerEncoder(config, Vocabulary(size=size))
    if millions is not None:
        assert count(encoder) / 1e6 == pytest.approx(millions, rel=0.003)


def test_every_published_size_has_a_preset():
    assert set(PUBLISHED) <= set(PRESETS)


COMPILES = """
import torch
from selfsup.batch import Vocabulary
from selfsup.models.transformer import Config, TransformerEncoder
config = Config(dim=16, layers=2, heads=2, dropout=0.0, causal={causal})
encoder = TransformerEncoder(config, Vocabulary(size=40)).eval()
compiled = torch.compile(encoder, backend="eager", fullgraph=True)
tokens = torch.arange(12).view(2, 6) + 5
mask = torch.tensor([[True] * 6, [True] * 3 + [False] * 3])
padded = dict(tokens=tokens, mask=mask)
for batch in (dict(tokens=tokens), padded, dict(padded, documents=tokens // 9)):
    torch.testing.assert_close(compiled(batch).last, encoder(batch).last)
slots = torch.tensor([[4, 1], [0, 2]])
some = compiled(padded, slots=slots).last
torch.testing.assert_close(some, encoder(padded, slots=slots).last)
"""


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
def test_compiles_without_a_graph_break(causal):
    """In a process of its own: the shape checks of the tests cannot be traced."""
    command = [sys.executable, "-c", COMPILES.format(causal=causal)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
