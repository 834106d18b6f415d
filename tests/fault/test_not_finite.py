"""A loss or a gradient that is not finite never reaches the weights."""

import pytest
import torch

from selfsup.errors import DivergedError
from selfsup.methods.generative.masked_language import MaskedLanguage
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
        entered: copies of the weights as each step began.
    """

    part: str
    value: float
    step: int

    def loss(self, batch, generator):
        output = super().loss(batch, generator)
        if not self.training:
            return output
        self.entered.append({k: v.clone() for k, v in self.state_dict().items()})
        if len(self.entered) - 1 == self.step:
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
