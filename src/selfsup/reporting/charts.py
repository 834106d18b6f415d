"""The figures of the report: every function turns numbers into one inline SVG.

Colours are classes: `c0` pre-trained, `c1` scratch, `c2` baseline, the same in every figure;
`k0` to `k8` are labels of an embedding map and runs that are laid over each other.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from selfsup.reporting.evidence import ARM_NAMES, arm_name, arm_order, interval
from selfsup.reporting.markup import compact
from selfsup.reporting.runs import Compare, Row, Run, finite
from selfsup.reporting.svg import CHARACTER, Plot, padded

WIDE, NARROW = (920, 420), (390, 380)  # a figure for screens, and the same for phones
MAX_POINTS = 600  # points of one drawn line; more cannot be told apart
MAX_MAP_POINTS = 2000
NUM_LABEL_COLORS = 9


def arm_color(arm: str, arms: Sequence[str] = ()) -> str:
    """The colour class of an arm; arms beyond the usual three follow in their own order."""
    if arm in ARM_NAMES:
        return f"c{list(ARM_NAMES).index(arm)}"
    others = [a for a in arms if a not in ARM_NAMES]
    return f"c{len(ARM_NAMES) + others.index(arm) % 3}"


def label_color(number: int) -> str:
    """The colour class of the n-th label or run."""
    return f"k{number % NUM_LABEL_COLORS}"


def label_shape(number: int) -> int:
    """The shape of the n-th label; labels that share a colour differ in shape."""
    return number + number // NUM_LABEL_COLORS


def both_widths(draw: Callable[[int, int], str]) -> str:
    """One figure drawn for a screen and for a phone; the style sheet shows one of them."""
    return f'<div class="wide">{draw(*WIDE)}</div><div class="narrow">{draw(*NARROW)}</div>'


def smoothed(values: Sequence[float]) -> list[float]:
    """The mean of the values around each one, a thirtieth of the series wide; it does not lag."""
    reach, place = len(values) // 60, np.arange(len(values))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    low, high = np.maximum(place - reach, 0), np.minimum(place + reach + 1, len(values))
    return ((sums[high] - sums[low]) / (high - low)).tolist()


def thinned(xs: Sequence[float], ys: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most `MAX_POINTS` points of a line, evenly chosen, first and last among them."""
    if len(xs) <= MAX_POINTS:
        return list(xs), list(ys)
    chosen = np.linspace(0, len(xs) - 1, MAX_POINTS).round().astype(int)
    return [xs[i] for i in chosen], [ys[i] for i in chosen]


def score_by_labels(compare: Compare, width: int, height: int) -> str:
    """Score against number of labels: means as lines, 95% intervals, every seed as a dot."""
    arms, counts = arm_order(compare), compare.label_counts
    seeds = [s for by_count in compare.scores.values() for v in by_count.values() for s in v]
    bounds = {
        (arm, count): clipped(interval(values), seeds)
        for arm in arms
        for count, values in compare.scores[arm].items()
    }
    shown = [edge for low, _, high in bounds.values() for edge in (low, high)]
    called = arm_name if width >= WIDE[0] else _short_name
    lasts = {arm: max(compare.scores[arm]) for arm in arms}
    names = [
        (f"{called(arm)} {bounds[arm, lasts[arm]][1]:.2f}", bounds[arm, lasts[arm]][1], arm)
        for arm in arms
    ]
    plot = Plot(
        f"{compare.metric} against number of labels",
        log_range(counts),
        padded(shown + seeds),
        width=width,
        height=height,
        log_x=True,
        x_ticks=counts,
        x_title=f"labelled {compare.unit} (log scale)",
        y_title=_title(compare.metric),
        right=18 + CHARACTER * max(len(words) for words, _, _ in names),
    )
    for place, arm in enumerate(arms):
        color, shift = arm_color(arm, arms), 9 * (place - (len(arms) - 1) / 2)
        mine = sorted(compare.scores[arm])
        lows, means, highs = zip(*(bounds[arm, count] for count in mine), strict=True)
        if len(mine) > 1:
            plot.band(mine, lows, highs, color)
            plot.line(mine, means, f"bold {color}{' dashed' if arm == 'baseline' else ''}")
        for count, low, mean, high in zip(mine, lows, means, highs, strict=True):
            if high > low:
                plot.bar(count, low, high, color, shift)
            single = len(compare.scores[arm][count]) == 1  # then the mean is its dot
            for number, score in enumerate(() if single else compare.scores[arm][count], 1):
                tip = f"{arm_name(arm)}, {count:,} labels, seed {number}: {score:.3f}"
                plot.dot(count, score, f"seed {color}", tip, radius=3.2, shift=shift, shape=place)
            tip = f"{arm_name(arm)}, {count:,} labels: mean {mean:.3f}"
            plot.dot(count, mean, f"mean {color}", tip, radius=5, shape=place)
    plot.end_labels([(words, value, arm_color(arm, arms)) for words, value, arm in names])
    return plot.render()


def _short_name(arm: str) -> str:
    return {"scratch": "scratch", "baseline": "baseline"}.get(arm, arm_name(arm))


def log_range(counts: Sequence[int]) -> tuple[float, float]:
    """The numbers of labels with some room at both sides of a logarithmic axis."""
    room = max(1.02, (counts[-1] / counts[0]) ** 0.05) if len(counts) > 1 else 2.0
    return counts[0] / room, counts[-1] * room


def clipped(
    estimate: tuple[float, float | None], scores: Sequence[float]
) -> tuple[float, float, float]:
    """(low, mean, high); an interval of scores between 0 and 1 does not leave that range."""
    mean, half = estimate[0], estimate[1] or 0.0
    low, high = mean - half, mean + half
    if all(0 <= score <= 1 for score in scores):
        low, high = max(0.0, low), min(1.0, high)
    return low, mean, high


def _title(words: str) -> str:
    return words.replace("_", " ")


def finetuning_curves(compare: Compare, key: str) -> list[str]:
    """`loss` or `score` while fine-tuning, one panel per number of labels, on one vertical axis.

    Two families of lines: every seed thin, the mean of an arm bold.
    """
    rows = [row for row in compare.curves if len(_points(row, key)[0]) > 1]
    if not rows:
        return []
    values = [value for row in rows for value in _points(row, key)[1]]
    title = f"held-out {_title(compare.metric)}" if key == "score" else f"training {key}"
    return [
        _family_panel(
            [row for row in rows if int(row["labels"]) == count], key, title, count, values
        )
        for count in sorted({int(row["labels"]) for row in rows})
    ]


def _family_panel(rows: list[Row], key: str, title: str, count: int, values: list[float]) -> str:
    arms = [arm for arm in ARM_NAMES if any(row["arm"] == arm for row in rows)]
    arms += sorted({str(row["arm"]) for row in rows} - set(arms))
    steps = [step for row in rows for step in _points(row, key)[0]]
    plot = Plot(
        f"Fine-tuning {key} with {count} labels",
        (min(steps), max(steps)),
        padded(values, 0.04),
        width=400,
        height=280,
        x_title="fine-tuning step",
        y_title=f"{title}, {count:,} labels",
        right=20 + CHARACTER * max(len(arm_name(arm)) for arm in arms),
    )
    ends = []
    for arm in arms:
        lines = [_points(row, key) for row in rows if row["arm"] == arm]
        for xs, ys in lines:
            plot.line(*thinned(xs, ys), f"thin {arm_color(arm, arms)}")
        xs, ys = _mean_line(lines)
        ends.append((arm_name(arm), ys[-1], arm_color(arm, arms), xs, ys))
    for _, _, color, xs, ys in ends:  # means above all seeds
        plot.line(*thinned(xs, ys), f"bold {color}")
    plot.end_labels([end[:3] for end in ends])
    return plot.render()


def _points(row: Row, key: str) -> tuple[list[float], list[float]]:
    pairs = [(x, y) for x, y in zip(row["step"], row.get(key) or (), strict=False) if finite(y)]
    return [x for x, _ in pairs], [y for _, y in pairs]


def _mean_line(lines: list[tuple[list[float], list[float]]]) -> tuple[list[float], list[float]]:
    """The mean over seeds at every step that all of them reached."""
    start, stop = max(xs[0] for xs, _ in lines), min(xs[-1] for xs, _ in lines)
    grid = sorted({x for xs, _ in lines for x in xs if start <= x <= stop}) or [start]
    return grid, np.mean([np.interp(grid, xs, ys) for xs, ys in lines], axis=0).tolist()


def training_loss(run: Run, width: int, height: int) -> str:
    """Loss of a run: training raw and smoothed, validation as dots on a line."""
    steps, losses = run.curve("loss")
    valid_steps, valid = run.curve("loss", "valid")
    every = steps + valid_steps
    references = _references(run)
    values = losses + valid + [value for _, value in references]
    plot = Plot(
        "Loss against training step",
        padded(every, 0.0) if min(every) == max(every) else (min(every), max(every)),
        padded(values),
        width=width,
        height=height,
        x_title="training step",
        y_title="loss (nats per predicted token)" if run.kind.endswith("language") else "loss",
        right=112,
    )
    for words, value in references:
        plot.line((min(every), max(every)), (value, value), "reference")
        plot.label_at(width - 118, plot.y(value) - 6, words, "tick end")
    ends = []
    if losses:
        smooth = smoothed(losses)
        plot.line(*thinned(steps, losses), "raw c6")
        plot.line(*thinned(steps, smooth), "bold c6")
        ends.append((f"train {smooth[-1]:.2f}", smooth[-1], "c6"))
    if valid:
        plot.line(valid_steps, valid, "bold c0")
        for step, value in zip(*thinned(valid_steps, valid), strict=True):
            plot.dot(step, value, "mean c0", f"step {step:,}: valid {value:.4f}", radius=3.4)
        ends.append((f"valid {valid[-1]:.2f}", valid[-1], "c0"))
    plot.end_labels(ends)
    return plot.render()


def _references(run: Run) -> list[tuple[str, float]]:
    value = run.values.get("facts", {}).get("unigram_entropy")
    return [("word frequencies alone", value)] if finite(value) and value > 0 else []


def small_curve(title: str, curves: dict[str, tuple[list[float], list[float]]]) -> str:
    """A small panel of one quantity over the steps; `curves` maps a colour class to a line."""
    xs = [x for line in curves.values() for x in line[0]]
    ys = [y for line in curves.values() for y in line[1]]
    span = (min(xs), max(xs)) if min(xs) < max(xs) else padded(xs)
    plot = Plot(title, span, padded(ys), width=380, height=230, x_title="step", y_title=title)
    for color, (steps, values) in curves.items():
        plot.line(*thinned(steps, values), f"normal {color}")
    return plot.render()


def embedding_map(
    points: Sequence[Sequence[float]], labels: Sequence[str], texts: Sequence[str], title: str
) -> str:
    """Points coloured and shaped by their label; the text shows when the mouse rests on one."""
    kinds = sorted(set(labels))
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    half = max(max(xs) - min(xs), max(ys) - min(ys), 1e-9) / 2  # one scale for both axes
    middle_x, middle_y = (min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2
    plot = Plot.framed(
        title, (middle_x - half, middle_x + half), (middle_y - half, middle_y + half), 440
    )
    for point, label, words in zip(points, labels, texts, strict=True):
        number = kinds.index(label)
        tip = f"{label}: {words[:160]}" if words else label
        plot.dot(
            point[0], point[1], label_color(number), tip, radius=3.6, shape=label_shape(number)
        )
    return plot.render()


def alignment_by_layer(scores: dict[str, list[Row]], width: int, height: int) -> str:
    """Mean reciprocal rank of translations, both ways together, against the layer.

    Bold lines are of vectors without the mean of their language, thin ones as they are. What has a
    single layer is a level.
    """
    lines = {
        (name, prefix): [(s[f"{prefix}mrr"] + s[f"{prefix}mrr_back"]) / 2 for s in layers]
        for name, layers in scores.items()
        for prefix in ("centred_", "")
    }
    top = max(1, *(len(values) - 1 for values in lines.values()))
    names = {
        (name, prefix): arm_name(name) + (", centred" if prefix and len(values) > 1 else "")
        for (name, prefix), values in lines.items()
    }
    plot = Plot(
        "Mean reciprocal rank of translations against layer",
        (0, top),
        padded([0.0, *(value for values in lines.values() for value in values)]),
        width=width,
        height=height,
        x_ticks=range(top + 1),
        x_title="layer (0: the embedding)",
        y_title="mean reciprocal rank of the translation",
        right=18 + CHARACTER * max(map(len, names.values())),
    )
    ends = []
    for (name, prefix), values in lines.items():
        color = label_color(list(scores).index(name))
        if len(values) == 1:
            if prefix:
                continue
            values = values * (top + 1)
        weight = "bold" if prefix else "normal"
        plot.line(range(len(values)), values, f"{weight} {color}")
        for layer, value in enumerate(values):
            tip = f"{names[name, prefix]}, layer {layer}: {value:.3f}"
            plot.dot(layer, value, f"mean {color}", tip, radius=3.4)
        ends.append((names[name, prefix], values[-1], color))
    plot.end_labels(ends)
    return plot.render()


def score_histogram(name: str, found: Row, width: int, height: int) -> str:
    """Shares of normal items and of anomalies by score, and the threshold as a line."""
    edges, threshold, log = found["edges"], found["threshold"], bool(found.get("log"))
    shares = [np.array(found[part]) / max(1, sum(found[part])) for part in ("normal", "abnormal")]
    top = max(float(max(part.max() for part in shares)), 1e-9)
    plot = Plot(
        f"Histogram of {name}",
        (edges[0], edges[-1]),
        (0.0, 1.08 * top),
        width=width,
        height=height,
        log_x=log,
        x_ticks=log_ticks(edges[0], edges[-1]) if log else None,
        x_title=f"{name}{' (log scale)' if log else ''}",
        y_title="share of the items",
    )
    xs = np.repeat(edges, 2)[1:-1].tolist()  # every bin from its left to its right edge
    for place, part in enumerate(shares):
        ys = np.repeat(part, 2).tolist()
        plot.band(xs, [0.0] * len(xs), ys, f"full {label_color(place)}")
        plot.line(xs, ys, f"normal {label_color(place)}")
    at = plot.x(threshold)
    plot.line((threshold, threshold), (0.0, 1.08 * top), "reference")
    side, shift = ("end", -7) if at > width / 2 else ("", 7)
    plot.label_at(at + shift, plot.y(1.08 * top) + 10, "threshold", f"tick {side}".strip())
    return plot.render()


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten in [low, high], with 2 and 5 times them where there are few.

    >>> log_ticks(0.5, 200), log_ticks(1, 10)
    ([1.0, 10.0, 100.0], [1.0, 2.0, 5.0, 10.0])
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [float(f"{lead}e{power}") for power in powers for lead in (1, 2, 5)]
    found = [value for value in found if low <= value <= high]
    tens = [value for value in found if math.log10(value) % 1 == 0]
    return tens if len(tens) > 2 else found


def losses_of_runs(runs: Sequence[Run], width: int, height: int) -> str:
    """Smoothed training losses of several runs; validation losses as dots."""
    lines = [(run, run.curve("loss"), run.curve("loss", "valid")) for run in runs]
    lines = [line for line in lines if line[1][0] or line[2][0]]
    steps = [x for _, train, valid in lines for x in train[0] + valid[0]]
    smooth = {id(run): smoothed(train[1]) for run, train, _ in lines}
    values = [y for run, _, valid in lines for y in smooth[id(run)] + valid[1]]
    longest = max(len(run.name) for run, _, _ in lines)
    plot = Plot(
        "Losses of the runs",
        (min(steps), max(steps)) if min(steps) < max(steps) else padded(steps),
        padded(values),
        width=width,
        height=height,
        x_title="training step",
        y_title="loss",
        right=18 + CHARACTER * min(longest, 24),
    )
    ends = []
    for number, (run, train, valid) in enumerate(lines):
        color = label_color(number)
        if train[0]:
            plot.line(*thinned(train[0], smooth[id(run)]), f"bold {color}")
        for step, value in zip(*thinned(*valid), strict=True):
            tip = f"{run.name}, step {compact(step)}: valid {value:.4f}"
            plot.dot(step, value, f"mean {color}", tip, shape=number)
        ends.append((run.name[:24], (valid[1] or smooth[id(run)])[-1], color))
    plot.end_labels(ends)
    return plot.render()
