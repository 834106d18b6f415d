import pytest

from selfsup.data.labels import Labelled, split, subset
from selfsup.evaluation.baselines import fit_baseline, word_features
from selfsup.evaluation.metrics import accuracy, spearman
from selfsup.randomness import numpy_generator

GOOD, BAD = ["good", "great", "fine", "nice"], ["bad", "awful", "poor", "dull"]
FILLER = ["the", "film", "was", "a", "story", "and", "it", "is", "one", "of"]


def reviews(count=120):
    """Sentences of filler with one telling word; three in ten are negative."""
    generator = numpy_generator(0, "reviews")
    items, labels = [], []
    for i in range(count):
        negative = i % 10 < 3
        words = list(generator.choice(FILLER, 6))
        words.insert(int(generator.integers(6)), str(generator.choice(BAD if negative else GOOD)))
        items.append(" ".join([*words, str(i)]))
        labels.append("neg" if negative else "pos")
    return Labelled("classification", items, labels, ("neg", "pos"), "reviews")


def score(data, metric=accuracy):
    train, valid, test = split(data, (0.6, 0.2, 0.2), seed=0)
    baseline = fit_baseline(train, valid)
    prediction = baseline.predict(test.items)
    assert all(type(p) is type(t) for p, t in zip(prediction, test.labels, strict=True))
    return metric(test.labels, prediction), baseline, test


def test_classification_beats_the_majority():
    value, baseline, test = score(reviews())
    assert value > 0.9 > test.labels.count("pos") / len(test)
    assert baseline.name.startswith("TF-IDF of ")
    assert "logistic regression" in baseline.name
    assert baseline.score > 0.9


def test_text_without_spaces_is_read_by_characters():
    data = reviews()
    chinese = str.maketrans({" ": "", **{chr(97 + i): chr(0x4E00 + i) for i in range(26)}})
    joined = [item.translate(chinese) for item in data.items]
    value, baseline, _ = score(Labelled("classification", joined, data.labels, data.names, "zh"))
    assert value > 0.9
    assert "characters" in baseline.name


def test_three_classes():
    generator = numpy_generator(0, "three")
    cues = {"a": "red", "b": "green", "c": "blue"}
    labels = [str(generator.choice(list(cues))) for _ in range(90)]
    items = [f"x {cues[label]} y {i}" for i, label in enumerate(labels)]
    value, _, _ = score(Labelled("classification", items, labels, ("a", "b", "c"), "three"))
    assert value > 0.95


def test_pairs_need_features_of_both_texts():
    """The label is whether both texts name the same thing: neither text alone tells."""
    generator = numpy_generator(0, "pairs")
    things = [f"{word}{i}" for i in range(4) for word in ("cat", "dog", "sun", "sea")]
    items, labels = [], []
    for i in range(200):
        first = str(generator.choice(things))
        second = first if i % 2 else str(generator.choice([t for t in things if t != first]))
        items.append((f"we saw the {first}", f"there was {second} here"))
        labels.append("same" if i % 2 else "other")
    value, _, _ = score(Labelled("classification", items, labels, ("other", "same"), "pairs"))
    assert value > 0.9


def test_regression_follows_the_words():
    generator = numpy_generator(0, "numbers")
    items, labels = [], []
    for i in range(120):
        good = int(generator.integers(0, 5))
        items.append(" ".join(["good"] * good + ["bad"] * (4 - good) + [str(i)]))
        labels.append(100.0 + 10 * good)
    value, baseline, test = score(Labelled("regression", items, labels, (), "numbers"), spearman)
    assert value > 0.9
    assert "ridge" in baseline.name
    errors = [p - t for p, t in zip(baseline.predict(test.items), test.labels, strict=True)]
    assert max(map(abs, errors)) < 15  # in the labels' own unit


def tagged(item_of, count=60):
    generator = numpy_generator(0, "tags")
    pairs = [item_of(generator) for _ in range(count)]
    items, labels = [p[0] for p in pairs], [p[1] for p in pairs]
    names = tuple(sorted({tag for tags in labels for tag in tags}))
    return Labelled("tagging", items, labels, names, "tags")


def test_tagging_chooses_the_linear_tagger_where_context_tells():
    """A word after "to" is a verb, after "the" a noun; the word itself says nothing."""

    def sentence(generator):
        words, tags = [], []
        for _ in range(4):
            verb = bool(generator.integers(2))
            words += ["to" if verb else "the", str(generator.choice(["walk", "run", "play"]))]
            tags += ["P" if verb else "D", "V" if verb else "N"]
        return words, tags

    value, baseline, test = score(tagged(sentence))
    assert value > 0.98
    assert baseline.name.startswith("word features + logistic regression")
    assert [len(tags) for tags in baseline.predict(test.items)] == list(map(len, test.items))


def test_tagging_keeps_the_frequent_tag_where_that_is_enough():
    def sentence(generator):
        words = [str(w) for w in generator.choice(["a", "b", "c"], 5)]
        return words, [word.upper() for word in words]

    value, baseline, _ = score(tagged(sentence))
    assert value == 1.0
    assert baseline.name == "most frequent tag of the word"
    assert baseline.predict([["b", "never seen"]])[0][0] == "B"


@pytest.mark.parametrize("count", [1, 2, 3])
def test_very_small_subsets(count):
    train, valid = split(reviews(), (0.7, 0.3), seed=0)
    few = subset(train, count, seed=0)
    assert set(fit_baseline(few, valid).predict(valid.items)) <= {"neg", "pos"}


def test_texts_of_one_letter_or_one_mark():
    data = Labelled("classification", ["好", "坏", "!", "?"], list("1010"), ("0", "1"), "short")
    assert fit_baseline(data, data).predict(["好"]) == ["1"]


def test_a_baseline_is_deterministic():
    train, valid = split(reviews(60), (0.7, 0.3), seed=0)
    first, second = fit_baseline(train, valid), fit_baseline(train, valid)
    assert (first.name, first.score) == (second.name, second.score)
    assert first.predict(valid.items) == second.predict(valid.items)


def test_word_features():
    features = word_features(["McDonald's", "ate", "12"])
    assert "first" in features[0]
    assert "first" not in features[1]
    assert {"word=McDonald's", "lower=mcdonald's", "shape=XxXx'x"} <= set(features[0])
    assert {"prefix=mcdo", "suffix=ld's", "-1=<", "-2=<<", "1=ate", "2=12"} <= set(features[0])
    assert {"shape=0", "suffix=2", "-1=ate", "1=>", "2=>>"} <= set(features[2])
