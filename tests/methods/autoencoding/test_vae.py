"""VAE: divergence and likelihood against torch.distributions, the bound against Monte Carlo."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from selfsup.batch import ImageSpec, TableSpec
from selfsup.methods.autoencoding.vae import (
    VAE,
    Config,
    Likelihood,
    divergence,
    negative_log_likelihood,
)
from selfsup.models.mlp import Config as Model
from selfsup.models.mlp import MLPEncoder
from selfsup.objective import Reconstructs
from selfsup.randomness import isolated, seed_layers, torch_generator

ROWS = TableSpec(columns=("age", "city"), source=(0, 1, 1, 1))
PICTURES = ImageSpec(size=8, channels=2, mean=(0.45, 0.55), std=(0.1, 0.15))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch_generator(seed, "values"))


def build(spec=ROWS, **config) -> VAE:
    with isolated():
        seed_layers(0, "model")
        encoder = MLPEncoder(Model(dims=(8,), dim=6), spec)
        return VAE(Config(**{"latent_dim": 3, "width": 8, **config}), encoder, spec).eval()


def loss_of(objective: VAE, batch, seed: int = 0):
    return objective.loss(batch, torch_generator(seed, "loss"))


def blind(objective: VAE) -> VAE:
    """The code is standard normal whatever the input, and the decoder gives 0."""
    with torch.no_grad():
        for part in (objective.mean, objective.log_variance, objective.decoder):
            for parameter in part.parameters():
                parameter.zero_()
    return objective


def with_loud_codes(objective: VAE) -> VAE:
    """Posteriors that differ much from each other and from the prior."""
    with torch.no_grad():
        objective.mean.weight.mul_(10)
        objective.log_variance.weight.mul_(4)
    return objective


def test_divergence_is_that_of_torch():
    mean, log_variance = 2 * draw(7, 4), draw(7, 4, seed=1)
    posterior = Normal(mean.double(), (log_variance.double() / 2).exp())
    prior = Normal(torch.zeros(4).double(), torch.ones(4).double())
    expected = kl_divergence(posterior, prior).sum(1)
    torch.testing.assert_close(divergence(mean, log_variance).double(), expected, rtol=1e-5, atol=0)
    assert divergence(torch.zeros(2, 4), torch.zeros(2, 4)).tolist() == [0, 0]


def test_likelihood_equals_loops_and_torch():
    values, mean, log_sigma = draw(3, 2, 4), draw(3, 2, 4, seed=1), torch.tensor(-0.7)
    got = negative_log_likelihood(values, mean, log_sigma)
    sigma = math.exp(-0.7)
    for b in range(3):
        total = 0.0
        for i, j in np.ndindex(2, 4):
            z = (float(values[b, i, j]) - float(mean[b, i, j])) / sigma
            total += 0.5 * z * z + math.log(sigma) + 0.5 * math.log(2 * math.pi)
        assert got[b].item() == pytest.approx(total, rel=1e-5)
    expected = -Normal(mean, log_sigma.exp()).log_prob(values).flatten(1).sum(1)
    torch.testing.assert_close(got, expected)


def test_missing_values_have_neither_likelihood_nor_gradient():
    values, mean = draw(2, 4), draw(2, 4, seed=1).requires_grad_()
    values[0, 1:3] = math.nan
    log_sigma = torch.tensor(0.3)
    got = negative_log_likelihood(values, mean, log_sigma)
    known = negative_log_likelihood(values[:1, [0, 3]], mean[:1, [0, 3]], log_sigma)
    torch.testing.assert_close(got[:1], known)
    got.sum().backward()
    assert torch.equal(mean.grad == 0, values.isnan())


def test_bits_of_a_gappy_input_are_per_value_that_is_there():
    objective = blind(build(sigma=2.0))
    row = draw(3, 4)
    row[1, :3] = math.nan
    objective.posterior = lambda batch: (torch.zeros(3, 3), torch.zeros(3, 3))
    output = loss_of(objective, {"row": row})
    nats = [-Normal(0.0, 2.0).log_prob(each[~each.isnan()]) for each in row]
    bits = sum(each.mean() for each in nats) / 3 / math.log(2)
    torch.testing.assert_close(output.metrics["bits_per_dimension"], bits)
    torch.testing.assert_close(output.loss, sum(each.sum() for each in nats) / 3 / 4)


@pytest.mark.parametrize("beta", [1.0, 3.0])
def test_loss_is_a_monte_carlo_estimate_of_the_bound(beta):
    objective, count = with_loud_codes(build(beta=beta)), 20000
    row = draw(1, 4)
    output = loss_of(objective, {"row": row.expand(count, 4)})
    mean, log_variance = (x[0].double() for x in objective.posterior({"row": row}))
    posterior, prior = Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0)
    # log p(x|z) + beta (log p(z) - log q(z|x)), with other random numbers and no closed form
    code = mean + (log_variance / 2).exp() * draw(count, 3, seed=5).double()
    with torch.no_grad():
        rebuilt = objective.decoder(code.float()).double()
    sigma = objective.likelihood.log_sigma().detach().double().exp()
    likelihood = Normal(rebuilt, sigma).log_prob(row.double()).sum(1)
    ratio = (prior.log_prob(code) - posterior.log_prob(code)).sum(1)
    bound = likelihood + beta * ratio
    assert ratio.mean() < -0.5, "the toy posterior must differ from the prior"
    error = bound.std() / count**0.5
    assert abs(-bound.mean() / 4 - output.loss) < 5 * error / 4
    assert abs(output.metrics["kl"] + ratio.mean()) < 5 * ratio.std() / count**0.5
    assert abs(output.metrics["reconstruction"] + likelihood.mean()) < (
        5 * 2**0.5 * likelihood.std() / count**0.5
    )
    bits = -(likelihood + ratio).mean() / 4 / math.log(2)
    tolerance = 5 * 2**0.5 * (likelihood + ratio).std() / count**0.5
    assert abs(output.metrics["bits_per_dimension"] - bits) < tolerance
    assert output.weight == count


def test_bits_per_dimension_of_pixels_are_the_entropy_of_the_levels():
    """Pixels from a Gaussian that the model knows cost as many bits as their levels have."""
    objective = blind(build(PICTURES, sigma=1.0))
    levels = np.arange(256)
    image, entropy = [], []
    generator = np.random.Generator(np.random.PCG64(0))
    for mean, std in zip(PICTURES.mean, PICTURES.std, strict=True):
        p = np.exp(-0.5 * ((levels / 255 - mean) / std) ** 2)
        p /= p.sum()
        entropy.append(-(p * np.log2(p)).sum())
        image.append(generator.choice(256, (400, 8, 8), p=p))
    batch = {"image": torch.tensor(np.stack(image, 1), dtype=torch.uint8)}
    output = loss_of(objective, batch)
    assert output.metrics["kl"] == 0
    assert output.metrics["bits_per_dimension"].item() == pytest.approx(np.mean(entropy), abs=0.02)
    analytic = np.mean([math.log2(255 * s * math.sqrt(2 * math.pi * math.e)) for s in PICTURES.std])
    assert output.metrics["bits_per_dimension"].item() == pytest.approx(analytic, abs=0.02)


def test_bits_of_rows_are_those_of_the_density():
    objective, row = blind(build(sigma=2.0)), 2 * draw(500, 4)
    bits = loss_of(objective, {"row": row}).metrics["bits_per_dimension"].item()
    expected = -Normal(0.0, 2.0).log_prob(row.double()).mean().item() / math.log(2)
    assert bits == pytest.approx(expected, rel=1e-5)
    assert bits == pytest.approx(math.log2(2 * math.sqrt(2 * math.pi * math.e)), abs=0.05)


def test_a_learned_sigma_rests_where_it_is_the_error():
    objective, row = blind(build()), 0.5 * draw(64, 4)
    best = 0.5 * row.square().mean().log()
    for shift, sign in ((0.0, 0), (0.3, 1), (-0.3, -1)):
        wanted = best + shift
        with torch.no_grad():  # the inverse of the soft lower bound
            objective.likelihood.raw.copy_(-6 + torch.log(torch.expm1(wanted + 6)))
        objective.zero_grad()
        output = loss_of(objective, {"row": row})
        assert output.metrics["sigma"].item() == pytest.approx(math.exp(wanted), rel=1e-4)
        output.loss.backward()
        gradient = objective.likelihood.raw.grad.item()
        assert abs(gradient) < 1e-4 if sign == 0 else gradient * sign > 0.1


def test_sigma_is_learned_or_fixed():
    assert Likelihood(0.0).log_sigma().item() == pytest.approx(0, abs=0.01)
    assert list(Likelihood(0.5).parameters()) == []
    assert Likelihood(0.5).log_sigma().exp().item() == pytest.approx(0.5)
    assert "raw" in Likelihood(0.5).state_dict()
    learned = Likelihood(0.0)
    with torch.no_grad():
        learned.raw.fill_(-50)
    assert learned.log_sigma().item() == pytest.approx(-6)


def test_active_units_are_those_whose_mean_depends_on_the_input():
    objective, batch = build(), {"row": draw(40, 4)}
    with torch.no_grad():
        objective.mean.weight[1] = 0
        objective.mean.weight[[0, 2]] *= 20
    assert loss_of(objective, batch).metrics["active_units"] == 2
    assert loss_of(blind(objective), batch).metrics["active_units"] == 0


def test_only_the_generator_decides_the_code():
    objective, batch = with_loud_codes(build()), {"row": draw(5, 4)}
    losses = [loss_of(objective, batch, seed).loss.item() for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_reconstruction_is_from_the_mean_code():
    objective, batch = with_loud_codes(build()), {"row": draw(5, 4)}
    expected = objective.decoder(objective.posterior(batch)[0])
    got = objective.reconstruct(batch)
    assert torch.equal(got, expected)
    assert not got.requires_grad
    assert isinstance(objective, Reconstructs)


@pytest.mark.parametrize(("spec", "shape"), [(ROWS, (4,)), (PICTURES, (2, 8, 8))])
def test_samples_are_decoded_from_the_prior(spec, shape):
    objective = build(spec)
    got = objective.sample(7, torch_generator(0, "sample"))
    code = torch.randn(7, 3, generator=torch_generator(0, "sample"))
    assert got.shape == (7, *shape)
    assert torch.equal(got, objective.decoder(code))


def test_interpolation_goes_straight_from_one_code_to_the_other():
    objective = with_loud_codes(build())
    first, second = {"row": draw(5, 4)}, {"row": draw(5, 4, seed=1)}
    path = objective.interpolate(first, second, 5)
    assert path.shape == (5, 5, 4)
    torch.testing.assert_close(path[:, 0], objective.reconstruct(first))
    torch.testing.assert_close(path[:, -1], objective.reconstruct(second))
    a, b = (objective.posterior(batch)[0] for batch in (first, second))
    for number, share in enumerate((0, 0.25, 0.5, 0.75, 1)):
        expected = objective.decoder((1 - share) * a + share * b)
        torch.testing.assert_close(path[:, number], expected)
    assert not torch.allclose(path[:, 0], path[:, -1], atol=1e-2)


def test_what_is_kept_is_all_that_is_needed_to_draw_and_rebuild():
    objective = build()
    kept = {name.partition(".")[0] for name in objective.state_dict()}
    assert kept == set(objective.kept)
    assert isinstance(objective.mean, nn.Linear)


@pytest.mark.parametrize(
    ("key", "value"),
    [("latent_dim", 0), ("width", 0), ("beta", -1.0), ("beta", math.nan), ("sigma", math.inf)],
)
def test_wrong_values_are_named(key, value):
    with pytest.raises(ValueError, match=key):
        Config(**{key: value})
