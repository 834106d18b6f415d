"""A smaller run of a run: prunes it, measures what that brought and cost, writes a new folder.

run.toml, model/    as in every run: `load`, `evaluate`, `finetune`, `compare` take it
pruning.json        what was removed; parameters, bytes, seconds and score before and after; for
                    heads, units and the top layers the same for every tenth that might be removed

Seconds are those of the encoder for a batch: the mean over some of the scored examples, from short
to long, or without labels one of random content. Before and after are measured in turn, so that
what else the machine does slows both alike.
"""

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import zstandard

from selfsup import config as configuration
from selfsup import console, environment, registry
from selfsup.batch import AudioSpec, Batch, ImageSpec, SeriesSpec, Vocabulary
from selfsup.data import labels as labelling
from selfsup.data.dataset import LabelledDataset
from selfsup.data.labels import Labelled, with_known_first
from selfsup.errors import CheckpointError, ConfigError, nearest
from selfsup.evaluation.adapt import default_training, num_rows, rows_of, score
from selfsup.files import write_json, write_text
from selfsup.model import Model
from selfsup.model_folder import load_model, save_model
from selfsup.models.encoder import Encoder
from selfsup.objective import Objective, Task
from selfsup.training.config import TrainingConfig
from selfsup.training.device import autocast, to_device
from selfsup.training.folder import RunFolder
from selfsup.training.loop import train
from selfsup.tuning import sparsity
from selfsup.tuning.importance import head_importance, least_important, unit_importance
from selfsup.tuning.pruning import (
    layers_to_drop,
    prunable,
    prune_heads,
    prune_layers,
    prune_units,
)

KINDS = {
    "heads": "a share of the attention heads, the least important ones; needs labelled data",
    "units": "a share of the feed-forward units, likewise",
    "layers": "layers by their numbers, from 0",
    "top_layers": "so many of the last layers",
    "alternate_layers": "so many layers, every other one from the last",
    "weights": "a share of the weights, the smallest ones: a smaller file, no speed",
    "gradual": "the same while training goes on; needs labelled data",
    "movement": "a share of the weights of each matrix while training goes on: what training moves "
    "to zero; needs labelled data",
}
"""What can be pruned, and what `amount` means."""
PARTS = {"heads": (head_importance, prune_heads), "units": (unit_importance, prune_units)}
TRAINED = {"gradual": "magnitude", "movement": "movement"}
CURVE = tuple(tenth / 10 for tenth in range(10))
JUDGED = 1000  # examples that importance is measured on, at most
ROWS, LENGTH = 32, 64  # of a batch that is timed
BATCHES, ROUNDS = 3, 3  # how many at most, and how often each


def prune(
    run: str | Path,
    out: str | Path,
    kind: str,
    amount: Any,
    *,
    data: str | Path | None = None,
    test: str | Path | None = None,
    columns: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes a pruned copy of a run.

    Args:
        run: a fine-tuned run; for layers and weights also a pre-trained one.
        out: the run folder to make.
        kind: one of `KINDS`.
        amount: a share, a number of layers, or their numbers: see `KINDS`.
        data: labelled file that judges and trains.
        test: labelled file that is scored; by default a quarter split off `data`.
        columns: as for `finetune`.
        settings: of `gradual` and `movement`: {"training.steps": 500, "pruning.cooldown": 0.2}.

    Returns:
        what pruning.json holds.

    Raises:
        ConfigError: the run cannot be pruned so, or labelled data are missing.
    """
    started, run = time.monotonic(), Path(run)
    if kind not in KINDS:
        raise ConfigError(f"cannot prune {kind!r}{nearest(kind, KINDS)}")
    if not (run / "run.toml").is_file():
        raise CheckpointError(f"{run}: no run.toml; is it a run folder?")
    model = load_model(run)
    whole = model.objective
    prunable(whole.encoder)
    labels = _read(model, data, test, columns or {})
    if labels is None and kind in (*PARTS, *TRAINED):
        raise ConfigError(f"pruning {kind} needs labelled examples: give data")
    with closing(RunFolder(Path(out))) as folder:
        smaller = copy.deepcopy(whole)
        held_out = None if labels is None else _rows(whole, model, labels[1])
        result: dict[str, Any] = {"kind": kind, "amount": amount}
        if kind in TRAINED:
            assert labels is not None
            _sparsify(smaller, model, labels[0], TRAINED[kind], amount, settings or {}, folder)
        elif kind in PARTS:
            assert labels is not None
            judged = labels[0].take(range(min(JUDGED, len(labels[0]))))
            importance = PARTS[kind][0](whole, _batches(_rows(whole, model, judged), model))
            result["importance"] = [
                [round(x, 6) for x in row if x == x] for row in importance.tolist()
            ]
            result["removed"] = _remove(smaller.encoder, kind, amount, importance)
            result["curve"] = _curve(whole, model, kind, held_out, importance)
        else:
            result["removed"] = _remove(smaller.encoder, kind, amount)
            if kind == "top_layers":
                result["curve"] = _curve(whole, model, kind, held_out)
        _save(folder.path, run, model, smaller, {"kind": kind, "amount": amount})
        result |= _difference(whole, smaller, model, held_out)
        sizes = [_bytes(path / "model" / "model.safetensors") for path in (run, folder.path)]
        result["bytes"], result["compressed_bytes"] = (
            {"before": before, "after": after} for before, after in zip(*sizes, strict=True)
        )
        if kind in ("weights", *TRAINED):
            result["zeros"] = sparsity.zero_share(smaller.encoder)
        result["seconds"] = round(time.monotonic() - started, 1)
        result["command"] = environment.command_line()
        write_json(folder.path / "pruning.json", result)
    return result


def _read(
    model: Model, data: str | Path | None, test: str | Path | None, columns: dict[str, Any]
) -> tuple[Labelled, Labelled] | None:
    """What judges and trains, and what is scored."""
    if data is None:
        return None
    if not isinstance(model.objective, Task):
        raise ConfigError("a pre-trained run has no labels to be pruned by: leave data out")
    task = model.values["task"]["name"]
    read = registry.module_of(registry.DATA, "data", model.values["data"]["name"]).read_labels
    names = model.names or None
    given = read(data, task, names=names, **columns)
    if test is None:
        judging, scored = labelling.split(given, (0.75, 0.25), seed=0)
        return judging, scored
    if task == "tagging":  # another language may have tags of its own
        return given, with_known_first(read(test, task, **columns), model.names)
    return given, read(test, task, names=names, **columns)


def _rows(objective: Objective, model: Model, labelled: Labelled) -> LabelledDataset:
    return rows_of(cast(Task, objective), model.preprocessor, labelled)


def _batches(rows: LabelledDataset, model: Model) -> Iterator[Batch]:
    lengths = np.zeros(len(rows)) if rows.lengths is None else rows.lengths
    order = np.argsort(lengths, kind="stable")
    for first in range(0, len(order), ROWS):
        yield to_device(rows.batch(order[first : first + ROWS]), model.device)


def _remove(encoder: Encoder, kind: str, amount: Any, importance: Any = None) -> Any:
    """Prunes in place; says what went: numbers of layers, or of parts by layer."""
    if kind in PARTS:
        gone = least_important(importance, amount)
        PARTS[kind][1](encoder, gone)
        return {str(layer): parts for layer, parts in gone.items()}
    if kind == "weights":
        sparsity.prune_magnitude(encoder, amount)
        return amount
    if kind == "layers":
        layers = sorted(set(amount))
    else:
        layers = layers_to_drop(kind.removesuffix("_layers"), amount, encoder.num_layers)
    prune_layers(encoder, layers)
    return layers


def _sparsify(
    objective: Objective,
    model: Model,
    labelled: Labelled,
    by: str,
    share: float,
    settings: dict[str, Any],
    folder: RunFolder,
) -> None:
    """Trains on with the labels while weights are pruned."""
    count, name = num_rows(model.preprocessor, labelled), model.values["task"]["name"]
    default = default_training(count, model.encoder.dim, name)
    values = {
        "training": configuration.to_mapping(replace(default, evaluations=0)),
        "pruning": {"share": share, "by": by},
    }
    values = configuration.overridden(values, settings)
    for section in values:
        if section not in ("training", "pruning"):
            hint = nearest(section, ("training", "pruning"))
            raise ConfigError(f"unknown section {section!r}{hint}")
    training = configuration.from_mapping(TrainingConfig, values["training"], "training")
    config = configuration.from_mapping(sparsity.Config, values["pruning"], "pruning")
    objective.requires_grad_(True)
    sparse = sparsity.Sparsifying(config, objective)
    train(sparse, _rows(objective, model, labelled), None, training, folder, "pruning")
    sparse.finish()


def _curve(
    whole: Objective,
    model: Model,
    kind: str,
    held_out: LabelledDataset | None,
    importance: Any = None,
) -> list[dict[str, Any]]:
    """Every tenth of the heads or units, or every number of top layers: what it brings and costs.

    `speedup` is seconds of the whole encoder by those of the pruned one.
    """
    layers = whole.encoder.num_layers
    amounts = CURVE if kind in PARTS else range(layers)
    rows = []
    with console.progress("measuring", len(amounts)) as bar:
        for amount in amounts:
            smaller = copy.deepcopy(whole)
            if amount:
                _remove(smaller.encoder, kind, amount, importance)
            found = _difference(whole, smaller, model, held_out, before=False)
            seconds = found["seconds_per_batch"]
            row = {"share": amount if kind in PARTS else amount / layers}
            row |= {"parameters": found["parameters"]["after"], "seconds": seconds["after"]}
            row["speedup"] = seconds["before"] / seconds["after"]
            if held_out is not None:
                row["score"] = found["score"]["after"]
            rows.append(row)
            bar.advance(1)
    return rows


def _difference(
    whole: Objective,
    smaller: Objective,
    model: Model,
    held_out: LabelledDataset | None,
    before: bool = True,
) -> dict[str, Any]:
    """Parameters, seconds and, with labels, score of both; `before`: score the whole one too."""
    pair = {"before": whole, "after": smaller}
    batches = _timed(model, held_out)
    with autocast(model.device, model.dtype):
        seconds = seconds_per_batch([task.encoder for task in pair.values()], batches)
    out: dict[str, Any] = {
        "parameters": {k: sum(p.numel() for p in task.parameters()) for k, task in pair.items()},
        "seconds_per_batch": dict(zip(pair, seconds, strict=True)),
        "batches": [{k: list(value.shape) for k, value in batch.items()} for batch in batches],
    }
    if held_out is not None:
        scored = {k: cast(Task, task) for k, task in pair.items() if before or k == "after"}
        out["metric"] = scored["after"].metric
        out["score"] = {name: score(task, held_out) for name, task in scored.items()}
        out["test_size"] = len(held_out)
    return out


def _timed(model: Model, held_out: LabelledDataset | None) -> list[Batch]:
    """The batches that are timed; of the scored examples evenly from the short to the long."""
    if held_out is None:
        return [to_device(example_batch(model.encoder), model.device)]
    batches = list(_batches(held_out, model))
    step = -(-len(batches) // BATCHES)
    return batches[step // 2 :: step]


def example_batch(encoder: Encoder, rows: int = ROWS, length: int = LENGTH) -> Batch:
    """Random content that a transformer reads: `length` positions, or whole pictures."""
    config, spec = cast(Any, encoder).config, cast(Any, encoder).spec
    draw = torch.Generator().manual_seed(0)
    if config.positions == "learned":
        length = min(length, config.max_length)
    match spec:
        case Vocabulary():
            return {"tokens": torch.randint(spec.size, (rows, length), generator=draw)}
        case ImageSpec():
            size = rows, spec.channels, spec.size, spec.size
            return {"image": torch.rand(size, generator=draw)}
        case AudioSpec(mel=0):
            samples = length * int(np.prod(config.conv_strides))
            return {"waveform": torch.randn(rows, samples, generator=draw)}
        case AudioSpec():
            frames = torch.randn(rows, length * config.patch, spec.mel, generator=draw)
            return {"frames": frames}
        case SeriesSpec():
            steps = min(length * config.patch, spec.length)
            return {"series": torch.randn(rows, steps, spec.channels, generator=draw)}
    raise ConfigError(f"a transformer does not read {type(spec).__name__}")


@torch.inference_mode()
def seconds_per_batch(
    encoders: Sequence[Encoder], batches: Sequence[Batch], rounds: int = ROUNDS
) -> list[float]:
    """Each encoder's mean over the batches, of each the shortest time, measured in turn.

    What else the machine does can only make it longer.
    """
    shortest = np.full((len(encoders), len(batches)), np.inf)
    wait: Callable[[], None] = (
        torch.cuda.synchronize if next(iter(batches[0].values())).is_cuda else lambda: None
    )
    states = [encoder.training for encoder in encoders]
    for number in range(rounds + 1):
        for place, batch in enumerate(batches):
            for row, encoder in enumerate(encoders):
                encoder.eval()
                wait()
                started = time.perf_counter()
                encoder(batch)
                wait()
                if number:  # the first round warms up
                    taken = time.perf_counter() - started
                    shortest[row, place] = min(shortest[row, place], taken)
    for encoder, training in zip(encoders, states, strict=True):
        encoder.train(training)
    return shortest.mean(1).tolist()


def _save(path: Path, run: Path, model: Model, smaller: Objective, pruning: dict[str, Any]) -> None:
    """The model folder and run.toml of the pruned run."""
    shape = configuration.to_mapping(smaller.encoder.config)
    section = {"name": model.values["model"]["name"], **shape}
    sections = {k: v for k, v in model.values.items() if k not in ("format", "sha256")}
    save_model(path / "model", smaller, {**sections, "model": section}, model.preprocessor)
    values = configuration.read_toml(run / "run.toml")
    source = values.get("command", {}).get("source", "")
    number = sum(p.numel() for p in smaller.parameters())
    values |= {
        "model": section,
        "pruning": {"base": str(run), **pruning},
        "command": {"line": environment.command_line(), "source": source},
        "facts": {**values.get("facts", {}), "parameters": number},
    }
    write_text(path / "run.toml", configuration.write_toml(values))


def _bytes(path: Path) -> tuple[int, int]:
    """Size of a file, and what zstd makes of it."""
    content = path.read_bytes()
    return len(content), len(zstandard.ZstdCompressor(level=9).compress(content))
