"""A trained model, and what one does with it."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, final

import numpy as np
import torch

from selfsup.batch import Batch
from selfsup.building import build_encoder
from selfsup.data.dataset import LabelledDataset
from selfsup.data.labels import Labelled
from selfsup.errors import ConfigError, DataError
from selfsup.models.encoder import Encoder, masked_mean
from selfsup.models.encoder_decoder import EncoderDecoder
from selfsup.objective import FillsBlanks, Generates, Objective, Scores, Task
from selfsup.randomness import torch_generator
from selfsup.side_by_side import side_by_side
from selfsup.training.device import autocast, pick_device, pick_dtype, to_device

if TYPE_CHECKING:
    from selfsup.evaluation.anomaly import Anomaly


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
            DataError: an item is empty, and its number is named; or one text is given, no list.
        """
        _check_several(items)
        if (
            layer is not None
            and not -self.encoder.num_layers - 1 <= layer <= self.encoder.num_layers
        ):
            raise ConfigError(f"layer must be from 0 to {self.encoder.num_layers}, got {layer}")
        out = np.empty((len(items), self.encoder.dim), dtype=np.float32)

        def read(given: tuple[list[int], Batch]) -> None:
            numbers, batch = given
            with self._inference():
                if layer is None:
                    pooled = self.encoder.pooled(batch)
                else:
                    features = self.encoder(batch)
                    pooled = masked_mean(features.hidden[layer], features.mask)
            out[numbers] = pooled.float().cpu().numpy()

        number = -(-len(items) // max(1, batch_size))
        side_by_side(read, self._batches(items, batch_size), number, self.device)
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
        """Writes on from `prompt`; an encoder-decoder, or a generation run, writes its answer.

        Args:
            prompt: the beginning, or the source; empty: the model begins a document.
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
                f"{self._kind()} cannot generate; use a causal_language, gpt_bert, denoising or "
                "generation run"
            )
        tokenizer = self.preprocessor.tokenizer
        batch, begun = self._begun(prompt)
        generator = torch_generator(seed, "generate", device=self.device)
        with self._inference():
            new = self.objective.generate(
                batch, num_tokens, generator, temperature=temperature, top_k=top_k, top_p=top_p
            )
        out = new[0].tolist()
        if tokenizer.vocabulary.sep in out:
            out = out[: out.index(tokenizer.vocabulary.sep)]
        return tokenizer.decode([*begun, *out])

    def _begun(self, prompt: str) -> tuple[Batch, list[int]]:
        """What the model reads before it writes, and the ids that what it writes goes on from."""
        if isinstance(self.objective, Task):
            return to_device(self._unlabelled([prompt]).batch(np.array([0])), self.device), []
        if isinstance(self.encoder, EncoderDecoder):
            ((_, batch),) = self._batches([prompt], 1)
            return batch, []
        tokenizer = self.preprocessor.tokenizer
        ids = tokenizer.encode([prompt])[0].astype(np.int64)
        if tokenizer.style == "bert":  # as every row of training began
            ids = np.array([tokenizer.vocabulary.cls, *ids])
        elif not len(ids):  # a document begins after the end of another
            ids = np.array([tokenizer.vocabulary.sep])
        batch = to_device({"tokens": torch.from_numpy(ids).unsqueeze(0)}, self.device)
        return batch, ids.tolist() if prompt else []

    def predict(self, items: Sequence[Any], batch_size: int = 64) -> list[Any]:
        """The label of each item: a class name, a number, a text, or for tagging a tag per word.

        Args:
            items: texts or pairs; for tagging lists of words, or texts that are split at spaces;
                for span_qa pairs of question and context.
            batch_size: items (for span_qa windows) per forward pass.

        Raises:
            ConfigError: the run was not fine-tuned for a task.
        """
        _check_several(items)
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
        _check_several(items)
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
        from selfsup.evaluation.adapt import answers  # it trains too

        if not items:
            return []
        return answers(self.objective, self._unlabelled(items), batch_size)[1]  # type: ignore[arg-type]

    def _unlabelled(self, items: Sequence[Any]) -> LabelledDataset:
        """The data set of a task, of items without labels."""
        name, nothing = self.values["task"]["name"], [None] * len(items)
        task: Any = self.objective
        unlabelled = Labelled(name, list(items), nothing, self.names, "items")
        return self.preprocessor.labelled(unlabelled, **task.row_options)

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
        if not self.objective.own_rows or not items:  # type: ignore[union-attr]
            yield from self._batches(items, size)
            return
        rows = self._unlabelled(items)
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
        _check_several(items)
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


def _check_several(items: Any) -> None:
    """A text is a sequence too, of its letters, which nobody means."""
    if isinstance(items, str | bytes):
        raise DataError(f"{items[:40]!r} is one item; give a list of items")
