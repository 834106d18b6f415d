"""LoRA: the change worked out, what trains, merging, sets, other kinds, the small folder."""

import tomllib
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import selfsup
from selfsup.batch import AudioSpec, ImageSpec, Vocabulary
from selfsup.errors import CheckpointError, ConfigError
from selfsup.models.resnet import Config as ResNetConfig
from selfsup.models.resnet import ResNetEncoder
from selfsup.models.transformer import Config, TransformerEncoder
from selfsup.randomness import torch_generator
from selfsup.tasks import classification, exits, generation
from selfsup.training.checkpoint import load_tensors
from selfsup.tuning.choice import Tuning, tune
from selfsup.tuning.lora import LoRA
from selfsup.tuning.parts import OWN, Where, merge, trained

MODEL = Config(dim=8, layers=2, heads=2, dropout=0.0)
TOKENS = torch.tensor([[5, 7, 2, 9], [4, 3, 8, 8]])
BATCH = {"tokens": TOKENS, "label": torch.tensor([0, 1])}


def classifier(encoder=None):
    torch.manual_seed(0)
    encoder = encoder or TransformerEncoder(MODEL, Vocabulary(size=20))
    return classification.Classification(classification.Config(dropout=0.0), encoder, ("a", "b"))


def lora(task, name=OWN, **options):
    tune(task, Tuning.of("lora", {"lora": options}), Where(name))
    for _, _, part in task.encoder.additions.every(name):  # as if it had been trained
        nn.init.normal_(part.b, generator=torch_generator(1, name))
    return task


def test_a_fused_projection_equals_separate_layers():
    layer = nn.Linear(4, 12)
    part = LoRA(
        layer, (0, 2), Tuning.of("lora", {"lora": {"rank": 3, "alpha": 6.0}}).configs["lora"]
    )
    nn.init.normal_(part.b, generator=torch_generator(0, "b"))
    x = torch.randn(2, 5, 4, generator=torch_generator(0, "x"))
    query, key, value = layer(x).chunk(3, -1)
    expected = torch.cat(
        (
            query + 2.0 * F.linear(F.linear(x, part.a[0]), part.b[0]),
            key,
            value + 2.0 * F.linear(F.linear(x, part.a[1]), part.b[1]),
        ),
        -1,
    )
    torch.testing.assert_close(part(x, layer(x)), expected)


def test_it_begins_as_the_base_and_only_the_parts_and_the_head_learn():
    task = classifier()
    before = task.encoder(BATCH).last
    tune(task, Tuning.of("lora"))
    assert torch.equal(task.encoder(BATCH).last, before)
    task.loss(BATCH, torch_generator(0, "loss")).loss.backward()
    moved = {name for name, p in task.named_parameters() if p.grad is not None}
    assert moved == {
        *(f"encoder.additions.own.layers/{i}/attention/qkv.lora.{x}" for i in (0, 1) for x in "ab"),
        "head.weight",
        "head.bias",
    }
    assert trained(task)[0] == 2 * 2 * 2 * 8 * 8 + 2 * 8 + 2


@pytest.mark.parametrize("targets", [["query", "value"], ["qkv"], ["all"], ["key", "up", "out"]])
def test_merging_changes_nothing_and_takes_the_parts_away(targets):
    task = lora(classifier(), targets=targets)
    before = task.encoder(BATCH).last
    merge(task.encoder)
    torch.testing.assert_close(task.encoder(BATCH).last, before)
    assert not list(task.encoder.additions)


def test_merging_and_unmerging_gives_the_weights_back():
    task = lora(classifier(), targets=["all"])
    before = {name: value.clone() for name, value in task.encoder.state_dict().items()}
    for sign in (1, -1):
        for place, _, part in task.encoder.additions.every(OWN):
            part.merge(task.encoder.get_submodule(place.replace("/", ".")), sign)
    for name, value in task.encoder.state_dict().items():
        torch.testing.assert_close(value, before[name])


def test_sets_are_switched_and_mixed_in_one_batch():
    task = classifier()
    plain = task.encoder(BATCH).last
    lora(task, "first")
    lora(task, "second", targets=["up", "down"], rank=2)
    additions, found = task.encoder.additions, {}
    for name in ("first", "second"):
        additions.switch(name)
        found[name] = task.encoder(BATCH).last
        assert not torch.allclose(found[name], plain)
    additions.switch(("second", torch.tensor([0])), ("first", torch.tensor([1])))
    mixed = task.encoder(BATCH).last
    torch.testing.assert_close(mixed[0], found["second"][0])
    torch.testing.assert_close(mixed[1], found["first"][1])
    additions.switch()
    assert torch.equal(task.encoder(BATCH).last, plain)
    with pytest.raises(ConfigError, match="there are first, second"):
        additions.switch("third")


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_the_same_lora_on_pictures_and_speech(kind):
    if kind == "image":
        spec = ImageSpec(size=8, channels=3, mean=(0.0,) * 3, std=(1.0,) * 3)
        batch = {"image": torch.randn(2, 3, 8, 8), "label": BATCH["label"]}
    else:
        spec = AudioSpec(rate=8000, mel=8, hop=80)
        batch = {"frames": torch.randn(2, 12, 8), "label": BATCH["label"]}
    task = classifier(TransformerEncoder(MODEL, spec))
    tune(task, Tuning.of("lora"))
    optimizer = torch.optim.Adam([p for p in task.parameters() if p.requires_grad], lr=0.05)
    kept = task.encoder.layers[0].attention.qkv.weight.clone()
    losses = []
    for step in range(15):
        loss = task.loss(batch, torch_generator(0, "loss", step)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 3
    assert torch.equal(kept, task.encoder.layers[0].attention.qkv.weight)


def test_bad_input():
    task = classifier()
    with pytest.raises(ConfigError, match=r"no linear layer 'quary'; it has down, out, qkv, up"):
        tune(task, Tuning.of("lora", {"lora": {"targets": ["quary"]}}))
    with pytest.raises(ConfigError, match="rank must be at least 1"):
        Tuning.of("lora", {"lora": {"rank": 0}})
    with pytest.raises(ConfigError, match="did you mean 'lora'"):
        Tuning.of("lore")
    with pytest.raises(ConfigError, match="options of tuning 'lora'"):
        Tuning.of("full", {"lora": {"rank": 2}})
    tune(task, Tuning.of("lora"))
    with pytest.raises(ConfigError, match="merge the tuned run first"):
        tune(task, Tuning.of("lora"))
    spec = ImageSpec(size=8, channels=3, mean=(0.0,) * 3, std=(1.0,) * 3)
    convolutions = classifier(ResNetEncoder(ResNetConfig(), spec))
    with pytest.raises(ConfigError, match="no linear layer 'query'"):
        tune(convolutions, Tuning.of("lora"))


def test_a_tuned_run_is_small_and_names_its_base(corpus, tmp_path):
    base = selfsup.pretrain(
        "bert-tiny-english",
        corpus.text,
        tmp_path / "base",
        {"training.steps": 3, "data.tokenizer.vocab_size": 80, "training.evaluations": 0}
        | {"model.dim": 16, "model.heads": 2, "training.device": "cpu"},
    )
    settings = {"training.steps": 6, "training.lr": 1e-1, "tuning.lora.rank": 2}
    out = selfsup.finetune(
        base,
        "classification",
        corpus.labelled,
        tmp_path / "tuned",
        tuning="lora",
        settings=settings,
    )
    tensors = load_tensors(out / "model" / "model.safetensors")
    assert {name.split(".")[0] for name in tensors} == {"encoder", "head"}
    assert all(".additions." in name for name in tensors if name.startswith("encoder"))
    values = tomllib.loads((out / "model" / "config.toml").read_text())
    of_base = tomllib.loads((base / "model" / "config.toml").read_text())
    assert values["base"]["sha256"] == of_base["sha256"]["model.safetensors"]
    assert values["tuning"]["lora"]["rank"] == 2
    text = ["the film was dull and the end of the film was awful ."]
    model = selfsup.load(out)
    assert not torch.equal(
        torch.from_numpy(model.embed(text)), torch.from_numpy(selfsup.load(base).embed(text))
    )
    # further tuning of everything makes a run that stands by itself
    whole = selfsup.finetune(
        out, "classification", corpus.labelled, tmp_path / "whole", settings={"training.steps": 2}
    )
    moved = base.rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"was tuned from .*base, which is not there"):
        selfsup.load(out)
    assert selfsup.load(whole).predict(text)[0] in ("good", "bad")
    other = selfsup.finetune(
        moved, "classification", corpus.labelled, tmp_path / "base", settings={"training.steps": 1}
    )
    with pytest.raises(CheckpointError, match="was tuned from another model"):
        selfsup.load(out)
    assert other == tmp_path / "base"


def test_layers_inside_experts_are_left_out():
    config = Config(dim=8, layers=2, heads=2, activation="relu", experts=2)  # in the second block
    task = classifier(TransformerEncoder(config, Vocabulary(size=20)))
    tune(task, Tuning.of("lora", {"lora": {"targets": ["up"]}}))
    places = [place for place, _, _ in task.encoder.additions.every(OWN)]
    assert places == ["layers/0/feedforward/up"]


def test_sets_for_some_rows_refuse_a_batch_whose_rows_change():
    task = lora(lora(classifier(), "first"), "second")
    additions = task.encoder.additions
    some = (("second", torch.tensor([0])), ("first", torch.tensor([1])))
    additions.switch(*some)
    task.encoder(BATCH)
    with pytest.raises(ConfigError, match="rows of a batch of 2, and 4 rows came: beam search and"):
        task.encoder({"tokens": TOKENS.repeat(2, 1)})
    additions.switch(*some)
    assert len(task.encoder({"tokens": TOKENS.repeat(2, 1)}).last) == 4
    additions.switch("first", "second")  # for all rows, of any batch
    for times in (1, 2):
        assert len(task.encoder({"tokens": TOKENS.repeat(times, 1)}).last) == 2 * times


def test_beam_search_and_early_exits_refuse_sets_for_some_rows():
    vocabulary = Vocabulary(size=20, pad=0, sep=1)
    writer = generation.Generation(
        generation.Config(max_target=4, num_beams=2),
        TransformerEncoder(replace(MODEL, causal=True), vocabulary),
    )
    config = exits.Config(training="joint", rule="entropy")
    leaver = classification.Classification(
        classification.Config(exits=config), TransformerEncoder(MODEL, vocabulary), ("a", "b")
    )
    for task in (writer, leaver):
        lora(task.eval(), targets=["all"])
    with torch.no_grad():  # one of two examples leaves
        nn.init.normal_(leaver.exits.heads[0][-1].weight)
        answers = leaver.exits.every(leaver.encoder, leaver.encoder(BATCH), leaver.head)[0]
        threshold = float(exits.entropy(answers).mean())
    leaver.exits.config = replace(config, threshold=threshold)
    for task in (writer, leaver):
        whole = task.predict(BATCH).values
        task.encoder.additions.switch((OWN, torch.arange(2)))
        with pytest.raises(ConfigError, match="beam search and early exits change the rows"):
            task.predict(BATCH)
        task.encoder.additions.switch(OWN)
        assert torch.equal(task.predict(BATCH).values, whole)
