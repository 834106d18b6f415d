"""A text's ids by way of its words are those that the library gives for the whole text."""

import json

import numpy as np
import pytest
import tokenizers as library

from selfsup.data import word_memory
from selfsup.data.tokenizer import Tokenizer, TokenizerConfig
from selfsup.data.word_memory import WordMemory, serves

TEXTS = [
    "The cat sat on the mat. The dog didn't; it ran 3.5 km!",
    "",
    " ",
    "\n\t leading and trailing  double   blanks \r\n",
    "Café naïve e\u0301 \u0301 alone, ﬁne Straße ΣΑΣ İstanbul",  # marks that combine, a lone one
    "猫坐在垫子上。 the 猫 sat",
    "zero\u200bwidth no\u00a0break thin\u2009space line\u2028end feed\x0c tab\x0b unit\x1f nul\x00",
    "emoji 👍🏽 family 👨‍👩‍👧 flag 🇩🇪",
    "[MASK] is seven characters here, [CLS][SEP] too",
    "a" * 300 + " b",
    "wörter\u00adweich x\ufeff\ufffd",
]


@pytest.fixture(autouse=True)
def few_threads(monkeypatch):
    monkeypatch.setenv("RAYON_NUM_THREADS", "1")  # on any machine


def trained(**settings):
    config = TokenizerConfig(vocab_size=300, **settings)
    return Tokenizer.train(config, [text for text in TEXTS for _ in range(3)])


def whole(tokenizer, texts):
    plain = library.Tokenizer.from_str(tokenizer.to_json())
    plain.encode_special_tokens = True
    return [one.ids for one in plain.encode_batch(texts, add_special_tokens=False)]


@pytest.mark.parametrize("kind", ["wordpiece", "word"])
@pytest.mark.parametrize("lowercase", [True, False])
def test_words_give_the_ids_of_the_text(kind, lowercase):
    tokenizer = trained(kind=kind, lowercase=lowercase)
    assert tokenizer._memory is not None
    for texts in (TEXTS, TEXTS[::-1], TEXTS[:1]):  # the second and third know every word
        found = tokenizer.encode(texts, parse_special=False)
        assert [ids.tolist() for ids in found] == whole(tokenizer, texts)
        assert {ids.dtype for ids in found} == {np.dtype(np.int32)}


def test_random_texts_give_the_ids_of_the_text():
    tokenizer = trained()
    rng = np.random.default_rng(0)
    signs = list("abcdeABC  \n\t\r.,'-é\u0301\u0308\u00a0\u2003猫ß")
    texts = ["".join(rng.choice(signs, rng.integers(1, 80))) for _ in range(500)]
    found = tokenizer.encode(texts, parse_special=False)
    assert [ids.tolist() for ids in found] == whole(tokenizer, texts)


def test_a_full_memory_begins_anew(monkeypatch):
    monkeypatch.setattr(word_memory, "MAX_CHARS", 20)
    tokenizer = trained()
    for text in TEXTS * 2:
        assert (
            tokenizer.encode([text], parse_special=False)[0].tolist() == whole(tokenizer, [text])[0]
        )
    assert tokenizer._memory._chars < 20 + max(map(len, TEXTS))


def test_long_words_are_not_remembered():
    tokenizer = trained()
    memory = WordMemory(tokenizer._plain)
    texts = ["ACGT" * 50, "猫坐在垫子上" * 9]
    assert [ids.tolist() for ids in memory.encode(texts)] == whole(tokenizer, texts)
    assert not memory._places


@pytest.mark.parametrize("kind", ["bpe", "unigram", "byte", "character"])
def test_tokenizers_that_look_across_spaces_are_left_to_the_library(kind):
    assert trained(kind=kind)._memory is None


def test_added_words_are_left_to_the_library():
    wrapped = library.Tokenizer.from_str(trained().to_json())
    wrapped.add_tokens(["New York"])
    assert not serves(json.loads(wrapped.to_str()))


def test_many_threads_are_left_to_the_library(monkeypatch):
    description = json.loads(trained().to_json())
    monkeypatch.setenv("RAYON_NUM_THREADS", "64")
    assert not serves(description)
    monkeypatch.setenv("RAYON_NUM_THREADS", "1")
    assert serves(description)
