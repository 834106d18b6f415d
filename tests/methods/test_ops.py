"""Maths that methods share: what it says of views, and that methods log it where they should."""

import math

import pytest
import torch
from torch import Tensor, nn

from selfsup.batch import ImageSpec
from selfsup.methods.bootstrapping import byol, simsiam
from selfsup.methods.contrastive import moco, simclr
from selfsup.methods.ops import projection_head, view_diagnostics
from selfsup.methods.regularized import barlow_twins, vicreg
from selfsup.methods.views import BYOL_FIRST, BYOL_SECOND, augment, view_pair
from selfsup.models.resnet import Config as Model
from selfsup.models.resnet import ResNetEncoder
from selfsup.randomness import isolated, seed_layers, torch_generator

SPEC = ImageSpec(size=8, channels=3, mean=(0.5,) * 3, std=(0.25,) * 3)
MODEL = Model(blocks=(1,), widths=(4,), stem="cifar", zero_init_residual=False)
WIDE = {"hidden_dim": 8, "projection_dim": 6}
METHODS = {
    "simclr": (simclr.SimCLR, simclr.Config(**WIDE), "head"),
    "moco": (moco.MoCo, moco.Config(**WIDE, queue_size=16), "head"),
    "moco, symmetric": (moco.MoCo, moco.Config(**WIDE, queue_size=16, symmetric=True), "head"),
    "byol": (byol.BYOL, byol.Config(**WIDE), "projector"),
    "simsiam": (simsiam.SimSiam, simsiam.Config(projection_dim=6, predictor_dim=3), "projector"),
    "barlow_twins": (barlow_twins.BarlowTwins, barlow_twins.Config(**WIDE), "head"),
    "vicreg": (vicreg.VICReg, vicreg.Config(**WIDE), "head"),
}


def pictures(size: int) -> Tensor:
    shape = (size, 3, 8, 8)
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch_generator(0, "pictures"))


def apart(x: list[float], y: list[float]) -> float:
    """Squared distance of the directions of two vectors."""
    length, other = (math.sqrt(sum(value * value for value in vector)) for vector in (x, y))
    return sum((a / length - b / other) ** 2 for a, b in zip(x, y, strict=True))


def slow_diagnostics(first: Tensor, second: Tensor) -> dict[str, float]:
    views = [view.double().tolist() for view in (first, second)]
    size = len(first)
    pairs = [(i, j) for i in range(size) for j in range(i)]
    near = [[math.exp(-2 * apart(view[i], view[j])) for i, j in pairs] for view in views]
    return {
        "alignment": sum(map(apart, *views)) / size,
        "uniformity": sum(math.log(sum(values) / len(values)) for values in near) / 2,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_diagnostics_equal_loops(dtype):
    first, second = torch.randn(2, 7, 5, generator=torch_generator(0, "vectors")).to(dtype)
    found, expected = view_diagnostics(first, 4 * second), slow_diagnostics(first, second)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(expected[name], rel=1e-5)
    assert view_diagnostics(first[:1], second[:1]).keys() == {"alignment"}


@pytest.mark.parametrize("name", METHODS)
def test_two_view_methods_log_diagnostics_of_held_out_projections(name):
    kind, config, head = METHODS[name]
    with isolated():
        seed_layers(0, "model")
        method = kind(config, ResNetEncoder(MODEL, SPEC), SPEC)
        for key, parameter in method.named_parameters():
            if key.startswith("teacher_"):  # else it would be the online network's twin
                nn.init.normal_(parameter)
    batch = {"image": pictures(6)}
    in_training = method.train().loss(batch, torch_generator(0, "loss"))
    assert not in_training.metrics.keys() & {"alignment", "uniformity"}

    projected: list[Tensor] = []
    getattr(method, head).register_forward_hook(lambda *call: projected.append(call[-1].detach()))
    held_out = method.eval().loss(batch, torch_generator(0, "loss"))
    views = torch.cat(projected)  # MoCo's second view may be projected once more
    expected = slow_diagnostics(views[:6], views[-6:])
    assert expected["alignment"] > 1e-6
    for key, value in expected.items():
        assert held_out.metrics[key].item() == pytest.approx(value, rel=1e-3, abs=1e-5)
        assert not held_out.metrics[key].requires_grad


def test_two_views_are_drawn_one_after_the_other():
    generator = torch_generator(0, "views")
    expected = [augment(pictures(4), kind, generator) for kind in (BYOL_FIRST, BYOL_SECOND)]
    pair = view_pair(pictures(4), BYOL_FIRST, BYOL_SECOND, torch_generator(0, "views"))
    assert all(map(torch.equal, pair, expected))
    assert not torch.equal(*pair)


@pytest.mark.parametrize(
    ("options", "has_bias"),
    [({}, True), ({"last_bias": False}, False), ({"last_norm": True}, False)],
)
def test_projection_heads(options, has_bias):
    head = projection_head((5, 4, 3), **options)
    linear = [layer for layer in head if isinstance(layer, nn.Linear)]
    assert [tuple(layer.weight.shape) for layer in linear] == [(4, 5), (3, 4)]
    assert [layer.bias is not None for layer in linear] == [False, has_bias]
