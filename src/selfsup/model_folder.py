"""A run's `model/` folder: what a user keeps, and the `Model` that loading it gives.

model/config.toml        format, encoder, method or task, label names, the weights' sha256
model/model.safetensors  the weights of the modules in `kept`; of a run that was tuned without
                         moving the encoder's weights, only those that its base does not have
model/tokenizer.json     or another preprocessor's file
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, final

import numpy as np
import torch
from torch.nn.modules.module import register_module_parameter_registration_hook

from selfsup import registry
from selfsup.batch import Batch
from selfsup.config import from_mapping, overridden, read_toml, write_toml
from selfsup.data.labels import Labelled
from selfsup.errors import CheckpointError, ConfigError, DataError
from selfsup.files import read_steadily, sha256, whole_folder
from selfsup.models.encoder import Encoder, masked_mean
from selfsup.objective import FillsBlanks, Generates, Objective, Scores, Task
from selfsup.randomness import isolated, seed_layers, torch_generator
from selfsup.training.checkpoint import load_tensors, load_weights, save_tensors
from selfsup.training.device import autocast, pick_device, pick_dtype, to_device
from selfsup.tuning.parts import OWN, Where, wrapped

if TYPE_CHECKING:
    from selfsup.evaluation.anomaly import Anomaly

FORMAT = 1
SLACK = 8
"""Numbers of a network for each one in its file, which may hold several in a byte."""
SECTIONS = ("data", "model", "method", "task", "labels", "tuning", "base", "sha256")


def build_encoder(name: str, config: Any, spec: Any, seed: int) -> Encoder:
    """A fresh encoder whose weights depend on the seed alone.

    Raises:
        ConfigError: this model does not read that kind of data.
    """
    encoder = registry.resolve(registry.MODELS, "model", name)
    if spec.kind not in encoder.reads:
        raise ConfigError(
            f"model.name = {name!r} reads {', '.join(encoder.reads)}, and the data are {spec.kind}"
        )
    with isolated():
        seed_layers(seed, "encoder")
        return encoder(config, spec)


def build_objective(table: str, name: str, config: Any, encoder: Encoder, extra: Any, seed: int):
    """A fresh method or task around an encoder; `extra` is the spec or the label names."""
    with isolated():
        seed_layers(seed, "objective")
        return registry.resolve(registry.TABLES[table], table[:-1], name)(config, encoder, extra)


def kept_weights(objective: Objective) -> dict[str, torch.Tensor]:
    """The part of the state that goes to `model/`."""
    prefixes = tuple(f"{name}." for name in objective.kept)
    return {k: v for k, v in objective.state_dict().items() if k.startswith(prefixes)}


def save_model(
    path: Path,
    objective: Objective,
    values: dict[str, Any],
    preprocessor: Any,
    base: "Base | None" = None,
) -> None:
    """Writes the folder whole.

    Args:
        path: the `model/` folder.
        objective: a trained method or task.
        values: sections `data` (its name), `model` and `method` or `task`, and for a task `labels`
            and `tuning` (`names`, the oldest first).
        preprocessor: what a user's items go through.
        base: whose weights are not written again where they are the same.
    """
    weights = kept_weights(objective)
    if base is not None:
        values = {**values, "base": base.values(path)}
        weights = without_base(weights, objective.encoder, base.model.encoder)
    with whole_folder(path) as aside:
        hashes = {"model.safetensors": save_tensors(aside / "model.safetensors", weights)}
        document = {"format": FORMAT, **values, "sha256": hashes}
        (aside / "config.toml").write_text(write_toml(document))
        preprocessor.save(aside)


def without_base(
    weights: dict[str, torch.Tensor], encoder: Encoder, base: Encoder
) -> dict[str, torch.Tensor]:
    """The weights that differ from those of the base that the encoder began as."""
    prefix = _place_of(base, encoder)
    known = {prefix + name: value for name, value in base.state_dict().items()}
    return {
        key: value
        for key, value in weights.items()
        if key not in known or not torch.equal(value.cpu(), known[key].cpu())
    }


def _place_of(base: Encoder, encoder: Encoder) -> str:
    """What a task calls the base's weights, its `encoder` being the base or around it."""
    depth = len(list(wrapped(encoder))) - len(list(wrapped(base)))
    return "encoder." * (depth + 1)


class Base(NamedTuple):
    """The run that another one was tuned from."""

    run: Path
    model: "Model"

    def values(self, path: Path) -> dict[str, Any]:
        """How a `model/` folder names it: from there, absolutely, and by its weights' sha256."""
        return {
            "path": os.path.relpath(self.run, path),
            "absolute": str(self.run.resolve()),
            **self.identity(),
        }

    def identity(self) -> dict[str, str]:
        """The sha256 of its weights."""
        return {"sha256": self.model.values["sha256"]["model.safetensors"]}


def load_base(path: Path, section: dict[str, str]) -> "Model":
    """The base of the run whose `model/` folder is `path`.

    Raises:
        CheckpointError: it is not there, has other weights, or was itself tuned from this run.
    """
    found = find_base(path, section)
    _check_chain(path, found)
    base = Base(found, load_model(found, "cpu"))
    check_base(path, section, base)
    return base.model


def _check_chain(path: Path, base: Path) -> None:
    """Follows the bases of bases: none of them may be the `model/` folder `path` again."""
    seen = {path.resolve()}
    while True:
        inner, values = read_folder(base)
        if inner.resolve() in seen:
            raise CheckpointError(f"{path / 'config.toml'}: says under [base] that it is its own")
        if "base" not in values:
            return
        seen.add(inner.resolve())
        base = find_base(inner, values["base"])


def find_base(path: Path, section: dict[str, str]) -> Path:
    """Where the base of the run whose `model/` folder is `path` lies.

    Raises:
        CheckpointError: it is not there.
    """
    places = [path / section["path"], Path(section["absolute"])]
    found = next((place for place in places if place.is_dir()), None)
    if found is None:
        raise CheckpointError(
            f"{path}: was tuned from {section['absolute']}, which is not there; put it back, or "
            f"name its new place as `absolute` under [base] in {path / 'config.toml'}"
        )
    return found


def check_base(path: Path, section: dict[str, str], base: Base) -> None:
    """Refuses a base with other weights than the run whose `model/` folder is `path` began as.

    Raises:
        CheckpointError: the sha256 of the weights differ.
    """
    known, given = section["sha256"], base.identity()["sha256"]
    if known != given:
        raise CheckpointError(
            f"{path}: was tuned from another model than {base.run} holds now: its weights' sha256 "
            f"was {known[:12]}..., this one's is {given[:12]}..."
        )


def load_model(
    run: str | Path, device: str = "auto", settings: dict[str, Any] | None = None
) -> "Model":
    """Loads a run's folder, or its `model/` folder, which may be replaced meanwhile.

    Args:
        run: the folder.
        device: auto, cpu or cuda.
        settings: changes to what a task does when it predicts: {"task.num_beams": 4}.

    Raises:
        CheckpointError: there is no finished model, or it is damaged.
        ConfigError: a setting of something else.
    """

    def read() -> Model:
        path, values = read_folder(run)
        for key in settings or {}:
            if not key.startswith("task.") or "task" not in values:
                raise ConfigError(
                    f"--set {key}: of a finished run only keys of its task can be set"
                )
        values = overridden(values, settings or {})
        base = load_base(path, values["base"]) if "base" in values else None
        return assemble(path, values, base, device)

    inner = Path(run) / "model"
    return read_steadily(inner if inner.is_dir() else Path(run), read)


def read_folder(run: str | Path) -> tuple[Path, dict[str, Any]]:
    """The `model/` folder of a run, and what its config.toml says.

    Raises:
        CheckpointError: there is no finished model, or another version wrote it.
    """
    run = Path(run)
    path = run / "model" if (run / "model").is_dir() else run
    if not (path / "config.toml").is_file():
        unfinished = (run / "checkpoints").is_dir()
        hint = "the run is not finished: go on with --resume" if unfinished else "no run is there"
        raise CheckpointError(f"{run}: holds no model; {hint}")
    values = read_toml(path / "config.toml")
    if values.get("format") != FORMAT:
        raise CheckpointError(
            f"{path / 'config.toml'}: format {values.get('format')}, this version reads {FORMAT}"
        )
    for name in SECTIONS:
        if not isinstance(values.get(name, {}), dict):
            raise CheckpointError(
                f"{path / 'config.toml'}: {name} is a section, got {values[name]!r}"
            )
    return path, values


def assemble(
    path: Path, values: dict[str, Any], base: "Model | None", device: str, name: str = OWN
) -> "Model":
    """The model of a folder, around the encoder of its base where it has one.

    Args:
        path: the `model/` folder.
        values: what its config.toml says.
        base: the run that it was tuned from; its encoder is taken as it is and not copied.
        device: auto, cpu or cuda.
        name: of the set that its additions become in the encoder.
    """
    try:
        data_name, model = values["data"]["name"], dict(values["model"])
        kind = "methods" if "method" in values else "tasks"
        section = dict(values[kind[:-1]])
        data_module = registry.module_of(registry.DATA, "data", data_name)
        model_name, objective_name = model.pop("name"), section.pop("name")
    except KeyError as error:
        raise CheckpointError(
            f"{path / 'config.toml'}: section or key {error} is missing"
        ) from None
    preprocessor = data_module.load_preprocessor(path)
    model_module = registry.module_of(registry.MODELS, "model", model_name)
    config = from_mapping(model_module.Config, model, "model")
    weights = _verified_weights(path, values)
    if base:
        encoder = base.encoder
    else:
        with at_most(SLACK * sum(tensor.numel() for tensor in weights.values()), path):
            encoder = build_encoder(model_name, config, preprocessor.spec, seed=0)
    of_base = list(encoder.state_dict()) if base else []
    names = tuple(values.get("labels", {}).get("names", ()))
    module = registry.module_of(registry.TABLES[kind], kind[:-1], objective_name)
    objective = build_objective(
        kind,
        objective_name,
        from_mapping(module.Config, section, kind[:-1]),
        encoder,
        preprocessor.spec if kind == "methods" else names,
        seed=0,
    )
    if "tuning" in values:
        retune(objective, values["tuning"], preprocessor, name)
    if name != OWN:
        own, wanted = f".additions.{OWN}.", f".additions.{name}."
        weights = {key.replace(own, wanted, 1): value for key, value in weights.items()}
    kept = set(kept_weights(objective))
    if base:
        kept -= {_place_of(encoder, objective.encoder) + name for name in of_base}
        values["tuning"] = joined(base.values.get("tuning"), values["tuning"])
    others = {k: v for k, v in objective.state_dict().items() if k not in kept}
    load_weights(objective, {**others, **weights}, str(path / "model.safetensors"))
    return Model(objective, preprocessor, names, values, device)


@contextmanager
def at_most(limit: int, path: Path) -> Iterator[None]:
    """Inside, no network of more than `limit` numbers is built.

    So a configuration that does not belong to the weights beside it cannot ask for all memory.

    Raises:
        CheckpointError: it was asked for; the `model/` folder `path` is named.
    """
    built = 0

    def count(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        nonlocal built
        built += parameter.numel() if parameter is not None else 0
        if built > limit:
            raise CheckpointError(
                f"{path}: config.toml describes a network much larger than model.safetensors"
            )

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # a tensor that no memory could hold
        raise CheckpointError(f"{path / 'config.toml'}: [model]: {error}") from error
    finally:
        hook.remove()


def joined(before: dict[str, Any] | None, after: dict[str, Any]) -> dict[str, Any]:
    """One section of tunings out of those of a base and those that came later."""
    before = before or {"names": []}
    return {**before, **after, "names": [*before["names"], *after["names"]]}


def retune(task: Any, section: dict[str, Any], preprocessor: Any, name: str = OWN) -> None:
    """Adds to the encoder of a task (or method) what tunings, named in a configuration, added."""
    from selfsup.tuning.choice import Tuning, tune  # its tunings import tasks

    for one in section["names"]:
        if one in registry.PASSING:
            continue
        options = {one: section[one]} if one in section else {}
        tune(task, Tuning.of(one, options), Where(name, preprocessor))


def _verified_weights(path: Path, values: dict[str, Any]) -> dict[str, torch.Tensor]:
    file = path / "model.safetensors"
    tensors = load_tensors(file)
    if values.get("sha256", {}).get(file.name) != sha256(file):
        raise CheckpointError(f"{file}: damaged: its sha256 differs from the one in config.toml")
    return tensors


@final
class Model:
    """A trained encoder with the verbs that its method or task gives.

    Attributes:
        objective: the method or task.
        preprocessor: turns items into batches.
        names: label names of a task.
        values: what config.toml says.
    """

    def __init__(
        self,
        objective: Objective,
        preprocessor: Any,
        names: tuple[str, ...],
        values: dict[str, Any],
        device: str = "auto",
    ):
        self.device = pick_device(device)
        self.dtype = pick_dtype("auto", self.device)
        self.objective, self.preprocessor = objective.to(self.device).eval(), preprocessor
        self.names, self.values = names, values

    @property
    def encoder(self) -> Encoder:
        """The trained encoder."""
        return self.objective.encoder

    def untrained_encoder(self, seed: int = 0) -> Encoder:
        """The same network with fresh weights."""
        name = self.values["model"]["name"]
        return build_encoder(name, self.encoder.config, self.preprocessor.spec, seed)

    @contextmanager
    def _inference(self) -> Iterator[None]:
        with torch.inference_mode(), autocast(self.device, self.dtype):
            yield

    def embed(
        self, items: Sequence[Any], batch_size: int = 64, layer: int | None = None
    ) -> np.ndarray:
        """One vector per item: the mean over its real positions.

        Args:
            items: texts, or (text, text) pairs.
            batch_size: items per forward pass.
            layer: 0 is the embedding, -1 the last layer; None: the encoder's own pooled vector.

        Returns:
            (items, dim) float32.

        Raises:
            ConfigError: the encoder has no such layer.
            DataError: an item is empty; its number is named.
        """
        if (
            layer is not None
            and not -self.encoder.num_layers - 1 <= layer <= self.encoder.num_layers
        ):
            raise ConfigError(f"layer must be from 0 to {self.encoder.num_layers}, got {layer}")
        out = np.empty((len(items), self.encoder.dim), dtype=np.float32)
        for numbers, batch in self._batches(items, batch_size):
            with self._inference():
                features = self.encoder(batch)
            pooled = (
                features.pooled
                if layer is None
                else masked_mean(features.hidden[layer], features.mask)
            )
            out[numbers] = pooled.float().cpu().numpy()
        return out

    def fill(self, text: str, top: int = 5) -> list[list[tuple[str, float]]]:
        """The likeliest words for every [MASK] in `text`: one list of (word, probability) each.

        Raises:
            ConfigError: the run's method does not fill blanks, or `top` is below 1.
            DataError: there is no [MASK] in the text.
        """
        if top < 1:
            raise ConfigError(f"top must be at least 1, got {top}")
        if not isinstance(self.objective, FillsBlanks):
            raise ConfigError(
                f"{self._kind()} cannot fill blanks; use a masked_language or gpt_bert run"
            )
        tokenizer = self.preprocessor.tokenizer
        ((_, batch),) = self._batches([text], 1)
        with self._inference():
            log_probabilities = self.objective.fill(batch)  # (blank, vocabulary)
        if not len(log_probabilities):
            mask = tokenizer.token(tokenizer.vocabulary.mask)
            raise DataError(f"no blank in {text!r}: write {mask} where a word is missing")
        best = log_probabilities.exp().topk(min(top, log_probabilities.shape[-1]), dim=-1)
        return [
            [(tokenizer.token(i), p) for i, p in zip(ids, values, strict=True)]
            for ids, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    def generate(
        self,
        prompt: str = "",
        num_tokens: int = 100,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> str:
        """Writes on from `prompt`.

        Args:
            prompt: the beginning; empty: the model begins a document.
            num_tokens: at most so many tokens are added.
            temperature: 0 takes the likeliest token each time.
            top_k: draw from the k likeliest tokens only; 0: all.
            top_p: draw from the smallest set of tokens with this total probability.
            seed: another seed, another text.

        Raises:
            ConfigError: the run's method does not generate, or an option is out of range.
        """
        if num_tokens < 0:
            raise ConfigError(f"the number of tokens must be at least 0, got {num_tokens}")
        if not isinstance(self.objective, Generates):
            raise ConfigError(
                f"{self._kind()} cannot generate; use a causal_language or gpt_bert run"
            )
        tokenizer = self.preprocessor.tokenizer
        ids = tokenizer.encode([prompt])[0].astype(np.int64)
        if tokenizer.style == "bert":  # as every row of training began
            ids = np.array([tokenizer.vocabulary.cls, *ids])
        elif not len(ids):  # a document begins after the end of another
            ids = np.array([tokenizer.vocabulary.sep])
        batch = to_device({"tokens": torch.from_numpy(ids).unsqueeze(0)}, self.device)
        generator = torch_generator(seed, "generate", device=self.device)
        with self._inference():
            new = self.objective.generate(
                batch, num_tokens, generator, temperature=temperature, top_k=top_k, top_p=top_p
            )
        out = new[0].tolist()
        if tokenizer.vocabulary.sep in out:
            out = out[: out.index(tokenizer.vocabulary.sep)]
        return tokenizer.decode([*(ids.tolist() if prompt else []), *out])

    def predict(self, items: Sequence[Any], batch_size: int = 64) -> list[Any]:
        """The label of each item: a class name, a number, a text, or for tagging a tag per word.

        Args:
            items: texts or pairs; for tagging lists of words, or texts that are split at spaces;
                for span_qa pairs of question and context.
            batch_size: items (for span_qa windows) per forward pass.

        Raises:
            ConfigError: the run was not fine-tuned for a task.
        """
        if isinstance(self.objective, Task) and self.objective.gives_text:
            return self._texts(items, batch_size)
        out: list[Any] = [None] * len(items)
        for number, values, _, num_words in self._predictions(items, batch_size):
            out[number] = self.answer(values, num_words)
        return out

    def answer(self, values: torch.Tensor, num_words: int | None = None) -> Any:
        """What `predict` gives for one item: a name or a number, for tagging a tag per word.

        Args:
            values: the item's row of the task's `Predictions.values`.
            num_words: of a tagged item; a word beyond the end of its row gets the tag "".
        """
        if num_words is not None:
            tags = [self.names[i] for i in values[:num_words].tolist() if i >= 0]
            return tags + [""] * (num_words - len(tags))
        return self.names[int(values)] if self.names else float(values)

    def predict_proba(self, items: Sequence[Any], batch_size: int = 64) -> list[np.ndarray]:
        """Probabilities in the order of `names`: (classes,) per item, for tagging (words, tags).

        Raises:
            ConfigError: the run was not fine-tuned for a task, or the task has no classes.
        """
        if isinstance(self.objective, Task) and (self.objective.gives_text or not self.names):
            what = "texts" if self.objective.gives_text else "numbers"
            raise ConfigError(f"{self._kind()} gives {what}, not probabilities: use predict")
        out: list[Any] = [None] * len(items)
        for number, _, scores, num_words in self._predictions(items, batch_size):
            shown = scores.float().cpu().numpy()[:num_words]
            lost = 0 if num_words is None else num_words - len(shown)
            out[number] = np.pad(shown, ((0, lost), (0, 0))) if lost else shown
        return out

    def _texts(self, items: Sequence[Any], batch_size: int) -> list[str]:
        """What the data set makes of the predictions for items without labels."""
        from selfsup.evaluation.adapt import answers, rows_of  # it imports this module

        if not items:
            return []
        task, nothing = self.values["task"]["name"], [None] * len(items)
        unlabelled = Labelled(task, list(items), nothing, self.names, "items")
        rows = rows_of(self.objective, self.preprocessor, unlabelled)  # type: ignore[arg-type]
        return answers(self.objective, rows, batch_size)[1]  # type: ignore[arg-type]

    def _predictions(
        self, items: Sequence[Any], batch_size: int
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, int | None]]:
        """(item number, its values, its scores, for tagging its number of words)."""
        if not isinstance(self.objective, Task):
            raise ConfigError(
                f"{self._kind()} has no labels to predict; run `selfsup finetune` first"
            )
        tagging = self.values["task"]["name"] == "tagging"
        if tagging:
            items = [item.split() if isinstance(item, str) else list(item) for item in items]
        for numbers, batch in self._rows(items, batch_size):
            with self._inference():
                values, scores = self.objective.predict(batch)
            for row, number in enumerate(numbers):
                num_words = len(items[number]) if tagging else None
                yield number, values[row], scores[row], num_words

    def _rows(self, items: Sequence[Any], size: int) -> Iterable[tuple[list[int], Batch]]:
        """What the task reads: of its data set, where that makes other rows than `_batches`."""
        from selfsup.evaluation.adapt import rows_of  # it imports this module

        if not self.objective.own_rows or not items:  # type: ignore[union-attr]
            yield from self._batches(items, size)
            return
        task, nothing = self.values["task"]["name"], [None] * len(items)
        unlabelled = Labelled(task, list(items), nothing, self.names, "items")
        rows = rows_of(self.objective, self.preprocessor, unlabelled)  # type: ignore[arg-type]
        order = np.argsort(rows.lengths, kind="stable")  # type: ignore[arg-type]
        for first in range(0, len(order), size):
            numbers = order[first : first + size]
            yield numbers.tolist(), to_device(rows.batch(numbers), self.device)

    def score(self, items: Sequence[str], batch_size: int = 16) -> list[float]:
        """Log-probability (nats) of each text, summed over its tokens.

        Raises:
            ConfigError: the run's method gives no probabilities.
        """
        if not isinstance(self.objective, Scores):
            raise ConfigError(
                f"{self._kind()} gives texts no probability; use a causal_language run"
            )
        out = [0.0] * len(items)
        for numbers, batch in self._batches(items, batch_size):
            with self._inference():
                scored = self.objective.score(batch)
            sums = (scored["log_probability"] * scored["scored"]).sum(1)
            for number, value in zip(numbers, sums.tolist(), strict=True):
                out[number] = value
        return out

    def anomalies(self, items: Sequence[Any], batch_size: int = 256) -> "list[Anomaly]":
        """How unusual each table row or picture is, and in which columns: `evaluation.anomaly`.

        Raises:
            ConfigError: the run rebuilds neither table rows nor pictures.
            DataError: an item cannot be read; its number is named.
        """
        from selfsup.evaluation.anomaly import anomalies  # it imports this module

        return anomalies(self, items, batch_size)

    def _batches(self, items: Sequence[Any], size: int) -> Iterable[tuple[list[int], Batch]]:
        for numbers, batch in self.preprocessor.batches(items, size):
            yield numbers, to_device(batch, self.device)

    def _kind(self) -> str:
        section = self.values.get("method") or self.values["task"]
        return f"a {section['name']} model"
