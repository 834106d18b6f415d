"""The command line from end to end, on a corpus of sentences whose words agree."""

import json
import math
import shutil
import tomllib

import numpy as np
import pytest

import selfsup as package
from selfsup.training.checkpoint import checkpoint_paths

COMPARE_KEYS = {
    *("task", "metric", "test_size", "label_counts", "arms", "seconds", "seeds", "tuning"),
    *("baseline_names", "learning_rates", "sweep", "curves", "unit", "command", "tunings"),
}
GOOD = "the film was wonderful and the end of the film was great ."
BAD = "the meal was terrible and the end of the meal was awful ."


def rows(run, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def table(out: str) -> dict[str, float]:
    """`name<tab>value` lines."""
    return {name: float(value) for name, value in (x.split("\t") for x in out.splitlines())}


def test_pretraining_leaves_the_public_format(masked_run):
    names = {p.name for p in masked_run.iterdir()}
    assert names == {
        *(".lock", "run.toml", "metrics.jsonl", "speed.jsonl", "checkpoints", "model"),
        "fills.json",
    }
    assert {p.name for p in (masked_run / "model").iterdir()} == {
        *("config.toml", "model.safetensors", "tokenizer.json", "preprocessor.toml")
    }
    assert [p.name for p in checkpoint_paths(masked_run / "checkpoints")] == [
        *("step-00000180", "step-00000240")
    ]
    values = tomllib.loads((masked_run / "run.toml").read_text())
    assert values["training"]["steps"] == 240
    assert values["method"] == {
        "name": "masked_language",
        "mask_rate": 0.15,
        "mask_share": 0.8,
        "random_share": 0.1,
        "whole_word": False,
        "sentence": "none",
        "head": "bert",
    }
    assert values["facts"]["documents"] == 600
    assert values["facts"]["parameters"] > 1000
    assert values["command"]["source"].endswith("text.txt")
    assert values["environment"]["precision"] == "float32"
    assert {"torch", "python", "processor", "cores"} <= values["environment"].keys()


def test_pretraining_learns_and_logs(masked_run):
    found = rows(masked_run)
    train = [row for row in found if row["split"] == "train"]
    valid = [row for row in found if row["split"] == "valid"]
    assert [row["step"] for row in train] == list(range(5, 241, 5))
    assert [row["step"] for row in valid] == [0, 120, 240]
    facts = tomllib.loads((masked_run / "run.toml").read_text())["facts"]
    assert valid[-1]["loss"] < facts["unigram_entropy"] - 0.3  # words agree: context tells
    assert {"loss", "mlm_accuracy", "gradient_norm", "lr", "tokens", "skipped"} <= train[0].keys()
    assert train[-1]["tokens"] == 240 * 16 * 16
    speed = rows(masked_run, "speed.jsonl")
    assert [row["step"] for row in speed] == [row["step"] for row in train]
    assert all(row["tokens_per_second"] > 0 for row in speed)


def test_evaluate_gives_the_held_out_loss(selfsup, masked_run):
    answer = selfsup("evaluate", masked_run)
    assert answer.code == 0
    scores = table(answer.out)
    last = [row for row in rows(masked_run) if row["split"] == "valid"][-1]
    assert scores["loss"] == pytest.approx(last["loss"], rel=1e-4)
    assert 0 < scores["mlm_accuracy"] < 1


def test_evaluate_on_other_text(selfsup, masked_run, tmp_path):
    words = ["awful", "the", "of", "was", "and", "film"]
    lines = (" ".join(words[i % 6 :] + words[: i % 5]) for i in range(200))
    (tmp_path / "other.txt").write_text("\n".join(lines))
    answer = selfsup("evaluate", masked_run, "--data", tmp_path / "other.txt")
    assert answer.code == 0
    assert table(answer.out)["loss"] > table(selfsup("evaluate", masked_run).out)["loss"] + 0.5


def test_fill(selfsup, masked_run):
    text = "the [MASK] was great and the end of the film was [MASK] ."
    answer = selfsup("fill", masked_run, text, "--top", 3)
    assert answer.code == 0
    lines = [line.split("\t") for line in answer.out.splitlines()]
    assert [line[0] for line in lines] == ["1"] * 3 + ["2"] * 3
    for blank in (lines[:3], lines[3:]):
        shares = [float(line[2]) for line in blank]
        assert shares == sorted(shares, reverse=True)
        assert 0 < sum(shares) <= 1
    blanks = package.load(masked_run).fill(text, top=3)
    assert [word for blank in blanks for word, _ in blank] == [x[1] for x in lines]


def test_fill_with_more_candidates_than_there_are_words(selfsup, masked_run):
    answer = selfsup("fill", masked_run, "the [MASK]", "--top", 10**6)
    assert answer.code == 0
    total = sum(float(line.split("\t")[2]) for line in answer.out.splitlines())
    assert total == pytest.approx(1, abs=0.01)


def test_embed(selfsup, masked_run, corpus, tmp_path):
    out = tmp_path / "new" / "vectors.npy"
    answer = selfsup("embed", masked_run, "--data", corpus.test, "--out", out)
    assert answer.code == 0
    assert answer.out == f"{out}\t40 x 32 float32\n"
    vectors = np.load(out, allow_pickle=False)
    assert (vectors.shape, vectors.dtype) == ((40, 32), np.float32)
    texts = [line.split(",")[0] for line in corpus.test.read_text().splitlines()[1:]]
    model = package.load(masked_run)
    assert np.allclose(vectors, model.embed(texts, batch_size=7), atol=1e-5)
    assert np.array_equal(model.embed(texts[:2], layer=-1), model.embed(texts[:2], layer=1))
    with pytest.raises(package.errors.ConfigError, match="layer must be from 0 to 1, got 2"):
        model.embed(texts[:2], layer=2)


def test_compare_report_and_doctor(selfsup, masked_run, corpus, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(masked_run, run)
    answer = selfsup(
        *("compare", run, "--task", "classification", "--data", corpus.labelled),
        *("--test", corpus.test, "--labels", 8, 40, "--seeds", 0, 1, 2, "--lrs", 5e-3),
        *("--steps", 12, "--jobs", 1),
    )
    assert answer.code == 0, answer.err
    found = json.loads((run / "compare.json").read_text())
    assert found.keys() == COMPARE_KEYS
    assert (found["task"], found["metric"]) == ("classification", "accuracy")
    assert (found["test_size"], found["label_counts"], found["seeds"]) == (40, [8, 40], [0, 1, 2])
    assert found["arms"].keys() == {"pretrained", "scratch", "baseline"}
    for arm in found["arms"].values():
        assert arm.keys() == {"8", "40"}
        for scores in arm.values():
            assert len(scores) == 3
            assert all(0 <= score <= 1 for score in scores)
    assert np.mean(found["arms"]["baseline"]["40"]) > 0.9  # the words say it all
    assert found["learning_rates"] == {
        arm: {"8": 5e-3, "40": 5e-3} for arm in ("pretrained", "scratch")
    }
    assert len(found["sweep"]) == 4
    assert len(found["curves"]) == 12
    for curve in found["curves"]:
        assert [x for x, y in zip(curve["step"], curve["loss"], strict=True) if y] == [5, 10, 12]
        watched = [y for y in curve["score"] if y is not None]
        assert len(watched) == 9  # before the first step, and eight times on the way
        assert all(0 <= score <= 1 for score in watched)
    assert found["baseline_names"].keys() == {"8", "40"}
    assert all(len(names) == 3 for names in found["baseline_names"].values())
    for arm in found["arms"].values():
        assert all(f"{np.mean(scores):.3f}" in answer.out for scores in arm.values())
    shown = json.loads((run / "embeddings.json").read_text())
    assert len(shown["points"]) == len(shown["labels"]) == len(shown["texts"]) == 40

    answer = selfsup("report", run)
    assert (answer.code, answer.out) == (0, f"{run / 'report.html'}\n")
    page = (run / "report.html").read_text()
    assert "<html" in page
    assert f"{np.mean(found['arms']['baseline']['40']):.3f}" in page

    answer = selfsup("doctor", run)
    assert answer.code == 0
    assert "step-00000240  whole, step 240" in answer.out
    assert "model          loads" in answer.out


def test_compare_somewhere_else_keeps_both_files(selfsup, masked_run, corpus, tmp_path):
    out = tmp_path / "here.json"
    answer = selfsup(
        *("compare", masked_run, "--task", "classification", "--data", corpus.labelled),
        *("--labels", 8, "--seeds", 0, "--lrs", 5e-3, "--steps", 2, "--jobs", 1, "--out", out),
    )
    assert answer.code == 0, answer.err
    assert "arms" in json.loads(out.read_text())
    assert "points" in json.loads((tmp_path / "here-embeddings.json").read_text())
    assert not (masked_run / "compare.json").exists()


def test_finetune_predict_evaluate(selfsup, tuned_run, corpus, tmp_path):
    assert not (tuned_run / "fills.json").exists()
    scored = [row["score"] for row in rows(tuned_run) if row["split"] == "valid"]
    assert len(scored) == 6
    assert scored[-1] > 0.8
    answer = selfsup("evaluate", tuned_run, "--data", corpus.test)
    assert answer.code == 0
    scores = table(answer.out)
    assert scores.keys() == {"examples", "accuracy", "macro_f1", "matthews"}
    assert scores["examples"] == 40
    assert scores["accuracy"] == pytest.approx(scored[-1])

    answer = selfsup("predict", tuned_run, GOOD, BAD)
    assert answer.code == 0
    lines = [line.split("\t") for line in answer.out.splitlines()]
    assert [(line[0], line[2]) for line in lines] == [("good", GOOD), ("bad", BAD)]
    assert all(0.5 < float(line[1]) <= 1 for line in lines)
    (tmp_path / "new.txt").write_text(f"{BAD}\n{GOOD}\n")
    answer = selfsup("predict", tuned_run, "--data", tmp_path / "new.txt")
    assert [line.split("\t")[0] for line in answer.out.splitlines()] == ["bad", "good"]


def test_predict_leaves_out_what_cannot_be_read_and_prints_a_line_for_each_item(
    selfsup, tuned_run, tmp_path
):
    new = tmp_path / "new.csv"
    new.write_text("text\n" + f'"{GOOD}\n{GOOD}"\n{BAD}\n' * 25 + '""\n')
    answer = selfsup("predict", tuned_run, "--data", new)
    assert answer.code == 0, answer.err
    assert "1 of 51 items cannot be used" in answer.err
    assert "new.csv:77: empty: it has no token" in answer.err
    lines = [line.split("\t") for line in answer.out.splitlines()]
    assert [line[0] for line in lines] == ["good", "bad"] * 25
    assert lines[0][2] == f"{GOOD} {GOOD}"


def test_a_tuned_model_reads_rows_as_long_as_it_was_tuned_on(selfsup, tuned_run):
    """Pre-training had rows of 16 tokens, fine-tuning of 128."""
    answer = selfsup("predict", tuned_run, " ".join([GOOD] * 5))
    assert answer.code == 0
    assert "cut" not in answer.err
    answer = selfsup("predict", tuned_run, " ".join([GOOD] * 20))
    assert "1 of 1 items were cut: the model reads at most 128 tokens" in answer.err


@pytest.mark.parametrize("tuning", ["full", "probe"])
def test_a_regression(selfsup, masked_run, corpus, tmp_path, tuning):
    data = tmp_path / "numbers.csv"
    lines = corpus.labelled.read_text().replace(",good", ",1.5").replace(",bad", ",-2")
    data.write_text(lines)
    run = tmp_path / "run"
    answer = selfsup(
        *("finetune", masked_run, "--task", "regression", "--data", data, "--out", run),
        *("--tuning", tuning, "--set", "training.steps=40", "training.lr=5e-3"),
    )
    assert answer.code == 0, answer.err
    scores = table(selfsup("evaluate", run, "--data", data).out)
    assert scores.keys() == {"examples", "pearson", "spearman"}
    assert scores["pearson"] > 0.5
    low, high = (
        float(x.split("\t")[0]) for x in selfsup("predict", run, BAD, GOOD).out.splitlines()
    )
    assert -4 < low < high < 4


def test_tagging(selfsup, masked_run, tmp_path):
    kinds = {"great": "ADJ", "awful": "ADJ", "film": "NOUN", "meal": "NOUN"}
    data = tmp_path / "tags.conll"
    with open(data, "w") as file:
        for noun in ("film", "meal"):
            for adjective in ("great", "awful"):
                for word in f"the {noun} was {adjective} .".split():
                    file.write(f"{word}\t{kinds.get(word, 'OTHER')}\n")
                file.write("\n")
    run = tmp_path / "run"
    answer = selfsup(
        *("finetune", masked_run, "--task", "tagging", "--data", data, "--out", run),
        *("--set", "training.steps=60", "training.lr=1e-2"),
    )
    assert answer.code == 0, answer.err
    assert table(selfsup("evaluate", run, "--data", data).out)["accuracy"] > 0.9
    answer = selfsup("predict", run, "the film was awful .")
    assert answer.out == "the/OTHER film/NOUN was/OTHER awful/ADJ ./OTHER\n"


def test_a_causal_run_from_end_to_end(selfsup, causal_run, corpus):
    assert (causal_run / "samples.json").exists()
    assert not (causal_run / "fills.json").exists()
    scores = table(selfsup("evaluate", causal_run).out)
    assert scores["perplexity_per_token"] == pytest.approx(math.exp(scores["loss"]), rel=1e-4)
    facts = tomllib.loads((causal_run / "run.toml").read_text())["facts"]["valid"]
    per_word = math.exp(scores["loss"] * facts["tokens"] / facts["words"])
    assert scores["perplexity_per_word"] == pytest.approx(per_word, rel=1e-4)
    assert 1 < scores["perplexity_per_word"] < 20

    beginning = "the film was"
    options = ("--prompt", beginning, "--tokens", 6)
    first = selfsup("generate", causal_run, *options, "--temperature", 0)
    assert first.code == 0
    assert first.out.startswith(beginning)
    assert len(first.out) > len(beginning)
    assert first == selfsup("generate", causal_run, *options, "--temperature", 0, "--seed", 5)
    drawn = {selfsup("generate", causal_run, *options, "--seed", seed).out for seed in range(4)}
    assert len(drawn) > 1
    again = {selfsup("generate", causal_run, *options, "--seed", seed).out for seed in range(4)}
    assert drawn == again
    assert selfsup("generate", causal_run, "--tokens", 0).out == "\n"

    near = selfsup("words", causal_run, "film", "great", "--top", 2).out.splitlines()
    assert [line.split("\t")[0] for line in near] == ["film", "film", "great", "great"]
    solved = selfsup("words", causal_run, "--analogy", "film", "the", "great", "--top", 1).out
    assert solved.startswith("the - film + great\t")
    assert selfsup("words", causal_run).code == 2

    model = package.load(causal_run)
    likely, unlikely = model.score([GOOD, "great end film was the the of and ."])
    assert unlikely < likely < 0


def test_a_causal_run_with_learned_positions_ends_well(selfsup, corpus, tmp_path):
    """Its samples must fit into the positions that it has."""
    answer = selfsup(
        *("pretrain", corpus.causal, "--data", corpus.text, "--out", tmp_path / "run", "--set"),
        *("model.positions=learned", "model.max_length=16", "training.steps=2"),
    )
    assert answer.code == 0, answer.err
    assert len(json.loads((tmp_path / "run" / "samples.json").read_text())) == 4


def test_a_short_run_has_a_curve(selfsup, corpus, tmp_path):
    """Fewer steps than `log_every`."""
    run = tmp_path / "run"
    settings = ("training.steps=3", "training.log_every=50")
    answer = selfsup(
        "pretrain", corpus.masked, "--data", corpus.text, "--out", run, "--set", *settings
    )
    assert answer.code == 0
    assert [row["step"] for row in rows(run) if row["split"] == "train"] == [3]
    assert [row["step"] for row in rows(run, "speed.jsonl")] == [3]


def test_another_budget_takes_the_place_of_the_recipes(selfsup, corpus, tmp_path):
    run = tmp_path / "run"
    begin = ("pretrain", corpus.masked, "--data", corpus.text, "--out", run, "--set")
    assert selfsup(*begin, "training.tokens=1000").code == 0
    training = tomllib.loads((run / "run.toml").read_text())["training"]
    assert (training["tokens"], "steps" in training) == (1000, False)
    assert [row["tokens"] for row in rows(run) if row["split"] == "train"] == [1024]


def test_doctor_looks_at_data(selfsup, corpus):
    answer = selfsup("doctor", corpus.labelled)
    assert answer.code == 0
    facts = dict(line.split(maxsplit=1) for line in answer.out.splitlines())
    assert (facts["documents"], facts["empty"]) == ("120", "0")
    texts = [line.rpartition(",")[0] for line in corpus.labelled.read_text().splitlines()[1:]]
    assert facts["duplicates"] == str(120 - len(set(texts)))
    assert facts["characters"].startswith(f"{sum(map(len, texts)):,} ")


def test_doctor_looks_at_the_installation(selfsup):
    answer = selfsup("doctor")
    assert answer.code == 0
    assert "torch          computes" in answer.out


@pytest.mark.slow
def test_one_line_of_20_megabytes(selfsup, corpus, tmp_path):
    """One document without a line break, read in parts."""
    sentence = b"the film was wonderful and the end of the film was great . "
    data = tmp_path / "long.txt"
    data.write_bytes(sentence * (20_000_000 // len(sentence)))
    run = tmp_path / "run"
    answer = selfsup(
        *("pretrain", corpus.masked, "--data", data, "--out", run),
        *("--set", "training.steps=5"),
    )
    assert answer.code == 0, answer.err
    facts = tomllib.loads((run / "run.toml").read_text())["facts"]
    assert (facts["documents"], facts["split_by"]) == (1, "part")
    words = facts["train"]["words"] + facts["valid"]["words"]
    assert words == pytest.approx(13 * (20_000_000 // len(sentence)), rel=1e-3)


def test_pairs_from_end_to_end(selfsup, masked_run, tmp_path):
    """Do the two halves praise and blame alike?"""
    lines = [f"{a},{b},{int(a == b)}" for a in ("good", "bad") for b in ("good", "bad")] * 4
    words = {"good": "the film was great", "bad": "the film was awful"}
    path = tmp_path / "pairs.csv"
    cells = [line.split(",") for line in lines]
    body = "\n".join(f"{words[a]},{words[b]},{same}" for a, b, same in cells)
    path.write_text(f"one,two,label\n{body}\n")
    columns = ("--text", "one", "--text-b", "two")
    settings = ("--set", "training.steps=4")
    run = tmp_path / "pairs"
    data = ("--task", "classification", "--data", path)
    assert selfsup("finetune", masked_run, *data, *columns, *settings, "--out", run).code == 0
    answer = selfsup("predict", run, "--data", path, *columns)
    assert answer.code == 0, answer.err
    found = [line.split("\t") for line in answer.out.splitlines()]
    assert [line[2] for line in found] == [f"{words[a]} | {words[b]}" for a, b, _ in cells]
    assert {line[0] for line in found} <= {"0", "1"}
