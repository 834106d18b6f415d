"""DeepCluster: its maths against loops and scikit-learn, its labels, and a run that goes on."""

import copy
import math
import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor

from selfsup.batch import Batch, ImageSpec
from selfsup.errors import ConfigError
from selfsup.methods.predictive.deepcluster import (
    Config,
    DeepCluster,
    balanced_cross_entropy,
    cluster_weights,
    normalised_mutual_information,
    whitening,
)
from selfsup.methods.views import NO_CHANGE
from selfsup.models.resnet import Config as Model
from selfsup.models.resnet import ResNetEncoder
from selfsup.randomness import isolated, seed_layers, torch_generator
from selfsup.training.checkpoint import load_newest, load_tensors, load_weights, save_tensors
from selfsup.training.config import TrainingConfig
from selfsup.training.folder import RunFolder
from selfsup.training.loop import train

MODEL = Model(blocks=(1,), widths=(6,), stem="cifar", zero_init_residual=False)
SPEC = ImageSpec(size=8, channels=3, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


class Kinds:
    """Pictures of four kinds, which differ in colour and stripes, with noise."""

    fields, lengths = ("image", "index"), None

    def __init__(self, size: int, noise: float = 20.0):
        draw = torch_generator(0, "kinds")
        self.kind = torch.randint(4, (size,), generator=draw)
        colour = torch.tensor([[200.0, 40, 40], [40, 200, 40], [40, 40, 200], [190, 190, 40]])
        image = colour[self.kind].view(size, 3, 1, 1).repeat(1, 1, 8, 8)
        image[self.kind % 2 == 0, :, ::2] *= 0.5
        image += noise * torch.randn(size, 3, 8, 8, generator=draw)
        self.image = image.clamp(0, 255).to(torch.uint8)

    def __len__(self) -> int:
        return len(self.image)

    def batch(self, numbers: np.ndarray) -> Batch:
        number = torch.as_tensor(numbers)
        return {"image": self.image[number], "index": number}


def build(seed: int = 0, **config) -> DeepCluster:
    with isolated():
        seed_layers(seed, "model")
        encoder = ResNetEncoder(MODEL, SPEC)
        settings = {"clusters": 4, "pca_dim": 3, "refresh_every": 2, "views": NO_CHANGE}
        return DeepCluster(Config(**(settings | config)), encoder, SPEC).train()


def refresh(method: DeepCluster, data: Kinds, seed: int = 0, order: Tensor | None = None) -> None:
    order = torch.arange(len(data)) if order is None else order
    batches = (data.batch(numbers) for numbers in order.split(13))
    method.refresh(batches, torch_generator(seed, "refresh"))


def nearest(method: DeepCluster, data: Kinds) -> list[int]:
    """The cluster of every picture, from the past encoder's features, one by one in float64."""
    with torch.no_grad():
        features = copy.deepcopy(method.past_encoder).eval()(data.batch(np.arange(len(data))))
    mean, projection, centroids = (
        x.double().numpy() for x in (method.mean, method.projection, method.centroids)
    )
    found = []
    for feature in features.pooled.double().numpy():
        whitened = (feature - mean) @ projection
        whitened /= np.linalg.norm(whitened)
        found.append(int(np.argmin([((whitened - c) ** 2).sum() for c in centroids])))
    return found


def learn(method: DeepCluster, batch: Batch) -> None:
    """One step far enough to change all features."""
    method.loss(batch, torch_generator(0, "loss")).loss.backward()
    with torch.no_grad():
        for parameter in method.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=3.0)
    method.zero_grad(set_to_none=True)


# ---- the maths ----------------------------------------------------------------------------------


def test_whitened_features_have_unit_variance_along_the_largest_directions():
    draw = torch_generator(0, "features")
    mix = torch.randn(6, 6, generator=draw) * torch.tensor([5.0, 3, 2, 1, 0.5, 0.2])
    features = torch.randn(300, 6, generator=draw) @ mix.T + 7
    mean, projection = whitening(features, 4)
    whitened = ((features - mean) @ projection).double().numpy()
    np.testing.assert_allclose(whitened.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(np.cov(whitened.T, bias=True), np.eye(4), atol=1e-4)
    variance, axes = np.linalg.eigh(np.cov(features.double().numpy().T, bias=True))
    expected = axes[:, ::-1][:, :4] / np.sqrt(variance[::-1][:4])
    signs = np.sign((expected * projection.double().numpy()).sum(0))
    np.testing.assert_allclose(projection, expected * signs, rtol=0, atol=1e-4)


def test_directions_without_variance_are_left_out():
    draw = torch_generator(0, "features")
    features = torch.randn(50, 2, generator=draw) @ torch.randn(2, 5, generator=draw)
    _, projection = whitening(features, 4)
    assert (projection != 0).any(0).tolist() == [True, True, False, False]
    _, projection = whitening(torch.ones(50, 5), 4)
    assert not projection.any()


def test_clusters_weigh_the_same():
    weight = cluster_weights(torch.tensor([6, 1, 0, 3]))
    assert weight[[0, 1, 3]].tolist() == pytest.approx([10 / 18, 10 / 3, 10 / 9])
    assert cluster_weights(torch.ones(5, dtype=torch.long)).tolist() == [1] * 5


def test_loss_over_all_pictures_is_the_mean_over_clusters():
    draw = torch_generator(0, "logits")
    logits, cluster = torch.randn(10, 4, generator=draw), torch.tensor([0] * 6 + [1] + [3] * 3)
    of_cluster: dict[int, list[float]] = {}
    for row, own in zip(logits.double().tolist(), cluster.tolist(), strict=True):
        of_cluster.setdefault(own, []).append(math.log(sum(map(math.exp, row))) - row[own])
    expected = sum(sum(losses) / len(losses) for losses in of_cluster.values()) / 3
    got = balanced_cross_entropy(logits, cluster, cluster_weights(cluster.bincount(minlength=4)))
    assert got.item() == pytest.approx(expected, rel=1e-5)


def test_mutual_information_is_that_of_scikit_learn():
    draw = torch_generator(0, "assignments")
    first = torch.randint(5, (200,), generator=draw)
    random = torch.randint(7, (200,), generator=draw)
    partly = torch.where(random < 3, random, 2 * first)
    for second in (random, partly, first, 4 - first, first // 2):
        got = normalised_mutual_information(first, second).item()
        expected = normalized_mutual_info_score(first, second, average_method="geometric")
        assert got == pytest.approx(expected, abs=1e-5)
    assert normalised_mutual_information(first, torch.zeros_like(first)) == 0


# ---- refresh ------------------------------------------------------------------------------------


def test_labels_are_the_nearest_centroids():
    method, data = build(), Kinds(60)
    refresh(method, data)
    assert method.labels.tolist() == nearest(method, data)
    assert method.sizes.tolist() == method.labels.bincount(minlength=4).tolist()
    assert len(set(method.labels.tolist())) > 1


def test_clusters_are_the_kinds_where_those_are_plain():
    method, data = build(), Kinds(80, noise=0.0)
    refresh(method, data)
    assert normalised_mutual_information(method.labels, data.kind).item() == pytest.approx(1)
    assert method.nmi == 0
    refresh(method, data, seed=1)  # other numbers for the same clusters
    assert method.nmi.item() == pytest.approx(1)


def test_labels_follow_the_index_of_a_picture():
    method, data = build(), Kinds(60)
    refresh(method, data, order=torch.randperm(60, generator=torch_generator(0, "order")))
    assert method.labels.tolist() == nearest(method, data)


def test_the_generator_decides_a_refresh():
    data, found = Kinds(60), []
    for seed in (0, 0, 1):
        method = build()
        refresh(method, data, seed)
        found.append(method.state_dict())
    assert all(torch.equal(x, found[1][name]) for name, x in found[0].items())
    assert not torch.equal(found[0]["head.weight"], found[2]["head.weight"])


def test_the_last_layer_is_drawn_anew():
    method, data = build(), Kinds(60)
    torch.nn.init.constant_(method.head.weight, 5.0)
    torch.nn.init.constant_(method.head.bias, 5.0)
    refresh(method, data)
    assert method.head.weight.std().item() == pytest.approx(0.01, rel=0.4)
    assert not method.head.bias.any()


def test_a_refresh_leaves_the_encoder_as_it_is():
    method, data = build(), Kinds(60)
    before = copy.deepcopy(method.encoder.state_dict())
    refresh(method, data)
    assert method.encoder.training
    for name, tensor in method.encoder.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_fewer_pictures_than_clusters_are_refused():
    with pytest.raises(ConfigError, match=r"70 clusters of 60 items.*method\.clusters"):
        refresh(build(clusters=70), Kinds(60))


# ---- the loss -----------------------------------------------------------------------------------


def expected_loss(method: DeepCluster, batch: Batch, labels: list[int]) -> float:
    with torch.no_grad():
        logits = method.head(method.encoder(batch).pooled).double().tolist()
    sizes = method.sizes.tolist()
    used = sum(size > 0 for size in sizes)
    return sum(
        sum(sizes) / (used * max(sizes[own], 1)) * (math.log(sum(map(math.exp, row))) - row[own])
        for row, own in zip(logits, labels, strict=True)
    ) / len(labels)


def test_training_learns_the_labels_of_the_last_refresh():
    method, data = build(), Kinds(60)
    refresh(method, data)
    batch = data.batch(np.array([50, 3, 17, 20, 8]))
    for _ in range(2):  # also after the encoder has moved on
        output = method.loss(batch, torch_generator(0, "loss"))
        expected = expected_loss(method, batch, method.labels[[50, 3, 17, 20, 8]].tolist())
        assert output.loss.item() == pytest.approx(expected, rel=1e-4)
        learn(method, batch)
    assert output.weight == 5
    assert output.metrics["used_clusters"] == (method.sizes > 0).sum()


def test_held_out_pictures_get_the_cluster_that_they_would_have_had():
    method, data = build(), Kinds(60)
    refresh(method, data)
    held_out = Kinds(90)
    labels = nearest(method, held_out)
    learn(method, data.batch(np.arange(60)))  # the labels do not move with the encoder
    batch = held_out.batch(np.arange(90))
    output = method.eval().loss(batch, torch_generator(0, "loss"))
    assert output.loss.item() == pytest.approx(expected_loss(method, batch, labels), rel=1e-4)


def test_pictures_of_the_training_data_have_the_same_label_in_evaluation():
    method, data = build(), Kinds(60)
    refresh(method, data)
    batch = data.batch(np.arange(60))
    assert torch.equal(method.eval()._clusters(batch), method.labels)


def test_before_the_first_refresh_the_held_out_loss_is_that_of_chance():
    method = build().eval()
    output = method.loss(Kinds(60).batch(np.arange(60)), torch_generator(0, "loss"))
    assert output.loss.item() == pytest.approx(math.log(4), rel=0.02)


def test_no_gradient_reaches_the_past_encoder():
    method, data = build(), Kinds(60)
    refresh(method, data)
    assert not any(parameter.requires_grad for parameter in method.past_encoder.parameters())
    learn(method, data.batch(np.arange(60)))
    for past, now in zip(
        method.past_encoder.parameters(), method.encoder.parameters(), strict=True
    ):
        assert not torch.equal(past, now)


# ---- saving and going on ------------------------------------------------------------------------


def test_labels_of_any_number_are_loaded(tmp_path):
    method, data = build(), Kinds(60)
    before = copy.deepcopy(method.state_dict())  # with no labels yet
    refresh(method, data)
    save_tensors(tmp_path / "weights", method.state_dict())
    fresh = build(seed=1)
    load_weights(fresh, load_tensors(tmp_path / "weights"), "weights")
    assert fresh.labels.dtype == torch.long
    for name, tensor in method.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor), name
    method.load_state_dict(before)  # the best weights may be those from before the first refresh
    assert len(method.labels) == 0


def test_a_run_that_goes_on_between_two_refreshes_is_bit_equal(tmp_path):
    config = TrainingConfig(
        steps=5, batch_size=8, checkpoint_every=3, evaluations=2, precision="float32"
    )
    data, valid, found = Kinds(40), Kinds(12), []

    def run(seed: int, resume: bool) -> None:
        folder = RunFolder(tmp_path / "run", resume=resume)
        try:
            train(build(seed), data, valid, config, folder)
        finally:
            folder.close()
        found.append((load_newest(folder.checkpoints), (folder.path / "metrics.jsonl").read_text()))

    run(seed=0, resume=False)
    newest = tmp_path / "run" / "checkpoints" / "step-00000005"
    labels = [
        load_tensors(path / "weights.safetensors")["labels"]
        for path in (newest.with_name("step-00000003"), newest)
    ]
    assert any(not torch.equal(*pair) for pair in pairwise(labels)), "nothing was clustered anew"
    shutil.rmtree(newest)
    run(seed=1, resume=True)  # from step 3, with labels of step 2; the next ones come at step 4
    (whole, rows), (resumed, rows_again) = found
    assert rows == rows_again
    assert whole.weights.keys() == resumed.weights.keys()
    for name, tensor in whole.weights.items():
        assert torch.equal(resumed.weights[name], tensor), name


@pytest.mark.parametrize("key", ["clusters", "pca_dim", "refresh_every", "iterations"])
def test_impossible_values_are_refused(key):
    with pytest.raises(ValueError, match=f"{key} must be at least"):
        Config(**{key: 0})
