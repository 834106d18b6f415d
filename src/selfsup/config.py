"""Configuration is data: TOML into frozen dataclasses and back, with errors that name the key.

A run is described by five sections. `data`, `model` and `method` each begin with a `name` from the
tables in `registry.py`; the rest of the section is the `Config` dataclass of that name's module.

    [data]      name = "text"             row_length = 64      [data.tokenizer] kind = "wordpiece"
    [model]     name = "transformer"      preset = "bert-tiny"
    [method]    name = "masked_language"  mask_rate = 0.15
    [training]  minutes = 3.0
    [recipe]    summary, expected time and result: text for people
"""

import dataclasses
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import tomli_w

from selfsup import registry
from selfsup.errors import ConfigError, nearest

T = TypeVar("T")
BUDGETS = ("training.steps", "training.tokens", "training.minutes")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides what a pre-training run computes.

    `data`, `model` and `method` hold the `Config` of the module that their `*_name` names.
    """

    data_name: str
    data: Any
    model_name: str
    model: Any
    method_name: str
    method: Any
    training: Any
    recipe: dict[str, Any] = field(default_factory=dict)


def from_mapping(cls: type[T], values: dict[str, Any], where: str) -> T:
    """Builds the frozen dataclass `cls` from plain values.

    Raises:
        ConfigError: an unknown key (the nearest one is named), a wrong type, or a value that the
            class itself refuses.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in fields:
            raise ConfigError(f"unknown key {where}.{key}{nearest(key, fields)}")
    converted = {
        key: _convert(hints[key], _completed(fields[key], value), f"{where}.{key}")
        for key, value in values.items()
    }
    missing = [
        name
        for name, f in fields.items()
        if name not in converted
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{where}: missing key {', '.join(missing)}")
    try:
        return cls(**converted)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error


def _completed(f: dataclasses.Field, value: Any) -> Any:
    """A section inside a section changes only the keys that it names: the rest is its default's."""
    default = f.default
    if f.default_factory is not dataclasses.MISSING:
        default = f.default_factory()
    if isinstance(value, dict) and dataclasses.is_dataclass(default):
        return {**to_mapping(default), **value}
    return value


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        inner = [a for a in args if a is not type(None)]
        return None if value is None else _convert(inner[0], value, where)
    if origin is typing.Literal:
        if value not in args:
            hint_text = nearest(str(value), map(str, args))
            raise ConfigError(f"{where} = {value!r} is not allowed{hint_text}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where} must be a list, got {value!r}")
        return tuple(_convert(args[0], item, where) for item in value)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ConfigError(f"{where} is a section, got {value!r}")
        return from_mapping(hint, value, where)  # type: ignore[arg-type]
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint in (int, float, str, bool) and type(value) is not hint:
        raise ConfigError(f"{where} must be {hint.__name__}, got {value!r}")
    return value


def to_mapping(config: Any) -> dict[str, Any]:
    """The plain values of a dataclass, nested; None is left out, as TOML has no word for it."""
    out: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            value = to_mapping(value)
        elif isinstance(value, tuple):
            value = list(value)
        if value is not None:
            out[f.name] = value
    return out


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as nested dictionaries.

    Raises:
        ConfigError: the file is missing, unreadable or not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not a TOML file ({error})") from error


def write_toml(values: dict[str, Any]) -> str:
    """Nested dictionaries as TOML text."""
    return tomli_w.dumps(values)


def recipe_values(name_or_path: str | Path) -> dict[str, Any]:
    """The plain values of a named recipe or of a user's own TOML file."""
    text = str(name_or_path)
    named = registry.recipe_paths()
    if text in named:
        return read_toml(named[text])
    if text.endswith(".toml"):
        return read_toml(Path(text))
    raise ConfigError(f"unknown recipe {text!r}{nearest(text, named)} (or give a .toml file)")


def overridden(values: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """A copy of `values` with dotted keys replaced: {"method.mask_rate": 0.3}."""
    out = {k: overridden(v, {}) if isinstance(v, dict) else v for k, v in values.items()}
    given = [name for name in BUDGETS if name in settings]
    if len(given) > 1:
        raise ConfigError(f"--set {' '.join(given)}: a run has one budget, give one of them")
    for dotted, value in settings.items():
        *sections, key = dotted.split(".")
        here = out
        for section in sections:
            here = here.setdefault(section, {})
            if not isinstance(here, dict):
                raise ConfigError(f"--set {dotted}: {section!r} is a value, not a section")
        if not sections:
            raise ConfigError(f"--set {dotted}: give section.key, such as training.steps=2000")
        if dotted in BUDGETS:  # another budget takes the place of the recipe's own
            for other in BUDGETS:
                here.pop(other.partition(".")[2], None)
        here[key] = value
    return out


def parse_setting(text: str) -> tuple[str, Any]:
    """One `--set` argument.

    >>> parse_setting("training.lr=1e-3"), parse_setting("model.norm=post")
    (('training.lr', 0.001), ('model.norm', 'post'))
    """
    key, equals, raw = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {text}: expected section.key=value")
    try:
        return key, tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        return key, raw


def run_config(values: dict[str, Any]) -> RunConfig:
    """Resolves plain values into a complete `RunConfig`.

    Raises:
        ConfigError: an unknown section, name or key.
    """
    from selfsup.training.config import TrainingConfig

    known = ("data", "model", "method", "training", "recipe")
    for section in values:
        if section not in known:
            raise ConfigError(f"unknown section {section!r}{nearest(section, known)}")
    parts: dict[str, Any] = {}
    for section, table in (
        ("data", registry.DATA),
        ("model", registry.MODELS),
        ("method", registry.METHODS),
    ):
        if not isinstance(values.get(section, {}), dict):
            raise ConfigError(f"{section} is a section, got {values[section]!r}")
        keys = dict(values.get(section, {}))
        name = keys.pop("name", None)
        if not isinstance(name, str):
            raise ConfigError(f"section [{section}] needs a name: one of {', '.join(table)}")
        if "preset" in keys:
            keys = {**preset_values(name, keys.pop("preset")), **keys}
        module = registry.module_of(table, section, name)
        parts[f"{section}_name"] = name
        parts[section] = from_mapping(module.Config, keys, section)
    if not isinstance(values.get("training", {}), dict):
        raise ConfigError(f"training is a section, got {values['training']!r}")
    training = from_mapping(TrainingConfig, values.get("training", {}), "training")
    return RunConfig(**parts, training=training, recipe=values.get("recipe", {}))


def run_values(config: RunConfig) -> dict[str, Any]:
    """The plain values of a resolved configuration; `run_config` gives the same object back."""
    out: dict[str, Any] = {"recipe": config.recipe} if config.recipe else {}
    for section in ("data", "model", "method"):
        name = getattr(config, f"{section}_name")
        out[section] = {"name": name, **to_mapping(getattr(config, section))}
    out["training"] = to_mapping(config.training)
    return out


def presets() -> dict[str, dict[str, Any]]:
    """Published or proven sizes by name of the model, from `models/presets.toml`."""
    return read_toml(Path(__file__).parent / "models" / "presets.toml")


def preset_values(model: str, name: str) -> dict[str, Any]:
    """One preset of a model, without its summary."""
    known = presets().get(model, {})
    if name not in known:
        raise ConfigError(f"unknown preset {name!r} of model {model!r}{nearest(name, known)}")
    return {k: v for k, v in known[name].items() if k != "summary"}
