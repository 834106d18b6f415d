"""Detectors of anomalies side by side: what a pre-trained model finds, and what needs no training.

Nothing here sees an anomaly before the test: every detector is fitted on the rows that the model
was pre-trained on, and its threshold comes from the rows that were held out of them.

| detector             | score of an item                                                        |
|----------------------|-------------------------------------------------------------------------|
| reconstruction error | the model's squared error, see `anomaly.py`                             |
| latent density       | Mahalanobis distance of the encoder's vector from those of the training |
|                      | rows; covariance shrunk (Ledoit and Wolf, 2004, J. Multivar. Anal. 88)  |
| PCA                  | squared error of a rebuilding from the components that hold 95% of the  |
|                      | training rows' variance                                                 |
| kNN                  | distance to the fifth nearest training row (Ramaswamy et al., 2000)     |
| isolation forest     | 100 trees (Liu, Ting and Zhou, 2008, ICDM)                              |
| z-score              | largest distance of a value from its mean, in standard deviations       |

The lower four read what the network reads: encoded rows, or pixels.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from selfsup import console, registry
from selfsup.batch import Batch
from selfsup.config import read_toml, run_config
from selfsup.data.dataset import Dataset
from selfsup.errors import ConfigError, nearest
from selfsup.evaluation.anomaly import FALSE_ALARM_RATE, detects, error_scores, histogram
from selfsup.evaluation.frozen import extract, raw_features
from selfsup.evaluation.metrics import area_under_roc, average_precision, threshold_for
from selfsup.model import Model
from selfsup.randomness import Order
from selfsup.training.device import to_device

EXPLAINED = 0.95
NEIGHBOURS = 5
TREES = 100
MAX_VALUES = 20_000_000  # of the training rows that detectors are fitted on; beyond it, a sample

Rows = Float[np.ndarray, "items inputs"]
Score = Callable[[Rows], Float[np.ndarray, " items"]]


def gaussian(train: Rows, seed: int) -> Score:
    """Mahalanobis distance from the training rows; `seed` has no meaning here."""
    from sklearn.covariance import LedoitWolf

    fitted = LedoitWolf().fit(train)
    return lambda rows: np.sqrt(fitted.mahalanobis(rows))


def principal(train: Rows, seed: int) -> Score:
    """Squared error of what the principal components leave; `seed` has no meaning here."""
    from sklearn.decomposition import PCA

    fitted = PCA(EXPLAINED, svd_solver="full").fit(train)
    return lambda rows: np.square(rows - fitted.inverse_transform(fitted.transform(rows))).sum(1)


def neighbours(train: Rows, seed: int) -> Score:
    """Distance to the fifth nearest training row; `seed` has no meaning here."""
    from sklearn.neighbors import NearestNeighbors

    fitted = NearestNeighbors(n_neighbors=min(NEIGHBOURS, len(train))).fit(train)
    return lambda rows: fitted.kneighbors(rows)[0][:, -1]


def forest(train: Rows, seed: int) -> Score:
    """How soon random splits set a row apart."""
    from sklearn.ensemble import IsolationForest

    fitted = IsolationForest(n_estimators=TREES, random_state=seed).fit(train)
    return lambda rows: -fitted.score_samples(rows)


def largest_deviation(train: Rows, seed: int) -> Score:
    """The largest |z|; a value that never changed in training counts as it is.

    `seed` has no meaning here.
    """
    from sklearn.preprocessing import StandardScaler

    fitted = StandardScaler().fit(train)
    return lambda rows: np.abs(fitted.transform(rows)).max(1)


CONTROLS: dict[str, Callable[[Rows, int], Score]] = {
    "PCA": principal,
    "kNN": neighbours,
    "isolation forest": forest,
    "z-score": largest_deviation,
}


def evaluate(
    model: Model,
    run: str | Path,
    data: str | Path | None,
    columns: dict[str, Any],
    normal: str | None,
) -> dict[str, Any]:
    """How well each detector tells normal items from all others.

    Args:
        model: pre-trained by a method that rebuilds its input.
        run: its folder; the corpus that run.toml names is read again.
        data: labelled items.
        columns: names of the columns, as for `read_labels`.
        normal: the label of normal items; None: see `normal_label`.

    Returns:
        `scores` by detector: `auroc`, `average_precision`, and at the threshold of 1% false alarms
        on held-out items the shares `normals_flagged` and `anomalies_caught`; `histograms` by
        detector, see `anomaly.histogram`; the `normal` label; the source of the `data`; numbers of
        `normals`, `anomalies` and `held_out` items.

    Raises:
        ConfigError: the model rebuilds neither table rows nor pictures, there are no data, or the
            normal label must be said.
        DataError: an item cannot be read as the model reads it.
    """
    if not detects(model):
        section = model.values.get("method") or model.values["task"]
        raise ConfigError(
            f"a {section['name']} run does not tell anomalies: a label for a pre-trained run, and "
            "normal, are for an autoencoder or a vae of table rows or pictures"
        )
    if data is None:
        raise ConfigError("anomalies are told from labelled items: give --data")
    values = read_toml(Path(run) / "run.toml")
    config = run_config({k: values[k] for k in ("data", "model", "method", "training")})
    module = registry.module_of(registry.DATA, "data", config.data_name)
    test = module.read_labels(data, "classification", **columns)
    chosen = normal_label(test.names, normal, values["data"].get("normal", ""))
    again = module.with_preprocessor(config.data, Path(run) / "model")
    corpus = module.prepare(again, values["command"]["source"])
    strange = np.array([label != chosen for label in test.labels])
    parts = (corpus.valid, model.preprocessor.labelled(test))
    found = all_scores(model, corpus.train, parts, config.training.seed)
    console.say(
        f"{(~strange).sum():,} normal ({chosen}), {strange.sum():,} anomalies; thresholds for "
        f"{FALSE_ALARM_RATE:.0%} false alarms from {len(corpus.valid):,} held-out items"
    )
    thresholds = {name: threshold_for(part[0], FALSE_ALARM_RATE) for name, part in found.items()}
    return {
        "scores": {n: judged(part[1], strange, thresholds[n]) for n, part in found.items()},
        "histograms": {n: histogram(part[1], strange, thresholds[n]) for n, part in found.items()},
        "normal": chosen,
        "data": str(data),
        "normals": int((~strange).sum()),
        "anomalies": int(strange.sum()),
        "held_out": len(corpus.valid),
    }


def judged(
    scores: Float[np.ndarray, " items"], strange: Bool[np.ndarray, " items"], threshold: float
) -> dict[str, float]:
    """Ranking quality, and what lies above a threshold.

    >>> judged(np.array([1.0, 3.0, 2.0, 4.0]), np.array([False, False, True, True]), 2.5)
    {'auroc': 0.75, 'average_precision': 0.8333333333333333, 'normals_flagged': 0.5, \
'anomalies_caught': 0.5}
    """
    truth, ranked, above = strange.tolist(), scores.tolist(), scores > threshold
    return {
        "auroc": area_under_roc(truth, ranked, True),
        "average_precision": average_precision(truth, ranked, True),
        "normals_flagged": float(above[~strange].mean()),
        "anomalies_caught": float(above[strange].mean()),
    }


def all_scores(
    model: Model, train: Dataset, parts: Sequence[Dataset], seed: int
) -> dict[str, list[np.ndarray]]:
    """By detector the scores of the items of each part, each (items,)."""
    width = extract(train, raw_features, np.arange(1)).shape[1]
    numbers = Order(len(train), seed)[0 : min(len(train), max(1, MAX_VALUES // width))]
    if len(numbers) < len(train):
        console.say(f"detectors are fitted on {len(numbers):,} of {len(train):,} training items")
    out = {"reconstruction error": [extract(part, error_scores(model)) for part in parts]}
    density = {"latent density": gaussian}
    for features, detectors in ((_pooled(model), density), (raw_features, CONTROLS)):
        rows = extract(train, features, numbers).astype(np.float64)
        others = [extract(part, features).astype(np.float64) for part in parts]
        for name, fit in detectors.items():
            score = fit(rows, seed)
            out[name] = [score(other) for other in others]
    return out


def _pooled(model: Model) -> Callable[[Batch], Tensor]:
    """The encoder's vectors, in float32 as all scores are."""
    return lambda batch: model.encoder.pooled(to_device(batch, model.device))


def normal_label(names: Sequence[str], given: str | None, learned: str) -> str:
    """Which label marks normal items.

    Args:
        names: the labels of the test items.
        given: what the user says; None: the value that the corpus was restricted to where it is a
            label, of "0" and "1" the first, or "normal".
        learned: `data.normal` of the corpus, "column=value" or "".

    Raises:
        ConfigError: there is no such label, or it must be said.

    >>> normal_label(("0", "1"), None, ""), normal_label(("a", "ok"), None, "class=ok")
    ('0', 'ok')
    """
    if given is not None:
        if given not in names:
            raise ConfigError(f"--normal {given}: no such label{nearest(given, names)}")
        return given
    usual = [learned.partition("=")[2], *["0"] * (set(names) == {"0", "1"}), "normal"]
    for name in usual:
        if name in names:
            return name
    shown = ", ".join(sorted(names)[:20])
    raise ConfigError(f"say which label is normal with --normal VALUE; labels: {shown}")
