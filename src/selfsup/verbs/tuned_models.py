"""Many tuned runs over one base in memory: a batch may mix items of all of them.

A run that was tuned without moving the encoder's own weights holds little of its own: parts in the
encoder, and a head. Here the base's encoder is loaded once, each run's parts become one of its sets
(`tuning.parts.Additions`), and a batch goes through the encoder once: each row meets the parts of
its own run, and each head reads the rows of its own run.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast, final

import torch

from selfsup.batch import Batch
from selfsup.errors import ConfigError, DataError, nearest
from selfsup.model import Model
from selfsup.model_folder import Base, assemble, check_base, load_model, read_whole
from selfsup.models.encoder import Encoder, Features
from selfsup.objective import Objective, Task
from selfsup.tasks.classification import Classification
from selfsup.tasks.regression import Regression
from selfsup.tasks.tagging import Tagging
from selfsup.training.device import autocast, to_device
from selfsup.tuning.parts import additions_of, innermost, wrapped

FILL = {"words": -1}  # what stands where a row has ended; of tokens the padding, else 0


class Row(NamedTuple):
    """One item on its way: whose it is, and what its run's preprocessor made of it."""

    number: int
    name: str
    num_words: int | None  # of an item that is tagged
    batch: Batch  # of this row alone
    length: int


class Given(Encoder):
    """Stands for the shared encoder in one run's task, and gives what that has computed."""

    features: Features

    def __init__(self, like: Encoder):
        super().__init__()
        self.config, self.reads, self.causal = like.config, like.reads, like.causal
        self.dim, self.num_layers = like.dim, like.num_layers

    def forward(self, batch: Batch) -> Features:
        """The features of the rows that `batch` holds."""
        return self.features


@final
class TunedModels:
    """One base and the runs that were tuned from it.

    Several threads may call it: their calls take turns, for a batch switches the encoder's sets.

    Args:
        base: the run folder that the others were tuned from.
        runs: their folders by the name that `predict` knows each by.
        device: auto, cpu or cuda.

    Raises:
        CheckpointError: a run is not finished, or was tuned from other weights.
        ConfigError: a run holds an encoder of its own.
    """

    def __init__(
        self, base: str | Path, runs: Mapping[str, str | Path] | None = None, device: str = "auto"
    ):
        loaded = load_model(base, device)
        alone = Objective()  # what the base was pre-trained with beside the encoder is let go
        alone.encoder = loaded.encoder
        model = Model(alone, loaded.preprocessor, (), loaded.values, device)
        self.base = Base(Path(base), model)
        self._additions = additions_of(innermost(model.encoder))
        self._of_base = self._additions.active
        self._models: dict[str, Model] = {}
        self._sets: dict[str, str] = {}  # a name may be any text, that of a set may not
        self._number = 0
        self._lock = threading.Lock()
        for name, run in (runs or {}).items():
            self.add(name, run)

    @property
    def names(self) -> tuple[str, ...]:
        """The runs that are loaded."""
        return tuple(self._models)

    def add(self, name: str, run: str | Path) -> None:
        """Loads one more run.

        Raises:
            CheckpointError, ConfigError: as above, or the name is taken.
        """
        with self._lock:
            if name in self._models:
                raise ConfigError(f"{name!r} is loaded already: remove it first, or name it anew")
            key = f"set{self._number}"

            def read(path: Path, values: dict[str, Any]) -> Model:
                self._forget(key)  # a save came between, and it is read again
                if "base" not in values or "task" not in values:
                    raise ConfigError(
                        f"{run}: is not a task tuned over a base: it holds an encoder of its own; "
                        "load it by itself (selfsup.load), or tune the base again with --tuning "
                        "lora"
                    )
                check_base(path, values["base"], self.base)
                return assemble(path, values, self.base.model, str(self.base.model.device), key)

            try:
                model = read_whole(run, read)
                if _reads_features(model.objective):
                    _stand_in(model.objective, self.base.model.encoder)
            except BaseException:
                self._forget(key)
                raise
            finally:
                self._additions.active = self._of_base
            self._models[name], self._sets[name] = model, key
            self._number += 1

    def remove(self, name: str) -> None:
        """Lets one run go.

        Raises:
            ConfigError: no run of this name is loaded.
        """
        with self._lock:
            self._known(name)
            del self._models[name]
            self._forget(self._sets.pop(name))

    def predict(
        self, items: Sequence[Any], names: str | Sequence[str], batch_size: int = 64
    ) -> list[Any]:
        """The answer of an item's run for each item, as `Model.predict` gives it.

        Items of classification, tagging and regression share batches, whoever's they are. What
        answers otherwise (texts, spans, early exits, clozes) goes in batches of its own through the
        same encoder.

        Args:
            items: what each item's run reads.
            names: the run of each item, or one for all.
            batch_size: items per forward pass.

        Raises:
            ConfigError: no run of this name is loaded, or there are not as many names as items.
            DataError: an item is empty.
        """
        given = [names] * len(items) if isinstance(names, str) else list(names)
        if len(given) != len(items):
            raise ConfigError(f"{len(given)} names for {len(items)} items: give one for each")
        out: list[Any] = [None] * len(items)
        with self._lock:
            numbers: dict[str, list[int]] = {}
            for number, name in enumerate(given):
                self._known(name)
                numbers.setdefault(name, []).append(number)
            rows: list[Row] = []
            for name, chosen in numbers.items():
                model, some = self._models[name], [items[number] for number in chosen]
                try:
                    if _reads_features(model.objective):
                        rows += _rows_of(name, model, chosen, some)
                        continue
                    self._switch({name: None})
                    for number, answer in zip(chosen, model.predict(some, batch_size), strict=True):
                        out[number] = answer
                except DataError as error:
                    raise DataError(f"of the items for {name!r}: {error}") from error
            rows.sort(key=lambda row: row.length)
            for first in range(0, len(rows), batch_size):
                for number, answer in self._answers(rows[first : first + batch_size]):
                    out[number] = answer
        return out

    @torch.inference_mode()
    def _answers(self, rows: list[Row]) -> Iterator[tuple[int, Any]]:
        """The number and the answer of each row of one batch."""
        base = self.base.model
        batch = to_device(_joined(rows, getattr(base.preprocessor.spec, "pad", 0)), base.device)
        places: dict[str, list[int]] = {}
        for place, row in enumerate(rows):
            places.setdefault(row.name, []).append(place)
        of = {name: torch.tensor(some, device=base.device) for name, some in places.items()}
        self._switch(of if len(of) > 1 else dict.fromkeys(of))
        with autocast(base.device, base.dtype):
            features = base.encoder(batch)
            for name, some in of.items():
                model = self._models[name]
                _give(model.objective, features, some)
                own = {field: value[some] for field, value in batch.items()}
                values = cast(Task, model.objective).predict(own).values
                for place, answer in zip(places[name], values, strict=True):
                    yield rows[place].number, model.answer(answer, rows[place].num_words)

    def _switch(self, rows: Mapping[str, torch.Tensor | None]) -> None:
        """Puts each run's set to work on its rows; a run may have none (probe, layer_mix)."""
        chosen = [(self._sets[name], some) for name, some in rows.items()]
        known = [(key, some) for key, some in chosen if key in self._additions]
        self._additions.switch(*self._of_base, *known)

    def _known(self, name: str) -> None:
        if name not in self._models:
            raise ConfigError(f"no run {name!r} is loaded{nearest(name, self._models)}")

    def _forget(self, key: str) -> None:
        self._additions.active = self._of_base
        if key in self._additions:
            del self._additions[key]


def _reads_features(objective: Objective) -> bool:
    """Whether a task's answer for a row depends on the features of that row alone."""
    if not isinstance(objective, Classification | Tagging | Regression):
        return False
    return getattr(objective, "exits", None) is None


def _stand_in(objective: Objective, shared: Encoder) -> None:
    """Puts a `Given` where a task, or what a tuning has put around its encoder, has `shared`."""
    if objective.encoder is shared:
        objective.encoder = Given(shared)
        return
    for outer in wrapped(objective.encoder):
        if getattr(outer, "encoder", None) is shared:
            outer.encoder = Given(shared)
            return


def _give(objective: Objective, features: Features, rows: torch.Tensor) -> None:
    """Gives a task its rows: all layers where a tuning mixes them, else the last."""
    given = cast(Given, innermost(objective.encoder))
    layers = features.hidden[-1:] if objective.encoder is given else features.hidden
    hidden = tuple(layer[rows] for layer in layers)
    given.features = Features(hidden, features.mask[rows], features.pooled[rows])


def _rows_of(name: str, model: Model, numbers: list[int], items: list[Any]) -> list[Row]:
    """The rows of one run's items; each run may have another longest row."""
    tagged = isinstance(model.objective, Tagging)
    if tagged:
        items = [item.split() if isinstance(item, str) else list(item) for item in items]
    out = []
    for (place,), batch in model.preprocessor.batches(items, 1):
        num_words = len(items[place]) if tagged else None
        length = next(iter(batch.values())).shape[1]
        out.append(Row(numbers[place], name, num_words, batch, length))
    return out


def _joined(rows: list[Row], pad: int) -> Batch:
    """One batch of many; a field that some rows lack says nothing of them."""
    out: Batch = {}
    for field, like in {k: v for row in rows for k, v in row.batch.items()}.items():
        fill = pad if field == "tokens" else FILL.get(field, 0)
        nothing = [like.new_ones(1, row.length) if field == "mask" else like[:, :0] for row in rows]
        parts = [row.batch.get(field, none) for row, none in zip(rows, nothing, strict=True)]
        longest = max(part.shape[1] for part in parts)
        out[field] = torch.cat([_filled(part, longest, fill) for part in parts])
    lengths = torch.tensor([row.length for row in rows])
    if "mask" not in out and bool((lengths != lengths[0]).any()):
        out["mask"] = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)  # (batch, time)
    return out


def _filled(row: torch.Tensor, longest: int, fill: int) -> torch.Tensor:
    rest = row.new_full((1, longest - row.shape[1], *row.shape[2:]), fill)
    return torch.cat((row, rest), 1)
