"""The optimizer and its schedules, against values worked out by hand."""

import math

import pytest
import torch
from torch import nn

from selfsup.training.optim import adamw, clip_gradient, learning_rate_share


def share(progress: float, schedule: str, **keys: float) -> float:
    settings = {"warmup": 0.2, "decay": 0.5, "final": 0.0, **keys}
    return learning_rate_share(progress, schedule=schedule, **settings)


@pytest.mark.parametrize(
    ("schedule", "keys", "expected"),  # at 0, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0
    [
        ("linear", {}, [0, 0.5, 1, 0.75, 0.5, 0.25, 0]),
        ("linear", {"final": 0.2}, [0, 0.5, 1, 0.8, 0.6, 0.4, 0.2]),
        ("linear", {"warmup": 0.0}, [1, 0.9, 0.8, 0.6, 0.4, 0.2, 0]),
        ("constant", {}, [0, 0.5, 1, 1, 1, 1, 1]),
        ("wsd", {}, [0, 0.5, 1, 1, 0.8, 0.4, 0]),
        ("wsd", {"final": 0.5}, [0, 0.5, 1, 1, 0.9, 0.7, 0.5]),
        ("wsd", {"decay": 0.2}, [0, 0.5, 1, 1, 1, 1, 0]),
        ("wsd", {"decay": 0.0}, [0, 0.5, 1, 1, 1, 1, 1]),
        (
            "cosine",
            {},
            [0, 0.5, 1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0],
        ),
        (
            "cosine",
            {"final": 0.1},
            [0, 0.5, 1, 0.55 + 0.45 * math.sqrt(0.5), 0.55, 0.55 - 0.45 * math.sqrt(0.5), 0.1],
        ),
    ],
)
def test_schedules_against_hand_values(schedule, keys, expected):
    places = [0.0, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0]
    got = [share(progress, schedule, **keys) for progress in places]
    assert got == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd", "constant"])
def test_schedules_never_jump_and_stay_between_0_and_1(schedule):
    values = [share(i / 1000, schedule) for i in range(1001)]
    assert max(values) == 1
    assert min(values) == 0
    assert max(abs(a - b) for a, b in zip(values, values[1:], strict=False)) < 0.006


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.linear = nn.Linear(4, 3)
        self.norm = nn.LayerNorm(3)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)


def test_only_trained_matrices_are_decayed():
    net = Net()
    optimizer = adamw(net, lr=0.1, betas=(0.8, 0.9), eps=1e-7, weight_decay=0.3)
    decayed, others = optimizer.param_groups
    names = {p: name for name, p in net.named_parameters()}
    assert {names[p] for p in decayed["params"]} == {"table.weight", "linear.weight"}
    assert {names[p] for p in others["params"]} == {"linear.bias", "norm.weight", "norm.bias"}
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.1, (0.8, 0.9), 1e-7)


def test_steps_are_those_of_the_paper():
    """Three steps of AdamW (Loshchilov and Hutter 2019, algorithm 2) in float64, by loops."""
    lr, betas, eps, decay = 0.01, (0.9, 0.98), 1e-6, 0.1
    module = nn.Linear(2, 1).double()
    optimizer = adamw(module, lr=lr, betas=betas, eps=eps, weight_decay=decay)
    values = {n: p.detach().flatten().tolist() for n, p in module.named_parameters()}
    first = {n: [0.0] * len(v) for n, v in values.items()}
    second = {n: [0.0] * len(v) for n, v in values.items()}
    for step in range(1, 4):
        module.zero_grad()
        (module(torch.tensor([[1.0, -2.0]]).double()) ** 2 * step).sum().backward()
        for name, parameter in module.named_parameters():
            for i, g in enumerate(parameter.grad.flatten().tolist()):
                m, v = first[name], second[name]
                m[i] = betas[0] * m[i] + (1 - betas[0]) * g
                v[i] = betas[1] * v[i] + (1 - betas[1]) * g * g
                rate = decay if name == "weight" else 0.0
                values[name][i] -= lr * rate * values[name][i]
                corrected = m[i] / (1 - betas[0] ** step), v[i] / (1 - betas[1] ** step)
                values[name][i] -= lr * corrected[0] / (math.sqrt(corrected[1]) + eps)
        optimizer.step()
        for name, parameter in module.named_parameters():
            assert parameter.flatten().tolist() == pytest.approx(values[name], rel=1e-12)


def with_gradients(*values: list[float]) -> nn.Module:
    module = nn.ParameterList([nn.Parameter(torch.zeros(len(v))) for v in values])
    for parameter, value in zip(module, values, strict=True):
        parameter.grad = torch.tensor(value)
    return module


def test_clip_scales_the_whole_gradient_to_the_limit():
    module = with_gradients([3.0, 0.0], [0.0, 4.0])
    norm = clip_gradient(module, 1.0)
    assert (norm.item(), norm.dtype) == (5.0, torch.float32)
    assert module[0].grad.tolist() == pytest.approx([0.6, 0.0], rel=1e-5)
    assert module[1].grad.tolist() == pytest.approx([0.0, 0.8], rel=1e-5)


@pytest.mark.parametrize("limit", [5.1, 0.0])
def test_clip_leaves_a_small_gradient_and_0_only_measures(limit):
    module = with_gradients([3.0, 0.0], [0.0, 4.0])
    assert clip_gradient(module, limit).item() == 5.0
    assert module[0].grad.tolist() == [3.0, 0.0]
    assert module[1].grad.tolist() == [0.0, 4.0]


def test_clip_passes_over_parameters_without_gradient():
    module = with_gradients([3.0], [4.0])
    module[0].grad = None
    assert clip_gradient(module, 2.0).item() == 4.0
    assert module[1].grad.tolist() == pytest.approx([2.0], rel=1e-5)


def test_clip_shows_a_gradient_that_is_not_finite():
    assert clip_gradient(with_gradients([float("inf")]), 1.0).isinf()
    assert clip_gradient(with_gradients([float("nan"), 1.0]), 1.0).isnan()
