"""Experts against a slow loop over tokens, their room, and the loss that spreads tokens."""

import math

import pytest
import torch
import torch.nn.functional as F

from selfsup.batch import Vocabulary
from selfsup.models.experts import Experts, Routing, summed
from selfsup.models.transformer import Config, TransformerEncoder
from selfsup.randomness import isolated, seed_layers, torch_generator


def experts(capacity: float = 1.25, number: int = 4) -> Experts:
    with isolated():
        seed_layers(0, "experts")
        return Experts(6, 10, number, F.relu, capacity).double()


def inputs(rows: int = 3, time: int = 8) -> torch.Tensor:
    return torch.randn(rows, time, 6, generator=torch_generator(0, "x"), dtype=torch.float64)


def slow(layer: Experts, x: torch.Tensor, real: torch.Tensor, room: float):
    """Token by token, in the order of the batch."""
    out, busy, likely = torch.zeros_like(x), [0] * layer.experts, torch.zeros(layer.experts)
    dropped = 0
    up = layer.up.weight.view(layer.experts, 10, 6)
    down = layer.down.weight.view(layer.experts, 6, 10)
    for row, column in torch.nonzero(real).tolist():
        token = x[row, column]
        share = (layer.router.weight @ token).float().softmax(0)
        best = int(share.argmax())
        likely += share.detach()
        if busy[best] < room:
            inner = torch.relu(up[best] @ token)
            out[row, column] = (down[best] @ inner) * share[best].double()
        else:
            dropped += 1
        busy[best] += 1
    count = int(real.sum())
    pairs = zip(busy, likely.tolist(), strict=True)
    balance = layer.experts * sum(b / count * p / count for b, p in pairs)
    return out, balance, dropped


@pytest.mark.parametrize("capacity", [0.5, 1.25, 4.0])
def test_equals_a_loop_over_tokens(capacity: float) -> None:
    layer, x = experts(capacity), inputs()
    real = torch.ones(3, 8, dtype=torch.bool)
    real[1, 5:] = False
    for training in (True, False):
        layer.train(training)
        room = math.ceil(capacity * 24 / 4) if training else math.inf
        out, routing = layer(x, real)
        expected, balance, dropped = slow(layer, x, real, room)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)
        assert routing.balance.item() == pytest.approx(balance, abs=1e-6)
        assert routing.dropped.item() == dropped
        assert routing.tokens.item() == 21
    assert capacity > 0.5 or slow(layer, x, real, math.ceil(capacity * 6))[2] > 0


def test_padding_takes_no_room_and_gives_nothing() -> None:
    layer, x = experts(0.5).train(), inputs()
    real = torch.zeros(3, 8, dtype=torch.bool)
    real[2, 6:] = True
    out, routing = layer(x, real)
    assert routing.tokens.item() == 2
    assert routing.dropped.item() == 0
    assert out[~real].abs().sum() == 0
    assert out[real].abs().sum() > 0


def test_evaluation_does_not_depend_on_neighbours() -> None:
    layer, x = experts(0.5).eval(), inputs()
    together, _ = layer(x, None)
    alone = torch.cat([layer(x[i : i + 1], None)[0] for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


def test_balance_is_one_when_all_are_equally_busy_and_grows_when_one_does_all() -> None:
    layer = experts().eval()
    x = torch.zeros(1, 8, 6, dtype=torch.float64)
    x[0, :, :4] = torch.eye(4, dtype=torch.float64).repeat(2, 1)
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[:, :4] = 50 * torch.eye(4, dtype=torch.float64)
    assert layer(x, None)[1].balance.item() == pytest.approx(1.0, abs=1e-5)
    with torch.no_grad():
        layer.router.weight[0] = 100
    assert layer(x, None)[1].balance.item() == pytest.approx(4.0, abs=1e-5)


def test_the_penalty_reaches_the_router_and_dropped_tokens_none() -> None:
    layer, x = experts(0.25).train(), inputs().requires_grad_()
    out, routing = layer(x, None)
    penalty, metrics = summed([routing, routing], 0.01)
    assert penalty is not None
    assert penalty.item() == pytest.approx(0.02 * routing.balance.item())
    assert metrics["dropped_tokens"].item() == 2 * routing.dropped.item() > 0
    assert 0 < metrics["dropped_share"].item() < 1
    penalty.backward(retain_graph=True)
    assert layer.router.weight.grad is not None
    assert layer.router.weight.grad.abs().sum() > 0
    assert layer.up.weight.grad is None or layer.up.weight.grad.abs().sum() == 0
    dropped = out.detach().abs().sum(-1) == 0
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert gradient[dropped].abs().sum() == 0
    assert gradient[~dropped].abs().sum() > 0


def test_no_experts_no_penalty() -> None:
    assert summed([], 0.01) == (None, {})


def test_every_second_block_of_a_transformer_has_experts() -> None:
    config = Config(dim=8, layers=4, heads=2, experts=3, dropout=0.0)
    encoder = TransformerEncoder(config, Vocabulary(size=20))
    assert [isinstance(b.feedforward, Experts) for b in encoder.layers] == [False, True] * 2
    features = encoder({"tokens": torch.arange(12).view(2, 6)})
    assert encoder.has_penalty
    assert features.penalty is not None
    assert set(features.metrics) == {"balance", "dropped_tokens", "dropped_share"}


def test_routing_spreads_when_trained_on_the_penalty_alone() -> None:
    layer, x = experts(number=3).train(), inputs(4, 16)
    with torch.no_grad():
        layer.router.weight[0] += 3 * torch.ones(6)
    optimizer = torch.optim.Adam(layer.router.parameters(), lr=0.05)
    first: Routing | None = None
    for _ in range(60):
        _, routing = layer(x.abs(), None)
        first = first or routing
        optimizer.zero_grad()
        routing.balance.backward()
        optimizer.step()
    assert first is not None
    assert first.balance.item() > 2
    assert routing.balance.item() < 1.3


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"experts": 1}, "at least 2"),
        ({"experts": 4, "activation": "swiglu"}, "plain feed-forward"),
        ({"experts": 4, "share_layers": True}, "cannot be shared"),
        ({"experts": 4, "expert_capacity": 0.0}, "expert_capacity"),
    ],
)
def test_bad_configurations_are_refused(values: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Config(**values)
