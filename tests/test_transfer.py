"""A tagger that was trained in one language, scored in another."""

import pytest

from selfsup.api import evaluate
from selfsup.data.labelled_text import read
from selfsup.data.labels import with_known_first
from selfsup.errors import DataError


def write(path, sentences):
    """Words with tags, one "word tag" a line."""
    path.write_text("\n".join("".join(f"{word}\n" for word in words) for words in sentences))
    return path


@pytest.fixture(scope="module")
def tagger(masked_run, selfsup, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tagger")
    sentences = [["the D", "film N", "was V"], ["the D", "book N", "was V", "dull A"]] * 8
    train = write(folder / "train.conll", sentences)
    answer = selfsup(
        *("finetune", masked_run, "--task", "tagging", "--data", train, "--out", folder / "run"),
        *("--set", "training.steps=30", "training.lr=1e-2"),
    )
    assert answer.code == 0, answer.err
    return folder / "run"


def test_the_majority_tag_stands_beside_the_accuracy(tagger, tmp_path):
    test = write(tmp_path / "test.conll", [["the D", "book N"], ["film N", "was V", "dull N"]])
    scores = evaluate(tagger, test)
    assert scores["examples"] == 2
    assert scores["majority"] == pytest.approx(3 / 5)


def test_unknown_tags_count_as_wrong_and_are_named(tagger, tmp_path, capsys):
    known = [["the D", "book N"], ["film N", "was V"]]
    before = evaluate(tagger, write(tmp_path / "known.conll", known))
    assert before["accuracy"] == 1
    after = evaluate(tagger, write(tmp_path / "both.conll", [*known, ["dull CL", "le X", "ma X"]]))
    assert after["accuracy"] == pytest.approx(4 / 7)
    assert "3 of 7 words have a tag that training has not seen" in capsys.readouterr().err


def test_another_set_of_tags_is_an_error(tagger, tmp_path):
    with pytest.raises(DataError, match=r"none of its tags .*choose the column"):
        evaluate(tagger, write(tmp_path / "other.conll", [["the DT", "book NN"]]))


def test_known_tags_keep_their_numbers(tmp_path):
    labelled = read(write(tmp_path / "a.conll", [["a Z", "b A"]]), "tagging")
    assert with_known_first(labelled, ("N", "A")).names == ("N", "A", "Z")
