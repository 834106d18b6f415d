"""Denoising: what is read and written, the loss against a loop, errors, a toy language."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from selfsup.batch import Batch, Vocabulary
from selfsup.errors import ConfigError
from selfsup.methods.generative.corruptions import Rows
from selfsup.methods.generative.denoising import Config, Denoising, ended
from selfsup.methods.surprisal import MAX_LOGITS
from selfsup.models.encoder_decoder import Config as Model
from selfsup.models.encoder_decoder import EncoderDecoder
from selfsup.models.transformer import Config as Stack
from selfsup.models.transformer import TransformerEncoder
from selfsup.randomness import isolated, numpy_generator, seed_layers, torch_generator

PAD, UNK, CLS, SEP, MASK = range(5)
SIZE = 40
VOCABULARY = Vocabulary(
    size=SIZE,
    pad=PAD,
    unk=UNK,
    cls=CLS,
    sep=SEP,
    mask=MASK,
    sentinels=tuple(range(SIZE - 1, 29, -1)),
    sentence_ends=(5,),
    unigram_entropy=3.0,
)
GPT = Vocabulary(size=SIZE, pad=0, sep=0, sentinels=(38, 39))
SMALL = Model(dim=16, layers=2, decoder_layers=1, heads=2, dropout=0.0, embedding_std=1.0)
METHODS = {
    "bart": {},
    "t5": {"corruptions": ("sentinel_spans",)},
    "mass": {"corruptions": ("mass_spans",)},
    "mixture": {"corruptions": ("token_mask", "token_deletion", "document_rotation")},
}
each = pytest.mark.parametrize("name", METHODS)


def build(model: Model = SMALL, vocabulary: Vocabulary = VOCABULARY, **config) -> Denoising:
    with isolated():
        seed_layers(0, "model")
        return Denoising(Config(**config), EncoderDecoder(model, vocabulary), vocabulary).eval()


def batch_of(lengths: list[int], seed: int = 0) -> Batch:
    """[CLS] letters [SEP], padded."""
    draw, longest = numpy_generator(seed, "letters"), max(lengths) + 2
    tokens = np.full((len(lengths), longest), PAD)
    for row, length in enumerate(lengths):
        tokens[row, : length + 2] = [CLS, *draw.integers(5, 30, length), SEP]
    mask = np.arange(longest) < np.array(lengths)[:, None] + 2
    return {"tokens": torch.tensor(tokens), "mask": torch.tensor(mask)}


def rows_of(batch: Batch) -> Rows:
    return Rows(batch["tokens"], batch["mask"])


@torch.no_grad()
def slow_loss(method: Denoising, batch: Batch, seed: int) -> tuple[float, float, int]:
    """Each row alone, without padding, each token predicted from a prefix of its own."""
    pair = method.corrupt(rows_of(batch), torch_generator(seed, "loss"))
    model, nats, hits, count = method.encoder.double(), 0.0, 0, 0
    for row in range(len(batch["tokens"])):
        source = pair.source.tokens[row][pair.source.mask[row]].unsqueeze(0)
        target = pair.target.tokens[row][pair.target.mask[row]].tolist()
        predicted = pair.predicted[row].tolist()
        read = model({"tokens": source})
        for place, token in enumerate(target):
            if not predicted[place]:
                continue
            before = [target[i] if predicted[i] else MASK for i in range(place)]
            given = torch.tensor([[model.start, *before]])
            scores = model.logits(model.decode(given, read).last[0, -1])
            nats -= float(scores.log_softmax(-1)[token])
            hits += int(scores.argmax()) == token
            count += 1
    model.float()
    return nats / count, hits / count, count


@each
def test_loss_equals_a_loop_over_tokens(name):
    method, batch = build(**METHODS[name]), batch_of([9, 4, 12])
    output = method.loss(batch, torch_generator(3, "loss"))
    nats, hits, count = slow_loss(method, batch, 3)
    assert output.weight == count
    assert output.loss.item() == pytest.approx(nats, abs=1e-5)
    assert output.metrics["accuracy"].item() == pytest.approx(hits, abs=1e-6)


def test_bart_writes_the_whole_row_and_mass_a_part_in_its_place():
    batch = batch_of([9, 4, 12])
    for name in ("bart", "mixture"):
        pair = build(**METHODS[name]).corrupt(rows_of(batch), torch_generator(0, "loss"))
        assert torch.equal(pair.target.tokens, batch["tokens"])
        assert torch.equal(pair.predicted, batch["mask"])
        assert not torch.equal(pair.source.tokens, batch["tokens"])
    pair = build(**METHODS["mass"]).corrupt(rows_of(batch), torch_generator(0, "loss"))
    assert torch.equal(pair.target.tokens, batch["tokens"])
    assert pair.predicted.sum(1).tolist() == [4, 2, 6]


def test_rates_are_those_of_the_papers_until_one_is_given():
    row = {"tokens": torch.tensor([[CLS, *range(5, 25), SEP]])}
    weights = {
        name: int(build(**config).loss(row, torch_generator(0, "loss")).weight)
        for name, config in METHODS.items()
    }
    # T5: three of 20 in one span, its sentinel and the end
    assert weights == {"bart": 22, "t5": 5, "mass": 10, "mixture": 22}
    given = build(corruptions=("mass_spans",), rate=0.2).loss(row, torch_generator(0, "loss"))
    assert given.weight == 4


# settings under which nothing is left to chance
STILL = {
    "bart": {"corruptions": ("token_mask",), "rate": 0.999},
    "t5": {"corruptions": ("sentinel_spans",), "rate": 0.999},
    "mass": {"corruptions": ("mass_spans",), "rate": 0.999, "mask_share": 1.0, "random_share": 0.0},
}


@pytest.mark.parametrize("name", STILL)
def test_padding_on_either_side_changes_nothing(name):
    method, tokens = build(**STILL[name]), batch_of([20])["tokens"]
    found = []
    for pads in ((0, 0), (0, 3), (3, 0)):
        mask = F.pad(torch.ones_like(tokens, dtype=torch.bool), pads)
        batch = {"tokens": F.pad(tokens, pads, value=7), "mask": mask}
        found.append(method.loss(batch, torch_generator(0, "loss")))
    assert {int(output.weight) for output in found} == {{"bart": 22, "t5": 21, "mass": 20}[name]}
    for output in found[1:]:
        torch.testing.assert_close(output.loss, found[0].loss, rtol=0, atol=1e-5)


def test_a_packed_row_is_one_text():
    method, batch = build(), batch_of([9, 9])
    documents = {"documents": torch.arange(11).expand(2, -1) // 4}
    losses = [
        method.loss(given, torch_generator(0, "loss")).loss for given in (batch, batch | documents)
    ]
    assert losses[0] == losses[1]


def test_targets_of_texts_without_an_end_are_given_one():
    tokens = torch.tensor([[5, 6, 7], [5, SEP, 9], [5, 6, 7], [9, 9, 9]])
    mask = torch.tensor([[True] * 3, [True, True, False], [True, True, False], [False] * 3])
    rows = ended(Rows(tokens, mask), SEP)
    real = [row[keep].tolist() for row, keep in zip(rows.tokens, rows.mask, strict=True)]
    assert real == [[5, 6, 7, SEP], [5, SEP], [5, 6, SEP], [SEP]]
    method = build(vocabulary=GPT, corruptions=("token_deletion",))
    output = method.loss({"tokens": torch.tensor([[5, 6, 7, 8]])}, torch_generator(0, "loss"))
    assert output.weight == 5


def test_a_row_without_text_is_written_without_harm():
    batch = {"tokens": torch.tensor([[CLS, SEP, PAD]]), "mask": torch.tensor([[True, True, False]])}
    weights = {}
    for name, config in METHODS.items():
        output = build(**config).loss(batch, torch_generator(0, "loss"))
        assert output.loss.isfinite(), name
        weights[name] = int(output.weight)
    assert weights == {"bart": 2, "t5": 1, "mass": 0, "mixture": 2}


def test_chunked_projection_changes_nothing(monkeypatch):
    found = []
    for limit in (2**27, 7 * SIZE):
        monkeypatch.setitem(MAX_LOGITS, "cpu", limit)
        method = build()
        output = method.loss(batch_of([9, 4, 12]), torch_generator(0, "loss"))
        output.loss.backward()
        found.append((output, [p.grad for p in method.parameters()]))
    (whole, gradients), (chunked, others) = found
    torch.testing.assert_close(chunked.loss, whole.loss, rtol=0, atol=1e-6)
    assert chunked.metrics == whole.metrics
    for gradient, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(other, gradient, rtol=1e-4, atol=1e-6)


def test_experts_of_both_stacks_add_their_loss():
    model = Model(dim=16, layers=2, heads=2, dropout=0.0, experts=2, activation="relu")
    batch = batch_of([9, 4])
    method = build(model, **STILL["bart"])
    output = method.loss(batch, torch_generator(0, "loss"))
    pair = method.corrupt(rows_of(batch), torch_generator(0, "loss"))
    read = method.encoder({"tokens": pair.source.tokens, "mask": batch["mask"]})
    given = method.encoder.shifted(batch["tokens"])
    written = method.encoder.decode(given, read, batch["mask"])
    assert read.penalty > 0
    assert written.penalty > 0
    text = output.loss - read.penalty - written.penalty
    logits = method.encoder.logits(written.last)[batch["mask"]]
    expected = F.cross_entropy(logits, batch["tokens"][batch["mask"]])
    torch.testing.assert_close(text, expected, rtol=0, atol=1e-5)


# a toy language: letters in pairs, and each pair comes twice


def toy(rows: int, seed: int) -> Batch:
    first = numpy_generator(seed, "toy").integers(6, 18, (rows, 4))
    pairs = np.stack([first, 35 - first], 2).reshape(rows, 8)  # 17..29 belongs to 6..18
    text = np.concatenate([pairs, pairs], 1)
    ends = np.full((rows, 1), CLS), np.full((rows, 1), SEP)
    return {"tokens": torch.tensor(np.concatenate([ends[0], text, ends[1]], 1))}


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_a_toy_language_is_learned(name):
    model = Model(
        dim=48,
        layers=1,
        heads=4,
        dropout=0.0,
        rotary_base=100.0,
        init_std=0.18,
        embedding_std=1.0,
    )
    method = build(model, **METHODS[name]).train()
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-2)
    for step in range(80):
        output = method.loss(toy(16, step), torch_generator(step, "loss"))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    held_out = method.eval().loss(toy(64, 1000), torch_generator(0, "loss")).loss
    assert held_out < 2.0, "unigrams: log(24) = 3.2"


# errors


def test_what_cannot_be_done_is_refused():
    stack = TransformerEncoder(Stack(dim=16, layers=1, heads=2), VOCABULARY)
    with pytest.raises(ConfigError, match="encoder_decoder"):
        Denoising(Config(), stack, VOCABULARY)
    with pytest.raises(ConfigError, match=r"text_infilling needs .* mask token"):
        build(vocabulary=GPT)
    bare = Vocabulary(size=SIZE, sep=SEP, mask=MASK)
    with pytest.raises(ConfigError, match=r"needs 1 sentinels .* has 0: set data\.tokenizer"):
        build(vocabulary=bare, **METHODS["t5"])
    method = build(vocabulary=GPT, **METHODS["t5"])
    for time, fits in ((22, True), (60, False)):
        row = {"tokens": torch.randint(1, 38, (1, time), generator=torch_generator(0, "row"))}
        if fits:
            assert method.loss(row, torch_generator(0, "loss")).loss > 0
        else:
            with pytest.raises(ConfigError, match=r"needs 3 sentinels .* has 2"):
                method.loss(row, torch_generator(0, "loss"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"corruptions": ()}, "at least one"),
        ({"corruptions": ("mass_spans", "token_mask")}, "only be the last"),
        ({"corruptions": ("sentinel_spans", "mass_spans")}, "only be the last"),
        ({"rate": 1.0}, "rate"),
        ({"span": 0.5}, "span"),
        ({"mask_share": 0.9, "random_share": 0.2}, "sum to at most 1"),
    ],
)
def test_bad_configurations(config, message):
    with pytest.raises(ValueError, match=message):
        Config(**config)


def test_the_chance_loss_is_known_where_the_target_is_text():
    chances = {name: build(**config).chance_loss for name, config in METHODS.items()}
    assert chances == {"bart": 3.0, "t5": None, "mass": 3.0, "mixture": 3.0}
