import lzma
import math
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet

from selfsup.data import series
from selfsup.data.series import Config, SeriesPreprocessor, prepare, read_labels, splits
from selfsup.data.series_files import read_ts, split_ends, time_of
from selfsup.data.series_windows import Windows, windows
from selfsup.errors import ConfigError, DataError


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def values(count: int, seed: int = 0) -> np.ndarray:
    """(time, 2): the row number, so that a window says where it comes from, and noise."""
    noise = np.random.Generator(np.random.PCG64(seed)).normal(5, 3, count).round(4)
    return np.stack([np.arange(count, dtype=np.float64), noise], 1)


def csv_of(rows: np.ndarray, header: str = "date,step,load") -> str:
    start = datetime(2016, 7, 1)
    lines = [
        f"{start + timedelta(hours=i)},{','.join('' if math.isnan(v) else repr(v) for v in row)}"
        for i, row in enumerate(rows.tolist())
    ]
    return "\n".join([header, *lines, ""])


def steps(data: Windows, preprocessor: SeriesPreprocessor) -> np.ndarray:
    """(windows, time): the row numbers in every window."""
    batch = data.batch(np.arange(len(data)))["series"].double().numpy()
    return (batch[:, :, 0] * preprocessor.std[0] + preprocessor.mean[0]).round().astype(int)


TS = """# shapes
@problemName Toy
@timeStamps false
@univariate false
@dimensions 2
@equalLength false
@classLabel true walk run
@data
1.0,2.0,3.0:0.5,?,0.7:walk
4,5:-1,1e1:run
6,7,8,9:NaN,1,2,3:walk
"""


# Windows


@pytest.mark.parametrize("stride", [1, 3])
def test_windows_never_leave_their_part(tmp_path, stride):
    path = write(tmp_path, "a.csv", csv_of(values(100)))
    prepared = prepare(Config(window=8, stride=stride), path)
    for data, begin, end in ((prepared.train, 0, 70), (prepared.valid, 70, 80)):
        expected = [list(range(at, at + 8)) for at in range(begin, end, stride) if at + 8 <= end]
        assert steps(data, prepared.preprocessor).tolist() == expected


def test_windows_never_cross_from_one_file_into_the_next(tmp_path):
    for name, count, offset in (("a.csv", 40, 0), ("b.csv", 60, 1000)):
        write(tmp_path, name, csv_of(values(count) + np.array([offset, 0])))
    prepared = prepare(Config(window=5, splits=(0.5, 0.25, 0.25)), tmp_path)
    for data, runs in (
        (prepared.train, [(0, 20), (1000, 1030)]),
        (prepared.valid, [(20, 30), (1030, 1045)]),
    ):
        got = steps(data, prepared.preprocessor)
        assert (np.diff(got, axis=1) == 1).all()
        assert got[:, 0].tolist() == [i for a, b in runs for i in range(a, b - 4)]
    assert (prepared.facts["series"], prepared.facts["rows"]) == (2, 100)
    assert prepared.facts["series_too_short"] == 0


def test_a_series_that_gives_no_window_is_counted_and_said(tmp_path, capsys):
    for name, count in (("a.csv", 40), ("b.csv", 9)):
        write(tmp_path, name, csv_of(values(count)))
    prepared = prepare(Config(window=5, splits=(0.5, 0.25, 0.25)), tmp_path)
    assert prepared.facts["series_too_short"] == 1
    assert "1 of 2 series have fewer than data.window = 5 rows" in capsys.readouterr().err


def test_items_of_a_table_are_its_windows_side_by_side(tmp_path):
    rows = values(13)
    path = write(tmp_path, "a.csv", csv_of(rows, "date,step,load"))
    fitted = SeriesPreprocessor(("load",), (0.0,), (1.0,), length=5)
    places, items = zip(*series.read_items(path, None, fitted), strict=True)
    assert places == (f"{path}:2", f"{path}:7", f"{path}:12")
    assert [len(item) for item in items] == [5, 5, 3]
    assert np.array_equal(np.concatenate(items), rows[:, 1:])


def test_a_batch_holds_the_windows_of_its_numbers(tmp_path):
    rows = values(60)
    prepared = prepare(Config(window=6, stride=2), write(tmp_path, "a.csv", csv_of(rows)))
    train = rows[:42]
    batch = prepared.train.batch(np.array([7, 0]))
    assert tuple(batch) == prepared.train.fields == ("series", "index")
    assert batch["index"].tolist() == [7, 0]
    assert batch["series"].dtype == torch.float32
    for got, begin in zip(batch["series"].numpy(), (14, 0), strict=True):
        for t in range(6):
            for c in range(2):
                mean = sum(train[:, c]) / 42
                std = math.sqrt(sum((x - mean) ** 2 for x in train[:, c]) / 42)
                assert got[t, c] == pytest.approx((rows[begin + t, c] - mean) / std, abs=1e-5)
    assert prepared.spec.channels == 2
    assert prepared.spec.length == 6
    assert prepared.train.lengths is None


def test_independent_channels_are_examples_of_their_own(tmp_path):
    rows = values(60)
    rows[5, 1] = math.nan
    path = write(tmp_path, "a.csv", csv_of(rows))
    joint = prepare(Config(window=6, stride=4), path)
    apart = prepare(Config(window=6, stride=4, independent=True), path)
    assert (apart.spec.channels, apart.spec.length) == (1, 6)
    for part in ("train", "valid"):
        both, single = getattr(joint, part), getattr(apart, part)
        assert len(single) == 2 * len(both) > 0
        expected = both.batch(np.arange(len(both)))["series"]
        got = single.batch(np.arange(len(single)))["series"]
        for channel in range(2):  # all windows of the first channel, then those of the second
            of_channel = got[channel * len(both) : (channel + 1) * len(both), :, 0]
            assert torch.equal(of_channel.isnan(), expected[:, :, channel].isnan())
            assert torch.equal(of_channel.nan_to_num(), expected[:, :, channel].nan_to_num())
    apart.preprocessor.save(tmp_path / "model")
    loaded = series.load_preprocessor(tmp_path / "model")
    assert loaded.spec == apart.spec
    with pytest.raises(ConfigError, match=r"reads single channels \(data\.independent\) of 2"):
        list(loaded.batches([np.zeros((6, 2))], 1))
    again = prepare(series.with_preprocessor(Config(window=6), tmp_path / "model"), path)
    assert again.spec.channels == 1
    alone = prepare(Config(window=6, columns=("load",), independent=True), path)
    _, batch = next(alone.preprocessor.batches([np.zeros((6, 1))], 1))
    assert batch["series"].shape == (1, 6, 1)


# Splits


def test_shares_are_rounded_as_in_the_published_benchmarks():
    path = Path("a.csv")
    for num_rows in (17420, 10, 101, 999):
        ends = split_ends(Config(), num_rows, path)
        num_train, num_test = int(num_rows * 0.7), int(num_rows * 0.2)
        assert ends == (num_train, num_rows - num_test, num_rows)
    hours = 30 * 24
    config = Config(split_rows=(12 * hours, 4 * hours, 4 * hours))
    assert split_ends(config, 17420, path) == (8640, 11520, 14400)
    with pytest.raises(DataError, match=r"a\.csv: 14399 rows cannot be split"):
        split_ends(config, 14399, path)
    with pytest.raises(DataError, match="1 rows cannot be split"):
        split_ends(Config(), 1, path)


def test_splits_are_standardised_by_the_training_rows(tmp_path):
    rows = values(50)
    path = write(tmp_path, "a.csv", csv_of(rows))
    columns, parts = splits(Config(split_rows=(20, 10, 15)), path)
    assert columns == ("step", "load")
    assert [len(parts[name]) for name in ("train", "valid", "test")] == [20, 10, 15]
    mean, std = rows[:20].mean(0), rows[:20].std(0)
    joined = np.concatenate([parts["train"], parts["valid"], parts["test"]])
    np.testing.assert_allclose(joined, (rows[:45] - mean) / std, atol=1e-6)
    _, raw = splits(Config(split_rows=(20, 10, 15), standardise=False), path)
    assert np.array_equal(raw["test"], rows[30:45].astype(np.float32))


def test_only_the_training_rows_are_fitted_and_the_test_rows_never_read(tmp_path):
    rows = values(100)
    config = Config(window=8)
    before = prepare(config, write(tmp_path, "a.csv", csv_of(rows)))
    changed = rows.copy()
    changed[70:80] = 77.0
    lines = csv_of(changed).splitlines()
    lines[81:] = [line.split(",")[0] + ",text,more text" for line in lines[81:]]
    after = prepare(config, write(tmp_path, "a.csv", "\n".join(lines)))
    assert after.preprocessor.mean == before.preprocessor.mean
    assert after.preprocessor.std == before.preprocessor.std
    assert after.facts["fingerprint"] == before.facts["fingerprint"]
    assert after.facts["bad_items"] == 0
    assert np.array_equal(after.train.series[0], before.train.series[0])
    assert not np.array_equal(after.valid.series[0], before.valid.series[0])
    with pytest.raises(DataError, match="More than 2%"):
        splits(config, tmp_path / "a.csv")


def test_forecasts_look_back_into_the_part_before_and_none_is_dropped():
    rows = np.arange(60.0)[:, None] * [1, 100]
    parts = {"train": rows[:30], "valid": rows[30:42], "test": rows[42:]}
    for name, begin, end in (("train", 0, 30), ("valid", 30, 42), ("test", 42, 60)):
        past, future = windows(parts, name, 5, 3)
        first = begin + 5 if name == "train" else begin
        assert past.shape == (end - first - 2, 5, 2)
        assert future.shape == (end - first - 2, 3, 2)
        for k in range(len(past)):
            assert np.array_equal(past[k], rows[first + k - 5 : first + k])
            assert np.array_equal(future[k], rows[first + k : first + k + 3])
            assert begin <= future[k, 0, 0] <= future[k, -1, 0] < end


def test_a_long_past_reaches_over_a_short_part():
    rows = np.arange(60.0)[:, None]
    parts = {"train": rows[:40], "valid": rows[40:45], "test": rows[45:]}
    past, future = windows(parts, "test", 20, 2)
    assert past[0, :, 0].tolist() == list(range(25, 45))
    assert future[-1, :, 0].tolist() == [58, 59]
    for part, history, horizon in (("train", 39, 2), ("valid", 41, 1), ("test", 20, 16)):
        with pytest.raises(DataError, match=f"the {part} part has"):
            windows(parts, part, history, horizon)


def test_the_counts_of_the_ett_benchmarks():
    parts = {"train": np.zeros((8640, 1)), "valid": np.zeros((2880, 1)), "test": np.ones((2880, 1))}
    counts = {h: [len(windows(parts, p, 96, h)[0]) for p in parts] for h in (24, 96, 720)}
    assert counts == {24: [8521, 2857, 2857], 96: [8449, 2785, 2785], 720: [7825, 2161, 2161]}


# Tables


def test_every_format_gives_the_same_windows(tmp_path):
    rows = values(60)
    text = csv_of(rows)
    expected = prepare(Config(window=4), write(tmp_path, "a.csv", text)).train.series[0]
    for name, content in (
        ("a.csv.xz", lzma.compress(text.encode())),
        ("a.tsv", text.replace(",", "\t")),
        ("b.csv", text.replace("2016-07-", "2016/07/")),
    ):
        got = prepare(Config(window=4), write(tmp_path, name, content)).train.series[0]
        assert np.array_equal(got, expected)
    times = [datetime(2016, 7, 1) + timedelta(hours=i) for i in range(60)]
    columns = {"Time": times, "step": rows[:, 0], "load": rows[:, 1]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    got = prepare(Config(window=4), tmp_path / "a.parquet").train.series[0]
    assert np.array_equal(got, expected)


def test_columns_and_time_are_chosen(tmp_path, capsys):
    rows = values(50)
    lines = [f"{i * 10},{a},{b},x,{-a}" for i, (a, b) in enumerate(rows.tolist())]
    path = write(tmp_path, "a.csv", "\n".join(["at,step,load,note,TIME", *lines, ""]))
    with pytest.raises(DataError, match=r"a\.csv:3: .* -1.0 does not lie after -0.0.*by 'TIME'"):
        prepare(Config(window=4), path)
    chosen = prepare(Config(window=4, columns=("load", "TIME")), path)  # so it is no time
    assert chosen.preprocessor.columns == ("load", "TIME")
    every = prepare(Config(window=4, time_column="at"), path)
    assert every.preprocessor.columns == ("step", "load", "TIME")
    assert "['note']" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"data\.time_column: no column 'att'; did you mean 'at'"):
        prepare(Config(time_column="att"), path)
    with pytest.raises(DataError, match="no column 'lode'; did you mean 'load'"):
        prepare(Config(columns=("lode",), time_column="at"), path)


def test_time_must_rise(tmp_path):
    lines = csv_of(values(50)).splitlines()
    lines[20], lines[21] = lines[21], lines[20]
    path = write(tmp_path, "a.csv", "\n".join(lines))
    with pytest.raises(DataError, match=r"a\.csv:22: the time stamp 2016-07-01 19:00:00 does not"):
        prepare(Config(window=4), path)
    lines[20] = lines[21]
    with pytest.raises(DataError, match=r"a\.csv:22: "):
        prepare(Config(window=4), write(tmp_path, "a.csv", "\n".join(lines)))
    lines[20] = "noon,1,2"
    with pytest.raises(DataError, match=r"a\.csv:21: 'noon' in 'date' is no time stamp"):
        prepare(Config(window=4), write(tmp_path, "a.csv", "\n".join(lines)))


def test_time_zones_are_respected():
    assert time_of("2024-03-31T03:00:00+02:00") - time_of("2024-03-31T01:30:00+01:00") == 1800
    assert time_of("2024-03-31 03:00") - time_of("2024-03-31 01:00") == 7200


def test_missing_values_stay_nan_and_are_left_out_of_the_statistics(tmp_path):
    rows = values(60)
    rows[[3, 50], 1] = math.nan
    prepared = prepare(Config(window=6), write(tmp_path, "a.csv", csv_of(rows)))
    known = [v for i, v in enumerate(rows[:42, 1]) if i != 3]
    assert prepared.preprocessor.mean[1] == pytest.approx(sum(known) / 41)
    assert prepared.facts["missing_cells"] == 1  # row 50 is test
    batch = prepared.train.batch(np.array([0, 10]))["series"]
    assert batch.isnan().nonzero().tolist() == [[0, 3, 1]]


def test_a_text_among_numbers_is_counted_named_and_missing(tmp_path, capsys):
    lines = csv_of(values(100)).splitlines()
    lines[11] = lines[11].split(",")[0] + ",10,broken"
    prepared = prepare(Config(window=6), write(tmp_path, "a.csv", "\n".join(lines)))
    named = f"{tmp_path / 'a.csv'}:12: 'load' holds 'broken', read as missing"
    assert prepared.facts["bad_item_examples"] == [named]
    assert named in capsys.readouterr().err
    assert np.argwhere(np.isnan(prepared.train.series[0])).tolist() == [[10, 1]]


def test_a_channel_that_is_mostly_numbers_must_be_decided(tmp_path):
    lines = csv_of(values(100)).splitlines()
    for i in (5, 25, 45, 65):
        lines[i] = lines[i].split(",")[0] + ",10,broken"
    path = write(tmp_path, "a.csv", "\n".join(lines))
    with pytest.raises(
        DataError, match=r"a\.csv:2: column 'load': 94\.3% of the cells are numbers"
    ):
        prepare(Config(window=6), path)
    assert prepare(Config(window=6, columns=("step",)), path).facts["columns"] == 1
    with pytest.raises(DataError, match=r"4 of 160 items.*More than 2%"):
        prepare(Config(window=6, columns=("step", "load")), path)


def test_a_constant_channel_is_zero(tmp_path):
    rows = values(60)
    rows[:, 1] = 0.1
    prepared = prepare(Config(window=6), write(tmp_path, "a.csv", csv_of(rows)))
    assert not prepared.train.series[0][:, 1].any()
    assert prepared.preprocessor.std[1] == 1.0


def test_sources_that_cannot_be_used(tmp_path):
    short = write(tmp_path, "a.csv", csv_of(values(50)))
    with pytest.raises(DataError, match="validation part is shorter than one window of 6 rows"):
        prepare(Config(window=6), short)
    with pytest.raises(DataError, match="one table"):
        splits(Config(), [short, write(tmp_path, "b.csv", csv_of(values(50)))])
    write(tmp_path, "c.csv", "date,note\n2016-07-01,x\n2016-07-02,y\n2016-07-03,z\n")
    with pytest.raises(DataError, match="no column of numbers"):
        prepare(Config(splits=(0.5, 0.5, 0.0)), tmp_path / "c.csv")


@pytest.mark.parametrize(
    "given",
    [
        {"window": 0},
        {"stride": 0},
        {"splits": (0.5, 0.5)},
        {"splits": (0.5, 0.2, 0.2)},
        {"splits": (0.0, 0.5, 0.5)},
        {"split_rows": (3, 4)},
    ],
)
def test_wrong_values(given):
    with pytest.raises(ConfigError, match=f"data.{next(iter(given))}"):
        Config(**given)


# .ts files


def test_a_ts_file_is_read(tmp_path):
    for name, content in (("a.ts", TS), ("a.ts.xz", lzma.compress(TS.encode()))):
        cases = read_ts(write(tmp_path, name, content))
        first = [[1, 0.5], [2, math.nan], [3, 0.7]]
        expected = [first, [[4, -1], [5, 10]], [[6, math.nan], [7, 1], [8, 2], [9, 3]]]
        for got, want in zip(cases.series, expected, strict=True):
            np.testing.assert_array_equal(got, want)
        assert cases.labels == ["walk", "run", "walk"]
        assert cases.where[0] == f"{tmp_path / name}:9"


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("4,5:-1,1e1:run", "4,5:-1:run", r"a\.ts:10: channels of \[2, 1\] steps"),
        ("4,5:-1,1e1:run", "4,5:run", r"a\.ts:10: 1 channels .* the first series has 2"),
        ("4,5:-1,1e1:run", "4,b:-1,1e1:run", r"a\.ts:10: not numbers"),
        ("4,5:-1,1e1:run", "4,inf:-1,1e1:run", r"a\.ts:10: a value is infinite"),
        ("1e1:run", "1e1:rum", r"a\.ts:10: class 'rum' is not named.*did you mean 'run'"),
        ("@timeStamps false", "@timeStamps true", r"a\.ts:3: series with time stamps"),
        ("# shapes", "shapes", r"a\.ts:1: expected @data"),
        (TS[TS.index("1.0,2.0") :], "", "no series after @data"),
    ],
)
def test_ts_files_that_cannot_be_read(tmp_path, before, after, message):
    assert TS.count(before) == 1
    with pytest.raises(DataError, match=message):
        read_ts(write(tmp_path, "a.ts", TS.replace(before, after)))


def cases(count: int) -> str:
    """`count` different series of one channel, two classes, lengths 3 to 6."""
    lines = [
        ",".join(str(i + t / 10) for t in range(3 + i % 4)) + f":{'ab'[i % 2]}"
        for i in range(count)
    ]
    return "\n".join(["@timeStamps false", "@classLabel true a b", "@data", *lines, ""])


def test_series_of_ts_files_are_examples_whole(tmp_path):
    prepared = prepare(Config(), write(tmp_path, "a.ts", cases(60)))
    mean, std = prepared.preprocessor.mean[0], prepared.preprocessor.std[0]
    found = []
    for data in (prepared.train, prepared.valid):
        assert data.fields == ("series", "mask", "index")
        batch = data.batch(np.arange(len(data)))
        assert batch["mask"].sum(1).tolist() == data.lengths.tolist()
        assert torch.equal(batch["mask"], ~batch["series"][:, :, 0].isnan())
        first = batch["series"][:, 0, 0].double().numpy() * std + mean
        found += [round(x) for x in first]
        assert data.lengths.tolist() == [3 + round(x) % 4 for x in first]
    assert sorted(found) == list(range(60))
    assert prepared.spec.length == 6
    assert 1 <= len(prepared.valid) <= 15
    rows = np.concatenate([s[:, 0] for s in prepared.train.series])
    assert abs(rows.mean()) < 1e-5
    assert abs(rows.std() - 1) < 1e-5
    assert prepared.facts["train_windows"] + prepared.facts["valid_windows"] == 60


def test_ts_files_do_not_mix(tmp_path):
    write(tmp_path, "a.ts", cases(20))
    write(tmp_path, "b.ts", TS)
    with pytest.raises(DataError, match=r"files with \[1, 2\] channels"):
        prepare(Config(), tmp_path)
    write(tmp_path, "b.csv", csv_of(values(30)))
    with pytest.raises(DataError, match=r"b\.csv: a table among \.ts files"):
        prepare(Config(), tmp_path)


def test_labels_of_a_ts_file(tmp_path):
    path = write(tmp_path, "a.ts", cases(20))
    labelled = read_labels(path, "classification")
    assert labelled.names == ("a", "b")
    assert labelled.items[1] == [[1.0], [1.1], [1.2], [1.3]]
    preprocessor = SeriesPreprocessor(("1",), (1.0,), (0.5,), 6)
    data = preprocessor.labelled(labelled, max_length=2)
    batch = data.batch(np.array([1, 0]))
    assert sorted(batch) == sorted(data.fields)
    assert batch["label"].tolist() == [1, 0]
    expected = torch.tensor([[0, 0.2, 0.4, 0.6], [-2, -1.8, -1.6, math.nan]])
    torch.testing.assert_close(batch["series"][:, :, 0], expected, equal_nan=True)
    assert batch["mask"].tolist() == [[True] * 4, [True, True, True, False]]
    assert (data.task, data.truncated) == ("classification", 0)
    assert data.lengths.tolist() == [3 + i % 4 for i in range(20)]


def test_numbers_as_labels(tmp_path):
    content = cases(4).replace("@classLabel true a b", "@targetLabel true")
    for letter, number in (("a", "1.5"), ("b", "-2")):
        content = content.replace(f":{letter}", f":{number}")
    labelled = read_labels(write(tmp_path, "a.ts", content), "regression")
    assert (labelled.labels, labelled.names) == ([1.5, -2.0, 1.5, -2.0], ())
    data = SeriesPreprocessor(("1",), (0.0,), (1.0,), 6).labelled(labelled)
    label = data.batch(np.array([3, 0]))["label"]
    assert label.dtype == torch.float32
    assert label.tolist() == [-2, 1.5]


def test_wrong_use_of_labels(tmp_path):
    path = write(tmp_path, "a.ts", cases(4))
    with pytest.raises(DataError, match=r"a\.ts:5: label 'b' is not among the training labels"):
        read_labels(path, "classification", names=("a", "c"))
    with pytest.raises(DataError, match="finite number, got 'a'"):
        read_labels(path, "regression")
    with pytest.raises(ConfigError, match="unknown task"):
        read_labels(path, "tagging")
    with pytest.raises(ConfigError, match="leave the columns out"):
        read_labels(path, "classification", label=3)
    with pytest.raises(DataError, match=r"read from \.ts files"):
        read_labels(write(tmp_path, "a.csv", "a,b\n1,2\n"), "classification")
    unlabelled = cases(4).replace("true a b", "false").replace(":a", "").replace(":b", "")
    with pytest.raises(DataError, match="the label is missing"):
        read_labels(write(tmp_path, "b.ts", unlabelled), "classification")


# Preprocessor


def test_a_saved_preprocessor_is_the_same_to_the_last_bit(tmp_path):
    path = write(tmp_path, "a.csv", csv_of(values(100)))
    prepared = prepare(Config(window=8), path)
    prepared.preprocessor.save(tmp_path / "model")
    loaded = series.load_preprocessor(tmp_path / "model")
    assert vars(loaded) == vars(prepared.preprocessor)
    assert loaded.spec == prepared.spec
    (tmp_path / "model" / "preprocessor.json").write_text('{"columns": ["a"]}')
    with pytest.raises(DataError, match=r"preprocessor\.json: not the preprocessor"):
        series.load_preprocessor(tmp_path / "model")


def test_other_data_are_read_as_the_model_reads_them(tmp_path):
    first = prepare(Config(window=8), write(tmp_path, "a.csv", csv_of(values(100))))
    first.preprocessor.save(tmp_path / "model")
    config = series.with_preprocessor(Config(window=8), tmp_path / "model")
    rows = values(100, seed=1) * 3
    text = csv_of(np.concatenate([rows, rows], 1), "date,more,extra,step,load")
    second = prepare(config, write(tmp_path, "b.csv", text))
    expected = (rows[:70] - first.preprocessor.mean) / first.preprocessor.std
    np.testing.assert_allclose(second.train.series[0], expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(DataError, match=r"channels 1, but the model .* reads step, load"):
        prepare(config, write(tmp_path, "c.ts", cases(20)))


def test_items_become_batches_of_similar_length():
    preprocessor = SeriesPreprocessor(("a", "b"), (1.0, 0.0), (2.0, 1.0), 4)
    items = [np.full((length, 2), float(length)) for length in (5, 2, 4, 2, 5)]
    items[2] = items[2].tolist()
    batches = list(preprocessor.batches(iter(items), 2))
    assert [numbers for numbers, _ in batches] == [[1, 3], [2, 0], [4]]
    assert ["mask" in batch for _, batch in batches] == [False, True, False]
    for numbers, batch in batches:
        for number, row in zip(numbers, batch["series"], strict=True):
            length = len(items[number])
            assert row[:length].tolist() == [[(length - 1) / 2, float(length)]] * length
            assert row[length:].isnan().all()
    assert preprocessor.limited(2) is preprocessor


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (np.zeros((3, 1)), r"item 2: shape \(3, 1\), expected \(time, 2\) for the channels a, b"),
        (np.zeros(3), r"item 2: shape \(3,\)"),
        (np.zeros((0, 2)), r"item 2: shape \(0, 2\)"),
        ([[1.0, 2.0], [3.0]], r"item 2: not a \(time, channel\) array"),
        ([[1.0, math.inf]], "item 2: a value is infinite"),
    ],
)
def test_items_that_do_not_fit(item, message):
    preprocessor = SeriesPreprocessor(("a", "b"), (1.0, 0.0), (2.0, 1.0), 4)
    with pytest.raises(DataError, match=message):
        list(preprocessor.batches([np.zeros((3, 2)), np.zeros((3, 2)), item], 2))
    with pytest.raises(ConfigError, match="batch_size"):
        list(preprocessor.batches([np.zeros((3, 2))], 0))
