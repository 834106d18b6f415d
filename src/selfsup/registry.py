"""The tables of names: what can be asked for, and where it lives.

Adding a method is three edits: its file, its line here, its recipe. Modules are imported late, so
reading these tables costs nothing.
"""

import ast
import importlib
import importlib.util
from pathlib import Path
from typing import Any

from selfsup.errors import ConfigError, nearest

DATA = {
    "text": "selfsup.data.text:prepare",
}
MODELS = {
    "transformer": "selfsup.models.transformer:TransformerEncoder",
}
METHODS = {
    "masked_language": "selfsup.methods.generative.masked_language:MaskedLanguage",
    "causal_language": "selfsup.methods.generative.causal_language:CausalLanguage",
}
TASKS = {
    "classification": "selfsup.tasks.classification:Classification",
    "tagging": "selfsup.tasks.tagging:Tagging",
    "regression": "selfsup.tasks.regression:Regression",
}
TUNINGS = {
    "full": "selfsup.tuning.full:full",
    "probe": "selfsup.tuning.probe:probe",
}
TABLES = {"data": DATA, "models": MODELS, "methods": METHODS, "tasks": TASKS, "tunings": TUNINGS}


def resolve(table: dict[str, str], kind: str, name: str) -> Any:
    """The object behind `name`.

    Raises:
        ConfigError: no such name; the nearest one is given.
    """
    return getattr(module_of(table, kind, name), table[name].partition(":")[2])


def module_of(table: dict[str, str], kind: str, name: str) -> Any:
    """The module that holds `name`; its `Config` is what a configuration section may say."""
    if name not in table:
        raise ConfigError(f"unknown {kind} {name!r}{nearest(name, table)}")
    return importlib.import_module(table[name].partition(":")[0])


def summary(target: str) -> str:
    """The first line of a module's docstring, read without importing it."""
    name = target.partition(":")[0]
    path = Path(__file__).parent.joinpath(*name.split(".")[1:]).with_suffix(".py")
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0].rstrip(".")


def recipe_paths() -> dict[str, Path]:
    """The named recipes: one TOML file each."""
    folder = Path(__file__).parent / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}
