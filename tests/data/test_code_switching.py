"""Words change by a dictionary, as often as asked, and nothing else of a text does."""

import json
import random
from collections import Counter

import pytest

from selfsup.cli import main
from selfsup.data.code_switching import frequent, read_lexicon, switched, write_switched
from selfsup.errors import ConfigError, DataError

ENTRIES = [
    {"en": "dog, hound; animal", "zh": "狗"},
    {"en": "to run", "zh": "跑"},
    {"en": "a very big house", "zh": "厦"},  # no single word
    {"en": "Dog", "zh": "犬"},
    {"en": ",", "zh": "，"},
]


@pytest.fixture
def lexicon(tmp_path):
    path = tmp_path / "lexicon.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in ENTRIES))
    return path


def test_a_lexicon_holds_single_words_without_case_and_marks(lexicon):
    found = read_lexicon(lexicon, "en", "zh")
    assert found == {
        "dog": ["狗", "犬"],
        "hound": ["狗"],
        "animal": ["狗"],
        "run": ["跑"],
        ",": ["，"],
    }


def test_a_lexicon_goes_both_ways(lexicon):
    assert read_lexicon(lexicon, "zh", "en")["跑"] == ["to run"]


def test_only_frequent_translations_are_kept():
    counts = Counter({"狗": 60, "犬": 90, "跑": 49})
    words = {"dog": ["狗", "犬"], "run": ["跑"]}
    assert frequent(words, counts, least=50, most=1) == {"dog": ["犬"]}


def test_words_with_endings_change_and_the_rest_stays():
    words = {"dog": ["狗"], "walk": ["走"], ",": ["，"]}
    text = "Dogs, walking\n\n  the dogged dog's walked; DOG!"
    found = switched(text, words, 1.0, random.Random(0))
    assert found == ("狗， 走\n\n  the dogged 狗's 走; 狗!", 6)


def test_the_share_is_that_of_known_words():
    found, count = switched("dog cat " * 5000, {"dog": ["狗"]}, 0.3, random.Random(0))
    assert count == found.count("狗")
    assert abs(count / 5000 - 0.3) < 0.02
    assert found.count("cat") == 5000


def test_a_corpus_is_written_whole_and_the_same_again(tmp_path, lexicon):
    corpus = tmp_path / "texts.jsonl"
    texts = ["The dog ran, the hound too.", "nothing known here", "run run run"]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    like = tmp_path / "chinese.txt"
    like.write_text("狗" * 60 + "，" * 60 + "跑" * 10)
    for name in ("one.jsonl", "two.jsonl"):
        given = ["--data", str(corpus), "--lexicon", str(lexicon), "--from", "en", "--to", "zh"]
        more = ["--like", str(like), "--share", "1", "--out", str(tmp_path / name)]
        assert main(["prep", "switch", *given, *more]) == 0
    written = (tmp_path / "one.jsonl").read_text()
    assert written == (tmp_path / "two.jsonl").read_text()
    assert [json.loads(line)["text"] for line in written.splitlines()] == [
        "The 狗 ran， the 狗 too.",
        "nothing known here",
        "run run run",  # what they become is too rare
    ]


def test_what_was_done_is_counted(tmp_path, lexicon):
    corpus = tmp_path / "texts.txt"
    corpus.write_text("the dog, a dog")
    counts = write_switched(
        corpus, lexicon, tmp_path / "out.jsonl", source="en", target="zh", share=1.0
    )
    assert counts == {"lexicon": 5, "documents": 1, "words": 5, "switched": 3}


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"share": 0.0}, ConfigError, "share must be above 0 and at most 1, got 0.0"),
        ({"source": "de"}, DataError, "'de'"),
        ({"target": "fr"}, DataError, "no text in 'fr'; there are en, zh"),
        ({"like": "texts.txt"}, DataError, "holds no translation"),
    ],
)
def test_bad_input_is_named(tmp_path, lexicon, options, error, says):
    (tmp_path / "texts.txt").write_text("the dog")
    given = {"source": "en", "target": "zh", **options}
    if "like" in given:
        given["like"] = tmp_path / given["like"]
    with pytest.raises(error, match=says):
        write_switched(tmp_path / "texts.txt", lexicon, tmp_path / "out.jsonl", **given)
    assert not (tmp_path / "out.jsonl").exists()


def test_a_file_is_not_overwritten(tmp_path, lexicon):
    (tmp_path / "out.jsonl").write_text("kept")
    with pytest.raises(ConfigError, match="exists"):
        write_switched(lexicon, lexicon, tmp_path / "out.jsonl", source="en", target="zh")
    assert (tmp_path / "out.jsonl").read_text() == "kept"
