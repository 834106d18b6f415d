"""Learning: an encoder from unlabeled data, a task from labels."""

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from selfsup import config as configuration
from selfsup import console, ranks, registry
from selfsup.config import RunConfig, run_config, run_values
from selfsup.data.corpora import MixedRows
from selfsup.data.dataset import Prepared
from selfsup.errors import ConfigError, nearest
from selfsup.evaluation import (
    anomaly,
    early_exit,
    frozen,
    showcase,
)
from selfsup.evaluation.adapt import default_training, fit, new_task, num_rows, rows_of
from selfsup.evaluation.gallery import gallery
from selfsup.files import write_json, write_text
from selfsup.model import Model
from selfsup.model_folder import Base, joined, load_model, save_model
from selfsup.objective import Objective
from selfsup.run_start import (
    IDENTITY,
    KEPT,
    build_method,
    check_fields,
    check_same,
    say_changes,
    say_start,
    write_run,
)
from selfsup.tasks.classification import Classification
from selfsup.training.config import TrainingConfig
from selfsup.training.distributed import check_ranks, machines_turn, processes
from selfsup.training.evaluate import evaluate_corpora
from selfsup.training.folder import RunFolder
from selfsup.training.loop import Watch, train
from selfsup.tuning.choice import Tuning
from selfsup.tuning.parts import trained

Columns = dict[str, Any]
SHOWN = {"fills": showcase.fills, "samples": showcase.samples, "pictures": gallery}
"""Files of a run that people look at: each is written where there is something to show."""


@processes()
def pretrain(
    recipe: str | Path,
    data: str | Path | Sequence[str],
    out: str | Path,
    settings: dict[str, Any] | None = None,
    resume: bool = False,
) -> Path:
    """Pre-trains an encoder on unlabeled data.

    Args:
        recipe: a named recipe, or a TOML file of your own.
        data: a file, folder, glob or list of those, or a Hugging Face dataset name; a list of
            "NAME=PATH,PATH" names several corpora of text, for several languages.
        out: the run folder to make.
        settings: changes to the recipe, {"training.steps": 2000}.
        resume: go on from the newest checkpoint in `out`.

    Returns:
        the run folder.

    Raises:
        ConfigError, DataError, DivergedError, StorageError, Interrupted: see errors.py.
    """
    values = configuration.overridden(configuration.recipe_values(recipe), settings or {})
    config = run_config(values)
    check_ranks(config.training)
    with _folder(out, resume) as folder:
        objective, prepared = _pretrain(config, data, folder, resume)
        if folder is not None:
            with ranks.alone():
                _write_pretrained(config, objective, prepared, folder.path)
    return Path(out)


@contextmanager
def _folder(out: str | Path, resume: bool) -> Iterator[RunFolder | None]:
    """The run folder, for the first rank alone."""
    if not ranks.first():
        yield None
        return
    with closing(RunFolder(Path(out), resume)) as folder:
        yield folder


def _pretrain(
    config: RunConfig, data: Any, folder: RunFolder | None, resume: bool
) -> tuple[Objective, Prepared]:
    """Prepares the data and trains; the first rank alone has a folder."""
    sections = {k: v for k, v in run_values(config).items() if k in KEPT}
    if resume and folder:
        check_same(folder.path, sections, {})
    data_module = registry.module_of(registry.DATA, "data", config.data_name)
    with machines_turn():
        prepared = data_module.prepare(config.data, data)
    if resume and folder:
        check_same(folder.path, {}, {k: prepared.facts[k] for k in IDENTITY})
        say_changes(folder.path, config.training)
    method = registry.resolve(registry.METHODS, "method", config.method_name)
    check_fields(config, method.fields, prepared.train.fields)
    objective = build_method(config, prepared.spec)
    check_fields(config, objective.fields, prepared.train.fields)  # it may want more
    if folder:
        source = [str(d) for d in data] if isinstance(data, list | tuple) else str(data)
        facts = prepared.facts
        write_run(folder.path, run_values(config), config.training, objective, facts, source)
        say_start(config, objective, prepared)
    watch = frozen.online_probe(prepared.train, prepared.valid)
    watch = watch or _corpus_losses(prepared.valid, config.training)
    more = folder, "pre-training", watch
    train(objective, prepared.train, prepared.valid, config.training, *more)
    return objective, prepared


def _write_pretrained(
    config: RunConfig, objective: Objective, prepared: Prepared, path: Path
) -> None:
    """The model folder, and the files that people look at."""
    sections = {k: v for k, v in run_values(config).items() if k in KEPT}
    model = Model(objective, prepared.preprocessor, (), sections, config.training.device)
    calibrated = anomaly.calibration(model, prepared.valid)
    if calibrated:
        sections |= calibrated
        written = configuration.read_toml(path / "run.toml")
        write_text(path / "run.toml", configuration.write_toml(written | calibrated))
    save_model(path / "model", objective, sections, prepared.preprocessor)
    for name, show in SHOWN.items():
        shown = show(model, prepared.valid)
        if shown:
            write_json(path / f"{name}.json", shown)


def _corpus_losses(valid: Any, training: TrainingConfig) -> Watch | None:
    """The held-out loss of each corpus while training, where there are several."""
    if not isinstance(valid, MixedRows):
        return None

    def watch(objective: Objective) -> dict[str, float]:
        device = next(objective.parameters()).device
        found = evaluate_corpora(objective, valid, training, device)
        return {f"loss_{name}": scores["loss"] for name, scores in found.items()}

    return watch


@processes()
def finetune(
    run: str | Path,
    task: str,
    data: str | Path,
    out: str | Path,
    *,
    valid: str | Path | None = None,
    tuning: str = "full",
    settings: dict[str, Any] | None = None,
    columns: Columns | None = None,
    max_length: int | None = None,
    resume: bool = False,
) -> Path:
    """Adapts a pre-trained run to a task with labels.

    Args:
        run: a pre-trained run folder.
        task: classification, tagging, regression, span_qa, generation or cloze.
        data: labelled training file; for generation also a mixture of several (`data.mixtures`).
        out: the run folder to make.
        valid: labelled validation file; its metric is followed while training.
        tuning: which parameters move, names of `selfsup list tunings`: "full", "lora",
            "adapter+bias". Unless it is full, the run holds only what was added, and names its base
            by hash.
        settings: {"training.lr": 1e-3, "task.dropout": 0.0, "tuning.lora.rank": 4}.
        columns: names of the columns `text`, `text_b` and `label`, where they are not the usual.
        max_length: longest item (a text in tokens, 128 by default); None: the kind's usual.
        resume: go on from the newest checkpoint in `out`.

    Returns:
        the run folder; `load(out).predict(...)` uses it.
    """
    base = load_model(run)
    columns = columns or {}
    read = registry.module_of(registry.DATA, "data", base.values["data"]["name"]).read_labels
    train_data = read(data, task, **columns)
    valid_data = read(valid, task, names=train_data.names or None, **columns) if valid else None
    preprocessor = base.preprocessor.limited(max_length)
    default = default_training(num_rows(preprocessor, train_data), base.encoder.dim, task)
    default = replace(default, evaluations=5 if valid else 0)
    values = {"task": {}, "training": configuration.to_mapping(default), "tuning": {}}
    known = tuple(values)
    values = configuration.overridden(values, settings or {})
    for section in values:
        if section not in known:
            raise ConfigError(f"unknown section {section!r}{nearest(section, known)}")
    chosen = Tuning.of(tuning, values["tuning"])
    module = registry.module_of(registry.TASKS, "task", task)
    task_config = configuration.from_mapping(module.Config, values["task"], "task")
    training = configuration.from_mapping(TrainingConfig, values["training"], "training")
    check_ranks(training)
    with _folder(out, resume) as folder:
        built = new_task(
            *(base.encoder, task, task_config, train_data),
            tuning=chosen,
            seed=training.seed,
            preprocessor=preprocessor,
            method=base.objective,
        )
        sections = {
            "data": base.values["data"],
            "model": base.values["model"],
            "task": {"name": task, **configuration.to_mapping(built.config)},
            "labels": {"names": list(train_data.names)},
        }
        extra = {
            "tuning": {
                "name": tuning,
                "base": str(run),
                "max_length": max_length or 0,
                **{name: keys for name, keys in chosen.values().items() if name != "names"},
            },
            "training": configuration.to_mapping(training),
        }
        facts = train_data.facts()
        if folder and resume:
            same = {k: sections[k] for k in ("model", "task", "labels")}
            check_same(folder.path, {**same, "tuning": extra["tuning"]}, facts)
            say_changes(folder.path, training)
        if not chosen.whole:
            moved, every = trained(built)
            console.say(f"{tuning}: {moved:,} of {every:,} parameters train ({moved / every:.2%})")
        if folder:
            write_run(folder.path, {**sections, **extra}, training, built, facts, str(data))
        fit(built, preprocessor, train_data, training, valid=valid_data, folder=folder)
        if folder:
            with ranks.alone():
                if valid_data and isinstance(built, Classification) and built.exits is not None:
                    early_exit.calibrate(built, rows_of(built, preprocessor, valid_data))
                start = None if chosen.whole else Base(Path(run), base)
                before = base.values.get("tuning") if chosen.whole else None
                sections["tuning"] = joined(before, chosen.values())
                save_model(folder.path / "model", built, sections, preprocessor, start)
    return Path(out)
