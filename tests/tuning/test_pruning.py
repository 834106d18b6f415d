"""Heads, units and layers cut out: equal to masking them, worth what a slow loop says, kept."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from selfsup.batch import ImageSpec, Vocabulary
from selfsup.errors import ConfigError
from selfsup.models import resnet
from selfsup.models.encoder_decoder import TransformerDecoder
from selfsup.models.transformer import Config, TransformerEncoder
from selfsup.models.view import Cache, Memory, View
from selfsup.randomness import isolated, seed_layers, torch_generator
from selfsup.tasks import classification, tagging
from selfsup.tuning.importance import head_importance, least_important, unit_importance
from selfsup.tuning.pruning import layers_to_drop, prune_heads, prune_layers, prune_units

SPEC = Vocabulary(size=40)
SMALL = Config(dim=12, layers=3, heads=3, dropout=0.1, init_std=0.4, relative_buckets=8)
HEADS = {0: [1], 1: [0, 2], 2: [0, 1, 2]}
BATCH = {
    "tokens": torch.randint(0, 40, (4, 7), generator=torch_generator(0, "tokens")),
    "mask": torch.arange(7) < torch.tensor([7, 5, 3, 6]).unsqueeze(1),
    "label": torch.tensor([0, 1, 1, 0]),
}
LAYOUTS = {
    "rotary": {},
    "relative": {"positions": "relative"},
    "causal relative": {"positions": "relative", "causal": True},
    "learned, no bias": {"positions": "learned", "bias": False},
    "post-norm": {"norm": "post", "positions": "sinusoidal"},
    "wide heads": {"head_width": 6},
}


def build(kind=TransformerEncoder, spec=SPEC, **keys):
    """An encoder whose biases are not 0 either."""
    with isolated():
        seed_layers(0, "model")
        encoder = kind(replace(SMALL, **keys), spec).eval()
    for number, (name, parameter) in enumerate(encoder.named_parameters()):
        if name.endswith("bias"):
            nn.init.normal_(parameter, generator=torch_generator(0, "bias", number))
    return encoder


def classifier(encoder):
    config = classification.Config(dropout=0.5)
    with isolated():
        seed_layers(0, "head")
        return classification.Classification(config, encoder, ("a", "b"))


def masked_heads(encoder, heads):
    """The outputs of `heads` are multiplied by 0 before they are mixed."""
    width = encoder.config.head_dim
    for layer, numbers in heads.items():
        mask = torch.ones(encoder.config.heads, width)
        mask[list(numbers)] = 0
        out = encoder.layers[layer].attention.out
        out.register_forward_pre_hook(lambda _, x, mask=mask: (x[0] * mask.flatten(),))
    return encoder


def same(got, expected):
    assert len(got.hidden) == len(expected.hidden)
    for a, b in zip(got.hidden, expected.hidden, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def rebuilt(encoder):
    """Another encoder of the same `Config` with the same weights, as loading builds it."""
    out = type(encoder)(encoder.config, encoder.spec).eval()
    out.load_state_dict(encoder.state_dict())
    return out


# Heads


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pruned_heads_equal_masked_heads(layout):
    whole, pruned = (build(**LAYOUTS[layout]) for _ in range(2))
    before = sum(p.numel() for p in pruned.parameters())
    prune_heads(pruned, HEADS)
    same(pruned(BATCH), masked_heads(whole, HEADS)(BATCH))
    assert (pruned(BATCH).last - build(**LAYOUTS[layout])(BATCH).last).abs().max() > 1e-2
    assert pruned.config.heads_left == (2, 1, 0)
    config = pruned.config
    of_head = (4 * config.dim + 3 * config.bias) * config.head_dim
    assert sum(p.numel() for p in pruned.parameters()) == before - 6 * of_head


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_encoder_built_anew_from_the_pruned_config_computes_the_same(layout):
    pruned = build(**LAYOUTS[layout])
    prune_heads(pruned, HEADS)
    prune_units(pruned, {0: range(48), 2: [5]})
    for a, b in zip(rebuilt(pruned)(BATCH).hidden, pruned(BATCH).hidden, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("layout", ["rotary", "causal relative"])
def test_pruning_twice_equals_pruning_at_once(layout):
    once, twice = (build(**LAYOUTS[layout]) for _ in range(2))
    prune_heads(once, {0: [0, 1], 2: [2]})
    prune_heads(twice, {0: [0]})
    prune_heads(twice, {0: [0], 2: [2]})  # head 1 of before
    assert once.config == twice.config
    for a, b in zip(once(BATCH).hidden, twice(BATCH).hidden, strict=True):
        assert torch.equal(a, b)


def test_pruning_nothing_changes_nothing():
    encoder, whole = build(), build()
    prune_heads(encoder, {0: []})
    prune_units(encoder, {})
    assert encoder.config == SMALL
    assert torch.equal(encoder(BATCH).last, whole(BATCH).last)


def test_an_attention_without_heads_gives_its_bias():
    encoder = build()
    prune_heads(encoder, {1: [0, 1, 2]})
    attention = encoder.layers[1].attention
    out = attention(torch.ones(2, 3, 12), View(None, None, False, None), 1)
    assert torch.equal(out, attention.out.bias.expand(2, 3, 12))


def test_a_cache_gives_what_reading_at_once_gives():
    encoder = build(causal=True, positions="relative")
    prune_heads(encoder, {0: [1], 1: [0, 1, 2]})
    tokens = BATCH["tokens"]
    cache = Cache()
    parts = [encoder({"tokens": tokens[:, a:b]}, cache).last for a, b in ((0, 4), (4, 5), (5, 7))]
    whole = encoder({"tokens": tokens}).last
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-5)


def test_cross_attention_is_left_whole():
    whole, pruned = (build(TransformerDecoder, causal=True, pooling="last") for _ in range(2))
    before = {k: v for k, v in pruned.state_dict().items() if "cross" in k}
    prune_heads(pruned, HEADS)
    after = pruned.state_dict()
    assert before
    assert all(torch.equal(after[name], value) for name, value in before.items())
    vectors = torch.randn(2, 5, 12, generator=torch_generator(0, "vectors"))
    memory = Memory(torch.randn(2, 4, 12, generator=torch_generator(0, "memory")), None)
    batch = {"tokens": BATCH["tokens"][:2, :5]}
    masked_heads(whole, HEADS)
    same(pruned(batch, None, vectors, memory), whole(batch, None, vectors, memory))


def test_a_shared_layer_loses_its_heads_everywhere():
    whole, pruned = (build(share_layers=True) for _ in range(2))
    prune_heads(pruned, {0: [0]})
    same(pruned(BATCH), masked_heads(whole, {0: [0]})(BATCH))
    assert pruned.config.heads_left == (2,)
    assert pruned.num_layers == 3


def test_a_pruned_encoder_trains_and_keeps_what_was_frozen():
    encoder = build()
    encoder.layers[0].requires_grad_(False)
    prune_heads(encoder, HEADS)
    task = classifier(encoder).train()
    task.loss(BATCH, torch_generator(0, "loss")).loss.backward()
    assert encoder.layers[0].attention.qkv.weight.grad is None
    for name in ("qkv", "out"):
        assert getattr(encoder.layers[1].attention, name).weight.grad.abs().sum() > 0
    torch.optim.AdamW(task.parameters(), fused=True).step()
    assert torch.isfinite(task.loss(BATCH, torch_generator(0, "loss")).loss)


# Units


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("bias", [True, False])
def test_pruned_units_equal_masked_units(activation, bias):
    whole, pruned = (build(activation=activation, bias=bias) for _ in range(2))
    width = pruned.config.feedforward_width
    units = {0: [0, 5, width - 1], 1: range(width)}
    prune_units(pruned, units)
    for layer, numbers in units.items():
        mask = torch.ones(width)
        mask[list(numbers)] = 0
        down = whole.layers[layer].feedforward.down
        down.register_forward_pre_hook(lambda _, x, mask=mask: (x[0] * mask,))
    same(pruned(BATCH), whole(BATCH))
    assert pruned.config.feedforward_left == (width - 3, 0, width)


# Layers


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_dropped_layers_equal_layers_that_do_nothing(norm):
    class Nothing(nn.Module):
        def forward(self, x, view, layer):
            return x, None

    whole, pruned = build(norm=norm), build(norm=norm)
    for encoder in (whole, pruned):
        prune_heads(encoder, {1: [0]})
    prune_layers(pruned, [0])
    whole.layers[0] = Nothing()
    assert torch.equal(pruned(BATCH).last, whole(BATCH).last)
    assert torch.equal(pruned(BATCH).pooled, whole(BATCH).pooled)
    assert (pruned.num_layers, len(pruned(BATCH).hidden)) == (2, 3)
    assert pruned.config.heads_left == (2, 3)
    assert torch.equal(rebuilt(pruned)(BATCH).last, pruned(BATCH).last)


def test_the_layer_that_lost_heads_may_go():
    encoder = build()
    prune_heads(encoder, {2: [0]})
    prune_layers(encoder, [2])
    assert encoder.config == replace(SMALL, layers=2)


def test_a_shared_layer_is_used_less_often():
    encoder = build(share_layers=True)
    expected = build(share_layers=True)(BATCH).hidden
    prune_layers(encoder, [0, 2])
    hidden = encoder(BATCH).hidden
    assert len(hidden) == 2
    torch.testing.assert_close(hidden[1], encoder.final_norm(expected[1]))


def test_which_layers_a_strategy_drops():
    assert layers_to_drop("alternate", 3, 5) == [0, 2, 4]
    assert layers_to_drop("top", 11, 12) == list(range(1, 12))
    for strategy, count in (("top", 3), ("alternate", 3), ("bottom", 0)):
        with pytest.raises(ConfigError, match=rf"of 3 layers, 1 to 2 .*{strategy}.*got {count}"):
            layers_to_drop(strategy, count, 3)
    with pytest.raises(ConfigError, match="unknown strategy 'tops'; did you mean 'top'"):
        layers_to_drop("tops", 1, 3)


# Importance


def exact_loss(task, batch):
    """The loss of one example in float64; the task itself computes the last steps in float32."""
    features = task.encoder(batch)
    vector = features.last[0, features.mask[0]].mean(0)
    logits = task.head.weight.double() @ vector + task.head.bias.double()
    return -logits.log_softmax(0)[batch["label"][0]].item()


def slow_importance(task, end, parts, width, epsilon=1e-5):
    """|d loss / d mask| by central differences, example by example, mask by mask."""
    out = torch.zeros(parts)
    for part in range(parts):
        for example in range(4):
            one = {name: value[example : example + 1] for name, value in BATCH.items()}
            losses = []
            for value in (1 + epsilon, 1 - epsilon):
                mask = torch.ones(parts, width, dtype=torch.float64)
                mask[part] = value
                hook = end.register_forward_pre_hook(
                    lambda _, x, mask=mask: (x[0] * mask.flatten(),)
                )
                losses.append(exact_loss(task, one))
                hook.remove()
            out[part] += abs(losses[0] - losses[1]) / (2 * epsilon) / 4
    return out


@pytest.mark.parametrize("of", ["heads", "units"])
def test_importance_equals_a_slow_loop_over_masks(of):
    task = classifier(build(positions="relative", layers=2, feedforward_dim=4)).eval()
    prune_heads(task.encoder, {1: [1]})
    task.encoder.double()
    measure = head_importance if of == "heads" else unit_importance
    batches = [{k: v[:3] for k, v in BATCH.items()}, {k: v[3:] for k, v in BATCH.items()}]
    found = measure(task, batches, normalise=False)
    for layer, block in enumerate(task.encoder.layers):
        parts = (3, 2)[layer] if of == "heads" else 4
        end = block.attention.out if of == "heads" else block.feedforward.down
        expected = slow_importance(task, end, parts, end.in_features // parts)
        torch.testing.assert_close(found[layer, :parts], expected, rtol=1e-4, atol=1e-6)
        assert found[layer, parts:].isnan().all()


def test_importance_of_tags_counts_every_word():
    with isolated():
        seed_layers(0, "head")
        task = tagging.Tagging(tagging.Config(), build(), ("x", "y", "z"))
    words = torch.where(BATCH["mask"], torch.arange(7).expand(4, 7), -1)
    label = torch.where(BATCH["mask"], BATCH["tokens"] % 3, -100)
    batch = {**BATCH, "words": words, "label": label}
    whole = head_importance(task, [batch])
    one_by_one = [{name: value[i : i + 1] for name, value in batch.items()} for i in range(4)]
    torch.testing.assert_close(whole, head_importance(task, one_by_one), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(whole.norm(dim=1), torch.ones(3))


def test_importance_leaves_the_task_as_it_was():
    task = classifier(build()).train()
    before = {name: value.clone() for name, value in task.state_dict().items()}
    first, second = (head_importance(task, [BATCH]) for _ in range(2))
    assert torch.equal(first, second)  # without dropout
    assert task.training
    assert all(torch.equal(before[name], value) for name, value in task.state_dict().items())
    assert all(p.grad is None for p in task.parameters())
    assert not any(layer.attention.out._forward_pre_hooks for layer in task.encoder.layers)


def test_a_head_that_nobody_reads_is_worth_nothing_and_goes_first():
    task = classifier(build())
    with torch.no_grad():
        task.encoder.layers[1].attention.out.weight[:, 4:8] = 0
    importance = head_importance(task, [BATCH], normalise=False)
    assert importance[1, 1] == 0
    assert (importance > 0).sum() == 8
    assert least_important(importance, 1 / 9) == {1: [1]}
    assert least_important(importance, 0) == {}
    assert sum(map(len, least_important(importance, 1).values())) == 9


# Bad input


@pytest.mark.parametrize(
    ("prune", "message"),
    [
        (lambda e: prune_heads(e, {3: [0]}), "no layer 3: the layers are 0 to 2"),
        (lambda e: prune_heads(e, {0: [3]}), "layer 0 has no head 3: it has 3"),
        (lambda e: prune_heads(e, {0: [-1]}), "layer 0 has no head -1"),
        (lambda e: prune_units(e, {0: [48]}), "layer 0 has no unit 48: it has 48"),
        (lambda e: prune_layers(e, [3]), "no layer 3: the layers are 0 to 2"),
        (lambda e: prune_layers(e, [0, 1, 2]), "all 3 layers would be dropped"),
        (lambda e: head_importance(classifier(e), []), "labelled examples"),
        (lambda e: least_important(torch.ones(2, 2), 1.5), r"must lie in \[0, 1\], got 1.5"),
    ],
)
def test_what_is_not_there_cannot_be_pruned(prune, message):
    encoder = build()
    before = encoder.config
    with pytest.raises(ConfigError, match=message):
        prune(encoder)
    assert encoder.config == before


def test_only_transformers_are_pruned():
    spec = ImageSpec(size=8, channels=1, mean=(0.5,), std=(0.5,))
    encoder = resnet.ResNetEncoder(resnet.Config(blocks=(1,), widths=(4,)), spec)
    for prune in (lambda: prune_heads(encoder, {0: [0]}), lambda: prune_layers(encoder, [0])):
        with pytest.raises(ConfigError, match="ResNetEncoder cannot be pruned: only a transformer"):
            prune()


def test_experts_stay_whole():
    encoder = build(experts=2, activation="relu")
    with pytest.raises(ConfigError, match="experts cannot be pruned; heads can"):
        prune_units(encoder, {0: [0]})
    with pytest.raises(ConfigError, match="no layer can be dropped"):
        prune_layers(encoder, [1])
    prune_heads(encoder, {0: [0]})
    assert torch.equal(rebuilt(encoder)(BATCH).last, encoder(BATCH).last)


@pytest.mark.parametrize(
    "keys",
    [
        {"heads_left": (3, 3)},
        {"heads_left": (3, 4, 3)},
        {"heads_left": (3, -1, 3)},
        {"feedforward_left": (49, 1, 1)},
        {"feedforward_left": (1, 1)},
        {"feedforward_left": (1, 1, 1), "experts": 2},
        {"heads_left": (3, 3, 3), "share_layers": True},
    ],
)
def test_a_config_says_how_much_is_left_of_every_layer(keys):
    with pytest.raises(ValueError, match=f"{next(iter(keys))} needs a .* got"):
        replace(SMALL, **keys)


def test_pictures_and_their_patches_are_pruned_alike():
    spec = ImageSpec(size=8, channels=1, mean=(0.5,), std=(0.5,))
    whole, pruned = (build(spec=spec) for _ in range(2))
    prune_heads(pruned, HEADS)
    batch = {"image": torch.rand(2, 1, 8, 8, generator=torch_generator(0, "image"))}
    same(pruned(batch), masked_heads(whole, HEADS)(batch))
