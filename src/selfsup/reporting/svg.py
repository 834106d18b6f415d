"""The few pieces of SVG that figures are made of: scales, ticks and one plot.

Nothing here has a colour. An element carries two classes: what it is (`line`, `dot`, `band`) and
whose it is (`c0`, `k3`); the style sheet gives both a colour in light and in dark.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from selfsup.reporting.markup import compact, text

CHARACTER = 6.9  # width of an average character of a 12.5-pixel label, in pixels
LABEL_STEP = 16  # least distance between two labels at line ends, in pixels


@dataclass(frozen=True)
class Scale:
    """Maps values in [low, high] to pixels in [start, stop]; values outside stick to the edge."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        share = min(1.0, max(0.0, (value - low) / (high - low)))
        return self.start + share * (self.stop - self.start)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers inside [low, high], about `count` of them.

    >>> ticks(0, 1), ticks(3, 97, 4)
    ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [25.0, 50.0, 75.0])
    """
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = min((m * power for m in (1, 2, 2.5, 5, 10)), key=lambda s: abs(math.log(s / rough)))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


def padded(values: Sequence[float], share: float = 0.06) -> tuple[float, float]:
    """The range of the values and some room around it; never empty."""
    low, high = min(values), max(values)
    room = (high - low) * share or abs(high) * share or 1.0
    return low - room, high + room


def spread(
    places: Sequence[float], low: float, high: float, step: float = LABEL_STEP
) -> list[float]:
    """Moves label positions apart to at least `step`, in their order, inside [low, high]."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    out = list(places)
    for before, here in pairwise(order):
        out[here] = max(out[here], out[before] + step)
    limit = high
    for here in reversed(order):
        out[here] = max(low, min(out[here], limit))
        limit = out[here] - step
    return out


def marker(x: float, y: float, r: float, shape: int, classes: str, tip: str = "") -> str:
    """A circle, square, diamond or triangle around a pixel, with a tooltip."""
    outlines = (
        f"M{_px(x - r)} {_px(y)}a{_px(r)} {_px(r)} 0 1 0 {_px(2 * r)} 0"
        f"a{_px(r)} {_px(r)} 0 1 0 {_px(-2 * r)} 0Z",
        f"M{_px(x - r)} {_px(y - r)}h{_px(2 * r)}v{_px(2 * r)}h{_px(-2 * r)}Z",
        f"M{_px(x)} {_px(y - 1.3 * r)}l{_px(1.3 * r)} {_px(1.3 * r)}"
        f"l{_px(-1.3 * r)} {_px(1.3 * r)}l{_px(-1.3 * r)} {_px(-1.3 * r)}Z",
        f"M{_px(x)} {_px(y - 1.2 * r)}l{_px(1.2 * r)} {_px(2.2 * r)}h{_px(-2.4 * r)}Z",
    )
    tooltip = f"<title>{text(tip)}</title>" if tip else ""
    return f'<path class="{classes}" d="{outlines[shape % 4]}">{tooltip}</path>'


class Plot:
    """One pair of axes that is drawn on, then rendered.

    Args:
        label: what the figure shows, for screen readers.
        x, y: (low, high) of the data.
        width, height: pixels of the view box.
        x_title, y_title: names of the axes; the y title stands above the axis, unrotated.
        right: room for labels at the right.
        log_x: logarithmic horizontal axis.
        x_ticks: values to mark; None chooses round ones.
    """

    def __init__(
        self,
        label: str,
        x: tuple[float, float],
        y: tuple[float, float],
        *,
        width: int = 460,
        height: int = 300,
        x_title: str = "",
        y_title: str = "",
        right: float = 16,
        log_x: bool = False,
        x_ticks: Sequence[float] | None = None,
    ):
        self.label, self.width, self.height, self.right = label, width, height, right
        self.bottom = height - 44
        y_ticks = ticks(*y, count=max(3, height // 70))
        self.left = 14 + CHARACTER * max((len(compact(v)) for v in y_ticks), default=1)
        self.x = Scale(*x, self.left, width - right, log_x)
        self.y = Scale(*y, self.bottom, 34)
        self.parts: list[str] = []
        self._axes(ticks(*x, count=max(3, width // 180)) if x_ticks is None else x_ticks, y_ticks)
        self.label_at(width - right, height - 6, x_title, "title end")
        self.label_at(0, 15, y_title, "title")

    def _axes(self, x_ticks: Sequence[float], y_ticks: Sequence[float]) -> None:
        edge = _px(self.width - self.right)
        for value in y_ticks:
            at = self.y(value)
            self._add("path", "grid", d=f"M{_px(self.left)} {_px(at)}H{edge}")
            self.label_at(self.left - 8, at + 4, compact(value), "tick end")
        free = -math.inf  # where the last label ended; one that would touch it is left out
        for value in x_ticks:
            at, words = self.x(value), compact(value)
            self._add("path", "axis", d=f"M{_px(at)} {self.bottom}v5")
            if at - CHARACTER * len(words) / 2 > free + 5:
                self.label_at(at, self.bottom + 20, words, "tick mid")
                free = at + CHARACTER * len(words) / 2
        self._add("path", "axis", d=f"M{_px(self.left)} {self.bottom}H{edge}")

    @classmethod
    def framed(
        cls, label: str, x: tuple[float, float], y: tuple[float, float], size: int
    ) -> "Plot":
        """A square frame without ticks, for coordinates that have no unit."""
        plot = cls(label, x, y, width=size, height=size)
        plot.x, plot.y = Scale(*x, 10, size - 10), Scale(*y, size - 10, 10)
        plot.parts = []
        side = str(size - 2)
        plot._add("rect", "frame", x="1", y="1", width=side, height=side, rx="8")
        return plot

    @classmethod
    def of_rows(
        cls, label: str, names: Sequence[str], x: tuple[float, float], width: int, x_title: str
    ) -> "Plot":
        """A row for each name, the first on top; its vertical place is its number, from 0."""
        height = 30 * len(names) + 52
        plot = cls(label, x, (0, 1), width=width, height=height, x_title=x_title, right=20)
        plot.parts.clear()
        plot.left = 14 + CHARACTER * max(map(len, names))
        plot.x = Scale(*x, plot.left, width - plot.right)
        plot.y = Scale(-0.5, len(names) - 0.5, 4, plot.bottom)
        plot._axes(ticks(*x, count=max(3, width // 120)), ())
        for place, name in enumerate(names):
            at = plot.y(place)
            plot._add("path", "grid", d=f"M{_px(plot.left)} {_px(at)}H{_px(width - plot.right)}")
            plot.label_at(plot.left - 8, at + 4, name, "tick end")
        plot.label_at(width - plot.right, height - 6, x_title, "title end")
        return plot

    def _add(self, tag: str, classes: str, content: str = "", **attributes: str) -> None:
        values = "".join(f' {name}="{value}"' for name, value in attributes.items())
        self.parts.append(f'<{tag} class="{classes}"{values}>{content}</{tag}>')

    def label_at(self, x: float, y: float, words: str, classes: str) -> None:
        """Text at a pixel."""
        if words:
            self._add("text", classes, text(words), x=_px(x), y=_px(y))

    def line(self, xs: Sequence[float], ys: Sequence[float], classes: str) -> None:
        """A line through points."""
        points = zip(xs, ys, strict=True)
        path = "L".join(f"{_px(self.x(x))} {_px(self.y(y))}" for x, y in points)
        self._add("path", f"line {classes}", d=f"M{path}")

    def band(
        self, xs: Sequence[float], lows: Sequence[float], highs: Sequence[float], classes: str
    ) -> None:
        """The area between two lines."""
        edge = [*zip(xs, highs, strict=True), *zip(xs[::-1], lows[::-1], strict=True)]
        path = "L".join(f"{_px(self.x(x))} {_px(self.y(y))}" for x, y in edge)
        self._add("path", f"band {classes}", d=f"M{path}Z")

    def bar(self, x: float, low: float, high: float, classes: str, shift: float = 0) -> None:
        """A vertical error bar, moved sideways by `shift` pixels."""
        at, bottom, top = self.x(x) + shift, self.y(low), self.y(high)
        caps = f"M{_px(at - 4)} {_px(top)}h8M{_px(at - 4)} {_px(bottom)}h8"
        self._add("path", f"bar {classes}", d=f"M{_px(at)} {_px(bottom)}V{_px(top)}{caps}")

    def dot(
        self,
        x: float,
        y: float,
        classes: str,
        tip: str = "",
        *,
        radius: float = 4,
        shift: float = 0,
        shape: int = 0,
    ) -> None:
        """A point: circle, square, diamond or triangle; `tip` shows when the mouse rests on it."""
        self.parts.append(
            marker(self.x(x) + shift, self.y(y), radius, shape, f"dot {classes}", tip)
        )

    def end_labels(self, labels: Sequence[tuple[str, float, str]]) -> None:
        """(words, value, class) at the right edge, moved apart where they would overlap."""
        places = spread([self.y(value) for _, value, _ in labels], 34, self.bottom - 4)
        for (words, _, classes), at in zip(labels, places, strict=True):
            self.label_at(self.width - self.right + 9, at + 4, words, f"name {classes}")

    def render(self) -> str:
        """The figure as an inline `<svg>` element."""
        return (
            f'<svg viewBox="0 0 {self.width} {self.height}" role="img" '
            f'aria-label="{text(self.label)}">{"".join(self.parts)}</svg>'
        )


def _px(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
