import json
import random
from functools import cache

import numpy as np
import pytest

from selfsup.data.tokenizer import Tokenizer, TokenizerConfig
from selfsup.errors import ConfigError, DataError, StorageError

KINDS = ("wordpiece", "word", "bpe", "unigram", "byte", "character")
ENGLISH = "The quick brown fox jumps over the lazy dog, and it's 3.5 metres from café to café."
CHINESE = "我喜欢学习，机器学习。"
CORPUS = [ENGLISH, CHINESE, f"Both: {CHINESE} and words"] * 20


@cache
def trained(kind="wordpiece", style="bert", **keys):
    return Tokenizer.train(
        TokenizerConfig(kind=kind, style=style, vocab_size=400, **keys), iter(CORPUS)
    )


@pytest.mark.parametrize("style", ["bert", "gpt"])
@pytest.mark.parametrize("kind", KINDS)
def test_survives_saving_and_loading(kind, style, tmp_path):
    before = trained(kind, style)
    before.save(tmp_path / "model")
    for path in (tmp_path / "model", tmp_path / "model" / "tokenizer.json"):
        after = Tokenizer.load(path)
        assert after.fingerprint == before.fingerprint
        assert after.vocabulary == before.vocabulary
        assert after.style == style
        assert all(map(np.array_equal, after.encode(CORPUS[:3]), before.encode(CORPUS[:3])))
    after.save(tmp_path / "again")
    first, second = (tmp_path / f / "tokenizer.json" for f in ("model", "again"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("style", ["bert", "gpt"])
@pytest.mark.parametrize("kind", KINDS)
def test_decoding_gives_the_text_back(kind, style):
    tokenizer = trained(kind, style, lowercase=False)
    # NFKC, as SentencePiece applies it, turns the full-width comma into the ASCII one.
    chinese = CHINESE.replace("，", ",") if kind == "unigram" else CHINESE
    ids = tokenizer.encode([ENGLISH, CHINESE])
    assert [tokenizer.decode(i) for i in ids] == [ENGLISH, chinese]
    assert ids[0].dtype == np.int32
    assert tokenizer.vocabulary.unk not in np.concatenate(ids)


@pytest.mark.parametrize("style", ["bert", "gpt"])
@pytest.mark.parametrize("kind", KINDS)
def test_any_text_can_be_encoded(kind, style):
    tokenizer = trained(kind, style)
    strange = ["", "  \n\t", "\u200b\ufeff\x00", "🎉👩‍👩‍👧 Ωmega Привет", "\uffff", "x" * 500]
    encoded = tokenizer.encode(strange)
    assert [len(ids) > 0 for ids in encoded][3:] == [True] * 3
    assert len(encoded[0]) == 0
    for ids in encoded:
        assert ((ids >= 0) & (ids < tokenizer.vocabulary.size)).all()
    if kind in ("bpe", "byte"):
        assert tokenizer.decode(encoded[3]) == strange[3].lower()
    else:
        assert tokenizer.vocabulary.unk in encoded[3]


def test_special_ids_of_both_styles():
    bert = trained().vocabulary
    assert (bert.pad, bert.unk, bert.cls, bert.sep, bert.mask) == (0, 1, 2, 3, 4)
    gpt = trained("bpe", "gpt").vocabulary
    assert (gpt.pad, gpt.unk, gpt.cls, gpt.sep, gpt.mask) == (0, -1, -1, 0, -1)
    assert gpt.special == (0,)


def test_byte_has_256_pieces_and_no_merges():
    tokenizer = trained("byte", "gpt")
    assert tokenizer.vocabulary.size == 257
    assert len(tokenizer.encode(["né 🎉"])[0]) == len("né 🎉".encode())


def test_wordpiece_splits_every_chinese_character():
    tokenizer = trained()
    ids = tokenizer.encode([CHINESE])[0]
    assert [tokenizer.token(i) for i in ids] == list(CHINESE)
    assert not set(ids.tolist()) & set(tokenizer.vocabulary.continues)


def test_lowercase_and_accents_of_wordpiece():
    lower, cased = trained(), trained(lowercase=False)
    assert lower.decode(lower.encode(["CAFÉ The"])[0]) == "cafe the"
    assert cased.decode(cased.encode(["café The"])[0]) == "café The"


@pytest.mark.parametrize(
    ("kind", "starts"), [("wordpiece", "##"), ("bpe", "Ġ"), ("unigram", "▁"), ("byte", "Ġ")]
)
def test_continues_are_the_pieces_inside_words(kind, starts):
    tokenizer = trained(kind)
    vocabulary = tokenizer.vocabulary
    expected = [
        i
        for i in range(vocabulary.size)
        if i not in vocabulary.special
        and tokenizer.token(i).startswith(starts) == (kind == "wordpiece")
    ]
    assert expected
    assert list(vocabulary.continues) == expected


@pytest.mark.parametrize("style", ["bert", "gpt"])
@pytest.mark.parametrize("kind", KINDS)
def test_spellings_are_the_text_of_the_tokens(kind, style):
    tokenizer = trained(kind, style)
    vocabulary = tokenizer.vocabulary
    assert len(vocabulary.spellings) == vocabulary.size
    assert all(vocabulary.spellings[i] == b"" for i in vocabulary.special)
    text = "the lazy café 学习"
    spelled = b"".join(vocabulary.spellings[i] for i in tokenizer.encode([text])[0])
    accents = text.replace("é", "e") if kind in ("wordpiece", "word") else text
    assert spelled.replace(b" ", b"").decode() == accents.replace(" ", "")


def test_words_are_whole_and_rare_ones_unknown():
    config = TokenizerConfig(kind="word", vocab_size=16)
    tokenizer = Tokenizer.train(config, ["often, rare"] + ["often it's here ."] * 9)
    ids = tokenizer.encode(["Often rarest it's here."])[0]
    assert [tokenizer.token(i) for i in ids] == ["often", "[UNK]", "it", "'", "s", "here", "."]
    assert tokenizer.decode(ids) == "often [UNK] it's here."
    assert tokenizer.vocabulary.continues == ()


@pytest.mark.parametrize("style", ["bert", "gpt"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_word_has_exactly_one_first_token(kind, style):
    tokenizer = trained(kind, style)
    sentence = ["The", "", "dogs", "\u200b", "it's", "我喜", "", ""]
    sentences = [sentence, [], ["fox"]]
    for words, (ids, numbers) in zip(sentences, tokenizer.encode_words(sentences), strict=True):
        assert len(ids) == len(numbers)
        assert numbers[numbers >= 0].tolist() == list(range(len(words)))
        assert len(numbers) == 0 or numbers[0] == 0
    ids, numbers = tokenizer.encode_words([sentence])[0]
    stand_in = tokenizer.vocabulary.unk if tokenizer.vocabulary.unk >= 0 else 0
    assert ids[numbers == 1].tolist() == [stand_in]


def test_words_of_byte_level_bpe_are_encoded_as_inside_a_sentence():
    tokenizer = trained("bpe")
    ids, _ = tokenizer.encode_words([["the", "lazy", "dog"]])[0]
    assert np.array_equal(ids, tokenizer.encode(["the lazy dog"])[0])


def test_rows_of_both_styles():
    a, b = np.array([10, 11, 12]), np.array([20])
    bert, gpt = trained(), trained("bpe", "gpt")
    tokens, segments = bert.row(a)
    assert (tokens.tolist(), segments.tolist()) == ([2, 10, 11, 12, 3], [0] * 5)
    tokens, segments = bert.row(a, b)
    assert tokens.tolist() == [2, 10, 11, 12, 3, 20, 3]
    assert segments.tolist() == [0, 0, 0, 0, 0, 1, 1]
    assert gpt.row(a)[0].tolist() == [10, 11, 12]
    tokens, segments = gpt.row(a, b)
    assert (tokens.tolist(), segments.tolist()) == ([10, 11, 12, 0, 20], [0, 0, 0, 0, 1])


@pytest.mark.parametrize("lengths", [(3, 9), (9, 3), (9, 9), (8, 9), (1, 1), (0, 20)])
@pytest.mark.parametrize("style", ["bert", "gpt"])
def test_truncation_takes_from_the_longer_one_first(style, lengths):
    tokenizer = trained() if style == "bert" else trained("bpe", "gpt")
    room = 12
    for max_length in range(room + 3, 4, -1):
        first, second = list(range(100, 100 + lengths[0])), list(range(200, 200 + lengths[1]))
        num_special = 3 if style == "bert" else 1
        while len(first) + len(second) + num_special > max_length:  # the slow way: token by token
            (first if len(first) > len(second) else second).pop()
        a, b = np.arange(100, 100 + lengths[0]), np.arange(200, 200 + lengths[1])
        tokens, segments = tokenizer.row(a, b, max_length=max_length)
        assert tokens[(tokens >= 100) & (tokens < 200)].tolist() == first
        assert tokens[tokens >= 200].tolist() == second
        assert len(tokens) == len(segments) <= max_length


@pytest.mark.parametrize("kind", KINDS)
def test_a_corpus_cannot_forge_special_tokens(kind):
    for style, marks in (("bert", ["[SEP]", "[CLS]", "[MASK]"]), ("gpt", ["<|endoftext|>"])):
        tokenizer = trained(kind, style)
        text = f"dog {' '.join(marks)} fox"
        wanted = {tokenizer.id(mark) for mark in marks}
        assert wanted <= set(tokenizer.encode([text])[0].tolist())
        assert not wanted & set(tokenizer.encode([text], parse_special=False)[0].tolist())


def test_decode_leaves_special_tokens_out_but_the_unknown_one():
    tokenizer = trained()
    ids = tokenizer.row(tokenizer.encode(["the 🎉 dog"])[0])[0]
    assert tokenizer.decode(ids) == "the [UNK] dog"


def test_tokens_and_ids():
    tokenizer = trained()
    assert tokenizer.token(tokenizer.id("the")) == "the"
    with pytest.raises(ConfigError, match=r"no token 'thee'.*did you mean 'the'"):
        tokenizer.id("thee")
    for wrong in (-1, tokenizer.vocabulary.size):
        with pytest.raises(ConfigError, match="no token has id"):
            tokenizer.token(wrong)


def test_published_names_of_special_tokens_are_found(tmp_path):
    import tokenizers
    from tokenizers import models, pre_tokenizers

    pieces = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "b", "Ġ", "Ġb"]
    ids = {piece: i for i, piece in enumerate(pieces)}
    given = tokenizers.Tokenizer(models.BPE(ids, [("Ġ", "b")]))
    given.pre_tokenizer = pre_tokenizers.ByteLevel()
    given.enable_truncation(3)
    given.enable_padding(length=8)
    given.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    vocabulary = tokenizer.vocabulary
    assert (vocabulary.cls, vocabulary.pad, vocabulary.sep) == (0, 1, 2)
    assert (vocabulary.unk, vocabulary.mask, vocabulary.continues) == (3, 4, (5,))
    assert tokenizer.encode([" b b b b b"])[0].tolist() == [7] * 5


@pytest.mark.parametrize(
    ("pieces", "single", "pair", "shortest"),
    [  # as the authors of RoBERTa and of T5 lay out their rows
        (["<s>", "<pad>", "</s>", "<unk>", "<mask>"], "0 7 2", "0 7 2 2 8 2", 6),
        (["<pad>", "</s>", "<unk>", "<extra_id_0>", "x"], "7 1", "7 1 8 1", 4),
        (["<|endoftext|>", "a", "b", "c", "d"], "7", "7 0 8", 3),
    ],
)
def test_rows_of_published_layouts(pieces, single, pair, shortest, tmp_path):
    import tokenizers
    from tokenizers import models

    ids = {piece: i for i, piece in enumerate([*pieces, "e", "f", "one", "two"])}
    given = tokenizers.Tokenizer(models.WordLevel(ids, unk_token=None))
    given.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    one, two = np.array([7]), np.array([8])
    assert tokenizer.row(one)[0].tolist() == [int(i) for i in single.split()]
    tokens, segments = tokenizer.row(one, two)
    assert tokens.tolist() == [int(i) for i in pair.split()]
    assert segments.tolist().count(1) == len(tokens) - tokens.tolist().index(8)
    long = np.repeat(one, 9)
    assert len(tokenizer.row(long, two, max_length=shortest)[0]) == shortest


def test_bad_tokenizer_files(tmp_path):
    with pytest.raises(DataError, match=r"tokenizer\.json: the tokenizer cannot be read"):
        Tokenizer.load(tmp_path)
    bad = tmp_path / "tokenizer.json"
    bad.write_text("{}")
    with pytest.raises(DataError, match=r"not a tokenizer\.json"):
        Tokenizer.load(bad)
    bad.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"not a tokenizer\.json"):
        Tokenizer.load(tmp_path)
    bad.write_text(trained("bpe", "gpt").to_json().replace("<|endoftext|>", "<|other|>"))
    with pytest.raises(DataError, match="no token that ends a document"):
        Tokenizer.load(bad)


def test_saving_below_a_file_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        trained("byte").save(tmp_path / "file" / "model")


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "byte"])
def test_training_needs_text(kind):
    with pytest.raises(DataError, match="without text"):
        Tokenizer.train(TokenizerConfig(kind=kind), iter(["", ""]))


@pytest.mark.parametrize("kind", ["wordpiece", "word", "bpe", "character"])
def test_the_same_text_gives_the_same_tokenizer(kind):
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghéж", k=rng.randint(2, 6))) for _ in range(300)]
    texts = [" ".join(rng.choices(words, k=40)) + " 学习" for _ in range(20)]
    config = TokenizerConfig(kind=kind, vocab_size=300)
    prints = {Tokenizer.train(config, texts).fingerprint for _ in range(4)}
    assert len(prints) == 1


def test_wordpiece_keeps_to_its_size_and_to_frequent_characters():
    rare = "".join(chr(0x4E00 + i) for i in range(500))
    tokenizer = Tokenizer.train(TokenizerConfig(vocab_size=100), ["dog cat " * 50, rare])
    assert 80 <= tokenizer.vocabulary.size <= 100
    assert tokenizer.id("dog") > 4
    assert tokenizer.id("##o") in tokenizer.vocabulary.continues
    assert '"##' not in json.dumps(json.loads(tokenizer.to_json())["added_tokens"])


def test_training_stops_at_the_limit():
    def texts():
        yield "abc" * 10
        yield "def" * 10
        raise AssertionError("read on after the limit")

    tokenizer = Tokenizer.train(TokenizerConfig(kind="character", train_chars=32), texts())
    pieces = {tokenizer.token(i) for i in range(5, tokenizer.vocabulary.size)}
    assert pieces == {"a", "b", "c", "d", "e"}


def test_bad_configurations():
    with pytest.raises(ConfigError, match="vocab_size"):
        TokenizerConfig(vocab_size=2)
    with pytest.raises(ConfigError, match="train_chars"):
        TokenizerConfig(train_chars=0)


@pytest.mark.parametrize("style", ["bert", "gpt"])
@pytest.mark.parametrize("kind", KINDS)
def test_sentinels_are_special_and_ends_of_sentences_are_known(kind, style):
    tokenizer = trained(kind, style, sentinels=3)
    vocabulary = tokenizer.vocabulary
    names = [tokenizer.token(i) for i in vocabulary.sentinels]
    assert names == ["<extra_id_0>", "<extra_id_1>", "<extra_id_2>"]
    assert set(vocabulary.sentinels) <= set(vocabulary.special)
    assert all(vocabulary.spellings[i] == b"" for i in vocabulary.sentinels)
    assert not set(vocabulary.sentinels) & set(vocabulary.continues)
    forged = tokenizer.encode(["<extra_id_1>"], parse_special=False)[0]
    assert not set(forged.tolist()) & set(vocabulary.sentinels)
    ends = {vocabulary.spellings[i].decode() for i in vocabulary.sentence_ends}
    assert "." in ends
    assert ends <= set(".?!。！？")
    assert trained(kind, style).vocabulary.sentinels == ()


def test_published_sentinels_are_found_in_the_order_of_their_numbers(tmp_path):
    import tokenizers
    from tokenizers import models

    pieces = ["<pad>", "</s>", "<unk>", "a", "<extra_id_2>", "<extra_id_1>", "<extra_id_0>"]
    ids = {piece: i for i, piece in enumerate(pieces)}
    given = tokenizers.Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    given.save(str(tmp_path / "tokenizer.json"))
    vocabulary = Tokenizer.load(tmp_path).vocabulary
    assert vocabulary.sentinels == (6, 5, 4)
    assert vocabulary.special == (0, 1, 2, 4, 5, 6)


@pytest.mark.parametrize("sentinels", [-1, 9])
def test_sentinels_leave_room_for_text(sentinels):
    with pytest.raises(ConfigError, match="sentinels"):
        TokenizerConfig(vocab_size=16, sentinels=sentinels)
