"""Windows of series: as batches for models, and as pairs of past and future for forecasts."""

import math

import numpy as np
import torch

from selfsup.batch import Batch
from selfsup.data.dataset import Dataset, pad_mask
from selfsup.data.series_files import PARTS
from selfsup.errors import DataError


class Windows(Dataset):
    """Windows of series, or whole series of any length.

    Args:
        series: (time, channel) float32 each.
        window: steps in a window; 0: every series is one example.
        stride: steps from one window to the next; a rest that is shorter gives no window.

    Attributes:
        spans: (examples, 3) int64: the number of the series, first step, step behind the last.

    >>> series = [np.zeros((10, 2), np.float32), np.zeros((7, 2), np.float32)]
    >>> windows = Windows(series, window=6, stride=2)
    >>> windows.spans.tolist()
    [[0, 0, 6], [0, 2, 8], [0, 4, 10], [1, 0, 6]]
    >>> windows.batch(np.array([3, 1]))["series"].shape
    torch.Size([2, 6, 2])
    """

    def __init__(self, series: list[np.ndarray], window: int = 0, stride: int = 1):
        self.series = series
        spans = []
        for number, one in enumerate(series):
            length = window or len(one)
            for begin in range(0, len(one) - length + 1, stride if window else 1):
                spans.append((number, begin, begin + length))
        self.spans = np.array(spans, dtype=np.int64).reshape(-1, 3)
        lengths = self.spans[:, 2] - self.spans[:, 1]
        differ = len(np.unique(lengths)) > 1
        self.lengths = lengths if differ else None
        self.fields = ("series", *("mask",) * differ, "index")

    def __len__(self) -> int:
        return len(self.spans)

    def batch(self, numbers: np.ndarray) -> Batch:
        """`series` (batch, longest, channel) float32, `index`, and `mask` where one is padded."""
        spans = self.spans[numbers].tolist()
        rows = [self.series[number][begin:end] for number, begin, end in spans]
        return {**padded(rows), "index": torch.from_numpy(np.asarray(numbers, dtype=np.int64))}


def channels_apart(series: list[np.ndarray]) -> list[np.ndarray]:
    """Every channel as a series of its own, (time, 1): views, not copies.

    >>> [one.tolist() for one in channels_apart([np.array([[1, 2], [3, 4]])])]
    [[[1], [3]], [[2], [4]]]
    """
    return [one[:, channel, None] for one in series for channel in range(one.shape[1])]


def padded(rows: list[np.ndarray]) -> Batch:
    """`series` (batch, longest, channel) float32, NaN behind an end; `mask` if lengths differ."""
    longest = max(map(len, rows))
    out = np.full((len(rows), longest, rows[0].shape[1]), math.nan, dtype=np.float32)
    for place, row in zip(out, rows, strict=True):
        place[: len(row)] = row
    return {"series": torch.from_numpy(out), **pad_mask(rows)}


def windows(
    parts: dict[str, np.ndarray], part: str, history: int, horizon: int
) -> tuple[np.ndarray, np.ndarray]:
    """Every pair of past and future of one part, as the ETT benchmarks cut them, none dropped.

    The future lies wholly inside the part; the past may reach back into the part before it, so the
    first row of the validation and test parts is forecast too (Informer, Zhou et al., 2021, arXiv
    2012.07436). A part has rows - horizon + 1 pairs, the training part `history` fewer.

    Args:
        parts: what `series.splits` gave.
        part: train, valid or test.
        history: rows of the past.
        horizon: rows of the future.

    Returns:
        past (window, history, channel) and future (window, horizon, channel): views, not copies.

    Raises:
        DataError: the part is too short for one pair, or the parts before it for its past.
    """
    before = PARTS[: PARTS.index(part)]
    known = np.concatenate([parts[part][:0], *(parts[name] for name in before)])
    rows = np.concatenate([known[max(0, len(known) - history) :], parts[part]])
    if (before and len(known) < history) or len(rows) < history + horizon:
        raise DataError(
            f"the {part} part has {len(parts[part])} rows and {len(known)} before it: too few for "
            f"a past of {history} and a future of {horizon} rows"
        )
    pairs = np.lib.stride_tricks.sliding_window_view(rows, history + horizon, axis=0)
    pairs = pairs.swapaxes(1, 2)  # (window, time, channel)
    return pairs[:, :history], pairs[:, history:]
