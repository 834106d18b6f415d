"""`make bench`: ratios of two things measured in one run, on this machine.

python -m benchmarks                 all of them
python -m benchmarks --record text   and write docs/results/bench-text.json
"""

import argparse
import os
import time

from benchmarks.text import BENCHMARKS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", default=list(BENCHMARKS), help=", ".join(BENCHMARKS))
    parser.add_argument("--record", metavar="NAME", help="write docs/results/bench-NAME.json")
    options = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    started, scores = time.monotonic(), {}
    print(f"{'benchmark':<34} {'selfsup':>12} {'peer':>12} {'ratio':>7}   unit")
    for name in options.names:
        ours, peer, unit = BENCHMARKS[name]()
        scores[name] = {"selfsup": ours, "peer": peer, "ratio": ours / peer}
        print(f"{name:<34} {ours:>12,.0f} {peer:>12,.0f} {ours / peer:>6.2f}x   {unit}", flush=True)
    if options.record:
        from selfsup import results

        command = f"python -m benchmarks {' '.join(options.names)} --record {options.record}"
        seconds = time.monotonic() - started
        name = f"bench-{options.record}"
        results.record(name, command=command, seeds=[0], seconds=seconds, scores=scores)


if __name__ == "__main__":
    main()
