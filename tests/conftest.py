"""What many test files share: a small corpus, its recipes, its runs, and quick real processes."""

import contextlib
import inspect
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

torch.manual_seed(0)  # for fixtures of modules: a process starts with a seed of its own
THINGS = ("film", "book", "song", "story", "meal", "place", "game", "trip")
GOOD = ("wonderful", "great", "lovely", "bright", "charming")
BAD = ("terrible", "dull", "awful", "boring", "gloomy")
MASKED = """
[recipe]
summary = "a masked language model of the tests"
[data]
name = "text"
row_length = 16
split_documents = "line"
valid_fraction = 0.1
[data.tokenizer]
vocab_size = 150
[model]
name = "transformer"
dim = 32
layers = 1
heads = 2
embedding_std = 1.0
init_std = 0.18
dropout = 0.05
[method]
name = "masked_language"
[training]
steps = 240
batch_size = 16
lr = 1e-2
log_every = 5
checkpoint_every = 60
evaluations = 2
precision = "float32"
device = "cpu"
"""
CAUSAL = MASKED.replace('"masked_language"', '"causal_language"').replace(
    "heads = 2", 'heads = 2\ncausal = true\npooling = "last"'
)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same draws for a test, whichever tests ran before it."""
    torch.manual_seed(0)


def sentences(count: int, seed: int) -> list[tuple[str, str]]:
    """(sentence, "good" or "bad"): the adjectives of a sentence agree, so context tells."""
    draw = np.random.Generator(np.random.PCG64(seed))
    out = []
    for _ in range(count):
        label, words = (("good", GOOD), ("bad", BAD))[draw.integers(2)]
        first, second = (words[i] for i in draw.choice(len(words), 2, replace=False))
        thing = THINGS[draw.integers(len(THINGS))]
        out.append((f"the {thing} was {first} and the end of the {thing} was {second} .", label))
    return out


@dataclass(frozen=True)
class Corpus:
    """Files that tests read and never change."""

    text: Path
    labelled: Path
    test: Path
    masked: Path
    causal: Path
    cache: Path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Iterator[Corpus]:
    """600 sentences, 120 labelled ones, 40 to test with, two recipes; the cache is in there too."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text.txt").write_text("".join(f"{text}\n" for text, _ in sentences(600, 0)))
    for name, count, seed in (("labelled", 120, 1), ("test", 40, 2)):
        lines = [f"{text},{label}\n" for text, label in sentences(count, seed)]
        (folder / f"{name}.csv").write_text("".join(["text,label\n", *lines]))
    (folder / "masked.toml").write_text(MASKED)
    (folder / "causal.toml").write_text(CAUSAL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SELFSUP_CACHE", str(folder / "cache"))
        yield Corpus(
            folder / "text.txt",
            folder / "labelled.csv",
            folder / "test.csv",
            folder / "masked.toml",
            folder / "causal.toml",
            folder / "cache",
        )


class Answer(NamedTuple):
    """What one command line gave."""

    code: int | str | None
    out: str
    err: str


def selfsup(*arguments: object) -> Answer:
    """One command line in this process: starting another one takes seconds."""
    from selfsup.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
    return Answer(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session", name="selfsup")
def run_selfsup(corpus) -> Callable[..., Answer]:
    """`selfsup("fill", run, text)` gives exit code, standard output and standard error."""
    return selfsup


@pytest.fixture(scope="session")
def masked_run(corpus, tmp_path_factory) -> Path:
    """A pre-trained masked language model; tests only read it, or copy it."""
    return _pretrained(corpus.masked, corpus, tmp_path_factory.mktemp("masked") / "run")


@pytest.fixture(scope="session")
def causal_run(corpus, tmp_path_factory) -> Path:
    """A pre-trained causal language model; tests only read it, or copy it."""
    return _pretrained(corpus.causal, corpus, tmp_path_factory.mktemp("causal") / "run")


def _pretrained(recipe: Path, corpus: Corpus, run: Path) -> Path:
    answer = selfsup("pretrain", recipe, "--data", corpus.text, "--out", run)
    assert answer.code == 0, answer.err
    assert answer.out == f"{run}\n"
    return run


@pytest.fixture(scope="session")
def tuned_run(corpus, masked_run, tmp_path_factory) -> Path:
    """A classifier of the labelled sentences; tests only read it, or copy it."""
    run = tmp_path_factory.mktemp("tuned") / "run"
    answer = selfsup(
        *("finetune", masked_run, "--task", "classification", "--data", corpus.labelled),
        *("--valid", corpus.test, "--out", run, "--set", "training.steps=60", "training.lr=5e-3"),
    )
    assert answer.code == 0, answer.err
    assert answer.out == f"{run}\n"
    return run


# A process that has imported everything and forks one child per command line.
SERVER = """
import json, os, sys
import torch
import selfsup.api
from selfsup.cli import main
torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # the first one imports for two seconds
print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    if "pid" in order:
        pid, status = os.waitpid(order["pid"], os.WNOHANG)
        print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
        continue
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        for number, path in enumerate((os.devnull, order["out"], order["err"])):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
        sys.stdin = open(0, closefd=False)
        sys.argv = ["selfsup", *order["arguments"]]
        exec(order["setup"], {})
        sys.exit(main())
    print(json.dumps(pid), flush=True)
"""


@dataclass(frozen=True)
class Child:
    """A real process that runs one command line."""

    pid: int
    out: Path
    err: Path
    ask: Callable[[dict], object]

    def wait(self, seconds: float = 60) -> int:
        """The exit code; minus the signal's number where a signal ended it."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            code = self.ask({"pid": self.pid})
            if code is not None:
                return code
            time.sleep(0.005)
        os.kill(self.pid, 9)
        raise TimeoutError(f"still running after {seconds} s: {self.err.read_text()}")


@pytest.fixture(scope="session")
def launch(corpus, tmp_path_factory) -> Iterator[Callable[..., Child]]:
    """Starts `selfsup ARGUMENTS` as a process of its own, in milliseconds.

    `setup`: Python that this process runs first, to bring a fault about.
    """
    folder = tmp_path_factory.mktemp("processes")
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert server.stdin is not None
    assert server.stdout is not None
    assert server.stdout.readline() == "ready\n"
    count = iter(range(10**9))

    def ask(order: dict) -> object:
        server.stdin.write(json.dumps(order) + "\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline())

    def launch(*arguments: object, setup: str = "") -> Child:
        number = next(count)
        out, err = folder / f"{number}.out", folder / f"{number}.err"
        words = [str(argument) for argument in arguments]
        pid = ask({"arguments": words, "out": str(out), "err": str(err), "setup": setup})
        return Child(pid, out, err, ask)

    with server:
        yield launch
        server.stdin.close()


# Imports once, for most of the time goes there, and forks before torch has any threads.
RANKS = """
import os, runpy, sys
import torch
path, name, count, folder, *arguments = sys.argv[1:]
results_of = runpy.run_path(path)[name]
rank, children = 0, []
for number in range(1, int(count)):
    child = os.fork()
    if not child:
        rank, children = number, []
        break
    children.append(child)
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=int(count)
)
torch.save(results_of(rank, *arguments), f"{folder}/{rank}.pt")
torch.distributed.destroy_process_group()
sys.exit(max((os.waitstatus_to_exitcode(os.waitpid(c, 0)[1]) for c in children), default=0))
"""


@pytest.fixture(scope="session")
def on_two_ranks(tmp_path_factory) -> Callable[..., list]:
    """Runs a function of a test file in two processes that talk: what it gave on rank 0 and 1.

    It is given its rank and the strings of the call; its results are tensors in lists and
    dictionaries. `count`: of processes.
    """

    def run(function: Callable[..., object], *arguments: str, count: int = 2) -> list:
        import torch

        folder = tmp_path_factory.mktemp("ranks")
        names = (inspect.getfile(function), function.__name__, str(count), str(folder), *arguments)
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", RANKS, *names],
            capture_output=True,
            text=True,
            timeout=600,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        return [torch.load(folder / f"{rank}.pt") for rank in range(count)]

    return run
