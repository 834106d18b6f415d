"""Each corruption against lists, on rows with padding, several documents and hardly any text."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor

from selfsup.methods.generative.corruptions import (
    Rows,
    compacted,
    disguised,
    document_rotation,
    drawn,
    mass_spans,
    sentence_permutation,
    sentinel_spans,
    span_counts,
    text_infilling,
    token_deletion,
    token_mask,
)
from selfsup.randomness import numpy_generator, torch_generator

PAD, UNK, CLS, SEP, MASK, STOP = range(6)
LETTERS = range(6, 40)
SIZE = 60
SENTINELS = torch.arange(SIZE - 1, 39, -1)  # as in T5, the first has the greatest id
SPECIAL = torch.zeros(SIZE, dtype=torch.bool)
SPECIAL[[PAD, CLS, SEP, MASK, *SENTINELS.tolist()]] = True
NO_TEXT = set(SPECIAL.nonzero().flatten().tolist())
ENDS = torch.zeros(SIZE, dtype=torch.bool)
ENDS[[SEP, STOP]] = True
ORDINARY = torch.tensor(LETTERS)
MANY = 10_000


def seeded(seed: int = 0) -> torch.Generator:
    return torch_generator(seed, "corruptions")


def rows_of(lists: list[list[int]]) -> Rows:
    longest = max(map(len, lists))
    mask = torch.tensor([[i < len(row) for i in range(longest)] for row in lists])
    return Rows(torch.tensor([row + [PAD] * (longest - len(row)) for row in lists]), mask)


def lists_of(rows: Rows) -> list[list[int]]:
    """The real tokens of each row; they must come first."""
    length = rows.mask.sum(1, keepdim=True)
    assert torch.equal(rows.mask, torch.arange(rows.mask.shape[1]) < length)
    pairs = zip(rows.tokens.tolist(), length.flatten().tolist(), strict=True)
    return [tokens[:count] for tokens, count in pairs]


def texts(num_rows: int, seed: int = 0, least: int = 1, most: int = 20) -> list[list[int]]:
    """[CLS] letters and full stops [SEP]; in every third row a second document."""
    generator = seeded(seed)
    out = []
    for row in range(num_rows):
        length = int(torch.randint(least, most + 1, (1,), generator=generator))
        letters = torch.randint(STOP, LETTERS.stop, (length,), generator=generator).tolist()
        if row % 3 == 0 and length > 2:
            letters[length // 2 : length // 2] = [SEP, CLS]
        out.append([CLS, *letters, SEP])
    return out


def same_row(count: int, length: int) -> Rows:
    """[CLS] 6 7 8 ... [SEP], many times: every letter tells its place."""
    return rows_of([[CLS, *range(6, 6 + length), SEP]] * count)


def letters_of(row: list[int]) -> list[int]:
    return [token for token in row if token not in NO_TEXT]


def specials_of(row: list[int]) -> list[int]:
    return [token for token in row if token in NO_TEXT and token != MASK]


def near(share: Tensor | float, expected: float, count: int) -> bool:
    """Within four standard deviations of a share of `count` independent draws."""
    sigma = math.sqrt(expected * (1 - expected) / count)
    return bool((torch.as_tensor(share) - expected).abs().max() < 4 * sigma)


def test_compacted_moves_what_stays_to_the_front_in_its_order():
    rows = compacted(
        torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8]]),
        torch.tensor([[False, True, False, True], [False] * 4]),
    )
    assert rows.tokens.tolist() == [[6, 8, 0, 0], [0] * 4]
    assert rows.mask.tolist() == [[True, True, False, False], [False] * 4]


def test_drawn_takes_so_many_candidates_and_each_equally_often():
    candidates = torch.tensor([[False, True, True, True, True, True, False]]).expand(MANY, -1)
    chosen = drawn(candidates, torch.full((MANY, 1), 2), seeded())
    assert (chosen.sum(1) == 2).all()
    assert not chosen[:, [0, 6]].any()
    assert near(chosen[:, 1:6].float().mean(0), 0.4, MANY)
    assert drawn(candidates, torch.full((MANY, 1), 9), seeded()).equal(candidates)


def test_token_mask_hides_its_share_and_nothing_else():
    lists = texts(500)
    for before, after in zip(
        lists, lists_of(token_mask(rows_of(lists), SPECIAL, MASK, 0.3, seeded())), strict=True
    ):
        assert after.count(MASK) == round(0.3 * len(letters_of(before)))
        assert all(new in (old, MASK) for old, new in zip(before, after, strict=True))
        assert specials_of(after) == specials_of(before)
    after = token_mask(same_row(MANY, 10), SPECIAL, MASK, 0.3, seeded()).tokens == MASK
    assert near(after[:, 1:-1].float().mean(0), 0.3, MANY)


def test_token_deletion_leaves_a_subsequence():
    lists = texts(500)
    for before, after in zip(
        lists, lists_of(token_deletion(rows_of(lists), SPECIAL, 0.3, seeded())), strict=True
    ):
        gone = min(round(0.3 * len(letters_of(before))), len(letters_of(before)) - 1)
        assert len(before) - len(after) == gone
        left = iter(before)
        assert all(token in left for token in after), "not in the order of the original"
        assert specials_of(after) == specials_of(before)
    (alone,) = lists_of(token_deletion(rows_of([[7]]), SPECIAL, 0.9, seeded()))
    assert alone == [7]


@pytest.mark.parametrize("span", [1.0, 3.0])
def test_text_infilling_hides_its_share_behind_single_masks(span):
    lists = texts(1000)
    rows = rows_of(lists)
    new = text_infilling(rows, SPECIAL, MASK, 0.3, span, seeded())
    assert new.tokens.shape == rows.tokens.shape
    for before, after in zip(lists, lists_of(new), strict=True):
        budget = round(0.3 * len(letters_of(before)))
        kept = letters_of(after)
        assert len(letters_of(before)) - len(kept) == budget
        left = iter(letters_of(before))
        assert all(token in left for token in kept)
        assert after.count(MASK) <= budget
        assert (after.count(MASK) > 0) == (budget > 0)
        assert specials_of(after) == specials_of(before)
        assert (after[0], after[-1]) == (CLS, SEP)


def slowly_infilled(row: list[int], rate: float, span: float, draw: np.random.Generator):
    """The same with lists: lengths are drawn until they suffice, then put between the letters."""
    budget = round(rate * (len(row) - 2))
    lengths: list[int] = []
    while sum(lengths) < budget:
        left = budget - sum(lengths)
        last = len(lengths) == budget - 1
        lengths.append(left if last else min(left, int(draw.poisson(span))))
    items = [1] * (len(row) - 2 - budget) + [-length for length in lengths]  # below 1: a span
    letters, after = iter(row[1:-1]), []
    for item in draw.permutation(items):
        gone = [next(letters) for _ in range(abs(item))]
        after += gone if item == 1 else [MASK]
    return [row[0], *after, row[-1]]


def lone_lengths(row: list[int], after: list[int]) -> list[int]:
    """How many letters each [MASK] stands for that has no other beside it."""
    places = [i for i, token in enumerate(after) if token == MASK]
    lone = [i for i in places if MASK not in (after[i - 1], after[i + 1])]
    return [row.index(after[i + 1]) - row.index(after[i - 1]) - 1 for i in lone]


def alike(one: list[int], two: list[int]) -> bool:
    """Whether two samples may have one distribution: chi-square below four deviations."""
    ours, theirs = Counter(one), Counter(two)
    values = [v for v in ours.keys() | theirs.keys() if ours[v] + theirs[v] >= 10]
    ratio = math.sqrt(len(two) / len(one))
    chi_square = sum(
        (ratio * ours[v] - theirs[v] / ratio) ** 2 / (ours[v] + theirs[v]) for v in values
    )
    return len(values) > 2 and chi_square < len(values) + 4 * math.sqrt(2 * len(values))


@pytest.mark.parametrize("span", [1.0, 3.0])
def test_infilling_has_the_statistics_of_a_loop(span):
    rows, draw = same_row(3000, 30), numpy_generator(0, "slow")
    row = rows.tokens[0].tolist()
    ours = lists_of(text_infilling(rows, SPECIAL, MASK, 0.4, span, seeded()))
    theirs = [slowly_infilled(row, 0.4, span, draw) for _ in range(3000)]
    for measure in (
        lambda after: [after.count(MASK)],
        lambda after: lone_lengths(row, after),
        lambda after: [i for i, token in enumerate(after) if token == MASK],
        lambda after: [len(after)],
        lambda after: [token for token in after if token != MASK],
    ):
        samples = [[v for after in lists for v in measure(after)] for lists in (ours, theirs)]
        assert alike(*samples)
    lengths = [v for after in ours for v in lone_lengths(row, after)]
    assert 0 in lengths, "nothing was inserted"


def test_long_spans_collapse_and_short_ones_do_not():
    rows = same_row(MANY // 10, 20)
    one = text_infilling(rows, SPECIAL, MASK, 0.5, 1000.0, seeded())
    assert ((one.tokens == MASK).sum(1) == 1).all()
    assert (one.mask.sum(1) == 2 + 10 + 1).all()
    begins = (one.tokens == MASK).int().argmax(1) - 1  # 11 places, all equally likely
    share = torch.bincount(begins, minlength=11).float() / len(begins)
    assert near(share, 1 / 11, len(begins))


def test_sentences_are_permuted_whole():
    row = [CLS, 6, 7, STOP, 8, STOP, STOP, 9, 10, 11, SEP, CLS, 12, SEP]
    sentences = [[6, 7, STOP], [8, STOP, STOP], [9, 10, 11, SEP], [CLS, 12]]
    rows = rows_of([row, [CLS, 6, STOP, 7, SEP]] * (MANY // 2))
    new = sentence_permutation(rows, SPECIAL, ENDS, seeded())
    assert torch.equal(new.mask, rows.mask)
    seen: Counter[tuple[int, ...]] = Counter()
    short: Counter[tuple[int, ...]] = Counter()
    for number, after in enumerate(lists_of(new)):
        if number % 2:
            short[tuple(after)] += 1
            continue
        assert (after[0], after[-1]) == (CLS, SEP)
        inner = after[1:-1]
        order = []
        while inner:
            (found,) = [i for i, s in enumerate(sentences) if inner[: len(s)] == s]
            order.append(found)
            inner = inner[len(sentences[found]) :]
        seen[tuple(order)] += 1
    assert all(sorted(order) == [0, 1, 2, 3] for order in seen)
    assert len(seen) == 24
    shares = torch.tensor([count / (MANY // 2) for count in seen.values()])
    assert near(shares, 1 / 24, MANY // 2)
    assert set(short) == {(CLS, 6, STOP, 7, SEP), (CLS, 7, 6, STOP, SEP)}


def test_rotation_begins_anywhere_with_equal_probability():
    rows = rows_of([[CLS, 6, 7, 8, 9, SEP], [6, 7, 8]] * (MANY // 2) + [[CLS, SEP]])
    new = document_rotation(rows, SPECIAL, seeded())
    assert torch.equal(new.mask, rows.mask)
    *found, empty = lists_of(new)
    assert empty == [CLS, SEP]
    for number, letters in enumerate(([6, 7, 8, 9], [6, 7, 8])):
        rotations = [letters[i:] + letters[:i] for i in range(len(letters))]
        if number == 0:
            rotations = [[CLS, *rotation, SEP] for rotation in rotations]
        counts = Counter(map(tuple, found[number::2]))
        assert set(counts) == set(map(tuple, rotations))
        shares = torch.tensor([count / (MANY // 2) for count in counts.values()])
        assert near(shares, 1 / len(letters), MANY // 2)


def rebuilt(source: list[int], target: list[int]) -> list[int]:
    """The row that a source and its target were made of."""
    assert target[-1] == SEP
    sentinels = set(SENTINELS.tolist())
    spans: dict[int, list[int]] = {}
    for token in target[:-1]:
        if token in sentinels:
            spans[token] = []
        else:
            spans[list(spans)[-1]].append(token)
    return [t for token in source for t in spans.get(token, [token])]


@pytest.mark.parametrize(("rate", "span"), [(0.15, 3.0), (0.5, 3.0), (0.5, 1.0), (0.9, 2.0)])
def test_source_and_target_of_sentinel_spans_rebuild_the_row(rate, span):
    lists = texts(600, most=18)
    source, target, predicted = sentinel_spans(
        rows_of(lists), SPECIAL, SENTINELS, SEP, rate, span, seeded()
    )
    assert torch.equal(predicted, target.mask)
    sentinels = set(SENTINELS.tolist())
    for before, read, written in zip(lists, lists_of(source), lists_of(target), strict=True):
        count = len(letters_of(before))
        hidden = min(max(round(rate * count), 1), count - 1)
        spans = min(max(round(hidden / span), 1), hidden, count - hidden) if hidden else 0
        marks = [token for token in read if token in sentinels]
        assert marks == SENTINELS[:spans].tolist()
        assert [token for token in written if token in sentinels] == marks
        assert len(written) == hidden + spans + 1
        whole = rebuilt(read, written)
        assert letters_of(whole) == letters_of(before)
        assert specials_of(whole) == specials_of(before)
        if before.count(SEP) == 1:
            assert whole == before


def test_sentinel_spans_worked_example():
    # two of four tokens in one span: the cut before it is the only thing that is drawn, and the
    # span comes last
    rows = rows_of([[CLS, 6, 7, 8, 9, SEP]])
    source, target, _ = sentinel_spans(rows, SPECIAL, SENTINELS, SEP, 0.5, 2.0, seeded())
    assert lists_of(source) == [[CLS, 6, 7, 59, SEP]]
    assert lists_of(target) == [[59, 8, 9, SEP]]
    # as many spans as tokens that stay: nothing is left to chance
    source, target, _ = sentinel_spans(rows, SPECIAL, SENTINELS, SEP, 0.5, 1.0, seeded())
    assert lists_of(source) == [[CLS, 6, 59, 8, 58, SEP]]
    assert lists_of(target) == [[59, 7, 58, 9, SEP]]


def test_sentinel_spans_cut_all_ways_equally_often():
    rows = same_row(MANY, 9)
    # 4 hidden tokens in 2 spans, 3 ways, between 5 others in 2 pieces, 4 ways
    source, target, _ = sentinel_spans(rows, SPECIAL, SENTINELS, SEP, 0.45, 2.0, seeded())
    counts = Counter(map(tuple, lists_of(source)))
    assert len(counts) == 12
    shares = torch.tensor([count / MANY for count in counts.values()])
    assert near(shares, 1 / 12, MANY)
    assert target.tokens.shape[1] == 4 + 2 + 1 + 1  # of 11 tokens: 5 hidden in 2 spans, the end


def test_span_counts_of_the_paper_and_of_hardly_any_text():
    count = torch.tensor([0, 1, 2, 3, 10, 62, 512])
    hidden, spans = span_counts(count, 0.15, 3.0)
    assert hidden.tolist() == [0, 0, 1, 1, 2, 9, 77]
    assert spans.tolist() == [0, 0, 1, 1, 1, 3, 26]
    longer = [span_counts(torch.tensor(n), 0.6, 2.0) for n in range(200)]
    for now, then in zip(longer, longer[1:], strict=False):
        assert now[0] <= then[0], "a shorter row hides more"
        assert now[1] <= then[1], "a shorter row has more spans"


def test_mass_hides_one_fragment_of_half_the_text_anywhere():
    lists = texts(600)
    source, target, predicted = mass_spans(
        rows_of(lists), SPECIAL, MASK, ORDINARY, 0.5, (1.0, 0.0), seeded()
    )
    assert lists_of(target) == lists
    for before, read, chosen in zip(lists, lists_of(source), predicted.tolist(), strict=True):
        places = [i for i, token in enumerate(before) if token not in NO_TEXT]
        fragment = [n for n, i in enumerate(places) if chosen[i]]
        assert len(fragment) == max(1, round(0.5 * len(places)))
        assert fragment == list(range(fragment[0], fragment[0] + len(fragment)))
        assert sum(chosen) == len(fragment)
        expected = [MASK if c else t for c, t in zip(chosen, before, strict=False)]
        assert read == expected
    rows = same_row(MANY, 10)
    begins = mass_spans(rows, SPECIAL, MASK, ORDINARY, 0.5, (1.0, 0.0), seeded())[2].int().argmax(1)
    share = torch.bincount(begins - 1, minlength=6).float() / MANY
    assert near(share, 1 / 6, MANY)


def test_disguised_tokens_follow_their_shares():
    tokens = torch.randint(6, LETTERS.stop, (MANY, 10), generator=seeded())
    chosen = torch.rand(tokens.shape, generator=seeded(1)) < 0.5
    after = disguised(tokens, chosen, MASK, ORDINARY, (0.8, 0.1), seeded(2))
    assert torch.equal(after[~chosen], tokens[~chosen])
    before, after = tokens[chosen], after[chosen]
    total, same = len(before), 0.1 / len(ORDINARY)  # a random token may be the original
    assert near((after == MASK).float().mean(), 0.8, total)
    assert near((after == before).float().mean(), 0.1 + same, total)
    random = after[(after != MASK) & (after != before)]
    assert near(len(random) / total, 0.1 - same, total)
    counts = torch.bincount(random, minlength=SIZE)
    assert counts.sum() == counts[ORDINARY].sum()
    expected = len(random) / len(ORDINARY)
    chi_square = ((counts[ORDINARY] - expected) ** 2 / expected).sum()
    degrees = len(ORDINARY) - 1
    assert chi_square < degrees + 4 * math.sqrt(2 * degrees)


def all_of(rows: Rows) -> list[Tensor]:
    """What every corruption makes of these rows, each with the same generator."""
    rate = 0.4
    out = [
        token_mask(rows, SPECIAL, MASK, rate, seeded()),
        token_deletion(rows, SPECIAL, rate, seeded()),
        text_infilling(rows, SPECIAL, MASK, rate, 2.0, seeded()),
        sentence_permutation(rows, SPECIAL, ENDS, seeded()),
        document_rotation(rows, SPECIAL, seeded()),
        *sentinel_spans(rows, SPECIAL, SENTINELS, SEP, rate, 2.0, seeded())[:2],
        mass_spans(rows, SPECIAL, MASK, ORDINARY, rate, (0.8, 0.1), seeded())[0],
    ]
    return [made.tokens.masked_fill(~made.mask, -1) for made in out]


def test_what_stands_behind_a_row_is_neither_read_nor_changed():
    rows = rows_of(texts(50))
    other = Rows(rows.tokens.masked_fill(~rows.mask, 7), rows.mask)
    for one, two in zip(all_of(rows), all_of(other), strict=True):
        assert torch.equal(one, two)


def test_rows_without_text_stay_as_they_are():
    rows = rows_of([[CLS, SEP], [SEP], [CLS, SEP, CLS, SEP]])
    *made, _, target, mass = all_of(rows)
    whole = rows.tokens.masked_fill(~rows.mask, -1)
    assert all(torch.equal(one, whole) for one in (*made[:3], mass))
    assert (target[:, 0] == SEP).all()
    assert (target[:, 1:] == -1).all()
