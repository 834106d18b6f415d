"""A Ray cluster of two nodes of one processor each, on this machine; see docs/data_at_scale.md."""

import json
import random
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "in", "mat", "big", "it", "was"]
# Argument 1: the folder of texts; 2 and 3: the caches of both engines; 4: a node dies or not.
PROGRAM = """
import json, os, socket, sys, threading, time
from pathlib import Path

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_worker_niceness"] = "0"  # the default starves on a busy machine
os.environ["RAY_raylet_start_wait_time_s"] = "300"
from ray.cluster_utils import Cluster

from selfsup.data import sharded
from selfsup.data.store import StoreConfig, build_or_open
from selfsup.data.tokenizer import Tokenizer, TokenizerConfig
from selfsup.workers import Workers

PORTS = ("metrics_agent", "metrics_export", "runtime_env_agent", "dashboard_agent_listen")


def node():
    # Given ports need not be waited for: on a busy machine Ray gives up after 15 seconds.
    sockets = [socket.create_server(("", 0)) for _ in PORTS]
    ports = {f"{n}_port": s.getsockname()[1] for n, s in zip(PORTS, sockets, strict=True)}
    for one in sockets:
        one.close()
    return {"num_cpus": 1, "object_store_memory": 80_000_000, "include_dashboard": False, **ports}


if __name__ == "__main__":
    sharded.SHARD_BYTES = 1
    folder, local, spread = map(Path, sys.argv[1:4])
    tokenizer = Tokenizer.train(TokenizerConfig(kind="byte", vocab_size=300), ["the cat sat"] * 3)
    config = StoreConfig(valid_fraction=0.2)
    one = build_or_open(folder, tokenizer, config, local)
    cluster = Cluster(initialize_head=True, head_node_args=node())
    second = cluster.add_node(**node())
    cluster.wait_for_nodes()
    os.environ["RAY_ADDRESS"] = cluster.address
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


def run(tmp_path, node):
    rng = random.Random(0)
    (tmp_path / "in").mkdir()
    for number in range(4):
        texts = [" ".join(rng.choices(WORDS, k=20)) for _ in range(40)]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / "in" / f"{number}.jsonl").write_text(lines)
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    folders = [str(tmp_path / name) for name in ("in", "local", "spread")]
    done = subprocess.run(
        [sys.executable, str(program), *folders, node], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    same, _ = json.loads(done.stdout.splitlines()[-1])
    assert same
    shards = sorted((tmp_path / "local").glob("shard-*"))
    assert len(shards) == 4
    for shard in shards:
        for path in shard.iterdir():
            twin = tmp_path / "spread" / shard.name / path.name
            assert path.read_bytes() == twin.read_bytes()
    return done


def test_a_cluster_makes_the_bytes_of_one_machine(tmp_path):
    assert "it is tried again" not in run(tmp_path, "lives").stderr


def test_work_goes_on_when_a_node_dies(tmp_path):
    run(tmp_path, "dies")
