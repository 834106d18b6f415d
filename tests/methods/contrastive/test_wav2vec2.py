"""wav2vec 2.0: against `transformers` number for number, its loss against loops, its negatives."""

import math

import pytest
import torch
from torch import Tensor, nn

from selfsup.batch import AudioSpec, Batch
from selfsup.methods.contrastive.wav2vec2 import (
    Config,
    Wav2Vec2,
    contrastive_loss,
    diversity_loss,
    draw_negatives,
    mean_square,
)
from selfsup.models.transformer import Config as Model
from selfsup.models.transformer import TransformerEncoder
from selfsup.models.waveform import standardised
from selfsup.objective import Output
from selfsup.randomness import isolated, seed_layers, torch_generator

SPEC = AudioSpec(rate=16000, mel=0, hop=160)
FRAMES = AudioSpec(rate=16000, mel=3, hop=160)
MODEL = Model(
    dim=32,
    layers=2,
    heads=2,
    feedforward_dim=48,
    norm="post",
    positions="none",
    embedding_norm=True,
    patch=1,
    dropout=0.0,
    conv_channels=16,
    conv_kernels=(10, 3, 2),
    conv_strides=(5, 2, 2),
    conv_positions=6,
    init_std=0.1,
)
SMALL = {
    "num_codes": 5,
    "code_dim": 8,
    "projection_dim": 12,
    "num_negatives": 4,
    "start_probability": 0.1,
    "span": 4,
}
PLAIN = {"feature_penalty": 0.0, "front_end_gradient": 1.0}


def build(spec: AudioSpec = SPEC, **config) -> Wav2Vec2:
    with isolated():
        seed_layers(0, "model")
        return Wav2Vec2(Config(**(SMALL | config)), TransformerEncoder(MODEL, spec), spec).eval()


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch_generator(seed, "noise"))


def waves(*lengths: int) -> Batch:
    """Sounds of those lengths in samples, with rubbish where padded."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    return {"waveform": noise(len(lengths), max(lengths)), "mask": mask}


def hidden_steps(*counts: int, time: int, seed: int = 0) -> Tensor:
    """(batch, time) bool with that many True per row, at random places."""
    key = torch.rand(len(counts), time, generator=torch_generator(seed, "hidden"))
    return key.argsort(1).argsort(1) < torch.tensor(counts).unsqueeze(1)


def loss_of(method: Wav2Vec2, batch: Batch, seed: int = 0) -> Output:
    return method.loss(batch, torch_generator(seed, "loss"))


# ---- against transformers -----------------------------------------------------------------------


def their_model(method: Wav2Vec2) -> nn.Module:
    """Their model with the weights of ours."""
    from transformers import Wav2Vec2Config, Wav2Vec2ForPreTraining

    config = Wav2Vec2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        conv_dim=(16, 16, 16),
        conv_kernel=MODEL.conv_kernels,
        conv_stride=MODEL.conv_strides,
        num_feat_extract_layers=3,
        num_conv_pos_embeddings=6,
        num_codevectors_per_group=5,
        num_codevector_groups=2,
        codevector_dim=8,
        proj_codevector_dim=12,
        diversity_loss_weight=0.1,
        contrastive_logits_temperature=0.1,
        **dict.fromkeys(
            (
                *("hidden_dropout", "attention_dropout", "activation_dropout"),
                *("feat_proj_dropout", "feat_quantizer_dropout", "layerdrop"),
            ),
            0.0,
        ),
    )
    theirs = Wav2Vec2ForPreTraining(config)
    embedding, below = method.encoder.embedding, theirs.wav2vec2
    with torch.no_grad():
        for ours, layer in zip(embedding.layers, below.feature_extractor.conv_layers, strict=True):
            layer.conv.load_state_dict(ours.convolution.state_dict())
        norm = embedding.layers[0].time_norm
        below.feature_extractor.conv_layers[0].layer_norm.load_state_dict(norm.state_dict())
        below.feature_projection.layer_norm.load_state_dict(embedding.content_norm.state_dict())
        below.feature_projection.projection.load_state_dict(embedding.linear.state_dict())
        mask_vector = embedding.linear(embedding.content_norm(method.mask_vector))
        below.masked_spec_embed.copy_(mask_vector)
        wide = below.encoder.pos_conv_embed.conv
        wide.parametrizations.weight.original0.copy_(embedding.conv_positions.gain.view(1, 1, -1))
        wide.parametrizations.weight.original1.copy_(embedding.conv_positions.direction)
        wide.bias.copy_(embedding.conv_positions.bias)
        below.encoder.layer_norm.load_state_dict(embedding.norm.state_dict())
        for ours, layer in zip(method.encoder.layers, below.encoder.layers, strict=True):
            parts = [getattr(layer.attention, f"{name}_proj") for name in "qkv"]
            for part, weight, bias in zip(
                parts,
                ours.attention.qkv.weight.chunk(3),
                ours.attention.qkv.bias.chunk(3),
                strict=True,
            ):
                part.weight.copy_(weight)
                part.bias.copy_(bias)
            layer.attention.out_proj.load_state_dict(ours.attention.out.state_dict())
            layer.layer_norm.load_state_dict(ours.attention_norm.state_dict())
            up, down = layer.feed_forward.intermediate_dense, layer.feed_forward.output_dense
            up.load_state_dict(ours.feedforward.up.state_dict())
            down.load_state_dict(ours.feedforward.down.state_dict())
            layer.final_layer_norm.load_state_dict(ours.feedforward_norm.state_dict())
        # their quantizer reads features with factor and offset, ours without
        factor, offset = embedding.content_norm.weight, embedding.content_norm.bias
        logits = method.quantizer.logits
        theirs.quantizer.weight_proj.weight.copy_(logits.weight / factor)
        theirs.quantizer.weight_proj.bias.copy_(logits.bias - (logits.weight / factor) @ offset)
        theirs.quantizer.codevectors.copy_(method.quantizer.codebooks.reshape(1, 10, 4))
        theirs.quantizer.temperature = method.quantizer.temperature.item()
        theirs.project_hid.load_state_dict(method.prediction_head.state_dict())
        theirs.project_q.load_state_dict(method.target_head.state_dict())
    return theirs


def randomised(method: Wav2Vec2) -> Wav2Vec2:
    """Every weight random, biases and norms too, so that none can be left out unnoticed."""
    generator = torch_generator(0, "weights")
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return method


@pytest.mark.parametrize("training", [True, False])
def test_losses_and_gradients_equal_those_of_transformers(training: bool):
    method = randomised(build(**PLAIN)).train(training)
    with isolated():
        theirs = their_model(method).train(training)
    waveform = standardised(noise(3, 1, 500), None, 0.0).squeeze(1)
    hidden = hidden_steps(9, 2, 15, time=24)
    negatives = draw_negatives(hidden, 4, torch_generator(0, "negatives"))
    flat = negatives + 24 * torch.arange(3).view(3, 1, 1)
    with isolated():
        torch.manual_seed(3)
        expected = theirs(waveform.clone(), mask_time_indices=hidden, sampled_negative_indices=flat)
    batch = {"waveform": waveform}
    output = method.compare(batch, hidden, negatives, torch.Generator().manual_seed(3))
    steps = hidden.sum()
    assert output.weight == steps == 26
    relative = {"rtol": 2e-5, "atol": 0.0}
    torch.testing.assert_close(
        output.metrics["contrastive"] * steps, expected.contrastive_loss, **relative
    )
    if not training:  # there they count the codes of the largest logits
        return
    torch.testing.assert_close(
        output.metrics["diversity"] * steps, expected.diversity_loss, **relative
    )
    torch.testing.assert_close(output.loss * steps, expected.loss, **relative)
    output.loss.backward()
    (expected.loss / steps).backward()
    below, embedding = theirs.wav2vec2, method.encoder.embedding
    for ours, other in (
        (embedding.layers[0].convolution, below.feature_extractor.conv_layers[0].conv),
        (embedding.layers[2].convolution, below.feature_extractor.conv_layers[2].conv),
        (
            method.encoder.layers[0].feedforward.up,
            below.encoder.layers[0].feed_forward.intermediate_dense,
        ),
        (method.prediction_head, theirs.project_hid),
        (method.target_head, theirs.project_q),
    ):
        wanted = other.weight.grad
        scale = wanted.abs().max().item()
        assert scale > 0
        torch.testing.assert_close(ours.weight.grad, wanted, rtol=1e-4, atol=1e-5 * scale)
    codes = theirs.quantizer.codevectors.grad.view(2, 5, 4)
    torch.testing.assert_close(method.quantizer.codebooks.grad, codes, rtol=1e-4, atol=1e-6)


# ---- the losses ---------------------------------------------------------------------------------


def slow_contrastive(prediction, target, codes, hidden, negatives, temperature):
    """Equation 3 with loops in float64: the mean loss, and how often the target is nearest."""

    def cosine(a: Tensor, b: Tensor) -> float:
        a, b = a.double().tolist(), b.double().tolist()
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))

    losses, found = [], 0
    for row, time in hidden.nonzero().tolist():
        others = [
            n
            for n in negatives[row, time].tolist()
            if codes[row, n].tolist() != codes[row, time].tolist()
        ]
        scores = [
            cosine(prediction[row, time], target[row, n]) / temperature for n in [time, *others]
        ]
        losses.append(math.log(sum(map(math.exp, scores))) - scores[0])
        found += bool(others) and scores[0] > max(scores[1:])
    return sum(losses) / len(losses), found / len(losses)


@pytest.mark.parametrize("num_codes", [2, 9])
def test_contrastive_loss_equals_loops(num_codes: int):
    hidden = hidden_steps(7, 0, 2, 11, time=12)
    target, codes = (
        noise(4, 12, 5),
        torch.randint(num_codes, (4, 12, 2), generator=torch_generator(0, "c")),
    )
    prediction = 3 * (target + noise(4, 12, 5, seed=1))
    negatives = draw_negatives(hidden, 3, torch_generator(0, "negatives"))
    got = contrastive_loss(prediction, target, codes, hidden, negatives, 0.2)
    loss, accuracy = slow_contrastive(prediction, target, codes, hidden, negatives, 0.2)
    assert got[0].item() == pytest.approx(loss, rel=1e-5)
    assert got[1].item() == pytest.approx(accuracy)
    assert 0 < accuracy < 1


def test_one_code_for_everything_finds_nothing():
    hidden, codes = hidden_steps(5, time=8), torch.zeros(1, 8, 2, dtype=torch.long)
    negatives = draw_negatives(hidden, 3, torch_generator(0, "negatives"))
    prediction = noise(1, 8, 4).requires_grad_()
    loss, accuracy = contrastive_loss(prediction, noise(1, 8, 4), codes, hidden, negatives, 0.1)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert accuracy == 0
    loss.backward()
    assert prediction.grad.isfinite().all()


def test_diversity_loss_is_the_share_of_codes_that_is_not_in_use():
    assert diversity_loss(torch.full((2, 4), 0.25)).item() == pytest.approx(0, abs=1e-6)
    assert diversity_loss(torch.eye(4)[:2]).item() == pytest.approx(1 - 2 / 8)
    share = noise(2, 4).softmax(-1)
    perplexities = [math.exp(-sum(p * math.log(p) for p in row)) for row in share.tolist()]
    assert diversity_loss(share).item() == pytest.approx(1 - sum(perplexities) / 8, rel=1e-5)


def test_mean_square_leaves_padding_out():
    real = torch.arange(6) < torch.tensor([[6], [2]])
    vectors = noise(2, 6, 3)
    values = [*vectors[0].flatten().tolist(), *vectors[1, :2].flatten().tolist()]
    expected = sum(v * v for v in values) / len(values)
    assert mean_square(vectors, real).item() == pytest.approx(expected, rel=1e-5)


# ---- negatives ----------------------------------------------------------------------------------


def test_negatives_are_other_hidden_steps_of_the_row_each_equally_often():
    hidden = hidden_steps(5, 2, 30, time=30)
    negatives = draw_negatives(hidden, 2000, torch_generator(0, "negatives"))
    for row, time in hidden.nonzero().tolist():
        others = sorted(set(hidden[row].nonzero().flatten().tolist()) - {time})
        counts = negatives[row, time].bincount(minlength=30)
        assert counts.nonzero().flatten().tolist() == others
        mean = 2000 / len(others)
        assert (counts[others] - mean).abs().max() <= 5 * math.sqrt(mean)


def test_negatives_of_rows_without_hidden_steps_are_places_too():
    hidden = hidden_steps(0, 3, time=6)
    negatives = draw_negatives(hidden, 50, torch_generator(0, "negatives"))
    assert (negatives >= 0).all()
    assert (negatives < 6).all()


# ---- the method ---------------------------------------------------------------------------------


def test_short_utterances_give_nothing():
    method = build()
    batch = waves(400, 35)  # 19 steps and one: no span has room there
    real = method.encoder.embedding.real(batch)
    assert real.sum(1).tolist() == [19, 1]
    output = loss_of(method, batch)
    assert 4 <= output.weight <= 19
    nothing = loss_of(method, waves(80, 60))
    assert nothing.weight == 0
    assert nothing.metrics["contrastive"] == 0
    assert nothing.metrics["accuracy"] == 0
    nothing.loss.backward()
    for name, parameter in method.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


def test_one_hidden_step_in_a_row_gives_nothing():
    method = build(span=1, start_probability=0.01)
    method.train()
    weights = {int(loss_of(method, waves(60), seed).weight) for seed in range(10)}
    assert 1 not in weights


def test_padding_changes_no_loss():
    method = build()
    sounds = waves(500, 300, 130)
    hidden = hidden_steps(9, 4, 2, time=24) & method.encoder.embedding.real(sounds)
    hidden = hidden & (hidden.sum(1, keepdim=True) > 1)
    assert hidden.sum() > 8
    negatives = draw_negatives(hidden, 4, torch_generator(0, "negatives"))
    expected = method.compare(sounds, hidden, negatives, torch.Generator())
    wider = {
        "waveform": nn.functional.pad(sounds["waveform"], (0, 60), value=2.0),
        "mask": nn.functional.pad(sounds["mask"], (0, 60)),
    }
    pad = nn.functional.pad
    got = method.compare(
        wider, pad(hidden, (0, 3)), pad(negatives, (0, 0, 0, 3)), torch.Generator()
    )
    torch.testing.assert_close(got.loss, expected.loss, rtol=0, atol=1e-5)
    for name, value in expected.metrics.items():
        torch.testing.assert_close(got.metrics[name], value, rtol=0, atol=1e-5)


def test_contrastive_loss_is_a_mean_over_hidden_steps():
    method, sounds = build(), waves(500, 400, 300)
    hidden = hidden_steps(9, 5, 3, time=24) & method.encoder.embedding.real(sounds)
    negatives = draw_negatives(hidden, 4, torch_generator(0, "negatives"))

    def of(rows: slice) -> Output:
        part = {name: tensor[rows] for name, tensor in sounds.items()}
        return method.compare(part, hidden[rows], negatives[rows], torch.Generator())

    whole, parts = of(slice(3)), [of(slice(1)), of(slice(1, 3))]
    assert whole.weight == sum(part.weight for part in parts)
    for name in ("contrastive", "accuracy"):
        mean = sum(part.metrics[name] * part.weight for part in parts) / whole.weight
        torch.testing.assert_close(whole.metrics[name], mean, rtol=0, atol=1e-5)


@pytest.mark.parametrize("spec", [SPEC, FRAMES], ids=["waveform", "frames"])
def test_the_encoder_sees_the_mask_vector_and_the_quantizer_what_it_hides(spec: AudioSpec):
    method = build(spec)
    batch = waves(500) if spec is SPEC else {"frames": noise(1, 24, 3)}
    hidden = hidden_steps(9, time=24)
    seen, quantized = [], []
    method.encoder.register_forward_pre_hook(
        lambda _, args, options: seen.append(options["vectors"]), with_kwargs=True
    )
    method.quantizer.register_forward_pre_hook(lambda _, args: quantized.append(args[0]))
    negatives = draw_negatives(hidden, 4, torch_generator(0, "negatives"))
    method.compare(batch, hidden, negatives, torch.Generator())
    vectors = method.encoder.embedding.vectors(batch)
    assert torch.equal(seen[0][hidden], method.mask_vector.expand(9, -1))
    assert torch.equal(seen[0][~hidden], vectors[~hidden])
    mean, variance = vectors.mean(-1, keepdim=True), vectors.var(-1, keepdim=True, correction=0)
    expected = (vectors - mean) / (variance + 1e-5).sqrt()
    torch.testing.assert_close(quantized[0], expected, rtol=0, atol=1e-5)


def test_front_end_learns_at_a_share_of_the_gradient_penalty_included():
    found = {}
    for share in (1.0, 0.1):
        method = build(front_end_gradient=share)
        output = loss_of(method, waves(500, 300))
        output.loss.backward()
        found[share] = output.loss, {k: p.grad for k, p in method.encoder.named_parameters()}
    assert found[1.0][0] == found[0.1][0]
    for name, gradient in found[1.0][1].items():
        share = 0.1 if name.startswith("embedding.layers.") else 1.0
        torch.testing.assert_close(found[0.1][1][name], share * gradient, rtol=1e-4, atol=1e-7)


def test_penalty_and_diversity_are_added_with_their_weights():
    batch = waves(500, 300)
    output = loss_of(build(feature_penalty=3.0, diversity_weight=0.5), batch)
    embedding = build().encoder.embedding
    penalty = mean_square(embedding.vectors(batch), embedding.real(batch))
    expected = output.metrics["contrastive"] + 0.5 * output.metrics["diversity"] + 3 * penalty
    torch.testing.assert_close(output.loss, expected)
    assert set(output.metrics) == {"contrastive", "diversity", "code_perplexity", "accuracy"}


def test_temperature_falls_to_its_end():
    method = build(gumbel_decay=0.9, final_gumbel_temperature=1.5)
    assert method.quantizer.temperature == 2
    found = []
    for step in range(5):
        method.after_step(step, 5)
        found.append(method.quantizer.temperature.item())
    assert found == pytest.approx([1.8, 1.62, 1.5, 1.5, 1.5])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("span", 0),
        ("num_codes", 1),
        ("num_negatives", 0),
        ("start_probability", 0.0),
        ("start_probability", math.nan),
        ("gumbel_decay", 1.1),
        ("temperature", 0.0),
        ("gumbel_temperature", 0.1),
        ("diversity_weight", -1.0),
        ("front_end_gradient", math.nan),
        ("groups", 3),
    ],
)
def test_impossible_values_are_refused(key: str, value: float):
    with pytest.raises(ValueError, match=key):
        Config(**{key: value})
