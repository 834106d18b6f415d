"""R-Drop: the divergence by hand, the loss of two passes, where it acts and where it cannot."""

import math

import pytest
import torch

from selfsup.batch import Vocabulary
from selfsup.errors import ConfigError
from selfsup.models.transformer import Config, TransformerEncoder
from selfsup.randomness import torch_generator
from selfsup.tasks import classification, regression, tagging
from selfsup.tasks.exits import Config as ExitConfig
from selfsup.tuning.choice import Tuning, tune
from selfsup.tuning.r_drop import divergence

TOKENS = torch.tensor([[5, 7, 2, 9], [4, 3, 8, 8]])
LABELS = {
    classification.Classification: torch.tensor([0, 1]),
    tagging.Tagging: torch.tensor([[0, -100, 1, -100], [1, 0, -100, -100]]),
}


def tuned(kind=classification.Classification, alpha=1.0, **options):
    torch.manual_seed(0)
    encoder = TransformerEncoder(Config(dim=8, layers=2, heads=2, dropout=0.2), Vocabulary(size=20))
    module = {
        classification.Classification: classification,
        tagging.Tagging: tagging,
        regression.Regression: regression,
    }[kind]
    task = kind(module.Config(dropout=0.5, **options), encoder, ("a", "b"))
    tune(task, Tuning.of("full+r_drop", {"r_drop": {"alpha": alpha}}))
    return task.train()


def test_the_divergence_by_hand():
    p, q = [0.5, 0.5], [0.25, 0.75]
    one, two = (torch.tensor([values, [0.9, 0.1]]).log() for values in (p, q))
    forward = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    back = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    expected = (forward + back) / 2
    both = divergence(one, two, torch.tensor([True, True]))
    assert float(both) == pytest.approx(expected / 2, rel=1e-5)  # the second item says the same
    alone = divergence(one + 3.0, two, torch.tensor([True, False]))
    assert float(alone) == pytest.approx(expected, rel=1e-5)
    assert float(divergence(one, two, torch.tensor([False, False]))) == 0


@pytest.mark.parametrize("kind", LABELS)
def test_the_loss_is_of_two_passes_with_other_dropout(kind):
    alpha, batch = 2.5, {"tokens": TOKENS, "label": LABELS[kind]}
    task, plain = tuned(kind, alpha), kind.loss
    torch.manual_seed(3)
    read = [task.read(task.encoder(batch)) for _ in range(2)]
    torch.manual_seed(3)
    own = [plain(task, batch, torch_generator(0, "x")).loss for _ in range(2)]
    torch.manual_seed(3)
    found = task.loss(batch, torch_generator(0, "x"))
    assert not torch.equal(*own)
    apart = divergence(*read, batch["label"] != -100)
    assert float(apart.detach()) > 0
    torch.testing.assert_close(found.loss, (own[0] + own[1]) / 2 + alpha * apart)
    torch.testing.assert_close(found.metrics["divergence"], apart)
    found.loss.backward()
    assert all(p.grad is not None for p in task.head.parameters())


def test_without_training_it_is_the_loss_of_the_task():
    batch = {"tokens": TOKENS, "label": torch.tensor([0, 1])}
    task = tuned().eval()
    found = task.loss(batch, torch_generator(0, "x"))
    plain = classification.Classification.loss(task, batch, torch_generator(0, "x"))
    assert torch.equal(found.loss, plain.loss)
    assert found.metrics.keys() == plain.metrics.keys()
    assert task.predict(batch).values.shape == (2,)


def test_what_has_no_classes_is_refused():
    with pytest.raises(ConfigError, match="r_drop compares probabilities of classes"):
        tuned(regression.Regression)
    with pytest.raises(ConfigError, match="without exits"):
        tuned(exits=ExitConfig(training="joint"))
    with pytest.raises(ConfigError, match="alpha must not be negative"):
        tuned(alpha=-1.0)
