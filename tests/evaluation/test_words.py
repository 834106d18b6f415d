"""Nearest words and analogies in tables that were made by hand."""

from types import SimpleNamespace

import pytest
import torch

from selfsup.batch import TableSpec
from selfsup.data.tokenizer import Tokenizer, TokenizerConfig
from selfsup.errors import ConfigError, DataError
from selfsup.evaluation.words import analogy, nearest_words
from selfsup.models.bag import BagEncoder
from selfsup.models.bag import Config as Bag
from selfsup.models.mlp import Config as MLP
from selfsup.models.mlp import MLPEncoder
from selfsup.models.transformer import Config as Transformer
from selfsup.models.transformer import TransformerEncoder

WORDS = ("king", "queen", "man", "woman", "tree")
# royal, male, plant; all of one length but the tree
VECTORS = ([1.0, 1.0, 0.0], [1.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [-1.0, -1.0, 0.0], [0.5, 0.3, 9.0])


def model_of(kind: str = "wordpiece", encoder: str = "bag"):
    """A model whose words have `VECTORS`; every other token lies near the king, but is no word."""
    texts = [" ".join(WORDS), " ".join(reversed(WORDS))] * 20
    tokenizer = Tokenizer.train(TokenizerConfig(kind=kind, vocab_size=400), texts)
    vocabulary = tokenizer.vocabulary
    if encoder == "bag":
        made = BagEncoder(Bag(dim=3), vocabulary)
    else:
        config = Transformer(dim=4, layers=1, heads=2, embedding_dim=3, positions="none")
        made = TransformerEncoder(config, vocabulary)
    table = made.embedding.tokens.weight.data
    table[:] = torch.tensor([-0.1, -0.2, -8.0])
    for i in (*vocabulary.special, *vocabulary.continues):
        table[i] = torch.tensor([1.0, 0.9, 0.0])
    for word, vector in zip(WORDS, VECTORS, strict=True):
        ids, starts = tokenizer.encode_words([["x", word]])[0]
        (place,) = (starts == 1).nonzero()[0]
        assert place == len(ids) - 1
        table[ids[place]] = torch.tensor(vector)
    return SimpleNamespace(encoder=made, preprocessor=SimpleNamespace(tokenizer=tokenizer))


@pytest.mark.parametrize("encoder", ["bag", "transformer"])
@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_nearest_words_by_cosine(kind, encoder):
    of_king, of_tree = nearest_words(model_of(kind, encoder), ["King", "tree"], top=3)
    assert [word for word, _ in of_tree][:1] == ["king"]
    assert of_tree[0][1] == pytest.approx(0.8 / (2 * (0.25 + 0.09 + 81)) ** 0.5, rel=1e-5)
    assert "king" not in [word for word, _ in of_king]
    assert of_king[0][0] == "tree"
    assert of_king[0][1] == pytest.approx(of_tree[0][1])
    assert [value for _, value in of_king] == sorted((v for _, v in of_king), reverse=True)


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_analogy_leaves_its_words_out(kind):
    found = analogy(model_of(kind), "man", "king", "woman", top=2)
    assert found[0][0] == "queen"
    assert found[0][1] == pytest.approx(1.0)
    assert not {"man", "king", "woman"} & {word for word, _ in found}


def test_more_than_there_are():
    model = model_of()
    vocabulary = model.preprocessor.tokenizer.vocabulary
    (found,) = nearest_words(model, ["king"], top=10_000)
    no_words = {*vocabulary.special, *vocabulary.continues}
    assert len(found) == vocabulary.size - len(no_words) - 1


def test_refusals():
    model = model_of()
    with pytest.raises(DataError, match="'kingqueen' is no single token of this model, but king"):
        nearest_words(model, ["king", "kingqueen"])
    with pytest.raises(DataError, match=r"'ß' is no single token .* \[UNK\]"):
        analogy(model, "king", "queen", "ß")
    with pytest.raises(ConfigError, match="top must be at least 1"):
        nearest_words(model, ["king"], top=0)
    spec = TableSpec(columns=("a",), source=(0,))
    model.encoder = MLPEncoder(MLP(), spec)
    with pytest.raises(ConfigError, match="no table of tokens"):
        nearest_words(model, ["king"])
