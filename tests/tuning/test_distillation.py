"""Distillation: losses worked out in float64, what is trained, and who may teach whom."""

import math
from dataclasses import replace

import pytest
import torch

from selfsup.batch import Vocabulary
from selfsup.errors import ConfigError
from selfsup.methods.ops import soft_loss
from selfsup.models.attention_scores import attention_scores
from selfsup.models.transformer import Config as Model
from selfsup.models.transformer import TransformerEncoder
from selfsup.randomness import isolated, seed_layers, torch_generator
from selfsup.tasks import classification, regression, tagging
from selfsup.tuning.distillation import (
    Config,
    Distillation,
    attention_loss,
    hidden_loss,
    layers_followed,
)

NAMES = ("a", "b", "c")
GENERATOR = torch_generator(0, "test")
MODULES = {"classification": classification, "tagging": tagging, "regression": regression}
SMALL = Model(dim=8, layers=2, heads=2, dropout=0.0, init_std=0.3)
DEEP = replace(SMALL, layers=4)
TOKENS = torch.tensor([[5, 7, 2, 9], [3, 4, 6, 0], [8, 1, 0, 0]])
MASK = TOKENS > 0
WORDS = torch.tensor([[0, -1, 1, 2], [0, 1, -1, -1], [0, -1, -1, -1]])
LABELS = {
    "classification": torch.tensor([0, 2, 1]),
    "tagging": torch.tensor([[0, -100, 1, 2], [2, 0, -100, -100], [1, -100, -100, -100]]),
    "regression": torch.tensor([1.0, 3.0, 2.0]),
}
UNKNOWN = {
    "classification": torch.tensor([0, 2, -100]),
    "tagging": LABELS["tagging"].index_fill(0, torch.tensor(2), -100),
    "regression": torch.tensor([1.0, 3.0, math.nan]),
}


def build(name, model=SMALL, seed=0, names=NAMES):
    module = MODULES[name]
    kind = getattr(module, name.capitalize())
    with isolated():
        seed_layers(seed, "task")
        task = kind(module.Config(dropout=0.0), TransformerEncoder(model, VOCABULARY), names)
        torch.nn.init.normal_(next(task.head.parameters()))
    if name == "regression":
        task.fit_labels([1.0 + seed, 3.0, 9.0])
    return task.eval()


VOCABULARY = Vocabulary(size=20, pad=0)


def pair(name, model=SMALL, **config):
    return Distillation(Config(**config), build(name, model, 1), build(name, DEEP, 2)).eval()


def batch_of(name, label=LABELS):
    return {"tokens": TOKENS, "mask": MASK, "words": WORDS, "label": label[name]}


def output_of(task, name):
    return task.read(task.encoder(batch_of(name))).detach().double()


def slow_kl(teacher, student, temperature):
    """T^2 * KL of two lists of logits, plain floats."""

    def shares(logits):
        powers = [math.exp(x / temperature) for x in logits]
        return [x / sum(powers) for x in powers]

    p, q = shares(teacher), shares(student)
    return temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def slow_nats(logits, label):
    return math.log(sum(math.exp(x) for x in logits)) - logits[label]


@pytest.mark.parametrize("temperature", [1.0, 2.0, 7.5])
def test_soft_loss_and_its_gradient(temperature):
    student = torch.randn(4, 3, generator=GENERATOR).requires_grad_()
    teacher = torch.randn(4, 3, generator=GENERATOR) * 2
    loss = soft_loss(student, teacher, temperature)
    rows = zip(teacher.tolist(), student.tolist(), strict=True)
    expected = torch.tensor([slow_kl(t, s, temperature) for t, s in rows])
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    loss.sum().backward()
    # Hinton et al., equation 2, times T^2
    shares = (teacher / temperature).softmax(-1), (student.detach() / temperature).softmax(-1)
    torch.testing.assert_close(student.grad, temperature * (shares[1] - shares[0]))
    assert soft_loss(teacher, teacher, temperature).abs().max() == 0


@pytest.mark.parametrize("label", [LABELS, UNKNOWN])
@pytest.mark.parametrize("name", ["classification", "tagging"])
def test_labels_and_teacher_are_mixed_item_by_item(name, label):
    distilled = pair(name, alpha=0.3, temperature=3.0)
    student, teacher = output_of(distilled.student, name), output_of(distilled.teacher, name)
    found = torch.ones(3) if name == "classification" else WORDS >= 0
    places = [tuple(place) for place in found.nonzero().tolist()]
    total, labels, softs = 0.0, 0.0, 0.0
    for place in places:
        own, other, answer = student[place].tolist(), teacher[place].tolist(), label[name][place]
        soft = slow_kl(other, own, 3.0)
        softs += soft
        if answer == -100:
            total += soft
        else:
            nats = slow_nats(own, int(answer))
            labels += nats
            total += 0.7 * nats + 0.3 * soft
    output = distilled.loss(batch_of(name, label), GENERATOR)
    count = len(places)
    assert int(output.weight) == count
    assert float(output.loss.detach()) == pytest.approx(total / count, rel=1e-5)
    assert float(output.metrics["label_loss"].detach()) == pytest.approx(labels / count, rel=1e-5)
    assert float(output.metrics["soft_loss"].detach()) == pytest.approx(softs / count, rel=1e-5)


@pytest.mark.parametrize("label", [LABELS, UNKNOWN])
def test_regression_compares_values_in_the_unit_of_the_labels(label):
    distilled = pair("regression", alpha=0.3)
    own, other = (output_of(side, "regression") for side in (distilled.student, distilled.teacher))
    heads = distilled.student.head, distilled.teacher.head
    (mean, std), (their_mean, their_std) = ((float(h.mean), float(h.std)) for h in heads)
    assert mean != their_mean
    total = 0.0
    for mine, theirs, answer in zip(own.tolist(), other.tolist(), label["regression"], strict=True):
        value = mean + std * mine
        soft = ((value - (their_mean + their_std * theirs)) / std) ** 2
        hard = ((value - float(answer)) / std) ** 2
        total += soft if math.isnan(answer) else 0.7 * hard + 0.3 * soft
    output = distilled.loss(batch_of("regression", label), GENERATOR)
    assert float(output.loss.detach()) == pytest.approx(total / 3, rel=1e-5)
    output.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in distilled.student.parameters())


@pytest.mark.parametrize("name", MODULES)
def test_alpha_0_is_the_task_itself(name):
    distilled = pair(name, alpha=0.0)
    expected = distilled.student.loss(batch_of(name), GENERATOR)
    got = distilled.loss(batch_of(name), GENERATOR)
    torch.testing.assert_close(got.loss, expected.loss)
    assert int(got.weight) == int(expected.weight)


def test_hidden_loss_is_a_mean_over_real_positions():
    own = [torch.randn(3, 4, 5, generator=GENERATOR) for _ in range(2)]
    other = [torch.randn(3, 4, 5, generator=GENERATOR) for _ in range(2)]
    terms = [
        (float(a[row, column, i]) - float(b[row, column, i])) ** 2
        for a, b in zip(own, other, strict=True)
        for row in range(3)
        for column in range(4)
        for i in range(5)
        if MASK[row, column]
    ]
    assert float(hidden_loss(own, other, MASK)) == pytest.approx(sum(terms) / len(terms), rel=1e-6)


def test_attention_loss_is_a_mean_over_what_real_positions_see():
    student, teacher = build("classification"), build("classification", DEEP, 2)
    found = []
    for task in (student, teacher):
        with attention_scores(task.encoder, [0, 1]) as scores:
            task.encoder({"tokens": TOKENS, "mask": MASK})
        found.append([scores[0], scores[1]])
    numbers = [[scores.detach() for scores in side] for side in found]
    terms = [
        (float(a[row, head, query, read]) - float(b[row, head, query, read])) ** 2
        for a, b in zip(*numbers, strict=True)
        for row in range(3)
        for head in range(2)
        for query in range(4)
        for read in range(4)
        if MASK[row, query] and MASK[row, read]
    ]
    loss = attention_loss(*found, MASK)
    assert float(loss.detach()) == pytest.approx(sum(terms) / len(terms), rel=1e-5)
    loss.backward()
    assert student.encoder.layers[0].attention.qkv.weight.grad.isfinite().all()


def test_layer_losses_follow_the_uniform_map():
    assert layers_followed(12, 6) == (0, 2, 4, 6, 8, 10, 12)
    assert layers_followed(4, 4) == (0, 1, 2, 3, 4)
    assert layers_followed(4, 1) == (0, 4)
    distilled = pair("classification", alpha=0.0, hidden_weight=0.5, attention_weight=0.25)
    batch = batch_of("classification")
    with attention_scores(distilled.student.encoder, range(2)) as own_scores:
        own = distilled.student.encoder(batch).hidden
    with attention_scores(distilled.teacher.encoder, range(4)) as scores:
        others = distilled.teacher.encoder(batch).hidden
    hidden = hidden_loss(own, [others[0], others[2], others[4]], MASK)
    attention = attention_loss([own_scores[0], own_scores[1]], [scores[1], scores[3]], MASK)
    label = distilled.student.loss(batch, GENERATOR).loss
    output = distilled.loss(batch, GENERATOR)
    torch.testing.assert_close(output.metrics["hidden_loss"], hidden)
    torch.testing.assert_close(output.metrics["attention_loss"], attention)
    torch.testing.assert_close(output.loss, label + 0.5 * hidden + 0.25 * attention)


def test_only_the_student_is_trained_and_kept():
    distilled = pair("tagging", replace(SMALL, dim=4), hidden_weight=1.0, attention_weight=1.0)
    before = {k: v.clone() for k, v in distilled.teacher.state_dict().items()}
    distilled.train()
    assert distilled.student.training
    assert not distilled.teacher.training
    assert not any(part.training for part in distilled.teacher.modules())
    optimizer = torch.optim.AdamW([p for p in distilled.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = distilled.loss(batch_of("tagging"), GENERATOR).loss
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.grad is None for p in distilled.teacher.parameters())
    for name, value in distilled.teacher.state_dict().items():
        assert torch.equal(value, before[name])
    assert distilled.projection.weight.grad.abs().max() > 0  # widths 4 and 8
    assert distilled.projection.weight.shape == (8, 4)
    assert {name.partition(".")[0] for name in distilled.state_dict()} == {
        *("student", "teacher", "projection"),
    }
    expected = distilled.student.predict(batch_of("tagging"))
    assert torch.equal(distilled.predict(batch_of("tagging")).values, expected.values)


@pytest.mark.parametrize("name", MODULES)
def test_loss_is_a_mean_over_its_items(name):
    distilled, batch = pair(name), batch_of(name, UNKNOWN)
    parts = [{k: v[rows] for k, v in batch.items()} for rows in (slice(0, 1), slice(1, 3))]
    outputs = [distilled.loss(part, GENERATOR) for part in parts]
    whole = distilled.loss(batch, GENERATOR)
    total = sum(float(o.loss.detach()) * int(o.weight) for o in outputs)
    assert sum(int(o.weight) for o in outputs) == int(whole.weight)
    assert float(whole.loss.detach()) == pytest.approx(total / int(whole.weight), rel=1e-5)


@pytest.mark.parametrize(
    ("student", "teacher", "config", "message"),
    [
        (build("tagging"), build("classification"), {}, "a tagging student cannot learn from a c"),
        (
            *(build("classification", names=("a", "b")), build("classification"), {}),
            "the teacher knows a, b, c, the student a, b",
        ),
        (
            *(build("classification", DEEP), build("classification"), {"hidden_weight": 1.0}),
            "4 layers cannot follow 2",
        ),
        (
            build("classification", replace(SMALL, heads=4)),
            *(build("classification"), {"attention_weight": 1.0}),
            r"the student has \[4\], the teacher \[2\]",
        ),
    ],
)
def test_who_cannot_learn_from_whom(student, teacher, config, message):
    with pytest.raises(ConfigError, match=message):
        Distillation(Config(**config), student, teacher)


@pytest.mark.parametrize(
    "config",
    [{"alpha": 1.5}, {"temperature": 0.0}, {"hidden_weight": -1.0}, {"attention_weight": -1.0}],
)
def test_numbers_out_of_range(config):
    with pytest.raises(ValueError, match=next(iter(config))):
        Config(**config)
