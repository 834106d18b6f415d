"""Frozen features across groups: does what was learned of some speakers hold for another?

A split that leaves every speaker on both sides measures how well voices are remembered. Here each
fold of groups (one each, or several) is the test part in turn. The next fold chooses the probe's
settings, and then joins the rest to fit it once more. Two other numbers stand beside: what a few
labels of each class and group are worth on all that is left, and verification: do two items come
from the same group?

| score    | what it is                                                                      |
|----------|---------------------------------------------------------------------------------|
| `linear` | accuracy on the groups left out, by a linear probe of the last layer            |
| `knn`    | the same by the nearest neighbours                                              |
| `mix`    | the same by a linear probe on a learned weighted sum of all layers              |
| `few`    | accuracy of a linear probe with `shots` labels of each class and group, on the  |
|          | other items of the same groups; mean over several draws                         |
| `eer`    | equal error rate of telling by the cosine whether two items of different        |
|          | classes share a group: chance 0.5, lower is better                              |

Axes: item; layer; dim.
"""

from collections import defaultdict
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int

from selfsup.data.labels import Labelled
from selfsup.errors import ConfigError, DataError
from selfsup.evaluation.frozen import extract, layer_features, pooled_features, raw_inputs
from selfsup.evaluation.layer_mix import fit_layer_mix
from selfsup.evaluation.probes import fit_linear_probe
from selfsup.evaluation.similarity import (
    cosine_scores,
    equal_error_rate,
    knn_accuracy,
    trial_pairs,
)
from selfsup.model import Model
from selfsup.models.encoder import Encoder
from selfsup.randomness import numpy_generator

MAX_TRIALS = 20_000
FEW_DRAWS = 5
FEW_STRENGTH = 0.1  # L2 penalty of the few-label probe: so few labels choose nothing

Split = tuple[np.ndarray, np.ndarray, np.ndarray]


def probe_across_groups(
    model: Model,
    untrained: Encoder,
    labelled: Labelled,
    max_length: int | None,
    folds: int = 0,
    shots: int = 1,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Scores on groups that were left out, and verification of groups, by name of the features.

    Args:
        model: a pre-trained model.
        untrained: the same network with fresh weights.
        labelled: classification examples with `groups`, at least three of them.
        max_length: longest item; None: what this kind of data usually takes.
        folds: parts that the groups are dealt to; 0: one for each group.
        shots: labels of each class and group for `few`.
        seed: draws those labels and the pairs of the verification.

    Returns:
        the scores of the table above; `mix` only for networks with several layers.

    Raises:
        ConfigError: another task than classification, or fewer than three folds.
        DataError: fewer than three groups.
    """
    if labelled.task != "classification":
        raise ConfigError(f"groups are left out for classification, not for {labelled.task}")
    if folds and folds < 3:
        raise ConfigError(f"folds must be at least 3: one scores, one chooses, got {folds}")
    names, groups = np.unique(labelled.groups, return_inverse=True)
    if len(names) < 3:
        raise DataError(
            f"{labelled.source}: {len(names)} groups; leaving one out, and another for choosing, "
            "needs at least three"
        )
    preprocessor = model.preprocessor.limited(max_length)
    data = preprocessor.labelled(labelled)
    dealt = groups % folds if folds else groups
    out = {}
    for name, encoder in (("pretrained", model.encoder), ("untrained", untrained.to(model.device))):
        features = extract(data, pooled_features(encoder, model.device))
        out[name] = left_out_scores(features, data.labels, dealt)
        if encoder.num_layers > 1:
            layers = extract(data, layer_features(encoder, model.device))
            out[name]["mix"] = left_out_mix(layers, data.labels, dealt)
        out[name] |= within_groups(features, data.labels, groups, shots, seed)
    for name, (raw, function) in raw_inputs(preprocessor).items():
        features = extract(raw.labelled(labelled), function)
        out[name] = left_out_scores(features, data.labels, dealt)
        out[name] |= within_groups(features, data.labels, groups, shots, seed)
    return out


def left_out_scores(
    features: Float[np.ndarray, "item dim"],
    labels: Int[np.ndarray, " item"],
    folds: Int[np.ndarray, " item"],
) -> dict[str, float]:
    """`linear` and `knn`: mean accuracies over the folds that were left out.

    Args:
        features: one vector per item.
        labels: class numbers.
        folds: fold numbers from 0, each of them there.
    """
    linear, knn = [], []
    for train, valid, test in _splits(folds):
        parts = features[train], labels[train], features[valid], labels[valid]
        strength = fit_linear_probe(*parts).strength
        both = np.concatenate([train, valid])
        known = features[both], labels[both]
        probe = fit_linear_probe(*known, *parts[2:], strengths=[strength])
        linear.append((probe.predict(features[test]) == labels[test]).mean())
        near = min(20, max(1, len(both) // len(np.unique(labels))))
        knn.append(knn_accuracy(*known, features[test], labels[test], near))
    return {"linear": float(np.mean(linear)), "knn": float(np.mean(knn))}


def left_out_mix(
    layers: Float[np.ndarray, "item layer dim"],
    labels: Int[np.ndarray, " item"],
    folds: Int[np.ndarray, " item"],
) -> float:
    """As `left_out_scores`, by a linear classifier on a learned weighted sum of layers."""
    scores = []
    for train, valid, test in _splits(folds):
        parts = layers[train], labels[train], layers[valid], labels[valid]
        rate = fit_layer_mix(*parts).rate
        both = np.concatenate([train, valid])
        mix = fit_layer_mix(layers[both], labels[both], *parts[2:], rates=[rate])
        scores.append((mix.predict(layers[test]) == labels[test]).mean())
    return float(np.mean(scores))


def within_groups(
    features: Float[np.ndarray, "item dim"],
    labels: Int[np.ndarray, " item"],
    groups: Int[np.ndarray, " item"],
    shots: int,
    seed: int,
) -> dict[str, float]:
    """`few` and `eer`; see the module's docstring."""
    scores = []
    for draw in range(FEW_DRAWS):
        known = _some(labels, groups, shots, seed + draw)
        rest = np.setdiff1d(np.arange(len(labels)), known)
        if not len(rest):
            raise DataError(f"{shots} labels of each class and group are all there are")
        parts = features[known], labels[known], features[known], labels[known]
        probe = fit_linear_probe(*parts, strengths=[FEW_STRENGTH])
        scores.append((probe.predict(features[rest]) == labels[rest]).mean())
    trials = min(MAX_TRIALS, 5 * len(labels))
    pairs, same = trial_pairs(groups, trials, numpy_generator(seed, "trials"), groups=labels)
    # cosines of features as they are say mostly what all items share
    centred = (features - features.mean(0)) / (features.std(0) + 1e-6)
    eer, _ = equal_error_rate(cosine_scores(centred, pairs), same)
    return {"few": float(np.mean(scores)), "eer": float(eer)}


def _splits(folds: np.ndarray) -> Iterator[Split]:
    """Numbers of the items that fit, choose and score, for each fold in turn."""
    count = int(folds.max()) + 1
    for out in range(count):
        chooses = (out + 1) % count
        train = np.flatnonzero((folds != out) & (folds != chooses))
        yield train, np.flatnonzero(folds == chooses), np.flatnonzero(folds == out)


def _some(labels: np.ndarray, groups: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """`shots` items of each class and group, at random."""
    taken: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for number in numpy_generator(seed, "shots").permutation(len(labels)):
        taken[int(groups[number]), int(labels[number])].append(int(number))
    return np.sort(np.array([n for items in taken.values() for n in items[:shots]]))
