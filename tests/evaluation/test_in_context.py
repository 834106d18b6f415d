"""Prompts, likelihoods against a slow version, calibration by hand, a model that learns to copy."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from selfsup.data import templates
from selfsup.data.labels import Labelled
from selfsup.data.text_preprocessor import TextPreprocessor
from selfsup.data.tokenizer import Tokenizer, TokenizerConfig
from selfsup.errors import ConfigError, DataError
from selfsup.evaluation.demonstrations import Example, draw, read_examples, read_parts
from selfsup.evaluation.in_context import (
    CONTENT_FREE,
    Settings,
    answer,
    calibrate,
    evaluate,
    reasoning,
)
from selfsup.evaluation.likelihood import Row, log_likelihoods, rows_of
from selfsup.methods.generative.causal_language import CausalLanguage, Config
from selfsup.model import Model
from selfsup.models.transformer import Config as Transformer
from selfsup.models.transformer import TransformerEncoder
from selfsup.randomness import numpy_generator, seed_layers

TEXTS = ["the film was good .\n\nreview: a bad book\nsentiment: not bad", "so good , so very bad"]
PLAIN = templates.parse(
    "Judge.\n\n{examples}\nreview: {text}\nsentiment: {label}\n--- labels\n0 = bad\n1 = not good",
    "plain",
)
THINKING = templates.parse(
    "{text} think: {reasoning}\nso {label}\n--- labels\n0 = bad\n1 = good", "thinking"
)
SHOWN = [
    Example("a bad book", "0"),
    Example("so very good", "1"),
    Example("the film was good .", "1"),
]


def model_of(kind="bpe", style="gpt", **options) -> Model:
    """An untrained causal model in float64, on the CPU."""
    config = TokenizerConfig(kind=kind, style=style, vocab_size=300, lowercase=False)
    tokenizer = Tokenizer.train(config, TEXTS * 20)
    seed_layers(0, "test")
    settings = {"dim": 16, "layers": 2, "heads": 2, "init_std": 0.3, "dropout": 0.1} | options
    encoder = TransformerEncoder(Transformer(causal=True, **settings), tokenizer.vocabulary)
    method = CausalLanguage(Config(), encoder, tokenizer.vocabulary).double()
    values = {"method": {"name": "causal_language"}}
    return Model(method, TextPreprocessor(tokenizer, 128), (), values, "cpu")


@pytest.fixture(scope="module")
def model() -> Model:
    return model_of()


@torch.no_grad()
def slow(model: Model, row: Row) -> list[float]:
    """Each end by itself, without cache, padding or batch."""
    out = []
    for end in row.ends:
        ids = torch.tensor(np.concatenate([row.context, end])).unsqueeze(0)
        hidden = model.encoder({"tokens": ids}).last[0]
        table = model.objective.head(hidden, model.encoder.embedding).log_softmax(-1)
        start = len(row.context)
        out.append(sum(float(table[i - 1, ids[0, i]]) for i in range(start, ids.shape[1])))
    return out


def slow_scores(model, template, shown, item, thought="") -> tuple[list[float], list[int]]:
    shown = [template.demonstration(*example) for example in shown]
    context = template.prompt(shown, item, thought)
    (row,) = rows_of(model.preprocessor.tokenizer, [context], template.words)
    return slow(model, row), [len(end) for end in row.ends]


def softmax(scores) -> np.ndarray:
    shares = np.exp(np.array(scores) - max(scores))
    return shares / shares.sum()


# Likelihoods


@pytest.mark.parametrize("positions", ["rotary", "learned"])
@pytest.mark.parametrize(("kind", "style"), [("bpe", "gpt"), ("wordpiece", "bert")])
@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_likelihoods_equal_those_of_one_text_at_a_time(positions, kind, style, batch_size):
    model = model_of(kind, style, positions=positions)
    ends = ["good", "not bad", "so very , very bad"]
    contexts = [f"review: the film was {x}\nsentiment: " for x in ("good", "so very bad .", "")]
    for chosen in (contexts, contexts[:1], ["the film ", "so bad "], ["so ", "so so so "], [""]):
        rows = rows_of(model.preprocessor.tokenizer, chosen, ends)
        found = log_likelihoods(model, rows, batch_size)
        assert found == pytest.approx(np.array([slow(model, row) for row in rows]), abs=1e-5)


def test_ends_are_encoded_with_their_contexts(model):
    tokenizer = model.preprocessor.tokenizer
    ((context, ends),) = rows_of(tokenizer, ["it is "], ["good", "good bad"])
    assert tokenizer.decode(context) == "it is"
    assert [tokenizer.decode(end) for end in ends] == [" good", " good bad"]
    assert (
        np.concatenate([context, ends[1]]).tolist()
        == tokenizer.encode(["it is good bad"])[0].tolist()
    )
    ((context, _),) = rows_of(tokenizer, [""], ["good", "bad"])
    assert context.tolist() == [tokenizer.vocabulary.sep]


def test_words_that_the_model_cannot_tell_apart_are_refused():
    tokenizer = model_of("wordpiece", "bert").preprocessor.tokenizer
    with pytest.raises(DataError, match="'ß' and 'ø' are the same tokens"):
        rows_of(tokenizer, ["so "], ["ß", "ø"])
    with pytest.raises(DataError, match="' ' is no token"):
        rows_of(tokenizer, ["so "], [" ", "good"])


def test_only_models_that_write_are_prompted():
    values = {"method": {"name": "masked_language"}}
    other = SimpleNamespace(objective=SimpleNamespace(encoder=None), values=values)
    with pytest.raises(ConfigError, match="masked_language model cannot be prompted"):
        answer(other, PLAIN, [], ["good"], Settings())


# Answers


@pytest.mark.parametrize("shots", [0, 3])
def test_normalisations_by_hand(model, shots):
    items = ["so good", "the very bad film was bad .", "N/A"]
    (alone,) = rows_of(model.preprocessor.tokenizer, ["sentiment: "], PLAIN.words)
    found = {
        name: answer(model, PLAIN, SHOWN[:shots], items, Settings(normalise=name)).plain
        for name in ("none", "length", "unconditional")
    }
    for i, item in enumerate(items):
        scores, lengths = slow_scores(model, PLAIN, SHOWN[:shots], item)
        assert lengths == [1, 2]
        by_length, gain = np.divide(scores, lengths), np.subtract(scores, slow(model, alone))
        for name, expected in (("none", scores), ("length", by_length), ("unconditional", gain)):
            assert found[name][i] == pytest.approx(softmax(expected), abs=1e-5)


def test_calibration_by_hand(model):
    shares = np.array([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6]])
    # 0.6 / 0.5, 0.3 / 0.25, 0.1 / 0.25 = 1.2, 1.2, 0.4
    assert calibrate(shares, np.array([0.5, 0.25, 0.25]))[0] == pytest.approx([3 / 7, 3 / 7, 1 / 7])
    assert calibrate(shares, shares[1])[1] == pytest.approx([1 / 3] * 3)

    found = answer(model, PLAIN, SHOWN, ["so good"], Settings(calibrate=True))
    empty = [softmax(slow_scores(model, PLAIN, SHOWN, text)[0]) for text in CONTENT_FREE]
    weighed = found.plain[0] / np.mean(empty, axis=0)
    assert found.calibrated[0] == pytest.approx(weighed / weighed.sum(), abs=1e-5)
    assert answer(model, PLAIN, SHOWN, ["so good"], Settings()).calibrated is None


def test_items_without_room_lose_their_first_demonstrations():
    model = model_of(positions="learned", max_length=512)
    items = ["bad", "so very bad " * 12]
    shown = [PLAIN.demonstration(*example) for example in SHOWN]
    lengths = [
        [
            rows_of(model.preprocessor.tokenizer, [PLAIN.prompt(some, item)], PLAIN.words)[0].length
            for item in items
        ]
        for some in (shown, shown[1:], shown[2:], [])
    ]
    assert lengths[0][0] < lengths[2][1]
    model = model_of(positions="learned", max_length=lengths[2][1])
    found = answer(model, PLAIN, SHOWN, items, Settings(calibrate=True))
    assert (found.dropped, found.longest) == (2, lengths[2][1])
    settings = Settings(calibrate=True)
    for item, kept, row in ((items[0], SHOWN, 0), (items[1], SHOWN[2:], 1)):
        alone = answer(model, PLAIN, kept, [item], settings)
        assert alone.dropped == 0
        assert found.plain[row] == pytest.approx(alone.plain[0], abs=1e-6)
        assert found.calibrated[row] == pytest.approx(alone.calibrated[0], abs=1e-6)
    limited = answer(model, PLAIN, SHOWN, items[:1], Settings(max_length=lengths[3][0]))
    assert limited.dropped == 3
    with pytest.raises(DataError, match=f"item 2 takes {lengths[3][1]} tokens without any"):
        answer(model, PLAIN, SHOWN, items, Settings(max_length=lengths[3][1] - 1))


def test_the_label_is_scored_behind_the_written_reasoning(model):
    shown = [Example("so bad", "0", "very bad"), Example("so good", "1", "very good")]
    items = ["the film", "a book was so very good"]
    settings = Settings(reasoning_tokens=5, batch_size=1)
    found = answer(model, THINKING, shown, items, settings)
    prompts = [
        "so bad think: very bad\nso bad\n\nso good think: very good\nso good\n\n"
        + item
        + " think: "
        for item in items
    ]
    thoughts = reasoning(model, prompts, settings)
    assert reasoning(model, prompts, Settings(reasoning_tokens=5)) == thoughts
    assert any(thoughts)
    for i, (prompt, thought) in enumerate(zip(prompts, thoughts, strict=True)):
        written = model.generate(prompt.rstrip(), 5, temperature=0.0)
        assert written.removeprefix(prompt.rstrip()).strip(" ").split("\n")[0].strip() == thought
        scores, _ = slow_scores(model, THINKING, shown, items[i], thought)
        assert found.plain[i] == pytest.approx(softmax(scores), abs=1e-5)
    drawn = [reasoning(model, prompts, Settings(temperature=2.0), seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


# Demonstrations


def pool_of(count: int) -> Labelled:
    labels = ["1" if i % 4 == 0 else "0" for i in range(count)]
    items = [Example(f"text {i}", label) for i, label in enumerate(labels)]
    return Labelled("classification", items, labels, ("0", "1"), "pool.csv")


def test_demonstrations_depend_on_the_seed_alone():
    pool = pool_of(40)
    assert draw(pool, 8, seed=1) == draw(pool, 8, seed=1)
    assert draw(pool, 8, seed=1) != draw(pool, 8, seed=2)
    assert set(draw(pool, 3, seed=1)) < set(draw(pool, 8, seed=1))
    assert draw(pool, 0, seed=1) == []
    assert len(set(draw(pool, 40, seed=1))) == 40
    with pytest.raises(DataError, match="41 demonstrations out of 40"):
        draw(pool, 41, seed=1)


def test_balanced_demonstrations():
    pool = pool_of(40)
    for seed in range(5):
        assert sorted(e.label for e in draw(pool, 4, seed, balanced=True)) == list("0011")
        assert sorted(e.label for e in draw(pool, 24, seed, balanced=True)) == list(
            "0" * 14 + "1" * 10
        )
    assert len({draw(pool, 1, seed, balanced=True)[0].label for seed in range(9)}) == 2
    orders = {"".join(e.label for e in draw(pool, 4, seed, balanced=True)) for seed in range(20)}
    assert len(orders) > 3


def write(path, *rows: str):
    path.write_text("\n".join([*rows, ""]))
    return path


def test_no_test_item_is_a_demonstration(tmp_path, capsys):
    rows = [f"text {i},{i % 2}" for i in range(20)]
    data = write(tmp_path / "data.csv", "text,label", *rows)
    test = write(tmp_path / "test.csv", "text,label", *rows[15:], "other,0")
    pool, scored = read_parts(PLAIN, data, test, {}, None)
    assert [e.item for e in pool.items] == [f"text {i}" for i in range(15)]
    assert len(scored) == 6
    assert "5 examples of" in capsys.readouterr().err
    for limit, size in ((None, 5), (2, 2)):
        pool, scored = read_parts(PLAIN, data, None, {}, limit)
        assert (len(pool), len(scored)) == (15, size)
        assert not {e.item for e in pool.items} & {e.item for e in scored.items}
    with pytest.raises(ConfigError, match="nothing to score"):
        read_parts(PLAIN, None, None, {}, None)


def test_files_that_do_not_fit_the_template(tmp_path):
    data = write(tmp_path / "data.csv", "text,label", "so,0", "la,positive")
    with pytest.raises(DataError, match="label 'positive' has no word in the template plain"):
        read_examples(data, PLAIN, {}, True)
    data = write(tmp_path / "pairs.csv", "text,text_b,label", "so,la,0", "la,so,1")
    with pytest.raises(DataError, match=r"plain has no \{text_b\}, but the items are pairs"):
        read_examples(data, PLAIN, {}, True)
    assert read_examples(data, PLAIN, {"text": "text_b"}, True).items[0] == Example("la", "0")
    data = write(tmp_path / "steps.csv", "text,label,reasoning", "so,0,it  is so", "la,1,")
    with pytest.raises(DataError, match=r"steps.csv:3: 'reasoning' is empty"):
        read_examples(data, THINKING, {}, True)
    assert read_examples(data, THINKING, {}, False).items[0] == Example("so", "0")
    write(data, "text,label,reasoning", "so,0,it  is so", "la,1,la")
    assert read_examples(data, THINKING, {}, True).items[0] == Example("so", "0", "it is so")
    data = write(tmp_path / "plain.csv", "text,label", "so,0", "la,1")
    with pytest.raises(DataError, match="no column 'reasoning'"):
        read_examples(data, THINKING, {}, True)


# Templates


def test_a_prompt_word_by_word():
    shown = [PLAIN.demonstration("{label} {oh}", "1"), PLAIN.demonstration("b", "0")]
    assert PLAIN.prompt(shown, "c") == (
        "Judge.\n\nreview: {label} {oh}\nsentiment: not good\n\nreview: b\nsentiment: bad\n\n"
        "review: c\nsentiment: "
    )
    assert (PLAIN.words, PLAIN.classes) == (("bad", "not good"), {"0": 0, "1": 1})
    assert PLAIN.answer_context == "sentiment: "
    pairs = templates.parse(
        "{text}? {text_b} It is {label}!\n\n--- labels\nno, 0 = a = b\n\nyes,1=c\n", "pairs"
    )
    assert pairs.prompt([pairs.demonstration(("x", "y"), "0")], ("v", "w")) == (
        "x? y It is a = b!\n\nv? w It is "
    )
    assert pairs.classes == {"no": 0, "0": 0, "yes": 1, "1": 1}
    assert (pairs.instruction, pairs.paired, pairs.answer_context) == ("", True, " It is ")
    assert THINKING.prompt([], "x") == "x think: "
    assert THINKING.prompt([], "x", "y") == "x think: y\nso "


GOOD = "--- labels\n0 = a\n1 = b"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{text}\n{lable}\n" + GOOD, r"t:2: unknown place \{lable\}; did you mean 'label'"),
        ("{text} {label}\n\n{text}\n" + GOOD, r"t:3: \{text\} stands here a second time"),
        ("{text} {label} {text_b}\n" + GOOD, r"t:1: \{text_b\} stands behind \{label\}"),
        ("{text}\n{examples}\n{label}\n" + GOOD, r"t:2: \{text\} stands above \{examples\}"),
        ("now: {examples}\n{text}{label}\n" + GOOD, r"t:1: \{examples\} needs a line of its own"),
        ("{text}\n" + GOOD, r"t: has no place \{label\}"),
        ("{label}\n" + GOOD, r"t: has no place \{text\}"),
        ("{text} {label}", r"t: needs one line '--- labels'.*found 0"),
        ("{text} {label}\n--- lables\n0 = a", r"t:2: unknown section '--- lables'; did you mean"),
        ("{text} {label}\n--- labels\n0 = a", "t: '--- labels' names 1 classes"),
        ("{text} {label}\n--- labels\n0 = a\n1 b", r"t:4: expected 'label = word'.*'1 b'"),
        ("{text} {label}\n--- labels\n0 = a\n1 =", "t:4: expected"),
        ("{text} {label}\n--- labels\n0 = a\n0 = b", "t:4: label '0' has a word already"),
        ("{text} {label}\n--- labels\n0 = a\n1 = a", "t:4: the word 'a' stands for another class"),
    ],
)
def test_template_errors_name_the_line(text, message):
    with pytest.raises(ConfigError, match=message):
        templates.parse(text, "t")


def test_other_words_for_labels_of_any_characters():
    labels = [
        "earn, acq",
        "a = b",
        'say "x"',
        '"',
        ",",
        " padded ",
        "two\nlines",
        "金融，股票",
        "1",
    ]
    words = {label: f"w{number} = ok, {number}" for number, label in enumerate(labels)}
    text = templates.with_words("{text} {label}\n--- labels\n0 = a\n1 = b", words)
    template = templates.parse(text, "t")
    assert {label: template.words[n] for label, n in template.classes.items()} == words
    assert "\n1 = w8" in text  # what needs no quotes has none
    assert "\n金融，股票 = w7" in text
    several = templates.parse('{text} {label}\n--- labels\n"a, b" , c = x\nd=y', "t")
    assert several.classes == {"a, b": 0, "c": 0, "d": 1}
    with pytest.raises(ConfigError, match="t:3: expected 'label = word'"):
        templates.parse('{text} {label}\n--- labels\n"a, b = x\nd = y', "t")


def test_named_templates_and_files(tmp_path):
    names = templates.paths()
    assert {"sentiment", "topic", "nli", "paraphrase", "sentiment-chinese"} < set(names)
    assert [name for name in names if templates.load(name, cloze=True).reasons] == ["nli-reasoning"]
    assert templates.load("nli").paired
    (tmp_path / "mine.txt").write_text(f"\ufeff{{text}} {{label}}\n{GOOD}", encoding="utf-8")
    assert templates.load(tmp_path / "mine.txt").words == ("a", "b")
    with pytest.raises(ConfigError, match="'sentimnt'; did you mean 'sentiment'"):
        templates.load("sentimnt")


def test_settings_out_of_range():
    with pytest.raises(ConfigError, match="unknown normalise 'lenght'; did you mean 'length'"):
        Settings(normalise="lenght")
    with pytest.raises(ConfigError, match="shots from 0 on"):
        Settings(shots=(-1,))
    with pytest.raises(ConfigError, match="limit must be at least 1"):
        Settings(limit=0)


# Whole evaluations

THINGS = ("film", "book", "song", "meal")
COPYING = templates.parse("{text} {label}\n--- labels\n0 = bad\n1 = good", "copying")


@pytest.fixture(scope="module")
def copier() -> Model:
    """Trained on texts of which each calls everything good or everything bad."""
    texts = ["film book song meal good bad\n\n" * 4]
    config = TokenizerConfig(kind="wordpiece", style="bert", vocab_size=60)
    tokenizer = Tokenizer.train(config, texts)
    seed_layers(0, "copier")
    shape = Transformer(dim=32, layers=1, heads=2, causal=True, dropout=0.0, init_std=0.18)
    encoder = TransformerEncoder(shape, tokenizer.vocabulary)
    method = CausalLanguage(Config(), encoder, tokenizer.vocabulary)
    things = np.array([tokenizer.id(word) for word in THINGS])
    opinions = np.array([tokenizer.id("bad"), tokenizer.id("good")])
    draws = numpy_generator(0, "copier")
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-2)
    for _ in range(60):
        thing = things[draws.integers(4, size=(16, 6))]
        opinion = np.repeat(opinions[draws.integers(2, size=(16, 1))], 6, axis=1)
        pairs = np.stack([thing, opinion], axis=2).reshape(16, 12)
        tokens = np.pad(pairs, ((0, 0), (1, 0)), constant_values=tokenizer.vocabulary.cls)
        optimizer.zero_grad()
        method.loss({"tokens": torch.from_numpy(tokens)}, torch.Generator()).loss.backward()
        optimizer.step()
    values = {"method": {"name": "causal_language"}}
    return Model(method, TextPreprocessor(tokenizer, 64), (), values, "cpu")


def test_a_model_that_copies_learns_in_context(copier):
    settings = Settings(shots=(0, 1, 3), calibrate=True)
    alone = []
    for label in "01":
        examples = [Example(thing, label) for thing in THINGS]
        known = Labelled("classification", examples, [label] * 4, ("0", "1"), "things")
        scores = evaluate(copier, COPYING, known, known, settings)["scores"]
        assert evaluate(copier, COPYING, known, known, settings)["scores"] == scores
        alone += scores["0"]["accuracy"]
        for shots in ("1", "3"):
            assert scores[shots]["accuracy"] == [1.0] * 3
            assert scores[shots]["one_answer"] == [1.0] * 3
    assert sum(alone) == 1.0  # without demonstrations the answers are the same in both worlds


def test_zero_shots_need_no_pool(copier, capsys):
    test = pool_of(8)
    found = evaluate(copier, COPYING, None, test, Settings(shots=(0,), max_length=60))
    assert found["test_size"] == 8
    assert found["majority"] == 0.75
    with pytest.raises(ConfigError, match="give --data, or --shots 0"):
        evaluate(copier, COPYING, None, test, Settings())
    found = evaluate(copier, COPYING, pool_of(40), test, Settings(shots=(16,), max_length=12))
    assert found["dropped_demonstrations"] > 0
    assert found["longest_prompt"] <= 12
    assert "found no room" in capsys.readouterr().err


def test_the_verb(causal_run, corpus, selfsup, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = shutil.copytree(causal_run, tmp_path / "run")
    (tmp_path / "mine.txt").write_text(
        "{text} it was {label}\n--- labels\nbad = terrible\ngood = wonderful\n"
    )
    common = ("prompt", run, "--template", "mine.txt", "--data", corpus.labelled)
    answer = selfsup(
        *(*common, "--test", corpus.test, "--shots", 0, 2, "--seeds", 0, 1, "--limit", 10),
        *("--calibrate", "--balanced", "--record", "mine"),
    )
    assert answer.code == 0, answer.err
    assert "10 items of mine.txt" in answer.out
    found = json.loads((run / "prompt.json").read_text())
    assert [len(v["calibrated_accuracy"]) for v in found["scores"].values()] == [1, 2]
    recorded = json.loads((tmp_path / "docs/results/mine.json").read_text())
    assert recorded["scores"] == found["scores"]

    answer = selfsup("prompt", run, "the film was great", "--template", "mine.txt")
    assert answer.code == 0, answer.err
    word, shares, item = answer.out.strip().split("\t")
    assert item == "the film was great"
    assert word in ("terrible", "wonderful")
    assert sum(map(float, shares.split()[1::2])) == pytest.approx(1, abs=2e-4)
    after = selfsup(
        *("prompt", run, "the film was great", "--template", "mine.txt"),
        *("--data", corpus.labelled, "--shots", 2),
    )
    assert after.out.split("\t")[1] != shares
    wrong = selfsup("prompt", run, "a film", "--template", "mine.txt", "--shots", 2)
    assert (wrong.code, "drawn from --data" in wrong.err) == (2, True)
    wrong = selfsup("prompt", run, "a film", "--template", "nli")
    assert (wrong.code, "but the items are one text" in wrong.err) == (3, True)
    listed = selfsup("list", "templates")
    assert "Say whether the review is good or bad." in listed.out
