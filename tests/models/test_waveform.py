"""Waveforms to vectors: against `transformers` number for number, and that padding changes none."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from selfsup.batch import AudioSpec, Batch
from selfsup.errors import ConfigError, DataError
from selfsup.models.transformer import Config, TransformerEncoder
from selfsup.models.waveform import ConvPositions, WaveformEmbedding, standardised
from selfsup.randomness import isolated, seed_layers, torch_generator

SPEC = AudioSpec(rate=16000, mel=0, hop=160)
KERNELS, STRIDES = (10, 3, 2), (5, 2, 2)  # hop 20, reach 30
SMALL = Config(
    dim=32,
    layers=2,
    heads=2,
    feedforward_dim=48,
    positions="none",
    dropout=0.0,
    conv_channels=16,
    conv_kernels=KERNELS,
    conv_strides=STRIDES,
    conv_positions=6,
)
BASE = replace(SMALL, norm="post", embedding_norm=True)
LARGE = replace(SMALL, norm="pre", conv_norm="layer")


def build(config: Config) -> TransformerEncoder:
    with isolated():
        seed_layers(0, "model")
        return TransformerEncoder(config, SPEC).eval()


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch_generator(seed, "noise"))


def rows(*lengths: int) -> list[Tensor]:
    """Sounds of unequal loudness and offset."""
    return [0.1 * (i + 1) * noise(n, seed=i) + 0.05 * i for i, n in enumerate(lengths)]


def padded(sounds: list[Tensor], extra: int = 0) -> Batch:
    """One batch, with loud rubbish where padded."""
    longest = max(map(len, sounds)) + extra
    waveform = 5 * noise(len(sounds), longest, seed=99)
    mask = torch.zeros(len(sounds), longest, dtype=torch.bool)
    for i, sound in enumerate(sounds):
        waveform[i, : len(sound)], mask[i, : len(sound)] = sound, True
    return {"waveform": waveform, "mask": mask}


def close(got: Tensor, expected: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


# ---- against transformers -----------------------------------------------------------------------


def their_config(config: Config, **more):
    from transformers import Wav2Vec2Config

    large = config.conv_norm == "layer"
    return Wav2Vec2Config(
        hidden_size=config.dim,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=config.feedforward_dim,
        conv_dim=(config.conv_channels,) * len(config.conv_kernels),
        conv_kernel=config.conv_kernels,
        conv_stride=config.conv_strides,
        num_feat_extract_layers=len(config.conv_kernels),
        feat_extract_norm=config.conv_norm,
        conv_bias=large,
        do_stable_layer_norm=large,
        num_conv_pos_embeddings=config.conv_positions,
        num_conv_pos_embedding_groups=16,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        feat_proj_dropout=0.0,
        layerdrop=0.0,
        **more,
    )


def randomised(model: nn.Module) -> nn.Module:
    """Every weight random, biases and norms too, so that none can be left out unnoticed."""
    generator = torch_generator(0, "weights")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model.eval()


def copy(ours: nn.Module, theirs: nn.Module) -> None:
    ours.load_state_dict(theirs.state_dict())


@torch.no_grad()
def copy_wav2vec2(encoder: TransformerEncoder, theirs: nn.Module) -> None:
    embedding, above = encoder.embedding, theirs.encoder
    for ours, layer in zip(embedding.layers, theirs.feature_extractor.conv_layers, strict=True):
        copy(ours.convolution, layer.conv)
        norm = ours.time_norm or ours.channel_norm
        assert (norm is None) is not hasattr(layer, "layer_norm")
        if norm is not None:
            copy(norm, layer.layer_norm)
    copy(embedding.content_norm, theirs.feature_projection.layer_norm)
    copy(embedding.linear, theirs.feature_projection.projection)
    convolution = above.pos_conv_embed.conv
    embedding.conv_positions.gain.copy_(convolution.parametrizations.weight.original0.flatten())
    embedding.conv_positions.direction.copy_(convolution.parametrizations.weight.original1)
    embedding.conv_positions.bias.copy_(convolution.bias)
    copy(embedding.norm or encoder.final_norm, above.layer_norm)
    for ours, layer in zip(encoder.layers, above.layers, strict=True):
        parts = [getattr(layer.attention, f"{name}_proj") for name in "qkv"]
        ours.attention.qkv.weight.copy_(torch.cat([part.weight for part in parts]))
        ours.attention.qkv.bias.copy_(torch.cat([part.bias for part in parts]))
        copy(ours.attention.out, layer.attention.out_proj)
        copy(ours.attention_norm, layer.layer_norm)
        copy(ours.feedforward.up, layer.feed_forward.intermediate_dense)
        copy(ours.feedforward.down, layer.feed_forward.output_dense)
        copy(ours.feedforward_norm, layer.final_layer_norm)


@pytest.mark.parametrize("kernel", [5, 6])
@pytest.mark.parametrize("config", [BASE, LARGE], ids=["base", "large"])
def test_features_equal_those_of_transformers(config: Config, kernel: int):
    from transformers import Wav2Vec2Model

    config = replace(config, conv_positions=kernel)
    with isolated():
        theirs = randomised(Wav2Vec2Model(their_config(config)))
    encoder = build(config)
    copy_wav2vec2(encoder, theirs)
    waveform = standardised(noise(3, 1, 700), None, 0.0).squeeze(1)
    batch = {"waveform": waveform}
    expected = theirs(waveform)
    vectors = encoder.embedding.vectors(batch)
    assert vectors.shape == (3, 34, 16)
    close(encoder.embedding.content_norm(vectors), expected.extract_features)
    close(encoder(batch).last, expected.last_hidden_state)


def test_defaults_are_those_of_the_published_model():
    from transformers import Wav2Vec2Config

    theirs, ours = Wav2Vec2Config(), Config()
    assert ours.conv_kernels == tuple(theirs.conv_kernel)
    assert ours.conv_strides == tuple(theirs.conv_stride)
    assert {ours.conv_channels} == set(theirs.conv_dim)
    embedding = WaveformEmbedding(8, channels=2)
    assert (embedding.hop, embedding.reach) == (320, 400)


# ---- padding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [0, 1, 63])
@pytest.mark.parametrize("config", [BASE, LARGE], ids=["base", "large"])
def test_padding_changes_no_real_position(config: Config, extra: int):
    encoder, sounds = build(config), rows(300, 299, 120, 30)
    batch = padded(sounds, extra)
    features = encoder(batch)
    vectors = encoder.embedding.vectors(batch)
    for i, sound in enumerate(sounds):
        alone = encoder({"waveform": sound.unsqueeze(0)})
        content = encoder.embedding.vectors({"waveform": sound.unsqueeze(0)})
        real = features.mask[i]
        assert real.sum() == alone.mask.sum() == content.shape[1]
        close(vectors[i, real], content[0])
        close(features.pooled[i], alone.pooled[0])
        for got, expected in zip(features.hidden, alone.hidden, strict=True):
            close(got[i, real], expected[0])


@pytest.mark.parametrize("config", [BASE, LARGE], ids=["base", "large"])
def test_gradients_do_not_depend_on_padding(config: Config):
    found = []
    for extra in (0, 80):
        encoder = build(config)
        encoder(padded(rows(200, 130), extra)).pooled.square().sum().backward()
        found.append({name: p.grad for name, p in encoder.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=1e-4, msg=name)


def test_a_position_is_real_when_all_its_samples_are():
    embedding = WaveformEmbedding(8, 4, KERNELS, STRIDES)
    lengths = [0, 1, 9, 10, 29, 30, 31, 49, 50, 69, 70, 100]
    mask = torch.arange(100) < torch.tensor(lengths).unsqueeze(1)
    real = embedding.real({"mask": mask})
    begins = range(0, 100 - embedding.reach + 1, embedding.hop)
    expected = [[begin + embedding.reach <= length for begin in begins] for length in lengths]
    assert real.tolist() == expected
    assert embedding.vectors({"waveform": noise(1, 100)}).shape[1] == len(begins)
    assert embedding.real({"waveform": noise(1, 100)}) is None


def test_a_position_reads_the_samples_that_hop_and_reach_say():
    embedding = WaveformEmbedding(8, 4, KERNELS, STRIDES, "layer")
    for layer in embedding.layers:  # else a changed sample changes mean and variance of all
        assert layer.time_norm is None
    waveform = noise(1, 105).requires_grad_()
    standard = standardised(waveform.unsqueeze(1), None, 0.0).detach().squeeze(1).requires_grad_()
    x = standard.unsqueeze(1)
    for layer in embedding.layers:
        x = layer(x, None)
    x[0, :, 3].square().sum().backward()
    read = standard.grad[0].nonzero().flatten()
    assert (read.min(), read.max()) == (3 * 20, 3 * 20 + 29)


def test_a_row_without_any_position_is_finite():
    encoder = build(BASE)
    features = encoder(padded(rows(90, 7)))
    assert features.mask.sum(1).tolist() == [4, 0]
    assert all(hidden.isfinite().all() for hidden in features.hidden)
    features.pooled.sum().backward()
    assert all(p.grad.isfinite().all() for p in encoder.parameters())


# ---- the parts ----------------------------------------------------------------------------------


def test_standardised_equals_loops():
    x, real = 3 * noise(3, 2, 8) + 1, torch.arange(8) < torch.tensor([[8], [5], [1]])
    got = standardised(x, real, 1e-5)
    for row in range(3):
        for channel in range(2):
            values = x[row, channel, real[row]].double().tolist()
            mean = sum(values) / len(values)
            variance = sum((v - mean) ** 2 for v in values) / len(values)
            expected = [(v - mean) / math.sqrt(variance + 1e-5) for v in values]
            assert got[row, channel, real[row]].tolist() == pytest.approx(expected, abs=1e-5)
            assert not got[row, channel, ~real[row]].any()
    close(standardised(x, None, 1e-5), standardised(x, torch.ones(3, 8, dtype=torch.bool), 1e-5))


def test_loudness_and_offset_change_nothing_and_silence_is_finite():
    encoder, waveform = build(BASE), noise(2, 200)
    expected = encoder({"waveform": waveform}).last
    close(encoder({"waveform": 0.02 * waveform + 0.3}).last, expected, atol=1e-3)
    assert encoder({"waveform": torch.zeros(1, 200)}).last.isfinite().all()


def test_convolution_over_positions_is_normalised_at_every_place_of_its_kernel():
    with isolated():
        seed_layers(0, "model")
        positions = ConvPositions(32, 5)
    assert positions.direction.shape == (32, 2, 5)  # 16 groups
    x = noise(2, 9, 32)
    expected = positions(x, None)
    assert expected.shape == x.shape
    with torch.no_grad():
        positions.direction.mul_(torch.tensor([1.0, 2.0, 3.0, 0.5, 7.0]))
    close(positions(x, None), expected)


def test_order_matters_through_the_convolution_alone():
    waveform = noise(1, 400)
    turned = torch.cat([waveform[:, 200:], waveform[:, :200]], 1)
    for kernel, differs in ((6, True), (0, False)):
        encoder = build(replace(LARGE, conv_positions=kernel))
        vectors = encoder.embedding.vectors({"waveform": waveform})
        change = encoder({"waveform": waveform}, vectors=vectors).pooled - (
            encoder({"waveform": turned}, vectors=vectors.roll(7, 1)).pooled
        )
        assert bool(change.abs().max() > 1e-4) is differs


# ---- what is refused ----------------------------------------------------------------------------


def test_a_batch_shorter_than_one_position_is_refused():
    with pytest.raises(DataError, match="29 samples is shorter than the 30"):
        build(BASE)({"waveform": noise(1, 29)})


@pytest.mark.parametrize("wrong", [{"causal": True}, {"embedding_dim": 16}])
def test_what_waveforms_cannot_be_read_with_is_refused(wrong: dict):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        build(replace(BASE, **wrong))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"conv_kernels": (10, 3)}, "conv_kernels and conv_strides"),
        ({"conv_strides": (5, 2, 0)}, "conv_kernels and conv_strides"),
        ({"conv_kernels": (), "conv_strides": ()}, "conv_kernels and conv_strides"),
        ({"conv_channels": 0}, "conv_channels"),
        ({"conv_positions": -1}, "conv_positions"),
    ],
)
def test_impossible_values_are_refused(wrong: dict, message: str):
    with pytest.raises(ValueError, match=message):
        replace(BASE, **wrong)
