"""Features without training: of an encoder as it is, and of the input as it comes.

A pre-trained encoder is always shown beside the same network untrained and beside the raw input:
pixels, mean log-mel, table columns. What it does not add to these, it has not learned.
"""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from selfsup.batch import AudioSpec, Batch, Vocabulary
from selfsup.data.dataset import Dataset, LabelledDataset, Preprocessor
from selfsup.data.labels import Labels
from selfsup.errors import ConfigError
from selfsup.evaluation.layer_mix import fit_layer_mix
from selfsup.evaluation.metrics import spearman
from selfsup.evaluation.probes import fit_linear_probe, ridge_probe
from selfsup.evaluation.similarity import knn_accuracy
from selfsup.model import Model
from selfsup.models.encoder import Encoder, masked_mean
from selfsup.objective import Objective
from selfsup.randomness import Order
from selfsup.training.device import autocast, pick_dtype, to_device
from selfsup.training.loop import Watch

ONLINE_BANK, ONLINE_QUERIES = 2000, 500
MIN_ONLINE = 50  # labelled examples on either side, below which a probe would be noise


def raw_features(batch: Batch) -> Float[Tensor, "batch features"]:
    """The input itself as one vector per example.

    | field            | vector                                                  |
    |------------------|---------------------------------------------------------|
    | `image`          | pixels, 0 to 1                                          |
    | `frames`         | mean and standard deviation of each mel band            |
    | `waveform`       | log energy in 32 equal parts of the sound               |
    | `series`         | every step; missing ones are 0                          |
    | `row`            | the encoded row                                         |
    """
    if "image" in batch:
        return batch["image"].flatten(1).float() / 255
    if "frames" in batch:
        frames = batch["frames"]
        mask = batch.get("mask", torch.ones(frames.shape[:2], dtype=torch.bool))
        mean = masked_mean(frames, mask)
        square = masked_mean((frames - mean.unsqueeze(1)).square(), mask)
        return torch.cat([mean, square.sqrt()], 1)
    if "waveform" in batch:
        energy = torch.nn.functional.adaptive_avg_pool1d(batch["waveform"].square(), 32)
        return (energy + 1e-8).log()
    if "series" in batch:
        return batch["series"].nan_to_num(0.0).flatten(1)
    return batch["row"]


def course_features(batch: Batch) -> Float[Tensor, "batch features"]:
    """Log-mel frames as the mean of each quarter of the sound: what comes when, unlike a mean."""
    frames, parts = batch["frames"], 4
    mask = batch.get("mask", torch.ones(frames.shape[:2], dtype=torch.bool))
    place = (mask.cumsum(1) - 1) * parts // mask.sum(1, keepdim=True)  # (batch, time)
    chosen = torch.nn.functional.one_hot(place.clamp(0, parts - 1), parts) * mask.unsqueeze(2)
    count = chosen.sum(1).clamp(min=1).unsqueeze(2)  # (batch, part, 1)
    return (torch.einsum("btp,btm->bpm", chosen.to(frames), frames) / count).flatten(1)


def raw_inputs(
    preprocessor: Preprocessor,
) -> dict[str, tuple[Preprocessor, Callable[[Batch], Tensor]]]:
    """What stands beside an encoder's features: by name, how data are read and become vectors."""
    spec = preprocessor.spec
    if isinstance(spec, Vocabulary):
        return {}
    out: dict[str, tuple[Preprocessor, Callable[[Batch], Tensor]]]
    out = {"raw input": (preprocessor.raw(), raw_features)}
    if isinstance(spec, AudioSpec) and spec.mel:
        out["raw input by quarters"] = preprocessor, course_features
    return out


@torch.inference_mode()
def extract(
    data: Dataset | LabelledDataset,
    function: Callable[[Batch], Tensor],
    numbers: np.ndarray | None = None,
    batch_size: int = 256,
) -> np.ndarray:
    """`function` of every example (or of those of `numbers`): (examples, ...) float32."""
    numbers = np.arange(len(data)) if numbers is None else numbers
    lengths = np.zeros(len(data)) if data.lengths is None else data.lengths
    order = np.argsort(lengths[numbers], kind="stable")
    parts, places = [], []
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        parts.append(function(data.batch(numbers[chosen])).float().cpu().numpy())
        places.append(chosen)
    out = np.empty((len(numbers), *parts[0].shape[1:]), dtype=np.float32)
    out[np.concatenate(places)] = np.concatenate(parts)
    return out


def pooled_features(encoder: Encoder, device: torch.device) -> Callable[[Batch], Tensor]:
    """A function for `extract`: the encoder's pooled vector, in evaluation mode."""
    return _reader(encoder, device, encoder.pooled)


def layer_features(encoder: Encoder, device: torch.device) -> Callable[[Batch], Tensor]:
    """A function for `extract`: each layer's mean over real positions, (batch, layer, dim)."""

    def means(batch: Batch) -> Tensor:
        features = encoder(batch)
        return torch.stack([masked_mean(layer, features.mask) for layer in features.hidden], 1)

    return _reader(encoder, device, means)


def _reader(
    encoder: Encoder, device: torch.device, take: Callable[[Batch], Tensor]
) -> Callable[[Batch], Tensor]:
    dtype = pick_dtype("auto", device)

    def function(batch: Batch) -> Tensor:
        training = encoder.training
        encoder.eval()
        with autocast(device, dtype):
            taken = take(to_device(batch, device))
        encoder.train(training)
        return taken

    return function


def online_probe(train: Dataset, valid: Dataset) -> Watch | None:
    """Weighted kNN on a corpus that happens to have labels, for a look while training.

    It reads the encoder and never changes it; training does not see the labels.

    Returns:
        what gives the `knn_accuracy` of an objective; None where there are no labels.
    """
    if train.labels is None or valid.labels is None:
        return None
    bank = Order(len(train), seed=0)[0 : min(ONLINE_BANK, len(train))]
    queries = Order(len(valid), seed=0)[0 : min(ONLINE_QUERIES, len(valid))]
    if min(len(bank), len(queries)) < MIN_ONLINE or len(np.unique(train.labels[bank])) < 2:
        return None
    bank_labels, query_labels = train.labels[bank], valid.labels[queries]

    def watch(objective: Objective) -> dict[str, float]:
        device = next(objective.parameters()).device
        function = pooled_features(objective.encoder, device)
        stored, asked = extract(train, function, bank), extract(valid, function, queries)
        return {"knn_accuracy": float(knn_accuracy(stored, bank_labels, asked, query_labels))}

    return watch


def probe(
    model: Model, untrained: Encoder, labels: Labels, max_length: int | None
) -> dict[str, dict[str, float]]:
    """What frozen features say about labels: trained, untrained, and the input as it comes.

    Args:
        model: a pre-trained model.
        untrained: the same network with fresh weights.
        labels: `train` fits the probes, `valid` chooses their settings, `test` is scored once.
        max_length: longest item; None: what this kind of data usually takes.

    Returns:
        by name of the features: `knn` and `linear`, accuracies on the test part, and for networks
        of several layers `mix`, a linear probe on a learned weighted sum of them (SUPERB); for
        regression `linear`, the Spearman correlation.

    Raises:
        ConfigError: a task that has no label per item.
    """
    if labels.train.task == "tagging":
        raise ConfigError("a probe reads one label per item; use compare --tuning probe for tags")
    preprocessor = model.preprocessor.limited(max_length)
    parts = {
        side: preprocessor.labelled(part)
        for side, part in (("train", labels.train), ("valid", labels.valid), ("test", labels.test))
    }
    encoders = {"pretrained": model.encoder, "untrained": untrained.to(model.device)}
    answers = {side: data.labels for side, data in parts.items()}
    out = {}
    for name, encoder in encoders.items():
        pooled = pooled_features(encoder, model.device)
        found = {side: extract(data, pooled) for side, data in parts.items()}
        out[name] = _probed(found, answers, labels.train.task)
        if labels.train.task == "classification" and encoder.num_layers > 1:
            layers = layer_features(encoder, model.device)
            found = {side: extract(data, layers) for side, data in parts.items()}
            mix = fit_layer_mix(found["train"], answers["train"], found["valid"], answers["valid"])
            out[name]["mix"] = float((mix.predict(found["test"]) == answers["test"]).mean())
    sides = {"train": labels.train, "valid": labels.valid, "test": labels.test}
    for name, (raw, function) in raw_inputs(preprocessor).items():
        found = {side: extract(raw.labelled(part), function) for side, part in sides.items()}
        out[name] = _probed(found, answers, labels.train.task)
    return out


def _probed(
    found: dict[str, np.ndarray], answers: dict[str, np.ndarray], task: str
) -> dict[str, float]:
    parts = (found["train"], answers["train"], found["valid"], answers["valid"])
    if task == "regression":
        guess = ridge_probe(*parts).predict(found["test"])
        return {"linear": float(spearman(answers["test"].tolist(), guess.tolist()))}
    near = knn_accuracy(found["train"], answers["train"], found["test"], answers["test"])
    guess = fit_linear_probe(*parts).predict(found["test"])
    return {"knn": float(near), "linear": float((guess == answers["test"]).mean())}
