"""BitFit: which layers have an offset, that it is the bias that moves, merging, sets."""

import pytest
import torch
from torch import nn

from selfsup.batch import Vocabulary
from selfsup.errors import ConfigError
from selfsup.models.transformer import Config, TransformerEncoder
from selfsup.randomness import torch_generator
from selfsup.tasks import classification
from selfsup.tuning.choice import Tuning, tune
from selfsup.tuning.parts import OWN, Where, merge, trained

SHAPE = {"dim": 8, "layers": 2, "heads": 2, "dropout": 0.0, "positions": "learned"}
BATCH = {"tokens": torch.tensor([[5, 7, 2, 9], [4, 3, 8, 8]]), "label": torch.tensor([0, 1])}


def classifier(**shape):
    torch.manual_seed(0)
    encoder = TransformerEncoder(Config(**{**SHAPE, **shape}), Vocabulary(size=20))
    return classification.Classification(classification.Config(dropout=0.0), encoder, ("a", "b"))


def tuned(task, name=OWN):
    tune(task, Tuning.of("bias"), Where(name))
    for place, _, part in task.encoder.additions.every(name):
        nn.init.normal_(part.offset, generator=torch_generator(1, name + place))
    return task


def test_it_begins_as_the_base_and_every_bias_has_an_offset():
    task = classifier(embedding_norm=True, pooling="bert")
    before = task.encoder(BATCH).last
    biases = {n: p for n, p in task.encoder.named_parameters() if n.endswith(".bias")}
    tune(task, Tuning.of("bias"))
    assert torch.equal(task.encoder(BATCH).last, before)
    offsets = {
        place.replace("/", ".") + ".bias": part.offset
        for place, _, part in task.encoder.additions.every(OWN)
    }
    assert {n: p.shape for n, p in offsets.items()} == {n: p.shape for n, p in biases.items()}
    assert trained(task)[0] == sum(p.numel() for p in biases.values()) + 2 * 8 + 2


def test_an_offset_has_the_gradient_of_its_bias():
    task = classifier()
    task.loss(BATCH, torch_generator(0, "loss")).loss.backward()
    expected = {n: p.grad for n, p in task.encoder.named_parameters() if n.endswith(".bias")}
    task = classifier()
    tune(task, Tuning.of("bias"))
    task.loss(BATCH, torch_generator(0, "loss")).loss.backward()
    moved = {name for name, p in task.named_parameters() if p.grad is not None}
    assert all(name.startswith(("head.", "encoder.additions.")) for name in moved)
    for place, _, part in task.encoder.additions.every(OWN):
        torch.testing.assert_close(part.offset.grad, expected[place.replace("/", ".") + ".bias"])


def test_merging_puts_it_into_the_bias():
    task = classifier()
    old = task.encoder.layers[0].attention.qkv.bias.clone()
    tuned(task)
    offset = task.encoder.additions[OWN]["layers/0/attention/qkv"]["bias"].offset
    before = task.encoder(BATCH).last
    merge(task.encoder)
    torch.testing.assert_close(task.encoder(BATCH).last, before)
    assert torch.equal(task.encoder.layers[0].attention.qkv.bias, old + offset)


def test_sets_in_one_batch(same_alone_and_mixed):
    task = tuned(tuned(classifier(), "first"), "second")
    same_alone_and_mixed(task, BATCH)


def test_a_model_without_biases():
    with pytest.raises(ConfigError, match=r"no linear layer or norm .*model.bias = false"):
        tune(classifier(bias=False), Tuning.of("bias"))
