"""What the tests of faults share: a count of trials, small runs, what bit-equal means."""

import json
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CLOCK = {"seconds", "speed_bytes"}
FILES = ("metrics.jsonl", "model/model.safetensors", "model/config.toml", "fills.json")


def pytest_addoption(parser: pytest.Parser) -> None:
    words = "write docs/results/faults.json; rows of tests that did not run stay as they are"
    parser.addoption("--record-faults", action="store_true", help=words)


class Faults:
    """Counts, for each kind of fault, the trials and those that ended as they must."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, Any]] = {}

    @contextmanager
    def trial(self, fault: str, note: str = "") -> Iterator[None]:
        """One trial: as required unless the block fails."""
        row = self.found.setdefault(fault, {"trials": 0, "as_required": 0, "note": note})
        row["trials"] += 1
        yield
        row["as_required"] += 1


@pytest.fixture(scope="session")
def faults(request) -> Iterator[Faults]:
    """With --record-faults the counts go to docs/results/faults.json."""
    from selfsup import results

    counts, started = Faults(), time.monotonic()
    yield counts
    if request.config.getoption("--record-faults"):
        path = results.FOLDER / "faults.json"
        before = json.loads(path.read_text()) if path.exists() else {"scores": {}}
        command = shlex.join(["pytest", *request.config.invocation_params.args])
        seconds = time.monotonic() - started
        if before["scores"].keys() - counts.found.keys():  # others were counted before
            command, seconds = f"{before['command']}; {command}", seconds + before["seconds"]
        scores = {**before["scores"], **counts.found}
        results.record("faults", command=command, seeds=[0], seconds=seconds, scores=scores)


@pytest.fixture(scope="session")
def same_run() -> Callable[..., None]:
    """Holds a finished run folder against another one."""
    from selfsup.training.checkpoint import load_newest

    def same_run(run: Path, whole: Path) -> None:
        """Bit-equal, but for the clock, and nothing half-written is left."""
        ours, theirs = load_newest(run / "checkpoints"), load_newest(whole / "checkpoints")
        assert ours is not None
        assert theirs is not None
        for got, expected in zip(ours[:3], theirs[:3], strict=True):
            assert (got is None) == (expected is None)
            assert (got or {}).keys() == (expected or {}).keys()
            for name, tensor in (expected or {}).items():
                assert got[name].dtype == tensor.dtype
                assert got[name].equal(tensor), name
        states = [{k: v for k, v in c.state.items() if k not in CLOCK} for c in (ours, theirs)]
        assert states[0] == states[1]
        names = sorted(str(p.relative_to(whole)) for p in whole.rglob("*"))
        assert sorted(str(p.relative_to(run)) for p in run.rglob("*")) == names
        for name in FILES:
            assert (run / name).read_bytes() == (whole / name).read_bytes(), name

    return same_run


@pytest.fixture(scope="session")
def pretrain(launch, corpus) -> Callable[..., Any]:
    """Starts `selfsup pretrain` of the small corpus as a process of its own."""

    def pretrain(out: Path, *settings: str, resume: bool = False, setup: str = "") -> Any:
        more = ["--resume"] if resume else []
        return launch(
            *("pretrain", corpus.masked, "--data", corpus.text, "--out", out, *more),
            *("--set", "training.log_every=1", *settings),
            setup=setup,
        )

    return pretrain


@pytest.fixture(scope="session")
def finished() -> Callable[[Any], None]:
    """Waits for a process that must end well."""

    def finished(child: Any) -> None:
        assert child.wait(600) == 0, child.err.read_text()

    return finished


@pytest.fixture(scope="session")
def small_method(corpus) -> Callable[..., Any]:
    """Builds a method of the small corpus in this process: (objective, prepared data)."""
    from selfsup.building import build_encoder
    from selfsup.config import recipe_values, run_config
    from selfsup.data import text
    from selfsup.randomness import isolated, seed_layers

    config = run_config(recipe_values(str(corpus.masked)))
    prepared = text.prepare(config.data, str(corpus.text))

    def small_method(kind: type, **attributes: Any) -> Any:
        encoder = build_encoder(config.model_name, config.model, prepared.spec, 0)
        with isolated():
            seed_layers(0, "objective")
            objective = kind(config.method, encoder, prepared.spec)
        for name, value in attributes.items():
            setattr(objective, name, value)
        return objective, prepared

    return small_method
