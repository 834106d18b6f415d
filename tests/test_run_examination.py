"""`selfsup doctor RUN`: a whole run is called whole, and every damage to it is named."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from selfsup.files import sha256
from selfsup.run_examination import examine_run
from selfsup.training.checkpoint import checkpoint_paths, load_tensors, save_tensors


@pytest.fixture
def run(masked_run, tmp_path) -> Path:
    """A copy of the pre-trained run, to be damaged."""
    shutil.copytree(masked_run, tmp_path / "run")
    return tmp_path / "run"


def damage(run: Path) -> dict[str, str]:
    """What is damaged, by the name of its finding."""
    return {name: said for name, said, damaged in examine_run(run) if damaged}


def said(run: Path) -> dict[str, str]:
    return {finding.name: finding.said for finding in examine_run(run)}


def test_a_whole_run(run):
    found = said(run)
    assert damage(run) == {}
    newest = checkpoint_paths(run / "checkpoints")[-1]
    rows = [len((run / f"{name}.jsonl").read_text().splitlines()) for name in ("metrics", "speed")]
    assert found.pop("run.toml").startswith(
        "readable, sections recipe, data, model, method, training"
    )
    assert found == {
        "step-00000180": "whole, step 180",
        "step-00000240": "whole, step 240",
        "metrics.jsonl": f"{rows[0]} rows",
        "speed.jsonl": f"{rows[1]} rows",
        "model": "loads",
    }
    assert newest.name == "step-00000240"


@pytest.mark.parametrize("change", ["cut", "emptied", "removed"])
@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("run.toml", "run.toml"),
        ("metrics.jsonl", "metrics.jsonl"),
        ("speed.jsonl", "speed.jsonl"),
        ("fills.json", "fills.json"),
        ("model/config.toml", "model"),
        ("model/model.safetensors", "model"),
        ("model/tokenizer.json", "model"),
        ("checkpoints/step-00000180/best.safetensors", "step-00000180"),
        ("checkpoints/step-00000240/weights.safetensors", "step-00000240"),
        ("checkpoints/step-00000240/manifest.json", "step-00000240"),
    ],
)
def test_every_damaged_file_is_named(run, selfsup, change, file, name):
    path = run / file
    if not path.exists():  # the run keeps its last weights
        shutil.copy(path.with_name("weights.safetensors"), path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] if change == "cut" else b"")
    if change == "removed":
        path.unlink()
    if change == "removed" and name in ("fills.json", "step-00000180"):
        assert damage(run) == {}
        return
    (found,) = damage(run).items()
    assert found[0] == name
    assert path.name in found[1] or "model" in found[1]
    if change == "cut" and name in ("metrics.jsonl", "model"):  # the command says the same
        answer = selfsup("doctor", run)
        assert answer.code == 5
        assert f"{name:<14} DAMAGED: {found[1]}" in answer.out.splitlines()
        assert answer.err == f"error: {found[1]}\n"


def test_several_damages_are_all_named_and_counted(run, selfsup):
    for path in checkpoint_paths(run / "checkpoints"):
        (path / "state.json").unlink()
    (run / "run.toml").unlink()
    answer = selfsup("doctor", run)
    assert answer.code == 5
    assert answer.out.count("DAMAGED") == 4
    assert "every checkpoint is damaged; begin anew" in answer.out
    assert "4 parts are damaged: the lines above name them" in answer.err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: [*rows[:2], rows[0], *rows[3:]], ":3: step 0 comes after 0"),
        (lambda rows: [*rows[:2], {"split": "train"}, *rows[3:]], ":3: a row without a step"),
        (lambda rows: [rows[0], {**rows[1], "loss": float("nan")}, *rows[2:]], ":2: loss is not"),
        (lambda rows: [*rows[:-1], {**rows[-1], "step": 250}], "and the checkpoint is of 240"),
        (lambda rows: rows[:-1], "shorter than the checkpoint says"),
    ],
)
def test_rows_that_cannot_be_of_this_run(run, change, words):
    path = run / "metrics.jsonl"
    size = path.stat().st_size
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    changed = change(rows)
    text = "".join(json.dumps(row) + "\n" for row in changed)
    if len(changed) == len(rows):  # of the size that the checkpoint says
        text = text[:-2] + " " * (size - len(text)) + "}\n" if len(text) < size else text
    path.write_text(text)
    if len(text) > size:
        text_size_of_checkpoint(run, len(text))
    (found,) = damage(run).items()
    assert found[0] == "metrics.jsonl"
    assert words in found[1]


def text_size_of_checkpoint(run: Path, size: int) -> None:
    """Makes the newest checkpoint say that so many bytes of metrics.jsonl are its own."""
    path = checkpoint_paths(run / "checkpoints")[-1]
    state = {**json.loads((path / "state.json").read_text()), "metrics_bytes": size}
    (path / "state.json").write_text(json.dumps(state))
    rehash(path)


def rehash(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["sha256"] = {name: sha256(path / name) for name in manifest["sha256"]}
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_rows_after_the_checkpoint_are_no_damage(run):
    """A run that was killed, even in the middle of a row."""
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 245, "spl')
    assert damage(run) == {}
    assert (
        "18 bytes after the newest checkpoint, which --resume makes again"
        in (said(run)["metrics.jsonl"])
    )


def test_files_of_different_runs_put_together(run):
    path = checkpoint_paths(run / "checkpoints")[-1]
    path.rename(path.with_name("step-00000230"))
    assert "state.json is of step 240" in damage(run)["step-00000230"]
    path.with_name("step-00000230").rename(path)
    tensors = load_tensors(path / "optimizer.safetensors")
    save_tensors(path / "optimizer.safetensors", {f"other.{k}": v for k, v in tensors.items()})
    rehash(path)
    assert "is of no weight" in damage(run)["step-00000240"]


def test_what_is_left_over_is_named(run):
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], text=True,
                          capture_output=True, check=True).stdout.strip()  # fmt: skip
    (run / "checkpoints" / f".step-00000200.{gone}.tmp").mkdir()
    (run / f".model.{os.getpid()}.tmp").mkdir()
    left = sorted(f.said for f in examine_run(run) if f.name == "left over")
    assert damage(run) == {}
    assert ".model." in left[0]
    assert f"being written by process {os.getpid()}" in left[0]
    assert "left by a process that was killed; --resume removes it" in left[1]


def test_a_run_without_checkpoints_or_rows_is_examined_too(run):
    """One that was imported: a model alone."""
    shutil.rmtree(run / "checkpoints")
    for name in ("metrics", "speed"):
        (run / f"{name}.jsonl").unlink()
    assert damage(run) == {}
    assert said(run)["model"] == "loads"


def test_a_run_that_was_killed_before_its_first_checkpoint(run):
    """All its rows, the cut one too, are made again."""
    shutil.rmtree(run / "checkpoints")
    shutil.rmtree(run / "model")
    (run / "metrics.jsonl").write_bytes(b'{"step": 5, "spl')
    assert damage(run) == {}
    assert said(run)["metrics.jsonl"].startswith("0 rows; 16 bytes after the newest checkpoint")
    assert said(run)["model"].startswith("none yet")
