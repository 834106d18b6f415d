import gzip
import json
import lzma
import math
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pyarrow
import pytest
import torch
import zstandard
from pyarrow import parquet

from selfsup.data import table
from selfsup.data.dataset import Prepared
from selfsup.data.table import Config, TablePreprocessor, prepare, read_labels
from selfsup.data.table_columns import CategoricalColumn, NumericColumn, to_normal
from selfsup.data.table_files import held_out, parsed
from selfsup.errors import ConfigError, DataError

CITIES = ("Bonn", "Rom", "Oslo")


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def people(count: int, first: int = 0) -> list[list[str]]:
    """id, age (all different), height, city: the height of every 7th and a city of every 11th is
    missing."""
    rows = []
    for i in range(first, first + count):
        height = "" if i % 7 == 3 else f"{1.5 + (i * 37 % 50) / 100:.2f}"
        city = "?" if i % 11 == 5 else CITIES[i * i % 3]
        rows.append([f"p{i}", str(20 + i), height, city])
    return rows


def csv_of(rows: list[list[str]], header: str = "id,age,height,city") -> str:
    return "\n".join([header, *map(",".join, rows), ""])


def ages(prepared: Prepared, side: str) -> list[int]:
    """The ages behind the first encoded column, which tell the rows of `people` apart."""
    column = prepared.preprocessor.columns[0]
    return [round(float(z) * column.std + column.mean) for z in getattr(prepared, side).rows[:, 0]]


# Encoding


def test_rows_are_encoded_as_by_hand(tmp_path):
    rows = people(60)
    prepared = prepare(Config(leave_out=("id",)), write(tmp_path, "a.csv", csv_of(rows)))
    train, valid = ages(prepared, "train"), ages(prepared, "valid")
    assert sorted(train + valid) == [20 + i for i in range(60)]
    by_age = {int(row[1]): row for row in rows}
    heights = [float(by_age[age][2]) for age in train if by_age[age][2]]
    mean = sum(heights) / len(heights)
    std = math.sqrt(sum((h - mean) ** 2 for h in heights) / len(heights))
    cities = [by_age[age][3] for age in train if by_age[age][3] != "?"]
    ranked = sorted(set(cities), key=lambda c: (-cities.count(c), c))
    for side, known in (("train", train), ("valid", valid)):
        for got, age in zip(getattr(prepared, side).rows.tolist(), known, strict=True):
            height, city = by_age[age][2:]
            assert got[1] == pytest.approx((float(height) - mean) / std if height else 0, abs=1e-5)
            one_hot = [float(city == c) for c in ranked] + [float(city == "?"), 0.0]
            assert got[2:-1] == one_hot
            assert got[-1] == float(not height)
    spec = prepared.spec
    assert spec.columns == ("age", "height", "city")
    assert spec.source == (0, 1, *[2] * (len(ranked) + 2), 1)
    assert prepared.train.rows.shape[1] == len(spec.source)


def test_facts_count_rows_columns_and_what_is_missing(tmp_path):
    rows = [*people(60), *people(3)]
    facts = prepare(Config(leave_out=("id",)), write(tmp_path, "a.csv", csv_of(rows))).facts
    assert facts["rows"] == 63 == facts["train_rows"] + facts["valid_rows"]
    assert (facts["columns"], facts["numeric_columns"], facts["categorical_columns"]) == (3, 2, 1)
    assert facts["missing_cells"] == sum(cell in ("", "?") for row in rows for cell in row)
    assert (facts["duplicates"], facts["bad_items"], facts["tokenizer"]) == (3, 0, "")
    assert json.loads(json.dumps(facts)) == facts


def test_only_the_training_part_is_fitted(tmp_path):
    rows = people(80)
    config = Config(leave_out=("id",))
    before = prepare(config, write(tmp_path, "a.csv", csv_of(rows)))
    valid = set(ages(before, "valid"))
    place = next(i for i, row in enumerate(rows) if int(row[1]) in valid)
    others = [["x", str(1000 + k), "99.5", "Mars"] for k in range(40)]
    for other in others:  # another content may fall on the other side: take one that does not
        rows[place] = other
        after = prepare(config, write(tmp_path, "a.csv", csv_of(rows)))
        if int(other[1]) in ages(after, "valid"):
            break
    else:
        pytest.fail("none of 40 rows was held out")
    assert after.preprocessor.columns == before.preprocessor.columns
    assert torch.equal(after.train.rows, before.train.rows)
    assert after.facts["fingerprint"] == before.facts["fingerprint"]
    assert not torch.equal(after.valid.rows, before.valid.rows)


def test_the_fingerprint_tells_data_and_settings_apart(tmp_path):
    path = write(tmp_path, "a.csv", csv_of(people(40)))
    prints = {
        prepare(config, path).facts["fingerprint"]
        for config in (
            Config(leave_out=("id",)),
            Config(leave_out=("id", "height")),
            Config(leave_out=("id",), scale="quantile"),
        )
    }
    again = prepare(Config(leave_out=("id",)), path).facts["fingerprint"]
    write(tmp_path, "a.csv", csv_of(people(41)))
    other = prepare(Config(leave_out=("id",)), path).facts["fingerprint"]
    assert len(prints) == 3
    assert again in prints
    assert other not in prints


def test_constant_columns_are_zero_whatever_comes_later(tmp_path):
    path = write(tmp_path, "a.csv", "a,b\n" + "".join(f"{i},0.1\n" for i in range(30)))
    prepared = prepare(Config(), path)
    assert not prepared.train.rows[:, 1].any()
    assert prepared.preprocessor.encode([{"a": 1, "b": 7.5}])[0, 1] == 0


def test_missing_values_without_an_indicator_where_training_had_none():
    numeric = NumericColumn("a", mean=4.0, std=2.0, missing=False)
    kinds = CategoricalColumn("b", ("x",), missing=False)
    got = TablePreprocessor((numeric, kinds)).encode([["8", "x"], ["NA", "null"], [None, math.nan]])
    assert got.tolist() == [[2, 1, 0], [0, 0, 1], [0, 0, 1]]
    assert got.dtype == np.float32


@pytest.mark.parametrize("cell", ["", "NA", "NaN", "nan", "null", "?", " ? ", None, math.nan])
def test_what_counts_as_missing(cell):
    assert parsed(cell) is None


@pytest.mark.parametrize("cell", ["abc", "1_000", "inf", "1,5", "0x10", math.inf])
def test_what_is_no_number(cell):
    assert isinstance(parsed(cell), str)


def test_rare_and_unseen_categories_share_a_column(tmp_path):
    kinds = ["a"] * 50 + ["b"] * 30 + ["c"] * 2 + ["d"]
    content = "".join(f"{i},{kind}\n" for i, kind in enumerate(kinds))
    path = write(tmp_path, "a.csv", "n,kind\n" + content)
    prepared = prepare(Config(max_categories=2), path)
    assert prepared.preprocessor.columns[1] == CategoricalColumn("kind", ("a", "b"), False)
    got = prepared.preprocessor.encode([[0, k] for k in ("a", "b", "c", "d", "never seen", "")])
    assert got[:, 1:].argmax(1).tolist() == [0, 1, 2, 2, 2, 2]
    assert got[:, 1:].sum(1).tolist() == [1] * 6


def test_numbers_that_name_categories(tmp_path):
    content = "".join(f"{i},{i % 3 + 1}\n" for i in range(60))
    path = write(tmp_path, "a.csv", "n,kind\n" + content)
    column = prepare(Config(categorical=("kind",)), path).preprocessor.columns[1]
    assert set(column.values) == {"1", "2", "3"}
    assert (column.encode([parsed(c) for c in (2, "2", 2.0, "2.0")]) == column.encode([2.0])).all()


# Text in columns of numbers


def test_a_text_in_a_numeric_column_is_counted_and_named(tmp_path, capsys):
    lines = [f"{i},{i * i % 17}" for i in range(200)]
    lines[41] = "41,many"
    path = write(tmp_path, "a.csv", "\n".join(["a,b", *lines, ""]))
    prepared = prepare(Config(), path)
    assert prepared.facts["bad_items"] == 1
    named = f"{path}:43: column 'b' is numeric and holds 'many'"
    assert prepared.facts["bad_item_examples"] == [named]
    assert named in capsys.readouterr().err
    assert sorted(ages(prepared, "train") + ages(prepared, "valid")) == [
        i for i in range(200) if i != 41
    ]


def test_too_many_texts_in_numeric_columns(tmp_path):
    lines = [[str(i), str(i + 1), str(i + 2)] for i in range(200)]
    for i in range(9):  # 1.5% of each column, 4.5% of the rows
        lines[20 * i][i % 3] = "many"
    path = write(tmp_path, "a.csv", csv_of(lines, "a,b,c"))
    with pytest.raises(DataError, match=r"9 of 200 items.*a\.csv:2: column 'a'.*More than 2%"):
        prepare(Config(), path)


def test_a_column_that_is_mostly_numbers_must_be_decided(tmp_path):
    lines = [f"{i},{'many' if i % 20 == 7 else i}" for i in range(200)]
    path = write(tmp_path, "a.csv", "\n".join(["a,b", *lines, ""]))
    with pytest.raises(DataError, match=r"'b': 9\d\.\d% of the cells are numbers.*'many'"):
        prepare(Config(), path)
    assert prepare(Config(leave_out=("b",)), path).facts["bad_items"] == 0
    chosen = prepare(Config(categorical=("b",)), path).facts
    assert (chosen["numeric_columns"], chosen["categorical_columns"]) == (1, 1)


# Scaling by quantiles


def slow_normal(x: float, quantiles: list[float]) -> float:
    """The middle of the first and the last rank at which the piecewise linear curve passes x."""
    steps = len(quantiles) - 1
    ranks = [k / steps for k, q in enumerate(quantiles) if q == x]
    for k in range(steps):
        low, high = quantiles[k], quantiles[k + 1]
        if low < x < high:
            ranks.append((k + (x - low) / (high - low)) / steps)
    if not ranks:
        ranks = [0.0 if x < quantiles[0] else 1.0]
    margin = 0.5 / len(quantiles)
    rank = min(max((min(ranks) + max(ranks)) / 2, margin), 1 - margin)
    return NormalDist().inv_cdf(rank)


def test_ranks_become_normal_deviates():
    quantiles = [0.0, 0.0, 0.0, 1.0, 2.0, 10.0, 10.0, 1e6]
    values = [-5.0, 0.0, 0.5, 1.0, 3.0, 10.0, 500.0, 1e6, 1e9]
    got = to_normal(np.array(values), np.array(quantiles))
    np.testing.assert_allclose(got, [slow_normal(x, quantiles) for x in values], atol=1e-9)


def test_heavy_tails_become_normal(tmp_path):
    draw = np.random.Generator(np.random.PCG64(0)).lognormal(0, 3, 3000)
    path = tmp_path / "a.npy"
    np.save(path, draw[:, None])
    plain, ranked = (prepare(Config(scale=s), path) for s in ("standard", "quantile"))
    assert len(ranked.preprocessor.columns[0].quantiles) == 1000
    assert plain.train.rows.max() > 15
    assert ranked.train.rows.abs().max() < 3.3
    assert abs(ranked.train.rows.mean()) < 0.01
    assert abs(ranked.train.rows.std() - 1) < 0.01


# Splitting


def test_equal_rows_fall_on_one_side_and_more_rows_move_none(tmp_path):
    rows = people(60)
    config = Config(leave_out=("id",), valid_fraction=0.3)
    alone = prepare(config, write(tmp_path, "a.csv", csv_of(rows)))
    twice = prepare(config, write(tmp_path, "a.csv", csv_of([*people(90), *rows])))
    assert 5 <= len(alone.valid) <= 31
    assert set(ages(alone, "valid")) <= set(ages(twice, "valid"))
    assert not set(ages(twice, "valid")) & set(ages(twice, "train"))


def test_the_most_usual_row_is_learned_from():
    kinds = [1] * 50 + [2] * 10 + [2**63 + i for i in range(40)]  # 1 and 2 lie below the threshold
    chosen = held_out(np.array(kinds, dtype=np.uint64), 0.1, "rows")
    assert chosen.tolist() == [kind == 2 for kind in kinds]


def test_a_side_is_never_empty():
    low, high = np.array([3, 5], dtype=np.uint64), np.array([2**63, 2**63 + 1], dtype=np.uint64)
    for digests in (low, high):
        assert sorted(held_out(digests, 0.1, "rows").tolist()) == [False, True]
    with pytest.raises(DataError, match="two different"):
        held_out(np.array([7, 7], dtype=np.uint64), 0.1, "rows")


# Files


def test_every_format_gives_the_same_rows(tmp_path):
    rows = people(50)
    text = csv_of(rows)
    tabs = text.replace(",", "\t")
    packed = {
        "a.csv.gz": gzip.compress(text.encode()),
        "a.csv.xz": lzma.compress(text.encode()),
        "a.tsv": tabs,
        "a.tsv.zst": zstandard.compress(tabs.encode()),
        "a.txt": text,
        "b.txt": tabs,
        "c.csv": text.replace("\n", "\r\n").replace("Bonn", '"Bonn"'),
    }
    config = Config(leave_out=("id",))
    expected = prepare(config, write(tmp_path, "a.csv", text)).train.rows
    for name, content in packed.items():
        assert torch.equal(prepare(config, write(tmp_path, name, content)).train.rows, expected)
    columns = dict(zip(("id", "age", "height", "city"), zip(*rows, strict=True), strict=True))
    typed = {
        **columns,
        "age": [int(age) for age in columns["age"]],
        "height": [float(h) if h else None for h in columns["height"]],
    }
    parquet.write_table(pyarrow.table(typed), tmp_path / "a.parquet")
    assert torch.equal(prepare(config, tmp_path / "a.parquet").train.rows, expected)


def test_without_a_header_columns_are_numbers(tmp_path):
    lines = "\n".join(",".join(row) for row in people(30))
    for name in ("a.csv", "a.txt"):
        prepared = prepare(
            Config(header=False, leave_out=("1",)), write(tmp_path, name, lines + "\n")
        )
        assert prepared.spec.columns == ("2", "3", "4")
        assert prepared.facts["rows"] == 30


def test_arrays(tmp_path):
    rows = np.random.Generator(np.random.PCG64(0)).normal(3, 2, (100, 4))
    np.save(tmp_path / "a.npy", rows)
    np.savez(tmp_path / "a.npz", X=rows, other=rows + 1, y=np.arange(100) % 2)
    plain = prepare(Config(), tmp_path / "a.npy")
    assert plain.spec.columns == ("1", "2", "3", "4")
    assert torch.equal(prepare(Config(), tmp_path / "a.npz").train.rows, plain.train.rows)
    mean = prepare(Config(array="other"), tmp_path / "a.npz").preprocessor.columns[0].mean
    assert 3.5 < mean < 4.5
    with pytest.raises(DataError, match=r"no array 'Z'.*known: X, other, y"):
        prepare(Config(array="Z"), tmp_path / "a.npz")
    np.save(tmp_path / "flat.npy", rows[0])
    with pytest.raises(DataError, match=r"\(row, column\)"):
        prepare(Config(), tmp_path / "flat.npy")


def test_pickles_are_never_read(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[print, 1]], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="not arrays of numbers"):
        prepare(Config(), tmp_path / "a.npy")


def test_folders_globs_and_lists_are_one_table(tmp_path, capsys):
    for name, first in (("a.csv", 0), ("b.csv", 30)):
        write(tmp_path, name, csv_of(people(30, first)))
    write(tmp_path, "notes.md", "x")
    config = Config(leave_out=("id",))
    sources = (tmp_path, str(tmp_path / "*.csv"), [tmp_path / "a.csv", tmp_path / "b.csv"])
    prints = {prepare(config, source).facts["fingerprint"] for source in sources}
    assert len(prints) == 1
    assert "notes.md" in capsys.readouterr().err
    assert prepare(config, tmp_path).facts["rows"] == 60
    write(tmp_path, "b.csv", csv_of(people(30), "id,age,size,city"))
    with pytest.raises(DataError, match=r"b\.csv: columns id, age, size, city, but .*a\.csv"):
        prepare(config, tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "a,b\n1,2\n3\n", r"a\.csv:3: 1 cells, but 2 columns"),
        ("a.txt", "a,b\n1,2\n3\n", r"a\.txt:3: 1 cells, but 2 columns"),
        ("a.csv", "a,b\n", "no row"),
        ("a.csv", "", "empty"),
        ("a.csv", "a,b\n1,2\n1,2\n", "two different"),
        ("a.parquet", "a,b", "not a Parquet file"),
        ("a.npz", "a,b", "not arrays"),
        ("a.dat", "a,b", "files of other kinds"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message):
        prepare(Config(), write(tmp_path, name, content))


def test_only_normal_rows(tmp_path):
    rows = [[str(i), "attack" if i % 4 == 0 else "normal"] for i in range(100)]
    path = write(tmp_path, "a.csv", csv_of(rows, "n,kind"))
    prepared = prepare(Config(normal="kind=normal"), path)
    assert prepared.spec.columns == ("n",)
    assert (prepared.facts["rows"], prepared.facts["left_out_by_normal"]) == (75, 25)
    assert not [n for n in ages(prepared, "train") if n % 4 == 0]
    np.savez(tmp_path / "a.npz", X=np.arange(100.0)[:, None], y=np.arange(100) % 4 == 0)
    arrays = prepare(Config(normal="y=0"), tmp_path / "a.npz")
    assert torch.equal(arrays.train.rows, prepared.train.rows)
    with pytest.raises(DataError, match=r"no row has that value; found: attack, normal"):
        prepare(Config(normal="kind=usual"), path)
    with pytest.raises(ConfigError, match="did you mean 'kind'"):
        prepare(Config(normal="kinds=normal"), path)


@pytest.mark.parametrize(
    "values",
    [
        {"valid_fraction": 0.0},
        {"valid_fraction": 0.6},
        {"max_categories": 0},
        {"normal": "label"},
        {"normal": "=1"},
    ],
)
def test_wrong_values(values):
    with pytest.raises(ConfigError, match=f"data.{next(iter(values))}"):
        Config(**values)


def test_columns_that_are_not_there(tmp_path):
    path = write(tmp_path, "a.csv", csv_of(people(30)))
    with pytest.raises(ConfigError, match=r"data\.leave_out: no column 'ids'; did you mean 'id'"):
        prepare(Config(leave_out=("ids",)), path)
    with pytest.raises(ConfigError, match="no column to learn from"):
        prepare(Config(leave_out=("id", "age", "height", "city")), path)


# Preprocessor


@pytest.mark.parametrize("scale", ["standard", "quantile"])
def test_a_saved_preprocessor_encodes_to_the_last_bit(tmp_path, scale):
    path = write(tmp_path, "a.csv", csv_of(people(60)))
    prepared = prepare(Config(leave_out=("id",), scale=scale), path)
    prepared.preprocessor.save(tmp_path / "model")
    loaded = table.load_preprocessor(tmp_path / "model")
    assert loaded.columns == prepared.preprocessor.columns
    assert loaded.spec == prepared.spec
    items = [dict(zip(("id", "age", "height", "city"), row, strict=True)) for row in people(60)]
    assert np.array_equal(loaded.encode(items), prepared.preprocessor.encode(items))
    encoded = {tuple(row) for row in prepared.preprocessor.encode(items).tolist()}
    assert {tuple(row) for row in prepared.train.rows.tolist()} <= encoded


def test_a_damaged_preprocessor(tmp_path):
    with pytest.raises(DataError, match=r"preprocessor\.json: not the preprocessor"):
        table.load_preprocessor(tmp_path)
    (tmp_path / "preprocessor.json").write_text('{"columns": [{"mean": 1.0}]}')
    with pytest.raises(DataError, match=r"preprocessor\.json: not the preprocessor"):
        table.load_preprocessor(tmp_path)


SMALL = TablePreprocessor(
    (NumericColumn("age", 40.0, 10.0, True), CategoricalColumn("city", ("Bonn", "Rom"), True))
)


def test_items_become_batches_in_their_order():
    items = [{"age": 30 + i, "city": "Rom", "id": "passed over"} for i in range(5)]
    batches = list(SMALL.batches(iter(items), 2))
    assert [numbers for numbers, _ in batches] == [[0, 1], [2, 3], [4]]
    rows = torch.cat([batch["row"] for _, batch in batches])
    assert rows.dtype == torch.float32
    expected = [[(i - 10) / 10, 0, 1, 0, 0, 0] for i in range(5)]
    torch.testing.assert_close(rows, torch.tensor(expected))
    lists = [[30 + i, "Rom"] for i in range(5)]
    assert torch.equal(next(iter(SMALL.batches(lists, 9)))[1]["row"], rows)
    assert SMALL.limited(3) is SMALL


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"age": 1, "town": "Rom"}, r"item 3: no column 'city'.*data.leave_out = \['city'\]"),
        ({"age": "old", "city": "Rom"}, "item 3: column 'age' must be a finite number, got 'old'"),
        ({"age": math.inf, "city": "Rom"}, "item 3: column 'age' must be a finite number"),
        ([1, 2, 3], "item 3: .* not a sequence of 2 cells: age, city"),
        ("1,Rom", "item 3: .* not a sequence of 2 cells"),
    ],
)
def test_items_that_do_not_fit(item, message):
    good = {"age": 1, "city": "Rom"}
    with pytest.raises(DataError, match=message):
        list(SMALL.batches([good, good, good, item], 2))
    with pytest.raises(ConfigError, match="batch_size"):
        list(SMALL.batches([good], 0))


def test_other_data_are_read_as_the_model_reads_them(tmp_path):
    config = Config(leave_out=("id",))
    first = prepare(config, write(tmp_path, "a.csv", csv_of(people(60))))
    first.preprocessor.save(tmp_path / "model")
    other = [[*row[:2], row[2] and "9.9", "Mars"] for row in people(40, 500)]
    path = write(tmp_path, "b.csv", csv_of(other))
    second = prepare(table.with_preprocessor(config, tmp_path / "model"), path)
    assert second.spec == first.spec
    assert second.preprocessor.columns == first.preprocessor.columns
    assert sorted(ages(second, "train") + ages(second, "valid")) == [520 + i for i in range(40)]
    write(tmp_path, "b.csv", csv_of(other, "id,age,size,city"))
    with pytest.raises(DataError, match="no column 'height', which the model reads"):
        prepare(table.with_preprocessor(config, tmp_path / "model"), path)


# Data sets and labels


def test_a_batch_holds_the_rows_of_its_numbers(tmp_path):
    prepared = prepare(Config(), write(tmp_path, "a.csv", csv_of(people(60))))
    batch = prepared.train.batch(np.array([5, 0, 5]))
    assert torch.equal(batch["row"], prepared.train.rows[[5, 0, 5]])
    assert batch["index"].tolist() == [5, 0, 5]
    assert tuple(batch) == prepared.train.fields == ("row", "index")


def test_labels_of_a_table(tmp_path):
    content = "age,class,city\n30,yes,Rom\n40,no,Bonn\n50,yes,Mars\n"
    labelled = read_labels(write(tmp_path, "a.csv", content), "classification")
    assert labelled.items[0] == {"age": "30", "city": "Rom"}
    assert (labelled.labels, labelled.names) == (["yes", "no", "yes"], ("no", "yes"))
    data = SMALL.labelled(labelled, max_length=1)
    batch = data.batch(np.array([2, 1]))
    assert tuple(sorted(batch)) == tuple(sorted(data.fields))
    assert batch["row"].tolist() == [[1, 0, 0, 0, 1, 0], [0, 1, 0, 0, 0, 0]]
    assert batch["label"].tolist() == [1, 0]
    assert batch["label"].dtype == torch.int64
    assert (data.task, data.labels.tolist(), data.truncated) == ("classification", [1, 0, 1], 0)
    assert (data.lengths, len(data)) == (None, 3)


def test_numbers_as_labels(tmp_path):
    path = write(tmp_path, "a.csv", "age,city,price\n30,Rom,1.5\n40,Bonn,-2\n")
    labelled = read_labels(path, "regression", label="price")
    assert (labelled.labels, labelled.names) == ([1.5, -2.0], ())
    label = SMALL.labelled(labelled).batch(np.array([1, 0]))["label"]
    assert label.dtype == torch.float32
    assert label.tolist() == [-2.0, 1.5]


def test_labels_of_a_table_without_a_header(tmp_path):
    path = write(tmp_path, "a.txt", "30,Rom,10,x\n40,Bonn,9,y\n")
    labelled = read_labels(path, "classification", label=3)
    assert labelled.items[1] == {"1": "40", "2": "Bonn", "4": "y"}
    assert labelled.names == ("9", "10")


def test_labels_of_arrays(tmp_path):
    np.savez(tmp_path / "a.npz", X=[[1.0, 2.0], [3.0, 4.0]], y=[0, 1], z=[0.5, 1.0])
    labelled = read_labels(tmp_path / "a.npz", "classification")
    assert labelled.items == [{"1": 1.0, "2": 2.0}, {"1": 3.0, "2": 4.0}]
    assert labelled.labels == ["0", "1"]
    assert read_labels(tmp_path / "a.npz", "regression", label="z").labels == [0.5, 1.0]
    with pytest.raises(DataError, match="no array 'w'"):
        read_labels(tmp_path / "a.npz", "classification", label="w")


@pytest.mark.parametrize(
    ("content", "task", "options", "message"),
    [
        ("a,label\n1,x\n2,?\n", "classification", {}, r"a\.csv:3: the label is missing"),
        ("a,label\n1,x\n2,x\n", "classification", {}, "every label is 'x'"),
        ("a,label\n1,5\n2,x\n", "regression", {}, r"a\.csv:3: .*finite number, got 'x'"),
        ("a,b\n1,5\n2,6\n", "classification", {}, "no label column"),
        ("a,label\n1,x\n2,z\n", "classification", {"names": ("x", "y")}, r"a\.csv:3: label 'z'"),
    ],
)
def test_labels_that_cannot_be_used(tmp_path, content, task, options, message):
    with pytest.raises(DataError, match=message):
        read_labels(write(tmp_path, "a.csv", content), task, **options)


def test_wrong_use_of_labels(tmp_path):
    path = write(tmp_path, "a.csv", "age,city,label\n30,Rom,x\nold,Bonn,y\n")
    with pytest.raises(ConfigError, match="unknown task"):
        read_labels(path, "tagging")
    with pytest.raises(ConfigError, match="leave text"):
        read_labels(path, "classification", text="age")
    with pytest.raises(DataError, match=r"a\.csv: item 1: column 'age'"):
        SMALL.labelled(read_labels(path, "classification"))
