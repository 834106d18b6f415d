"""BYOL: its loss against loops, its teacher, its momentum, and which views meet."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from selfsup.batch import Batch, ImageSpec
from selfsup.errors import ConfigError
from selfsup.methods.bootstrapping.byol import BYOL, Config, momentum_at, regression_loss
from selfsup.methods.views import ViewConfig, augment
from selfsup.models.resnet import Config as Model
from selfsup.models.resnet import ResNetEncoder
from selfsup.randomness import isolated, seed_layers, torch_generator

MODEL = Model(blocks=(1,), widths=(4,), stem="cifar", zero_init_residual=False)
SPEC = ImageSpec(size=8, channels=3, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
FIRST = ViewConfig(crop_scale=(0.5, 1.0), jitter=0.0, grey=0.0, blur=0.0)
SECOND = ViewConfig(crop_scale=(0.3, 0.6), jitter=0.0, grey=0.0, blur=0.0, solarise=0.5)


def build(**config) -> BYOL:
    """In training mode, with a teacher that differs from the online network."""
    with isolated():
        seed_layers(0, "model")
        encoder = ResNetEncoder(MODEL, SPEC)
        settings = {"hidden_dim": 8, "projection_dim": 6, "views_a": FIRST, "views_b": SECOND}
        method = BYOL(Config(**(settings | config)), encoder, SPEC).train()
    generator = torch_generator(0, "teacher")
    with torch.no_grad():
        for module in (method.teacher_encoder, method.teacher_projector):
            for parameter in module.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return method


def pictures(size: int, seed: int = 0) -> Batch:
    generator = torch_generator(seed, "pictures")
    return {"image": torch.randint(256, (size, 3, 8, 8), generator=generator, dtype=torch.uint8)}


def loss_of(method: BYOL, batch: Batch, seed: int = 0) -> Tensor:
    return method.loss(batch, torch_generator(seed, "loss")).loss


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def slow_loss(prediction: Tensor, target: Tensor) -> float:
    """Equation 2 with loops in float64: the squared distance of unit vectors."""
    distances = []
    for p, t in zip(prediction.double().tolist(), target.double().tolist(), strict=True):
        length, other = (math.sqrt(sum(x * x for x in vector)) for vector in (p, t))
        distances.append(sum((x / length - y / other) ** 2 for x, y in zip(p, t, strict=True)))
    return sum(distances) / len(distances)


# ---- the loss -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_regression_loss_equals_loops(dtype: torch.dtype):
    generator = torch_generator(0, "vectors")
    prediction, target = (3 * torch.randn(2, 7, 5, generator=generator)).to(dtype)
    loss = regression_loss(prediction, target)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(slow_loss(prediction, target), rel=1e-5)


def test_each_view_predicts_the_teachers_projection_of_the_other_with_statistics_of_its_own():
    method, batch = build(), pictures(6)
    by_hand = copy.deepcopy(method)
    generator = torch_generator(0, "loss")
    first, second = (augment(batch["image"], kind, generator) for kind in (FIRST, SECOND))

    def online(view: Tensor) -> Tensor:
        return by_hand.predictor(by_hand.projector(by_hand.encoder({"image": view}).pooled))

    def teacher(view: Tensor) -> Tensor:
        return by_hand.teacher_projector(by_hand.teacher_encoder({"image": view}).pooled)

    expected = slow_loss(online(first), teacher(second)) + slow_loss(online(second), teacher(first))
    output = method.loss(batch, torch_generator(0, "loss"))
    assert output.loss.item() == pytest.approx(expected, rel=1e-4)
    assert output.weight == 6
    both = torch.cat([first, second])  # together in one pass they would share statistics
    together = regression_loss(online(both), teacher(both).roll(6, 0)).item()
    assert abs(2 * together - expected) > 1e-3


def test_metric_is_the_spread_of_the_teachers_directions():
    method = build().eval()
    spread = method.loss(pictures(6), torch_generator(0, "loss")).metrics["target_deviation"]
    assert 0.01 < spread < 1
    with torch.no_grad():
        for parameter in method.teacher_projector[-1].parameters():
            parameter.copy_(torch.ones(()) * (parameter.ndim == 1))  # one vector for all
    spread = method.loss(pictures(6), torch_generator(0, "loss")).metrics["target_deviation"]
    assert spread < 1e-6


# ---- the teacher --------------------------------------------------------------------------------


def test_teacher_begins_as_a_copy_of_encoder_and_projector():
    with isolated():
        seed_layers(0, "model")
        encoder = ResNetEncoder(MODEL, SPEC)
        method = BYOL(Config(hidden_dim=8, projection_dim=6), encoder, SPEC)
    for teacher, online in (
        (method.teacher_encoder, method.encoder),
        (method.teacher_projector, method.projector),
    ):
        for (name, slow), fast in zip(
            teacher.state_dict().items(), online.state_dict().values(), strict=True
        ):
            assert torch.equal(slow, fast), name
            assert slow.data_ptr() != fast.data_ptr(), name


def test_no_gradient_reaches_the_teacher():
    method = build()
    teacher = [*method.teacher_encoder.parameters(), *method.teacher_projector.parameters()]
    assert not any(parameter.requires_grad for parameter in teacher)
    for parameter in teacher:  # not even if it could be trained
        parameter.requires_grad_()
    loss_of(method, pictures(6)).backward()
    assert all(parameter.grad is None for parameter in teacher)
    assert all(parameter.grad is not None for parameter in method.predictor.parameters())
    assert all(parameter.grad is not None for parameter in method.encoder.parameters())


@pytest.mark.parametrize(("step", "momentum"), [(0, 0.9), (5, 0.95), (10, 1.0)])
def test_teacher_moves_by_the_momentum_of_its_step_and_keeps_its_own_statistics(step, momentum):
    method = build(momentum=0.9)
    loss_of(method, pictures(6))  # running statistics of teacher and online network now differ
    pairs = (
        (method.teacher_encoder, method.encoder),
        (method.teacher_projector, method.projector),
    )
    old = [snapshot(teacher) for teacher, _ in pairs]
    online = snapshot(method.encoder)
    method.after_step(step, 10)
    for (teacher, student), before in zip(pairs, old, strict=True):
        fast = student.state_dict()
        for name, parameter in teacher.named_parameters():
            moved = momentum * before[name].double() + (1 - momentum) * fast[name].double()
            torch.testing.assert_close(parameter.double(), moved, rtol=0, atol=1e-6)
        statistics = {name for name, _ in teacher.named_buffers()} & before.keys()
        assert statistics
        for name in statistics:
            assert torch.equal(teacher.state_dict()[name], before[name]), name
            same_as_online = torch.equal(before[name], fast[name])
            assert same_as_online is name.endswith("num_batches_tracked"), name
    assert all(torch.equal(tensor, online[name]) for name, tensor in snapshot(pairs[0][1]).items())


def test_momentum_rises_from_the_first_to_one_by_a_cosine():
    assert momentum_at(0, 100, 0.996) == pytest.approx(0.996, abs=1e-15)
    assert momentum_at(50, 100, 0.996) == pytest.approx(0.998, abs=1e-15)
    assert momentum_at(99, 100, 0.996) == pytest.approx(1 - 0.004 * 0.000246719818, abs=1e-12)
    assert momentum_at(100, 100, 0.996) == 1.0
    values = [momentum_at(step, 100, 0.5) for step in range(101)]
    assert values == sorted(values)
    assert momentum_at(0, 1, 0.0) == 0.0


# ---- side effects, wrong use --------------------------------------------------------------------


def test_evaluation_changes_nothing():
    method = build().eval()
    before = snapshot(method)
    with torch.no_grad():
        first = loss_of(method, pictures(6))
        assert loss_of(method, pictures(6)) == first
    for name, tensor in method.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_loss_in_training_leaves_the_teachers_weights_to_after_step():
    method = build()
    teacher = [*method.teacher_encoder.parameters(), *method.teacher_projector.parameters()]
    before = [parameter.clone() for parameter in teacher]
    loss_of(method, pictures(6)).backward()
    assert all(torch.equal(*pair) for pair in zip(teacher, before, strict=True))


def test_a_batch_of_one_is_refused_in_training_alone():
    method = build()
    with pytest.raises(ConfigError, match=r"training\.batch_size >= 2"):
        loss_of(method, pictures(1))
    assert loss_of(method.eval(), pictures(1)).isfinite()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("momentum", -0.1),
        ("momentum", 1.1),
        ("momentum", math.nan),
        ("hidden_dim", 0),
        ("projection_dim", 0),
    ],
)
def test_impossible_values_are_refused(key: str, value: float):
    with pytest.raises(ValueError, match=key):
        Config(**{key: value})
