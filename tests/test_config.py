"""Configuration: every key is checked and named, and what is written is read back as it was."""

import tomllib
from dataclasses import dataclass, field
from typing import Literal

import pytest

from selfsup import registry
from selfsup.config import (
    from_mapping,
    overridden,
    parse_setting,
    preset_values,
    presets,
    read_toml,
    recipe_values,
    run_config,
    run_values,
    to_mapping,
    write_toml,
)
from selfsup.errors import ConfigError
from selfsup.training.config import TrainingConfig

PRESETS = [(model, name) for model, group in presets().items() for name in group]
SMALLEST = {
    "data": {"name": "text"},
    "model": {"name": "transformer"},
    "method": {"name": "masked_language"},
    "training": {"steps": 10},
}


@dataclass(frozen=True, kw_only=True)
class Inner:
    width: int = 3


@dataclass(frozen=True, kw_only=True)
class Example:
    count: int
    rate: float = 0.5
    name: str = "a"
    flag: bool = False
    maybe: float | None = None
    kind: Literal["one", "two"] = "one"
    pair: tuple[float, ...] = (1.0, 2.0)
    inner: Inner = field(default_factory=Inner)

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError(f"count must not be negative, got {self.count}")


def changed(section: str, **keys) -> dict:
    return {**SMALLEST, section: {**SMALLEST[section], **keys}}


@pytest.mark.parametrize("name", sorted(registry.recipe_paths()))
def test_every_recipe_is_valid_and_survives_a_round_trip(name):
    config = run_config(recipe_values(name))
    assert run_config(tomllib.loads(write_toml(run_values(config)))) == config
    assert config.recipe["summary"]


def test_there_is_a_recipe():
    assert "bert-tiny-english" in registry.recipe_paths()


@pytest.mark.parametrize(("model", "name"), PRESETS)
def test_every_preset_builds_a_config_and_survives_a_round_trip(model, name):
    preset = presets()[model][name]
    # "last" is for causal models, which the masked language model of SMALLEST is not
    layout = {"pooling": "mean"} if preset.get("pooling") == "last" else {}
    config = run_config(changed("model", name=model, preset=name, **layout))
    assert run_config(tomllib.loads(write_toml(run_values(config)))) == config
    for key in preset.keys() - {"summary", "pooling"}:
        given = getattr(config.model, key)
        assert (list(given) if isinstance(given, tuple) else given) == preset[key]
    assert preset["summary"]


def test_a_key_beside_a_preset_wins():
    config = run_config(changed("model", preset="bert-tiny", layers=7))
    assert (config.model.layers, config.model.dim) == (7, 128)


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown preset 'bert-tinny'.*'bert-tiny'"):
        run_config(changed("model", preset="bert-tinny"))


def test_preset_values_leave_the_summary_out():
    assert "summary" not in preset_values("transformer", "bert-tiny")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({**SMALLEST, "trainin": {}}, "unknown section 'trainin'; did you mean 'training'?"),
        (
            changed("method", mask_rat=0.3),
            "unknown key method.mask_rat; did you mean 'mask_rate'?",
        ),
        (
            changed("data", tokenizer={"vocab": 9}),
            "unknown key data.tokenizer.vocab; did you mean 'vocab_size'?",
        ),
        (changed("training", lrs=1.0), "unknown key training.lrs; did you mean 'lr'?"),
        (changed("data", name="txt"), "unknown data 'txt'; did you mean 'text'?"),
        (changed("model", name="transformr"), "unknown model 'transformr'"),
        (changed("method", name="mask_language"), "did you mean 'masked_language'?"),
        ({**SMALLEST, "method": {}}, "section [method] needs a name: one of"),
        (changed("training", lr="fast"), "training.lr must be float, got 'fast'"),
        (changed("training", steps=2.5), "training.steps must be int, got 2.5"),
        (changed("training", steps=True), "training.steps must be int, got True"),
        (changed("training", compile=1), "training.compile must be bool, got 1"),
        (changed("training", device=3), "training.device must be str, got 3"),
        (changed("training", schedule="linar"), "is not allowed; did you mean 'linear'?"),
        (changed("data", tokenizer="bpe"), "data.tokenizer is a section, got 'bpe'"),
        (changed("method", mask_rate=1.5), "method: mask_rate must lie between 0 and 1, got 1.5"),
        (changed("model", dim=130, heads=4), "model: dim = 130 is not a multiple of heads = 4"),
        (changed("training", minutes=1.0), "exactly one positive budget"),
        ({**SMALLEST, "training": {}}, "exactly one positive budget"),
    ],
)
def test_what_is_wrong_is_named(values, message):
    with pytest.raises(ConfigError) as caught:
        run_config(values)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"steps": 0}, "positive budget"),
        ({"tokens": -5}, "positive budget"),
        ({"steps": 5, "tokens": 5}, "positive budget"),
        ({"minutes": float("nan")}, "positive budget"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"accumulate": 0}, "accumulate must be at least 1"),
        ({"log_every": 0}, "log_every must be at least 1"),
        ({"checkpoint_every": 0}, "checkpoint_every must be at least 1"),
        ({"checkpoints": 0}, "checkpoints must be at least 1"),
        ({"valid_batches": 0}, "valid_batches must be at least 1"),
        ({"evaluations": -1}, "evaluations must be at least 0, got -1"),
        ({"patience": -1}, "patience must be at least 0, got -1"),
        ({"lr": -1.0}, "lr must be at least 0, got -1.0"),
        ({"lr": float("nan")}, "lr must be at least 0, got nan"),
        ({"eps": -1.0}, "eps must be at least 0"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
        ({"clip": -1.0}, "clip must be at least 0"),
        ({"betas": (0.9,)}, "betas needs two numbers"),
        ({"betas": (0.9, 1.0)}, "betas needs two numbers"),
        ({"warmup": 1.0}, "warmup is a share"),
        ({"warmup": -0.1}, "warmup is a share"),
        ({"decay": 1.5}, "decay is a share"),
        ({"final_lr": -1.0}, "final_lr is a share"),
        ({"evaluations": 0, "keep": "best"}, "look at evaluations"),
        ({"evaluations": 0, "patience": 3}, "look at evaluations"),
    ],
)
def test_training_refuses_what_cannot_work(keys, message):
    budget = {} if keys.keys() & {"steps", "tokens", "minutes"} else {"steps": 10}
    with pytest.raises(ConfigError, match=message):
        from_mapping(TrainingConfig, {**budget, **keys}, "training")


def test_types_are_kept_and_whole_numbers_become_floats():
    given = {
        "count": 2,
        "rate": 1,
        "maybe": 3,
        "kind": "two",
        "pair": [1, 2.5],
        "inner": {"width": 9},
    }
    built = from_mapping(Example, given, "example")
    assert built == Example(
        count=2, rate=1.0, maybe=3.0, kind="two", pair=(1.0, 2.5), inner=Inner(width=9)
    )
    assert [type(v) for v in (built.rate, built.maybe, *built.pair)] == [float] * 4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "example: missing key count"),
        ({"count": -1}, "example: count must not be negative, got -1"),
        ({"count": 1, "inner": {"with": 2}}, "example.inner.with; did you mean 'width'?"),
        ({"count": 1, "inner": {"width": "2"}}, "example.inner.width must be int, got '2'"),
        ({"count": 1, "pair": ["x"]}, "example.pair must be float, got 'x'"),
        ({"count": 1, "kind": 1}, "example.kind = 1 is not allowed; known: one, two"),
        ({"count": 1, "maybe": "x"}, "example.maybe must be float, got 'x'"),
    ],
)
def test_from_mapping_names_the_key(given, message):
    with pytest.raises(ConfigError) as caught:
        from_mapping(Example, given, "example")
    assert message in str(caught.value)


@pytest.mark.parametrize("maybe", [None, 0.25])
def test_to_mapping_is_undone_by_from_mapping(maybe):
    config = Example(count=4, maybe=maybe, pair=(0.5,), inner=Inner(width=1))
    text = write_toml(to_mapping(config))
    assert from_mapping(Example, tomllib.loads(text), "example") == config
    assert ("maybe" in text) is (maybe is not None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("training.steps=2000", ("training.steps", 2000)),
        ("training.lr=1e-3", ("training.lr", 0.001)),
        ("training.tensorboard=true", ("training.tensorboard", True)),
        ("training.betas=[0.9, 0.95]", ("training.betas", [0.9, 0.95])),
        ("model.norm=post", ("model.norm", "post")),
        ("model.norm='post'", ("model.norm", "post")),
        ("data.tokenizer.file=a=b.json", ("data.tokenizer.file", "a=b.json")),
        ("data.text_column=", ("data.text_column", "")),
    ],
)
def test_settings_are_toml_values_or_bare_words(text, expected):
    assert parse_setting(text) == expected


@pytest.mark.parametrize("text", ["training.steps", "=3", ""])
def test_a_setting_needs_key_and_value(text):
    with pytest.raises(ConfigError, match=r"expected section\.key=value"):
        parse_setting(text)


def test_overridden_changes_a_copy():
    values = {"method": {"mask_rate": 0.1}, "data": {"tokenizer": {"kind": "bpe"}}}
    out = overridden(
        values, {"method.mask_rate": 0.3, "data.tokenizer.vocab_size": 50, "model.dim": 8}
    )
    assert out == {
        "method": {"mask_rate": 0.3},
        "data": {"tokenizer": {"kind": "bpe", "vocab_size": 50}},
        "model": {"dim": 8},
    }
    assert values == {"method": {"mask_rate": 0.1}, "data": {"tokenizer": {"kind": "bpe"}}}


def test_a_run_has_one_budget():
    recipe = {"training": {"steps": 10}}
    assert overridden(recipe, {"training.minutes": 3})["training"] == {"minutes": 3}
    with pytest.raises(ConfigError, match=r"training\.steps training\.minutes: .* one budget"):
        overridden(recipe, {"training.minutes": 3, "training.steps": 5})


def test_overridden_needs_a_section():
    with pytest.raises(ConfigError, match=r"give section\.key"):
        overridden({}, {"steps": 3})
    with pytest.raises(ConfigError, match="'steps' is a value, not a section"):
        overridden({"training": {"steps": 1}}, {"training.steps.more": 3})


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(
        ConfigError, match=r"unknown recipe 'bert-tiny-englsh'; did you mean 'bert-tiny-english'\?"
    ):
        recipe_values("bert-tiny-englsh")


def test_a_recipe_of_ones_own(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(write_toml(SMALLEST))
    assert run_config(recipe_values(path)).training.steps == 10


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read"), (b"a = ", "not a TOML file"), (b"a = '\xff'", "not a TOML file")],
)
def test_an_unreadable_file_is_named(tmp_path, content, message):
    path = tmp_path / "mine.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_toml(path)
    assert str(path) in str(caught.value)
