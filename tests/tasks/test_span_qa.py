import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from selfsup.data.labelled_spans import LabelledSpans
from selfsup.data.labels import Labelled
from selfsup.data.span_files import Answer
from selfsup.data.text_preprocessor import TextPreprocessor
from selfsup.data.tokenizer import Tokenizer, TokenizerConfig
from selfsup.errors import ConfigError
from selfsup.evaluation.adapt import answers, num_rows
from selfsup.evaluation.metrics import METRICS
from selfsup.model_folder import load_model
from selfsup.models.encoder import Encoder, Features
from selfsup.models.transformer import Config as TransformerConfig
from selfsup.models.transformer import TransformerEncoder
from selfsup.randomness import torch_generator
from selfsup.tasks.span_qa import Config, SpanQA, best_spans, document_tokens, span_loss

GENERATOR = torch_generator(0, "test")


class ToyEncoder(Encoder):
    """One vector per token, its context none, and dropout."""

    def __init__(self, dim=8, vocabulary=64):
        super().__init__()
        self.dim, self.num_layers = dim, 1
        self.tokens, self.dropout = nn.Embedding(vocabulary, dim), nn.Dropout(0.5)
        nn.init.normal_(self.tokens.weight, generator=torch_generator(0, "toy"))

    def forward(self, batch):
        tokens = batch["tokens"]
        x = self.dropout(self.tokens(tokens))
        mask = batch.get("mask", torch.ones_like(tokens, dtype=torch.bool))
        return Features((x, x), mask, x[:, 0])


def build(**options):
    task = SpanQA(Config(**options), ToyEncoder())
    for parameter in task.head.parameters():
        nn.init.normal_(parameter, generator=torch_generator(1, "head"))
    return task.eval()


def batch_of():
    """[CLS] q [SEP] d d d [SEP], and [CLS] q q [SEP] d [SEP] with padding."""
    tokens = torch.randint(1, 64, (2, 7), generator=torch_generator(2, "batch"))
    segments = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1, 0]])
    mask = torch.tensor([[True] * 7, [True] * 6 + [False]])
    label = torch.tensor([[3, 5], [0, 0]])
    return {"tokens": tokens.where(mask, 0), "segments": segments, "mask": mask, "label": label}


def wider(batch, by=4):
    fill = {"tokens": 7, "segments": 0, "mask": 0}
    padded = {k: nn.functional.pad(batch[k], (0, by), value=v) for k, v in fill.items()}
    return {**batch, **padded}


# Loss


def test_the_document_is_what_may_answer():
    expected = [[0, 0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 1, 0, 0]]
    assert document_tokens(batch_of()).int().tolist() == expected
    assert document_tokens(wider(batch_of()))[:, :7].int().tolist() == expected
    assert not document_tokens(wider(batch_of()))[:, 7:].any()


def test_loss_is_the_mean_of_both_cross_entropies_over_possible_places():
    task, batch = build(), batch_of()
    scores = task.head(task.encoder(batch).last).double().detach()
    possible = [[0, 3, 4, 5], [0, 4]]
    slow = []
    for row, places in enumerate(possible):
        for end in range(2):
            of_row = scores[row, :, end].tolist()
            total = math.log(sum(math.exp(of_row[place]) for place in places))
            slow.append(total - of_row[batch["label"][row, end]])
    output = task.loss(batch, GENERATOR)
    assert float(output.loss.detach()) == pytest.approx(sum(slow) / 4, rel=1e-5)
    assert output.weight == 2
    assert output.loss.dtype == torch.float32


def test_accuracy_needs_both_ends_and_unknown_answers_are_not_scored():
    probabilities = torch.tensor(
        [
            [[0.7, 0.1], [0.2, 0.2], [0.1, 0.7]],
            [[0.7, 0.1], [0.2, 0.2], [0.1, 0.7]],
            [[0.1, 0.1], [0.8, 0.1], [0.1, 0.8]],
        ]
    )
    label = torch.tensor([[0, 2], [1, 2], [-100, -100]])
    loss, accuracy, count = span_loss(probabilities.log(), label)
    nats = [0.7, 0.7, 0.2, 0.7]
    assert float(loss) == pytest.approx(-sum(map(math.log, nats)) / 4, rel=1e-6)
    assert (float(accuracy), int(count)) == (0.5, 2)
    nothing, accuracy, count = span_loss(probabilities.log(), torch.full((3, 2), -100))
    assert (float(nothing), float(accuracy), int(count)) == (0, 0, 0)


def test_gradient_is_finite_and_reaches_encoder_and_head():
    task = build().train()
    task.loss(batch_of(), GENERATOR).loss.backward()
    for parameter in (*task.head.parameters(), task.encoder.tokens.weight):
        assert parameter.grad.isfinite().all()
    assert task.head.weight.grad.abs().sum() > 0
    assert task.encoder.tokens.weight.grad.abs().sum() > 0


# Spans


@pytest.mark.parametrize("max_answer", [1, 2, 3, 30])
def test_the_best_legal_span_against_all_of_them(max_answer):
    generator = torch_generator(max_answer, "spans")
    scores = torch.randn(40, 9, 2, generator=generator, dtype=torch.float64)
    # documents that begin and end anywhere, of one token to all
    edges = torch.randint(0, 9, (40, 2), generator=generator).sort(1).values
    place = torch.arange(9)
    document = (place >= edges[:, :1]) & (place <= edges[:, 1:])
    spans, score = best_spans(scores, document, max_answer)
    for row in range(40):
        legal = [
            (float(scores[row, i, 0] + scores[row, j, 1]), [i, j])
            for i in range(edges[row, 0], edges[row, 1] + 1)
            for j in range(i, min(i + max_answer, int(edges[row, 1]) + 1))
        ]
        best, span = max(legal)
        assert spans[row].tolist() == span
        assert float(score[row]) == pytest.approx(best)


def test_predictions_are_spans_with_their_scores_and_that_of_no_answer():
    task, batch = build(max_answer=2), batch_of()
    scores = task.head(task.encoder(batch).last)
    values, found = task.predict(batch)
    for row, places in enumerate([[0, 3, 4, 5], [0, 4]]):
        shown = scores[row, places].log_softmax(0)
        first, last = values[row].tolist()
        at = places.index(first), places.index(last)
        assert 0 <= last - first < 2
        expected = [shown[at[0], 0] + shown[at[1], 1], shown[0].sum()]
        torch.testing.assert_close(found[row], torch.stack(expected))
    assert values[1].tolist() == [4, 4]


def test_padding_changes_nothing():
    task, batch = build(), batch_of()
    torch.testing.assert_close(task.predict(wider(batch)), task.predict(batch))
    torch.testing.assert_close(task.loss(wider(batch), GENERATOR), task.loss(batch, GENERATOR))


def test_predict_has_no_dropout_or_gradient_and_restores_the_mode():
    task, batch = build(dropout=0.5), batch_of()
    quiet = task.predict(batch)
    task.train()
    for _ in range(3):
        prediction = task.predict(batch)
        torch.testing.assert_close(prediction, quiet)
        assert not prediction.scores.requires_grad
    assert task.training
    assert task.encoder.dropout.training


def test_head_and_settings():
    task = SpanQA(Config(), ToyEncoder(dim=512))
    assert float(task.head.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert task.head.bias.abs().max() == 0
    assert (task.kept, task.metric, task.gives_text) == (("encoder", "head"), "answer_f1", True)
    for wrong in ({"dropout": 1.0}, {"max_answer": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must"):
            Config(**wrong)


# Learning

THINGS = ["ball", "cup", "hat", "key", "pen", "bag"]
PEOPLE = ["ann", "bob", "cat", "dan"]


def stories(count):
    """Who has what: (question, story), and the thing. Longer than a row of 24 tokens."""
    draw = np.random.Generator(np.random.PCG64(0))
    items, labels = [], []
    for _ in range(count):
        people, things = draw.permutation(PEOPLE), draw.permutation(THINGS)
        told = [f"{who} has the old {what} ." for who, what in zip(people, things, strict=False)]
        story, asked = " ".join(told), int(draw.integers(len(people)))
        items.append((f"what has {people[asked]} ?", story))
        labels.append([Answer(str(things[asked]), story.index(things[asked]))])
    return Labelled("span_qa", items, labels, (), "stories")


def test_a_tiny_model_learns_to_answer_over_several_windows():
    labelled = stories(12)
    texts = [text for item in labelled.items for text in item]
    tokenizer = Tokenizer.train(TokenizerConfig(vocab_size=100), texts * 5)
    data = LabelledSpans(labelled, tokenizer, 24)
    assert len(data) == 2 * len(labelled)
    assert num_rows(TextPreprocessor(tokenizer, 24), labelled) == len(data)
    assert num_rows(None, replace(labelled, task="generation")) == len(labelled)
    config = TransformerConfig(
        dim=32, layers=2, heads=2, dropout=0.0, embedding_std=1.0, init_std=0.18
    )
    torch.manual_seed(0)
    task = SpanQA(Config(dropout=0.0), TransformerEncoder(config, tokenizer.vocabulary))
    batch = data.batch(np.arange(len(data)))
    optimizer = torch.optim.Adam(task.parameters(), lr=5e-3)
    before = METRICS["exact_match"](*answers(task, data))
    for _ in range(60):
        optimizer.zero_grad()
        task.loss(batch, GENERATOR).loss.backward()
        optimizer.step()
    truth, guess = answers(task, data)
    assert truth == labelled.labels
    assert before < 0.5
    assert METRICS["exact_match"](truth, guess) > 0.9


# From files to answers


def squad_of(labelled):
    """Two stories an article."""
    articles = []
    for number in range(0, len(labelled), 2):
        paragraphs = [
            {
                "context": labelled.items[i][1],
                "qas": [
                    {
                        "id": str(i),
                        "question": labelled.items[i][0],
                        "answers": [
                            {"text": a.text, "answer_start": a.start} for a in labelled.labels[i]
                        ],
                    }
                ],
            }
            for i in (number, number + 1)
        ]
        articles.append({"title": f"story {number}", "paragraphs": paragraphs})
    return {"version": "1.1", "data": articles}


def test_finetune_evaluate_predict_compare(masked_run, selfsup, tmp_path):
    labelled = stories(40)
    train, new, run = tmp_path / "train.json", tmp_path / "new.jsonl", tmp_path / "run"
    train.write_text(json.dumps(squad_of(labelled)))
    found = selfsup(
        *("finetune", masked_run, "--task", "span_qa", "--data", train, "--valid", train),
        *("--out", run, "--max-length", 64, "--set", "training.steps=10"),
    )
    assert found.code == 0, found.err

    found = selfsup("evaluate", run, "--data", train)
    assert found.code == 0, found.err
    shown = dict(line.split("\t") for line in found.out.splitlines())
    assert list(shown) == ["examples", "exact_match", "answer_f1"]
    assert shown["examples"] == "40"

    items = labelled.items[:5]
    guess = load_model(run).predict(items)
    assert all(text and text in item[1] for text, item in zip(guess, items, strict=True))
    expected = METRICS["answer_f1"](labelled.labels, load_model(run).predict(labelled.items))
    assert float(shown["answer_f1"]) == pytest.approx(expected, abs=1e-5)
    assert load_model(run).predict([]) == []
    with pytest.raises(ConfigError, match="a span_qa model gives texts, not probabilities"):
        load_model(run).predict_proba(items)

    rows = [{"question": question, "context": context} for question, context in items]
    new.write_text("\n".join(map(json.dumps, rows)))
    found = selfsup("predict", run, "--data", new, "--text", "question", "--text-b", "context")
    assert found.code == 0, found.err
    assert [line.split("\t")[0] for line in found.out.splitlines()] == guess

    out = tmp_path / "compare.json"
    found = selfsup(
        *("compare", masked_run, "--task", "span_qa", "--data", train, "--labels", 10),
        *("--seeds", 0, "--lrs", 1e-3, "--steps", 2, "--max-length", 64, "--jobs", 1),
        *("--out", out),
    )
    assert found.code == 0, found.err
    result = json.loads(out.read_text())
    assert (result["metric"], result["unit"]) == ("answer_f1", "examples")
    assert set(result["arms"]) == {"pretrained", "scratch", "baseline"}
    assert list(tmp_path.glob("*embeddings*")) == []
