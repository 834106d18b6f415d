"""The sections of the page, in reading order: each turns one part of a run into HTML."""

from statistics import median
from typing import Any

from selfsup.reporting import charts
from selfsup.reporting.evidence import (
    LOWER_IS_BETTER,
    arm_name,
    arm_order,
    difference,
    interval,
    lower_is_better,
    signed,
    verdict,
)
from selfsup.reporting.markup import flattened, number, pairs, records, rounded, section, text
from selfsup.reporting.runs import Compare, Row, Run, finite
from selfsup.reporting.svg import marker

SHOWN_ELSEWHERE = ("environment", "facts", "command")
MAX_SAMPLES = 12

PROBES = {
    "knn": "accuracy of the nearest neighbours",
    "linear": "accuracy of a linear map",
    "mix": "accuracy of a linear map on a learned weighted sum of all layers",
    "few": "accuracy of a linear map with few labels of each class and group",
    "eer": "error rate of telling groups apart (lower is better)",
    "mse": "mean squared error (lower is better)",
    "mae": "mean absolute error (lower is better)",
}


def evidence(compare: Compare, anchor: str, title: str) -> str:
    """Score against labels, the same numbers as a table, and how they were measured."""
    figure = charts.both_widths(lambda w, h: charts.score_by_labels(compare, w, h))
    better = "Lower is better. " if lower_is_better(compare) else ""
    lead = (
        f"{better}Lines join the means; small dots are single seeds; bars and bands are 95% "
        "t-intervals over the seeds. Every arm sees the same labels."
    )
    counts = compare.label_counts if len(compare.label_counts) > 1 else []
    conclusions = "".join(
        f"<li>{text(verdict(compare, count).conclusion)}</li>" for count in counts
    )
    drawn = ("arms", "tunings", "curves", "label_counts", "metric", "command", "verdict")
    rest = {key: value for key, value in compare.raw.items() if key not in drawn}
    how = _details("How this was measured", rest)
    body = (
        f'<figure>{figure}</figure>{_score_table(compare)}<ul class="plain">{conclusions}</ul>{how}'
    )
    return section(anchor, title, lead, body)


def _details(title: str, values: Row) -> str:
    """Keys and values; lists of records become tables below them."""
    tables = {
        key: value
        for key, value in values.items()
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value)
    }
    listed = pairs({key: value for key, value in values.items() if key not in tables})
    listed += "".join(f"<h3>{text(key)}</h3>{records(value)}" for key, value in tables.items())
    return f"<details><summary>{text(title)}</summary>{listed}</details>"


def _score_table(compare: Compare) -> str:
    arms = arm_order(compare)
    paired = {"pretrained", "scratch"} <= set(arms)
    head = "".join(
        f'<th class="{charts.arm_color(arm, arms)}"><i></i>{text(arm_name(arm))}</th>'
        for arm in arms
    )
    head += "<th>pre-trained − scratch</th>" if paired else ""
    rows = []
    for count in compare.label_counts:
        winner = verdict(compare, count).winner
        cells = ""
        for arm in arms:
            values = compare.scores[arm].get(count)
            bold = ' class="best"' if arm == winner else ""
            cells += f"<td{bold}>{_estimate(*interval(values)) if values else '–'}</td>"
        if paired:
            both = [compare.scores[arm].get(count) for arm in ("pretrained", "scratch")]
            gap = difference(both[0], both[1]) if both[0] and both[1] else None
            cells += f"<td>{_estimate(*gap, sign=True) if gap else '–'}</td>"
        seeds = max(len(compare.scores[arm].get(count, ())) for arm in arms)
        rows.append(f'<tr><th scope="row">{count:,}</th>{cells}<td>{seeds}</td></tr>')
    note = f"{text(compare.metric)}: mean ± half of the 95% interval; the best mean is bold."
    return (
        f'<p class="note">{note}</p><div class="scroll"><table><thead><tr><th>labels</th>{head}'
        f"<th>seeds</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _estimate(mean: float, half: float | None, sign: bool = False) -> str:
    shown = signed(mean, 3) if sign else f"{mean:.3f}"
    return shown if half is None else f"{shown} <small>± {half:.3f}</small>"


def finetuning(compare: Compare, anchor: str) -> str:
    """Loss (and score) while fine-tuning: two families of lines."""
    grids = [
        _grid(panels, "pair")
        for panels in (charts.finetuning_curves(compare, key) for key in ("loss", "score"))
        if panels
    ]
    if not grids:
        return ""
    lead = (
        "The same network and the same labels; only the start differs. Bold: the mean over seeds. "
        "Thin: every seed."
    )
    return section(anchor, "Fine-tuning, from two starts", lead, "".join(grids))


def _grid(panels: list[str], classes: str) -> str:
    figures = "".join(f"<figure>{panel}</figure>" for panel in panels)
    return f'<div class="grid {classes}">{figures}</div>'


def training(run: Run, anchor: str) -> str:
    """Loss over the steps, then the learning rate and whatever else was logged."""
    steps = [x for split in ("train", "valid") for x in run.curve("loss", split)[0]]
    if not steps:
        return ""
    figure = charts.both_widths(lambda w, h: charts.training_loss(run, w, h))
    body = f"<figure>{figure}</figure>" + _grid(_small_panels(run), "small")
    title = "Fine-tuning" if "task" in run.values else "Pre-training"
    lead = "Thin: the training loss as logged. Bold: the same, smoothed. Dots: held out."
    return section(anchor, title, lead, body)


def _small_panels(run: Run) -> list[str]:
    logged = dict.fromkeys(key for row in run.metrics for key, v in row.items() if finite(v))
    keys = [key for key in logged if key not in ("step", "loss", "lr", "tokens")]
    panels = []
    for key in (["lr"] if "lr" in logged else []) + keys:
        curves = {"c6": run.curve(key), "c0": run.curve(key, "valid")}
        curves = {color: line for color, line in curves.items() if line[0]}
        moves = len({value for _, values in curves.values() for value in values}) > 1
        if moves or key == "lr":
            name = "learning rate" if key == "lr" else key.replace("_", " ")
            panels.append(charts.small_curve(name, curves))
    return panels


def speed(run: Run, anchor: str) -> str:
    """Throughput over the steps."""
    kind = run.values.get("data", {}).get("name", "text")
    unit = {"text": "tokens", "audio": "frames"}.get(kind, "examples")
    panels = []
    for key, name in (
        ("tokens_per_second", f"{unit} per second"),
        ("data_wait", "share of time spent waiting for data"),
    ):
        rows = [row for row in run.speed if finite(row.get(key))]
        if rows:
            line = ([row["step"] for row in rows], [row[key] for row in rows])
            panels.append(charts.small_curve(name, {"c6": line}))
    if not panels:
        return ""
    rates = [r["tokens_per_second"] for r in run.speed if finite(r.get("tokens_per_second"))]
    lead = f"Median: {rounded(median(rates))} {unit} per second." if rates else ""
    return section(anchor, "Speed", lead, _grid(panels, "small"))


def embeddings(run: Run, anchor: str) -> str:
    """A map of vectors, beside the same map before training where there is one."""
    found = run.embeddings
    if not found or not found["points"]:
        return ""
    labels = [str(label) for label in found["labels"]]
    words = [str(t) for t in found.get("texts") or [""] * len(labels)]
    maps = [("untrained_points", "before training"), ("points", "after training")]
    maps = [(key, name) for key, name in maps if found.get(key)]
    shown = min(len(labels), charts.MAX_MAP_POINTS)
    panels = []
    for key, name in maps:
        points = found[key][:shown]
        drawn = charts.embedding_map(points, labels[:shown], words[:shown], f"Map {name}")
        caption = f"<figcaption>{name}</figcaption>" if len(maps) > 1 else ""
        panels.append(drawn + caption)
    kinds = sorted(set(labels[:shown]))
    legend = "".join(
        f'<li class="{charts.label_color(place)}"><svg viewBox="0 0 12 12" aria-hidden="true">'
        f"{marker(6, 6, 4, charts.label_shape(place), 'dot')}</svg>{text(kind)} "
        f"<small>{labels[:shown].count(kind):,}</small></li>"
        for place, kind in enumerate(kinds)
    )
    part = f" The first {shown:,} of {len(labels):,} points." if shown < len(labels) else ""
    lead = (
        f"One dot is one item, placed by {text(found.get('projection', 'a projection'))} of its "
        f"vector; labels only colour it. Rest the mouse on a dot to see which.{part}"
    )
    body = f'<ul class="legend">{legend}</ul>{_grid(panels, "pair")}'
    return section(anchor, str(found.get("title") or "Map of embeddings"), lead, body)


def fills(run: Run, anchor: str) -> str:
    """Sentences with blanks, the best guesses for each as bars."""
    if not run.fills:
        return ""
    cards = []
    for fill in run.fills:
        pieces = str(fill["text"]).split("[MASK]")
        sentence = text(pieces[0])
        for place, piece in enumerate(pieces[1:]):
            guesses = fill["blanks"][place] if place < len(fill["blanks"]) else []
            sentence += f"<mark>{text(guesses[0][0] if guesses else '[MASK]')}</mark>{text(piece)}"
        bars = "".join(_guesses(guesses) for guesses in fill["blanks"])
        cards.append(f'<div class="card"><p>{sentence}</p><div class="blanks">{bars}</div></div>')
    lead = "The marked word is the model's first choice; the bars are its five best."
    body = f'<div class="cards">{"".join(cards)}</div>'
    return section(anchor, "Filled blanks", lead, body)


def _guesses(guesses: list[list[Any]]) -> str:
    rows = "".join(
        f'<li><span>{text(word)}</span><b><i style="width:{100 * chance:.1f}%"></i></b>'
        f"<span>{f'{100 * chance:.0f}' if chance >= 0.005 else '&lt;1'}%</span></li>"
        for word, chance in guesses
    )
    return f'<ol class="bars">{rows}</ol>'


def samples(run: Run, anchor: str) -> str:
    """What a generating model wrote."""
    if not run.samples:
        return ""
    blocks = [
        f"<blockquote><b>{text(sample['prompt'])}</b>{text(sample['text'])}</blockquote>"
        for sample in run.samples
    ]
    more = blocks[MAX_SAMPLES:]
    body = "".join(blocks[:MAX_SAMPLES])
    if more:
        body += f"<details><summary>{len(more)} more</summary>{''.join(more)}</details>"
    return section(anchor, "What it writes", "Bold: the prompt. The rest is the model's.", body)


def probe(run: Run, anchor: str) -> str:
    """What frozen features say about labels, beside an untrained network and the raw input."""
    if not run.probe:
        return ""
    scores = run.probe["scores"]
    kinds = list(dict.fromkeys(kind for found in scores.values() for kind in found))
    best = {
        k: (min if k in LOWER_IS_BETTER else max)(f[k] for f in scores.values() if k in f)
        for k in kinds
    }
    rows = ""
    for name, found in scores.items():
        cells = ""
        for kind in kinds:
            value = found.get(kind)
            bold = ' class="best"' if value == best[kind] else ""
            cells += f"<td{bold}>{'–' if value is None else f'{value:.3f}'}</td>"
        rows += f'<tr><th scope="row">{text(arm_name(name))}</th>{cells}</tr>'
    head = "".join(f"<th>{text(kind)}</th>" for kind in kinds)
    size = run.probe.get("test_size", 0)
    known = [f"<b>{text(kind)}</b>: {PROBES[kind]}" for kind in kinds if kind in PROBES]
    lead = f"Frozen vectors, and simple models on them, scored on {size:,} test examples. "
    if "horizon" in run.probe:
        lead = (
            f"Forecasts of {run.probe['horizon']} rows by a linear map, over all {size:,} test "
            "windows, on the standardised scale. "
        )
    lead += "; ".join(known) + "."
    table = (
        '<div class="scroll"><table><thead><tr><th>features</th>'
        f"{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )
    return section(anchor, "Frozen features", lead, table)


def alignment(run: Run, anchor: str) -> str:
    """How near translations lie to each other, layer by layer."""
    if not run.alignment:
        return ""
    found = run.alignment
    first, second = map(str, found["languages"])
    drawn = charts.both_widths(lambda w, h: charts.alignment_by_layer(found["scores"], w, h))
    table = records(
        [
            {
                "vectors": arm_name(name),
                "layer": layer if len(layers) > 1 else "–",
                f"MRR {first} to {second}": f"{scores['mrr']:.3f}",
                f"{second} to {first}": f"{scores['mrr_back']:.3f}",
                f"centred, {first} to {second}": f"{scores['centred_mrr']:.3f}",
                f"centred, {second} to {first}": f"{scores['centred_mrr_back']:.3f}",
            }
            for name, layers in found["scores"].items()
            for layer, scores in enumerate(layers)
        ]
    )
    lead = (
        f"Each of {found['pairs']:,} texts looks for its translation among all others by the "
        "cosine of their mean vectors: the mean of 1 / rank (MRR), both ways; by chance "
        f"{found['chance']:.3f}. Centred: without the mean of each language (Libovický et al. "
        "2019). The line of one level counts only the tokens that both languages share."
    )
    return section(anchor, "Two languages", lead, f"<figure>{drawn}</figure>{table}")


def anomalies(run: Run, anchor: str) -> str:
    """How far apart normal items and anomalies lie, and detectors side by side."""
    if not run.anomaly:
        return ""
    found, histograms = run.anomaly, run.anomaly["histograms"]
    legend = "".join(
        f'<li class="{charts.label_color(place)}"><svg viewBox="0 0 12 12" aria-hidden="true">'
        f"{marker(6, 6, 4, 1, 'dot')}</svg>{name} items "
        f"<small>{text(number(found.get(key, '')))}</small></li>"
        for place, (name, key) in enumerate((("normal", "normals"), ("unusual", "anomalies")))
    )
    main, *others = histograms
    drawn = charts.both_widths(lambda w, h: charts.score_histogram(main, histograms[main], w, h))
    figure = f'<ul class="legend">{legend}</ul><figure>{drawn}</figure>'
    small = [charts.score_histogram(name, histograms[name], 380, 230) for name in others]
    more = f"<details><summary>The other detectors</summary>{_grid(small, 'small')}</details>"
    lead = (
        "Share of the items of each kind by their score. What lies right of the threshold is "
        "called an anomaly; the threshold was set on held-out items, so that at most 1% of them "
        f"lie beyond it. Labelled items: {text(found.get('data', ''))}."
    )
    body = figure + (more if others else "") + _detector_table(found["scores"])
    return section(anchor, "Normal items and anomalies", lead, body)


def _detector_table(scores: dict[str, dict[str, float]]) -> str:
    """Ranking quality, the best bold; then what lies above the threshold."""
    names = ("auroc", "average_precision", "normals_flagged", "anomalies_caught")
    best = {name: max(found[name] for found in scores.values()) for name in names[:2]}
    rows = ""
    for detector, found in scores.items():
        cells = ""
        for name in names:
            bold = ' class="best"' if found[name] == best.get(name) else ""
            cells += f"<td{bold}>{found[name]:.3f}</td>"
        rows += f'<tr><th scope="row">{text(detector)}</th>{cells}</tr>'
    titles = ("AUROC", "average precision", "normal items flagged", "anomalies caught")
    head = "".join(f"<th>{title}</th>" for title in titles)
    return (
        '<div class="scroll"><table><thead><tr><th>detector</th>'
        f"{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def facts(run: Run, anchor: str) -> str:
    """Counts of the data and the model."""
    found = run.values.get("facts", {})
    if not found:
        return ""
    return section(anchor, "The data", "", pairs(found))


def configuration(run: Run, anchor: str) -> str:
    """Every key of `run.toml` that no other section shows, group by group."""
    loose = {k: v for k, v in run.values.items() if not isinstance(v, dict)}
    groups = {"run": loose} if loose else {}
    groups.update({k: v for k, v in run.values.items() if isinstance(v, dict) and v})
    groups = {name: values for name, values in groups.items() if name not in SHOWN_ELSEWHERE}
    if not groups:
        return ""
    body = "".join(
        f"<details><summary>{text(name)} <small>{text(values.get('name', ''))} "
        f"{len(flattened(values))} keys</small></summary>{pairs(values)}</details>"
        for name, values in groups.items()
    )
    return section(anchor, "Configuration", "Resolved: defaults included.", body)


def environment(run: Run, anchor: str) -> str:
    """Where it ran."""
    found = run.values.get("environment", {})
    return section(anchor, "Environment", "", pairs(found)) if found else ""
