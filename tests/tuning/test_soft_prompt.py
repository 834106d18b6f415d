"""Soft prompts: what enters, what comes out, caches, sets; and several tunings in one run."""

import numpy as np
import pytest
import torch

import selfsup
from selfsup.batch import ImageSpec, Vocabulary
from selfsup.errors import ConfigError, DataError
from selfsup.models import encoder_decoder
from selfsup.models.decoding import CausalWriter, Rules, sample
from selfsup.models.transformer import Config, TransformerEncoder
from selfsup.models.view import Cache
from selfsup.models.vocabulary_head import VocabularyHead
from selfsup.randomness import torch_generator
from selfsup.tasks import classification
from selfsup.training.checkpoint import load_tensors
from selfsup.tuning.choice import Tuning, tune
from selfsup.tuning.parts import OWN, Where, trained

SHAPE = {"dim": 8, "layers": 2, "heads": 2, "dropout": 0.0}
TOKENS = torch.tensor([[5, 7, 2, 9], [4, 3, 8, 8]])
BATCH = {"tokens": TOKENS, "label": torch.tensor([0, 1])}
PADDED = BATCH | {"mask": torch.tensor([[True, True, False, False], [True] * 4])}
POSITIONS = ["learned", "rotary", "relative", "sinusoidal"]


def classifier(encoder=None, read="encoder", **shape):
    torch.manual_seed(0)
    encoder = encoder or TransformerEncoder(
        Config(**{**SHAPE, **shape}), Vocabulary(size=20, pad=0, sep=1)
    )
    config = classification.Config(dropout=0.0, pooling=read)
    return classification.Classification(config, encoder, ("a", "b"))


def prompted(task, name=OWN, preprocessor=None, **options):
    tune(task, Tuning.of("soft_prompt", {"soft_prompt": options}), Where(name, preprocessor))
    return task


class Words:
    """A tokenizer, and what holds it."""

    def encode(self, texts):
        return [np.array([int(word) for word in text.split()], dtype=np.int64) for text in texts]

    @property
    def tokenizer(self):
        return self


@pytest.mark.parametrize("pooling", ["mean", "cls", "last", "bert"])
@pytest.mark.parametrize("positions", POSITIONS)
def test_a_prompt_of_words_equals_these_words(positions, pooling):
    causal = pooling == "last"
    task = classifier(positions=positions, pooling=pooling, causal=causal)
    encoder = task.encoder
    words = torch.tensor([[6, 13, 6]]).expand(2, -1)
    whole = encoder({"tokens": torch.cat((words, TOKENS), 1)})
    prompted(task, preprocessor=Words(), words="6 13", length=3)  # again from the first
    found = encoder(BATCH)
    for a, b in zip(found.hidden, whole.hidden, strict=True):
        torch.testing.assert_close(a, b[:, 3:])
    assert found.mask.shape == (2, 4)
    expected = encoder.pool(whole.last[:, 3:], found.mask)
    torch.testing.assert_close(found.pooled, expected)
    padded = encoder(PADDED)
    assert torch.equal(padded.mask, PADDED["mask"])
    alone = encoder({"tokens": TOKENS[:1, :2]})
    torch.testing.assert_close(padded.last[:1, :2], alone.last)
    torch.testing.assert_close(padded.pooled[:1], alone.pooled)


def test_it_begins_as_tokens_and_only_it_and_the_head_learn():
    task = prompted(classifier(read="cls", embedding_dim=4), length=5)
    (part,) = [part for _, _, part in task.encoder.additions.every(OWN)]
    table = task.encoder.embedding.tokens.weight
    begun = [(table == vector).all(1).nonzero().item() for vector in part.vectors]
    assert not set(begun) & {0, 1}
    task.loss(BATCH, torch_generator(0, "loss")).loss.backward()
    moved = {name for name, p in task.named_parameters() if p.grad is not None}
    assert moved == {
        "head.weight",
        "head.bias",
        "encoder.additions.own.embedding.soft_prompt.vectors",
    }
    assert part.vectors.grad.abs().sum(1).min() > 0
    assert trained(task)[0] == 5 * 4 + 2 * 8 + 2


@pytest.mark.parametrize("positions", POSITIONS)
def test_sets_of_other_lengths_in_one_batch_equal_each_alone(positions):
    task = classifier(positions=positions)
    task.encoder.requires_grad_(False)
    plain = task.encoder(PADDED).last
    prompted(task, "first", length=5)
    prompted(task, "second", length=2)
    rows = {"tokens": torch.cat((TOKENS, TOKENS)), "mask": torch.cat((PADDED["mask"],) * 2)}
    additions, found = task.encoder.additions, {}
    for name in ("first", "second"):
        additions.switch(name)
        found[name] = task.encoder(PADDED).last
    additions.switch(("second", torch.tensor([0])), ("first", torch.tensor([3])))
    mixed = task.encoder(rows)
    torch.testing.assert_close(mixed.last[0, :2], found["second"][0, :2])
    torch.testing.assert_close(mixed.last[1], plain[1])
    torch.testing.assert_close(mixed.last[2, :2], plain[0, :2])
    torch.testing.assert_close(mixed.last[3], found["first"][1])
    assert torch.equal(mixed.mask, rows["mask"])
    additions.switch()
    assert torch.equal(task.encoder(PADDED).last, plain)


@pytest.mark.parametrize("positions", POSITIONS)
def test_a_cache_takes_the_prompt_once(positions):
    task = classifier(causal=True, pooling="last", positions=positions)
    encoder = task.encoder
    tune(task, Tuning.of("soft_prompt+prefix", {"soft_prompt": {"length": 3}}))
    whole, cache = encoder(BATCH).last, Cache()
    first = encoder({"tokens": TOKENS[:, :2]}, cache).last
    steps = [encoder({"tokens": TOKENS[:, i : i + 1]}, cache).last for i in (2, 3)]
    torch.testing.assert_close(torch.cat((first, *steps), 1), whole)
    head = VocabularyHead(encoder, transform=False)
    encoder.embedding.tokens.weight.data *= 20  # so that what is written depends on what is read
    prompts = {"tokens": PADDED["tokens"], "mask": PADDED["mask"]}
    with torch.no_grad():
        written = sample(CausalWriter(encoder, head, prompts), Rules(max_tokens=4, end=-1, pad=0))
        ids = TOKENS[0, :2]
        for token in written[0]:
            last = encoder({"tokens": ids.unsqueeze(0)}).last[:, -1]
            assert head(last, encoder.embedding).argmax() == token
            ids = torch.cat((ids, token.view(1)))


def test_the_source_of_an_encoder_decoder_has_it():
    model = encoder_decoder.EncoderDecoder(
        encoder_decoder.Config(**SHAPE), Vocabulary(size=20, sep=3)
    )
    task = prompted(classifier(model), length=3)
    assert {place for place, _, _ in model.additions.every(OWN)} == {"source/embedding"}
    read = task.encoder(PADDED)
    assert read.last.shape == (2, 4, 8)
    assert model.decode(torch.tensor([[3], [3]]), read).last.shape == (2, 1, 8)


def test_bad_input():
    with pytest.raises(ConfigError, match="length must be at least 1"):
        Tuning.of("soft_prompt", {"soft_prompt": {"length": 0}})
    with pytest.raises(ConfigError, match="needs the model's tokenizer"):
        prompted(classifier(), words="6 13")
    with pytest.raises(ConfigError, match="holds no token"):
        prompted(classifier(), words=" ", preprocessor=Words())
    spec = ImageSpec(size=8, channels=3, mean=(0.0,) * 3, std=(1.0,) * 3)
    with pytest.raises(ConfigError, match="a model of text, not of image"):
        prompted(classifier(TransformerEncoder(Config(**SHAPE), spec)))
    task = prompted(classifier(positions="learned", max_length=6), length=3)
    with pytest.raises(DataError, match="a row of 7 tokens is longer"):
        task.encoder(BATCH)
    with pytest.raises(DataError, match="one document per row"):
        task.encoder(BATCH | {"documents": torch.zeros_like(TOKENS)})


def test_all_of_them_together_through_a_run_s_folder(corpus, tmp_path):
    start = {"training.steps": 3, "training.evaluations": 0}
    base_run = selfsup.pretrain(corpus.masked, corpus.text, tmp_path / "base", start)
    text = "lora+adapter+ia3+bias+prefix+soft_prompt"
    settings = {"training.steps": 6, "training.lr": 1e-1, "tuning.prefix.projection": 4}
    settings |= {"tuning.soft_prompt.words": "the film", "tuning.soft_prompt.length": 4}
    out = selfsup.finetune(
        base_run,
        "classification",
        corpus.labelled,
        tmp_path / "run",
        tuning=text,
        settings=settings,
    )
    tensors = load_tensors(out / "model" / "model.safetensors")
    assert all(".additions." in name for name in tensors if name.startswith("encoder"))
    kinds = {name.split(".")[4] for name in tensors if name.startswith("encoder")}
    assert kinds == set(text.split("+"))
    items = ["the film was dull .", "the song was lovely and the end of the song was bright ."]
    first, again, base = (selfsup.load(run) for run in (out, out, base_run))
    assert np.array_equal(first.predict_proba(items), again.predict_proba(items))
    assert not np.allclose(first.embed(items), base.embed(items), atol=1e-2)
    for name, value in base.encoder.state_dict().items():  # the base's own weights
        assert torch.equal(first.encoder.state_dict()[name], value)
    state = first.objective.state_dict()
    assert all(torch.equal(state[name], value) for name, value in tensors.items())
