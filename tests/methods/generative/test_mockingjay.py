"""Mockingjay: its loss against loops, the fate of chosen frames, and how many are chosen."""

import pytest
import torch
from torch import Tensor

from selfsup.batch import AudioSpec, Batch
from selfsup.errors import ConfigError
from selfsup.methods.generative.mockingjay import (
    Config,
    Mockingjay,
    channel_bands,
    corrupt,
    masked_l1,
)
from selfsup.models.recurrent import Config as Recurrent
from selfsup.models.recurrent import RecurrentEncoder
from selfsup.models.transformer import Config as Transformer
from selfsup.models.transformer import TransformerEncoder
from selfsup.objective import Output
from selfsup.randomness import isolated, seed_layers, torch_generator

SPEC = AudioSpec(rate=8000, mel=6, hop=80)
ALL_KEPT = {"mask_rate": 1.0, "span": 1, "mask_share": 0.0, "random_share": 0.0}


def build(patch: int = 1, **config) -> Mockingjay:
    with isolated():
        seed_layers(0, "model")
        model = Transformer(dim=8, layers=1, heads=2, patch=patch, dropout=0.0, init_std=0.3)
        return Mockingjay(Config(**config), TransformerEncoder(model, SPEC), SPEC).eval()


def batch_of(*lengths: int) -> Batch:
    """Rows of those lengths, with rubbish where padded."""
    shape = (len(lengths), max(lengths), SPEC.mel)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    return {"frames": torch.randn(shape, generator=torch_generator(0, "frames")), "mask": mask}


def loss_of(method: Mockingjay, batch: Batch, seed: int = 0) -> Output:
    return method.loss(batch, torch_generator(seed, "loss"))


def shown_to(method: Mockingjay, batch: Batch) -> Tensor:
    """The frames that the encoder reads."""
    seen = []
    handle = method.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    loss_of(method, batch)
    handle.remove()
    return seen[0]["frames"]


def slow_l1(restored: Tensor, target: Tensor, hidden: Tensor) -> float:
    """The mean absolute error over hidden numbers, with loops in float64."""
    errors = [
        abs(float(restored[place].double() - target[place].double()))
        for place in map(tuple, hidden.nonzero().tolist())
    ]
    return sum(errors) / max(len(errors), 1)


# ---- the loss -----------------------------------------------------------------------------------


def test_masked_l1_equals_loops():
    generator = torch_generator(0, "numbers")
    restored, target = torch.randn(2, 3, 5, 4, generator=generator)
    hidden = torch.rand(3, 5, 4, generator=generator) < 0.4
    expected = slow_l1(restored, target, hidden)
    assert masked_l1(restored, target, hidden).item() == pytest.approx(expected, rel=1e-5)
    assert masked_l1(restored, target, torch.zeros_like(hidden)) == 0


@pytest.mark.parametrize("patch", [1, 3])
def test_loss_compares_the_heads_output_with_stacked_frames(patch: int):
    method, batch = build(patch, **ALL_KEPT), batch_of(11, 7)
    output = loss_of(method, batch)
    restored = method.head(method.encoder(batch).last)  # nothing is hidden from the encoder
    target = torch.zeros_like(restored)
    hidden = torch.zeros(restored.shape, dtype=torch.bool)
    for row, length in enumerate((11, 7)):
        for position in range(length // patch):
            frames = batch["frames"][row, position * patch : (position + 1) * patch]
            target[row, position], hidden[row, position] = frames.flatten(), True
    assert output.weight == (11 // patch + 7 // patch) * patch * SPEC.mel
    expected = slow_l1(restored.detach(), target, hidden)
    assert output.loss.item() == pytest.approx(expected, rel=1e-5)
    assert output.metrics["l1"].item() == pytest.approx(expected, rel=1e-5)
    mean = torch.stack(
        [row[keep].mean(0) for row, keep in zip(target, hidden[..., 0], strict=True)]
    )
    expected = slow_l1(mean.unsqueeze(1).expand_as(target), target, hidden)
    assert output.metrics["l1_mean"].item() == pytest.approx(expected, rel=1e-5)


def test_only_hidden_numbers_are_learned_from():
    """With every chosen frame zero, the loss must not depend on how others are restored."""
    method, batch = build(mask_rate=0.3, span=3, mask_share=1.0, random_share=0.0), batch_of(20)
    zero = (shown_to(method, batch) == 0).all(-1)
    restored = method.head(method.encoder({**batch, "frames": shown_to(method, batch)}).last)
    hidden = zero.unsqueeze(-1).expand_as(restored)
    expected = slow_l1(restored.detach(), batch["frames"], hidden)
    output = loss_of(method, batch)
    assert output.weight == 6 * SPEC.mel
    assert output.loss.item() == pytest.approx(expected, rel=1e-5)


def test_a_batch_of_rows_shorter_than_a_span_has_weight_and_loss_zero():
    method = build(span=7)
    output = loss_of(method, batch_of(6, 3))
    output.loss.backward()
    assert output.weight == 0
    assert output.loss == 0


# ---- what is hidden -----------------------------------------------------------------------------


def test_one_fate_for_each_utterance_in_the_asked_shares():
    size, time = 3000, 10
    generator = torch_generator(0, "corrupt")
    frames = torch.randn(size, time, 2, generator=generator) + 5
    chosen = torch.zeros(size, time, dtype=torch.bool)
    chosen[:, 2:6] = True
    real = torch.arange(time).expand(size, -1) < 8
    out = corrupt(frames, chosen, real, Config(), generator)
    assert torch.equal(out[~chosen], frames[~chosen])
    inside, before = out[:, 2:6], frames[:, 2:6]
    zero = (inside == 0).flatten(1)
    kept = (inside == before).flatten(1).all(1)
    assert torch.equal(zero.any(1), zero.all(1))
    replaced = ~zero.all(1) & ~kept
    assert zero.all(1).float().mean() == pytest.approx(0.8, abs=0.03)
    assert replaced.float().mean() == pytest.approx(0.1, abs=0.025)
    assert kept.float().mean() == pytest.approx(0.1, abs=0.025)
    sources = torch.zeros(time)
    for row in replaced.nonzero().flatten().tolist():
        for frame in inside[row]:
            found = (frames[row] == frame).all(1).nonzero().flatten()
            assert len(found) == 1, "a replacement is a frame of the same utterance"
            sources[found] += 1
    assert (sources[:8] > 0).all()
    assert (sources[8:] == 0).all(), "padding takes no one's place"
    assert sources[:8].max() < 1.5 * sources[:8].min()


def test_the_expected_share_is_chosen_in_whole_spans_outside_padding():
    method = build(mask_share=1.0, random_share=0.0, span=7)
    batch = batch_of(*([90, 60, 31] * 200))
    zero = (shown_to(method, batch) == 0).all(-1)
    assert not (zero & ~batch["mask"]).any()
    assert (zero.sum(1) % 7 == 0).all()
    for length in (90, 60, 31):
        share = zero[batch["mask"].sum(1) == length].sum(1).float().mean() / length
        assert share == pytest.approx(0.15, abs=0.02)


def test_a_stacked_position_is_hidden_with_all_its_frames():
    method = build(3, mask_rate=0.5, span=2, mask_share=1.0, random_share=0.0)
    shown = shown_to(method, batch_of(25))
    assert shown.shape == (1, 24, SPEC.mel)
    zero = (shown[0] == 0).all(-1).view(8, 3)
    assert torch.equal(zero.any(1), zero.all(1))
    assert zero.any(1).sum() == 4


def test_channel_bands_are_bands_of_every_width_at_every_place():
    bands = channel_bands(4000, 6, 3, torch_generator(0, "bands"))
    found = {}
    for row in bands.tolist():
        width = sum(row)
        first = row.index(True) if width else 0
        assert row == [first <= i < first + width for i in range(6)]
        found.setdefault(width, []).append(first)
    assert found.keys() == {0, 1, 2, 3}
    for width, firsts in found.items():
        assert len(firsts) / 4000 == pytest.approx(0.25, abs=0.03)
        assert set(firsts) == (set(range(6 - width + 1)) if width else {0})


def test_a_hidden_band_is_restored_in_every_real_frame():
    method, batch = build(channel_mask=6, span=50), batch_of(20, 12)  # rows too short for a span
    seen = shown_to(method, batch)
    zero = seen == 0
    assert zero.any()
    assert torch.equal(zero.any(1, keepdim=True) & batch["mask"].unsqueeze(-1), zero)
    restored = method.head(method.encoder({**batch, "frames": seen}).last)
    output = loss_of(method, batch)
    assert output.weight == zero.sum()
    expected = slow_l1(restored.detach(), batch["frames"], zero)
    assert output.loss.item() == pytest.approx(expected, rel=1e-5)


# ---- what is refused ----------------------------------------------------------------------------


def test_a_causal_model_is_refused_and_a_bidirectional_recurrent_one_is_not():
    causal = Transformer(dim=8, layers=1, heads=2, causal=True)
    with pytest.raises(ConfigError, match="both sides"):
        Mockingjay(Config(), TransformerEncoder(causal, SPEC), SPEC)
    one, two = (Recurrent(dim=8, layers=1, bidirectional=both) for both in (False, True))
    with pytest.raises(ConfigError, match="bidirectional = true"):
        Mockingjay(Config(), RecurrentEncoder(one, SPEC), SPEC)
    method = Mockingjay(Config(mask_rate=0.5, span=5), RecurrentEncoder(two, SPEC), SPEC)
    assert loss_of(method, batch_of(20)).weight == 10 * SPEC.mel


def test_a_band_wider_than_a_frame_is_refused():
    with pytest.raises(ConfigError, match="6 channels"):
        build(channel_mask=7)


@pytest.mark.parametrize(
    "config",
    [
        {"mask_rate": 0.0},
        {"mask_rate": 1.1},
        {"span": 0},
        {"channel_mask": -1},
        {"mask_share": 0.8, "random_share": 0.3},
        {"mask_share": -0.1},
    ],
)
def test_impossible_settings_are_refused(config):
    with pytest.raises(ValueError, match=next(iter(config))):
        Config(**config)
