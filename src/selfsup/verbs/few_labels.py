"""Few labels and many unlabelled items: pattern-exploiting training and self-training of a run."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from selfsup import config as configuration
from selfsup import console, environment, registry
from selfsup.data import templates as template_files
from selfsup.data.labels import Labelled
from selfsup.errors import ConfigError, nearest
from selfsup.evaluation.adapt import (
    class_scores,
    default_training,
    fit,
    new_task,
    rows_of,
    score,
)
from selfsup.files import write_json
from selfsup.model import Model
from selfsup.model_folder import load_model, save_model
from selfsup.objective import Objective, Task
from selfsup.run_start import check_same, write_run
from selfsup.tasks import classification, cloze
from selfsup.training.config import TrainingConfig
from selfsup.training.folder import RunFolder
from selfsup.training.loop import train
from selfsup.tuning import pet as patterns
from selfsup.tuning import self_training, verbalizers
from selfsup.tuning.pseudo_labels import (
    SoftClassification,
    SoftLabelled,
    softened,
    without_labels,
)
from selfsup.verbs.unlabelled import Sources, read_unlabelled

Settings = dict[str, Any]
Columns = dict[str, Any]


def zero_shot(
    run: str | Path,
    templates: Sequence[str | Path],
    data: str | Path,
    *,
    columns: Columns | None = None,
    settings: Settings | None = None,
    max_length: int | None = None,
) -> dict[str, float]:
    """The accuracy of a pre-trained run with each template, without any training.

    Args:
        run: a masked_language or gpt_bert run.
        templates: names of templates, or files.
        data: a labelled file.
        columns, max_length: as for `finetune`.
        settings: {"cloze.several_tokens": "mean"}.
    """
    base = load_model(run)
    values = _sections(settings, {"cloze": {}})
    labelled = _read(base, data, columns)
    preprocessor = base.preprocessor.limited(max_length)
    out = {}
    for name in templates:
        task = _cloze(
            base, template_files.text_of(name), values["cloze"], labelled, str(name), seed=0
        )
        out[str(name)] = score(task, rows_of(task, preprocessor, _as_cloze(labelled)))
    return out


def pet(
    run: str | Path,
    templates: Sequence[str | Path],
    data: str | Path,
    unlabelled: Sources,
    out: str | Path,
    *,
    valid: str | Path | None = None,
    settings: Settings | None = None,
    columns: Columns | None = None,
    max_length: int | None = None,
    search_words: bool = False,
    resume: bool = False,
) -> Path:
    """Trains a classifier on what cloze models with several templates say of unlabelled items.

    Args:
        run: a pre-trained masked_language or gpt_bert run.
        templates: names of templates, or files.
        data: labelled training file.
        unlabelled: texts without labels: files of text, or tables; pairs of texts in a table.
        out: the run folder to make: a fine-tuned classifier, and pet.json with what each template
            was worth.
        valid: labelled file that is followed while the classifier trains.
        settings: {"pet.generations": 3, "cloze.several_tokens": "mean", "cloze_training.steps":
            100, "task.dropout": 0.0, "training.lr": 1e-3}.
        columns: as for `finetune`.
        max_length: longest text in tokens; None: 128.
        search_words: search other words for the classes first, with the labelled examples and those
            of `valid`.
        resume: go on with the classifier from the newest checkpoint in `out`.

    Returns:
        the run folder.

    Raises:
        ConfigError: a template or a setting that does not fit.
        DataError: labels or items that do not fit the templates.
    """
    base, columns = load_model(run), columns or {}
    labelled = _read(base, data, columns)
    held_out = _read(base, valid, columns, labelled.names) if valid else None
    items = read_unlabelled(base, unlabelled, labelled, columns)
    defaults = {"cloze_training": _training(base, len(labelled), False)}
    defaults |= {"training": _training(base, len(items), bool(valid))}
    values = _sections(settings, {"pet": {}, "cloze": {}, "task": {}, **defaults})
    config = _config(patterns.Config, values, "pet")
    short = _config(TrainingConfig, values, "cloze_training")
    preprocessor = base.preprocessor.limited(max_length)
    chosen, accuracies = [], []
    for name in templates:
        text = template_files.text_of(name)
        task = _cloze(base, text, values["cloze"], labelled, str(name), config.seeds[0])
        if search_words:
            text = _best_words(base, task, preprocessor, values["cloze"], labelled, held_out)
            task = _cloze(base, text, values["cloze"], labelled, str(name), config.seeds[0])
        chosen.append(text)
        accuracies.append(score(task, rows_of(task, preprocessor, _as_cloze(labelled))))
        console.say(f"{name}: accuracy {accuracies[-1]:.3f} on the labelled examples, untrained")
    sections = _final_sections(base, values, labelled)
    extra = {
        "tuning": {"name": "full", "base": str(run), "max_length": max_length or 0},
        "pet": {**configuration.to_mapping(config), "templates": chosen},
        "training": configuration.to_mapping(_config(TrainingConfig, values, "training")),
    }
    facts = {**labelled.facts(), "unlabelled_examples": len(items)}
    with closing(RunFolder(Path(out), resume)) as folder:
        if resume:
            check_same(folder.path, {k: sections[k] for k in ("model", "task", "labels")}, facts)

        def fit_one(number: int, seed: int, examples: Labelled) -> np.ndarray:
            task = _cloze(base, chosen[number], values["cloze"], labelled, "", seed)
            title = f"template {templates[number]}, seed {seed}"
            training = replace(short, seed=seed)
            fit(task, preprocessor, _as_cloze(examples), training, title=title)
            return class_scores(task, preprocessor, without_labels(items, labelled, "cloze"))

        said = patterns.annotate(fit_one, accuracies, labelled, items, config)
        training = _config(TrainingConfig, values, "training")
        student = _classifier(base, values, labelled, training.seed)
        write_run(folder.path, {**sections, **extra}, training, student, facts, str(data))
        _teach(
            *(student, preprocessor, labelled, items, said.scores, config.temperature, training),
            valid=held_out,
            folder=folder,
        )
        save_model(folder.path / "model", student, sections, preprocessor)
        shares = softened(said.scores)
        by_template = [
            {"name": str(name), "accuracy_untrained": accuracy, "text": text}
            for name, accuracy, text in zip(templates, accuracies, chosen, strict=True)
        ]
        record = {
            "templates": by_template,
            **configuration.to_mapping(config),
            **facts,
            "trained": said.record,
            "mean_confidence": float(shares.max(1).mean()),
            "classes": dict(zip(labelled.names, shares.mean(0).tolist(), strict=True)),
            "command": environment.command_line(),
        }
        write_json(folder.path / "pet.json", record)
    return folder.path


def self_train(
    run: str | Path,
    data: str | Path,
    unlabelled: Sources,
    out: str | Path,
    *,
    valid: str | Path | None = None,
    settings: Settings | None = None,
    columns: Columns | None = None,
    max_length: int | None = None,
) -> Path:
    """Trains a classifier that labels items by itself, and learns from those it is sure of.

    Args:
        run: a pre-trained run of any kind of data.
        data: labelled training file.
        unlabelled: items without labels.
        out: the run folder to make: a fine-tuned classifier, and self_training.json with what each
            round took.
        valid: labelled file that is followed while training.
        settings: {"self_training.threshold": 0.95, "task.dropout": 0.0, "training.steps": 200}.
        columns: as for `finetune`.
        max_length: longest item; None: the kind's usual.

    Returns:
        the run folder.
    """
    base, columns = load_model(run), columns or {}
    labelled = _read(base, data, columns)
    held_out = _read(base, valid, columns, labelled.names) if valid else None
    items = read_unlabelled(base, unlabelled, labelled, columns)
    default = {"training": _training(base, len(labelled), bool(valid))}
    values = _sections(settings, {"self_training": {}, "task": {}, **default})
    config = _config(self_training.Config, values, "self_training")
    training = _config(TrainingConfig, values, "training")
    preprocessor = base.preprocessor.limited(max_length)
    sections = _final_sections(base, values, labelled)
    extra = {
        "tuning": {"name": "full", "base": str(run), "max_length": max_length or 0},
        "self_training": configuration.to_mapping(config),
        "training": configuration.to_mapping(training),
    }
    facts = {**labelled.facts(), "unlabelled_examples": len(items)}
    with closing(RunFolder(Path(out), False)) as folder:

        def train_one(examples: Labelled, number: int) -> Task:
            task = _classifier(base, values, examples, training.seed + number)
            this = replace(training, seed=training.seed + number)
            title = f"round {number}, {len(examples)} examples"
            fit(task, preprocessor, examples, this, valid=held_out, title=title)
            return task

        def scores_of(task: Task, some: Labelled) -> np.ndarray:
            return class_scores(task, preprocessor, some)

        task, rounds = self_training.self_train(train_one, scores_of, labelled, items, config)
        write_run(folder.path, {**sections, **extra}, training, task, facts, str(data))
        save_model(folder.path / "model", task, sections, preprocessor)
        record = {**configuration.to_mapping(config), **facts, "rounds": rounds}
        record["command"] = environment.command_line()
        write_json(folder.path / "self_training.json", record)
    return folder.path


def _teach(
    student: classification.Classification,
    preprocessor: Any,
    labelled: Labelled,
    items: Sequence[Any],
    scores: Float[np.ndarray, "items classes"],
    temperature: float,
    training: TrainingConfig,
    *,
    valid: Labelled | None = None,
    folder: RunFolder | None = None,
) -> None:
    """Trains a classifier on what models said of the unlabelled items, and on nothing else.

    Args:
        student: the classifier.
        preprocessor: of its encoder.
        labelled: whose classes they are.
        items: the unlabelled items.
        scores: of the items.
        temperature: softens them.
        training: budget and optimizer.
        valid: labelled examples whose metric is followed.
        folder: where the run is kept.
    """
    data = rows_of(student, preprocessor, without_labels(items, labelled, "classification"))
    objective = SoftClassification(student, temperature)
    held_out = rows_of(student, preprocessor, valid) if valid else None
    watch = (lambda trained: {"score": score(trained.student, held_out)}) if held_out else None
    train(objective, SoftLabelled(data, scores), held_out, training, folder, "distilling", watch)


def _best_words(
    base: Model,
    task: cloze.Cloze,
    preprocessor: Any,
    values: dict[str, Any],
    labelled: Labelled,
    held_out: Labelled | None,
) -> str:
    """A template with the best words, by held-out examples or, without, the labelled ones."""

    def measure(text: str) -> float:
        assert held_out is not None
        other = _cloze(base, text, values, labelled, "", seed=0)
        return score(other, rows_of(other, preprocessor, _as_cloze(held_out)))

    ranked = None if held_out is None else measure
    found = verbalizers.search(task, preprocessor, _as_cloze(labelled), measure=ranked)
    return found[0][0]


def _read(
    base: Model, path: str | Path, columns: Columns | None, names: tuple[str, ...] | None = None
) -> Labelled:
    read = registry.module_of(registry.DATA, "data", base.values["data"]["name"]).read_labels
    return read(path, "classification", names=names, **(columns or {}))


def _as_cloze(labelled: Labelled) -> Labelled:
    return replace(labelled, task="cloze")


def _training(base: Model, count: int, watched: bool) -> dict[str, Any]:
    default = default_training(count, base.encoder.dim)
    return configuration.to_mapping(replace(default, evaluations=5 if watched else 0))


def _sections(settings: Settings | None, known: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The sections with what `settings` change.

    Raises:
        ConfigError: another section.
    """
    for key in settings or {}:
        if key.partition(".")[0] not in known:
            hint = nearest(key.partition(".")[0], known)
            raise ConfigError(f"unknown section {key.partition('.')[0]!r}{hint}")
    values = configuration.overridden(known, settings or {})
    for name in ("training", "cloze_training"):  # another budget takes the place of the steps
        if name in values and {"minutes", "tokens"} & values[name].keys():
            values[name].pop("steps", None)
    return values


def _config(kind: Any, values: dict[str, Any], section: str) -> Any:
    return configuration.from_mapping(kind, values[section], section)


def _final_sections(base: Model, values: dict[str, Any], labelled: Labelled) -> dict[str, Any]:
    """What the classifier's model folder says."""
    config = _config(classification.Config, values, "task")
    return {
        "data": base.values["data"],
        "model": base.values["model"],
        "task": {"name": "classification", **configuration.to_mapping(config)},
        "labels": {"names": list(labelled.names)},
        "tuning": {"names": [*base.values.get("tuning", {}).get("names", ()), "full"]},
    }


def _classifier(base: Model, values: dict[str, Any], labelled: Labelled, seed: int) -> Any:
    config = _config(classification.Config, values, "task")
    return new_task(base.encoder, "classification", config, labelled, tuning="full", seed=seed)


def _cloze(
    base: Model, text: str, values: dict[str, Any], labelled: Labelled, name: str, seed: int
) -> Any:
    """A cloze model with the pre-trained head; `name` is the template's, for messages."""
    if name:
        template_files.parse(text, name, cloze=True).words_of(labelled.names, labelled.source)
    keys = {**values, "template": text}
    config = configuration.from_mapping(cloze.Config, keys, "cloze")
    method: Objective = base.objective
    return new_task(
        *(base.encoder, "cloze", config, _as_cloze(labelled)),
        tuning="full",
        seed=seed,
        method=method,
    )
