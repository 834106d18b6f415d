"""Replaced-token detection against slow versions and against `transformers`."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from selfsup.batch import Batch, Vocabulary
from selfsup.errors import ConfigError
from selfsup.methods.ops import masked_loss
from selfsup.methods.predictive.replaced_token import (
    Chosen,
    Config,
    ReplacedToken,
    choose,
    detection_loss,
    generator_config,
    sample,
)
from selfsup.models.transformer import Config as Model
from selfsup.models.transformer import TransformerEncoder
from selfsup.randomness import isolated, seed_layers, torch_generator
from selfsup.training.checkpoint import save_tensors

PAD, UNK, CLS, SEP, MASK = range(5)
SIZE = 30
VOCABULARY = Vocabulary(size=SIZE, pad=PAD, unk=UNK, cls=CLS, sep=SEP, mask=MASK)
BERT = Model(
    dim=32,
    layers=2,
    heads=4,
    feedforward_dim=48,
    embedding_dim=24,
    norm="post",
    norm_eps=1e-12,
    positions="learned",
    max_length=24,
    segment_types=2,
    embedding_norm=True,
)
HALF = {"generator_scale": 0.5, "mask_rate": 0.3}


def build(model: Model = BERT, vocabulary: Vocabulary = VOCABULARY, **config) -> ReplacedToken:
    with isolated():
        seed_layers(0, "model")
        encoder = TransformerEncoder(model, vocabulary)
        return ReplacedToken(Config(**config), encoder, vocabulary).eval()


def randomised(module: nn.Module) -> None:
    """Every weight random, biases and norms too, so that none can be left out unnoticed."""
    generator = torch_generator(0, "weights")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)


def rows_of(num_rows: int, time: int = 20) -> Batch:
    """[CLS] letters [SEP] padding; every third row has an [UNK] in its middle."""
    generator = torch_generator(0, "rows")
    tokens = torch.randint(5, SIZE, (num_rows, time), generator=generator)
    length = torch.randint(4, time + 1, (num_rows, 1), generator=generator)
    slot = torch.arange(time)
    tokens[::3, 2] = UNK
    tokens = torch.where(slot == length - 1, SEP, tokens).masked_fill(slot >= length, PAD)
    tokens[:, 0] = CLS
    return {"tokens": tokens, "mask": slot < length}


def replayed(method: ReplacedToken, batch: Batch, seed: int) -> tuple[Chosen, Tensor]:
    """What `method.loss` masked, and the tokens that it gave to the encoder."""
    generator, tokens = torch_generator(seed, "loss"), batch["tokens"]
    chosen = choose((tokens >= 5) & batch["mask"], method.config.mask_rate, generator)
    drawn = sample(method._predict(batch, chosen), generator)
    corrupted = tokens.clone()
    for row, slot in chosen.real.nonzero().tolist():
        corrupted[row, chosen.positions[row, slot]] = drawn[row, slot]
    return chosen, corrupted


# choosing and drawing


@pytest.mark.parametrize("rate", [0.15, 0.4])
def test_each_row_has_exactly_its_share_of_chosen_tokens(rate):
    batch = rows_of(3_000)
    maskable = (batch["tokens"] >= 5) & batch["mask"]
    chosen = choose(maskable, rate, torch_generator(1, "mask"))
    times = torch.zeros_like(batch["tokens"])
    times.scatter_add_(1, chosen.positions, chosen.real.long())
    assert times.max() == 1, "a position was chosen twice"
    assert not times[~maskable].any(), "a special or padded position was chosen"
    wanted = [max(1, round(rate * n)) for n in maskable.sum(1).tolist()]
    assert times.sum(1).tolist() == wanted


def test_samples_follow_the_softmax_and_carry_no_gradient():
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0, -20.0], requires_grad=True)
    drawn = sample(logits.expand(200, 200, -1), torch_generator(0, "sample"))
    assert not drawn.requires_grad
    share = torch.bincount(drawn.flatten(), minlength=5) / drawn.numel()
    expected = logits.detach().softmax(-1)
    sigma = (expected * (1 - expected) / drawn.numel()).sqrt()
    assert ((share - expected).abs() < 4 * sigma + 1e-6).all()
    again = sample(logits.expand(200, 200, -1), torch_generator(0, "sample"))
    assert torch.equal(drawn, again)


def test_only_chosen_tokens_change_and_the_generator_sees_each_as_mask():
    method, batch, seen = build(**HALF), rows_of(20), {}
    for name in ("generator", "encoder"):
        part = getattr(method, name)
        part.register_forward_pre_hook(lambda _, given, n=name: seen.update({n: given[0]}))
    method.loss(batch, torch_generator(0, "loss"))
    chosen, corrupted = replayed(method, batch, 0)
    was_chosen = torch.zeros_like(batch["mask"]).scatter(1, chosen.positions, chosen.real)
    shown, given = seen["generator"]["tokens"], seen["encoder"]["tokens"]
    assert torch.equal(shown, batch["tokens"].masked_fill(was_chosen, MASK))
    assert torch.equal(given, corrupted)
    assert torch.equal(given[~was_chosen], batch["tokens"][~was_chosen])
    assert (given != batch["tokens"]).any()


def certain_of(method: ReplacedToken, token: int) -> ReplacedToken:
    """The same method, whose generator now draws one token everywhere."""
    with torch.no_grad():
        method.generator_head.bias[token] = 60.0
    return method


def test_a_drawn_token_that_is_the_original_counts_as_original():
    method = certain_of(build(mask_rate=0.999), 7)
    batch = {"tokens": torch.tensor([[CLS, 7, 8, 7, 9, SEP]])}  # all chosen, all become 7
    metrics = method.loss(batch, torch_generator(0, "loss")).metrics
    assert metrics["replaced_share"].item() == pytest.approx(2 / 6)
    metrics = method.loss({"tokens": torch.tensor([[7, 7, 7]])}, torch_generator(0, "loss")).metrics
    assert metrics["replaced_share"] == 0


# the losses


def slow_detection(logits: Tensor, replaced: Tensor, real: Tensor) -> list[float]:
    nats, right, called, actual, both, count = 0.0, 0, 0, 0, 0, 0
    for row in range(len(logits)):
        for slot in range(logits.shape[1]):
            if not real[row, slot]:
                continue
            probability = 1 / (1 + math.exp(-float(logits[row, slot].double())))
            truth, says = bool(replaced[row, slot]), probability > 0.5
            nats -= math.log(probability if truth else 1 - probability)
            right += truth == says
            called += says
            actual += truth
            both += truth and says
            count += 1
    return [nats / count, right / count, both / max(called, 1), both / max(actual, 1)]


def test_detection_loss_equals_a_loop():
    generator = torch_generator(0, "loss")
    logits = torch.randn(5, 9, generator=generator) * 3
    replaced = torch.rand(5, 9, generator=generator) < 0.3
    real = torch.rand(5, 9, generator=generator) < 0.7
    got = [value.item() for value in detection_loss(logits, replaced, real)]
    assert got == pytest.approx(slow_detection(logits, replaced, real), abs=1e-5)
    half = detection_loss(logits.bfloat16(), replaced, real)
    assert half.loss.dtype == torch.float32
    assert half.loss.item() == pytest.approx(
        slow_detection(logits.bfloat16(), replaced, real)[0], abs=1e-5
    )


def test_what_is_padded_counts_in_no_detection_metric():
    real = torch.tensor([[True, True, False]])
    replaced = torch.tensor([[True, False, True]])
    got = [
        detection_loss(torch.tensor([[2.0, -1.0, behind]]), replaced, real)
        for behind in (-50.0, 50.0)
    ]
    assert got[0] == got[1]
    none = detection_loss(torch.full((1, 3), -1.0), torch.zeros_like(real), real)
    assert (none.accuracy, none.precision, none.recall) == (1, 0, 0)


def test_the_loss_equals_a_loop_in_float64():
    method, batch = build(**HALF), rows_of(6)
    randomised(method)
    output = method.loss(batch, torch_generator(3, "loss"))
    chosen, corrupted = replayed(method, batch, 3)
    tokens, real = batch["tokens"], batch["mask"]
    method.double()
    logits = method._predict(batch, chosen).detach().log_softmax(-1)
    nats, hits = [], []
    for row, slot in chosen.real.nonzero().tolist():
        original = int(tokens[row, chosen.positions[row, slot]])
        nats.append(-float(logits[row, slot, original]))
        hits.append(int(logits[row, slot].argmax()) == original)
    hidden = method.encoder({**batch, "tokens": corrupted}).last
    inner = nn.functional.gelu(hidden @ method.head[0].weight.T + method.head[0].bias)
    answer = (inner @ method.head[2].weight.T + method.head[2].bias)[..., 0]
    detection = slow_detection(answer.detach(), corrupted != tokens, real)
    expected = {
        "generator_loss": sum(nats) / len(nats),
        "generator_accuracy": sum(hits) / len(hits),
        "replaced_share": float((corrupted != tokens).sum() / real.sum()),
        "discriminator_loss": detection[0],
        "discriminator_accuracy": detection[1],
        "discriminator_precision": detection[2],
        "discriminator_recall": detection[3],
    }
    assert {k: v.item() for k, v in output.metrics.items()} == pytest.approx(expected, abs=1e-4)
    assert output.loss.item() == pytest.approx(
        expected["generator_loss"] + 50 * expected["discriminator_loss"], rel=1e-5
    )
    assert output.weight == real.sum()


def test_generator_loss_leaves_out_unused_slots():
    logits = torch.zeros(1, 2, SIZE)
    logits[0, 1, 3] = 100.0
    target = torch.tensor([[5, 6]])
    loss, accuracy = masked_loss(logits, target, torch.tensor([[True, False]]))
    assert loss.item() == pytest.approx(math.log(SIZE))
    assert accuracy == 0
    assert masked_loss(logits, target, torch.zeros(1, 2, dtype=torch.bool))[0] == 0


def test_parts_of_a_batch_weigh_by_their_real_tokens():
    method, batch = certain_of(build(mask_rate=0.999), 7), rows_of(8)
    randomised(method.head)

    def of(first: int, last: int):
        part = {name: field[first:last] for name, field in batch.items()}
        return method.loss(part, torch_generator(0, "loss"))

    whole, parts = of(0, 8), [of(0, 3), of(3, 8)]
    assert whole.weight == sum(part.weight for part in parts)
    assert parts[0].weight * 5 != parts[1].weight * 3
    for name in ("discriminator_loss", "discriminator_accuracy", "replaced_share"):
        mean = sum(part.metrics[name] * part.weight for part in parts) / whole.weight
        torch.testing.assert_close(whole.metrics[name], mean, rtol=0, atol=1e-5)


def test_padding_does_not_change_the_loss():
    method, batch = certain_of(build(mask_rate=0.999), 7), rows_of(6)
    wider = {name: nn.functional.pad(field, (0, 3)) for name, field in batch.items()}
    behind = {**batch, "tokens": batch["tokens"].masked_fill(~batch["mask"], 9)}
    expected = method.loss(batch, torch_generator(0, "loss"))
    for other in (wider, behind):
        got = method.loss(other, torch_generator(1, "loss"))
        assert got.weight == expected.weight
        torch.testing.assert_close(got.loss, expected.loss, rtol=0, atol=1e-4)


# who learns from what


def gradients(weight: float) -> dict[str, Tensor]:
    method = build(discriminator_weight=weight, **HALF)
    randomised(method)
    method.loss(rows_of(8), torch_generator(0, "loss")).loss.backward()
    return {k: p.grad.double() for k, p in method.named_parameters() if p.grad is not None}


def test_each_network_learns_from_its_own_loss_and_the_tables_from_both():
    once, twice = gradients(1.0), gradients(2.0)
    shared = {f"encoder.embedding.{n}" for n in ("tokens", "segments", "positions", "norm")}
    for name in once:
        # the loss is linear in the weight
        discriminator = (twice[name] - once[name]).abs().max().item()
        masked = (2 * once[name] - twice[name]).abs().max().item()
        both = name.rpartition(".")[0] in shared
        assert (discriminator > 1e-5) is (both or not name.startswith("generator")), name
        assert (masked > 1e-5) is (both or name.startswith("generator")), name


def test_shared_tables_are_saved_and_trained_once(tmp_path):
    method = build()
    names = set(method.state_dict())
    assert {n for n in names if n.startswith("generator.embedding.")} == {
        "generator.embedding.projection.weight",
        "generator.embedding.projection.bias",
    }
    save_tensors(tmp_path / "weights.safetensors", method.state_dict())
    assert method.generator.embedding.tokens is method.encoder.embedding.tokens
    assert len(list(method.parameters())) == len(names)
    method.load_state_dict({k: torch.ones_like(v) for k, v in method.state_dict().items()})
    assert (method.generator.embedding.tokens.weight == 1).all()


def test_the_generator_is_the_encoders_layout_made_narrower():
    base = Model(dim=768, layers=12, heads=12, feedforward_dim=3072, pooling="bert")
    third = generator_config(base, 1 / 3)
    assert third == replace(
        base, dim=256, heads=4, feedforward_dim=1024, embedding_dim=768, pooling="mean"
    )
    assert third.head_dim == base.head_dim
    narrow = generator_config(Model(dim=192, heads=3), 0.25)  # a head does not fit
    assert (narrow.dim, narrow.heads, narrow.feedforward_width) == (48, 1, 192)
    assert generator_config(Model(dim=36, heads=6), 0.5).head_dim % 2 == 0  # rotary positions
    same = build(replace(BERT, embedding_dim=0), generator_scale=1.0)
    assert same.generator.embedding.projection is None


# `transformers`


def copy(ours: nn.Module, *theirs: nn.Module) -> None:
    """Weights of one layer, or of several that are one here."""
    states = [layer.state_dict() for layer in theirs]
    ours.load_state_dict({k: torch.cat([s[k] for s in states]) for k in states[0]})


def copy_layers(ours: TransformerEncoder, theirs: nn.Module) -> None:
    copy(ours.embedding.projection, theirs.embeddings_project)
    for block, layer in zip(ours.layers, theirs.encoder.layer, strict=True):
        attention = layer.attention.self
        copy(block.attention.qkv, attention.query, attention.key, attention.value)
        copy(block.attention.out, layer.attention.output.dense)
        copy(block.attention_norm, layer.attention.output.LayerNorm)
        copy(block.feedforward.up, layer.intermediate.dense)
        copy(block.feedforward.down, layer.output.dense)
        copy(block.feedforward_norm, layer.output.LayerNorm)


def electra(method: ReplacedToken) -> tuple[nn.Module, nn.Module]:
    """Their discriminator and generator with random weights, which are copied into `method`."""
    from transformers import ElectraConfig, ElectraForMaskedLM, ElectraForPreTraining

    def configured(model: Model) -> ElectraConfig:
        return ElectraConfig(
            vocab_size=SIZE,
            embedding_size=24,
            hidden_size=model.dim,
            num_hidden_layers=2,
            num_attention_heads=model.heads,
            intermediate_size=model.feedforward_dim,
            max_position_embeddings=24,
        )

    with isolated():
        seed_layers(1, "theirs")
        discriminator = ElectraForPreTraining(configured(method.encoder.config)).eval()
        generator = ElectraForMaskedLM(configured(method.generator.config)).eval()
    randomised(discriminator)
    randomised(generator)
    shared = discriminator.electra.embeddings
    generator.electra.embeddings.load_state_dict(shared.state_dict())
    embedding = method.encoder.embedding
    copy(embedding.tokens, shared.word_embeddings)
    copy(embedding.positions, shared.position_embeddings)
    copy(embedding.segments, shared.token_type_embeddings)
    copy(embedding.norm, shared.LayerNorm)
    copy_layers(method.encoder, discriminator.electra)
    copy_layers(method.generator, generator.electra)
    copy(method.head[0], discriminator.discriminator_predictions.dense)
    copy(method.head[2], discriminator.discriminator_predictions.dense_prediction)
    copy(method.generator_head.dense, generator.generator_predictions.dense)
    copy(method.generator_head.norm, generator.generator_predictions.LayerNorm)
    with torch.no_grad():
        method.generator_head.bias.copy_(generator.generator_lm_head.bias)
    return discriminator, generator


def test_the_loss_equals_transformers():
    method, batch = build(**HALF), rows_of(6)
    batch["segments"] = (torch.arange(20) > 4).long().expand(6, -1) * batch["mask"]
    discriminator, generator = electra(method)
    output = method.loss(batch, torch_generator(2, "loss"))
    chosen, corrupted = replayed(method, batch, 2)
    tokens, real = batch["tokens"], batch["mask"]
    was_chosen = torch.zeros_like(real).scatter(1, chosen.positions, chosen.real)
    options = {"attention_mask": real.long(), "token_type_ids": batch["segments"]}
    masked = generator(
        input_ids=tokens.masked_fill(was_chosen, MASK),
        labels=tokens.masked_fill(~was_chosen, -100),
        **options,
    )
    found = discriminator(input_ids=corrupted, labels=(corrupted != tokens).long(), **options)
    got = output.metrics
    torch.testing.assert_close(got["generator_loss"], masked.loss, rtol=0, atol=1e-5)
    torch.testing.assert_close(got["discriminator_loss"], found.loss, rtol=0, atol=1e-5)
    torch.testing.assert_close(output.loss, masked.loss + 50 * found.loss, rtol=1e-5, atol=0)


# what is refused


@pytest.mark.parametrize(
    "values",
    [
        {"mask_rate": 0.0},
        {"mask_rate": 1.0},
        {"generator_scale": 0.0},
        {"generator_scale": 1.5},
        {"discriminator_weight": 0.0},
    ],
)
def test_config_refuses_what_makes_no_sense(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        Config(**values)


def test_wrong_partners_are_refused():
    with pytest.raises(ConfigError, match="mask token"):
        build(vocabulary=Vocabulary(size=SIZE, pad=0, sep=1))
    with pytest.raises(ConfigError, match=r"model\.causal = false"):
        build(Model(dim=16, heads=2, layers=1, causal=True))
