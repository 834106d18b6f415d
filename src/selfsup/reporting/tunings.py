"""Tunings side by side in the report: what each scores against what it costs."""

from collections.abc import Sequence
from typing import NamedTuple

from selfsup.reporting import charts
from selfsup.reporting.evidence import interval, lower_is_better
from selfsup.reporting.markup import compact, section, text
from selfsup.reporting.runs import Compare, Row
from selfsup.reporting.svg import CHARACTER, Plot, padded

WIDTH, HEIGHT = 380, 340
SIZE = 1.32  # of a name in a small panel, against a label of a large figure
SHIFTS = [shift * sign for shift in range(0, 73, 9) for sign in (1, -1)]
"""How far above or below its dot a name may stand, in pixels."""


class Box(NamedTuple):
    """The place of a name or a dot, in pixels."""

    left: float
    right: float
    top: float
    bottom: float

    def meets(self, other: "Box") -> bool:
        """Whether the two cover each other."""
        across = self.left < other.right and other.left < self.right
        return across and self.top < other.bottom and other.top < self.bottom


class Panel(NamedTuple):
    """One cost: its name, a value for each tuning, whether its axis is logarithmic."""

    name: str
    values: list[float]
    log: bool = False


def tunings(compare: Compare, anchor: str) -> str:
    """Score against cost and the same numbers as a table, where there are several tunings."""
    if len(compare.tunings) < 2:
        return ""
    count = min(compare.label_counts)
    figure = "".join(figures(compare, count))
    better = "Lower is better. " if lower_is_better(compare) else ""
    lead = (
        f"{better}The pre-trained network with {count:,} labelled {text(compare.unit)}: its "
        f"{text(compare.metric.replace('_', ' '))} against the parameters that are trained, and "
        "against seconds and memory of a training step. Bars are 95% t-intervals over the seeds."
    )
    note = (
        "A step: its forward and backward pass. Memory is counted: what a step keeps for its "
        "backward pass, gradients and the optimizer's moments of what is trained, all weights. "
        f"Training: one whole, with {count:,} labels. Saved: the weights in a run's folder."
    )
    head, rows = table(compare)
    cells = "".join(f"<th>{text(name)}</th>" for name in head[1:])
    body = "".join(
        f'<tr><th scope="row"><span class="arm {color(place)}">{text(row[0])}</span></th>'
        + "".join(f"<td>{text(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for place, row in enumerate(rows)
    )
    listed = (
        f'<p class="note">{note}</p><div class="scroll"><table><thead><tr><th>{head[0]}</th>'
        f"{cells}</tr></thead><tbody>{body}</tbody></table></div>"
    )
    body = f'<figure><div class="grid small">{figure}</div></figure>{listed}'
    return section(anchor, "Tunings", lead, body)


def color(place: int) -> str:
    """The colour class of the n-th tuning; the first is the pre-trained arm of other figures."""
    return charts.label_color(place - 1) if place else "c0"


def figures(compare: Compare, count: int) -> list[str]:
    """Three panels with one vertical axis: parameters, seconds of a step, its memory."""
    rows = compare.tunings.values()
    panels = (
        Panel("trained parameters (log scale)", [row["trained"] for row in rows], True),
        Panel("seconds of a step", [row["step_seconds"] for row in rows]),
        Panel("memory of a step (MB)", [row["memory"] / 1e6 for row in rows]),
    )
    estimates = [interval(row["scores"][count]) for row in rows]
    seeds = [score for row in rows for score in row["scores"][count]]
    bounds = [charts.clipped(estimate, seeds) for estimate in estimates]
    shown = padded([edge for low, _, high in bounds for edge in (low, high)])
    return [_panel(compare, panel, bounds, shown) for panel in panels]


def _panel(
    compare: Compare,
    panel: Panel,
    bounds: Sequence[tuple[float, float, float]],
    shown: tuple[float, float],
) -> str:
    metric = compare.metric.replace("_", " ")
    low, high = min(panel.values), max(panel.values)
    span = (low / 2, high * 2) if panel.log else (0.0, 1.15 * high)
    plot = Plot(
        f"{metric} against {panel.name}",
        span,
        shown,
        width=WIDTH,
        height=HEIGHT,
        x_title=panel.name,
        y_title=metric,
        log_x=panel.log,
        x_ticks=charts.log_ticks(*span) if panel.log else None,
    )
    for place, (value, (bottom, mean, top)) in enumerate(zip(panel.values, bounds, strict=True)):
        if top > bottom:
            plot.bar(value, bottom, top, color(place))
        tip = f"{list(compare.tunings)[place]}: {metric} {mean:.3f}, {panel.name} {compact(value)}"
        plot.dot(value, mean, f"mean {color(place)}", tip, radius=5.5, shape=place)
    _names(plot, list(compare.tunings), panel.values, [mean for _, mean, _ in bounds])
    return plot.render()


def _names(
    plot: Plot, names: Sequence[str], values: Sequence[float], means: Sequence[float]
) -> None:
    """Each tuning's name near its dot, where it covers neither a dot nor another name."""
    dots = [(plot.x(value), plot.y(mean)) for value, mean in zip(values, means, strict=True)]
    taken = [Box(x - 7, x + 7, y - 7, y + 7) for x, y in dots]
    for place, (name, (x, y)) in enumerate(zip(names, dots, strict=True)):
        long = SIZE * CHARACTER * len(name)
        near = [Box(x + 11, x + 11 + long, y - 9 + by, y + 7 + by) for by in SHIFTS]
        near += [Box(x - 11 - long, x - 11, y - 9 + by, y + 7 + by) for by in SHIFTS]
        near.sort(key=lambda box: abs(box.top - y + 9))  # as near as can be, to the right first
        fitting = [box for box in near if _inside(plot, box)] or near
        free = [box for box in fitting if not any(map(box.meets, taken))]
        box = (free or fitting)[0]
        taken.append(box)
        left = box.right < x
        at = box.right if left else box.left
        plot.label_at(at, box.top + 14, name, f"name {color(place)}{' end' if left else ''}")


def _inside(plot: Plot, box: Box) -> bool:
    return (
        plot.left < box.left
        and box.right < plot.width
        and box.top > 26
        and box.bottom < plot.bottom
    )


def table(compare: Compare) -> tuple[list[str], list[list[str]]]:
    """Head and rows: scores by number of labels, then costs; the page and the terminal show it."""
    counts = compare.label_counts
    head = ["tuning", *(f"{count:,} labels" for count in counts), "trained", "a step"]
    head += ["memory", "training", "saved"]
    return head, [[name, *_cells(row, counts)] for name, row in compare.tunings.items()]


def _cells(row: Row, counts: Sequence[int]) -> list[str]:
    scores = [interval(row["scores"][count]) for count in counts if count in row["scores"]]
    shown = [f"{mean:.3f}" + ("" if half is None else f" ± {half:.3f}") for mean, half in scores]
    return [
        *shown,
        *["–"] * (len(counts) - len(shown)),
        f"{row['trained']:,} ({100 * row['share']:.3g}%)",
        f"{1000 * row['step_seconds']:.3g} ms",
        _megabytes(row["memory"]),
        f"{interval(row['seconds'][min(row['seconds'])])[0]:.1f} s",
        _megabytes(row["file_bytes"]),
    ]


def _megabytes(count: float) -> str:
    return f"{compact(float(f'{count / 1e6:.3g}'))} MB"
