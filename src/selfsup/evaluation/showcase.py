"""What a person wants to look at after a run: filled blanks, samples, a map of embeddings."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from selfsup.batch import Batch
from selfsup.data.dataset import Dataset, LabelledDataset
from selfsup.data.labels import Labelled
from selfsup.model import Model
from selfsup.models.encoder import Encoder
from selfsup.models.encoder_decoder import EncoderDecoder
from selfsup.objective import FillsBlanks, Generates
from selfsup.randomness import Order, numpy_generator
from selfsup.training.device import to_device

MAP_POINTS = 600
NAMES = {
    "text": "texts",
    "image": "pictures",
    "audio": "sounds",
    "series": "series",
    "table": "rows",
}
MAP_LABELS = 8  # more colours cannot be told apart


def fills(model: Model, held_out: Dataset, count: int = 8, top: int = 5) -> list[dict[str, Any]]:
    """Blanks in held-out text with what the model puts there; empty where it cannot fill.

    Each entry has the text with [MASK], the word that stood there, and the likeliest candidates.
    """
    if not isinstance(model.objective, FillsBlanks):
        return []
    tokenizer, vocabulary = model.preprocessor.tokenizer, model.preprocessor.spec
    numbers = Order(len(held_out), seed=1)[0 : min(count, len(held_out))]
    tokens = held_out.batch(numbers)["tokens"][:, :48].clone()
    generator = numpy_generator(1, "fills")
    out = []
    for row in tokens:
        words = [i for i in range(4, len(row) - 4) if _is_word(tokenizer, vocabulary, row, i)]
        if not words:
            continue
        place = int(generator.choice(words))
        answer = tokenizer.token(int(row[place]))
        row[place] = vocabulary.mask
        with torch.inference_mode():
            batch = to_device({"tokens": row.unsqueeze(0)}, model.device)
            best = model.objective.fill(batch)[0].exp().topk(top)
        candidates = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        # a row may begin inside a word: that piece says nothing to a reader
        begin = next(i for i in range(1, place + 1) if int(row[i]) not in vocabulary.continues)
        before = tokenizer.decode(row[begin:place].tolist())
        after = tokenizer.decode(row[place + 1 :].tolist())
        out.append(
            {
                "text": f"{before} {tokenizer.token(vocabulary.mask)} {after}".strip(),
                "answers": [answer],
                "blanks": [[[tokenizer.token(i), round(p, 4)] for i, p in candidates]],
            }
        )
    return out


def _is_word(tokenizer: Any, vocabulary: Any, row: torch.Tensor, place: int) -> bool:
    """Whether a whole word of letters stands there, not a piece of one."""
    here, after = int(row[place]), int(row[place + 1])
    whole = here not in vocabulary.continues and after not in vocabulary.continues
    text = tokenizer.token(here).strip("Ġ▁")
    return whole and here not in vocabulary.special and text.isalpha()


def samples(model: Model, held_out: Dataset, count: int = 4) -> list[dict[str, str]]:
    """Texts that the model writes on from held-out beginnings; empty where it writes none on."""
    if not isinstance(model.objective, Generates) or isinstance(model.encoder, EncoderDecoder):
        return []
    tokenizer = model.preprocessor.tokenizer
    numbers = Order(len(held_out), seed=1)[0 : min(count, len(held_out))]
    out = []
    for seed, row in enumerate(held_out.batch(numbers)["tokens"]):
        prompt = tokenizer.decode(row[:12].tolist())
        # one row with its prompt: learned positions end there
        room = model.preprocessor.max_length - 1 - len(tokenizer.encode([prompt])[0])
        length = max(0, min(80, room))
        text = model.generate(prompt, length, temperature=0.8, top_p=0.95, seed=seed)
        out.append({"prompt": prompt, "text": text})
    return out


def embedding_map(model: Model, untrained: Encoder, labelled: Labelled) -> dict[str, Any]:
    """Two-dimensional maps (t-SNE) of the same items in the trained and an untrained encoder.

    For tagging every point is a word in its sentence, coloured by its tag; else an item, by
    its label. Only the most frequent labels are shown.
    """
    data = model.preprocessor.limited(None).labelled(labelled)
    order = Order(len(data), seed=2)[0 : min(MAP_POINTS, len(data))]
    trained, labels, texts = _vectors(model.encoder, data, labelled, order, model.device)
    before, _, _ = _vectors(untrained.to(model.device).eval(), data, labelled, order, model.device)
    names, counts = np.unique(labels, return_counts=True)
    shown = set(names[np.argsort(-counts, kind="stable")][:MAP_LABELS])
    keep = [i for i, name in enumerate(labels) if name in shown][:MAP_POINTS]
    what = "words" if labelled.task == "tagging" else NAMES[model.preprocessor.spec.kind]
    return {
        "title": f"{len(keep)} {what} and their labels",
        "projection": "t-SNE",
        "points": _flatten(trained[keep]),
        "untrained_points": _flatten(before[keep]),
        "labels": [labels[i] for i in keep],
        "texts": [texts[i] for i in keep],
    }


def _flatten(vectors: np.ndarray) -> list[list[float]]:
    if len(vectors) < 3:  # too few to be near or far
        return [[float(place), 0.0] for place in range(len(vectors))]
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    reduced = PCA(min(30, *vectors.shape), random_state=0).fit_transform(vectors)
    perplexity = min(30.0, (len(reduced) - 1) / 3)
    flat = TSNE(2, perplexity=perplexity, init="pca", random_state=0, max_iter=500)
    return np.round(flat.fit_transform(reduced), 3).tolist()


@torch.inference_mode()
def _vectors(
    encoder: Encoder,
    data: LabelledDataset,
    labelled: Labelled,
    order: np.ndarray,
    device: torch.device,
) -> tuple[np.ndarray, list[str], list[str]]:
    vectors, labels, texts = [], [], []
    for first in range(0, len(order), 64):
        numbers = order[first : first + 64]
        batch: Batch = to_device(data.batch(numbers), device)
        features = encoder(batch)
        for row, number in enumerate(numbers):
            item, label = labelled.items[number], labelled.labels[number]
            if labelled.task != "tagging":
                vectors.append(features.pooled[row])
                labels.append(str(label))
                texts.append(_shown(item))
                continue
            starts = (batch["words"][row] >= 0).nonzero().flatten()
            word = int(number) % len(starts)  # one word per sentence, anywhere in it
            vectors.append(features.last[row, starts[word]])
            labels.append(label[word])
            texts.append(_in_context(item, word))
    return torch.stack(vectors).float().cpu().numpy(), labels, texts


def _shown(item: Any) -> str:
    """What people call an item."""
    if isinstance(item, bytes | np.ndarray):
        return ""
    if isinstance(item, Path):
        return "/".join(item.parts[-2:])
    return " | ".join(item) if isinstance(item, tuple) else str(item)[:120]


def _in_context(words: list[str], place: int) -> str:
    around = words[max(0, place - 4) : place], words[place + 1 : place + 5]
    return f"{' '.join(around[0])} [{words[place]}] {' '.join(around[1])}".strip()
