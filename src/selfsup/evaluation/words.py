"""What word vectors know: the nearest words, and analogies.

Both look at the token table of any encoder that has one: word2vec's vectors, or what enters a
transformer before its first layer. Special tokens and pieces that go on with a word are no answers.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from selfsup.errors import ConfigError, DataError
from selfsup.models.embeddings import TokenEmbedding

if TYPE_CHECKING:
    from selfsup.model import Model


def nearest_words(
    model: "Model", words: Sequence[str], top: int = 10
) -> list[list[tuple[str, float]]]:
    """The words of the greatest cosine to each of `words`, nearest first, never the word itself.

    Args:
        model: its encoder has a token table.
        words: each a single token of the model.
        top: how many to give; fewer where the vocabulary is smaller.

    Returns:
        (word, cosine) of each neighbour, one list per word.

    Raises:
        ConfigError: the encoder has no token table, or `top` is below 1.
        DataError: a word is no single token.
    """
    table = _unit_table(model)
    return [_best(model, table @ table[i], [i], top) for i in _ids(model, words)]


def analogy(model: "Model", a: str, b: str, c: str, top: int = 5) -> list[tuple[str, float]]:
    """What is to `c` as `b` is to `a`: the words nearest to b - a + c, but for these three.

    The vectors have unit length before they are added (3CosAdd: Levy and Goldberg 2014, "Linguistic
    Regularities in Sparse and Explicit Word Representations"; Mikolov et al. 2013, arXiv
    1301.3781, section 4).

    Args:
        model: its encoder has a token table.
        a, b, c: each a single token of the model.
        top: how many to give.

    Returns:
        (word, cosine with b - a + c), best first.

    Raises:
        ConfigError: the encoder has no token table, or `top` is below 1.
        DataError: a word is no single token.
    """
    table = _unit_table(model)
    ids = _ids(model, [a, b, c])
    from_, to, other = table[ids]  # (dim,) each
    return _best(model, table @ F.normalize(to - from_ + other, dim=0), ids, top)


def _unit_table(model: "Model") -> Float[Tensor, "vocabulary dim"]:
    embedding: Any = getattr(model.encoder, "embedding", None)
    if not isinstance(embedding, TokenEmbedding):
        raise ConfigError("this encoder has no table of tokens: its model was not trained on text")
    return F.normalize(embedding.tokens.weight.detach().float(), dim=1)


def _ids(model: "Model", words: Sequence[str]) -> list[int]:
    tokenizer = model.preprocessor.tokenizer
    out = []
    # each word stands behind another one, since some tokenizers give a first word another token
    for word, (ids, starts) in zip(
        words, tokenizer.encode_words([[word, word] for word in words]), strict=True
    ):
        found = ids[(starts == 1).argmax() :].tolist()
        if len(found) != 1 or found[0] in tokenizer.vocabulary.special:
            pieces = " ".join(tokenizer.token(i) for i in found)
            raise DataError(f"{word!r} is no single token of this model, but {pieces}")
        out += found
    return out


def _best(
    model: "Model", cosine: Float[Tensor, " vocabulary"], asked: list[int], top: int
) -> list[tuple[str, float]]:
    if top < 1:
        raise ConfigError(f"top must be at least 1, got {top}")
    tokenizer = model.preprocessor.tokenizer
    vocabulary = tokenizer.vocabulary
    allowed = torch.ones_like(cosine, dtype=torch.bool)
    allowed[[*vocabulary.special, *vocabulary.continues, *asked]] = False
    best = cosine.masked_fill(~allowed, -torch.inf).topk(min(top, int(allowed.sum())))
    return [
        (tokenizer.decode([i]).strip(), value)
        for i, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
