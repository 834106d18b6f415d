"""Rows with a blank, word scores by hand and by loops, pre-trained heads, and the verbs."""

import json
import math

import numpy as np
import pytest
import torch

from selfsup.data import templates
from selfsup.data.labelled_cloze import LabelledCloze, shares, verbalizers
from selfsup.data.labels import Labelled, subset
from selfsup.data.tokenizer import Tokenizer, TokenizerConfig
from selfsup.errors import ConfigError, DataError
from selfsup.evaluation.adapt import new_task, rows_of, score
from selfsup.methods.generative import gpt_bert, masked_language
from selfsup.methods.generative.causal_language import CausalLanguage
from selfsup.methods.generative.causal_language import Config as Causal
from selfsup.models import transformer
from selfsup.models.transformer import TransformerEncoder
from selfsup.randomness import isolated, seed_layers, torch_generator
from selfsup.tasks.cloze import Cloze, Config, verbalizer_scores

LABELS = "\n--- labels\n0 = bad\n1 = good"
PLAIN = "{text} it was {label} ." + LABELS
LONG = "{text} it was {label} ." + "\n--- labels\n0 = not good at all\n1 = good"
PAIRED = "{text_b} ? {label} , {text}" + "\n--- labels\n0 = no\n1 = yes"
TEXTS = [
    "the film was good and the book was not bad at all .",
    "a bad song , it was no good story ? yes , no film , no book .",
]
GENERATOR = torch_generator(0, "test")
ITEMS = ["the film", "a bad song , a bad book", "no story", "good good good"]


def tokenizer_of(kind="word", **options) -> Tokenizer:
    return Tokenizer.train(TokenizerConfig(kind=kind, vocab_size=300, **options), TEXTS * 30)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tokenizer_of()


def labelled(items=ITEMS, labels=("1", "0", "0", "1")) -> Labelled:
    return Labelled("cloze", list(items), list(labels), ("0", "1"), "few.tsv")


def method_of(tokenizer: Tokenizer, name="masked_language", **config):
    shape = {"dim": 16, "layers": 2, "heads": 2, "init_std": 0.3, "dropout": 0.1}
    shape |= {"causal": True} if name == "causal_language" else {}
    kinds = {
        "masked_language": (masked_language.MaskedLanguage, masked_language.Config),
        "gpt_bert": (gpt_bert.GPTBERT, gpt_bert.Config),
        "causal_language": (CausalLanguage, Causal),
    }
    kind, configured = kinds[name]
    with isolated():
        seed_layers(0, "model")
        encoder = TransformerEncoder(transformer.Config(**shape), tokenizer.vocabulary)
        return kind(configured(**config), encoder, tokenizer.vocabulary).double()


def cloze_of(tokenizer: Tokenizer, template=PLAIN, examples=None, method=None, **config) -> Cloze:
    method = method or method_of(tokenizer)
    task = new_task(
        method.encoder,
        "cloze",
        Config(template=template, **config),
        examples or labelled(),
        tuning="full",
        seed=0,
        method=method,
    )
    assert isinstance(task, Cloze)
    return task.double().eval()


class Rows:
    """Stands for a preprocessor with rows of some length."""

    def __init__(self, tokenizer: Tokenizer, max_length: int = 64):
        self.tokenizer, self.max_length = tokenizer, max_length

    def labelled(self, labelled: Labelled, **options) -> LabelledCloze:
        return LabelledCloze(labelled, self.tokenizer, self.max_length, **options)


def shown(tokenizer: Tokenizer, row: torch.Tensor) -> str:
    return " ".join(tokenizer.token(i) for i in row.tolist())


# Rows


def test_a_row_is_the_template_with_a_blank(tokenizer):
    data = LabelledCloze(labelled(), tokenizer, 64, template=PLAIN)
    batch = data.batch(np.array([0, 3]))
    assert shown(tokenizer, batch["tokens"][1]) == ("[CLS] good good good it was [MASK] . [SEP]")
    assert shown(tokenizer, batch["tokens"][0]) == ("[CLS] the film it was [MASK] . [SEP] [PAD]")
    assert batch["mask"].sum(1).tolist() == [8, 9]
    assert batch["label"].tolist() == [1, 1]
    assert batch["index"].tolist() == [0, 3]
    words = [[tokenizer.id("bad")], [tokenizer.id("good")]]
    assert batch["verbalizers"].tolist() == words
    assert data.truncated == 0


def test_pairs_go_where_the_template_has_them_and_special_words_stay_text(tokenizer):
    pair = labelled([("the [MASK] film", "no book")] * 2, "01")
    (row,) = LabelledCloze(pair, tokenizer, 64, template=PAIRED).batch(np.array([0]))["tokens"]
    told = shown(tokenizer, row)
    assert told.startswith("[CLS] no book ? [MASK] , the ")
    assert told.endswith(" film [SEP]")
    assert told.count("[MASK]") == 1


def test_an_instruction_stands_before_the_query_alone(tokenizer):
    template = "yes or no ?\n\n{examples}\n" + PLAIN
    data = LabelledCloze(
        labelled(), tokenizer, 64, template=template, pool=[json.dumps(["1", "a song"])], draws=1
    )
    (row,) = data.batch(np.array([0]))["tokens"]
    assert shown(tokenizer, row) == (
        "[CLS] yes [UNK] no ? the film it was [MASK] . [SEP] a song it was good . [SEP]"
    )


@pytest.mark.parametrize("template", [PLAIN, LONG, PAIRED])
def test_truncation_cuts_texts_alone(tokenizer, template):
    long = "film " * 40
    items = [(f"{long}a", f"{long}b") if template == PAIRED else long] * 2
    whole = LabelledCloze(labelled(items, "01"), tokenizer, 500, template=template)
    cut = LabelledCloze(labelled(items, "01"), tokenizer, 20, template=template)
    assert (whole.truncated, cut.truncated) == (0, 2)
    (row,) = cut.batch(np.array([1]))["tokens"]
    assert len(row) == 20
    film = tokenizer.id("film")
    (full,) = whole.batch(np.array([1]))["tokens"]
    ends = tokenizer.encode(["a b"])[0].tolist()  # the last words of both texts are lost
    assert [i for i in row.tolist() if i != film] == [
        i for i in full.tolist() if i not in (film, *ends)
    ]
    blanks = (row == tokenizer.vocabulary.mask).sum()
    assert blanks == (4 if template == LONG else 1)


def test_shares():
    for lengths in ([5], [9, 1, 4], [7, 7, 7], [0, 12]):
        for room in range(30):
            slow = list(lengths)
            while sum(slow) > room:  # takes one token from the longest, the last of them first
                slow[max(i for i, n in enumerate(slow) if n == max(slow))] -= 1
            assert shares(lengths, room) == slow


def test_no_room_for_text_is_an_error(tokenizer):
    with pytest.raises(ConfigError, match="take 6 tokens, and a row has at most 6: no room"):
        LabelledCloze(labelled(), tokenizer, 6, template=PLAIN)
    assert len(LabelledCloze(labelled(), tokenizer, 7, template=PLAIN)) == 4


def test_white_space_before_the_blank_belongs_to_the_word():
    tokenizer = tokenizer_of("bpe", lowercase=False)
    spaced = LabelledCloze(labelled(), tokenizer, 64, template=PLAIN)
    joined = LabelledCloze(labelled(), tokenizer, 64, template="{text}:{label}" + LABELS)
    decode = [tokenizer.decode(row[row >= 0]) for row in spaced.words]
    assert decode == [" bad", " good"]
    assert [tokenizer.decode(row[row >= 0]) for row in joined.words] == ["bad", "good"]
    (row,) = spaced.batch(np.array([0]))["tokens"]
    assert tokenizer.decode(row.tolist()) == "the film it was ."


# Demonstrations


def test_demonstrations_are_one_of_each_class_and_never_the_item_itself(tokenizer):
    pool = [json.dumps([label, text]) for label, text in zip("1001", ITEMS, strict=True)]
    data = LabelledCloze(labelled(), tokenizer, 64, template=PLAIN, pool=pool, draws=3)
    assert len(data) == 4
    batch = data.batch(np.array([0, 2]))
    assert batch["tokens"].shape[0] == 6
    assert batch["label"].tolist() == [1, 0]
    for number, row in enumerate(batch["tokens"]):
        item = ITEMS[(0, 2)[number // 3]]
        query, bad, good, rest = shown(tokenizer, row).split(" [SEP]")
        assert query == f"[CLS] {item} it was [MASK] ."
        assert bad.strip() in {f"{ITEMS[i]} it was bad ." for i in (1, 2)} - {
            f"{item} it was bad ."
        }
        assert good.strip() in {f"{ITEMS[i]} it was good ." for i in (0, 3)} - {
            f"{item} it was good ."
        }
        assert set(rest.split()) <= {"[PAD]"}
    again = LabelledCloze(labelled(), tokenizer, 64, template=PLAIN, pool=pool, draws=3)
    assert torch.equal(again.batch(np.array([0, 2]))["tokens"], batch["tokens"])
    new = labelled(["a story"] * 30, "0" * 30)
    many = LabelledCloze(new, tokenizer, 64, template=PLAIN, pool=pool, draws=40)
    drawn = {tuple(row.tolist()) for row in many.batch(np.array([0]))["tokens"]}
    assert len(drawn) == 4  # two of each class


def test_predictions_are_averaged_over_draws(tokenizer):
    task = cloze_of(tokenizer, demonstrations=3)
    assert len(task.config.pool) == 4
    data = rows_of(task, Rows(tokenizer), labelled())
    batch = data.batch(np.array([0, 1, 2]))
    values, found = task.predict(batch)
    rows = []
    for row in range(9):
        one = {"tokens": batch["tokens"][row : row + 1], "verbalizers": batch["verbalizers"]}
        if "mask" in batch:
            one["mask"] = batch["mask"][row : row + 1]
        one["index"] = torch.tensor([0])
        rows.append(task.predict(one).scores[0])
    mean = torch.stack(rows).view(3, 3, 2).mean(1)
    torch.testing.assert_close(found, mean)
    assert values.tolist() == mean.argmax(1).tolist()
    nats = -torch.stack(rows).log()[torch.arange(9), batch["label"].repeat_interleave(3)].mean()
    output = task.loss(batch, GENERATOR)
    assert output.weight == 3
    assert float(output.loss.detach()) == pytest.approx(float(nats), rel=1e-5)


# Scores


def test_scores_by_hand():
    table = torch.tensor([[[0.5, 0.2, 0.2, 0.1], [0.1, 0.6, 0.2, 0.1]]]).log()
    words = torch.tensor([[0, -1], [1, 2], [3, 1]])
    found = verbalizer_scores(table, words)
    by_hand = [math.log(0.5), math.log(0.2 * 0.2), math.log(0.1 * 0.6)]
    assert found[0].tolist() == pytest.approx(by_hand)
    mean = verbalizer_scores(table, words, mean=True)
    assert mean[0].tolist() == pytest.approx([by_hand[0], by_hand[1] / 2, by_hand[2] / 2])


@pytest.mark.parametrize("several_tokens", ["sum", "mean"])
@pytest.mark.parametrize("name", ["masked_language", "gpt_bert"])
@pytest.mark.parametrize("head", ["bert", "tied"])
def test_scores_against_a_loop_over_items_words_and_tokens(tokenizer, several_tokens, name, head):
    method = method_of(tokenizer, name, head=head)
    task = cloze_of(tokenizer, LONG, method=method, several_tokens=several_tokens)
    assert task.config.head == head
    batch = rows_of(task, Rows(tokenizer), labelled()).batch(np.arange(4))
    answer = task.predict(batch)
    words = [tokenizer.encode([word])[0].tolist() for word in ("not good at all", "good")]
    nats = []
    for number, item in enumerate(ITEMS):
        ids = tokenizer.encode([f"{item} it was"])[0].tolist()
        end = tokenizer.encode(["."])[0].tolist()
        cls, sep, mask = (getattr(tokenizer.vocabulary, n) for n in ("cls", "sep", "mask"))
        row = torch.tensor([[cls, *ids, *[mask] * 4, *end, sep]])
        method.eval()
        filled = method.fill({"tokens": row}).double()  # the method's own word for it
        scores = []
        for word in words:
            score = sum(float(filled[place, token]) for place, token in enumerate(word))
            scores.append(score / len(word) if several_tokens == "mean" else score)
        shares = np.exp(scores) / np.exp(scores).sum()
        assert answer.scores[number].tolist() == pytest.approx(shares.tolist(), rel=1e-5)
        nats.append(-math.log(shares[int(labelled().labels[number])]))
    assert float(task.loss(batch, GENERATOR).loss.detach()) == pytest.approx(
        np.mean(nats), rel=1e-5
    )


def test_words_that_are_neither_read_nor_labels_get_no_gradient(tokenizer):
    task = cloze_of(tokenizer)
    batch = rows_of(task, Rows(tokenizer), labelled()).batch(np.arange(4))
    task.loss(batch, GENERATOR).loss.backward()
    gradient = task.encoder.embedding.tokens.weight.grad
    used = torch.cat([batch["tokens"].unique(), batch["verbalizers"].flatten()]).unique()
    others = torch.ones(len(gradient), dtype=torch.bool).index_fill(0, used, False)
    assert others.any()
    assert (gradient[others] == 0).all()
    assert (gradient[batch["verbalizers"].flatten()] != 0).any(1).all()


def test_padding_changes_nothing(tokenizer):
    task = cloze_of(tokenizer)
    batch = rows_of(task, Rows(tokenizer), labelled()).batch(np.arange(4))
    wider = dict(batch)
    wider["tokens"] = torch.nn.functional.pad(batch["tokens"], (0, 3))
    wider["mask"] = torch.nn.functional.pad(batch["mask"], (0, 3))
    torch.testing.assert_close(task.predict(wider).scores, task.predict(batch).scores)


def test_the_pretrained_head_comes_along_as_a_copy(tokenizer):
    method = method_of(tokenizer)
    before = {key: value.clone() for key, value in method.head.state_dict().items()}
    task = cloze_of(tokenizer, method=method)
    for key, value in task.head.state_dict().items():
        assert torch.equal(value, before[key])
    assert "head.dense.weight" in task.state_dict()
    optimizer = torch.optim.Adam(task.parameters(), lr=0.02)
    batch = rows_of(task, Rows(tokenizer), labelled()).batch(np.arange(4))
    first = float(task.loss(batch, GENERATOR).loss.detach())
    for _ in range(20):
        optimizer.zero_grad()
        task.loss(batch, GENERATOR).loss.backward()
        optimizer.step()
    assert float(task.loss(batch, GENERATOR).loss.detach()) < 0.5 * first
    for name, parameter in task.named_parameters():
        assert parameter.grad is not None, name
    for key, value in method.head.state_dict().items():
        assert torch.equal(value, before[key])


def test_probe_trains_the_head_alone(tokenizer):
    method = method_of(tokenizer)
    options = {"tuning": "probe", "seed": 0, "method": method}
    task = new_task(method.encoder, "cloze", Config(template=PLAIN), labelled(), **options)
    moving = {name.partition(".")[0] for name, p in task.named_parameters() if p.requires_grad}
    assert moving == {"head"}
    options["tuning"] = "layer_mix"
    with pytest.raises(ConfigError, match="reads the last layer"):
        new_task(method.encoder, "cloze", Config(template=PLAIN), labelled(), **options)


def test_subsets_hold_every_class():
    many = labelled([str(i) for i in range(40)], "0" * 36 + "1" * 4)
    assert set(subset(many, 2, seed=0).labels) == {"0", "1"}


# Bad input


def test_words_that_do_not_do(tokenizer):
    with pytest.raises(ConfigError, match="no pieces for the word 'splendid'"):
        verbalizers(tokenizer, ["good", "splendid"], " ", "sum")
    with pytest.raises(ConfigError, match="'not bad' is 2 tokens to this model: not bad; choose"):
        verbalizers(tokenizer, ["good", "not bad"], " ", "refuse")
    with pytest.raises(ConfigError, match="'good' and 'GOOD' are the same tokens"):
        verbalizers(tokenizer, ["good", "GOOD"], " ", "sum")


@pytest.mark.parametrize(
    ("labels", "words", "message"),
    [
        ("02", "0 = bad\n1 = good", "few.tsv: label '2' has no word in the template"),
        ("01", "0 = bad\n1 = good\n2, neutral = yes", "no example has the label '2' or 'neutral'"),
        ("01", "0, 1 = bad\n2 = good", "labels '0' and '1' have the same word 'bad'"),
    ],
)
def test_labels_that_do_not_fit_the_template(tokenizer, labels, words, message):
    examples = Labelled("cloze", ["a", "b"], list(labels), tuple(labels), "few.tsv")
    with pytest.raises(DataError, match=message):
        LabelledCloze(examples, tokenizer, 64, template="{text} {label}\n--- labels\n" + words)


def test_items_that_do_not_fit_the_template(tokenizer):
    with pytest.raises(DataError, match=r"has \{text_b\}, but the items are one text"):
        LabelledCloze(labelled(), tokenizer, 64, template=PAIRED)
    with pytest.raises(DataError, match=r"has no \{text_b\}, but the items are pairs"):
        LabelledCloze(labelled([("a", "b")] * 2, "01"), tokenizer, 64, template=PLAIN)


def test_runs_that_fill_no_blanks_are_refused(tokenizer):
    causal = method_of(tokenizer, "causal_language")
    with pytest.raises(ConfigError, match="needs a masked_language or gpt_bert run"):
        Cloze(Config(template=PLAIN), causal.encoder, ("0", "1"))
    other = method_of(tokenizer)
    task = Cloze(Config(template=PLAIN), other.encoder, ("0", "1"))
    with pytest.raises(ConfigError, match="pre-trained without filling blanks"):
        task.begin(causal, ITEMS, "0101")
    unmasked = tokenizer_of("bpe", style="gpt")
    encoder = TransformerEncoder(transformer.Config(dim=8, layers=1, heads=2), unmasked.vocabulary)
    with pytest.raises(ConfigError, match="a tokenizer with a mask token"):
        Cloze(Config(template=PLAIN), encoder, ("0", "1"))


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({}, ConfigError, "cloze needs a template: task.template ="),
        ({"template": "sentimnt"}, ConfigError, "no template and no file is called 'sentimnt'"),
        ({"template": "{text} it was\n--- labels\n0 = a\n1 = b"}, ConfigError, r"no place \{label"),
        ({"template": PLAIN, "demonstrations": -1}, ValueError, "must not be negative, got -1"),
        ({"template": "nli-reasoning"}, ValueError, r"takes no \{reasoning\}"),
    ],
)
def test_settings_out_of_range(values, error, message):
    with pytest.raises(error, match=message):
        Config(**values)


def test_a_configuration_holds_the_text_of_its_template(tmp_path):
    named = [name for name in templates.paths() if name.startswith("cloze-")]
    assert len(named) >= 10
    for name in named:
        text = Config(template=name).template
        assert Config(template=text).template == text
        assert templates.parse(text, name, cloze=True).instruction == ""
    (tmp_path / "mine.txt").write_text(PLAIN)
    assert Config(template=str(tmp_path / "mine.txt")).template == PLAIN


# The verbs


def test_finetune_evaluate_and_predict(corpus, masked_run, selfsup, tmp_path):
    template = tmp_path / "reviews.txt"
    text = "{text} it was {label} .\n--- labels\nbad = terrible\ngood = wonderful\n"
    template.write_text(text)
    begin = ("finetune", masked_run, "--task", "cloze", "--data", corpus.labelled)
    answer = selfsup(
        *begin, "--out", tmp_path / "run", "--set", f"task.template={template}",
        "training.steps=100", "training.lr=5e-3", "training.seed=1",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    template.unlink()  # the run holds its text
    answer = selfsup("evaluate", tmp_path / "run", "--data", corpus.test)
    assert answer.code == 0, answer.err
    found = dict(line.split() for line in answer.out.splitlines())
    assert float(found["accuracy"]) > 0.8
    items = ["the film was great and lovely", "the film was awful and dull"]
    answer = selfsup("predict", tmp_path / "run", *items)
    assert [line.split("\t")[0] for line in answer.out.splitlines()] == ["good", "bad"]

    from selfsup import api

    model = api.load(tmp_path / "run", "cpu")
    assert model.values["task"]["template"] == text
    shares = model.predict_proba(items)
    assert np.stack(shares).sum(1) == pytest.approx(1)
    assert model.predict([]) == []
    assert selfsup(*begin, "--out", tmp_path / "other").code == 2


def test_zero_shot_is_the_score_before_training(masked_run, tmp_path):
    from selfsup import api

    model = api.load(masked_run, "cpu")
    text = "{text} it was {label} .\n--- labels\nbad = dull awful\ngood = great\n"
    examples = Labelled(
        "cloze", ["a great film", "a dull film"], ["good", "bad"], ("bad", "good"), "x"
    )
    task = new_task(
        model.encoder, "cloze", Config(template=text), examples, tuning="full", seed=0,
        method=model.objective,
    )  # fmt: skip
    rows = rows_of(task, model.preprocessor, examples)
    assert score(task, rows) in (0.0, 0.5, 1.0)
    filled = model.fill("a great film it was [MASK] [MASK] .", top=10**6)
    first, second = (dict(blank) for blank in filled)
    bad = math.log(first["dull"]) + math.log(second["awful"])
    share = 1 / (1 + math.exp(bad - math.log(first["great"])))
    batch = rows.batch(np.array([0]))
    assert float(task.predict(batch).scores[0, 1]) == pytest.approx(share, rel=1e-4)
