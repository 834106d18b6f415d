"""Two ranks learn what one learns: replicated, sharded, and with every block divided."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from selfsup import ranks
from selfsup.batch import Batch, Vocabulary
from selfsup.errors import ConfigError, DivergedError
from selfsup.methods.generative.masked_language import Config as MaskedConfig
from selfsup.methods.generative.masked_language import MaskedLanguage
from selfsup.models.transformer import Config as ModelConfig
from selfsup.models.transformer import TransformerEncoder
from selfsup.objective import Output
from selfsup.randomness import isolated, seed_layers
from selfsup.training.checkpoint import load_newest
from selfsup.training.config import TrainingConfig
from selfsup.training.distributed import Share, Spread, share_of
from selfsup.training.folder import RunFolder
from selfsup.training.loop import train
from selfsup.verbs.learning import pretrain

SPEC = Vocabulary(size=40, pad=0, unk=1, cls=2, sep=3, mask=4)
CLOSE = {"rtol": 0, "atol": 1e-5}


class Rows:
    """Packed rows of drawn tokens."""

    fields, lengths, labels = ("tokens",), None, None

    def __len__(self) -> int:
        return 24

    def batch(self, numbers: np.ndarray) -> Batch:
        drawn = np.random.default_rng(0).integers(5, 40, (24, 8))
        return {"tokens": torch.from_numpy(drawn[numbers]), "index": torch.as_tensor(numbers)}


def build(activation: str = "geglu", dropout: float = 0.0) -> MaskedLanguage:
    with isolated():
        seed_layers(0, "test")
        shape = ModelConfig(
            dim=16, layers=2, heads=4, activation=activation, dropout=dropout, positions="rotary"
        )
        return MaskedLanguage(MaskedConfig(), TransformerEncoder(shape, SPEC), SPEC)


def settings(**more) -> TrainingConfig:
    keys: dict = {"steps": 4, "batch_size": 4, "accumulate": 2, "lr": 1e-2, "log_every": 2}
    keys["eps"] = 1e-4  # smaller, AdamW makes a large step of what rounding left
    more = {"evaluations": 1, "valid_batches": 2, "precision": "float32", **more}
    return TrainingConfig(**{**keys, "checkpoint_every": 2, "schedule": "constant", **more})


def half(**more) -> TrainingConfig:
    """The first half of a run without evaluations."""
    return settings(steps=2, evaluations=0, **more)


def run(config: TrainingConfig, folder: Path | None = None, resume: bool = False, **shape) -> dict:
    """The weights, moments and rows that a training leaves; those of the first rank."""
    objective = build(**shape)
    if folder is None or not ranks.first():
        rows = train(objective, Rows(), Rows(), config)
        return {"weights": dict(objective.state_dict()), "rows": rows}
    with closing(RunFolder(folder, resume)) as opened:
        rows = train(objective, Rows(), Rows(), config, opened)
    found = load_newest(folder / "checkpoints")
    return {"weights": dict(objective.state_dict()), "rows": rows, "moments": found.optimizer}


CASES = {
    "replicated": {},
    "dropout": {"dropout": 0.1},
    "sharded": {"sharded": True},
    "divided": {"tensor_parallel": 2},
    "divided, no gate": {"tensor_parallel": 2, "activation": "gelu"},
    "clipped": {"sharded": True, "clip": 1e-3},
    "clipped and divided": {"tensor_parallel": 2, "clip": 1e-3},
    "recomputed": {"sharded": True, "recompute": True},
    "best": {"sharded": True, "keep": "best", "evaluations": 2},
}


def split(case: dict) -> tuple[TrainingConfig, dict]:
    shape = {name: case[name] for name in ("dropout", "activation") if name in case}
    return settings(**{k: v for k, v in case.items() if k not in shape}), shape


class Broken(Rows):
    """On the second rank a batch of the second step is not finite."""

    def batch(self, numbers: np.ndarray) -> Batch:
        return {**super().batch(numbers), "bad": torch.tensor(self.bad(numbers))}

    def __init__(self) -> None:
        self.asked = 0

    def bad(self, numbers: np.ndarray) -> float:
        self.asked += 1
        return float("nan") if self.asked == 2 and ranks.number() == 1 else 0.0


class Poisoned(MaskedLanguage):
    """Adds what the batch says."""

    def loss(self, batch: Batch, generator: torch.Generator) -> Output:
        found = super().loss(batch, generator)
        return found._replace(loss=found.loss + batch["bad"].float())


def poisoned(policy: str) -> dict:
    objective = build()
    objective.__class__ = Poisoned
    states: list[dict[str, Tensor]] = []
    objective.after_step = lambda step, total: states.append(
        {k: v.clone() for k, v in objective.state_dict().items()}
    )
    config = settings(nonfinite=policy, evaluations=0, log_every=1)
    try:
        rows = train(objective, Broken(), None, config)
        stopped = False
    except DivergedError:
        rows, stopped = [], True
    steps = torch.tensor([[row["step"], row["skipped"]] for row in rows])
    return {"stopped": torch.tensor(stopped), "states": states, "rows": steps}


def of_one_rank(rank: int, folder: str) -> dict:
    """Everything that two processes are asked, in one go: to begin costs the most."""
    runs, found = Path(folder), {}
    for name, case in CASES.items():
        config, shape = split(case)
        found[name] = run(config, runs / name, **shape)
        ranks.set_group(None)
    run(half(sharded=True), runs / "sharded before")
    ranks.set_group(None)
    divided = settings(tensor_parallel=2, evaluations=0)
    found["sharded, then divided"] = run(divided, runs / "sharded before", resume=True)
    ranks.set_group(None)
    run(half(sharded=True), runs / "two before")
    ranks.set_group(None)
    found["one, then two"] = run(settings(evaluations=0), runs / "one before", resume=True)
    found["rows"] = run(settings(accumulate=1))
    found["skip"], found["stop"] = poisoned("skip"), poisoned("stop")
    spread = Spread(build(), settings(), torch.device("cpu"))
    found["sums"] = torch.tensor(spread.sums(1.0, float(rank)))
    found["first"] = torch.tensor(ranks.first())
    with ranks.alone():
        found["alone"] = torch.tensor([ranks.count(), ranks.number()])
    return found


@pytest.fixture(scope="module")
def two(on_two_ranks, tmp_path_factory):
    """What each of two ranks gave, and where their folders are."""
    folder = tmp_path_factory.mktemp("runs")
    run(half(), folder / "one before")
    return on_two_ranks(of_one_rank, str(folder)), folder


def same(found: dict, expected: dict) -> None:
    for part in expected.keys() - {"rows"}:
        assert found[part].keys() == expected[part].keys()
        for name, tensor in expected[part].items():
            torch.testing.assert_close(
                found[part][name], tensor, **CLOSE, msg=lambda text, name=name: f"{name}: {text}"
            )
    for got, row in zip(found["rows"], expected["rows"], strict=True):
        assert got.keys() == row.keys()
        for name, value in row.items():
            assert got[name] == pytest.approx(value, abs=1e-5) if name != "split" else got[name]


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_learn_what_one_learns(name, two, tmp_path):
    config, shape = split(CASES[name])
    alone = {"sharded": False, "tensor_parallel": 1}
    expected = run(replace(config, **alone), tmp_path / "run", **shape)
    same(two[0][0][name], expected)


@pytest.mark.parametrize("name", ["replicated", "dropout"])
def test_replicas_stay_bit_equal(name, two):
    first, second = (of_rank[name]["weights"] for of_rank in two[0])
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", ["sharded, then divided", "one, then two"])
def test_other_ranks_go_on_from_a_checkpoint(name, two, tmp_path):
    same(two[0][0][name], run(settings(evaluations=0), tmp_path / "run"))


def test_one_process_goes_on_from_a_sharded_checkpoint(two, tmp_path):
    found = run(settings(evaluations=0), two[1] / "two before", resume=True)
    same(found, run(settings(evaluations=0), tmp_path / "run"))


def test_ranks_that_divide_the_rows_of_a_pass_stay_bit_equal(two):
    first, second = (of_rank["rows"]["weights"] for of_rank in two[0])
    assert all(torch.equal(first[key], second[key]) for key in first)
    name = "encoder.layers.0.attention.qkv.weight"
    assert not torch.equal(first[name], build().state_dict()[name])


def test_what_is_not_finite_on_one_rank_touches_the_weights_of_none(two):
    """Three of four steps change the weights, the second is passed over by both."""
    for of_rank in two[0]:
        skip = of_rank["skip"]
        assert not skip["stopped"]
        assert skip["rows"].tolist() == [[1, 0], [2, 1], [3, 1], [4, 1]]
        assert len(skip["states"]) == 3
        stop = of_rank["stop"]
        assert stop["stopped"]
        assert len(stop["states"]) == 1
    first, second = (of_rank["skip"]["states"] for of_rank in two[0])
    for ours, theirs in zip(first, second, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_ranks_know_of_each_other(two):
    for rank, of_rank in enumerate(two[0]):
        assert of_rank["sums"].tolist() == [2, 1]
        assert bool(of_rank["first"]) == (rank == 0)
        assert of_rank["alone"].tolist() == [1, 0]


def four(rank: int) -> dict:
    """Two ranks for each block, twice, with shards."""
    return run(settings(tensor_parallel=2))


def test_four_ranks_divide_blocks_and_shares(on_two_ranks, tmp_path):
    found = on_two_ranks(four, count=4)[0]
    expected = run(settings())
    same(found, expected)


def test_recomputing_changes_no_bit():
    for dropout in (0.0, 0.1):
        once = run(settings(), dropout=dropout)
        again = run(settings(recompute=True), dropout=dropout)
        for name, weight in once["weights"].items():
            assert torch.equal(weight, again["weights"][name]), name


class Compares(nn.Module):
    whole_batch = True


@pytest.mark.parametrize(
    ("module", "count", "accumulate", "expected"),
    [
        (nn.Identity(), 1, 3, Share((0, 1, 2), slice(0, 8), ())),
        (nn.Identity(), 2, 4, Share((1, 3), slice(0, 8), ())),
        (nn.Identity(), 2, 3, Share((0, 1, 2), slice(4, 8), (1,))),
        (nn.Sequential(Compares()), 2, 4, Share((0, 1, 2, 3), slice(4, 8), (1,))),
        (nn.Sequential(Compares()), 1, 4, Share((0, 1, 2, 3), slice(0, 8), ())),
    ],
)
def test_a_step_is_divided(module, count, accumulate, expected):
    config = TrainingConfig(steps=1, batch_size=8, accumulate=accumulate)
    assert share_of(module, config, min(1, count - 1), count) == expected


def test_a_batch_that_does_not_divide_is_refused():
    config = TrainingConfig(steps=1, batch_size=10)
    with pytest.raises(ConfigError, match=r"4 ranks cannot divide .* = 10 .*batch_size=8"):
        share_of(nn.Identity(), config, 0, 4)


def test_blocks_need_as_many_ranks():
    with pytest.raises(ConfigError, match=r"tensor_parallel = 2 does not divide 1 rank"):
        run(settings(tensor_parallel=2))


def test_ranks_that_do_not_divide_are_refused_before_a_run_is_begun(tmp_path):
    (tmp_path / "texts.txt").write_text("the cat sat on the mat")
    with pytest.raises(ConfigError, match=r"tensor_parallel = 2 does not divide 1 rank"):
        pretrain(
            "bert-tiny-english",
            tmp_path / "texts.txt",
            tmp_path / "run",
            {"training.tensor_parallel": 2},
        )
    assert not (tmp_path / "run").exists()
