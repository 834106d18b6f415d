"""Early exit: who leaves where against a loop over single examples, losses, stages, saved runs."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import selfsup
from selfsup.batch import Vocabulary
from selfsup.errors import ConfigError
from selfsup.models import transformer
from selfsup.models.bag import BagEncoder
from selfsup.models.bag import Config as BagConfig
from selfsup.models.encoder import masked_mean
from selfsup.models.transformer import TransformerEncoder
from selfsup.models.view import Prefix, repacked
from selfsup.randomness import isolated, seed_layers, torch_generator
from selfsup.registry import TASKS, module_of
from selfsup.tasks import classification, regression
from selfsup.tasks.exits import Config, Exits, distillation_loss, entropy, joint_loss
from selfsup.tuning.layer_mix import MixedEncoder

LAYERS, SIZE = 5, 40
SHAPE = {"dim": 16, "layers": LAYERS, "heads": 2, "dropout": 0.0, "init_std": 0.25}
KINDS = {
    "rotary": {},
    "causal": {"causal": True, "positions": "learned"},
    "relative": {"positions": "relative", "norm_kind": "rms"},
    "post": {"norm": "post", "positions": "learned", "share_layers": True},
}
RULES = {
    "entropy": Config(training="joint", rule="entropy", threshold=0.55),
    "speed": Config(training="joint", rule="speed", threshold=0.6),
    "patience": Config(training="joint", rule="patience", patience=1),
    "calibrated": Config(training="joint", rule="calibrated"),
}
TUNED = ("prefix", "prompt")  # what a tuning puts before the items
GENERATOR = torch_generator(0, "loss")


def build(exits, module=classification, dropout=0.0, pooling="mean", **shape):
    """A task with random heads whose answers differ from layer to layer."""
    with isolated():
        seed_layers(0, "task")
        shape |= {"pooling": "bert"} if pooling == "encoder" else {}
        config = transformer.Config(**{**SHAPE, **shape})
        encoder = TransformerEncoder(config, Vocabulary(size=SIZE))
        task_class = {classification: classification.Classification}.get(
            module, regression.Regression
        )
        task = task_class(
            module.Config(exits=exits, dropout=dropout, pooling=pooling), encoder, ("a", "b", "c")
        )
        for name, parameter in task.named_parameters():
            if not name.startswith("encoder") and parameter.ndim == 2:
                nn.init.normal_(parameter, std=1.0 if name.startswith("head") else 0.5)
        if task.exits is not None:
            task.exits.thresholds.copy_(torch.tensor([0.2, 0.0, 0.9, 0.5]))
    return task.eval()


def rows(count, seed=0):
    generator = torch_generator(seed, "rows")
    lengths = torch.randint(2, 13, (count,), generator=generator).tolist()
    return [torch.randint(1, SIZE, (n,), generator=generator) for n in lengths]


def put_before(encoder, kind):
    """Three random slots: keys and values of every layer, or vectors."""
    generator = torch_generator(3, kind)
    if kind == "prompt":
        slots = torch.randn(3, 16, generator=generator)
        front = torch.ones(1, 3, dtype=torch.bool)

        def prompt(vectors, real):
            real = real if real is None else torch.cat((front.expand(len(real), -1), real), 1)
            return torch.cat((slots.expand(len(vectors), -1, -1), vectors), 1), real

        encoder.prompt = prompt
        return
    keys = torch.randn(LAYERS, 2, 1, 2, 3, 8, generator=generator)

    def prefix(count):
        layers = [tuple(part.expand(count, -1, -1, -1) for part in layer) for layer in keys]
        return Prefix(layers, None, None)

    encoder.prefix = prefix


def padded(tokens, side="right"):
    longest = max(map(len, tokens))
    batch = torch.full((len(tokens), longest), 7)
    mask = torch.zeros(len(tokens), longest, dtype=torch.bool)
    for number, row in enumerate(tokens):
        place = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        batch[number, place], mask[number, place] = row, True
    return {"tokens": batch} if mask.all() else {"tokens": batch, "mask": mask}


def slow(task, hidden):
    """The answer to one example and the layer behind which it leaves, from all layers at once."""
    config, before, streak = task.exits.config, None, 0
    for exit_, head in enumerate(task.exits.heads):
        answer = head(hidden[exit_ + 1].mean(1))[0].double()
        shares = answer.softmax(0).tolist()
        unsure = -sum(p * math.log(p) for p in shares)
        if before is not None:
            streak = streak + 1 if before.argmax() == answer.argmax() else 0
        before = answer
        limit = {
            "entropy": config.threshold,
            "speed": config.threshold * math.log(len(shares)),
            "calibrated": float(task.exits.thresholds[exit_]) * math.log(len(shares)),
            "patience": -1.0,
        }[config.rule]
        if unsure < limit or (config.rule == "patience" and streak >= config.patience):
            return answer, exit_ + 1
    return task.head(hidden[-1].mean(1))[0].double(), LAYERS


@torch.no_grad()
def spread(task, hidden):
    """Takes away what all answers of a head share, and lets a third of them leave at an exit."""
    for number, head in enumerate(task.exits.heads):
        vectors = torch.cat([layers[number + 1].mean(1) for layers in hidden])
        head[-1].bias -= head(vectors).mean(0)
        unsure = entropy(head(vectors)) / math.log(3)
        task.exits.thresholds[number] = unsure.sort().values[len(hidden) // 3 :][:2].mean()


def leave(task, tokens, size, side="right"):
    """Answers and layers in batches of `size`."""
    with torch.no_grad():
        found = [
            task.exits.leave(task.encoder, padded(tokens[i : i + size], side), task.head)
            for i in range(0, len(tokens), size)
        ]
    return torch.cat([a for a, _ in found]), torch.cat([n for _, n in found])


@torch.no_grad()
@pytest.mark.parametrize("kind", [*KINDS, *TUNED])
@pytest.mark.parametrize("rule", RULES)
def test_a_batch_leaves_as_its_examples_do_alone(rule, kind):
    task, tokens = build(RULES[rule], **KINDS.get(kind, {})), rows(14)
    if kind in TUNED:
        put_before(task.encoder, kind)
    hidden = [task.encoder({"tokens": row[None]}).hidden for row in tokens]
    spread(task, hidden)
    expected = [slow(task, layers) for layers in hidden]
    layers = [layer for _, layer in expected]
    assert len(set(layers)) > 1  # or there is nothing to see
    for size, side in ((1, "right"), (5, "left"), (14, "right")):
        answers, left = leave(task, tokens, size, side)
        assert left.tolist() == layers
        slow_answers = torch.stack([answer for answer, _ in expected])
        torch.testing.assert_close(answers.double(), slow_answers, rtol=0, atol=1e-5)
    predicted = task.predict(padded(tokens))
    assert predicted.values.tolist() == [int(answer.argmax()) for answer, _ in expected]
    torch.testing.assert_close(predicted.scores.sum(1), torch.ones(14))


class Says(nn.Module):
    """A head that says this class of every example."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def forward(self, vectors):
        return torch.eye(3)[self.number].expand(len(vectors), -1)


@pytest.mark.parametrize(
    ("said", "patience", "layer"),
    [
        ((0, 1, 1, 1), 2, 4),
        ((1, 1, 1, 0), 2, 3),
        ((1, 1, 0, 0), 2, 5),
        ((1, 1, 0, 0), 1, 2),
        ((2, 2, 2, 2), 3, 4),
        ((0, 1, 0, 1), 1, 5),
    ],
)
def test_patience_counts_repetitions_in_a_row(said, patience, layer):
    task = build(Config(training="joint", rule="patience", patience=patience))
    task.exits.heads = nn.ModuleList(map(Says, said))
    answers, layers = leave(task, rows(3), 3)
    assert layers.tolist() == [layer] * 3
    if layer < LAYERS:
        assert answers.argmax(1).tolist() == [said[layer - 1]] * 3


@pytest.mark.parametrize("pooling", ["mean", "cls", "encoder"])
def test_the_last_answer_is_the_full_models(pooling):
    """Through the loop, which a threshold that nobody reaches does not leave."""
    tiny = Config(training="joint", rule="entropy", threshold=1e-30)
    task, plain = build(tiny, pooling=pooling), build(Config(), pooling=pooling)
    found = plain.load_state_dict(task.state_dict(), strict=False)
    assert all(key.startswith("exits.") for key in found.unexpected_keys)
    assert not found.missing_keys
    batch = padded(rows(9))
    answers, layers = task.exits.leave(task.encoder, batch, task.head)
    assert layers.tolist() == [LAYERS] * 9
    assert torch.equal(answers, plain.read(plain.encoder(batch)))
    scores = task.predict(batch).scores, plain.predict(batch).scores
    torch.testing.assert_close(*scores, rtol=0, atol=1e-6)  # another order of sums


@pytest.mark.parametrize(
    "never",
    [
        Config(training="joint"),  # calibrated, and never was
        Config(training="joint", rule="entropy"),
        Config(training="joint", rule="speed"),
        Config(training="joint", rule="patience"),
        Config(training="joint", rule="patience", patience=LAYERS - 1),  # more than exits can give
    ],
)
def test_threshold_zero_is_the_full_model_bit_by_bit(never):
    task, batch = build(never), padded(rows(9))
    task.exits.thresholds.zero_()
    plain = build(Config())
    plain.load_state_dict(task.state_dict(), strict=False)
    answers, layers = task.exits.leave(task.encoder, batch, task.head)
    assert layers.tolist() == [LAYERS] * 9
    assert torch.equal(answers, plain.read(plain.encoder(batch)))


def test_only_the_heads_that_are_asked_compute():
    task, asked = build(RULES["calibrated"]), []
    for number, head in enumerate(task.exits.heads):
        head.register_forward_hook(lambda *_, number=number: asked.append(number))
    task.encoder.layers[4].register_forward_hook(lambda *_: asked.append("last layer"))
    task.exits.thresholds.copy_(torch.tensor([0.0, 0.0, 1.1, 0.5]))
    _, layers = leave(task, rows(4), 4)
    assert asked == [2]  # all leave there
    assert layers.tolist() == [3] * 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_repacked_rows_go_on_as_in_their_batch(kind, side):
    encoder = build(Config(), **KINDS[kind]).encoder
    batch = padded(sorted(rows(8), key=len), side)
    stay = torch.tensor([0, 2, 3])
    x, view, mask = encoder.begin(batch)
    x, _ = encoder.step(x, view, 0)
    whole, _ = encoder.step(x, view, 1)
    fewer, fewer_view, fewer_mask = repacked(x, view, mask, stay)
    longest = int(mask[stay].sum(1).max())
    assert fewer.shape[1] == (longest if side == "right" else mask.shape[1])
    got, _ = encoder.step(fewer, fewer_view, 1)
    assert torch.equal(fewer_mask, mask[stay][:, : fewer.shape[1]])
    torch.testing.assert_close(
        got[fewer_mask], whole[stay][:, : fewer.shape[1]][fewer_mask], rtol=0, atol=1e-5
    )
    alone, alone_view, _ = repacked(fewer, fewer_view, fewer_mask, torch.tensor([2]))
    got, _ = encoder.step(alone, alone_view, 1)
    time = slice(-got.shape[1], None) if side == "left" else slice(got.shape[1])
    real = mask[3][time]
    torch.testing.assert_close(got[0][real], whole[3][time][real], rtol=0, atol=1e-5)


def test_documents_stay_apart_when_rows_are_repacked():
    encoder = build(Config()).encoder
    batch = {
        "tokens": torch.stack([row[:2].repeat(3) for row in rows(3)]),
        "documents": torch.tensor([[0, 0, 0, 1, 1, 1]] * 3),
    }
    x, view, mask = encoder.begin(batch)
    whole, _ = encoder.step(x, view, 0)
    fewer, fewer_view, _ = repacked(x, view, mask, torch.tensor([1]))
    got, _ = encoder.step(fewer, fewer_view, 0)
    torch.testing.assert_close(got[0], whole[1], rtol=0, atol=1e-5)


# Numbers


def test_the_patience_of_a_regression_counts_close_answers():
    exits = Config(training="joint", rule="patience", patience=1, threshold=0.5)
    task, tokens = build(exits, module=regression), rows(14)
    task.head.mean.fill_(10.0)
    task.head.std.fill_(3.0)
    values, layers = [], []
    for row in tokens:
        hidden = task.encoder({"tokens": row[None]}).hidden
        numbers = [h(x.mean(1)).item() for h, x in zip(task.exits.heads, hidden[1:-1], strict=True)]
        close = [abs(b - a) < 0.5 for a, b in zip(numbers, numbers[1:], strict=False)]
        last = task.head(hidden[-1].mean(1)).item()
        found = close.index(True) + 1 if True in close else None
        values.append(10 + 3 * (last if found is None else numbers[found]))
        layers.append(LAYERS if found is None else found + 1)
    assert len(set(layers)) > 2
    for size in (1, 14):
        with torch.no_grad():
            parts = [padded(tokens[i : i + size]) for i in range(0, 14, size)]
            found = [task.exits.leave(task.encoder, part, task.head.linear)[1] for part in parts]
            assert torch.cat(found).tolist() == layers
            got = torch.cat([task.predict(part).values for part in parts])
        assert got.tolist() == pytest.approx(values, abs=1e-4)


# Losses


def test_joint_loss_weighs_by_the_layers_number():
    losses = torch.tensor([0.7, 2.0, 0.25], dtype=torch.float64)
    assert float(joint_loss(list(losses))) == pytest.approx((0.7 + 2 * 2.0 + 3 * 0.25) / 6)


def test_distillation_loss_and_entropy_equal_loops():
    student, teacher = torch.randn(2, 4, 3, generator=torch_generator(0, "answers")) * 3
    total, entropies = 0.0, []
    for s, t in zip(student.double().tolist(), teacher.double().tolist(), strict=True):
        p = [math.exp(x) / sum(map(math.exp, s)) for x in s]
        q = [math.exp(x) / sum(map(math.exp, t)) for x in t]
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        entropies.append(-sum(a * math.log(a) for a in p))
    assert float(distillation_loss(student, teacher)) == pytest.approx(total / 4, rel=1e-5)
    assert entropy(student).tolist() == pytest.approx(entropies, rel=1e-5)
    assert entropy(torch.tensor([[1000.0, 0.0]])).item() == 0.0


def labelled(count=6):
    return {**padded(rows(count)), "label": torch.arange(count) % 3}


def gradients(task, batch):
    task.zero_grad(set_to_none=True)
    output = task.loss(batch, GENERATOR)
    output.loss.backward()
    names = {n for n, p in task.named_parameters() if p.grad is not None and p.grad.any()}
    return output, {name.partition(".")[0] for name in names}


def cross_entropies(task, batch):
    """The loss of every head, by a loop over examples in float64."""
    features, out = task.encoder(batch), []
    for layer, head in enumerate([*task.exits.heads, task.head], 1):
        logits = head(masked_mean(features.hidden[layer], features.mask)).double()
        out.append(
            sum(
                math.log(sum(map(math.exp, row))) - row[label]
                for row, label in zip(logits.tolist(), batch["label"].tolist(), strict=True)
            )
            / len(logits)
        )
    return out


def test_the_joint_loss_of_a_task_trains_everything():
    task, batch = build(RULES["patience"]).train(), labelled()
    output, trained = gradients(task, batch)
    assert trained == {"encoder", "head", "exits"}
    losses = cross_entropies(task, batch)
    expected = sum(n * loss for n, loss in enumerate(losses, 1)) / 15
    assert float(output.loss.detach()) == pytest.approx(expected, rel=1e-5)
    right = task.read(task.encoder(batch)).argmax(1) == batch["label"]
    assert float(output.metrics["accuracy"]) == pytest.approx(float(right.float().mean()))


@pytest.mark.parametrize("training", ["two_stage", "distilled"])
def test_two_stages(training):
    task, batch = build(Config(training=training), dropout=0.4).train(), labelled()
    output, trained = gradients(task, batch)
    assert trained == {"encoder", "head"}
    for step in range(4):
        task.after_step(step, 10)
        assert not task.exits.frozen
    task.after_step(4, 10)  # five of ten steps are done
    assert task.exits.frozen
    kept = {name: value.clone() for name, value in task.state_dict().items()}
    _, trained = gradients(task, batch)
    assert trained == {"exits"}
    assert not task.encoder.training
    assert task.exits.training
    task.exits.dropout.p = 0.0
    output, _ = gradients(task.train(), batch)
    task.eval()
    early = cross_entropies(task, batch)[:-1]
    if training == "distilled":
        features = task.encoder(batch)
        *answers, teacher = task.exits.every(task.encoder, features, task.head)
        early = [distillation_loss(answer, teacher).item() for answer in answers]
    assert float(output.loss.detach()) == pytest.approx(sum(early), rel=1e-5)
    optimizer = torch.optim.AdamW(task.parameters(), lr=0.1, weight_decay=0.1)
    gradients(task.train(), batch)
    optimizer.step()
    for name, value in task.state_dict().items():
        moved = name.startswith("exits.heads")
        assert torch.equal(value, kept[name]) != moved, name
    expected = sum(n * loss for n, loss in enumerate(cross_entropies(task.eval(), batch), 1)) / 15
    assert float(task.loss(batch, GENERATOR).loss.detach()) == pytest.approx(expected, rel=1e-5)


def test_the_second_stage_goes_on_after_a_checkpoint():
    task, other = (build(Config(training="two_stage")) for _ in range(2))
    task.after_step(9, 10)
    other.load_state_dict(task.state_dict())
    assert gradients(other.train(), labelled())[1] == {"exits"}


def test_the_loss_of_a_regression():
    task = build(Config(training="joint", rule="patience"), module=regression).train()
    batch = {**padded(rows(4)), "label": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    task.fit_labels(batch["label"].tolist())
    features, losses = task.encoder(batch), []
    target = (batch["label"] - 2.5) / math.sqrt(1.25)
    for layer, head in enumerate([*task.exits.heads, task.head.linear], 1):
        answer = head(masked_mean(features.hidden[layer], features.mask))[:, 0]
        losses.append(((answer - target).double() ** 2).mean().item())
    expected = sum(n * loss for n, loss in enumerate(losses, 1)) / 15
    output, trained = gradients(task, batch)
    assert float(output.loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert trained == {"encoder", "head", "exits"}


# Runs


def test_a_run_with_exits_is_trained_saved_and_loaded(corpus, tmp_path):
    shape = {"model.layers": 3, "training.steps": 3, "model.dim": 16}
    base = selfsup.pretrain(corpus.masked, corpus.text, tmp_path / "base", shape)
    settings = {
        "task.exits.training": "two_stage",
        "task.exits.rule": "speed",
        "task.exits.threshold": 0.9999,
        "training.steps": 30,
        "training.lr": 1e-2,
    }
    out = tmp_path / "tuned"
    run = selfsup.finetune(base, "classification", corpus.labelled, out, settings=settings)
    first, second = selfsup.load(run), selfsup.load(run)
    assert first.objective.exits.config == Config(
        training="two_stage", rule="speed", threshold=0.9999
    )
    assert first.objective.exits.frozen
    assert first.objective.exits.heads[0][-1].weight.abs().max() > 0.05  # it has learned
    texts = ["the film was dull .", "a wonderful trip", "the book was lovely and bright ."]
    shares = [model.predict_proba(texts) for model in (first, second)]
    for one, two in zip(*shares, strict=True):
        assert one.tolist() == two.tolist()
    first.objective.exits.config = replace(first.objective.exits.config, threshold=0.0)
    full = first.predict_proba(texts)
    assert any(abs(one - two).max() > 1e-6 for one, two in zip(full, shares[0], strict=True))
    assert selfsup.evaluate(run, corpus.test)["examples"] == 40


# Bad input


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"threshold": -0.1}, "exits.threshold must not be negative, got -0.1"),
        ({"threshold": math.nan}, "exits.threshold must not be negative, got nan"),
        ({"patience": -1}, "exits.patience must not be negative"),
        ({"tolerance": -1.0}, "exits.tolerance must not be negative"),
        ({"rule": "speed", "threshold": 1.5}, "at most 1, got 1.5"),
        ({"rule": "confidence"}, "task.exits.rule = 'confidence' is not allowed"),
        ({"trainin": "joint"}, "unknown key task.exits.trainin.*training"),
    ],
)
def test_bad_settings(keys, message):
    from selfsup.config import from_mapping

    module = module_of(TASKS, "task", "classification")
    with pytest.raises(ConfigError, match=message):
        from_mapping(module.Config, {"exits": keys}, "task")


@pytest.mark.parametrize("keys", [{"rule": "entropy"}, {"training": "distilled"}])
def test_a_regression_has_patience_alone(keys):
    from selfsup.config import from_mapping

    assert from_mapping(regression.Config, {"exits": {"training": "joint"}}, "task")
    with pytest.raises(ConfigError, match="numbers have no entropy"):
        from_mapping(regression.Config, {"exits": keys}, "task")


def test_encoders_without_layers_to_leave_from():
    config = classification.Config(exits=Config(training="joint"))
    encoders = (
        BagEncoder(BagConfig(dim=8), Vocabulary(size=SIZE)),
        TransformerEncoder(transformer.Config(dim=8, heads=2, layers=1), Vocabulary(size=SIZE)),
    )
    for encoder in encoders:
        with pytest.raises(ConfigError, match="'transformer' with at least 2 layers"):
            classification.Classification(config, encoder, ("a", "b"))
    task = build(RULES["patience"])
    task.encoder = MixedEncoder(task.encoder)
    with pytest.raises(ConfigError, match="puts another encoder around it"):
        task.predict(padded(rows(2)))
    with pytest.raises(ConfigError, match="puts another encoder around it"):
        task.loss(labelled(), GENERATOR)


def test_without_exits_nothing_is_added():
    task = build(Config())
    assert task.exits is None
    assert not any(key.startswith("exits") for key in task.state_dict())
    assert not any(isinstance(module, Exits) for module in task.modules())
