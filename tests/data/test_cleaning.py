"""Each rule by a worked example; the whole cleaning by what is kept, dropped and written."""

import gzip
import json
import sys

import pytest

from selfsup.config import from_mapping
from selfsup.data.cleaning import RepeatedSpans, clean, span_hashes
from selfsup.data.cleaning_rules import Config, Counts, Rules
from selfsup.data.ngrams import sentences
from selfsup.errors import ConfigError, DataError

GOOD = "The first line is long enough. It has two sentences.\nAnd here is the third one."
KEPT = "A line that every rule keeps. It is here. It stays here."


def apply(text: str, **keys) -> tuple[str, dict[str, tuple[int, int, int]]]:
    """The cleaned text, and (documents, lines, characters) of each rule that dropped something."""
    counts = Counts()
    left = Rules(Config(**keys)).cleaned(text, counts)
    dropped = {
        rule: (found.documents, found.lines, found.characters)
        for rule, found in counts.items()
        if found.characters or found.documents
    }
    return left, dropped


def test_a_good_text_is_left_alone():
    assert apply(GOOD) == (GOOD, {})


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("Home | About us | Contact and more", "no_line_end"),
        ("This line of text just goes on...", "no_line_end"),
        ("Click to read more of it…", "no_line_end"),
        ("Only four words here.", "short_line"),
        ("Please turn on JavaScript to go on.", "javascript"),
        ("By this you accept our Privacy Policy today.", "policy"),
        ("This site uses cookies of many kinds.", "policy"),
        (f"One word of this is {'x' * 1001} too long.", "long_word"),
        ("我们去。", "short_line"),
        ("我们今天下午去看电影", "no_line_end"),
    ],
)
def test_rules_for_lines(line, rule):
    assert apply(f"{KEPT}\n{line}\n{KEPT}") == (
        f"{KEPT}\n{KEPT}",
        {rule: (0, 1, len(line) + 1)},
    )


@pytest.mark.parametrize(
    "line",
    [
        'He called out to them "We are here!"',
        "我们今天下午去看电影了。",
        "他说：“我们今天下午去看电影了！”",
        "It has exactly these five words.".replace("these ", ""),
        f"这一行没有空格但是很长{'很' * 1001}长。",
    ],
)
def test_lines_that_stay(line):
    assert apply(f"{KEPT}\n{line}") == (f"{KEPT}\n{line}", {})


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (f"{KEPT}\nHere stands Lorem Ipsum dolor sit amet.", "lorem_ipsum"),
        (f"{KEPT}\nif (x) {{ go on to the next one.", "curly_bracket"),
        ("There are two sentences in this. That is too few.", "few_sentences"),
    ],
)
def test_rules_for_documents(text, rule):
    assert apply(text) == ("", {rule: (1, 0, len(text))})


def test_page_rules_look_only_at_lines_that_are_left():
    left, dropped = apply(f"{KEPT}\nfunction() {{ return lorem ipsum\n{KEPT}")
    assert left == f"{KEPT}\n{KEPT}"
    assert dropped["no_line_end"][1] == 1


def test_citation_marks_go_and_the_line_stays():
    text = f"It is so.[1][23] It was.[edit] So it will be. [citation needed]\n{KEPT}"
    left, dropped = apply(text)
    assert left == f"It is so. It was. So it will be.\n{KEPT}"
    assert dropped == {"citations": (0, 0, len("[1][23][edit] [citation needed]"))}
    assert apply(f"See [a] and [12b] of the book. {KEPT}")[1] == {}


def test_no_line_left_and_no_text():
    assert apply("Menu\nHome\n")[1] == {"no_line_end": (0, 2, 10), "empty": (1, 0, 0)}
    assert apply("  \n\n") == ("", {"empty": (1, 0, 4)})
    assert apply("", min_sentences=0) == ("", {"empty": (1, 0, 0)})


def test_numbers_of_words():
    text = "One two three four five. " * 4
    assert apply(text, min_words=21)[1] == {"few_words": (1, 0, 100)}
    assert apply(text, max_words=19)[1] == {"many_words": (1, 0, 100)}
    assert apply(text, min_words=20, max_words=20)[0] == text.strip()


def test_white_space_is_counted():
    left, dropped = apply(f"  {KEPT}  \n\n\n{KEPT}\n")
    assert left == f"{KEPT}\n{KEPT}"
    assert dropped == {"white_space": (0, 0, 7)}


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("This is a DAMN fine day here.", True),
        ("Damn, this is a fine day.", True),
        ("They built the new amsterdamn dam here.", False),
        ("It was a cold hearted thing.", True),
        ("今天下午我们看坏蛋电影去了。", True),
    ],
)
def test_bad_words_come_from_a_file(tmp_path, line, found):
    path = tmp_path / "words.txt"
    path.write_text("damn\n\ncold hearted\n坏蛋\n", encoding="utf-8")
    left, dropped = apply(f"{KEPT}\n{line}", bad_words=str(path))
    assert ("bad_words" in dropped) == found
    assert (left == "") == found


def test_bad_words_that_cannot_be_read(tmp_path):
    (tmp_path / "none.txt").write_text("\n \n")
    with pytest.raises(ConfigError, match="holds no word"):
        Rules(Config(bad_words=str(tmp_path / "none.txt")))
    with pytest.raises(DataError, match=r"missing\.txt"):
        Rules(Config(bad_words=str(tmp_path / "missing.txt")))


def test_scripts():
    chinese = "我们今天下午去看电影了。他们没有去。你去吗？"
    assert apply(chinese, scripts=("han",))[0] == chinese
    assert apply(chinese, scripts=("latin",))[1] == {"scripts": (1, 0, len(chinese))}
    assert apply(KEPT, scripts=("han", "latin"))[0] == KEPT


def test_every_rule_can_be_turned_off():
    text = "menu\nlorem ipsum {[1] javascript, we use cookies"
    off = dict.fromkeys(
        ("line_ends", "javascript", "policy", "citations", "lorem_ipsum", "curly_bracket"), False
    )
    off |= {"min_line_words": 0, "max_word_chars": 0, "min_sentences": 0}
    assert apply(text, **off) == (text, {})


def test_a_missing_language_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "py3langid", None)
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    with pytest.raises(ConfigError, match=r"selfsup\[language\]"):
        Rules(Config(language="en"))


def test_language():
    pytest.importorskip("py3langid", reason="the extra `language` is not installed")
    english = "The weather was fine and we went for a walk. It was late. We came home."
    german = "Das Wetter war schön und wir gingen spazieren. Es war spät. Wir kamen heim."
    assert apply(english, language="en")[0] == english
    assert apply(german, language="en")[1] == {"language": (1, 0, len(german))}
    assert apply(german, language="de")[0] == german
    with pytest.raises(ConfigError, match="unknown language 'english'"):
        Rules(Config(language="english"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"min_word": 3}, r"unknown key clean\.min_word; did you mean 'min_words'"),
        ({"bands": 0}, "bands must be at least 1"),
        ({"min_words": -1}, "min_words must be at least 0"),
        ({"script_share": 2.0}, r"script_share must be in 0\.\.1"),
        ({"scripts": ["latn"]}, "unknown script 'latn'; did you mean 'latin'"),
        ({"min_words": 5, "max_words": 4}, "max_words is smaller"),
    ],
)
def test_wrong_settings(keys, message):
    with pytest.raises(ConfigError, match=message):
        from_mapping(Config, keys, "clean")


# Spans


def removed(*texts: str) -> list[str]:
    hashes = [h for text in texts for h in span_hashes(sentences(text), 3)]
    spans = RepeatedSpans({h for h in hashes if hashes.count(h) > 1}, 3)
    return [spans.removed(text)[0] for text in texts]


def test_all_but_the_first_of_equal_spans_are_removed():
    assert removed("Aa. Bb. Cc. Dd.", "Xx. AA. Bb.  Cc. Yy.", "Aa. Bb. Zz.") == [
        "Aa. Bb. Cc. Dd.",
        "Xx. Yy.",
        "Aa. Bb. Zz.",  # two sentences are no span
    ]


def test_overlapping_spans_are_removed_as_one():
    assert removed("A a. B b. C c. D d.", "A a. B b. C c. D d. E e.")[1] == "E e."


def test_a_text_that_repeats_itself():
    assert removed("Ha. Ha. Ha. Ha.") == ["Ha. Ha. Ha. Ha."]
    assert removed("A a. B b. C c. X x. A a. B b. C c.") == ["A a. B b. C c. X x."]


def test_a_span_whose_first_place_was_removed_is_kept_once():
    # "B b. C c. X x." overlaps a removed span in the second text; the third keeps it
    texts = removed("A a. B b. C c.", "A a. B b. C c. X x.", "B b. C c. X x. Y y.")
    assert texts == ["A a. B b. C c.", "X x.", "B b. C c. X x. Y y."]


def test_spans_cross_lines_and_leave_no_blank_line():
    assert removed("A a. B b.\nC c.", "X x.\nA a. B b.\nC c. Y y.") == [
        "A a. B b.\nC c.",
        "X x.\nY y.",
    ]


# The whole


def page(number: int) -> str:
    words = [f"word{number}x{i}" for i in range(60)]
    lines = [" ".join(words[i : i + 20]).capitalize() + "." for i in (0, 20, 40)]
    return "\n".join(lines)


@pytest.fixture
def crawl(tmp_path):
    """Two files in which every rule for the whole corpus has its case."""
    folder = tmp_path / "crawl"
    folder.mkdir()
    with_span = f"{page(6)}\n{page(1)}"
    records = [
        {"text": page(0), "url": "a", "n": 1},
        {"text": f"{page(0)}\nMenu", "url": "b", "n": 2},  # equal when cleaned
        {"text": page(1), "url": "c", "n": 3},
        {"text": page(1) + " And that is all.", "url": "d", "n": 4},  # nearly equal
        {"text": with_span, "url": "e", "n": 5},  # holds page 1: half of it is a repeated span
        {"text": None, "url": "f", "n": 6},
    ]
    (folder / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    with gzip.open(folder / "b.csv.gz", "wt", encoding="utf-8") as file:
        file.write(f'id,text\n1,"{page(7)}"\n2,too short\n')
    return folder


def read_out(out):
    paths = sorted((out / "documents").iterdir())
    return [json.loads(line) for path in paths for line in gzip.open(path, "rt")]


def test_the_whole(crawl, tmp_path):
    before = {path.name: path.read_bytes() for path in crawl.iterdir()}
    summary = clean(crawl, tmp_path / "out", Config())
    assert read_out(tmp_path / "out") == [
        {"text": page(0), "url": "a", "n": 1},
        {"text": page(1), "url": "c", "n": 3},
        {"text": page(6), "url": "e", "n": 5},
        {"id": "1", "text": page(7)},
    ]
    dropped = {rule: v["documents"] for rule, v in summary["dropped"].items() if v["documents"]}
    assert dropped == {"empty": 2, "exact_duplicates": 1, "near_duplicates": 1}
    assert summary["dropped"]["repeated_spans"]["lines"] == 3
    assert summary["dropped"]["near_duplicates"]["examples"] == [page(1).replace("\n", " ")[:100]]
    assert summary["read"]["documents"] == 8
    for what in ("documents", "characters"):  # nothing is lost
        gone = sum(found[what] for found in summary["dropped"].values())
        assert summary["read"][what] == summary["kept"][what] + gone
    lines = sum(found["lines"] for found in summary["dropped"].values())
    assert lines == 2 + 3  # "Menu", "too short" and the span
    assert json.loads((tmp_path / "out" / "cleaning.json").read_text()) == json.loads(
        json.dumps(summary)
    )
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"documents", "cleaning.json"}
    assert {path.name: path.read_bytes() for path in crawl.iterdir()} == before


def test_the_same_input_gives_the_same_bytes(crawl, tmp_path):
    for name in ("one", "two"):
        clean(crawl, tmp_path / name, Config())
    for path in (tmp_path / "one").rglob("*.*"):
        other = tmp_path / "two" / path.relative_to(tmp_path / "one")
        assert path.read_bytes() == other.read_bytes()


def test_parts_are_bounded(tmp_path):
    (tmp_path / "in.txt").write_text("".join(f"{page(i)}\n\n" for i in range(10)))
    one = len(json.dumps({"text": page(0)}))
    out = tmp_path / "out"
    clean(tmp_path / "in.txt", out, Config(), split="blank_line", part_chars=3 * one)
    assert len(list((out / "documents").iterdir())) == 4
    assert [record["text"] for record in read_out(out)] == [page(i) for i in range(10)]


def test_duplicates_may_be_kept(crawl, tmp_path):
    config = Config(exact_duplicates=False, near_duplicates=False, span_sentences=0)
    summary = clean(crawl, tmp_path / "out", config)
    assert summary["kept"]["documents"] == 6


def test_a_folder_that_holds_something_is_refused(crawl, tmp_path):
    with pytest.raises(ConfigError, match="not empty"):
        clean(crawl, crawl, Config())
    assert len(list(crawl.iterdir())) == 2
    (tmp_path / "empty").mkdir()
    clean(crawl, tmp_path / "empty", Config())


def test_unreadable_and_empty_input_leaves_nothing(tmp_path):
    (tmp_path / "bad.jsonl").write_text(f'{json.dumps({"text": page(0)})}\n{{"text": 3}}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl:2: the text is int"):
        clean(tmp_path / "bad.jsonl", tmp_path / "out", Config())
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(DataError, match="no document"):
        clean(tmp_path / "none.jsonl", tmp_path / "out", Config())
    assert {path.name for path in tmp_path.iterdir()} == {"bad.jsonl", "none.jsonl"}


def test_columns_with_half_a_character_are_written(tmp_path):
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": page(0), "title": "\ud800"}) + "\n")
    clean(tmp_path / "in.jsonl", tmp_path / "out", Config())
    assert read_out(tmp_path / "out")[0]["title"] == "?"


def test_nothing_left_is_said(tmp_path, capsys):
    (tmp_path / "in.txt").write_text("Menu")
    summary = clean(tmp_path / "in.txt", tmp_path / "out", Config())
    assert summary["kept"]["documents"] == 0
    assert "no document is left" in capsys.readouterr().err


# The command line


def test_prep_clean(crawl, tmp_path, selfsup):
    out = tmp_path / "out"
    answer = selfsup("prep", "clean", "--data", crawl, "--out", out, "--set", "span_sentences=0")
    assert answer.code == 0, answer.err
    table = {line.split()[0]: line.split()[1:] for line in answer.out.splitlines()}
    assert table["read"][0] == "8"
    assert table["near_duplicates"][0] == "-1"
    assert table["empty"] == ["-2", "0.00%"]  # all their lines went by another rule
    assert table["kept"][0] == "4"
    assert f"--data {out}/documents" in answer.err
    page_text = (out / "report.html").read_text()
    assert "near duplicates" in page_text
    assert "http" not in page_text.replace("http-equiv", "")
    again = selfsup("prep", "clean", "--data", crawl, "--out", out)
    assert again.code == 2
    assert "not empty" in again.err


def test_prep_contamination(tmp_path, selfsup):
    (tmp_path / "corpus.txt").write_text(page(0))
    (tmp_path / "test.csv").write_text(f'sentence,label\n"{page(0)}",1\n"{page(1)}",0\n')
    options = ("--data", tmp_path / "corpus.txt", "--test", tmp_path / "test.csv")
    more = ("--test-text", "sentence", "--drop", tmp_path / "clean.jsonl")
    answer = selfsup(*("prep", "contamination", *options, *more, "--out", tmp_path / "found.json"))
    assert answer.code == 0, answer.err
    assert answer.out.splitlines()[0] == "contaminated\t1 of 2\t50.00%"
    assert json.loads((tmp_path / "found.json").read_text())["shares"] == {"0": 1.0}
    assert json.loads((tmp_path / "clean.jsonl").read_text())["label"] == "0"
    again = selfsup("prep", "contamination", *options, "--out", tmp_path / "found.json")
    assert again.code == 2
    assert selfsup("prep").code == 2
