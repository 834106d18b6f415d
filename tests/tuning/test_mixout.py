"""Mixout: the weights of one step, their mean, its limits, and where it acts."""

import copy

import pytest
import torch
import torch.nn.functional as F

from selfsup.batch import Vocabulary
from selfsup.errors import ConfigError
from selfsup.models.transformer import Config, TransformerEncoder
from selfsup.randomness import torch_generator
from selfsup.tasks import classification
from selfsup.tuning.choice import Tuning, tune
from selfsup.tuning.mixout import mixed

BATCH = {"tokens": torch.tensor([[5, 7, 2, 9], [4, 3, 8, 8]]), "label": torch.tensor([0, 1])}


def tuned(p=0.7, text="full+mixout"):
    torch.manual_seed(0)
    config = Config(dim=8, layers=2, heads=2, dropout=0.0)
    encoder = TransformerEncoder(config, Vocabulary(size=20))
    task = classification.Classification(classification.Config(dropout=0.0), encoder, ("a", "b"))
    tune(task, Tuning.of(text, {"mixout": {"p": p}}))
    return task


def moved(task):
    """As if it had been trained."""
    draw = torch_generator(0, "moved")
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.1)
    return task


def test_each_weight_is_the_old_one_or_is_scaled_away_from_it():
    torch.manual_seed(1)
    before, weight, p = torch.zeros(40, 50) + 2.0, torch.zeros(40, 50) + 3.0, 0.75
    found = mixed(weight, before, p)
    # equation 5 by hand: dropped (2 - 0.75 * 2) / 0.25 = 2, kept (3 - 0.75 * 2) / 0.25 = 6
    assert set(found.unique().tolist()) == {2.0, 6.0}
    assert float((found == 2.0).float().mean()) == pytest.approx(p, abs=0.03)


def test_the_mean_is_the_weight_itself():
    torch.manual_seed(2)
    before, weight = torch.randn(3, 4), torch.randn(3, 4)
    mean = torch.stack([mixed(weight, before, 0.5) for _ in range(20_000)]).mean(0)
    torch.testing.assert_close(mean, weight, atol=0.05, rtol=0)


def test_the_limits():
    before, weight = torch.randn(3, 4), torch.randn(3, 4)
    assert torch.equal(mixed(weight, before, 1.0), before)
    torch.testing.assert_close(mixed(weight, before, 0.0), weight)


def test_with_1_the_linear_layers_stay_as_they_were_and_learn_nothing():
    task, start = moved(tuned(1.0)), tuned(0.0)
    layer, x = task.encoder.layers[0].feedforward.up, torch.randn(2, 8)
    old = start.encoder.layers[0].feedforward.up.weight
    torch.testing.assert_close(layer(x), F.linear(x, old, layer.bias))
    layer(x).sum().backward()
    assert not layer.weight.grad.any()
    assert layer.bias.grad.any()


def test_it_acts_while_training_alone_and_adds_no_weights():
    task = moved(tuned(0.7))
    plain = moved(tuned(0.0, "full+mixout"))
    assert task.state_dict().keys() == plain.state_dict().keys() - {"before"}
    assert not any("before" in name for name in task.state_dict())
    task.eval(), plain.eval()
    torch.testing.assert_close(task.encoder(BATCH).last, plain.encoder(BATCH).last)
    task.train()
    assert not torch.allclose(task.encoder(BATCH).last, plain.encoder(BATCH).last)
    assert not hasattr(task.head, "before")


def test_a_copy_is_free_of_the_original():
    task = tuned(0.0)
    layer = copy.deepcopy(task).encoder.layers[0].feedforward.up
    with torch.no_grad():
        layer.weight.fill_(0.0)
    assert torch.equal(layer(torch.ones(1, 8)), layer.bias.unsqueeze(0))


def test_something_must_move_and_p_is_a_probability():
    with pytest.raises(ConfigError, match=r"mixout acts on matrices .* full\+mixout"):
        tuned(text="probe+mixout")
    with pytest.raises(ConfigError, match=r"p must lie from 0 to 1, got 1\.1"):
        tuned(1.1)
