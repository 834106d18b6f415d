import sys
from pathlib import Path

import pytest

from selfsup.data.sources import HubDataset, Wanted, class_folders, find, listed, opened
from selfsup.errors import DataError

WANTED = Wanted(
    what="letter",
    known=".abc",
    reads=lambda path: path.suffix == ".abc",
    beside=lambda path: path.suffix == ".label",
)
FILES_ONLY = Wanted(what="letter", known=".abc", reads=WANTED.reads, hub=False)


def make(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def test_paths_are_relative_to_what_was_named(tmp_path):
    names = ("b/2.abc", "b/1.abc", "a/x/3.abc", ".git/4.abc", "a/.x/5.abc", "a/6.md")
    make(tmp_path, *names)
    assert list(find(tmp_path, WANTED).values()) == ["a/x/3.abc", "b/1.abc", "b/2.abc"]
    assert find(tmp_path / "b" / "1.abc", WANTED) == {tmp_path / "b" / "1.abc": "1.abc"}
    assert list(find(f"{tmp_path}/b/?.abc", WANTED).values()) == ["1.abc", "2.abc"]
    assert list(find(f"{tmp_path}/*/**/3.abc", WANTED).values()) == ["a/x/3.abc"]
    # the first name counts
    both = find([tmp_path / "b", tmp_path], WANTED)
    assert list(both.values()) == ["1.abc", "2.abc", "a/x/3.abc"]


def test_only_what_belongs_to_no_file_is_warned_of(tmp_path, capsys):
    make(tmp_path, "1.abc", "1.label")
    find(tmp_path, WANTED)
    assert capsys.readouterr().err == ""
    make(tmp_path, *(f"{i}.md" for i in range(7)))
    find(tmp_path, WANTED)
    warning = "7 files are not read (unknown extension): 0.md, 1.md, 2.md, 3.md, 4.md, ..."
    assert warning in capsys.readouterr().err


def test_what_is_not_found(tmp_path):
    make(tmp_path, "wiki.abc", "deep/a.md", "deep/a.label")
    for source, message in (
        (tmp_path / "wik.abc", r"no file or folder .*wik\.abc; did you mean 'wiki\.abc'"),
        (tmp_path / "deep", r"the folder .* gives no letter; looked for \.abc; it gives 1 other"),
        (tmp_path / "deep" / "a.md", r"a\.md: unknown extension; known: \.abc$"),
        (f"{tmp_path}/*.txt", r"the pattern .*\*\.txt gives no letter; looked for \.abc$"),
        ("hf:a:b:c:d", "hf:a:b:c:d: write hf:owner/name"),
        ("missing.abc", "no file or folder missing.abc"),
        ([], r"list of sources is empty; give files \(\.abc\)"),
    ):
        with pytest.raises(DataError, match=message):
            find(source, WANTED)


def test_many_siblings_give_no_hint(tmp_path):
    make(tmp_path, *(f"{i}.abc" for i in range(30)))
    with pytest.raises(DataError, match=r"no file or folder .*33\.abc$"):
        find(tmp_path / "33.abc", WANTED)


def test_datasets_of_the_hub():
    wanted = [HubDataset("a/b"), HubDataset("a/b", "en", "test"), HubDataset("a/b", None, "test")]
    assert list(find(["a/b", "hf:a/b:en:test", "hf:a/b::test", wanted[0]], WANTED)) == wanted
    for source in ("hf:a/b", HubDataset("a/b")):
        with pytest.raises(DataError, match=r"hf:a/b.*: datasets of the Hub are not read here"):
            find(source, FILES_ONLY)
    with pytest.raises(DataError, match="no file or folder a/b"):
        find("a/b", FILES_ONLY)
    with pytest.raises(DataError, match="no file or folder texts"):  # no dataset
        find("texts", WANTED)


def test_a_source_as_a_list():
    assert listed("a", WANTED) == ["a"]
    assert listed(("a", Path("b")), WANTED) == ["a", Path("b")]


def test_first_level_folders_are_classes_where_every_file_lies_in_one():
    a, b, c = Path("x/cat/1"), Path("x/cat/deep/2"), Path("x/dog/3")
    found = {a: "cat/1", b: "cat/deep/2", c: "dog/3"}
    assert class_folders(found) == {a: "cat", b: "cat", c: "dog"}
    assert class_folders(found, least=3) == {}
    assert class_folders({**found, Path("x/4"): "4"}) == {}
    assert class_folders({**found, HubDataset("a/b"): ""}) == {}


def test_an_error_inside_a_dataset_names_it(monkeypatch):
    class Fake:
        @staticmethod
        def load_dataset(name, config, split, streaming):
            assert (name, config, split, streaming) == ("a/b", "en", "train", True)
            yield "first"
            raise OSError("cut off")

    monkeypatch.setitem(sys.modules, "datasets", Fake)
    rows = []
    message = r"hf:a/b:en:train cannot be opened \(OSError: cut off\)"
    with pytest.raises(DataError, match=message), opened(HubDataset("a/b", "en")) as stream:
        rows += [next(stream)]
        next(stream)
    assert rows == ["first"]
    with pytest.raises(DataError, match=r"^mine$"), opened(HubDataset("a/b", "en")):
        raise DataError("mine")
