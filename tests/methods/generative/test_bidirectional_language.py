"""The bidirectional language model's loss against loops, its targets, and what leads to them."""

import math

import pytest
import torch

from selfsup.batch import Batch, Vocabulary
from selfsup.errors import ConfigError
from selfsup.methods.generative.bidirectional_language import (
    BidirectionalLanguage,
    Config,
)
from selfsup.methods.ops import follows
from selfsup.methods.surprisal import MAX_LOGITS
from selfsup.models import elmo, recurrent
from selfsup.randomness import isolated, seed_layers, torch_generator

LETTERS = tuple(bytes([97 + i]) for i in range(9))
VOCABULARY = Vocabulary(size=10, pad=0, sep=0, spellings=(b"", *LETTERS), unigram_entropy=2.0)
BATCH = {
    "tokens": torch.tensor([[3, 1, 4, 1, 5, 9], [2, 7, 1, 0, 0, 0]]),
    "mask": torch.tensor([[True] * 6, [True] * 3 + [False] * 3]),
    "documents": torch.tensor([[0, 0, 0, 1, 1, 1], [0] * 6]),
}
PAIRS = [(0, 0), (0, 1), (0, 3), (0, 4), (1, 0), (1, 1)]  # (row, the first of two neighbours)


def build(dropout: float = 0.0) -> BidirectionalLanguage:
    with isolated():
        seed_layers(0, "model")
        shape = elmo.Config(dim=6, cell=8, filters=(4, 4), dropout=dropout)
        return BidirectionalLanguage(Config(), elmo.ElmoEncoder(shape, VOCABULARY), VOCABULARY)


def loss_of(method: BidirectionalLanguage, batch: Batch):
    return method.loss(batch, torch_generator(0, "loss"))


def slow_nats(method: BidirectionalLanguage, vector: list[float], target: int) -> float:
    """-log softmax at `target`, in float64 loops."""
    weight, bias = method.head.weight.double().tolist(), method.head.bias.double().tolist()
    logits = [
        b + sum(w * v for w, v in zip(row, vector, strict=True))
        for row, b in zip(weight, bias, strict=True)
    ]
    return math.log(sum(math.exp(x) for x in logits)) - logits[target]


def slow_losses(method: BidirectionalLanguage) -> tuple[float, float]:
    """Mean nats forwards and backwards over `PAIRS`, each document encoded alone."""
    forward, backward = [], []
    for row, first, last in ((0, 0, 3), (0, 3, 6), (1, 0, 3)):
        tokens = BATCH["tokens"][row, first:last]
        hidden = method.encoder({"tokens": tokens[None]}).last[0].double().tolist()
        for left in range(len(tokens) - 1):
            forward.append(slow_nats(method, hidden[left][:6], int(tokens[left + 1])))
            backward.append(slow_nats(method, hidden[left + 1][6:], int(tokens[left])))
    return sum(forward) / len(forward), sum(backward) / len(backward)


def test_neighbours_are_real_and_of_one_document():
    pairs = follows(BATCH).nonzero().tolist()
    assert [tuple(pair) for pair in pairs] == PAIRS
    assert follows({"tokens": torch.zeros(2, 3)}).all()


def test_loss_equals_loops():
    method = build().eval()
    output = loss_of(method, BATCH)
    forward, backward = slow_losses(method)
    assert output.weight == len(PAIRS)
    assert output.metrics["forward_loss"].item() == pytest.approx(forward, abs=1e-5)
    assert output.metrics["backward_loss"].item() == pytest.approx(backward, abs=1e-5)
    assert output.loss.item() == pytest.approx((forward + backward) / 2, abs=1e-5)
    assert abs(forward - backward) > 1e-3


def nats_of(method, tokens):
    found = method._surprisals({"tokens": tokens}, torch.ones(1, 2))
    return [of_side.nats.view(1, 2) for of_side in found]


def test_no_prediction_has_seen_its_target():
    method = build().eval()
    tokens = BATCH["tokens"][:1, :3]
    forward, backward = nats_of(method, tokens)
    changed = torch.tensor([[3, 8, 4]])  # the word in the middle
    other_forward, other_backward = nats_of(method, changed)
    logits = method.head(method.encoder({"tokens": tokens}).last[:, 0, :6])
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([8]))
    assert other_forward[0, 0].item() == pytest.approx(expected.item(), abs=1e-6)
    logits = method.head(method.encoder({"tokens": tokens}).last[:, 2, 6:])
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([8]))
    assert other_backward[0, 1].item() == pytest.approx(expected.item(), abs=1e-6)
    assert other_forward[0, 1] != forward[0, 1]
    assert other_backward[0, 0] != backward[0, 0]


def test_chunks_change_neither_loss_nor_gradient(monkeypatch):
    found = []
    for limit in (2**24, 30):  # three positions at a time
        monkeypatch.setitem(MAX_LOGITS, "cpu", limit)
        method = build()
        output = loss_of(method, BATCH)
        output.loss.backward()
        found.append((output.loss, {k: p.grad for k, p in method.named_parameters()}))
    (once, whole), (pieces, parts) = found
    torch.testing.assert_close(pieces, once, rtol=0, atol=1e-6)
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=0, atol=1e-6, msg=name)


def test_nothing_to_predict_weighs_nothing():
    output = loss_of(build(), {"tokens": torch.tensor([[4], [2]])})
    assert output.weight == 0
    assert output.loss == 0


def test_dropout_acts_before_the_softmax_too():
    method = build(dropout=0.5)
    method.encoder.eval()
    still = loss_of(method, BATCH).loss
    method.encoder.dropout.train()
    with isolated():
        seed_layers(0, "dropout")
        assert loss_of(method, BATCH).loss != still


def test_the_score_is_that_of_the_forward_direction():
    method = build().eval()
    score = method.score(BATCH)
    scored = [tuple(place) for place in score["scored"].nonzero().tolist()]
    assert scored == [(row, left + 1) for row, left in PAIRS]
    assert (score["log_probability"][~score["scored"]] == 0).all()
    total = -score["log_probability"].sum().item() / len(PAIRS)
    assert total == pytest.approx(slow_losses(method)[0], abs=1e-5)


def test_chance_is_the_unigram_entropy():
    assert build().chance_loss == 2.0


def test_directions_that_meet_are_refused():
    shape = recurrent.Config(dim=8, layers=1, bidirectional=True)
    encoder = recurrent.RecurrentEncoder(shape, VOCABULARY)
    with pytest.raises(ConfigError, match=r"model\.name = 'elmo'"):
        BidirectionalLanguage(Config(), encoder, VOCABULARY)
