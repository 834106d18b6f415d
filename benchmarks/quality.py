"""Time to quality: seconds until a held-out loss and a probe's accuracy are both reached.

    python -m benchmarks.quality                          targets and limit as below
    python -m benchmarks.quality --limit 10 --record quality

Ours is the recipe `bert-tiny-english`. The peer is transformers' BertForMaskedLM with its own
initialisation and dropout at about the same number of parameters, in a plain loop with what its
Trainer has by default: AdamW without weight decay, a linear fall of the learning rate, clipping at
1, masks drawn anew for every row. Its learning rate is the best of several; ours is the recipe's.
Tokenizer, rows, their order, batch size, warm-up, precision, threads and the clock that the
learning rate follows are the same. What is measured, equally often and outside the clock: the loss
at 15% of the tokens of held-out rows, masked once for both, and a logistic regression of frozen
token vectors of the last layer on part-of-speech tags.

Data: `demo/`; with $SELFSUP_DATA, film reviews of text/english and UD English EWT there.
"""

import argparse
import os
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.timing import num_parameters
from selfsup import config as configuration
from selfsup import console, results
from selfsup.batch import Batch, Vocabulary
from selfsup.config import RunConfig
from selfsup.data import text
from selfsup.data.dataset import LabelledDataset, Prepared
from selfsup.evaluation.probes import fit_linear_probe
from selfsup.methods.generative.masked_language import Config, MaskedLanguage, choose, corrupt
from selfsup.methods.ops import masked_loss
from selfsup.run_start import build_method
from selfsup.training.device import autocast, keep_freed_memory, pick_dtype
from selfsup.training.optim import adamw, clip_gradient, learning_rate_share

RECIPE = "bert-tiny-english"
HELD_OUT_ROWS, SENTENCES = 512, 300
STRENGTHS = (1e-1, 1e-2)  # of the probe's penalty: few, as it is fitted at every look


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two, ready to train.

    Attributes:
        model: what is trained.
        optimizer: at its greatest learning rate.
        loss: of a batch, masks drawn from the generator.
        hidden: last layer of a batch, (batch, time, dim).
        logits: of hidden vectors.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[Batch, torch.Generator], Tensor]
    hidden: Callable[[Batch], Tensor]
    logits: Callable[[Tensor], Tensor]


class Look(NamedTuple):
    """One evaluation."""

    seconds: float  # of training before it
    loss: float  # nats
    accuracy: float


class Goal(NamedTuple):
    """Both have to be reached within the limit."""

    loss: float
    accuracy: float
    limit: float  # seconds
    every: float  # seconds of training between two looks

    def first(self, looks: list[Look]) -> float | None:
        """Seconds until it was reached, or None."""
        for look in looks:
            if look.loss <= self.loss and look.accuracy >= self.accuracy:
                return look.seconds
        return None


def own_side(config: RunConfig, vocabulary: Vocabulary) -> Side:
    """The recipe."""
    method = build_method(config, vocabulary)
    assert isinstance(method, MaskedLanguage)
    settings = config.training
    return Side(
        model=method,
        optimizer=adamw(
            method,
            lr=settings.lr,
            betas=(settings.betas[0], settings.betas[1]),
            eps=settings.eps,
            weight_decay=settings.weight_decay,
        ),
        loss=lambda batch, generator: method.loss(batch, generator).loss,
        hidden=lambda batch: method.encoder(batch).last,
        logits=lambda hidden: method.head(hidden, method.encoder.embedding),
    )


def peer_side(config: RunConfig, vocabulary: Vocabulary, lr: float) -> Side:
    """BertForMaskedLM in the recipe's shape."""
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=vocabulary.size,
            hidden_size=config.model.dim,
            num_hidden_layers=config.model.layers,
            num_attention_heads=config.model.heads,
            intermediate_size=config.model.feedforward_width,
            max_position_embeddings=config.data.row_length,
            pad_token_id=vocabulary.pad,
        )
    )

    def hidden(batch: Batch) -> Tensor:
        mask = batch["mask"].long() if "mask" in batch else None
        return model.bert(input_ids=batch["tokens"], attention_mask=mask).last_hidden_state

    def loss(batch: Batch, generator: torch.Generator) -> Tensor:
        masked, chosen = masked_rows(batch, vocabulary, generator)
        real = torch.zeros_like(batch["tokens"], dtype=torch.bool)
        real = real.scatter(1, chosen.positions, chosen.real)
        labels = torch.where(real, batch["tokens"], -100)
        mask = batch["mask"].long() if "mask" in batch else None
        return model(input_ids=masked["tokens"], attention_mask=mask, labels=labels).loss

    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)
    return Side(model=model, optimizer=optimizer, loss=loss, hidden=hidden, logits=model.cls)


def masked_rows(batch: Batch, vocabulary: Vocabulary, generator: torch.Generator) -> tuple:
    """BERT's corruption of 15%: the batch with it, and the chosen positions."""
    special = torch.zeros(vocabulary.size, dtype=torch.bool)
    special[list(vocabulary.special)] = True
    maskable = ~special[batch["tokens"]]
    if "mask" in batch:
        maskable = maskable & batch["mask"]
    chosen, ordinary = choose(maskable, 0.15, generator), (~special).nonzero().squeeze(1)
    tokens = corrupt(batch["tokens"], chosen, Config(), vocabulary.mask, ordinary, generator)
    return {**batch, "tokens": tokens}, chosen


@torch.no_grad()
def held_out_loss(side: Side, prepared: Prepared) -> float:
    """Nats per masked token; rows and masks are the same at every call."""
    generator, total, count = torch.Generator().manual_seed(0), 0.0, 0
    rows = np.arange(min(HELD_OUT_ROWS, len(prepared.valid)))
    for first in range(0, len(rows), 64):
        batch = prepared.valid.batch(rows[first : first + 64])
        masked, chosen = masked_rows(batch, prepared.spec, generator)
        hidden = side.hidden(masked)
        place = chosen.positions.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
        target = batch["tokens"].gather(1, chosen.positions)
        loss, _ = masked_loss(side.logits(hidden.gather(1, place)), target, chosen.real)
        total, count = total + float(loss) * int(chosen.real.sum()), count + int(chosen.real.sum())
    return total / count


@torch.no_grad()
def probe_accuracy(side: Side, labelled: list[LabelledDataset]) -> float:
    """Accuracy on the last part of a probe of the first, its penalty chosen on the second."""
    parts = [_word_vectors(side, part) for part in labelled]
    probe = fit_linear_probe(*parts[0], *parts[1], strengths=STRENGTHS)
    features, tags = parts[2]
    return float((probe.predict(features) == tags.numpy()).mean())


def _word_vectors(side: Side, part: LabelledDataset) -> tuple[Tensor, Tensor]:
    features, tags = [], []
    for first in range(0, min(SENTENCES, len(part)), 50):
        batch = part.batch(np.arange(first, min(first + 50, SENTENCES, len(part))))
        begins = batch["words"] >= 0
        features.append(side.hidden(batch)[begins].float())
        tags.append(batch["label"][begins])
    return torch.cat(features), torch.cat(tags)


def train(
    side: Side, config: RunConfig, prepared: Prepared, labelled: list, goal: Goal
) -> list[Look]:
    """Trains until the goal or the limit is reached; only training and its data are on the clock.

    The steps are those of selfsup's loop, without its files and its log.
    """
    settings, looks, spent = config.training, [], 0.0
    dtype = pick_dtype(settings.precision, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    rates = [group["lr"] for group in side.optimizer.param_groups]
    order = _order(len(prepared.train), settings.batch_size)
    while spent < goal.limit and goal.first(looks) is None:
        side.model.train()
        until = min(goal.limit, goal.every * (len(looks) + 1))
        while spent < until:
            started = time.perf_counter()
            share = learning_rate_share(
                spent / goal.limit, warmup=settings.warmup, schedule="linear", decay=0.0, final=0.0
            )
            for group, rate in zip(side.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * share
            batch = prepared.train.batch(next(order))
            with autocast(torch.device("cpu"), dtype):
                loss = side.loss(batch, generator)
            loss.backward()
            clip_gradient(side.model, 1.0)
            side.optimizer.step()
            side.optimizer.zero_grad(set_to_none=True)
            spent += time.perf_counter() - started
        side.model.eval()
        looks.append(Look(spent, held_out_loss(side, prepared), probe_accuracy(side, labelled)))
    return looks


def _order(count: int, batch_size: int) -> Iterator[np.ndarray]:
    draw = np.random.default_rng(0)
    while True:
        numbers = draw.permutation(count)
        for first in range(0, count - batch_size + 1, batch_size):
            yield numbers[first : first + batch_size]


def sources() -> tuple[Path, list[Path]]:
    """Unlabeled text, and sentences with tags: train, dev, test."""
    root = os.environ.get("SELFSUP_DATA")
    if root:
        tagged = sorted((Path(root) / "text" / "ud_english_ewt").rglob("*.conllu*"))
        parts = [next(p for p in tagged if name in p.name) for name in ("train", "dev", "test")]
        return Path(root) / "text" / "english" / "imdb_unsup.jsonl.xz", parts
    demo = Path(__file__).parent.parent / "demo"
    names = ("train", "dev", "test")
    return demo / "unlabeled", [demo / "labels" / f"{name}.conllu.xz" for name in names]


def measure(goal: Goal, lrs: list[float]) -> tuple[dict[str, Any], dict[str, list[Look]]]:
    """The score as it is recorded, and every look of every run."""
    config = configuration.run_config(configuration.recipe_values(RECIPE))
    config = replace(config, training=replace(config.training, minutes=goal.limit / 60))
    unlabeled, tagged = sources()
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder, console.quiet():
        prepared = text.prepare(config.data, str(unlabeled), Path(folder))
        reader = prepared.preprocessor.limited(config.data.row_length)
        labelled = [reader.labelled(text.read_labels(path, "tagging")) for path in tagged]
        ours = own_side(config, prepared.spec)
        counts = (
            num_parameters(ours.model),
            num_parameters(peer_side(config, prepared.spec, lrs[0]).model),
        )
        assert abs(counts[0] - counts[1]) < 0.03 * counts[0], counts
        looks = {"selfsup": train(ours, config, prepared, labelled, goal)}
        for lr in lrs:
            side = peer_side(config, prepared.spec, lr)
            looks[f"peer, lr {lr:g}"] = train(side, config, prepared, labelled, goal)
    mine = goal.first(looks["selfsup"])
    others = [goal.first(found) for name, found in looks.items() if name != "selfsup"]
    theirs = min((seconds for seconds in others if seconds is not None), default=None)
    missed = f">{goal.limit:.0f}"
    score: dict[str, Any] = {
        "selfsup": missed if mine is None else mine,
        "peer": missed if theirs is None else theirs,
        "unit": f"s to loss {goal.loss:g} and accuracy {goal.accuracy:g}; less is better",
    }
    if mine is not None and theirs is not None:
        score["ratio"] = mine / theirs
    return score, looks


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality")
    parser.add_argument("--limit", type=float, default=5.0, help="minutes of training of each run")
    parser.add_argument("--loss", type=float, default=4.8, help="nats per masked token")
    parser.add_argument("--accuracy", type=float, default=0.75, help="of the tagging probe")
    parser.add_argument("--every", type=float, default=10.0, help="seconds between two looks")
    parser.add_argument("--lrs", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3])
    parser.add_argument("--record", metavar="NAME", help="write docs/results/bench-NAME.json")
    options = parser.parse_args()
    goal = Goal(options.loss, options.accuracy, 60 * options.limit, options.every)
    started = time.monotonic()
    score, looks = measure(goal, options.lrs)
    for name, found in looks.items():
        print(f"{name}:")
        for look in found:
            print(f"  {look.seconds:>6.0f} s  loss {look.loss:.3f}  accuracy {look.accuracy:.3f}")
    print(f"time to quality: selfsup {score['selfsup']}, peer {score['peer']} {score['unit']}")
    if options.record:
        lrs = " ".join(f"{lr:g}" for lr in options.lrs)
        command = shlex.join(["python", "-m", "benchmarks.quality"]) + (
            f" --limit {options.limit:g} --loss {options.loss:g} --accuracy {options.accuracy:g}"
            f" --every {options.every:g} --lrs {lrs} --record {options.record}"
        )
        results.record(
            f"bench-{options.record}",
            command=command,
            seeds=[0],
            seconds=time.monotonic() - started,
            scores={"time_to_quality": score},
            looks={name: [look._asdict() for look in found] for name, found in looks.items()},
        )


if __name__ == "__main__":
    main()
