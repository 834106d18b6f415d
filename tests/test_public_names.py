"""What `import selfsup` gives is a promise, and what must answer at once imports nothing heavy."""

import json
import subprocess
import sys

import pytest

import selfsup

NAMES = ["Model", "align", "compare", "distill", "embed", "evaluate", "export", "finetune"]
NAMES += ["import_", "index_recall", "load", "load_many", "merge", "pet", "pretrain", "probe"]
NAMES += ["prompt", "prune", "report", "search", "self_train"]
HEAVY = {"torch", "numpy", "sklearn", "scipy", "tokenizers", "pyarrow", "matplotlib", "rich"}
# Runs a command line and tells on the last line of the standard error what it imported.
WATCHED = f"""
import json, sys
from selfsup.cli import main
code = 0
try:
    code = main(sys.argv[1:])
except SystemExit as stop:
    code = stop.code
print(json.dumps([code, sorted({HEAVY!r} & set(sys.modules))]), file=sys.stderr)
"""


def watched(*arguments: str) -> tuple[int, set[str], str]:
    """Exit code, heavy imports and standard output of one command line."""
    out = subprocess.run(
        [sys.executable, "-c", WATCHED, *arguments], capture_output=True, text=True, check=True
    )
    code, heavy = json.loads(out.stderr.splitlines()[-1])
    return code, set(heavy), out.stdout


def test_public_names_are_pinned():
    assert sorted(selfsup.__all__) == NAMES
    assert all(getattr(selfsup, name) is not None for name in NAMES)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'pretrane'"):
        selfsup.pretrane  # noqa: B018


@pytest.mark.parametrize("module", ["selfsup", "selfsup.cli", "selfsup.config", "selfsup.registry"])
def test_imports_without_torch(module):
    code = f"import sys, {module}; print({HEAVY!r} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("list",), "masked_language"),
        (("list", "recipes"), "bert-tiny-english"),
        (("list", "methods"), "causal_language"),
        (("list", "models"), "bert-base"),
        (("list", "tasks"), "tagging"),
        (("--help",), "exit codes"),
        (("pretrain", "--help"), "--resume"),
        (("compare", "--help"), "--labels"),
        (("search", "--help"), "--recall"),
        (("--version",), "."),
        ((), "VERB"),
    ],
)
def test_looking_needs_no_torch(arguments, said):
    code, heavy, out = watched(*arguments)
    assert code == 0
    assert heavy == set()
    assert said in out


def test_every_verb_teaches_by_example():
    out = subprocess.run(
        [sys.executable, "-m", "selfsup", "--help"], capture_output=True, text=True, check=True
    )
    verbs = ("pretrain", "finetune", "compare", "evaluate", "embed", "search", "fill", "generate")
    for verb in verbs:
        assert f"\n    {verb} " in out.stdout


def test_a_wrong_verb_exits_with_2_and_names_the_help():
    out = subprocess.run(
        [sys.executable, "-m", "selfsup", "pretrian"], capture_output=True, text=True
    )
    assert out.returncode == 2
    assert out.stdout == ""
    assert "invalid choice: 'pretrian'" in out.stderr
    assert out.stderr.endswith("see: selfsup --help\n")
