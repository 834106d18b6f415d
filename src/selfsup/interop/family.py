"""What is said of a published architecture, so that its checkpoints can be read and written."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from selfsup.interop.weights import Rule


class Head(NamedTuple):
    """What a method or a task adds to the encoder: their class, and where our tensors lie."""

    architecture: str
    rules: tuple[Rule, ...] = ()
    sentence: tuple[Rule, ...] = ()  # of `sentence_head`
    pooler: str = ""  # what stands in the place of the family's


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture.

    Attributes:
        name: `model_type` in config.json.
        prefix: of the encoder's tensors in a model with a head.
        keys: their key -> (ours, their default).
        also: their key -> the other key of theirs that it must equal.
        layout: what of ours is fixed: see `facts`.
        required: their key -> the only value that ours can express, which is also their default.
        activation: their key, its default, and their names for ours.
        rules: the map of the encoder.
        heads: by method or task; the first is what a checkpoint without a head becomes.
        pooler: their linear layer behind `pooling = "bert"`, or "".
        sentence: the sentence objective of the paper, "" for none.
        tied: their tensor -> the one that it repeats.
        dropped: endings of names that hold no learned number.
        model: name of ours.
        imports: whether checkpoints are read.
    """

    name: str
    prefix: str
    keys: Mapping[str, tuple[str, Any]]
    also: Mapping[str, str] = field(default_factory=dict)
    layout: Mapping[str, Any]
    required: Mapping[str, Any] = field(default_factory=dict)
    activation: tuple[str, str, Mapping[str, str]]
    rules: Callable[[Any, int, str], list[Rule]]
    heads: Mapping[str, Head]
    pooler: str = ""
    sentence: str = ""
    tied: Mapping[str, str] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    model: str = "transformer"
    imports: bool = True
