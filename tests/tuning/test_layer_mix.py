"""The layer mix: equation 1 worked out, what is trained, and the way through a run's folder."""

import math
import tomllib

import numpy as np
import pytest
import torch
from torch import nn

import selfsup
from selfsup.config import from_mapping
from selfsup.models.encoder import Encoder, Features, masked_mean
from selfsup.randomness import torch_generator
from selfsup.registry import MODELS, TASKS, module_of, resolve
from selfsup.tasks import classification
from selfsup.tuning.choice import Tuning, tune
from selfsup.tuning.layer_mix import MixedEncoder

SIZE, LAYERS, DIM = 8, 2, 4


class ToyEncoder(Encoder):
    """A table and layers with dropout."""

    def __init__(self):
        super().__init__()
        self.dim, self.num_layers, self.config = DIM, LAYERS, None
        self.tokens = nn.Embedding(SIZE, DIM)
        self.layers = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(LAYERS))
        self.dropout = nn.Dropout(0.5)
        for number, parameter in enumerate(self.parameters()):
            nn.init.normal_(parameter, generator=torch_generator(0, "toy", number))

    def forward(self, batch):
        hidden = [self.dropout(self.tokens(batch["tokens"]))]
        for layer in self.layers:
            hidden.append(torch.tanh(layer(hidden[-1])))
        return Features(tuple(hidden), batch["mask"], hidden[-1][:, 0])


BATCH = {
    "tokens": torch.tensor([[1, 2, 3], [4, 5, 0]]),
    "mask": torch.tensor([[True] * 3, [True, True, False]]),
    "label": torch.tensor([0, 1]),
}


def classifier(pooling="mean"):
    config = classification.Config(dropout=0.5, pooling=pooling)
    return classification.Classification(config, ToyEncoder(), ("a", "b"))


def gradient_names(task):
    task.loss(BATCH, torch_generator(0, "loss")).loss.backward()
    return {name for name, p in task.named_parameters() if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize("layer_norm", [False, True])
def test_the_mix_equals_equation_1(layer_norm):
    encoder = ToyEncoder().eval()
    mixed = MixedEncoder(encoder, layer_norm).eval()
    with torch.no_grad():
        mixed.scores.copy_(torch.tensor([0.5, -1.0, 2.0]))
        mixed.gamma.fill_(0.7)
    inner, features = encoder(BATCH), mixed(BATCH)
    total = sum(math.exp(s) for s in (0.5, -1.0, 2.0))
    expected = torch.zeros(2, 3, DIM, dtype=torch.float64)
    for score, layer in zip((0.5, -1.0, 2.0), inner.hidden, strict=True):
        layer = layer.double()
        if layer_norm:
            spread = (layer.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
            layer = (layer - layer.mean(-1, keepdim=True)) / spread
        expected += 0.7 * math.exp(score) / total * layer
    torch.testing.assert_close(features.last.double(), expected, rtol=0, atol=1e-6)
    pooled = masked_mean(features.last, BATCH["mask"])
    assert torch.equal(features.pooled, pooled)
    assert len(features.hidden) == mixed.num_layers + 1 == LAYERS + 2
    assert all(map(torch.equal, features.hidden[:-1], inner.hidden))


def test_it_begins_with_the_mean_of_all_layers():
    task = classifier()
    tune(task, Tuning.of("layer_mix"))
    features = task.encoder(BATCH)
    mean = torch.stack(features.hidden[:-1]).mean(0)
    torch.testing.assert_close(features.last, mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "encoder", "cls"])
def test_only_the_mix_and_the_head_get_gradients(pooling):
    task = classifier(pooling)
    tune(task, Tuning.of("layer_mix"))
    task.train()
    trained = {"encoder.scores", "encoder.gamma", "head.weight", "head.bias"}
    assert gradient_names(task) == trained
    assert {name for name, p in task.named_parameters() if p.requires_grad} == trained


def test_the_frozen_encoder_is_without_dropout_and_a_trained_one_is_not():
    task = classifier()
    assert task.encoder.dropout.training
    tune(task, Tuning.of("layer_mix"))
    assert not task.encoder.encoder.dropout.training  # at once, before any call of train
    task.train()
    assert task.training
    assert not task.encoder.encoder.dropout.training
    tune(task, Tuning.of("full"))
    task.train()
    assert task.encoder.encoder.dropout.training
    assert "encoder.encoder.tokens.weight" in gradient_names(task)


def test_the_weights_find_the_layer_that_knows():
    """The label is the sign of a number in the table; later layers have forgotten the token."""
    task = classifier()
    with torch.no_grad():
        for layer in task.encoder.layers:
            layer.weight.zero_()
    tune(task, Tuning.of("layer_mix"))
    optimizer = torch.optim.Adam([p for p in task.parameters() if p.requires_grad], lr=0.05)
    generator = torch_generator(0, "labels")
    mask = torch.ones(16, 1, dtype=torch.bool)
    for _ in range(60):
        tokens = torch.randint(SIZE, (16, 1), generator=generator)
        label = (task.encoder.encoder.tokens(tokens)[:, 0, 0] > 0).long()
        batch = {"tokens": tokens, "mask": mask, "label": label}
        optimizer.zero_grad()
        task.loss(batch, generator).loss.backward()
        optimizer.step()
    share = task.encoder.scores.softmax(0)
    assert share[0] > 0.5
    assert task.encoder.gamma > 1


@pytest.mark.parametrize("name", ["recurrent", "bag"])
def test_models_of_the_registry_can_be_mixed(name):
    from selfsup.batch import Vocabulary

    config = from_mapping(module_of(MODELS, "model", name).Config, {"dim": DIM}, "model")
    encoder = resolve(MODELS, "model", name)(config, Vocabulary(size=SIZE))
    task = resolve(TASKS, "task", "tagging")(
        module_of(TASKS, "task", "tagging").Config(), encoder, ("a", "b")
    )
    tune(task, Tuning.of("layer_mix"))
    label = torch.tensor([[0, 1, -100], [1, 0, -100]])
    task.loss({**BATCH, "label": label}, torch_generator(0, "loss")).loss.backward()
    assert task.encoder.gamma.grad is not None
    assert all(p.grad is None for p in encoder.parameters())


RECIPE = """
[recipe]
summary = "an ELMo of the tests"
[data]
name = "text"
row_length = 16
split_documents = "line"
valid_fraction = 0.1
[data.tokenizer]
kind = "word"
style = "gpt"
vocab_size = 60
[model]
name = "elmo"
dim = 8
cell = 12
filters = [8, 8]
[method]
name = "bidirectional_language"
[training]
steps = 3
lr = 1e-2
evaluations = 1
precision = "float32"
device = "cpu"
"""


def test_a_mix_survives_its_folder_and_further_tuning(corpus, tmp_path):
    (tmp_path / "elmo.toml").write_text(RECIPE)
    base = selfsup.pretrain(tmp_path / "elmo.toml", corpus.text, tmp_path / "base")
    scores = selfsup.evaluate(base)
    assert scores["perplexity_per_token"] == pytest.approx(math.exp(scores["loss"]))
    settings = {"training.steps": 4, "training.lr": 1e-1, "training.precision": "float32"}
    runs = [base]
    for number, tuning in enumerate(["layer_mix", "full"]):
        out = tmp_path / str(number)
        runs.append(
            selfsup.finetune(
                runs[-1],
                "classification",
                corpus.labelled,
                out,
                tuning=tuning,
                settings=settings,
            )
        )
    text = ["the film was dull and the end of the film was awful ."]
    for run, names in zip(runs[1:], (["layer_mix"], ["layer_mix", "full"]), strict=True):
        values = tomllib.loads((run / "model" / "config.toml").read_text())
        assert values["tuning"]["names"] == names
        model = selfsup.load(run)
        assert isinstance(model.encoder, MixedEncoder)
        assert model.encoder.scores.abs().max() > 0
        assert model.embed(text).shape == (1, 16)
        assert np.array_equal(model.embed(text), model.embed(text, layer=3))
        assert model.predict(text)[0] in ("good", "bad")
    frozen, moved = (selfsup.load(run).encoder.encoder.state_dict() for run in runs[1:])
    first = selfsup.load(base).encoder.state_dict()
    assert all(torch.equal(first[name], frozen[name]) for name in first)
    assert not all(torch.equal(first[name], moved[name]) for name in first)
