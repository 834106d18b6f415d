"""APC: its loss against loops, what it may see, and rows that are too short."""

import pytest
import torch

from selfsup.batch import AudioSpec, Batch
from selfsup.errors import ConfigError
from selfsup.methods.generative.apc import APC, Config, future_errors
from selfsup.models.recurrent import Config as Recurrent
from selfsup.models.recurrent import RecurrentEncoder
from selfsup.models.transformer import Config as Transformer
from selfsup.models.transformer import TransformerEncoder
from selfsup.objective import Output
from selfsup.randomness import isolated, seed_layers, torch_generator

SPEC = AudioSpec(rate=8000, mel=4, hop=80)


def build(shift: int, **model) -> APC:
    with isolated():
        seed_layers(0, "model")
        encoder = RecurrentEncoder(Recurrent(**({"dim": 6, "layers": 1} | model)), SPEC)
        return APC(Config(shift=shift), encoder, SPEC).eval()


def batch_of(*lengths: int) -> Batch:
    """Rows of those lengths, with rubbish where padded."""
    shape = (len(lengths), max(lengths), SPEC.mel)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    return {"frames": torch.randn(shape, generator=torch_generator(0, "frames")), "mask": mask}


def loss_of(method: APC, batch: Batch) -> Output:
    return method.loss(batch, torch_generator(0, "loss"))


def slow_errors(predictions, frames, mask, shift: int) -> tuple[float, float, int]:
    """Equation 1 with loops in float64, per frame and channel."""
    predicted, copied, total = 0.0, 0.0, 0
    rows = zip(predictions.double(), frames.double(), mask.sum(1).tolist(), strict=True)
    for guess, row, length in rows:
        for time in range(length - shift):
            total += 1
            for channel in range(row.shape[1]):
                target = float(row[time + shift, channel])
                predicted += abs(float(guess[time, channel]) - target) / row.shape[1]
                copied += abs(float(row[time, channel]) - target) / row.shape[1]
    return predicted / max(total, 1), copied / max(total, 1), total


@pytest.mark.parametrize("shift", [1, 3, 5])
def test_errors_equal_loops(shift: int):
    batch = batch_of(9, 6, 4, 1)
    predictions = torch.randn(batch["frames"].shape, generator=torch_generator(1, "predictions"))
    errors = future_errors(predictions, batch["frames"], batch["mask"], shift)
    expected = slow_errors(predictions, batch["frames"], batch["mask"], shift)
    assert errors.predicted.item() == pytest.approx(expected[0], rel=1e-5)
    assert errors.copied.item() == pytest.approx(expected[1], rel=1e-5)
    assert errors.total == expected[2] > 0


def test_errors_are_float32_whatever_the_precision():
    batch = batch_of(9, 6)
    guess = torch.zeros_like(batch["frames"]).bfloat16()
    errors = future_errors(guess, batch["frames"], batch["mask"], 2)
    exact = future_errors(guess.float(), batch["frames"], batch["mask"], 2)
    assert errors.predicted.dtype == torch.float32
    assert errors.predicted == exact.predicted


def test_loss_reads_the_encoder_and_the_head():
    method, batch = build(shift=2), batch_of(9, 6, 2)
    output = loss_of(method, batch)
    predictions = method.head(method.encoder(batch).last)
    predicted, copied, total = slow_errors(predictions.detach(), batch["frames"], batch["mask"], 2)
    assert output.loss.item() == pytest.approx(predicted, rel=1e-5)
    assert output.metrics["l1"].item() == pytest.approx(predicted, rel=1e-5)
    assert output.metrics["l1_copy"].item() == pytest.approx(copied, rel=1e-5)
    assert output.weight == total == 11
    assert not output.metrics["l1"].requires_grad


def test_what_is_predicted_is_not_seen():
    """A change of the last frames changes targets, never a prediction for them."""
    method, batch = build(shift=2), batch_of(9)
    before = method.head(method.encoder(batch).last)[:, :7]
    batch["frames"][:, 7:] += 1.0
    assert torch.equal(method.head(method.encoder(batch).last)[:, :7], before)


def test_rows_that_are_too_short_contribute_nothing():
    method = build(shift=4)
    long = loss_of(method, {k: v[:1] for k, v in batch_of(9, 4, 1).items()})
    both = loss_of(method, batch_of(9, 4, 1))
    assert both.weight == long.weight == 5
    torch.testing.assert_close(both.loss, long.loss, rtol=0, atol=1e-6)


@pytest.mark.parametrize("lengths", [(4, 2), (3, 1), (1,)])
def test_a_batch_with_nothing_to_predict_has_weight_and_loss_zero(lengths):
    output = loss_of(build(shift=4), batch_of(*lengths))
    output.loss.backward()
    assert output.weight == 0
    assert output.loss == 0
    assert all(value == 0 for value in output.metrics.values())


def test_a_batch_without_a_mask_is_all_real():
    method, batch = build(shift=3), batch_of(8, 8)
    assert loss_of(method, {"frames": batch["frames"]}).loss == loss_of(method, batch).loss


def test_a_model_that_sees_the_future_is_refused():
    with pytest.raises(ConfigError, match="bidirectional = false"):
        build(shift=5, bidirectional=True)
    encoder = TransformerEncoder(Transformer(dim=8, layers=1, heads=2, patch=1), SPEC)
    with pytest.raises(ConfigError, match="causal = true"):
        APC(Config(), encoder, SPEC)


def test_a_transformer_must_be_causal_and_read_single_frames():
    model = {"dim": 8, "layers": 1, "heads": 2, "causal": True, "dropout": 0.0}
    with pytest.raises(ConfigError, match=r"model\.patch must be 1, got 4"):
        APC(Config(), TransformerEncoder(Transformer(**model), SPEC), SPEC)
    method = APC(Config(), TransformerEncoder(Transformer(**model, patch=1), SPEC), SPEC)
    assert loss_of(method, batch_of(9, 7)).weight == 6


def test_the_shift_is_at_least_one():
    with pytest.raises(ValueError, match="shift"):
        Config(shift=0)
