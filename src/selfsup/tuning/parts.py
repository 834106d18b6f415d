"""What a tuning adds to an encoder: small parts at named places, in sets that can be switched.

A place is a module of the encoder, by its name in `named_modules`. What the module gives is changed
by the part that sits there: a hook hands the module's input and output to the part. So the encoder
keeps its classes, its weights their names, and all that is new lies in one submodule,
`encoder.additions`, which is what a tuned run saves. What no module gives (a prefix, a prompt) a
transformer asks for itself.

An encoder may carry several sets, one for each task that it was tuned for. `Additions.switch`
says which set works on which rows of the batches that follow. Beam search and early exits go on
with other rows than a batch began with; of these only sets that work on all rows know what to do.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Int
from torch import Tensor, nn

from selfsup.errors import ConfigError
from selfsup.models.block import Block
from selfsup.models.encoder import Encoder
from selfsup.models.experts import Experts
from selfsup.models.transformer import TransformerEncoder

OWN = "own"
"""The set of a run that was tuned by itself."""
Rows = Int[Tensor, " rows"] | None  # None: all of them


class Where(NamedTuple):
    """Where a tuning puts what it adds.

    Attributes:
        name: of the set.
        preprocessor: the encoder's own; what begins as the vectors of words needs it.
    """

    name: str = OWN
    preprocessor: Any = None


class Part(nn.Module):
    """What is added at one place.

    Attributes:
        on_input: it changes what its module reads, and is called before it with that as x and y.
    """

    on_input: bool = False

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The new output of a module that read `x` and gave `y`, both with the batch in front."""
        raise TypeError(f"{type(self).__name__} does not define forward")

    def merge(self, module: nn.Module, sign: int = 1) -> None:
        """Puts the part into the weights of its module; with -1 takes it out again.

        Raises:
            ConfigError: no weights of the module do the same.
        """
        raise ConfigError(f"{type(self).__name__} computes what no weights of its place can")


class Additions(nn.ModuleDict):
    """Sets of parts by name; each set is places, and each place parts by the tuning's name.

    Attributes:
        active: which set works on which rows, in this order.
    """

    active: tuple[tuple[str, Rows], ...] = ()
    num_rows: int | None = None  # of the batches whose rows `active` numbers, once one was seen

    def switch(self, *active: tuple[str, Rows] | str) -> None:
        """Names the sets at work from now on, each for all rows or for some.

        Where one is for some, all batches up to the next switch have the same number of rows.
        """
        chosen = [(one, None) if isinstance(one, str) else one for one in active]
        for name, _ in chosen:
            if name not in self:
                raise ConfigError(f"no additions are called {name!r}; there are {', '.join(self)}")
        self.active, self.num_rows = tuple(chosen), None

    def at(self, place: str, x: Tensor, y: Tensor) -> Tensor:
        """The output `y` of the module at a place, changed by the active parts there."""
        copied = False
        for rows, part in self.working(place, len(y)):
            if part.on_input:
                continue
            if rows is None:
                y = part(x, y)
            elif len(rows):
                changed = part(x[rows], y[rows])
                if torch.is_grad_enabled():
                    y = y.index_copy(0, rows, changed)
                else:  # one copy for all sets
                    y = (y if copied else y.clone()).index_copy_(0, rows, changed)
                    copied = True
        return y

    def before(self, place: str, x: Tensor) -> Tensor:
        """What the module at a place reads instead of `x`."""
        for rows, part in self.working(place, len(x)):
            if not part.on_input:
                continue
            if rows is None:
                x = part(x, x)
            elif len(rows):
                x = x.index_copy(0, rows, part(x[rows], x[rows]))
        return x

    def working(self, place: str, num_rows: int) -> Iterator[tuple[Rows, Any]]:
        """The active parts at one place, and on which rows of a batch of so many.

        Raises:
            ConfigError: sets were switched on for rows of a batch of another size.
        """
        for name, rows in self.active:
            if rows is not None:
                self._check_rows(num_rows)
            for part in self.parts(name, place):
                yield rows, part

    def _check_rows(self, num_rows: int) -> None:
        if self.num_rows is None:
            self.num_rows = num_rows
        if num_rows != self.num_rows:
            raise ConfigError(
                f"additions were switched on for rows of a batch of {self.num_rows}, and "
                f"{num_rows} rows came: beam search and early exits change the rows, so give each "
                "set batches of its own; before a batch of another size switch again"
            )

    def parts(self, name: str, place: str) -> Iterator[Any]:
        """The parts of one set at one place, in the order in which they were added."""
        places = cast(nn.ModuleDict, self[name])
        if place in places:
            yield from cast(nn.ModuleDict, places[place]).values()

    def every(self, name: str) -> Iterator[tuple[str, str, Any]]:
        """Place, tuning and part of all that is in one set."""
        for place, kinds in cast(nn.ModuleDict, self[name]).items():
            for kind, part in cast(nn.ModuleDict, kinds).items():
                yield place, kind, part


class InputHook:
    """Stands before one place of an encoder and calls its additions."""

    def __init__(self, additions: Additions, place: str):
        self.additions, self.place = additions, place

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """As `register_forward_pre_hook` wants it."""
        return self.additions.before(self.place, inputs[0]), *inputs[1:]


class Hook:
    """Stands at one place of an encoder and calls its additions."""

    def __init__(self, additions: Additions, place: str):
        self.additions, self.place = additions, place

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """As `register_forward_hook` wants it."""
        return self.additions.at(self.place, inputs[0], output)


def additions_of(encoder: Encoder) -> Additions:
    """The additions of an encoder, made where there are none yet."""
    if not hasattr(encoder, "additions"):
        encoder.additions = Additions()
    return cast(Additions, encoder.additions)


def wrapped(encoder: Encoder) -> Iterator[Encoder]:
    """An encoder and what it is around, where a tuning has put one around another."""
    while isinstance(encoder, Encoder):
        yield encoder
        encoder = getattr(encoder, "encoder", None)  # type: ignore[assignment]


def innermost(encoder: Encoder) -> Encoder:
    """The encoder itself where a tuning has put another one around it."""
    return list(wrapped(encoder))[-1]


def add(encoder: Encoder, name: str, kind: str, place: str, part: Part) -> None:
    """Adds a part of the tuning `kind` to the set `name`, and switches that set on for all rows.

    Raises:
        ConfigError: the set has a part of this tuning there already.
    """
    additions = additions_of(encoder)
    if name not in additions:
        additions[name] = nn.ModuleDict()
        additions.switch(*additions.active, name)
    places, key = cast(nn.ModuleDict, additions[name]), place.replace(".", "/")
    known = key in places
    if not known:
        places[key] = nn.ModuleDict()
    kinds = cast(nn.ModuleDict, places[key])
    if kind in kinds:
        raise ConfigError(
            f"{kind} is there already: merge the tuned run first (selfsup merge), or go on from "
            "its base"
        )
    kinds[kind] = part
    module = encoder.get_submodule(place)
    if not any(isinstance(hook, Hook) for hook in module._forward_hooks.values()):
        module.register_forward_hook(Hook(additions, key))
    before = module._forward_pre_hooks.values()
    if part.on_input and not any(isinstance(h, InputHook) for h in before):
        module.register_forward_pre_hook(InputHook(additions, key))


def merge(encoder: Encoder, name: str = OWN) -> None:
    """Puts all parts of a set into the encoder's weights and takes the set away.

    Raises:
        ConfigError: a part cannot be merged; then nothing is changed.
    """
    encoder = innermost(encoder)
    additions = additions_of(encoder)
    kept = {key: value.clone() for key, value in encoder.state_dict().items()}
    try:
        # what changes a module's input does so for all that was added to it: its turn is last
        for place, _, part in sorted(additions.every(name), key=lambda one: one[2].on_input):
            part.merge(encoder.get_submodule(place.replace("/", ".")))
    except ConfigError:
        encoder.load_state_dict(kept)
        raise
    additions.active = tuple(one for one in additions.active if one[0] != name)
    del additions[name]


def blocks(encoder: Encoder, tuning: str) -> dict[str, Block]:
    """The transformer blocks of an encoder by name, for a tuning whose parts sit in them.

    Raises:
        ConfigError: there are none, or their feed-forward layers are experts.
    """
    found = {name: part for name, part in encoder.named_modules() if isinstance(part, Block)}
    if not found:
        raise ConfigError(
            f"{tuning} sits in transformer blocks, and {type(encoder).__name__} has none: use full"
        )
    if any(block.routed for block in found.values()):
        raise ConfigError(
            f"{tuning} sits in feed-forward layers, and this encoder's are experts "
            f"(model.experts): use lora with targets query, key, value or out"
        )
    return found


def stacks(encoder: Encoder, tuning: str) -> dict[str, TransformerEncoder]:
    """The transformers that an encoder is, or is made of; their name with a "." behind, or "".

    Raises:
        ConfigError: there are none.
    """
    found = {
        f"{name}." if name else "": part
        for name, part in encoder.named_modules()
        if isinstance(part, TransformerEncoder)
    }
    if not found:
        raise ConfigError(f"{tuning} needs a transformer, and this is a {type(encoder).__name__}")
    return found


def linear_places(encoder: Encoder, targets: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """The linear layers that are meant: place and, of a fused layer, which of its equal shares.

    Args:
        encoder: with blocks of attention and feed-forward layers, or any other with linear layers.
        targets: of every block `query`, `key`, `value` (shares of a fused layer), `qkv` (the whole
            of it), `out`, `up`, `down`, of a decoder's cross-attention `cross`; `all`: every one of
            these; or the last part of the name of any other linear layer.

    Returns:
        () as shares where the whole layer is meant.

    Raises:
        ConfigError: a target that this encoder does not have; its linear layers are named.
    """
    # experts multiply by all of their layers' weights at once, and call none of them
    left_out = [f"{name}." for name, m in encoder.named_modules() if isinstance(m, Experts)]
    layers = {
        name: module
        for name, module in encoder.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(("additions.", *left_out))
    }
    shares = {"query": (0, "qkv"), "key": (1, "qkv"), "value": (2, "qkv")}
    chosen: dict[str, tuple[int, ...]] = {}
    for target in targets:
        share, last = shares.get(target, (None, target))
        found = [
            name
            for name in layers
            if (target == "all" and ".layers." in f".{name}")
            or (target == "cross" and ".cross." in name)
            or name.rpartition(".")[2] == last
        ]
        if not found:
            known = sorted({name.rpartition(".")[2] for name in layers})
            raise ConfigError(
                f"this encoder has no linear layer {target!r}; it has {', '.join(known) or 'none'}"
            )
        for name in found:
            before = chosen.get(name)
            if share is None or before == ():
                chosen[name] = ()
            else:
                chosen[name] = tuple(sorted({*(before or ()), share}))
    return chosen


def trained(module: nn.Module) -> tuple[int, int]:
    """How many numbers are trained, and how many there are; shared weights count once.

    >>> layer = nn.Linear(3, 2)
    >>> _ = layer.bias.requires_grad_(False)
    >>> trained(layer)
    (6, 8)
    """
    parameters = list(module.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)
