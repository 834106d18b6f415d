"""The task that writes: its loss, both kinds of models, a toy task learned, and the verbs."""

import copy
import math

import numpy as np
import pytest
import torch

from selfsup import api
from selfsup.batch import Vocabulary
from selfsup.cli import main
from selfsup.data.labelled_pairs import LabelledPairs
from selfsup.data.labels import Labelled
from selfsup.data.text_preprocessor import TextPreprocessor
from selfsup.data.tokenizer import Tokenizer, TokenizerConfig
from selfsup.errors import ConfigError
from selfsup.evaluation.adapt import answers, default_training, fit, new_task
from selfsup.models import encoder_decoder, transformer
from selfsup.models.encoder_decoder import EncoderDecoder
from selfsup.models.transformer import TransformerEncoder
from selfsup.randomness import isolated, numpy_generator, seed_layers, torch_generator
from selfsup.tasks.generation import Config, Generation, generation_loss
from selfsup.training.config import TrainingConfig

SIZE, PAD, END = 30, 0, 1
VOCABULARY = Vocabulary(size=SIZE, pad=PAD, sep=END)
SHAPE = {"dim": 32, "heads": 2, "dropout": 0.0, "init_std": 0.1}
KINDS = ["encoder_decoder", "causal"]
GENERATOR = torch_generator(0, "test")


def encoder_of(kind: str, vocabulary=VOCABULARY, layers=2, **more):
    with isolated():
        seed_layers(0, "model")
        if kind == "causal":
            return TransformerEncoder(
                transformer.Config(**SHAPE, layers=layers, causal=True, **more), vocabulary
            )
        return EncoderDecoder(encoder_decoder.Config(**SHAPE, layers=layers, **more), vocabulary)


def build(kind: str, **config) -> Generation:
    return Generation(Config(**config), encoder_of(kind)).eval()


def batch() -> dict[str, torch.Tensor]:
    generator = torch_generator(1, "batch")
    tokens = torch.randint(3, SIZE, (3, 6), generator=generator)
    mask = torch.arange(6) < torch.tensor([[6], [3], [5]])
    label = torch.randint(3, SIZE, (3, 4), generator=generator)
    for row, length in enumerate((2, 4, 3)):
        label[row, length - 1], label[row, length:] = END, -100
    return {"tokens": tokens.where(mask, PAD), "mask": mask, "label": label}


def test_loss_against_loops():
    logits = torch.randn(5, 7, generator=GENERATOR) * 3
    target = torch.tensor([0, 6, 3, 3, 1])
    loss, nats, accuracy = generation_loss(logits.bfloat16(), target, 0.2)
    slow, plain = [], []
    for row, right in zip(logits.bfloat16().double().tolist(), target.tolist(), strict=True):
        total = math.log(sum(math.exp(x) for x in row))
        wanted = [0.8 * (i == right) + 0.2 / 7 for i in range(7)]
        slow.append(sum(w * (total - x) for w, x in zip(wanted, row, strict=True)))
        plain.append(total - row[right])
    assert float(loss) == pytest.approx(sum(slow) / 5, rel=1e-5)
    assert float(nats) == pytest.approx(sum(plain) / 5, rel=1e-5)
    assert float(accuracy) == pytest.approx(
        float((logits.bfloat16().argmax(-1) == target).float().mean())
    )


@pytest.mark.parametrize("kind", KINDS)
def test_each_token_is_told_from_the_source_and_the_ones_before(kind):
    """One row at a time, one token at a time, nothing padded."""
    task, given = build(kind), batch()
    nats = []
    for source, mask, label in zip(given["tokens"], given["mask"], given["label"], strict=True):
        source, label = source[mask].unsqueeze(0), label[label != -100]
        for place, right in enumerate(label):
            before = label[:place].unsqueeze(0)
            if kind == "causal":
                hidden = task.encoder({"tokens": torch.cat((source, before), 1)}).last
                logits = hidden @ task.encoder.embedding.tokens.weight.T
            else:
                written = torch.cat((torch.tensor([[END]]), before), 1)
                read = task.encoder({"tokens": source})
                logits = task.encoder.logits(task.encoder.decode(written, read).last)
            nats.append(-float(logits[0, -1].log_softmax(-1)[right].detach()))
    output = task.loss(given, GENERATOR)
    assert output.weight == len(nats) == 9
    assert float(output.metrics["nats"]) == pytest.approx(sum(nats) / 9, rel=1e-5)
    plain = Generation(Config(label_smoothing=0.0), task.encoder).loss(given, GENERATOR)
    assert float(plain.loss.detach()) == pytest.approx(sum(nats) / 9, rel=1e-5)
    assert float(output.loss.detach()) != pytest.approx(sum(nats) / 9, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_beams", [1, 3])
def test_padding_changes_nothing(kind, num_beams):
    task, given = build(kind, num_beams=num_beams, max_target=8), batch()
    fill = {"tokens": 7, "mask": 0, "label": -100}
    wider = {
        name: torch.nn.functional.pad(value, (0, 3), value=fill[name])
        for name, value in given.items()
    }
    torch.testing.assert_close(task.loss(wider, GENERATOR), task.loss(given, GENERATOR))
    written = task.predict(given).values
    assert written.shape == (3, 8)
    assert torch.equal(task.predict(wider).values, written)
    for row in range(3):
        alone = {"tokens": given["tokens"][row, given["mask"][row]].unsqueeze(0)}
        assert torch.equal(task.predict(alone).values[0], written[row])


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_reaches_every_weight(kind):
    task = build(kind).train()
    task.loss(batch(), GENERATOR).loss.backward()
    for name, parameter in task.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_predict_has_no_dropout_and_restores_the_mode():
    encoder = encoder_of("encoder_decoder", attention_dropout=0.5)
    task = Generation(Config(max_target=6), encoder).train()
    first = task.predict(batch()).values
    assert task.training
    assert torch.equal(task.predict(batch()).values, first)


def test_models_that_do_not_write_are_refused():
    bidirectional = TransformerEncoder(transformer.Config(**SHAPE), VOCABULARY)
    with pytest.raises(ConfigError, match="needs a model that writes"):
        Generation(Config(), bidirectional)
    short = encoder_of("encoder_decoder", positions="learned", max_length=20)
    with pytest.raises(ConfigError, match="set it to at most 20"):
        Generation(Config(), short)
    for name in ("probe", "layer_mix"):
        with pytest.raises(ConfigError, match="no head beside the encoder"):
            new_task(encoder_of("causal"), "generation", Config(), toy(2), tuning=name, seed=0)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"max_target": 2}, "max_target"),
        ({"num_beams": 0}, "num_beams"),
        ({"no_repeat": -1}, "no_repeat"),
    ],
)
def test_bad_settings_are_refused(values, said):
    with pytest.raises(ValueError, match=said):
        Config(**values)


def test_steps_grow_with_the_pairs_up_to_a_cap():
    assert default_training(100, 128, "generation").steps == 200
    assert default_training(6400, 128, "generation").steps == 1000
    assert default_training(10**6, 128, "generation").steps == 10_000
    assert default_training(6400, 128).steps == 2000


# Learning


def toy(count: int, seed: int = 0) -> Labelled:
    """Words to be written backwards."""
    generator = numpy_generator(seed, "toy")
    lengths = generator.integers(2, 5, count)
    words = ["".join(generator.choice(list("abcd"), length)) for length in lengths]
    return Labelled("generation", words, [word[::-1] for word in words], (), "toy")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    config = TokenizerConfig(kind="character", vocab_size=32, style="gpt")
    return Tokenizer.train(config, toy(50).items)


@pytest.mark.parametrize("kind", KINDS)
def test_words_are_learned_backwards(kind, tokenizer):
    layers, steps, least = (2, 250, 0.8) if kind == "causal" else (1, 150, 0.9)
    places = {"positions": "learned", "max_length": 24, "embedding_std": 1.0}
    encoder = encoder_of(kind, tokenizer.vocabulary, layers, **places)
    config = Config(max_target=8, num_beams=2, label_smoothing=0.0)
    task = new_task(encoder, "generation", config, toy(1), tuning="full", seed=0)
    training = TrainingConfig(steps=steps, batch_size=32, lr=8e-3, warmup=0.1, evaluations=0)
    preprocessor = TextPreprocessor(tokenizer, 12)
    valid = toy(100, seed=1)
    rows = fit(task, preprocessor, toy(3000), training, valid=valid)
    assert rows[-1]["loss"] < 0.5
    truth, written = answers(task, LabelledPairs(valid, tokenizer, 12, max_target=8))
    right = [a == b.replace(" ", "") for a, b in zip(truth, written, strict=True)]
    assert sum(right) / len(right) > least
    fresh = Generation(config, copy.deepcopy(encoder))
    _, noise = answers(fresh, LabelledPairs(valid, tokenizer, 12, max_target=8))
    assert sum(a == b for a, b in zip(truth, noise, strict=True)) < 5


# The verbs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A causal model of letters, trained for two steps."""
    folder = tmp_path_factory.mktemp("generation")
    (folder / "letters.txt").write_text("\n".join(toy(900).items), encoding="utf-8")
    recipe = folder / "tiny.toml"
    recipe.write_text(
        """
[data]
name = "text"
row_length = 32
split_documents = "line"
[data.tokenizer]
kind = "character"
style = "gpt"
vocab_size = 40
[model]
name = "transformer"
dim = 32
layers = 1
heads = 2
causal = true
[method]
name = "causal_language"
[training]
steps = 2
batch_size = 4
""",
        encoding="utf-8",
    )
    return api.pretrain(recipe, str(folder / "letters.txt"), folder / "run")


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    paths = []
    for name, count, seed in (("train", 60, 0), ("test", 12, 1)):
        pairs = toy(count, seed)
        lines = ["source\ttarget", *map("\t".join, zip(pairs.items, pairs.labels, strict=True))]
        path = folder / f"{name}.tsv"
        path.write_text("\n".join(lines), encoding="utf-8")
        paths.append(str(path))
    return paths


def test_the_verbs(run, tables, tmp_path, capsys):
    train, test = tables
    out = str(tmp_path / "backwards")
    options = ["task.prefix=dcb", "task.max_target=8", "task.num_beams=2", "training.steps=3"]
    arguments = ["--task", "generation", "--data", train, "--valid", test, "--out", out]
    assert main(["finetune", str(run), *arguments, "--set", *options]) == 0
    capsys.readouterr()
    assert main(["evaluate", out, "--data", test]) == 0
    scores = dict(line.split("\t") for line in capsys.readouterr().out.splitlines())
    assert list(scores) == ["examples", "bleu", "chrf", "rouge_1", "rouge_2", "rouge_l"]
    assert main(["predict", out, "abc", "dacb"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[1] for line in lines] == ["abc", "dacb"]
    model = api.load(out)
    written = model.predict(["abc", "dacb"])
    assert [" ".join(text.split()) for text in written] == [line.split("\t")[0] for line in lines]
    assert model.objective.row_options == {"max_target": 8, "prefix": "dcb"}
    tokenizer = model.preprocessor.tokenizer
    prompt = np.append(tokenizer.encode(["dcbabc"])[0], tokenizer.vocabulary.sep)
    values = model.objective.predict({"tokens": torch.tensor(prompt)[None].long()}).values[0]
    ids = values.tolist()
    end = tokenizer.vocabulary.sep
    assert tokenizer.decode(ids[: ids.index(end)] if end in ids else ids) == written[0]
    with pytest.raises(ConfigError, match="gives texts"):
        model.predict_proba(["abc"])


def test_compare_with_scratch_and_the_baselines(run, tables, tmp_path):
    train, test = tables
    result = api.compare(
        run, "generation", train, test=test, out=tmp_path / "compare.json",
        label_counts=[20], seeds=(0,), lrs=(1e-3,), steps=2,
    )  # fmt: skip
    assert result["metric"] == "bleu"
    assert set(result["arms"]) == {"pretrained", "scratch", "baseline"}
    assert result["baseline_names"]["20"][0].split()[0] in ("the", "translation")
