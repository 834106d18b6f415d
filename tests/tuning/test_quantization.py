"""Int8 weights: the rounding by hand, close outputs, a quarter of the memory, no training."""

import copy

import pytest
import torch
from torch import nn

import selfsup
from selfsup.batch import ImageSpec, Vocabulary
from selfsup.errors import ConfigError
from selfsup.models import resnet
from selfsup.models.transformer import Config, TransformerEncoder
from selfsup.randomness import isolated, seed_layers, torch_generator
from selfsup.tuning.pruning import prune_heads
from selfsup.tuning.quantization import Int8Linear, quantized, stored_bytes, to_int8

TOKENS = torch.randint(0, 30, (4, 9), generator=torch_generator(0, "tokens"))


@pytest.fixture(autouse=True)
def without_gradient():
    with torch.no_grad():
        yield


def layer(bias=True, inputs=16, outputs=8):
    with isolated():
        seed_layers(0, "layer")
        return nn.Linear(inputs, outputs, bias=bias)


def encoder(**keys):
    with isolated():
        seed_layers(0, "model")
        shape = Config(dim=64, layers=2, heads=4, init_std=0.2, **keys)
        return TransformerEncoder(shape, Vocabulary(size=30)).eval()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_int8_equals_products_of_rounded_numbers(bias, packed):
    plain = layer(bias)
    found = Int8Linear(plain, packed)
    x = torch.randn(3, 5, 16, generator=torch_generator(0, "x"))
    assert found.weight.dtype == torch.int8
    assert found.weight.abs().amax(1).tolist() == [127] * 8
    weight = found.weight.double() * found.scale.double().unsqueeze(1)
    assert ((weight - plain.weight).abs() <= 0.5001 * found.scale.unsqueeze(1)).all()
    if packed:  # 7 bits from the least to the greatest, as sums of two products need 16 bits
        step = (x.max() - x.min()).double() / 127
    else:
        step = x.double().abs().amax(-1, keepdim=True) / 127
    rounded = (x.double() / step).round() * step
    expected = rounded @ weight.T + (0 if plain.bias is None else plain.bias)
    # the kernel's zero is rounded too, so a number in the middle of two steps may go to either
    near = step.item() * 0.3 if packed else 1e-5
    torch.testing.assert_close(found(x).double(), expected, rtol=0, atol=near)
    assert 0 < (found(x) - plain(x)).abs().max() < 0.05


def test_row_by_row_a_row_does_not_depend_on_its_neighbours():
    found = Int8Linear(layer(), packed=False)
    x = torch.randn(3, 16, generator=torch_generator(0, "x"))
    x[1] *= 100
    assert torch.equal(found(x)[0], found(x[:1])[0])


def test_an_encoder_computes_nearly_the_same():
    plain, small = encoder(), encoder()
    to_int8(small)
    a, b = plain({"tokens": TOKENS}).last, small({"tokens": TOKENS}).last
    assert 0 < (a - b).norm() / a.norm() < 0.08
    assert sum(isinstance(part, Int8Linear) for part in small.modules()) == 2 * 4
    assert type(small.embedding.tokens) is nn.Embedding


def test_the_blocks_take_a_quarter():
    plain, small = encoder(), encoder()
    to_int8(small)
    matrices = sum(
        part.weight.numel() for part in plain.layers.modules() if isinstance(part, nn.Linear)
    )
    outputs = sum(
        part.out_features for part in plain.layers.modules() if isinstance(part, nn.Linear)
    )
    assert stored_bytes(plain) - stored_bytes(small) == 3 * matrices - 4 * outputs


def test_a_copy_and_a_reload_compute_the_same():
    small, other = encoder(), encoder()
    to_int8(small)
    expected = small({"tokens": TOKENS}).last
    assert torch.equal(copy.deepcopy(small)({"tokens": TOKENS}).last, expected)
    for part in other.parameters():
        part.mul_(0.5)
    to_int8(other)
    assert not torch.equal(other({"tokens": TOKENS}).last, expected)
    other.load_state_dict(small.state_dict())
    assert torch.equal(other({"tokens": TOKENS}).last, expected)


def test_pruned_layers_and_experts_are_quantized_too():
    pruned = encoder()
    prune_heads(pruned, {0: [0, 1, 2, 3], 1: [2]})
    routed = encoder(experts=2, activation="relu")
    for small in (pruned, routed):
        before = small({"tokens": TOKENS}).last
        to_int8(small)
        after = small({"tokens": TOKENS}).last
        assert torch.isfinite(after).all()
        assert type(small.layers[1].attention.qkv) is Int8Linear
        if small is pruned:
            assert (after - before).norm() / before.norm() < 0.05
    assert type(routed.layers[1].feedforward.up) is nn.Linear


def test_a_model_answers_as_before(tuned_run, corpus):
    model = selfsup.load(tuned_run)
    small = quantized(model)
    texts = [line.rpartition(",")[0] for line in corpus.test.read_text().splitlines()[1:]]
    assert small.predict(texts) == model.predict(texts)
    shares = [torch.tensor(m.predict_proba(texts)[0]) for m in (small, model)]
    assert 0 < (shares[0] - shares[1]).abs().max() < 0.05
    assert all(p.dtype == torch.float32 for p in model.objective.parameters())
    assert not any(isinstance(part, Int8Linear) for part in model.encoder.modules())


def test_int8_cannot_be_trained():
    small = Int8Linear(layer())
    assert list(small.parameters()) == []
    with (
        torch.enable_grad(),
        pytest.raises(ConfigError, match="inference alone: train the float32 run"),
    ):
        small(torch.ones(1, 16, requires_grad=True))


def test_only_transformer_blocks_become_int8():
    spec = ImageSpec(size=8, channels=1, mean=(0.5,), std=(0.5,))
    other = resnet.ResNetEncoder(resnet.Config(blocks=(1,), widths=(4,)), spec)
    with pytest.raises(ConfigError, match="ResNetEncoder has no transformer blocks"):
        to_int8(other)
