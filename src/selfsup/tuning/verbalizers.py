"""Words for the classes of a cloze, searched for with the labelled examples.

LM-BFF (Gao, Fisch and Chen, 2020, arXiv 2012.15723). For each class the `candidates` words are kept
that the pre-trained model puts into the blanks of its examples, by the sum of their
log-probabilities; of all ways to give each class one of these, the `kept` that label the training
examples best as they are, without training. A ranking on held-out examples, by any measure (the
paper fine-tunes with each), then decides.

Axes: items: the training examples; classes; vocabulary.

Deviations: words are whole, of letters, and no class shares one with another. Where the ways would
be more than 20,000, fewer candidates are kept for each class; and among ways that label equally
many examples right, those come first that give the right words more probability. The templates
themselves are not searched for: that takes a second model that writes (T5).
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from selfsup.data.dataset import LabelledDataset
from selfsup.data.labels import Labelled, label_numbers
from selfsup.data.templates import with_words
from selfsup.data.tokenizer import Tokenizer
from selfsup.errors import DataError
from selfsup.tasks.cloze import Cloze
from selfsup.training.device import to_device

MOST_WAYS = 20_000
Measure = Callable[[str], float]
"""How good a template with other words is: its text to a score, higher is better."""


@torch.inference_mode()
def blank_log_probabilities(
    task: Cloze, rows: LabelledDataset, batch_size: int = 32
) -> Float[np.ndarray, "items vocabulary"]:
    """What the model would put into the (first) blank of each example, in nats."""
    out, device = [], next(task.parameters()).device
    task.eval()
    for first in range(0, len(rows), batch_size):
        numbers = np.arange(first, min(first + batch_size, len(rows)))
        filled = task.blanks(to_device(rows.batch(numbers), device))[:, 0]
        out.append(filled.view(len(numbers), -1, filled.shape[-1]).mean(1).cpu().numpy())
    return np.concatenate(out)


def whole_words(tokenizer: Tokenizer, lead: str) -> Bool[np.ndarray, " vocabulary"]:
    """Which tokens are words of letters that the tokenizer writes with this one token.

    Args:
        tokenizer: of the model.
        lead: what stands before the blank: "" or " ".
    """
    vocabulary = tokenizer.vocabulary
    spelled = [text.decode("utf-8", "replace") for text in vocabulary.spellings]
    numbers = [i for i, text in enumerate(spelled) if text.isalpha()]
    encoded = tokenizer.encode([lead + spelled[i] for i in numbers], parse_special=False)
    out = np.zeros(vocabulary.size, dtype=bool)
    for number, ids in zip(numbers, encoded, strict=True):
        out[number] = ids.tolist() == [number]
    return out


def likeliest(
    log_probabilities: Float[np.ndarray, "items vocabulary"],
    classes: Int[np.ndarray, " items"],
    num_classes: int,
    allowed: Bool[np.ndarray, " vocabulary"],
    candidates: int,
) -> list[list[int]]:
    """For each class the tokens with the highest mean log-probability over its examples.

    Raises:
        DataError: a class has no example.
    """
    out = []
    for number in range(num_classes):
        if not (classes == number).any():
            raise DataError(f"class {number} has no example to search words with")
        mean = log_probabilities[classes == number].mean(0)
        order = np.argsort(np.where(allowed, -mean, np.inf), kind="stable")
        out.append(order[: min(candidates, int(allowed.sum()))].tolist())
    return out


def best_ways(
    log_probabilities: Float[np.ndarray, "items vocabulary"],
    classes: Int[np.ndarray, " items"],
    candidates: Sequence[Sequence[int]],
    kept: int,
) -> list[tuple[int, ...]]:
    """The ways to give each class one of its candidates that label most examples right.

    Args:
        log_probabilities: of every token in each example's blank.
        classes: of the examples.
        candidates: tokens for each class, the best first.
        kept: how many ways.
    """
    most = int(MOST_WAYS ** (1 / len(candidates)) + 1e-9)
    ways = [
        way
        for way in itertools.product(*(some[:most] for some in candidates))
        if len(set(way)) == len(way)
    ]
    scored = []
    for way in ways:
        scores = log_probabilities[:, way]  # (items, classes)
        right = scores[np.arange(len(classes)), classes]
        total = np.logaddexp.reduce(scores, axis=1)
        hits = int((scores.argmax(1) == classes).sum())
        scored.append((-hits, float((total - right).mean())))
    order = sorted(range(len(ways)), key=scored.__getitem__)
    return [ways[place] for place in order[:kept]]


def search(
    task: Cloze,
    preprocessor: Any,
    labelled: Labelled,
    *,
    candidates: int = 100,
    kept: int = 10,
    measure: Measure | None = None,
) -> list[tuple[str, float]]:
    """Templates with other words, the best first, each with its score.

    Args:
        task: a cloze with any words, as it was pre-trained.
        preprocessor: of its encoder.
        labelled: the training examples.
        candidates: words that are tried for each class.
        kept: ways that are measured; the authors measure 100.
        measure: ranks them; None: in the order in which they label the training examples, by 1,
            1/2, 1/3...

    Raises:
        DataError: a class has no example, or no way is left.
    """
    tokenizer, text = preprocessor.tokenizer, task.config.template
    rows = preprocessor.labelled(labelled.take([0]), **task.row_options)
    allowed, spelled = (
        whole_words(tokenizer, rows.query.lead("label")),
        tokenizer.vocabulary.spellings,
    )
    # any words of one token, so that there is one blank
    anything = [spelled[token].decode() for token in np.flatnonzero(allowed)]
    one_blank = with_words(text, dict(zip(labelled.names, anything, strict=False)))
    options = {**task.row_options, "template": one_blank}
    found = blank_log_probabilities(task, preprocessor.labelled(labelled, **options))
    classes = label_numbers(labelled)
    tokens = likeliest(found, classes, len(labelled.names), allowed, candidates)
    ways = best_ways(found, classes, tokens, kept)
    if not ways:
        raise DataError(f"{labelled.source}: no words can be told apart; give more candidates")
    texts = []
    for way in ways:
        words = [spelled[token].decode() for token in way]
        texts.append(with_words(text, dict(zip(labelled.names, words, strict=True))))
    scores = [
        1 / (place + 1) if measure is None else measure(one) for place, one in enumerate(texts)
    ]
    return sorted(zip(texts, scores, strict=True), key=lambda pair: -pair[1])
