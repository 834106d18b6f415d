import json
import random

import numpy as np
import pytest
import torch

from selfsup.config import from_mapping
from selfsup.data.corpora import MixedRows, joined, mixed_entropy, mixed_sample, named, shares
from selfsup.data.dataset import Dataset
from selfsup.data.reading import documents
from selfsup.data.rows import PackedRows, PairRows
from selfsup.data.text import Config, prepare
from selfsup.data.tokenizer import TokenizerConfig
from selfsup.errors import ConfigError, DataError
from selfsup.randomness import Order
from selfsup.training.config import TrainingConfig
from selfsup.training.folder import RunFolder
from selfsup.training.loop import train

ENGLISH = ["the", "cat", "sat", "on", "a", "mat", "and", "it", "was", "big"]
OTHER = ["der", "hund", "lief", "zu", "einem", "haus", "und", "es", "war", "klein"]


def write(path, words, num_documents, seed=0):
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(words, k=rng.randint(5, 60))) for _ in range(num_documents)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A large corpus and a small one."""
    folder = tmp_path_factory.mktemp("corpora")
    return write(folder / "a.jsonl", ENGLISH, 400), write(folder / "b.jsonl", OTHER, 60, seed=1)


def config(**keys):
    return Config(row_length=16, tokenizer=TokenizerConfig(vocab_size=300), **keys)


class Numbers(Dataset):
    """Rows that hold their own number."""

    fields = ("tokens", "index")

    def __init__(self, size, first=0):
        self.size, self.first = size, first

    def __len__(self):
        return self.size

    def batch(self, numbers):
        rows = torch.from_numpy(np.asarray(numbers))
        return {"tokens": (self.first + rows).unsqueeze(1), "index": rows}


def mixed(sizes, exponent):
    parts = {f"part{i}": Numbers(size, 10_000 * i) for i, size in enumerate(sizes)}
    return MixedRows(parts, shares(sizes, exponent), pad=0)


def test_shares_by_hand():
    assert shares([900, 100], 1.0) == pytest.approx([0.9, 0.1])
    assert shares([900, 100], 0.0) == pytest.approx([0.5, 0.5])
    weights = 0.9**0.7, 0.1**0.7
    assert shares([900, 100], 0.7) == pytest.approx([w / sum(weights) for w in weights])


@pytest.mark.parametrize("exponent", [0.0, 0.3, 0.7, 1.0])
def test_shares_hold_on_ten_thousand_rows(exponent):
    sizes = [30_000, 4_000, 700]
    rows = mixed(sizes, exponent)
    corpus, _ = rows.locate(Order(len(rows), seed=3)[0:10_000])
    found = np.bincount(corpus, minlength=3) / 10_000
    # four standard deviations of 10,000 draws
    assert np.abs(found - shares(sizes, exponent)).max() < 4 * np.sqrt(0.25 / 10_000)


@pytest.mark.parametrize("sizes", [[50, 7], [7, 50, 1], [1, 1], [13]])
@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_one_pass_reads_every_row_and_some_corpus_only_once(sizes, exponent):
    rows = mixed(sizes, exponent)
    corpus, row = rows.locate(np.arange(len(rows)))
    repeats = []
    for number, size in enumerate(sizes):
        times = np.bincount(row[corpus == number], minlength=size)
        assert len(times) == size
        assert 1 <= times.min() <= times.max() <= times.min() + 1  # evenly spread
        repeats.append(times.mean())
    assert min(repeats) == 1
    if exponent == 1:
        assert len(rows) == sum(sizes)
        assert max(repeats) == 1


def test_a_batch_is_the_rows_where_they_were_asked_for():
    rows = mixed([5, 3], 1.0)
    batch = rows.batch(np.array([6, 0, 7, 4]))
    assert batch["tokens"].tolist() == [[10_001], [0], [10_002], [4]]
    assert batch["index"].tolist() == [6, 0, 7, 4]
    assert set(batch) == {"tokens", "index"}
    assert rows.batch(np.array([7]))["tokens"].tolist() == [[10_002]]


def test_batches_of_different_length_are_joined():
    short = {"tokens": torch.tensor([[5, 6]]), "documents": torch.tensor([[0, 1]])}
    long = {"tokens": torch.tensor([[7, 8, 9], [7, 7, 0]])}
    long["mask"] = torch.tensor([[True, True, True], [True, True, False]])
    out = joined([short, long], pad=4)
    assert out["tokens"].tolist() == [[5, 6, 4], [7, 8, 9], [7, 7, 0]]
    assert out["mask"].tolist() == [[True, True, False], [True] * 3, [True, True, False]]
    assert out["documents"].tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 0]]
    assert "mask" not in joined([short, short], pad=4)


def test_pairs_of_two_corpora_keep_their_lengths_and_masks(two, tmp_path):
    prepared = prepare(config(rows="pairs"), [f"b={two[1]}", f"a={two[0]}"], tmp_path)
    rows = prepared.train
    assert isinstance(rows, MixedRows)
    assert isinstance(rows.parts["a"], PairRows)
    assert len(rows.lengths) == len(rows)
    numbers = np.array([0, len(rows) - 1, 1])
    batch = rows.batch(numbers)
    corpus, row = rows.locate(numbers)
    mask = batch.get("mask", torch.ones_like(batch["tokens"], dtype=torch.bool))
    for place, (part, number) in enumerate(zip(corpus, row, strict=True)):
        of_part = rows.parts["ab"[part]]
        alone = of_part.batch(np.array([number]))
        for name in ("tokens", "segments"):
            assert batch[name][place][mask[place]].tolist() == alone[name][0].tolist()
        assert rows.lengths[numbers[place]] == of_part.lengths[number]


def test_one_corpus_is_as_it_was(two, tmp_path):
    plain, one = prepare(config(), two[0], tmp_path), prepare(config(), f"en={two[0]}", tmp_path)
    assert plain.facts == one.facts
    assert isinstance(one.train, PackedRows)
    numbers = np.arange(len(plain.train))
    batch, same = plain.train.batch(numbers), one.train.batch(numbers)
    assert batch.keys() == same.keys()
    assert all(torch.equal(batch[name], same[name]) for name in batch)


def test_prepare_is_deterministic_and_its_facts_name_each_corpus(two, tmp_path):
    sources = [f"en={two[0]}", f"de={two[1]}"]
    first = prepare(config(), sources, tmp_path / "a")
    again = prepare(config(), sources[::-1], tmp_path / "b")
    assert first.facts == again.facts
    assert first.preprocessor.tokenizer.to_json() == again.preprocessor.tokenizer.to_json()
    numbers = Order(len(first.train), seed=0)[0:50]
    assert torch.equal(first.train.batch(numbers)["tokens"], again.train.batch(numbers)["tokens"])
    facts = first.facts["corpora"]
    assert list(facts) == ["de", "en"]
    assert facts["de"]["share"] + facts["en"]["share"] == pytest.approx(1)
    tokens = [facts[name]["train"]["tokens"] for name in ("de", "en")]
    assert [facts[n]["share"] for n in facts] == pytest.approx(shares(tokens, 0.7), abs=0.01)
    assert facts["en"]["reads_per_pass"] == 1 < facts["de"]["reads_per_pass"]
    assert first.facts["train"]["tokens"] == sum(tokens)
    assert first.facts["files"] == 2
    changed = prepare(config(), [sources[0], f"de={two[1]},{two[0]}"], tmp_path / "a")
    assert changed.facts["fingerprint"] != first.facts["fingerprint"]


def test_several_paths_make_one_corpus(two, tmp_path):
    together = prepare(config(), f"both={two[0]},{two[1]}", tmp_path)
    assert together.facts["documents"] == 460
    assert together.facts == prepare(config(), [two[0], two[1]], tmp_path).facts


def test_the_entropy_of_a_mixture_by_hand():
    vocabulary = type("Vocabulary", (), {"size": 4, "special": (0,)})()
    streams = [np.array([1, 1, 0, 0]), np.array([2, 3, 2, 3])]
    expected = -(0.5 * np.log(0.5) + 2 * 0.25 * np.log(0.25))
    found = mixed_entropy(streams, np.array([0.5, 0.5]), vocabulary)
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(("exponent", "limit"), [(0.0, 10**9), (0.7, 3000), (1.0, 10**9)])
def test_the_tokenizer_reads_each_corpus_by_its_share(exponent, limit, two):
    corpora = {"a": [two[0]], "b": [two[1]]}
    texts = {n: [d.text for d in documents(p)] for n, (p,) in corpora.items()}
    sizes = [sum(len(text.split()) for text in texts[name]) for name in "ab"]
    sample = " ".join(mixed_sample(corpora, exponent, limit, documents)).split()
    found = sum(word in OTHER for word in sample) / len(sample)
    assert found == pytest.approx(shares(sizes, exponent)[1], abs=0.02)
    assert sum(map(len, sample)) <= limit + 100
    if exponent == 1:
        assert len(sample) == sum(sizes)


def test_a_small_language_keeps_its_words(two, tmp_path):
    """With a vocabulary too small for both, the exponent decides whose words stay whole."""

    def pieces(exponent):
        tokenizer = TokenizerConfig(vocab_size=60)
        sources = [f"en={two[0]}", f"de={two[1]}"]
        found = Config(row_length=16, sampling_exponent=exponent, tokenizer=tokenizer)
        encode = prepare(found, sources, tmp_path).preprocessor.tokenizer.encode
        return sum(len(ids) for ids in encode(OTHER))

    assert pieces(0.0) < pieces(1.0)


def test_a_resumed_run_reads_the_same_rows(two, tmp_path):
    rows = prepare(config(), [f"en={two[0]}", f"de={two[1]}"], tmp_path / "cache").train

    class Watched(Dataset):
        fields, seen = rows.fields, []

        def __len__(self):
            return len(rows)

        def batch(self, numbers):
            self.seen.append(rows.batch(numbers)["tokens"].tolist())
            return {"tokens": torch.zeros(len(numbers), 1), "index": torch.from_numpy(numbers)}

    def run(steps, folder):
        Watched.seen = []
        training = TrainingConfig(
            steps=steps, batch_size=8, evaluations=0, checkpoint_every=5, device="cpu"
        )
        folder = RunFolder(folder, resume=folder.exists())
        try:
            train(Toy(), Watched(), None, training, folder)
        finally:
            folder.close()
        return list(Watched.seen)

    whole = run(20, tmp_path / "whole")[:20]
    run(10, tmp_path / "parts")
    assert run(20, tmp_path / "parts")[:10] == whole[10:]


class Toy(torch.nn.Module):
    """The least objective that a loop can train."""

    refresh_every = None

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def loss(self, batch, generator):
        from selfsup.objective import Output

        return Output((batch["tokens"] + self.weight).square().mean(), len(batch["tokens"]), {})

    def after_step(self, step, total):
        pass


def test_names_of_corpora(tmp_path, monkeypatch):
    assert named("texts/") == {"": "texts/"}
    assert named(["a.txt", "b.txt"]) == {"": ["a.txt", "b.txt"]}
    assert named("en=a.txt,b/") == {"en": ["a.txt", "b/"]}
    assert named(["./en=a.txt"]) == {"": ["./en=a.txt"]}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lang=en").mkdir()
    assert named(["lang=en"]) == {"": ["lang=en"]}


@pytest.mark.parametrize(
    ("sources", "said"),
    [
        (["en=a.txt", "en=b.txt"], "two corpora are called 'en': write en=PATH,PATH"),
        (["en=a.txt", "b.txt"], "b.txt has no name, but 'en' has"),
        (["en=a.txt", "zh="], "corpus 'zh' has no path: write zh=PATH"),
    ],
)
def test_wrong_names(sources, said):
    with pytest.raises(DataError, match=said):
        named(sources)


def test_errors_name_the_corpus(two, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"text": " "}\n')
    with pytest.raises(DataError, match=r"corpus 'zh': no text in .*empty\.jsonl"):
        prepare(config(), [f"en={two[0]}", f"zh={empty}"], tmp_path)
    with pytest.raises(DataError, match="corpus 'zh': no file or folder"):
        prepare(config(), [f"en={two[0]}", f"zh={tmp_path / 'gone.jsonl'}"], tmp_path)
    short = write(tmp_path / "short.jsonl", OTHER, 2)
    with pytest.raises(DataError, match=r"corpus 'zh': .*fewer than one row"):
        prepare(config(), [f"en={two[0]}", f"zh={short}"], tmp_path)
    with pytest.raises(ConfigError, match="sampling_exponent must be from 0 to 1"):
        from_mapping(Config, {"sampling_exponent": 1.5}, "data")


def test_a_run_follows_and_evaluates_each_corpus(two, corpus, selfsup, tmp_path):
    sources = [f"en={two[0]}", f"de={two[1]}"]
    run = tmp_path / "run"
    answer = selfsup(
        *("pretrain", corpus.masked, "--data", *sources, "--out", run),
        *("--set", "training.steps=20", "data.tokenizer.vocab_size=300"),
    )
    assert answer.code == 0, answer.err
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    held_out = [row for row in rows if row["split"] == "valid"]
    assert all(row["loss_en"] > 0 and row["loss_de"] > 0 for row in held_out)
    assert held_out[-1]["loss_en"] != held_out[-1]["loss_de"]
    answer = selfsup("evaluate", run)
    assert [line.split()[:2] for line in answer.out.splitlines()] == [
        ["de", "loss"],
        ["en", "loss"],
    ]
