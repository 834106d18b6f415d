"""Prefix tuning: attention worked out, masks, caches, sets of other lengths, what trains."""

import pytest
import torch
from torch import nn

from selfsup.batch import Vocabulary
from selfsup.errors import ConfigError, DataError
from selfsup.models import encoder_decoder
from selfsup.models.attention_scores import attention_scores
from selfsup.models.decoding import CausalWriter, DecoderWriter, Rules, beam_search, sample
from selfsup.models.transformer import Config, TransformerEncoder
from selfsup.models.view import Cache, repacked
from selfsup.models.vocabulary_head import VocabularyHead
from selfsup.randomness import torch_generator
from selfsup.tasks import classification, generation
from selfsup.tuning.choice import Tuning, tune
from selfsup.tuning.parts import OWN, Where, trained

SHAPE = {"dim": 8, "layers": 2, "heads": 2, "dropout": 0.0}
TOKENS = torch.tensor([[5, 7, 2, 9], [4, 3, 8, 8]])
BATCH = {"tokens": TOKENS, "label": torch.tensor([0, 1])}
PADDED = BATCH | {"mask": torch.tensor([[True, True, False, False], [True] * 4])}
POSITIONS = ["learned", "rotary", "relative", "sinusoidal"]


def classifier(encoder=None, **shape):
    torch.manual_seed(0)
    encoder = encoder or TransformerEncoder(Config(**{**SHAPE, **shape}), Vocabulary(size=20))
    return classification.Classification(classification.Config(dropout=0.0), encoder, ("a", "b"))


def prefixed(task, name=OWN, **options):
    tune(task, Tuning.of("prefix", {"prefix": {"init_std": 1.0, **options}}), Where(name))
    return task


def test_attention_with_a_prefix_by_hand():
    task = prefixed(classifier(layers=1, positions="none"), length=3)
    encoder, (part,) = task.encoder, [part for _, _, part in task.encoder.additions.every(OWN)]
    x, view, _ = encoder.begin(BATCH)
    attention = encoder.layers[0].attention
    found = attention(x, view, 0)
    # the table: of its one layer keys then values, each (heads, head_dim)
    learned = part.table.detach().view(3, 2, 2, 4)
    expected = torch.zeros(2, 4, 8)
    for row in range(2):
        queries, keys, values = attention.qkv(x[row]).view(4, 3, 2, 4).unbind(1)
        mixed = torch.zeros(4, 2, 4)
        for head in range(2):
            k = torch.cat((learned[:, 0, head], keys[:, head]))
            v = torch.cat((learned[:, 1, head], values[:, head]))
            mixed[:, head] = (queries[:, head] @ k.T / 2).softmax(-1) @ v
        expected[row] = attention.out(mixed.flatten(1))
    torch.testing.assert_close(found, expected)


def test_only_the_prefix_and_the_head_learn():
    for projection, names in ((0, {"table"}), (5, {"table"})):
        task = prefixed(classifier(), length=4, projection=projection)
        task.loss(BATCH, torch_generator(0, "loss")).loss.backward()
        moved = {name for name, p in task.named_parameters() if p.grad is not None}
        if projection:
            names = names | {f"project.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
        place = "encoder.additions.own.layers.prefix."
        assert moved == {"head.weight", "head.bias"} | {place + name for name in names}
        width = 2 * 2 * 8
        own = 4 * 8 + 8 * 5 + 5 + 5 * width + width if projection else 4 * width
        assert trained(task)[0] == own + 2 * 8 + 2


def test_a_projection_makes_keys_and_values_of_a_table():
    task = prefixed(classifier(), length=4, projection=5)
    (part,) = [part for _, _, part in task.encoder.additions.every(OWN)]
    with torch.no_grad():
        first, _, last = part.project
        flat = last(torch.tanh(first(part.table)))
    before = task.encoder(BATCH).last
    plain = prefixed(classifier(), length=4)
    (other,) = [part for _, _, part in plain.encoder.additions.every(OWN)]
    other.table.data = flat
    torch.testing.assert_close(plain.encoder(BATCH).last, before)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("positions", POSITIONS)
def test_padding_changes_nothing_and_the_future_stays_hidden(positions, causal):
    task = prefixed(classifier(positions=positions, causal=causal), length=3)
    found = task.encoder(PADDED).last
    alone = task.encoder({"tokens": TOKENS[:1, :2]}).last
    torch.testing.assert_close(found[:1, :2], alone)
    torch.testing.assert_close(found[1:], task.encoder({"tokens": TOKENS[1:]}).last)
    changed = TOKENS.clone()
    changed[:, 3] = 11
    seen = task.encoder({"tokens": changed}).last[:, :3]
    assert torch.allclose(seen, task.encoder(BATCH).last[:, :3], atol=1e-6) == causal


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shift", [False, True])
def test_sets_of_other_lengths_in_one_batch_equal_each_alone(causal, shift):
    task = classifier(positions="learned", causal=causal)
    plain = task.encoder(PADDED).last
    prefixed(task, "first", length=5, shift_positions=shift)
    prefixed(task, "second", length=2, shift_positions=shift)
    rows = {"tokens": torch.cat((TOKENS, TOKENS)), "mask": torch.cat((PADDED["mask"],) * 2)}
    additions, found = task.encoder.additions, {}
    for name in ("first", "second"):
        additions.switch(name)
        found[name] = task.encoder(PADDED).last
    additions.switch(("second", torch.tensor([0])), ("first", torch.tensor([3])))
    mixed = task.encoder(rows).last
    torch.testing.assert_close(mixed[0, :2], found["second"][0, :2])
    torch.testing.assert_close(mixed[1], plain[1])
    torch.testing.assert_close(mixed[2, :2], plain[0, :2])
    torch.testing.assert_close(mixed[3], found["first"][1])
    additions.switch()
    assert torch.equal(task.encoder(PADDED).last, plain)
    assert not torch.allclose(found["first"][1], found["second"][1], atol=1e-3)


def test_shifted_positions_are_those_of_a_cache_of_tokens():
    """A prefix that holds what the model makes of some tokens is those tokens."""
    for positions in ("learned", "rotary"):
        task = classifier(positions=positions, causal=True, pooling="last")
        cache = Cache()
        task.encoder({"tokens": torch.tensor([[6, 13, 10]])}, cache)
        expected = task.encoder({"tokens": TOKENS}, select(cache, 2)).last
        prefixed(task, length=3, shift_positions=True)
        (part,) = [part for _, _, part in task.encoder.additions.every(OWN)]
        with torch.no_grad():
            kept = [torch.stack([kv[0, :, :3] for kv in cache.layers[i]]) for i in (0, 1)]
            part.table.copy_(torch.stack(kept).permute(3, 0, 1, 2, 4).flatten(1))
        torch.testing.assert_close(task.encoder(BATCH).last, expected)
    task = prefixed(classifier(positions="learned", max_length=6), length=3, shift_positions=True)
    with pytest.raises(DataError, match="a row of 7 tokens is longer than the 6 learned"):
        task.encoder(BATCH)


def select(cache, count):
    cache.select(torch.zeros(count, dtype=torch.long))
    return cache


@pytest.mark.parametrize("positions", POSITIONS)
def test_writing_with_a_cache_equals_writing_without(positions):
    encoder = TransformerEncoder(
        Config(**SHAPE, causal=True, pooling="last", positions=positions), Vocabulary(size=20)
    )
    prefixed(classifier(encoder), length=3, shift_positions=True)
    head = VocabularyHead(encoder, transform=False)
    encoder.embedding.tokens.weight.data *= 20  # so that what is written depends on what is read
    prompts = {"tokens": PADDED["tokens"], "mask": PADDED["mask"]}
    with torch.no_grad():
        written = sample(CausalWriter(encoder, head, prompts), Rules(max_tokens=5, end=-1, pad=0))
        for row, length in ((0, 2), (1, 4)):
            ids = TOKENS[row, :length]
            for token in written[row]:
                last = encoder({"tokens": ids.unsqueeze(0)}).last[:, -1]
                assert head(last, encoder.embedding).argmax() == token
                ids = torch.cat((ids, token.view(1)))


def test_both_stacks_of_an_encoder_decoder_have_one():
    torch.manual_seed(0)
    model = encoder_decoder.EncoderDecoder(
        encoder_decoder.Config(**SHAPE), Vocabulary(size=20, sep=3)
    )
    task = generation.Generation(generation.Config(max_target=8, num_beams=2), model)
    source = {"tokens": TOKENS, "mask": PADDED["mask"]}
    target = torch.tensor([[3, 6, 9], [3, 4, 7]])
    plain = model.decode(target, model(source)).last
    prefixed(task, length=3)
    places = ("source/layers", "target/layers")
    assert tuple(place for place, _, _ in model.additions.every(OWN)) == places
    read = model(source)
    whole = model.decode(target, read).last
    assert not torch.allclose(whole, plain, atol=1e-3)
    cache = Cache()
    steps = [model.decode(target[:, i : i + 1], read, cache=cache).last for i in range(3)]
    torch.testing.assert_close(torch.cat(steps, 1), whole)
    batch = source | {"label": torch.tensor([[6, 9], [4, -100]])}
    task.loss(batch, torch_generator(0, "loss")).loss.backward()
    moved = {name for name, p in task.named_parameters() if p.grad is not None}
    assert moved == {f"encoder.additions.own.{place}.prefix.table" for place in places}
    best = beam_search(DecoderWriter(model, read), Rules(max_tokens=4, end=3, pad=0), 3)
    assert best.tokens.shape == (2, 1, 4)


def test_leaving_early_and_looking_at_scores():
    task = prefixed(classifier(), length=3)
    x, view, mask = task.encoder.begin(PADDED)
    whole, _ = task.encoder.step(x, view, 0)
    x, view, mask = repacked(x, view, mask, torch.tensor([0]))
    assert x.shape[1] == 2
    torch.testing.assert_close(task.encoder.step(x, view, 0)[0], whole[:1, :2])
    with attention_scores(task.encoder, [0]) as scores:
        task.encoder(PADDED)
    assert scores[0].shape == (2, 2, 4, 4)
    assert scores[0][0, :, 0].isinf().tolist() == [[False, False, True, True]] * 2


def test_pruned_heads_and_shared_layers():
    task = prefixed(classifier(heads_left=(1, 0), positions="relative"), length=3)
    (part,) = [part for _, _, part in task.encoder.additions.every(OWN)]
    assert part.table.shape == (3, 2 * 1 * 4)
    torch.testing.assert_close(
        task.encoder(PADDED).last[0, :2], task.encoder({"tokens": TOKENS[:1, :2]}).last[0]
    )
    shared = prefixed(classifier(share_layers=True, layers=3), length=3)
    (part,) = [part for _, _, part in shared.encoder.additions.every(OWN)]
    assert part.table.shape == (3, 3 * 2 * 8)
    before = shared.encoder(BATCH).last
    nn.init.zeros_(part.table[:, 32:])  # the last application's own
    assert not torch.allclose(shared.encoder(BATCH).last, before)


def test_bad_input():
    for options, message in (
        ({"length": 0}, "length must be at least 1"),
        ({"projection": -1}, "projection must not be negative"),
    ):
        with pytest.raises(ConfigError, match=message):
            Tuning.of("prefix", {"prefix": options})
    task = prefixed(classifier())
    with pytest.raises(ConfigError, match="merge the tuned run first"):
        prefixed(task)
