import gzip
import io
import json
import os
import struct
import zlib

import numpy as np
import pyarrow as arrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from selfsup.batch import ImageSpec
from selfsup.config import from_mapping
from selfsup.data import image
from selfsup.data.image_decoding import Form, decode, decode_all
from selfsup.data.image_files import Picture, find
from selfsup.data.image_store import moments
from selfsup.errors import ConfigError, DataError

SIZE = 8
SMALL = image.Config(size=SIZE)
FORM = Form(SIZE, 3, 10**8)
GREY = Form(SIZE, 1, 10**8)


def noise(count, seed=0, size=SIZE, channels=3):
    """(count, size, size, channels) random pictures."""
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, channels), np.uint8)


def encoded(values, kind="png", **options):
    """The bytes of a picture file."""
    content = io.BytesIO()
    picture = values if isinstance(values, Image.Image) else Image.fromarray(values)
    picture.save(content, kind, **options)
    return content.getvalue()


def write(folder, values, kind="png"):
    """One file per picture: 000.png, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, one in enumerate(values):
        (folder / f"{number:03}.{kind}").write_bytes(encoded(one, kind))
    return folder


def write_parquet(path, values, schema=None, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [encoded(one) for one in values]
    parquet.write_table(arrow.table({"image": cells, **columns}, schema=schema), path)
    return path


def write_idx(folder, values, labels=None, name="train-images-idx3-ubyte.gz"):
    folder.mkdir(parents=True, exist_ok=True)
    head = struct.pack(f">{1 + values.ndim}I", 0x0800 + values.ndim, *values.shape)
    pack = gzip.compress if name.endswith(".gz") else bytes
    (folder / name).write_bytes(pack(head + values.tobytes()))
    if labels is not None:
        beside = name.replace("images", "labels").replace("idx3", "idx1").replace("idx4", "idx1")
        head = struct.pack(">2I", 0x0801, len(labels))
        (folder / beside).write_bytes(pack(head + bytes(labels)))
    return folder / name


def stored(prepared):
    """Both sides together: a row of values for each picture, sorted."""
    rows = np.concatenate([prepared.train.pictures, prepared.valid.pictures])
    return sorted(row.tobytes() for row in rows)


def expected(values):
    return sorted(one.transpose(2, 0, 1).tobytes() for one in values)


def store_folder(cache):
    (folder,) = cache.iterdir()
    return folder


# Sources


@pytest.mark.parametrize(
    "source", ["folder", "nested", "glob", "list", "parquet", "struct", "paths", "bmp", "tiff"]
)
def test_every_source_gives_the_same_pictures(source, tmp_path):
    values = noise(30)
    data = tmp_path / "data"
    given = data
    if source in ("folder", "glob", "list"):
        write(data, values)
        given = {"glob": str(data / "*.png"), "list": [data / "000.png", data]}.get(source, data)
    elif source == "nested":
        write(data, values[:10])
        write(data / "sub" / "deep", values[10:])
        (data / ".hidden.png").write_bytes(b"not read")
    elif source in ("bmp", "tiff"):
        write(data, values, source)
    elif source == "parquet":
        given = write_parquet(data / "a.parquet", values)
    else:
        write(data, values)
        cells = [
            {"bytes": encoded(one) if source == "struct" else None, "path": f"{number:03}.png"}
            for number, one in enumerate(values)
        ]
        given = data / "a.parquet"
        parquet.write_table(arrow.table({"image": cells}), given)
    prepared = image.prepare(SMALL, given, tmp_path / "cache")
    assert stored(prepared) == expected(values)
    assert prepared.facts["pictures"] == 30
    assert prepared.facts["classes"] == 0
    assert prepared.facts["tokenizer"] == ""
    assert prepared.train.labels is None
    assert prepared.facts["train_pictures"] == len(prepared.train)
    assert prepared.facts["valid_pictures"] == len(prepared.valid)
    assert min(len(prepared.train), len(prepared.valid)) > 0


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("train-images-idx3-ubyte.gz", 1),
        ("train-images.idx3-ubyte", 1),
        ("x-images-idx4-ubyte.gz", 3),
    ],
)
def test_idx_files(name, channels, tmp_path):
    values = noise(30, channels=channels)
    plain = values[..., 0] if channels == 1 else values
    path = write_idx(tmp_path, plain, [n % 10 for n in range(30)], name)
    config = image.Config(size=SIZE, channels=channels)
    for source in (path, tmp_path):
        prepared = image.prepare(config, source, tmp_path / ".cache")
        assert stored(prepared) == expected(values)
        assert prepared.train.label_names == tuple(map(str, range(10)))
        by_content = {v.transpose(2, 0, 1).tobytes(): n % 10 for n, v in enumerate(values)}
        for row, label in zip(prepared.train.pictures, prepared.train.labels, strict=True):
            assert by_content[row.tobytes()] == label


def test_a_label_file_that_appears_makes_a_new_store(tmp_path):
    path = write_idx(tmp_path, noise(9)[..., 0])
    assert image.prepare(SMALL, path, tmp_path / ".cache").train.labels is None
    write_idx(tmp_path, noise(9)[..., 0], [1, 2, 3] * 3)
    assert image.prepare(SMALL, path, tmp_path / ".cache").train.label_names == ("1", "2", "3")


@pytest.mark.slow  # importing `datasets` takes seconds
@pytest.mark.parametrize("features", [True, False])
def test_hub_dataset_is_streamed(features, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    values = noise(20)
    columns = {"image": [{"bytes": encoded(v), "path": None} for v in values], "label": [0, 1] * 10}
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["dog", "cat"])}
    path = tmp_path / "data" / "train.parquet"
    path.parent.mkdir()
    if features:
        table = datasets.Dataset.from_dict(columns, datasets.Features(kinds))
        table.to_parquet(path)
    else:
        parquet.write_table(arrow.table(columns), path)
    prepared = image.prepare(SMALL, f"hf:{path.parent}", tmp_path / "cache")
    assert stored(prepared) == expected(values)
    assert prepared.train.label_names == (("cat", "dog") if features else ("0", "1"))
    again = image.prepare(SMALL, path, tmp_path / "cache")  # the names stand in the file too
    assert again.train.label_names == prepared.train.label_names
    assert again.train.labels.tolist() == prepared.train.labels.tolist()
    with pytest.raises(DataError, match="cannot be opened"):
        image.prepare(SMALL, f"hf:{path.parent}::test", tmp_path / "cache")
    if features:
        with pytest.raises(DataError, match="no column 'imag'; did you mean 'image'"):
            image.prepare(image.Config(image_column="imag"), f"hf:{path.parent}", tmp_path / "c")


def test_a_file_that_is_named_twice_is_read_once_in_its_first_place(tmp_path):
    data = write(tmp_path / "data", noise(3))
    names = [one.place.name for one in find([data / "002.png", data, data / "000.png"])]
    assert names == ["002.png", "000.png", "001.png"]


# Decoding


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "bmp", "gif", "tiff"])
def test_formats(kind):
    red = Image.new("RGB", (20, 16), (200, 30, 60))
    found = decode(encoded(red, kind), FORM)
    assert found.pixels.shape == (3, SIZE, SIZE)
    assert found.pixels.dtype == np.uint8
    assert not found.animated
    difference = found.pixels.astype(int) - np.array([200, 30, 60])[:, None, None]
    assert np.abs(difference).max() <= 5  # JPEG and WebP lose a little


def half_clear(mode):
    picture = Image.new("RGBA", (SIZE, SIZE), (100, 0, 200, 255))
    picture.paste((9, 9, 9, 0), (0, 0, SIZE, SIZE // 2))
    return picture.convert(mode)


def deep(mode):
    ramp = np.linspace(0, 65535, SIZE).round().astype(np.uint16 if mode == "I;16" else np.int32)
    return Image.fromarray(np.tile(ramp, (SIZE, 1)))


def test_cmyk():
    ink = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    for kind in ("jpeg", "tiff"):
        found = decode(encoded(ink, kind), FORM).pixels.astype(int)
        assert np.abs(found - np.array([255, 0, 0])[:, None, None]).max() <= 2


def test_palette():
    picture = Image.new("P", (SIZE, SIZE), 1)
    picture.putpalette([0, 0, 0, 10, 200, 30])
    for kind in ("png", "gif", "bmp"):
        assert decode(encoded(picture, kind), FORM).pixels[:, 3, 3].tolist() == [10, 200, 30]
    clear = encoded(picture, transparency=1)
    assert (decode(clear, FORM).pixels == 255).all()
    clear = encoded(picture, transparency=b"\xff\x80")  # half of it through: bytes for each colour
    assert np.allclose(decode(clear, FORM).pixels[:, 3, 3], [132, 227, 142], atol=2)


@pytest.mark.parametrize("kind", ["png", "webp", "tiff"])
def test_transparency_lies_on_white(kind):
    lossless = {"lossless": True} if kind == "webp" else {}
    found = decode(encoded(half_clear("RGBA"), kind, **lossless), FORM).pixels
    assert (found[:, :4] == 255).all()
    assert (found[:, 4:] == np.array([100, 0, 200])[:, None, None]).all()


def test_grey_with_transparency_and_one_bit():
    found = decode(encoded(half_clear("LA")), GREY).pixels
    level = np.asarray(half_clear("RGBA").convert("RGB").convert("L"))[-1, 0]
    assert (found[0, :4] == 255).all()
    assert (found[0, 4:] == level).all()
    clear_black = encoded(Image.new("L", (SIZE, SIZE), 0), transparency=0)
    assert (decode(clear_black, GREY).pixels == 255).all()
    stripes = Image.fromarray(np.tile([True, False], (SIZE, SIZE // 2)))
    assert decode(encoded(stripes), FORM).pixels[2, 0].tolist() == [255, 0] * 4


@pytest.mark.parametrize(("mode", "kind"), [("I;16", "png"), ("I;16", "tiff"), ("I", "tiff")])
def test_sixteen_bits_are_scaled_by_their_own_range(mode, kind):
    found = decode(encoded(deep(mode), kind), GREY).pixels
    assert found[0, 3].tolist() == [round(255 * n / 7) for n in range(8)]
    assert (decode(encoded(deep(mode), kind), FORM).pixels == found).all()


def test_sixteen_bits_big_endian():
    """A TIFF by hand: a header, eight tags, then 2 x 2 values."""
    tags = {256: 2, 257: 2, 258: 16, 262: 1, 273: 8 + 2 + 8 * 12 + 4, 277: 1, 278: 2, 279: 8}
    content = struct.pack(">2sHIH", b"MM", 42, 8, len(tags))
    content += b"".join(struct.pack(">HHII", tag, 4, 1, value) for tag, value in tags.items())
    content += struct.pack(">I4H", 0, 0, 65535, 257, 32896)
    found = decode(content, Form(2, 1, 100)).pixels
    assert found.tolist() == [[[0, 255], [1, 128]]]


def test_floating_point_pictures_are_refused_with_the_reason():
    with pytest.raises(DataError, match="floating-point"):
        decode(encoded(Image.new("F", (9, 9), 0.5), "tiff"), FORM)


def test_grey_of_colour():
    values = noise(1)[0]
    found = decode(encoded(values), GREY).pixels[0]
    assert np.abs(found - values @ [0.299, 0.587, 0.114]).max() <= 0.51
    assert (
        decode(encoded(np.repeat(values[..., :1], 3, 2)), GREY).pixels[0] == values[..., 0]
    ).all()


TURNED = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x, 2).transpose(1, 0, 2),
    8: lambda x: np.rot90(x, 1),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "tiff", "jpeg"])
def test_exif_orientation(orientation, kind):
    values = np.zeros((32, 48, 3), np.uint8)
    values[:16, :24], values[:16, 24:], values[16:, :24] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = decode(encoded(values, kind, exif=exif), FORM).pixels.astype(int)
    upright = decode(encoded(np.ascontiguousarray(TURNED[orientation](values))), FORM).pixels
    assert np.abs(found - upright).max() <= (0 if kind != "jpeg" else 30)


def test_damaged_exif_data_do_not_cost_the_picture():
    content = encoded(noise(1)[0], exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12")
    assert (decode(content, FORM).pixels == noise(1)[0].transpose(2, 0, 1)).all()


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (SIZE, SIZE), colour) for colour in ("red", "lime", "blue")]
    for kind in ("gif", "png", "webp", "tiff"):
        lossless = {"lossless": True} if kind == "webp" else {}
        content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **lossless)
        found = decode(content, FORM)
        assert found.animated, kind
        assert found.pixels[:, 2, 2].tolist() == [255, 0, 0], kind
        (tmp_path / f"a.{kind}").write_bytes(content)
    still = encoded(noise(1)[0])
    (tmp_path / "b.png").write_bytes(still)
    assert image.prepare(SMALL, tmp_path, tmp_path / ".cache").facts["animated"] == 4


def test_a_second_view_is_no_animation():
    views = [Image.fromarray(one) for one in noise(2, size=32)]
    content = encoded(views[0], "mpo", save_all=True, append_images=views[1:])
    assert not decode(content, FORM).animated
    assert (decode(content, FORM).pixels == decode(encoded(views[0], "jpeg"), FORM).pixels).all()


def test_short_side_is_resized_and_the_centre_cropped():
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, :20], wide[:, 20:40], wide[:, 40:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    green = np.array([0, 255, 0])[:, None, None]
    for values in (wide, np.ascontiguousarray(wide.transpose(1, 0, 2))):
        found = decode(encoded(values), FORM).pixels
        inner = found[:, 1:-1, 1:-1]  # antialiasing mixes the very edge with what is beside it
        assert (inner == green).all()
    tile = np.kron((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8), [[1]])
    fine = decode(encoded(tile.astype(np.uint8)), GREY).pixels.astype(int)
    assert np.abs(fine - 127).max() < 12  # without antialiasing: 0 or 255
    small = decode(encoded(noise(1, size=3)[0]), FORM)  # smaller pictures are enlarged
    assert small.pixels.shape == (3, SIZE, SIZE)


def test_large_jpegs_are_decoded_at_a_fraction_of_their_size_and_look_the_same():
    ramp = np.linspace(0, 255, 400).astype(np.uint8)
    values = np.stack([np.tile(ramp, (400, 1)), np.tile(ramp[:, None], (1, 400))] * 2, 2)[..., :3]
    values = np.ascontiguousarray(values)
    whole = decode(encoded(values), FORM).pixels.astype(int)
    assert np.abs(decode(encoded(values, "jpeg", quality=95), FORM).pixels - whole).max() <= 4


def test_decoding_in_threads_keeps_the_order():
    values = noise(200)
    stream = (Picture(str(n), encoded(one)) for n, one in enumerate(values))
    found = list(decode_all(stream, FORM))
    assert [picture.where for picture, _ in found] == [str(n) for n in range(200)]
    for (_, result), one in zip(found, values, strict=True):
        assert (result.pixels == one.transpose(2, 0, 1)).all()


# Bad pictures


def test_a_truncated_picture_among_a_hundred_is_counted_and_named(tmp_path, capsys):
    data = write(tmp_path / "data", noise(99))
    whole = encoded(noise(1, 5, 64)[0], "jpeg")
    (data / "half.jpg").write_bytes(whole[: len(whole) // 2])
    prepared = image.prepare(SMALL, data, tmp_path / "cache")
    assert stored(prepared) == expected(noise(99))
    assert prepared.facts["bad_items"] == 1
    assert "half.jpg: image file is truncated" in prepared.facts["bad_item_examples"][0]
    warning = capsys.readouterr().err
    assert "1 of 100 items cannot be used" in warning
    assert "half.jpg" in warning


def test_too_many_bad_pictures_stop(tmp_path):
    cells = [encoded(one) for one in noise(100)]
    cells[4], cells[7], cells[70] = b"no picture", None, cells[70][:60]
    path = tmp_path / "a.parquet"
    parquet.write_table(arrow.table({"image": cells}), path)
    with pytest.raises(DataError, match=r"3 of 100 items cannot be used") as failure:
        image.prepare(SMALL, path, tmp_path / "cache")
    text = str(failure.value)
    assert "row 5: it is not a JPEG, PNG, WebP, BMP, GIF or TIFF picture" in text
    assert "row 8: it is empty" in text
    assert "row 71: " in text
    assert list((tmp_path / "cache").iterdir()) == []


def enlarged_header(content, width, height):
    """A PNG that says it is that large."""
    body = b"IHDR" + struct.pack(">2I", width, height) + content[24:29]
    return content[:12] + body + struct.pack(">I", zlib.crc32(body)) + content[33:]


def test_too_large_pictures_are_not_decoded(tmp_path, capsys):
    data = write(tmp_path / "data", noise(60))
    content = encoded(noise(1, 9)[0])
    (data / "huge.png").write_bytes(enlarged_header(content, 12_000, 12_000))
    facts = image.prepare(SMALL, data, tmp_path / "cache").facts
    assert facts["bad_items"] == 1
    reason = "huge.png: 12,000 x 12,000 pixels are more than data.max_pixels = 100,000,000"
    assert reason in facts["bad_item_examples"][0]
    with pytest.raises(DataError, match="61 of 61 items"):
        image.prepare(image.Config(size=4, max_pixels=63), data, tmp_path / "cache")


def test_the_limit_of_pillow_neither_warns_nor_stays_lifted(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    for kind in ("png", "tiff", "gif", "webp", "bmp", "jpeg"):
        items = [Picture("a", encoded(noise(1, size=7)[0], kind))] * 3
        items += [Picture("b", encoded(noise(1, size=32)[0], kind))] * 60
        results = [result for _, result in decode_all(items, FORM)]
        assert not any(isinstance(result, DataError) for result in results), kind
    assert Image.MAX_IMAGE_PIXELS == 40


# The store


def test_a_prepared_source_is_opened_again(tmp_path):
    data, cache = write(tmp_path / "data", noise(30)), tmp_path / "cache"
    first = image.prepare(SMALL, data, cache)
    folder = store_folder(cache)
    assert folder.name.startswith("image-")
    made = [file.stat().st_mtime_ns for file in (folder, *sorted(folder.iterdir()))]
    second = image.prepare(SMALL, data, cache)
    assert [f.stat().st_mtime_ns for f in (folder, *sorted(folder.iterdir()))] == made
    assert second.facts == first.facts
    assert second.spec == first.spec
    assert (second.train.pictures == first.train.pictures).all()
    image.prepare(image.Config(size=4), data, cache)
    assert len(list(cache.iterdir())) == 2
    touched = data / "000.png"
    os.utime(touched, ns=(1, 1))
    third = image.prepare(SMALL, data, cache)
    assert len(list(cache.iterdir())) == 3
    assert third.facts["fingerprint"] == first.facts["fingerprint"]  # the pictures are the same


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: cut(folder / "train.bin"),
        lambda folder: (folder / "valid.bin").unlink(),
        lambda folder: cut(folder / "meta.json"),
        lambda folder: cut(folder / "train-labels.npy"),
        lambda folder: np.save(folder / "valid-labels.npy", np.zeros(99, np.int64)),
        lambda folder: (folder / "meta.json").write_text("{}"),
    ],
)
def test_damage_is_noticed_and_mended(damage, tmp_path, capsys):
    data, cache = tmp_path / "data", tmp_path / "cache"
    write(data / "cat", noise(20))
    write(data / "dog", noise(20, 1))
    first = image.prepare(SMALL, data, cache)
    train, valid = np.array(first.train.pictures), np.array(first.valid.pictures)
    damage(store_folder(cache))
    again = image.prepare(SMALL, data, cache)
    assert "damaged; they are made again" in capsys.readouterr().err
    assert again.facts == first.facts
    assert (again.train.pictures == train).all()
    assert (again.valid.pictures == valid).all()
    assert (again.valid.labels == first.valid.labels).all()
    image.prepare(SMALL, data, cache)
    assert capsys.readouterr().err == ""


def test_equal_pictures_fall_on_one_side(tmp_path):
    values = noise(60)
    write(tmp_path / "data" / "a", values)
    write(tmp_path / "data" / "b", values, "bmp")  # other files, the same pictures
    config = image.Config(size=SIZE, valid_fraction=0.3)
    prepared = image.prepare(config, tmp_path / "data", tmp_path / "cache")
    sides = [{row.tobytes() for row in s.pictures} for s in (prepared.train, prepared.valid)]
    assert not sides[0] & sides[1]
    assert len(sides[0] | sides[1]) == 60
    assert stored(prepared) == expected(np.concatenate([values, values]))
    assert 8 <= len(sides[1]) <= 30
    assert prepared.facts["duplicates"] == 60
    assert not prepared.facts["duplicates_dropped"]
    config = image.Config(size=SIZE, valid_fraction=0.3, drop_duplicates=True)
    dropped = image.prepare(config, tmp_path / "data", tmp_path / "cache")
    assert stored(dropped) == expected(values)
    assert dropped.facts["duplicates"] == 60
    assert dropped.facts["pictures"] == 120
    assert {row.tobytes() for row in dropped.valid.pictures} == sides[1]


def test_adding_files_moves_no_picture(tmp_path):
    data = write(tmp_path / "data", noise(80))
    config = image.Config(size=SIZE, valid_fraction=0.2)
    before = image.prepare(config, data, tmp_path / "cache")
    write(data / "more", noise(80, 1))
    after = image.prepare(config, data, tmp_path / "cache")
    for side in ("train", "valid"):
        old, new = ({row.tobytes() for row in getattr(p, side).pictures} for p in (before, after))
        assert old < new


@pytest.mark.parametrize("fraction", [0.001, 0.5])
@pytest.mark.parametrize("count", [2, 3, 7])
def test_few_pictures_fill_both_sides(count, fraction, tmp_path):
    for seed in range(5):
        data = write(tmp_path / f"{seed}", np.repeat(noise(count, seed), 2, 0))
        config = image.Config(size=SIZE, valid_fraction=fraction)
        prepared = image.prepare(config, data, tmp_path / "cache")
        sides = [{row.tobytes() for row in s.pictures} for s in (prepared.train, prepared.valid)]
        assert min(map(len, sides)) > 0
        assert not sides[0] & sides[1]
        assert stored(prepared) == expected(np.repeat(noise(count, seed), 2, 0))


def test_one_picture_alone_is_an_error(tmp_path):
    data = write(tmp_path / "data", np.repeat(noise(1), 3, 0))
    with pytest.raises(DataError, match=r"3 pictures, but .* at least two different ones"):
        image.prepare(SMALL, data, tmp_path / "cache")


@pytest.mark.parametrize("channels", [1, 3])
def test_spec_holds_mean_and_deviation_of_the_training_part(channels, tmp_path, monkeypatch):
    monkeypatch.setattr("selfsup.data.image_store.BLOCK_BYTES", 1000)
    data = write(tmp_path / "data", noise(40) // np.array([1, 2, 3], np.uint8))
    config = image.Config(size=SIZE, channels=channels)
    prepared = image.prepare(config, data, tmp_path / "cache")
    values = np.asarray(prepared.train.pictures, dtype=np.float64) / 255
    assert prepared.spec == image.prepare(config, data, tmp_path / "cache").spec
    assert (prepared.spec.size, prepared.spec.channels) == (SIZE, channels)
    np.testing.assert_allclose(prepared.spec.mean, values.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(prepared.spec.std, values.std((0, 2, 3)), rtol=1e-10)


def test_a_channel_that_never_changes():
    mean, std = moments(np.full((5, 1, 4, 4), 51, np.uint8))
    assert mean == pytest.approx([0.2])
    assert std == [1e-3]


def test_a_batch_holds_the_decoded_pictures(tmp_path):
    values = noise(50, size=12)
    data = write(tmp_path / "data", values)
    train = image.prepare(SMALL, data, tmp_path / "cache").train
    by_content = {decode(encoded(one), FORM).pixels.tobytes() for one in values}
    numbers = np.array([30, 2, 2, 41, 0])
    batch = train.batch(numbers)
    assert train.fields == ("image", "index") == tuple(batch)
    assert batch["index"].tolist() == numbers.tolist()
    assert batch["image"].dtype == torch.uint8
    assert batch["image"].shape == (5, 3, SIZE, SIZE)
    assert (batch["image"].numpy() == np.stack([train.pictures[n] for n in numbers])).all()
    assert {row.numpy().tobytes() for row in batch["image"]} <= by_content
    batch["image"][0] = 0  # a copy: the store is not written
    assert train.pictures[30].any()


# Labels that a corpus happens to have


def test_sub_folders_are_classes(tmp_path):
    values = {name: noise(20, seed) for seed, name in enumerate(("10", "9", "cat"))}
    for name, rows in values.items():
        write(tmp_path / "data" / name / "deep", rows)
    prepared = image.prepare(SMALL, tmp_path / "data", tmp_path / "cache")
    assert prepared.train.label_names == prepared.valid.label_names == ("9", "10", "cat")
    assert prepared.facts["classes"] == 3
    for side in (prepared.train, prepared.valid):
        assert side.labels.dtype == np.int64
        assert len(side.labels) == len(side) > 0
        for row, label in zip(side.pictures, side.labels, strict=True):
            name = side.label_names[label]
            assert row.tobytes() in {v.transpose(2, 0, 1).tobytes() for v in values[name]}
    assert image.prepare(SMALL, tmp_path / "data" / "cat", tmp_path / "cache").train.labels is None
    write(tmp_path / "data", noise(1, 9))  # one picture lies in no sub-folder
    assert image.prepare(SMALL, tmp_path / "data", tmp_path / "cache").train.labels is None


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([2, 10] * 15, ("2", "10")),
        ([True, False] * 15, ("false", "true")),
        (["b", " a "] * 15, ("a", "b")),
        ([0.5, 1.5] * 15, ()),
        (["b", None] * 15, ()),
    ],
)
def test_labels_of_a_parquet_file(labels, names, tmp_path, capsys):
    path = write_parquet(tmp_path / "a.parquet", noise(30), label=labels)
    prepared = image.prepare(SMALL, path, tmp_path / "cache")
    assert prepared.train.label_names == names
    assert (prepared.train.labels is None) == (not names)
    assert ("15 pictures have no label" in capsys.readouterr().err) == (None in labels)


def test_class_names_of_a_hugging_face_parquet_file(tmp_path):
    kinds = {"info": {"features": {"label": {"names": ["dog", "cat"], "_type": "ClassLabel"}}}}
    schema = arrow.schema({"image": arrow.binary(), "label": arrow.int64()})
    schema = schema.with_metadata({"huggingface": json.dumps(kinds)})
    path = write_parquet(tmp_path / "a.parquet", noise(30), schema, label=[0, 1] * 15)
    assert image.prepare(SMALL, path, tmp_path / "cache").train.label_names == ("cat", "dog")
    assert image.read_labels(path, "classification").labels == ["dog", "cat"] * 15


# Errors of sources


def test_what_cannot_be_found(tmp_path):
    data = write(tmp_path / "data", noise(3))
    (data / "notes.txt").write_text("")
    for source, message in (
        (data / "0000.png", "no file or folder .*0000.png; did you mean '000.png'"),
        (data / "notes.txt", "known: .jpg .jpeg .png"),
        ("missing.png", "no file or folder .*missing.png"),
        (str(data / "*.gif"), "gives no picture"),
        ([], "list of sources is empty"),
        ("hf:a:b:c:d", "write hf:owner/name"),
    ):
        with pytest.raises(DataError, match=message):
            image.prepare(SMALL, source, tmp_path / "cache")


def test_a_hub_dataset_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'selfsup\[hub\]'"):
        image.prepare(SMALL, "hf:owner/name", tmp_path / "cache")


def test_other_files_in_a_folder_are_named(tmp_path, capsys):
    data = write(tmp_path / "data", noise(3))
    (data / "notes.txt").write_text("")
    image.prepare(SMALL, data, tmp_path / "cache")
    assert "1 files are not read (unknown extension): notes.txt" in capsys.readouterr().err


def test_damaged_files_of_many_pictures_are_named(tmp_path):
    values = noise(30)
    whole = write_parquet(tmp_path / "a.parquet", values)
    wrong = tmp_path / "wrong.parquet"
    wrong.write_bytes(whole.read_bytes()[:-20])
    numbers = tmp_path / "numbers.parquet"
    parquet.write_table(arrow.table({"image": list(range(30))}), numbers)
    plain = write_idx(tmp_path, values[..., 0], name="cut-images-idx3-ubyte")
    cut(plain)
    packed = write_idx(tmp_path, values[..., 0], name="cut-images-idx3-ubyte.gz")
    packed.write_bytes(packed.read_bytes()[:-30])
    labels = write_idx(tmp_path, values[..., 0], [1] * 29, "few-images-idx3-ubyte")
    bare = tmp_path / "bare-images-idx3-ubyte"
    bare.write_bytes(b"\0\0\x0d\x03")
    odd = write_idx(tmp_path, noise(3, channels=2), name="odd-images-idx4-ubyte")
    for path, message in (
        (wrong, "wrong.parquet: not a readable Parquet file"),
        (numbers, "numbers.parquet: row 1: 'image' holds int"),
        (plain, "cut-images-idx3-ubyte: not a whole idx file .*row 30 of 30"),
        (packed, "cut-images-idx3-ubyte.gz: not a whole idx file"),
        (labels, "30 pictures, but 29 labels in few-labels-idx1-ubyte"),
        (bare, "not an idx file of pictures .*0x00000d03"),
        (odd, "1 or 3 channels"),
    ):
        with pytest.raises(DataError, match=message):
            image.prepare(SMALL, path, tmp_path / "cache")
    with pytest.raises(DataError, match="no column 'imgae'; did you mean 'image'"):
        image.prepare(image.Config(image_column="imgae"), whole, tmp_path / "cache")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": 0}, "data.size"),
        ({"channels": 4}, "data.channels"),
        ({"valid_fraction": 0.6}, "data.valid_fraction"),
        ({"max_pixels": 0}, "data.max_pixels"),
        ({"siz": 3}, "did you mean 'size'"),
    ],
)
def test_wrong_configuration(values, message):
    with pytest.raises(ConfigError, match=message):
        from_mapping(image.Config, values, "data")


# The preprocessor


def test_preprocessor_is_saved_and_loaded(tmp_path):
    spec = ImageSpec(size=9, channels=3, mean=(0.1, 0.2, 1 / 3), std=(0.4, 0.5, 0.6))
    image.ImagePreprocessor(spec, 1234).save(tmp_path)
    loaded = image.load_preprocessor(tmp_path)
    assert loaded.spec == spec
    assert loaded.max_pixels == 1234
    assert loaded.limited(7) is loaded
    config = image.with_preprocessor(image.Config(valid_fraction=0.3), tmp_path)
    assert config == image.Config(size=9, channels=3, valid_fraction=0.3)
    for damage in ("size = 'large'", "size = 3", "channels ="):
        (tmp_path / "preprocessor.toml").write_text(damage)
        with pytest.raises(DataError, match="not the preprocessor of a picture model"):
            image.load_preprocessor(tmp_path)


def preprocessor(channels=3, max_pixels=10**6):
    numbers = (0.5,) * channels
    spec = ImageSpec(size=SIZE, channels=channels, mean=numbers, std=numbers)
    return image.ImagePreprocessor(spec, max_pixels)


def test_a_users_items(tmp_path):
    values = noise(5)
    data = write(tmp_path, values)
    items = [
        data / "000.png",
        str(data / "001.png"),
        encoded(values[2]),
        Image.open(data / "003.png"),
        values[4],
    ]
    batches = list(preprocessor().batches(iter(items), 2))
    assert [numbers for numbers, _ in batches] == [[0, 1], [2, 3], [4]]
    found = torch.cat([batch["image"] for _, batch in batches])
    assert (found.numpy() == values.transpose(0, 3, 1, 2)).all()
    grey = values[0, ..., 0]
    ((_, batch),) = preprocessor(1).batches([grey, grey[..., None]], 9)
    assert (batch["image"].numpy() == grey).all()
    clear = np.concatenate([values[0], np.zeros((SIZE, SIZE, 1), np.uint8)], 2)
    ((_, batch),) = preprocessor().batches([clear], 9)
    assert (batch["image"] == 255).all()
    assert list(preprocessor().batches([], 4)) == []


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("missing.png", r"item 1 \(missing.png\) cannot be used: No such file"),
        (b"nothing", "item 1 cannot be used: it is not a JPEG"),
        (np.zeros((3, 4), np.float32), r"item 1 is an array of float32 \(3, 4\); expected uint8"),
        (np.zeros((3, 8, 8), np.uint8), "1, 3 or 4 channels"),
        (np.zeros((0, 8), np.uint8), "item 1 is an array"),
        (None, "item 1 is NoneType"),
        (encoded(noise(1, size=40)[0]), "40 x 40 pixels are more than data.max_pixels = 1,000"),
    ],
)
def test_a_users_bad_item_is_named(item, message):
    with pytest.raises(DataError, match=message):
        list(preprocessor(max_pixels=1000).batches([noise(1)[0], item], 4))


def test_batch_size_must_be_positive():
    with pytest.raises(ConfigError, match="batch_size"):
        list(preprocessor().batches([], 0))


# Labelled pictures

LABELS = ["cat", "dog", "cat", "cat", "dog", "dog"]


def labelled_source(kind, folder):
    """The same six pictures in every kind of source, and read_labels' options."""
    values = noise(6)
    options = {}
    if kind == "folder":
        for number, label in enumerate(LABELS):
            place = folder / "data" / label
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number}.png").write_bytes(encoded(values[number]))
        return folder / "data", options
    if kind == "parquet":
        return write_parquet(folder / "a.parquet", values, label=LABELS, file=["x"] * 6), options
    if kind == "named":
        path = folder / "a.parquet"
        cells = [encoded(one) for one in values]
        parquet.write_table(arrow.table({"scan": cells, "animal": LABELS}), path)
        return path, {"text": "scan", "label": "animal"}
    write(folder / "photos", values)
    rows = [(f"photos/{number:03}.png", label) for number, label in enumerate(LABELS)]
    path = folder / f"a.{kind.removeprefix('bare ')}"
    if kind == "jsonl":
        text = "".join(json.dumps({"filename": a, "label": b}) + "\n" for a, b in rows)
    elif kind == "bare tsv":
        text = "".join(f"{label}\t{name}\n" for name, label in rows)
        options = {"text": 2, "label": "1"}
    else:
        text = "".join(f"{a},{b}\n" for a, b in [("path", "class"), *rows])
    path.write_text(text)
    return path, options


@pytest.mark.parametrize("kind", ["folder", "parquet", "named", "csv", "jsonl", "bare tsv"])
def test_every_labelled_source_gives_the_same_examples(kind, tmp_path):
    path, options = labelled_source(kind, tmp_path)
    labelled = image.read_labels(path, "classification", **options)
    order = np.argsort(LABELS, kind="stable") if kind == "folder" else np.arange(6)
    assert labelled.labels == [LABELS[n] for n in order]
    assert labelled.names == ("cat", "dog")
    assert labelled.task == "classification"
    assert labelled.source == str(path)
    data = preprocessor().labelled(labelled)
    assert data.fields == ("image", "label", "index")
    assert (data.lengths, data.truncated) == (None, 0)
    assert data.task == "classification"
    assert len(data) == 6
    batch = data.batch(np.array([4, 1]))
    assert sorted(batch) == sorted(data.fields)
    assert batch["index"].tolist() == [4, 1]
    assert batch["label"].dtype == torch.int64
    names = ("cat", "dog")
    assert [names[n] for n in batch["label"]] == [LABELS[order[4]], LABELS[order[1]]]
    assert (batch["image"].numpy() == noise(6)[order[[4, 1]]].transpose(0, 3, 1, 2)).all()


def test_labelled_idx_file(tmp_path):
    path = write_idx(tmp_path, noise(12)[..., 0], [9, 3, 0] * 4)
    labelled = image.read_labels(path, "classification")
    assert labelled.names == ("0", "3", "9")
    assert labelled.labels == ["9", "3", "0"] * 4
    data = preprocessor(1).labelled(labelled)
    assert (data.pictures[:, 0] == noise(12)[..., 0]).all()
    assert data.labels.tolist() == [2, 1, 0] * 4


def test_regression(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", noise(3), score=[0.5, -1.25, 3.0])
    labelled = image.read_labels(path, "regression")
    assert labelled.labels == [0.5, -1.25, 3.0]
    assert labelled.names == ()
    batch = preprocessor().labelled(labelled).batch(np.array([1, 0]))
    assert batch["label"].dtype == torch.float32
    assert batch["label"].tolist() == [-1.25, 0.5]
    for number, bad in enumerate(("much", "nan", "inf")):
        path = write_parquet(tmp_path / f"{number}.parquet", noise(2), label=["1", bad])
        with pytest.raises(DataError, match=f"row 2: its label must be a finite number.*{bad}"):
            image.read_labels(path, "regression")


def test_labels_of_test_data(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", noise(2), label=["cat", "dig"])
    with pytest.raises(DataError, match=r"row 2: label 'dig' is not among.*did you mean 'dog'"):
        image.read_labels(path, "classification", names=("cat", "dog"))
    write(tmp_path / "data" / "dog", noise(2))  # one class is enough there
    labelled = image.read_labels(tmp_path / "data", "classification", names=("cat", "dog"))
    assert labelled.names == ("cat", "dog")
    assert preprocessor().labelled(labelled).labels.tolist() == [1, 1]
    with pytest.raises(DataError, match="every label is 'dog'"):
        image.read_labels(tmp_path / "data", "classification")


def test_wrong_labelled_sources(tmp_path):
    write(tmp_path / "photos", noise(2))
    table = tmp_path / "a.csv"
    table.write_text("path,label\nphotos/000.png,a\nphotos/007.png,b\n")
    empty = tmp_path / "b.csv"
    empty.write_text("path,label\nphotos/000.png,a\nphotos/001.png,\n")
    columns = write_parquet(tmp_path / "c.parquet", noise(2), label=["a", "b"], category=[1, 2])
    two = tmp_path / "d.csv"
    two.write_text("path,file,label\nphotos/000.png,photos/000.png,a\n")
    lines = tmp_path / "e.jsonl"
    lines.write_text('{"path": "photos/000.png", "label": 1}\n{"label": 2}\n')
    for path, message in (
        (table, r"a.csv:3: no file .*007.png"),
        (empty, r"b.csv:3: its label is ''"),
        (columns, "'label' and 'category' could each be the label column"),
        (two, "found path and file; say which with text=NAME"),
        (lines, "e.jsonl:2: 'path' must be a path, got None"),
        (tmp_path / "photos", "000.png: has no label; every picture must lie in a sub-folder"),
        (tmp_path / "f.txt", "no file or folder"),
    ):
        with pytest.raises(DataError, match=message):
            image.read_labels(path, "classification")
    with pytest.raises(DataError, match="no column 'imag'"):
        image.read_labels(columns, "classification", text="imag", label="label")
    with pytest.raises(ConfigError, match="has no columns to name"):
        image.read_labels(tmp_path / "photos", "classification", label="x")
    with pytest.raises(ConfigError, match="leave text_b out"):
        image.read_labels(table, "classification", text_b="label")
    with pytest.raises(ConfigError, match="classification or regression, not for 'tagging'"):
        image.read_labels(table, "tagging")


def test_a_labelled_picture_that_cannot_be_used_is_named(tmp_path):
    write(tmp_path / "data" / "a", noise(2))
    write(tmp_path / "data" / "b", noise(2))
    (tmp_path / "data" / "b" / "001.png").write_bytes(b"nothing")
    labelled = image.read_labels(tmp_path / "data", "classification")
    with pytest.raises(DataError, match=r"data: item 3 \(.*001.png\) cannot be used"):
        preprocessor().labelled(labelled)
