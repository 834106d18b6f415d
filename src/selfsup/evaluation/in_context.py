"""In-context learning: a model that writes labels items after a few examples in its prompt.

Nothing is trained. A prompt is an instruction, some demonstrations and the item, and the answer is
the label word that is likeliest to come next (Brown et al., 2020, arXiv 2005.14165).
An encoder-decoder, or a model that was fine-tuned to write, reads the prompt as a source and writes
the word as its target (`targets.py`).

| `normalise`     | what a label word is scored by                                             |
|-----------------|----------------------------------------------------------------------------|
| `none`          | log p(word | prompt), summed over its tokens                               |
| `length`        | the same per token                                                         |
| `unconditional` | log p(word | prompt) - log p(word | "Sentiment:"), what it gains by the    |
|                 | prompt: Brown et al.'s "answer context"; Holtzman et al., 2021, 2104.08315 |

Contextual calibration (Zhao et al., 2021, arXiv 2102.09690) divides the labels' probabilities by
those that the same prompt gives to items without content, so that favourite words lose their lead.
With a chain of thought (Wei et al., 2022, arXiv 2201.11903; without demonstrations Kojima et al.,
2022, arXiv 2205.11916) the model first writes a line of reasoning, and the label is scored
behind it.

Deviation from Zhao et al.: W p is made a distribution by its sum and not by a softmax; the order of
the labels is the same.

Axes: items; classes.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import scipy
import torch
from jaxtyping import Float

from selfsup import console
from selfsup.data.labels import Labelled
from selfsup.data.templates import Template
from selfsup.errors import ConfigError, DataError, nearest
from selfsup.evaluation.demonstrations import Example, Item, draw
from selfsup.evaluation.likelihood import padded, rows_of
from selfsup.evaluation.targets import prompt_rows, prompt_scores, writer_of
from selfsup.randomness import torch_generator
from selfsup.training.device import autocast

if TYPE_CHECKING:
    from selfsup.model import Model

CONTENT_FREE = ("N/A", "[MASK]", "")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How items are prompted.

    Attributes:
        shots: numbers of demonstrations.
        seeds: each draws other demonstrations, in another order.
        normalise: see the module's docstring.
        calibrate: also give calibrated answers.
        balanced: as many demonstrations of each class as can be.
        limit: test items, with the classes in their shares; None: all.
        max_length: longest prompt in tokens, answer included; None: the model's learned positions.
            Longer prompts lose their first demonstrations, and that is counted.
        batch_size: prompts per forward pass.
        reasoning_tokens: most tokens of a chain of thought.
        temperature: of drawing its tokens; 0: always the likeliest.
    """

    shots: tuple[int, ...] = (0, 1, 4, 16)
    seeds: tuple[int, ...] = (0, 1, 2)
    normalise: Literal["none", "length", "unconditional"] = "none"
    calibrate: bool = False
    balanced: bool = False
    limit: int | None = None
    max_length: int | None = None
    batch_size: int = 16
    reasoning_tokens: int = 64
    temperature: float = 0.0

    def __post_init__(self) -> None:
        known = ("none", "length", "unconditional")
        if self.normalise not in known:
            raise ConfigError(
                f"unknown normalise {self.normalise!r}{nearest(self.normalise, known)}"
            )
        if not self.seeds or not self.shots or min(self.shots) < 0:
            raise ConfigError(
                f"needs a seed and numbers of shots from 0 on, got seeds {list(self.seeds)}, "
                f"shots {list(self.shots)}"
            )
        for name in ("limit", "max_length", "batch_size", "reasoning_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")


class Answers(NamedTuple):
    """What the model says of some items after some demonstrations.

    Attributes:
        plain: probabilities of the classes, each row sums to 1.
        calibrated: the same after contextual calibration; None where not asked for.
        dropped: demonstrations that found no room, over all prompts.
        longest: tokens of the longest prompt with its answer.
    """

    plain: Float[np.ndarray, "items classes"]
    calibrated: Float[np.ndarray, "items classes"] | None
    dropped: int
    longest: int


def answer(
    model: "Model",
    template: Template,
    demonstrations: Sequence[Example],
    items: Sequence[Item],
    settings: Settings,
    seed: int = 0,
) -> Answers:
    """Labels items after the same demonstrations, in this order.

    Args:
        model: a causal language model, or one that writes targets for sources.
        template: puts the prompts together.
        demonstrations: may be empty.
        items: texts, or pairs for a template with `{text_b}`.
        settings: of which `shots`, `seeds`, `balanced` and `limit` are not read here.
        seed: of drawing a chain of thought.

    Raises:
        ConfigError: the model cannot be prompted.
        DataError: an item alone is longer than a prompt may be, or a label word has no token.
    """
    if writer_of(model) is not None and template.reasons:
        raise ConfigError(
            f"the template {template.name} has {{reasoning}}, which a causal_language run alone "
            "writes; use another template"
        )
    template.check_items(items, "items")
    shown = [template.demonstration(*example) for example in demonstrations]
    kept, longest = _kept(model, template, shown, items, settings)
    plain = np.empty((len(items), len(template.words)))
    calibrated = np.empty_like(plain) if settings.calibrate else None
    for count in sorted(set(kept)):
        numbers = [i for i, number in enumerate(kept) if number == count]
        some = shown[len(shown) - count :]
        here = [items[i] for i in numbers]
        plain[numbers] = _probabilities(model, template, some, here, settings, seed)
        if calibrated is not None:
            empty = _content_free(template)
            content_free = _probabilities(model, template, some, empty, settings, seed)
            calibrated[numbers] = calibrate(plain[numbers], content_free.mean(0))
    return Answers(plain, calibrated, sum(len(shown) - count for count in kept), longest)


def calibrate(
    probabilities: Float[np.ndarray, "items classes"], content_free: Float[np.ndarray, " classes"]
) -> Float[np.ndarray, "items classes"]:
    """Contextual calibration, W = diag(content_free)^-1 and b = 0; rows sum to 1 again.

    >>> calibrate(np.array([[0.6, 0.4]]), np.array([0.75, 0.25])).round(4).tolist()
    [[0.3333, 0.6667]]
    """
    weighed = probabilities / np.maximum(content_free, np.finfo(float).tiny)
    return weighed / weighed.sum(1, keepdims=True)


def _content_free(template: Template) -> list[Item]:
    return [(text, text) if template.paired else text for text in CONTENT_FREE]


def _probabilities(
    model: "Model",
    template: Template,
    shown: Sequence[str],
    items: Sequence[Item],
    settings: Settings,
    seed: int,
) -> Float[np.ndarray, "items classes"]:
    thoughts: list[str] = [""] * len(items)
    if template.reasons:
        prompts = [template.prompt(shown, item) for item in items]
        thoughts = reasoning(model, prompts, settings, seed)
    contexts = [template.prompt(shown, *pair) for pair in zip(items, thoughts, strict=True)]
    rows = prompt_rows(model, contexts, template.words)
    scores = prompt_scores(model, rows, settings.batch_size)
    if settings.normalise == "length":
        scores /= [[len(end) for end in row.ends] for row in rows]
    if settings.normalise == "unconditional":
        alone = prompt_rows(model, [template.answer_context], template.words)
        scores -= prompt_scores(model, alone)  # (1, classes)
    return scipy.special.softmax(scores, axis=1)


def reasoning(
    model: "Model", prompts: Sequence[str], settings: Settings, seed: int = 0
) -> list[str]:
    """What the model writes on, up to the end of the line or `reasoning_tokens`."""
    tokenizer, objective = model.preprocessor.tokenizer, model.objective
    encoded = rows_of(tokenizer, [prompt.rstrip(" ") for prompt in prompts], [])
    out = []
    with torch.inference_mode(), autocast(model.device, model.dtype):
        for at in range(0, len(prompts), settings.batch_size):
            generator = torch_generator(seed, "reasoning", at, device=model.device)
            written = objective.generate(  # type: ignore[operator]
                padded(model, [row.context for row in encoded[at : at + settings.batch_size]]),
                settings.reasoning_tokens,
                generator,
                temperature=settings.temperature,
            )
            for ids in written.tolist():
                out.append(tokenizer.decode(ids).strip(" ").partition("\n")[0].strip())
    return out


def _kept(
    model: "Model",
    template: Template,
    shown: Sequence[str],
    items: Sequence[Item],
    settings: Settings,
) -> tuple[list[int], int]:
    """How many of the last demonstrations each item's prompt has room for; the longest prompt."""
    config: Any = model.encoder.config
    learned = config.max_length if config.positions == "learned" else None
    limit = min((n for n in (settings.max_length, learned) if n is not None), default=None)
    extra = settings.reasoning_tokens if template.reasons else 0
    empty = _content_free(template) if settings.calibrate else []
    kept, longest, left = [0] * len(items), 0, list(range(len(items)))
    for count in range(len(shown), -1, -1):
        some = shown[len(shown) - count :]
        here = [*(items[i] for i in left), *empty]
        contexts = [template.prompt(some, item, "") for item in here]
        rows = prompt_rows(model, contexts, template.words)
        lengths = [row.length + extra for row in rows]
        least = max(lengths[len(left) :], default=0)  # what calibration needs
        takes = {i: max(length, least) for i, length in zip(left, lengths, strict=False)}
        for i in [i for i in left if limit is None or takes[i] <= limit]:
            kept[i], longest = count, max(longest, takes[i])
            left.remove(i)
        if not left:
            return kept, longest
    raise DataError(
        f"item {left[0] + 1} takes {takes[left[0]]} tokens without any demonstration, and a "
        f"prompt has at most {limit}; shorten the item or the instruction"
    )


def evaluate(
    model: "Model", template: Template, pool: Labelled | None, test: Labelled, settings: Settings
) -> dict[str, Any]:
    """Accuracy by number of demonstrations and seed: what prompt.json holds.

    Without demonstrations nothing depends on the seed, but for a drawn chain of thought; so there
    the first seed is the only one.

    Raises:
        ConfigError: demonstrations are asked for, and there is no pool.
        DataError: the pool has too few.
    """
    started = time.monotonic()
    if pool is None and max(settings.shots) > 0:
        raise ConfigError("demonstrations need labelled examples: give --data, or --shots 0")
    truth = np.array([template.classes[label] for label in test.labels])
    items = [example.item for example in test.items]
    drawn = template.reasons and settings.temperature > 0
    runs = [
        (shots, seed)
        for shots in settings.shots
        for seed in (settings.seeds if shots or drawn else settings.seeds[:1])
    ]
    scores: dict[str, dict[str, list[float]]] = {}
    dropped, longest = 0, 0
    with console.progress("prompting", len(runs)) as bar:
        for shots, seed in runs:
            examples = [] if pool is None else draw(pool, shots, seed, settings.balanced)
            answers = answer(model, template, examples, items, settings, seed)
            found = scores.setdefault(str(shots), {})
            for name, value in _measured(answers, truth).items():
                found.setdefault(name, []).append(value)
            dropped, longest = dropped + answers.dropped, max(longest, answers.longest)
            bar.advance(1, f"{shots} shots, accuracy {found['accuracy'][-1]:.3f}")
    _warn(model, dropped, longest)
    return {
        "template": template.name,
        "words": list(template.words),
        "normalise": settings.normalise,
        "balanced": settings.balanced,
        "test_size": len(test),
        "majority": float(np.bincount(truth).max() / len(truth)),
        "seeds": list(settings.seeds),
        "scores": scores,
        "longest_prompt": longest,
        "dropped_demonstrations": dropped,
        "seconds": round(time.monotonic() - started, 1),
    }


def _measured(answers: Answers, truth: np.ndarray) -> dict[str, float]:
    """Accuracy, and the share of the items that get the most frequent answer."""
    out = {}
    for prefix, shares in (("", answers.plain), ("calibrated_", answers.calibrated)):
        if shares is not None:
            guess = shares.argmax(1)
            out[f"{prefix}accuracy"] = float((guess == truth).mean())
            out[f"{prefix}one_answer"] = float(np.bincount(guess).max() / len(guess))
    return out


def _warn(model: "Model", dropped: int, longest: int) -> None:
    if dropped:
        console.warn(f"{dropped} demonstrations found no room in their prompts and were left out")
    trained = model.preprocessor.max_length
    if longest > trained:
        console.warn(
            f"the longest prompt has {longest} tokens, and the model was pre-trained on rows of "
            f"{trained}: it may not make use of more; see --max-length"
        )
