"""`embed` and `search`: files and indexes that read back equal, cuts, bad items, wrong runs."""

import json
import shutil

import numpy as np
import pytest
from pyarrow import parquet
from safetensors.numpy import load_file, save_file

import selfsup as package
from selfsup import doctor, vector_parts
from selfsup.config import read_toml
from selfsup.errors import CheckpointError, ConfigError, DataError
from selfsup.files import sha256
from selfsup.model import Model
from selfsup.vector_index import VectorIndex
from selfsup.verbs import searching


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """40 texts in parts of 16."""
    monkeypatch.setattr(vector_parts, "PART_ITEMS", 16)


@pytest.fixture(scope="module")
def texts(corpus) -> list[str]:
    return [line.split(",")[0] for line in corpus.test.read_text().splitlines()[1:]]


@pytest.fixture(scope="module")
def vectors(masked_run, texts) -> np.ndarray:
    return package.load(masked_run).embed(texts)


@pytest.fixture(scope="module")
def index(masked_run, corpus, tmp_path_factory):
    """An exact index of the 40 texts; tests only read it."""
    path = tmp_path_factory.mktemp("index") / "texts"
    return package.embed(masked_run, corpus.test, path).path


@pytest.fixture
def lines(tmp_path):
    """Writes a text file of such lines."""

    def lines(*content: str):
        path = tmp_path / "lines.txt"
        path.write_text("".join(f"{line}\n" for line in content))
        return path

    return lines


def items_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_array_and_its_items(masked_run, corpus, texts, vectors, tmp_path):
    out = tmp_path / "new" / "v.npy"
    done = package.embed(masked_run, corpus.test, out)
    assert done == (out, 40, 32, "float32")
    assert np.allclose(np.load(out), vectors, atol=1e-5)
    items = items_of(tmp_path / "new" / "v.items.jsonl")
    assert [item["item"] for item in items] == texts
    assert [item["id"] for item in items] == list(range(40))
    assert items[2]["place"] == f"{corpus.test}:4"
    assert sorted(path.name for path in out.parent.iterdir()) == ["v.items.jsonl", "v.npy"]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_parquet(masked_run, corpus, texts, vectors, tmp_path, dtype):
    out = tmp_path / "v.parquet"
    package.embed(masked_run, corpus.test, out, dtype=dtype)
    table = parquet.read_table(out)
    assert table.column_names == ["id", "item", "place", "vector"]
    assert str(table.schema.field("vector").type).endswith("[32]")
    found = np.array(table["vector"].to_pylist())
    assert np.allclose(found, vectors.astype(dtype), atol=1e-5 if dtype == "float32" else 2e-3)
    assert table["item"].to_pylist() == texts
    facts = json.loads(table.schema.metadata[b"selfsup"])
    assert facts["model"]["sha256"] == sha256(masked_run / "model" / "model.safetensors")


def test_an_index_holds_unit_vectors_and_names_its_run(masked_run, index, vectors):
    opened = VectorIndex(index)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    assert np.allclose(opened.vectors, vectors / lengths, atol=1e-5)
    values = read_toml(index / "index.toml")
    assert values["model"]["sha256"] == sha256(masked_run / "model" / "model.safetensors")
    assert (values["kind"], values["layer"], values["items"]) == ("exact", "pooled", 40)
    assert (values["normalisation"], values["metric"]) == ("unit", "inner_product")


def test_search_gives_cosines_in_order(index, texts, vectors):
    (first, second) = package.search(index, [texts[3], texts[7]], k=40)
    assert first.query == texts[3]
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for number, answer in ((3, first), (7, second)):
        cosines = unit @ unit[number]
        assert [found.score for found in answer.found] == pytest.approx(
            np.sort(cosines)[::-1].tolist(), abs=1e-5
        )
        assert cosines[answer.found[0].id] == pytest.approx(1, abs=1e-5)
        assert all(texts[found.id] == found.item for found in answer.found)


def test_more_are_asked_for_than_there_are(index):
    (answer,) = package.search(index, "the film was great .", k=1000)
    assert sorted(found.id for found in answer.found) == list(range(40))


def test_queries_go_through_the_layer_of_the_index(masked_run, corpus, texts, tmp_path):
    package.embed(masked_run, corpus.test, tmp_path / "index", layer=0, dtype="float16")
    (answer,) = package.search(tmp_path / "index", texts[0], k=1)
    assert answer.found[0].score == pytest.approx(1, abs=2e-3)
    assert read_toml(tmp_path / "index" / "index.toml")["layer"] == 0


def test_one_item(masked_run, lines, tmp_path):
    package.embed(masked_run, lines("the film was great ."), tmp_path / "one")
    (answer,) = package.search(tmp_path / "one", "the meal was dull .")
    assert [(found.id, found.item) for found in answer.found] == [(0, "the film was great .")]
    with pytest.raises(DataError, match="recall needs 2 items at least, here is 1"):
        package.index_recall(tmp_path / "one")


def cut_after(monkeypatch, calls: int) -> list[int]:
    """Stops the embedding after so many parts; the list holds the sizes of what was embedded."""
    whole, done = Model.embed, []

    def embed(self, items, *more):
        if len(done) == calls:
            raise KeyboardInterrupt
        done.append(len(items))
        return whole(self, items, *more)

    monkeypatch.setattr(Model, "embed", embed)
    return done


@pytest.mark.parametrize("name", ["v.npy", "v.parquet", "index"])
def test_a_cut_embedding_goes_on_and_gives_equal_bytes(masked_run, corpus, tmp_path, name):
    for folder in ("whole", "cut"):
        (tmp_path / folder).mkdir()
    package.embed(masked_run, corpus.test, tmp_path / "whole" / name)
    with pytest.MonkeyPatch.context() as patch:
        cut_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            package.embed(masked_run, corpus.test, tmp_path / "cut" / name)
    assert [path.name for path in (tmp_path / "cut").iterdir()] == [f"{name}.parts"]
    with pytest.MonkeyPatch.context() as patch:
        done = cut_after(patch, 9)
        package.embed(masked_run, corpus.test, tmp_path / "cut" / name)
    assert done == [8]
    whole = [path for path in sorted((tmp_path / "whole").rglob("*")) if path.is_file()]
    assert len(whole) == {"v.npy": 2, "v.parquet": 1, "index": 4}[name]
    for path in whole:
        same = tmp_path / "cut" / path.relative_to(tmp_path / "whole")
        assert path.read_bytes() == same.read_bytes()
    assert not (tmp_path / "cut" / f"{name}.parts").exists()


def test_two_workers_go_on_where_one_was_stopped_and_give_equal_bytes(
    masked_run, corpus, tmp_path, monkeypatch
):
    out, write = tmp_path / "two.npy", searching.write_npy
    times: list[dict] = []

    def note():
        times.append({p: p.stat().st_mtime_ns for p in out.parent.glob("two.npy.parts/0*/*")})

    def noted(path, parts):
        note()
        write(path, parts)

    package.embed(masked_run, corpus.test, tmp_path / "one.npy")
    with pytest.MonkeyPatch.context() as patch:
        cut_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            package.embed(masked_run, corpus.test, out)
    note()
    monkeypatch.setattr(searching, "write_npy", noted)
    assert package.embed(masked_run, corpus.test, out, jobs=2).rows == 40
    assert [len(files) for files in times] == [3, 9]
    assert times[1].items() >= times[0].items()
    one, two = (np.load(tmp_path / f"{name}.npy") for name in ("one", "two"))
    assert np.allclose(one, two, rtol=0, atol=1e-5)  # bytes differ with the number of threads
    one, two = ((tmp_path / f"{name}.items.jsonl").read_bytes() for name in ("one", "two"))
    assert one == two


def test_a_part_that_fails_is_named_and_the_others_are_kept(
    masked_run, corpus, tmp_path, monkeypatch
):
    whole = Model.embed

    def embed(self, items, *more):
        if len(items) == 8:
            raise DataError("together they are too much")
        return whole(self, items, *more)

    monkeypatch.setattr(Model, "embed", embed)
    with pytest.raises(
        DataError,
        match=r"1 of 3 shards failed twice: items 33 to 40 \(.*test.csv:34 to .*test.csv:41\); "
        r"what was made is kept.*together they are too much",
    ):
        package.embed(masked_run, corpus.test, tmp_path / "v.npy")
    assert [path.name for path in sorted((tmp_path / "v.npy.parts").iterdir())] == [
        *("00000", "00001")
    ]


def test_a_worker_that_sees_another_run_is_refused(masked_run):
    weights = sha256(masked_run / "model" / "model.safetensors")
    assert vector_parts._loaded(vector_parts.Origin(str(masked_run), weights)).encoder.dim == 32
    with pytest.raises(CheckpointError, match=rf"sha256 is {weights[:12]}\.\.\. for this worker"):
        vector_parts._loaded(vector_parts.Origin(str(masked_run), "0" * 64))


def test_a_part_whose_items_or_form_changed_is_made_again(masked_run, texts, lines, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        cut_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            package.embed(masked_run, lines(*texts), tmp_path / "v.npy")
    texts = [*texts[:20], "the trip was awful .", *texts[21:]]
    with pytest.MonkeyPatch.context() as patch:
        done = cut_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            package.embed(masked_run, lines(*texts), tmp_path / "v.npy", layer=0)
        assert done == [16, 16]
        done.clear()
        package.embed(masked_run, lines(*texts), tmp_path / "v.npy", layer=0)
        assert done == [8]
    expected = package.load(masked_run).embed(texts, layer=0)
    assert np.allclose(np.load(tmp_path / "v.npy"), expected, atol=1e-5)


def test_bad_items_are_named_and_the_others_keep_their_numbers(
    masked_run, texts, lines, tmp_path, capsys
):
    many = [*texts, *texts[:20]]
    many[17] = ""
    many[18] = " ".join(texts)
    package.embed(masked_run, lines(*many), tmp_path / "v.npy", batch_size=4)
    said = capsys.readouterr().err
    assert "lines.txt: 1 of 60 items cannot be used" in said
    assert "lines.txt:18: empty: it has no token" in said
    assert said.count("items were cut") == 1
    items = items_of(tmp_path / "v.items.jsonl")
    assert [item["id"] for item in items] == [i for i in range(60) if i != 17]
    expected = package.load(masked_run).embed([text for text in many if text])
    assert np.allclose(np.load(tmp_path / "v.npy"), expected, atol=1e-5)


def test_data_without_items_or_with_bad_ones_alone(masked_run, lines, tmp_path):
    with pytest.raises(DataError, match=r"lines.txt: no item to embed is there"):
        package.embed(masked_run, lines(), tmp_path / "v.npy")
    with pytest.raises(DataError, match="2 of 2 items cannot be used"):
        package.embed(masked_run, lines("", " "), tmp_path / "v.npy")
    assert not (tmp_path / "v.npy").exists()


def test_vectors_that_are_not_finite_are_bad_items(masked_run, corpus, tmp_path, monkeypatch):
    whole = Model.embed

    def embed(self, items, *more):
        vectors = whole(self, items, *more)
        vectors[3, 5] = 1e6  # fits into float32, not into float16
        return vectors

    monkeypatch.setattr(Model, "embed", embed)
    assert package.embed(masked_run, corpus.test, tmp_path / "v.npy").rows == 40
    with pytest.raises(DataError, match=r"3 of 40 items.*test.csv:5: .*not finite in float16"):
        package.embed(masked_run, corpus.test, tmp_path / "v.npy", dtype="float16")


def test_a_query_that_is_not_finite_or_of_another_width_is_refused(index):
    opened = VectorIndex(index)
    with pytest.raises(DataError, match="not finite"):
        opened.search(np.full((1, 32), np.nan, np.float32))
    with pytest.raises(DataError, match=r"shape \(1, 31\); expected \(n, 32\)"):
        opened.search(np.ones((1, 31), np.float32))


def test_recall(masked_run, corpus, index, tmp_path):
    exact = package.index_recall(index, k=5)
    assert (exact.recall, exact.k, exact.queries, exact.effort) == (1.0, 5, 40, 0)
    assert package.index_recall(index, k=100, queries=7).k == 39
    with pytest.raises(ConfigError, match="effort is for ivf and hnsw"):
        package.index_recall(index, effort=3)
    package.embed(masked_run, corpus.text, tmp_path / "ivf", index="ivf")
    poor, full = (package.index_recall(tmp_path / "ivf", effort=n) for n in (1, 15))
    assert poor.recall < full.recall == 1.0
    assert (poor.effort, poor.queries) == (1, 600)
    assert read_toml(tmp_path / "ivf" / "index.toml")["faiss"]["clusters"] == 15
    (answer,) = package.search(tmp_path / "ivf", "the film was dull .", k=3, effort=15)
    package.embed(masked_run, corpus.text, tmp_path / "ivf")  # takes the old one's place
    (same,) = package.search(tmp_path / "ivf", "the film was dull .", k=3)
    assert [f.score for f in answer.found] == pytest.approx([f.score for f in same.found], abs=1e-6)


def test_a_run_with_other_weights_is_refused(masked_run, texts, lines, tmp_path):
    run, index = tmp_path / "run", tmp_path / "index"
    shutil.copytree(masked_run, run)
    package.embed(run, lines(*texts), index)
    file, config = run / "model" / "model.safetensors", run / "model" / "config.toml"
    before = sha256(file)
    save_file({name: value + 1 for name, value in load_file(file).items()}, file)
    config.write_text(config.read_text().replace(before, sha256(file)))
    with pytest.raises(CheckpointError) as refused:
        package.search(index, "the film")
    assert before[:12] in str(refused.value)
    assert sha256(file)[:12] in str(refused.value)
    shutil.rmtree(run)
    with pytest.raises(CheckpointError, match="which is not there; put it back"):
        package.search(index, "the film")


def test_an_index_that_moved_with_its_run_is_found(masked_run, texts, lines, tmp_path):
    shutil.copytree(masked_run, tmp_path / "old" / "run")
    package.embed(tmp_path / "old" / "run", lines(*texts), tmp_path / "old" / "index")
    (tmp_path / "old").rename(tmp_path / "new")
    assert len(package.search(tmp_path / "new" / "index", "the film", k=2)[0].found) == 2


def test_a_damaged_index_is_refused(index, tmp_path):
    copy = tmp_path / "index"
    shutil.copytree(index, copy)
    assert [*doctor.examine(str(copy))] == ["index          whole, exact, 40 vectors of 32 numbers"]
    (copy / "items.jsonl").write_bytes((copy / "items.jsonl").read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"items.jsonl: damaged"):
        [*doctor.examine(str(copy))]
    (copy / "vectors.npy").write_bytes((copy / "vectors.npy").read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="damaged"):
        VectorIndex(copy)
    with pytest.raises(CheckpointError, match="no index is there"):
        VectorIndex(tmp_path)


def test_the_command_line(selfsup, index, texts, tmp_path, monkeypatch):
    answer = selfsup("search", index, texts[5], "--k", 3)
    assert answer.code == 0, answer.err
    rows = [line.split("\t") for line in answer.out.splitlines()]
    assert [row[0] for row in rows] == ["1", "2", "3"]
    assert float(rows[0][1]) == pytest.approx(1, abs=1e-4)
    assert rows[0][2] == texts[5]
    assert rows[0][3].rpartition(":")[0].endswith("test.csv")
    (tmp_path / "questions.txt").write_text(f"{texts[1]}\n{texts[2]}\n")
    answer = selfsup("search", index, "--queries", tmp_path / "questions.txt", "--k", 2)
    assert [line.split("\t")[:2] for line in answer.out.splitlines()] == [
        *(["1", "1"], ["1", "2"], ["2", "1"], ["2", "2"])
    ]
    answer = selfsup("search", index, texts[5], "--k", 2, "--json")
    found = json.loads(answer.out)
    assert found["query"] == texts[5]
    assert [result["rank"] for result in found["results"]] == [1, 2]
    monkeypatch.chdir(tmp_path)
    answer = selfsup("search", index, "--recall", "--k", 4, "--record", "recall")
    assert "recall\t1.0000\nk\t4\nqueries\t40\n" in answer.out
    recorded = json.loads((tmp_path / "docs" / "results" / "recall.json").read_text())
    assert recorded["scores"]["recall"] == 1.0
    assert recorded["index"] == {"kind": "exact", "items": 40, "dim": 32, "dtype": "float32"}


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((), 2, "nothing to search for"),
        (("the film", "--k", 0), 2, "k must be at least 1, got 0"),
        (("the film", "--effort", 2), 2, "effort is for ivf and hnsw"),
        (("the film", "--record", "x"), 2, "--record is for --recall"),
        (("the film", "--recall"), 2, "it takes no query"),
        (("--recall", "--sample", 0), 2, "queries must be at least 1, got 0"),
        (("the film", ""), 3, "item 1 is empty"),
    ],
)
def test_wrong_use_of_search(selfsup, index, arguments, code, words):
    answer = selfsup("search", index, *arguments)
    assert (answer.code, answer.out) == (code, "")
    assert words in answer.err


@pytest.mark.parametrize(
    ("out", "more", "code", "words"),
    [
        ("v.csv", (), 2, "out must end in .npy or .parquet"),
        ("v.npy", ("--index", "ivf"), 2, "index = 'ivf' is for a folder"),
        ("index", ("--index", "flat"), 2, "no kind of index 'flat'"),
        ("v.npy", ("--dtype", "int8"), 2, "dtype must be float32 or float16, got 'int8'"),
        ("v.npy", ("--layer", 2), 2, "layer must be from 0 to 1, got 2"),
        ("v.npy", ("--engine", "spark"), 2, "invalid choice: 'spark'"),
        ("v.npy", ("--jobs", -1), 2, "jobs must be at least 1, got -1"),
        ("folder", (), 5, "is a folder with other things"),
        ("folder/file", (), 5, "is a file, and an index is a folder"),
    ],
)
def test_wrong_use_of_embed(selfsup, masked_run, corpus, tmp_path, out, more, code, words):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("mine")
    answer = selfsup("embed", masked_run, "--data", corpus.test, "--out", tmp_path / out, *more)
    assert (answer.code, answer.out) == (code, "")
    assert words in answer.err
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "file"]
