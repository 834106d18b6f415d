"""What the panels of all kinds of data are made of; see `gallery.py`."""

import base64
import io
from typing import Any

import numpy as np
from jaxtyping import Int
from PIL import Image

from selfsup.data.dataset import Dataset
from selfsup.evaluation.frozen import extract, pooled_features
from selfsup.evaluation.similarity import nearest_neighbours
from selfsup.model import Model
from selfsup.randomness import Order

Cell = dict[str, Any]
Panel = dict[str, Any]


def held_out_numbers(held_out: Dataset, count: int) -> Int[np.ndarray, " shown"]:
    """The numbers of at most `count` examples, the same in every panel."""
    return Order(len(held_out), seed=1)[0 : min(count, len(held_out))]


def near(
    model: Model, held_out: Dataset, rows: int, columns: int, among: int, batch_size: int
) -> Int[np.ndarray, "rows columns"] | None:
    """Numbers of some examples, and beside each those whose pooled vectors are nearest.

    Args:
        model: whose encoder gives the vectors.
        held_out: examples that training did not see.
        rows: how many examples are asked.
        columns: 1 and the number of neighbours.
        among: at most so many held-out examples are looked at.
        batch_size: examples per forward pass.

    Returns:
        the example asked first, then the nearest; None where there are too few examples.
    """
    if len(held_out) <= columns:
        return None
    numbers = np.sort(held_out_numbers(held_out, among))
    features = extract(held_out, pooled_features(model.encoder, model.device), numbers, batch_size)
    found = nearest_neighbours(features, columns - 1)
    asked = Order(len(numbers), seed=2)[0 : min(rows, len(numbers))]
    return numbers[np.concatenate([asked[:, None], found[asked]], 1)]


def png(picture: Image.Image) -> str:
    """A picture as a data URI."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return data_uri("image/png", buffer.getvalue())


def data_uri(kind: str, content: bytes) -> str:
    """A file that stands in the page itself.

    >>> data_uri("audio/wav", b"abc")
    'data:audio/wav;base64,YWJj'
    """
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
