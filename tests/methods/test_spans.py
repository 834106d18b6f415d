"""Span masks: how many spans, where they may lie, and that every arrangement is equally likely."""

import itertools
from collections import Counter

import pytest
import torch
from torch import Tensor

from selfsup.methods.spans import begun_spans, covered, span_mask
from selfsup.randomness import torch_generator


def rows(*lengths: int, time: int | None = None) -> Tensor:
    """(batch, time) bool, True at the first `lengths` positions."""
    return torch.arange(time or max(lengths)) < torch.tensor(lengths).unsqueeze(1)


def draw(real: Tensor, rate: float, span: int, seed: int = 0, **options) -> Tensor:
    return span_mask(real, rate, span, torch_generator(seed, "mask"), **options)


def runs(row: Tensor) -> list[tuple[int, int]]:
    """(first, length) of each run of True."""
    out, first = [], 0
    for value, group in itertools.groupby(row.tolist()):
        size = len(list(group))
        if value:
            out.append((first, size))
        first += size
    return out


@pytest.mark.parametrize("span", [1, 2, 5, 9])
def test_covered_equals_a_loop(span: int):
    begins = torch.rand(20, 7, generator=torch_generator(0, "begins")) < 0.2
    expected = torch.zeros_like(begins)
    for row, time in begins.nonzero().tolist():
        expected[row, time : time + span] = True
    assert torch.equal(covered(begins, span), expected)


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize(("rate", "span"), [(0.15, 7), (0.65, 10), (0.9, 3), (1.0, 4)])
def test_spans_are_whole_and_lie_within_the_real_part(overlap: bool, rate: float, span: int):
    real = rows(*([40, 31, 12, 6, 0] * 40))
    mask = draw(real, rate, span, overlap=overlap)
    assert mask.shape == real.shape
    assert mask.dtype == torch.bool
    assert not (mask & ~real).any()
    sizes = [size for row in mask for _, size in runs(row)]
    assert min(sizes) >= span
    if not overlap:
        assert all(size % span == 0 for size in sizes)
    short = real.sum(1) < span
    assert short.any()
    assert not mask[short].any()


@pytest.mark.parametrize(("rate", "span", "length"), [(0.15, 7, 61), (0.08, 3, 50), (0.5, 4, 40)])
def test_the_number_of_spans_is_exact_but_for_its_fraction(rate: float, span: int, length: int):
    real = rows(*[length] * 4000)
    counts = Counter((draw(real, rate, span, overlap=False).sum(1) // span).tolist())
    expected = rate * length / span
    low = int(expected + 1e-9)
    assert set(counts) <= {low, low + 1}
    mean = sum(number * times for number, times in counts.items()) / 4000
    assert mean == pytest.approx(expected, abs=0.03)  # 4 standard deviations at most


def test_spans_that_do_not_overlap_cover_the_rate_on_average():
    real = rows(*([90, 50, 23, 10] * 6000))
    mask = draw(real, 0.15, 7, overlap=False)
    share = mask.sum(1) / real.sum(1)
    for length in (90, 50, 23, 10):
        assert share[real.sum(1) == length].mean() == pytest.approx(0.15, abs=0.015)


@pytest.mark.parametrize("overlap", [True, False])
def test_every_arrangement_is_equally_likely(overlap: bool):
    time, span = 7, 2
    places = range(time - span + 1)
    sets = [
        pair for pair in itertools.combinations(places, 2) if overlap or pair[1] - pair[0] >= span
    ]
    expected = Counter()
    for pair in sets:
        begins = torch.zeros(1, time, dtype=torch.bool)
        begins[0, list(pair)] = True
        expected[tuple(covered(begins, span)[0].tolist())] += 1
    real = rows(*[time] * 6000, time=time + 3)  # padding on the right
    mask = draw(real, 4 / 7, span, overlap=overlap)
    found = Counter(tuple(row[:time]) for row in mask.tolist())
    assert found.keys() == expected.keys()
    for arrangement, times in expected.items():
        assert found[arrangement] / 6000 == pytest.approx(times / len(sets), abs=0.02)


def test_starts_are_drawn_without_replacement():
    mask = draw(rows(*[30] * 200), 0.5, 1)
    assert (mask.sum(1) == 15).all()


@pytest.mark.parametrize("overlap", [True, False])
def test_rate_one_with_single_positions_hides_all_that_is_real(overlap: bool):
    real = rows(9, 4, 1, time=12)
    assert torch.equal(draw(real, 1.0, 1, overlap=overlap), real)


@pytest.mark.parametrize("overlap", [True, False])
def test_no_more_spans_than_there_is_room_for(overlap: bool):
    mask = draw(rows(*[5, 3, 2] * 50), 1.0, 3, min_masks=2, overlap=overlap)
    full = mask.sum(1).view(50, 3)
    assert (full[:, 0] == 3).any() or overlap
    assert (full[:, 0] >= 3).all()
    assert (full[:, 1] == 3).all()
    assert (full[:, 2] == 0).all()


def test_min_masks_is_the_least_number_of_spans():
    real = rows(*[20] * 500)
    assert not draw(real, 0.05, 5).any(1).all()  # a fifth of a span on average
    assert (draw(real, 0.05, 5, min_masks=2, overlap=False).sum(1) == 10).all()


def test_only_the_generator_decides():
    real = rows(30, 20)
    assert torch.equal(draw(real, 0.5, 3), draw(real, 0.5, 3))
    assert not torch.equal(draw(real, 0.5, 3), draw(real, 0.5, 3, seed=1))


def test_begun_spans_begin_anywhere_and_end_with_the_row():
    real = rows(*([30, 18] * 3000))
    mask = begun_spans(real, 0.05, 6, torch_generator(0, "mask"))
    assert not (mask & ~real).any()
    share = mask[::2].float().mean(0)
    for time in range(30):
        expected = 1 - 0.95 ** min(time + 1, 6)
        assert share[time] == pytest.approx(expected, abs=0.035)
    assert share[6:].mean() == pytest.approx(1 - 0.95**6, abs=0.01)
    assert mask[:, 17][1::2].any()
    inner = [size for row in mask[::2] for first, size in runs(row) if first + size < 30]
    assert min(inner) == 6


def test_begun_spans_with_probability_one_hide_all_that_is_real():
    real = rows(9, 4)
    assert torch.equal(begun_spans(real, 1.0, 3, torch_generator(0, "mask")), real)
