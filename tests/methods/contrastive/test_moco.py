"""MoCo: its loss against loops, its queue, its teacher, and two ranks against one."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from selfsup import ranks
from selfsup.batch import Batch, ImageSpec
from selfsup.methods.contrastive.moco import Config, MoCo, info_nce
from selfsup.methods.views import NO_CHANGE, ViewConfig, augment
from selfsup.models.batch_norm import BatchNorm
from selfsup.models.resnet import Config as Model
from selfsup.models.resnet import ResNetEncoder
from selfsup.randomness import isolated, seed_layers, torch_generator

MODEL = Model(blocks=(1,), widths=(4,), stem="cifar", zero_init_residual=False)
SPEC = ImageSpec(size=8, channels=3, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
CROPS = ViewConfig(crop_scale=(0.5, 1.0), jitter=0.0, grey=0.0, blur=0.0)


def build(**config) -> MoCo:
    with isolated():
        seed_layers(0, "model")
        encoder = ResNetEncoder(MODEL, SPEC)
        settings = {"queue_size": 10, "momentum": 0.9, "projection_dim": 6, "views": CROPS}
        return MoCo(Config(**(settings | config)), encoder, SPEC).train()


def pictures(size: int, seed: int = 0) -> Batch:
    generator = torch_generator(seed, "pictures")
    return {"image": torch.randint(256, (size, 3, 8, 8), generator=generator, dtype=torch.uint8)}


def loss_of(method: MoCo, batch: Batch, seed: int = 0) -> Tensor:
    return method.loss(batch, torch_generator(seed, "loss")).loss


def learn(method: MoCo, batch: Batch, seed: int = 0) -> Tensor:
    """One batch forward and backward; gives its keys."""
    loss_of(method, batch, seed).backward()
    return method.new_keys[-1]


def step(method: MoCo) -> None:
    """What the loop does between two batches of different steps."""
    with torch.no_grad():
        for parameter in method.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=0.1)
    method.after_step(0, 10)
    method.zero_grad(set_to_none=True)


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def unit(x: Tensor) -> Tensor:
    return x / x.square().sum(1, keepdim=True).sqrt()


def oldest_first(method: MoCo) -> Tensor:
    return method.queue.roll(-int(method.pointer), 0)


# ---- the loss -----------------------------------------------------------------------------------


def slow_info_nce(query: Tensor, key: Tensor, queue: Tensor, temperature: float):
    """Equation 1 with loops in float64: the mean loss, and how often the key has the top score."""
    losses, found = [], 0
    for q, k in zip(query.double().tolist(), key.double().tolist(), strict=True):
        length = math.sqrt(sum(x * x for x in q))
        scores = [
            sum(x * y for x, y in zip(q, other, strict=True)) / length / temperature
            for other in [k, *queue.double().tolist()]
        ]
        losses.append(math.log(sum(math.exp(score) for score in scores)) - scores[0])
        found += all(scores[0] > score for score in scores[1:])
    return sum(losses) / len(losses), found / len(losses)


@pytest.mark.parametrize(
    ("batch", "keys", "temperature"), [(8, 12, 0.07), (5, 1, 0.2), (1, 7, 1.0)]
)
def test_info_nce_equals_loops(batch: int, keys: int, temperature: float):
    generator = torch_generator(0, "vectors")
    query = 3 * torch.randn(batch, 4, generator=generator)
    key = unit(query + 2 * torch.randn(batch, 4, generator=generator))
    queue = unit(torch.randn(keys, 4, generator=generator))
    loss, found = info_nce(query, key, queue, temperature)
    expected, share = slow_info_nce(query, key, queue, temperature)
    assert loss.item() == pytest.approx(expected, rel=2e-5)
    assert found.item() == pytest.approx(share, abs=1e-6)
    if batch == 8:
        assert 0 < share < 1, "the toy vectors must not all be found"


def test_info_nce_is_float32_under_autocast():
    generator = torch_generator(0, "vectors")
    query, key, queue = (unit(torch.randn(n, 4, generator=generator)) for n in (3, 3, 9))
    expected, _ = info_nce(query, key, queue, 0.07)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = info_nce(query, key, queue, 0.07)
    assert torch.equal(loss, expected)


@pytest.mark.parametrize("symmetric", [False, True])
def test_loss_compares_each_query_with_the_teachers_key_of_the_other_view(symmetric: bool):
    method, batch = build(symmetric=symmetric).eval(), pictures(4)
    with torch.no_grad():  # teacher and encoder must not be the same network
        noise = torch_generator(0, "teacher")
        for parameter in method.teacher_head.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=noise))
    generator = torch_generator(0, "loss")
    views = [augment(batch["image"], CROPS, generator) for _ in range(2)]
    queries = [method.head(method.encoder({"image": view}).pooled) for view in views]
    keys = [method.teacher_head(method.teacher_encoder({"image": v}).pooled) for v in views]
    ways = [
        slow_info_nce(query, unit(key), method.queue, 0.07)[0]
        for query, key in zip(queries, reversed(keys), strict=True)
    ]
    assert abs(ways[0] - ways[1]) > 1e-3
    expected = sum(ways) / 2 if symmetric else ways[0]
    output = method.loss(batch, torch_generator(0, "loss"))
    assert output.loss.item() == pytest.approx(expected, rel=1e-4)
    assert output.weight == 4


def test_head_is_linear_or_has_one_hidden_layer_without_batch_norm():
    assert isinstance(build().head, nn.Linear)
    kinds = [type(layer) for layer in build(hidden_dim=5).head]
    assert kinds == [nn.Linear, nn.ReLU, nn.Linear]


# ---- the queue ----------------------------------------------------------------------------------


def test_queue_begins_with_unit_vectors_that_the_seed_decides():
    queue = build(queue_size=500).queue
    assert torch.allclose(queue.square().sum(1), torch.ones(500), atol=1e-5)
    assert queue.mean(0).abs().max() < 0.1
    assert torch.equal(queue, build(queue_size=500).queue)


@pytest.mark.parametrize("queue_size", [1, 3, 4, 8, 10])
def test_queue_wraps_and_holds_the_newest_keys_in_order(queue_size: int):
    method = build(queue_size=queue_size)
    everything = [method.queue.clone()]
    for number in range(7):
        everything.append(learn(method, pictures(4, number), number))
        step(method)
        expected = torch.cat(everything)[-queue_size:]
        assert torch.equal(oldest_first(method), expected)
    assert method.pointer.shape == ()
    assert 0 <= method.pointer < queue_size


@pytest.mark.parametrize("symmetric", [False, True])
def test_keys_are_the_teachers_unit_vectors_of_the_other_views(symmetric: bool):
    method, batch = build(symmetric=symmetric), pictures(4)
    step_by_step = copy.deepcopy(method)
    generator = torch_generator(0, "loss")
    views = [augment(batch["image"], CROPS, generator) for _ in range(2)]
    expected = [
        unit(step_by_step.teacher_head(step_by_step.teacher_encoder({"image": view}).pooled))
        for view in (reversed(views) if symmetric else views[1:])
    ]
    torch.testing.assert_close(learn(method, batch), torch.cat(expected), rtol=0, atol=1e-6)


def test_all_batches_of_an_accumulated_step_enter_the_queue():
    method = build()
    keys = [learn(method, pictures(3, number), number) for number in range(3)]
    step(method)
    assert torch.equal(oldest_first(method)[-9:], torch.cat(keys))
    assert method.new_keys == []


def test_keys_of_a_step_that_was_passed_over_stay_out():
    method = build()
    before = method.queue.clone()
    learn(method, pictures(3, 0))
    method.zero_grad(set_to_none=True)  # as the loop does after a step that was not finite
    keys = learn(method, pictures(3, 1))
    step(method)
    assert torch.equal(oldest_first(method), torch.cat([before[3:], keys]))


def test_evaluation_changes_nothing():
    method = build().eval()
    before = snapshot(method)
    with torch.no_grad():
        first = loss_of(method, pictures(4))
        assert loss_of(method, pictures(4)) == first
    assert method.new_keys == []
    for name, tensor in method.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_loss_in_training_leaves_queue_and_teacher_to_after_step():
    method = build()
    held = [method.queue, method.pointer, *method.teacher_encoder.parameters()]
    held += method.teacher_head.parameters()
    before = [tensor.clone() for tensor in held]
    learn(method, pictures(4))
    assert all(torch.equal(*pair) for pair in zip(held, before, strict=True))
    assert not any("keys" in name for name in method.state_dict())


# ---- the teacher --------------------------------------------------------------------------------


def test_no_gradient_reaches_the_keys():
    method = build(symmetric=True)
    teacher = [*method.teacher_encoder.parameters(), *method.teacher_head.parameters()]
    assert not any(parameter.requires_grad for parameter in teacher)
    for parameter in teacher:  # not even if it could be trained
        parameter.requires_grad_()
    keys = learn(method, pictures(4))
    assert not keys.requires_grad
    assert all(parameter.grad is None for parameter in teacher)
    assert all(parameter.grad is not None for parameter in method.encoder.parameters())


def test_teacher_moves_by_its_momentum_and_keeps_its_own_running_statistics():
    method = build(momentum=0.8, hidden_dim=5)
    pairs = ((method.teacher_encoder, method.encoder), (method.teacher_head, method.head))
    for number in range(2):
        learn(method, pictures(4, number), number)
        old = [snapshot(teacher) for teacher, _ in pairs]
        step(method)
        for (teacher, student), before in zip(pairs, old, strict=True):
            for name, parameter in teacher.named_parameters():
                moved = 0.8 * before[name].double() + 0.2 * student.state_dict()[name].double()
                torch.testing.assert_close(parameter.double(), moved, rtol=0, atol=1e-6)
                assert not torch.equal(parameter, before[name]), name
            for name, buffer in teacher.named_buffers():
                assert name not in before or torch.equal(buffer, before[name]), name


def test_teachers_running_statistics_are_those_of_the_keys_views():
    method, batch = build(), pictures(4)
    alone = copy.deepcopy(method.teacher_encoder)
    generator = torch_generator(0, "loss")
    _, view = (augment(batch["image"], CROPS, generator) for _ in range(2))
    alone({"image": view})
    learn(method, batch)
    step(method)
    norms = [module for module in method.teacher_encoder.modules() if isinstance(module, BatchNorm)]
    own = [module for module in alone.modules() if isinstance(module, BatchNorm)]
    for norm, expected in zip(norms, own, strict=True):
        assert torch.equal(norm.running_mean, expected.running_mean)
        assert torch.equal(norm.running_var, expected.running_var)


# ---- the configuration --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("queue_size", 0),
        ("hidden_dim", -1),
        ("projection_dim", 0),
        ("momentum", -0.1),
        ("momentum", 1.0),
        ("momentum", math.nan),
        ("temperature", 0.0),
        ("temperature", math.nan),
    ],
)
def test_impossible_values_are_refused(key: str, value: float):
    with pytest.raises(ValueError, match=key):
        Config(**{key: value})


# ---- two ranks ----------------------------------------------------------------------------------


def queue_after(num_steps: int, rows: slice) -> dict[str, Tensor]:
    """Queue, pointer and teacher of one process that sees those rows of each batch of 6."""
    method = build(views=NO_CHANGE)
    for number in range(num_steps):
        learn(method, {"image": pictures(6, number)["image"][rows]}, number)
        for parameter in method.parameters():  # the loop's mean over ranks
            if parameter.grad is not None:
                parameter.grad = ranks.total(parameter.grad) / ranks.count()
        step(method)
    return snapshot(method)


def one_rank(rank: int) -> dict[str, Tensor]:
    """What each of the two processes runs."""
    return queue_after(2, slice(3 * rank, 3 * rank + 3))


def test_queue_is_equal_on_all_ranks_and_holds_the_keys_of_all(on_two_ranks):
    first, second = on_two_ranks(one_rank)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    expected = queue_after(2, slice(None))
    assert expected["pointer"] == 2  # two steps of 6 keys, 10 places
    for name, tensor in expected.items():
        torch.testing.assert_close(first[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
