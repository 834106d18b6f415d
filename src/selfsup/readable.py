"""Which items a trained model can read, why not the others, and what people call them."""

import re
from typing import Any

from selfsup import console
from selfsup.errors import DataError
from selfsup.model import Model

NUMBERED = re.compile(r"^item \d+( \(.*?\))?( is| cannot be used)?:? ")  # messages of preprocessors


def name_of(place: str, item: Any) -> str:
    """What people call an item: a text itself, or both of a pair; anything else by its place."""
    if isinstance(item, tuple):
        return " | ".join(item)
    return item if isinstance(item, str) else place


def refusals(model: Model, items: list[Any], size: int = 64) -> dict[int, str]:
    """Why items cannot be read, by number."""
    reasons = {}
    for first in range(0, len(items), size):
        group = items[first : first + size]
        if _refusal(model, group) is None:
            continue
        for number, item in enumerate(group, first):
            reason = _refusal(model, [item])
            if reason is not None:
                reasons[number] = NUMBERED.sub("", reason)
    return reasons


def _refusal(model: Model, items: list[Any]) -> str | None:
    try:
        with console.silent():  # those that can be used are read again
            for _ in model.preprocessor.batches(items, len(items)):
                pass
    except DataError as error:
        return str(error)
    return None
