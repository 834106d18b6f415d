"""Causal language modelling against slow versions and against `transformers`."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfsup.batch import Batch, Vocabulary
from selfsup.errors import ConfigError, DataError
from selfsup.methods.generative.causal_language import (
    CausalLanguage,
    Config,
)
from selfsup.methods.ops import follows
from selfsup.methods.surprisal import MAX_LOGITS, surprisal
from selfsup.models.decoding import filtered
from selfsup.models.transformer import Config as Model
from selfsup.models.transformer import TransformerEncoder
from selfsup.models.vocabulary_head import Projection
from selfsup.objective import Generates, Scores
from selfsup.randomness import isolated, seed_layers, torch_generator

SIZE = 31
PAD, CLS, END = 0, 1, 2
FULL = Vocabulary(size=SIZE, pad=PAD, cls=CLS, sep=END)
BARE = Vocabulary(size=SIZE)  # no special token at all, as our `transformers` models see it
GPT2 = Model(
    dim=16,
    layers=2,
    heads=2,
    positions="learned",
    max_length=24,
    activation="gelu_tanh",
    causal=True,
    pooling="last",
)
ROTARY = Model(dim=16, layers=2, heads=2, causal=True)


def build(model: Model = GPT2, vocabulary: Vocabulary = FULL, **config) -> CausalLanguage:
    """With weights so large that its greedy texts differ from row to row."""
    with isolated():
        seed_layers(0, "model")
        encoder = TransformerEncoder(model, vocabulary)
        method = CausalLanguage(Config(**config), encoder, vocabulary).eval()
    generator = torch_generator(2, "weights")
    with torch.no_grad():
        for parameter in method.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise, alpha=0.6 if parameter.ndim == 2 else 0.1)
    return method


def ragged(lengths: list[int], left: bool = False) -> Batch:
    """Rows of random letters, padded on one side."""
    tokens = torch.randint(3, SIZE, (len(lengths), max(lengths)), generator=torch_generator(0, "r"))
    slot = torch.arange(max(lengths))
    mask = slot < torch.tensor(lengths).unsqueeze(1)
    tokens = tokens.masked_fill(~mask, PAD)
    if left:
        rolled = [row.roll(max(lengths) - n) for row, n in zip(tokens, lengths, strict=True)]
        return {"tokens": torch.stack(rolled), "mask": mask.flip(1)}
    return {"tokens": tokens, "mask": mask}


def packed() -> Batch:
    """Documents of unequal length that end with END, in rows with padding."""
    batch = ragged([12, 9, 10])
    tokens = batch["tokens"].clone()
    tokens[0, 3] = tokens[0, 11] = tokens[1, 5] = tokens[1, 8] = tokens[2, 9] = END
    documents = (tokens == END).long().cumsum(1).roll(1, 1)
    documents[:, 0] = 0
    return {**batch, "tokens": tokens, "documents": documents}


def slow_log_probabilities(method: CausalLanguage, batch: Batch) -> dict[tuple[int, int], float]:
    """log p of each real token after the ones before it, by (row, slot); one document at a time."""
    found = {}
    ones = torch.ones_like(batch["tokens"])
    mask, documents = batch.get("mask", ones.bool()), batch.get("documents", ones)
    for row in range(len(ones)):
        for document in documents[row].unique():
            slots = (mask[row] & (documents[row] == document)).nonzero().flatten().tolist()
            for place in range(1, len(slots)):
                before = batch["tokens"][row : row + 1, slots[:place]]
                hidden = method.encoder({"tokens": before}).last[:, -1]
                scores = method.head(hidden, method.encoder.embedding)[0].double().tolist()
                log_sum = math.log(sum(math.exp(score) for score in scores))
                token = int(batch["tokens"][row, slots[place]])
                found[row, slots[place]] = scores[token] - log_sum
    return found


BATCHES = {
    "whole": {"tokens": ragged([9, 9])["tokens"]},
    "right": ragged([9, 4, 1]),
    "left": ragged([9, 4, 1], left=True),
    "packed": packed(),
}


# the loss


def test_an_encoder_that_sees_the_next_token_is_refused():
    with pytest.raises(ConfigError, match=r"model\.causal = true"):
        build(Model(dim=16, heads=2, layers=1))


def test_next_tokens_stay_in_their_document_and_end_with_its_end():
    batch = packed()
    target, real = batch["tokens"][:, 1:], follows(batch)
    expected = []
    for row in range(3):
        for slot in range(11):
            both = batch["mask"][row, slot] and batch["mask"][row, slot + 1]
            same = batch["documents"][row, slot] == batch["documents"][row, slot + 1]
            if both and same:
                expected.append((row, slot, int(batch["tokens"][row, slot + 1])))
    got = [(row, slot, int(target[row, slot])) for row, slot in real.nonzero().tolist()]
    assert got == expected
    assert sum(token == END for *_, token in got) == 5  # the end of each document
    assert (0, 3) not in [place[:2] for place in got]  # what follows that end


@pytest.mark.parametrize("head", ["tied", "bert"])
@pytest.mark.parametrize("name", BATCHES)
def test_loss_and_score_equal_a_loop(name, head):
    method, batch = build(ROTARY, head=head), BATCHES[name]
    expected = slow_log_probabilities(method, batch)
    output = method.loss(batch, torch_generator(0, "loss"))
    assert output.weight == len(expected)
    assert output.loss.item() == pytest.approx(-sum(expected.values()) / len(expected), abs=1e-5)
    score = method.score(batch)
    assert {tuple(place) for place in score["scored"].nonzero().tolist()} == expected.keys()
    assert score["log_probability"].dtype == torch.float32
    assert score["log_probability"].shape == batch["tokens"].shape
    assert not score["log_probability"][~score["scored"]].any()
    for place, value in expected.items():
        assert score["log_probability"][place].item() == pytest.approx(value, abs=1e-5)
    assert isinstance(method, Scores)


def test_surprisal_and_accuracy():
    logits = torch.randn(6, SIZE, generator=torch_generator(0, "logits")) * 4
    target = torch.tensor([3, 4, 5, 6, 7, int(logits[5].argmax())])
    projection = Projection(logits.bfloat16(), torch.eye(SIZE).bfloat16())
    _, nats, hit = surprisal(projection, target, torch.ones(6))
    exact = logits.bfloat16().double()
    for i in range(6):
        expected = math.log(sum(math.exp(x) for x in exact[i].tolist())) - float(
            exact[i, target[i]]
        )
        assert nats[i].item() == pytest.approx(expected, abs=1e-5)
    assert hit.tolist() == [False] * 5 + [True]
    assert nats.dtype == torch.float32
    method, batch = build(), packed()
    score = method.score(batch)
    output = method.loss(batch, torch_generator(0, "loss"))
    logits = method.head(method.encoder(batch).last, method.encoder.embedding)
    right = [
        int(logits[row, slot - 1].argmax()) == int(batch["tokens"][row, slot])
        for row, slot in score["scored"].nonzero().tolist()
    ]
    assert output.metrics["accuracy"].item() == pytest.approx(sum(right) / len(right))


def test_a_batch_in_which_nothing_follows_has_no_weight():
    output = build().loss({"tokens": torch.tensor([[5], [6]])}, torch_generator(0, "loss"))
    assert output.weight == 0
    assert output.loss == 0


def test_packed_documents_give_the_same_as_documents_alone():
    method, batch = build(), packed()
    whole = method.loss(batch, torch_generator(0, "loss"))
    parts = []
    for row in range(3):
        for document in batch["documents"][row].unique():
            here = batch["mask"][row] & (batch["documents"][row] == document)
            if here.any():
                alone = {"tokens": batch["tokens"][row, here].unsqueeze(0)}
                parts.append(method.loss(alone, torch_generator(0, "loss")))
    assert len(parts) == 5
    mean = sum(p.loss * p.weight for p in parts) / sum(p.weight for p in parts)
    torch.testing.assert_close(whole.loss, mean, rtol=0, atol=1e-5)


def test_chunked_projection_changes_nothing(monkeypatch):
    found = []
    for limit in (2**27, 7 * SIZE):
        monkeypatch.setitem(MAX_LOGITS, "cpu", limit)
        method = build(head="bert")
        output = method.loss(packed(), torch_generator(0, "loss"))
        output.loss.backward()
        found.append((output, [p.grad for p in method.parameters() if p.grad is not None]))
    (whole, gradients), (chunked, others) = found
    torch.testing.assert_close(chunked.loss, whole.loss, rtol=0, atol=1e-6)
    assert chunked.metrics == whole.metrics
    assert len(gradients) == len(others) > 0
    for gradient, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(other, gradient, rtol=1e-4, atol=1e-6)


# `transformers`


def gpt2_with_our_weights(method: CausalLanguage) -> nn.Module:
    """`GPT2LMHeadModel` that computes what `method` does."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=SIZE,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=24,
        bos_token_id=None,
        eos_token_id=None,
    )
    with isolated():
        theirs = GPT2LMHeadModel(config).eval()
    body, encoder = theirs.transformer, method.encoder
    body.wte.load_state_dict(encoder.embedding.tokens.state_dict())
    body.wpe.load_state_dict(encoder.embedding.positions.state_dict())
    body.ln_f.load_state_dict(encoder.final_norm.state_dict())
    for layer, block in zip(body.h, encoder.layers, strict=True):
        layer.ln_1.load_state_dict(block.attention_norm.state_dict())
        layer.ln_2.load_state_dict(block.feedforward_norm.state_dict())
        for conv, linear in (
            (layer.attn.c_attn, block.attention.qkv),
            (layer.attn.c_proj, block.attention.out),
            (layer.mlp.c_fc, block.feedforward.up),
            (layer.mlp.c_proj, block.feedforward.down),
        ):
            conv.load_state_dict({"weight": linear.weight.T, "bias": linear.bias})
    return theirs


def test_loss_equals_transformers():
    method, batch = build(vocabulary=BARE), ragged([9, 4, 6])
    theirs = gpt2_with_our_weights(method)
    expected = theirs(
        input_ids=batch["tokens"],
        attention_mask=batch["mask"].long(),
        labels=batch["tokens"].masked_fill(~batch["mask"], -100),
    ).loss
    got = method.loss(batch, torch_generator(0, "loss")).loss
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_greedy_text_equals_transformers():
    method, batch = build(vocabulary=BARE), ragged([9, 4, 6], left=True)
    theirs = gpt2_with_our_weights(method)
    expected = theirs.generate(
        batch["tokens"],
        attention_mask=batch["mask"].long(),
        max_new_tokens=12,
        do_sample=False,
        pad_token_id=0,
    )[:, 9:]
    got = method.generate(batch, 12, torch_generator(0, "text"), temperature=0.0)
    assert torch.equal(got, expected)
    assert len({tuple(row) for row in got.tolist()}) == 3


# generation


def greedy(method: CausalLanguage, batch: Batch, num_tokens: int) -> Tensor:
    return method.generate(batch, num_tokens, torch_generator(0, "text"), temperature=0.0)


def slow_greedy(method: CausalLanguage, prompt: list[int], num_tokens: int) -> list[int]:
    """One row, everything read anew for each token."""
    text = list(prompt)
    for _ in range(num_tokens):
        hidden = method.encoder({"tokens": torch.tensor([text])}).last[0, -1]
        logits = method.head(hidden, method.encoder.embedding)
        for special in method.vocabulary.special:
            if special != END:
                logits[special] = -torch.inf
        text.append(int(logits.argmax()))
        if text[-1] == END:
            break
    written = text[len(prompt) :]
    return written + [PAD] * (num_tokens - len(written))


@pytest.mark.parametrize("model", [GPT2, ROTARY], ids=["learned", "rotary"])
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_prompts_of_unequal_length_give_each_what_it_gives_alone(model, left):
    method, lengths = build(model), [7, 3, 1, 5]
    batch = ragged(lengths, left=left)
    got = greedy(method, batch, 10)
    assert got.shape == (4, 10)
    assert got.dtype == torch.int64
    for row, real in enumerate(batch["mask"]):
        prompt = batch["tokens"][row, real]
        assert got[row].tolist() == slow_greedy(method, prompt.tolist(), 10)
        assert torch.equal(greedy(method, {"tokens": prompt.unsqueeze(0)}, 10)[0], got[row])
    assert isinstance(method, Generates)


def test_a_row_stops_at_its_end_and_the_others_go_on():
    free = build(vocabulary=Vocabulary(size=SIZE, pad=PAD, cls=CLS))  # has no end
    batch = ragged([6, 4, 5])
    texts = greedy(free, batch, 10)
    end = next(token for token in texts[0, 2:].tolist() if token not in texts[1])
    method = build(vocabulary=Vocabulary(size=SIZE, pad=PAD, cls=CLS, sep=end))
    got = greedy(method, batch, 10)
    ended = []
    for row in range(3):
        text = texts[row].tolist()
        stop = text.index(end) + 1 if end in text else 10
        ended.append(stop)
        assert got[row].tolist() == text[:stop] + [PAD] * (10 - stop)
    assert 2 < ended[0] < ended[1] == 10
    without_pad = build(vocabulary=Vocabulary(size=SIZE, cls=CLS, sep=end))
    stop = ended[0]
    assert set(greedy(without_pad, batch, 10)[0, stop:].tolist()) == {end}


def slow_filtered(logits: list[float], top_k: int, top_p: float) -> list[float]:
    kept = sorted(range(len(logits)), key=lambda i: -logits[i])
    if top_k:
        kept = kept[:top_k]
    weight = {i: math.exp(logits[i]) for i in kept}
    total = sum(weight.values())
    nucleus, share = [], 0.0
    for i in kept:
        if share >= top_p:
            break
        nucleus.append(i)
        share += weight[i] / total
    return [x if i in nucleus else -math.inf for i, x in enumerate(logits)]


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 1.0), (1, 1.0), (5, 1.0), (99, 1.0), (0, 0.6), (0, 1e-6), (6, 0.7)]
)
def test_filters_equal_lists(top_k, top_p):
    logits = torch.randn(40, SIZE, generator=torch_generator(0, "logits")) * 2
    expected = [slow_filtered(row, top_k, top_p) for row in logits.tolist()]
    assert filtered(logits, top_k, top_p).tolist() == expected


@pytest.mark.parametrize("options", [{}, {"temperature": 2.0, "top_k": 6, "top_p": 0.8}])
def test_tokens_are_drawn_as_often_as_the_model_says(options):
    method, num_rows = build(), 20_000
    prompt = torch.tensor([[5, 9, 4]])
    logits = method.head(method.encoder({"tokens": prompt}).last[0, -1], method.encoder.embedding)
    logits = logits.detach().masked_fill(torch.tensor([i in (PAD, CLS) for i in range(SIZE)]), -1e9)
    scaled = (logits / options.get("temperature", 1.0)).tolist()
    kept = slow_filtered(scaled, options.get("top_k", 0), options.get("top_p", 1.0))
    share = torch.tensor(kept).softmax(0)
    batch = {"tokens": prompt.expand(num_rows, -1)}
    drawn = method.generate(batch, 1, torch_generator(0, "text"), **options)
    found = torch.bincount(drawn.flatten(), minlength=SIZE) / num_rows
    assert not found[share == 0].any()
    assert ((found - share).abs() <= 4 * (share * (1 - share) / num_rows).sqrt()).all()


def test_the_generator_alone_decides_the_text():
    method, batch = build(), ragged([6, 4])
    before = torch.get_rng_state()
    texts = [method.generate(batch, 12, torch_generator(seed, "text")) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])


@pytest.mark.parametrize(
    "options", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}]
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        build().generate(ragged([3]), 2, torch_generator(0, "text"), **options)


def test_texts_may_fill_the_learned_positions_but_not_pass_them():
    method = build(vocabulary=BARE)
    assert greedy(method, ragged([4]), 21).shape == (1, 21)  # the last token is not read again
    with pytest.raises(DataError, match="24 learned positions"):
        greedy(method, ragged([4]), 22)
    with pytest.raises(DataError, match="documents"):
        greedy(method, packed(), 2)


def test_perplexity_comes_from_the_scores():
    method, batch = build(), {"tokens": ragged([9, 9])["tokens"]}
    score = method.score(batch)
    logits = method.head(method.encoder(batch).last, method.encoder.embedding)[:, :-1]
    nats = F.cross_entropy(logits.flatten(0, 1), batch["tokens"][:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(-score["log_probability"].sum(), nats, rtol=0, atol=1e-4)
    assert not score["log_probability"].requires_grad
