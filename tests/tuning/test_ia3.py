"""(IA)3: the factors worked out, gated and cross-attention layers, merging, also with others."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from selfsup.batch import Vocabulary
from selfsup.models import encoder_decoder
from selfsup.models.transformer import Config, TransformerEncoder
from selfsup.randomness import torch_generator
from selfsup.tasks import classification
from selfsup.tuning.choice import Tuning, tune
from selfsup.tuning.ia3 import OutputFactors
from selfsup.tuning.parts import OWN, Where, merge, trained

SHAPE = {"dim": 8, "layers": 2, "heads": 2, "dropout": 0.0}
BATCH = {"tokens": torch.tensor([[5, 7, 2, 9], [4, 3, 8, 8]]), "label": torch.tensor([0, 1])}


def classifier(encoder=None, **shape):
    torch.manual_seed(0)
    encoder = encoder or TransformerEncoder(Config(**SHAPE, **shape), Vocabulary(size=20))
    return classification.Classification(classification.Config(dropout=0.0), encoder, ("a", "b"))


def tuned(task, text="ia3", name=OWN):
    """As if it had been trained."""
    tune(task, Tuning.of(text), Where(name))
    for place, kind, part in task.encoder.additions.every(name):
        for parameter in part.parameters():
            draw = torch.rand(parameter.shape, generator=torch_generator(1, f"{name}{place}{kind}"))
            parameter.data = draw + (0.5 if kind == "ia3" else 0.0)
    return task


def test_keys_and_values_of_a_fused_projection():
    layer = nn.Linear(3, 6)
    part = OutputFactors(layer, 4)
    part.factors.data = torch.tensor([2.0, 3.0, 4.0, 5.0])
    x = torch.randn(2, 3, generator=torch_generator(0, "x"))
    expected = layer(x) * torch.tensor([1.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    assert torch.equal(part(x, layer(x)), expected)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_the_inner_activation_is_multiplied(activation):
    task = tuned(classifier(activation=activation))
    feedforward = task.encoder.layers[0].feedforward
    factors = task.encoder.additions[OWN]["layers/0/feedforward/down"]["ia3"].factors
    x = torch.randn(2, 4, 8, generator=torch_generator(0, "x"))
    inner = feedforward.up(x)
    if activation == "gelu":
        inner = F.gelu(inner)
    else:
        gate, inner = inner.chunk(2, -1)
        inner = F.silu(gate) * inner
    expected = F.linear(inner * factors, feedforward.down.weight, feedforward.down.bias)
    torch.testing.assert_close(feedforward(x), expected)


def test_it_begins_as_the_base_and_only_factors_and_the_head_learn():
    task = classifier()
    before = task.encoder(BATCH).last
    tune(task, Tuning.of("ia3"))
    assert torch.equal(task.encoder(BATCH).last, before)
    task.loss(BATCH, torch_generator(0, "loss")).loss.backward()
    moved = {name for name, p in task.named_parameters() if p.grad is not None}
    assert moved == {"head.weight", "head.bias"} | {
        f"encoder.additions.own.layers/{i}/{place}.ia3.factors"
        for i in (0, 1)
        for place in ("attention/qkv", "feedforward/down")
    }
    assert trained(task)[0] == 2 * (2 * 8 + 4 * 8) + 2 * 8 + 2


@pytest.mark.parametrize(
    ("text", "bias"),
    [
        *((text, True) for text in ("ia3", "lora+ia3", "ia3+lora", "bias+ia3+lora", "ia3+bias")),
        ("ia3", False),
    ],
)
def test_merging_changes_nothing_and_takes_the_parts_away(text, bias):
    options = {"lora": {"targets": ["all"]}} if "lora" in text else {}
    task = classifier(bias=bias).double()
    tune(task, Tuning.of(text, options))
    for place, kind, part in task.encoder.additions.every(OWN):
        for parameter in part.parameters():
            draw = torch.rand(parameter.shape, generator=torch_generator(1, f"{place}{kind}"))
            parameter.data = (draw + 0.5 if kind == "ia3" else draw / 4).double()
    before = task.encoder(BATCH).last
    merge(task.encoder)
    torch.testing.assert_close(task.encoder(BATCH).last, before)
    assert not list(task.encoder.additions)


def test_merging_and_unmerging_gives_the_weights_back():
    task = tuned(classifier())
    before = {name: value.clone() for name, value in task.encoder.state_dict().items()}
    for sign in (1, -1):
        for place, _, part in task.encoder.additions.every(OWN):
            part.merge(task.encoder.get_submodule(place.replace("/", ".")), sign)
        weight = task.encoder.layers[0].feedforward.down.weight
        assert (sign == 1) != torch.allclose(weight, before["layers.0.feedforward.down.weight"])
    for name, value in task.encoder.state_dict().items():
        torch.testing.assert_close(value, before[name])


def test_sets_in_one_batch(same_alone_and_mixed):
    task = tuned(tuned(classifier(), name="first"), name="second")
    same_alone_and_mixed(task, BATCH)


def test_a_decoder_has_factors_on_the_keys_and_values_of_the_source():
    model = encoder_decoder.EncoderDecoder(
        encoder_decoder.Config(**SHAPE), Vocabulary(size=20, sep=3)
    )
    written = torch.tensor([[3, 6], [3, 4]])
    task = tuned(classifier(model))
    factors = model.additions[OWN]["target/layers/1/cross/kv"]["ia3"].factors
    assert factors.shape == (16,)
    before = model.decode(written, model(BATCH)).last
    merge(model)
    torch.testing.assert_close(model.decode(written, model(BATCH)).last, before)
    assert task.encoder is model
