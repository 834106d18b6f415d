"""Pictures decoded in threads to squares of one size.

Every picture becomes 8-bit grey or RGB: transparency lies on white, 16 bits are scaled by their own
range, the EXIF orientation is applied, of an animation the first frame is taken.
"""

import io
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from selfsup.cores import cores
from selfsup.data.image_files import Content, Picture
from selfsup.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
CHUNK_PICTURES, CHUNK_BYTES = 32, 8 << 20  # what one thread decodes at a time
TO_EIGHT_BITS = ((np.arange(65536) * 255 + 32767) // 65535).astype(np.uint8)
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
Item = str | Content


@dataclass(frozen=True)
class Form:
    """What every picture becomes; the keys of `data.image.Config` with the same names."""

    size: int
    channels: int
    max_pixels: int


class Decoded(NamedTuple):
    """(channels, size, size) uint8 values, and whether the file holds more than this picture."""

    pixels: np.ndarray
    animated: bool


def decode_all(
    stream: Iterable[Picture], form: Form
) -> Iterator[tuple[Picture, Decoded | DataError]]:
    """Decodes in threads, a bounded number ahead; the order stays.

    Yields:
        (picture, what became of it): a `DataError` holds the reason why it cannot be used.
    """
    workers = min(8, cores())
    waiting: deque[tuple[list[Picture], Future]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        for chunk in _chunks(stream):
            waiting.append((chunk, pool.submit(_decode_chunk, chunk, form)))
            if len(waiting) > 2 * workers:
                ready, results = waiting.popleft()
                yield from zip(ready, results.result(), strict=True)
        for ready, results in waiting:
            yield from zip(ready, results.result(), strict=True)


def decode_items(items: Iterable[Item], form: Form, source: str = "") -> Iterator[np.ndarray]:
    """A user's items as (channels, size, size) uint8, in order; nothing is left out.

    Args:
        items: paths, encoded bytes, Pillow images, or (height, width[, channel]) uint8 arrays.
        form: what they become.
        source: where the items come from, for messages.

    Raises:
        DataError: an item cannot be used; its number and its path are named.
    """
    begin = f"{source}: item" if source else "item"
    stream = (_picture(item, f"{begin} {number}") for number, item in enumerate(items))
    for picture, result in decode_all(stream, form):
        if isinstance(result, DataError):
            raise DataError(f"{picture.where} cannot be used: {result}")
        yield result.pixels


def _picture(item: Any, where: str) -> Picture:
    if isinstance(item, str | Path):
        return Picture(f"{where} ({item})", Path(item).expanduser())
    if isinstance(item, Image.Image):
        try:
            item.load()  # here, as an image that is given twice must not be read by two threads
        except Exception as error:
            raise DataError(f"{where} cannot be used: {error}") from error
        return Picture(where, item)
    if isinstance(item, bytes):
        return Picture(where, item)
    if not isinstance(item, np.ndarray):
        raise DataError(
            f"{where} is {type(item).__name__}; expected a path, encoded bytes, a Pillow image or "
            "a uint8 array (height, width) or (height, width, channel)"
        )
    fits = item.ndim == 2 or (item.ndim == 3 and item.shape[2] in (1, 3, 4))
    if item.dtype != np.uint8 or not fits or 0 in item.shape:
        raise DataError(
            f"{where} is an array of {item.dtype} {item.shape}; expected uint8 (height, width) or "
            "(height, width, channel) with 1, 3 or 4 channels"
        )
    return Picture(where, item)


def _chunks(stream: Iterable[Picture]) -> Iterator[list[Picture]]:
    chunk: list[Picture] = []
    held = 0
    for picture in stream:
        chunk.append(picture)
        held += len(picture.content) if isinstance(picture.content, bytes) else 0
        if len(chunk) == CHUNK_PICTURES or held >= CHUNK_BYTES:
            yield chunk
            chunk, held = [], 0
    if chunk:
        yield chunk


def _decode_chunk(chunk: list[Picture], form: Form) -> list[Decoded | DataError]:
    out: list[Decoded | DataError] = []
    with _own_limit:
        for picture in chunk:
            try:
                out.append(decode(picture.content, form))
            except DataError as error:
                out.append(error)
    return out


class _OwnLimit:
    """Lifts Pillow's limit of pixels while any thread decodes: `max_pixels` is the limit here."""

    def __init__(self) -> None:
        self.lock, self.inside, self.before = threading.Lock(), 0, Image.MAX_IMAGE_PIXELS

    def __enter__(self) -> None:
        with self.lock:
            if self.inside == 0:
                self.before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            self.inside += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                Image.MAX_IMAGE_PIXELS = self.before


_own_limit = _OwnLimit()


def decode(content: Content, form: Form) -> Decoded:
    """One picture as (channels, size, size) uint8.

    The short side is resized to `size` with antialiasing, then the centre is cropped.

    Raises:
        DataError: it cannot be used; the message is the reason, and the caller knows the name.
    """
    if isinstance(content, np.ndarray):
        content = Image.fromarray(content[..., 0] if content.shape[2:] == (1,) else content)
    if isinstance(content, bytes) and not content:
        raise DataError("it is empty")
    try:
        if isinstance(content, Image.Image):
            return Decoded(_square(content, form), False)
        with Image.open(
            io.BytesIO(content) if isinstance(content, bytes) else content, formats=FORMATS
        ) as image:
            return _decode_file(image, form)
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError("it is not a JPEG, PNG, WebP, BMP, GIF or TIFF picture") from error
    except OSError as error:
        raise DataError(error.strerror or str(error)) from error
    except Exception as error:  # damaged files make each format raise its own
        raise DataError(f"{type(error).__name__}: {error}") from error


def _decode_file(image: Any, form: Form) -> Decoded:
    width, height = image.size
    if width * height > form.max_pixels:
        raise DataError(
            f"{width:,} x {height:,} pixels are more than data.max_pixels = {form.max_pixels:,}"
        )
    # the second view of an MPO, which is a JPEG to Pillow as well, is no animation
    animated = image.format != "MPO" and getattr(image, "is_animated", False)
    image.draft(None, (2 * form.size, 2 * form.size))  # a JPEG can be decoded at 1/2, 1/4 or 1/8
    image.load()
    return Decoded(_square(image, form), animated)


def _square(image: Image.Image, form: Form) -> np.ndarray:
    turn = TURNS.get(_orientation(image))
    image = _eight_bits(image, "RGB" if form.channels == 3 else "L")
    if turn is not None:
        image = image.transpose(turn)
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    box = (left, top, left + side, top + side)
    image = image.resize((form.size, form.size), Image.Resampling.BICUBIC, box)
    values = np.asarray(image).reshape(form.size, form.size, form.channels)
    return np.ascontiguousarray(values.transpose(2, 0, 1))


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF data, of any kind; the pixels may be whole
        return 1


def _eight_bits(image: Image.Image, mode: str) -> Image.Image:
    """The picture in `mode`, RGB or L, whatever it was."""
    if image.mode == "F":
        raise DataError("its pixels are floating-point numbers, which have no fixed range")
    if image.mode.startswith("I"):  # 16 bits, stored in 16 or 32
        image = Image.fromarray(TO_EIGHT_BITS[np.asarray(image).clip(0, 65535)])
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == mode else image.convert(mode)
