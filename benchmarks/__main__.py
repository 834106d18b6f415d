"""`make bench`: ratios of two things measured in one run, on this machine.

python -m benchmarks                          all of them
python -m benchmarks pictures                 one group, or one benchmark by its name
python -m benchmarks text --record text       and write docs/results/bench-text.json
"""

import argparse
import os
import shlex
import time

from benchmarks import adapting, engine, memory, optimizers, pictures, speech, text, writing
from benchmarks.timing import NotMeasuredError

GROUPS = {
    "text": text.BENCHMARKS,
    "writing": writing.BENCHMARKS,
    "memory": memory.BENCHMARKS,
    "engine": engine.BENCHMARKS,
    "optimizers": optimizers.BENCHMARKS,
    "adapting": adapting.BENCHMARKS,
    "pictures": pictures.BENCHMARKS,
    "speech": speech.BENCHMARKS,
}
BENCHMARKS = {name: measure for group in GROUPS.values() for name, measure in group.items()}


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    known = ", ".join([*GROUPS, *BENCHMARKS])
    parser.add_argument("names", nargs="*", default=list(GROUPS), help=known)
    parser.add_argument("--record", metavar="NAME", help="write docs/results/bench-NAME.json")
    options = parser.parse_args()
    names = [one for name in options.names for one in GROUPS.get(name, [name])]
    for name in names:
        if name not in BENCHMARKS:
            parser.error(f"unknown benchmark {name!r}; known are {known}")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    started, scores = time.monotonic(), {}
    print(f"{'benchmark':<34} {'selfsup':>12} {'peer':>12} {'ratio':>7}   unit")
    for name in names:
        try:
            ours, peer, unit = BENCHMARKS[name]()
        except NotMeasuredError as error:
            print(f"{name}: not measured ({error})", flush=True)
            continue
        scores[name] = {"selfsup": ours, "peer": peer, "ratio": ours / peer, "unit": unit}
        print(
            f"{name:<34} {_number(ours):>12} {_number(peer):>12} {ours / peer:>6.2f}x   {unit}",
            flush=True,
        )
    if options.record:
        from selfsup import results

        command = shlex.join(
            ["python", "-m", "benchmarks", *options.names, "--record", options.record]
        )
        seconds = time.monotonic() - started
        name = f"bench-{options.record}"
        results.record(name, command=command, seeds=[0], seconds=seconds, scores=scores)


if __name__ == "__main__":
    main()
