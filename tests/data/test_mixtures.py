"""Mixtures of labelled files: what a row says, how many rows a task has, errors that name keys."""

import json
from collections import Counter

import pytest

from selfsup.data import templates
from selfsup.data.labels import subset
from selfsup.data.mixtures import source_of
from selfsup.data.text import read_labels
from selfsup.errors import ConfigError, DataError

STARS = "Stars for {text}\n= {label}\n--- labels\n0 = one\n1 = five\n"
TWICE = "{text} {text_b}: {label}\n--- labels\nno = differ\nyes = agree\n"


@pytest.fixture
def folder(tmp_path):
    """Two labelled files and two templates, in one folder."""
    rows = [f"film {i}\t{i % 2}" for i in range(40)]
    (tmp_path / "films.tsv").write_text("\n".join(["text\tlabel", *rows]))
    pairs = [{"a": f"x{i}", "b": f"y{i}", "same": ("no", "yes")[i % 3 == 0]} for i in range(9)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (tmp_path / "stars.txt").write_text(STARS)
    (tmp_path / "twice.txt").write_text(TWICE)
    return tmp_path


@pytest.fixture
def mixed(folder):
    def read(text: str):
        (folder / "mixture.toml").write_text(text)
        return read_labels(folder / "mixture.toml", "generation")

    return read


FILMS = '[[tasks]]\ndata = "films.tsv"\ntemplates = ["sentiment", "stars.txt"]\n'
PAIRS = (
    '[[tasks]]\nname = "same"\ndata = "pairs.jsonl"\ntemplates = ["twice.txt"]\n'
    'text = "a"\ntext_b = "b"\nlabel = "same"\n'
)


def test_every_example_through_every_template(mixed):
    found = mixed(FILMS + PAIRS)
    assert (found.task, found.names, len(found)) == ("generation", (), 2 * 40 + 9)
    assert found.items[0] == (
        "Say whether the review is good or bad.\n\nReview: film 0\nSentiment:"
    )
    assert found.items[41] == "Stars for film 1\n="
    assert found.items[80] == "x0 y0:"
    assert [found.labels[i] for i in (0, 1, 40, 41, 80, 81)] == [
        *("bad", "good", "one", "five", "agree", "differ")
    ]
    assert found.parts[0] == ("films", ("bad", "good"), "Sentiment:")
    assert found.parts[41] == ("films", ("one", "five"), "=")
    assert found.parts[80] == ("same", ("differ", "agree"), ":")
    assert found.groups[0] == found.groups[40] != found.groups[1]  # one film
    assert found.items[0] == source_of(templates.load("sentiment"), "film 0")
    some = found.take([80, 0])
    assert [part.name for part in some.parts] == ["same", "films"]
    assert len(subset(found, 10, seed=0).parts) == 10


def test_one_template_for_each_example_drawn_by_the_seed(mixed):
    found = mixed('render = "one"\n' + FILMS)
    assert [item.rpartition("film ")[2].split("\n")[0] for item in found.items] == [
        str(i) for i in range(40)
    ]
    stars = [item.startswith("Stars") for item in found.items]
    assert 8 < sum(stars) < 32
    for label, other, part in zip(found.labels, stars, found.parts, strict=True):
        assert label in (("one", "five") if other else ("bad", "good"))
        assert label in part.choices
    assert mixed('render = "one"\n' + FILMS).items == found.items
    assert mixed('render = "one"\nseed = 1\n' + FILMS).items != found.items


def test_a_cap_holds_for_all_templates_of_a_task_together(mixed):
    found = mixed("cap = 10\n" + FILMS + PAIRS)
    assert Counter(part.name for part in found.parts) == {"films": 10, "same": 9}
    stars = [item.startswith("Stars") for item in found.items[:10]]
    assert stars == [False] * 5 + [True] * 5
    seen = [item.split("film ")[1].split("\n")[0] for item in found.items[:10]]
    assert set(seen[:5]) != set(seen[5:])  # other examples for each template
    assert len(set(seen[:5])) == 5
    found = mixed('cap = 10\nrender = "one"\n' + FILMS)
    assert len({item.split("film ")[1].split("\n")[0] for item in found.items}) == 10
    found = mixed("cap = 10\n" + FILMS + "cap = 4\n" + PAIRS)
    assert Counter(part.name for part in found.parts) == {"films": 4, "same": 9}


def test_words_of_the_mixture_replace_those_of_the_templates(mixed):
    found = mixed(FILMS + 'words = {0 = "weak", 1 = "strong"}\n')
    assert {part.choices for part in found.parts} == {("weak", "strong")}
    assert set(found.labels) == {"weak", "strong"}
    assert found.items[1].endswith("Review: film 1\nSentiment:")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cap = 3\n", r"mixture.toml: a mixture lists its tasks, each under a line \[\[tasks\]\]"),
        ("capp = 3\n" + FILMS, "unknown key .*mixture.toml.capp; did you mean 'cap'"),
        ('render = "some"\n' + FILMS, "mixture.toml.render = 'some' is not allowed"),
        ("cap = 0\n" + FILMS, "mixture.toml: cap must be at least 1, got 0"),
        (FILMS + PAIRS.replace("name", "nam"), r"unknown key .*: tasks 2.nam; did you mean 'name'"),
        (FILMS + FILMS, "tasks 2: 'films' is the name of an earlier one"),
        ('[[tasks]]\ntemplates = ["nli"]\n', "tasks 1: missing key data"),
        ('[[tasks]]\ndata = "films.tsv"\ntemplates = []\n', "tasks 1: templates must name"),
        (FILMS + "cap = 1\n", "tasks 1: cap must be at least 1 for each template, got 1 for 2"),
        (FILMS + "words = {0 = 3}\n", "tasks 1: words.0 must be one line of text, got 3"),
        (FILMS + 'words = {0 = "a\\nb = c", 1 = "d"}\n', "words.0 must be one line of text"),
        (FILMS + 'words = "good"\n', "tasks 1: words must be a section"),
        (FILMS.replace("sentiment", "sentimnt"), "no template and no file is called"),
        (FILMS.replace("sentiment", "nli-reasoning"), r"task 'films': nli-reasoning: has \{reaso"),
        (FILMS.replace("sentiment", "cloze-sentiment-just"), r"just:1: \{text\} stands behind"),
        (FILMS + 'words = {0 = "a", 1 = "a"}\n', "sentiment with words:.* 'a' stands for another"),
    ],
)
def test_bad_mixtures(mixed, text, message):
    with pytest.raises(ConfigError, match=message):
        mixed(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            FILMS + 'words = {0 = "weak", 2 = "so"}\n',
            "films.tsv: label '1' has no word in the t",
        ),
        (
            FILMS.replace("sentiment", "nli"),
            r"template .*nli has \{text_b\}, but the items are",
        ),
        (FILMS.replace("films.tsv", "none.tsv"), r"none.tsv: cannot be read"),
        (PAIRS.replace('"a"', '"c"'), "pairs.jsonl:1: no column 'c' for text"),
    ],
)
def test_files_that_do_not_fit(mixed, text, message):
    with pytest.raises(DataError, match=message):
        mixed(text)


def test_a_mixture_names_the_columns_itself(folder):
    (folder / "mixture.toml").write_text(FILMS)
    with pytest.raises(ConfigError, match="names the columns of its files"):
        read_labels(folder / "mixture.toml", "generation", text="text")
