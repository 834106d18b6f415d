"""ELMo's encoder: its characters and its LSTMs against loops, what each direction sees, padding."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfsup.batch import Batch, Vocabulary
from selfsup.config import from_mapping, preset_values, presets
from selfsup.errors import ConfigError
from selfsup.models.elmo import (
    BEGIN,
    END,
    FIRST_SPECIAL,
    PAD,
    Config,
    ElmoEncoder,
    documents_apart,
    spelled,
)
from selfsup.randomness import isolated, seed_layers, torch_generator

WORDS = ("walk", "walks", "walked", "the", "zygote", "s", "Öl", "quixotically")
VOCABULARY = Vocabulary(
    size=2 + len(WORDS),
    pad=0,
    unk=1,
    continues=(7,),
    spellings=(b"", b"", *(word.encode() for word in WORDS)),
)
SMALL = {"dim": 4, "cell": 6, "filters": (3, 2, 4), "char_dim": 5, "max_chars": 8}


def build(vocabulary: Vocabulary = VOCABULARY, **config) -> ElmoEncoder:
    with isolated():
        seed_layers(0, "model")
        return ElmoEncoder(Config(**(SMALL | config)), vocabulary).eval()


def random_tokens(*lengths: int) -> Batch:
    """Rows of those lengths, with other words where padded."""
    shape = (len(lengths), max(lengths))
    tokens = torch.randint(2, VOCABULARY.size, shape, generator=torch_generator(0, "tokens"))
    return {"tokens": tokens, "mask": torch.arange(shape[1]) < torch.tensor(lengths)[:, None]}


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def affine(linear: nn.Linear, x: list[float]) -> list[float]:
    weight, bias = linear.weight.double().tolist(), linear.bias.double().tolist()
    rows = zip(weight, bias, strict=True)
    return [b + sum(w * v for w, v in zip(row, x, strict=True)) for row, b in rows]


def slow_word(encoder: ElmoEncoder, chars: list[int]) -> list[float]:
    """One word's vector from its characters, without padding, in float64 loops."""
    embedding = encoder.embedding
    table = embedding.characters.weight.double().tolist()
    vectors = [table[char] for char in chars]
    found = []
    for convolution in embedding.convolutions:
        weight, bias = convolution.weight.double().tolist(), convolution.bias.double().tolist()
        for kernel, b in zip(weight, bias, strict=True):
            matches = []
            for first in range(len(chars)):
                window = vectors[first : first + convolution.kernel_size[0]]  # the rest is zero
                matches.append(
                    b
                    + sum(
                        kernel[channel][offset] * value
                        for offset, vector in enumerate(window)
                        for channel, value in enumerate(vector)
                    )
                )
            found.append(max(0.0, max(matches)))
    for highway in embedding.highways:
        gate = [sigmoid(g) for g in affine(highway.gate, found)]
        change = [max(0.0, c) for c in affine(highway.change, found)]
        found = [g * c + (1 - g) * x for g, c, x in zip(gate, change, found, strict=True)]
    return affine(embedding.projection, found)


def slow_lstm(lstm: nn.LSTM, rows: list[list[float]]) -> list[list[float]]:
    """An LSTM whose output is projected (Sak et al. 2014), gate by gate in float64."""
    names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    w, u, b, c = (getattr(lstm, name).double().tolist() for name in names)
    size = lstm.hidden_size
    projection = lstm.weight_hr_l0.double().tolist()
    cell, state, out = [0.0] * size, [0.0] * len(projection), []
    for x in rows:
        gate = [
            b[i]
            + c[i]
            + sum(a * v for a, v in zip(w[i], x, strict=True))
            + sum(a * v for a, v in zip(u[i], state, strict=True))
            for i in range(4 * size)
        ]
        inner = []
        for i in range(size):
            fresh = sigmoid(gate[i]) * math.tanh(gate[2 * size + i])
            cell[i] = sigmoid(gate[size + i]) * cell[i] + fresh
            inner.append(sigmoid(gate[3 * size + i]) * math.tanh(cell[i]))
        state = [sum(a * v for a, v in zip(row, inner, strict=True)) for row in projection]
        out.append(state)
    return out


def slow_hidden(encoder: ElmoEncoder, tokens: list[int]) -> list[Tensor]:
    """All hidden states of one document, (time, 2 dim) each."""
    chars = spelled(encoder.spec, encoder.config.max_chars).tolist()
    words = [slow_word(encoder, [c for c in chars[token] if c != PAD]) for token in tokens]
    ahead, back = words, words[::-1]
    hidden = [torch.tensor([[*word, *word] for word in words], dtype=torch.float64)]
    for number in range(encoder.num_layers):
        outputs = []
        for layer, x in ((encoder.forwards[number], ahead), (encoder.backwards[number], back)):
            out = slow_lstm(layer.lstm, x)
            if number and encoder.config.residual:
                out = [
                    [a + b for a, b in zip(one, two, strict=True)]
                    for one, two in zip(out, x, strict=True)
                ]
            outputs.append(out)
        ahead, back = outputs
        both = [[*left, *right] for left, right in zip(ahead, back[::-1], strict=True)]
        hidden.append(torch.tensor(both, dtype=torch.float64))
    return hidden


def test_spellings_worked_by_hand():
    table = spelled(VOCABULARY, 8)
    assert table.shape == (VOCABULARY.size, 8)
    rows = table.tolist()
    assert rows[0] == [BEGIN, FIRST_SPECIAL, END, *[PAD] * 5]
    assert rows[1] == [BEGIN, FIRST_SPECIAL + 1, END, *[PAD] * 5]
    assert rows[2] == [BEGIN, *b"walk", END, PAD, PAD]
    assert rows[7] == [ord("s"), END, *[PAD] * 6]  # goes on with the word before it
    assert rows[8] == [BEGIN, 0xC3, 0x96, ord("l"), END, *[PAD] * 3]
    assert rows[9] == [BEGIN, *b"quixot", END]  # cut


@torch.no_grad()
def test_word_vectors_equal_loops_and_know_nothing_of_the_batch():
    encoder = build()
    tokens = torch.tensor([[2, 3, 9], [7, 1, 3]])
    got = encoder.embedding(tokens)
    chars = spelled(VOCABULARY, 8).tolist()
    for row in range(2):
        for time in range(3):
            real = [char for char in chars[tokens[row, time]] if char != PAD]
            expected = torch.tensor(slow_word(encoder, real), dtype=torch.float64)
            torch.testing.assert_close(got[row, time].double(), expected, rtol=0, atol=1e-6)
    alone = encoder.embedding(tokens[:1, :1])  # without longer words beside it
    torch.testing.assert_close(alone[0, 0], got[0, 0], rtol=0, atol=1e-6)
    wider = build(max_chars=12).embedding(tokens[:1, :2])
    torch.testing.assert_close(wider, got[:1, :2], rtol=0, atol=1e-6)


def test_words_spelled_alike_are_near():
    encoder = build(dim=64, cell=64, filters=(32, 32, 64, 64), char_dim=16, max_chars=16)
    tokens = [2, 3, 4, 5, 6, 8, 9]  # all but the "s" that goes on: walk, walks, walked, the, ...
    vectors = encoder.embedding(torch.tensor([tokens]))[0]
    order = torch.cdist(vectors, vectors).argsort(1)
    for word in range(3):
        assert set(order[word, :3].tolist()) == {0, 1, 2}


@pytest.mark.parametrize("residual", [True, False])
@torch.no_grad()
def test_hidden_states_equal_loops_whatever_the_padding(residual):
    encoder = build(residual=residual)
    lengths = (6, 3, 1)
    batch = random_tokens(*lengths)
    features = encoder(batch)
    assert len(features.hidden) == encoder.num_layers + 1
    assert encoder.dim == 8
    assert torch.equal(features.mask, batch["mask"])
    for row, length in enumerate(lengths):
        expected = slow_hidden(encoder, batch["tokens"][row, :length].tolist())
        for got, slow in zip(features.hidden, expected, strict=True):
            assert got.shape == (3, 6, 8)
            torch.testing.assert_close(got[row, :length].double(), slow, rtol=0, atol=1e-6)
        mean = expected[-1].mean(0).float()
        torch.testing.assert_close(features.pooled[row], mean, rtol=0, atol=1e-6)


@torch.no_grad()
def test_padding_may_stand_before_a_row():
    encoder, batch = build(), random_tokens(5)
    before = {name: F.pad(batch[name], (3, 0)) for name in ("tokens", "mask")}
    for got, expected in zip(encoder(before).hidden, encoder(batch).hidden, strict=True):
        torch.testing.assert_close(got[:, 3:], expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_packed_row_equals_its_documents_alone():
    encoder, batch = build(), random_tokens(9, 7)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 2], [0, 0, 0, 0, 0, 1, 1, 0, 0]])
    packed = encoder({**batch, "documents": documents}).hidden
    for row, first, last in ((0, 0, 3), (0, 3, 8), (0, 8, 9), (1, 0, 5), (1, 5, 7)):
        alone = encoder({"tokens": batch["tokens"][row : row + 1, first:last]}).hidden
        for got, expected in zip(packed, alone, strict=True):
            torch.testing.assert_close(got[row, first:last], expected[0], rtol=0, atol=1e-6)


def test_documents_apart_worked_by_hand():
    mask = torch.tensor([[True, True, True, True], [False, True, True, False]])
    documents = torch.tensor([[0, 0, 0, 1], [0, 0, 0, 0]])
    runs = documents_apart(mask, documents)
    assert runs.real.tolist() == [[True] * 3, [True, False, False], [True, True, False]]
    assert runs.source[runs.real].tolist() == [0, 1, 2, 3, 5, 6]
    assert runs.home.tolist() == [[0, 1, 2, 3], [0, 6, 7, 0]]
    nothing = documents_apart(torch.zeros(2, 3, dtype=torch.bool), None)
    assert not nothing.real.any()


def test_each_half_sees_one_side_only():
    encoder, batch = build(), {"tokens": torch.tensor([[2, 3, 4, 5, 6, 7]])}
    changed = {"tokens": torch.tensor([[2, 3, 4, 9, 6, 7]])}
    assert not encoder.causal
    for got, expected in zip(encoder(changed).hidden[1:], encoder(batch).hidden[1:], strict=True):
        differs = (got - expected).abs().reshape(6, 2, 4).amax(-1) > 1e-7  # (time, direction)
        assert differs[:, 0].tolist() == [False, False, False, True, True, True]
        assert differs[:, 1].tolist() == [True, True, True, True, False, False]


def test_the_first_layer_is_the_words_vector_twice():
    encoder, batch = build(), random_tokens(4)
    words = encoder.embedding(batch["tokens"])
    assert torch.equal(encoder(batch).hidden[0], torch.cat([words, words], -1))


def test_dropout_acts_in_training_only():
    encoder, batch = build(dropout=0.5), random_tokens(9)
    expected = encoder(batch)
    assert torch.equal(encoder(batch).last, expected.last)
    with isolated():
        seed_layers(0, "dropout")
        got = encoder.train()(batch)
    assert not torch.equal(got.last, expected.last)
    assert torch.equal(got.hidden[0], expected.hidden[0])  # layers drop what they read


def test_the_spelling_is_rebuilt_and_not_saved():
    encoder = build()
    assert not any("spelling" in name for name in encoder.state_dict())
    assert encoder.embedding.characters.weight[PAD].tolist() == [0.0] * 5
    assert encoder.forwards[0].lstm.bias_ih_l0.tolist() == [0.0] * 6 + [1.0] * 6 + [0.0] * 12


def test_unknown_spellings_are_refused():
    with pytest.raises(ConfigError, match="10 tokens with 0 spellings"):
        build(replace(VOCABULARY, spellings=()))


PRESETS = {  # parameters; the published network is said to have 93.6 million
    "elmo": 93_666_432,
    "elmo-mini": 1_369_600,
}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_the_stated_size(name):
    config = from_mapping(Config, preset_values("elmo", name), "model")
    with torch.device("meta"):
        encoder = ElmoEncoder(config, VOCABULARY)
    assert sum(p.numel() for p in encoder.parameters()) == PRESETS[name]


def test_every_preset_is_counted():
    assert set(PRESETS) == set(presets()["elmo"])
    assert abs(PRESETS["elmo"] / 93.6e6 - 1) < 0.02


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"dim": 0}, "above 0"),
        ({"filters": ()}, "above 0"),
        ({"cell": 3}, "at least dim"),
        ({"max_chars": 2}, "max_chars"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_impossible_shapes_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        Config(**(SMALL | config))
