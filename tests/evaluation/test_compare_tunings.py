"""Several tunings in one comparison: which arms train, the rates, the costs counted by hand."""

import json
import shutil

import pytest
import torch
from torch import nn

import selfsup as package
from selfsup.errors import ConfigError
from selfsup.evaluation.compare_settings import ADDED_LRS, WHOLE_LRS, Settings
from selfsup.evaluation.cost import saved_bytes, step_memory
from selfsup.models.encoder import Encoder, Features
from selfsup.objective import Output, Task
from selfsup.reporting import write_figure, write_report
from selfsup.tuning.choice import Tuning

TUNINGS = "full,lora,probe"


@pytest.fixture(scope="module")
def compared(selfsup, masked_run, corpus, tmp_path_factory):
    """A copy of the run with a comparison of three tunings, and what the command printed."""
    run = tmp_path_factory.mktemp("compared") / "run"
    shutil.copytree(masked_run, run)
    answer = selfsup(
        *("compare", run, "--task", "classification", "--data", corpus.labelled),
        *("--test", corpus.test, "--labels", 8, 24, "--seeds", 0, 1, "--steps", 4, "--jobs", 1),
        *("--lrs", 5e-3, "--tuning", TUNINGS, "--set", "tuning.lora.rank=3"),
    )
    assert answer.code == 0, answer.err
    return run, answer.out, json.loads((run / "compare.json").read_text())


def test_the_first_tuning_has_all_arms_and_the_others_the_pretrained_one(compared):
    _, _, found = compared
    assert found["tuning"] == "full"
    assert found["arms"].keys() == {"pretrained", "scratch", "baseline"}
    assert list(found["tunings"]) == TUNINGS.split(",")
    assert found["tunings"]["full"]["scores"] == found["arms"]["pretrained"]
    tried = {(row["tuning"], row["arm"]) for row in found["sweep"]}
    assert tried == {(name, "pretrained") for name in found["tunings"]} | {("full", "scratch")}
    assert {row["tuning"] for row in found["curves"]} == {"full"}
    for tuning in found["tunings"].values():
        assert {count: len(scores) for count, scores in tuning["scores"].items()} == {
            "8": 2,
            "24": 2,
        }
        assert tuning["learning_rates"] == {"8": 5e-3, "24": 5e-3}
        assert all(seconds > 0 for of_count in tuning["seconds"].values() for seconds in of_count)


def test_what_trains_and_what_is_saved(compared):
    run, _, found = compared
    encoder = package.load(run).encoder
    every, head = sum(p.numel() for p in encoder.parameters()), 32 * 2 + 2
    lora = 2 * (3 * 32 + 3 * 32)  # query and value of one layer
    costs = found["tunings"]
    assert {name: cost["trained"] for name, cost in costs.items()} == {
        "full": every + head,
        "lora": lora + head,
        "probe": head,
    }
    assert costs["lora"]["share"] == pytest.approx((lora + head) / (every + lora + head))
    assert {name: cost["file_bytes"] for name, cost in costs.items()} == {
        "full": 4 * (every + head),
        "lora": 4 * (lora + head),
        "probe": 4 * head,
    }
    assert costs["lora"]["options"]["lora"]["rank"] == 3
    assert costs["full"]["memory"] > costs["lora"]["memory"] > costs["probe"]["memory"]
    assert costs["probe"]["memory"] > 4 * (every + head)


def test_the_terminal_and_the_report_show_them(compared, tmp_path):
    run, printed, found = compared
    assert "The pre-trained network, tuning by tuning" in printed
    page = write_report([run], tmp_path / "page.html").read_text()
    assert '<a href="#tunings">Tunings</a>' in page
    part = page[page.index('<section id="tunings">') :]
    part = part[: part.index("</section>")]
    assert part.count("<svg") == 3
    assert f"{found['tunings']['lora']['trained']:,}" in part
    assert write_figure(run / "compare.json", tmp_path / "x.png").stat().st_size > 1000


def test_one_tuning_makes_no_section(compared, tmp_path):
    run, _, found = compared
    other = tmp_path / "run"
    shutil.copytree(run, other)
    one = {**found, "tunings": {"full": found["tunings"]["full"]}}
    (other / "compare.json").write_text(json.dumps(one))
    assert "#tunings" not in write_report([other], tmp_path / "page.html").read_text()
    (other / "compare.json").write_text(
        json.dumps({key: value for key, value in found.items() if key != "tunings"})
    )  # as older versions wrote it
    assert "#tunings" not in write_report([other], tmp_path / "page.html").read_text()


def test_each_tuning_has_rates_of_its_own_unless_they_are_given():
    options = {"task": "classification", "label_counts": (8,), "tuning": "full,lora,full+mixout"}
    settings = Settings(**options)
    assert settings.rates("full") == settings.rates("full+mixout") == WHOLE_LRS
    assert settings.rates("lora") == ADDED_LRS
    assert Settings(**options, lrs=(0.1,)).rates("lora") == (0.1,)
    assert settings.trials == [
        ("full", "pretrained"),
        ("full", "scratch"),
        ("lora", "pretrained"),
        ("full+mixout", "pretrained"),
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--tuning", "full,probe,full"), "names one of them twice"),
        (("--tuning", "full,lorra"), "unknown tuning 'lorra'; did you mean 'lora'?"),
        (("--tuning", "full", "--set", "tuning.lora.rank=2"), "options of tuning 'lora', but"),
        (("--tuning", "full,lora", "--set", "tuning.lora.rnk=2"), "rnk"),
        (("--set", "task.templat=x"), "unknown key task.templat"),
        (("--set", "training.lr=1"), "changes task.KEY and tuning.NAME.KEY alone, got"),
    ],
)
def test_what_cannot_be_asked_for(selfsup, masked_run, corpus, arguments, words):
    answer = selfsup(
        *("compare", masked_run, "--task", "classification", "--data", corpus.labelled),
        *("--labels", 8, "--jobs", 1, *arguments),
    )
    assert answer.code == 2
    assert words in answer.err


def test_clozes_are_compared_too(selfsup, masked_run, corpus, tmp_path):
    template = tmp_path / "about.txt"
    template.write_text("{label} : {text}\n--- labels\nbad = a\ngood = b\n")
    answer = selfsup(
        *("compare", masked_run, "--task", "cloze", "--data", corpus.labelled, "--labels", 8),
        *("--seeds", 0, "--lrs", 1e-3, "--steps", 2, "--jobs", 1, "--tuning", "full,bias"),
        *("--set", f"task.template={template}", "task.demonstrations=1"),
        *("--out", tmp_path / "compare.json"),
    )
    assert answer.code == 0, answer.err
    found = json.loads((tmp_path / "compare.json").read_text())
    assert found["task_options"] == {"template": str(template), "demonstrations": 1}
    assert found["arms"].keys() == {"pretrained", "scratch", "baseline"}
    assert found["tunings"]["bias"]["share"] < 0.2  # the head trains with it
    assert json.loads((tmp_path / "embeddings.json").read_text())


class Toy(Encoder):
    """One table and one layer, so that memory can be counted by hand."""

    def __init__(self):
        super().__init__()
        self.dim, self.num_layers = 4, 1
        self.table, self.layer = nn.Embedding(10, 4), nn.Linear(4, 4, bias=False)

    def forward(self, batch):
        x = self.table(batch["tokens"])
        y = self.layer(x)
        return Features((x, y), torch.ones_like(batch["tokens"], dtype=torch.bool), y.mean(1))


class ToyTask(Task):
    """The sum of the squares of what the encoder gives."""

    kept = ("encoder",)
    metric = "accuracy"

    def __init__(self):
        super().__init__()
        self.encoder = Toy()

    def loss(self, batch, generator):
        return Output(self.encoder(batch).last.square().sum(), 1, {})


def test_memory_by_hand():
    task, batch = ToyTask(), {"tokens": torch.tensor([[1, 2, 3], [4, 5, 6]])}
    weights, table, layer = 4 * (40 + 16), 4 * 40, 4 * 16
    x = y = 4 * 2 * 3 * 4  # what the layer reads, and what is squared; the tokens are the batch's
    assert step_memory(task, batch) == weights + 3 * (table + layer) + x + y
    assert step_memory(task, batch, "lars") == weights + 2 * (table + layer) + x + y
    sums = 4 * (10 + 4 + 4 + 4)  # of rows and of columns, which is all that adafactor keeps
    assert step_memory(task, batch, "adafactor") == weights + table + layer + sums + x + y
    task.encoder.table.requires_grad_(False)
    assert step_memory(task, batch) == weights + 3 * layer + x + y
    task.encoder.layer.requires_grad_(False)
    assert not task.training
    assert step_memory(task, batch) == weights


def test_what_a_file_holds_is_what_the_base_has_not():
    task, base = ToyTask(), Toy()
    base.load_state_dict(task.encoder.state_dict())
    with torch.no_grad():
        task.encoder.layer.weight.add_(1.0)
    assert saved_bytes(task, base, Tuning.of("full")) == 4 * (40 + 16)
    assert saved_bytes(task, base, Tuning.of("lora")) == 4 * 16


def test_options_name_a_tuning():
    with pytest.raises(ConfigError, match="options of tuning 'lora', but the tuning is 'full'"):
        Settings(
            task="tagging",
            label_counts=(8,),
            tuning="full",
            tuning_options={"lora": {"rank": 1}},
        )
