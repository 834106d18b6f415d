"""Gradual unfreezing: when each layer opens, what a closed one does, what a checkpoint keeps."""

import pytest
import torch

from selfsup.batch import Vocabulary
from selfsup.errors import ConfigError
from selfsup.models.transformer import Config, TransformerEncoder
from selfsup.randomness import torch_generator
from selfsup.tasks import classification
from selfsup.training.config import TrainingConfig
from selfsup.training.loop import train
from selfsup.tuning.choice import Tuning, tune
from selfsup.tuning.unfreezing import num_open

BATCH = {
    "tokens": torch.tensor([[5, 7, 2, 9], [4, 3, 8, 8]]),
    "label": torch.tensor([0, 1]),
    "index": torch.tensor([0, 1]),
}


def tuned(share):
    torch.manual_seed(0)
    encoder = TransformerEncoder(Config(dim=8, layers=2, heads=2), Vocabulary(size=20))
    task = classification.Classification(classification.Config(), encoder, ("a", "b"))
    tune(task, Tuning.of("full+unfreezing", {"unfreezing": {"share": share}}))
    return task


def layers(task):
    """Embedding and layers: whether all of each is trained."""
    encoder = task.encoder
    return [
        {p.requires_grad for p in part.parameters()} == {True}
        for part in (encoder.embedding, *encoder.layers)
    ]


def test_the_schedule():
    assert [num_open(step, 12, 3, 0.5) for step in range(8)] == [1, 1, 1, 2, 2, 2, 3, 3]
    assert num_open(0, 12, 3, 0.0) == 3


class Toy:
    """Two examples, always the same."""

    fields, lengths, labels = ("tokens", "label"), None, None

    def __len__(self):
        return 2

    def batch(self, numbers):
        return {name: value[torch.as_tensor(numbers)] for name, value in BATCH.items()}


def test_layers_open_from_the_top_while_training():
    task, seen, before = tuned(0.5), [], {}
    own_loss = task.loss

    def loss(batch, generator):
        out = own_loss(batch, generator)
        seen.append(layers(task))
        if len(seen) == 3:  # nothing below the last layer has moved, not by decay either
            for name, value in task.state_dict().items():
                lower = name.startswith(("encoder.embedding", "encoder.layers.0"))
                assert torch.equal(value, before[name]) == lower or name == "unfreezing.opened"
        return out

    task.loss = loss
    before |= {name: value.clone() for name, value in task.state_dict().items()}
    config = TrainingConfig(
        steps=8, batch_size=2, lr=0.01, weight_decay=0.1, evaluations=0, warmup=0.0, device="cpu"
    )
    train(task, Toy(), None, config)
    closed, half, all_open = [False, False, True], [False, True, True], [True] * 3
    assert seen == [closed] * 2 + [half] * 2 + [all_open] * 4
    assert int(task.unfreezing.opened) == 3


def test_a_checkpoint_keeps_how_far_it_is_and_a_saved_model_does_not():
    task, other = tuned(0.5), tuned(0.5)
    task.after_step(3, 12)
    other.load_state_dict(task.state_dict())
    other.train()
    other.loss(BATCH, torch_generator(0, "x"))
    assert layers(other) == [False, True, True]
    assert not any(name.startswith("unfreezing") for name in task.kept)


def test_looking_at_held_out_examples_opens_nothing():
    task = tuned(0.5)
    task.eval()
    task.loss(BATCH, torch_generator(0, "x"))
    assert layers(task) == [True, True, True]  # as the optimizer must find it


def test_the_share_is_below_one():
    with pytest.raises(ConfigError, match=r"share must lie in \[0, 1\), got 1"):
        tuned(1.0)
