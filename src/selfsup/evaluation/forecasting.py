"""Long-term forecasts: what features of an encoder say about the future, beside simple baselines.

The protocol of the ETT benchmarks (Informer, Zhou et al., 2021, arXiv 2012.07436): series are split
by time and standardised by their training rows, `horizon` rows are forecast from the `history`
before them, and errors are means over all windows of the test part, none dropped, on the
standardised scale.

| forecast                     | what it is                                                        |
|------------------------------|-------------------------------------------------------------------|
| `last value`                 | each channel stays where it is                                    |
| `ridge on lags`              | the future of a channel is linear in its last `lags` values, all  |
|                              | less their mean; one map for all channels                         |
| `ridge on lags, by channel`  | a map of its own for each channel                                 |
| `ridge on features`          | a frozen encoder reads the history of one channel; its hidden     |
|                              | vectors, side by side, go through one linear map for all channels |
|                              | (PatchTST, Nie et al., 2022, arXiv 2211.14730, section 3.1)       |

Linear maps on lags are hard to beat (Zeng et al., 2022, arXiv 2205.13504; Toner and Darlow, 2024,
arXiv 2403.14587), so a forecast of an encoder is never shown without them.

All maps are ridge regressions in closed form, with an intercept that is not penalised, fitted on
the training part; their strength is the one with the least squared error on the validation part. So
there is no randomness and no learning rate. PatchTST trains its linear head with Adam instead.

Axes: window; channel; row: one channel of one window; time; feature; horizon.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from scipy import linalg
from torch import Tensor

from selfsup.batch import SeriesSpec
from selfsup.data.series_windows import windows
from selfsup.errors import ConfigError, DataError
from selfsup.methods.generative.masked_series import instance_statistics
from selfsup.models.transformer import TransformerEncoder
from selfsup.training.device import autocast, pick_dtype, to_device

ALPHAS = (0.1, 1.0, 10.0, 100.0, 1e3, 1e4, 1e5)
BATCH = 256  # windows that are held at once


@dataclass(frozen=True)
class Score:
    """Errors on the standardised scale, over all test windows.

    Attributes:
        mse, mae: means over windows, steps and channels.
        columns: (mse, mae) of each channel.
        alphas: the penalties that were best on the validation part: one for each channel, or one
            for all; () where nothing is fitted. At an edge of the sweep, widen it.
    """

    mse: float
    mae: float
    columns: dict[str, tuple[float, float]]
    alphas: tuple[float, ...] = ()


class Rows(NamedTuple):
    """Some rows to fit or to forecast: the future is `centre` + `scale` * (linear in features).

    Attributes:
        features: (row, feature).
        future: (row, horizon), on the standardised scale.
        centre, scale: (row, 1).
    """

    features: np.ndarray
    future: np.ndarray
    centre: np.ndarray
    scale: np.ndarray


class Linear(NamedTuple):
    """A fitted map: (feature, horizon) and (horizon,), float64."""

    weight: np.ndarray
    bias: np.ndarray


Part = Callable[[str], Iterable[Rows]]
"""The rows of train, valid or test, in the order of (window, channel)."""


def forecast(
    encoder: TransformerEncoder | None,
    parts: dict[str, np.ndarray],
    columns: Sequence[str],
    history: int,
    horizon: int,
    *,
    lags: int = 0,
    alphas: Sequence[float] = ALPHAS,
    instance_norm: bool = True,
    stride: int = 1,
) -> dict[str, Score]:
    """Errors of the baselines and, where there is one, of an encoder.

    Args:
        encoder: of one channel (`data.independent = true`); None: the baselines alone. An untrained
            encoder is a baseline too.
        parts: what `data.series.splits` gave.
        columns: names of the channels.
        history: rows that are read; an encoder reads as many of the last as fill whole patches.
        horizon: rows that are forecast.
        lags: rows that the ridge baselines read, at most `history`; 0: all.
        alphas: penalties to try, as scikit-learn's `Ridge` counts them.
        instance_norm: give the encoder channels of mean 0 and deviation 1 in each window, and bring
            its forecast back, as in `masked_series`.
        stride: training windows from one that the encoder's map is fitted on to the next; more
            saves time, as neighbours are nearly equal.

    Raises:
        DataError: a part is too short, or values are missing.
        ConfigError: more lags than history, or an encoder that reads several channels at once.
    """
    if lags > history:
        raise ConfigError(f"lags = {lags} reach further back than the history of {history} rows")
    if any(np.isnan(part).any() for part in parts.values()):
        raise DataError(
            "forecasts are measured on complete series; fill the missing values first, or choose "
            "columns without any"
        )
    lags = lags or history
    each = [{n: part[:, c : c + 1] for n, part in parts.items()} for c in range(len(columns))]
    apart = [fit_and_score(_lag_rows(one, history, horizon, lags), alphas) for one in each]
    together = fit_and_score(_lag_rows(parts, history, horizon, lags), alphas)
    scores = {
        "last value": last_value(parts, columns, history, horizon),
        "ridge on lags": _score(*together, columns),
        "ridge on lags, by channel": _score(
            np.stack([errors for errors, _ in apart], 2).reshape(2, -1),
            tuple(alpha for _, (alpha,) in apart),
            columns,
        ),
    }
    if encoder is not None:
        rows = _feature_rows(encoder, parts, history, horizon, instance_norm, stride)
        scores["ridge on features"] = _score(*fit_and_score(rows, alphas), columns)
    return scores


def last_value(
    parts: dict[str, np.ndarray], columns: Sequence[str], history: int, horizon: int
) -> Score:
    """Every channel keeps the last value of its history."""
    errors = []
    for past, future in _folded(parts, "test", history, horizon):
        error = future.astype(np.float64) - past[:, -1:]  # (row, horizon)
        errors.append((np.square(error).mean(1), np.abs(error).mean(1)))
    return _score(np.concatenate(errors, 1), (), columns)


def fit_and_score(rows: Part, alphas: Sequence[float]) -> tuple[np.ndarray, tuple[float, ...]]:
    """Fits on train, chooses on valid, forecasts test.

    Returns:
        the mean squared and absolute error of each test row, (2, row), and the one chosen penalty.
    """
    fitted = fit_ridge(rows("train"), alphas)
    mse = forecast_errors(rows("valid"), fitted)[0].mean(1)  # (alpha,)
    best = len(alphas) - 1 - int(np.argmin(mse[::-1]))  # of equals the last, the most regularised
    return forecast_errors(rows("test"), [fitted[best]])[:, 0], (alphas[best],)


def fit_ridge(batches: Iterable[Rows], alphas: Sequence[float]) -> list[Linear]:
    """Ridge regression for every penalty, from moments that are summed batch by batch.

    Minimises sum(scale² * |(future - centre) / scale - features @ weight - bias|²), the squared
    error of the forecast itself, + alpha * |weight|².
    """
    moments = np.asarray(sum(map(_moments, batches)))
    size = len(moments) - 1
    xx, xy = moments[:size, :size], moments[:size, size + 1 :]
    total, mean_x, mean_y = moments[size, size], moments[size, :size], moments[size, size + 1 :]
    mean_x, mean_y = mean_x / total, mean_y / total
    xx, xy = xx - total * np.outer(mean_x, mean_x), xy - total * np.outer(mean_x, mean_y)
    out = []
    for alpha in alphas:
        weight = linalg.solve(xx + alpha * np.eye(len(xx)), xy, assume_a="pos")
        out.append(Linear(weight, mean_y - mean_x @ weight))
    return out


def _moments(batch: Rows) -> np.ndarray:
    """Weighted sums of products of (features, 1) with (features, 1, future)."""
    future = (batch.future.astype(np.float64) - batch.centre) / batch.scale
    known = np.pad(batch.features.astype(np.float64), ((0, 0), (0, 1)), constant_values=1.0)
    importance = np.square(batch.scale, dtype=np.float64)  # (row, 1)
    return (known * importance).T @ np.concatenate([known, future], 1)


def forecast_errors(batches: Iterable[Rows], fitted: Sequence[Linear]) -> np.ndarray:
    """Squared and absolute error of each map and row, means over the horizon: (2, map, row)."""
    out = []
    for batch in batches:
        features = batch.features.astype(np.float64)
        for_each = []
        for weight, bias in fitted:
            guess = batch.centre + batch.scale * (features @ weight + bias)
            error = guess - batch.future
            for_each.append((np.square(error).mean(1), np.abs(error).mean(1)))
        out.append(np.array(for_each).swapaxes(0, 1))  # (2, map, row)
    return np.concatenate(out, 2)


def _folded(
    parts: dict[str, np.ndarray], name: str, history: int, horizon: int, step: int = 1
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Past (row, history) and future (row, horizon) of one part, some windows at a time."""
    pairs = windows(parts, name, history, horizon)
    for at in range(0, len(pairs[0]), BATCH * step):
        here = slice(at, at + BATCH * step, step)
        past, future = (np.concatenate(some[here].swapaxes(1, 2)) for some in pairs)
        yield past, future


def _lag_rows(parts: dict[str, np.ndarray], history: int, horizon: int, lags: int) -> Part:
    def rows(name: str) -> Iterator[Rows]:
        for past, future in _folded(parts, name, history, horizon):
            read = past[:, -lags:].astype(np.float64)
            mean = read.mean(1, keepdims=True)
            yield Rows(read - mean, future, mean, np.ones_like(mean))

    return rows


def _feature_rows(
    encoder: TransformerEncoder,
    parts: dict[str, np.ndarray],
    history: int,
    horizon: int,
    instance_norm: bool,
    stride: int,
) -> Part:
    if not isinstance(encoder.spec, SeriesSpec) or encoder.spec.channels != 1:
        raise ConfigError(
            f"forecasts read channel by channel, but this encoder reads {encoder.spec}; pre-train "
            "it with data.independent = true"
        )
    used = history // encoder.config.patch * encoder.config.patch

    def rows(name: str) -> Iterator[Rows]:
        step = stride if name == "train" else 1
        for past, future in _folded(parts, name, history, horizon, step):
            series = torch.from_numpy(past[:, history - used :, None].copy())  # (row, time, 1)
            mean, std = torch.zeros(len(series), 1, 1), torch.ones(len(series), 1, 1)
            if instance_norm:
                mean, std = instance_statistics(series)
            features = _encoded(encoder, (series - mean) / std)
            yield Rows(features, future, mean[:, 0].numpy(), std[:, 0].numpy())

    return rows


@torch.no_grad()
def _encoded(
    encoder: TransformerEncoder, series: Float[Tensor, "row time 1"]
) -> Float[np.ndarray, "row feature"]:
    """All hidden vectors of the last layer side by side."""
    training, device = encoder.training, next(encoder.parameters()).device
    encoder.eval()
    with autocast(device, pick_dtype("auto", device)):
        last = encoder(to_device({"series": series}, device)).last
    encoder.train(training)
    return last.flatten(1).float().cpu().numpy()


def _score(errors: np.ndarray, alphas: tuple[float, ...], columns: Sequence[str]) -> Score:
    """From squared and absolute errors, (2, row), rows in the order of (window, channel)."""
    mse, mae = errors.reshape(2, -1, len(columns)).mean(1).tolist()
    each = dict(zip(columns, zip(mse, mae, strict=True), strict=True))
    return Score(float(np.mean(mse)), float(np.mean(mae)), each, alphas)
