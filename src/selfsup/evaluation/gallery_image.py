"""Panels about models of pictures: views, rebuilt ones, new ones, ways between two, neighbours."""

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from selfsup.batch import ImageSpec
from selfsup.data.dataset import Dataset
from selfsup.evaluation.gallery_parts import Cell, Panel, held_out_numbers, near, png
from selfsup.methods.views import ViewConfig, augment
from selfsup.model import Model
from selfsup.objective import Interpolates, Reconstructs, Samples
from selfsup.randomness import torch_generator
from selfsup.training.device import to_device

ROWS, COLUMNS = 6, 8
MAX_NEIGHBOURS = 2000  # held-out pictures among which neighbours are looked for

Pictures = Float[Tensor, "row channel height width"]


def image_panels(model: Model, held_out: Dataset, spec: ImageSpec) -> list[Panel]:
    """Every panel that the model's method can show."""
    image = held_out.batch(held_out_numbers(held_out, ROWS))["image"]
    panels = (
        _views(model, image),
        _rebuilt(model, image, spec),
        _sampled(model, spec),
        _between(model, image, spec),
        _neighbours(model, held_out),
    )
    return [panel for panel in panels if panel]


def _views(model: Model, image: Tensor) -> Panel | None:
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
def _rebuilt(model: Model, image: Tensor, spec: ImageSpec) -> Panel | None:
    if not isinstance(model.objective, Reconstructs):
        return None
    rebuilt = model.objective.reconstruct(to_device({"image": image}, model.device))
    lead = "Left: a picture that training never saw. Right: the same as the model rebuilds it."
    rows = _rows([image.float() / 255, _visible(rebuilt, spec)])
    return {"title": "Rebuilt", "lead": lead, "rows": rows}


@torch.inference_mode()
def _sampled(model: Model, spec: ImageSpec) -> Panel | None:
    if not isinstance(model.objective, Samples):
        return None
    generator = torch_generator(0, "gallery", device=model.device)
    drawn = _visible(model.objective.sample(ROWS * COLUMNS, generator), spec)
    lead = "Pictures that the model makes from random codes."
    return {"title": "Samples", "lead": lead, "rows": _rows(list(drawn.split(ROWS)))}


@torch.inference_mode()
def _between(model: Model, image: Tensor, spec: ImageSpec) -> Panel | None:
    """Half of the pictures on the left, the other half on the right."""
    count = len(image) // 2
    if not isinstance(model.objective, Interpolates) or not count:
        return None
    first, last = image[:count], image[count : 2 * count]
    ends = [to_device({"image": end}, model.device) for end in (first, last)]
    ways = model.objective.interpolate(ends[0], ends[1], COLUMNS - 2)  # (row, step, ...)
    steps = [_visible(step, spec) for step in ways.unbind(1)]
    lead = (
        "First and last: pictures that training never saw. Between: what the model makes of the "
        "codes on the line from one to the other."
    )
    rows = _rows([first.float() / 255, *steps, last.float() / 255])
    return {"title": "From one picture to another", "lead": lead, "rows": rows}


def _neighbours(model: Model, held_out: Dataset) -> Panel | None:
    shown = near(model, held_out, ROWS, COLUMNS, MAX_NEIGHBOURS, batch_size=256)
    if shown is None:
        return None
    image = held_out.batch(shown.flatten())["image"].float() / 255
    columns = [image[place::COLUMNS] for place in range(COLUMNS)]
    among = min(MAX_NEIGHBOURS, len(held_out))
    lead = (
        f"First: a picture. Then: those of {among:,} held-out pictures whose vectors are nearest "
        "to its own."
    )
    return {"title": "Nearest neighbours", "lead": lead, "rows": _rows(columns)}


def _visible(standardised: Pictures, spec: ImageSpec) -> Pictures:
    """Pictures in [0, 1] from those on the scale that models rebuild."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (spec.mean, spec.std))
    return (standardised.cpu() * std + mean).clamp(0, 1)


def _rows(columns: list[Pictures]) -> list[list[Cell]]:
    """Columns of pictures in [0, 1] as rows of cells."""
    return [[{"png": _png(column[row])} for column in columns] for row in range(len(columns[0]))]


def _png(picture: Float[Tensor, "channel height width"]) -> str:
    values = (255 * picture).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return png(Image.fromarray(values.squeeze(-1) if values.shape[-1] == 1 else values))
