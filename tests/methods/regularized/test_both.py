"""What Barlow Twins and VICReg share: unequal views, a deep head, the statistics of a batch."""

import pytest
import torch
from torch import nn

from selfsup.errors import ConfigError
from selfsup.methods.regularized import barlow_twins, vicreg
from selfsup.methods.views import BYOL_FIRST, BYOL_SECOND, augment
from selfsup.randomness import torch_generator

METHODS = {
    "barlow_twins": (barlow_twins.BarlowTwins, barlow_twins.Config),
    "vicreg": (vicreg.VICReg, vicreg.Config),
}


@pytest.fixture(params=METHODS)
def named(request, build):
    """The method's name, and the method with a small head."""
    method, config = METHODS[request.param]
    return request.param, build(method, config(hidden_dim=16, projection_dim=6))


def test_views_take_turns(named, pictures):
    objective = named[1].train()
    objective.loss({"image": pictures()}, torch_generator(0, "loss"))
    generator = torch_generator(0, "loss")
    expected = [augment(pictures(), each, generator) for each in (BYOL_FIRST, BYOL_SECOND)]
    assert all(map(torch.equal, objective.encoder.shown, expected))
    assert len(objective.encoder.shown) == objective.head[1].num_batches_tracked == 2


def test_head_has_three_layers_without_offsets(named):
    linear = [layer for layer in named[1].head if isinstance(layer, nn.Linear)]
    assert [tuple(layer.weight.shape) for layer in linear] == [(16, 12), (16, 16), (6, 16)]
    assert [layer.bias for layer in linear] == [None] * 3


def test_one_example_has_no_statistics(named, pictures):
    name, objective = named
    with pytest.raises(ConfigError, match=rf"{name} .* training\.batch_size >= 2"):
        objective.loss({"image": pictures(1)}, torch_generator(0, "loss"))


@pytest.mark.parametrize("name", METHODS)
def test_widths_and_views_are_the_papers(name):
    config = METHODS[name][1]()
    assert (config.hidden_dim, config.projection_dim) == (8192, 8192)
    assert (config.views_a, config.views_b) == (BYOL_FIRST, BYOL_SECOND)
