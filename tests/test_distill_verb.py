"""The verb `distill`: from a fine-tuned run to a smaller one that is like any other."""

import shutil
import tomllib

import pytest
import torch

import selfsup as toolkit
from selfsup.errors import ConfigError, DataError
from selfsup.model_folder import load_model
from selfsup.training.checkpoint import load_newest, load_tensors
from selfsup.verbs.distilling import distill

QUICK = {"training.steps": 12, "training.lr": 5e-3, "training.checkpoint_every": 6}


@pytest.fixture(scope="module")
def teacher(corpus, selfsup, tmp_path_factory):
    """A classifier of two layers."""
    folder = tmp_path_factory.mktemp("teacher")
    for arguments in (
        *(("pretrain", corpus.masked, "--data", corpus.text, "--out", folder / "base"),),
        *(("finetune", folder / "base", "--data", corpus.labelled, "--out", folder / "run"),),
    ):
        pretrain = arguments[0] == "pretrain"
        more = ["model.layers=2"] if pretrain else ["training.lr=5e-3"]
        task = () if pretrain else ("--task", "classification")
        answer = selfsup(*arguments, *task, "--set", "training.steps=60", *more)
        assert answer.code == 0, answer.err
    return folder / "run"


def state(run):
    return load_tensors(run / "model" / "model.safetensors")


def test_the_student_is_a_run_like_any_other(teacher, corpus, tmp_path):
    out = distill(
        teacher,
        corpus.labelled,
        tmp_path / "run",
        unlabelled=corpus.text,
        valid=corpus.test,
        settings={**QUICK, "training.steps": 60, "distillation.temperature": 3.0},
    )
    values = tomllib.loads((out / "run.toml").read_text())
    assert values["model"]["layers"] == 1
    assert values["distillation"]["teacher"] == str(teacher)
    assert values["distillation"]["temperature"] == 3.0
    assert values["facts"]["labelled_examples"] == 120
    assert values["facts"]["unlabelled_examples"] == 600
    small, large = state(out), state(teacher)
    assert {name.partition(".")[0] for name in small} == {"encoder", "head"}
    assert small.keys() == {name for name in large if ".layers.1." not in name}
    assert values["facts"]["parameters"] == sum(tensor.numel() for tensor in small.values())
    scores = toolkit.evaluate(out, corpus.test)
    assert scores["accuracy"] > 0.9
    assert toolkit.load(out).predict(["the film was dull ."]) == ["bad"]


def test_it_begins_with_layers_and_head_of_the_teacher(teacher, corpus, tmp_path):
    settings = {"training.steps": 1, "training.lr": 1e-12}
    begun = state(distill(teacher, corpus.labelled, tmp_path / "a", settings=settings))
    for name, tensor in state(teacher).items():
        if ".layers.1." not in name:
            torch.testing.assert_close(begun[name], tensor, rtol=0, atol=1e-6)
    fresh = state(distill(teacher, corpus.labelled, tmp_path / "b", settings=settings, fresh=True))
    assert fresh.keys() == begun.keys()
    assert (fresh["head.weight"] - begun["head.weight"]).abs().max() > 0.01


def test_a_resumed_run_is_bit_equal(teacher, corpus, tmp_path):
    followed = {"distillation.hidden_weight": 1.0, "distillation.attention_weight": 0.1}
    settings = {**QUICK, **followed, "model.dim": 16}
    options = {"unlabelled": corpus.test, "settings": settings, "fresh": True}
    whole = distill(teacher, corpus.labelled, tmp_path / "whole", **options)
    cut = distill(teacher, corpus.labelled, tmp_path / "cut", **options)
    for path in (cut / "checkpoints" / "step-00000012").iterdir():
        path.unlink()
    (cut / "checkpoints" / "step-00000012").rmdir()
    distill(teacher, corpus.labelled, cut, resume=True, **options)
    found = [load_newest(run / "checkpoints").weights for run in (whole, cut)]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert all(torch.equal(tensor, state(cut)[name]) for name, tensor in state(whole).items())
    with pytest.raises(ConfigError, match=r"distillation\.alpha = 0.5, now 0.9"):
        changed = {**settings, "distillation.alpha": 0.9}
        distill(teacher, corpus.labelled, cut, resume=True, **{**options, "settings": changed})


def test_another_run_can_be_the_student(teacher, corpus, masked_run, tmp_path):
    # the session's masked run has the same corpus, so the same tokenizer
    out = distill(teacher, corpus.labelled, tmp_path / "run", student=masked_run, settings=QUICK)
    assert load_model(out).encoder.num_layers == 1
    assert tomllib.loads((out / "run.toml").read_text())["tuning"]["base"] == str(masked_run)


def test_tagging_with_unlabelled_sentences(teacher, corpus, selfsup, tmp_path):
    train = tmp_path / "train.conll"
    train.write_text("the D\nfilm N\nwas V\n\nthe D\nbook N\nwas V\ndull A\n\n" * 8)
    base = teacher.parent / "base"
    answer = selfsup(
        *("finetune", base, "--task", "tagging", "--data", train, "--out", tmp_path / "tagger"),
        *("--set", "training.steps=30", "training.lr=1e-2"),
    )
    assert answer.code == 0, answer.err
    answer = selfsup(
        *("distill", tmp_path / "tagger", "--data", train, "--out", tmp_path / "small"),
        *("--unlabelled", corpus.text, train, "--layers", "1", "--set", "training.steps=30"),
    )
    assert answer.code == 0, answer.err
    assert answer.out == f"{tmp_path / 'small'}\n"
    assert toolkit.load(tmp_path / "small").predict(["the book was dull"]) == [["D", "N", "V", "A"]]
    facts = tomllib.loads((tmp_path / "small" / "run.toml").read_text())["facts"]
    assert facts["unlabelled_examples"] == 616


def with_another_word(run, out):
    """A copy of the run whose tokenizer has one word that is another."""
    shutil.copytree(run / "model", out / "model")
    path = out / "model" / "tokenizer.json"
    text = path.read_text()
    assert '"wonderful"' in text
    path.write_text(text.replace('"wonderful"', '"marvellous"'))
    return out


def test_what_does_not_fit_is_named(teacher, corpus, masked_run, tmp_path):
    def refused(error, message, run=teacher, data=corpus.labelled, **options):
        with pytest.raises(error, match=message):
            distill(run, data, tmp_path / "run", **options)
        assert not (tmp_path / "run" / "model").exists()

    refused(ConfigError, "is no teacher: it must be fine-tuned", run=masked_run)
    other = with_another_word(masked_run, tmp_path / "other")
    refused(ConfigError, r"read different tokens .*data\.tokenizer\.file", student=other)
    refused(ConfigError, "3 layers cannot be taken from a model of 2.*--fresh", layers=3)
    refused(ConfigError, "layers must be above 0", layers=0)
    refused(ConfigError, "--layers is for a student that is made", student=masked_run, layers=1)
    narrow = {"model.dim": 16}
    refused(ConfigError, "model.dim is for a student", student=masked_run, settings=narrow)
    refused(ConfigError, r"model\.dim is 16, but 32 .*--fresh", settings=narrow)
    refused(ConfigError, "unknown section 'distil'; did you mean", settings={"distil.alpha": 1})
    refused(ConfigError, "unknown key distillation.alfa", settings={"distillation.alfa": 0.5})
    other = tmp_path / "other.csv"
    other.write_text("text,label\na film,fine\na book,bad\n")
    refused(DataError, r"other.csv:2: label 'fine' is not among", data=other)
