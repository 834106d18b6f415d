"""Fine-tuning and embedding texts of mixed length, against what people use for it.

`finetune_4x256`: one and the same BERT classifier, by our loop and by the Trainer of `transformers`
with a collator that pads each batch to its longest row. Lengths are those of $SELFSUP_DATA's SST-2
where it is given, else drawn with the same mean; both sides see the same rows, in batches of 32.
Ours puts rows of similar length into one batch, and an attention kernel without a mask where
nothing is padded.

`embed_6x384`: vectors of texts by `Model.embed` and by sentence-transformers' `encode`, from one
checkpoint with random weights; the vectors have to be the same within 1e-4.
"""

import math
import os
import random
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.timing import NotMeasuredError, Pair, best_rates, num_parameters, unit
from selfsup import console
from selfsup.batch import Vocabulary
from selfsup.data import label_files
from selfsup.data.dataset import LabelledDataset, pad_mask, pad_rows
from selfsup.interop.transformers import import_run
from selfsup.model_folder import load_model
from selfsup.models.transformer import Config, TransformerEncoder
from selfsup.tasks import classification
from selfsup.training.config import TrainingConfig
from selfsup.training.device import pick_dtype
from selfsup.training.loop import train

VOCABULARY, PAD, FIRST = 8000, 0, 5
WORDS_PER_TEXT = 13.5  # of SST-2's dev part, says its README


class Rows(LabelledDataset):
    """Drawn tokens of given lengths, of two classes."""

    fields = ("tokens", "mask", "label")

    def __init__(self, lengths: list[int]):
        generator = np.random.default_rng(0)
        self.rows = [generator.integers(FIRST, VOCABULARY, length) for length in lengths]
        self.labels = generator.integers(0, 2, len(lengths))
        self.lengths, self.task, self.truncated = np.array(lengths), "classification", 0

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, numbers: np.ndarray) -> dict[str, torch.Tensor]:
        rows = [self.rows[number] for number in numbers]
        label = torch.from_numpy(self.labels[numbers])
        return {"tokens": pad_rows(rows, PAD), **pad_mask(rows), "label": label}


def text_lengths(count: int) -> list[int]:
    """Tokens of as many texts, between the special ones that each begins and ends with."""
    path = Path(os.environ.get("SELFSUP_DATA", "")) / "text/glue/SST-2/dev.tsv.gz"
    if path.is_file():
        _, records = label_files.table(path)
        lengths = [len(record.cells["sentence"].split()) for record in records]
    else:
        generator = np.random.default_rng(0)
        lengths = (
            np.maximum(1, generator.gamma(4.0, WORDS_PER_TEXT / 4, count)).astype(int).tolist()
        )
    return [2 + lengths[i % len(lengths)] for i in range(count)]


def finetune(dim: int, layers: int, batch: int, steps: int, precision: str = "auto") -> Pair:
    """Samples/s of fine-tuning, both sides with dropout, clipping and a falling rate."""
    dtype = pick_dtype(precision, torch.device("cpu"))
    lengths = text_lengths(batch * steps)
    amount = batch * steps
    ours, peer = (side(dim, layers, lengths, dtype) for side in (own_finetuning, peer_finetuning))
    rates = best_rates(lambda: ours(batch, steps), lambda: peer(batch, steps), amount)
    return *rates, unit("samples", dtype)


def own_finetuning(
    dim: int, layers: int, lengths: list[int], dtype: torch.dtype
) -> Callable[[int, int], float]:
    """A turn of ours: its seconds."""
    spec = Vocabulary(size=VOCABULARY, pad=PAD, unk=1, cls=2, sep=3, mask=4)
    model = Config(
        dim=dim,
        layers=layers,
        heads=dim // 64,
        norm="post",
        norm_eps=1e-12,
        positions="learned",
        segment_types=2,
        embedding_norm=True,
        pooling="bert",
    )
    task = classification.Classification(
        classification.Config(pooling="encoder"), TransformerEncoder(model, spec), ("0", "1")
    )
    data = Rows(lengths)

    def turn(batch: int, steps: int) -> float:
        precision = str(dtype).removeprefix("torch.")
        training = TrainingConfig(
            steps=steps, batch_size=batch, lr=5e-5, evaluations=0, precision=precision
        )
        started = time.perf_counter()
        with console.quiet():
            train(task, data, None, training, None, "benchmark")
        return time.perf_counter() - started

    turn.parameters = num_parameters(task)  # type: ignore[attr-defined]
    return turn


def peer_finetuning(
    dim: int, layers: int, lengths: list[int], dtype: torch.dtype
) -> Callable[[int, int], float]:
    """A turn of the Trainer: its seconds."""
    try:
        import accelerate  # noqa: F401
        from transformers import (
            BertConfig,
            BertForSequenceClassification,
            Trainer,
            TrainingArguments,
        )
    except ImportError as error:
        raise NotMeasuredError(f"the Trainer needs {error.name}") from None
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=dim,
        num_hidden_layers=layers,
        num_attention_heads=dim // 64,
        intermediate_size=4 * dim,
    )
    model, data = BertForSequenceClassification(config), Rows(lengths)
    examples = [
        {"input_ids": row, "label": int(label)}
        for row, label in zip(data.rows, data.labels, strict=True)
    ]

    def collate(chosen: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        tokens = pad_rows([one["input_ids"] for one in chosen], PAD)
        labels = torch.tensor([one["label"] for one in chosen])
        return {"input_ids": tokens, "attention_mask": (tokens != PAD).long(), "labels": labels}

    def turn(batch: int, steps: int) -> float:
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder,
                max_steps=steps,
                per_device_train_batch_size=batch,
                learning_rate=5e-5,
                warmup_steps=math.ceil(0.06 * steps),
                save_strategy="no",
                logging_strategy="no",
                report_to=[],
                disable_tqdm=True,
                remove_unused_columns=False,
                use_cpu=True,
                bf16=dtype == torch.bfloat16,
            )
            trainer = Trainer(model, arguments, collate, examples)
            started = time.perf_counter()
            trainer.train()
            return time.perf_counter() - started

    return turn


def embed(dim: int, layers: int, count: int) -> Pair:
    """Texts/s, float32, tokenization included."""
    try:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.models import Pooling, Transformer
    except ImportError as error:
        raise NotMeasuredError(f"the peer needs {error.name}") from None
    texts = drawn_texts(count)
    with tempfile.TemporaryDirectory() as folder:
        source = checkpoint(Path(folder) / "bert", dim, layers, texts)
        with console.quiet():
            ours = load_model(import_run(source, Path(folder) / "run"), "cpu")
        ours.dtype = torch.float32
        reader = Transformer(str(source), max_seq_length=128)
        peer = SentenceTransformer(modules=[reader, Pooling(dim, "mean")], device="cpu")
        found, expected = ours.embed(texts, layer=-1), peer.encode(texts, show_progress_bar=False)
        assert np.abs(found - expected).max() < 1e-4, np.abs(found - expected).max()
        rates = best_rates(
            partial(seconds_of, lambda: ours.embed(texts, layer=-1)),
            partial(seconds_of, lambda: peer.encode(texts, show_progress_bar=False)),
            count,
        )
    return *rates, unit("texts", torch.float32)


def seconds_of(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def drawn_texts(count: int) -> list[str]:
    """Made-up words, the frequent ones far more often, in texts of SST-2's lengths."""
    generator = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(generator.choices(letters, k=generator.randint(2, 9))) for _ in range(3000)]
    weights = [1 / (1 + rank) for rank in range(len(words))]
    return [" ".join(generator.choices(words, weights, k=n - 2)) for n in text_lengths(count)]


def checkpoint(folder: Path, dim: int, layers: int, texts: list[str]) -> Path:
    """A BERT of `transformers` with random weights and a WordPiece tokenizer of these texts."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    tokenizer = BertWordPieceTokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=VOCABULARY, show_progress=False)
    folder.mkdir()
    tokenizer.save_model(str(folder))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=dim,
        num_hidden_layers=layers,
        num_attention_heads=dim // 32,
        intermediate_size=4 * dim,
    )
    BertModel(config).save_pretrained(folder)
    return folder


BENCHMARKS: dict[str, Callable[[], Pair]] = {
    "finetune_4x256": partial(finetune, 256, 4, 32, 40),
    "finetune_4x256_bf16": partial(finetune, 256, 4, 32, 10, "bfloat16"),
    "embed_6x384": partial(embed, 384, 6, 1024),
}
