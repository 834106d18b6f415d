"""Watching a run: finite numbers, plateaus, collapsed features, and signals. It never trains."""

import signal
import threading
from types import FrameType

import torch
from jaxtyping import Float
from torch import Tensor

PLATEAU_MARGIN = 0.25  # nats below chance at which a model has clearly left the plateau
MIN_EFFECTIVE_RANK = 1.1
MIN_SPREAD = 0.01


class Signals:
    """Remembers SIGTERM and SIGINT until the loop can save; a second SIGINT stops at once."""

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> "Signals":
        self.previous = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self.previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        if self.received == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number


def effective_rank(features: Float[Tensor, "batch dim"]) -> Tensor:
    """exp of the entropy of the singular values of the centred features, 1 to min(batch, dim).

    Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality". 1 means that
    all examples lie on one line.
    """
    values = torch.linalg.svdvals((features - features.mean(0)).float())
    share = values / values.sum().clamp(min=1e-12)
    return torch.exp(torch.special.entr(share).sum())


def spread(features: Float[Tensor, "batch dim"]) -> Tensor:
    """Standard deviation over examples, relative to the root mean square; 0 when all are equal."""
    features = features.float()
    rms = features.square().mean().sqrt().clamp(min=1e-12)
    return features.std(0, unbiased=False).square().mean().sqrt() / rms


def plateau_warning(loss: float, chance_loss: float | None, progress: float) -> str | None:
    """Plain words when a third of the budget is spent and the loss is still that of a blind guess.

    Args:
        loss: validation loss, nats.
        chance_loss: loss of a guess that ignores its input (the unigram entropy for language).
        progress: share of the budget that is spent.
    """
    if chance_loss is None or progress < 1 / 3 or loss < chance_loss - PLATEAU_MARGIN:
        return None
    return (
        f"after {progress:.0%} of the budget the loss ({loss:.2f}) is that of guessing without "
        f"looking at the input ({chance_loss:.2f}): the encoder has learned nothing from context "
        "yet. Try a higher learning rate (training.lr=2e-3), smaller batches or more time; with a "
        "transformer also rotary positions (model.positions='rotary', model.rotary_base=100 for "
        "short rows), embeddings of unit variance (model.embedding_std=1.0) and pre-norm "
        "(model.norm='pre')."
    )


def collapse_warning(rank: float, relative_spread: float, progress: float) -> str | None:
    """Plain words when the encoder gives nearly the same vector, or one line, for all examples."""
    if progress < 1 / 4 or (rank >= MIN_EFFECTIVE_RANK and relative_spread >= MIN_SPREAD):
        return None
    return (
        f"features are collapsing (effective rank {rank:.1f}, relative spread "
        f"{relative_spread:.3f}): the encoder gives nearly the same vector for every example. Try "
        "a lower learning rate, longer warm-up (training.warmup), or less weight decay."
    )
