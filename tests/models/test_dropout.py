"""Dropout: its rate, its scale, its gradient, and attention with it against torch's."""

import pytest
import torch
import torch.nn.functional as F

from selfsup.models.attention import mix
from selfsup.models.dropout import Dropout, dropout
from selfsup.models.view import past


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
def test_each_element_is_dropped_with_the_rate_and_the_mean_stays(p):
    torch.manual_seed(0)
    count = 1_000_000
    out = dropout(torch.ones(count), p)
    error = 5 * (p * (1 - p) / count) ** 0.5
    assert (out == 0).float().mean().item() == pytest.approx(p, abs=error)
    kept = out[out != 0]
    assert kept.unique().numel() == 1
    assert kept[0].item() == pytest.approx(1 / (1 - p), rel=1e-4)


def test_elements_fall_independently_within_and_between_words():
    torch.manual_seed(0)
    gone = (dropout(torch.ones(400_000), 0.3) == 0).double()
    for distance in (1, 2, 3, 4, 8):
        together = (gone[distance:] * gone[:-distance]).mean().item()
        assert together == pytest.approx(0.09, abs=0.003)


def test_the_gradient_is_that_of_what_was_kept():
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    out = dropout(x, 0.4)
    out.sum().backward()
    torch.testing.assert_close(x.grad, (out / x).detach())


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_the_ends_keep_all_or_nothing(p):
    assert torch.equal(dropout(torch.ones(9), p), torch.ones(9) * (1 - p))


def test_a_seed_gives_the_same_elements_and_evaluation_gives_all():
    layer = Dropout(0.5)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(layer(torch.ones(3, 50)))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert torch.equal(layer.eval()(torch.ones(3)), torch.ones(3))


@pytest.mark.parametrize("seen", ["all", "past", "some", "numbers"])
def test_attention_without_a_dropped_weight_is_that_of_torch(seen):
    torch.manual_seed(0)
    queries, keys, values = torch.randn(3, 2, 4, 6, 8, dtype=torch.float64)
    allowed = None
    if seen == "some":
        allowed = past(6, 6, queries.device) & (torch.arange(6) != 3) | torch.eye(6).bool()
    if seen == "numbers":
        allowed = torch.randn(1, 4, 6, 6, dtype=torch.float64)
    found = mix(queries, keys, values, allowed, seen == "past", rate=1e-9)
    expected = F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=allowed, is_causal=seen == "past"
    )
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_attention_drops_weights_and_keeps_their_mean():
    torch.manual_seed(0)
    queries, keys = torch.zeros(2, 64, 4, 50, 2)
    values = torch.ones(64, 4, 50, 2)
    found = mix(queries, keys, values, None, causal=False, rate=0.3)
    assert found.mean().item() == pytest.approx(1, abs=0.01)
    assert found.std().item() == pytest.approx((0.3 / 0.7 / 50) ** 0.5, rel=0.1)
