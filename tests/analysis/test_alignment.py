import json
import math

import numpy as np
import pytest
import torch

from selfsup.analysis.alignment import (
    both_ways,
    by_layer,
    centred,
    chance,
    retrieval,
    shared_tokens,
    unique_pairs,
)
from selfsup.errors import DataError
from selfsup.evaluation.translations import read_pairs
from selfsup.reporting.runs import read_run
from selfsup.reporting.sections import alignment


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def diagonal(count):
    return np.stack([np.arange(count)] * 2, axis=1)


def slow(queries, targets, pairs):
    """The definition, with loops."""
    ranks = []
    for number, query in enumerate(queries):
        right = {b for a, b in pairs.tolist() if a == number}
        cosines = [
            float(query @ target / (query.norm() * target.norm()).clamp(min=1e-12))
            for target in targets
        ]
        best = max(cosines[b] for b in right)
        ranks.append(1 + sum(c >= best for i, c in enumerate(cosines) if i not in right))
    return float(np.mean([1 / rank for rank in ranks])), float(np.mean([r == 1 for r in ranks]))


def test_identical_vectors_are_found():
    x = noise(30, 8)
    assert retrieval(x, x, diagonal(30)) == (1.0, 1.0)
    assert retrieval(3 * x, x.flip(0), np.stack([np.arange(30), np.arange(30)[::-1]], 1)) == (1, 1)


def test_random_vectors_give_the_chance_level():
    count = 1000
    found = retrieval(noise(count, 16), noise(count, 16, seed=1), diagonal(count))
    assert chance(count) == pytest.approx((math.log(count) + 0.5772) / count, rel=1e-3)
    assert found.mrr == pytest.approx(chance(count), rel=0.5)
    assert found.precision < 0.01


def test_equal_vectors_find_nothing():
    found = retrieval(torch.ones(20, 4), torch.ones(20, 4), diagonal(20))
    assert found == (pytest.approx(1 / 20), 0.0)
    nothing = retrieval(torch.zeros(20, 4), torch.zeros(20, 4), diagonal(20))
    assert nothing == found


@pytest.mark.parametrize(("first", "second"), [(12, 12), (5, 9), (1, 3)])
def test_against_the_definition(first, second, monkeypatch):
    monkeypatch.setattr("selfsup.analysis.alignment.SIMILARITIES", 20)  # several pieces
    queries, targets = noise(first, 6), noise(second, 6, seed=1)
    pairs = np.array([[i % first, i % second] for i in range(max(first, second) + 2)])
    assert retrieval(queries, targets, pairs) == pytest.approx(slow(queries, targets, pairs))
    back = pairs[:, ::-1]
    assert retrieval(targets, queries, back) == pytest.approx(slow(targets, queries, back))


def test_an_item_with_two_translations_needs_to_find_one():
    queries = torch.tensor([[1.0, 0.0]])
    targets = torch.tensor([[0.0, 1.0], [1.0, 0.1], [1.0, 0.0]])
    assert retrieval(queries, targets, np.array([[0, 0], [0, 2]])) == (1.0, 1.0)
    assert retrieval(queries, targets, np.array([[0, 0], [0, 1]])) == (0.5, 0.0)


def test_centring_takes_the_language_away():
    meaning = noise(40, 8)
    first, second = meaning + 20 * noise(1, 8, seed=1), meaning + 20 * noise(1, 8, seed=2)
    assert torch.allclose(centred(first).mean(0), torch.zeros(8, dtype=torch.float64))
    assert torch.allclose(centred(first), centred(second))
    found = both_ways(first, second, diagonal(40))
    assert found["centred_mrr"] == found["centred_precision_back"] == 1.0
    assert found["mrr"] < 0.5


def test_directions_differ_and_layers_are_apart():
    # every query is nearest to target 0; targets 0 and 2 are nearest to the right query
    first = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.8, 0.1]])
    second = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    found = both_ways(first, second, diagonal(3))
    assert found["precision"] == pytest.approx(1 / 3)
    assert found["mrr"] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
    assert found["precision_back"] == pytest.approx(2 / 3)
    assert found["mrr_back"] == pytest.approx((1 + 1 / 2 + 1) / 3)
    x = noise(10, 3, 4)
    y = torch.stack([noise(10, 4, seed=5), x[:, 1], noise(10, 4, seed=6)], dim=1)
    layers = by_layer(x, y, diagonal(10))
    assert [scores["mrr"] == 1 for scores in layers] == [False, True, False]


def test_shared_tokens_by_hand():
    first = [np.array([7, 7, 1]), np.array([2, 9])]
    second = [np.array([5, 7]), np.array([9, 6]), np.array([9])]
    bags = shared_tokens(first, second)
    sevens, nines = math.log(5 / 2), math.log(5 / 3)  # held by 2 and by 3 of 5 items
    assert torch.allclose(bags[0], torch.tensor([[2 * sevens, 0.0], [0.0, nines]]))
    assert torch.allclose(bags[1], torch.tensor([[sevens, 0.0], [0.0, nines], [0.0, nines]]))
    apart = shared_tokens([np.array([1])], [np.array([2]), np.array([], dtype=np.int64)])
    assert [bag.tolist() for bag in apart] == [[[0.0]], [[0.0], [0.0]]]


def test_equal_texts_are_one_item():
    pairs = unique_pairs([("a", "x"), ("b", "y"), ("a", "z"), ("a", "x")])
    assert (pairs.first, pairs.second) == (["a", "b"], ["x", "y", "z"])
    assert pairs.numbers.tolist() == [[0, 0], [1, 1], [0, 2]]


def test_pairs_from_a_file(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_text("zh\ten\n狗\t dog\n猫\tcat\n")
    assert read_pairs(path) == (("zh", "en"), [("狗", "dog"), ("猫", "cat")])
    assert read_pairs(path, "en", "zh")[0] == ("en", "zh")
    three = tmp_path / "three.jsonl"
    three.write_text('{"a": "x", "b": "y", "c": 1}\n' * 2)
    assert read_pairs(three, "a", "b")[1] == [("x", "y")] * 2
    with pytest.raises(DataError, match="no text column was found"):
        read_pairs(three)
    path.write_text("zh\ten\n狗\tdog\n猫\t \n")
    with pytest.raises(DataError, match=r"pairs.tsv:3: 'en' is empty"):
        read_pairs(path)
    path.write_text("zh\ten\n狗\tdog\n")
    with pytest.raises(DataError, match="1 pairs; at least 2"):
        read_pairs(path)


def test_the_verb_and_its_section(masked_run, selfsup, tmp_path):
    """Copies of a text are its translations; other words for the same things are not known."""
    run = tmp_path / "run"
    run.symlink_to(masked_run)
    texts = [f"the {a} was {b} ." for a in ("film", "book", "song") for b in ("dull", "great")]
    path = tmp_path / "pairs.tsv"
    path.write_text("".join(["en\ttoo\n", *(f"{text}\t{text}\n" for text in texts)]))
    try:
        answer = selfsup("align", run, "--data", path)
        assert answer.code == 0, answer.err
        assert "en→too" in answer.out
        found = json.loads((run / "alignment.json").read_text())
        html = alignment(read_run(run), "languages")
    finally:
        (masked_run / "alignment.json").unlink(missing_ok=True)
    assert found["pairs"] == 6
    assert found["languages"] == ["en", "too"]
    assert {name: len(layers) for name, layers in found["scores"].items()} == {
        "pretrained": 2,
        "untrained": 2,
        "shared tokens": 1,
    }
    assert all(s["mrr"] == 1 for layers in found["scores"].values() for s in layers)
    assert html.count("<tr>") == 1 + 5
    assert "layer 1: 1.000" in html
