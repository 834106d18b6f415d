"""Writes the tables of README.md, README.zh.md and docs/results.md from docs/results/*.json.

    python docs/build.py            write them
    python docs/build.py --check    fail if one is out of date

In a page, the table of a result stands between two comments:

    <!-- result: NAME -->
    <!-- end -->
"""

import json
import re
import sys
from pathlib import Path

from selfsup.report.evidence import arm_name, interval

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
BLOCK = re.compile(r"(<!-- result: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
PAGES = ("README.md", "README.zh.md", "docs/results.md")


def table(name: str) -> str:
    """The Markdown table of one result, with the command and the machine that made it."""
    result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    rows = comparison(result) if "label_counts" in result else numbers(result["scores"])
    machine = result["machine"]
    place = machine.get("gpu") or f"{machine['processor']}, {machine['threads']} thread(s)"
    seeds = ", ".join(map(str, result["seeds"]))
    source = f"`{result['command']}`, seeds {seeds}, {result['seconds']:.0f} s on {place}, "
    return f"{rows}\n\n{source}torch {result['versions']['torch']}, {result['date']}.\n"


def comparison(result: dict) -> str:
    """Arms by number of labels: mean and 95% interval over the seeds."""
    arms = result["scores"]
    lines = [
        f"| labels | {' | '.join(arm_name(arm) for arm in arms)} |",
        f"|---|{'---|' * len(arms)}",
    ]
    for count in map(str, result["label_counts"]):
        cells = [interval(scores[count]) for scores in arms.values()]
        shown = [f"{mean:.3f} ± {half:.3f}" for mean, half in cells]
        lines.append(f"| {count} | {' | '.join(shown)} |")
    what = f"{result['task']}, {result['metric']} on {result['test_size']:,} test examples"
    return f"{what}, mean and 95% interval:\n\n" + "\n".join(lines)


def numbers(scores: dict) -> str:
    """A plain list of scores."""
    lines = ["| | |", "|---|---|"]
    for key, value in scores.items():
        if isinstance(value, dict):
            inner = ", ".join(
                f"{k} {v:.4g}" for k, v in value.items() if isinstance(v, int | float)
            )
            lines.append(f"| {key} | {inner} |")
        else:
            lines.append(f"| {key} | {value:.4g} |")
    return "\n".join(lines)


def built(text: str) -> str:
    """A page with its tables made anew."""
    return BLOCK.sub(lambda m: f"{m[1]}{table(m[2])}{m[3]}", text)


def main(arguments: list[str]) -> int:
    """Writes or checks every page."""
    stale = []
    for page in PAGES:
        path = ROOT / page
        before = path.read_text(encoding="utf-8")
        after = built(before)
        if before != after:
            stale.append(page)
            if "--check" not in arguments:
                path.write_text(after, encoding="utf-8")
    print("out of date: " + ", ".join(stale) if stale else "up to date")
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
