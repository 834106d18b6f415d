"""Tunings in the report: the panels, their names apart, the table, what is damaged."""

import json
import re

import pytest

from selfsup.errors import CheckpointError
from selfsup.reporting.runs import read_compare
from selfsup.reporting.tunings import Box, figures, table, tunings

NAMES = ("full", "lora", "adapter+bias", "prefix", "<probe>")


def write(path, **changes):
    """A comparison of tunings whose scores and costs lie close to each other."""
    found = {
        name: {
            "scores": {"50": [0.70 + 0.004 * n, 0.72], "300": [0.8]},
            "seconds": {"50": [3.0, 4.0], "300": [9.0]},
            "learning_rates": {"50": 1e-3, "300": 1e-3},
            "trained": 10**6 if n == 0 else 1000 + n,
            "share": 0.5**n,
            "step_seconds": 0.05 + 0.001 * n,
            "memory": 2_000_000 + n,
            "file_bytes": 4000,
        }
        for n, name in enumerate(NAMES)
    }
    found["lora"] |= changes
    values = {"task": "tagging", "metric": "accuracy", "unit": "sentences", "tunings": found}
    values |= {"arms": {"pretrained": found["full"]["scores"]}, "curves": []}
    path.write_text(json.dumps(values))
    return path


@pytest.fixture
def compare(tmp_path):
    return read_compare(write(tmp_path / "compare.json"))


def test_three_panels_share_the_axis_of_scores(compare):
    panels = figures(compare, 50)
    ticks = [re.findall(r'<text class="tick end"[^>]*>([^<]+)', panel) for panel in panels]
    assert ticks[0] == ticks[1] == ticks[2]
    for panel, name in zip(panels, ("trained parameters", "seconds", "memory"), strict=True):
        assert name in panel
        assert panel.count('class="dot ') == panel.count('class="name ') == len(NAMES)
        assert panel.count('class="bar ') == len(NAMES)
        assert "<probe>" not in panel


def test_names_do_not_cover_each_other(compare):
    for panel in figures(compare, 50):
        boxes = []
        for left, x, y, name in re.findall(
            r'class="name k?c?\d( end)?" x="([\d.]+)" y="([\d.]+)">([^<]+)', panel
        ):
            wide = 9 * len(name)
            start = float(x) - (wide if left else 0)
            boxes.append(Box(start, start + wide, float(y) - 12, float(y) + 1))
        assert len(boxes) == len(NAMES)
        assert not any(one.meets(two) for place, one in enumerate(boxes) for two in boxes[:place])


def test_the_table(compare):
    head, rows = table(compare)
    assert head[:3] == ["tuning", "50 labels", "300 labels"]
    assert rows[0] == [
        *("full", "0.710 ± 0.127", "0.800", "1,000,000 (100%)", "50 ms", "2 MB", "3.5 s"),
        "0.004 MB",
    ]
    assert rows[1][3] == "1,001 (50%)"


def test_the_section_is_text_only_where_there_are_several(compare):
    html = tunings(compare, "tunings")
    assert "<probe>" not in html
    assert "&lt;probe&gt;" in html
    one = dict(list(compare.tunings.items())[:1])
    assert tunings(type(compare)(**{**vars(compare), "tunings": one}), "tunings") == ""


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trained": 0}, "lora must hold numbers above 0"),
        ({"memory": "much"}, "lora must hold numbers above 0"),
        ({"scores": {"50": [None]}}, r"tunings\.lora\.50 = \[None\]: not finite"),
        ({"scores": {}}, "lora lacks scores"),
        ({"seconds": {"50": [1.0]}}, "lora lacks scores, or seconds"),
        ({"scores": None}, '"tunings" must hold'),
    ],
)
def test_damage_is_named(tmp_path, changes, words):
    with pytest.raises(CheckpointError, match=words):
        read_compare(write(tmp_path / "compare.json", **changes))
