"""The recurrent encoder: its layers against gate-by-gate loops, causality and padding."""

import math

import pytest
import torch
from torch import Tensor, nn

from selfsup.batch import AudioSpec, Batch, Vocabulary
from selfsup.models.recurrent import Config, RecurrentEncoder, rearranged, turned_around
from selfsup.randomness import isolated, seed_layers, torch_generator

SPEC = AudioSpec(rate=8000, mel=5, hop=80)
KINDS = ("gru", "lstm")
SHAPES = [
    (kind, bidirectional, residual)
    for kind in KINDS
    for bidirectional in (False, True)
    for residual in (False, True)
]
every_shape = pytest.mark.parametrize(("kind", "bidirectional", "residual"), SHAPES)


def build(spec: AudioSpec | Vocabulary = SPEC, **config) -> RecurrentEncoder:
    with isolated():
        seed_layers(0, "model")
        return RecurrentEncoder(Config(**({"dim": 6, "layers": 2} | config)), spec).eval()


def random_frames(*lengths: int) -> Batch:
    """Rows of those lengths, with rubbish where padded."""
    shape = (len(lengths), max(lengths), SPEC.mel)
    frames = torch.randn(shape, generator=torch_generator(0, "frames"))
    return {
        "frames": frames,
        "mask": torch.arange(max(lengths)) < torch.tensor([[n] for n in lengths]),
    }


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def slow_recurrence(network: nn.RNNBase, rows: list[list[float]]) -> list[list[float]]:
    """One GRU (Cho et al. 2014) or LSTM, gate by gate in float64."""
    names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    w, u, b, c = (getattr(network, name).double().tolist() for name in names)
    size = network.hidden_size
    state, cell, out = [0.0] * size, [0.0] * size, []
    for x in rows:
        given = [b[i] + sum(a * v for a, v in zip(w[i], x, strict=True)) for i in range(len(w))]
        kept = [c[i] + sum(a * v for a, v in zip(u[i], state, strict=True)) for i in range(len(u))]
        new = []
        for i in range(size):
            if isinstance(network, nn.GRU):
                reset = sigmoid(given[i] + kept[i])
                update = sigmoid(given[size + i] + kept[size + i])
                fresh = math.tanh(given[2 * size + i] + reset * kept[2 * size + i])
                new.append((1 - update) * fresh + update * state[i])
            else:
                gate = [given[k * size + i] + kept[k * size + i] for k in range(4)]
                cell[i] = sigmoid(gate[1]) * cell[i] + sigmoid(gate[0]) * math.tanh(gate[2])
                new.append(sigmoid(gate[3]) * math.tanh(cell[i]))
        state = new
        out.append(state)
    return out


def slow_hidden(encoder: RecurrentEncoder, frames: Tensor) -> list[Tensor]:
    """All hidden states of one row without padding, (time, dim) each."""
    linear = encoder.embedding.linear
    x = frames.double() @ linear.weight.double().T + linear.bias.double()
    hidden = [x]
    for layer in encoder.layers:
        out = slow_recurrence(layer.forwards, x.tolist())
        if layer.backwards is not None:
            back = slow_recurrence(layer.backwards, x.tolist()[::-1])[::-1]
            out = [[*left, *right] for left, right in zip(out, back, strict=True)]
        x = torch.tensor(out, dtype=torch.float64) + (x if encoder.config.residual else 0)
        hidden.append(x)
    return hidden


@every_shape
@torch.no_grad()
def test_hidden_states_equal_loops_whatever_the_padding(kind, bidirectional, residual):
    encoder = build(kind=kind, bidirectional=bidirectional, residual=residual)
    lengths = (7, 4, 1)
    batch = random_frames(*lengths)
    features = encoder(batch)
    assert len(features.hidden) == encoder.num_layers + 1
    assert torch.equal(features.mask, batch["mask"])
    for row, length in enumerate(lengths):
        expected = slow_hidden(encoder, batch["frames"][row, :length])
        for got, slow in zip(features.hidden, expected, strict=True):
            assert got.shape == (3, 7, encoder.dim)
            torch.testing.assert_close(got[row, :length].double(), slow, rtol=0, atol=1e-5)
        mean = expected[-1].mean(0).float()
        torch.testing.assert_close(features.pooled[row], mean, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_one_direction_is_causal_and_two_are_not(kind):
    batch = random_frames(8)
    changed = {**batch, "frames": batch["frames"].clone()}
    changed["frames"][:, 5:] += 1.0
    one, two = build(kind=kind), build(kind=kind, bidirectional=True)
    assert one.causal
    assert not two.causal
    for got, expected in zip(one(changed).hidden, one(batch).hidden, strict=True):
        assert torch.equal(got[:, :5], expected[:, :5])
        assert not torch.equal(got[:, 5:], expected[:, 5:])
    assert (two(changed).last[:, 0] != two(batch).last[:, 0]).any()


def test_every_position_of_two_directions_gets_gradient_from_every_other():
    batch = random_frames(6)
    frames = batch["frames"].requires_grad_()
    encoder = build(bidirectional=True)
    for time in range(6):
        (gradient,) = torch.autograd.grad(encoder(batch).last[0, time].sum(), frames)
        assert (gradient[0].abs().amax(-1) > 0).all()


def test_turned_around_is_its_own_inverse_and_leaves_padding():
    mask = torch.arange(6) < torch.tensor([[6], [3], [0]])
    source = turned_around(mask)
    assert source.tolist() == [[5, 4, 3, 2, 1, 0], [2, 1, 0, 3, 4, 5], [0, 1, 2, 3, 4, 5]]
    x = torch.randn(3, 6, 2, generator=torch_generator(0, "x"))
    assert torch.equal(rearranged(rearranged(x, source), source), x)


def test_tokens_enter_through_a_table():
    encoder = build(Vocabulary(size=10), bidirectional=True)
    tokens = torch.tensor([[4, 2, 9]])
    hidden = encoder({"tokens": tokens}).hidden
    assert torch.equal(hidden[0], encoder.embedding.tokens.weight[tokens])
    padded = {"tokens": torch.tensor([[4, 2, 9, 0]]), "mask": torch.tensor([[True] * 3 + [False]])}
    torch.testing.assert_close(encoder(padded).last[:, :3], hidden[-1], rtol=0, atol=1e-6)


def test_given_vectors_take_the_place_of_the_embedding():
    encoder, batch = build(), random_frames(6, 4)
    vectors = encoder.embedding.vectors(batch)
    assert torch.equal(encoder(batch, vectors=vectors).last, encoder(batch).last)
    hidden = encoder(batch, vectors=torch.zeros_like(vectors)).hidden
    assert torch.equal(hidden[0], torch.zeros_like(vectors))


def test_dropout_acts_in_training_only():
    encoder, batch = build(dropout=0.5), random_frames(9)
    expected = encoder(batch).last
    assert torch.equal(encoder(batch).last, expected)
    with isolated():
        seed_layers(0, "dropout")
        assert not torch.equal(encoder.train()(batch).last, expected)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"dim": 0}, "above 0"),
        ({"layers": 0}, "above 0"),
        ({"dim": 5, "bidirectional": True}, "even"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_impossible_shapes_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        Config(**config)
