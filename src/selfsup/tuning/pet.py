"""Pattern-exploiting training: several templates label unlabelled texts, a classifier learns that.

Schick and Schütze, "Exploiting Cloze Questions for Few Shot Text Classification and Natural
Language Inference" (2020, arXiv 2001.07676). Nobody knows which template is good when there are
few labels. So a cloze model is trained for each template (and seed), all of them score the
unlabelled texts, and their weighted mean, softened by a temperature, is what a plain classifier is
trained on (section 3.3). In iPET (section 3.4) the models also teach each other: each model of the
next generation is trained on the labelled examples and on texts that some of the others labelled,
`growth` times as many in each generation, in the proportions of the labelled classes, and drawn in
proportion to how sure those models are.

Axes: models: templates * seeds; items; classes.

Deviations: where too few texts are given a class, all of them are taken, once; the authors' code
repeats them. There is no auxiliary language modelling, as in `tasks.cloze`, and no iPET without
labels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from selfsup.data.labels import Labelled
from selfsup.errors import ConfigError
from selfsup.randomness import numpy_generator
from selfsup.tuning.pseudo_labels import softened, with_pseudo_labels

Fit = Callable[[int, int, Labelled], Float[np.ndarray, "items classes"]]
"""Trains a cloze model with a template (its number) and a seed on examples; its scores of all
unlabelled items."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """How models are combined. Defaults are the paper's, but for `generations`."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Each template is trained once with each."""
    weights: Literal["accuracy", "uniform"] = "accuracy"
    """What a model's scores count: its template's accuracy on the labelled examples before training
    (the paper's "weighted"), or all the same."""
    temperature: float = 2.0
    """Of the soft labels."""
    generations: int = 1
    """1: PET. More: iPET, whose paper goes on until models see 1,000 examples: 4 from 10 labelled
    ones, 3 from 50 or 100."""
    growth: float = 5.0
    """By what factor the examples grow from one generation to the next (d)."""
    annotators: float = 0.25
    """Share of the other models that label a model's examples (lambda)."""

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be different numbers, got {list(self.seeds)}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")
        if self.generations < 1:
            raise ValueError(f"generations must be at least 1, got {self.generations}")
        if not self.growth > 1:
            raise ValueError(f"growth must be above 1, got {self.growth}")
        if not 0 < self.annotators <= 1:
            raise ValueError(f"annotators is a share above 0, got {self.annotators}")


class Annotation(NamedTuple):
    """What an ensemble of cloze models says.

    Attributes:
        scores: of the last generation, combined.
        record: what is worth keeping of every model and generation.
    """

    scores: Float[np.ndarray, "items classes"]
    record: list[dict[str, Any]]


def combined(
    scores: Float[np.ndarray, "models items classes"], weights: Sequence[float]
) -> Float[np.ndarray, "items classes"]:
    """The weighted mean of the models' scores; all alike where every weight is 0.

    >>> combined(np.array([[[1.0, 3.0]], [[5.0, 3.0]]]), [3.0, 1.0]).tolist()
    [[2.0, 3.0]]
    """
    used = list(weights) if sum(weights) > 0 else [1.0] * len(scores)
    return np.average(scores, axis=0, weights=used)


def drawn(
    scores: Float[np.ndarray, "items classes"],
    counts: Sequence[int],
    generator: np.random.Generator,
) -> Int[np.ndarray, " chosen"]:
    """Items to learn with their likeliest class: so many of each class, the surest most often.

    Args:
        scores: what the annotators say.
        counts: items per class; where fewer have that class, all of these are taken.
        generator: source of randomness.
    """
    shares, guess = softened(scores), scores.argmax(1)
    out = []
    for number, count in enumerate(counts):
        of_class = np.flatnonzero(guess == number)
        sure = shares[of_class, number]
        count = min(count, len(of_class))
        if count:
            out.append(generator.choice(of_class, count, replace=False, p=sure / sure.sum()))
    return np.concatenate(out) if out else np.empty(0, dtype=np.int64)


def annotate(
    fit: Fit,
    accuracies: Sequence[float],
    labelled: Labelled,
    items: Sequence[Any],
    config: Config,
    truth: Sequence[str] | None = None,
) -> Annotation:
    """Trains cloze models, generation after generation, and combines what they say of the items.

    Args:
        fit: trains one model.
        accuracies: of each template on the labelled examples, before training.
        labelled: examples with labels.
        items: those without.
        config: see there.
        truth: the items' labels, where they are known after all: the record then says how often
            models are right. Nothing is chosen by them.

    Raises:
        ConfigError: a second generation of a single model, which has no other to learn from.
    """
    models = [(number, seed) for number in range(len(accuracies)) for seed in config.seeds]
    if config.generations > 1 and len(models) < 2:
        raise ConfigError(
            "models of a second generation learn from others: give more --templates or --seeds, or "
            "generations = 1"
        )
    by_template = accuracies if config.weights == "accuracy" else [1.0] * len(accuracies)
    weights = [by_template[number] for number, _ in models]
    numbers = {name: number for number, name in enumerate(labelled.names)}
    known = None if truth is None else np.array([numbers.get(label, -1) for label in truth])
    record: list[dict[str, Any]] = []
    examples, scores = [labelled] * len(models), np.empty(0)
    for generation in range(config.generations):
        if generation:
            examples = _examples(scores, weights, labelled, items, config, generation)
        pairs = zip(models, examples, strict=True)
        scores = np.stack([fit(*model, some) for model, some in pairs])
        both = combined(scores, weights)
        told: dict[str, Any] = {
            "generation": generation,
            "models": [
                {"template": number, "seed": seed, "examples": len(some)}
                for (number, seed), some in zip(models, examples, strict=True)
            ],
        }
        if known is not None:
            told["right"] = float((both.argmax(1) == known).mean())
            for model, own in zip(told["models"], scores, strict=True):
                model["right"] = float((own.argmax(1) == known).mean())
        record.append(told)
    return Annotation(both, record)


def _examples(
    scores: Float[np.ndarray, "models items classes"],
    weights: Sequence[float],
    labelled: Labelled,
    items: Sequence[Any],
    config: Config,
    generation: int,
) -> list[Labelled]:
    """What each model of a generation is trained on."""
    factor = config.growth**generation - 1
    counts = [int(factor * labelled.labels.count(name)) for name in labelled.names]
    out = []
    for model in range(len(scores)):
        generator = numpy_generator(config.seeds[0], "ipet", generation, model)
        others = [other for other in range(len(scores)) if other != model]
        size = max(1, round(config.annotators * len(others)))
        chosen = sorted(generator.choice(others, size, replace=False).tolist())
        said = combined(scores[chosen], [weights[other] for other in chosen])
        places = drawn(said, counts, generator)
        more = [items[place] for place in places]
        out.append(with_pseudo_labels(labelled, more, said.argmax(1)[places]))
    return out
