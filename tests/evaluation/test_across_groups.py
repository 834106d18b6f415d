import numpy as np
import pytest

from selfsup.errors import DataError
from selfsup.evaluation.across_groups import left_out_mix, left_out_scores, within_groups
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
    features, labels, groups = items(8.0, 0.0)
    scores = left_out_scores(features, labels, groups)
    assert scores["linear"] > 0.95
    assert scores["knn"] > 0.95
    eer = within_groups(features, labels, groups, 1, seed=0)["eer"]
    assert eer == pytest.approx(0.5, abs=0.1), "nothing tells groups apart"


def test_features_of_the_group_alone_say_nothing_of_the_class_but_verify_the_group():
    features, labels, groups = items(0.0, 8.0)
    assert left_out_scores(features, labels, groups)["linear"] < 0.5
    assert within_groups(features, labels, groups, 1, seed=0)["eer"] < 0.25


def test_a_left_out_group_says_nothing_to_its_own_probe():
    """Labels of one group are turned round: the others tell them wrong, and it alone suffers."""
    features, labels, groups = items(8.0, 0.0)
    turned = np.where(groups == 3, (labels + 1) % 3, labels)
    assert left_out_scores(features, turned, groups)["linear"] < 0.8
    assert left_out_scores(features, labels, groups)["linear"] > 0.95


def test_the_mix_finds_the_layer_that_knows_the_class():
    knows, labels, groups = items(8.0, 0.0)
    ignorant, _, _ = items(0.0, 3.0, seed=1)
    assert left_out_mix(np.stack([ignorant, knows, ignorant], 1), labels, groups) > 0.9
    assert left_out_mix(np.stack([ignorant, ignorant], 1), labels, groups) < 0.6


def test_more_shots_are_worth_more_and_only_the_drawn_items_are_read():
    features, labels, groups = items(2.0, 0.0)
    one, four = (within_groups(features, labels, groups, n, seed=0)["few"] for n in (1, 4))
    assert one < four
    assert one == within_groups(features, labels, groups, 1, seed=0)["few"]
    assert one != within_groups(features, labels, groups, 1, seed=1)["few"]


def test_as_many_shots_as_items_leave_nothing_to_score():
    with pytest.raises(DataError, match="12 labels of each class and group are all there are"):
        within_groups(*items(1.0, 0.0), shots=12, seed=0)
