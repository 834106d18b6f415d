"""Soft prompts: learned vectors before the token vectors of each row, and only these are trained.

Lester, Al-Rfou and Constant, "The Power of Scale for Parameter-Efficient Prompt Tuning" (2021,
arXiv 2104.08691), section 2: the vectors enter the model as if they were those of tokens, and
positions go on behind them. They begin as the vectors of words (section 3.2) or of tokens drawn
from the vocabulary. An encoder-decoder has its prompt before the source. What the model makes of
the prompt itself is dropped again: tasks and `pooled` see the items alone. The paper's learning
rate is 0.3, far above that of other tunings.

Axes: batch; time; prompt: learned vectors; width: of the token table.

Deviations:
- Tokens are drawn from the whole vocabulary, not from its 5,000 most common ones.
- A decoder does not see what the encoder makes of the prompt.
"""

from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from selfsup.batch import Vocabulary
from selfsup.errors import ConfigError
from selfsup.objective import Task
from selfsup.tuning.parts import Additions, Part, Where, add, additions_of, innermost, stacks


@dataclass(frozen=True, kw_only=True)
class Config:
    """How long the prompt is, and how it begins."""

    length: int = 20
    """Vectors."""
    words: str = ""
    """A text whose tokens' vectors the prompt begins as, again and again; "": drawn tokens'."""

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"length must be at least 1, got {self.length}")


@final
class SoftPrompt(Part):
    """Vectors that enter before those of a row.

    Args:
        initial: (prompt, width).
    """

    def __init__(self, initial: Float[Tensor, "prompt width"]):
        super().__init__()
        self.vectors = nn.Parameter(initial.detach().clone())


class Prompts:
    """What a stack asks for the prompts at work.

    Args:
        additions: of the encoder that the stack is, or belongs to.
        place: of the prompts.
    """

    def __init__(self, additions: Additions, place: str):
        self.additions, self.place = additions, place

    def __call__(
        self, vectors: Float[Tensor, "batch time width"], real: Bool[Tensor, "batch time"] | None
    ) -> tuple[Tensor, Tensor | None]:
        """Vectors with the prompts of each row's sets before them, and which of them are real.

        Rows of shorter prompts, or of none, are padded on the left: (batch, longest + time, width).
        """
        working = list(self.additions.working(self.place, len(vectors)))
        lengths = torch.zeros(len(vectors), dtype=torch.long)
        for rows, part in working:
            lengths[slice(None) if rows is None else rows.cpu()] += len(part.vectors)
        longest = int(lengths.max()) if working else 0
        if not longest:
            return vectors, real
        before = vectors.new_zeros(len(vectors), longest, vectors.shape[-1])
        free = longest - lengths  # of each row, to the left of what was filled in
        for rows, part in working:
            chosen = torch.arange(len(vectors)) if rows is None else rows.cpu()
            slots = free[chosen].unsqueeze(1) + torch.arange(len(part.vectors))  # (rows, prompt)
            place = chosen.unsqueeze(1).to(vectors.device), slots.to(vectors.device)
            filled = part.vectors.to(vectors.dtype).expand(*slots.shape, -1)
            before = before.index_put(place, filled)
            free[chosen] += len(part.vectors)
        if real is not None or bool((lengths < longest).any()):
            here = torch.arange(longest) >= (longest - lengths).unsqueeze(1)  # (batch, longest)
            items = vectors.new_ones(vectors.shape[:2], dtype=torch.bool) if real is None else real
            real = torch.cat((here.to(items.device), items), 1)
        return torch.cat((before, vectors), 1), real


def soft_prompt(task: Task, config: Config, where: Where) -> None:
    """Puts a learned prompt before each row.

    Raises:
        ConfigError: the encoder is no transformer of text, or there are no words to begin from.
    """
    encoder = innermost(task.encoder)
    name, stack = next(iter(stacks(encoder, "soft_prompt").items()))  # the reading one is first
    if not isinstance(stack.spec, Vocabulary):
        raise ConfigError(f"soft_prompt needs a model of text, not of {stack.spec.kind}")
    tokens = _first_tokens(config, stack.spec, where.preprocessor)
    initial = stack.embedding.vectors({"tokens": tokens.to(stack.embedding.tokens.weight.device)})
    place = f"{name}embedding"
    add(encoder, where.name, "soft_prompt", place, SoftPrompt(initial.squeeze(0)))
    stack.prompt = Prompts(additions_of(encoder), place.replace(".", "/"))


def _first_tokens(
    config: Config, vocabulary: Vocabulary, preprocessor: Any
) -> Int[Tensor, "1 prompt"]:
    """The tokens that a prompt begins as."""
    if not config.words:
        usable = torch.tensor(sorted({*range(vocabulary.size)} - {*vocabulary.special}))
        return usable[torch.randint(len(usable), (1, config.length))]
    if preprocessor is None:
        raise ConfigError("soft_prompt.words needs the model's tokenizer, and none was given")
    ids = preprocessor.tokenizer.encode([config.words])[0].tolist()
    if not ids:
        raise ConfigError(f"soft_prompt.words = {config.words!r} holds no token")
    return torch.tensor([(ids * -(-config.length // len(ids)))[: config.length]])
