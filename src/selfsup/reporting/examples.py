"""What people look at: pictures, spectrograms, players and series of pictures.json, in panels."""

from itertools import groupby
from typing import Any

from selfsup.reporting import charts
from selfsup.reporting.markup import section, text
from selfsup.reporting.runs import Row, Run, finite
from selfsup.reporting.svg import Plot, padded

# Nothing is fetched from elsewhere: what a file says is shown only if it is one of these.
PNG, WAV = "data:image/png;base64,", "data:audio/wav;base64,"
# Cells that need more room than half a page, and how their rows are laid out.
BROAD = {"series": "windows", "wav": "players", "spectrogram": "spectrograms"}


def examples(run: Run, anchor: str) -> str:
    """Panels of cells, row by row; `evaluation/gallery.py` says what a cell may hold."""
    if not run.pictures:
        return ""
    panels = "".join(_panel(panel) for panel in run.pictures)
    return section(anchor, "Held-out examples", "", f'<div class="grid pair">{panels}</div>')


def _panel(panel: Row) -> str:
    rows = [[_parts(cell) for cell in row] for row in panel["rows"]]
    kinds = {kind for row in rows for cell in row for kind in cell}
    layout = next((f" {layout}" for kind, layout in BROAD.items() if kind in kinds), "")
    broad = ' class="broad"' if layout else ""
    columns = panel.get("columns") or []
    head = "".join(f"<div>{text(name)}</div>" for name in columns)
    head = f'<div class="strip heads{layout}">{head}</div>' if head else ""
    body = "".join(
        f'<div class="strip{layout}">{"".join(f"<div>{_cell(cell)}</div>" for cell in row)}</div>'
        for row in rows
    )
    lead = f'<p class="note">{text(panel.get("lead", ""))}</p>'
    return f"<figure{broad}><h3>{text(panel['title'])}</h3>{lead}{head}{body}</figure>"


def _parts(cell: Any) -> Row:
    """What a cell holds by kind; the first reports had pictures only, as bare addresses."""
    return cell if isinstance(cell, dict) else {"png": cell}


def _cell(cell: Row) -> str:
    parts = ""
    for kind, words in (("png", ""), ("spectrogram", "spectrogram")):
        if str(cell.get(kind, "")).startswith(PNG):
            parts += f'<img class="{kind}" alt="{words}" src="{text(cell[kind])}">'
    if str(cell.get("wav", "")).startswith(WAV):
        parts += f'<audio controls preload="metadata" src="{text(cell["wav"])}"></audio>'
    if "series" in cell:
        parts += series_window(cell["series"])
    return parts


def series_window(found: Row) -> str:
    """One channel of a window: the true line, what was hidden shaded, what the model says."""
    true, said = _stretches(found["true"]), _stretches(found["model"])
    values = [y for _, ys in true + said for y in ys]
    low, high = padded(values or [0.0])
    name, last = str(found.get("name") or "value"), max(len(found["true"]) - 1, 1)
    plot = Plot(
        *(f"A window of {name}", (0, last), (low, high)),
        width=400,
        height=220,
        x_title="time step",
        y_title=name,
    )
    for first, stop in found["hidden"]:
        plot.band((first - 0.5, stop - 0.5), (low, low), (high, high), "c0")
    for stretches, classes in ((true, "normal c6"), (said, "bold c0")):
        for xs, ys in stretches:
            plot.line(*charts.thinned(xs, ys), classes)
    return plot.render()


def _stretches(values: list[float | None]) -> list[tuple[list[float], list[float]]]:
    """Places and values of every stretch without gaps; a single value becomes a short line."""
    out: list[tuple[list[float], list[float]]] = []
    for known, pairs in groupby(enumerate(values), key=lambda pair: finite(pair[1])):
        xs, ys = zip(*pairs, strict=True)
        if known:
            single = len(xs) == 1
            out.append(([xs[0] - 0.3, xs[0] + 0.3], [*ys, *ys]) if single else ([*xs], [*ys]))
    return out
