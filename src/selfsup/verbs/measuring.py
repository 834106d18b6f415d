"""Measuring a run: held-out loss, metrics, comparisons, probes, alignment, prompts."""

import math
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from selfsup import config as configuration
from selfsup import environment, registry
from selfsup.analysis.alignment import chance
from selfsup.config import run_config
from selfsup.data import templates
from selfsup.data.corpora import MixedRows
from selfsup.data.labels import Labelled, with_known_first
from selfsup.errors import CheckpointError, ConfigError
from selfsup.evaluation import compare as comparison
from selfsup.evaluation import (
    compare_settings,
    detectors,
    early_exit,
    frozen,
    frozen_forecasts,
    in_context,
    showcase,
    translations,
)
from selfsup.evaluation.across_groups import probe_across_groups
from selfsup.evaluation.adapt import answers, rows_of
from selfsup.evaluation.demonstrations import read_parts
from selfsup.evaluation.metrics import METRICS
from selfsup.evaluation.targets import part_accuracies
from selfsup.files import write_json
from selfsup.model import Model
from selfsup.model_folder import load_model
from selfsup.objective import Task
from selfsup.training.device import autocast
from selfsup.training.evaluate import evaluate as held_out_loss
from selfsup.training.evaluate import evaluate_corpora

Columns = dict[str, Any]
PREDICTS_TOKENS = ("causal_language", "bidirectional_language")
"""Methods whose loss is nats per token of a text."""


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
    if labelled.parts:
        return _evaluate_mixture(model, labelled)
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


def _evaluate_mixture(model: Model, labelled: Labelled) -> dict[str, float]:
    """Accuracy by task, and what the most frequent target of each would score."""
    found = part_accuracies(model.objective, model.preprocessor, labelled)  # type: ignore[arg-type]
    targets: dict[str, Counter[str]] = {}
    for part, target in zip(labelled.parts, labelled.labels, strict=True):
        targets.setdefault(part.name, Counter())[target] += 1
    scores = {"accuracy": fmean(found.values())}
    for name, accuracy in found.items():
        scores[f"accuracy_{name}"] = accuracy
        scores[f"majority_{name}"] = max(targets[name].values()) / targets[name].total()
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
        task: classification, tagging, regression, span_qa, generation or cloze.
        data: labelled training file.
        valid: labelled validation file that chooses learning rates; by default split off `data`.
        test: labelled test file; by default split off `data`.
        columns: as for `finetune`.
        out: another place for the JSON file.
        settings: fields of `evaluation.compare_settings.Settings`: label_counts, seeds, lrs, steps,
            tuning ("full,lora,probe" compares these), tuning_options ({"lora": {"rank": 16}}),
            task_options ({"template": "topic.txt"}).

    Returns:
        what the file holds.
    """
    model = load_model(run)
    if isinstance(model.objective, Task):
        raise CheckpointError(f"{run} is fine-tuned already; compare needs a pre-trained run")
    kind = model.values["data"]["name"]
    labels = comparison.read_labels(kind, task, data, valid, test, **(columns or {}))
    counts = settings.pop("label_counts", None) or _default_counts(len(labels.train))
    chosen = compare_settings.Settings(task=task, label_counts=tuple(counts), **settings)
    result = comparison.compare(run, labels, chosen)
    result["command"] = environment.command_line()
    path = Path(out) if out else Path(run) / "compare.json"
    write_json(path, result)
    if registry.resolve(registry.TASKS, "task", task).gives_text:
        return result  # a map shows items by their labels
    test_part = replace(labels.test, task="classification") if task == "cloze" else labels.test
    shown = showcase.embedding_map(model, model.untrained_encoder(), test_part)
    stem = path.stem if "compare" in path.stem else f"{path.stem}-compare"
    write_json(path.with_name(stem.replace("compare", "embeddings") + ".json"), shown)
    return result


def _default_counts(available: int) -> list[int]:
    return [n for n in (50, 300, 2000) if n <= available] or [available]


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


def prompt(
    run: str | Path,
    template: str | Path,
    *,
    data: str | Path | None = None,
    test: str | Path | None = None,
    columns: Columns | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Measures in-context learning of a model that writes; writes prompt.json into the run.

    Args:
        run: a `causal_language` run, an encoder-decoder, or a run that was fine-tuned for
            generation (`finetune` with a mixture: zero-shot on tasks that it did not hold).
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
