"""What a person can do wrong: the right exit code, one clear message, and no traceback."""

import shutil
from pathlib import Path

import pytest

import selfsup as package
from selfsup.config import read_toml, write_toml
from selfsup.errors import ConfigError, DataError
from selfsup.run_start import check_same
from selfsup.training.checkpoint import checkpoint_paths


@pytest.fixture
def refused(selfsup):
    """Runs a command line that must fail; gives its message."""

    def refused(code: int, *arguments: object) -> str:
        answer = selfsup(*arguments)
        assert answer.code == code, answer.err
        assert answer.out == ""
        assert "Traceback" not in answer.err
        last = answer.err.splitlines()[-1]
        assert last.startswith("error: ")
        assert answer.err.count("error: ") == 1
        assert len(last) > 30, "too short to help"
        return last

    return refused


@pytest.fixture
def pretrain(refused, corpus, tmp_path):
    """A pre-training that must fail: `pretrain(code, settings..., data=..., recipe=...)`."""

    def pretrain(code: int, *settings: str, data=corpus.text, recipe=corpus.masked, more=()) -> str:
        begin = ("pretrain", recipe, "--data", data, "--out", tmp_path / "run", *more)
        message = refused(code, *begin, *(["--set", *settings] if settings else []))
        assert not (tmp_path / "run" / "model").exists()
        return message

    return pretrain


def test_data_that_is_not_there(pretrain, tmp_path):
    (tmp_path / "texts.txt").write_text("a")
    message = pretrain(3, data=tmp_path / "text.txt")
    assert f"no file or folder {tmp_path / 'text.txt'}; did you mean 'texts.txt'?" in message


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "latin.txt",
            "naïve café\n".encode("latin1") * 200,
            ["latin.txt:1: not UTF-8 (byte 0xef at character 3, see iconv)"],
        ),
        ("wide.txt", ("naive\n" * 300).encode("utf-16"), ["not UTF-8: byte 0", "utf-16"]),
        ("empty.txt", b"", ["a corpus without text"]),
        ("blank.txt", b" \n\n \n" * 50, ["too little text", "0 documents"]),
        ("short.txt", b"the film was great .\n", ["too little text", "give more text"]),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', ["a.jsonl:2: not JSON"]),
        ("b.jsonl", b'{"txt": "a"}\n', ["b.jsonl:1: no column 'text'; did you mean 'txt'?"]),
        ("a.csv", b"text,label\na,b,c\n", ["a.csv:2: 3 fields", "names 2"]),
        ("a.txt.gz", b"no gzip", ["a.txt.gz: cannot be read", "damaged"]),
        ("a.parquet", b"no parquet", ["a.parquet: not a readable Parquet file"]),
        ("a.docx", b"no text", ["a.docx: unknown extension; known: .txt"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_data_that_cannot_be_read(pretrain, tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    message = pretrain(3, data=tmp_path / name)
    assert name in message or name == "empty.txt"
    for word in words:
        assert word in message


def test_a_folder_in_place_of_a_file_that_holds_nothing(pretrain, tmp_path):
    (tmp_path / "texts").mkdir()
    assert "gives no file to read; looked for .txt" in pretrain(3, data=tmp_path / "texts")


def test_a_corpus_shorter_than_a_row(pretrain, tmp_path):
    lines = [f"the film number {i} was great ." for i in range(40)]
    (tmp_path / "few.txt").write_text("\n".join(lines))
    message = pretrain(3, "data.row_length=2000", data=tmp_path / "few.txt")
    assert "fewer than one row of 2000: lower data.row_length to at most" in message


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["training.step=5"], "unknown key training.step; did you mean 'steps'?"),
        (["trainig.steps=5"], "unknown section 'trainig'; did you mean 'training'?"),
        (["model.layrs=5"], "unknown key model.layrs; did you mean 'layers'?"),
        (["data.tokenizer.knd=bpe"], "unknown key data.tokenizer.knd; did you mean 'kind'?"),
        (["model.layers=many"], "model.layers must be int, got 'many'"),
        (["model.layers"], "--set model.layers: expected section.key=value"),
        (["steps=5"], "--set steps: give section.key"),
        (["method.name=masked_langage"], "did you mean 'masked_language'?"),
        (["model.name=transfomer"], "unknown model 'transfomer'"),
        (
            ["model.preset=bert-tny"],
            "unknown preset 'bert-tny' of model 'transformer'; did you mean 'bert-tiny'?",
        ),
        (["model.heads=5"], "dim = 32 is not a multiple of heads = 5"),
        (["training.steps=0"], "exactly one positive budget"),
        (["training.lr=-1"], "training: lr must be at least 0, got -1"),
        (["training.device=tpu"], "training.device = 'tpu'"),
        (["training.device=cuda"], "torch sees no GPU; use device='cpu'"),
        (["model.causal=true"], "masked_language needs model.causal = false"),
        (["method.sentence=sop"], "set data.rows = 'pairs'"),
        (["data.tokenizer.style=gpt"], "needs a tokenizer with a mask token"),
        (["data.row_length=2"], "data.row_length must be at least 8, got 2"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_wrong_setting(pretrain, settings, words):
    assert words in pretrain(2, *settings)


def test_an_unknown_recipe(pretrain, tmp_path):
    assert "did you mean 'bert-tiny-english'?" in pretrain(2, recipe="bert-tiny-englsh")
    assert "cannot be read" in pretrain(2, recipe=tmp_path / "none.toml")


def test_a_run_folder_that_exists(refused, corpus, masked_run):
    begin = ("pretrain", corpus.masked, "--data", corpus.text, "--out", masked_run)
    assert "exists already: give --resume to go on with it, or another --out" in refused(2, *begin)


def test_an_out_that_is_a_file_or_cannot_be_made(refused, corpus, tmp_path):
    (tmp_path / "file").write_text("")
    begin = ("pretrain", corpus.masked, "--data", corpus.text, "--out")
    assert "is a file; --out needs a folder" in refused(2, *begin, tmp_path / "file")
    assert "cannot be written" in refused(5, *begin, tmp_path / "file" / "run")
    assert "cannot be written (File name too long)" in refused(5, *begin, tmp_path / ("n" * 300))


@pytest.fixture
def copied(masked_run, tmp_path) -> Path:
    """A copy of the pre-trained run, to be damaged."""
    shutil.copytree(masked_run, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["model.dim=64"], "was begun with model.dim = 32, now 64"),
        (["data.row_length=24"], "was begun with data.row_length = 16, now 24"),
        (["method.final_mask_rate=0.1"], "method.final_mask_rate = None, now 0.1"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_resume_with_another_configuration(refused, corpus, copied, settings, words):
    begin = ("pretrain", corpus.masked, "--data", corpus.text, "--out", copied, "--resume")
    message = refused(2, *begin, "--set", *settings)
    assert words in message
    assert "or another --out" in message


def test_a_key_that_is_new_stood_at_its_default(copied):
    values = read_toml(copied / "run.toml")
    sections = {name: values[name] for name in ("data", "model", "method")}
    older = {**values, "data": {k: v for k, v in values["data"].items() if k != "across_documents"}}
    del older["model"]["experts"]
    (copied / "run.toml").write_text(write_toml(older))
    sections["model"] = {**sections["model"], "experts": 0}
    check_same(copied, sections, {})
    changed = {**sections, "data": {**sections["data"], "across_documents": True}}
    with pytest.raises(ConfigError, match=r"data.across_documents = False, now True"):
        check_same(copied, changed, {})
    older["model"] |= {"experts": 0, "gone": 1}
    (copied / "run.toml").write_text(write_toml(older))
    with pytest.raises(ConfigError, match=r"model.gone = 1, now None"):
        check_same(copied, sections, {})


def test_changes_of_the_training_are_said(selfsup, corpus, copied):
    begin = ("pretrain", corpus.masked, "--data", corpus.text, "--out", copied, "--resume")
    answer = selfsup(*begin)
    assert answer.code == 0, answer.err
    assert "other settings" not in answer.err
    answer = selfsup(*begin, "--set", "training.steps=241", "training.seed=5")
    assert answer.code == 0, answer.err
    assert "was begun with: seed = 0, now 5, steps = 240, now 241\n" in answer.err


def test_resume_with_other_data_or_another_recipe(refused, corpus, copied, tuned_run):
    begin = ("--out", copied, "--resume")
    message = refused(2, "pretrain", corpus.masked, "--data", corpus.labelled, *begin)
    assert "was begun with facts.fingerprint = " in message
    message = refused(2, "pretrain", corpus.causal, "--data", corpus.text, *begin)
    assert "was begun with m" in message
    message = refused(
        2, "pretrain", corpus.masked, "--data", corpus.text, "--out", tuned_run, "--resume"
    )
    assert "was begun with method." in message


def test_resume_a_finetuning_with_another_configuration(
    refused, corpus, masked_run, tuned_run, tmp_path
):
    task = ("--task", "classification")
    begin = ("finetune", masked_run, "--out", tuned_run, "--resume", "--set", "training.steps=60")
    data = ("--data", corpus.labelled)
    assert "task.dropout = 0.1, now 0.5" in refused(2, *begin, "task.dropout=0.5", *task, *data)
    assert "tuning.name = 'full', now 'probe'" in refused(
        2, *begin, *task, *data, "--tuning", "probe"
    )
    assert "facts.labelled_examples = 120, now 40" in refused(
        2, *begin, *task, "--data", corpus.test
    )
    lines = corpus.labelled.read_text().splitlines()
    lines[1], lines[-1] = lines[-1], lines[1]
    (tmp_path / "other.csv").write_text("\n".join(lines))
    assert "facts.fingerprint = " in refused(2, *begin, *task, "--data", tmp_path / "other.csv")


def test_a_damaged_newest_checkpoint_is_passed_over(selfsup, corpus, copied):
    newest = checkpoint_paths(copied / "checkpoints")[-1]
    weights = newest / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    expected = (copied / "metrics.jsonl").read_bytes()
    shutil.rmtree(copied / "model")

    answer = selfsup("doctor", copied)
    assert answer.code == 5
    assert f"{newest.name}  DAMAGED: " in answer.out
    assert "none yet: the run is not finished; go on with --resume" in answer.out

    answer = selfsup("pretrain", corpus.masked, "--data", corpus.text, "--out", copied, "--resume")
    assert answer.code == 0
    assert f"{newest}: weights.safetensors is damaged (its sha256 differs)" in answer.err
    assert "using the one before it" in answer.err
    assert f"resuming {copied} at step 180" in answer.err
    assert (copied / "metrics.jsonl").read_bytes() == expected
    assert "DAMAGED" not in selfsup("doctor", copied).out


def test_when_every_checkpoint_is_damaged(selfsup, refused, corpus, copied):
    for path in checkpoint_paths(copied / "checkpoints"):
        (path / "manifest.json").unlink()
    begin = ("pretrain", corpus.masked, "--data", corpus.text, "--out", copied, "--resume")
    answer = selfsup(*begin)
    assert answer.code == 5
    assert "all 2 checkpoints are damaged" in answer.err.splitlines()[-1]
    assert selfsup("doctor", copied).code == 5


@pytest.mark.parametrize("damage", [lambda c: c[:-7], lambda c: b"", lambda c: b"\xff" * len(c)])
def test_a_damaged_model(selfsup, refused, copied, damage):
    path = copied / "model" / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    message = refused(5, "fill", copied, "the [MASK]")
    assert "model.safetensors: damaged or not a safetensors file" in message
    answer = selfsup("doctor", copied)
    assert answer.code == 5
    assert answer.err.startswith(f"{message}; ")


@pytest.mark.parametrize(
    ("name", "content", "code", "words"),
    [
        ("config.toml", b"a = ", 2, "config.toml: not a TOML file"),
        ("config.toml", b"format = 1\n", 5, "section or key 'data' is missing"),
        ("config.toml", b"format = 9\n", 5, "format 9, this version reads 1"),
        ("tokenizer.json", b"{}", 3, "tokenizer.json: not a tokenizer.json"),
        ("preprocessor.toml", b"", 3, "preprocessor.toml: not the preprocessor"),
    ],
)
def test_a_damaged_part_of_the_model(refused, copied, name, content, code, words):
    (copied / "model" / name).write_bytes(content)
    assert words in refused(code, "fill", copied, "the [MASK]")


def test_a_model_of_another_shape(refused, copied):
    path = copied / "model" / "config.toml"
    path.write_text(path.read_text().replace("dim = 32", "dim = 64"))
    assert "embedding.tokens.weight is (125, 32), here (125, 64)" in refused(
        5, "fill", copied, "the [MASK]"
    )


def test_a_run_that_is_not_there_or_not_finished(refused, copied, tmp_path):
    assert "holds no model; no run is there" in refused(5, "fill", tmp_path / "none", "a [MASK]")
    shutil.rmtree(copied / "model")
    assert "not finished: go on with --resume" in refused(5, "fill", copied, "a [MASK]")
    assert "no run.toml; is it a run folder?" in refused(5, "report", tmp_path / "none")


def test_the_wrong_verb_for_a_run(refused, masked_run, causal_run, tuned_run, corpus):
    assert "a masked_language model cannot generate" in refused(2, "generate", masked_run)
    assert "cannot fill blanks" in refused(2, "fill", causal_run, "the [MASK]")
    assert "run `selfsup finetune` first" in refused(2, "predict", masked_run, "a film")
    assert "cannot fill blanks" in refused(2, "fill", tuned_run, "the [MASK]")
    compare = ("compare", tuned_run, "--task", "classification", "--data", corpus.labelled)
    assert "needs a pre-trained run" in refused(5, *compare)
    assert "is evaluated on a labelled file: give --data" in refused(2, "evaluate", tuned_run)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("the film was .",), 3, "no blank in 'the film was .': write [MASK]"),
        (("",), 3, "item 0 is empty"),
        (("the [MASK]", "--top", 0), 2, "top must be at least 1, got 0"),
    ],
)
def test_fill(refused, masked_run, arguments, code, words):
    assert words in refused(code, "fill", masked_run, *arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--tokens", -1), "the number of tokens must be at least 0, got -1"),
        (("--temperature", -1), "temperature >= 0"),
        (("--top-p", 0), "0 < top_p <= 1"),
        (("--top-k", -2), "top_k >= 0"),
    ],
)
def test_generate(refused, causal_run, arguments, words):
    assert words in refused(2, "generate", causal_run, *arguments)


def test_embed(refused, masked_run, corpus, tmp_path):
    (tmp_path / "gap.txt").write_text("the film\n\nthe meal\n")
    begin = ("embed", masked_run, "--out", tmp_path / "v.npy", "--data")
    message = refused(3, *begin, tmp_path / "gap.txt")
    assert "1 of 3 items cannot be used" in message
    assert "gap.txt:2: empty: it has no token" in message
    message = refused(3, *begin, corpus.test, "--text", "txt")
    assert "test.csv:1: no column 'txt'; did you mean 'text'?" in message
    assert "batch_size must be at least 1, got 0" in refused(
        2, *begin, corpus.test, "--batch-size", 0
    )
    assert not (tmp_path / "v.npy").exists()
    elsewhere = ("embed", masked_run, "--data", corpus.test, "--out", tmp_path)
    assert "is a folder with other things" in refused(5, *elsewhere)


def test_one_text_in_place_of_a_list(tuned_run, masked_run, causal_run):
    tuned = package.load(tuned_run)
    for use in (tuned.predict, tuned.predict_proba, package.load(masked_run).embed):
        with pytest.raises(DataError, match="'the film' is one item; give a list of items"):
            use("the film")
    with pytest.raises(DataError, match="give a list of items"):
        package.load(causal_run).score("the film")


def test_predict(refused, tuned_run):
    assert "give items, or --data FILE" in refused(2, "predict", tuned_run)
    assert "item 1 is empty" in refused(3, "predict", tuned_run, "a film", "")


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        ("text,label\nthe film,god\n", 3, "bad.csv:2: label 'god' is not among the training lab"),
        ("txt,label\nthe film,good\n", 3, "bad.csv:1: no text column was found"),
        ("text,label\nthe film,\n", 3, "bad.csv:2: 'label' is empty"),
        ("text,label\n,good\n", 3, "bad.csv:2: 'text' is empty"),
        ("text,label\nthe film,good,1\n", 3, "bad.csv:2: 3 cells, but 2 columns"),
        ("text,label\n", 3, "no example"),
        ("", 3, "is empty"),
    ],
    ids=lambda value: value[:30].replace("\n", " ") if isinstance(value, str) else "",
)
def test_labelled_files(refused, tuned_run, tmp_path, content, code, words):
    (tmp_path / "bad.csv").write_text(content)
    assert words in refused(code, "evaluate", tuned_run, "--data", tmp_path / "bad.csv")


def test_finetune(refused, masked_run, corpus, tmp_path):
    def finetune(code: int, *arguments: object, task="classification", data=corpus.labelled) -> str:
        begin = ("finetune", masked_run, "--task", task, "--data", data)
        return refused(code, *begin, "--out", tmp_path / "run", *arguments)

    assert "did you mean 'classification'?" in finetune(2, task="clasification")
    assert "did you mean 'label'?" in finetune(3, "--label", "lable")
    assert "unknown key task.droput; did you mean 'dropout'?" in finetune(
        2, "--set", "task.droput=0.5"
    )
    assert "unknown section 'model'" in finetune(2, "--set", "model.dim=5")
    assert "unknown tuning 'fulll'; did you mean 'full'?" in finetune(2, "--tuning", "fulll")
    assert "'label' must be a finite number, got" in finetune(3, task="regression")
    assert "none.csv: cannot be read (No such file or directory)" in finetune(
        3, data=tmp_path / "none.csv"
    )


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--labels", 5000), 3, "--labels asks for 5000"),
        (("--labels", 0), 2, "label count must be at least 1, got 0"),
        (("--labels", 20, 8), 2, "label counts must rise, got [20, 8]"),
        (("--labels", 8, "--steps", -1), 2, "steps must be at least 1, got -1"),
        (("--labels", 8, "--jobs", -1), 2, "jobs must be at least 1, got -1"),
        (("--labels", 8, "--lrs", -1), 2, "learning rates must be above 0, got [-1.0]"),
        (("--labels", 8, "--seeds", 1, 1), 2, "seeds must differ, got [1, 1]"),
        (("--labels", 8, "--tuning", "lorra"), 2, "unknown tuning 'lorra'"),
        (("--labels", 8, "--max-length", 2), 2, "max_length must be at least 5 tokens, got 2"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_compare(refused, masked_run, corpus, arguments, code, words):
    begin = ("compare", masked_run, "--task", "classification", "--data", corpus.labelled)
    jobs = () if "--jobs" in arguments else ("--jobs", 1)
    assert words in refused(code, *begin, *arguments, *jobs)


def test_words_that_argparse_refuses(selfsup):
    for arguments in (("pretrian",), ("pretrain",), ("fill", "run"), ("embed", "x", "--dta", "y")):
        answer = selfsup(*arguments)
        assert answer.code == 2
        assert answer.out == ""
        assert answer.err.startswith("error: ")
        assert answer.err.splitlines()[-1].startswith("see: selfsup")


def test_list_and_doctor(refused, tmp_path):
    assert "cannot list 'recipe'; did you mean 'recipes'?" in refused(2, "list", "recipe")
    assert "no file or folder" in refused(3, "doctor", tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text("")
    assert "documents, all empty" in refused(3, "doctor", tmp_path / "empty.txt")


def test_diverged(refused, corpus, tmp_path):
    begin = ("pretrain", corpus.masked, "--data", corpus.text, "--out", tmp_path / "run")
    message = refused(
        4, *begin, "--set", "training.lr=1e30", "training.clip=0", "training.steps=20"
    )
    assert "not finite" in message or "held-out loss is" in message
    assert "lower training.lr" in message
