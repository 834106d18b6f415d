"""Frozen features across groups: does what was learned of some speakers hold for another?

A split that leaves every speaker on both sides measures how well voices are remembered. Here each
group in turn is the test part; another group chooses the probe's settings; the rest fits it, with
all labels or with a few per class and group. The groups themselves are told apart by verification:
do two items come from the same one?
"""

from collections import defaultdict

import numpy as np

from selfsup.data.labels import Labelled
from selfsup.errors import ConfigError, DataError
from selfsup.evaluation.frozen import extract, pooled_features, raw_features
from selfsup.evaluation.probes import fit_linear_probe
from selfsup.evaluation.similarity import (
    cosine_scores,
    equal_error_rate,
    knn_accuracy,
    trial_pairs,
)
from selfsup.model_folder import Model
from selfsup.models.encoder import Encoder
from selfsup.randomness import numpy_generator

MAX_TRIALS = 20_000


def probe_across_groups(
    model: Model,
    untrained: Encoder,
    labelled: Labelled,
    max_length: int | None,
    shots: int = 0,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Leave-one-group-out accuracies and verification of groups, by name of the features.

    Args:
        model: a pre-trained model.
        untrained: the same network with fresh weights.
        labelled: classification examples with `groups`, at least three of them.
        max_length: longest item; None: what this kind of data usually takes.
        shots: labelled examples of each class and group that fit the probe; 0: all.
        seed: draws the shots and the pairs of the verification.

    Returns:
        `linear` and `knn`, mean accuracies over the groups that were left out, and `eer`, the equal
        error rate of telling by the cosine whether two items of different classes share a group.

    Raises:
        ConfigError: another task than classification.
        DataError: fewer than three groups.
    """
    if labelled.task != "classification":
        raise ConfigError(f"groups are left out for classification, not for {labelled.task}")
    names, groups = np.unique(labelled.groups, return_inverse=True)
    if len(names) < 3:
        raise DataError(
            f"{labelled.source}: {len(names)} groups; leaving one out, and another for choosing, "
            "needs at least three"
        )
    preprocessor = model.preprocessor.limited(max_length)
    data = preprocessor.labelled(labelled)
    found = {
        "pretrained": extract(data, pooled_features(model.encoder, model.device)),
        "untrained": extract(data, pooled_features(untrained.to(model.device), model.device)),
        "raw input": extract(preprocessor.raw().labelled(labelled), raw_features),
    }
    return {
        name: left_out_scores(features, data.labels, groups, shots, seed)
        for name, features in found.items()
    }


def left_out_scores(
    features: np.ndarray, labels: np.ndarray, groups: np.ndarray, shots: int, seed: int
) -> dict[str, float]:
    """`linear`, `knn` and `eer` of one kind of features; see `probe_across_groups`.

    Args:
        features: (items, dim).
        labels: (items,) class numbers.
        groups: (items,) group numbers from 0, each of them there.
        shots, seed: as there.
    """
    count, linear, knn = int(groups.max()) + 1, [], []
    for out in range(count):
        chooses = (out + 1) % count
        train = np.flatnonzero((groups != out) & (groups != chooses))
        train = _some(train, labels, groups, shots, seed)
        valid = _some(np.flatnonzero(groups == chooses), labels, groups, shots, seed)
        test = groups == out
        parts = (features[train], labels[train], features[valid], labels[valid])
        guess = fit_linear_probe(*parts).predict(features[test])
        linear.append((guess == labels[test]).mean())
        near = min(20, max(1, len(train) // len(np.unique(labels))))
        knn.append(knn_accuracy(*parts[:2], features[test], labels[test], near))
    generator = numpy_generator(seed, "trials")
    trials = min(MAX_TRIALS, 5 * len(labels))
    pairs, same = trial_pairs(groups, trials, generator, groups=labels)
    # cosines of features as they are say mostly what all items share
    centred = (features - features.mean(0)) / (features.std(0) + 1e-6)
    eer, _ = equal_error_rate(cosine_scores(centred, pairs), same)
    return {"linear": float(np.mean(linear)), "knn": float(np.mean(knn)), "eer": float(eer)}


def _some(
    numbers: np.ndarray, labels: np.ndarray, groups: np.ndarray, shots: int, seed: int
) -> np.ndarray:
    """`shots` items of each class and group, at random; all where `shots` is 0."""
    if not shots:
        return numbers
    taken: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for number in numpy_generator(seed, "shots").permutation(len(labels)):
        taken[int(groups[number]), int(labels[number])].append(int(number))
    wanted = set(numbers.tolist())
    chosen = [n for items in taken.values() for n in items[:shots] if n in wanted]
    return np.sort(np.array(chosen))
