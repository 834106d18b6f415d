import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfsup.batch import ImageSpec
from selfsup.config import from_mapping, preset_values, presets, to_mapping
from selfsup.errors import ConfigError
from selfsup.models.batch_norm import BatchNorm
from selfsup.models.resnet import Config, Convolution, ResNetEncoder
from selfsup.randomness import isolated, seed_layers, torch_generator

SPEC = ImageSpec(size=32, channels=3, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
BARE = ImageSpec(size=32, channels=3, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
SMALL = Config(blocks=(1, 2), widths=(8, 16), stem="strided", zero_init_residual=False)
RESNET_50 = Config(block="bottleneck", blocks=(3, 4, 6, 3))


def build(config: Config, spec: ImageSpec = SPEC) -> ResNetEncoder:
    with isolated():
        seed_layers(0, "model")
        return ResNetEncoder(config, spec).eval()


def randomised(encoder: nn.Module) -> nn.Module:
    """Every factor, offset and running statistic random, so that none goes unnoticed."""
    generator = torch_generator(0, "weights")
    for part in encoder.modules():
        if isinstance(part, BatchNorm | nn.BatchNorm2d):
            for tensor in (part.weight, part.bias, part.running_mean, part.running_var):
                tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return encoder


def pictures(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch_generator(0, "pictures"))


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


# Against transformers, number for number


def theirs_by_our_names(model: nn.Module, config: Config) -> dict[str, Tensor]:
    """The weights of a `transformers` ResNetModel under torchvision's names."""
    places = {("embedder", "embedder"): ("conv1", "bn1")}
    for stage, blocks in enumerate(config.blocks):
        for block in range(blocks):
            theirs, ours = f"encoder.stages.{stage}.layers.{block}", f"layer{stage + 1}.{block}"
            for i in range(3 if config.block == "bottleneck" else 2):
                places[theirs, f"layer.{i}"] = (f"{ours}.conv{i + 1}", f"{ours}.bn{i + 1}")
            places[theirs, "shortcut"] = (f"{ours}.downsample.0", f"{ours}.downsample.1")
    out = {}
    for name, tensor in model.state_dict().items():
        module, leaf = name.rsplit(".", 1)
        module, kind = module.rsplit(".", 1)
        place = next(p for p in places if module == ".".join(p))
        out[f"{places[place][kind == 'normalization']}.{leaf}"] = tensor
    return out


@pytest.mark.parametrize("config", [Config(), RESNET_50], ids=["resnet18", "resnet50"])
def test_equals_transformers(config):
    from transformers import ResNetConfig, ResNetModel

    their_config = ResNetConfig(
        depths=config.blocks,
        hidden_sizes=[width * config.expansion for width in config.widths],
        layer_type=config.block,
        downsample_in_bottleneck=False,
    )
    with isolated():
        seed_layers(0, "theirs")
        theirs = randomised(ResNetModel(their_config)).double()
    ours = build(config, BARE).double()
    ours.load_state_dict(theirs_by_our_names(theirs, config))
    x = torch.rand(2, 3, 40, 72, generator=torch_generator(0, "x"), dtype=torch.float64)
    for training in (True, False):  # by the batch's statistics, then by the running ones
        with torch.no_grad():
            expected = theirs.train(training)(x)
            got = ours.train(training)({"image": x})
        map, pooled = expected.last_hidden_state, expected.pooler_output[..., 0, 0]
        assert map.shape == (2, ours.dim, 2, 3)
        size = map.abs().max()
        close(got.last / size, map.flatten(2).transpose(1, 2) / size, 1e-10)
        close(got.pooled.double() / size, pooled / size, 1e-6)  # ours is float32
    moved = theirs_by_our_names(theirs, config)
    assert set(ours.state_dict()) == set(moved)
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, moved[name], rtol=1e-10, atol=1e-10)


# The public layout

NAMES = [  # of torchvision's resnet18 and resnet50
    "conv1.weight",
    "bn1.weight",
    "bn1.bias",
    "bn1.running_mean",
    "bn1.running_var",
    "bn1.num_batches_tracked",
    "layer1.0.conv1.weight",
    "layer1.0.bn1.weight",
    "layer1.1.conv2.weight",
    "layer2.0.downsample.0.weight",
    "layer2.0.downsample.1.weight",
    "layer2.0.downsample.1.running_var",
    "layer4.1.bn2.bias",
]
NAMES_50 = ["layer1.0.conv3.weight", "layer1.0.downsample.0.weight", "layer3.5.bn3.running_mean"]


@pytest.mark.parametrize(
    ("config", "names", "num_entries", "num_parameters"),
    [(Config(), NAMES, 120, 11_176_512), (RESNET_50, NAMES + NAMES_50, 318, 23_508_032)],
    ids=["resnet18", "resnet50"],
)
def test_weights_are_those_of_the_public_layout(config, names, num_entries, num_parameters):
    with torch.device("meta"):
        encoder = ResNetEncoder(config, SPEC)
    state = encoder.state_dict()
    assert set(names) <= set(state)
    assert len(state) == num_entries  # and none of ours: no mean, no std
    assert count(encoder) == num_parameters
    assert state["layer2.0.conv2.weight"].shape == (128, 128, 3, 3)
    assert encoder.dim == config.widths[-1] * config.expansion


def test_a_bottleneck_halves_the_map_in_its_3x3():
    block = build(replace(SMALL, block="bottleneck")).layer2[0]
    assert (block.conv1.stride, block.conv2.stride, block.conv3.stride) == ((1, 1), (2, 2), (1, 1))


# Sizes of the maps


@pytest.mark.parametrize(
    ("stem", "size", "expected"),
    [("imagenet", 64, 8), ("imagenet", 32, 4), ("strided", 32, 8), ("cifar", 32, 16)],
)
def test_each_stem_divides_the_size(stem, size, expected):
    encoder = build(replace(SMALL, stem=stem))
    batch = {"image": pictures(2, 3, size, size)}
    assert encoder.feature_map(batch).shape == (2, 16, expected, expected)
    features = encoder(batch)
    assert features.last.shape == (2, expected**2, 16)
    assert features.mask.shape == (2, expected**2)
    assert features.mask.all()
    assert features.pooled.shape == (2, 16)
    assert len(features.hidden) == encoder.num_layers + 1 == 1


def test_pictures_need_not_be_square():
    assert build(SMALL).feature_map({"image": pictures(1, 3, 24, 40)}).shape == (1, 16, 6, 10)


def test_features_are_the_map_row_by_row_and_its_mean():
    encoder = randomised(build(SMALL))
    batch = {"image": pictures(2, 3, 24, 40)}
    map, features = encoder.feature_map(batch), encoder(batch)
    for row in range(6):
        for column in range(10):
            assert torch.equal(features.last[:, 10 * row + column], map[:, :, row, column])
    expected = torch.stack([features.last[:, i] for i in range(60)]).double().mean(0)
    close(features.pooled.double(), expected)


def test_a_stem_of_its_own_width_and_grey_pictures():
    spec = ImageSpec(size=32, channels=1, mean=(0.5,), std=(0.2,))
    encoder = build(replace(SMALL, stem_width=4), spec)
    assert encoder.conv1.weight.shape == (4, 1, 3, 3)
    assert encoder.layer1[0].conv1.weight.shape == (8, 4, 3, 3)
    assert encoder.layer1[0].downsample is not None
    assert encoder({"image": pictures(2, 1, 32, 32)}).pooled.shape == (2, 16)


# What is read


def test_bytes_equal_fractions():
    encoder, image = randomised(build(SMALL)), pictures(2, 3, 32, 32)
    expected = encoder({"image": image.float() / 255}).last
    assert torch.equal(encoder({"image": image}).last, expected)


def test_pictures_are_standardised_with_the_spec():
    image = torch.rand(2, 3, 32, 32, generator=torch_generator(0, "x"))
    expected = torch.empty_like(image)
    for channel in range(3):
        expected[:, channel] = (image[:, channel] - SPEC.mean[channel]) / SPEC.std[channel]
    ours, bare = randomised(build(SMALL)), randomised(build(SMALL, BARE))
    close(ours({"image": image}).last, bare({"image": expected}).last)
    assert (ours({"image": image}).last - bare({"image": image}).last).abs().max() > 0.1


# Memory format and precision


@pytest.mark.parametrize("stem", ["imagenet", "cifar", "strided"])
@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_the_memory_format_changes_no_number(block, stem):
    config = replace(SMALL, block=block, stem=stem)
    image, outputs, gradients = pictures(4, 3, 16, 16), [], []
    for channels_last in (True, False):
        encoder = randomised(build(replace(config, channels_last=channels_last)))
        map = encoder.double().train().feature_map({"image": image})
        assert map.is_contiguous(memory_format=torch.channels_last) is channels_last
        map.square().mean().backward()
        outputs.append(map)
        gradients.append([p.grad for p in encoder.parameters()])
    close(*outputs, 1e-10)
    for got, expected in zip(*gradients, strict=True):
        close(got, expected, 1e-10)


def test_bf16_autocast_stays_close_to_float32():
    encoder = randomised(build(SMALL)).train()
    batch = {"image": pictures(8, 3, 32, 32)}
    expected = encoder(batch).pooled
    with torch.autocast("cpu", torch.bfloat16):
        features = encoder(batch)
    assert features.last.dtype == torch.bfloat16
    assert features.pooled.dtype == torch.float32
    assert (features.pooled - expected).norm() / expected.norm() < 0.05


# Initial weights and gradients


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_gradients_reach_every_parameter(block):
    encoder = build(replace(SMALL, block=block)).train()
    encoder({"image": pictures(4, 3, 32, 32)}).pooled.square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_zero_init_residual_makes_each_block_its_shortcut(block):
    encoder = build(replace(SMALL, block=block, zero_init_residual=True)).train()
    plain = build(replace(SMALL, block=block)).train()
    for stage in (encoder.layer1, encoder.layer2):
        for part in stage:
            x = torch.randn(4, part.conv1.in_channels, 6, 6, generator=torch_generator(0, "x"))
            beside = x if part.downsample is None else part.downsample(x)
            assert torch.equal(part(x), beside.relu())
    assert all(part.weight.all() for part in plain.modules() if isinstance(part, BatchNorm))
    # the first steps can still move it
    encoder({"image": pictures(4, 3, 32, 32)}).pooled.square().sum().backward()
    assert all(part.last_norm.weight.grad.any() for part in [*encoder.layer1, *encoder.layer2])


def test_initial_convolutions_have_the_published_spread():
    encoder = build(Config(blocks=(1, 1), widths=(64, 128)))
    for layer in (encoder.conv1, encoder.layer1[0].conv1, encoder.layer2[0].downsample[0]):
        fan_out = layer.out_channels * layer.kernel_size[0] ** 2
        assert layer.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.03)


# Configuration and presets


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"blocks": []}, r"blocks needs a number above 0 for each stage, got \(\)"),
        ({"blocks": [2, 0], "widths": [8, 8]}, r"blocks needs a number above 0"),
        ({"widths": [64, 128]}, r"each of the 4 stages in blocks = .* got \(64, 128\)"),
        ({"widths": [64, 128, 0, 512]}, "widths needs a number above 0"),
        ({"stem_width": -1}, "stem_width must not be negative, got -1"),
        ({"stem": "imagnet"}, "did you mean 'imagenet'"),
    ],
)
def test_contradictions_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        from_mapping(Config, values, "model")


def multiply_adds(encoder: ResNetEncoder, size: int) -> int:
    """Products in the convolutions for one picture, counted from the shapes that they gave."""
    products = 0

    def note(layer: nn.Module, _: tuple, out: Tensor) -> None:
        nonlocal products
        products += out[0].numel() * layer.weight[0].numel()

    for part in encoder.modules():
        if isinstance(part, nn.Conv2d):
            part.register_forward_hook(note)
    encoder({"image": torch.empty(1, 3, size, size, dtype=torch.uint8, device="meta")})
    return products


PRESETS = {  # parameters; picture size; multiply-adds
    "resnet18": (11_176_512, 224, 1_813_561_344),
    "resnet50": (23_508_032, 224, 4_087_136_256),
    "resnet18-cifar": (11_168_832, 32, 555_417_600),
    "resnet-narrow": (1_226_400, 32, 15_949_824),
}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_the_stated_size(name):
    num_parameters, size, products = PRESETS[name]
    config = from_mapping(Config, preset_values("resnet", name), "model")
    assert from_mapping(Config, to_mapping(config), "model") == config
    with torch.device("meta"):
        encoder = ResNetEncoder(config, SPEC)
    assert count(encoder) == num_parameters
    assert multiply_adds(encoder, size) == products


def test_every_preset_is_counted():
    assert set(PRESETS) == set(presets()["resnet"])


def test_the_narrow_preset_counted_by_hand():
    second = 32 * 64 * 9 + 64 * 64 * 9 + 32 * 64
    stages = [  # positions of the map; weights of convolutions; channels that are normalised
        (16 * 16, 3 * 32 * 9, 32),
        (16 * 16, 2 * 32 * 32 * 9, 2 * 32),
        (8 * 8, second, 3 * 64),
        (4 * 4, 4 * second, 3 * 128),
        (2 * 2, 16 * second, 3 * 256),
    ]
    num_parameters = sum(weights + 2 * channels for _, weights, channels in stages)
    products = sum(positions * weights for positions, weights, _ in stages)
    assert PRESETS["resnet-narrow"] == (num_parameters, 32, products)


COMPILES = """
import torch
import torch.nn.functional as F
from selfsup.batch import ImageSpec
from selfsup.models.resnet import Config, Convolution, ResNetEncoder
spec = ImageSpec(size=16, channels=3, mean=(0.5,) * 3, std=(0.2,) * 3)
encoder = ResNetEncoder(Config(blocks=(1, 1), widths=(8, 16)), spec)
compiled = torch.compile(encoder, backend="eager", fullgraph=True)
batch = dict(image=torch.arange(2 * 3 * 16 * 16).view(2, 3, 16, 16).to(torch.uint8))
torch.testing.assert_close(compiled(batch).last, encoder(batch).last)
"""


@pytest.mark.slow
def test_compiles_without_a_graph_break():
    """In a process of its own: the shape checks of the tests cannot be traced."""
    done = subprocess.run([sys.executable, "-c", COMPILES], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 3), (4, 3), (2, 5)])
def test_tiny_maps_are_convolved_as_large_ones(size, stride):
    layer = Convolution(8, 6, 3, stride, padding=1, bias=False)
    x = torch.randn(5, 8, *size).contiguous(memory_format=torch.channels_last).requires_grad_()
    out, expected = layer(x), F.conv2d(x, layer.weight, None, stride, 1)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    seen = torch.randn_like(expected)
    pairs = (torch.autograd.grad(each, [x, layer.weight], seen) for each in (out, expected))
    for ours, theirs in zip(*pairs, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
