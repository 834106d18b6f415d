import math

import numpy as np
import pytest
import torch
from scipy.interpolate import interp1d
from scipy.optimize import brentq
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import average_precision_score, roc_curve
from sklearn.preprocessing import StandardScaler

from selfsup.errors import DataError
from selfsup.evaluation.layer_mix import fit_layer_mix
from selfsup.evaluation.metrics import pearson, spearman
from selfsup.evaluation.probes import fit_linear_probe, pca_features, ridge_probe
from selfsup.evaluation.similarity import (
    alignment,
    code_perplexity,
    cosine_scores,
    equal_error_rate,
    knn_accuracy,
    knn_predict,
    mean_average_precision,
    nearest_neighbours,
    recall_at_k,
    trial_pairs,
    uniformity,
)
from selfsup.randomness import numpy_generator


def clusters(count, dim=12, classes=4, spread=1.0, seed=0):
    """Features around one centre per class, and the classes, every one of which occurs."""
    generator = numpy_generator(seed, "clusters")
    centres = numpy_generator(99, "centres").normal(size=(classes, dim))
    labels = generator.permutation(np.arange(count) % classes)
    return centres[labels] + spread * generator.normal(size=(count, dim)), labels


def cosine(a, b):
    return float(a @ b) / (math.sqrt(a @ a) * math.sqrt(b @ b))


@pytest.fixture(params=[7, 2**22], ids=["row by row", "at once"])
def chunked(request, monkeypatch):
    monkeypatch.setattr("selfsup.evaluation.similarity.SIMILARITIES", request.param)


# Neighbours


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize(("k", "temperature"), [(1, 0.1), (5, 0.07), (20, 0.1), (40, 1.0)])
def test_knn_votes_as_in_a_slow_loop(k, temperature):
    bank, labels = clusters(40, spread=2.0)
    queries, _ = clusters(25, spread=2.0, seed=1)
    slow = []
    for query in queries:
        near = sorted(((cosine(query, b), c) for b, c in zip(bank, labels, strict=True)))[-k:]
        votes = [0.0] * 4
        for similarity, c in near:
            votes[c] += math.exp(similarity / temperature)
        slow.append(votes.index(max(votes)))
    guess = knn_predict(bank, labels, queries, k, temperature)
    assert guess.tolist() == slow
    truth = numpy_generator(0, "truth").integers(0, 4, 25)
    share = knn_accuracy(bank, labels, queries, truth, k, temperature)
    assert share == pytest.approx(np.mean(truth == slow))


def test_knn_of_tensors_equals_that_of_arrays():
    bank, labels = clusters(40)
    queries, _ = clusters(9, seed=1)
    tensors = (torch.from_numpy(a) for a in (bank, labels, queries))
    assert (knn_predict(*tensors) == knn_predict(bank, labels, queries)).all()


def test_knn_at_its_limits():
    bank, labels = clusters(10)
    queries, truth = clusters(6, seed=1)
    everyone = knn_predict(bank, labels, queries, k=10)
    assert (knn_predict(bank, labels, queries, k=1000) == everyone).all()
    assert knn_predict(bank, np.full(10, 3), queries).tolist() == [3] * 6
    # exp(1 / 0.001) is no float, nor is 1 / exp of it
    cold = knn_predict(bank, labels, queries, k=10, temperature=1e-3)
    assert (cold == knn_predict(bank, labels, queries, k=1)).all()
    # all neighbours are equal: the vote is a count
    constant = knn_predict(np.ones((5, 3)), np.array([2, 1, 2, 0, 2]), np.ones((2, 3)), k=5)
    assert constant.tolist() == [2, 2]
    tied = knn_predict(np.ones((4, 3)), np.array([3, 1, 3, 1]), np.ones((1, 3)), k=4)
    assert tied.tolist() == [1]
    assert (knn_predict(bank, labels, queries, num_classes=9) < 4).all()
    assert knn_accuracy(bank, labels, queries, truth + 100) == 0.0


@pytest.mark.usefixtures("chunked")
def test_nearest_neighbours_leave_the_item_out():
    x, _ = clusters(15)
    for i, row in enumerate(nearest_neighbours(x, 4)):
        others = sorted((j for j in range(15) if j != i), key=lambda j: -cosine(x[i], x[j]))
        assert row.tolist() == others[:4]
    assert nearest_neighbours(x, 100).shape == (15, 14)
    assert all(i not in row for i, row in enumerate(nearest_neighbours(np.ones((6, 2)), 5)))


def exact_ties(count=24):
    """Features with many equal cosines that rounding cannot tell apart, and labels."""
    generator = numpy_generator(3, "ties")
    return np.eye(4)[generator.integers(0, 4, count)], generator.integers(0, 3, count)


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("data", [clusters(24, spread=2.0), exact_ties()], ids=["free", "ties"])
def test_retrieval_as_in_a_slow_loop(data):
    x, labels = data
    labels = np.append(labels[:-1], 77)  # one item is alone in its class
    first, precisions = [], []
    for i in range(23):
        others = [j for j in range(24) if j != i]
        score = np.round([cosine(x[i], x[j]) for j in others], 12)
        right = labels[others] == labels[i]
        first.append(sum(s >= score[right].max() for s in score[~right]))
        precisions.append(average_precision_score(right, score))
    recall = recall_at_k(x, labels, (1, 2, 10))
    assert recall == pytest.approx({k: np.mean([f < k for f in first]) for k in (1, 2, 10)})
    assert mean_average_precision(x, labels) == pytest.approx(np.mean(precisions))


def test_retrieval_of_collapsed_features_is_not_luck():
    x, labels = np.tile([1.0, 0.0], (12, 1)), np.repeat([0, 1, 2], 4)
    assert recall_at_k(x, labels) == {1: 0.0, 5: 0.0, 10: 1.0}  # 8 items of other classes tie
    assert mean_average_precision(x, labels) == pytest.approx(3 / 11)  # the share of its class
    assert recall_at_k(x, np.zeros(12, dtype=int), (1,)) == {1: 1.0}
    assert mean_average_precision(x, np.zeros(12, dtype=int)) == 1.0
    for measure in (recall_at_k, mean_average_precision):
        with pytest.raises(DataError, match="none of the 12 items shares its label"):
            measure(x, np.arange(12))


# Linear probes


@pytest.mark.parametrize("strength", [1e-4, 1e-2, 1.0])
def test_linear_probe_is_scikit_learns_logistic_regression(strength):
    x, labels = clusters(200, spread=1.5)
    x[:, 1] = 0.1 * x[:, 0] + 1e-3 * x[:, 1]  # nearly collinear
    x[:, 2] = 1000 + 1e-2 * x[:, 2]  # far from the origin
    new, truth = clusters(80, spread=1.5, seed=1)
    probe = fit_linear_probe(x, labels, new, truth, strengths=[strength])
    x, new = (a.astype(np.float32).astype(np.float64) for a in (x, new))  # as the probe reads them
    scaler = StandardScaler().fit(x)
    reference = LogisticRegression(C=1 / (strength * 200), tol=1e-9, solver="newton-cholesky")
    reference.fit(scaler.transform(x), labels)
    weight, bias = probe.weight.numpy().T, probe.bias.numpy()
    assert np.abs(weight - reference.coef_).max() < 1e-3
    # softmax does not tell a common number on all biases
    assert np.abs((bias - bias.mean()) - reference.intercept_).max() < 1e-3
    rows = scaler.transform(new)
    assert (probe.predict(new) == reference.predict(rows)).all()
    assert np.abs(probe.scores(new) - reference.predict_proba(rows)).max() < 1e-3
    assert probe.valid_accuracy == pytest.approx(np.mean(reference.predict(rows) == truth))


def test_linear_probe_of_two_classes():
    """Two columns share one weight: their penalty is half of that of scikit-learn's one."""
    x, labels = clusters(150, classes=2, spread=2.0)
    probe = fit_linear_probe(x, labels, x, labels, strengths=[0.01])
    scaler = StandardScaler().fit(x)
    reference = LogisticRegression(C=2 / (0.01 * 150), tol=1e-9, solver="newton-cholesky")
    reference.fit(scaler.transform(x), labels)
    difference = probe.weight[:, 1] - probe.weight[:, 0]
    assert np.abs(difference.numpy() - reference.coef_[0]).max() < 1e-3


def test_linear_probe_takes_the_strength_that_validation_likes():
    x, labels = clusters(60, dim=50, spread=2.0)
    new, truth = clusters(200, dim=50, spread=2.0, seed=1)
    strengths = (1e-4, 10.0, 1e-1)
    probe = fit_linear_probe(x, labels, new, truth, strengths)
    alone = {
        s: fit_linear_probe(x, labels, new, truth, strengths=[s]).valid_accuracy for s in strengths
    }
    assert probe.sweep == pytest.approx(alone, abs=1 / 200)
    assert len(set(alone.values())) == 3
    assert probe.strength == max(alone, key=alone.get)
    assert probe.valid_accuracy == np.mean(probe.predict(new) == truth)
    # where all are equally good, the strongest penalty
    easy, kinds = clusters(60, spread=0.01)
    assert fit_linear_probe(easy, kinds, easy, kinds, strengths).strength == 10.0


def test_linear_probe_is_deterministic_and_needs_no_gradient_mode():
    x, labels = clusters(50)
    plain = fit_linear_probe(x, labels, x, labels)
    with torch.inference_mode():
        again = fit_linear_probe(torch.from_numpy(x).float(), labels, torch.from_numpy(x), labels)
    assert torch.equal(plain.weight, again.weight)
    assert not plain.weight.requires_grad


def test_linear_probe_of_odd_data():
    x, labels = clusters(30)
    names = np.array([5, 40, -2, 7])[labels]  # any whole numbers
    probe = fit_linear_probe(x, names, x, names, strengths=[1e-3])
    assert probe.classes.tolist() == [-2, 5, 7, 40]
    assert (probe.predict(x) == names).mean() == probe.valid_accuracy > 0.9
    assert fit_linear_probe(x, np.full(30, 3), x, np.full(30, 3)).predict(x).tolist() == [3] * 30
    constant = fit_linear_probe(
        np.full((9, 4), 1e3), np.arange(9) // 5, np.ones((2, 4)), np.zeros(2, int)
    )
    assert constant.predict(np.ones((2, 4))).tolist() == [0, 0]  # the commoner class
    unseen = fit_linear_probe(x[labels < 3], labels[labels < 3], x, labels)
    assert unseen.valid_accuracy <= 0.8
    wide = fit_linear_probe(x[:6, :], labels[:6], x, labels)  # fewer items than dimensions
    assert np.isfinite(wide.scores(x)).all()


@pytest.mark.parametrize("metric", ["spearman", "pearson"])
def test_ridge_probe_is_scikit_learns_ridge(metric):
    x, _ = clusters(40, dim=30)
    new, _ = clusters(70, dim=30, seed=1)
    direction = numpy_generator(0, "direction").normal(size=30)
    noise = numpy_generator(0, "noise").normal(size=110)
    y = 100 + 7 * (np.concatenate([x, new]) @ direction + 3 * noise)
    strengths = (1e-3, 1.0, 1e-1)
    probe = ridge_probe(x, y[:40], new, y[40:], strengths, metric)
    scaler = StandardScaler().fit(x)
    measure = {"spearman": spearman, "pearson": pearson}[metric]
    scores = {}
    for strength in strengths:
        reference = Ridge(alpha=strength * 40).fit(scaler.transform(x), y[:40])
        guess = reference.predict(scaler.transform(new))
        scores[strength] = measure(y[40:].tolist(), guess.tolist())
        if strength == probe.strength:
            assert np.abs(probe.predict(new) - guess).max() < 1e-3
            assert np.abs(probe.weight.numpy() - reference.coef_).max() < 1e-4
    assert probe.sweep == pytest.approx(scores, abs=1e-4)
    assert probe.strength == max(scores, key=scores.get)
    assert probe.valid_score == probe.sweep[probe.strength]


def test_ridge_probe_of_constant_features_gives_the_mean():
    probe = ridge_probe(
        np.ones((4, 3)), np.array([1.0, 2, 3, 6]), np.ones((2, 3)), np.array([1.0, 2])
    )
    assert probe.predict(np.ones((2, 3))).tolist() == [3.0, 3.0]
    assert probe.valid_score == 0.0


# Which layer


def layers_of(count, informative, scales, seed=0):
    """Layers of noise, one of which has the classes in it; (items, layers, dim) and labels."""
    signal, labels = clusters(count, dim=8, spread=0.5, seed=seed)
    noise = numpy_generator(seed, "layers").normal(size=(count, len(scales), 8))
    noise[:, informative] = signal
    return noise * np.array(scales)[:, None], labels


@pytest.mark.parametrize("informative", [0, 2])
def test_layer_mix_finds_the_layer_whatever_its_scale(informative):
    scales = [0.01, 100.0, 1.0]
    x, labels = layers_of(160, informative, scales)
    new, truth = layers_of(80, informative, scales, seed=1)
    rates = (1e-4, 1e-2, 1e-1)
    probe = fit_layer_mix(x, labels, new, truth, rates=rates, steps=80, batch_size=64)
    assert probe.weights.shape == (3,)
    assert probe.weights.sum() == pytest.approx(1.0)
    assert probe.weights.argmax() == informative
    assert probe.weights[informative] > 0.6
    assert probe.valid_accuracy == max(probe.sweep.values()) > 0.9
    assert probe.valid_accuracy == np.mean(probe.predict(new) == truth)
    assert set(probe.sweep) == set(rates)
    assert probe.rate > 1e-4  # with which hardly anything is learned


def test_layer_mix_begins_with_equal_weights_and_repeats():
    x, labels = layers_of(60, 1, [1.0, 1.0])
    start = fit_layer_mix(x, labels, x, labels, rates=[0.1], steps=0)
    assert start.weights.tolist() == [0.5, 0.5]
    one = fit_layer_mix(x, labels, x, labels, rates=[0.05], steps=20, batch_size=16)
    split = [torch.from_numpy(x[:, layer]) for layer in range(2)]
    with torch.inference_mode():
        two = fit_layer_mix(split, labels, split, labels, rates=[0.05], steps=20, batch_size=16)
    other = fit_layer_mix(x, labels, x, labels, rates=[0.05], steps=20, batch_size=16, seed=1)
    assert (one.weights == two.weights).all()
    assert (one.predict(x) == two.predict(split)).all()
    assert (one.weights != other.weights).any()


def test_layer_mix_steps_as_adam_on_the_plain_formula():
    """The formula written out in float64, for full batches."""
    # in classes of equal size the bias starts with a gradient of 0, and Adam blows its rounding up
    x, labels = layers_of(43, 1, [1.0, 3.0, 0.2])
    probe = fit_layer_mix(x, labels, x, labels, rates=[0.03], steps=10, batch_size=43)
    z = torch.from_numpy(x).double()
    z = z - z.mean(0)
    z = z / z.square().mean((0, 2), keepdim=True).sqrt()
    mix, head, bias = (torch.zeros(s, dtype=torch.float64) for s in ((3,), (8, 4), (4,)))
    parameters = [p.requires_grad_() for p in (mix, head, bias)]
    adam = torch.optim.Adam(parameters, lr=0.03)
    for _ in range(10):
        share = mix.exp() / mix.exp().sum()
        mixed = sum(share[layer] * z[:, layer] for layer in range(3))
        logits = mixed @ head + bias
        picked = logits[torch.arange(43), torch.from_numpy(labels)]
        loss = (logits.exp().sum(1).log() - picked).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert probe.weights == pytest.approx(mix.softmax(0).detach().numpy(), abs=1e-4)
    assert torch.allclose(probe.head.double(), head, atol=1e-4)
    assert torch.allclose(probe.bias.double(), bias, atol=1e-4)
    assert (probe.predict(x) == logits.argmax(1).numpy()).mean() > 0.95


# Verification


def slow_error_rates(scores, same, threshold):
    """Shares of impostors accepted and of true pairs rejected."""
    accepted = scores >= threshold
    return np.mean(accepted[~same]), np.mean(~accepted[same])


@pytest.mark.parametrize("levels", [3, 10, 10**6])
def test_equal_error_rate_lies_on_the_roc_curve(levels):
    generator = numpy_generator(0, "trials", levels)
    for _ in range(20):
        same = generator.permutation(np.arange(41) % 3 == 0)
        scores = generator.integers(0, levels, 41) + same * levels * 0.4
        rate, threshold = equal_error_rate(scores, same)
        false, true, _ = roc_curve(same, scores, drop_intermediate=False)
        crossing = brentq(lambda x, f=false, t=true: 1 - x - interp1d(f, t)(x), 0, 1)
        # where the curve rises straight up, interp1d takes any point of that line: use the inverse
        other = 1 - brentq(lambda x, f=false, t=true: 1 - x - interp1d(t, f)(x), 0, 1)
        assert min(abs(rate - crossing), abs(rate - other)) < 1e-9
        gaps = {t: abs(np.subtract(*slow_error_rates(scores, same, t))) for t in scores}
        assert gaps[threshold] == pytest.approx(min(gaps.values()))


def test_equal_error_rate_by_hand():
    scores = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    same = np.array([True, True, False, True, False, False])
    assert equal_error_rate(scores, same) == (pytest.approx(1 / 3), 0.7)
    assert equal_error_rate(scores, scores > 0.65) == (0.0, 0.7)
    assert equal_error_rate(-scores, scores > 0.65)[0] == 1.0
    assert equal_error_rate(np.ones(6), same) == (0.5, 1.0)
    assert equal_error_rate(np.ones(6), same[::-1])[0] == 0.5


@pytest.mark.parametrize(
    ("scores", "same"), [([1.0, 2.0], [True, True]), ([1.0], [False]), ([np.nan, 1], [True, False])]
)
def test_equal_error_rate_refuses_what_it_cannot_judge(scores, same):
    with pytest.raises(DataError, match="needs pairs of both kinds and scores that are numbers"):
        equal_error_rate(np.array(scores), np.array(same))


@pytest.mark.parametrize("grouped", [False, True])
def test_trial_pairs(grouped):
    speakers, digits = np.arange(60) % 6, np.arange(60) // 6 % 5
    groups = digits if grouped else None
    pairs, same = trial_pairs(speakers, 200, numpy_generator(0, "trials"), groups)
    assert pairs.shape == (200, 2)
    assert same.sum() == 100
    assert (same == (speakers[pairs[:, 0]] == speakers[pairs[:, 1]])).all()
    assert (pairs[:, 0] != pairs[:, 1]).all()
    assert len({frozenset(pair) for pair in pairs.tolist()}) == 200
    if grouped:
        assert (digits[pairs[:, 0]] != digits[pairs[:, 1]]).all()
    counts = np.bincount(pairs[~same].ravel(), minlength=60)
    assert counts.max() <= 2 * counts.mean() + 2  # nobody stands for all
    assert 0 < same[:100].sum() < 100  # the kinds are mixed
    again, _ = trial_pairs(speakers, 200, numpy_generator(0, "trials"), groups)
    other, _ = trial_pairs(speakers, 200, numpy_generator(1, "trials"), groups)
    assert (pairs == again).all()
    assert (pairs != other).any()


@pytest.mark.parametrize("count", [6, 7])
def test_trial_pairs_can_take_every_pair_there_is(count):
    labels = np.arange(count) % 2
    every = [(i, j) for i in range(count) for j in range(i)]
    kinds = [labels[i] == labels[j] for i, j in every]
    most = int(2 * min(sum(kinds), len(kinds) - sum(kinds)))
    pairs, same = trial_pairs(labels, most, numpy_generator(0, "all"))
    assert len({frozenset(pair) for pair in pairs.tolist()}) == most
    taken = {frozenset(pair) for pair in pairs[same].tolist()}
    assert taken == {frozenset(e) for e, kind in zip(every, kinds, strict=True) if kind}
    with pytest.raises(DataError, match=f"of {count} items {sum(kinds)} pairs of the same label"):
        trial_pairs(labels, most + 2, numpy_generator(0, "all"))
    odd, kind = trial_pairs(labels, 5, numpy_generator(0, "all"))
    assert (len(odd), kind.sum()) == (5, 2)


def test_cosine_scores():
    x, _ = clusters(8)
    pairs = np.array([[0, 1], [3, 3], [7, 2]])
    expected = [cosine(x[i], x[j]) for i, j in pairs]
    assert cosine_scores(x, pairs) == pytest.approx(expected, abs=1e-6)
    assert cosine_scores(torch.from_numpy(x), pairs)[1] == pytest.approx(1.0)


# Diagnostics and controls


@pytest.mark.usefixtures("chunked")
def test_alignment_and_uniformity_as_in_slow_loops():
    x, y = clusters(9)[0], clusters(9, seed=1)[0]
    u, v = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (x, y))
    apart = [sum((u[i] - v[i]) ** 2) for i in range(9)]
    assert float(alignment(torch.from_numpy(x), torch.from_numpy(y))) == pytest.approx(
        np.mean(apart), rel=1e-5
    )
    for t in (2.0, 0.5):
        near = [math.exp(-t * sum((u[i] - u[j]) ** 2)) for i in range(9) for j in range(i)]
        value = uniformity(torch.from_numpy(x), t)
        assert value.dtype == torch.float32
        assert float(value) == pytest.approx(math.log(np.mean(near)), rel=1e-5)


def test_diagnostics_at_their_limits():
    x = torch.from_numpy(clusters(20)[0])
    assert float(alignment(x, 5 * x)) == pytest.approx(0.0, abs=1e-10)
    assert float(alignment(x, -x)) == pytest.approx(4.0, rel=1e-6)
    assert float(uniformity(torch.ones(7, 3))) == pytest.approx(0.0, abs=1e-5)
    assert float(uniformity(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))) == pytest.approx(-8.0)
    half = x.bfloat16().requires_grad_()
    assert uniformity(half).dtype == alignment(half, half).dtype == torch.float32
    assert not uniformity(half).requires_grad


def test_code_perplexity():
    counts = torch.tensor([[5, 0, 0, 0], [2, 2, 2, 2], [3, 1, 0, 0]])
    skewed = math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert code_perplexity(counts).tolist() == pytest.approx([1.0, 4.0, skewed], rel=1e-6)
    assert float(code_perplexity(counts[1])) == pytest.approx(4.0)


def test_pca_features_are_fitted_on_the_training_items():
    x, _ = clusters(50)
    new, _ = clusters(20, seed=1)
    transform = pca_features(x, 5)
    reference = PCA(5, svd_solver="full").fit(x)
    assert np.abs(transform(new)) == pytest.approx(np.abs(reference.transform(new)), abs=1e-4)
    assert pca_features(torch.from_numpy(x), 500)(x).shape == (50, 12)
    assert pca_features(x[:3], 500)(x).shape == (50, 3)


# What is refused


def test_features_and_labels_that_do_not_fit_are_refused():
    x, labels = clusters(6)
    broken = x.copy()
    broken[[2, 4], 0] = np.nan, np.inf
    with pytest.raises(DataError, match="of 2 of 6 items are not finite, first those of item 2"):
        knn_predict(broken, labels, x)
    with pytest.raises(DataError, match="2 of 6 items are not finite"):
        fit_linear_probe(x, labels, broken, labels)
    with pytest.raises(DataError, match="6 items and 5 labels do not pair up"):
        recall_at_k(x, labels[:5])
    with pytest.raises(DataError, match="no features to look at"):
        knn_predict(x[:0], labels[:0], x)


def test_given_arrays_stay_as_they_are():
    x, labels = clusters(20)
    x.setflags(write=False)  # as a memory-mapped file is
    labels.setflags(write=False)
    knn_predict(x, labels, x)
    fit_linear_probe(x, labels, x, labels, strengths=[0.1])
    tensor = torch.ones(4, 3)
    nearest_neighbours(tensor, 2)
    assert torch.equal(tensor, torch.ones(4, 3))
