import pytest
import torch
from torch import Tensor, nn

from selfsup.models.batch_norm import BatchNorm, rank_statistics
from selfsup.randomness import isolated, seed_layers, torch_generator

# (batch, features), (batch, channels, height, width); how many rows the first of two ranks has
CASES = {
    "vectors": ((8, 5), 4),
    "maps": ((6, 3, 4, 5), 3),
    "uneven-vectors": ((7, 5), 2),
    "uneven-maps": ((4, 3, 4, 5), 1),
}


def draw(*shape: int, name: str = "x") -> Tensor:
    return torch.randn(shape, generator=torch_generator(0, name), dtype=torch.float64)


def randomised(layer: nn.Module) -> nn.Module:
    """Every weight and running statistic random, so that none can be left out unnoticed."""
    generator = torch_generator(0, "weights")
    with torch.no_grad():
        for tensor in [*layer.parameters(), layer.running_mean, layer.running_var]:
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return layer


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


# One rank: torch's own


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("shape", [(8, 5), (6, 5, 4, 3)])
def test_one_rank_is_torch_itself(shape, affine):
    kind = nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d
    ours = randomised(BatchNorm(5, eps=0.01, momentum=0.3, affine=affine))
    theirs = kind(5, eps=0.01, momentum=0.3, affine=affine)
    theirs.load_state_dict(ours.state_dict())
    x = draw(*shape).float()
    for training in (True, False):
        assert torch.equal(ours.train(training)(x), theirs.train(training)(x))
    for (name, mine), (other, yours) in zip(
        ours.state_dict().items(), theirs.state_dict().items(), strict=True
    ):
        assert name == other
        assert torch.equal(mine, yours)


def test_without_affine_there_is_nothing_to_learn():
    layer = BatchNorm(5, affine=False)
    assert list(layer.parameters()) == []
    assert set(layer.state_dict()) == {"running_mean", "running_var", "num_batches_tracked"}


def test_statistics_equal_loops():
    x = draw(4, 3, 2, 5)
    mean, variance, count = rank_statistics(x)
    assert count == 40
    for feature in range(3):
        values = x[:, feature].flatten().tolist()
        middle = sum(values) / 40
        assert mean[feature].item() == pytest.approx(middle, abs=1e-14)
        spread = sum((value - middle) ** 2 for value in values) / 40
        assert variance[feature].item() == pytest.approx(spread, abs=1e-14)


# Two ranks: each process computes its rows of every case and saves what it got

NETWORKS = {
    2: lambda: [nn.Linear(5, 6), BatchNorm(6), nn.ReLU(), nn.Linear(6, 4), BatchNorm(4, 0.1)],
    4: lambda: [nn.Conv2d(3, 6, 3), BatchNorm(6), nn.ReLU(True), nn.Conv2d(6, 4, 1), BatchNorm(4)],
}


def network(axes: int, affine: bool) -> nn.Sequential:
    """Two layers with a normalisation after each; the last one with or without weights."""
    with isolated():
        seed_layers(0, "model")
        *layers, last = NETWORKS[axes]()
        last = BatchNorm(last.num_features, last.eps, momentum=0.3, affine=affine)
        return nn.Sequential(*layers, last).double()


def learn(axes: int, affine: bool, x: Tensor, rows: slice, num_ranks: int) -> dict[str, Tensor]:
    """Two batches forward, the second one backward: outputs, gradients and statistics.

    The loss of a rank is a weighted sum over its rows; the mean of the losses over ranks is the
    loss of one process.
    """
    net = network(axes, affine)
    with torch.no_grad():
        net(2 * x[rows] + 3)
    mine = x[rows].clone().requires_grad_()
    out = net(mine)
    weights = draw(*x.shape[:1], *out.shape[1:], name="loss")
    (out * weights[rows]).sum().mul(num_ranks).backward()
    gradients = {f"gradient of {name}": p.grad for name, p in net.named_parameters()}
    return {
        "out": out.detach(),
        "input gradient": mine.grad,
        **gradients,
        **dict(net.named_buffers()),
    }


def reduced_precision(x: Tensor, rows: slice) -> dict[str, Tensor]:
    """Outputs and statistics in bfloat16, and of float32 values far from zero."""
    rough, far = BatchNorm(5, momentum=1.0), BatchNorm(5, momentum=1.0)
    return {
        "bfloat16": rough(x[rows].bfloat16()).detach(),
        "bfloat16 mean": rough.running_mean,
        "far": far((x[rows] + 10_000).float()).detach(),
        "far variance": far.running_var,
    }


def one_rank(rank: int) -> dict:
    """What each of the two processes runs."""
    results = {}
    for name, (shape, first) in CASES.items():
        rows = slice(0, first) if rank == 0 else slice(first, None)
        for affine in (True, False):
            results[name, affine] = learn(len(shape), affine, draw(*shape), rows, 2)
    rows = slice(0, 32) if rank == 0 else slice(32, None)
    results["precision"] = reduced_precision(draw(64, 5), rows)
    layer = randomised(BatchNorm(5)).eval()
    results["evaluation"] = {
        "out": layer(draw(8, 5)[rank::2].float()).detach(),
        **layer.state_dict(),
    }
    return results


@pytest.fixture(scope="module")
def two_ranks(on_two_ranks) -> list[dict]:
    """The results of both processes."""
    return on_two_ranks(one_rank)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_learn_what_one_learns(two_ranks, case, affine):
    shape, _ = CASES[case]
    expected = learn(len(shape), affine, draw(*shape), slice(None), 1)
    first, second = (results[case, affine] for results in two_ranks)
    assert set(first) == set(second) == set(expected)
    close(torch.cat((first["out"], second["out"])), expected["out"])
    # the losses of both ranks act on every input, so a rank's input gradient is that of their sum
    inputs = torch.cat((first["input gradient"], second["input gradient"]))
    close(inputs / 2, expected["input gradient"])
    parameters = [name for name in expected if name.startswith("gradient of")]
    assert len(parameters) == (8 if affine else 6)
    for name in parameters:
        close((first[name] + second[name]) / 2, expected[name])
    buffers = [name for name in expected if "running" in name or "num_batches" in name]
    assert len(buffers) == 6
    for name in buffers:
        close(first[name], expected[name])
        assert torch.equal(first[name], second[name])


def test_ranks_do_not_learn_from_their_own_rows_alone(two_ranks):
    """The test above would not notice if both halves had the same statistics."""
    alone = learn(2, True, draw(8, 5), slice(0, 4), 1)
    assert (alone["out"] - two_ranks[0]["vectors", True]["out"]).abs().max() > 0.1


def test_statistics_of_several_ranks_are_float32_and_stable(two_ranks):
    first, second = (results["precision"] for results in two_ranks)
    x = draw(64, 5)
    rounded = x.bfloat16().double()
    normal = (rounded - rounded.mean(0)) / (rounded.var(0, correction=0) + 1e-5).sqrt()
    assert first["bfloat16"].dtype == torch.bfloat16
    got = torch.cat((first["bfloat16"], second["bfloat16"]))
    torch.testing.assert_close(got, normal.bfloat16(), rtol=2**-7, atol=0)  # its last bit
    close(first["bfloat16 mean"].double(), rounded.mean(0), 1e-7)
    x = (x + 10_000).float().double()
    normal = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()
    close(torch.cat((first["far"], second["far"])).double(), normal, 2e-3)  # 10,000 has 1e-3 steps
    close(first["far variance"].double(), x.var(0), 1e-5)


def test_evaluation_reads_the_running_statistics_on_every_rank(two_ranks):
    layer = randomised(BatchNorm(5)).eval()
    expected = layer(draw(8, 5).float()).detach()
    for rank, results in enumerate(two_ranks):
        assert torch.equal(results["evaluation"]["out"], expected[rank::2])
        assert results["evaluation"]["num_batches_tracked"] == 0
        assert torch.equal(results["evaluation"]["running_var"], layer.running_var)
