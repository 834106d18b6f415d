"""Soft labels by hand, generations, the search for words, and the verbs."""

import json
import math

import numpy as np
import pytest
import torch

from selfsup.data.labels import Labelled
from selfsup.data.templates import parse
from selfsup.errors import ConfigError, DataError
from selfsup.models.encoder import Encoder, Features
from selfsup.randomness import numpy_generator, torch_generator
from selfsup.tasks.classification import Classification
from selfsup.tasks.classification import Config as Classified
from selfsup.tuning import verbalizers
from selfsup.tuning.pet import Config, annotate, combined, drawn
from selfsup.tuning.pseudo_labels import SoftClassification, softened

LABELLED = Labelled("classification", list("abcdef"), list("000011"), ("0", "1"), "few.tsv")
ITEMS = [f"item {number}" for number in range(200)]


class Numbers(Encoder):
    """The batch's own vectors."""

    dim, num_layers = 3, 1

    def forward(self, batch):
        x = batch["row"].unsqueeze(1)
        return Features((x,), torch.ones(len(x), 1, dtype=torch.bool), batch["row"])


def random_scores(seed: int, items: int = 200) -> np.ndarray:
    scores = numpy_generator(seed, "scores").normal(0, 2, (items, 2))
    return scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)


# Soft labels


def test_soft_labels_by_hand():
    scores = np.array([[[2.0, 0.0]], [[0.0, 4.0]], [[1.0, 1.0]]])
    mean = combined(scores, [0.5, 0.25, 0.25])
    assert mean.tolist() == [[1.25, 1.25]]
    uniform = combined(scores, [1.0, 1.0, 1.0])
    assert uniform[0].tolist() == pytest.approx([1.0, 5 / 3])
    share = 1 / (1 + math.exp((5 / 3 - 1) / 2))
    assert softened(uniform, 2.0)[0].tolist() == pytest.approx([share, 1 - share])
    assert combined(scores, [0.0, 0.0, 0.0]).tolist() == uniform.tolist()


def test_what_rows_have_in_common_does_not_matter():
    """Log-probabilities of classes and logits of words differ by a number for each text."""
    logits = numpy_generator(0, "logits").normal(0, 2, (3, 5, 2))
    shares = logits - np.logaddexp.reduce(logits, axis=2, keepdims=True)
    weights = [0.6, 0.9, 0.5]
    expected = softened(combined(logits, weights), 2.0)
    np.testing.assert_allclose(softened(combined(shares, weights), 2.0), expected)


def test_the_loss_of_the_classifier_by_hand():
    student = Classification(Classified(dropout=0.0), Numbers(), ("0", "1"))
    objective = SoftClassification(student, temperature=2.0)
    row = torch.tensor([[1.0, 2.0, 3.0], [0.0, -1.0, 1.0]])
    label = torch.tensor([[0.0, 3.0], [1.0, 1.0]])
    output = objective.loss({"row": row, "label": label}, torch_generator(0, "x"))
    with torch.no_grad():
        student.head.weight.copy_(torch.tensor([[0.5, 0.0, 0.0], [0.0, 0.5, 0.0]]))
        output = objective.loss({"row": row, "label": label}, torch_generator(0, "x"))
    logits = [[0.5, 1.0], [0.0, -0.5]]
    divergences = []
    for own, other in zip(logits, label.tolist(), strict=True):
        p = [math.exp(x / 2) for x in other]
        q = [math.exp(x / 2) for x in own]
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        divergences.append(4 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    assert float(output.loss) == pytest.approx(sum(divergences) / 2, rel=1e-5)
    assert output.weight == 2
    assert float(output.metrics["agreement"]) == 1.0
    hard = {"row": row, "label": torch.tensor([1, 0])}
    own = student.loss(hard, torch_generator(0, "x"))
    assert torch.equal(objective.loss(hard, torch_generator(0, "x")).loss, own.loss)
    assert all(name.startswith("student.") for name in objective.state_dict())
    student.head.weight.grad = None
    objective.loss({"row": row, "label": label}, torch_generator(0, "x")).loss.backward()
    assert student.head.weight.grad.abs().sum() > 0


# Generations


def test_drawn_items_have_the_class_and_the_surest_come_most_often():
    scores = np.log(np.array([[0.99, 0.01]] * 5 + [[0.51, 0.49]] * 5 + [[0.2, 0.8]] * 3))
    counts = np.zeros(len(scores))
    for seed in range(400):
        places = drawn(scores, [2, 5], numpy_generator(seed, "draw"))
        assert len(set(places.tolist())) == len(places) == 5  # of class 1 there are only three
        assert sorted(places[2:].tolist()) == [10, 11, 12]
        counts[places] += 1
    sure, unsure = counts[:5].sum(), counts[5:10].sum()
    assert 1.4 < sure / unsure < 2.1  # a little below 0.99 / 0.51: without replacement
    assert len(drawn(scores[:10], [0, 3], numpy_generator(0, "draw"))) == 0


def test_each_generation_learns_from_other_models_and_grows():
    asked: list[list[tuple[int, int, Labelled]]] = []
    answers = {(t, s): random_scores(10 * t + s) for t in range(2) for s in (0, 1)}

    def fit(template, seed, examples):
        if len(asked) == 0 or len(asked[-1]) == 4:
            asked.append([])
        asked[-1].append((template, seed, examples))
        return answers[template, seed]

    config = Config(seeds=(0, 1), generations=3, growth=3.0, annotators=0.3)
    found = annotate(fit, [0.8, 0.4], LABELLED, ITEMS, config, truth=["0"] * 200)
    weights = [0.8, 0.8, 0.4, 0.4]
    every = np.stack([answers[t, s] for t in range(2) for s in (0, 1)])
    np.testing.assert_allclose(found.scores, combined(every, weights))
    assert [len(some) for some in asked] == [4, 4, 4]
    for generation, models in enumerate(asked):
        for place, (template, seed, examples) in enumerate(models):
            assert (template, seed) == (place // 2, place % 2)
            zeros, ones = (examples.labels.count(name) for name in "01")
            assert (zeros, ones) == (4 * 3**generation, 2 * 3**generation)
            assert examples.items[:6] == LABELLED.items
            assert examples.labels[:6] == LABELLED.labels
            if not generation:
                continue
            # 0.3 of three others is one model: all new labels are those of one, not its own
            numbers = [ITEMS.index(item) for item in examples.items[6:]]
            said = [
                str(int(every[other][number].argmax())) for other in range(4) for number in numbers
            ]
            said_by = np.array(said).reshape(4, -1) == np.array(examples.labels[6:])
            teachers = set(np.flatnonzero(said_by.all(1)).tolist())
            assert teachers
            assert teachers != {place}
    assert [told["generation"] for told in found.record] == [0, 1, 2]
    right = (combined(every, weights).argmax(1) == 0).mean()
    assert found.record[-1]["right"] == pytest.approx(right)
    again = annotate(fit, [0.8, 0.4], LABELLED, ITEMS, config)
    assert "right" not in again.record[0]
    assert asked[3][2][2].items == asked[0][2][2].items
    assert asked[4][1][2].items == asked[1][1][2].items  # the same draw again


def test_uniform_weights():
    scores = {0: random_scores(0), 1: random_scores(1)}
    config = Config(seeds=(0,), weights="uniform")
    found = annotate(lambda t, s, e: scores[t], [0.9, 0.1], LABELLED, ITEMS, config)
    np.testing.assert_allclose(found.scores, (scores[0] + scores[1]) / 2)


def test_a_single_model_has_no_teacher():
    config = Config(seeds=(0,), generations=2)
    with pytest.raises(ConfigError, match="give more --templates or --seeds"):
        annotate(lambda t, s, e: random_scores(0), [0.9], LABELLED, ITEMS, config)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seeds": ()}, "seeds must be different"),
        ({"seeds": (1, 1)}, "seeds must be different"),
        ({"temperature": 0.0}, "temperature"),
        ({"generations": 0}, "generations"),
        ({"growth": 1.0}, "growth"),
        ({"annotators": 0.0}, "annotators"),
    ],
)
def test_settings_out_of_range(values, message):
    with pytest.raises(ValueError, match=message):
        Config(**values)


# The search for words


def test_likeliest_words_and_best_ways_by_loops():
    draw = numpy_generator(0, "table")
    table = np.log(draw.dirichlet(np.ones(12), 9))
    classes = np.array([0, 1, 0, 1, 1, 0, 0, 1, 1])
    allowed = np.array([True] * 10 + [False] * 2)
    found = verbalizers.likeliest(table, classes, 2, allowed, 4)
    for number in range(2):
        mean = [table[classes == number, word].mean() for word in range(10)]
        assert found[number] == sorted(range(10), key=lambda word: -mean[word])[:4]
    ways = verbalizers.best_ways(table, classes, found, 3)
    slow = {}
    for first in found[0]:
        for second in found[1]:
            if first != second:
                pairs = zip(table[:, first], table[:, second], classes, strict=True)
                hits = sum((b > a) == bool(c) for a, b, c in pairs)
                slow[first, second] = hits
    best = sorted(slow.values(), reverse=True)[:3]
    assert [slow[way] for way in ways] == best
    assert all(
        len(set(way)) == 2 for way in verbalizers.best_ways(table, classes, [[1], [1, 2]], 9)
    )
    with pytest.raises(DataError, match="class 2 has no example"):
        verbalizers.likeliest(table, classes, 3, allowed, 4)


def test_search_finds_words_of_the_classes(masked_run, corpus):
    from selfsup.model_folder import load_model
    from selfsup.verbs import few_labels

    base = load_model(masked_run, "cpu")
    labelled = few_labels._as_cloze(few_labels._read(base, corpus.labelled, {})).take(range(40))
    # two blanks, and no good words for the classes
    text = "the film was {label} . {text}\n--- labels\nbad = the end\ngood = was\n"
    task = few_labels._cloze(base, text, {}, labelled, "x", seed=0)
    preprocessor = base.preprocessor.limited(None)
    found = verbalizers.search(task, preprocessor, labelled, candidates=30, kept=5)
    assert [score for _, score in found] == [1, 1 / 2, 1 / 3, 1 / 4, 1 / 5]
    words = parse(found[0][0], "found", cloze=True).words
    tokens = [preprocessor.tokenizer.encode([word])[0].tolist() for word in words]
    assert all(len(ids) == 1 for ids in tokens)
    first, last = found[0][0], found[4][0]
    backwards = verbalizers.search(
        task, preprocessor, labelled, candidates=30, kept=5, measure=lambda one: float(one == last)
    )
    assert backwards[0] == (last, 1.0)
    assert backwards[1][0] == first


# The verbs

TEMPLATES = {
    "after.txt": "{text} it was {label} .\n--- labels\nbad = terrible\ngood = wonderful\n",
    "film.txt": "{text} the film was {label} .\n--- labels\nbad = terrible\ngood = wonderful\n",
}


@pytest.fixture
def begin(corpus, masked_run, tmp_path):
    """The verb with two templates and 16 labelled examples."""
    lines = corpus.labelled.read_text().splitlines()
    (tmp_path / "few.csv").write_text("\n".join(lines[:17]) + "\n")
    for name, text in TEMPLATES.items():
        (tmp_path / name).write_text(text)
    templates = [tmp_path / name for name in TEMPLATES]
    return ["pet", masked_run, "--templates", *templates, "--data", tmp_path / "few.csv"]


def test_pet_makes_a_classifier(begin, corpus, selfsup, tmp_path):
    begin = [corpus.labelled if str(one).endswith("few.csv") else one for one in begin]
    steps = ["training.steps=40", "training.lr=5e-3", "cloze_training.steps=200"]
    steps += ["cloze_training.lr=5e-3", "pet.seeds=[1]", "pet.generations=2", "pet.growth=1.5"]
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(corpus.text.read_text().splitlines(True)[:120]))
    more = ["--unlabelled", texts, "--out", tmp_path / "run", "--valid", corpus.test]
    answer = selfsup(*begin, *more, "--set", *steps)
    assert answer.code == 0, answer.err
    answer = selfsup("evaluate", tmp_path / "run", "--data", corpus.test)
    found = dict(line.split() for line in answer.out.splitlines())
    assert float(found["accuracy"]) > 0.8
    told = json.loads((tmp_path / "run" / "pet.json").read_text())
    assert [one["text"] for one in told["templates"]] == list(TEMPLATES.values())
    first, second = ([one["examples"] for one in some["models"]] for some in told["trained"])
    assert first == [120, 120]
    assert all(150 < count <= 180 for count in second)
    assert sum(told["classes"].values()) == pytest.approx(1)
    assert told["unlabelled_examples"] == 120

    zero = selfsup(*begin, "--zero-shot")
    by_name = dict(reversed(line.split("\t")) for line in zero.out.splitlines())
    for one in told["templates"]:
        assert float(by_name[one["name"]]) == pytest.approx(one["accuracy_untrained"], abs=1e-4)


def test_bad_use(begin, causal_run, selfsup, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("a film\na book\n")
    out = ["--unlabelled", texts, "--out", tmp_path / "run"]
    answer = selfsup(*begin)
    assert answer.code == 2
    assert "give --unlabelled TEXTS and --out RUN, or --zero-shot" in answer.err
    answer = selfsup(*begin, *out, "--zero-shot")
    assert "--zero-shot trains nothing" in answer.err
    answer = selfsup(*begin, *out, "--set", "clozes.steps=3")
    assert "unknown section 'clozes'; did you mean 'cloze'" in answer.err
    answer = selfsup("pet", causal_run, *begin[2:], *out)
    assert answer.code == 2
    assert "needs a masked_language or gpt_bert run" in answer.err
    (tmp_path / "after.txt").write_text("{text} {label}\n--- labels\nbad = dull\nfine = bright\n")
    answer = selfsup(*begin, *out)
    assert answer.code == 3
    assert "label 'good' has no word in the template" in answer.err
    assert "after.txt" in answer.err
    assert not (tmp_path / "run").exists()
