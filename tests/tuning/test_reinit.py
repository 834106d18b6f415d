"""Re-initialised layers: which weights are new, from which seed, and which stay."""

import pytest
import torch

from selfsup.batch import Vocabulary
from selfsup.errors import ConfigError
from selfsup.models.transformer import Config, TransformerEncoder
from selfsup.tasks import classification
from selfsup.tuning.choice import Tuning, tune

MODEL = Config(dim=8, layers=3, heads=2, norm="pre", pooling="bert")


def tuned(layers, seed=0):
    torch.manual_seed(0)
    encoder = TransformerEncoder(MODEL, Vocabulary(size=20))
    with torch.no_grad():  # what a pre-training would have left nowhere at its beginning
        for parameter in encoder.parameters():
            parameter.fill_(7.0)
    task = classification.Classification(classification.Config(), encoder, ("a", "b"))
    tune(task, Tuning.of("full+reinit", {"reinit": {"layers": layers}}), seed=seed)
    return task.encoder


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_last_layers_and_what_reads_them_are_new(layers):
    new = (*(f"layers.{n}." for n in range(3)[-layers:]), "final_norm.", "pooler.")
    for name, parameter in tuned(layers).named_parameters():
        assert bool((parameter == 7.0).all()) == (not name.startswith(new)), name


def test_new_weights_are_those_of_a_fresh_encoder_and_of_the_seed():
    weight = "layers.2.feedforward.up.weight"
    one, same, other = (tuned(1, seed).get_parameter(weight) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert float(one.detach().std()) == pytest.approx(MODEL.init_std, rel=0.2)
    assert torch.equal(tuned(1).get_parameter("final_norm.weight"), torch.ones(8))


@pytest.mark.parametrize(
    ("layers", "words"),
    [(0, "layers must be at least 1, got 0"), (4, "layers = 4, and the encoder has 3")],
)
def test_a_number_of_layers_that_cannot_be(layers, words):
    with pytest.raises(ConfigError, match=words):
        tuned(layers)
