"""VQ-VAE: its loss from its parts, its map of codes, and when its codebook moves."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from selfsup.batch import Batch, ImageSpec
from selfsup.methods.autoencoding.vqvae import FIRST_BATCHES, VQVAE, Config
from selfsup.models.quantizers import code_means
from selfsup.models.resnet import Config as Model
from selfsup.models.resnet import ResNetEncoder
from selfsup.objective import Reconstructs
from selfsup.randomness import isolated, seed_layers, torch_generator

SPEC = ImageSpec(size=8, channels=3, mean=(0.5, 0.4, 0.6), std=(0.25, 0.2, 0.3))
MODEL = Model(blocks=(1, 1), widths=(4, 6), stem="cifar", zero_init_residual=False)


def build(**config) -> VQVAE:
    with isolated():
        seed_layers(0, "model")
        settings = {"num_codes": 7, "code_dim": 5, "width": 8}
        return VQVAE(Config(**(settings | config)), ResNetEncoder(MODEL, SPEC), SPEC)


def pictures(size: int = 4, seed: int = 0) -> Batch:
    generator = torch_generator(seed, "pictures")
    return {"image": torch.randint(256, (size, 3, 8, 8), generator=generator, dtype=torch.uint8)}


def standard(image: Tensor) -> Tensor:
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (SPEC.mean, SPEC.std))
    return (image / 255 - mean) / std


def loss_of(objective: VQVAE, batch: Batch):
    return objective.loss(batch, torch_generator(0, "loss"))


def snapshot(objective: VQVAE) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in [*objective.named_parameters(), *objective.named_buffers()]}


def ready(**config) -> VQVAE:
    """Evaluation mode; the codebook begins with the data."""
    objective = build(**config)
    objective.refresh([pictures(8, seed=9)], torch_generator(0, "refresh"))
    return objective.eval()


def test_loss_is_the_error_plus_the_commitment():
    objective, batch = ready(commitment=0.7), pictures()
    output = loss_of(objective, batch)
    hidden = objective.encoder(batch).last  # (4, 16, 6)
    vectors = objective.projection(hidden)
    codes, total = torch.zeros(4, 16, dtype=torch.long), 0.0
    for b in range(4):
        for t in range(16):
            distance = (vectors[b, t].double() - objective.quantizer.codebook.double()).norm(dim=1)
            codes[b, t] = distance.argmin()
            total += distance.min().item() ** 2
    maps = torch.zeros(4, 5, 4, 4)
    for b in range(4):
        for y in range(4):
            for x in range(4):
                maps[b, :, y, x] = objective.quantizer.codebook[codes[b, 4 * y + x]]
    error = (objective.decoder(maps) - standard(batch["image"])).square().mean()
    expected = error.item() + 0.7 * total / vectors.numel()
    assert output.loss.item() == pytest.approx(expected, rel=1e-4)
    assert output.metrics["reconstruction"].item() == pytest.approx(error.item(), rel=1e-4)
    share = torch.bincount(codes.flatten(), minlength=7) / 64
    perplexity = math.exp(-sum(p * math.log(p) for p in share.tolist() if p))
    assert output.metrics["perplexity"].item() == pytest.approx(perplexity, rel=1e-4)
    assert perplexity > 2
    assert output.weight == 4
    assert torch.equal(objective.codes(batch), codes.view(4, 4, 4))
    torch.testing.assert_close(objective.reconstruct(batch), objective.decoder(maps))
    assert isinstance(objective, Reconstructs)


def test_each_code_stands_for_its_place():
    objective, batch = ready(), pictures()
    other = {"image": batch["image"].clone()}
    other["image"][:, :, :1, :1] = 255 - other["image"][:, :, :1, :1]
    changed = objective.codes(batch) != objective.codes(other)
    assert not changed[:, 3].any()
    assert not changed[:, :, 3].any()
    assert changed.any()


def test_gradient_reaches_the_encoder_through_the_codes():
    objective = ready(commitment=0.0)
    loss_of(objective, pictures()).loss.backward()
    for name, parameter in objective.named_parameters():
        assert parameter.grad.abs().max() > 0, name
    assert not objective.quantizer.codebook.requires_grad


def test_evaluation_changes_nothing():
    objective = ready()
    before = snapshot(objective)
    first = loss_of(objective, pictures()).loss
    assert loss_of(objective, pictures()).loss == first
    objective.codes(pictures())
    objective.reconstruct(pictures())
    assert all(torch.equal(tensor, before[name]) for name, tensor in snapshot(objective).items())
    assert not objective.quantizer.new_vectors


def test_the_codebook_follows_all_batches_of_a_step():
    objective = ready(revive_below=0.0).train()
    quantizer = objective.quantizer
    before, counts, sums = quantizer.codebook.clone(), quantizer.counts, quantizer.sums
    vectors = []
    for seed in range(3):
        loss_of(objective, pictures(seed=seed)).loss.backward()
        vectors.append(quantizer.new_vectors[-1])
    assert torch.equal(quantizer.codebook, before)
    seen = torch.cat(vectors)
    assert seen.shape == (3 * 4 * 16, 5)
    chosen = F.one_hot(quantizer.codes(seen), 7).float()
    counts, sums = 0.99 * counts + 0.01 * chosen.sum(0), 0.99 * sums + 0.01 * chosen.T @ seen
    objective.after_step(0, 10)
    torch.testing.assert_close(quantizer.codebook, code_means(counts, sums, 1e-5))
    assert not torch.equal(quantizer.codebook, before)
    assert (
        loss_of(objective, pictures()).metrics["code_usage"] == (chosen.sum(0) > 0).float().mean()
    )


def test_vectors_of_a_step_that_was_passed_over_stay_out():
    objective = ready(revive_below=0.0).train()
    quantizer = objective.quantizer
    loss_of(objective, pictures(seed=5)).loss.backward()
    quantizer.new_sums.fill_(math.nan)
    objective.zero_grad(set_to_none=True)  # as the loop does after a step that was not finite
    loss_of(objective, pictures()).loss.backward()
    (seen,) = quantizer.new_vectors
    chosen = F.one_hot(quantizer.codes(seen), 7).float()
    counts = 0.99 * quantizer.counts + 0.01 * chosen.sum(0)
    sums = 0.99 * quantizer.sums + 0.01 * chosen.T @ seen
    objective.after_step(0, 10)
    torch.testing.assert_close(quantizer.codebook, code_means(counts, sums, 1e-5))


def test_the_codebook_begins_with_vectors_of_the_first_batches():
    objective = build()
    objective.encoder.eval()  # or batch norm would give other vectors afterwards
    batches = [pictures(2, seed) for seed in range(FIRST_BATCHES + 2)]
    objective.refresh(iter(batches), torch_generator(0, "refresh"))
    seen = torch.cat([objective.vectors(batch).flatten(0, 1) for batch in batches[:FIRST_BATCHES]])
    for code in objective.quantizer.codebook:
        assert torch.isclose(code, seen, rtol=0, atol=1e-6).all(1).any()
    assert loss_of(objective.eval(), pictures()).metrics["perplexity"] > 2
    again = build()
    again.encoder.eval()
    again.refresh(iter(batches), torch_generator(1, "refresh"))
    assert not torch.equal(again.quantizer.codebook, objective.quantizer.codebook)
    assert objective.refresh_every == 0


def test_what_is_kept_is_all_that_is_needed_to_rebuild():
    kept = {name.partition(".")[0] for name in build().state_dict()}
    assert kept == set(VQVAE.kept)


def test_defaults_are_the_papers():
    config = Config()
    assert (config.num_codes, config.code_dim, config.commitment) == (512, 64, 0.25)
    assert config.decay == 0.99


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_codes", 0),
        ("code_dim", 0),
        ("width", 0),
        ("commitment", -0.1),
        ("decay", 1.0),
        ("decay", math.nan),
        ("revive_below", 1.0),
    ],
)
def test_wrong_values_are_named(key, value):
    with pytest.raises(ValueError, match=key):
        Config(**{key: value})
