"""The order of examples is a permutation per pass, and a pure function of seed and position."""

import numpy as np
import pytest
import torch

from selfsup.randomness import (
    Batches,
    Order,
    derive,
    isolated,
    numpy_generator,
    seed_layers,
    torch_generator,
)

SIZES = [1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 100, 255, 256, 257, 1000, 4097]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_every_pass_is_a_permutation(size, seed):
    order = Order(size, seed)
    for number in range(3):
        found = order[number * size : (number + 1) * size]
        assert found.dtype == np.int64
        assert np.array_equal(np.sort(found), np.arange(size))


def test_a_large_pass_is_a_permutation():
    size = 2**20
    found = Order(size, seed=3)[0:size]
    assert np.array_equal(np.sort(found), np.arange(size))


def test_a_size_beyond_32_bits_needs_no_table():
    size = 2**40 + 7
    found = Order(size, seed=0)[size - 1000 : size + 1000]
    assert found.min() >= 0
    assert found.max() < size
    assert len(np.unique(found[:1000])) == len(np.unique(found[1000:])) == 1000


def test_it_is_a_pure_function_of_position():
    order = Order(37, seed=5)
    whole = order[0:200]
    again = Order(37, seed=5)
    single = [int(again[p : p + 1][0]) for p in reversed(range(200))]
    assert single[::-1] == whole.tolist()
    assert np.array_equal(again[30:90], whole[30:90]), "a slice across the end of a pass differs"
    assert len(order[5:5]) == 0


def test_it_differs_by_seed_and_by_pass():
    first, second = Order(1000, 0)[0:1000], Order(1000, 1)[0:1000]
    next_pass = Order(1000, 0)[1000:2000]
    for other in (second, next_pass):
        assert (first == other).mean() < 0.02  # a random permutation shares 1 place of 1000


def test_without_shuffle_it_counts():
    assert Order(4, seed=9, shuffle=False)[2:10].tolist() == [2, 3, 0, 1, 2, 3, 0, 1]


def test_an_order_needs_an_example():
    with pytest.raises(ValueError, match="at least one"):
        Order(0, seed=0)


@pytest.mark.parametrize("size", [1000, 1024, 2**20])
def test_there_is_no_obvious_correlation(size):
    """Place and number, neighbours, and two seeds: correlations of a shuffle, 1 / sqrt(n)."""
    count = min(size, 20_000)
    found = Order(size, seed=0)[0:count]
    limit = 5 / np.sqrt(count)
    pairs = {
        "place": (np.arange(count), found),
        "neighbours": (found[:-1], found[1:]),
        "two apart": (found[:-2], found[2:]),
        "another seed": (found, Order(size, seed=1)[0:count]),
        "next pass": (found, Order(size, seed=0)[size : size + count]),
        "parity": (np.arange(count) % 2, found % 2),
    }
    for name, (a, b) in pairs.items():
        assert abs(np.corrcoef(a, b)[0, 1]) < limit, name


def test_batches_are_spread_over_the_data():
    """Every batch of 64 out of 4096 comes from all over: its mean is that of a random sample."""
    means = Order(4096, seed=2)[0:4096].reshape(64, 64).mean(1)
    expected = 4096 / np.sqrt(12 * 64)
    assert 0.7 * expected < means.std() < 1.3 * expected


def test_small_orders_reach_every_permutation():
    found = {tuple(Order(4, seed)[0:4].tolist()) for seed in range(600)}
    assert len(found) == 24


def test_batches_without_lengths_follow_the_order():
    order = Order(10, seed=1)
    batches = Batches(order, 4)
    assert np.array_equal(np.concatenate([batches[i] for i in range(6)]), order[0:24])


@pytest.mark.parametrize(("size", "batch"), [(1000, 8), (64, 8), (40, 4), (5, 2), (3, 8), (1, 1)])
def test_batches_by_length_hold_what_the_order_gives(size, batch):
    """The same examples as often; in whole windows of the order."""
    lengths = np.random.Generator(np.random.PCG64(0)).integers(1, 50, size)
    order = Order(size, seed=2)
    batches = Batches(order, batch, lengths)
    count = batches.window * 3
    found = [batches[i] for i in range(count)]
    assert {len(numbers) for numbers in found} == {batch}
    got, expected = np.sort(np.concatenate(found)), np.sort(order[0 : count * batch])
    assert np.array_equal(got, expected)
    assert np.array_equal(found[1], Batches(Order(size, seed=2), batch, lengths)[1])


def test_batches_by_length_pad_less():
    lengths = np.random.Generator(np.random.PCG64(0)).integers(1, 100, 2000)

    def padding(batches: Batches) -> float:
        found = [lengths[batches[i]] for i in range(200)]
        return sum((len(x) * x.max() - x.sum()) for x in found) / sum(x.sum() for x in found)

    assert padding(Batches(Order(2000, 0), 10, lengths)) < 0.4 * padding(
        Batches(Order(2000, 0), 10)
    )


def test_derive_is_a_pure_function_of_all_its_arguments():
    seeds = [
        derive(0, "mask"),
        derive(1, "mask"),
        derive(0, "order"),
        derive(0, "mask", 0),
        derive(0, "mask", 0, 0),
        derive(0, "mask", 1, 0),
        derive(0, "mask", 10),
        derive(-1, "mask"),
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive(0, "mask", 1) == 2382694478175498254  # a number in old runs: never to change


def test_generators_are_fresh_and_equal():
    draws = [torch.rand(3, generator=torch_generator(0, "a", 1)) for _ in range(2)]
    assert torch.equal(*draws)
    assert not torch.equal(draws[0], torch.rand(3, generator=torch_generator(0, "a", 2)))
    assert numpy_generator(0, "a").random() == numpy_generator(0, "a").random()


def test_isolated_gives_the_callers_state_back():
    before = torch.get_rng_state()
    with isolated():
        seed_layers(0, "layers")
        first = torch.rand(2)
        seed_layers(0, "layers")
        assert torch.equal(first, torch.rand(2))
    assert torch.equal(torch.get_rng_state(), before)


def test_isolated_gives_it_back_after_an_error():
    before = torch.get_rng_state()
    with pytest.raises(KeyError), isolated():
        seed_layers(0, "layers")
        torch.rand(2)
        raise KeyError
    assert torch.equal(torch.get_rng_state(), before)
