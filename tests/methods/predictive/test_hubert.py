"""HuBERT: its loss against loops, its clusters from round to round, its teacher, its frames."""

import copy
import math

import pytest
import torch
from torch import Tensor

from selfsup.batch import AudioSpec, Batch
from selfsup.errors import ConfigError
from selfsup.methods.predictive.hubert import (
    Config,
    HuBERT,
    cluster_logits,
    draw_frames,
    frame_of_step,
    weighted_cross_entropy,
)
from selfsup.models.transformer import Config as Model
from selfsup.models.transformer import TransformerEncoder
from selfsup.objective import Output
from selfsup.randomness import isolated, seed_layers, torch_generator

FRAMES = AudioSpec(rate=8000, mel=3, hop=80)
WAVES = AudioSpec(rate=8000, mel=0, hop=10)
SMALL = {
    "clusters": (4, 6),
    "layer": 1,
    "refresh_every": 5,
    "projection_dim": 5,
    "start_probability": 0.15,
    "span": 3,
}


def build(spec: AudioSpec = FRAMES, patch: int = 2, dropout: float = 0.0, **config) -> HuBERT:
    with isolated():
        seed_layers(0, "model")
        model = Model(
            dim=8,
            layers=2,
            heads=2,
            patch=patch,
            dropout=dropout,
            init_std=0.3,
            conv_channels=4,
            conv_kernels=(10, 3, 2),
            conv_strides=(5, 2, 2),
        )
        return HuBERT(Config(**(SMALL | config)), TransformerEncoder(model, spec), spec).eval()


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch_generator(seed, "noise"))


def batch_of(*lengths: int, seed: int = 0) -> Batch:
    """Rows of those lengths in frames, with rubbish where padded."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    shape = (len(lengths), max(lengths))
    return {
        "frames": noise(*shape, 3, seed=seed),
        "mfcc": noise(*shape, 39, seed=seed),
        "mask": mask,
    }


def waves_of(*lengths: int) -> Batch:
    """Sounds of those lengths in samples; 20 samples in an MFCC frame."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    waveform = noise(len(lengths), max(lengths))
    return {
        "waveform": waveform,
        "mask": mask,
        "mfcc": noise(len(lengths), (max(lengths) - 20) // 10 + 1, 39),
    }


def loss_of(method: HuBERT, batch: Batch, seed: int = 0) -> Output:
    return method.loss(batch, torch_generator(seed, "loss"))


def refresh(method: HuBERT, *batches: Batch, seed: int = 0) -> HuBERT:
    method.refresh(list(batches), torch_generator(seed, "refresh"))
    return method


def nearest(features: Tensor, centroids: Tensor) -> list[int]:
    """The nearest centre of each row, one distance after another, in float64."""
    distances = [[math.dist(f, c) for c in centroids.tolist()] for f in features.tolist()]
    return [row.index(min(row)) for row in distances]


# ---- the loss -----------------------------------------------------------------------------------


def slow_loss(projected, codes, target, weight, temperature) -> float:
    """Equations 1 to 3 with loops in float64."""

    def cosine(a: list[float], b: list[float]) -> float:
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return dot / math.hypot(*a) / math.hypot(*b)

    total = 0.0
    for vector, cluster, share in zip(
        projected.double().tolist(), target.tolist(), weight.double().tolist(), strict=True
    ):
        scores = [cosine(vector, code) / temperature for code in codes.double().tolist()]
        total += share * (math.log(sum(map(math.exp, scores))) - scores[cluster])
    return total / float(weight.double().sum())


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_loss_of_items_equals_loops(temperature: float):
    projected, codes = 3 * noise(20, 5), noise(7, 5, seed=1)
    target = torch.randint(7, (20,), generator=torch_generator(0, "target"))
    weight = torch.where(noise(20, seed=2) > 0, 1.0, 0.3)
    got = weighted_cross_entropy(cluster_logits(projected, codes, temperature), target, weight)
    expected = slow_loss(projected, codes, target, weight, temperature)
    assert got.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("unmasked_weight", [0.0, 0.5])
def test_loss_is_over_hidden_steps_and_over_others_by_their_weight(unmasked_weight: float):
    method = build(unmasked_weight=unmasked_weight, feature_penalty=0.0)
    batch, seen = batch_of(30, 21, 14), []
    refresh(method, batch)
    handle = method.encoder.register_forward_pre_hook(
        lambda _, args, options: seen.append(options["vectors"]), with_kwargs=True
    )
    output = loss_of(method, batch)
    handle.remove()
    hidden = (seen[0] == method.mask_vector).all(-1)
    real = method.encoder.embedding.real(batch)
    assert 0 < hidden.sum() < real.sum()
    assert not (hidden & ~real).any()
    weight = torch.where(hidden, 1.0, unmasked_weight) * real
    last = method.encoder(batch, vectors=seen[0]).last
    target = method.targets(batch)
    expected = slow_loss(method.head(last)[real], method.codes[:4], target[real], weight[real], 0.1)
    assert output.loss.item() == pytest.approx(expected, rel=1e-5)
    assert output.weight.item() == pytest.approx(weight.sum().item())
    guess = cluster_logits(method.head(last[hidden]), method.codes[:4], 0.1).argmax(1)
    accuracy = (guess == target[hidden]).float().mean()
    assert output.metrics["accuracy"] == accuracy
    share = target[real].bincount() / real.sum()
    perplexity = math.exp(-sum(p * math.log(p) for p in share.tolist() if p))
    assert output.metrics["target_perplexity"].item() == pytest.approx(perplexity, rel=1e-5)


def test_penalty_of_the_front_end_is_added():
    batch = batch_of(30, 21)
    with_penalty, without = (loss_of(build(feature_penalty=p), batch) for p in (2.0, 0.0))
    embedding = build().encoder.embedding
    penalty = embedding.vectors(batch)[embedding.real(batch)].square().mean()
    torch.testing.assert_close(with_penalty.loss, without.loss + 2 * penalty)
    assert with_penalty.metrics["prediction_loss"] == without.metrics["prediction_loss"]


def test_a_batch_with_nothing_hidden_has_no_weight():
    method = build(span=30)
    output = loss_of(method, batch_of(12, 8))
    assert output.weight == 0
    assert output.metrics["prediction_loss"] == 0
    output.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in method.parameters())


# ---- targets ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("step_hop", "frame_hop"), [(80, 80), (160, 80), (240, 80), (320, 80)])
def test_a_steps_frame_is_the_one_nearest_to_its_middle(step_hop: int, frame_hop: int):
    found = frame_of_step(6, step_hop, frame_hop).tolist()
    middles = [frame_hop * (frame + 0.5) for frame in range(60)]
    for step, frame in enumerate(found):
        distances = [abs(step_hop * (step + 0.5) - middle) for middle in middles]
        assert frame == distances.index(min(distances))


@pytest.mark.parametrize("patch", [1, 2, 3])
def test_first_targets_are_the_nearest_centres_of_mfcc(patch: int):
    method, batch = build(patch=patch), batch_of(13, 9)
    refresh(method, batch)
    target = method.targets(batch)
    assert target.shape == (2, 13 // patch)
    places = range((patch - 1) // 2, 13 // patch * patch, patch)
    for row in range(2):
        assert target[row].tolist() == nearest(
            batch["mfcc"][row, list(places)], method.mfcc_centroids
        )
    assert len(target.unique()) > 2


def test_steps_of_a_waveform_have_every_second_mfcc_frame():
    method, batch = build(WAVES), waves_of(300, 200)
    refresh(method, batch)
    target = method.targets(batch)
    assert target.shape == method.encoder.embedding.vectors(batch).shape[:2] == (2, 14)
    expected = nearest(batch["mfcc"][0, : 2 * 14 : 2], method.mfcc_centroids)
    assert target[0].tolist() == expected


def test_later_targets_are_the_nearest_centres_of_a_layers_features():
    method, batch = build(), batch_of(30, 21)
    refresh(refresh(method, batch), batch)
    assert method.round == 2
    features = method.encoder(batch).hidden[1]
    expected = [nearest(row, method.layer_centroids) for row in features]
    assert method.targets(batch).tolist() == expected
    assert loss_of(method, batch).metrics["round"] == 2


def test_targets_stay_while_the_encoder_learns():
    method, batch = build(dropout=0.3).train(), batch_of(30, 21)
    refresh(refresh(method, batch), batch)
    before = method.targets(batch)
    frozen = copy.deepcopy(method.teacher.state_dict())
    with isolated():
        loss_of(method, batch).loss.backward()
        with torch.no_grad():
            for parameter in method.encoder.parameters():
                parameter.sub_(parameter.grad, alpha=10.0)
        assert torch.equal(method.targets(batch), before)  # and no dropout in the teacher
    assert all(torch.equal(tensor, frozen[k]) for k, tensor in method.teacher.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())


def test_targets_see_the_whole_sound_and_no_padding():
    method, batch = build(), batch_of(30, 21)
    refresh(refresh(method, batch), batch)
    changed = {**batch, "frames": batch["frames"].clone()}
    changed["frames"][1, 21:] = 9.0
    assert torch.equal(method.targets(changed)[1, :10], method.targets(batch)[1, :10])


# ---- rounds -------------------------------------------------------------------------------------


def test_each_refresh_is_a_round_until_there_is_no_more():
    method, batch = build(), batch_of(40, 36)
    assert method.refresh_every == 5
    assert loss_of(method, batch).loss.isfinite()  # before the first: random centres
    found = []
    for seed in range(4):
        refresh(method, batch, seed=seed)
        found.append({k: v.clone() for k, v in method.state_dict().items()})
    assert [int(state["round"]) for state in found] == [1, 2, 2, 2]
    assert not torch.equal(found[0]["codes"], found[1]["codes"])
    assert torch.equal(found[0]["mfcc_centroids"], found[1]["mfcc_centroids"])
    for name, tensor in found[1].items():
        assert torch.equal(found[3][name], tensor), name


def test_only_codes_of_this_rounds_clusters_count():
    method, batch = build(), batch_of(40, 36)
    refresh(method, batch)
    expected = loss_of(method, batch).loss
    with torch.no_grad():
        method.codes[4:] = 100.0
    assert loss_of(method, batch).loss == expected
    refresh(method, batch)
    assert method.targets(batch).max() == 5


def test_the_teacher_is_the_encoder_of_the_last_refresh():
    method, batch = build(), batch_of(40, 36)
    refresh(method, batch)
    with torch.no_grad():
        for parameter in method.encoder.parameters():
            parameter.mul_(1.5)
    refresh(method, batch)
    for name, tensor in method.encoder.state_dict().items():
        assert torch.equal(method.teacher.state_dict()[name], tensor), name
    assert build(clusters=(4,)).teacher is None


def test_centres_are_means_of_the_real_frames_they_are_nearest_to():
    method = build(patch=1, iterations=50)
    batches = [batch_of(30, 12), batch_of(25, 20, seed=1)]
    refresh(method, *batches)
    frames = torch.cat([batch["mfcc"][batch["mask"]] for batch in batches])
    assert len(frames) == 87
    cluster = torch.tensor(nearest(frames, method.mfcc_centroids))
    for number in range(4):
        mean = frames[cluster == number].mean(0)
        torch.testing.assert_close(method.mfcc_centroids[number], mean, rtol=0, atol=1e-4)


def test_frames_are_drawn_equally_often_from_all_parts():
    parts = torch.arange(60.0).view(60, 1).split((7, 0, 23, 30))
    counts = torch.zeros(60)
    for seed in range(900):
        drawn = draw_frames(parts, 5, torch_generator(seed, "frames")).flatten().long()
        assert len(drawn.unique()) == 5
        counts[drawn] += 1
    assert (counts - 75).abs().max() < 5 * math.sqrt(75)


def test_all_frames_are_kept_in_their_order_when_there_are_few():
    parts = torch.arange(9.0).view(9, 1).split((4, 5))
    assert torch.equal(draw_frames(parts, 9, torch.Generator()), torch.cat(parts))


def test_fewer_steps_than_clusters_are_refused():
    with pytest.raises(ConfigError, match=r"method\.clusters"):
        refresh(build(max_frames=3), batch_of(40, 36))


# ---- the configuration --------------------------------------------------------------------------


def test_a_layer_that_the_encoder_has_not_is_refused():
    with pytest.raises(ConfigError, match=r"method\.layer = 3: .* up to 2"):
        build(layer=3)


def test_fields_are_those_of_the_encoder_and_mfcc():
    assert build().fields == ("frames", "mfcc")
    assert build(WAVES).fields == ("waveform", "mfcc")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("clusters", ()),
        ("clusters", (100, 1)),
        ("layer", -1),
        ("refresh_every", 0),
        ("max_frames", 0),
        ("span", 0),
        ("start_probability", 0.0),
        ("start_probability", math.nan),
        ("temperature", 0.0),
        ("unmasked_weight", -0.1),
        ("feature_penalty", math.nan),
    ],
)
def test_impossible_values_are_refused(key: str, value: float):
    with pytest.raises(ValueError, match=key):
        Config(**{key: value})
