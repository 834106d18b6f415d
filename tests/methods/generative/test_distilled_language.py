"""Distilled language modelling: losses by loops, the student's beginning, and a run without it."""

import math
import shutil
from dataclasses import replace

import pytest
import torch

import selfsup as toolkit
from selfsup.batch import Vocabulary
from selfsup.errors import ConfigError
from selfsup.methods.generative.distilled_language import (
    Config,
    DistilledLanguage,
    direction_loss,
)
from selfsup.methods.generative.masked_language import Config as Masked
from selfsup.methods.generative.masked_language import MaskedLanguage
from selfsup.models.transformer import Config as Model
from selfsup.models.transformer import TransformerEncoder
from selfsup.randomness import isolated, seed_layers, torch_generator
from selfsup.training.checkpoint import load_newest, load_tensors

GENERATOR = torch_generator(0, "test")
VOCABULARY = Vocabulary(size=30, pad=0, unk=1, cls=2, sep=3, mask=4, unigram_entropy=3.0)
SMALL = Model(dim=16, layers=2, heads=2, dropout=0.1, init_std=0.2)
DEEP = replace(SMALL, layers=4)
TOKENS = torch.randint(5, 30, (4, 12), generator=GENERATOR)
MASK = torch.arange(12) < torch.tensor([[12], [9], [12], [7]])
BATCH = {"tokens": TOKENS.where(MASK, 0), "mask": MASK}


def teacher_of(model=DEEP, vocabulary=VOCABULARY, **config):
    with isolated():
        seed_layers(1, "teacher")
        return MaskedLanguage(Masked(**config), TransformerEncoder(model, vocabulary), vocabulary)


def build(model=SMALL, teacher=None, vocabulary=VOCABULARY, **config):
    with isolated():
        seed_layers(0, "student")
        encoder = TransformerEncoder(model, vocabulary)
        method = DistilledLanguage(Config(teacher="runs/big", **config), encoder, vocabulary)
    method.take_teacher(teacher or teacher_of())
    return method.eval()


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_the_teacher_counts_where_tokens_were_hidden_alone(temperature):
    method, said = build(temperature=temperature), []
    for head in (method.head, method.teacher.head):
        head.register_forward_hook(lambda module, inputs, output: said.append(output))
    found = method.loss(BATCH, torch_generator(0, "loss")).metrics["soft_loss"]
    student, teacher = said  # (batch, slot, vocabulary)
    nats = []
    for row, count in enumerate((2, 1, 2, 1)):  # 0.15 of the tokens; two slots in every row
        for slot in range(count):
            shares = []
            for logits in (teacher[row, slot], student[row, slot]):
                powers = [math.exp(x / temperature) for x in logits.tolist()]
                shares.append([x / sum(powers) for x in powers])
            nats.append(sum(p * math.log(p / q) for p, q in zip(*shares, strict=True)))
    assert float(found.detach()) == pytest.approx(temperature**2 * sum(nats) / 6, rel=1e-4)


def test_direction_loss_against_a_loop():
    student, teacher = torch.randn(2, 4, 12, 5, generator=GENERATOR).unbind()
    terms = []
    for row, column in MASK.nonzero().tolist():
        a, b = student[row, column].tolist(), teacher[row, column].tolist()
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        terms.append(1 - dot / math.hypot(*a) / math.hypot(*b))
    found = float(direction_loss(student, teacher, MASK))
    assert found == pytest.approx(sum(terms) / len(terms), 1e-5)


def test_the_loss_is_the_weighted_sum_of_its_parts():
    weights = {"masked_weight": 0.5, "soft_weight": 3.0, "hidden_weight": 0.7}
    output = build(**weights).loss(BATCH, torch_generator(0, "loss"))
    metrics = output.metrics
    expected = 0.5 * metrics["mlm_loss"] + 3 * metrics["soft_loss"] + 0.7 * metrics["hidden_loss"]
    torch.testing.assert_close(output.loss, expected)
    assert min(metrics[name] for name in ("mlm_loss", "soft_loss", "hidden_loss")) > 0.01
    assert int(output.weight) == sum(round(0.15 * n) for n in (12, 9, 12, 7))


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it():
    method = build(DEEP)
    metrics = method.loss(BATCH, torch_generator(0, "loss")).metrics
    assert metrics["soft_loss"].abs() < 1e-5
    assert metrics["hidden_loss"].abs() < 1e-5
    assert metrics["mlm_loss"] > 1


def test_it_begins_with_every_other_layer_embedding_and_head():
    teacher = teacher_of()
    method = build(teacher=teacher)
    expected = teacher.state_dict()
    for name, value in method.encoder.state_dict().items():
        source = name.replace("layers.1.", "layers.3.")
        assert torch.equal(value, expected[f"encoder.{source}"]), name
    for name, value in method.head.state_dict().items():
        assert torch.equal(value, expected[f"head.{name}"])
    fresh = build(teacher=teacher, start="fresh").encoder
    assert not torch.equal(fresh.embedding.tokens.weight, method.encoder.embedding.tokens.weight)


def test_the_teacher_stays_as_it_is_and_is_not_kept():
    method = build()
    before = {name: value.clone() for name, value in method.teacher.state_dict().items()}
    method.train()
    assert method.encoder.training
    assert not any(part.training for part in method.teacher.modules())
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=0.01)
    for step in range(3):
        method.loss(BATCH, torch_generator(0, "loss", step)).loss.backward()
        optimizer.step()
    assert all(p.grad is None for p in method.teacher.parameters())
    for name, value in method.teacher.state_dict().items():
        assert torch.equal(value, before[name])
    assert "teacher" not in method.kept


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocabulary": replace(VOCABULARY, size=31)}, "data.tokenizer.file = 'runs/big/model'"),
        ({"vocabulary": replace(VOCABULARY, continues=(7,))}, "another tokenizer"),
        ({"model": replace(SMALL, dim=8), "start": "fresh"}, "method.hidden_weight = 0"),
        ({"model": replace(SMALL, layers=5)}, "5 layers .* a model of 4.*method.start = 'fresh'"),
        ({"model": replace(SMALL, norm="post")}, "model.norm is 'post'.*method.start = 'fresh'"),
        ({"head": "tied"}, "method.head = 'tied' is not the teacher's"),
        ({"model": replace(SMALL, causal=True)}, "causal = false"),
        ({"vocabulary": replace(VOCABULARY, mask=-1)}, "mask token"),
    ],
)
def test_who_cannot_learn(arguments, message):
    with pytest.raises(ConfigError, match=message):
        build(**arguments)


def test_other_counts_of_words_are_no_other_tokenizer():
    build(vocabulary=replace(VOCABULARY, unigram_entropy=2.0))


@pytest.mark.parametrize(
    "config",
    [
        {"temperature": 0.0},
        {"mask_rate": 1.0},
        {"mask_share": 0.9, "random_share": 0.2},
        {"soft_weight": -1.0},
        {"masked_weight": 0.0, "soft_weight": 0.0, "hidden_weight": 0.0},
    ],
)
def test_numbers_out_of_range(config):
    with pytest.raises(ValueError, match=r"temperature|mask_rate|share|weights"):
        Config(teacher="x", **config)


# Runs


@pytest.fixture(scope="module")
def recipe(corpus, masked_run, tmp_path_factory):
    """The recipe of the tests' masked run, with that run as the teacher."""
    text = corpus.masked.read_text()
    method = f'name = "distilled_language"\nteacher = "{masked_run}"'
    text = text.replace('name = "masked_language"', method)
    text = text.replace("vocab_size = 150", f'file = "{masked_run}/model"')
    path = tmp_path_factory.mktemp("recipe") / "distilled.toml"
    path.write_text(text.replace("steps = 240", "steps = 20"))
    return path


def test_a_run_is_resumed_bit_equal_and_holds_the_student_alone(
    recipe, corpus, masked_run, selfsup, tmp_path
):
    teacher = tmp_path / "teacher"
    shutil.copytree(masked_run, teacher)
    changes = ("--set", f"method.teacher={teacher}", "training.checkpoint_every=10")
    begin = ("pretrain", recipe, "--data", corpus.text, *changes, "--out")
    for out in ("whole", "cut"):
        answer = selfsup(*begin, tmp_path / out)
        assert answer.code == 0, answer.err
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-00000020")
    answer = selfsup(*begin, tmp_path / "cut", "--resume")
    assert answer.code == 0, answer.err
    whole, cut = (load_newest(tmp_path / out / "checkpoints") for out in ("whole", "cut"))
    assert whole.weights.keys() == cut.weights.keys()
    assert all(torch.equal(whole.weights[name], cut.weights[name]) for name in whole.weights)
    kept = load_tensors(tmp_path / "whole" / "model" / "model.safetensors")
    assert {name.partition(".")[0] for name in kept} == {"encoder", "head"}
    shutil.rmtree(teacher)  # a finished run needs it no more
    model = toolkit.load(tmp_path / "whole")
    assert len(model.fill("the [MASK] was great .")[0]) == 5
    scores = toolkit.evaluate(tmp_path / "whole")
    assert scores["loss"] == pytest.approx(scores["mlm_loss"])


@pytest.mark.parametrize("which", ["causal", "tuned"])
def test_another_kind_of_run_is_no_teacher(
    which, recipe, corpus, causal_run, tuned_run, selfsup, tmp_path
):
    kind = {"causal": "causal_language run", "tuned": "fine-tuned"}[which]
    run = {"causal": causal_run, "tuned": tuned_run}[which]
    answer = selfsup(
        *("pretrain", recipe, "--data", corpus.text, "--out", tmp_path / "run"),
        *("--set", f"method.teacher={run}"),
    )
    assert answer.code == 2
    assert f"{kind}; a teacher is a run of masked_language or distilled_language" in answer.err
