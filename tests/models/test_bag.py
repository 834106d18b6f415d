"""The bag of words: vectors know nothing of their neighbours, and texts are means of words."""

import pytest
import torch

from selfsup.batch import Vocabulary
from selfsup.models.bag import BagEncoder, Config
from selfsup.randomness import isolated, seed_layers

PAD, UNK, CLS, SEP, MASK = range(5)
VOCABULARY = Vocabulary(size=30, pad=PAD, unk=UNK, cls=CLS, sep=SEP, mask=MASK)


def build(dim: int = 8) -> BagEncoder:
    with isolated():
        seed_layers(0, "model")
        return BagEncoder(Config(dim=dim), VOCABULARY).eval()


def test_a_text_is_the_mean_of_its_words_without_special_tokens_and_padding():
    encoder = build()
    tokens = torch.tensor([[CLS, 7, 9, 9, SEP], [CLS, 6, SEP, 8, 8], [CLS, UNK, SEP, PAD, PAD]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 0, 0]], dtype=torch.bool)
    features = encoder({"tokens": tokens, "mask": mask})
    table = encoder.embedding.tokens.weight
    expected = torch.stack([(table[7] + 2 * table[9]) / 3, table[6], torch.zeros(8)])
    torch.testing.assert_close(features.pooled, expected, rtol=0, atol=1e-7)
    assert torch.equal(features.last, table[tokens])
    assert torch.equal(features.mask, mask)
    assert len(features.hidden) == encoder.num_layers + 1 == 1


def test_without_a_mask_every_position_is_real():
    features = build()({"tokens": torch.tensor([[7, 9]])})
    assert features.mask.all()


def test_the_table_is_uniform_in_half_a_dim_to_either_side():
    table = build(dim=50).embedding.tokens.weight
    assert table.abs().max() <= 0.01
    assert table.abs().max() > 0.0099
    assert table.std().item() == pytest.approx(0.01 / 3**0.5, rel=0.05)


def test_no_width_is_refused():
    with pytest.raises(ValueError, match="dim must be above 0"):
        Config(dim=0)
