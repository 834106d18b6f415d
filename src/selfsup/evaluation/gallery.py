"""Pictures for the report: views of one picture, nearest neighbours, what is rebuilt.

A gallery is a list of panels, each with a title, one sentence on how to read it, and rows of PNG
files as data URIs; the report shows them as they are.
"""

import base64
import io
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from selfsup.batch import ImageSpec
from selfsup.data.dataset import Dataset
from selfsup.evaluation.frozen import extract, pooled_features
from selfsup.evaluation.similarity import nearest_neighbours
from selfsup.methods.views import ViewConfig, augment
from selfsup.model_folder import Model
from selfsup.objective import Reconstructs
from selfsup.randomness import Order, torch_generator
from selfsup.training.device import to_device

ROWS, COLUMNS = 6, 8
MAX_NEIGHBOURS = 2000  # held-out pictures among which neighbours are looked for


def gallery(model: Model, held_out: Dataset) -> list[dict[str, Any]]:
    """Panels about a model of pictures; empty for other kinds of data."""
    spec = model.preprocessor.spec
    if not isinstance(spec, ImageSpec):
        return []
    numbers = Order(len(held_out), seed=1)[0 : min(ROWS, len(held_out))]
    image = held_out.batch(numbers)["image"]
    panels = [_views(model, image), _rebuilt(model, image, spec), _neighbours(model, held_out)]
    return [panel for panel in panels if panel]


def _views(model: Model, image: Tensor) -> dict[str, Any] | None:
    """What the method makes of one picture before it looks at it."""
    config = model.objective.config
    kinds = [value for value in vars(config).values() if isinstance(value, ViewConfig)]
    if not kinds:
        return None
    columns = [image.float() / 255]
    for number in range(COLUMNS - 1):
        generator = torch_generator(number, "gallery")
        view = augment(image, kinds[number % len(kinds)], generator)
        columns.append(torch.nn.functional.interpolate(view, size=image.shape[-2:]))
    lead = "First: the picture. Then: random views, which the method takes for the same thing."
    return {"title": "Views", "lead": lead, "rows": _rows(columns)}


@torch.inference_mode()
def _rebuilt(model: Model, image: Tensor, spec: ImageSpec) -> dict[str, Any] | None:
    if not isinstance(model.objective, Reconstructs):
        return None
    rebuilt = model.objective.reconstruct(to_device({"image": image}, model.device)).cpu()
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (spec.mean, spec.std))
    lead = "Left: a picture that training never saw. Right: the same as the model rebuilds it."
    rows = _rows([image.float() / 255, (rebuilt * std + mean).clamp(0, 1)])
    return {"title": "Rebuilt", "lead": lead, "rows": rows}


def _neighbours(model: Model, held_out: Dataset) -> dict[str, Any] | None:
    count = min(MAX_NEIGHBOURS, len(held_out))
    if count <= COLUMNS:
        return None
    numbers = np.sort(Order(len(held_out), seed=1)[0:count])
    features = extract(held_out, pooled_features(model.encoder, model.device), numbers)
    near = nearest_neighbours(features, COLUMNS - 1)
    asked = Order(count, seed=2)[0:ROWS]
    shown = np.concatenate([asked[:, None], near[asked]], 1)  # (row, column)
    image = held_out.batch(numbers[shown.flatten()])["image"].float() / 255
    columns = [image[place::COLUMNS] for place in range(COLUMNS)]
    lead = (
        f"First: a picture. Then: those of {count:,} held-out pictures whose vectors are nearest "
        "to its own."
    )
    return {"title": "Nearest neighbours", "lead": lead, "rows": _rows(columns)}


def _rows(columns: list[Tensor]) -> list[list[str]]:
    """Columns of pictures (row, channel, height, width) in [0, 1] as rows of data URIs."""
    return [[data_uri(column[row]) for column in columns] for row in range(len(columns[0]))]


def data_uri(picture: Tensor) -> str:
    """One picture (channel, height, width) in [0, 1] as a PNG in a data URI."""
    values = (255 * picture).round().to(torch.uint8).permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(values.squeeze(-1) if values.shape[-1] == 1 else values).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
