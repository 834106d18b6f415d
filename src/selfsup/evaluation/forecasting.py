"""Long-term forecasts: what features of an encoder say about the future, beside simple baselines.

The protocol of the ETT benchmarks (Informer, Zhou et al., 2021, arXiv 2012.07436): series are split
by time and standardised by their training rows, `horizon` rows are forecast from the `history`
before them, and errors are means over all windows of the test part, none dropped, on the
standardised scale.

| forecast                         | what it is                                                    |
|----------------------------------|---------------------------------------------------------------|
| the encoder's name               | a frozen encoder reads the history of one channel; its hidden |
|                                  | vectors, side by side, go through one linear map for all      |
|                                  | channels (PatchTST, Nie et al., 2022, arXiv 2211.14730,       |
|                                  | section 3.1)                                                  |
| the encoder's name + lags        | the same with the history itself beside the hidden vectors,   |
|                                  | which has the penalty of ridge on lags: what features add     |
| `ridge on N lags`                | the future of a channel is linear in its last N values, all   |
|                                  | less their mean; one map for all channels                     |
| `ridge on N lags, by channel`    | a map of its own for each channel                             |
| `last value`                     | each channel stays where it is                                |

Linear maps on lags are hard to beat (Zeng et al., 2022, arXiv 2205.13504; Toner and Darlow, 2024,
arXiv 2403.14587), so a forecast of an encoder is never shown without them.

All maps are ridge regressions in closed form, with an intercept that is not penalised, fitted on
the training part; their strength is the one with the least squared error on the validation part. So
there is no randomness and no learning rate. PatchTST trains its linear head with Adam instead.

Axes: window; channel; row: one channel of one window; time; feature; horizon.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import scipy
import torch
from jaxtyping import Float
from torch import Tensor

from selfsup.batch import SeriesSpec
from selfsup.data.series_windows import windows
from selfsup.errors import ConfigError, DataError
from selfsup.methods.generative.masked_series import instance_statistics
from selfsup.models.transformer import TransformerEncoder
from selfsup.training.device import autocast, pick_dtype, to_device

ALPHAS = (0.1, 1.0, 10.0, 100.0, 1e3, 1e4, 1e5, 1e6)
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

Penalty = float | np.ndarray
"""Of all features or of each, (feature,); inf: this one is not read."""


def forecast(
    encoders: dict[str, TransformerEncoder],
    parts: dict[str, np.ndarray],
    columns: Sequence[str],
    history: int,
    horizon: int,
    *,
    lags: Iterable[int] = (),
    alphas: Sequence[float] = ALPHAS,
    instance_norm: bool = True,
) -> dict[str, Score]:
    """Errors of encoders and of the baselines.

    Args:
        encoders: of one channel (`data.independent = true`), by name. An untrained encoder is a
            baseline too.
        parts: as `data.series.splits` gives them.
        columns: names of the channels.
        history: rows that are read; an encoder reads as many of the last as fill whole patches.
        horizon: rows that are forecast.
        lags: numbers of rows that ridge reads, beside `history`.
        alphas: penalties to try, as scikit-learn's `Ridge` counts them.
        instance_norm: give an encoder channels of mean 0 and deviation 1 in each window, and bring
            its forecast back, as in `masked_series`.

    Raises:
        DataError: a part is too short, or values are missing.
        ConfigError: an encoder that reads several channels at once.
    """
    if any(np.isnan(part).any() for part in parts.values()):
        raise DataError(
            "forecasts are measured on complete series; fill the missing values first, or choose "
            "columns without any"
        )
    scores, alone = {}, 0.0
    each = [{n: part[:, c : c + 1] for n, part in parts.items()} for c in range(len(columns))]
    for count in sorted({history, *lags}):
        ((errors, chosen),) = fit_and_score(_lag_rows(parts, count, horizon), alphas)
        scores[f"ridge on {count} lags"] = _score(errors, (alphas[chosen],), columns)
        alone = alphas[chosen] if count == history else alone
        apart = [fit_and_score(_lag_rows(one, count, horizon), alphas)[0] for one in each]
        scores[f"ridge on {count} lags, by channel"] = _score(
            np.stack([errors for errors, _ in apart], 2).reshape(2, -1),
            tuple(alphas[chosen] for _, chosen in apart),
            columns,
        )
    scores["last value"] = last_value(parts, columns, history, horizon)
    learned = {}
    for name, encoder in encoders.items():
        rows, hidden = _feature_rows(encoder, parts, history, horizon, instance_norm)
        sweeps = [
            [np.where(hidden, alpha, beside) for alpha in alphas] for beside in (np.inf, alone)
        ]
        found = fit_and_score(rows, *sweeps)
        for title, (errors, chosen) in zip((name, f"{name} + lags"), found, strict=True):
            learned[title] = _score(errors, (alphas[chosen],), columns)
    return learned | scores


def last_value(
    parts: dict[str, np.ndarray], columns: Sequence[str], history: int, horizon: int
) -> Score:
    """Every channel keeps the last value of its history."""
    errors = []
    for past, future in _folded(parts, "test", history, horizon):
        error = future.astype(np.float64) - past[:, -1:]  # (row, horizon)
        errors.append((np.square(error).mean(1), np.abs(error).mean(1)))
    return _score(np.concatenate(errors, 1), (), columns)


def fit_and_score(rows: Part, *sweeps: Sequence[Penalty]) -> list[tuple[np.ndarray, int]]:
    """Fits on train, chooses on valid, forecasts test.

    Returns:
        for each sweep of penalties, which rise: the mean squared and absolute error of each test
        row, (2, row), and the number of the chosen penalty.
    """
    fitted = fit_ridge(rows("train"), [penalty for sweep in sweeps for penalty in sweep])
    mse = forecast_errors(rows("valid"), fitted)[0].mean(1)
    begins = np.cumsum([0, *map(len, sweeps[:-1])]).tolist()
    chosen = []
    for begin, sweep in zip(begins, sweeps, strict=True):
        here = mse[begin : begin + len(sweep)]
        chosen.append(len(sweep) - 1 - int(np.argmin(here[::-1])))  # the greatest of equals
    maps = [fitted[begin + number] for begin, number in zip(begins, chosen, strict=True)]
    errors = forecast_errors(rows("test"), maps)  # (2, sweep, row)
    return [(errors[:, place], number) for place, number in enumerate(chosen)]


def fit_ridge(batches: Iterable[Rows], penalties: Sequence[Penalty]) -> list[Linear]:
    """Ridge regression for every penalty, from moments that are summed batch by batch.

    Minimises sum(scale² * |(future - centre) / scale - features @ weight - bias|²), the squared
    error of the forecast itself, + sum(penalty * weight²).
    """
    xx: Any = 0.0
    xy: Any = 0.0
    for batch in batches:
        known = np.pad(batch.features.astype(np.float64), ((0, 0), (0, 1)), constant_values=1.0)
        known *= batch.scale  # (row, feature + 1)
        xx += known.T @ known
        xy += known.T @ (batch.future.astype(np.float64) - batch.centre)
    total, mean_x, mean_y = xx[-1, -1], xx[-1, :-1] / xx[-1, -1], xy[-1] / xx[-1, -1]
    xx = xx[:-1, :-1] - total * np.outer(mean_x, mean_x)
    xy = xy[:-1] - total * np.outer(mean_x, mean_y)
    out = []
    for penalty in penalties:
        each = np.broadcast_to(penalty, len(xx))
        read = np.flatnonzero(np.isfinite(each))
        penalised = xx[np.ix_(read, read)] + np.diag(each[read])
        weight = np.zeros_like(xy)
        weight[read] = scipy.linalg.solve(penalised, xy[read], assume_a="pos", overwrite_a=True)
        out.append(Linear(weight, mean_y - mean_x @ weight))
    return out


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
    parts: dict[str, np.ndarray], name: str, history: int, horizon: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Past (row, history) and future (row, horizon) of one part, some windows at a time."""
    pairs = windows(parts, name, history, horizon)
    for at in range(0, len(pairs[0]), BATCH):
        past, future = (np.concatenate(s[at : at + BATCH].swapaxes(1, 2)) for s in pairs)
        yield past, future


def _lag_rows(parts: dict[str, np.ndarray], lags: int, horizon: int) -> Part:
    def rows(name: str) -> Iterator[Rows]:
        for past, future in _folded(parts, name, lags, horizon):
            read = past.astype(np.float64)
            mean = read.mean(1, keepdims=True)
            yield Rows(read - mean, future, mean, np.ones_like(mean))

    return rows


def _feature_rows(
    encoder: TransformerEncoder,
    parts: dict[str, np.ndarray],
    history: int,
    horizon: int,
    instance_norm: bool,
) -> tuple[Part, np.ndarray]:
    """Hidden vectors of the history and behind them what was read; and which are the former."""
    if not isinstance(encoder.spec, SeriesSpec) or encoder.spec.channels != 1:
        raise ConfigError(
            f"forecasts read channel by channel, but this encoder reads {encoder.spec}; pre-train "
            "it with data.independent = true"
        )
    positions = history // encoder.config.patch
    used = positions * encoder.config.patch

    def rows(name: str) -> Iterator[Rows]:
        for past, future in _folded(parts, name, history, horizon):
            read = torch.from_numpy(past[:, history - used :, None].copy())  # (row, time, 1)
            mean, std = torch.zeros(len(read), 1, 1), torch.ones(len(read), 1, 1)
            if instance_norm:
                mean, std = instance_statistics(read)
            read = (read - mean) / std
            features = np.concatenate([_encoded(encoder, read), read[:, :, 0].numpy()], 1)
            yield Rows(features, future, mean[:, 0].numpy(), std[:, 0].numpy())

    return rows, np.repeat([True, False], [positions * encoder.dim, used])


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
