"""Suites: all nine tasks of GLUE in their official layout, what is missing, resuming, one's own."""

import json
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.metrics import f1_score, matthews_corrcoef

from selfsup import registry
from selfsup.errors import CheckpointError, ConfigError, DataError, DivergedError
from selfsup.evaluation import suite_task
from selfsup.evaluation.metrics import METRICS
from selfsup.evaluation.suite import evaluate_suite
from selfsup.evaluation.suite_files import Question
from selfsup.evaluation.suite_plan import find, load
from selfsup.evaluation.suite_task import Settings, answers

QUICK = {"steps": 2, "lrs": (1e-3,), "max_length": 16}
THREE = ("contradiction", "entailment", "neutral")
OF_PAIRS = {  # folder: columns of both texts and of the label, classes, end of line
    "MRPC": ("#1 String", "#2 String", "Quality", "01", "\n"),
    "QQP": ("question1", "question2", "is_duplicate", "01", "\n"),
    "QNLI": ("question", "sentence", "label", ("entailment", "not_entailment"), "\n"),
    "RTE": ("sentence1", "sentence2", "label", ("entailment", "not_entailment"), "\r\n"),
    "WNLI": ("sentence1", "sentence2", "label", "01", "\n"),
    "STS-B": ("sentence1", "sentence2", "score", ("0.000", "2.500", "5.000"), "\n"),
}
THINGS = ("film", "book", "song", "story")


def write(path: Path, header: list[str], rows: list[list[str]], end: str = "\n") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["\t".join(cells) for cells in ([header] if header else []) + rows]
    path.write_bytes("".join(f"{line}{end}" for line in lines).encode())


def text(number: int) -> str:
    return f'the "{THINGS[number % 4]}" was good {number}'


def glue(folder: Path) -> Path:
    """A small GLUE, each file as the official one: columns, headers, quotes, line ends."""
    for name, count in (("train", 10), ("dev", 6)):
        rows = [["gj04", str(n % 2), "*" * (n % 2), f'A " {text(n)}'] for n in range(count)]
        write(folder / f"CoLA/{name}.tsv", [], rows)
        rows = [[text(n) + " ", str(n % 2)] for n in range(count)]
        write(folder / f"SST-2/{name}.tsv", ["sentence", "label"], rows)
    for name in ("CoLA", "SST-2"):
        rows = [[str(n), text(n)] for n in range(4)]
        write(folder / f"{name}/test.tsv", ["index", "sentence"], rows)
    for task, (first, second, label, classes, end) in OF_PAIRS.items():
        for name, count in (("train", 10), ("dev", 6)):
            rows = [
                [str(n), text(n), text(n + n % 2), classes[n % len(classes)]] for n in range(count)
            ]
            write(folder / task / f"{name}.tsv", ["index", first, second, label], rows, end)
        rows = [[str(n), text(n), text(n + 1)] for n in range(4)]
        write(folder / task / "test.tsv", ["index", first, second], rows, end)
    header = ["index", "sentence1", "sentence2"]
    for name, count in (("train", 10), ("dev_matched", 6), ("dev_mismatched", 6)):
        rows = [[str(n), text(n), text(n + 1), "x", THREE[n % 3]] for n in range(count)]
        write(folder / f"MNLI/{name}.tsv", [*header, "label1", "gold_label"], rows)
    for name in ("MNLI/test_matched", "MNLI/test_mismatched", "diagnostic/diagnostic"):
        write(folder / f"{name}.tsv", header, [[str(n), text(n), text(n + 1)] for n in range(4)])
    rows = [["Logic", text(n), text(n + 1), THREE[n % 3]] for n in range(6)]
    columns = ["Logic", "Premise", "Hypothesis", "Label"]
    write(folder / "diagnostic/diagnostic-full.tsv", columns, rows)
    return folder


@pytest.fixture(scope="module")
def nine(masked_run, tmp_path_factory) -> tuple[Path, Path, dict]:
    """The folder of data, that of the results, and the results on all nine tasks."""
    data = glue(tmp_path_factory.mktemp("glue"))
    with open(data / "QQP" / "train.tsv", "a") as file:
        file.write("10\tonly one text\n")
    out = tmp_path_factory.mktemp("nine") / "out"
    return data, out, evaluate_suite(masked_run, "glue", data, out, seeds=(0, 1), **QUICK)


def test_all_nine_tasks_are_the_glue_score(nine) -> None:
    _, out, result = nine
    assert list(result["tasks"]) == [
        *("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli")
    ]
    assert {task["state"] for task in result["tasks"].values()} == {"done"}
    assert result["overall"]["name"] == "GLUE score"
    metrics = {name: task["metrics"] for name, task in result["tasks"].items()}
    assert list(metrics["mrpc"]) == ["f1", "accuracy"]
    assert list(metrics["stsb"]) == ["pearson", "spearman"]
    assert list(metrics["cola"]) == ["matthews"]
    assert list(metrics["mnli"]) == ["matched.accuracy", "mismatched.accuracy", "AX.matthews"]
    for seed in (0, 1):
        of_tasks = [
            *(metrics["cola"]["matthews"][seed], metrics["sst2"]["accuracy"][seed]),
            (metrics["mrpc"]["f1"][seed] + metrics["mrpc"]["accuracy"][seed]) / 2,
            (metrics["stsb"]["pearson"][seed] + metrics["stsb"]["spearman"][seed]) / 2,
            (metrics["qqp"]["f1"][seed] + metrics["qqp"]["accuracy"][seed]) / 2,
            sum(metrics["mnli"][f"{part}.accuracy"][seed] for part in ("matched", "mismatched"))
            / 2,
            *(metrics[name]["accuracy"][seed] for name in ("qnli", "rte", "wnli")),
        ]
        assert result["overall"]["score"][seed] == pytest.approx(sum(of_tasks) / 9)
    assert result["lines"]["human"]["same_tasks"] == pytest.approx(0.871, abs=0.0006)
    assert result["lines"]["bert-large"]["same_tasks"] == pytest.approx(0.805, abs=0.0006)
    assert result["tasks"]["qqp"]["left_out"] == {str(nine[0] / "QQP/train.tsv"): 1}
    assert result["tasks"]["rte"]["train_examples"] == 10
    assert json.loads((out / "suite.json").read_text()) == json.loads(json.dumps(result))


def test_the_submission_holds_every_file_of_the_page(nine) -> None:
    _, out, _ = nine
    names = [*("CoLA", "SST-2", "MRPC", "STS-B", "QQP", "MNLI-m", "MNLI-mm", "AX", "QNLI"), "RTE"]
    with zipfile.ZipFile(out / "submission.zip") as archive:
        assert archive.namelist() == [f"{name}.tsv" for name in [*names, "WNLI"]]
        files = {name: archive.read(name).decode() for name in archive.namelist()}
    for name, content in files.items():
        lines = content.removesuffix("\n").split("\n")
        assert lines[0] == "index\tprediction"
        assert [line.split("\t")[0] for line in lines[1:]] == ["0", "1", "2", "3"], name
        answers = {line.split("\t")[1] for line in lines[1:]}
        if name in ("RTE.tsv", "QNLI.tsv"):
            assert answers <= {"entailment", "not_entailment"}
        elif name in ("AX.tsv", "MNLI-m.tsv", "MNLI-mm.tsv"):
            assert answers <= set(THREE)
        elif name == "STS-B.tsv":
            assert all(0 <= float(a) <= 5 and len(a) == 5 for a in answers)
        else:
            assert answers <= {"0", "1"}, name


def test_what_is_done_is_kept_and_what_differs_is_refused(nine, masked_run, monkeypatch) -> None:
    data, out, result = nine
    with monkeypatch.context() as patch:
        patch.setattr(suite_task, "fit", lambda *_, **__: pytest.fail("a task was trained again"))
        again = evaluate_suite(masked_run, "glue", data, out, seeds=(0, 1), **QUICK)
        assert again["tasks"] == result["tasks"]
        with pytest.raises(ConfigError, match=r"cola\.json: was made with other settings \(seeds"):
            evaluate_suite(masked_run, "glue", data, out, seeds=(0,), **QUICK)
    kept = json.loads((out / "tasks/rte.json").read_text())
    (out / "tasks/rte.json").unlink()
    repeated = evaluate_suite(masked_run, "glue", data, out, seeds=(0, 1), **QUICK)
    assert repeated["tasks"]["rte"]["metrics"] == kept["result"]["metrics"]
    assert repeated["tasks"]["cola"]["seconds"] == result["tasks"]["cola"]["seconds"]


def test_missing_tasks_are_named_and_the_mean_says_so(masked_run, tmp_path) -> None:
    data = glue(tmp_path / "glue")
    for name in ("QQP", "MNLI", "STS-B", "WNLI", "RTE", "QNLI"):
        shutil.rmtree(data / name)
    (data / "MRPC/dev.tsv").unlink()
    result = evaluate_suite(masked_run, "glue", data, tmp_path / "out", **QUICK)
    states = {name: task["state"] for name, task in result["tasks"].items()}
    assert [name for name, state in states.items() if state == "done"] == ["cola", "sst2"]
    assert result["tasks"]["qqp"]["missing"] == ["QQP/train.tsv", "QQP/dev.tsv"]
    assert result["tasks"]["mrpc"]["missing"] == ["MRPC/dev.tsv"]
    assert result["overall"]["name"] == "mean of 2 of 9 tasks"
    assert "GLUE score" not in json.dumps(result)
    assert result["lines"]["human"]["same_tasks"] == pytest.approx((0.664 + 0.978) / 2)
    # a task whose data come later is done then
    glue(tmp_path / "later")
    shutil.copytree(tmp_path / "later/RTE", data / "RTE")
    result = evaluate_suite(masked_run, "glue", data, tmp_path / "out", **QUICK)
    assert result["overall"]["name"] == "mean of 3 of 9 tasks"


def test_the_scored_part_chooses_nothing(masked_run, tmp_path) -> None:
    rows = [[text(n), str(n % 2)] for n in range(40)]
    found = []
    for name, flip in (("one", 0), ("two", 1)):
        data = tmp_path / name
        write(data / "SST-2/train.tsv", ["sentence", "label"], rows)
        dev = [[text(n), str((n + flip) % 2)] for n in range(8)]
        write(data / "SST-2/dev.tsv", ["sentence", "label"], dev)
        write(data / "SST-2/test.tsv", ["index", "sentence"], [[str(n), text(n)] for n in range(8)])
        settings = {**QUICK, "lrs": (1e-4, 3e-2, 1e-2), "steps": 12}
        result = evaluate_suite(masked_run, "glue", data, tmp_path / f"out-{name}", **settings)
        task = result["tasks"]["sst2"]
        sent = (tmp_path / f"out-{name}/submission/SST-2.tsv").read_text()
        found.append((task["learning_rate"], task["choosing_examples"], sent))
        assert task["train_examples"] + task["choosing_examples"] == 40
    assert found[0] == found[1]
    assert found[0][1] == 8


def test_a_rate_that_diverges_is_passed_over(masked_run, tmp_path, monkeypatch) -> None:
    rows = [[text(n), str(n % 2)] for n in range(40)]
    for name in ("train", "dev"):
        write(tmp_path / f"SST-2/{name}.tsv", ["sentence", "label"], rows)
    least = [1e-3]

    def fit(*given, **more):
        if given[3].lr != least[0]:
            raise DivergedError(f"the loss is nan at {given[3].lr}")

    monkeypatch.setattr(suite_task, "fit", fit)
    settings = {**QUICK, "lrs": (1e-1, 1e-3, 1e-2)}
    result = evaluate_suite(masked_run, "glue", tmp_path, tmp_path / "out", **settings)
    assert result["tasks"]["sst2"]["learning_rate"] == 1e-3
    least[0] = 1e-1  # then nothing can be better with less
    with pytest.raises(DivergedError, match=r"nan at 0\.001"):
        evaluate_suite(masked_run, "glue", tmp_path, tmp_path / "other", **settings)


def test_labels_count_those_that_choose(masked_run, tmp_path) -> None:
    data = glue(tmp_path)
    rows = [[text(n), str(n % 2)] for n in range(60)]
    write(data / "SST-2/train.tsv", ["sentence", "label"], rows)
    result = evaluate_suite(
        masked_run, "glue", data, tmp_path / "out", labels=30, steps=1, max_length=16
    )
    task = result["tasks"]["sst2"]
    assert task["train_examples"] + task["choosing_examples"] == 30
    assert 4 <= task["choosing_examples"] <= 8
    assert result["tasks"]["cola"]["choosing_examples"] == 0  # too few to keep any back
    assert result["overall"]["name"] == "GLUE with 30 labels a task"


def test_choices_are_gathered_by_question(tmp_path) -> None:
    shares = {"a": 0.2, "b": 0.7, "c": 0.6, "d": 0.6, "e": 0.9}

    def predict(items):
        return [str(int(shares[item] > 0.5)) for item in items]

    def predict_proba(items):
        return [np.array([1 - shares[item], shares[item]]) for item in items]

    model = SimpleNamespace(names=("0", "1"), predict=predict, predict_proba=predict_proba)
    rows = [
        Question(0, ("a", "b"), ("0", "1"), 1, ("first", "second")),
        Question(1, ("c", "d", "e"), ("1", "0", "0"), 0, ("x", "y", "z")),
        Question(2, ("c", "d"), ("1", "0"), 0, ("x", "y")),
    ]

    assert answers(model, "copa", rows) == ["second", "z", "x"]  # of equal ones the first
    assert answers(model, "multirc", rows) == [["0", "1"], ["1", "1", "1"], ["1", "1"]]


def test_metrics_against_scikit_learn_and_by_hand() -> None:
    draw = np.random.default_rng(0)
    truth, guess = (draw.integers(0, 2, 50).astype(str).tolist() for _ in range(2))
    assert METRICS["f1"](truth, guess) == pytest.approx(f1_score(truth, guess, pos_label="1"))
    three = [THREE[n] for n in draw.integers(0, 3, 60)]
    given = [THREE[n] for n in draw.integers(0, 3, 60)]
    assert METRICS["matthews"](three, given) == pytest.approx(matthews_corrcoef(three, given))
    # MultiRC: F1 over all answers (2 right, 3 given, 3 true), and questions with all right
    truth_of, guess_of = [["1", "0"], ["1", "1", "0"]], [["1", "0"], ["1", "0", "1"]]
    assert METRICS["f1"](truth_of, guess_of) == pytest.approx(4 / 6)
    assert METRICS["all_right"](truth_of, guess_of) == 0.5
    # CB: the mean of the three classes' F1: 2/3, 1, 0
    truth, guess = ["c", "c", "e", "n"], ["c", "n", "e", "c"]
    assert METRICS["macro_f1"](truth, guess) == pytest.approx((0.5 + 1 + 0) / 3)


def test_superglue_is_read_scored_and_submitted(masked_run, tmp_path) -> None:
    def put(name: str, records: list[dict]) -> None:
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({"idx": n, **r}) + "\n" for n, r in enumerate(records)))

    copa = [
        {"premise": text(n), "choice1": "a", "choice2": "b", "question": "cause", "label": n % 2}
        for n in range(6)
    ]
    entities = [{"start": 0, "end": 3}, {"start": 5, "end": 7}]
    record = [
        {
            "passage": {"text": f"Rome and {n}", "entities": entities},
            "qas": [{"query": "@placeholder fell", "idx": n, "answers": [{"text": "Rome"}]}],
        }
        for n in range(6)
    ]
    wsc = [
        {
            "text": f"Ann lost {n} of hers",
            "label": bool(n % 2),
            "target": {
                "span1_index": 0,
                "span1_text": "Ann",
                "span2_index": 4,
                "span2_text": "hers",
            },
        }
        for n in range(6)
    ]
    for name, records in (("COPA", copa), ("ReCoRD", record), ("WSC", wsc)):
        for part in ("train", "val", "test"):
            put(f"{name}/{part}.jsonl", records)
    result = evaluate_suite(masked_run, "superglue", tmp_path / "data", tmp_path / "out", **QUICK)
    done = {n: t for n, t in result["tasks"].items() if t["state"] == "done"}
    assert list(done) == ["copa", "record", "wsc"]
    assert result["tasks"]["rte"]["missing"] == ["RTE/train.jsonl", "RTE/val.jsonl"]
    assert done["record"]["metrics"].keys() == {"answer_f1", "exact_match"}
    assert done["copa"]["train_examples"] == 6
    assert done["copa"]["majority"] is None
    assert done["wsc"]["majority"] == 0.5
    lines = (tmp_path / "out/submission/ReCoRD.jsonl").read_text().splitlines()
    assert {json.loads(line)["label"] for line in lines} <= {"Rome", "and"}
    lines = (tmp_path / "out/submission/COPA.jsonl").read_text().splitlines()
    assert [json.loads(line)["idx"] for line in lines] == list(range(6))
    assert {json.loads(line)["label"] for line in lines} <= {0, 1}


MINE = """
title = "Mine"
[tasks.films]
task = "classification"
train = "films.csv"
scored = "test.csv"
metrics = ["accuracy", "macro_f1"]
[tasks.words]
task = "tagging"
train = ["Words.BIO", "other.bio"]
scored = "words.bio"
metrics = ["span_f1"]
[tasks.written]
task = "generation"
train = "films.csv"
scored = "test.csv"
metrics = ["bleu"]
[lines.before]
title = "the model before"
source = "our own test"
scores.films = [70, 60]
"""


def test_what_is_trained_on_is_not_scored_where_a_file_has_several_names(tmp_path):
    for name in ("dev.csv", "trial.csv"):
        (tmp_path / name).touch()
    train = find(tmp_path, ("train.csv", "dev.csv"))
    assert train == tmp_path / "dev.csv"
    names = ("dev.csv", "trial.csv")
    assert find(tmp_path, names, but=train) == tmp_path / "trial.csv"
    (tmp_path / "trial.csv").unlink()
    assert find(tmp_path, names, but=train) is None
    assert find(tmp_path, ("dev.csv",), but=train) == train  # as the user says


def test_a_suite_of_ones_own(selfsup, masked_run, corpus, tmp_path) -> None:
    (tmp_path / "mine.toml").write_text(MINE)
    shutil.copy(corpus.labelled, tmp_path / "films.csv")
    shutil.copy(corpus.test, tmp_path / "test.csv")
    tags = "the O\nfilm B-THING\nend I-THING\n\nwas O\nbook B-THING\n\n"
    (tmp_path / "words.bio").write_text(tags * 4 + "song B-NEVER\n\n")
    (tmp_path / "other.bio").write_text(tags)
    arguments = ("--labels", 40, "--steps", 60, "--lrs", 5e-3, "--tuning", "bias+probe")
    answer = selfsup(
        *("evaluate", masked_run, "--suite", tmp_path / "mine.toml", *arguments),
        *("--out", tmp_path / "out"),
    )
    assert answer.code == 0, answer.err
    assert "not supported: written\tgeneration needs a model that writes" in answer.out
    assert "mean of 2 of 3 tasks" in answer.out
    found = json.loads((tmp_path / "out/suite.json").read_text())
    assert found["tasks"]["films"]["metrics"]["accuracy"][0] > 0.6
    assert found["tasks"]["words"]["files"]["train"].lower() == "words.bio"
    assert found["lines"]["before"]["scores"]["films"] == pytest.approx(0.65)
    assert found["lines"]["before"]["same_tasks"] is None  # it has no score of the other task
    assert found["settings"]["tuning"] == "bias+probe"
    assert not (tmp_path / "out/submission.zip").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("[tasks.films]", "[tasks.films"), "not a TOML file"),
        (('task = "tagging"', 'task = "taging"'), "did you mean 'tagging'"),
        (('["span_f1"]', '["span_f2"]'), "unknown metric 'span_f2'; did you mean 'span_f1'"),
        (('["span_f1"]', "[]"), "no metric counts"),
        (('train = "films.csv"', 'tran = "films.csv"'), "unknown key tasks.films.tran"),
        (('scored = "words.bio"\n', ""), "tasks.words: missing key scored"),
        (("[70, 60]", "70"), r"lines.before.scores.films must be 2 number\(s\)"),
        (("scores.films", "scores.film"), "no task 'film'; did you mean 'films'"),
        (('title = "Mine"', 'titel = "Mine"'), "unknown key .*titel"),
        (('["span_f1"]', '["span_f1"]\nlayout = "tsv"'), "layout 'tsv' is for classification"),
        (('["span_f1"]', '["span_f1"]\nlayout = "glue"'), "layout = 'glue'"),
        (('["bleu"]', '["bleu"]\nhidden."x.tsv" = "y.tsv"'), "needs a layout"),
        (('["bleu"]', '["bleu"]\nrange = [5, 0]'), "range must be"),
    ],
)
def test_a_wrong_suite_says_where(tmp_path, change: tuple[str, str], message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(MINE.replace(*change, 1))
    with pytest.raises(ConfigError, match=message):
        load(path)


def test_wrong_use(selfsup, masked_run, tuned_run, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"no suite and no file is called 'glu'.*'glue'"):
        load("glu")
    with pytest.raises(ConfigError, match="glue needs --data"):
        evaluate_suite(masked_run, "glue")
    with pytest.raises(ConfigError, match="not a folder"):
        evaluate_suite(masked_run, "glue", tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="fine-tuned already"):
        evaluate_suite(tuned_run, "glue", tmp_path)
    with pytest.raises(ConfigError, match="did you mean 'probe'"):
        evaluate_suite(masked_run, "glue", tmp_path, tuning="prob")
    for wrong in ({"labels": 0}, {"seeds": (1, 1)}, {"seeds": ()}, {"lrs": (0.0,)}):
        with pytest.raises(ConfigError):
            Settings(**wrong)
    answer = selfsup("evaluate", masked_run, "--labels", 200)
    assert (answer.code, "--labels is for a --suite" in answer.err) == (2, True)
    answer = selfsup("evaluate", masked_run, "--suite", "glue", "--data", tmp_path, "--label", "x")
    assert answer.code == 2
    for of_it in (("--suite", "glue"), ("--exits", tmp_path / "valid.csv")):
        answer = selfsup("evaluate", masked_run, *of_it, "--data", tmp_path, "--set", "a.b=1")
        assert answer.code == 2
        assert "--set" in answer.err


def test_a_damaged_file_stops_the_suite(masked_run, tmp_path) -> None:
    data = glue(tmp_path)
    (data / "SST-2/train.tsv").write_bytes(b"sentence\tlabel\n\xff\t1\n")
    with pytest.raises(DataError, match=r"SST-2/train\.tsv:2: not UTF-8"):
        evaluate_suite(masked_run, "glue", data, tmp_path / "out", **QUICK)
    assert (tmp_path / "out/tasks/cola.json").is_file()


def test_files_are_found_in_any_case_and_packed(tmp_path) -> None:
    (tmp_path / "cola").mkdir()
    (tmp_path / "cola" / "Train.tsv.gz").touch()
    (tmp_path / "b.tsv").touch()
    assert find(tmp_path, ("CoLA/train.tsv",)) == tmp_path / "cola" / "Train.tsv.gz"
    assert find(tmp_path, ("a.tsv", "b.tsv")) == tmp_path / "b.tsv"
    assert find(tmp_path, ("CoLA", "cola/dev.tsv")) is None


@pytest.mark.parametrize("name", sorted(registry.suite_paths()))
def test_every_suite_that_comes_along_is_whole(name: str) -> None:
    found = load(name)
    assert found.summary
    assert all(set(line.scores) == set(found.tasks) for line in found.lines.values())


def test_list_names_them(selfsup) -> None:
    answer = selfsup("list", "suites")
    assert answer.code == 0
    assert "glue " in answer.out
    assert "superglue " in answer.out


def test_the_example_of_the_page_is_a_suite(tmp_path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "suites.md").read_text()
    path = tmp_path / "mine.toml"
    path.write_text(page.split("```toml\n")[1].split("```")[0])
    assert load(path).tasks["urgency"].counted == ("macro_f1", "accuracy")
    for name in registry.suite_paths():
        assert f"| `{name}` |" in page
