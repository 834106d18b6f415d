import pytest
import torch
from torch import nn

from selfsup.models.encoder import Encoder, Features
from selfsup.randomness import torch_generator
from selfsup.tasks import classification, regression, tagging
from selfsup.tuning.choice import Tuning, tune
from selfsup.tuning.parts import trained as trained_parameters

NAMES = ("a", "b")
TASKS = {
    "classification": lambda: classification.Classification(
        classification.Config(dropout=0.5), ToyEncoder(), NAMES
    ),
    "regression": lambda: regression.Regression(
        regression.Config(dropout=0.5), ToyEncoder(), NAMES
    ),
    "tagging": lambda: tagging.Tagging(tagging.Config(dropout=0.5), ToyEncoder(), NAMES),
}
BATCH = {"tokens": torch.tensor([[1, 2], [3, 4]]), "words": torch.tensor([[0, 1], [0, 1]])}
LABELS = {
    "classification": torch.tensor([0, 1]),
    "regression": torch.tensor([0.0, 1.0]),
    "tagging": torch.tensor([[0, 1], [1, 1]]),
}


class ToyEncoder(Encoder):
    """Embeddings with dropout and a running statistic that training mode would move."""

    def __init__(self):
        super().__init__()
        self.dim, self.num_layers = 4, 1
        self.tokens, self.dropout = nn.Embedding(8, 4), nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(4)
        nn.init.normal_(self.tokens.weight, generator=torch_generator(0, "toy"))

    def forward(self, batch):
        x = self.dropout(self.tokens(batch["tokens"]))
        x = self.norm(x.transpose(1, 2)).transpose(1, 2)  # (batch, time, dim)
        return Features((x, x), torch.ones_like(batch["tokens"], dtype=torch.bool), x.mean(1))


def train(task, name, steps=3):
    task.train()
    trained = [p for p in task.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1, weight_decay=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        loss = task.loss({**BATCH, "label": LABELS[name]}, torch_generator(0, "x", step)).loss
        loss.backward()
        optimizer.step()


def state_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("name", TASKS)
def test_probe_leaves_the_encoder_untouched(name):
    task = TASKS[name]()
    tune(task, Tuning.of("probe"))
    encoder, head = state_of(task.encoder), state_of(task.head)
    train(task, name)
    for key, value in task.encoder.state_dict().items():  # weights and running statistics
        assert torch.equal(value, encoder[key]), key
    assert all(p.grad is None for p in task.encoder.parameters())
    assert any(not torch.equal(v, head[k]) for k, v in task.head.state_dict().items())


@pytest.mark.parametrize("name", TASKS)
def test_probe_has_no_dropout_in_the_encoder_but_in_the_head(name):
    task = TASKS[name]()
    assert task.encoder.dropout.training
    tune(task, Tuning.of("probe"))
    assert not task.encoder.dropout.training  # at once, before any call of train
    task.train()
    assert not any(module.training for module in task.encoder.modules())
    assert task.training
    assert task.dropout.training
    first, second = task.encoder(BATCH).last, task.encoder(BATCH).last
    assert torch.equal(first, second)
    task.predict(BATCH)
    assert task.training
    assert not task.encoder.dropout.training


@pytest.mark.parametrize("name", TASKS)
def test_full_trains_everything(name):
    task = TASKS[name]()
    tune(task, Tuning.of("probe"))
    tune(task, Tuning.of("full"))
    task.train()
    assert task.encoder.dropout.training
    before = state_of(task)
    train(task, name)
    for key, parameter in task.named_parameters():
        assert not torch.equal(before[key], parameter), key


def test_trained_parameters():
    task = TASKS["classification"]()
    encoder, head = 8 * 4 + 2 * 4, 4 * 2 + 2
    assert trained_parameters(task) == (encoder + head, encoder + head)
    tune(task, Tuning.of("probe"))
    assert trained_parameters(task) == (head, encoder + head)
    assert trained_parameters(task.encoder) == (0, encoder)
