"""Adapters: the bottleneck worked out, where they sit, what trains, other kinds of input."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from selfsup.batch import AudioSpec, ImageSpec, Vocabulary
from selfsup.errors import ConfigError
from selfsup.models import encoder_decoder
from selfsup.models.resnet import Config as ResNetConfig
from selfsup.models.resnet import ResNetEncoder
from selfsup.models.transformer import Config, TransformerEncoder
from selfsup.randomness import torch_generator
from selfsup.tasks import classification
from selfsup.tuning import adapter
from selfsup.tuning.choice import Tuning, tune
from selfsup.tuning.parts import OWN, Where, merge, trained

SHAPE = {"dim": 8, "layers": 2, "heads": 2, "dropout": 0.0}
BATCH = {"tokens": torch.tensor([[5, 7, 2, 9], [4, 3, 8, 8]]), "label": torch.tensor([0, 1])}


def classifier(encoder=None, **shape):
    torch.manual_seed(0)
    encoder = encoder or TransformerEncoder(Config(**SHAPE, **shape), Vocabulary(size=20))
    return classification.Classification(classification.Config(dropout=0.0), encoder, ("a", "b"))


def adapted(task, name=OWN, **options):
    tune(task, Tuning.of("adapter", {"adapter": options}), Where(name))
    return task


def test_the_bottleneck_by_hand():
    part = adapter.Adapter(2, adapter.Config(width=1, activation="relu"), torch.zeros(()))
    for parameter, value in zip(
        (part.down.weight, part.down.bias, part.up.weight, part.up.bias),
        ([[2.0, -1.0]], [0.5], [[3.0], [-4.0]], [0.25, 0.0]),
        strict=True,
    ):
        parameter.data = torch.tensor(value)
    y = torch.tensor([[1.0, 1.5], [0.0, 1.0]])
    # down: 2 - 1.5 + 0.5 = 1 and -1 + 0.5 < 0
    assert part(y, y).tolist() == [[1.0 + 3.0 + 0.25, 1.5 - 4.0], [0.25, 1.0]]


def test_it_begins_near_the_base_as_published():
    task = classifier()
    before = task.encoder(BATCH).last
    adapted(task, width=4)
    after = task.encoder(BATCH).last
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)
    assert not torch.equal(after, before)
    weights = [p for n, p in task.encoder.additions.named_parameters() if n.endswith("weight")]
    assert all(0 < w.abs().max() <= 2e-3 for w in weights)


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_a_block_with_adapters_by_hand(norm):
    """Each adapter changes what its sub-layer gives, before the residual sum."""
    task = adapted(classifier(norm=norm), width=3, init_std=0.5, layer_norm=True)
    encoder = task.encoder
    block, view = encoder.layers[0], encoder.begin(BATCH)[1]
    x = torch.randn(2, 4, 8, generator=torch_generator(0, "x"))
    own = encoder.additions[OWN]
    attention = own["layers/0/attention"]["adapter"]
    feedforward = own["layers/0/feedforward"]["adapter"]

    def through(part, y):
        read = F.layer_norm(y, (8,), part.norm.weight, part.norm.bias)
        return y + part.up(F.gelu(part.down(read)))

    found, _ = block(x, view, 0)
    if norm == "pre":
        z = x + through(attention, block.attention.forward(block.attention_norm(x), view, 0))
        z = z + through(feedforward, block.feedforward.forward(block.feedforward_norm(z)))
    else:
        z = block.attention_norm(x + through(attention, block.attention.forward(x, view, 0)))
        z = block.feedforward_norm(z + through(feedforward, block.feedforward.forward(z)))
    torch.testing.assert_close(found, z)


@pytest.mark.parametrize(
    ("options", "halves", "width"),
    [
        ({"reduction": 4}, ("attention", "feedforward"), 2),
        ({"places": "pfeiffer"}, ("feedforward",), 1),
    ],
)
def test_only_adapters_and_the_head_learn(options, halves, width):
    task = adapted(classifier(), **options)
    task.loss(BATCH, torch_generator(0, "loss")).loss.backward()
    moved = {name for name, p in task.named_parameters() if p.grad is not None}
    assert moved == {"head.weight", "head.bias"} | {
        f"encoder.additions.own.layers/{i}/{half}.adapter.{layer}.{kind}"
        for i in (0, 1)
        for half in halves
        for layer in ("down", "up")
        for kind in ("weight", "bias")
    }
    assert trained(task)[0] == 2 * len(halves) * (2 * 8 * width + width + 8) + 2 * 8 + 2


def test_sets_in_one_batch(same_alone_and_mixed):
    task = adapted(adapted(classifier(), "first", init_std=0.5), "second", init_std=0.5, width=3)
    same_alone_and_mixed(task, BATCH)


@pytest.mark.parametrize(
    ("tuning", "lr"), [("adapter", 0.01), ("ia3", 0.1), ("bias", 0.01), ("prefix", 0.1)]
)
@pytest.mark.parametrize("kind", ["image", "audio"])
def test_the_same_tuning_on_pictures_and_speech(kind, tuning, lr):
    if kind == "image":
        spec = ImageSpec(size=8, channels=3, mean=(0.0,) * 3, std=(1.0,) * 3)
        batch = {"image": torch.randn(2, 3, 8, 8, generator=torch_generator(0, "image"))}
    else:
        spec = AudioSpec(rate=8000, mel=8, hop=80)
        batch = {"frames": torch.randn(2, 12, 8, generator=torch_generator(0, "frames"))}
    batch["label"] = BATCH["label"]
    task = classifier(TransformerEncoder(Config(**SHAPE, init_std=0.3), spec))
    tune(task, Tuning.of(tuning))
    kept = {name: p.clone() for name, p in task.named_parameters() if not p.requires_grad}
    task.head.requires_grad_(False)  # so that it is the tuning that learns
    nn.init.normal_(task.head.weight, generator=torch_generator(0, "head"))
    assert trained(task)[0] > 0
    optimizer = torch.optim.Adam([p for p in task.parameters() if p.requires_grad], lr=lr)
    losses = []
    for step in range(20):
        loss = task.loss(batch, torch_generator(0, "loss", step)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(p, kept[n]) for n, p in task.named_parameters() if n in kept)


def test_decoder_blocks_have_one_behind_each_of_three():
    model = encoder_decoder.EncoderDecoder(
        encoder_decoder.Config(**SHAPE), Vocabulary(size=20, sep=3)
    )
    tune(classifier(model), Tuning.of("adapter"))
    places = {place for place, _, _ in model.additions.every(OWN)}
    assert places == {
        *(f"source/layers/{i}/{half}" for i in (0, 1) for half in ("attention", "feedforward")),
        *(
            f"target/layers/{i}/{half}"
            for i in (0, 1)
            for half in ("attention", "cross", "feedforward")
        ),
    }


def test_bad_input():
    for options, message in (
        ({"reduction": 0}, "reduction must be at least 1"),
        ({"width": -1}, "width must not be negative"),
        ({"places": "anywhere"}, "places"),
        ({"activation": "swiglu"}, "activation"),
    ):
        with pytest.raises(ConfigError, match=message):
            Tuning.of("adapter", {"adapter": options})
    task = adapted(classifier())
    with pytest.raises(ConfigError, match="what no weights of its place can"):
        merge(task.encoder)
    assert [kind for _, kind, _ in task.encoder.additions.every(OWN)] == ["adapter"] * 4
    with pytest.raises(ConfigError, match="merge the tuned run first"):
        adapted(task)
    spec = ImageSpec(size=8, channels=3, mean=(0.0,) * 3, std=(1.0,) * 3)
    for tuning in ("adapter", "ia3", "prefix", "soft_prompt"):
        with pytest.raises(ConfigError, match=f"{tuning} .*ResNetEncoder"):
            tune(classifier(ResNetEncoder(ResNetConfig(), spec)), Tuning.of(tuning))
    for tuning in ("adapter", "ia3"):
        with pytest.raises(ConfigError, match=r"are experts \(model.experts\)"):
            tune(classifier(experts=2), Tuning.of(tuning))
