import numpy as np
import pytest
import torch
from scipy.special import erf
from torch import Tensor

from selfsup.batch import ImageSpec, TableSpec
from selfsup.config import from_mapping
from selfsup.errors import ConfigError, DataError
from selfsup.models.batch_norm import BatchNorm
from selfsup.models.mlp import Config, MLPEncoder
from selfsup.randomness import isolated, seed_layers, torch_generator

TABLE = TableSpec(columns=("age", "city"), source=(0, 1, 1, 1, 0))
PICTURES = ImageSpec(size=4, channels=2, mean=(0.4, 0.6), std=(0.2, 0.5))
NORMS = ("none", "layer", "batch")


def build(spec: TableSpec | ImageSpec, seed: int = 0, **values) -> MLPEncoder:
    with isolated():
        seed_layers(seed, "model")
        return MLPEncoder(Config(**{"dims": (7, 6), "dim": 3, **values}), spec)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch_generator(0, "rows"))


def slow_code(encoder: MLPEncoder, flat: np.ndarray) -> np.ndarray:
    """The layers one number at a time, in float64; batch norm by its running statistics."""
    state = {k: v.double().numpy() for k, v in encoder.layers.state_dict().items()}
    rows = []
    for row in flat:
        x = [float(value) for value in row]
        for at in (0, 4, 8):
            weight, bias = state[f"{at}.weight"], state[f"{at}.bias"]
            x = [sum(w * v for w, v in zip(ws, x, strict=True)) for ws in weight]
            x = [v + b for v, b in zip(x, bias, strict=True)]
            if at == 8:
                break
            if encoder.config.norm == "layer":
                mean = sum(x) / len(x)
                var = sum((v - mean) ** 2 for v in x) / len(x)
                x = [(v - mean) / (var + 1e-5) ** 0.5 for v in x]
            if encoder.config.norm == "batch":
                mean, var = state[f"{at + 1}.running_mean"], state[f"{at + 1}.running_var"]
                x = [(v - m) / (s + 1e-5) ** 0.5 for v, m, s in zip(x, mean, var, strict=True)]
            relu = encoder.config.activation == "relu"
            x = [max(v, 0.0) if relu else v * (1 + erf(v / 2**0.5)) / 2 for v in x]
        rows.append(x)
    return np.array(rows)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_the_code_of_a_row_equals_a_slow_version(norm, activation):
    encoder = build(TABLE, norm=norm, activation=activation)
    encoder({"row": 2 * draw(16, 5) + 1})  # moves the running statistics of batch norm
    encoder.eval()
    row = draw(3, 5)
    features = encoder({"row": row})
    np.testing.assert_allclose(
        features.pooled.detach(), slow_code(encoder, row.numpy()), rtol=1e-5, atol=1e-6
    )
    assert len(features.hidden) == 1 == encoder.num_layers + 1
    assert torch.equal(features.last[:, 0], features.pooled)
    assert features.mask.shape == (3, 1)
    assert features.mask.all()


def test_batch_norm_reads_the_whole_batch_and_the_others_do_not():
    row = draw(6, 5)
    for norm in NORMS:
        encoder = build(TABLE, norm=norm)
        first = encoder({"row": row}).pooled[:3]
        alone = encoder({"row": row[:3]}).pooled
        assert torch.allclose(first, alone, atol=1e-6) == (norm != "batch")
    assert [type(part) for part in build(TABLE, norm="batch").layers][1] is BatchNorm


def test_pictures_are_standardised_with_the_spec_and_flattened():
    encoder = build(PICTURES).eval()
    image = torch.randint(
        0, 256, (2, 2, 4, 4), dtype=torch.uint8, generator=torch_generator(0, "image")
    )
    flat = np.zeros((2, 32))
    for b in range(2):
        for c, (mean, std) in enumerate(zip(PICTURES.mean, PICTURES.std, strict=True)):
            for y in range(4):
                for x in range(4):
                    flat[b, 16 * c + 4 * y + x] = (float(image[b, c, y, x]) / 255 - mean) / std
    from_bytes = encoder({"image": image}).pooled.detach()
    np.testing.assert_allclose(from_bytes, slow_code(encoder, flat), rtol=1e-5, atol=1e-6)
    assert torch.allclose(encoder({"image": image / 255}).pooled, from_bytes, atol=1e-6)


def test_a_picture_of_another_size_is_refused():
    with pytest.raises(DataError, match=r"\(2, 4, 4\).*got \(2, 8, 8\)"):
        build(PICTURES)({"image": torch.zeros(1, 2, 8, 8)})


def test_gradients_reach_every_weight():
    encoder = build(TABLE, norm="layer")
    encoder({"row": draw(8, 5)}).pooled.square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_dropout_works_in_training_alone():
    encoder = build(TABLE, dropout=0.5)
    row = draw(4, 5)
    with isolated():
        seed_layers(0, "dropout")
        assert not torch.equal(encoder({"row": row}).pooled, encoder({"row": row}).pooled)
    encoder.eval()
    assert torch.equal(encoder({"row": row}).pooled, encoder({"row": row}).pooled)


def test_without_inner_layers_it_is_one_linear_map():
    encoder = build(TABLE, dims=())
    row = draw(4, 5)
    linear = encoder.layers[0]
    assert len(encoder.layers) == 1
    expected = row @ linear.weight.T + linear.bias
    torch.testing.assert_close(encoder({"row": row}).pooled, expected, rtol=0, atol=1e-6)


def test_weights_load_into_a_fresh_encoder_and_hold_no_statistics_of_the_data():
    encoder, other = build(PICTURES), build(PICTURES, seed=1)
    assert not {"mean", "std"} & encoder.state_dict().keys()
    image = torch.rand(2, 2, 4, 4, generator=torch_generator(0, "image"))
    assert not torch.equal(encoder({"image": image}).pooled, other({"image": image}).pooled)
    other.load_state_dict(encoder.state_dict())
    assert torch.equal(encoder({"image": image}).pooled, other({"image": image}).pooled)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dims": [0]}, "above 0"),
        ({"dim": 0}, "above 0"),
        ({"dropout": 1.0}, "in \\[0, 1\\)"),
        ({"norm": "lyer"}, "did you mean 'layer'"),
    ],
)
def test_wrong_values(values, message):
    with pytest.raises(ConfigError, match=message):
        from_mapping(Config, values, "model")
