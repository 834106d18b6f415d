"""A loss or a gradient that is not finite never reaches the weights, on one rank or several."""

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from selfsup import ranks
from selfsup.batch import Vocabulary
from selfsup.errors import DivergedError
from selfsup.methods.generative.masked_language import Config as MaskedConfig
from selfsup.methods.generative.masked_language import MaskedLanguage
from selfsup.models.transformer import Config as ModelConfig
from selfsup.models.transformer import TransformerEncoder
from selfsup.randomness import isolated, seed_layers
from selfsup.training.checkpoint import load_checkpoint
from selfsup.training.config import TrainingConfig
from selfsup.training.folder import RunFolder
from selfsup.training.loop import train

pytestmark = pytest.mark.fault

STEPS = 8
FAULTY = [0, 1, 4, 6, 7]  # the first and the last step, and others


class Faulty(MaskedLanguage):
    """At one step the loss, or every gradient, is NaN or infinite.

    Attributes:
        part: loss or gradient.
        value: what stands in its place.
        step: when.
        rank: where; None: on every rank.
        entered: copies of the weights as each step began.
    """

    part: str
    value: float
    step: int
    rank: int | None = None

    def loss(self, batch, generator):
        output = super().loss(batch, generator)
        if not self.training:
            return output
        self.entered.append({k: v.clone() for k, v in self.state_dict().items()})
        if len(self.entered) - 1 == self.step and self.rank in (None, ranks.number()):
            if self.part == "loss":
                return output._replace(loss=output.loss * self.value)
            output.loss.register_hook(lambda gradient: gradient * self.value)
            assert output.loss.isfinite()
        return output


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


@pytest.fixture
def faulty(small_method, tmp_path):
    """Trains with such a step; gives the objective and its folder."""

    def faulty(part: str, value: float, step: int, policy: str):
        objective, data = small_method(Faulty, part=part, value=value, step=step, entered=[])
        name = f"{part}-{value}-{step}-{policy}"
        folder = RunFolder(tmp_path / name)
        config = TrainingConfig(
            steps=STEPS,
            batch_size=8,
            lr=1e-2,
            precision="float32",
            checkpoint_every=1,
            checkpoints=STEPS,
            evaluations=0,
            device="cpu",
            nonfinite=policy,
        )
        try:
            if policy == "stop":
                with pytest.raises(DivergedError, match=f"step {step}: loss .* not finite"):
                    train(objective, data.train, None, config, folder)
            else:
                train(objective, data.train, None, config, folder)
        finally:
            folder.close()
        return objective, tmp_path / name / "checkpoints"

    return faulty


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("part", ["loss", "gradient"])
def test_skip(faulty, faults, part, value):
    """Weights and moments are bit-unchanged over that step, and move over all others."""
    for step in FAULTY:
        with faults.trial(f"{part} not finite, policy skip", "weights and moments bit-unchanged"):
            objective, checkpoints = faulty(part, value, step, "skip")
            entered = [*objective.entered, objective.state_dict()]
            moved = [not equal(a, b) for a, b in zip(entered, entered[1:], strict=False)]
            assert moved == [number != step for number in range(STEPS)]
            if step:
                around = [checkpoints / f"step-{n:08d}" for n in (step, step + 1)]
                before, after = map(load_checkpoint, around)
                assert equal(before.weights, after.weights)
                assert equal(before.optimizer, after.optimizer)
                assert (before.state["skipped"], after.state["skipped"]) == (0, 1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("part", ["loss", "gradient"])
def test_stop(faulty, faults, part, value):
    for step in FAULTY:
        with faults.trial(
            f"{part} not finite, policy stop", "weights bit-unchanged; DivergedError"
        ):
            objective, _ = faulty(part, value, step, "stop")
            assert len(objective.entered) == step + 1
            assert equal(objective.state_dict(), objective.entered[step])


# Two ranks, one of which is struck


class Rows:
    """Packed rows of drawn tokens."""

    fields, lengths, labels = ("tokens",), None, None

    def __len__(self) -> int:
        return 24

    def batch(self, numbers):
        drawn = np.random.default_rng(0).integers(5, 40, (24, 8))
        return {"tokens": torch.from_numpy(drawn[numbers]), "index": torch.as_tensor(numbers)}


TRIALS = list(itertools.product(("loss", "gradient"), ("skip", "stop"), (0, 1), (0, 3, 5)))
VALUES = {0: float("nan"), 3: float("inf"), 5: float("nan")}  # by step, of six


def of_one_rank(rank: int) -> list[dict]:
    """The weights as each step began and at the end, and the exit code, of every trial."""
    spec, found = Vocabulary(size=40, pad=0, unk=1, cls=2, sep=3, mask=4), []
    for part, policy, victim, step in TRIALS:
        with isolated():
            seed_layers(0, "test")
            encoder = TransformerEncoder(ModelConfig(dim=16, layers=1, heads=2), spec)
            objective = Faulty(MaskedConfig(), encoder, spec)
        objective.part, objective.rank, objective.entered = part, victim, []
        objective.step, objective.value = step, VALUES[step]
        keys = {"evaluations": 0, "precision": "float32", "device": "cpu", "nonfinite": policy}
        config, code = TrainingConfig(steps=6, batch_size=4, lr=1e-2, **keys), 0
        try:
            train(objective, Rows(), None, config)
        except DivergedError as error:
            code = error.exit_code
        states = [*objective.entered, dict(objective.state_dict())]
        found.append({"code": torch.tensor(code), "states": states})
    return found


def test_on_one_of_two_ranks(on_two_ranks, faults):
    """All ranks decide alike, whichever is struck, and hold the same weights all the time."""
    for (part, policy, _, step), *of_ranks in zip(TRIALS, *on_two_ranks(of_one_rank), strict=True):
        note = "weights bit-unchanged; the ranks agree" + ("; exit code 4" * (policy == "stop"))
        with faults.trial(f"{part} not finite on one rank, policy {policy}", note):
            for ours, theirs in zip(*(one["states"] for one in of_ranks), strict=True):
                assert equal(ours, theirs)
            states = of_ranks[0]["states"]
            moved = [not equal(a, b) for a, b in zip(states, states[1:], strict=False)]
            if policy == "skip":
                assert moved == [number != step for number in range(6)]
            else:
                assert moved == [True] * step + [False]
            assert [int(one["code"]) for one in of_ranks] == [4 * (policy == "stop")] * 2


STRUCK = """
import os, sys
from selfsup.cli import main
from selfsup.methods.generative.masked_language import MaskedLanguage
usual, count = MaskedLanguage.loss, iter(range(10**9))

def loss(self, batch, generator):
    output = usual(self, batch, generator)
    if self.training and next(count) == 2 and os.environ["RANK"] == "1":
        output = output._replace(loss=output.loss * float("nan"))
    return output

MaskedLanguage.loss = loss
sys.exit(main())
"""


def test_the_command_line_of_two_ranks(corpus, faults, tmp_path):
    """The second is struck; torchrun says with which code each of them ended."""
    script, run = tmp_path / "struck.py", tmp_path / "run"
    script.write_text(STRUCK)
    words = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *(script, "pretrain", corpus.masked, "--data", corpus.text, "--out", run),
        *("--set", "training.steps=4", "training.checkpoint_every=1"),
    ]
    with faults.trial("loss not finite on one rank, command line", "exit code 4; no model"):
        done = subprocess.run(
            list(map(str, words)),
            capture_output=True,
            text=True,
            timeout=600,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        said = done.stdout + done.stderr
        assert done.returncode != 0
        assert "error: step 2: " in said
        assert "exitcode  : 4 " in said
        assert "exitcode  : 1 " not in said
        assert not (run / "model").exists()
        found = load_checkpoint(run / "checkpoints" / "step-00000002")
        assert found.state["step"] == 2


SETUP = """
import itertools
from selfsup.methods.generative.masked_language import MaskedLanguage
usual, count = MaskedLanguage.loss, itertools.count()

def loss(self, batch, generator):
    output = usual(self, batch, generator)
    if self.training and next(count) == 6:
        {fault}
    return output

MaskedLanguage.loss = loss
"""
FAULTS = {
    "loss": "output = output._replace(loss=output.loss * float('nan'))",
    "gradient": "output.loss.register_hook(lambda gradient: gradient * float('inf'))",
}


@pytest.mark.parametrize("part", FAULTS)
def test_the_command_line(pretrain, finished, same_run, faults, tmp_path, part):
    """Exit code 4; without the fault the run is resumed as if nothing had been."""
    settings = ("training.steps=12", "training.checkpoint_every=4")
    whole, run = tmp_path / "whole", tmp_path / "run"
    finished(pretrain(whole, *settings))
    with faults.trial(f"{part} not finite, command line", "exit code 4; resumed bit-equally"):
        child = pretrain(run, *settings, setup=SETUP.format(fault=FAULTS[part]))
        assert child.wait() == 4, child.err.read_text()
        said = child.err.read_text()
        assert "error: step 6: " in said
        assert "Traceback" not in said
        assert not (run / "model").exists()
        finished(pretrain(run, *settings, resume=True))
        same_run(run, whole)
