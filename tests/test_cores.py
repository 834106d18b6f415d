"""Threads follow what a process may use, not what the machine has."""

import os
import subprocess
import sys

import pytest

from selfsup.cores import cores, settle_threads

ALLOWED = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("max 100000", ALLOWED),
        ("100000 100000", 1),
        ("50000 100000", 1),
        ("9900000 100000", min(99, ALLOWED)),
        ("nonsense", ALLOWED),
    ],
)
def test_the_share_of_a_container_counts(tmp_path, said, expected):
    (tmp_path / "cpu.max").write_text(said)
    assert cores(tmp_path / "cpu.max") == expected


def test_no_share_is_no_limit(tmp_path):
    assert cores(tmp_path / "none") == ALLOWED


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="processes cannot be bound here")
def test_a_bound_process_counts_what_it_is_bound_to():
    one = min(os.sched_getaffinity(0))
    program = f"import os; os.sched_setaffinity(0, {{{one}}}); from selfsup.cores import cores; "
    done = subprocess.run(
        [sys.executable, "-c", program + "print(cores())"], capture_output=True, text=True
    )
    assert done.stdout == "1\n", done.stderr


@pytest.mark.parametrize(
    ("given", "threads"),
    [
        ({}, "16"),
        ({"OMP_NUM_THREADS": "3"}, "3"),
        ({"OMP_NUM_THREADS": "1"}, "1"),
        ({"LOCAL_WORLD_SIZE": "1", "OMP_NUM_THREADS": "1"}, "1"),
        ({"LOCAL_WORLD_SIZE": "4"}, "4"),
        ({"LOCAL_WORLD_SIZE": "4", "OMP_NUM_THREADS": "1"}, "4"),
        ({"LOCAL_WORLD_SIZE": "4", "OMP_NUM_THREADS": "2"}, "2"),
        ({"LOCAL_WORLD_SIZE": "64", "OMP_NUM_THREADS": "1"}, "1"),
        ({"LOCAL_WORLD_SIZE": "many"}, "16"),
    ],
)
def test_threads_of_a_process(given, threads):
    settle_threads(given, free=16)
    assert given["OMP_NUM_THREADS"] == threads
