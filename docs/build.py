"""Writes the tables of README.md, README.zh.md and the pages of docs/ from docs/results/*.json.

    python docs/build.py            write them
    python docs/build.py --check    fail if one is out of date

In a page, the table of a result stands between two comments:

    <!-- result: NAME -->
    <!-- end -->

and one table of several probes, a row for each, between these:

    <!-- probes: NAME NAME ... -->
    <!-- end -->

and one table of benchmarks, of those of docs/results/bench-NAME.json that exist, between these:

    <!-- bench: NAME NAME ... -->
    <!-- end -->

and one table of what indexes find, between these:

    <!-- recalls: NAME NAME ... -->
    <!-- end -->

and the tables of a study of methods between these:

    <!-- study: NAME -->
    <!-- end -->

and the table of a comparison of several tunings, what each scores and costs, between these:

    <!-- tunings: NAME -->
    <!-- end -->

and the table of the faults that `pytest tests/fault --record-faults` counts, between these:

    <!-- faults: NAME -->
    <!-- end -->
"""

import json
import re
import sys
from pathlib import Path

from selfsup.reporting.evidence import arm_name, interval

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
BLOCK = re.compile(
    r"(<!-- (result|probes|bench|study|tunings|faults|recalls): ([^>]+) -->\n).*?(<!-- end -->)",
    re.DOTALL,
)
PAGES = (
    *("README.md", "README.zh.md", "docs/results.md"),
    *("docs/benchmarks.md", "docs/language.md", "docs/tuning.md"),
    *("docs/search.md", "docs/reliability.md", "docs/optimizers.md", "docs/suites.md"),
)


def table(name: str) -> str:
    """The Markdown table of one result, with the command and the machine that made it."""
    result = read(name)
    if "label_counts" in result:
        rows = comparison(result)
    else:
        rows = suite(result) if "suite" in result else numbers(result["scores"])
    return f"{rows}\n\n{source(result)}\n"


def read(name: str) -> dict:
    """What `--record NAME` wrote."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def source(result: dict) -> str:
    """The commands and the machine that made a result."""
    machine = result["machine"]
    place = machine.get("gpu") or f"{machine['processor']}, {machine['threads']} thread(s)"
    seeds = ", ".join(map(str, result["seeds"]))
    made = result.get("pretraining")
    before = f"`{made['command']}` ({made['seconds']:.0f} s), then " if made else ""
    command = f"{before}`{result['command']}`, seeds {seeds}, {result['seconds']:.0f} s"
    return f"{command} on {place}, torch {result['versions']['torch']}, {result['date']}."


def probes(names: list[str]) -> str:
    """Pre-trained features of several runs, then the references, which are the same for all."""
    results = {name: read(name) for name in names}
    keys = list(dict.fromkeys(key for r in results.values() for key in r["scores"]["pretrained"]))
    rows = {name: r["scores"]["pretrained"] for name, r in results.items()}
    references: dict[str, dict[str, dict]] = {}  # by what it is, then by the result that has it
    for name, result in results.items():
        for reference, scores in result["scores"].items():
            found = references.setdefault(reference, {})
            if reference != "pretrained" and scores not in found.values():
                found[name] = scores
    for reference, found in references.items():
        for name, scores in found.items():
            rows[f"{reference} ({name})" if len(found) > 1 else reference] = scores
    lines = [f"| | {' | '.join(keys)} |", f"|---|{'---|' * len(keys)}"]
    for name, scores in rows.items():
        cells = [f"{scores[key]:.3f}" if key in scores else "" for key in keys]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    sources = "\n".join(f"- {source(result)}" for result in results.values())
    return (
        "\n".join(lines) + f"\n\n<details><summary>Commands</summary>\n\n{sources}\n\n</details>\n"
    )


def benchmarks(names: list[str]) -> str:
    """What selfsup and a peer reach, a row for each benchmark that was recorded."""
    found = [f"bench-{name}" for name in names if (RESULTS / f"bench-{name}.json").exists()]
    results = list(map(read, found))
    lines = ["| | selfsup | peer | ratio | unit |", "|---|---|---|---|---|"]
    for result in results:
        for name, score in result["scores"].items():
            keys = ("selfsup", "peer", "ratio")
            cells = [score.get(key, "") for key in keys]  # no ratio where a side did not get there
            shown = [f"{cell:,.4g}" if isinstance(cell, float) else str(cell) for cell in cells]
            lines.append(f"| {name} | {' | '.join(shown)} | {score.get('unit', '')} |")
    if not results:
        return "Not measured yet.\n"
    return "\n".join(lines) + "\n\n" + "\n".join(f"- {source(r)}" for r in results) + "\n"


def recalls(names: list[str]) -> str:
    """What indexes find of what an exact search finds, a row for each effort that was recorded."""
    results = list(map(read, names))
    found = results[0]["scores"]
    lines = [
        f"| index | vectors | effort | recall@{found['k']} | queries/s | exact queries/s |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        scores, index = result["scores"], result["index"]
        lines.append(
            f"| {index['kind']} | {index['items']:,} x {index['dim']} | {scores['effort'] or ''} "
            f"| {scores['recall']:.4f} | {scores['per_second']:,.0f} "
            f"| {scores['exact_per_second']:,.0f} |"
        )
    return "\n".join(lines) + "\n\n" + "\n".join(f"- {source(r)}" for r in results) + "\n"


def study(name: str) -> str:
    """A table for each way of tuning: methods by task, then what stands beside them."""
    if not (RESULTS / f"{name}.json").exists():
        return "Not measured yet.\n"
    result = read(name)
    scores = result["scores"]
    tasks = list(next(iter(scores.values())))
    parts = []
    for tuning in next(iter(scores[next(iter(scores))].values())):
        lines = [f"| {tuning} | {' | '.join(tasks)} |", f"|---|{'---|' * len(tasks)}"]
        rows = [(method, scores[method], "pretrained") for method in scores]
        measured = [method for method in scores if "scratch" in scores[method][tasks[0]][tuning]]
        rows += [(f"scratch ({method})", scores[method], "scratch") for method in measured]
        rows += [("classical baseline", scores[method], "baseline") for method in measured[:1]]
        for label, of_method, arm in rows:
            shown = []
            for task in tasks:
                found = of_method.get(task, {}).get(tuning, {}).get(arm)
                mean, half = interval(found) if found else (0.0, 0.0)
                margin = "" if half is None else f" ± {half:.3f}"
                shown.append(f"{mean:.3f}{margin}" if found else "")
            lines.append(f"| {label} | {' | '.join(shown)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + f"\n\n{source(result)}\n"


def tunings(name: str) -> str:
    """Tunings of a pre-trained network: score by number of labels, then what each costs."""
    if not (RESULTS / f"{name}.json").exists():
        return "Not measured yet.\n"
    result = read(name)
    counts = [str(count) for count in result["label_counts"]]
    head = [*(f"{count} labels" for count in counts), "trained", "share", "one step", "memory"]
    lines = [f"| tuning | {' | '.join(head)} | saved |", f"|---|{'---|' * len(head)}---|"]
    for tuning, found in result["tunings"].items():
        cells = []
        for count in counts:
            cells.append(with_interval(found["scores"][count]))
        cells += [f"{found['trained']:,}", f"{found['share']:.2%}"]
        cells += [f"{1000 * found['step_seconds']:.3g} ms", f"{found['memory'] / 1e6:.1f} MB"]
        lines.append(f"| {tuning} | {' | '.join(cells)} | {found['file_bytes'] / 1e6:.2f} MB |")
    for arm in ("scratch", "baseline"):
        if arm in result["scores"]:
            cells = [with_interval(result["scores"][arm][count]) for count in counts]
            lines.append(f"| {arm_name(arm)} | {' | '.join(cells)} | | | | | |")
    what = f"{result['task']}, {result['metric']} on {result['test_size']:,} test examples"
    note = (
        "time of a step: forward and backward; its memory: what is kept for backward, gradients "
        "and moments of what is trained, all weights"
    )
    rows = "\n".join(lines)
    return f"{what}, mean and 95% interval; {note}:\n\n{rows}\n\n{source(result)}\n"


def faults(name: str) -> str:
    """Kinds of fault: how often each was brought about, and how often it ended as it must."""
    if not (RESULTS / f"{name}.json").exists():
        return "Not measured yet.\n"
    result = read(name)
    lines = ["| fault | trials | as required | what is required |", "|---|---|---|---|"]
    for fault, found in result["scores"].items():
        counts = f"{found['trials']} | {found['as_required']}"
        lines.append(f"| {fault} | {counts} | {found['note']} |")
    return "\n".join(lines) + f"\n\n{source(result)}\n"


def comparison(result: dict) -> str:
    """Arms by number of labels: mean and 95% interval over the seeds."""
    arms = result["scores"]
    lines = [
        f"| labels | {' | '.join(arm_name(arm) for arm in arms)} |",
        f"|---|{'---|' * len(arms)}",
    ]
    for count in map(str, result["label_counts"]):
        shown = [with_interval(scores[count]) for scores in arms.values()]
        lines.append(f"| {count} | {' | '.join(shown)} |")
    what = f"{result['task']}, {result['metric']} on {result['test_size']:,} test examples"
    how = "mean and 95% interval" if len(result["seeds"]) > 1 else "one seed"
    return f"{what}, {how}:\n\n" + "\n".join(lines)


def with_interval(scores: list[float]) -> str:
    """A mean, and the half of its 95% interval where there are several seeds."""
    mean, half = interval(scores)
    return f"{mean:.3f}" if half is None else f"{mean:.3f} ± {half:.3f}"


def suite(result: dict) -> str:
    """The tasks of a suite, of which the missing ones are named."""
    lines = ["| task | | most frequent class |", "|---|---|---|"]
    for task in result["scores"].values():
        metrics = ", ".join(
            f"{name.replace('_', ' ')} {with_interval(scores)}"
            for name, scores in task["metrics"].items()
        )
        majority = "" if task["majority"] is None else f"{task['majority']:.3f}"
        lines.append(f"| {task['title']} | {metrics} | {majority} |")
    score, missing = result["overall"]["score"], ", ".join(result["missing"])
    lines.append(f"| {result['overall']['name']} | {with_interval(score)} | |")
    return "\n".join(lines) + (f"\n\nMissing: {missing}." if missing else "")


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

    def made(found: re.Match[str]) -> str:
        head, kind, names, tail = found.groups()
        made = {
            "result": table,
            "probes": lambda names: probes(names.split()),
            "study": study,
            "tunings": tunings,
            "faults": faults,
            "bench": lambda names: benchmarks(names.split()),
            "recalls": lambda names: recalls(names.split()),
        }
        return head + made[kind](names) + tail

    return BLOCK.sub(made, text)


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
