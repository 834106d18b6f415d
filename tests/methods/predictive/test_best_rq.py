"""BEST-RQ: its labels and loss against loops, its frozen quantizer, and what is hidden."""

import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from selfsup.batch import AudioSpec, Batch
from selfsup.methods.predictive.best_rq import BestRQ, Config, label, usage
from selfsup.models.recurrent import Config as Recurrent
from selfsup.models.recurrent import RecurrentEncoder
from selfsup.models.transformer import Config as Transformer
from selfsup.models.transformer import TransformerEncoder
from selfsup.objective import Output
from selfsup.randomness import isolated, seed_layers, torch_generator

SPEC = AudioSpec(rate=8000, mel=4, hop=80)
SMALL = {"num_codes": 7, "code_dim": 3, "start_probability": 0.2, "span": 3}


def build(patch: int = 2, seed: int = 0, **config) -> BestRQ:
    with isolated():
        seed_layers(seed, "model")
        model = Transformer(dim=8, layers=1, heads=2, patch=patch, dropout=0.0, init_std=0.3)
        return BestRQ(Config(**(SMALL | config)), TransformerEncoder(model, SPEC), SPEC).eval()


def batch_of(*lengths: int) -> Batch:
    """Rows of those lengths, with rubbish where padded."""
    shape = (len(lengths), max(lengths), SPEC.mel)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    return {"frames": torch.randn(shape, generator=torch_generator(0, "frames")), "mask": mask}


def loss_of(method: BestRQ, batch: Batch, seed: int = 0) -> Output:
    return method.loss(batch, torch_generator(seed, "loss"))


def shown_to(method: BestRQ, batch: Batch, seed: int = 0) -> Tensor:
    """The frames that the encoder reads."""
    seen = []
    handle = method.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    loss_of(method, batch, seed)
    handle.remove()
    return seen[0]["frames"]


def slow_label(vector: list[float], projection: Tensor, codes: Tensor) -> int:
    """Equation 1 with loops in float64: both sides on the unit sphere, Euclidean distance."""

    def unit(x: list[float]) -> list[float]:
        length = math.sqrt(sum(value * value for value in x))
        return [value / length for value in x]

    matrix = projection.double().tolist()
    projected = unit(
        [sum(vector[i] * matrix[i][d] for i in range(len(vector))) for d in range(len(matrix[0]))]
    )
    distances = [
        sum((p - c) ** 2 for p, c in zip(projected, unit(code), strict=True))
        for code in codes.double().tolist()
    ]
    return distances.index(min(distances))


def slow_loss(method: BestRQ, batch: Batch) -> tuple[float, float, list[int], list[int]]:
    """Loss, accuracy, labels and guesses, position by position in float64."""
    shown, stack = shown_to(method, batch), method.encoder.embedding.stack
    logits = method.head(method.encoder({**batch, "frames": shown}).last).detach().double()
    changed = (shown != batch["frames"]).any(-1)
    losses, labels, guesses = [], [], []
    for row, length in enumerate(batch["mask"].sum(1).tolist()):
        for position in range(length // stack):
            place = slice(position * stack, (position + 1) * stack)
            if not changed[row, place].all():
                continue
            vector = batch["frames"][row, place].flatten().double().tolist()
            scores = logits[row, position].tolist()
            labels.append(slow_label(vector, method.projections[0], method.codes[0]))
            guesses.append(scores.index(max(scores)))
            losses.append(math.log(sum(map(math.exp, scores))) - scores[labels[-1]])
    hits = sum(a == b for a, b in zip(labels, guesses, strict=True))
    return sum(losses) / len(losses), hits / len(losses), labels, guesses


def slow_perplexity(numbers: list[int]) -> float:
    shares = [count / len(numbers) for count in Counter(numbers).values()]
    return math.exp(-sum(share * math.log(share) for share in shares))


# ---- labels -------------------------------------------------------------------------------------


def test_labels_equal_loops():
    method = build(num_codebooks=2)
    vectors = torch.randn(50, 2 * SPEC.mel, generator=torch_generator(0, "vectors"))
    got = label(vectors, method.projections, method.codes)
    for book in range(2):
        expected = [
            slow_label(v, method.projections[book], method.codes[book])
            for v in vectors.double().tolist()
        ]
        assert got[:, book].tolist() == expected
    assert len(set(got[:, 0].tolist())) > 3
    assert not torch.equal(got[:, 0], got[:, 1])


def test_labels_do_not_depend_on_loudness_or_on_autocast():
    method = build(num_codes=500)
    vectors = torch.randn(200, 2 * SPEC.mel, generator=torch_generator(0, "vectors"))
    expected = label(vectors, method.projections, method.codes)
    assert torch.equal(label(4 * vectors, method.projections, method.codes), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(label(vectors, method.projections, method.codes), expected)


def test_the_quantizer_is_drawn_from_the_seed_and_never_trained():
    method, same, other = build(), build(), build(seed=1)
    for name in ("projections", "codes"):
        assert torch.equal(getattr(method, name), getattr(same, name))
        assert not torch.equal(getattr(method, name), getattr(other, name))
        assert name in method.state_dict()
        assert name not in dict(method.named_parameters())
    assert method.projections.shape == (1, 2 * SPEC.mel, 3)
    torch.testing.assert_close(method.codes.square().sum(-1), torch.ones(1, 7))


def test_the_projection_has_xaviers_variance():
    method = build(patch=8, code_dim=200)
    projection = method.projections[0]  # (32, 200)
    assert projection.var() == pytest.approx(2 / (32 + 200), rel=0.05)
    assert projection.abs().max() <= math.sqrt(6 / 232)


def test_usage_is_the_perplexity_of_the_codes():
    numbers = [0, 0, 3, 3, 3, 6]
    assert usage(torch.tensor([numbers]).T, 7).item() == pytest.approx(slow_perplexity(numbers))
    both = torch.tensor([numbers, [1] * 6]).T
    assert usage(both, 7).item() == pytest.approx((slow_perplexity(numbers) + 1) / 2)


# ---- the loss -----------------------------------------------------------------------------------


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_loss_and_metrics_equal_loops(patch: int):
    method, batch = build(patch, span=6), batch_of(23, 16, 9)
    output = loss_of(method, batch)
    loss, accuracy, labels, guesses = slow_loss(method, batch)
    assert 0 < len(labels) < 48 // patch
    assert output.weight == len(labels)
    assert output.loss.item() == pytest.approx(loss, rel=1e-5)
    assert output.metrics["accuracy"].item() == pytest.approx(accuracy, abs=1e-6)
    code, guess = slow_perplexity(labels), slow_perplexity(guesses)
    assert output.metrics["code_perplexity"].item() == pytest.approx(code, rel=1e-5)
    assert output.metrics["prediction_perplexity"].item() == pytest.approx(guess, rel=1e-5)


def test_several_codebooks_give_the_mean_of_their_losses():
    method, batch = build(num_codebooks=3, start_probability=1.0), batch_of(12, 8)
    output = loss_of(method, batch)
    frames = batch["frames"].unflatten(1, (-1, 2)).flatten(2)
    real = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    shown = shown_to(method, batch)
    logits = method.head(method.encoder({**batch, "frames": shown}).last)[real].view(10, 3, 7)
    target = label(frames[real], method.projections, method.codes)
    nats = -logits.double().log_softmax(-1).gather(2, target.unsqueeze(-1))
    assert output.weight == 10
    assert output.loss.item() == pytest.approx(nats.mean().item(), rel=1e-5)


def test_a_batch_without_any_span_has_weight_and_loss_zero_and_a_graph():
    method, batch = build(start_probability=1e-9), batch_of(12, 8)
    output = loss_of(method, batch)
    output.loss.backward()
    assert output.weight == 0
    assert output.loss == 0
    assert all(value == 0 for value in output.metrics.values())
    assert all(p.grad is None or (p.grad == 0).all() for p in method.parameters())


# ---- what is hidden -----------------------------------------------------------------------------


def test_hidden_frames_become_noise_and_padding_is_never_hidden():
    method = build(start_probability=0.05, span=6, noise=0.1)
    batch = batch_of(*([60, 41] * 100))
    shown = shown_to(method, batch)
    hidden = (shown != batch["frames"]).any(-1)
    assert not (hidden & ~batch["mask"]).any()
    assert shown[hidden].std() == pytest.approx(0.1, rel=0.03)
    assert shown[hidden].mean() == pytest.approx(0.0, abs=0.003)
    assert hidden[:, 5:40].float().mean() == pytest.approx(1 - 0.95**6, abs=0.03)


def test_a_row_without_a_span_is_left_alone():
    method, batch = build(start_probability=0.02), batch_of(*[20] * 30)
    hidden = (shown_to(method, batch) != batch["frames"]).any(-1)
    assert hidden.any()
    assert not hidden.any(1).all()


def test_the_paper_reads_one_label_per_forty_milliseconds():
    with isolated():
        seed_layers(0, "model")
        encoder = TransformerEncoder(Transformer(dim=8, layers=1, heads=2), SPEC)
        method = BestRQ(Config(), encoder, SPEC)
    assert method.projections.shape == (1, 4 * SPEC.mel, 16)
    assert method.codes.shape == (1, 8192, 16)


def test_a_recurrent_encoder_labels_single_frames():
    with isolated():
        seed_layers(0, "model")
        encoder = RecurrentEncoder(Recurrent(dim=8, layers=1), SPEC)
        method = BestRQ(Config(**(SMALL | {"start_probability": 1.0})), encoder, SPEC).eval()
    assert loss_of(method, batch_of(11, 5)).weight == 16


@pytest.mark.parametrize(
    "config",
    [
        {"num_codes": 1},
        {"code_dim": 0},
        {"num_codebooks": 0},
        {"span": 0},
        {"start_probability": 0.0},
        {"start_probability": 1.5},
        {"noise": -0.1},
    ],
)
def test_impossible_settings_are_refused(config):
    with pytest.raises(ValueError, match=next(iter(config))):
        Config(**config)
