"""Imports point one way: no circles, packages know only those before them, methods no other."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import selfsup
from selfsup import registry

ROOT = Path(selfsup.__file__).parent.parent
KNOWN = {
    "data": (),
    "models": (),
    "methods": ("models",),
    "tasks": ("data", "models"),
    "analysis": ("models",),
    "training": ("data", "models"),
    "tuning": ("data", "models", "methods", "tasks", "training"),
    "evaluation": ("data", "models", "methods", "tasks", "analysis", "training", "tuning"),
}


def imported(path: Path) -> Iterator[str]:
    """The modules of selfsup that a file imports when it is loaded."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("selfsup"):
            continue
        for alias in node.names:
            inner = f"{node.module}.{alias.name}"
            is_module = ROOT.joinpath(*inner.split(".")).with_suffix(".py").is_file()
            yield inner if is_module else str(node.module)


IMPORTS = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): set(imported(path))
    for path in sorted((ROOT / "selfsup").rglob("*.py"))
    if path.name != "__init__.py"
}


def test_no_circle():
    assert "selfsup.models.block" in IMPORTS["selfsup.models.transformer"]
    list(TopologicalSorter(IMPORTS).static_order())  # raises CycleError, which names it


@pytest.mark.parametrize("package", KNOWN)
def test_packages(package):
    wrong = {
        (module, other)
        for module, others in IMPORTS.items()
        for other in others
        if module.startswith(f"selfsup.{package}.")
        and (part := other.split(".")[1]) not in (package, *KNOWN[package])
        and (part in KNOWN or (part == "objective" and package in ("data", "models")))
    }
    assert not wrong


def test_methods():
    methods = {target.partition(":")[0] for target in registry.METHODS.values()}
    assert not {name: IMPORTS[name] & methods for name in methods if IMPORTS[name] & methods}
