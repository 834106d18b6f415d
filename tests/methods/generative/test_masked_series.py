"""Masked series: masks, scales and loss against loops, and what NaN and padding may reach."""

import math

import pytest
import torch
from torch import Tensor

from selfsup.batch import Batch, SeriesSpec
from selfsup.errors import ConfigError
from selfsup.methods.generative.masked_series import (
    Config,
    MaskedSeries,
    hide,
    instance_statistics,
    masked_mse,
)
from selfsup.model_folder import kept_weights
from selfsup.models.transformer import Config as Model
from selfsup.models.transformer import TransformerEncoder
from selfsup.objective import FillsBlanks
from selfsup.randomness import isolated, seed_layers, torch_generator

PATCH = 3
MODEL = {"dim": 16, "layers": 2, "heads": 2, "patch": PATCH, "dropout": 0.0, "init_std": 0.2}


def build(channels: int = 2, model: dict | None = None, **config) -> MaskedSeries:
    spec = SeriesSpec(channels=channels, length=12)
    with isolated():
        seed_layers(0, "model")
        encoder = TransformerEncoder(Model(**(MODEL | (model or {}))), spec)
        return MaskedSeries(Config(**config), encoder, spec).eval()


def windows(size: int = 5, time: int = 12, channels: int = 2, seed: int = 0) -> Tensor:
    """Values around 3; every tenth is missing."""
    generator = torch_generator(seed, "windows")
    series = 3 + 2 * torch.randn(size, time, channels, generator=generator)
    missing = torch.rand(series.shape, generator=generator) < 0.1
    return series.masked_fill(missing, math.nan)


def padded(series: Tensor, lengths: list[int]) -> Batch:
    mask = torch.arange(series.shape[1]) < torch.tensor(lengths).unsqueeze(1)
    return {"series": series.masked_fill(~mask.unsqueeze(-1), math.nan), "mask": mask}


def generator(seed: int = 0) -> torch.Generator:
    return torch_generator(seed, "loss")


def slow_statistics(values: list[float]) -> tuple[float, float]:
    known = [v for v in values if not math.isnan(v)]
    mean = sum(known) / max(1, len(known))
    return mean, math.sqrt(sum((v - mean) ** 2 for v in known) / max(1, len(known)) + 1e-5)


# Masks


def test_every_row_hides_its_exact_share():
    real = torch.arange(12) < torch.tensor([12, 10, 7, 2, 1, 0]).unsqueeze(1)
    hidden = hide(real, 0.4, generator())
    assert hidden.sum(1).tolist() == [5, 4, 3, 1, 1, 0]
    assert not (hidden & ~real).any()


def test_every_patch_is_hidden_equally_often_and_rows_differ():
    real = torch.arange(6) < torch.tensor([6, 5]).repeat(4000).unsqueeze(1)
    hidden = hide(real, 0.5, generator())
    for length, count in ((6, 3), (5, 2)):
        share = hidden[real.sum(1) == length].double().mean(0)[:length]
        assert (share - count / length).abs().max() < 0.03  # 4 deviations
    assert len(hidden[0::2].unique(dim=0)) == math.comb(6, 3)
    assert torch.equal(hide(real, 0.5, generator(1)), hide(real, 0.5, generator(1)))


# Normalisation


def test_statistics_are_those_of_the_known_steps():
    series = windows(seed=3)
    series[1, :, 0] = math.nan
    series[2, :, 1] = 7.0
    mean, std = instance_statistics(series)
    for row in range(len(series)):
        for channel in range(2):
            expected = slow_statistics(series[row, :, channel].double().tolist())
            assert mean[row, 0, channel].item() == pytest.approx(expected[0], abs=1e-5)
            assert std[row, 0, channel].item() == pytest.approx(expected[1], rel=1e-4)


def test_a_normalised_model_does_not_see_offset_and_scale_of_a_channel():
    factor, offset = torch.tensor([0.5, 40.0]), torch.tensor([-9.0, 100.0])
    series = windows()
    for normalised in (True, False):
        method = build(instance_norm=normalised)
        losses = [
            method.loss({"series": given}, generator()).loss.item()
            for given in (series, series * factor + offset)
        ]
        assert (losses[0] == pytest.approx(losses[1], rel=1e-3)) is normalised


# Loss


def test_masked_mse_is_a_mean_over_known_hidden_numbers():
    restored, target = (torch.randn(3, 4, 6, generator=generator(i)) for i in range(2))
    compared = torch.rand(3, 4, 6, generator=generator(2)) < 0.4
    target = target.masked_fill(torch.rand(3, 4, 6, generator=generator(3)) < 0.2, math.nan)
    compared &= ~target.isnan()
    errors = [
        (restored[i, j, k].double().item() - target[i, j, k].double().item()) ** 2
        for i, j, k in compared.nonzero().tolist()
    ]
    got = masked_mse(restored, target, compared)
    assert got.item() == pytest.approx(sum(errors) / len(errors), rel=1e-6)
    nothing = torch.zeros_like(compared)
    assert masked_mse(restored, target, nothing).item() == 0.0
    restored.requires_grad_()
    masked_mse(restored, target, compared).backward()
    assert restored.grad.isfinite().all()
    assert torch.equal(restored.grad != 0, compared)


@pytest.mark.parametrize("normalised", [True, False])
def test_loss_equals_a_loop_in_float64(normalised):
    method = build(instance_norm=normalised, mask_rate=0.5).double()
    batch = padded(windows(time=14).double(), [14, 12, 11, 6, 9])  # patches: 4 (of 14), 4, 3, 2, 3
    real = torch.arange(4) < torch.tensor([4, 4, 3, 2, 3]).unsqueeze(1)
    hidden = hide(real, 0.5, generator())
    scaled = batch["series"].clone()
    statistics = {}
    for row in range(5):
        for channel in range(2):
            mean, std = slow_statistics(scaled[row, :, channel].tolist())
            statistics[row, channel] = mean
            if normalised:
                scaled[row, :, channel] = (scaled[row, :, channel] - mean) / std
                statistics[row, channel] = 0.0
    vectors = method.encoder.embedding.vectors({"series": scaled})
    for row, position in hidden.nonzero().tolist():
        vectors[row, position] = method.blank.weight[0]
    said = method.head(method.encoder({**batch, "series": scaled}, vectors=vectors).last)
    errors, guesses = [], []
    for row, position in hidden.nonzero().tolist():
        for step in range(PATCH):
            for channel in range(2):
                wanted = scaled[row, position * PATCH + step, channel].item()
                if not math.isnan(wanted):
                    # loss and metrics are computed in float32
                    errors.append((said[row, position, step * 2 + channel].item() - wanted) ** 2)
                    guesses.append((statistics[row, channel] - wanted) ** 2)
    output = method.loss(batch, generator())
    assert int(output.weight) == len(errors)
    assert output.loss.item() == pytest.approx(sum(errors) / len(errors), rel=1e-5)
    assert output.metrics["mse"].item() == output.loss.item()
    assert output.metrics["mse_mean"].item() == pytest.approx(sum(guesses) / len(guesses), rel=1e-5)


def test_hidden_values_do_not_reach_the_predictions():
    method = build(instance_norm=False)  # else they reach the window's mean and deviation
    batch = {"series": windows()}
    hidden = hide(torch.ones(5, 4, dtype=torch.bool), 0.4, generator())
    steps = hidden.repeat_interleave(PATCH, 1).unsqueeze(-1)
    expected = method._restored(batch, hidden)
    for value in (1000.0, math.nan):
        changed = {"series": batch["series"].masked_fill(steps, value)}
        assert torch.equal(method._restored(changed, hidden), expected)
    seen = {"series": batch["series"].masked_fill(~steps, 1000.0)}
    assert not torch.isclose(method._restored(seen, hidden), expected).any(-1).all()


def test_nan_reaches_neither_loss_nor_gradient():
    method = build()
    series = windows()
    series[0] = math.nan  # a window without any value
    series[1, :, 1] = math.nan
    series[2, 5:] = math.nan
    output = method.loss({"series": series}, generator())
    output.loss.backward()
    assert output.loss.isfinite()
    assert all(value.isfinite() for value in output.metrics.values())
    gradients = [parameter.grad for parameter in method.parameters()]
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)
    nothing = method.loss({"series": torch.full((2, 12, 2), math.nan)}, generator())
    assert (nothing.loss.item(), int(nothing.weight)) == (0.0, 0)
    nothing.loss.backward()


# Imputation


@pytest.mark.parametrize("normalised", [True, False])
def test_missing_steps_are_filled_and_known_ones_kept(normalised):
    method = build(instance_norm=normalised)
    batch = padded(windows(time=14), [14, 12, 14, 7, 14])
    before = batch["series"].clone()
    filled = method.impute(batch)
    known = ~before.isnan()
    assert torch.equal(batch["series"].nan_to_num(), before.nan_to_num())
    assert torch.equal(filled[known], before[known])
    whole = torch.tensor([12, 12, 12, 6, 12])  # steps in whole patches
    reached = (torch.arange(14) < whole.unsqueeze(1)).unsqueeze(-1)
    assert torch.equal(filled.isnan(), ~known & ~reached)
    assert (~known & reached).sum() > 5


def test_predictions_come_back_to_the_scale_of_their_window():
    method = build(channels=1)
    series = windows(channels=1)
    filled, moved = (method.impute({"series": given}) for given in (series, 10 * series + 50))
    torch.testing.assert_close(moved, 10 * filled + 50, rtol=1e-3, atol=1e-3)


def test_a_patch_with_a_missing_step_is_predicted_from_the_others_alone():
    method = build(channels=1, instance_norm=False)
    series = windows(channels=1).nan_to_num(1.0)
    series[:, 4] = math.nan
    other = series.clone()
    other[:, [3, 5]] = 50.0  # in the same patch
    assert torch.equal(
        method.impute({"series": series})[:, 4], method.impute({"series": other})[:, 4]
    )


def test_a_trained_model_fills_gaps_better_than_the_mean():
    method = build(channels=1, model={"embedding_std": 1.0, "rotary_base": 100.0}).train()
    draw = generator(5)
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-2)

    def waves(size: int) -> Tensor:
        turn, phase = torch.rand(2, size, 1, generator=draw)
        step = torch.arange(30.0)
        return torch.sin(step * (0.5 + 0.4 * turn) + 6.3 * phase).unsqueeze(-1)

    for _ in range(150):
        optimizer.zero_grad()
        method.loss({"series": waves(32)}, draw).loss.backward()
        optimizer.step()
    truth = waves(64)
    gap = truth.clone()
    gap[:, 13:17] = math.nan
    filled = method.eval().impute({"series": gap})
    error = (filled - truth)[:, 13:17].square().mean()
    mean, _ = instance_statistics(gap)
    assert error < 0.3 * (mean - truth)[:, 13:17].square().mean()


# Use


def test_what_a_model_folder_keeps_is_enough_to_impute():
    method, other = build(), build(model={"init_std": 0.1})
    other.load_state_dict(kept_weights(method))  # all of it: nothing else has weights
    batch = {"series": windows()}
    assert torch.equal(other.impute(batch), method.impute(batch))


def test_it_does_not_pass_for_a_model_of_text():
    assert not isinstance(build(), FillsBlanks)


def test_wrong_use():
    with pytest.raises(ConfigError, match=r"model\.causal = false"):
        build(model={"causal": True})
    for rate in (0.0, 1.0, -0.1):
        with pytest.raises(ValueError, match="mask_rate must lie between 0 and 1"):
            Config(mask_rate=rate)
