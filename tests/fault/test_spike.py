"""A spike in the loss: whatever is decided about it is decided again after a resume."""

from contextlib import suppress

import pytest
import torch

from selfsup.methods.generative.masked_language import MaskedLanguage
from selfsup.training.checkpoint import load_newest
from selfsup.training.config import TrainingConfig
from selfsup.training.folder import RunFolder
from selfsup.training.loop import train

pytestmark = pytest.mark.fault

STEPS, SPIKE = 30, 20
CLOCK = {"seconds", "speed_bytes"}


class Spiking(MaskedLanguage):
    """At one step the loss lies ten standard deviations of the earlier ones above their mean.

    The earlier losses stand in a buffer, so that a resumed run has the same spike.

    Attributes:
        cut: the step before which the program ends; None: it does not.
    """

    cut: int | None = None

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.register_buffer("past", torch.zeros(STEPS))
        self.register_buffer("number", torch.zeros((), dtype=torch.long))

    def loss(self, batch, generator):
        output = super().loss(batch, generator)
        if not self.training:
            return output
        step = int(self.number)
        if step == self.cut:
            raise KeyboardInterrupt
        self.past[step] = output.loss.detach()
        if step == SPIKE:
            mean, sigma = self.past[:step].mean(), self.past[:step].std()
            return output._replace(loss=output.loss * (mean + 10 * sigma) / output.loss.detach())
        return output

    def after_step(self, step, total):
        super().after_step(step, total)
        self.number += 1


@pytest.mark.parametrize("every", [1, 4])
def test_a_run_cut_around_a_spike_is_bit_equal(small_method, faults, tmp_path, every):
    """Resumed from the checkpoint just before it, at it and after it, and from one further away."""

    def run(name: str, cut: int | None, resume: bool = False):
        objective, data = small_method(Spiking, cut=cut)
        folder = RunFolder(tmp_path / name, resume)
        config = TrainingConfig(
            steps=STEPS,
            batch_size=8,
            lr=1e-2,
            log_every=1,
            evaluations=3,
            checkpoint_every=every,
            precision="float32",
            device="cpu",
        )
        try:
            with suppress(KeyboardInterrupt):
                train(objective, data.train, data.valid, config, folder)
        finally:
            folder.close()
        return objective

    whole = run("whole", None)
    past = whole.past[:SPIKE]
    rows = (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    for cut in (SPIKE - 1, SPIKE, SPIKE + 1, SPIKE + 2):
        with faults.trial("cut around a spike of ten sigma", "resumed: bit-equal"):
            name = f"cut{cut}"
            run(name, cut)
            run(name, None, resume=True)
            ours, theirs = (load_newest(tmp_path / n / "checkpoints") for n in (name, "whole"))
            assert ours is not None
            assert theirs is not None
            for got, expected in zip(ours[:2], theirs[:2], strict=True):
                assert got.keys() == expected.keys()
                assert all(got[key].equal(expected[key]) for key in got)
            states = [{k: v for k, v in c.state.items() if k not in CLOCK} for c in (ours, theirs)]
            assert states[0] == states[1]
            assert (tmp_path / name / "metrics.jsonl").read_bytes() == rows
    # it was a spike: the row of that step says so
    import json

    losses = [r["loss"] for r in map(json.loads, rows.splitlines()) if r["split"] == "train"]
    assert losses[SPIKE] > float(past.mean() + 9.9 * past.std())
