"""How many processors this process may use, and how many threads that makes."""

import os
from collections.abc import Mapping, MutableMapping
from pathlib import Path

QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds of all processors, and period
SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


def cores(quota: Path = QUOTA) -> int:
    """Processors that this process may run on, at least 1.

    The machine's own number misleads where a process is bound to some of them, or a container is
    given a share of their time: a laptop's two processors' worth on a server of 64.

    Args:
        quota: where the container's share stands; a file that is not there means no limit.
    """
    try:
        time, period = quota.read_text(encoding="ascii").split()
        share = int(time) // int(period)
    except (OSError, ValueError):  # no such file, or "max"
        return len(_allowed())
    return max(1, min(len(_allowed()), share))


def settle_threads(environment: MutableMapping[str, str], free: int | None = None) -> None:
    """Says in the environment how many threads torch is to use; before torch is imported.

    What a user has set stays, but for one case that cannot be told from it: torchrun sets
    OMP_NUM_THREADS to 1 where nothing is said, which leaves processors idle when there are more of
    them than ranks. There the ranks of a machine share its processors. Two hyper-threads of one
    core count once, as torch itself counts: products of matrices gain nothing from the second.

    Args:
        environment: that of the process.
        free: processors; by default those of `cores`, without second hyper-threads.

    >>> environment = {"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    >>> settle_threads(environment, free=16)
    >>> environment["OMP_NUM_THREADS"]
    '8'
    """
    ranks = _ranks_here(environment)
    said = environment.get("OMP_NUM_THREADS")
    if said is not None and (ranks == 1 or said != "1"):
        return
    free = min(cores(), _whole()) if free is None else free
    environment["OMP_NUM_THREADS"] = str(max(1, free // ranks))


def _allowed() -> set[int]:
    """The numbers of the processors that this process is bound to."""
    bound = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    return bound(0) if bound else set(range(os.cpu_count() or 1))


def _whole() -> int:
    """Those of them that are no hyper-threads of the same core."""
    try:
        return len({Path(SIBLINGS.format(one)).read_text("ascii") for one in _allowed()})
    except OSError:
        return len(_allowed())


def _ranks_here(environment: Mapping[str, str]) -> int:
    said = environment.get("LOCAL_WORLD_SIZE", "1")
    return max(1, int(said)) if said.isdecimal() else 1
