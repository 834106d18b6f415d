"""Batches side by side: all of them, few held at a time, errors and threads given back."""

import threading
import time

import numpy as np
import pytest
import torch

from selfsup.model_folder import load_model
from selfsup.side_by_side import MOST, side_by_side

CPU = torch.device("cpu")


@pytest.fixture
def threads():
    """Four, whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield 4
    torch.set_num_threads(before)


@pytest.mark.parametrize(("number", "share"), [(2, 2), (3, 1), (50, 1)])
def test_every_batch_is_done_once_with_a_share_of_the_threads(threads, number, share):
    seen, lock = [], threading.Lock()

    def work(batch: int) -> None:
        with lock:
            seen.append((batch, torch.get_num_threads()))

    side_by_side(work, range(number), number, CPU)
    assert sorted(seen) == [(batch, share) for batch in range(number)]
    assert torch.get_num_threads() == threads


def test_one_batch_has_all_threads_and_the_callers_own(threads):
    seen = []
    side_by_side(
        lambda _: seen.append((torch.get_num_threads(), threading.current_thread())), [0], 1, CPU
    )
    assert seen == [(threads, threading.main_thread())]


def test_few_batches_are_held_at_a_time(threads):
    made, done = 0, []

    def batches():
        nonlocal made
        for made in range(1, 101):
            assert made - len(done) <= 3 * threads + 2
            yield made

    def work(batch: int) -> None:
        time.sleep(0.001)
        done.append(batch)

    side_by_side(work, batches(), 100, CPU)
    assert len(done) == made == 100
    assert threads <= MOST


def test_errors_come_out_and_the_threads_come_back(threads):
    def fails(batch: int) -> None:
        if batch == 3:
            raise ValueError("the fourth")

    with pytest.raises(ValueError, match="the fourth"):
        side_by_side(fails, range(10), 10, CPU)

    def unreadable():
        yield 0
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        side_by_side(lambda _: None, unreadable(), 10, CPU)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("layer", [None, 1])
def test_vectors_are_those_of_one_thread(masked_run, threads, layer):
    model = load_model(masked_run, "cpu")
    texts = [f"the film was {'very ' * (n % 7)}good" for n in range(40)]
    found = model.embed(texts, batch_size=4, layer=layer)
    torch.set_num_threads(1)
    np.testing.assert_allclose(found, model.embed(texts, batch_size=4, layer=layer), atol=1e-5)
