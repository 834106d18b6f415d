"""A Ray cluster of two nodes of one processor each, on this machine; see docs/data_at_scale.md."""

import json
import random
import subprocess
import sys

import numpy as np
import pytest

import selfsup
from selfsup import vector_parts

pytestmark = pytest.mark.slow

WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "in", "mat", "big", "it", "was"]
CLUSTER = """
import itertools, json, os, socket, subprocess, sys, threading, time
from pathlib import Path

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_worker_niceness"] = "0"  # the default starves on a busy machine
os.environ["RAY_raylet_start_wait_time_s"] = "300"
from ray.cluster_utils import Cluster

from selfsup.workers import Workers

PORTS = ("metrics_agent", "metrics_export", "runtime_env_agent", "dashboard_agent_listen")


def node(**more):
    # Given ports need not be waited for: on a busy machine Ray gives up after 15 seconds.
    sockets = [socket.create_server(("", 0)) for _ in PORTS]
    ports = {f"{n}_port": s.getsockname()[1] for n, s in zip(PORTS, sockets, strict=True)}
    for one in sockets:
        one.close()
    fixed = {"num_cpus": 1, "object_store_memory": 80_000_000, "include_dashboard": False}
    return {**fixed, **ports, **more}


def start(**more):
    cluster = Cluster(initialize_head=True, head_node_args=node(**more))
    second = cluster.add_node(**node(**more))
    cluster.wait_for_nodes()
    os.environ["RAY_ADDRESS"] = cluster.address
    return cluster, second
"""
# Argument 1: the folder of texts; 2 and 3: the caches of both engines; 4: a node dies or not.
PREPARING = """
from selfsup.data import sharded
from selfsup.data.store import StoreConfig, build_or_open
from selfsup.data.tokenizer import Tokenizer, TokenizerConfig

if __name__ == "__main__":
    sharded.SHARD_BYTES = 1
    folder, local, spread = map(Path, sys.argv[1:4])
    tokenizer = Tokenizer.train(TokenizerConfig(kind="byte", vocab_size=300), ["the cat sat"] * 3)
    config = StoreConfig(valid_fraction=0.2)
    one = build_or_open(folder, tokenizer, config, local)
    cluster, second = start()
    if sys.argv[4] == "dies":
        def kill():
            time.sleep(4)
            cluster.remove_node(second, allow_graceful=False)
        threading.Thread(target=kill, daemon=True).start()
    started = time.monotonic()
    other = build_or_open(folder, tokenizer, config, spread, Workers(engine="ray"))
    seconds = time.monotonic() - started
    same = one.meta == other.meta and (one.train[:] == other.train[:]).all()
    print(json.dumps([bool(same), seconds]))
    cluster.shutdown()
"""
# Argument 1: a folder with texts.txt, which becomes the working one; 2: a run.
EMBEDDING = """
import selfsup
from selfsup import vector_parts
from selfsup.verbs import searching

TIMES = []
SAY = "echo $PPID $CUDA_VISIBLE_DEVICES > said"


def times():
    return {str(p): p.stat().st_mtime_ns for p in Path("two.npy.parts").glob("0*/*")}


def stopped(items):
    yield from itertools.islice(windows(items), 5)
    raise KeyboardInterrupt


def noted(path, parts):
    TIMES.append(times())
    write(path, parts)


if __name__ == "__main__":
    vector_parts.PART_ITEMS = 16
    windows, write = vector_parts._windows, searching.write_npy
    cluster, _ = start(num_gpus=1)
    os.chdir(sys.argv[1])
    vector_parts._windows = stopped
    try:
        selfsup.embed(sys.argv[2], "texts.txt", "two.npy", engine="ray")
    except KeyboardInterrupt:
        TIMES.append(times())
    vector_parts._windows, searching.write_npy = windows, noted
    selfsup.embed(sys.argv[2], "texts.txt", "two.npy", engine="ray")
    shards = [(str(n), (["sh", "-c", SAY + str(n)],)) for n in range(6)]
    Workers(engine="ray").run(subprocess.check_call, shards, "saying", gpu=True)
    print(json.dumps(TIMES))
    cluster.shutdown()
"""


def start(program, folder, *arguments):
    """What the program says in its last line, and to the standard error."""
    (folder / "program.py").write_text(CLUSTER + program)
    done = subprocess.run(
        [sys.executable, str(folder / "program.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def prepare(tmp_path, node):
    rng = random.Random(0)
    (tmp_path / "in").mkdir()
    for number in range(4):
        texts = [" ".join(rng.choices(WORDS, k=20)) for _ in range(40)]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / "in" / f"{number}.jsonl").write_text(lines)
    folders = [tmp_path / name for name in ("in", "local", "spread")]
    (same, _), said = start(PREPARING, tmp_path, *folders, node)
    assert same
    shards = sorted((tmp_path / "local").glob("shard-*"))
    assert len(shards) == 4
    for shard in shards:
        for path in shard.iterdir():
            twin = tmp_path / "spread" / shard.name / path.name
            assert path.read_bytes() == twin.read_bytes()
    return said


def test_a_cluster_makes_the_bytes_of_one_machine(tmp_path):
    assert "it is tried again" not in prepare(tmp_path, "lives")


def test_work_goes_on_when_a_node_dies(tmp_path):
    prepare(tmp_path, "dies")


def test_a_cluster_embeds_as_one_process_does_and_goes_on_where_it_was_stopped(
    masked_run, corpus, tmp_path, monkeypatch
):
    (tmp_path / "texts.txt").write_text(
        "".join(corpus.text.read_text().splitlines(keepends=True)[:120])
    )
    (stopped, whole), said = start(EMBEDDING, tmp_path, tmp_path, masked_run)
    assert "it is tried again" not in said
    assert 3 <= len(stopped) <= 15
    assert whole.items() >= stopped.items()
    assert len(whole) == 3 * 8
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vector_parts, "PART_ITEMS", 16)
    selfsup.embed(masked_run, "texts.txt", "one.npy")
    one, two = (np.load(tmp_path / f"{name}.npy") for name in ("one", "two"))
    assert np.allclose(one, two, rtol=0, atol=1e-5)  # bytes differ with the number of threads
    one, two = ((tmp_path / f"{name}.items.jsonl").read_bytes() for name in ("one", "two"))
    assert one == two
    lines = [path.read_text().split() for path in tmp_path.glob("said?")]
    assert len(lines) == 6
    assert {gpu for _, gpu in lines} == {"0"}
    assert len({process for process, _ in lines}) <= 2
