"""Forecasts: ridge against scikit-learn, errors against loops, and no look into the future."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from selfsup.batch import SeriesSpec
from selfsup.errors import ConfigError, DataError
from selfsup.evaluation.forecasting import (
    Linear,
    Rows,
    Score,
    fit_ridge,
    forecast,
    forecast_errors,
    last_value,
)
from selfsup.models.transformer import Config as Model
from selfsup.models.transformer import TransformerEncoder
from selfsup.randomness import isolated, numpy_generator, seed_layers

COLUMNS = ("load", "heat", "wind")
HISTORY, HORIZON, PATCH = 12, 4, 5
ALPHAS = (0.1, 10.0)


def parts(noise: float = 0.3, seed: int = 0) -> dict[str, np.ndarray]:
    """Three noisy sines of their own periods, offsets and sizes, float32 as `splits` gives them."""
    draw = numpy_generator(seed, "parts")
    step = np.arange(400)[:, None]
    rows = [1.0, -2.0, 0.0] + np.sin(step / [2.0, 3.0, 5.0]) * [1.0, 0.5, 2.0]
    rows = (rows + noise * draw.normal(size=rows.shape)).astype(np.float32)
    return {"train": rows[:280], "valid": rows[280:330], "test": rows[330:]}


def build(channels: int = 1) -> TransformerEncoder:
    spec = SeriesSpec(channels=channels, length=HISTORY)
    config = Model(dim=8, layers=1, heads=2, patch=PATCH, dropout=0.5, init_std=0.3)
    with isolated():
        seed_layers(0, "model")
        return TransformerEncoder(config, spec)


def slow_pairs(
    data: dict[str, np.ndarray], part: str, history: int = HISTORY
) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """(channel, past, future) in the order of (window, channel), float64, by counting rows."""
    rows = np.concatenate([data["train"], data["valid"], data["test"]]).astype(np.float64)
    begin = {"train": 0, "valid": 280, "test": 330}[part]
    first = begin + history if part == "train" else begin
    last = begin + len(data[part]) - HORIZON
    return [
        (channel, rows[at - history : at, channel], rows[at : at + HORIZON, channel])
        for at in range(first, last + 1)
        for channel in range(3)
    ]


def slow_errors(guesses: list[np.ndarray], pairs: list) -> tuple[float, float]:
    squared, absolute = [], []
    for guess, (_, _, future) in zip(guesses, pairs, strict=True):
        for said, true in zip(guess, future, strict=True):
            squared.append((said - true) ** 2)
            absolute.append(abs(said - true))
    return sum(squared) / len(squared), sum(absolute) / len(absolute)


def assert_scored(score: Score, guesses: list[np.ndarray], pairs: list) -> None:
    """The score equals a loop, on the whole and for each channel."""
    assert (score.mse, score.mae) == pytest.approx(slow_errors(guesses, pairs), rel=1e-4)
    for number, name in enumerate(COLUMNS):
        chosen = [i for i, (channel, _, _) in enumerate(pairs) if channel == number]
        expected = slow_errors([guesses[i] for i in chosen], [pairs[i] for i in chosen])
        assert score.columns[name] == pytest.approx(expected, rel=1e-4)


def sklearn_forecasts(train: list, other: list, alpha: float) -> list[np.ndarray]:
    """From past to future, both less the mean of the past."""
    model = Ridge(alpha).fit(
        [p - p.mean() for _, p, _ in train], [f - p.mean() for _, p, f in train]
    )
    guesses = model.predict([p - p.mean() for _, p, _ in other])
    return [guess + p.mean() for guess, (_, p, _) in zip(guesses, other, strict=True)]


# Ridge


def some_rows(size: int = 60) -> Rows:
    draw = numpy_generator(1, "rows")
    return Rows(
        draw.normal(2, 1, (size, 6)) * [1, 1, 1, 5, 5, 0.1],
        draw.normal(1, 1, (size, 3)),
        draw.normal(size=(size, 1)),
        draw.uniform(0.2, 3, (size, 1)),
    )


def test_ridge_equals_scikit_learns():
    rows = some_rows()
    target, importance = (rows.future - rows.centre) / rows.scale, rows.scale[:, 0] ** 2
    for at in (60, 17):  # one batch, or several
        batches = [Rows(*(some[first : first + at] for some in rows)) for first in range(0, 60, at)]
        for alpha, fitted in zip(ALPHAS, fit_ridge(batches, ALPHAS), strict=True):
            expected = Ridge(alpha).fit(rows.features, target, importance)
            np.testing.assert_allclose(fitted.weight, expected.coef_.T, rtol=1e-8, atol=1e-10)
            np.testing.assert_allclose(fitted.bias, expected.intercept_, rtol=1e-8)


def test_each_feature_may_have_a_penalty_of_its_own():
    rows = some_rows()
    target, importance = (rows.future - rows.centre) / rows.scale, rows.scale[:, 0] ** 2
    each = np.array([0.1, 3.0, 30.0, 1.0, np.inf, 7.0])
    (fitted,) = fit_ridge([rows], [each])
    read = [0, 1, 2, 3, 5]
    narrow = rows.features[:, read] / np.sqrt(each[read])  # then one penalty of 1 is the same
    expected = Ridge(1.0).fit(narrow, target, importance)
    np.testing.assert_allclose(
        fitted.weight[read], expected.coef_.T / np.sqrt(each[read])[:, None], rtol=1e-8, atol=1e-10
    )
    np.testing.assert_allclose(fitted.bias, expected.intercept_, rtol=1e-8)
    assert not fitted.weight[4].any(), "it is not read"


def test_errors_equal_a_loop():
    rows = some_rows(7)
    fitted = [Linear(np.full((6, 3), value), np.arange(3.0)) for value in (0.1, -0.2)]
    got = forecast_errors(
        [Rows(*(some[:4] for some in rows)), Rows(*(some[4:] for some in rows))], fitted
    )
    assert got.shape == (2, 2, 7)
    for number, (weight, bias) in enumerate(fitted):
        for i, (features, future, centre, scale) in enumerate(zip(*rows, strict=True)):
            errors = []
            for h in range(3):
                linear = bias[h] + sum(features[k] * weight[k, h] for k in range(6))
                errors.append(centre[0] + scale[0] * linear - future[h])
            assert got[0, number, i] == pytest.approx(sum(e**2 for e in errors) / 3)
            assert got[1, number, i] == pytest.approx(sum(map(abs, errors)) / 3)


# Baselines


def test_the_last_value():
    data = parts()
    pairs = slow_pairs(data, "test")
    assert len(pairs) == 3 * (70 - HORIZON + 1)
    score = last_value(data, COLUMNS, HISTORY, HORIZON)
    assert_scored(score, [np.repeat(past[-1], HORIZON) for _, past, _ in pairs], pairs)
    assert score.alphas == ()


@pytest.mark.parametrize("lags", [HISTORY, 7, 20])
def test_ridge_on_lags(lags):
    data = parts()
    pairs = {name: slow_pairs(data, name, lags) for name in ("train", "valid", "test")}
    scores = forecast({}, data, COLUMNS, HISTORY, HORIZON, lags=[lags], alphas=ALPHAS)
    names = [
        f"ridge on {n} lags{kind}" for n in sorted({lags, 12}) for kind in ("", ", by channel")
    ]
    assert list(scores) == [*names, "last value"]

    def best(train: list, valid: list) -> float:
        errors = [slow_errors(sklearn_forecasts(train, valid, a), valid)[0] for a in ALPHAS]
        return ALPHAS[int(np.argmin(errors))]

    shared = scores[f"ridge on {lags} lags"]
    assert shared.alphas == (best(pairs["train"], pairs["valid"]),)
    guesses = sklearn_forecasts(pairs["train"], pairs["test"], shared.alphas[0])
    assert_scored(shared, guesses, pairs["test"])

    apart = scores[f"ridge on {lags} lags, by channel"]
    guesses = [np.empty(0)] * len(pairs["test"])
    for channel in range(3):
        train, valid, test = (
            [pair for pair in pairs[name] if pair[0] == channel]
            for name in ("train", "valid", "test")
        )
        assert apart.alphas[channel] == best(train, valid)
        guesses[channel::3] = sklearn_forecasts(train, test, apart.alphas[channel])
    assert_scored(apart, guesses, pairs["test"])


def test_what_can_be_foreseen_is_foreseen():
    data = parts(noise=0.0)
    scores = forecast({"net": build()}, data, COLUMNS, HISTORY, HORIZON, alphas=(1e-6, 1e-3))
    assert scores["ridge on 12 lags, by channel"].mse < 1e-4 < scores["last value"].mse
    assert scores["net"].mse < 0.2 * scores["last value"].mse
    assert scores["net + lags"].mse < scores["net"].mse


# Encoder


@pytest.mark.parametrize("name", ["net", "net + lags"])
@pytest.mark.parametrize("normalised", [True, False])
def test_the_encoders_forecast_equals_a_slow_one(normalised, name):
    data, encoder = parts(), build().train()
    scores = forecast(
        *({"net": encoder}, data, COLUMNS, HISTORY, HORIZON),
        alphas=ALPHAS,
        instance_norm=normalised,
    )
    assert encoder.training, "the mode comes back"
    encoder.eval()

    def described(pairs: list) -> tuple[list, list, list]:
        features, centres, scales = [], [], []
        for _, past, _ in pairs:
            past = past[-10:]  # two patches of five; the two oldest of twelve rows fill none
            mean, std = (past.mean(), math.sqrt(past.var() + 1e-5)) if normalised else (0.0, 1.0)
            series = torch.tensor((past - mean) / std).float().view(1, 10, 1)
            with torch.no_grad():
                hidden = encoder({"series": series}).last.flatten()
            beside = series.flatten() if "lags" in name else series[0, :0, 0]
            features.append((hidden.numpy(), beside.numpy()))
            centres.append(mean)
            scales.append(std)
        return features, centres, scales

    found = {}
    for part in ("train", "valid", "test"):
        pairs = slow_pairs(data, part)
        found[part] = (pairs, *described(pairs))
    pairs, features, centres, scales = found["train"]
    targets = [
        (future - c) / s for (_, _, future), c, s in zip(pairs, centres, scales, strict=True)
    ]
    (of_lags,) = scores["ridge on 12 lags"].alphas

    def joined(seen: list, alpha: float) -> list[np.ndarray]:
        """Lags are scaled so that `alpha` is to them what `of_lags` is to them unscaled."""
        factor = math.sqrt(alpha / of_lags)
        return [np.concatenate([hidden, beside * factor]) for hidden, beside in seen]

    guesses = {}
    for alpha in ALPHAS:
        model = Ridge(alpha).fit(joined(features, alpha), targets, np.square(scales))
        for part in ("valid", "test"):
            pairs, seen, *rest = found[part]
            rows = zip(model.predict(joined(seen, alpha)), *rest, strict=True)
            guesses[alpha, part] = [c + s * linear for linear, c, s in rows]
    valid = [slow_errors(guesses[alpha, "valid"], found["valid"][0])[0] for alpha in ALPHAS]
    chosen = ALPHAS[int(np.argmin(valid))]
    score = scores[name]
    assert score.alphas == (chosen,)
    assert_scored(score, guesses[chosen, "test"], found["test"][0])


def test_the_future_does_not_leak_into_forecasts():
    """With the last test rows changed, only errors of windows that forecast them change."""
    data = parts()
    changed = {**data, "test": data["test"].copy()}
    changed["test"][-1] += 100.0
    before, after = (
        forecast({"net": build()}, some, COLUMNS, HISTORY, HORIZON, alphas=ALPHAS)
        for some in (data, changed)
    )
    for name, score in before.items():
        assert after[name].alphas == score.alphas
        # one step of one window of each channel has another truth, and the forecast is as before
        count = 3 * (70 - HORIZON + 1) * HORIZON
        moved = (after[name].mae - score.mae) * count
        assert moved == pytest.approx(300, abs=30)


def test_test_rows_decide_nothing():
    data = parts()
    shuffled = {**data, "test": numpy_generator(0, "other").permutation(data["test"])}
    chosen = [
        {
            name: score.alphas
            for name, score in forecast({}, some, COLUMNS, HISTORY, HORIZON, alphas=ALPHAS).items()
        }
        for some in (data, shuffled)
    ]
    assert chosen[0] == chosen[1]


# Wrong use


def test_wrong_use():
    data = parts()
    with pytest.raises(ConfigError, match=r"reads SeriesSpec\(channels=3, .* data\.independent"):
        forecast({"net": build(channels=3)}, data, COLUMNS, HISTORY, HORIZON)
    data["valid"][3, 1] = math.nan
    with pytest.raises(DataError, match="fill the missing values first"):
        forecast({}, data, COLUMNS, HISTORY, HORIZON)
