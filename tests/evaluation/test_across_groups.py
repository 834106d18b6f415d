import numpy as np
import pytest

from selfsup.evaluation.across_groups import left_out_scores
from selfsup.randomness import numpy_generator


def items(strength_of_class: float, strength_of_group: float, seed: int = 0):
    """4 groups x 3 classes x 12 items whose features hold the class, the group and noise."""
    draw = numpy_generator(seed, "items")
    groups, labels = (part.flatten() for part in np.mgrid[0:4, 0:36])
    labels = labels % 3
    noise = draw.normal(size=(len(labels), 12))
    noise[:, :3] += strength_of_class * np.eye(3)[labels]
    noise[:, 3:7] += strength_of_group * np.eye(4)[groups]
    return noise.astype(np.float32), labels, groups


def test_a_class_that_is_the_same_in_all_groups_is_found_in_a_new_one():
    scores = left_out_scores(*items(8.0, 0.0), shots=0, seed=0)
    assert scores["linear"] > 0.95
    assert scores["knn"] > 0.95
    assert scores["eer"] == pytest.approx(0.5, abs=0.1), "nothing tells groups apart"


def test_features_of_the_group_alone_say_nothing_of_the_class_but_verify_the_group():
    scores = left_out_scores(*items(0.0, 8.0), shots=0, seed=0)
    assert scores["linear"] < 0.5
    assert scores["eer"] < 0.25


def test_one_shot_reads_one_item_of_each_class_and_group():
    features, labels, groups = items(2.0, 0.0)
    few, all_of_them = (left_out_scores(features, labels, groups, n, seed=0) for n in (1, 0))
    assert few["linear"] < all_of_them["linear"]
    # everything but the drawn items may be anything: only the test group is read beside them
    assert few == left_out_scores(features, labels, groups, 1, seed=0)
    assert few != left_out_scores(features, labels, groups, 1, seed=1)
