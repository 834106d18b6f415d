"""The loop does what its configuration says: how long, how fast, how often, how safely."""

import json
import time

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter  # noqa: F401  (its import is slow: paid once)

from selfsup.errors import ConfigError, DivergedError
from selfsup.objective import Output
from selfsup.randomness import Batches, Order
from selfsup.training.folder import RunFolder
from selfsup.training.loop import train
from selfsup.training.optim import learning_rate_share


def split(rows: list[dict], name: str) -> list[dict]:
    return [row for row in rows if row["split"] == name]


def column(rows: list[dict], name: str, key: str) -> list:
    return [row[key] for row in split(rows, name)]


def test_a_budget_in_steps_is_kept_to_the_step(toy):
    objective = toy.build()
    rows = train(objective, toy.Rows(10), None, toy.config(steps=7))
    assert column(rows, "train", "step") == [1, 2, 3, 4, 5, 6, 7]
    assert objective.steps == [(step, 7) for step in range(7)]
    assert objective.seen == 7
    assert not objective.training


def test_a_budget_in_tokens_ends_with_the_step_that_spends_it(toy):
    data, config = toy.Rows(10), toy.config(tokens=100)
    rows = train(toy.build(), data, None, config)
    order = Batches(Order(10, config.seed), config.batch_size, data.lengths)
    expected, spent = [], 0
    while spent < 100:
        spent += sum(len(data.rows[i]) for i in order[len(expected)])
        expected.append(spent)
    assert column(rows, "train", "tokens") == expected


def test_a_budget_in_minutes_ends_on_time(toy):
    started = time.monotonic()
    rows = train(toy.build(), toy.Rows(10), toy.Rows(4), toy.config(minutes=0.01, evaluations=4))
    seconds = time.monotonic() - started
    assert seconds >= 0.6
    assert seconds < 3  # 0.6 s and a slow machine
    rates = column(rows, "train", "lr")
    assert len(rates) > 20
    assert max(rates) == pytest.approx(1e-3, rel=0.05)
    assert rates[-1] < 0.1 * max(rates), "the rate must follow the clock to its end"
    assert split(rows, "valid")[-1]["step"] == split(rows, "train")[-1]["step"]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd", "constant"])
def test_logged_learning_rates_are_the_schedules(toy, schedule):
    config = toy.config(
        steps=12, lr=0.2, warmup=0.25, schedule=schedule, decay=0.5, final_lr=0.1, batch_size=1
    )
    rows = train(toy.build(), toy.Rows(10), None, config)
    expected = [
        0.2 * learning_rate_share(n / 13, warmup=0.25, schedule=schedule, decay=0.5, final=0.1)
        for n in range(1, 13)
    ]
    assert column(rows, "train", "lr") == expected
    assert min(expected) > 0


@pytest.mark.parametrize("evaluations", [1, 3, 4, 10, 20])
def test_evaluations_are_evenly_spaced_from_first_to_last(toy, evaluations):
    config = toy.config(steps=20, evaluations=evaluations)
    rows = train(toy.build(), toy.Rows(10), toy.Rows(9, seed=1), config)
    expected = [-(-20 * i // evaluations) for i in range(evaluations + 1)]
    assert column(rows, "valid", "step") == expected


def test_more_evaluations_than_steps_are_one_per_step(toy):
    rows = train(toy.build(), toy.Rows(10), toy.Rows(9), toy.config(steps=3, evaluations=50))
    assert column(rows, "valid", "step") == [0, 1, 2, 3]


def test_without_evaluations_or_held_out_data_there_are_none(toy):
    for valid, number in ((toy.Rows(4), 0), (None, 5)):
        rows = train(toy.build(), toy.Rows(9), valid, toy.config(steps=3, evaluations=number))
        assert split(rows, "valid") == []


def test_an_evaluation_is_the_weighted_mean_over_a_fixed_part(toy):
    valid = toy.Rows(9, seed=1)
    objective = toy.build(noise=0.0)
    config = toy.config(steps=1, lr=0.0, evaluations=1)
    first, last = split(train(objective, toy.Rows(9), valid, config), "valid")
    assert first["loss"] == last["loss"]
    with torch.no_grad():
        losses = [objective.loss(valid.batch([i]), torch.Generator()).loss for i in range(9)]
    assert first["loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-6)
    few = train(toy.build(), toy.Rows(9), valid, toy.config(steps=1, valid_batches=1))
    many = train(toy.build(), toy.Rows(9), valid, toy.config(steps=1, valid_batches=2))
    assert split(few, "valid")[0]["loss"] != split(many, "valid")[0]["loss"]


@pytest.mark.parametrize(("log_every", "expected"), [(3, [3, 6, 7]), (7, [7]), (50, [7])])
def test_every_step_is_logged_once(toy, log_every, expected):
    """Rows are weighted means over their steps; the last one may cover fewer."""
    single = train(toy.build(), toy.Rows(9), None, toy.config(steps=7))
    rows = train(toy.build(), toy.Rows(9), None, toy.config(steps=7, log_every=log_every))
    assert column(rows, "train", "step") == expected
    losses = column(single, "train", "loss")
    begin = 0
    for row in rows:
        covered = losses[begin : row["step"]]
        assert row["loss"] == pytest.approx(sum(covered) / len(covered), rel=1e-12)
        begin = row["step"]


class Scripted:
    """Makes the loop's held-out loss follow a script, through the weights themselves."""

    def __init__(self, toy, losses: list[float]):
        class Follow(toy.Largest):
            def loss(self, batch, generator):
                out = super().loss(batch, generator)
                if self.training:
                    return out
                place = min(int(self.seen), len(losses) - 1)
                return Output(torch.tensor(losses[place]), out.weight, out.metrics)

        self.objective = toy.build(kind=Follow)


def test_patience_stops_after_so_many_evaluations_without_improvement(toy):
    losses = [5.0, 4.0, 3.0, 3.5, 3.25, 3.0, 1.0, 1.0]
    config = toy.config(steps=8, evaluations=8, patience=3)
    rows = train(Scripted(toy, losses).objective, toy.Rows(9), toy.Rows(4), config)
    assert column(rows, "valid", "loss") == losses[:6]
    patient = toy.config(steps=8, evaluations=8, patience=4)
    rows = train(Scripted(toy, losses).objective, toy.Rows(9), toy.Rows(4), patient)
    assert column(rows, "valid", "step")[-1] == 8


def test_keep_best_gives_the_best_weights_and_last_the_last(toy):
    losses = [5.0, 4.0, 1.0, 3.0, 2.0]
    states = {}
    for keep in ("best", "last"):
        objective = Scripted(toy, losses).objective
        config = toy.config(steps=4, evaluations=4, keep=keep)
        train(objective, toy.Rows(9), toy.Rows(4), config)
        states[keep] = toy.weights(objective)
    assert states["best"]["seen"] == 2
    assert states["last"]["seen"] == 4
    twin = toy.build()
    with pytest.raises(KeyboardInterrupt):  # the same run, left after two steps
        train(twin, Stopping(toy.Rows(9), 2), None, toy.config(steps=4))
    toy.same(states["best"], toy.weights(twin))


class Stopping:
    """Data that end the program when the batch of step `step` is used."""

    def __init__(self, data, step: int):
        self.data, self.fields, self.lengths = data, data.fields, data.lengths
        self.left = step

    def __len__(self) -> int:
        return len(self.data)

    def batch(self, numbers):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        return self.data.batch(numbers)


def test_accumulation_equals_a_big_batch(toy):
    states = []
    for size, accumulate in ((6, 1), (3, 2), (2, 3), (1, 6)):
        objective = toy.build(dropout=0.0, noise=0.0)
        config = toy.config(steps=3, batch_size=size, accumulate=accumulate, eps=1e-3)
        rows = train(objective, toy.Rows(12), None, config)
        states.append((toy.weights(objective), column(rows, "train", "loss")))
    (expected, losses), *others = states
    for got, their_losses in others:
        assert their_losses == pytest.approx(losses, rel=1e-5)
        for name, tensor in expected.items():
            torch.testing.assert_close(got[name], tensor, rtol=0, atol=2e-6)


class Breaking:
    """An objective that gives a loss or a gradient that is not finite at some steps."""

    def __init__(self, toy, kind: str, steps: tuple[int, ...]):
        class Broken(toy.Largest):
            calls = 0

            def loss(self, batch, generator):
                out = super().loss(batch, generator)
                if not self.training:
                    return out
                here, self.calls = self.calls, self.calls + 1
                if here not in steps:
                    return out
                if kind == "gradient":  # a finite loss whose derivative is infinite
                    root = self.head.bias.mul(0).sum().abs().sqrt()
                    return Output(out.loss + root, out.weight, out.metrics)
                return Output(out.loss * float(kind), out.weight, out.metrics)

        self.objective = toy.build(kind=Broken)


@pytest.mark.parametrize("kind", ["nan", "inf", "gradient"])
def test_a_step_that_is_not_finite_stops_before_the_weights_see_it(toy, kind):
    objective = Breaking(toy, kind, (3,)).objective
    with pytest.raises(DivergedError, match=r"step 3: .*not finite.*lower training\.lr") as caught:
        train(objective, toy.Rows(9), None, toy.config(steps=6))
    assert caught.value.exit_code == 4
    twin = toy.build()
    with pytest.raises(KeyboardInterrupt):
        train(twin, Stopping(toy.Rows(9), 3), None, toy.config(steps=6))
    toy.same(toy.weights(objective), toy.weights(twin))


@pytest.mark.parametrize("kind", ["nan", "inf", "gradient"])
def test_skip_passes_over_such_steps_and_counts_them(toy, kind, capsys):
    objective = Breaking(toy, kind, (1, 4)).objective
    config = toy.config(steps=6, nonfinite="skip", log_every=2)
    rows = train(objective, toy.Rows(9), None, config)
    assert column(rows, "train", "skipped") == [1, 1, 2]
    assert objective.seen == 4, "after_step must not follow a step that was passed over"
    assert all(torch.isfinite(p).all() for p in objective.parameters())
    assert capsys.readouterr().err.count("step passed over") == 2


def test_a_micro_batch_that_is_not_finite_spoils_the_whole_step(toy):
    objective = Breaking(toy, "nan", (3,)).objective  # the second micro-batch of step 1
    with pytest.raises(DivergedError, match="step 1"):
        train(objective, toy.Rows(9), None, toy.config(steps=6, accumulate=2))
    assert objective.seen == 1


def test_a_rate_that_ruins_the_weights_is_told_apart_at_the_evaluation(toy):
    config = toy.config(steps=4, lr=1e38, clip=0.0, warmup=0.0, evaluations=4)
    with pytest.raises(DivergedError, match="held-out loss is"):
        train(toy.build(), toy.Rows(9), toy.Rows(9), config)


def test_bfloat16_keeps_weights_and_losses_in_float32(toy):
    objective, exact = toy.build(noise=0.0), toy.build(noise=0.0)
    rows = train(objective, toy.Rows(9), None, toy.config(steps=5, precision="bfloat16"))
    expected = train(exact, toy.Rows(9), None, toy.config(steps=5))
    losses = column(rows, "train", "loss")
    assert losses != column(expected, "train", "loss"), "nothing was computed in bfloat16"
    assert losses == pytest.approx(column(expected, "train", "loss"), rel=0.02)
    assert {p.dtype for p in objective.parameters()} == {torch.float32}


def test_it_leaves_the_callers_random_state(toy):
    before = torch.get_rng_state()
    train(toy.build(dropout=0.5), toy.Rows(9), toy.Rows(9), toy.config(steps=5))
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(DivergedError):
        train(Breaking(toy, "nan", (1,)).objective, toy.Rows(9), None, toy.config())
    assert torch.equal(torch.get_rng_state(), before)


def test_equal_runs_are_bit_equal_and_seeds_differ(toy, tmp_path):
    def run(name: str, seed: int, disturb: int):
        torch.rand(disturb)  # the global state must not matter
        objective, folder = toy.build(0, dropout=0.3), RunFolder(tmp_path / name)
        train(objective, toy.Rows(9), toy.Rows(9), toy.config(seed=seed), folder)
        folder.close()
        return toy.weights(objective), (tmp_path / name / "metrics.jsonl").read_bytes()

    with torch.random.fork_rng():
        first, again, other = run("a", 0, 1), run("b", 0, 50), run("c", 1, 1)
    toy.same(first[0], again[0])
    assert first[1] == again[1]
    assert not torch.equal(first[0]["head.weight"], other[0]["head.weight"])
    assert first[1] != other[1]


def test_the_seed_decides_dropout(toy):
    losses = []
    for seed in (0, 0, 1):
        objective = toy.build(dropout=0.5, noise=0.0)
        rows = train(objective, toy.Rows(1), None, toy.config(steps=1, batch_size=1, seed=seed))
        losses.append(rows[0]["loss"])
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("device", ["gpu", "meta", "cuda:99", "cpu:x"])
def test_an_unknown_device_is_refused(toy, device):
    with pytest.raises(ConfigError, match=r"training\.device"):
        train(toy.build(), toy.Rows(9), None, toy.config(device=device))


def test_tensorboard_files_hold_the_rows(toy, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = RunFolder(tmp_path / "run")
    config = toy.config(steps=4, evaluations=2, tensorboard=True)
    rows = train(toy.build(), toy.Rows(9), toy.Rows(9), config, folder)
    folder.close()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    losses = [event.value for event in events.Scalars("train/loss")]
    assert losses == pytest.approx(column(rows, "train", "loss"), rel=1e-6)
    assert [event.step for event in events.Scalars("valid/loss")] == [0, 2, 4]


def test_a_plateau_is_warned_of_once_and_written_down(toy, tmp_path, capsys):
    objective = toy.build()
    objective.chance_loss = 0.01  # the toy never gets there
    folder = RunFolder(tmp_path / "run")
    train(objective, toy.Rows(9), toy.Rows(9), toy.config(evaluations=10), folder)
    folder.close()
    said = capsys.readouterr().err
    assert said.count("guessing without looking at the input") == 1
    (written,) = json.loads((tmp_path / "run" / "warnings.json").read_text())
    assert written.startswith("plateau: after 40% of the budget")


def test_a_collapse_is_warned_of(toy, capsys):
    objective = toy.build()
    with torch.no_grad():
        objective.encoder.linear.weight.zero_()
    objective.encoder.requires_grad_(False)
    train(objective, toy.Rows(9), toy.Rows(9), toy.config(evaluations=10, batch_size=8))
    assert capsys.readouterr().err.count("features are collapsing") == 1


def test_a_healthy_run_is_not_warned_of(toy, tmp_path, capsys):
    objective = toy.build()
    objective.chance_loss = 9.0
    folder = RunFolder(tmp_path / "run")
    train(objective, toy.Rows(9), toy.Rows(9), toy.config(evaluations=10, batch_size=8), folder)
    folder.close()
    assert "warning" not in capsys.readouterr().err
    assert not (tmp_path / "run" / "warnings.json").exists()
