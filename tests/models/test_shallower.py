"""Layers taken from a deeper transformer: which ones, and that nothing else gets in."""

from dataclasses import replace

import pytest
import torch

from selfsup.batch import Vocabulary
from selfsup.errors import ConfigError
from selfsup.models.recurrent import Config as Recurrent
from selfsup.models.recurrent import RecurrentEncoder
from selfsup.models.shallower import layers_kept, take_layers
from selfsup.models.transformer import Config, TransformerEncoder
from selfsup.randomness import isolated, seed_layers

VOCABULARY = Vocabulary(size=20, pad=0)
MODEL = Config(dim=8, layers=4, heads=2, dropout=0.0)
BATCH = {"tokens": torch.tensor([[5, 7, 2, 9], [3, 4, 5, 6]])}


def build(config=MODEL, seed=0, vocabulary=VOCABULARY):
    with isolated():
        seed_layers(seed, "model")
        return TransformerEncoder(config, vocabulary).eval()


def test_which_layers_are_kept():
    assert layers_kept(12, 6) == (0, 2, 4, 7, 9, 11)  # the authors' code
    assert layers_kept(12, 12) == tuple(range(12))
    assert layers_kept(4, 2) == (0, 3)
    assert layers_kept(5, 1) == (0,)
    for count in range(1, 13):
        for wanted in range(1, count + 1):
            kept = layers_kept(count, wanted)
            assert list(kept) == sorted(set(kept))
            assert len(kept) == wanted
            assert kept[-1] == (count - 1 if wanted > 1 else 0)


@pytest.mark.parametrize("positions", ["rotary", "relative", "learned"])
def test_the_student_equals_its_layers_put_together_by_hand(positions):
    config = replace(MODEL, positions=positions, norm_kind="rms", activation="swiglu")
    deeper, student = build(config), build(replace(config, layers=2), seed=1)
    assert take_layers(student, deeper) == (0, 3)
    by_hand = build(replace(config, layers=2), seed=2)
    by_hand.embedding.load_state_dict(deeper.embedding.state_dict())
    for place, number in enumerate((0, 3)):
        by_hand.layers[place].load_state_dict(deeper.layers[number].state_dict())
    by_hand.final_norm.load_state_dict(deeper.final_norm.state_dict())
    if positions == "relative":
        by_hand.relative.load_state_dict(deeper.relative.state_dict())
    for got, expected in zip(student(BATCH).hidden, by_hand(BATCH).hidden, strict=True):
        assert torch.equal(got, expected)
    assert torch.equal(student(BATCH).hidden[1], deeper(BATCH).hidden[1])


def test_it_is_a_copy():
    deeper, student = build(), build(replace(MODEL, layers=2), seed=1)
    take_layers(student, deeper)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    assert torch.equal(deeper(BATCH).last, build()(BATCH).last)


def test_shared_layers_are_taken_as_one():
    shared = replace(MODEL, share_layers=True)
    deeper, student = build(shared), build(replace(shared, layers=2), seed=1)
    take_layers(student, deeper)
    assert torch.equal(student(BATCH).hidden[1], deeper(BATCH).hidden[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 5}, "5 layers cannot be taken from a model of 4"),
        ({"heads": 4}, "model.heads is 4, but 2"),
        ({"dim": 16}, "model.dim is 16, but 8"),
        ({"norm": "post"}, "model.norm is 'post', but 'pre'"),
    ],
)
def test_another_shape_is_an_error(changes, message):
    with pytest.raises(ConfigError, match=message):
        take_layers(build(replace(MODEL, **changes)), build())


def test_other_models_and_other_data_are_errors():
    student = build(replace(MODEL, layers=2))
    with pytest.raises(ConfigError, match="not from a RecurrentEncoder"):
        take_layers(student, RecurrentEncoder(Recurrent(dim=8, layers=2), VOCABULARY))
    with pytest.raises(ConfigError, match="other data"):
        take_layers(student, build(vocabulary=Vocabulary(size=21, pad=0)))
    added = build()
    added.additions = torch.nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r"other weights: additions\.bias.*merge"):
        take_layers(student, added)
