"""Before a run trains: the objective is built, what must fit is checked, run.toml is written."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selfsup import config as configuration
from selfsup import console, environment, registry
from selfsup.building import build_encoder, build_objective
from selfsup.config import RunConfig
from selfsup.errors import ConfigError
from selfsup.files import write_text
from selfsup.model_folder import load_model
from selfsup.objective import Objective, Taught
from selfsup.training.config import TrainingConfig
from selfsup.training.device import pick_device, pick_dtype

KEPT = ("data", "model", "method")  # sections that a model folder keeps and a resumed run repeats
IDENTITY = ("fingerprint", "tokenizer")  # facts that say whether data are the same


def build_method(config: RunConfig, spec: Any) -> Objective:
    """A fresh method with its encoder, as the configuration says."""
    seed = config.training.seed
    encoder = build_encoder(config.model_name, config.model, spec, seed)
    built = build_objective("methods", config.method_name, config.method, encoder, spec, seed)
    if encoder.has_penalty and not built.adds_penalty:
        raise ConfigError(
            f"method {config.method_name} does not train experts (model.experts = 0); "
            "masked_language, causal_language and denoising do"
        )
    if isinstance(built, Taught):
        built.take_teacher(_teacher(built))
    return built


def _teacher(student: Taught) -> Objective:
    """The trained method of the run that is to teach."""
    run = student.config.teacher
    model = load_model(run, "cpu")
    name = model.values.get("method", {}).get("name", "")
    if name not in student.teachers:
        kind = f"is a {name} run" if name else "is fine-tuned"
        raise ConfigError(
            f"method.teacher = {run!r} {kind}; a teacher is a run of "
            f"{' or '.join(student.teachers)}"
        )
    return model.objective


def check_same(path: Path, sections: dict[str, Any], facts: dict[str, Any]) -> None:
    """Resuming needs the same whole sections and the same facts; training may be prolonged.

    A key that this version knows and that of the run, or of its base, did not stood at its default.
    """
    if not (path / "run.toml").exists():
        return  # stopped before the first line was written: there is nothing to differ from
    before = configuration.read_toml(path / "run.toml")
    before |= {name: _completed(name, _section(before, name)) for name in sections}
    sections = {name: _completed(name, values) for name, values in sections.items()}
    pairs = {
        f"{section}.{key}": (_section(before, section).get(key), values.get(key))
        for section, values in sections.items()
        for key in sorted(_section(before, section).keys() | values.keys())
    }
    pairs |= {f"facts.{k}": (_section(before, "facts").get(k), new) for k, new in facts.items()}
    for key, (old, new) in pairs.items():
        if old != new:
            raise ConfigError(
                f"--resume: {path} was begun with {key} = {old!r}, now {new!r}; "
                "use the same recipe, settings and data, or another --out"
            )


def say_changes(path: Path, training: TrainingConfig) -> None:
    """Names what a resumed run does otherwise from now on; its run.toml keeps the new alone."""
    if not (path / "run.toml").exists():
        return
    before = _section(configuration.read_toml(path / "run.toml"), "training")
    now = configuration.to_mapping(training)
    keys = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if keys:
        changes = ", ".join(f"{key} = {before.get(key)}, now {now.get(key)}" for key in keys)
        console.say(f"going on with other settings than {path} was begun with: {changes}")


def _section(values: dict[str, Any], name: str) -> dict[str, Any]:
    """A section of run.toml; what is none counts as empty."""
    found = values.get(name)
    return found if isinstance(found, dict) else {}


def _completed(section: str, values: dict[str, Any]) -> dict[str, Any]:
    """A section with the defaults of the keys that it leaves out."""
    table = registry.TABLES.get(section) or registry.TABLES.get(f"{section}s")
    keys = dict(values)
    name = keys.pop("name", None)
    if table is None or not isinstance(name, str) or name not in table:
        return values
    shape = getattr(registry.module_of(table, section, name), "Config", None)
    if shape is None:
        return values
    try:
        config = configuration.from_mapping(shape, keys, section)
    except ConfigError:  # a key that is gone: it will be named as a difference
        return values
    return {"name": name, **configuration.to_mapping(config)}


def check_fields(config: RunConfig, wanted: Sequence[str], given: Sequence[str]) -> None:
    """Refuses data that lack a field which the method reads."""
    missing = [name for name in wanted if name not in given]
    if missing:
        hint = "; set data.rows = 'pairs'" if "segments" in missing else ""
        raise ConfigError(
            f"{config.method_name} reads {', '.join(missing)}, which this data does not give{hint}"
        )


def say_start(config: RunConfig, objective: Objective, prepared: Any) -> None:
    """One line for people: what is trained, and on how much."""
    number = sum(p.numel() for p in objective.parameters())
    size = f"{number / 1e6:.1f}M" if number >= 1e6 else f"{number:,}"
    console.say(
        f"{config.method_name}, {config.model_name} of {size} parameters, "
        f"{len(prepared.train):,} rows; {prepared.facts.get('duplicates', 0):,} duplicates found"
    )


def write_run(
    path: Path,
    sections: dict[str, Any],
    training: TrainingConfig,
    objective: Objective,
    facts: dict[str, Any],
    source: Any,
) -> None:
    """Writes run.toml: the resolved sections, the command, versions, machine and counts."""
    device = pick_device(training.device)
    dtype = str(pick_dtype(training.precision, device)).removeprefix("torch.")
    number = sum(p.numel() for p in objective.parameters())
    trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    values = {
        **sections,
        "command": {"line": environment.command_line(), "source": source},
        "environment": {
            **environment.versions(),
            **environment.machine(),
            "device": str(device),
            "precision": dtype,
        },
        "facts": {**facts, "parameters": number, "trained_parameters": trained},
    }
    write_text(path / "run.toml", configuration.write_toml(values))
