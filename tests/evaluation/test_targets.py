"""Likelihoods of targets against a loop over tokens, ranked choices, mixtures, the verbs."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from selfsup.cli import main
from selfsup.data import templates
from selfsup.data.labels import Labelled, Part
from selfsup.data.text_preprocessor import TextPreprocessor
from selfsup.data.tokenizer import Tokenizer, TokenizerConfig
from selfsup.errors import ConfigError, DataError
from selfsup.evaluation.adapt import fit, new_task
from selfsup.evaluation.demonstrations import Example
from selfsup.evaluation.in_context import Settings, answer
from selfsup.evaluation.targets import (
    pair_rows,
    part_accuracies,
    prompt_rows,
    prompt_scores,
    target_log_likelihoods,
    writer_of,
)
from selfsup.methods.generative import denoising
from selfsup.model import Model
from selfsup.models import encoder_decoder, transformer
from selfsup.models.encoder_decoder import EncoderDecoder
from selfsup.models.transformer import TransformerEncoder
from selfsup.randomness import isolated, numpy_generator, seed_layers
from selfsup.tasks import classification
from selfsup.tasks.generation import Config, Generation
from selfsup.training.config import TrainingConfig

SHAPE = {"dim": 32, "heads": 2, "dropout": 0.1, "init_std": 0.3}
KINDS = ["encoder_decoder", "causal"]
TEXTS = ["the film was good .\nreview: a bad book so very", "sentiment: not bad, is it so good"]
PLAIN = templates.parse(
    "Judge.\n\n{examples}\nreview: {text}\nis it {label}\n--- labels\n0 = bad\n1 = not good",
    "plain",
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    config = TokenizerConfig(kind="bpe", style="bert", vocab_size=300, lowercase=False)
    return Tokenizer.train(config, TEXTS * 20)


def encoder_of(kind, vocabulary, layers=1, **more):
    with isolated():
        seed_layers(0, "model")
        if kind == "causal":
            config = transformer.Config(**SHAPE | more, layers=layers, causal=True)
            return TransformerEncoder(config, vocabulary)
        return EncoderDecoder(encoder_decoder.Config(**SHAPE | more, layers=layers), vocabulary)


def task_of(kind, tokenizer, **config) -> Generation:
    return Generation(Config(**config), encoder_of(kind, tokenizer.vocabulary)).eval()


@torch.no_grad()
def slow(task, source, end) -> float:
    """One source, one token at a time, nothing padded."""
    total = 0.0
    for place, right in enumerate(end.tolist()):
        before = torch.tensor(end[:place]).unsqueeze(0)
        tokens = torch.tensor(source).unsqueeze(0)
        if isinstance(task.encoder, EncoderDecoder):
            written = torch.cat((torch.tensor([[task.encoder.start]]), before), 1)
            read = task.encoder({"tokens": tokens})
            logits = task.encoder.logits(task.encoder.decode(written, read).last)
        else:
            hidden = task.encoder({"tokens": torch.cat((tokens, before), 1)}).last
            logits = task.head(hidden, task.encoder.embedding)
        total += float(logits[0, -1].log_softmax(-1)[right])
    return total


SOURCES = ["review: a good film", "so", "the book was not so very good . is it "]
ENDS = ["good", "not bad", "so very bad"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_likelihoods_equal_those_of_one_token_at_a_time(kind, batch_size, tokenizer):
    task = task_of(kind, tokenizer)
    rows = pair_rows(tokenizer, SOURCES, ENDS)
    rows[1] = rows[1]._replace(ends=rows[1].ends[:2])  # rows may differ in their ends
    found = target_log_likelihoods(task, rows, batch_size)
    assert [len(scores) for scores in found] == [3, 2, 3]
    for scores, row in zip(found, rows, strict=True):
        assert scores == pytest.approx([slow(task, row.context, end) for end in row.ends], abs=2e-4)


def test_dropout_is_off_and_comes_back(tokenizer):
    task = task_of("encoder_decoder", tokenizer).train()
    rows = pair_rows(tokenizer, SOURCES, ENDS)
    first = np.stack(target_log_likelihoods(task, rows))
    assert task.training
    assert task.encoder.training
    assert (np.stack(target_log_likelihoods(task, rows)) == first).all()


def test_rows_are_those_of_training(tokenizer):
    labelled = Labelled("generation", ["so good", "is it  so very bad"], ["bad", "good"], (), "x")
    data = TextPreprocessor(tokenizer, 6).labelled(labelled)
    assert data.truncated == 1
    for number, row in enumerate(pair_rows(tokenizer, labelled.items, ["bad", "good"], 6)):
        assert row.context.tolist() == data.sources[number].tolist()
        assert row.ends[number].tolist() == data.targets[number].tolist()
    (row,) = pair_rows(tokenizer, ["so good \n"], ["bad", "good"])
    assert row.context.tolist() == data.sources[0].tolist()
    parts = (Part("it", ("bad", "good"), " very bad"),) * 2
    asked = TextPreprocessor(tokenizer, 6).labelled(replace(labelled, parts=parts))
    bad = tokenizer.encode([" very bad"])[0].tolist()
    assert asked.sources[1].tolist()[-len(bad) - 1 : -1] == bad != data.sources[1].tolist()[-3:-1]
    assert len(asked.sources[1]) == 6
    (row,) = pair_rows(tokenizer, labelled.items[1:], ["bad", "good"], 6, len(bad))
    assert row.context.tolist() == asked.sources[1].tolist()
    with pytest.raises(DataError, match="'' is no token"):
        pair_rows(tokenizer, ["so"], ["bad", ""])


def model_of(kind, tokenizer, **config) -> Model:
    task = task_of(kind, tokenizer, **config)
    values = {"task": {"name": "generation"}}
    return Model(task, TextPreprocessor(tokenizer, 128), (), values, "cpu")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shots", [0, 2])
def test_answers_of_a_prompt(kind, shots, tokenizer):
    model = model_of(kind, tokenizer, prefix="so: ")
    shown = [Example("so bad", "0"), Example("very good", "1")][:shots]
    items = ["so good", "the very bad film was bad ."]
    found = answer(model, PLAIN, shown, items, Settings(batch_size=2)).plain
    for item, shares in zip(items, found, strict=True):
        text = PLAIN.prompt([PLAIN.demonstration(*one) for one in shown], item)
        (row,) = pair_rows(tokenizer, ["so: " + text], PLAIN.words)
        scores = np.array([slow(model.objective, row.context, end) for end in row.ends])
        expected = np.exp(scores) / np.exp(scores).sum()
        assert shares == pytest.approx(expected, abs=1e-4)


def test_a_pretrained_encoder_decoder_writes_as_it_stands(tokenizer):
    encoder = encoder_of("encoder_decoder", tokenizer.vocabulary, positions="learned", max_length=9)
    method = denoising.Denoising(denoising.Config(), encoder, tokenizer.vocabulary)
    values = {"method": {"name": "denoising"}}
    model = Model(method, TextPreprocessor(tokenizer, 9), (), values, "cpu")
    rows = prompt_rows(model, ["so good"], ENDS)
    fine_tuned = Generation(Config(max_target=9), encoder).eval()
    expected = [slow(fine_tuned, rows[0].context, end) for end in rows[0].ends]
    assert prompt_scores(model, rows)[0] == pytest.approx(expected, abs=2e-4)
    assert not encoder.training


def test_what_cannot_be_prompted(tokenizer):
    encoder = encoder_of("encoder_decoder", tokenizer.vocabulary)
    other = classification.Classification(classification.Config(), encoder, ("a", "b"))
    values = {"task": {"name": "classification"}}
    with pytest.raises(ConfigError, match="a classification model cannot be prompted; use a caus"):
        writer_of(SimpleNamespace(objective=other, values=values))
    thinking = templates.parse(
        "{text} think: {reasoning}\nso {label}\n--- labels\n0 = bad\n1 = good", "thinking"
    )
    model = Model(Generation(Config(), encoder), TextPreprocessor(tokenizer, 64), (), {}, "cpu")
    with pytest.raises(ConfigError, match=r"thinking has \{reasoning\}, which a causal_language"):
        answer(model, thinking, [], ["so"], Settings())


# Mixtures


def toy(count: int, seed: int) -> Labelled:
    """First: the word that stands there; second: whether it is "good"."""
    draw = numpy_generator(seed, "toy")
    first = Part("first", ("good", "bad"))
    second = Part("second", ("not so", "so"))
    items, labels, parts = [], [], []
    for number in range(count):
        word = ("good", "bad")[draw.integers(2)]
        text = " ".join(draw.choice(["the film", "a book", "was", "very"], 3)) + f" {word}"
        if number % 2:
            items.append(f"review: {text}")
            labels.append(word)
            parts.append(first)
        else:
            items.append(f"is it {text}")
            labels.append("so" if word == "good" else "not so")
            parts.append(second)
    return Labelled("generation", items, labels, (), "toy", parts=tuple(parts))


def test_accuracies_by_a_loop(tokenizer):
    task, labelled = task_of("encoder_decoder", tokenizer, prefix="the "), toy(40, 0)
    hits = {"first": [], "second": []}
    for item, label, part in zip(labelled.items, labelled.labels, labelled.parts, strict=True):
        (row,) = pair_rows(tokenizer, ["the " + item], part.choices)
        scores = [slow(task, row.context, end) for end in row.ends]
        hits[part.name].append(part.choices[int(np.argmax(scores))] == label)
    expected = {name: sum(some) / len(some) for name, some in hits.items()}
    assert part_accuracies(task, TextPreprocessor(tokenizer, 32), labelled) == expected
    assert 0 < min(expected.values()) < 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixture_is_learned_and_followed_task_by_task(kind, tokenizer):
    shape = {"dropout": 0.0, "init_std": 0.1, "embedding_std": 1.0}
    encoder = encoder_of(kind, tokenizer.vocabulary, **shape)
    config = Config(label_smoothing=0.0, max_target=8)
    task = new_task(encoder, "generation", config, toy(1, 0), tuning="full", seed=0)
    training = TrainingConfig(steps=150, batch_size=16, lr=5e-3, warmup=0.1, evaluations=1)
    preprocessor, valid = TextPreprocessor(tokenizer, 32), toy(160, 1)
    rows = fit(task, preprocessor, toy(900, 0), training, valid=valid)
    first, last = (row for row in rows if row["split"] == "valid")
    assert first["score"] < 0.8
    assert min(last["score_first"], last["score_second"]) > 0.9
    assert last["score"] == pytest.approx((last["score_first"] + last["score_second"]) / 2)


RECIPE = """
[data]
name = "text"
row_length = 32
split_documents = "line"
[data.tokenizer]
vocab_size = 120
[model]
name = "encoder_decoder"
dim = 16
layers = 1
heads = 2
[method]
name = "denoising"
[training]
steps = 2
batch_size = 4
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("targets")
    (folder / "tiny.toml").write_text(RECIPE)
    text = "".join(corpus.text.read_text().splitlines(True)[:200])
    (folder / "text.txt").write_text(text)
    out = ["--data", str(folder / "text.txt"), "--out", str(folder / "run")]
    assert main(["pretrain", str(folder / "tiny.toml"), *out]) == 0
    return folder / "run"


def test_the_verbs(run, corpus, tmp_path, capsys):
    words = 'templates = ["sentiment"]\nwords = {bad = "dull", good = "great"}\n'
    for name, data in (("train", corpus.labelled), ("test", corpus.test)):
        (tmp_path / f"{name}.toml").write_text(
            f'cap = 30\n[[tasks]]\nname = "mood"\ndata = "{data}"\n{words}'
            f'[[tasks]]\nname = "film"\ndata = "{data}"\ntemplates = ["film.txt"]\n'
        )
    film = "{text} the film was {label} .\n--- labels\nbad = terrible\ngood = wonderful\n"
    (tmp_path / "film.txt").write_text(film.replace(" .\n---", "\n---"))
    out = tmp_path / "many"
    files = ["--data", tmp_path / "train.toml", "--valid", tmp_path / "test.toml", "--out", out]
    arguments = ["finetune", run, "--task", "generation", *files, "--set", "training.steps=3"]
    assert main([str(one) for one in arguments]) == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {"score", "score_mood", "score_film"} < rows[0].keys()
    capsys.readouterr()
    assert main(["evaluate", str(out), "--data", str(tmp_path / "test.toml")]) == 0
    scores = dict(line.split("\t") for line in capsys.readouterr().out.splitlines())
    names = ["accuracy", "accuracy_mood", "majority_mood", "accuracy_film", "majority_film"]
    assert list(scores) == ["examples", *names]
    assert scores["examples"] == "60"
    held_out = ["--template", str(tmp_path / "film.txt"), "--test", str(corpus.test)]
    for one in (run, out):  # as it was pre-trained, and after other tasks
        assert main(["prompt", str(one), *held_out]) == 0
        found = json.loads((one / "prompt.json").read_text())
        assert found["test_size"] == 40
        assert 0 <= found["scores"]["0"]["accuracy"][0] <= 1
    capsys.readouterr()
    assert main(["prompt", str(out), "a dull film", "--template", str(tmp_path / "film.txt")]) == 0
    assert capsys.readouterr().out.split("\t")[0] in ("terrible", "wonderful")
