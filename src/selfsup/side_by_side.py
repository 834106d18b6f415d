"""Batches that need nothing of each other, computed side by side on a processor.

Between two products of matrices the threads of one batch wait for each other, and a small product
has too little work for all of them. As many batches at once as there are threads have neither
trouble. A GPU has its own ways of being busy, and takes one batch after the other.
"""

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")

MOST = 8
"""Batches at once: each needs memory of its own."""


def side_by_side(
    work: Callable[[T], None], batches: Iterable[T], number: int, device: torch.device
) -> None:
    """Does `work` on every batch; what it raises is raised here.

    Args:
        work: has to enter `inference_mode` and `autocast` itself, which are of one thread each.
        batches: read as they are needed: few are held at a time.
        number: how many there are, about; where fewer than torch's threads, each has several.
        device: what the work is done on.
    """
    threads = torch.get_num_threads()
    streams = min(threads, number, MOST) if device.type == "cpu" else 1
    if streams < 2:
        for batch in batches:
            work(batch)
        return
    waiting: deque[Future[None]] = deque()
    share = threads // streams
    try:
        with ThreadPoolExecutor(streams, "batch", torch.set_num_threads, (share,)) as pool:
            for batch in batches:
                waiting.append(pool.submit(work, batch))
                if len(waiting) > 2 * streams:
                    waiting.popleft().result()
            while waiting:
                waiting.popleft().result()
    finally:
        torch.set_num_threads(threads)
