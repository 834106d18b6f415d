"""Plans: published counts, FLOPs against the formula, memory by hand, the verb."""

import json
from dataclasses import replace

import pytest

from selfsup import planning
from selfsup.cli import main
from selfsup.errors import ConfigError
from selfsup.planning import Counts, Layout, count, hardware, plan, subject

H100 = hardware("h100")


@pytest.mark.parametrize("name", planning.names())
def test_parameters_are_the_published_ones(name: str) -> None:
    asked = subject(name)
    built = planning.build(asked)
    assert all(p.is_meta for p in built.parameters())
    total = sum(p.numel() for p in built.parameters())
    assert total == pytest.approx(asked.published, rel=0.02)


@pytest.fixture(scope="module")
def bert() -> Counts:
    return count(subject("bert-base"))


@pytest.fixture(scope="module")
def gpt3() -> Counts:
    return count(subject("gpt3-175b"))


def test_flops_are_six_per_parameter_and_attention(gpt3: Counts) -> None:
    found = plan(gpt3, Layout(), H100)
    dim, layers, row = 12288, 96, 2048
    # matrices of the layers, the tied output, and scores with their sums over a whole row
    forward = 2 * 12 * layers * dim**2 + 2 * dim * 50257 + 4 * layers * dim * row
    assert found.flops_per_token == pytest.approx(3 * forward, rel=1e-3)
    again = plan(gpt3, Layout(checkpointing=True), H100)
    assert again.flops_per_token == pytest.approx(4 * forward, rel=1e-3)
    assert again.activation_bytes < found.activation_bytes / 4
    # published: 3.14e23 (Brown et al. 2020, table D.1), which leaves attention out
    assert found.flops_per_token * found.tokens == pytest.approx(3.14e23, rel=0.05)


def test_a_token_meets_one_expert() -> None:
    found = plan(count(subject("switch-1.6t")), Layout(), H100)
    assert found.active_parameters < 2e9 < 1.5e12 < found.expert_parameters
    assert 3 < found.flops_per_token / found.active_parameters < 9


def test_memory_is_sixteen_bytes_a_parameter_and_shared_as_asked(bert: Counts) -> None:
    alone = plan(bert, Layout(), H100)
    number = alone.parameters
    assert alone.weight_bytes == 4 * number
    assert alone.optimizer_bytes == 12 * number
    split = plan(bert, Layout(devices=8, tensor=2, pipeline=2), H100)
    assert split.weight_bytes == number
    assert split.optimizer_bytes == 3 * number
    zero = plan(bert, Layout(devices=8, sharding="optimizer"), H100)
    assert (zero.weight_bytes, zero.optimizer_bytes) == (4 * number, 12 * number / 8)
    full = plan(bert, Layout(devices=8, sharding="full"), H100)
    assert full.weight_bytes + full.optimizer_bytes == 16 * number / 8
    # 12 layers, 512 positions of 768 numbers, 34 bytes each; logits at 15% of the positions
    layers, logits = 12 * 512 * 768 * 34, 6 * 512 * 0.15 * 30522
    assert alone.activation_bytes == pytest.approx(layers + logits)


@pytest.mark.parametrize(("optimizer", "each"), [("adamw", 12), ("lamb", 12), ("lars", 8)])
def test_moments_are_those_of_the_optimizer(optimizer, each) -> None:
    counts = count(subject("bert-mini-english", {"training.optimizer": optimizer}))
    assert plan(counts, Layout(), H100).optimizer_bytes == each * counts.parameters


def test_adafactor_keeps_rows_and_columns() -> None:
    counts = count(replace(subject("bert-base"), optimizer="adafactor"))
    dim, inner, layers = 768, 3072, 12
    matrices = (3 * dim + dim) + (dim + dim) + 2 * (dim + inner)  # qkv, out, up and down
    vectors = 3 * dim + dim + inner + dim + 4 * dim  # biases, two norms
    embedding = (30522 + dim) + (512 + dim) + (2 + dim) + 2 * dim  # and its norm
    pooler = 3 * dim
    assert counts.moments == layers * (matrices + vectors) + embedding + pooler
    found = plan(counts, Layout(), H100)
    assert found.optimizer_bytes == pytest.approx(4 * (found.parameters + counts.moments))


def test_days_follow_from_flops(bert: Counts) -> None:
    one = plan(bert, Layout(utilisation=0.5), H100)
    assert one.days == pytest.approx(
        one.tokens * one.flops_per_token / (989e12 * 0.5 * 86400), rel=1e-9
    )
    assert plan(bert, Layout(devices=4), H100).days == pytest.approx(one.days * 0.5 / 0.4 / 4)


def test_a_layout_that_fits_is_found_and_fits(gpt3: Counts) -> None:
    layout = Layout(devices=1024)
    assert not plan(gpt3, layout, H100).fits
    better = planning.smallest_that_fits(gpt3, layout, H100)
    assert better is not None
    assert better.devices == 1024
    assert plan(gpt3, better, H100).fits
    assert planning.smallest_that_fits(gpt3, Layout(devices=2), H100) is None


def test_a_recipe_with_changes() -> None:
    asked = subject("bert-mini-english", {"model.layers": 12})
    assert (asked.keys["layers"], asked.vocabulary, asked.row_length) == (12, 8000, 64)
    assert asked.tokens == 8500 * 16 * 64
    found = plan(count(asked), Layout(), H100)
    assert found.parameters > 5e6
    assert found.published == 0


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: subject("gpt3"), "gpt3-175b"),
        (lambda: subject("simclr-small"), "reads image"),
        (lambda: hardware("h10"), "h100"),
        (lambda: Layout(devices=6, tensor=4), "do not divide 6"),
        (lambda: Layout(devices=8, experts=3), "does not divide"),
        (lambda: Layout(utilisation=0.0), "utilisation"),
        (lambda: Layout(micro_batch=0), "--micro-batch"),
    ],
)
def test_wrong_questions_are_answered(call, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        call()


def test_the_verb_prints_a_table_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "bert-base", "--hardware", "rtx4090"]) == 0
    shown = capsys.readouterr().out
    assert "109,482,240" in shown
    assert "fits" in shown
    assert main(["plan", "bert-large", "--gigabytes", "3", "--devices", "8"]) == 0
    assert "try: --devices 8" in capsys.readouterr().out
    assert main(["plan", "bert-base", "--json", "--tokens", "1e9", "--optimizer", "lars"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["tokens"] == 1e9
    assert values["optimizer_bytes"] == 8 * values["parameters"]
    assert values["fits"] is True
