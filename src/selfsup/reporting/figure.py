"""The picture for a README: a comparison as one PNG on white, drawn with matplotlib."""

import io
from pathlib import Path

from selfsup.files import write_bytes
from selfsup.reporting.charts import log_range
from selfsup.reporting.evidence import arm_name, arm_order, interval, verdict
from selfsup.reporting.runs import Compare, finite, read_compare

COLORS = (
    "#0072b2",
    "#d55e00",
    "#00875f",
    "#7b4fa3",
    "#a36a00",
    "#50565f",
)  # Okabe and Ito, then more
INK, QUIET, GRID = "#1c1f24", "#5d646e", "#e4e6ea"
MARKS = "osD^"


def write_figure(compare_json: Path, out: Path) -> Path:
    """Draws score against labels, and fine-tuning curves where they were kept, as one PNG.

    Args:
        compare_json: a `compare*.json` of a run.
        out: the picture; the same comparison gives the same bytes.

    Raises:
        CheckpointError: the comparison is missing or damaged.
        StorageError: `out` cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    compare = read_compare(compare_json)
    count = compare.label_counts[0]
    curves = [row for row in compare.curves if int(row["labels"]) == count]
    figure = Figure(figsize=(11, 4.4) if curves else (7, 4.6), dpi=160, facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2 if curves else 1, squeeze=False)[0]
    _scores(panels[0], compare)
    if curves:
        _curves(panels[1], compare, curves, count)
    figure.suptitle(
        _wrapped(verdict(compare, count).headline, 100 if curves else 56),
        x=0.03, ha="left", color=INK, fontsize=12.5, fontweight="bold",
    )  # fmt: skip
    figure.tight_layout(rect=(0.01, 0, 1, 0.99), w_pad=3)
    png = io.BytesIO()
    figure.savefig(png, format="png", metadata={"Software": None})
    write_bytes(out, png.getvalue())
    return out


def _wrapped(words: str, width: int) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(words, width))


def _plain(panel, title: str, x_label: str) -> None:
    panel.set_title(title, loc="left", fontsize=10.5, color=QUIET)
    panel.set_xlabel(x_label, color=QUIET, fontsize=10)
    panel.grid(axis="y", color=GRID, linewidth=0.8)
    panel.set_axisbelow(True)
    panel.tick_params(colors=QUIET, length=0, labelsize=9.5)
    for side in ("top", "right", "left"):
        panel.spines[side].set_visible(False)
    panel.spines["bottom"].set_color(QUIET)


def _scores(panel, compare: Compare) -> None:
    names: list[tuple[str, float, float, str]] = []
    for place, arm in enumerate(arm_order(compare)):
        color, mark = COLORS[place % len(COLORS)], MARKS[place % len(MARKS)]
        counts = sorted(compare.scores[arm])
        estimates = [interval(compare.scores[arm][count]) for count in counts]
        means = [mean for mean, _ in estimates]
        halves = [half or 0.0 for _, half in estimates]
        panel.errorbar(
            counts, means, halves, color=color, marker=mark, markersize=7, linewidth=2.2,
            elinewidth=1.2, capsize=3, markeredgecolor="white",
            linestyle="--" if arm == "baseline" else "-",
        )  # fmt: skip
        for count in counts:
            seeds = compare.scores[arm][count]
            panel.plot([count] * len(seeds), seeds, mark, color=color, markersize=3, alpha=0.5)
        names.append((f"{arm_name(arm)} {means[-1]:.2f}", counts[-1], means[-1], color))
    panel.set_xscale("log")
    panel.set_xticks(compare.label_counts, [f"{count:,}" for count in compare.label_counts])
    panel.minorticks_off()
    panel.set_xlim(*log_range(compare.label_counts))
    _name_ends(panel, names)
    _plain(panel, compare.metric.replace("_", " "), f"labelled {compare.unit} (log scale)")


def _curves(panel, compare: Compare, curves: list[dict], count: int) -> None:
    """The held-out score while fine-tuning where it was kept, else the training loss."""
    key = "score" if any(finite(y) for row in curves for y in row.get("score", ())) else "loss"
    arms = arm_order(compare)
    names: list[tuple[str, float, float, str]] = []
    for arm in arms:
        color = COLORS[arms.index(arm) % len(COLORS)]
        lines = [
            [(x, y) for x, y in zip(row["step"], row.get(key, ()), strict=False) if finite(y)]
            for row in curves
            if row["arm"] == arm
        ]
        lines = [line for line in lines if line]
        for line in lines:
            panel.plot(*zip(*line, strict=True), color=color, linewidth=0.8, alpha=0.35)
        if lines:
            shortest = min(map(len, lines))
            steps = [x for x, _ in lines[0][:shortest]]
            mean = [sum(line[k][1] for line in lines) / len(lines) for k in range(shortest)]
            panel.plot(steps, mean, color=color, linewidth=2.4)
            names.append((arm_name(arm), steps[-1], mean[-1], color))
    _name_ends(panel, names)
    what = f"held-out {compare.metric.replace('_', ' ')}" if key == "score" else "training loss"
    _plain(panel, f"{what}, {count:,} labels", "fine-tuning step")


def _name_ends(panel, names: list[tuple[str, float, float, str]]) -> None:
    from selfsup.reporting.svg import spread

    panel.margins(y=0.08)
    low, high = panel.get_ylim()
    step = (high - low) * 0.062
    places = spread([value for _, _, value, _ in names], low, high, step)
    right = panel.get_xlim()[1]
    for (words, _, _, color), place in zip(names, places, strict=True):
        panel.annotate(
            words, (right, place), xytext=(6, 0), textcoords="offset points",
            color=color, va="center", fontsize=10.5, fontweight="bold", annotation_clip=False,
        )  # fmt: skip
