"""SimSiam: its loss against loops, its stop-gradient, its heads."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from selfsup.batch import Batch, ImageSpec
from selfsup.errors import ConfigError
from selfsup.methods.bootstrapping.simsiam import Config, SimSiam, negative_cosine
from selfsup.methods.views import ViewConfig, augment
from selfsup.models.batch_norm import BatchNorm
from selfsup.models.resnet import Config as Model
from selfsup.models.resnet import ResNetEncoder
from selfsup.randomness import isolated, seed_layers, torch_generator

MODEL = Model(blocks=(1,), widths=(4,), stem="cifar", zero_init_residual=False)
SPEC = ImageSpec(size=8, channels=3, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
CROPS = ViewConfig(crop_scale=(0.5, 1.0), jitter=0.0, grey=0.0, blur=0.0)


def build(**config) -> SimSiam:
    with isolated():
        seed_layers(0, "model")
        encoder = ResNetEncoder(MODEL, SPEC)
        settings = {"projection_dim": 8, "predictor_dim": 3, "views": CROPS}
        return SimSiam(Config(**(settings | config)), encoder, SPEC).train()


def pictures(size: int) -> Batch:
    generator = torch_generator(0, "pictures")
    return {"image": torch.randint(256, (size, 3, 8, 8), generator=generator, dtype=torch.uint8)}


def loss_of(method: SimSiam, batch: Batch) -> Tensor:
    return method.loss(batch, torch_generator(0, "loss")).loss


def slow_loss(prediction: Tensor, target: Tensor) -> float:
    """Equation 1 with loops in float64."""
    cosines = []
    for p, z in zip(prediction.double().tolist(), target.double().tolist(), strict=True):
        length, other = (math.sqrt(sum(x * x for x in vector)) for vector in (p, z))
        cosines.append(sum(x * y for x, y in zip(p, z, strict=True)) / length / other)
    return -sum(cosines) / len(cosines)


def outputs(method: SimSiam, batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
    """Predictions and projections of both views, each in a pass of its own."""
    generator = torch_generator(0, "loss")
    views = [augment(batch["image"], CROPS, generator) for _ in range(2)]
    projections = [method.projector(method.encoder({"image": view}).pooled) for view in views]
    return [method.predictor(projection) for projection in projections], projections


# ---- the loss -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_negative_cosine_equals_loops(dtype: torch.dtype):
    generator = torch_generator(0, "vectors")
    prediction, target = (3 * torch.randn(2, 7, 5, generator=generator)).to(dtype)
    loss = negative_cosine(prediction, target)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(slow_loss(prediction, target), rel=1e-5, abs=1e-6)


def test_gradient_flows_into_the_prediction_and_never_into_the_target():
    generator = torch_generator(0, "vectors")
    prediction, target = (
        torch.randn(7, 5, generator=generator, requires_grad=True) for _ in range(2)
    )
    negative_cosine(prediction, target).backward()
    assert target.grad is None
    assert prediction.grad.abs().max() > 0


def test_each_view_predicts_the_other_with_statistics_of_its_own():
    method, batch = build(), pictures(6)
    (p1, p2), (z1, z2) = outputs(copy.deepcopy(method), batch)
    ways = slow_loss(p1, z2), slow_loss(p2, z1)
    assert abs(ways[0] - ways[1]) > 1e-3
    output = method.loss(batch, torch_generator(0, "loss"))
    assert output.loss.item() == pytest.approx(sum(ways) / 2, rel=1e-4)
    assert output.weight == 6
    assert {int(norm.num_batches_tracked) for norm in norms(method)} == {2}


def test_methods_gradient_is_that_of_constant_targets():
    method, batch = build(), pictures(6)
    stopped, flowing = copy.deepcopy(method), copy.deepcopy(method)
    loss_of(method, batch).backward()
    (p1, p2), (z1, z2) = outputs(stopped, batch)
    constants = z1.detach().clone(), z2.detach().clone()
    cosine = nn.CosineSimilarity()
    (-(cosine(p1, constants[1]) + cosine(p2, constants[0])).mean() / 2).backward()
    (p1, p2), (z1, z2) = outputs(flowing, batch)
    (-(cosine(p1, z2) + cosine(p2, z1)).mean() / 2).backward()
    largest = 0.0
    for (name, got), expected, other in zip(
        method.named_parameters(), stopped.parameters(), flowing.parameters(), strict=True
    ):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-4, atol=1e-6, msg=name)
        largest = max(largest, (got.grad - other.grad).abs().max().item())
    assert largest > 1e-3


def test_metric_is_the_spread_of_the_projections_directions():
    method, batch = build(), pictures(6)
    metric = method.loss(batch, torch_generator(0, "loss")).metrics["target_deviation"]
    assert 0.5 < metric <= 1  # batch normalisation has spread them
    with torch.no_grad():
        method.eval().projector[-1].running_mean.fill_(-1e4)  # one vector for all
    metric = method.loss(batch, torch_generator(0, "loss")).metrics["target_deviation"]
    assert metric < 1e-3


# ---- the heads ----------------------------------------------------------------------------------


def norms(method: SimSiam) -> list[BatchNorm]:
    return [module for module in method.modules() if isinstance(module, BatchNorm)]


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_projector_is_normalised_to_the_end_and_the_predictor_is_narrow(layers: int):
    method = build(projector_layers=layers)
    linear = [module for module in method.projector if isinstance(module, nn.Linear)]
    assert [tuple(layer.weight.shape) for layer in linear] == [(8, 4), (8, 8), (8, 8)][:layers]
    assert all(layer.bias is None for layer in linear)
    projector = [module for module in method.projector if isinstance(module, BatchNorm)]
    assert [norm.affine for norm in projector] == [True] * (layers - 1) + [False]
    assert method.projector[-1] is projector[-1]
    first, norm, relu, last = method.predictor
    assert (first.weight.shape, last.weight.shape) == ((3, 8), (8, 3))
    assert (type(norm), type(relu), last.bias is None) == (BatchNorm, nn.ReLU, False)


# ---- side effects, wrong use --------------------------------------------------------------------


def test_evaluation_changes_nothing():
    method = build().eval()
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    with torch.no_grad():
        first = loss_of(method, pictures(6))
        assert loss_of(method, pictures(6)) == first
    for name, tensor in method.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_batch_of_one_is_refused_in_training_alone():
    method = build()
    with pytest.raises(ConfigError, match=r"training\.batch_size >= 2"):
        loss_of(method, pictures(1))
    assert loss_of(method.eval(), pictures(1)).isfinite()


@pytest.mark.parametrize("key", ["projector_layers", "projection_dim", "predictor_dim"])
def test_impossible_values_are_refused(key: str):
    with pytest.raises(ValueError, match=key):
        Config(**{key: 0})
