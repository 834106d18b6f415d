"""word2vec: its loss against loops, its draws against their distributions, and toy meanings."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from selfsup.batch import Batch, Vocabulary
from selfsup.data.dataset import Dataset
from selfsup.errors import ConfigError, DataError
from selfsup.methods.predictive import word2vec
from selfsup.methods.predictive.word2vec import (
    Config,
    Word2Vec,
    keep_probability,
    negative_sampling_loss,
    neighbours,
)
from selfsup.models.bag import BagEncoder
from selfsup.models.bag import Config as Bag
from selfsup.models.transformer import Config as Transformer
from selfsup.models.transformer import TransformerEncoder
from selfsup.randomness import isolated, numpy_generator, seed_layers, torch_generator
from selfsup.training.config import TrainingConfig
from selfsup.training.loop import train

PAD, UNK, CLS, SEP, MASK = range(5)
SIZE = 30
VOCABULARY = Vocabulary(size=SIZE, pad=PAD, unk=UNK, cls=CLS, sep=SEP, mask=MASK)


def build(dim: int = 8, vocabulary: Vocabulary = VOCABULARY, **config) -> Word2Vec:
    with isolated():
        seed_layers(0, "model")
        encoder = BagEncoder(Bag(dim=dim), vocabulary)
        return Word2Vec(Config(**config), encoder, vocabulary).eval()


def draws(seed: int = 0) -> torch.Generator:
    return torch_generator(seed, "draws")


def slow_loss(vectors: Tensor, output: Tensor, target: Tensor, negatives: Tensor):
    """Equation 4 with loops in float64, and the share of pairs that are told apart."""

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    def score(word: int, pair: int) -> float:
        return sum(
            a * b for a, b in zip(output[word].tolist(), vectors[pair].tolist(), strict=True)
        )

    loss, told = 0.0, 0
    for pair, true in enumerate(target.tolist()):
        others = [word for word in negatives[pair].tolist() if word != true]
        loss -= math.log(sigmoid(score(true, pair)))
        loss -= sum(math.log(sigmoid(-score(word, pair))) for word in others)
        told += all(score(true, pair) > score(word, pair) for word in others)
    return loss / len(target), told / len(target)


def test_loss_against_loops():
    generator = draws()
    vectors = torch.randn(40, 6, generator=generator)
    output = torch.randn(9, 6, generator=generator)
    target = torch.randint(9, (40,), generator=generator)
    negatives = torch.randint(9, (40, 3), generator=generator)
    assert (negatives == target.unsqueeze(1)).any()
    loss, accuracy = negative_sampling_loss(vectors, output, target, negatives)
    expected = slow_loss(vectors.double(), output.double(), target, negatives)
    assert loss.item() == pytest.approx(expected[0], rel=1e-5)
    assert accuracy.item() == pytest.approx(expected[1])
    assert 0 < accuracy < 1


def slow_windows(texts: list[int], reach: list[int]) -> list[list[int]]:
    """The places in the window of every word."""
    return [
        [
            other
            for other in range(len(texts))
            if 0 < abs(other - at) <= reach[at] and texts[other] == texts[at]
        ]
        for at in range(len(texts))
    ]


def test_windows_against_loops():
    draw = numpy_generator(0, "windows")
    texts = np.sort(draw.integers(0, 6, 50))
    reach = draw.integers(1, 5, 50)
    place, real = neighbours(torch.tensor(texts), torch.tensor(reach), window=4)
    found = [p[r].tolist() for p, r in zip(place, real, strict=True)]
    assert found == slow_windows(texts.tolist(), reach.tolist())
    assert {len(window) for window in found} >= {1, 2, 4, 8}


def recorded(monkeypatch, model: Word2Vec, batch: Batch, seed: int = 0):
    """What the loss was asked for one batch: vectors, targets, negatives; and the output."""
    seen: list[tuple[Tensor, ...]] = []

    def watched(vectors, output, target, negatives):
        seen.append((vectors.detach(), target, negatives))
        return negative_sampling_loss(vectors, output, target, negatives)

    monkeypatch.setattr(word2vec, "negative_sampling_loss", watched)
    result = model.loss(batch, draws(seed))
    return *seen[0], result


def words_of(model: Word2Vec, vectors: Tensor) -> list[int]:
    """Which word each vector is of."""
    table = model.encoder.embedding.tokens.weight.detach()
    return torch.cdist(vectors, table).argmin(1).tolist()


def messy_batch() -> Batch:
    """Two rows with special tokens inside, padding that looks like words, and two documents."""
    tokens = torch.tensor(
        [
            [CLS, 10, UNK, 11, MASK, 12, SEP, CLS, 13, 14, SEP, 29, 29],
            [CLS, 20, SEP, CLS, 21, 22, 23, SEP, PAD, PAD, PAD, PAD, PAD],
        ]
    )
    mask = torch.arange(13) < torch.tensor([[11], [8]])
    documents = torch.zeros_like(tokens)
    documents[0, 7:], documents[1, 3:] = 1, 1
    return {"tokens": tokens, "mask": mask, "documents": documents}


TEXTS = [[10, 11, 12], [13, 14], [20], [21, 22, 23]]
ALL_WORDS = [word for text in TEXTS for word in text]


def test_skip_gram_pairs_are_words_of_one_text_near_each_other(monkeypatch):
    model = build(window=1, subsample=0.0, negatives=2)
    vectors, target, negatives, output = recorded(monkeypatch, model, messy_batch())
    pairs = sorted(zip(words_of(model, vectors), target.tolist(), strict=True))
    expected = [
        (text[i], text[j])
        for text in TEXTS
        for i in range(len(text))
        for j in (i - 1, i + 1)
        if 0 <= j < len(text)
    ]
    assert pairs == sorted(expected)
    assert output.weight == len(expected)
    assert negatives.shape == (len(expected), 2)


def test_cbow_predicts_the_centre_from_the_mean_of_its_window(monkeypatch):
    model = build(architecture="cbow", window=1, subsample=0.0)
    vectors, target, _, output = recorded(monkeypatch, model, messy_batch())
    table = model.encoder.embedding.tokens.weight.detach()
    expected = {
        text[i]: table[[text[j] for j in (i - 1, i + 1) if 0 <= j < len(text)]].mean(0)
        for text in TEXTS
        if len(text) > 1
        for i in range(len(text))
    }
    assert target.tolist() == list(expected)
    torch.testing.assert_close(vectors, torch.stack(list(expected.values())))
    assert output.weight == len(expected)


def test_padding_and_special_tokens_are_never_counted_or_drawn(monkeypatch):
    model = build(subsample=0.0, negatives=400)
    model.refresh([messy_batch()], draws())
    assert model.counts.nonzero().flatten().tolist() == sorted(ALL_WORDS)
    vectors, target, negatives, _ = recorded(monkeypatch, model, messy_batch())
    allowed = set(ALL_WORDS)
    assert set(words_of(model, vectors)) | set(target.tolist()) <= allowed
    assert set(negatives.flatten().tolist()) == allowed


def test_before_counting_all_words_are_alike(monkeypatch):
    model = build(negatives=400, subsample=0.0)
    *_, negatives, _ = recorded(monkeypatch, model, messy_batch())
    assert set(negatives.flatten().tolist()) == set(range(5, SIZE))


def test_a_batch_without_a_pair_has_no_weight_and_a_gradient_of_zero():
    for architecture in ("skip_gram", "cbow"):
        model = build(architecture=architecture, subsample=0.0)
        output = model.loss({"tokens": torch.tensor([[CLS, 7, SEP], [CLS, UNK, SEP]])}, draws())
        assert output.weight == 0
        assert output.loss == 0
        output.loss.backward()
        assert model.output.weight.grad.abs().max() == 0


def test_reach_is_uniform(monkeypatch):
    """A pair at distance d is used where the reach is at least d: (window - d + 1) / window."""
    model = build(window=4, subsample=0.0, vocabulary=Vocabulary(size=4005, pad=PAD, sep=SEP))
    tokens = torch.arange(5, 4005).unsqueeze(0)  # every word once: its number is its place
    vectors, target, _, _ = recorded(monkeypatch, model, {"tokens": tokens})
    centre = torch.tensor(words_of(model, vectors))
    distance = (target - centre).abs().bincount(minlength=5)
    share = distance[1:] / (2 * 4000)
    torch.testing.assert_close(share, torch.tensor([1.0, 0.75, 0.5, 0.25]), rtol=0, atol=0.03)


def test_keep_probability_is_that_of_the_paper():
    counts = torch.tensor([0, 1, 10, 1000, 98989])
    kept = keep_probability(counts, 1e-3)
    assert kept[:3].tolist() == [1.0, 1.0, 1.0]
    assert kept[3].item() == pytest.approx(math.sqrt(1e-3 / 1e-2))
    assert kept[4].item() == pytest.approx(math.sqrt(1e-3 / 0.98989))
    assert keep_probability(counts, 0.0).tolist() == [1.0] * 5


def test_frequent_words_are_dropped_and_windows_reach_across_them(monkeypatch):
    model = build(window=1, subsample=0.04)
    tokens = torch.tensor([10, 11]).repeat(20000).view(1, -1)
    tokens[0, ::50] = 12  # one in fifty, at places of word 10
    model.refresh([{"tokens": tokens}], draws())
    assert model.counts[[10, 11, 12]].tolist() == [19200, 20000, 800]
    words, _ = model._subsampled({"tokens": tokens}, draws())
    share = words.bincount(minlength=13)[10:] / model.counts[10:13]
    expected = torch.tensor([(0.04 / 0.48) ** 0.5, (0.04 / 0.5) ** 0.5, 1.0])
    torch.testing.assert_close(share, expected, rtol=0, atol=0.015)
    vectors, target, *_ = recorded(monkeypatch, model, {"tokens": tokens})
    pairs = torch.stack([torch.tensor(words_of(model, vectors)), target])
    assert ((pairs[0] == 10) & (pairs[1] == 10)).any()  # never side by side in the text


def test_noise_is_the_counts_to_three_quarters():
    model = build(negatives=10)
    counts = torch.tensor([1, 3, 10, 30, 100, 300])
    model.refresh([{"tokens": torch.arange(6, 12).repeat_interleave(counts).unsqueeze(0)}], draws())
    drawn = model._negatives(20_000, draws())
    observed = drawn.flatten().bincount(minlength=SIZE).double()
    expected = torch.zeros(SIZE, dtype=torch.float64)
    expected[6:12] = counts.double() ** 0.75
    expected *= drawn.numel() / expected.sum()
    assert observed[expected == 0].sum() == 0
    used = expected > 0
    chi_square = ((observed - expected)[used] ** 2 / expected[used]).sum()
    assert chi_square < 20.5  # 5 degrees of freedom: one in a thousand


def test_training_starts_where_the_authors_do():
    model = build(negatives=3, subsample=0.0)
    assert model.output.weight.abs().max() == 0
    assert model.encoder.embedding.tokens.weight.abs().max() <= 0.5 / 8
    loss, weight, metrics = model.loss(messy_batch(), draws())
    assert loss.item() == pytest.approx(4 * math.log(2), rel=0.06)  # less where negatives are true
    assert weight > 0
    assert metrics["accuracy"] == 0


def test_refusals():
    encoder = TransformerEncoder(Transformer(dim=8, layers=1, heads=2), VOCABULARY)
    with pytest.raises(ConfigError, match=r"model\.name = 'bag'"):
        Word2Vec(Config(), encoder, VOCABULARY)
    with pytest.raises(DataError, match="no word"):
        build().refresh([{"tokens": torch.tensor([[CLS, UNK, SEP]])}], draws())
    for wrong in ({"window": 0}, {"negatives": 0}, {"subsample": -1e-3}, {"subsample": 2.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Config(**wrong)


# Sentences of (royal or plain) and (male or female) words: each half of a meaning has its company.
KING, QUEEN, MAN, WOMAN = range(5, 9)
COMPANY = {
    "royal": (9, 10, 11),
    "plain": (12, 13, 14),
    "male": (15, 16, 17),
    "female": (18, 19, 20),
}
NOUNS = {
    KING: ("royal", "male"),
    QUEEN: ("royal", "female"),
    MAN: ("plain", "male"),
    WOMAN: ("plain", "female"),
}


class Sentences(Dataset):
    """[CLS] a b noun c d [SEP]: the words around a noun are drawn from the company it keeps."""

    spec = Vocabulary(size=21, pad=PAD, unk=UNK, cls=CLS, sep=SEP, mask=MASK)
    fields = ("tokens", "index")

    def __init__(self, size: int):
        draw = numpy_generator(0, "company")
        rows = []
        for noun in draw.choice(list(NOUNS), size):
            rank, sex = (COMPANY[half] for half in NOUNS[int(noun)])
            around = draw.permutation([*draw.choice(rank, 2), *draw.choice(sex, 2)])
            rows.append([CLS, *around[:2], noun, *around[2:], SEP])
        self.rows = torch.tensor(np.array(rows))

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, numbers: np.ndarray) -> Batch:
        return {"tokens": self.rows[torch.as_tensor(numbers)], "index": torch.as_tensor(numbers)}


@pytest.mark.parametrize("architecture", ["skip_gram", "cbow"])
def test_words_of_one_company_become_neighbours_and_an_analogy_is_solved(architecture):
    model = build(
        dim=12, vocabulary=Sentences.spec, architecture=architecture, window=2, subsample=0.0
    )
    config = TrainingConfig(
        steps=250, batch_size=32, lr=1e-2, weight_decay=0.0, eps=1e-12, precision="float32"
    )
    train(model, Sentences(2000), None, config)
    table = torch.nn.functional.normalize(model.encoder.embedding.tokens.weight.detach(), dim=1)
    cosine = table @ table.T
    for members in COMPANY.values():
        others = [word for word in range(9, 21) if word not in members]
        inside = min(cosine[a, b] for a in members for b in members if a != b)
        assert inside > max(cosine[a, b] for a in members for b in others)
    question = table[KING] - table[MAN] + table[WOMAN]
    answers = table @ question
    answers[[PAD, UNK, CLS, SEP, MASK, KING, MAN, WOMAN]] = -torch.inf
    assert answers.argmax() == QUEEN
