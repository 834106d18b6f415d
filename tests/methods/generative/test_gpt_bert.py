"""GPT-BERT: both ways of reading, against loops; filling, scoring and writing; a toy language."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from selfsup.batch import Batch, Vocabulary
from selfsup.errors import ConfigError
from selfsup.methods.generative.corruptions import disguised, drawn
from selfsup.methods.generative.gpt_bert import GPTBERT, Config
from selfsup.models.transformer import Config as Model
from selfsup.models.transformer import TransformerEncoder
from selfsup.models.view import Cache
from selfsup.randomness import isolated, numpy_generator, seed_layers, torch_generator

PAD, UNK, CLS, SEP, MASK = range(5)
SIZE = 30
VOCABULARY = Vocabulary(
    size=SIZE, pad=PAD, unk=UNK, cls=CLS, sep=SEP, mask=MASK, unigram_entropy=3.0
)
SMALL = Model(dim=16, layers=2, heads=2, dropout=0.0, embedding_std=1.0)
RELATIVE = Model(dim=16, layers=2, heads=2, dropout=0.0, positions="relative")


def build(model: Model = SMALL, **config) -> GPTBERT:
    with isolated():
        seed_layers(0, "model")
        method = GPTBERT(Config(**config), TransformerEncoder(model, VOCABULARY), VOCABULARY)
        for parameter in method.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return method.eval()


def packed(rows: int = 6, seed: int = 0) -> Batch:
    """[CLS] letters [SEP] [CLS] letters [SEP] padding."""
    draw, out = numpy_generator(seed, "letters"), []
    for _ in range(rows):
        a, b = (draw.integers(5, SIZE, n).tolist() for n in draw.integers(2, 6, 2))
        out.append(([CLS, *a, SEP], [CLS, *b, SEP]))
    longest = max(len(a) + len(b) for a, b in out)
    rest = [longest - len(a) - len(b) for a, b in out]
    tokens = [a + b + [PAD] * n for (a, b), n in zip(out, rest, strict=True)]
    mask = [[True] * (longest - n) + [False] * n for n in rest]
    documents = [[0] * len(a) + [1] * (longest - len(a)) for a, _ in out]
    named = {"tokens": tokens, "mask": mask, "documents": documents}
    return {name: torch.tensor(values) for name, values in named.items()}


def documents_of(batch: Batch, row: int) -> list[list[int]]:
    real = batch["mask"][row]
    tokens, documents = batch["tokens"][row][real], batch["documents"][row][real]
    return [tokens[documents == number].tolist() for number in documents.unique()]


def log_probabilities(method: GPTBERT, hidden: Tensor) -> Tensor:
    return method.head(hidden, method.encoder.embedding).log_softmax(-1)


@torch.no_grad()
def slow_causal(method: GPTBERT, batch: Batch) -> list[float]:
    """-log p of every token but a document's first, each from a prefix of its own."""
    nats = []
    for row in range(len(batch["tokens"])):
        for text in documents_of(batch, row):
            for place in range(1, len(text)):
                prefix = {"tokens": torch.tensor([text[:place]])}
                hidden = method.encoder(prefix, causal=True).last[0, -1]
                nats.append(-float(log_probabilities(method, hidden)[text[place]]))
    return nats


@pytest.mark.parametrize("model", [SMALL, RELATIVE], ids=["rotary", "relative"])
def test_causal_rows_see_no_future_and_no_other_document(model):
    method, batch = build(model), packed()
    expected = slow_causal(method, batch)
    got = method._next(batch)[0]
    assert got.item() == pytest.approx(np.mean(expected), abs=1e-5)


def test_a_prefix_is_read_alike_by_a_causal_stack():
    method, batch = build(), packed(2)
    whole = method.encoder(batch, causal=True)
    cut = {name: values[:, :5] for name, values in batch.items()}
    part = method.encoder(cut, causal=True)
    torch.testing.assert_close(whole.last[:, :5], part.last, rtol=0, atol=1e-5)
    both = method.encoder(batch).last[:, :5] - method.encoder(cut).last
    assert both.abs().max() > 1e-3


def test_masked_tokens_are_predicted_from_one_to_their_left():
    method, batch = build(mask_rate=0.4), packed()
    loss, accuracy, _ = method._masked(batch, torch_generator(3, "mask"))
    generator, tokens = torch_generator(3, "mask"), batch["tokens"]
    maskable = batch["mask"] & (tokens >= 5)
    count = (maskable.sum(1, keepdim=True) * 0.4).round().long().clamp(min=1)
    chosen = drawn(maskable, count, generator)
    ordinary = torch.arange(5, SIZE)
    corrupted = disguised(tokens, chosen, MASK, ordinary, (0.8, 0.1), generator)
    hidden = method.encoder({**batch, "tokens": corrupted}).last
    nats, hits = [], []
    for row, place in chosen.nonzero().tolist():
        scores = log_probabilities(method, hidden[row, place - 1]).detach().double()
        nats.append(-float(scores[tokens[row, place]]))
        hits.append(int(scores.argmax()) == int(tokens[row, place]))
    assert loss.item() == pytest.approx(np.mean(nats), abs=1e-5)
    assert accuracy.item() == pytest.approx(np.mean(hits), abs=1e-6)


@pytest.mark.parametrize(
    ("rows", "share", "expected"), [(6, 0.5, 3), (6, 0.01, 1), (6, 0.99, 5), (1, 0.5, 0)]
)
def test_a_batch_is_split_by_rows_and_weighed_by_them(rows, share, expected):
    method, batch = build(causal_share=share), packed(rows)
    output = method.loss(batch, torch_generator(0, "loss"))
    assert output.weight == rows
    masked = {name: values[expected:] for name, values in batch.items()}
    loss = method._masked(masked, torch_generator(0, "loss"))[0] * (rows - expected) / rows
    if expected:
        causal = {name: values[:expected] for name, values in batch.items()}
        loss = loss + method._next(causal)[0] * expected / rows
    assert ("causal_loss" in output.metrics) is (expected > 0)
    torch.testing.assert_close(output.loss, loss, rtol=0, atol=1e-6)


def test_the_mask_rate_falls_and_is_saved():
    method = build()
    seen = []
    for step in range(3):
        method.after_step(step, 3)
        seen.append(method.state_dict()["mask_rate"].item())
    assert seen == pytest.approx([0.25, 0.2, 0.15])


def test_fill_reads_both_sides_and_predicts_from_the_left():
    method = build()
    tokens = torch.tensor([[CLS, 7, MASK, 9, SEP], [CLS, MASK, 8, MASK, SEP]])
    got = method.fill({"tokens": tokens})
    hidden = method.encoder({"tokens": tokens}).last
    places = [(0, 1), (1, 0), (1, 2)]
    expected = torch.stack([log_probabilities(method, hidden[place]) for place in places])
    torch.testing.assert_close(got, expected)
    other = tokens.clone()
    other[0, 3] = 20
    assert not torch.allclose(method.fill({"tokens": other})[0], got[0])


def test_scores_are_those_of_prefixes_and_go_on_from_a_cache():
    method, batch = build(), packed()
    score = method.score(batch)
    nats = slow_causal(method, batch)
    assert (-score["log_probability"][score["scored"]]).tolist() == pytest.approx(nats, abs=1e-5)
    assert not score["scored"][batch["tokens"] == CLS].any()
    text = {"tokens": torch.randint(5, SIZE, (2, 9), generator=torch_generator(0, "text"))}
    whole, cache = method.score(text), Cache()
    method.encoder({"tokens": text["tokens"][:, :4]}, cache, causal=True)
    rest = method.score({"tokens": text["tokens"][:, 4:]}, cache)
    torch.testing.assert_close(
        rest["log_probability"][:, 1:], whole["log_probability"][:, 5:], rtol=0, atol=1e-5
    )


def test_written_tokens_are_the_likeliest_after_the_text_so_far():
    method = build()
    prompt = torch.tensor([[CLS, 7, 9], [CLS, 12, 20]])
    written = method.generate(
        {"tokens": prompt}, 5, torch_generator(0, "text"), temperature=0.0
    ).tolist()
    for row, tokens in enumerate(written):
        text = prompt[row].tolist()
        for token in tokens:
            hidden = method.encoder({"tokens": torch.tensor([text])}, causal=True).last[0, -1]
            allowed = log_probabilities(method, hidden)
            allowed[[PAD, UNK, CLS, MASK]] = -torch.inf
            assert token == int(allowed.argmax())
            text.append(token)
            if token == SEP:
                break


def toy(rows: int, seed: int) -> Batch:
    """[CLS] letters that count up from any, twelve in a circle [SEP]."""
    first = numpy_generator(seed, "toy").integers(0, 12, (rows, 1))
    text = 5 + (first + np.arange(8)) % 12
    ends = np.full((rows, 1), CLS), np.full((rows, 1), SEP)
    return {"tokens": torch.tensor(np.concatenate([ends[0], text, ends[1]], 1))}


def test_a_toy_language_is_learned_both_ways():
    model = Model(dim=32, layers=2, heads=2, dropout=0.0, embedding_std=1.0, init_std=0.18)
    method = build(model, causal_share=0.5).train()
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-2)
    for step in range(80):
        output = method.loss(toy(16, step), torch_generator(step, "loss"))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    method.eval()
    metrics = method.loss(toy(64, 1000), torch_generator(0, "loss")).metrics
    assert metrics["causal_loss"] < 1.0, "unigrams: log(12) = 2.5"
    assert metrics["masked_loss"] < 1.0
    blank = torch.tensor([[CLS, 5, 6, MASK, 8, 9, 10, 11, 12, SEP]])
    assert int(method.fill({"tokens": blank}).argmax()) == 7
    go_on = method.generate(
        {"tokens": torch.tensor([[CLS, 5, 6, 7]])}, 3, torch_generator(0, "text"), temperature=0.0
    )
    assert go_on.tolist() == [[8, 9, 10]]


def test_what_cannot_be_done_is_refused():
    encoder = TransformerEncoder(SMALL, VOCABULARY)
    with pytest.raises(ConfigError, match="mask token"):
        GPTBERT(Config(), encoder, Vocabulary(size=SIZE, sep=SEP))
    causal = TransformerEncoder(Model(dim=16, layers=1, heads=2, causal=True), VOCABULARY)
    with pytest.raises(ConfigError, match="causal = false"):
        GPTBERT(Config(), causal, VOCABULARY)
    with pytest.raises(ConfigError, match="cache"):
        encoder({"tokens": torch.tensor([[5, 6]])}, Cache())


@pytest.mark.parametrize(
    "config",
    [
        {"causal_share": 0.0},
        {"causal_share": 1.0},
        {"mask_rate": 1.0},
        {"final_mask_rate": 0.0},
        {"mask_share": 0.95, "random_share": 0.1},
    ],
)
def test_bad_configurations(config):
    with pytest.raises(ValueError, match=next(iter(config))):
        Config(**config)


def test_padding_changes_neither_way():
    method, batch = build(), packed(3)
    wider = {name: F.pad(values, (0, 3)) for name, values in batch.items()}
    torch.testing.assert_close(method._next(wider)[0], method._next(batch)[0], rtol=0, atol=1e-5)
    for mode in (True, None):
        expected, got = method.encoder(batch, causal=mode), method.encoder(wider, causal=mode)
        kept = got.last[:, : batch["tokens"].shape[1]][batch["mask"]]
        torch.testing.assert_close(kept, expected.last[batch["mask"]], rtol=0, atol=1e-5)
