"""Product quantization: against `transformers` number for number, its draws and its gradients."""

import math

import pytest
import torch
from torch import Tensor

from selfsup.models.product_quantizer import (
    ProductQuantizer,
    group_perplexities,
    straight_through_choice,
)
from selfsup.randomness import isolated, seed_layers, torch_generator


def build(**options) -> ProductQuantizer:
    with isolated():
        seed_layers(0, "model")
        return ProductQuantizer(**({"width": 6, "dim": 8, "groups": 2, "num_codes": 5} | options))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch_generator(seed, "noise"))


def their_quantizer(ours: ProductQuantizer):
    from transformers import Wav2Vec2Config
    from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2GumbelVectorQuantizer

    config = Wav2Vec2Config(
        num_codevector_groups=2,
        num_codevectors_per_group=5,
        codevector_dim=8,
        conv_dim=(6,),
        conv_kernel=(1,),
        conv_stride=(1,),
        num_feat_extract_layers=1,
    )
    theirs = Wav2Vec2GumbelVectorQuantizer(config)
    theirs.weight_proj.load_state_dict(ours.logits.state_dict())
    theirs.codevectors.data = ours.codebooks.detach().reshape(1, 10, 4).clone()
    return theirs


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("temperature", [2.0, 0.5])
def test_vectors_and_gradients_equal_those_of_transformers(training: bool, temperature: float):
    ours = build(temperature=temperature).train(training)
    with isolated():
        theirs = their_quantizer(ours).train(training)
        theirs.temperature = temperature
        vectors, weight = noise(3, 7, 6), noise(3, 7, 8, seed=1)
        mask = noise(3, 7, seed=2) > 0
        torch.manual_seed(5)
        expected, perplexity = theirs(vectors, mask)
    out = ours(vectors, torch.Generator().manual_seed(5))
    torch.testing.assert_close(out.vectors, expected, rtol=0, atol=1e-6)
    if training:
        share = out.probability[mask].mean(0)
        assert group_perplexities(share).sum().item() == pytest.approx(perplexity.item(), rel=1e-5)
    (out.vectors * weight).sum().backward()
    (expected * weight).sum().backward()
    pairs = [(ours.codebooks.grad.reshape(1, 10, 4), theirs.codevectors.grad)]
    if training:
        pairs.append((ours.logits.weight.grad, theirs.weight_proj.weight.grad))
    for got, wanted in pairs:
        assert wanted.abs().max() > 0
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


def test_vectors_are_the_codes_of_the_groups_one_behind_the_other():
    quantizer = build().train()
    out = quantizer(noise(9, 6), torch_generator(0, "codes"))
    for row in range(9):
        first, second = out.codes[row].tolist()
        expected = torch.cat([quantizer.codebooks[0, first], quantizer.codebooks[1, second]])
        torch.testing.assert_close(out.vectors[row], expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(out.probability.sum(-1), torch.ones(9, 2))
    assert len(out.codes.unique()) > 2


def test_choices_are_drawn_from_the_softmax_whatever_the_temperature():
    logits = torch.tensor([0.0, 1.0, -1.0, 0.5])
    probability = logits.softmax(0)
    for temperature in (0.1, 5.0):
        many = logits.expand(20_000, 4)
        drawn = straight_through_choice(many, torch.tensor(temperature), torch_generator(0, "draw"))
        share = drawn.round().mean(0)
        deviation = (probability * (1 - probability) / 20_000).sqrt()
        assert ((share - probability).abs() < 4 * deviation).all()


def test_evaluation_takes_the_largest_logit_and_draws_nothing():
    quantizer, vectors = build().eval(), noise(4, 3, 6)
    generator = torch_generator(0, "codes")
    before = generator.get_state()
    out = quantizer(vectors, generator)
    assert torch.equal(generator.get_state(), before)
    logits = quantizer.logits(vectors).unflatten(-1, (2, 5))
    assert torch.equal(out.codes, logits.argmax(-1))
    torch.testing.assert_close(out.probability, logits.softmax(-1))


def test_choices_are_made_in_float32_under_autocast():
    quantizer, vectors = build().train(), noise(20, 6)
    expected = quantizer(vectors, torch_generator(0, "codes"))
    with torch.autocast("cpu", torch.bfloat16):
        got = quantizer(vectors, torch_generator(0, "codes"))
    for ours, wanted in zip(got, expected, strict=True):
        assert torch.equal(ours, wanted)


def test_perplexity_counts_the_codes_in_use():
    share = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.0, 1.0, 0.0, 0.0], [0.5, 0.25, 0.25, 0.0]])
    expected = [4, 1, math.exp(0.5 * math.log(2) + 0.5 * math.log(4))]
    assert group_perplexities(share).tolist() == pytest.approx(expected)
    share = torch.zeros(2, 3).requires_grad_()  # where nothing was chosen
    group_perplexities(share).sum().backward()
    assert share.grad.isfinite().all()


def test_temperature_is_saved():
    quantizer = build()
    quantizer.temperature.fill_(0.7)
    other = build()
    other.load_state_dict(quantizer.state_dict())
    assert other.temperature == quantizer.temperature
