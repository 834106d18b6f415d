"""Translation pairs and a trained encoder: how well it aligns two languages, beside baselines.

The measure stands in `analysis/alignment.py`; here are the pairs' file, the vectors, and what the
encoder is held against: the same network untrained, and the tokens that both languages share.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from selfsup.analysis.alignment import both_ways, by_layer, shared_tokens, unique_pairs
from selfsup.batch import Batch
from selfsup.data.dataset import Preprocessor
from selfsup.data.label_files import find_column, table
from selfsup.errors import ConfigError, DataError
from selfsup.evaluation.frozen import layer_features
from selfsup.model import Model

SHARED = "shared tokens"
LEAST = 2  # pairs, below which there is nothing to look through


def read_pairs(
    path: str | Path, text: str | None = None, text_b: str | None = None
) -> tuple[tuple[str, str], list[tuple[str, str]]]:
    """The two languages' columns of a table, and its pairs of sentences or words.

    Args:
        path: a .csv, .tsv, .jsonl or .parquet file.
        text, text_b: the columns; by default the first and second of a file with only two, or the
            usual names of a pair of texts.

    Raises:
        DataError: the file cannot be read, a text is empty, or there are fewer than two pairs.
        ConfigError: no such column.
    """
    path = Path(path)
    columns, records = table(path)
    if text is None and text_b is None and len(columns) == 2:
        a, b = columns
    else:
        a = find_column(path, columns, "text", text)
        b = find_column(path, columns, "text_b", text_b)
    pairs = []
    for record in records:
        for column in (a, b):
            if not str(record.cells.get(column) or "").strip():
                raise DataError(
                    f"{record.where}: {column!r} is empty; fill it in or remove the line"
                )
        pairs.append((str(record.cells[a]).strip(), str(record.cells[b]).strip()))
    if len(pairs) < LEAST:
        raise DataError(f"{path}: {len(pairs)} pairs; at least {LEAST} are needed to tell apart")
    return (a, b), pairs


def align(model: Model, pairs: list[tuple[str, str]]) -> dict[str, list[dict[str, float]]]:
    """Scores of `alignment.by_layer`: `pretrained`, `untrained`, and `shared tokens` as one layer.

    Args:
        model: a pre-trained model of text.
        pairs: (text, its translation).

    Raises:
        ConfigError: the model reads no text.
    """
    if model.values["data"]["name"] != "text":
        raise ConfigError("align reads texts and their translations: give a run of text")
    found = unique_pairs(pairs)
    out = {}
    for name, encoder in (
        ("pretrained", model.encoder),
        ("untrained", model.untrained_encoder().to(model.device)),
    ):
        function = layer_features(encoder, model.device)
        first, second = (
            item_features(model.preprocessor, texts, function)
            for texts in (found.first, found.second)
        )
        out[name] = by_layer(first, second, found.numbers)
    tokenizer = model.preprocessor.tokenizer
    bags = shared_tokens(
        tokenizer.encode(found.first, parse_special=False),
        tokenizer.encode(found.second, parse_special=False),
    )
    return {**out, SHARED: [both_ways(*bags, found.numbers)]}


@torch.inference_mode()
def item_features(
    preprocessor: Preprocessor,
    items: list[Any],
    function: Callable[[Batch], Tensor],
    batch_size: int = 64,
) -> Float[Tensor, "items ..."]:
    """`function` of every item, in their order: what `frozen.extract` is to a data set."""
    parts, places = [], []
    for numbers, batch in preprocessor.batches(items, batch_size):
        parts.append(function(batch).float().cpu())
        places += numbers
    return torch.cat(parts)[np.argsort(places)]
