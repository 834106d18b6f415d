"""Distilling a fine-tuned run into a smaller one: the teacher's answers, and perhaps more texts."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, final

import numpy as np
import torch

from selfsup import config as configuration
from selfsup import console, registry
from selfsup.batch import Batch
from selfsup.building import build_encoder
from selfsup.data.dataset import LabelledDataset
from selfsup.data.labels import Labelled
from selfsup.errors import ConfigError, nearest
from selfsup.evaluation.adapt import default_training, new_task, rows_of, score
from selfsup.model import Model
from selfsup.model_folder import load_model, save_model
from selfsup.models.encoder import Encoder
from selfsup.models.shallower import take_layers
from selfsup.models.transformer import TransformerEncoder
from selfsup.randomness import isolated, seed_layers
from selfsup.run_start import check_same, write_run
from selfsup.tasks.tagging import IGNORED
from selfsup.training.config import TrainingConfig
from selfsup.training.folder import RunFolder
from selfsup.training.loop import train
from selfsup.tuning import distillation
from selfsup.verbs.unlabelled import Sources, read_unlabelled

SECTIONS = ("model", "task", "training", "distillation")


@final
class PartlyLabelled(LabelledDataset):
    """Labelled rows and, behind them, rows whose label nobody knows: -100, for numbers NaN.

    Args:
        data: all rows; the labels of the unlabelled ones mean nothing.
        num_labelled: so many rows at the beginning have a label.
    """

    def __init__(self, data: LabelledDataset, num_labelled: int):
        self.data, self.num_labelled = data, num_labelled
        self.fields, self.lengths, self.task = data.fields, data.lengths, data.task
        self.labels, self.truncated = data.labels, data.truncated

    def __len__(self) -> int:
        return len(self.data)

    def batch(self, numbers: np.ndarray) -> Batch:
        """The rows of those numbers."""
        batch = self.data.batch(numbers)
        label = batch["label"]
        unknown = torch.as_tensor(np.asarray(numbers) >= self.num_labelled)
        nothing = torch.nan if label.is_floating_point() else IGNORED
        unknown = unknown.view(-1, *[1] * (label.ndim - 1))
        return {**batch, "label": label.masked_fill(unknown, nothing)}


def distill(
    teacher: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    student: str | Path | None = None,
    layers: int | None = None,
    fresh: bool = False,
    unlabelled: Sources | None = None,
    valid: str | Path | None = None,
    settings: dict[str, Any] | None = None,
    columns: dict[str, Any] | None = None,
    max_length: int | None = None,
    resume: bool = False,
) -> Path:
    """Trains a smaller run to answer as a fine-tuned one does.

    Args:
        teacher: a run that was fine-tuned for classification, tagging or regression.
        data: labelled training file of the same task, with the same labels.
        out: the run folder to make: a fine-tuned run like any other, which needs no teacher.
        student: a smaller run with the same tokenizer whose encoder learns; None: one of the
            teacher's shape with fewer layers, which begins with every other layer of the teacher
            and with its head.
        layers: of a student that is made from the teacher; None: half of the teacher's.
        fresh: such a student begins with random weights. `settings` may then change its shape.
        unlabelled: more items for which the teacher alone speaks.
        valid: labelled validation file; its metric is followed while training.
        settings: {"distillation.temperature": 4.0, "training.lr": 1e-3, "model.dim": 128}.
        columns: as for `finetune`.
        max_length: longest item (a text in tokens); None: the teacher's.
        resume: go on from the newest checkpoint in `out`.

    Returns:
        the run folder.

    Raises:
        ConfigError: teacher, student and data do not fit each other.
        DataError: a file cannot be read, or has a label that the teacher does not know.
    """
    taught, columns = load_model(teacher, "cpu"), columns or {}
    if not isinstance(taught.objective, distillation.TASKS):
        raise ConfigError(
            f"{teacher} is no teacher: it must be fine-tuned (selfsup finetune) for "
            "classification, tagging or regression"
        )
    name, kind = taught.values["task"]["name"], taught.values["data"]["name"]
    values = _values(taught, student, layers, fresh, settings or {})
    seed = values["training"].get("seed", 0)
    encoder, base = _student(taught, teacher, student, fresh, values["model"], seed)
    read = registry.module_of(registry.DATA, "data", kind).read_labels
    labelled = read(data, name, names=taught.names or None, **columns)
    valid_data = read(valid, name, names=taught.names or None, **columns) if valid else None
    extra = read_unlabelled(taught, unlabelled, labelled, columns) if unlabelled else []
    everything = _with_unlabelled(labelled, extra)
    default = default_training(len(everything), encoder.dim, name)
    default = replace(default, evaluations=5 if valid else 0)
    values["training"] = {**configuration.to_mapping(default), **values["training"]}
    module = registry.module_of(registry.TASKS, "task", name)
    task_config = configuration.from_mapping(module.Config, values["task"], "task")
    config = configuration.from_mapping(distillation.Config, values["distillation"], "distillation")
    training = configuration.from_mapping(TrainingConfig, values["training"], "training")
    preprocessor = taught.preprocessor
    if max_length is not None:
        preprocessor = preprocessor.limited(max_length)
    with closing(RunFolder(Path(out), resume)) as folder:
        sections = {
            "data": base["data"],
            "model": base["model"],
            "task": {"name": name, **configuration.to_mapping(task_config)},
            "labels": {"names": list(taught.names)},
        }
        more = {
            "tuning": {"name": "full", "base": str(student or teacher)},
            "distillation": {"teacher": str(teacher), **configuration.to_mapping(config)},
        }
        facts = {**labelled.facts(), "unlabelled_examples": len(extra)}
        same = {k: sections[k] for k in ("model", "task", "labels")}
        if resume:
            check_same(folder.path, {**same, **more}, facts)
        task = new_task(encoder, name, task_config, labelled, tuning="full", seed=training.seed)
        if student is None and not fresh:
            _copy_head(task, taught.objective)
        with isolated():
            seed_layers(training.seed, "distillation")
            objective = distillation.Distillation(config, task, taught.objective)
        written = {**sections, **more, "training": configuration.to_mapping(training)}
        write_run(folder.path, written, training, task, facts, str(data))
        rows = PartlyLabelled(rows_of(task, preprocessor, everything), len(labelled))
        held_out = rows_of(task, preprocessor, valid_data) if valid_data else None
        watch = (lambda trained: {"score": score(trained, held_out)}) if held_out else None
        train(objective, rows, held_out, training, folder, "distilling", watch)
        tunings = {"names": [*base.get("tuning", {}).get("names", ()), "full"]}
        save_model(folder.path / "model", task, {**sections, "tuning": tunings}, preprocessor)
    return folder.path


def _values(
    taught: Model,
    student: str | Path | None,
    layers: int | None,
    fresh: bool,
    settings: dict[str, Any],
) -> dict[str, dict[str, Any]]:
    """The sections that `settings` may change, with what the teacher's say."""
    for key in settings:
        section = key.partition(".")[0]
        if section not in SECTIONS:
            raise ConfigError(f"unknown section {section!r}{nearest(section, SECTIONS)}")
    shaped = sorted(key for key in settings if key.startswith("model."))
    if student is not None and (layers or fresh or shaped):
        raise ConfigError(
            f"{'--layers' if layers else '--fresh' if fresh else shaped[0]} is for a student that "
            "is made from the teacher: leave it or --student out"
        )
    model = dict(taught.values["model"])
    if layers is not None:
        if "layers" not in model:
            raise ConfigError(f"model.name = {model['name']!r} is not made of --layers")
        model["layers"] = layers
    elif "layers" in model:
        model["layers"] = max(1, model["layers"] // 2)
    task = {k: v for k, v in taught.values["task"].items() if k not in ("name", "exits")}
    values: dict[str, Any] = {"model": model, "task": task, "training": {}, "distillation": {}}
    return configuration.overridden(values, settings)


def _student(
    taught: Model,
    teacher: str | Path,
    student: str | Path | None,
    fresh: bool,
    model: dict[str, Any],
    seed: int,
) -> tuple[Encoder, dict[str, Any]]:
    """The encoder that learns, and what the configuration says of it: `data`, `model`, `tuning`."""
    if student is not None:
        small = load_model(student, "cpu")
        if small.preprocessor.spec != taught.preprocessor.spec:
            raise ConfigError(
                f"{student} and its teacher {teacher} read different tokens (or pictures, frames): "
                "pre-train the student with data.tokenizer.file of the teacher's model folder"
            )
        return small.encoder, small.values
    values = {"data": taught.values["data"], "model": model}
    name = model["name"]
    shape = registry.module_of(registry.MODELS, "model", name).Config
    keys = {key: value for key, value in model.items() if key != "name"}
    config = configuration.from_mapping(shape, keys, "model")
    values["model"] = {"name": name, **configuration.to_mapping(config)}
    encoder = build_encoder(name, config, taught.preprocessor.spec, seed)
    if fresh:
        return encoder, values
    if not isinstance(encoder, TransformerEncoder):
        raise ConfigError(
            f"model.name = {name!r} has no layers that a student could begin with: use --fresh or "
            "--student RUN"
        )
    try:
        kept = take_layers(encoder, taught.encoder)
    except ConfigError as error:
        raise ConfigError(f"{teacher}: {error} (--fresh)") from None
    console.say(f"the student begins with layers {', '.join(map(str, kept))} of {teacher}")
    return encoder, values


def _copy_head(task: Any, teacher: Any) -> None:
    task.head.load_state_dict(teacher.head.state_dict())


def _with_unlabelled(labelled: Labelled, items: list[Any]) -> Labelled:
    """All items in one; the labels of the last ones only fill the place."""
    filler: Any = 0.0 if labelled.task == "regression" else labelled.names[0]
    fillers = [[filler] * len(i) if labelled.task == "tagging" else filler for i in items]
    return replace(
        labelled, items=[*labelled.items, *items], labels=[*labelled.labels, *fillers], groups=()
    )
