"""Weights pruned one by one: worked examples by hand, the schedule, the way through training."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from selfsup.batch import Vocabulary
from selfsup.errors import ConfigError
from selfsup.models import transformer
from selfsup.models.transformer import TransformerEncoder
from selfsup.randomness import isolated, seed_layers, torch_generator
from selfsup.tasks import classification
from selfsup.tuning.sparsity import (
    Config,
    Masked,
    Sparsifying,
    lowest_pruned,
    matrices,
    prune_magnitude,
    pruned_share,
    zero_share,
)

SHAPE = transformer.Config(dim=8, layers=2, heads=2, dropout=0.0)
BATCH = {
    "tokens": torch.randint(0, 20, (8, 6), generator=torch_generator(0, "tokens")),
    "label": torch.tensor([0, 1] * 4),
}


def classifier(shape=SHAPE):
    with isolated():
        seed_layers(0, "task")
        encoder = TransformerEncoder(shape, Vocabulary(size=20))
        return classification.Classification(classification.Config(), encoder, ("a", "b"))


def train(sparse, steps, lr=0.01):
    sparse.train()
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=lr)
    for step in range(steps):
        sparse.loss(BATCH, torch_generator(0, "loss", step)).loss.backward()
        optimizer.step()
        sparse.after_step(step, steps)
        optimizer.zero_grad()


def test_movement_scores_equal_two_steps_of_sgd_by_hand():
    # y = w1 x1 + w2 x2, loss = (y - 1)^2 / 2, so dL/dw'_i = (y - 1) x_i; rate 0.1
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data = torch.tensor([[0.5, -1.0]])
    part = Masked(layer.weight, scored=True)
    parametrize.register_parametrization(layer, "weight", part)
    x, optimizer = torch.tensor([1.0, 2.0]), torch.optim.SGD(layer.parameters(), lr=0.1)

    def step():
        optimizer.zero_grad()
        (0.5 * (layer(x) - 1).square().sum()).backward()
        optimizer.step()
        return layer.parametrizations.weight.original.detach()

    # step 1: y = -1.5, gradient (-2.5, -5): w -> (0.75, -0.5), S = -0.1 w g = (0.125, -0.5)
    torch.testing.assert_close(step(), torch.tensor([[0.75, -0.5]]))
    torch.testing.assert_close(part.scores.detach(), torch.tensor([[0.125, -0.5]]))
    part.mask.copy_(lowest_pruned(part.scores.detach(), 1))
    assert part.mask.tolist() == [[1, 0]]  # w2 moved towards zero
    assert layer(x).item() == 0.75
    # step 2: y = 0.75, gradient (-0.25, -0.5): the pruned weight stays, its score moves on
    torch.testing.assert_close(step(), torch.tensor([[0.775, -0.5]]))
    expected = torch.tensor([[0.125 + 0.1 * 0.75 * 0.25, -0.5 - 0.1 * 0.5 * 0.5]])
    torch.testing.assert_close(part.scores.detach(), expected)


def test_the_lowest_scores_are_pruned_and_exactly_so_many():
    scores = torch.tensor([[0.0, -1.0, 0.0], [2.0, 0.0, -3.0]])
    for count in range(7):
        mask = lowest_pruned(scores, count)
        assert mask.sum() == 6 - count
        if 0 < count < 6:
            assert scores[mask == 0].max() <= scores[mask == 1].min()


def test_the_schedule_is_cubic_between_warmup_and_cooldown():
    config = Config(share=0.9, warmup=0.1, cooldown=0.3)
    for progress in torch.linspace(0, 1, 21).tolist():
        if progress < 0.1:
            expected = 0.0
        elif progress > 0.7:
            expected = 0.9
        else:  # v_f + (v_i - v_f) (1 - (t - t_i) / (N - t_i - t_f))^3, v being what is left
            expected = 1 - (0.1 + 0.9 * (1 - (progress - 0.1) / 0.6) ** 3)
        assert pruned_share(progress, config) == pytest.approx(expected, abs=1e-6)


def test_magnitude_prunes_the_smallest_weights_of_all_blocks_together():
    task = classifier()
    with torch.no_grad():
        task.encoder.layers[0].feedforward.up.weight *= 1e-3
    kept = {n: p.clone() for n, p in task.named_parameters()}
    weights = torch.cat([layer.weight.detach().flatten() for layer in matrices(task.encoder)])
    limit = weights.abs().sort().values[round(0.6 * len(weights))]
    prune_magnitude(task.encoder, 0.6)
    assert (task.encoder.layers[0].feedforward.up.weight == 0).all()
    for name, parameter in task.named_parameters():
        pruned = "layers" in name and parameter.ndim == 2
        expected = torch.where(kept[name].abs() < limit, 0, kept[name]) if pruned else kept[name]
        assert torch.equal(parameter, expected), name
    assert zero_share(task.encoder) == pytest.approx(0.6, abs=1e-3)


@pytest.mark.parametrize("by", ["movement", "magnitude"])
def test_training_ends_with_the_share_of_zeros_that_was_asked_for(by):
    task = classifier()
    names = set(task.state_dict())
    sparse = Sparsifying(Config(share=0.75, by=by, warmup=0.0, cooldown=0.5), task)
    before = sparse.loss(BATCH, torch_generator(0, "loss")).loss.item()
    train(sparse, 20)
    sparse.eval()
    assert not task.training
    expected = task.predict(BATCH).scores
    sparse.finish()
    assert set(task.state_dict()) == names
    assert all(type(layer) is nn.Linear for layer in matrices(task.encoder))
    assert torch.equal(task.predict(BATCH).scores, expected)
    assert zero_share(task.encoder) == pytest.approx(0.75, abs=0.01)
    assert task.loss(BATCH, torch_generator(0, "loss")).loss < before
    for layer in matrices(task.encoder) if by == "movement" else ():  # in every matrix
        assert (layer.weight == 0).float().mean() == pytest.approx(0.75, abs=0.01)
    fresh = classifier()
    fresh.load_state_dict(task.state_dict())
    assert torch.equal(fresh.eval().predict(BATCH).scores, expected)


def test_nothing_is_pruned_while_warming_up():
    sparse = Sparsifying(Config(share=0.9, warmup=0.6, cooldown=0.1), classifier())
    sparse.after_step(4, 10)
    assert all(part.mask.all() for part in sparse.parts)
    sparse.after_step(7, 10)
    assert not any(part.mask.all() for part in sparse.parts)


def test_a_checkpoint_holds_scores_and_masks():
    first, second = (Sparsifying(Config(share=0.5), classifier()) for _ in range(2))
    train(first, 3)
    first.prune(0.5)
    assert any("scores" in name for name in first.state_dict())
    second.load_state_dict(first.state_dict())
    first.finish()
    second.finish()
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_experts_and_tables_are_left_alone():
    task = classifier(replace(SHAPE, experts=2, activation="relu"))
    assert len(matrices(task.encoder)) == 2 * 2 + 2  # attentions, and one block without experts


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_bad_shares_are_refused(share):
    with pytest.raises(ConfigError, match=r"must lie in \[0, 1\)"):
        prune_magnitude(classifier().encoder, share)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\)"):
        Config(share=share)


def test_a_schedule_needs_time_to_prune():
    with pytest.raises(ValueError, match="leave a part of the budget"):
        Config(warmup=0.5, cooldown=0.5)
