import io
import json
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import soundfile
import torch

from selfsup.batch import AudioSpec
from selfsup.data.audio import (
    AudioPreprocessor,
    Config,
    load_preprocessor,
    prepare,
    read_labels,
    with_preprocessor,
)
from selfsup.data.audio_files import WORKERS, find, in_order
from selfsup.data.filterbank import LogMel, cmvn, deltas, mfcc
from selfsup.errors import ConfigError, DataError

RATE = 8000
SMALL = Config(rate=RATE, mel=20, valid_fraction=0.3)
SPEAKERS = r"(?P<label>\d)_(?P<group>[a-z]+)_\d+\.wav"


def tone(seconds, hertz=440.0, rate=RATE, seed=None):
    """A tone in [-1, 1]; a seed adds a little noise of its own."""
    time = np.arange(round(seconds * rate)) / rate
    out = 0.5 * np.sin(2 * np.pi * hertz * time)
    if seed is not None:
        out = out + 0.1 * np.random.default_rng(seed).standard_normal(len(time))
    return out.astype(np.float32)


def write(path, samples, rate=RATE, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate, **options)
    return path


def corpus(folder, count=20, seconds=(0.3, 0.5)):
    """Noisy tones, all different, of two lengths in turn."""
    for i in range(count):
        write(folder / f"{i % 3}_{'ab'[i % 2]}_{i}.wav", tone(seconds[i % 2], 200 + 10 * i, seed=i))
    return folder


def both_sides(prepared, field):
    """The rows of that field on both sides, without padding."""
    rows = []
    for data in (prepared.train, prepared.valid):
        for i in range(len(data)):
            rows.append(data.batch(np.array([i]))[field][0].numpy())
    return rows


def peak(samples, rate):
    """The loudest frequency in Hz."""
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return spectrum.argmax() * rate / len(samples)


@pytest.mark.parametrize("rate", [RATE, 16000, 22050, 44100])
@pytest.mark.parametrize("channels", [1, 2])
def test_files_are_mixed_and_resampled(rate, channels, tmp_path):
    samples = np.stack([tone(1.0, 1000.0, rate) * scale for scale in (1.0, 0.5)[:channels]], -1)
    path = write(tmp_path / "a.wav", samples, rate)
    config = Config(rate=RATE, features="waveform")
    ((_, batch),) = AudioPreprocessor(config).batches([path], 1)
    found = batch["waveform"][0].numpy()
    assert abs(len(found) - RATE) <= 1
    assert peak(found, RATE) == pytest.approx(1000, abs=1.5)
    inner = found[400:-400]  # a resampler rings at the ends
    assert np.abs(inner).max() == pytest.approx(0.5 if channels == 1 else 0.375, abs=0.01)
    assert "mask" not in batch


def test_what_is_above_half_the_new_rate_is_gone(tmp_path):
    path = write(tmp_path / "a.wav", tone(1.0, 6000.0, 16000), 16000)
    config = Config(rate=RATE, features="waveform")
    ((_, batch),) = AudioPreprocessor(config).batches([path], 1)
    assert batch["waveform"][0, 400:-400].abs().max() < 0.001


@pytest.mark.parametrize("suffix", ["flac", "ogg", "mp3", "WAV"])
def test_formats(suffix, tmp_path):
    path = write(tmp_path / f"a.{suffix}", tone(1.0, 1000.0, 16000), 16000, format=suffix.upper())
    config = Config(features="waveform")
    ((_, batch),) = AudioPreprocessor(config).batches([path], 1)
    assert batch["waveform"].shape == (1, 16000)
    assert peak(batch["waveform"][0].numpy(), 16000) == pytest.approx(1000, abs=1.5)


def test_waveforms_keep_their_sixteen_bits(tmp_path):
    whole = np.random.default_rng(0).integers(-32768, 32768, 4000).astype(np.int16)
    for name, part in (("a", whole), ("b", whole[::-1].copy())):
        write(tmp_path / "in" / f"{name}.wav", part, subtype="PCM_16")
    config = Config(rate=RATE, features="waveform")
    prepared = prepare(config, tmp_path / "in", tmp_path / "cache")
    assert prepared.spec == AudioSpec(rate=RATE, mel=0, hop=80)
    found = {tuple((row * 32768).astype(int)) for row in both_sides(prepared, "waveform")}
    assert found == {tuple(whole.astype(int)), tuple(whole[::-1].astype(int))}


def test_frames_mfcc_and_facts(tmp_path):
    corpus(tmp_path / "in")
    write(tmp_path / "in" / "other.wav", tone(0.5, rate=16000), 16000)
    config = Config(rate=RATE, mel=20, mfcc=True, valid_fraction=0.3)
    prepared = prepare(config, tmp_path / "in", tmp_path / "cache")
    facts = prepared.facts
    assert prepared.spec == AudioSpec(rate=RATE, mel=20, hop=80)
    assert prepared.train.fields == ("frames", "mask", "index", "mfcc")
    assert facts["files"] == 21
    assert facts["seconds"] == pytest.approx(10 * 0.3 + 10 * 0.5 + 0.5, abs=1e-3)
    assert facts["sample_rates"] == {"8000": 20, "16000": 1}
    assert facts["duplicates"] == facts["bad_items"] == 0
    assert facts["tokenizer"] == ""
    assert len(facts["fingerprint"]) == 64
    sizes = len(prepared.train), len(prepared.valid)
    assert sizes == (facts["train_examples"], facts["valid_examples"])
    assert min(sizes) > 0
    assert sum(sizes) == 21

    waveform = torch.from_numpy(soundfile.read(tmp_path / "in" / "0_a_0.wav", dtype="float32")[0])
    expected = cmvn(LogMel(RATE, 20)(waveform[None]))[0].numpy()
    distances = [
        np.abs(row - expected).max() if row.shape == expected.shape else np.inf
        for row in both_sides(prepared, "frames")
    ]
    place = int(np.argmin(distances))
    assert distances[place] < 1e-5
    base = mfcc(LogMel(RATE, 23)(waveform[None]))
    coefficients = torch.cat([base, deltas(base), deltas(deltas(base))], -1)[0].numpy()
    np.testing.assert_allclose(both_sides(prepared, "mfcc")[place], coefficients, atol=1e-4)


def test_frames_are_normalised_unless_asked_otherwise(tmp_path):
    corpus(tmp_path / "in", 6)
    for kind in ("utterance", "none"):
        config = Config(rate=RATE, mel=20, cmvn=kind)
        for row in both_sides(prepare(config, tmp_path / "in", tmp_path / "cache"), "frames"):
            is_normal = np.abs(row.mean(0)).max() < 1e-4 and np.abs(row.std(0) - 1).max() < 1e-3
            assert is_normal == (kind == "utterance")


@pytest.mark.parametrize("features", ["frames", "waveform"])
def test_an_example_is_the_same_alone_and_padded(features, tmp_path):
    corpus(tmp_path / "in")
    config = Config(rate=RATE, mel=20, mfcc=True, features=features, valid_fraction=0.3)
    train = prepare(config, tmp_path / "in", tmp_path / "cache").train
    short, long = int(np.argmin(train.lengths)), int(np.argmax(train.lengths))
    together = train.batch(np.array([long, short]))
    assert together["index"].tolist() == [long, short]
    assert together["mask"].sum(1).tolist() == [train.lengths[long], train.lengths[short]]
    for row, number in enumerate((long, short)):
        alone = train.batch(np.array([number]))
        assert "mask" not in alone
        for field in (features, "mfcc"):
            size = alone[field].shape[1]
            assert together[field].dtype == torch.float32
            assert torch.equal(together[field][row, :size], alone[field][0])
            assert (together[field][row, size:] == 0).all()
    if features == "waveform":  # mfcc has frames where the waveform has samples
        samples = torch.from_numpy(train.lengths[[long, short]])
        assert alone["mfcc"].shape[1] == config.framing.num_frames(samples)[1]


def damaged_files(folder):
    """A file without samples, one with NaN, one whose header is cut off, one that is too short."""
    write(folder / "zero.wav", np.zeros(0, np.float32))
    broken = tone(0.5)
    broken[1000] = np.nan
    write(folder / "nan.wav", broken, subtype="FLOAT")
    whole = io.BytesIO()
    soundfile.write(whole, tone(0.5), RATE, format="WAV")
    (folder / "cut.wav").write_bytes(whole.getvalue()[:20])
    write(folder / "short.wav", tone(0.05))


def test_bad_files_are_counted_and_named(tmp_path, capsys):
    corpus(tmp_path / "in", 200, seconds=(0.1, 0.12))
    damaged_files(tmp_path / "in")
    facts = prepare(SMALL, tmp_path / "in", tmp_path / "cache").facts
    assert (facts["files"], facts["bad_items"]) == (204, 4)
    assert facts["train_examples"] + facts["valid_examples"] == 200
    named = "\n".join(facts["bad_item_examples"])
    for name, reason in (
        ("cut.wav", "cannot be decoded"),
        ("nan.wav", "holds NaN"),
        ("short.wav", "0.050 s long, shorter than data.min_seconds = 0.1"),
        ("zero.wav", "holds no sound"),
    ):
        assert f"{tmp_path / 'in' / name}: {reason}" in named
    assert "4 of 204 items cannot be used" in capsys.readouterr().err


def test_too_many_bad_files_stop(tmp_path):
    corpus(tmp_path / "in", 20)
    damaged_files(tmp_path / "in")
    with pytest.raises(
        DataError, match=r"/in: 4 of 24 items cannot be used .*cut\.wav.*More than 2%"
    ):
        prepare(SMALL, tmp_path / "in", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []  # nothing half-written


def test_a_flac_that_ends_early_is_bad(tmp_path):
    whole = io.BytesIO()
    soundfile.write(whole, tone(3.0, seed=0), RATE, format="FLAC")
    path = tmp_path / "a.flac"
    path.write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    with pytest.raises(DataError, match=rf"item 0 \({path}\): cannot be decoded"):
        list(AudioPreprocessor(SMALL).batches([path], 1))


def ramps(folder, names, size=2000):
    """Files that count on from each other in 16-bit samples, so that each sample is known."""
    for number, name in enumerate(names):
        part = np.arange(number * size, (number + 1) * size) % 30000
        write(folder / name, part.astype(np.int16), subtype="PCM_16")


def numbers(row):
    return np.rint(row * 32768).astype(int)


def test_neighbours_of_one_folder_and_group_are_joined(tmp_path):
    names = [f"{folder}/{i}_{who}_0.wav" for folder in "pq" for i in range(8) for who in "ab"]
    ramps(tmp_path / "in", names, size=900)
    config = Config(
        rate=RATE,
        features="waveform",
        pattern=SPEAKERS,
        join_seconds=0.3,
        min_seconds=0.1,
        valid_fraction=0.2,
    )
    prepared = prepare(config, tmp_path / "in", tmp_path / "cache")
    assert prepared.train.labels is None
    rows = [numbers(row) for row in both_sides(prepared, "waveform")]
    assert sorted(np.concatenate(rows)) == sorted(range(900 * 32))  # each file once
    for row in rows:
        files = row[::900] // 900
        assert len({(file // 16, file % 2) for file in files}) == 1  # one folder, one speaker
        assert (np.diff(files) > 0).all()
    assert max(map(len, rows)) == 2700  # 0.3 s are reached with the third file
    assert len(rows) < 20


def test_joined_in_random_order_files_keep_folder_and_group(tmp_path):
    names = [f"{i:02}_{who}_0.wav" for i in range(12) for who in "ab"]
    ramps(tmp_path / "in", names, size=900)
    given = {"rate": RATE, "features": "waveform", "pattern": SPEAKERS, "join_seconds": 0.3}
    config = Config(**given, min_seconds=0.1, valid_fraction=0.2, join_order="random")
    prepared = prepare(config, tmp_path / "in", tmp_path / "cache")
    rows = [numbers(row) for row in both_sides(prepared, "waveform")]
    assert sorted(np.concatenate(rows)) == sorted(range(900 * 24))
    files = [row[::900] // 900 for row in rows]
    assert all(len(set(file % 2)) == 1 for file in files)  # one speaker
    assert any((np.diff(file) < 0).any() for file in files)
    again = prepare(config, tmp_path / "in", tmp_path / "other")
    pairs = zip(rows, (numbers(row) for row in both_sides(again, "waveform")), strict=True)
    assert all(np.array_equal(one, two) for one, two in pairs)


def test_joined_examples_never_exceed_the_maximum(tmp_path):
    ramps(tmp_path / "in", [f"{i:02}.wav" for i in range(12)], size=2000)
    config = Config(rate=RATE, features="waveform", join_seconds=0.6, max_seconds=0.6)
    prepared = prepare(config, tmp_path / "in", tmp_path / "cache")
    rows = [numbers(row) for row in both_sides(prepared, "waveform")]
    assert sorted(np.concatenate(rows)) == list(range(24000))
    assert {len(row) for row in rows} <= {2000, 4000}
    assert max(map(len, rows)) == 4000


def test_long_sounds_are_cut_into_equal_parts(tmp_path):
    ramps(tmp_path / "in", ["a.wav", "b.wav"], size=2500)
    config = Config(rate=RATE, features="waveform", max_seconds=0.2)
    prepared = prepare(config, tmp_path / "in", tmp_path / "cache")
    rows = [numbers(row) for row in both_sides(prepared, "waveform")]
    assert [len(row) for row in rows] == [1250] * 4
    assert sorted(np.concatenate(rows)) == list(range(5000))


def test_equal_files_fall_on_one_side_and_are_counted(tmp_path):
    corpus(tmp_path / "in", 30, seconds=(0.2, 0.2))
    for path in sorted((tmp_path / "in").iterdir()):
        samples, _ = soundfile.read(path, dtype="int16")
        write(path.with_suffix(".flac"), samples)
    prepared = prepare(SMALL, tmp_path / "in", tmp_path / "cache")
    assert prepared.facts["duplicates"] == 30
    train, valid = (
        {data.batch(np.array([i]))["frames"].numpy().tobytes() for i in range(len(data))}
        for data in (prepared.train, prepared.valid)
    )
    assert not train & valid
    assert (2 * len(train), 2 * len(valid)) == (len(prepared.train), len(prepared.valid))


def test_few_files_still_give_two_sides(tmp_path):
    corpus(tmp_path / "in", 2)
    prepared = prepare(Config(rate=RATE, mel=20), tmp_path / "in", tmp_path / "cache")
    assert (len(prepared.train), len(prepared.valid)) == (1, 1)


def test_one_sound_cannot_be_split(tmp_path):
    for name in ("a.wav", "b.wav"):
        write(tmp_path / "in" / name, tone(0.5))
    with pytest.raises(DataError, match="2 files with 1 different sound cannot be split"):
        prepare(SMALL, tmp_path / "in", tmp_path / "cache")


def test_adding_files_moves_none(tmp_path):
    corpus(tmp_path / "in", 20)
    before = prepare(SMALL, tmp_path / "in", tmp_path / "cache")
    corpus(tmp_path / "in", 25)
    after = prepare(SMALL, tmp_path / "in", tmp_path / "cache")
    held_out = {row.tobytes() for row in both_sides(after, "frames")[len(after.train) :]}
    assert {row.tobytes() for row in both_sides(before, "frames")[len(before.train) :]} <= held_out
    assert before.facts["fingerprint"] != after.facts["fingerprint"]


def refuse(*args, **kwargs):
    raise AssertionError("a file was decoded again")


def test_the_store_is_used_again(tmp_path, monkeypatch):
    corpus(tmp_path / "in")
    config = Config(rate=RATE, mel=20, mfcc=True, pattern=SPEAKERS, valid_fraction=0.3)
    first = prepare(config, tmp_path / "in", tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(soundfile, "SoundFile", refuse)
        second = prepare(config, tmp_path / "in", tmp_path / "cache")
    assert second.facts == first.facts
    assert second.train.labels.tolist() == first.train.labels.tolist()
    for field in ("frames", "mfcc"):
        for one, other in zip(both_sides(first, field), both_sides(second, field), strict=True):
            np.testing.assert_array_equal(one, other)
    assert all(isinstance(array, np.memmap) for array in second.train.arrays.values())


@pytest.mark.parametrize(
    "name", ["train.frames.bin", "valid.mfcc.bin", "train.offsets.npy", "valid.labels.npy"]
)
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_store_is_made_again(name, damage, tmp_path, capsys):
    corpus(tmp_path / "in", 8)
    config = Config(rate=RATE, mel=20, mfcc=True, pattern=SPEAKERS, valid_fraction=0.3)
    expected = both_sides(prepare(config, tmp_path / "in", tmp_path / "cache"), "frames")
    (folder,) = (tmp_path / "cache").iterdir()
    if damage == "gone":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes((folder / name).read_bytes()[:-4])
    again = both_sides(prepare(config, tmp_path / "in", tmp_path / "cache"), "frames")
    assert "the stored sounds are damaged" in capsys.readouterr().err
    assert all(np.array_equal(a, b) for a, b in zip(expected, again, strict=True))


def test_another_configuration_gets_another_store(tmp_path):
    corpus(tmp_path / "in", 6)
    for mel in (20, 23):
        prepared = prepare(Config(rate=RATE, mel=mel), tmp_path / "in", tmp_path / "cache")
        assert prepared.train.batch(np.array([0]))["frames"].shape[-1] == mel
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_labels_of_the_corpus_come_from_its_paths(tmp_path):
    corpus(tmp_path / "in", 20)
    config = Config(rate=RATE, features="waveform", pattern=SPEAKERS, valid_fraction=0.3)
    prepared = prepare(config, tmp_path / "in", tmp_path / "cache")
    assert prepared.facts["label_names"] == ["0", "1", "2"]
    labels = np.concatenate([prepared.train.labels, prepared.valid.labels])
    for row, label in zip(both_sides(prepared, "waveform"), labels, strict=True):
        number = round((peak(row, RATE) - 200) / 10)  # the files differ in their pitch
        assert number % 3 == label


def test_low_rates_are_warned_of(tmp_path, capsys):
    corpus(tmp_path / "in", 4)
    prepare(Config(mel=40), tmp_path / "in", tmp_path / "cache")
    assert "4 of 4 files have a lower rate than data.rate = 16000" in capsys.readouterr().err


def test_where_sounds_are_found(tmp_path, capsys):
    corpus(tmp_path / "in", 3)
    write(tmp_path / "in" / "sub" / "d.flac", tone(0.2))
    write(tmp_path / "in" / ".hidden" / "e.wav", tone(0.2))
    (tmp_path / "in" / "notes.md").write_text("no sound")
    names = ["0_a_0.wav", "1_b_1.wav", "2_a_2.wav", "sub/d.flac"]
    assert list(find(tmp_path / "in").values()) == names
    assert "1 files are not read (unknown extension): notes.md" in capsys.readouterr().err
    assert list(find(str(tmp_path / "in" / "**" / "*.flac")).values()) == ["sub/d.flac"]
    assert list(find([tmp_path / "in" / names[0]] * 2).values()) == [names[0]]


def test_what_is_not_found(tmp_path):
    corpus(tmp_path / "in", 2)
    (tmp_path / "in" / "notes.md").write_text("no sound")
    with pytest.raises(DataError, match=r"no file or folder .*did you mean '0_a_0\.wav'"):
        find(tmp_path / "in" / "0_a_00.wav")
    with pytest.raises(DataError, match=r"notes\.md gives no sound; looked for \.wav"):
        find(tmp_path / "in" / "notes.md")
    with pytest.raises(DataError, match=r"the pattern .* gives no sound"):
        find(str(tmp_path / "in" / "*.flac"))
    with pytest.raises(DataError, match="list of sources is empty"):
        find([])
    with pytest.raises(DataError, match=r"path '0_a_0\.wav' does not match the pattern"):
        prepare(Config(pattern=r"(?P<label>x)"), tmp_path / "in" / "0_a_0.wav", tmp_path)


def test_a_hub_dataset_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"needs the package `datasets`: pip install"):
        prepare(SMALL, "hf:owner/name", tmp_path)


@pytest.mark.slow  # importing `datasets` takes seconds
def test_a_hub_dataset(tmp_path, monkeypatch):
    import pyarrow
    from pyarrow import parquet

    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    corpus(tmp_path / "in", 6)
    paths = sorted((tmp_path / "in").iterdir())
    sounds = [{"bytes": path.read_bytes(), "path": path.name} for path in paths]
    (tmp_path / "hub").mkdir()
    parquet.write_table(pyarrow.table({"audio": sounds}), tmp_path / "hub" / "train.parquet")
    config = Config(rate=RATE, mel=20, pattern=SPEAKERS)
    from_hub = prepare(config, f"hf:{tmp_path / 'hub'}", tmp_path / "cache")
    from_files = prepare(config, tmp_path / "in", tmp_path / "cache")
    assert from_hub.facts == from_files.facts
    with pytest.raises(DataError, match="cannot be opened"):
        prepare(config, f"hf:{tmp_path / 'hub'}::test", tmp_path / "cache")


def test_threads_take_no_more_than_is_needed():
    taken = []
    stream = (taken.append(i) or i for i in range(1000))
    with ThreadPoolExecutor(WORKERS) as pool:
        results = in_order(pool, lambda i: i * i, stream)
        assert [next(results) for _ in range(5)] == [0, 1, 4, 9, 16]
        assert len(taken) <= 5 + 2 * WORKERS + 1
        assert list(results) == [i * i for i in range(5, 1000)]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rate": 0}, "data.rate must be above 0"),
        ({"mel": 500}, "mel = 500 is too many"),
        ({"valid_fraction": 0.0}, "data.valid_fraction"),
        ({"max_seconds": 0.15}, "data.max_seconds = 0.15 must be at least twice"),
        ({"join_seconds": 30.0}, "data.join_seconds must be from 0 to data.max_seconds"),
        ({"min_seconds": 0.01}, "less than one frame"),
        ({"pattern": "("}, "no regular expression"),
        ({"pattern": r"\d"}, "must name the groups"),
        ({"pattern": r"(?P<speaker>\d)"}, "it names speaker"),
    ],
)
def test_configurations_that_cannot_be(values, words):
    with pytest.raises(ConfigError, match=words):
        Config(**values)


@pytest.mark.parametrize("features", ["frames", "waveform"])
def test_the_preprocessor_gives_what_the_store_holds(features, tmp_path):
    corpus(tmp_path / "in", 12)
    config = Config(rate=16000, mel=20, mfcc=True, features=features, valid_fraction=0.3)
    prepared = prepare(config, tmp_path / "in", tmp_path / "cache")
    prepared.preprocessor.save(tmp_path / "model")
    loaded = load_preprocessor(tmp_path / "model")
    assert loaded.spec == prepared.spec
    assert loaded.config == config
    items = sorted((tmp_path / "in").iterdir())
    seen = []
    for field in (features, "mfcc"):
        stored = {row.tobytes() for row in both_sides(prepared, field)}
        for chosen, batch in loaded.batches(items, 6):
            assert set(batch) <= {features, "mfcc", "mask"}
            for row, number in enumerate(chosen):
                ((_, alone),) = loaded.batches([items[number]], 1)
                size = alone[field].shape[1]
                assert alone[field][0].numpy().tobytes() in stored
                assert torch.equal(batch[field][row, :size], alone[field][0])
                seen.append(number)
    assert sorted(seen) == sorted(list(range(12)) * 2)


def test_items_of_similar_length_share_a_batch(tmp_path):
    paths = [write(tmp_path / f"{i}.wav", tone((0.2, 0.6)[i % 2])) for i in range(6)]
    batches = list(AudioPreprocessor(SMALL).batches(map(str, paths), 3))
    assert [numbers for numbers, _ in batches] == [[0, 2, 4], [1, 3, 5]]
    assert all("mask" not in batch for _, batch in batches)


def test_arrays_and_arrays_with_their_rate(tmp_path):
    samples = tone(0.5, 300.0, seed=1)
    path = write(tmp_path / "a.wav", samples, subtype="FLOAT")
    items = [path, samples, torch.from_numpy(samples), (samples.astype(np.float64), RATE)]
    (batch,) = (batch for _, batch in AudioPreprocessor(SMALL).batches(items, 4))
    for row in batch["frames"][1:]:
        assert torch.equal(row, batch["frames"][0])
    high = tone(0.5, 300.0, 16000)
    config = Config(rate=RATE, features="waveform")
    ((_, batch),) = AudioPreprocessor(config).batches([(high, 16000)], 1)
    assert batch["waveform"].shape == (1, 4000)
    assert peak(batch["waveform"][0].numpy(), RATE) == pytest.approx(300, abs=3)


def test_items_that_cannot_be_used(tmp_path):
    good = tone(0.5)
    path = write(tmp_path / "zero.wav", np.zeros(0, np.float32))
    for item, words in (
        (path, rf"item 1 \({path}\): holds no sound"),
        (tmp_path / "none.wav", r"item 1 \(.*none\.wav\): cannot be decoded"),
        (np.zeros(4000, np.int16), "item 1: is int16, 1-D; expected"),
        (np.zeros((2, 4000), np.float32), "item 1: is float32, 2-D; expected"),
        (np.full(4000, np.nan, np.float32), "item 1: holds NaN"),
        (np.zeros(100, np.float32), "item 1: 0.013 s long"),
        (np.zeros(0, np.float32), "item 1: holds no sound"),
        (7, "item 1: is int; expected"),
    ):
        with pytest.raises(DataError, match=words):
            list(AudioPreprocessor(SMALL).batches([good, item], 2))
    with pytest.raises(ConfigError, match="batch_size must be at least 1, got 0"):
        list(AudioPreprocessor(SMALL).batches([good], 0))


def test_long_items_are_cut_with_a_warning(tmp_path, capsys):
    limited = AudioPreprocessor(SMALL).limited(50)
    limited.save(tmp_path / "model")
    limited = load_preprocessor(tmp_path / "model")
    assert limited.max_length == 50
    whole = tone(1.0, seed=0)
    ((_, batch),) = limited.batches([whole], 1)
    ((_, expected),) = AudioPreprocessor(SMALL).batches([whole[: 49 * 80 + 200]], 1)
    assert torch.equal(batch["frames"], expected["frames"])
    assert batch["frames"].shape == (1, 50, 20)
    assert "1 of 1 sounds were cut" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="max_length must be at least 1"):
        limited.limited(0)


def test_a_preprocessor_that_is_damaged(tmp_path):
    with pytest.raises(DataError, match="not the preprocessor of a sound model"):
        load_preprocessor(tmp_path)
    (tmp_path / "preprocessor.toml").write_text("max_samples = 9\n[data]\nrats = 3\n")
    with pytest.raises(DataError, match="not the preprocessor of a sound model"):
        load_preprocessor(tmp_path)


def test_other_data_are_read_as_the_model_reads_them(tmp_path):
    AudioPreprocessor(Config(rate=RATE, mel=20, cmvn="none")).save(tmp_path)
    given = Config(join_seconds=5.0, mfcc=True)
    expected = Config(rate=RATE, mel=20, cmvn="none", join_seconds=5.0)
    assert with_preprocessor(given, tmp_path) == expected


def test_labels_from_a_pattern(tmp_path):
    corpus(tmp_path / "in", 6)
    labelled = read_labels(tmp_path / "in", "classification", label=SPEAKERS)
    assert labelled.items[0] == str(tmp_path / "in" / "0_a_0.wav")
    assert labelled.labels == ["0", "0", "1", "1", "2", "2"]
    assert labelled.names == ("0", "1", "2")
    assert labelled.groups == ("a", "b", "a", "b", "a", "b")
    assert labelled.take([1, 2]).groups == ("b", "a")
    by_number = read_labels(tmp_path / "in", "regression", label=r"_(?P<label>\d+)\.wav")
    assert (sorted(by_number.labels), by_number.names) == ([0.0, 1.0, 2.0, 3.0, 4.0, 5.0], ())
    assert by_number.groups == ()


def test_labels_from_sub_folders(tmp_path):
    for name in ("10/a.wav", "2/b.wav", "2/deep/c.flac"):
        write(tmp_path / name, tone(0.2))
    labelled = read_labels(tmp_path, "classification")
    assert (labelled.labels, labelled.names) == (["10", "2", "2"], ("2", "10"))
    write(tmp_path / "stray.wav", tone(0.2))
    with pytest.raises(DataError, match=r"stray\.wav: lies in no sub-folder"):
        read_labels(tmp_path, "classification")


def test_labels_from_tables(tmp_path):
    corpus(tmp_path / "sounds", 3)
    names = [f"sounds/{path.name}" for path in sorted((tmp_path / "sounds").iterdir())]
    paths = [str(tmp_path / name) for name in names]
    lines = [f"{name},{label}\n" for name, label in zip(names, "yny", strict=True)]
    (tmp_path / "a.csv").write_text("".join(["file,label\n", *lines]))
    (tmp_path / "b.csv").write_text("".join(lines))
    rows = [
        {"clip": name, "score": number / 2, "Speaker": who}
        for number, (name, who) in enumerate(zip(names, "uvu", strict=True))
    ]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    labelled = read_labels(tmp_path / "a.csv", "classification")
    assert (labelled.items, labelled.labels) == (paths, ["y", "n", "y"])
    assert (labelled.names, labelled.groups) == (("n", "y"), ())
    by_number = read_labels(tmp_path / "b.csv", "classification", text=1, label=2)
    assert (by_number.items, by_number.labels) == (labelled.items, labelled.labels)
    scores = read_labels(tmp_path / "c.jsonl", "regression", text="clip")
    assert (scores.labels, scores.groups) == ([0.0, 0.5, 1.0], ("u", "v", "u"))


def test_labels_that_cannot_be_read(tmp_path):
    corpus(tmp_path / "in", 3)
    table = tmp_path / "in" / "a.csv"
    for content, options, words in (
        ("file,label\nnone.wav,1\n", {}, r"a\.csv:2: no file .*none\.wav"),
        ("file,label\n0_a_0.wav,\n", {}, r"a\.csv:2: 'label' must be text or a number"),
        ("file,label\n0_a_0.wav,1\n", {}, "every label is '1'"),
        ("file,label\n0_a_0.wav,1\n", {"names": ("10", "2")}, "label '1' is not among"),
        ("file,label\n0_a_0.wav,x\n", {"task": "regression"}, "finite number, got 'x'"),
        ("clip,label\n0_a_0.wav,1\n", {}, "expected one column of paths .* found none"),
        ("file,path,label\na,b,1\n", {}, "found file, path; say which with text=NAME"),
        ("file,label\n", {}, "holds no example"),
    ):
        table.write_text(content)
        with pytest.raises(DataError, match=words):
            read_labels(table, **{"task": "classification", **options})
    folder = tmp_path / "in"
    with pytest.raises(ConfigError, match="not for 'tagging'"):
        read_labels(folder, "tagging")
    with pytest.raises(ConfigError, match="no second text"):
        read_labels(folder, "classification", text_b="b")
    with pytest.raises(ConfigError, match="leave text out"):
        read_labels(folder, "classification", text="file")
    with pytest.raises(ConfigError, match=r"must name the group \(\?P<label>"):
        read_labels(folder, "classification", label=r"(?P<group>\d)")
    with pytest.raises(DataError, match="does not match the pattern"):
        read_labels(folder, "classification", label=r"x(?P<label>\d)")


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_labelled_sounds(task, tmp_path):
    corpus(tmp_path / "in", 6)
    labelled = read_labels(tmp_path / "in", task, label=SPEAKERS)
    preprocessor = AudioPreprocessor(Config(rate=RATE, mel=20, mfcc=True))
    data = preprocessor.limited(40).labelled(labelled)
    assert data.fields == ("frames", "mask", "index", "mfcc", "label")
    assert (len(data), data.task) == (6, task)
    assert data.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert data.truncated == 3  # of 0.5 s
    assert sorted(data.lengths.tolist()) == [28] * 3 + [40] * 3

    batch = data.batch(np.array([5, 4]))
    assert batch["index"].tolist() == [5, 4]
    assert batch["label"].tolist() == [2, 2]
    assert batch["label"].dtype == (torch.int64 if task == "classification" else torch.float32)
    assert batch["mask"].sum(1).tolist() == data.lengths[[5, 4]].tolist()
    ((_, alone),) = preprocessor.batches([labelled.items[4]], 1)
    assert torch.equal(batch["frames"][1, : alone["frames"].shape[1]], alone["frames"][0])
    whole = preprocessor.labelled(labelled)
    assert (whole.truncated, whole.lengths.max()) == (0, 48)


def test_a_labelled_sound_that_cannot_be_used(tmp_path):
    corpus(tmp_path / "in", 3)
    broken = write(tmp_path / "in" / "2_b_9.wav", np.zeros(0, np.float32))
    labelled = read_labels(tmp_path / "in", "classification", label=SPEAKERS)
    with pytest.raises(DataError, match=rf"in: item 3 \({broken}\): holds no sound"):
        AudioPreprocessor(SMALL).labelled(labelled)
