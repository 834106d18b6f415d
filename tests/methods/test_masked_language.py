"""Masked language modelling against slow versions and against `transformers`."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfsup.batch import Batch, Vocabulary
from selfsup.errors import ConfigError
from selfsup.methods.generative.masked_language import (
    Chosen,
    Config,
    MaskedLanguage,
    choose,
    corrupt,
    rearrange_pairs,
)
from selfsup.methods.ops import masked_loss
from selfsup.models.transformer import Config as Model
from selfsup.models.transformer import TransformerEncoder
from selfsup.randomness import isolated, numpy_generator, seed_layers, torch_generator

PAD, UNK, CLS, SEP, MASK = range(5)
SIZE = 30
VOCABULARY = Vocabulary(
    size=SIZE, pad=PAD, unk=UNK, cls=CLS, sep=SEP, mask=MASK, continues=tuple(range(20, SIZE))
)
ORDINARY = torch.arange(5, SIZE)
BERT = Model(
    dim=16,
    layers=2,
    heads=2,
    feedforward_dim=24,
    norm="post",
    norm_eps=1e-12,
    positions="learned",
    max_length=24,
    segment_types=2,
    embedding_norm=True,
    pooling="bert",
)
ALL_MASKED = {"mask_rate": 0.999, "mask_share": 1.0, "random_share": 0.0}


def build(model: Model = BERT, vocabulary: Vocabulary = VOCABULARY, **config) -> MaskedLanguage:
    with isolated():
        seed_layers(0, "model")
        encoder = TransformerEncoder(model, vocabulary)
        return MaskedLanguage(Config(**config), encoder, vocabulary).eval()


def rows_of(num_rows: int, time: int = 20) -> tuple[Tensor, Tensor]:
    """[CLS] letters [SEP] padding; every third row has an [UNK] in its middle: tokens, mask."""
    generator = torch_generator(0, "rows")
    tokens = torch.randint(5, SIZE, (num_rows, time), generator=generator)
    length = torch.randint(4, time + 1, (num_rows, 1), generator=generator)
    slot = torch.arange(time)
    tokens[::3, 2] = UNK
    tokens = torch.where(slot == length - 1, SEP, tokens).masked_fill(slot >= length, PAD)
    tokens[:, 0] = CLS
    return tokens, slot < length


def pairs_of(num_rows: int, seed: int = 0) -> Batch:
    """[CLS] a [SEP] b [SEP]: a and b have 1 to 9 letters each and at most 10 together."""
    draw = numpy_generator(seed, "pairs")
    rows = [
        ([CLS, *draw.integers(5, SIZE, a), SEP], [*draw.integers(5, SIZE, b), SEP])
        for a in draw.integers(1, 10, num_rows)
        for b in [draw.integers(1, 11 - a)]
    ]
    return batch_from_lists(rows)


def batch_from_lists(rows: list[tuple[list[int], list[int]]]) -> Batch:
    longest = max(len(first) + len(second) for first, second in rows)
    out = {"tokens": [], "segments": [], "mask": []}
    for first, second in rows:
        padding = longest - len(first) - len(second)
        out["tokens"].append([*first, *second, *[PAD] * padding])
        out["segments"].append([0] * len(first) + [1] * len(second) + [0] * padding)
        out["mask"].append([True] * (len(first) + len(second)) + [False] * padding)
    return {name: torch.tensor(values) for name, values in out.items()}


def sentences_of(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """The letters of a and of b of each row, without special tokens."""
    rows = []
    for tokens, mask in zip(batch["tokens"].tolist(), batch["mask"].tolist(), strict=True):
        real = [token for token, is_real in zip(tokens, mask, strict=True) if is_real]
        assert (real[0], real[-1], real.count(CLS), real.count(SEP)) == (CLS, SEP, 1, 2)
        middle = real.index(SEP)
        rows.append((real[1:middle], real[middle + 1 : -1]))
    return rows


# choosing and corrupting


@pytest.mark.parametrize("rate", [0.15, 0.4])
def test_each_row_has_exactly_its_share_of_chosen_tokens(rate):
    tokens, mask = rows_of(10_000)
    maskable = (tokens >= 5) & mask
    chosen = choose(maskable, rate, torch_generator(1, "mask"))
    assert chosen.positions.shape == (10_000, math.ceil(rate * 20))
    times = torch.zeros_like(tokens).scatter_add_(1, chosen.positions, chosen.real.long())
    assert times.max() == 1, "a position was chosen twice"
    assert not times[~maskable].any(), "a special or padded position was chosen"
    wanted = [max(1, round(rate * n)) for n in maskable.sum(1).tolist()]
    assert times.sum(1).tolist() == wanted
    # every ordinary position of a full row is chosen equally often
    full = (mask.all(1)) & (tokens[:, 2] != UNK)
    share = times[full, 1:19].float().mean(0)
    expected = round(rate * 18) / 18
    assert (share - expected).abs().max() < 4 * math.sqrt(expected * (1 - expected) / full.sum())


def test_a_row_without_ordinary_tokens_has_nothing_chosen():
    method = build(sentence="none")
    batch = {"tokens": torch.tensor([[CLS, SEP, PAD]]), "mask": torch.tensor([[True, True, False]])}
    output = method.loss(batch, torch_generator(0, "loss"))
    assert output.weight == 0
    assert output.loss == 0


def test_what_lies_behind_the_mask_is_neither_chosen_nor_read():
    method = build(**ALL_MASKED)
    mask = torch.tensor([[True] * 6 + [False] * 3])
    losses = []
    for behind in (PAD, 7, 8):
        tokens = torch.tensor([[CLS, 5, 6, 9, 11, SEP, behind, behind, behind]])
        output = method.loss({"tokens": tokens, "mask": mask}, torch_generator(0, "loss"))
        assert output.weight == 4
        losses.append(output.loss.item())
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-6)


def test_corruption_follows_its_shares():
    tokens, mask = rows_of(10_000)
    generator = torch_generator(2, "mask")
    chosen = choose((tokens >= 5) & mask, 0.3, generator)
    corrupted = corrupt(tokens, chosen, Config(), MASK, ORDINARY, generator)
    was_chosen = torch.zeros_like(mask).scatter(1, chosen.positions, chosen.real)
    assert torch.equal(corrupted[~was_chosen], tokens[~was_chosen])
    before, after = tokens[was_chosen], corrupted[was_chosen]
    total = len(before)
    same_letter = 0.1 / len(ORDINARY)  # a random token may be the original
    for happened, share in (
        (after == MASK, 0.8),
        ((after != MASK) & (after != before), 0.1 - same_letter),
        (after == before, 0.1 + same_letter),
    ):
        sigma = math.sqrt(share * (1 - share) / total)
        assert abs(happened.float().mean().item() - share) < 3 * sigma
    random = after[(after != MASK) & (after != before)]
    counts = torch.bincount(random, minlength=SIZE)
    assert not counts[:5].any(), "a special token was drawn"
    expected = len(random) / len(ORDINARY)
    chi_square = ((counts[5:] - expected) ** 2 / expected).sum()
    degrees = len(ORDINARY) - 1
    assert chi_square < degrees + 4 * math.sqrt(2 * degrees)


def test_whole_words_are_whole_but_for_a_first_one_that_is_too_long():
    tokens, mask = rows_of(2_000)
    maskable = (tokens >= 5) & mask
    continues = (tokens >= 20) & mask
    chosen = choose(maskable, 0.25, torch_generator(3, "mask"), continues)
    cut = 0
    for row in range(len(tokens)):
        letters = [i for i in range(20) if maskable[row, i]]
        budget = max(1, round(0.25 * len(letters)))
        words: list[list[int]] = []
        for i in range(20):
            if i == 0 or not continues[row, i]:
                words.append([])
            words[-1].append(i)
        words = [[i for i in word if maskable[row, i]] for word in words]
        taken = set(chosen.positions[row][chosen.real[row]].tolist())
        assert 1 <= len(taken) <= budget
        touched = [word for word in words if taken & set(word)]
        broken = [word for word in touched if not set(word) <= taken]
        if broken:
            cut += 1
            assert touched == broken == [touched[0]]
            assert len(broken[0]) > budget == len(taken)
            assert taken == set(broken[0][:budget])
        else:
            assert sum(map(len, touched)) == len(taken)
    assert 0 < cut < 500


def test_a_word_cut_by_the_beginning_of_the_row_stands_alone():
    continues = torch.tensor([[True, True, False, False]]).expand(400, -1)
    maskable = torch.ones_like(continues)
    chosen = choose(maskable, 0.5, torch_generator(0, "mask"), continues)  # two tokens of four
    taken = {
        tuple(sorted(p[r].tolist())) for p, r in zip(chosen.positions, chosen.real, strict=True)
    }
    assert taken == {(0, 1), (2, 3), (2,), (3,)}  # one alone: (0, 1) came next and did not fit


def test_a_moving_mask_rate_is_followed_and_saved():
    tokens, mask = rows_of(50)
    method = build(mask_rate=0.5, final_mask_rate=0.1)

    def weight() -> int:
        return int(method.loss({"tokens": tokens, "mask": mask}, torch_generator(0, "loss")).weight)

    def wanted(rate: float) -> int:
        return sum(max(1, round(rate * n)) for n in ((tokens >= 5) & mask).sum(1).tolist())

    assert weight() == wanted(0.5)
    seen = []
    for step in range(4):
        method.after_step(step, 4)
        seen.append(method.state_dict()["mask_rate"].item())
    assert seen == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert weight() == wanted(0.1)
    fresh = build(mask_rate=0.5, final_mask_rate=0.1)
    fresh.load_state_dict(method.state_dict())
    assert fresh.mask_rate.item() == pytest.approx(0.1)
    still = build(mask_rate=0.5)
    still.after_step(3, 4)
    assert still.mask_rate.item() == 0.5


# the loss


def slow_masked_loss(logits: Tensor, target: Tensor, real: Tensor) -> tuple[float, float]:
    nats, hits, count = 0.0, 0, 0
    for row, row_logits in enumerate(logits.double().tolist()):
        for slot, scores in enumerate(row_logits):
            if real[row, slot]:
                top = max(scores)
                log_sum = top + math.log(sum(math.exp(s - top) for s in scores))
                nats += log_sum - scores[target[row, slot]]
                hits += scores.index(top) == int(target[row, slot])
                count += 1
    return nats / count, hits / count


def test_masked_loss_equals_a_loop():
    generator = torch_generator(0, "loss")
    logits = torch.randn(5, 4, SIZE, generator=generator) * 5
    target = torch.randint(SIZE, (5, 4), generator=generator)
    target[0, :2] = logits[0, :2].argmax(-1)
    real = torch.rand(5, 4, generator=generator) < 0.7
    real[0, 0] = True
    loss, accuracy = masked_loss(logits, target, real)
    assert (loss.item(), accuracy.item()) == pytest.approx(
        slow_masked_loss(logits, target, real), abs=1e-5
    )
    half = masked_loss(logits.bfloat16(), target, real)[0]
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(
        slow_masked_loss(logits.bfloat16(), target, real)[0], abs=1e-5
    )


# sentence pairs


def test_rearranged_pairs_equal_lists():
    batch, generator = pairs_of(64), torch_generator(0, "pairs")
    row = torch.arange(64)
    width = batch["tokens"].shape[1]
    nothing = torch.zeros(64, dtype=torch.bool)
    swap = torch.rand(64, generator=generator) < 0.5
    partner = torch.where(
        torch.rand(64, generator=generator) < 0.5,
        torch.randint(64, (64,), generator=generator),
        row,
    )
    originals = sentences_of(batch)
    cut = 0
    for swapped, partners in ((swap, row), (nothing, partner), (nothing, row)):
        got = rearrange_pairs(batch, swapped, partners, VOCABULARY)
        expected = []
        for i in range(64):
            first, second = originals[i][0], originals[partners[i]][1]
            room = width - 3 - len(first)
            cut += len(second) > room
            second = second[:room]
            if swapped[i]:
                first, second = second, first
            expected.append(([CLS, *first, SEP], [*second, SEP]))
        for name, tensor in batch_from_lists(expected).items():
            assert torch.equal(got[name], tensor), name
    assert cut > 0


@pytest.mark.parametrize("sentence", ["nsp", "sop"])
def test_half_of_the_pairs_are_negative_and_labelled(sentence):
    batch = pairs_of(400)
    originals = sentences_of(batch)
    rows, label = build(sentence=sentence)._make_pairs(batch, torch_generator(0, "pairs"))
    ends = {tuple(b) for _, b in originals}
    certain = 0
    for i, (first, second) in enumerate(sentences_of(rows)):
        a, b = originals[i]
        if sentence == "sop":
            assert (first, second) == ((a, b) if label[i] else (b, a))
        elif label[i]:
            assert (first, second) == (a, b)
        else:
            assert first == a
            assert second != b or len(b) < 3  # short texts may be equal by chance
            certain += tuple(second) in ends
    assert abs(label.float().mean() - 0.5) < 3 * 0.5 / math.sqrt(400)
    assert sentence == "sop" or certain > 150


def test_nsp_refuses_a_batch_of_one():
    with pytest.raises(ConfigError, match="batch_size >= 2"):
        build(sentence="nsp").loss(pairs_of(1), torch_generator(0, "loss"))


@pytest.mark.parametrize("sentence", ["nsp", "sop"])
def test_new_rows_are_no_longer_than_the_longest_and_ignore_padding(sentence):
    batch = pairs_of(32)
    width = batch["tokens"].shape[1]
    method = build(replace(BERT, max_length=width), sentence=sentence)
    wider = {name: F.pad(tensor, (0, 3)) for name, tensor in batch.items()}
    losses = [method.loss(given, torch_generator(0, "loss")).loss for given in (batch, wider)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("sentence", ["nsp", "sop"])
def test_sentence_loss_equals_a_loop(sentence):
    method, batch = build(sentence=sentence, **ALL_MASKED), pairs_of(6)
    output = method.loss(batch, torch_generator(4, "loss"))
    rows, label = method._make_pairs(batch, torch_generator(4, "loss"))  # the first draws
    ordinary = rows["tokens"] >= 5
    features = method.encoder({**rows, "tokens": rows["tokens"].masked_fill(ordinary, MASK)})
    logits = method.head(features.last, method.encoder.embedding)
    masked, accuracy = slow_masked_loss(logits, rows["tokens"], ordinary)
    answer = method.sentence_head(features.pooled).detach().double()
    nats = [-float(scores.log_softmax(0)[k]) for scores, k in zip(answer, label, strict=True)]
    hits = [int(scores.argmax()) == int(k) for scores, k in zip(answer, label, strict=True)]
    assert output.loss.item() == pytest.approx(masked + np.mean(nats), abs=1e-5)
    expected = {
        "mlm_loss": masked,
        "mlm_accuracy": accuracy,
        "sentence_loss": np.mean(nats),
        "sentence_accuracy": np.mean(hits),
    }
    assert {k: v.item() for k, v in output.metrics.items()} == pytest.approx(expected, abs=1e-5)
    assert output.weight == ordinary.sum()


# `transformers`


def copy(ours: nn.Module, *theirs: nn.Module) -> None:
    """Weights of one layer, or of several that are one here."""
    states = [layer.state_dict() for layer in theirs]
    ours.load_state_dict({k: torch.cat([s[k] for s in states]) for k in states[0]})


def bert_with_our_weights(ours: MaskedLanguage) -> nn.Module:
    """`BertForPreTraining` with random weights, which are copied into `ours`."""
    from transformers import BertConfig, BertForPreTraining

    config = BertConfig(
        vocab_size=SIZE,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=24,
    )
    with isolated():
        seed_layers(1, "theirs")
        theirs = BertForPreTraining(config).eval()
    generator = torch_generator(0, "weights")
    with torch.no_grad():
        for parameter in theirs.parameters():  # biases and norms too, so that none is left out
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    body, embedding = theirs.bert, ours.encoder.embedding
    copy(embedding.tokens, body.embeddings.word_embeddings)
    copy(embedding.positions, body.embeddings.position_embeddings)
    copy(embedding.segments, body.embeddings.token_type_embeddings)
    copy(embedding.norm, body.embeddings.LayerNorm)
    for block, layer in zip(ours.encoder.layers, body.encoder.layer, strict=True):
        attention = layer.attention.self
        copy(block.attention.qkv, attention.query, attention.key, attention.value)
        copy(block.attention.out, layer.attention.output.dense)
        copy(block.attention_norm, layer.attention.output.LayerNorm)
        copy(block.feedforward.up, layer.intermediate.dense)
        copy(block.feedforward.down, layer.output.dense)
        copy(block.feedforward_norm, layer.output.LayerNorm)
    copy(ours.encoder.pooler, body.pooler.dense)
    predictions = theirs.cls.predictions
    copy(ours.head.dense, predictions.transform.dense)
    copy(ours.head.norm, predictions.transform.LayerNorm)
    with torch.no_grad():
        ours.head.bias.copy_(predictions.decoder.bias)
        if ours.config.sentence != "none":  # their class 0 is "B follows A", here it is class 1
            ours.sentence_head.weight.copy_(theirs.cls.seq_relationship.weight.flip(0))
            ours.sentence_head.bias.copy_(theirs.cls.seq_relationship.bias.flip(0))
    return theirs


def replayed(method: MaskedLanguage, batch: Batch, generator: torch.Generator):
    """The corrupted tokens of `method.loss`, and labels that are -100 where nothing is asked."""
    tokens = batch["tokens"]
    chosen = choose((tokens >= 5) & batch["mask"], method.config.mask_rate, generator)
    corrupted = corrupt(tokens, chosen, method.config, MASK, ORDINARY, generator)
    labels = torch.full_like(tokens, -100)
    for row, slot in chosen.real.nonzero().tolist():
        position = chosen.positions[row, slot]
        labels[row, position] = tokens[row, position]
    return corrupted, labels


def theirs_on(theirs: nn.Module, batch: Batch, tokens: Tensor, **labels: Tensor):
    return theirs(
        input_ids=tokens,
        attention_mask=batch["mask"].long(),
        token_type_ids=batch["segments"],
        **labels,
    )


def test_masked_loss_equals_transformers():
    method, batch = build(), pairs_of(6)
    theirs = bert_with_our_weights(method)
    output = method.loss(batch, torch_generator(0, "loss"))
    corrupted, labels = replayed(method, batch, torch_generator(0, "loss"))
    assert (labels != -100).sum() == output.weight
    logits = theirs_on(theirs, batch, corrupted).prediction_logits
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())  # BertForMaskedLM's loss
    torch.testing.assert_close(output.loss, expected, rtol=0, atol=1e-5)


def test_masked_and_sentence_loss_equal_transformers():
    method, batch = build(sentence="nsp"), pairs_of(6)
    theirs = bert_with_our_weights(method)
    output = method.loss(batch, torch_generator(0, "loss"))
    generator = torch_generator(0, "loss")
    batch, label = method._make_pairs(batch, generator)
    assert 0 < label.sum() < 6
    corrupted, labels = replayed(method, batch, generator)
    expected = theirs_on(
        theirs, batch, corrupted, labels=labels, next_sentence_label=1 - label
    ).loss
    torch.testing.assert_close(output.loss, expected, rtol=0, atol=1e-5)


def test_fill_equals_transformers():
    method, batch = build(), pairs_of(5)
    theirs = bert_with_our_weights(method)
    blank = (batch["tokens"] >= 5) & (batch["tokens"] % 3 == 0)
    tokens = batch["tokens"].masked_fill(blank, MASK)
    expected = theirs_on(theirs, batch, tokens).prediction_logits[blank].log_softmax(-1)
    got = method.fill({**batch, "tokens": tokens})
    assert got.shape == (blank.sum(), SIZE)
    assert not got.requires_grad
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


# what is refused


@pytest.mark.parametrize(
    "values",
    [
        {"mask_rate": 0.0},
        {"mask_rate": 1.0},
        {"final_mask_rate": 1.5},
        {"mask_share": 0.9, "random_share": 0.2},
        {"random_share": -0.1},
    ],
)
def test_config_refuses_shares_that_are_none(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        Config(**values)


def test_wrong_partners_are_refused():
    with pytest.raises(ConfigError, match="mask token"):
        build(vocabulary=Vocabulary(size=SIZE, pad=0, sep=1))
    with pytest.raises(ConfigError, match=r"model\.causal = false"):
        build(Model(dim=16, heads=2, layers=1, causal=True))


def test_chosen_slots_that_are_not_used_change_nothing():
    tokens = torch.tensor([[CLS, 7, 8, SEP]])
    chosen = Chosen(torch.tensor([[2, 1]]), torch.tensor([[True, False]]))
    config = Config(mask_share=1.0, random_share=0.0)
    corrupted = corrupt(tokens, chosen, config, MASK, ORDINARY, torch_generator(0, "mask"))
    assert corrupted.tolist() == [[CLS, 7, MASK, SEP]]
