"""The verbs, as functions: what `import selfsup` gives and what the command line calls."""

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from selfsup import config as configuration
from selfsup import console, environment, registry
from selfsup.analysis.alignment import chance
from selfsup.config import run_config, run_values
from selfsup.data import templates
from selfsup.data.corpora import MixedRows
from selfsup.data.labels import Labelled, with_known_first
from selfsup.errors import CheckpointError, ConfigError, nearest
from selfsup.evaluation import (
    anomaly,
    detectors,
    early_exit,
    frozen,
    frozen_forecasts,
    in_context,
    showcase,
    translations,
)
from selfsup.evaluation import compare as comparison
from selfsup.evaluation.across_groups import probe_across_groups
from selfsup.evaluation.adapt import answers, default_training, fit, new_task, rows_of
from selfsup.evaluation.demonstrations import read_parts
from selfsup.evaluation.gallery import gallery
from selfsup.evaluation.metrics import METRICS
from selfsup.files import write_json, write_text
from selfsup.model_folder import Base, Model, joined, load_model, save_model
from selfsup.objective import Objective, Task
from selfsup.run_start import (
    IDENTITY,
    KEPT,
    build_method,
    check_fields,
    check_same,
    say_start,
    write_run,
)
from selfsup.tasks.classification import Classification
from selfsup.training.config import TrainingConfig
from selfsup.training.device import autocast
from selfsup.training.evaluate import evaluate as held_out_loss
from selfsup.training.evaluate import evaluate_corpora
from selfsup.training.folder import RunFolder
from selfsup.training.loop import train
from selfsup.tuned_models import TunedModels
from selfsup.tuning.choice import Tuning
from selfsup.tuning.parts import trained

Columns = dict[str, Any]
SHOWN = {"fills": showcase.fills, "samples": showcase.samples, "pictures": gallery}
"""Files of a run that people look at: each is written where there is something to show."""
PREDICTS_TOKENS = ("causal_language", "bidirectional_language")
"""Methods whose loss is nats per token of a text."""


def load(run: str | Path, device: str = "auto", settings: dict[str, Any] | None = None) -> Model:
    """Loads a run's model: `.embed`, `.fill`, `.generate`, `.predict`, `.score`, `.anomalies`.

    Args:
        run: a run folder, or its `model/` folder.
        device: auto, cpu or cuda.
        settings: of a fine-tuned run's task: {"task.num_beams": 4}.

    Raises:
        CheckpointError: there is no finished model, or it is damaged.
    """
    return load_model(run, device, settings)


def load_many(
    base: str | Path, runs: Mapping[str, str | Path], device: str = "auto"
) -> TunedModels:
    """Loads one base and many runs tuned from it: `.predict(items, names)` mixes them in a batch.

    Args:
        base: the run folder that the others were tuned from.
        runs: their folders by the names that `predict` is to know: {"mood": "runs/mood-lora"}.
        device: auto, cpu or cuda.

    Raises:
        CheckpointError: a run is not finished, or was tuned from another base.
        ConfigError: a run holds an encoder of its own.
    """
    return TunedModels(base, runs, device)


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
    folder = RunFolder(Path(out), resume)
    try:
        sections = {k: v for k, v in run_values(config).items() if k in KEPT}
        if resume:
            check_same(folder.path, sections, {})
        data_module = registry.module_of(registry.DATA, "data", config.data_name)
        prepared = data_module.prepare(config.data, data)
        if resume:
            check_same(folder.path, {}, {k: prepared.facts[k] for k in IDENTITY})
        method = registry.resolve(registry.METHODS, "method", config.method_name)
        check_fields(config, method.fields, prepared.train.fields)
        objective = build_method(config, prepared.spec)
        check_fields(config, objective.fields, prepared.train.fields)  # it may want more
        source = [str(d) for d in data] if isinstance(data, list | tuple) else str(data)
        write_run(
            folder.path, run_values(config), config.training, objective, prepared.facts, source
        )
        say_start(config, objective, prepared)
        watch = frozen.online_probe(objective, prepared.train, prepared.valid)
        watch = watch or _corpus_losses(objective, prepared.valid, config.training)
        train(
            objective,
            prepared.train,
            prepared.valid,
            config.training,
            folder,
            "pre-training",
            watch,
        )
        model = Model(objective, prepared.preprocessor, (), sections, config.training.device)
        calibrated = anomaly.calibration(model, prepared.valid)
        if calibrated:
            sections |= calibrated
            written = configuration.read_toml(folder.path / "run.toml")
            write_text(folder.path / "run.toml", configuration.write_toml(written | calibrated))
        save_model(folder.path / "model", objective, sections, prepared.preprocessor)
        for name, show in SHOWN.items():
            shown = show(model, prepared.valid)
            if shown:
                write_json(folder.path / f"{name}.json", shown)
    finally:
        folder.close()
    return folder.path


def _corpus_losses(
    objective: Objective, valid: Any, training: TrainingConfig
) -> Callable[[], dict[str, float]] | None:
    """The held-out loss of each corpus while training, where there are several."""
    if not isinstance(valid, MixedRows):
        return None

    def watch() -> dict[str, float]:
        device = next(objective.parameters()).device
        found = evaluate_corpora(objective, valid, training, device)
        return {f"loss_{name}": scores["loss"] for name, scores in found.items()}

    return watch


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
        data: labelled training file.
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
    default = default_training(len(train_data), base.encoder.dim, task)
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
    preprocessor = base.preprocessor.limited(max_length)
    folder = RunFolder(Path(out), resume)
    try:
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
        facts = {"labelled_examples": len(train_data)}
        if resume:
            same = {k: sections[k] for k in ("model", "task", "labels")}
            check_same(folder.path, {**same, "tuning": extra["tuning"]}, facts)
        if not chosen.whole:
            moved, every = trained(built)
            console.say(f"{tuning}: {moved:,} of {every:,} parameters train ({moved / every:.2%})")
        write_run(folder.path, {**sections, **extra}, training, built, facts, str(data))
        fit(
            built,
            preprocessor,
            train_data,
            training,
            valid=valid_data,
            folder=folder,
        )
        if valid_data and isinstance(built, Classification) and built.exits is not None:
            early_exit.calibrate(built, rows_of(built, preprocessor, valid_data))
        if chosen.whole:  # the base is not needed any more: what it had added is said here
            tunings = joined(base.values.get("tuning"), chosen.values())
            save_model(folder.path / "model", built, sections | {"tuning": tunings}, preprocessor)
        else:
            tunings, start = chosen.values(), Base(Path(run), base)
            sections |= {"tuning": tunings}
            save_model(folder.path / "model", built, sections, preprocessor, start)
    finally:
        folder.close()
    return folder.path


def evaluate(
    run: str | Path,
    data: str | Path | None = None,
    columns: Columns | None = None,
    normal: str | None = None,
    settings: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Scores a run on data it was not trained on; anomalies also go to anomaly.json in the run.

    Args:
        run: a pre-trained run: held-out loss and perplexity; or a fine-tuned one: its metrics.
        data: for a pre-trained run other unlabeled text, by default the part of its own corpus that
            was held out; for a fine-tuned run a labelled file.
        columns: as for `finetune`. A `label` makes `data` a labelled file for a pre-trained run
            too: one that rebuilds rows or pictures is compared with other detectors of anomalies.
        normal: the label of normal items, all others being anomalies.
        settings: as for `load`.

    Returns:
        metric names and values; by detector where detectors are compared, by name of the corpus
        where there are several.
    """
    model, columns = load_model(run, settings=settings), columns or {}
    fine_tuned = isinstance(model.objective, Task)
    if normal is not None or ("label" in columns and not fine_tuned):
        found = detectors.evaluate(model, run, data, columns, normal)
        write_json(Path(run) / "anomaly.json", {**found, "command": environment.command_line()})
        return found["scores"]
    if fine_tuned:
        return _evaluate_task(model, data, columns)
    values = configuration.read_toml(Path(run) / "run.toml")
    config = run_config({k: values[k] for k in ("data", "model", "method", "training")})
    data_module = registry.module_of(registry.DATA, "data", config.data_name)
    source = data if data is not None else values["command"]["source"]
    prepared = data_module.prepare(
        data_module.with_preprocessor(config.data, _model_path(run)), source
    )
    held_out = prepared.valid if data is None else prepared.train
    side = "valid" if data is None else "train"
    everything = replace(config.training, valid_batches=10**9)
    scores: dict[str, Any]
    with torch.no_grad(), autocast(model.device, model.dtype):
        if isinstance(held_out, MixedRows):
            scores = evaluate_corpora(model.objective, held_out, everything, model.device)
            counted = [(scores[name], prepared.facts["corpora"][name][side]) for name in scores]
        else:
            scores = held_out_loss(model.objective, held_out, everything, model.device)
            counted = [(scores, prepared.facts.get(side, {}))]
    for found, counts in counted if config.method_name in PREDICTS_TOKENS else ():
        found["perplexity_per_token"] = math.exp(found["loss"])
        found["perplexity_per_word"] = math.exp(found["loss"] * counts["tokens"] / counts["words"])
    return scores


def _model_path(run: str | Path) -> Path:
    return Path(run) / "model" if (Path(run) / "model").is_dir() else Path(run)


def _evaluate_task(model: Model, data: str | Path | None, columns: Columns) -> dict[str, float]:
    if data is None:
        raise ConfigError("a fine-tuned run is evaluated on a labelled file: give --data")
    task = model.values["task"]["name"]
    data_module = registry.module_of(registry.DATA, "data", model.values["data"]["name"])
    known = None if task == "tagging" else model.names or None
    labelled = data_module.read_labels(data, task, names=known, **columns)
    if task == "tagging":  # another language may have tags of its own
        labelled = with_known_first(labelled, model.names)
    held_out = rows_of(model.objective, model.preprocessor, labelled)  # type: ignore[arg-type]
    truth, guess = answers(model.objective, held_out)  # type: ignore[arg-type]
    names = {
        "classification": ("accuracy", "macro_f1", "matthews"),
        "cloze": ("accuracy", "macro_f1", "matthews"),
        "tagging": ("accuracy", "macro_f1"),
        "regression": ("pearson", "spearman"),
        "span_qa": ("exact_match", "answer_f1"),
        "generation": ("bleu", "chrf", "rouge_1", "rouge_2", "rouge_l"),
    }[task]
    scores = {n: float(METRICS[n](truth, guess)) for n in names}
    if task == "tagging":  # what the most frequent tag of this file would score everywhere
        scores["majority"] = max(Counter(truth).values()) / len(truth)
    if getattr(model.objective, "exits", None) is not None:
        scores["layers"] = float(early_exit.layers_used(model.objective, held_out)[1].mean())  # type: ignore[arg-type]
    return {"examples": len(labelled), **scores}


def compare(
    run: str | Path,
    task: str,
    data: str | Path,
    *,
    valid: str | Path | None = None,
    test: str | Path | None = None,
    columns: Columns | None = None,
    out: str | Path | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Measures what the pre-training was worth; writes compare.json into the run folder.

    Args:
        run: a pre-trained run.
        task: classification, tagging, regression, span_qa or generation.
        data: labelled training file.
        valid: labelled validation file that chooses learning rates; by default split off `data`.
        test: labelled test file; by default split off `data`.
        columns: as for `finetune`.
        out: another place for the JSON file.
        settings: fields of `evaluation.compare.Settings`: label_counts, seeds, lrs, steps, tuning
            ("full,lora,probe" compares these), tuning_options ({"lora": {"rank": 16}}).

    Returns:
        what the file holds.
    """
    model = load_model(run)
    if isinstance(model.objective, Task):
        raise CheckpointError(f"{run} is fine-tuned already; compare needs a pre-trained run")
    kind = model.values["data"]["name"]
    labels = comparison.read_labels(kind, task, data, valid, test, **(columns or {}))
    counts = settings.pop("label_counts", None) or _default_counts(len(labels.train))
    chosen = comparison.Settings(task=task, label_counts=tuple(counts), **settings)
    result = comparison.compare(run, labels, chosen)
    result["command"] = environment.command_line()
    path = Path(out) if out else Path(run) / "compare.json"
    write_json(path, result)
    if registry.resolve(registry.TASKS, "task", task).gives_text:
        return result  # a map shows items by their labels
    shown = showcase.embedding_map(model, model.untrained_encoder(), labels.test)
    stem = path.stem if "compare" in path.stem else f"{path.stem}-compare"
    write_json(path.with_name(stem.replace("compare", "embeddings") + ".json"), shown)
    return result


def probe(
    run: str | Path,
    task: str,
    data: str | Path,
    *,
    valid: str | Path | None = None,
    test: str | Path | None = None,
    columns: Columns | None = None,
    max_length: int | None = None,
    across: bool = False,
    folds: int = 0,
    shots: int = 1,
    horizon: int = 0,
    splits: str = "",
) -> dict[str, Any]:
    """Measures frozen features: weighted kNN and a linear probe; writes probe.json into the run.

    For classes also embeddings.json: a map of items, coloured by their labels.

    Beside the pre-trained network stand the same network untrained and, where an input is a vector,
    the raw input.

    Args:
        run: a pre-trained run.
        task: classification, regression, or forecasting with a `masked_series` run.
        data: labelled training file; for forecasting one table, and no other file.
        valid: labelled validation file that chooses the probes' settings; by default split off.
        test: labelled test file; by default split off `data`.
        columns: as for `finetune`.
        max_length: as for `finetune`.
        across: leave out one group (a speaker, say) at a time instead of `valid` and `test`; also
            gives `few` and `eer`, the equal error rate of telling groups apart.
        folds: with `across`, parts that the groups are dealt to; 0: one for each group.
        shots: with `across`, labelled examples of each class and group for `few`.
        horizon: rows to forecast; 0: 96.
        splits: which rows of the table to fit, to choose and to score: ett, shares or numbers of
            rows; "": as the run was split.

    Returns:
        what the file holds: `scores` by features and probe.
    """
    started = time.monotonic()
    model = load_model(run)
    if isinstance(model.objective, Task):
        raise CheckpointError(f"{run} is fine-tuned already; probe needs a pre-trained run")
    kind = model.values["data"]["name"]
    if task != "forecasting" and (horizon or splits):
        raise ConfigError("horizon and splits are for --task forecasting")
    sizes: dict[str, Any]
    seen: Labelled | None = None
    if task == "forecasting":
        if valid or test or columns or max_length or across:
            raise ConfigError("forecasting reads one table: it takes data, horizon and splits")
        scores, sizes = frozen_forecasts.probe(run, model, data, horizon or 96, splits)
    elif across:
        read = registry.module_of(registry.DATA, "data", kind).read_labels
        seen = read(data, task, **(columns or {}))
        fresh = model.untrained_encoder()
        scores = probe_across_groups(model, fresh, seen, max_length, folds, shots)
        sizes = {"test_size": len(seen), "groups": len(set(seen.groups)), "shots": shots}
    else:
        labels = comparison.read_labels(kind, task, data, valid, test, **(columns or {}))
        seen = labels.test if task == "classification" else None
        scores = frozen.probe(model, model.untrained_encoder(), labels, max_length)
        sizes = {"train_size": len(labels.train), "test_size": len(labels.test)}
    result = {
        "task": task,
        **sizes,
        "scores": scores,
        "seconds": round(time.monotonic() - started, 1),
        "command": environment.command_line(),
    }
    write_json(Path(run) / "probe.json", result)
    if seen is not None:
        shown = showcase.embedding_map(model, model.untrained_encoder(), seen)
        write_json(Path(run) / "embeddings.json", shown)
    return result


def align(run: str | Path, data: str | Path, columns: Columns | None = None) -> dict[str, Any]:
    """Measures whether translations lie close to each other; writes alignment.json into the run.

    Beside the pre-trained network stand the same network untrained and the tokens that both
    languages share.

    Args:
        run: a pre-trained run of text.
        data: translation pairs, of sentences or of words: csv, tsv, jsonl, parquet.
        columns: `text` and `text_b`, the columns of the two languages; by default the only two.

    Returns:
        what the file holds: `scores` by kind of vectors, for each layer as in
        `analysis.alignment.both_ways`.
    """
    started = time.monotonic()
    model = load_model(run)
    languages, pairs = translations.read_pairs(data, **(columns or {}))
    result = {
        "data": str(data),
        "pairs": len(pairs),
        "languages": list(languages),
        "chance": chance(len(pairs)),
        "scores": translations.align(model, pairs),
        "seconds": round(time.monotonic() - started, 1),
        "command": environment.command_line(),
    }
    write_json(Path(run) / "alignment.json", result)
    return result


def _default_counts(available: int) -> list[int]:
    return [n for n in (50, 300, 2000) if n <= available] or [available]


def prompt(
    run: str | Path,
    template: str | Path,
    *,
    data: str | Path | None = None,
    test: str | Path | None = None,
    columns: Columns | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Measures in-context learning of a causal language model; writes prompt.json into the run.

    Args:
        run: a `causal_language` run.
        template: a named template (`selfsup list templates`), or a text file of your own.
        data: labelled file that demonstrations are drawn from; None: there are none.
        test: labelled file that is scored; by default a quarter is split off `data`.
        columns: as for `finetune`.
        settings: fields of `evaluation.in_context.Settings`: shots, seeds, calibrate, normalise...

    Returns:
        what the file holds.
    """
    model, pattern = load_model(run), templates.load(template)
    if data is None:
        settings.setdefault("shots", (0,))
    chosen = in_context.Settings(**settings)
    pool, scored = read_parts(pattern, data, test, columns or {}, chosen.limit)
    result = in_context.evaluate(model, pattern, pool, scored, chosen)
    result["command"] = environment.command_line()
    write_json(Path(run) / "prompt.json", result)
    return result


def report(
    runs: Sequence[str | Path], out: str | Path | None = None, figure: str | Path | None = None
) -> Path:
    """Writes one self-contained HTML page about one run or several.

    Args:
        runs: run folders.
        out: the file; by default report.html in the (first) run folder.
        figure: also draw the first run's comparison as a PNG, for a README.
    """
    from selfsup.reporting import write_figure, write_report

    paths = [Path(run) for run in runs]
    for path in paths:
        if not (path / "run.toml").is_file():
            raise CheckpointError(f"{path}: no run.toml; is it a run folder?")
    if figure is not None:
        write_figure(paths[0] / "compare.json", Path(figure))
    return write_report(paths, Path(out) if out else paths[0] / "report.html")


def import_(source: str | Path, out: str | Path, base: str | Path | None = None) -> Path:
    """Makes a finished run of a published checkpoint; see `interop.transformers`.

    Args:
        source: a folder of `transformers` with safetensors, a name on the Hugging Face Hub, or a
            folder of PEFT: see `interop.peft_import`.
        out: the run folder to make.
        base: for a folder of PEFT: a run of the model that it was trained over.

    Returns:
        the run folder: `finetune`, `compare`, `load` and the others take it as one of their own.
    """
    from selfsup.interop.peft import is_adapter
    from selfsup.interop.peft_import import import_adapter
    from selfsup.interop.transformers import import_run

    if base is not None:
        return import_adapter(source, base, out)
    if is_adapter(source):
        raise ConfigError(f"{source}: an adapter of PEFT: give a run of its model as --base")
    return import_run(source, out)


def export(run: str | Path, out: str | Path, to: str = "transformers") -> Path:
    """Writes a run's model as a checkpoint of another library.

    Args:
        run: a run folder with a transformer of text.
        out: the folder to make.
        to: transformers; or peft: what a run tuned with lora, ia3, prefix or soft_prompt adds.

    Returns:
        the folder.

    Raises:
        ConfigError: the library has no architecture that computes this model.
    """
    from selfsup.interop.peft import export_adapter
    from selfsup.interop.transformers import export_run

    writers = {"transformers": export_run, "peft": export_adapter}
    if to not in writers:
        raise ConfigError(f"cannot export to {to!r}{nearest(to, writers)}")
    return writers[to](run, out)


def say_next(run: Path) -> None:
    """The next steps to try, for people."""
    console.say(f"next: selfsup report {run}")
    if "anomaly" in configuration.read_toml(run / "run.toml"):
        console.say(f"      selfsup predict {run} --data NEW")
        return
    console.say(f"      selfsup compare {run} --task classification --data LABELLED.csv")
