"""Many tuned runs over one base: answers as of each alone, one encoder in memory, bad input."""

import shutil
import threading
import tomllib

import pytest
import torch

import selfsup
from selfsup.config import read_toml, write_toml
from selfsup.errors import CheckpointError, ConfigError, DataError
from selfsup.model_folder import load_model
from selfsup.training.checkpoint import load_tensors
from selfsup.verbs import tuned_models
from selfsup.verbs.tuned_models import TunedModels

SMALL = {"training.steps": 12, "training.lr": 2e-2, "training.device": "cpu"}
TEXTS = [
    "the film was dull and the end of the film was awful .",
    "the meal was great .",
    "the trip was bright and the end of the trip was lovely .",
    "the song was boring and the end of it was gloomy and dull and awful .",
    "a place .",
]


@pytest.fixture(scope="module")
def runs(corpus, masked_run, tmp_path_factory):
    """Tuned runs of three tasks over one base, by name."""
    folder = tmp_path_factory.mktemp("tuned")
    lines = corpus.labelled.read_text().splitlines()[1:]
    (folder / "length.csv").write_text(
        "text,label\n" + "".join(f"{x.rpartition(',')[0]},{len(x)}.5\n" for x in lines)
    )
    rows = []
    for line in lines[:40]:
        words = line.rpartition(",")[0].split()
        rows += [
            f"{i}\t{word}\t_\t{'DET' if word == 'the' else 'X'}\t_\t_\t0\t_\t_\t_\n"
            for i, word in enumerate(words, 1)
        ]
        rows.append("\n")
    (folder / "tags.conllu").write_text("".join(rows))
    given = {
        "mood": ("classification", corpus.labelled, "lora", {}),
        "short": ("classification", corpus.labelled, "lora", {"tuning.lora.targets": ["up"]}),
        "tags": ("tagging", folder / "tags.conllu", "lora", {"tuning.lora.rank": 2}),
        "length": ("regression", folder / "length.csv", "layer_mix", {}),
        "probe": ("classification", corpus.labelled, "probe", {}),
        "prefix": ("classification", corpus.labelled, "lora+prefix", {}),
    }
    out = {}
    for name, (task, data, tuning, settings) in given.items():
        out[name] = selfsup.finetune(
            masked_run,
            task,
            data,
            folder / name,
            tuning=tuning,
            settings=SMALL | settings,
            max_length=9 if name == "short" else None,
        )
    return out


@pytest.fixture
def selfsup_verb(request):
    """`conftest.run_selfsup`, whose name the package has here."""
    return request.getfixturevalue("selfsup")


@pytest.fixture(scope="module")
def alone(runs):
    return {name: selfsup.load(run, "cpu") for name, run in runs.items()}


def same(got, expected) -> bool:
    return got == pytest.approx(expected, abs=1e-5) if isinstance(got, float) else got == expected


@pytest.mark.parametrize("batch_size", [3, 64])
def test_a_mixed_batch_gives_the_answers_of_each_run_alone(masked_run, runs, alone, batch_size):
    many = selfsup.load_many(masked_run, runs, "cpu")
    assert many.names == tuple(runs)
    items = [text for text in TEXTS for _ in runs]
    names = [name for _ in TEXTS for name in runs]
    got = many.predict(items, names, batch_size)
    for name in runs:
        mine = [answer for answer, other in zip(got, names, strict=True) if other == name]
        for one, expected in zip(mine, alone[name].predict(TEXTS), strict=True):
            assert same(one, expected), name
        assert all(map(same, many.predict(TEXTS, name), mine))
    assert len({str(answer) for answer in got}) > 5  # they do say different things


def test_scores_of_a_mixed_batch_equal_those_of_each_run_alone(masked_run, runs, alone):
    """Labels may agree by chance; what the heads read may not."""
    many = selfsup.load_many(masked_run, runs, "cpu")
    seen = {}
    for name in runs:
        head = many._models[name].objective.head
        head.register_forward_hook(lambda m, i, o, name=name: seen.setdefault(name, o))
    many.predict([TEXTS[0], TEXTS[0], TEXTS[3], TEXTS[0]], ["mood", "short", "tags", "probe"])
    for name, text in (("mood", TEXTS[0]), ("short", TEXTS[0]), ("probe", TEXTS[0])):
        ((_, batch),) = alone[name].preprocessor.batches([text], 1)
        expected = alone[name].objective.read(alone[name].encoder(batch))
        torch.testing.assert_close(seen[name], expected, rtol=0, atol=1e-5)
    assert not torch.allclose(seen["mood"], seen["probe"])


def held_bytes(modules) -> int:
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for module in modules
        for t in module.state_dict().values()
    }
    return sum(storages.values())


def test_the_base_is_in_memory_once(masked_run, runs):
    base = held_bytes([selfsup.load(masked_run, "cpu").encoder])
    many = TunedModels(masked_run, device="cpu")
    empty = held_bytes([many.base.model.objective])
    assert empty == base
    sizes = []
    for name, run in runs.items():
        many.add(name, run)
        tasks = [model.objective for model in many._models.values()]
        sizes.append(held_bytes([many.base.model.objective, *tasks]))
    files = sum((run / "model" / "model.safetensors").stat().st_size for run in runs.values())
    assert empty < sizes[-1] <= base + files
    for name in list(runs):
        many.remove(name)
    assert held_bytes([many.base.model.objective]) == empty
    assert many.names == ()


def test_runs_come_and_go_without_a_trace(masked_run, runs, alone):
    many = TunedModels(masked_run, {"mood": runs["mood"]}, "cpu")
    before = many.predict(TEXTS, "mood")
    many.add("a.b/items", runs["short"])  # any text is a name
    assert many.predict(TEXTS, "a.b/items") == alone["short"].predict(TEXTS)
    many.remove("a.b/items")
    assert many.predict(TEXTS, "mood") == before
    many.add("a.b/items", runs["tags"])
    assert many.predict(TEXTS, "a.b/items") == alone["tags"].predict(TEXTS)
    assert many.predict([], "mood") == []


def test_a_run_that_is_saved_again_meanwhile_is_read_again(
    masked_run, runs, alone, tmp_path, monkeypatch
):
    inner, calls, real = tmp_path / "run" / "model", [], tuned_models.assemble
    shutil.copytree(runs["mood"] / "model", inner)

    def assemble(*given):
        if not calls:  # its configuration was read, its weights are not yet
            inner.rename(tmp_path / "old")
            shutil.copytree(runs["short"] / "model", inner)
        calls.append(given)
        return real(*given)

    monkeypatch.setattr(tuned_models, "assemble", assemble)
    many = TunedModels(masked_run, {"it": tmp_path / "run"}, "cpu")
    assert many.predict(TEXTS, "it") == alone["short"].predict(TEXTS)
    assert len(calls) == 2


def test_what_answers_otherwise_goes_through_the_same_encoder(corpus, tmp_path):
    base = selfsup.pretrain(
        corpus.masked, corpus.text, tmp_path / "base", {"training.steps": 3, "model.layers": 2}
    )
    runs = {
        name: selfsup.finetune(
            base,
            "classification",
            corpus.labelled,
            tmp_path / name,
            tuning="lora",
            settings={**SMALL, "training.steps": 3, "task.exits.training": training},
        )
        for name, training in (("exits", "joint"), ("none", "none"))
    }
    many = selfsup.load_many(base, runs, "cpu")
    got = many.predict(TEXTS * 2, ["exits"] * 5 + ["none"] * 5)
    assert got[:5] == selfsup.load(runs["exits"], "cpu").predict(TEXTS)
    assert got[5:] == selfsup.load(runs["none"], "cpu").predict(TEXTS)


@pytest.mark.parametrize(("name", "said"), [("mood", "merged into"), ("prefix", "stays beside")])
def test_a_merged_run_needs_no_base(runs, alone, selfsup_verb, tmp_path, name, said):
    answer = selfsup_verb("merge", runs[name], "--out", tmp_path / "whole")
    assert answer.code == 0, answer.err
    assert answer.out == f"{tmp_path / 'whole'}\n"
    assert said in answer.err
    path = tmp_path / "whole" / "model"
    values = tomllib.loads((path / "config.toml").read_text())
    assert "base" not in values
    added = [key for key in load_tensors(path / "model.safetensors") if ".additions." in key]
    assert bool(added) == (name == "prefix") == bool(values["tuning"]["names"])
    model = selfsup.load(path.parent, "cpu")
    for one, other in zip(
        model.predict_proba(TEXTS), alone[name].predict_proba(TEXTS), strict=True
    ):
        assert one == pytest.approx(other, abs=1e-5)
    assert selfsup.report([path.parent]).is_file()
    again = selfsup_verb("merge", path.parent, "--out", tmp_path / "again")
    assert again.code == 2
    assert "needs no base" in again.err


def test_threads_take_turns(masked_run, runs, alone):
    many = TunedModels(masked_run, {name: runs[name] for name in ("mood", "tags")}, "cpu")
    expected = {name: alone[name].predict(TEXTS) for name in many.names}
    wrong = []

    def ask(name: str) -> None:
        for _ in range(10):
            if many.predict(TEXTS, name) != expected[name]:
                wrong.append(name)

    threads = [threading.Thread(target=ask, args=(name,)) for name in many.names * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("key", ["path", "absolute", "sha256"])
@pytest.mark.parametrize("value", [None, 3])
def test_a_base_that_is_not_described(runs, tmp_path, key, value):
    shutil.copytree(runs["mood"] / "model", tmp_path / "model")
    values = read_toml(tmp_path / "model" / "config.toml")
    values["base"] = {k: v for k, v in {**values["base"], key: value}.items() if v is not None}
    (tmp_path / "model" / "config.toml").write_text(write_toml(values))
    with pytest.raises(CheckpointError, match=rf"config\.toml: base\.{key} must be a text"):
        load_model(tmp_path, "cpu")


def test_bad_input(masked_run, causal_run, tuned_run, runs, tmp_path):
    many = TunedModels(masked_run, {"mood": runs["mood"]}, "cpu")
    with pytest.raises(ConfigError, match="no run 'moot' is loaded; did you mean 'mood'"):
        many.predict(TEXTS, "moot")
    with pytest.raises(ConfigError, match="no run 'moot' is loaded"):
        many.remove("moot")
    with pytest.raises(ConfigError, match="2 names for 5 items"):
        many.predict(TEXTS, ["mood", "mood"])
    with pytest.raises(ConfigError, match="'mood' is loaded already"):
        many.add("mood", runs["tags"])
    with pytest.raises(ConfigError, match="holds an encoder of its own"):
        many.add("whole", tuned_run)
    with pytest.raises(ConfigError, match="holds an encoder of its own"):
        many.add("base", masked_run)
    with pytest.raises(CheckpointError, match="was tuned from another model than"):
        selfsup.load_many(causal_run, {"mood": runs["mood"]})
    with pytest.raises(CheckpointError, match="holds no model"):
        many.add("nothing", tmp_path)
    with pytest.raises(DataError, match="of the items for 'mood': item 1 is empty"):
        many.predict(["a film", ""], "mood")
    assert many.names == ("mood",)
    assert len(many.predict(TEXTS, "mood")) == 5
