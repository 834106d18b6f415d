"""The report: a page that says who won, holds all it shows, and loads nothing."""

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from selfsup.errors import CheckpointError, ConfigError
from selfsup.reporting import write_figure, write_report
from selfsup.reporting.charts import smoothed
from selfsup.reporting.evidence import difference, interval, t95, verdict
from selfsup.reporting.runs import read_compare, read_run
from selfsup.reporting.svg import spread, ticks

EVIL = "<script>alert('x')</script> & \x00 http://example.org"
TOML = """
[data]
name = "text"
[data.tokenizer]
size = 4096
[method]
name = "masked_language"
[facts]
documents = 20412
unigram_entropy = 6.6
[environment]
python = "3.11.9"
[command]
line = "selfsup pretrain bert-minutes --data tales.txt --out runs/first"
"""
ARMS = {
    "pretrained": {"50": [0.71, 0.72, 0.73], "300": [0.81, 0.82, 0.80]},
    "scratch": {"50": [0.58, 0.59, 0.60], "300": [0.74, 0.75, 0.73]},
    "baseline": {"50": [0.65, 0.66, 0.67], "300": [0.78, 0.77, 0.79]},
}
PNG, WAV = "data:image/png;base64,AAAA", "data:audio/wav;base64,BBBB"
SERIES = {
    "name": EVIL,
    "true": [0.0, 1.0, None, 2.0, 3.0],
    "model": [None, 1.5, None, 2.5],
    "hidden": [[1, 2], [3, 5]],
}
PANELS: list[dict[str, Any]] = [
    {"title": EVIL, "lead": EVIL, "rows": [[{"png": PNG}, {"png": "http://example.org/x.png"}]]},
    {"title": "Of old", "rows": [[PNG, PNG]]},
    {
        "title": "Sounds",
        "columns": ["left", EVIL],
        "rows": [
            [{"spectrogram": PNG, "wav": WAV}, {"wav": "http://example.org/x.wav"}],
            [{"spectrogram": f'{PNG}" onload="{EVIL}'}, {"spectrogram": "javascript:0"}],
        ],
    },
    {"title": "Series", "rows": [[{"series": SERIES}]]},
]


def anomaly(**main) -> dict[str, Any]:
    """Detectors of anomalies: one on a logarithmic scale, one on a linear one."""
    histogram = {
        "edges": [0.01, 0.1, 1.0, 10.0],
        "normal": [6, 2, 0],
        "abnormal": [0, 1, 3],
        "threshold": 0.5,
        "log": True,
    }
    linear = histogram | {"edges": [0.0, 1.0, 2.0, 3.0], "threshold": 2.5, "log": False}
    scores = {"average_precision": 0.75, "normals_flagged": 0.125, "anomalies_caught": 0.5}
    return {
        "scores": {"error": {"auroc": 0.987, **scores}, EVIL: {"auroc": 0.5, **scores}},
        "histograms": {"error": histogram | main, EVIL: linear},
        "data": EVIL,
        "normals": 8,
        "anomalies": 4,
    }


def write_compare(folder: Path, arms=ARMS, **more) -> Path:
    curves = [
        {"arm": arm, "labels": count, "seed": seed, "step": [0, 10, 20], "loss": [1.1, 0.6, end]}
        for arm, end in (("pretrained", 0.2), ("scratch", 0.5))
        for count in (50, 300)
        for seed in (0, 1)
    ]
    values = {"task": "classification", "metric": "accuracy", "unit": "sentences", "arms": arms}
    values |= {"curves": curves, "seeds": [0, 1, 2], "sweep": [{"arm": "scratch", "lr": 0.001}]}
    path = folder / "compare.json"
    path.write_text(json.dumps(values | more))
    return path


def write_run(folder: Path, full: bool = True) -> Path:
    folder.mkdir(parents=True)
    (folder / "run.toml").write_text(TOML)
    if not full:
        return folder
    rows = [{"step": s, "split": "train", "loss": 9 - s / 20, "lr": 1e-3 * s} for s in range(90)]
    rows += [{"step": s, "split": "valid", "loss": 9.1 - s / 20} for s in (30, 60, 89)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    speed = [{"step": s, "seconds": s, "tokens_per_second": 4e4 + s} for s in range(5)]
    (folder / "speed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in speed))
    write_compare(folder)
    fills = [{"text": f"{EVIL} [MASK]", "blanks": [[["<b>", 0.5], ["cat", 0.2]]]}]
    (folder / "fills.json").write_text(json.dumps(fills))
    (folder / "samples.json").write_text(json.dumps([{"prompt": EVIL, "text": EVIL}]))
    points = [[0.0, 1.0], [2.0, 1.5], [1.0, 0.2]]
    embeddings = {"points": points, "untrained_points": points[::-1], "labels": ["A", EVIL, "B"]}
    embeddings |= {"texts": [EVIL, "b", "c"], "projection": "PCA", "title": EVIL}
    (folder / "embeddings.json").write_text(json.dumps(embeddings))
    (folder / "warnings.json").write_text(json.dumps([EVIL]))
    (folder / "pictures.json").write_text(json.dumps(PANELS))
    (folder / "anomaly.json").write_text(json.dumps(anomaly()))
    return folder


@pytest.fixture
def page(tmp_path) -> str:
    run = write_run(tmp_path / "first")
    return write_report([run], tmp_path / "report.html").read_text()


def words(html: str) -> str:
    return re.sub(r"<[^>]+>", "", html)


def test_page_opens_with_the_verdict(page):
    top = words(page[page.index("<h1") : page.index("</h1>")])
    assert top == (
        "With 50 labelled sentences: 0.72 pre-trained, 0.59 from scratch (+0.13), "
        "0.66 classical baseline"
    )
    assert page.index('class="warnings"') < page.index("<h1")


def test_everything_from_files_is_escaped(page):
    assert "<script" not in page
    assert "\x00" not in page
    assert page.count("&lt;script&gt;") >= 6  # blanks, samples, warnings, labels, title, tooltips


def test_page_loads_nothing(page):
    inside = r"#|data:,|data:image/png;base64,|data:audio/wav;base64,"
    assert not re.search(rf"(src|srcset|href)=\"(?!{inside})", page)
    assert not re.search(r"url\(|@import|<(link rel=\"style|script|iframe|object)", page)
    assert "http" not in re.sub(r"http://example\.org|http-equiv", "", page)


def test_examples_stand_in_the_page_itself(page):
    assert "img-src data:; media-src data:" in page
    assert page.count(f'<img class="png" alt="" src="{PNG}">') == 3
    assert page.count(f'<audio controls preload="metadata" src="{WAV}"></audio>') == 1
    assert len(re.findall("<(?:img|audio)", page)) == 6
    assert '" onload' not in page
    assert "example.org/x" not in page
    assert "javascript" not in page
    assert '<div class="strip heads players"><div>left</div>' in page


def test_series_show_what_was_hidden_and_what_the_model_says(page):
    start = page.index('aria-label="A window of')
    figure = page[start : page.index("</svg>", start)]
    assert figure.count('class="band c0"') == 2
    assert figure.count('class="line normal c6"') == 2  # a missing value parts the line
    assert figure.count('class="line bold c0"') == 2


def test_anomalies_show_a_histogram_and_detectors(page):
    part = page[page.index('<section id="anomalies"') :]
    part = part[: part.index("</section>")]
    figures = re.findall(r"<svg viewBox=.{1,40}role=.*?</svg>", part, flags=re.S)
    assert len(figures) == 3  # the first for two widths, and the other detector
    for figure in figures:
        assert figure.count("reference") == 1
        assert ">threshold<" in figure
    heights = re.search(r'class="line normal k0" d="M([^"]+)"', figures[0])[1].split("L")
    assert len(heights) == 6  # three bins, the left and the right edge of each
    ys = [float(point.split()[1]) for point in heights]
    base = ys[-1]
    assert (base - ys[0]) / (base - ys[2]) == pytest.approx(3, rel=0.01)  # 6 of 8 against 2 of 8
    assert "(log scale)" in figures[0]
    assert "(log scale)" not in figures[2]
    assert "<td>0.125</td>" in part
    assert '<td class="best">0.987</td>' in part
    assert page.index('id="anomalies"') < page.index('id="training"')


def test_the_best_features_are_marked_where_less_is_better_too(tmp_path):
    folder = write_run(tmp_path / "run")
    scores = {
        "pretrained": {"linear": 0.7, "eer": 0.1},
        "untrained": {"linear": 0.8, "eer": 0.3},
        "raw input": {"linear": 0.6},
    }
    (folder / "probe.json").write_text(json.dumps({"scores": scores, "test_size": 3000}))
    out = tmp_path / "page.html"
    write_report([folder], out)
    part = out.read_text()
    part = part[part.index("Frozen features") :]
    part = part[: part.index("</section>")]
    assert re.findall(r"<td class=\"best\">(0\.\d+)", part) == ["0.100", "0.800"]


def test_without_a_comparison_the_probe_makes_the_headline(tmp_path):
    folder = write_run(tmp_path / "run")
    for path in [*folder.glob("compare*.json"), folder / "anomaly.json"]:
        path.unlink()
    scores = {"pretrained": {"linear": 0.6}, "untrained": {"linear": 0.5}, "raw": {"linear": 0.7}}
    (folder / "probe.json").write_text(json.dumps({"scores": scores, "test_size": 3000}))
    out = tmp_path / "page.html"
    write_report([folder], out)
    top = words(out.read_text().partition("</header>")[0])
    assert "linear: pre-trained 0.600, untrained 0.500, raw 0.700" in top
    assert "Best is raw: the pre-training does not pay here." in top


def test_a_run_that_tells_anomalies_is_told_how_to_measure_it(tmp_path):
    run = write_run(tmp_path / "rows", full=False)
    (run / "run.toml").write_text(TOML + "[anomaly]\nthreshold = 1.0\n")
    html = write_report([run], tmp_path / "out.html").read_text()
    assert "(anomaly.json)" in html
    (run / "anomaly.json").write_text(json.dumps(anomaly()))
    assert "(anomaly.json)" not in write_report([run], tmp_path / "out.html").read_text()


@pytest.mark.parametrize(
    "damage", [{"normal": [1, 2]}, {"edges": []}, {"threshold": None}, {"abnormal": [0, "<b>", 1]}]
)
def test_a_damaged_histogram_is_named(tmp_path, damage):
    run = write_run(tmp_path / "first")
    (run / "anomaly.json").write_text(json.dumps(anomaly(**damage)))
    with pytest.raises(CheckpointError, match=r"anomaly\.json: histograms\.error"):
        read_run(run)


def test_figures_are_well_formed_and_every_class_has_a_style(page):
    figures = re.findall(r"<svg.*?</svg>", page, flags=re.S)
    style = page[page.index("<style>") : page.index("</style>")]
    assert len(figures) >= 12
    used = {
        name
        for figure in figures
        for element in ElementTree.fromstring(figure).iter()
        for name in element.get("class", "").split()
    }
    assert {"c0", "c1", "c2", "k0", "band", "dot"} <= used
    assert [name for name in sorted(used) if f".{name}" not in style and name != "tick"] == []
    assert "nan" not in "".join(figures).lower()
    assert not re.search(r'(fill|stroke)="', "".join(figures))  # colours come from the style alone


def test_colors_exist_in_light_and_in_dark(page):
    style = page[page.index("<style>") : page.index("</style>")]
    light, dark = style.split("@media (prefers-color-scheme: dark)")
    dark = dark[: dark.index("}\n}")]
    declared = set(re.findall(r"(--[\w-]+):\s*#", light))
    assert declared == set(re.findall(r"(--[\w-]+):\s*#", dark))
    assert set(re.findall(r"var\((--[\w-]+)\)", style)) - {"--c"} <= declared


def test_every_key_of_the_run_is_shown(page):
    for shown in ("tokenizer.size", "4096", "20,412", "3.11.9", "bert-minutes", "sweep"):
        assert shown in page


def test_missing_parts_are_named_with_their_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs" / "bare", full=False)
    html = write_report([Path("runs/bare")], tmp_path / "out.html").read_text()
    for file in ("metrics.jsonl", "speed.jsonl", "compare.json", "fills.json", "embeddings.json"):
        assert f"({file})" in html
    assert "selfsup compare runs/bare --task" in html
    assert "samples.json" not in html  # a masked model does not write
    assert "no measurement yet" in html


def test_a_full_run_misses_nothing(page):
    assert "Not in this report" not in page


def test_same_runs_give_the_same_bytes(tmp_path):
    run = write_run(tmp_path / "first")
    one = write_report([run], tmp_path / "one.html").read_bytes()
    assert write_report([run], tmp_path / "two.html").read_bytes() == one


def test_several_runs_are_laid_over_each_other(tmp_path):
    runs = [write_run(tmp_path / "first"), write_run(tmp_path / "other", full=False)]
    html = write_report(runs, tmp_path / "out.html").read_text()
    assert "<h1>2 runs</h1>" in html
    assert html.count("<article") == 2
    assert 'aria-label="Losses of the runs"' in html
    anchors = re.findall(r' id="([^"]+)"', html)
    assert len(anchors) == len(set(anchors))


@pytest.mark.parametrize(
    ("arm", "start"),
    [("baseline", "The classical baseline wins"), ("scratch", "Training from scratch wins")],
)
def test_a_loss_of_pretraining_is_said_as_plainly(tmp_path, arm, start):
    arms = ARMS | {arm: {"50": [0.91, 0.90, 0.92]}}
    found = verdict(read_compare(write_compare(tmp_path, arms)), 50)
    assert found.headline.startswith(f"{start} with 50 labelled sentences: 0.91, against 0.72 pre")
    assert (found.winner, found.clear) == (arm, True)


def test_a_lead_inside_the_noise_is_not_a_win(tmp_path):
    arms = {"pretrained": {"50": [0.60, 0.80, 0.70]}, "scratch": {"50": [0.75, 0.60, 0.70]}}
    found = verdict(read_compare(write_compare(tmp_path, arms)), 50)
    assert not found.clear
    assert "within the noise" in found.conclusion
    one_seed = {"pretrained": {"50": [0.8]}, "scratch": {"50": [0.6]}}
    found = verdict(read_compare(write_compare(tmp_path, one_seed)), 50)
    assert "too few seeds" in found.conclusion
    alike = {"pretrained": {"50": [0.8, 0.7]}, "scratch": {"50": [0.6, 0.5]}}
    found = verdict(read_compare(write_compare(tmp_path, alike)), 50)
    assert not found.clear
    assert "too few seeds" in found.conclusion


def test_equal_scores_are_no_lead(tmp_path):
    arms = {"pretrained": {"50": [0.8, 0.9]}, "scratch": {"50": [0.8, 0.9]}}
    found = verdict(read_compare(write_compare(tmp_path, arms)), 50)
    assert not found.clear
    assert found.conclusion == "Pre-trained and from scratch are level with 50 labelled sentences."


def test_smaller_wins_where_the_metric_is_an_error(tmp_path):
    compare = read_compare(write_compare(tmp_path, metric="mean_squared_error"))
    assert verdict(compare, 50).winner == "scratch"


def test_a_small_gain_is_not_shown_as_none(tmp_path):
    arms = {"pretrained": {"50": [0.754, 0.756]}, "scratch": {"50": [0.751, 0.753]}}
    found = verdict(read_compare(write_compare(tmp_path, arms)), 50)
    assert "0.755 pre-trained, 0.752 from scratch (+0.003)" in found.headline


def test_intervals_agree_with_scipy():
    for df in (1, 2, 5, 9, 10, 11, 30, 200):
        assert t95(df) == pytest.approx(stats.t.ppf(0.975, df), rel=1e-4)
    one, two = [0.71, 0.74, 0.70, 0.77], [0.66, 0.70, 0.69, 0.68]
    paired = stats.ttest_rel(one, two).confidence_interval()
    gap, half = difference(one, two)
    assert (gap - half, gap + half) == pytest.approx(tuple(paired), abs=1e-4)
    assert interval(one)[0] == pytest.approx(np.mean(one))


def test_smoothing_does_not_lag():
    line = list(np.linspace(3.0, 1.0, 601))
    assert smoothed(line)[50:-50] == pytest.approx(line[50:-50])
    assert smoothed([2.0, 1.0]) == [2.0, 1.0]


def test_labels_are_moved_apart_but_stay_inside():
    places = spread([10.0, 11.0, 12.0, 99.0], 0, 100, step=16)
    assert np.all(np.diff(places) >= 16)
    assert max(places) <= 100
    assert spread([5.0, 50.0], 0, 100) == [5.0, 50.0]


def test_ticks_stay_inside_and_are_even():
    for low, high in ((0.5817, 0.7512), (-3, 2900), (1e-5, 3e-5)):
        found = ticks(low, high)
        assert 3 <= len(found) <= 9
        assert low <= found[0] < found[-1] <= high
        assert np.ptp(np.diff(found)) < 1e-9


def test_damaged_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match="at least one run"):
        write_report([], tmp_path / "out.html")
    with pytest.raises(CheckpointError, match=r"nowhere/run\.toml"):
        write_report([tmp_path / "nowhere"], tmp_path / "out.html")
    run = write_run(tmp_path / "first")
    metrics = run / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text(whole + '{"step": 91, "lo')
    assert read_run(run).warnings[-1].startswith("metrics.jsonl: its last line is cut off")
    metrics.write_text('{"step": 91, "lo\n' + whole)
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl:1"):
        read_run(run)
    metrics.write_text(whole)
    write_compare(run, {"scratch": {"50": [0.5, float("nan")]}})
    with pytest.raises(CheckpointError, match=r"arms\.scratch\.50"):
        read_run(run)


def test_picture_for_the_readme(tmp_path):
    compare = write_compare(tmp_path)
    one = write_figure(compare, tmp_path / "one.png").read_bytes()
    assert one.startswith(b"\x89PNG")
    assert write_figure(compare, tmp_path / "two.png").read_bytes() == one


def test_the_report_does_not_import_torch():
    code = "import sys, selfsup.reporting; assert not {'torch', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
