"""Layer decay: the rate of every layer, in the optimizer and in the loop; the depth of names."""

import pytest
import torch

from selfsup.batch import ImageSpec, Vocabulary
from selfsup.errors import ConfigError
from selfsup.models.resnet import Config as ResNetConfig
from selfsup.models.resnet import ResNetEncoder
from selfsup.models.transformer import Config, TransformerEncoder
from selfsup.tasks import classification
from selfsup.training.optim import adamw
from selfsup.tuning.choice import Tuning, tune

TOKENS = torch.tensor([[5, 7, 2, 9], [4, 3, 8, 8]])
OPTIMIZER = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}


def tuned(text, encoder=None, **options):
    torch.manual_seed(0)
    config = Config(dim=8, layers=2, heads=2, dropout=0.0, norm="pre")
    encoder = encoder or TransformerEncoder(config, Vocabulary(size=20))
    task = classification.Classification(classification.Config(dropout=0.0), encoder, ("a", "b"))
    tune(task, Tuning.of(text, options))
    return task


def test_each_layer_learns_at_a_share_of_the_one_above():
    task = tuned("full+layer_decay", layer_decay={"factor": 0.5})
    groups = adamw(task, **OPTIMIZER).param_groups
    scale = {p: group["lr_scale"] for group in groups for p in group["params"]}
    for name, parameter in task.named_parameters():
        expected = 0.125
        for part, value in (("head.", 1.0), ("final_norm", 0.5), ("s.1.", 0.5), ("s.0.", 0.25)):
            if name.startswith("head.") if part == "head." else part in name:
                expected = value
        assert scale[parameter] == expected, name
    assert len(groups) == 8  # four rates, each for what is decayed and what is not


def test_the_first_step_of_adam_is_as_long_as_the_rate():
    task = tuned("full+layer_decay", layer_decay={"factor": 0.5})
    optimizer = adamw(task, **OPTIMIZER)
    for group in optimizer.param_groups:
        group["lr"] = 0.1 * group["lr_scale"]  # as the loop sets it
    before = {name: p.detach().clone() for name, p in task.named_parameters()}
    for parameter in task.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moved = {name: before[name] - p.detach() for name, p in task.named_parameters()}
    for name, length in (
        ("head.weight", 0.1),
        ("encoder.layers.1.feedforward.up.weight", 0.05),
        ("encoder.layers.0.feedforward.up.weight", 0.025),
        ("encoder.embedding.tokens.weight", 0.0125),
    ):
        torch.testing.assert_close(moved[name], torch.full_like(moved[name], length))


def test_what_is_added_to_a_layer_learns_as_that_layer():
    task = tuned("lora+layer_decay", layer_decay={"factor": 0.5})
    parts = list(task.encoder.additions.every("own"))
    scales = {place: {p.lr_scale for p in part.parameters()} for place, _, part in parts}
    assert scales == {"layers/0/attention/qkv": {0.25}, "layers/1/attention/qkv": {0.5}}


@pytest.mark.parametrize("text", ["layer_decay+full", "probe+layer_decay", "probe+unfreezing"])
def test_something_must_move_already(text):
    with pytest.raises(ConfigError, match="acts on what another tuning lets move"):
        tuned(text)


@pytest.mark.parametrize("kind", ["layer_decay", "unfreezing", "reinit"])
def test_an_encoder_without_a_stack_of_layers(kind):
    config = ResNetConfig(widths=(4, 8), blocks=(1, 1))
    encoder = ResNetEncoder(config, ImageSpec(size=8, channels=3, mean=(0.0,) * 3, std=(1.0,) * 3))
    with pytest.raises(ConfigError, match=f"{kind} needs an encoder of layers one above"):
        tuned(f"full+{kind}", encoder)
    shared = TransformerEncoder(
        Config(dim=8, layers=2, heads=2, share_layers=True), Vocabulary(size=20)
    )
    with pytest.raises(ConfigError, match=f"{kind} needs an encoder of layers one above"):
        tuned(f"full+{kind}", shared)


@pytest.mark.parametrize("factor", [0, 1.5])
def test_a_factor_out_of_range(factor):
    with pytest.raises(ConfigError, match=r"factor must lie in \(0, 1\]"):
        Tuning.of("full+layer_decay", {"layer_decay": {"factor": factor}})
