"""What every method promises, tested on each. A new method adds its cases to `CASES`: no more."""

import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from selfsup.batch import Batch, Vocabulary
from selfsup.config import from_mapping, overridden, to_mapping, write_toml
from selfsup.data.dataset import Dataset, pad_mask, pad_rows
from selfsup.objective import Objective
from selfsup.randomness import isolated, numpy_generator, seed_layers, torch_generator
from selfsup.registry import METHODS, MODELS, module_of, resolve
from selfsup.training import guard
from selfsup.training.checkpoint import load_newest, load_tensors, load_weights, save_tensors
from selfsup.training.config import TrainingConfig
from selfsup.training.folder import RunFolder
from selfsup.training.loop import train

PAD, UNK, CLS, SEP, MASK = range(5)
NUM_LETTERS = 10
VOCABULARY = Vocabulary(
    size=5 + NUM_LETTERS,
    pad=PAD,
    unk=UNK,
    cls=CLS,
    sep=SEP,
    mask=MASK,
    continues=(7, 11, 12),
    unigram_entropy=float(np.log(NUM_LETTERS)),
)


class Sequences(Dataset):
    """Rows that recite the alphabet from any letter on, of unequal length.

    Args:
        layout: "single": [CLS] a [SEP]; "pairs": [CLS] a [SEP] b [SEP], b goes on from a;
            "packed": a [SEP] b [SEP], two documents that know nothing of each other.
        size: number of examples.
        seed: decides them.
    """

    spec = VOCABULARY

    def __init__(self, layout: str, size: int, seed: int):
        self.layout = layout
        extra = {"single": (), "pairs": ("segments",), "packed": ("documents",)}[layout]
        self.fields = ("tokens", "mask", "index", *extra)
        draw = numpy_generator(seed, "sequences")
        self.rows = [self._row(draw) for _ in range(size)]
        self.lengths = np.array([len(row["tokens"]) for row in self.rows])

    def _row(self, draw: np.random.Generator) -> dict[str, np.ndarray]:
        length_a, length_b = draw.integers(4, 8, 2)
        first, other = draw.integers(NUM_LETTERS, size=2)
        letters = (first + np.arange(length_a + length_b)) % NUM_LETTERS + 5
        a, b = letters[:length_a], letters[length_a:]
        if self.layout == "single":
            return {"tokens": np.array([CLS, *a, SEP])}
        if self.layout == "pairs":
            segments = np.repeat([0, 1], [length_a + 2, length_b + 1])
            return {"tokens": np.array([CLS, *a, SEP, *b, SEP]), "segments": segments}
        b = (other + np.arange(length_b)) % NUM_LETTERS + 5
        documents = np.repeat([0, 1], [length_a + 1, length_b + 1])
        return {"tokens": np.array([*a, SEP, *b, SEP]), "documents": documents}

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, numbers: np.ndarray) -> Batch:
        rows = [self.rows[number] for number in numbers]
        mask = pad_mask([row["tokens"] for row in rows])
        padded = {name: pad_rows([row[name] for row in rows], PAD) for name in rows[0]}
        return {**padded, **mask, "index": torch.as_tensor(numbers)}

    @staticmethod
    def widened(batch: Batch) -> Batch:
        """The same examples with three more columns of padding."""
        mask = batch.get("mask", torch.ones_like(batch["tokens"], dtype=torch.bool))
        columns = {k: v for k, v in {**batch, "mask": mask}.items() if k != "index"}
        wider = {k: nn.functional.pad(v, (0, 3)) for k, v in columns.items()}
        return {**batch, **wider}


@dataclass(frozen=True)
class Case:
    """One method on one toy data set.

    Attributes:
        method: name in the registry.
        data: makes a toy data set of (size, seed); `spec` is what encoder and method must know of
            it, `widened` pads a batch further.
        model: the encoder's section of a configuration, with `name`.
        config: the method's section.
        still: dotted settings under which `loss` draws nothing; None where it always draws.
        random: whether the generator matters.
        leaves: share of the first held-out loss that is left at most after 60 steps.
    """

    method: str
    data: Callable[[int, int], Any]
    model: dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)
    still: dict[str, Any] | None = None
    random: bool = True
    leaves: float = 0.8

    def __str__(self) -> str:
        return "-".join([self.method, *(f"{k}={v}" for k, v in self.config.items())])


def sequences(layout: str) -> Callable[[int, int], Sequences]:
    return lambda size, seed: Sequences(layout, size, seed)


TRANSFORMER = {
    "name": "transformer",
    "dim": 32,
    "layers": 2,
    "heads": 2,
    "feedforward_dim": 64,
    "embedding_std": 1.0,
    "rotary_base": 100.0,
    "dropout": 0.05,
}
PAIRED = {**TRANSFORMER, "segment_types": 2}
CAUSAL = {**TRANSFORMER, "causal": True}
NO_DROPOUT = {"model.dropout": 0.0}
ALL_MASKED = {
    **NO_DROPOUT,
    "method.mask_rate": 0.999,
    "method.mask_share": 1.0,
    "method.random_share": 0.0,
}
MOVING = {"mask_rate": 0.4, "final_mask_rate": 0.2}
WHOLE_WORD = {"whole_word": True, "head": "tied", "mask_rate": 0.3}
CASES = [
    Case("masked_language", sequences("single"), TRANSFORMER, {}, ALL_MASKED),
    Case("masked_language", sequences("single"), TRANSFORMER, MOVING),
    Case("masked_language", sequences("packed"), TRANSFORMER, WHOLE_WORD, ALL_MASKED),
    Case("masked_language", sequences("pairs"), PAIRED, {"sentence": "nsp"}, leaves=0.9),
    Case("masked_language", sequences("pairs"), PAIRED, {"sentence": "sop"}, leaves=0.9),
    Case("causal_language", sequences("packed"), CAUSAL, {}, NO_DROPOUT, random=False),
    Case("causal_language", sequences("single"), CAUSAL, {"head": "bert"}, NO_DROPOUT, False),
]
STILL_CASES = [case for case in CASES if case.still is not None]
each = pytest.mark.parametrize("case", CASES, ids=str)
each_still = pytest.mark.parametrize("case", STILL_CASES, ids=str)


def build(case: Case, settings: dict[str, Any] | None = None, seed: int = 0) -> Objective:
    """A fresh objective in evaluation mode."""
    values = overridden({"model": case.model, "method": case.config}, settings or {})
    model = dict(values["model"])
    name = model.pop("name")
    model_config = from_mapping(module_of(MODELS, "model", name).Config, model, "model")
    spec = case.data(1, 0).spec
    config = method_config(case, values["method"])
    with isolated():
        seed_layers(seed, "model")
        encoder = resolve(MODELS, "model", name)(model_config, spec)
        return resolve(METHODS, "method", case.method)(config, encoder, spec).eval()


def method_config(case: Case, values: dict[str, Any]) -> Any:
    return from_mapping(module_of(METHODS, "method", case.method).Config, values, "method")


def batch_of(case: Case, size: int = 8, seed: int = 1) -> Batch:
    return case.data(size, seed).batch(np.arange(size))


def loss_of(objective: Objective, batch: Batch, seed: int = 0):
    return objective.loss(batch, torch_generator(seed, "loss"))


def same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit-equal."""
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


def gradients(objective: Objective) -> dict[str, Tensor]:
    return {k: p.grad.clone() for k, p in objective.named_parameters() if p.grad is not None}


def test_the_table_holds_every_method():
    assert {case.method for case in CASES} == set(METHODS)


@each
def test_loss_is_a_finite_float32_scalar(case):
    objective = build(case)
    output = loss_of(objective, batch_of(case))
    assert output.loss.shape == ()
    assert output.loss.dtype == torch.float32
    assert output.metrics
    for name, value in {"loss": output.loss, **output.metrics}.items():
        assert value.shape == (), name
        assert value.isfinite(), name
    assert int(output.weight) == output.weight > 0
    assert {p.dtype for p in objective.parameters()} == {torch.float32}


@each
def test_bfloat16_autocast_changes_the_loss_little(case):
    objective, batch = build(case), batch_of(case)
    with torch.autocast("cpu", torch.bfloat16):
        output = loss_of(objective, batch)
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert all(
        g.dtype == torch.float32 and g.isfinite().all() for g in gradients(objective).values()
    )
    torch.testing.assert_close(output.loss, loss_of(objective, batch).loss, rtol=0.03, atol=0)


@each
def test_gradient_reaches_every_trainable_parameter(case):
    objective = build(case)
    loss_of(objective, batch_of(case)).loss.backward()
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name
    assert any(p.requires_grad for p in objective.encoder.parameters())


@each
def test_only_the_generator_decides_the_loss(case):
    objective, batch = build(case), batch_of(case)
    before = torch.get_rng_state()
    losses = [loss_of(objective, batch, seed).loss.item() for seed in (0, 0, 1, 2)]
    assert torch.equal(torch.get_rng_state(), before), "global randomness was read"
    assert losses[0] == losses[1]
    assert (len(set(losses)) == 3) is case.random


@each
def test_loss_leaves_the_batch_as_it_is(case):
    batch = batch_of(case)
    before = {name: tensor.clone() for name, tensor in batch.items()}
    loss_of(build(case), batch)
    same(batch, before)


@each
def test_fields_and_kept_name_real_things(case):
    objective, data = build(case), case.data(2, 0)
    assert set(objective.fields) <= set(data.fields)
    assert "encoder" in objective.kept
    assert all(isinstance(getattr(objective, name), nn.Module) for name in objective.kept)
    assert objective.chance_loss is None or objective.chance_loss > 0


@each
def test_config_survives_a_round_trip(case):
    config = method_config(case, case.config)
    assert method_config(case, tomllib.loads(write_toml(to_mapping(config)))) == config


@each
def test_saved_and_loaded_weights_give_equal_outputs(case, tmp_path):
    objective, other, batch = build(case, seed=0), build(case, seed=1), batch_of(case)
    expected = loss_of(objective, batch).loss
    assert loss_of(other, batch).loss != expected
    save_tensors(tmp_path / "weights.safetensors", objective.state_dict())
    load_weights(other, load_tensors(tmp_path / "weights.safetensors"), "weights")
    assert loss_of(other, batch).loss == expected
    for got, hidden in zip(
        other.encoder(batch).hidden, objective.encoder(batch).hidden, strict=True
    ):
        assert torch.equal(got, hidden)


@each
def test_padding_does_not_change_the_features(case):
    objective, batch = build(case), batch_of(case)
    wider = case.data(1, 0).widened(batch)
    expected, got = objective.encoder(batch), objective.encoder(wider)
    torch.testing.assert_close(got.pooled, expected.pooled, rtol=0, atol=1e-5)
    for ours, hidden in zip(got.hidden, expected.hidden, strict=True):
        ours = ours[:, : hidden.shape[1]]
        torch.testing.assert_close(ours[expected.mask], hidden[expected.mask], rtol=0, atol=1e-5)


@each_still
def test_padding_does_not_change_the_loss(case):
    objective, batch = build(case, case.still), batch_of(case)
    expected, got = loss_of(objective, batch), loss_of(objective, case.data(1, 0).widened(batch))
    assert got.weight == expected.weight
    torch.testing.assert_close(got.loss, expected.loss, rtol=0, atol=1e-5)
    for name, value in expected.metrics.items():
        torch.testing.assert_close(got.metrics[name], value, rtol=0, atol=1e-5)


@each_still
def test_loss_is_a_mean_over_weight_items(case):
    objective, data = build(case, case.still), case.data(8, 1)
    parts = [loss_of(objective, data.batch(np.arange(*ends))) for ends in ((0, 3), (3, 8))]
    whole = loss_of(objective, data.batch(np.arange(8)))
    assert whole.weight == sum(part.weight for part in parts)
    assert parts[0].weight * 5 != parts[1].weight * 3, "rows of one length cannot tell"
    mean = sum(part.loss * part.weight for part in parts) / whole.weight
    torch.testing.assert_close(whole.loss, mean, rtol=0, atol=1e-5)
    for name, value in whole.metrics.items():
        mean = sum(part.metrics[name] * part.weight for part in parts) / whole.weight
        torch.testing.assert_close(value, mean, rtol=0, atol=1e-5)


@each_still
def test_two_micro_batches_give_one_batchs_gradient(case):
    found = []
    for size, accumulate in ((8, 1), (4, 2)):
        objective = build(case, case.still)
        # after_step is called while the step's gradient is still there
        objective.after_step = lambda step, total, o=objective: found.append(gradients(o))
        config = TrainingConfig(
            steps=1, batch_size=size, accumulate=accumulate, clip=0.0, precision="float32"
        )
        train(objective, case.data(8, 1), None, config)
    once, twice = found
    assert once.keys() == twice.keys()
    for name, gradient in once.items():
        torch.testing.assert_close(twice[name], gradient, rtol=0, atol=1e-5)


@each
def test_training_lowers_the_held_out_loss_and_features_do_not_collapse(case):
    objective = build(case)
    config = TrainingConfig(
        steps=60, batch_size=16, lr=1e-2, evaluations=1, valid_batches=4, precision="float32"
    )
    rows = train(objective, case.data(256, 2), case.data(64, 3), config)
    first, last = (row for row in rows if row["split"] == "valid")
    assert (first["step"], last["step"]) == (0, 60)
    assert last["loss"] < case.leaves * first["loss"]
    pooled = objective.encoder(batch_of(case, 32, seed=4)).pooled.detach()
    assert guard.effective_rank(pooled) > 3  # of 32 examples; 1: all on one line
    assert guard.spread(pooled) > 0.1


class PowerCut(Exception):
    """The machine stops."""


class Failing:
    """A data set whose machine stops when the batch at step `step` is asked for."""

    def __init__(self, data: Any, step: int):
        self.data, self.left = data, step
        self.fields, self.lengths = data.fields, data.lengths

    def __len__(self) -> int:
        return len(self.data)

    def batch(self, numbers: np.ndarray) -> Batch:
        if self.left == 0:
            raise PowerCut
        self.left -= 1
        return self.data.batch(numbers)


@each
def test_a_resumed_run_is_bit_equal_to_an_uninterrupted_one(case, tmp_path):
    config = TrainingConfig(
        steps=9, batch_size=4, checkpoint_every=3, log_every=2, evaluations=3, precision="float32"
    )
    data, valid = case.data(20, 5), case.data(8, 6)

    def run(name: str, source: Any, seed: int, resume: bool = False) -> None:
        folder = RunFolder(tmp_path / name, resume=resume)
        try:
            train(build(case, seed=seed), source, valid, config, folder)
        finally:
            folder.close()

    run("whole", data, seed=0)
    with pytest.raises(PowerCut):  # after step 5: two steps and one row past the checkpoint
        run("cut", Failing(data, 5), seed=0)
    assert [p.name for p in (tmp_path / "cut" / "checkpoints").iterdir()] == ["step-00000003"]
    run("cut", data, seed=1, resume=True)  # other initial weights: the checkpoint must replace them
    whole, cut = (load_newest(tmp_path / name / "checkpoints") for name in ("whole", "cut"))
    same(cut.weights, whole.weights)
    same(cut.optimizer, whole.optimizer)
    assert whole.optimizer
    clock = {"seconds", "speed_bytes"}
    states = [{k: v for k, v in c.state.items() if k not in clock} for c in (whole, cut)]
    assert states[0] == states[1]
    metrics = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "cut")]
    assert metrics[0] == metrics[1]
