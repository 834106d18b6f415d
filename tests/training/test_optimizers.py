"""Adafactor, LAMB and LARS against slow versions and others' code; what all optimizers promise."""

import math
import subprocess
import sys
from contextlib import closing, suppress
from itertools import product

import pytest
import torch
from torch import nn
from transformers.optimization import Adafactor as TransformersAdafactor

from selfsup.config import from_mapping
from selfsup.errors import CheckpointError, ConfigError
from selfsup.randomness import isolated
from selfsup.training.checkpoint import load_newest, load_optimizer, optimizer_tensors
from selfsup.training.config import TrainingConfig
from selfsup.training.folder import RunFolder
from selfsup.training.loop import train
from selfsup.training.optim import optimizer
from selfsup.training.optimizers.adafactor import Adafactor, factored_axes, num_moments
from selfsup.training.optimizers.adamw import AdamW
from selfsup.training.optimizers.groups import parameter_groups
from selfsup.training.optimizers.lamb import Lamb
from selfsup.training.optimizers.lars import Lars

NAMES = ["adamw", "adafactor", "lamb", "lars"]
SHAPES = [(5, 3), (7,), (3, 6), ()]


def parameters(*shapes: tuple[int, ...], dtype=torch.float64) -> nn.ParameterList:
    generator = torch.Generator().manual_seed(1)
    values = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return nn.ParameterList([nn.Parameter(value.to(dtype)) for value in values])


def gradients(module: nn.Module, step: int) -> list[torch.Tensor]:
    """Gives every parameter a gradient of its own size: large in step 3, small in step 4."""
    generator = torch.Generator().manual_seed(100 + step)
    size = {3: 50.0, 4: 0.01}.get(step, 1.0)
    for number, parameter in enumerate(module.parameters()):
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.grad = (drawn * size * (number + 1)).to(parameter.dtype)
    return [p.grad.clone() for p in module.parameters()]


def build(module: nn.Module, name: str, **keys) -> torch.optim.Optimizer:
    return optimizer(module, TrainingConfig(**{"steps": 1, "lr": 0.05, **keys}, optimizer=name))


def same_numbers(module: nn.Module, expected: list[torch.Tensor], accuracy: float) -> None:
    for parameter, value in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.detach(), value, rtol=accuracy, atol=accuracy)


def length(numbers: list[float]) -> float:
    return math.sqrt(sum(number * number for number in numbers))


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lamb_is_that_of_the_paper(decay):
    """Algorithm 2, number by number; vectors take Adam's step without decay."""
    module, lr, (beta1, beta2), eps = parameters(*SHAPES), 0.05, (0.9, 0.98), 1e-3
    tested = build(module, "lamb", lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=decay)
    values = [p.detach().flatten().tolist() for p in module]
    first = [[0.0] * len(x) for x in values]
    second = [[0.0] * len(x) for x in values]
    for step in range(1, 7):
        for x, m, v, g, p in zip(
            values, first, second, gradients(module, step), module, strict=True
        ):
            r = []
            for i, slope in enumerate(g.flatten().tolist()):
                m[i] = beta1 * m[i] + (1 - beta1) * slope
                v[i] = beta2 * v[i] + (1 - beta2) * slope**2
                mean, square = m[i] / (1 - beta1**step), v[i] / (1 - beta2**step)
                r.append(mean / (math.sqrt(square) + eps) + (decay * x[i] if p.ndim > 1 else 0))
            ratio = length(x) / length(r) if p.ndim > 1 else 1.0
            x[:] = [number - lr * ratio * change for number, change in zip(x, r, strict=True)]
        tested.step()
        expected = [
            torch.tensor(x).double().view_as(p) for x, p in zip(values, module, strict=True)
        ]
        same_numbers(module, expected, 1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lars_is_that_of_simclr(decay):
    module, lr, momentum = parameters(*SHAPES), 2.0, 0.8
    tested = build(module, "lars", lr=lr, betas=(momentum, 0.5), weight_decay=decay)
    values = [p.detach().flatten().tolist() for p in module]
    moved = [[0.0] * len(x) for x in values]
    for step in range(1, 7):
        for x, v, g, p in zip(values, moved, gradients(module, step), module, strict=True):
            slope = g.flatten().tolist()
            if p.ndim > 1:
                slope = [a + decay * b for a, b in zip(slope, x, strict=True)]
                ratio = 0.001 * length(x) / length(slope)
                slope = [ratio * a for a in slope]
            v[:] = [momentum * a + lr * b for a, b in zip(v, slope, strict=True)]
            x[:] = [a - b for a, b in zip(x, v, strict=True)]
        tested.step()
        expected = [
            torch.tensor(x).double().view_as(p) for x, p in zip(values, module, strict=True)
        ]
        same_numbers(module, expected, 1e-6)


def slow_adafactor(
    x: torch.Tensor, moments: dict, g: torch.Tensor, step: int, lr: float, relative: bool
) -> torch.Tensor:
    """Algorithms 4 to 6 for one tensor, (rows, columns, ...) factored in its first two axes."""
    share, second = step**-0.8, torch.zeros_like(g)
    for place in product(*map(range, g.shape)):
        if g.ndim < 2:
            old = moments.get(place, 0.0)
            moments[place] = (1 - share) * old + share * (float(g[place]) ** 2 + 1e-30)
            second[place] = moments[place]
    if g.ndim >= 2:
        rows, columns, *others = g.shape
        for rest in product(*map(range, others)):
            squares = [
                [float(g[r, c, *rest]) ** 2 + 1e-30 for c in range(columns)] for r in range(rows)
            ]
            for r in range(rows):
                key = "row", r, rest
                moments[key] = (1 - share) * moments.get(key, 0.0) + share * sum(
                    squares[r]
                ) / columns
            for c in range(columns):
                key, mean = ("column", c, rest), sum(squares[r][c] for r in range(rows)) / rows
                moments[key] = (1 - share) * moments.get(key, 0.0) + share * mean
            mean = sum(moments["row", r, rest] for r in range(rows)) / rows
            for r, c in product(range(rows), range(columns)):
                second[r, c, *rest] = moments["row", r, rest] * moments["column", c, rest] / mean
    update = g / second.sqrt()
    update = update / max(1.0, length(update.flatten().tolist()) / math.sqrt(g.numel()))
    size = max(1e-3, length(x.flatten().tolist()) / math.sqrt(x.numel())) if relative else 1.0
    return x - lr * size * update


@pytest.mark.parametrize("relative", [True, False])
def test_adafactor_is_that_of_the_paper(relative):
    """A convolution too, whose two largest axes are factored."""
    module = parameters(*SHAPES, (4, 5, 3, 2), dtype=torch.float64)
    tested = build(module, "adafactor", relative_step=relative, weight_decay=0.0)
    values, moments = [p.detach().clone() for p in module], [{} for _ in module]
    for step in range(1, 7):
        for number, g in enumerate(gradients(module, step)):
            kept = values[number], moments[number]
            values[number] = slow_adafactor(*kept, g, step, 0.05, relative)
        tested.step()
        same_numbers(module, values, 1e-10)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adafactor_is_torchs(decay):
    """Whose rate is at most 1 / sqrt(step): above 0.05 in these steps."""
    module, theirs = parameters(*SHAPES[:3]), parameters(*SHAPES[:3])
    tested = build(module, "adafactor", weight_decay=decay)
    groups = parameter_groups(theirs, decay)
    other = torch.optim.Adafactor(groups, lr=0.05, eps=(1e-30, 1e-3))
    for step in range(1, 20):
        for net, its in ((module, tested), (theirs, other)):
            gradients(net, step)
            its.step()
        same_numbers(module, [p.detach() for p in theirs], 1e-10)


@pytest.mark.parametrize("relative", [True, False])
def test_adafactor_is_that_of_transformers(relative):
    shapes = [*SHAPES[:3], (2, 4, 3)]
    module, theirs = parameters(*shapes), parameters(*shapes)
    tested = build(module, "adafactor", relative_step=relative, weight_decay=0.0)
    other = TransformersAdafactor(
        theirs.parameters(), lr=0.05, scale_parameter=relative, relative_step=False
    )
    for step in range(1, 20):
        for net, its in ((module, tested), (theirs, other)):
            gradients(net, step)
            its.step()
        same_numbers(module, [p.detach() for p in theirs], 1e-10)


def test_adafactor_survives_a_gradient_of_zero_and_a_huge_one():
    module = parameters((4, 3), (3,), dtype=torch.float32)
    tested = build(module, "adafactor", weight_decay=0.0)
    before = [p.detach().clone() for p in module]
    for parameter in module:
        parameter.grad = torch.zeros_like(parameter)
    tested.step()
    same_numbers(module, before, 0.0)
    module[0].grad[2] = 1e15  # the other rows stay at 0
    tested.step()
    assert module[0].isfinite().all()
    assert torch.equal(module[0][:2], before[0][:2])
    assert (module[0][2] < before[0][2]).all()


def test_adafactor_keeps_rows_and_columns_alone():
    module = parameters((30, 20), (20,), (16, 8, 3, 3), (2, 9, 7))
    gradients(module, 1)
    tested = build(module, "adafactor")
    tested.step()
    kept = [sum(t.numel() for k, t in tested.state[p].items() if k != "step") for p in module]
    assert kept == [30 + 20, 20, (16 + 8) * 9, 2 * (9 + 7)]
    assert kept == [num_moments(p.shape) for p in module]
    assert factored_axes(torch.Size([4, 4, 1])) == (0, 1)


def test_a_step_is_a_share_of_the_matrix_whatever_the_gradient():
    for size in (1e-3, 1.0, 1e3):
        for name, share in (("lamb", 0.05), ("lars", 0.05 * 0.001)):
            module = parameters((6, 4))
            before = module[0].detach().clone()
            module[0].grad = size * torch.ones(6, 4).double()
            build(module, name, weight_decay=0.0, eps=0.0).step()
            moved = (module[0] - before).norm() / before.norm()
            assert moved.item() == pytest.approx(share, rel=1e-6), (name, size)


def test_a_matrix_of_zeros_moves_at_a_ratio_of_one():
    slope = torch.tensor([[1.0, 2.0], [-4.0, 3.0]])
    for name, moved in (("lamb", -0.05 * slope.sign()), ("lars", -0.05 * slope)):
        module = nn.ParameterList([nn.Parameter(torch.zeros(2, 2))])
        module[0].grad = slope.clone()
        build(module, name, eps=0.0).step()
        torch.testing.assert_close(module[0].detach(), moved)


@pytest.mark.parametrize("name", NAMES)
def test_lr_scale_scales_the_step(name):
    module, half = parameters(*SHAPES), parameters(*SHAPES)
    for parameter in half:
        parameter.lr_scale = 0.5
    before = [p.detach().clone() for p in module]
    for net in (module, half):
        tested = build(net, name)
        for group in tested.param_groups:
            group["lr"] = 0.05 * group["lr_scale"]  # as the loop sets it
        gradients(net, 1)
        tested.step()
    expected = [x + 0.5 * (p.detach() - x) for x, p in zip(before, module, strict=True)]
    same_numbers(half, expected, 1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_frozen_or_without_gradient_stays(name):
    module = parameters((3, 2), (4, 2), (3,), (0, 2))
    module[0].requires_grad_(False)
    before = [p.detach().clone() for p in module]
    tested = build(module, name)
    listed = {id(p) for group in tested.param_groups for p in group["params"]}
    assert id(module[0]) not in listed
    gradients(module, 1)
    module[1].grad = None
    tested.step()
    assert torch.equal(module[0], before[0])
    assert torch.equal(module[1], before[1])
    assert module[1] not in tested.state
    assert not torch.equal(module[2], before[2])
    gradients(module, 2)  # later it joins, at its own first step
    tested.step()
    assert module[1].isfinite().all()
    assert not torch.equal(module[1], before[1])
    if "step" in tested.state[module[1]]:
        assert (tested.state[module[1]]["step"], tested.state[module[2]]["step"]) == (1, 2)


@pytest.mark.parametrize("name", NAMES[1:])
def test_bfloat16_parameters_keep_float32_moments(name):
    module = parameters(*SHAPES, dtype=torch.bfloat16)
    precise = nn.ParameterList([nn.Parameter(p.detach().float()) for p in module])
    its, tested = build(precise, name), build(module, name)
    for parameter, exact, g in zip(module, precise, gradients(module, 1), strict=True):
        parameter.grad, exact.grad = g, g.float()
    its.step()
    tested.step()
    assert all(p.dtype == torch.bfloat16 for p in module)
    same_numbers(module, [p.detach().bfloat16() for p in precise], 0.0)
    for p, exact in zip(module, precise, strict=True):
        for key, value in tested.state[p].items():
            assert value.dtype == torch.float32
            assert torch.equal(value, its.state[exact][key])


class Stopping:
    """Data that end the program when the batch of step `left` is asked for."""

    def __init__(self, data, left: int):
        self.data, self.fields, self.lengths, self.left = data, data.fields, data.lengths, left

    def __len__(self) -> int:
        return len(self.data)

    def batch(self, numbers):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        return self.data.batch(numbers)


@pytest.mark.parametrize("name", NAMES)
def test_a_cut_run_is_bit_equal_and_learns(toy, tmp_path, name):
    rate = {"adamw": 0.03, "adafactor": 0.1, "lamb": 0.05, "lars": 0.3}[name]
    config = toy.config(steps=30, checkpoint_every=16, optimizer=name, lr=rate, weight_decay=0.1)
    for path, resume, stop in (("whole", False, 99), ("cut", False, 20), ("cut", True, 99)):
        objective = toy.build()
        with closing(RunFolder(tmp_path / path, resume)) as folder, suppress(KeyboardInterrupt):
            rows = train(objective, Stopping(toy.Rows(20), stop), None, config, folder)
    one, other = (load_newest(tmp_path / path / "checkpoints") for path in ("whole", "cut"))
    toy.same(other.weights, one.weights)
    toy.same(other.optimizer, one.optimizer)
    losses = [row["loss"] for row in rows]
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])


@pytest.mark.parametrize("name", NAMES)
def test_a_step_that_is_not_finite_leaves_no_trace(toy, tmp_path, name):
    class Broken(toy.Largest):
        """Its gradient is not finite from step 3 on."""

        def loss(self, batch, generator):
            out = super().loss(batch, generator)
            return out._replace(loss=out.loss * math.inf) if self.seen >= 3 else out

    kept = []
    for steps in (3, 6):
        keys = {"schedule": "constant", "warmup": 0.0, "nonfinite": "skip", "optimizer": name}
        with closing(RunFolder(tmp_path / str(steps), False)) as folder:
            train(
                toy.build(kind=Broken), toy.Rows(9), None, toy.config(steps=steps, **keys), folder
            )
        kept.append(load_newest(folder.checkpoints))
    assert kept[1].state["skipped"] == 3
    toy.same(kept[1].weights, kept[0].weights)
    toy.same(kept[1].optimizer, kept[0].optimizer)


def test_moments_of_another_optimizer_are_refused():
    module = parameters(*SHAPES)
    gradients(module, 1)
    saved = build(module, "adamw")
    saved.step()
    tensors = optimizer_tensors(module, saved)
    for name in ("adafactor", "lars"):
        with pytest.raises(CheckpointError, match=r"another optimizer.*training\.optimizer"):
            load_optimizer(module, build(module, name), tensors)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lamb"])
def test_a_part_of_the_moments_is_refused(name):
    module = parameters(*SHAPES)
    gradients(module, 1)
    saved = build(module, name)
    saved.step()
    tensors = optimizer_tensors(module, saved)
    load_optimizer(module, build(module, name), tensors)
    for lost in tensors:
        left = {key: value for key, value in tensors.items() if key != lost}
        with pytest.raises(CheckpointError, match=f"{lost.partition('|')[0]}' has only"):
            load_optimizer(module, build(module, name), left)


def test_the_configuration_chooses_and_refuses():
    module = parameters(*SHAPES)
    kinds = {"adamw": AdamW, "adafactor": Adafactor, "lamb": Lamb, "lars": Lars}
    assert {name: type(build(module, name)) for name in NAMES} == kinds
    assert type(optimizer(module, TrainingConfig(steps=1))) is AdamW
    for keys, named in (
        ({"optimizer": "sgd"}, r"training\.optimizer"),
        ({"optimizer": "lamb", "relative_step": False}, "relative_step"),
        ({"optimizer": "lars", "sharded": True}, "optimizer"),
        ({"optimizer": "adafactor", "tensor_parallel": 2}, "optimizer"),
    ):
        with pytest.raises(ConfigError, match=named):
            from_mapping(TrainingConfig, {"steps": 1, **keys}, "training")


def test_adamw_is_torchs_number_for_number():
    weights = []
    for kind in (torch.optim.AdamW, AdamW):
        with isolated():
            torch.manual_seed(0)
            module, x = nn.Linear(5, 3), torch.randn(8, 5)
        chosen = kind(module.parameters(), lr=0.1, betas=(0.8, 0.9), weight_decay=0.2, fused=True)
        for _ in range(5):
            chosen.zero_grad()
            module(x).square().sum().backward()
            chosen.step()
        weights.append(module.weight.detach().clone())
    assert weights[0].equal(weights[1])


def test_a_start_does_without_torchs_compiler_and_scikit_learn():
    program = """
import sys, torch
import selfsup.api
from selfsup.training.optim import adamw
module = torch.nn.Linear(2, 2)
optimizer = adamw(module, lr=0.1, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.0)
module(torch.ones(1, 2)).sum().backward()
optimizer.step()
optimizer.zero_grad()
print(*(name for name in ("torch._dynamo", "sklearn", "scipy.stats") if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr
