import math

import numpy as np
import pytest
import torch
from torch import nn

from selfsup.data.labelled_text import LabelledText
from selfsup.data.labels import Labelled
from selfsup.data.tokenizer import Tokenizer, TokenizerConfig
from selfsup.errors import DataError
from selfsup.models.encoder import Encoder, Features, masked_mean
from selfsup.randomness import torch_generator
from selfsup.tasks import classification, regression, tagging

NAMES = ("a", "b", "c")
GENERATOR = torch_generator(0, "test")


class ToyEncoder(Encoder):
    """Embeddings, one mixing layer that looks at real positions only, and dropout."""

    def __init__(self, dim=8, vocabulary=64):
        super().__init__()
        self.dim, self.num_layers = dim, 1
        self.tokens, self.segments = nn.Embedding(vocabulary, dim), nn.Embedding(2, dim)
        self.mix, self.dropout = nn.Linear(dim, dim), nn.Dropout(0.5)
        generator = torch_generator(0, "toy")
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)

    def forward(self, batch):
        tokens = batch["tokens"]
        mask = batch.get("mask", torch.ones_like(tokens, dtype=torch.bool))
        x = self.tokens(tokens)
        if "segments" in batch:
            x = x + self.segments(batch["segments"])
        context = masked_mean(x, mask).unsqueeze(1)  # (batch, 1, dim)
        y = self.dropout(torch.tanh(self.mix(x) + context))
        return Features((x, y), mask, y[:, 0] * 2)


def build(module, **options):
    task_class = {
        classification: classification.Classification,
        regression: regression.Regression,
        tagging: tagging.Tagging,
    }[module]
    task = task_class(module.Config(**options), ToyEncoder(), NAMES)
    generator = torch_generator(1, "head")
    for parameter in task.head.parameters():
        nn.init.normal_(parameter, generator=generator)
    return task.eval()


def batch_of(lengths=(3, 5, 5), label=None, words=None):
    generator = torch_generator(2, "batch")
    tokens = torch.randint(1, 64, (len(lengths), max(lengths)), generator=generator)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    batch = {"tokens": tokens.where(mask, 0), "mask": mask}
    if label is not None:
        batch["label"] = torch.tensor(label)
    if words is not None:
        batch["words"] = torch.tensor(words)
    return batch


def slow_cross_entropy(logits, label):
    """One example, plain Python floats (float64)."""
    return math.log(sum(math.exp(x) for x in logits)) - logits[label]


# Losses against loops


def test_classification_loss():
    logits = torch.randn(7, 3, generator=GENERATOR) * 3
    label = torch.tensor([0, 1, 2, 2, 1, 0, 0])
    loss, accuracy = classification.classification_loss(logits.bfloat16(), label)
    rows = logits.bfloat16().double().tolist()
    slow = [slow_cross_entropy(row, i) for row, i in zip(rows, label.tolist(), strict=True)]
    hits = [max(range(3), key=row.__getitem__) == i for row, i in zip(rows, label, strict=True)]
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(sum(slow) / 7, rel=1e-6)
    assert float(accuracy) == pytest.approx(sum(hits) / 7)


def test_tagging_loss_scores_marked_positions_only():
    logits = torch.randn(2, 4, 3, generator=GENERATOR) * 3
    label = torch.tensor([[-100, 2, -100, 0], [1, -100, -100, -100]])
    loss, accuracy, count = tagging.tagging_loss(logits, label)
    slow, hits = [], []
    for row in range(2):
        for column in range(4):
            target = int(label[row, column])
            if target != -100:
                scores = logits[row, column].double().tolist()
                slow.append(slow_cross_entropy(scores, target))
                hits.append(max(range(3), key=scores.__getitem__) == target)
    assert int(count) == 3
    assert float(loss) == pytest.approx(sum(slow) / 3, rel=1e-6)
    assert float(accuracy) == pytest.approx(sum(hits) / 3)


def test_tagging_loss_without_a_word_is_zero():
    logits = torch.randn(1, 2, 3, generator=GENERATOR, requires_grad=True)
    loss, _, count = tagging.tagging_loss(logits, torch.full((1, 2), -100))
    loss.backward()
    assert (float(loss.detach()), int(count)) == (0.0, 0)
    assert logits.grad.abs().max() == 0


def test_regression_loss_is_of_standardised_labels():
    output, label = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([10.0, 14.0, 30.0])
    loss, error = regression.regression_loss(output, label, torch.tensor(15.0), torch.tensor(4.0))
    differences = [o - (t - 15.0) / 4.0 for o, t in [(0.5, 10.0), (-1.0, 14.0), (2.0, 30.0)]]
    assert float(loss) == pytest.approx(sum(d * d for d in differences) / 3)
    assert float(error) == pytest.approx(4.0 * sum(abs(d) for d in differences) / 3)


# Tasks


def test_pooling_choices():
    batch = batch_of(label=[0, 1, 2])
    for pooling in ("encoder", "mean", "cls"):
        task = build(classification, pooling=pooling)
        features = task.encoder(batch)
        slow = {
            "encoder": features.pooled,
            "cls": features.last[:, 0],
            "mean": torch.stack(
                [row[:n].mean(0) for row, n in zip(features.last, (3, 5, 5), strict=True)]
            ),
        }[pooling]
        logits = slow @ task.head.weight.T + task.head.bias
        prediction = task.predict(batch)
        torch.testing.assert_close(prediction.scores, logits.softmax(-1))
        assert prediction.values.tolist() == logits.argmax(-1).tolist()
        output = task.loss(batch, GENERATOR)
        expected, _ = classification.classification_loss(logits, batch["label"])
        torch.testing.assert_close(output.loss, expected)
        assert output.weight == 3
        assert set(output.metrics) == {"accuracy"}


def test_regression_predicts_in_the_labels_unit():
    task, batch = build(regression), batch_of(label=[0.0, 10.0, 20.0])
    before = task.predict(batch).values
    task.fit_labels([0.0, 10.0, 20.0])
    std = math.sqrt(200 / 3)
    torch.testing.assert_close(task.predict(batch).values, 10 + std * before)
    standardised = [(y - 10) / std for y in (0.0, 10.0, 20.0)]
    slow = sum((o - y) ** 2 for o, y in zip(before.tolist(), standardised, strict=True)) / 3
    assert float(task.loss(batch, GENERATOR).loss.detach()) == pytest.approx(slow, rel=1e-5)
    # what is kept is enough to predict
    other = build(regression)
    other.head.load_state_dict(task.head.state_dict())
    torch.testing.assert_close(other.predict(batch).values, task.predict(batch).values)


def test_regression_refuses_equal_labels():
    with pytest.raises(DataError, match="all 3 training labels are 2"):
        build(regression).fit_labels([2.0, 2.0, 2.0])


def test_tagging_predicts_per_word():
    words = [[-1, 0, 1, -1, -1], [-1, 0, -1, 1, 2], [0, -1, -1, -1, -1]]
    task, batch = build(tagging), batch_of((3, 5, 1), words=words)
    prediction = task.predict(batch)
    logits = task.head(task.encoder(batch).last)
    assert prediction.values.shape == (3, 3)
    assert prediction.scores.shape == (3, 3, 3)
    for row, numbers in enumerate(words):
        seen = {word: column for column, word in enumerate(numbers) if word >= 0}
        for word in range(3):
            if word in seen:
                scores = logits[row, seen[word]].softmax(-1)
                torch.testing.assert_close(prediction.scores[row, word], scores)
                assert prediction.values[row, word] == scores.argmax()
            else:
                assert prediction.values[row, word] == -1
                assert prediction.scores[row, word].sum() == 0


def labelled_batch(module):
    label = {
        classification: [0, 1, 2],
        regression: [0.5, 1.0, 2.0],
        tagging: [[-100, 0, 1, -100, -100], [-100, 2, -100, 1, 0], [-100, 1, 1, 1, 1]],
    }[module]
    words = [[-1, 0, 1, -1, -1], [-1, 0, -1, 1, 2], [-1, 0, 1, 2, 3]]
    return batch_of(label=label, words=words)


MODULES = [classification, regression, tagging]
IDS = ["classification", "regression", "tagging"]


@pytest.mark.parametrize("module", MODULES, ids=IDS)
def test_padding_changes_nothing(module):
    task, batch = build(module), labelled_batch(module)
    wider = {}
    for name, value in batch.items():
        fill = {"label": -100, "words": -1, "tokens": 7, "mask": 0}[name]
        short = value.dim() == 1
        wider[name] = value if short else nn.functional.pad(value, (0, 4), value=fill)
    torch.testing.assert_close(task.predict(wider), task.predict(batch))
    torch.testing.assert_close(task.loss(wider, GENERATOR), task.loss(batch, GENERATOR))


@pytest.mark.parametrize("module", MODULES, ids=IDS)
def test_gradient_reaches_encoder_and_head(module):
    task = build(module).train()
    task.loss(labelled_batch(module), GENERATOR).loss.backward()
    for name in ("encoder.mix.weight", "encoder.tokens.weight"):
        assert task.get_parameter(name).grad.abs().sum() > 0
    assert all(p.grad.abs().sum() > 0 for p in task.head.parameters())


@pytest.mark.parametrize("module", MODULES, ids=IDS)
def test_predict_has_no_dropout_or_gradient_and_restores_the_mode(module):
    task, batch = build(module, dropout=0.5), labelled_batch(module)
    quiet = task.predict(batch)
    task.train()
    for _ in range(3):
        prediction = task.predict(batch)
        torch.testing.assert_close(prediction, quiet)
        assert not prediction.scores.requires_grad
    assert task.training
    assert task.encoder.dropout.training


@pytest.mark.parametrize("module", MODULES, ids=IDS)
def test_head_starts_small_and_keeps_what_is_needed(module):
    task_class = type(build(module))
    task = task_class(module.Config(), ToyEncoder(dim=512), NAMES)
    weight, bias = list(task.head.parameters())
    assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.2)
    assert bias.abs().max() == 0
    assert task.kept[:2] == ("encoder", "head")
    assert task.metric == ("spearman" if module is regression else "accuracy")
    with pytest.raises(ValueError, match="dropout must lie"):
        module.Config(dropout=1.0)


def test_a_few_steps_learn_each_task_from_labelled_text():
    """From `LabelledText` to the prediction: first letters decide, and every task finds out."""
    texts = ["ab", "ba", "abab", "baba", "aab", "bba"]
    tokenizer = Tokenizer.train(TokenizerConfig(kind="character", vocab_size=32), texts)
    tags = [["X" if letter == "a" else "Y" for letter in text] for text in texts]
    first = [text[0] for text in texts]
    numbers = [10.0 if letter == "a" else 20.0 for letter in first]
    cases = [
        (classification, Labelled("classification", texts, first, ("a", "b"), "toy")),
        (regression, Labelled("regression", [(t, t) for t in texts], numbers, (), "toy")),
        (tagging, Labelled("tagging", [list(t) for t in texts], tags, ("X", "Y"), "toy")),
    ]
    for module, labelled in cases:
        data = LabelledText(labelled, tokenizer, 16)
        options = {} if module is tagging else {"pooling": "cls"}
        task = type(build(module))(module.Config(**options), OrderedEncoder(), labelled.names)
        if module is regression:
            task.fit_labels(labelled.labels)
        batch = data.batch(np.arange(6))
        optimizer = torch.optim.Adam(task.parameters(), lr=0.05)
        task.eval()
        for _ in range(40):
            optimizer.zero_grad()
            task.loss(batch, GENERATOR).loss.backward()
            optimizer.step()
        values = task.predict(batch).values
        if module is tagging:
            for row, answer in zip(values, data.word_labels, strict=True):
                assert row[: len(answer)].tolist() == answer.tolist()
                assert (row[len(answer) :] == -1).all()
        elif module is regression:
            torch.testing.assert_close(values, batch["label"], atol=1.0, rtol=0)
        else:
            assert values.tolist() == batch["label"].tolist()


class OrderedEncoder(ToyEncoder):
    """Puts the second position's embedding into the first, so that [CLS] sees the first letter."""

    def forward(self, batch):
        hidden, mask, pooled, *_ = super().forward(batch)
        first = hidden[-1][:, :1] + hidden[-1][:, 1:2]
        last = torch.cat([first, hidden[-1][:, 1:]], dim=1)
        return Features((hidden[0], last), mask, pooled)
