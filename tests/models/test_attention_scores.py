"""Attention scores: a naive attention with them gives what the kernel gave."""

from dataclasses import replace

import pytest
import torch

from selfsup.batch import Vocabulary
from selfsup.models.attention import Attention
from selfsup.models.attention_scores import attention_scores
from selfsup.models.transformer import Config, TransformerEncoder
from selfsup.randomness import isolated, seed_layers

MODEL = Config(dim=8, layers=3, heads=2, dropout=0.0, init_std=0.5)
TOKENS = torch.tensor([[5, 7, 2, 9, 1], [3, 4, 5, 0, 0]])
MASK = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
DOCUMENTS = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]])
BATCHES = {
    "plain": {"tokens": TOKENS},
    "padded": {"tokens": TOKENS, "mask": MASK},
    "packed": {"tokens": TOKENS, "documents": DOCUMENTS},
}


def build(**changes):
    with isolated():
        seed_layers(0, "model")
        return TransformerEncoder(replace(MODEL, **changes), Vocabulary(size=20, pad=0)).eval()


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("positions", ["rotary", "relative", "learned"])
def test_naive_attention_with_the_scores_equals_the_kernel(positions, causal, batch):
    encoder = build(positions=positions, causal=causal, share_layers=positions == "learned")
    seen = {}

    def keep(module, inputs, output):
        seen[inputs[2]] = inputs[0], output

    for layer in encoder.layers:
        layer.attention.register_forward_hook(keep)
    with attention_scores(encoder, range(3)) as scores:
        encoder(BATCHES[batch])
    assert scores.keys() == seen.keys() == {0, 1, 2}
    for number, (x, output) in seen.items():
        attention = encoder.layers[number % len(encoder.layers)].attention
        values = attention.qkv(x).chunk(3, -1)[2].unflatten(-1, (2, 4)).transpose(1, 2)
        mixed = scores[number].softmax(-1) @ values  # (batch, heads, time, head_dim)
        naive = attention.out(mixed.transpose(1, 2).flatten(2))
        torch.testing.assert_close(naive, output, rtol=0, atol=2e-6)


def test_only_the_layers_that_are_asked_for_and_no_hook_stays():
    encoder = build()
    expected = encoder(BATCHES["padded"]).last
    with attention_scores(encoder, [2]) as scores:
        got = encoder(BATCHES["padded"]).last
    assert scores.keys() == {2}
    assert torch.equal(got, expected)
    attentions = [part for part in encoder.modules() if isinstance(part, Attention)]
    assert len(attentions) == 3
    assert not any(part._forward_hooks for part in attentions)
    scores[2].isfinite().all()
    scores[2].masked_fill(scores[2].isinf(), 0.0).sum().backward()
    assert attentions[2].qkv.weight.grad.abs().max() > 0


def test_nothing_is_computed_where_nothing_is_asked_for():
    encoder = build()
    with attention_scores(encoder, []) as scores:
        encoder(BATCHES["plain"])
        assert not any(layer.attention._forward_hooks for layer in encoder.layers)
    assert scores == {}
