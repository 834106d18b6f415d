"""The guard: it warns when it should, and only then."""

import os
import signal
import threading

import pytest
import torch

from selfsup.training import guard
from selfsup.training.guard import Signals, collapse_warning, plateau_warning


def features(rank: int, batch: int = 64, dim: int = 16, seed: int = 0) -> torch.Tensor:
    """Random features of exactly this rank."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(batch, rank, generator=generator)
    return left @ torch.randn(rank, dim, generator=generator)


@pytest.mark.parametrize("rank", [1, 2, 4, 8])
def test_effective_rank_is_at_most_the_rank(rank):
    got = guard.effective_rank(features(rank)).item()
    assert 0.6 * rank <= got <= rank + 1e-3


def test_effective_rank_of_equal_directions_is_their_number():
    """Four orthogonal directions of equal strength."""
    axes = torch.eye(4).repeat(2, 1)
    centred = torch.cat([axes[:4], -axes[:4]])
    assert guard.effective_rank(centred).item() == pytest.approx(4.0, rel=1e-5)


def test_effective_rank_does_not_see_scale_shift_or_rotation():
    base = features(5)
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(1)))[0]
    moved = 7 * base @ rotation + 3
    expected = guard.effective_rank(base).item()
    assert guard.effective_rank(moved).item() == pytest.approx(expected, rel=1e-3)


def test_equal_features_have_rank_1_and_no_spread():
    same = torch.ones(8, 4)
    assert guard.effective_rank(same).item() == pytest.approx(1.0)
    assert guard.spread(same).item() == 0.0


def test_spread_is_relative_to_the_size():
    found = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    assert guard.spread(found).item() == pytest.approx(1.0)
    assert guard.spread(found + 100).item() == pytest.approx(0.01, rel=1e-3)
    assert guard.spread(found * 1e-3).item() == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize(
    ("loss", "chance", "progress", "warns"),
    [
        (6.0, 6.0, 0.5, True),
        (5.8, 6.0, 0.34, True),
        (6.0, 6.0, 0.33, False),  # too early to tell
        (5.7, 6.0, 1.0, False),  # has left the plateau
        (6.0, None, 1.0, False),  # the method has no blind guess
        (9.0, 6.0, 0.9, True),
    ],
)
def test_plateau_warning(loss, chance, progress, warns):
    text = plateau_warning(loss, chance, progress)
    assert (text is not None) is warns
    if text:
        assert f"{progress:.0%}" in text
        assert f"{loss:.2f}" in text
        assert "training.lr" in text


@pytest.mark.parametrize(
    ("rank", "spread", "progress", "warns"),
    [
        (1.05, 0.5, 0.5, True),
        (5.0, 0.005, 0.25, True),
        (1.05, 0.005, 0.24, False),  # too early to tell
        (1.2, 0.02, 1.0, False),
    ],
)
def test_collapse_warning(rank, spread, progress, warns):
    text = collapse_warning(rank, spread, progress)
    assert (text is not None) is warns
    if text:
        assert "collapsing" in text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_remembered_and_the_old_handlers_come_back(number):
    before = signal.getsignal(number)
    with Signals() as signals:
        assert signals.received is None
        os.kill(os.getpid(), number)
        assert signals.received == number
    assert signal.getsignal(number) is before


def test_a_second_sigint_stops_at_once():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), Signals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_sigterm_waits():
    with Signals() as signals:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.SIGTERM


def test_another_thread_leaves_signals_alone():
    before = signal.getsignal(signal.SIGTERM)
    found = []

    def work() -> None:
        with Signals() as signals:
            found.append((signals.received, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(None, before)]
