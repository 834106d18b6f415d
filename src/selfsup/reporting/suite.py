"""A suite of tasks in the report: scores on one axis, others' beside, and what is missing."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from selfsup.reporting import charts
from selfsup.reporting.evidence import interval
from selfsup.reporting.markup import number, pairs, section, text
from selfsup.reporting.runs import Row, Run, finite
from selfsup.reporting.svg import Plot, marker

OURS, MAJORITY = "this run", "most frequent class"


def suites(run: Run, anchor: str) -> str:
    """Every suite that was evaluated on the run, one after the other."""
    several = len(run.suites) > 1
    return "".join(
        _suite(found, f"{anchor}-{place}" if several and place else anchor)
        for place, found in enumerate(run.suites)
    )


def headline(found: Row) -> tuple[str, str]:
    """The overall score as a sentence, and what it leaves out."""
    done = [task for task in found["tasks"].values() if task["state"] == "done"]
    if not done:
        return f"{found['title']}: no task was measured", _lacking(found)
    whole = found["overall"]
    sentence = f"{found['title']}: {whole['name']} {percent(whole['score'])}"
    return sentence, f"{_others(found)}{_lacking(found)}"


def overall(found: Row) -> str:
    """The mean under its own name, and what others reach on the same tasks."""
    whole = found["overall"]
    return f"{whole['name']}: {percent(whole['score'])}. {_others(found)}".rstrip()


def _others(found: Row) -> str:
    shown = [
        f"{line['title']} {100 * line['same_tasks']:.1f}"
        for line in found["lines"].values()
        if finite(line["same_tasks"])
    ]
    return f"On the same tasks: {', '.join(shown)}. " if shown else ""


def percent(scores: Sequence[float]) -> str:
    """Mean of the seeds and half of its 95% interval, in percent.

    >>> percent([0.5]), percent([0.5, 0.52])
    ('50.0', '51.0 ± 12.7')
    """
    mean, half = interval(list(scores))
    return f"{100 * mean:.1f}" + (f" ± {100 * half:.1f}" if half is not None else "")


def _lacking(found: Row) -> str:
    by_state: dict[str, list[str]] = {}
    for task in found["tasks"].values():
        if task["state"] != "done":
            by_state.setdefault(task["state"], []).append(task["title"])
    words = "; ".join(f"{state}: {', '.join(titles)}" for state, titles in by_state.items())
    return f"{words[0].upper()}{words[1:]}." if words else "All tasks were measured."


def _suite(found: Row, anchor: str) -> str:
    figure = charts.both_widths(lambda width, height: dots(found, width))
    words = [overall(found)] if found["overall"]["tasks"] else []
    words += [_lacking(found), str(found.get("note", ""))]
    lead = text(" ".join(f"{part[:1].upper()}{part[1:]}" for part in words if part))
    sources = "".join(
        f"<li>{text(line['title'])}: {text(line['source'])}.</li>"
        for line in found["lines"].values()
    )
    keys = ("settings", "run", "command", "summary")
    files = {str(task["title"]): task.get("files", {}) for task in found["tasks"].values()}
    how = pairs({key: found[key] for key in keys if key in found} | {"files": files})
    body = (
        f"{_legend(found)}<figure>{figure}</figure>{_table(found)}"
        f'<ul class="plain">{sources}{_reasons(found)}</ul>'
        f"<details><summary>How this was measured</summary>{how}</details>"
    )
    return section(anchor, str(found["title"]), lead, body)


def _series(found: Row) -> list[tuple[str, str, int]]:
    """(name, colour class, shape) of everything that is drawn, this run first."""
    drawn = [(OURS, "c0", 0)]
    if any(finite(task.get("majority")) for task in found["tasks"].values()):
        drawn.append((MAJORITY, "c6", 3))
    places = enumerate(found["lines"].values())
    return drawn + [
        (str(line["title"]), charts.label_color(place + 1), 1 + place % 2) for place, line in places
    ]


def _legend(found: Row) -> str:
    items = "".join(
        f'<li class="{color}"><svg viewBox="0 0 12 12" aria-hidden="true">'
        f"{marker(6, 6, 4, shape, 'dot')}</svg>{text(name)}</li>"
        for name, color, shape in _series(found)
    )
    return f'<ul class="legend">{items}</ul>'


def dots(found: Row, width: int) -> str:
    """A row for each task: this run's seeds and their mean, the majority, what others reached."""
    tasks, lines = found["tasks"], list(found["lines"].values())
    styles = {name: (color, shape) for name, color, shape in _series(found)}
    shown = [100 * score for task in tasks.values() for score in task.get("score", ())]
    low = min(0.0, *shown) if shown else 0.0
    plot = Plot.of_rows(
        f"{found['title']}: score of each task",
        [str(task["title"]) for task in tasks.values()],
        (10 * (low // 10), 100.0),
        width,
        "score in percent",
    )
    for place, (name, task) in enumerate(tasks.items()):
        if task["state"] != "done":
            words = f"{task['state']}: {task['missing'][0]}" if "missing" in task else task["state"]
            room = (width - plot.left) / 7
            words = words if len(words) < room else str(task["state"])
            plot.label_at(plot.left + 8, plot.y(place) - 3, words, "tick")
        for line in lines:
            if name in line["scores"]:
                value = 100 * line["scores"][name]
                color, shape = styles[str(line["title"])]
                tip = f"{line['title']}, {task['title']}: {value:.1f}"
                plot.dot(value, place, color, tip, radius=4, shape=shape)
        if finite(task.get("majority")):
            color, shape = styles[MAJORITY]
            tip = f"{MAJORITY}, {task['title']}: {100 * task['majority']:.1f}"
            plot.dot(100 * task["majority"], place, color, tip, radius=4, shape=shape)
        seeds = [100 * score for score in task.get("score", ())]
        for nth, value in enumerate(seeds if len(seeds) > 1 else (), start=1):
            tip = f"{task['title']}, seed {nth}: {value:.1f}"
            plot.dot(value, place, "seed c0", tip, radius=3)
        if seeds:
            tip = f"{OURS}, {task['title']}: {fmean(seeds):.1f}"
            plot.dot(fmean(seeds), place, "mean c0", tip, radius=5.5)
    return plot.render()


def _table(found: Row) -> str:
    lines = list(found["lines"].values())
    titles = [OURS, MAJORITY, *(line["title"] for line in lines), "scored", "trained on", "metrics"]
    head = "".join(f"<th>{text(title)}</th>" for title in titles)
    rows = ""
    for name, task in found["tasks"].items():
        others = [_share(line["scores"].get(name)) for line in lines]
        if task["state"] == "done":
            cells = [f"<b>{percent(task['score'])}</b>", _share(task.get("majority")), *others]
            cells += [number(sum(task["examples"].values())), number(task["train_examples"])]
            cells.append(text(metrics_of(task)))
        else:
            cells = [text(task["state"]), "", *others, "", "", ""]
        row = "".join(f"<td>{cell}</td>" for cell in cells)
        rows += f'<tr><th scope="row">{text(task["title"])}</th>{row}</tr>'
    whole = found["overall"]
    if whole["tasks"]:
        cells = [f"<b>{percent(whole['score'])}</b>", ""]
        cells += [_share(line["same_tasks"]) for line in lines] + ["", "", ""]
        row = "".join(f"<td>{cell}</td>" for cell in cells)
        rows += f'<tr><th scope="row">{text(whole["name"])}</th>{row}</tr>'
    return (
        '<div class="scroll"><table class="records"><thead><tr><th>task</th>'
        f"{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _share(value: Any) -> str:
    return f"{100 * value:.1f}" if finite(value) else "–"


def metrics_of(task: Row) -> str:
    """Each metric of a task with the mean of its seeds, in percent."""
    return ", ".join(
        f"{name.replace('_', ' ')} {100 * fmean(values):.1f}"
        for name, values in task["metrics"].items()
    )


def _reasons(found: Row) -> str:
    """What was not there or left out, file by file."""
    words = []
    for task in found["tasks"].values():
        if task["state"] == "missing":
            words.append(f"{task['title']}: no file {', '.join(task['missing'])}")
        if task["state"] == "not supported":
            words.append(f"{task['title']}: {task['why']}")
        words += [
            f"{task['title']}: {count:,} lines without a label or a cell left out of {file}"
            for file, count in task.get("left_out", {}).items()
        ]
    return "".join(f"<li>{text(line)}.</li>" for line in words)
