"""Vector quantization against loops: nearest codes, moving averages, revival, and two ranks."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from selfsup.models.quantizers import VectorQuantizer, code_means, nearest_codes, perplexity
from selfsup.randomness import isolated, seed_layers, torch_generator


def build(num_codes: int = 6, dim: int = 3, **options) -> VectorQuantizer:
    with isolated():
        seed_layers(0, "model")
        return VectorQuantizer(num_codes, dim, **options)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch_generator(seed, "vectors"))


def snapshot(module: VectorQuantizer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.named_buffers()}


def unchanged(module: VectorQuantizer, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in module.named_buffers())


def slow_codes(vectors: Tensor, codebook: Tensor) -> list[int]:
    """The nearest code of each vector, one distance after another, in float64."""
    out = []
    for v in vectors.double().tolist():
        distances = [math.dist(v, c) for c in codebook.double().tolist()]
        out.append(distances.index(min(distances)))
    return out


def slow_step(
    module: VectorQuantizer, vectors: Tensor
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Equations 6 to 8 one code after another, float64: counts, sums, codebook."""
    codes = slow_codes(vectors, module.codebook)
    counts, sums = module.counts.double().numpy(), module.sums.double().numpy()
    for i in range(len(counts)):
        chosen = [v for v, code in zip(vectors.double().numpy(), codes, strict=True) if code == i]
        counts[i] = module.decay * counts[i] + (1 - module.decay) * len(chosen)
        sums[i] = module.decay * sums[i] + (1 - module.decay) * sum(chosen, np.zeros(len(sums[i])))
    total = sum(counts)
    codebook = np.zeros_like(sums)
    for i in range(len(counts)):
        smoothed = (counts[i] + module.epsilon) / (total + len(counts) * module.epsilon) * total
        codebook[i] = sums[i] / smoothed
    return counts, sums, codebook


@pytest.mark.parametrize(
    ("vectors", "codes", "dim"), [(40, 7, 3), (5, 1, 2), (1, 9, 4), (30, 5, 1)]
)
def test_nearest_codes_equal_a_loop(vectors, codes, dim):
    v, c = 2 * draw(vectors, dim) + 1, 2 * draw(codes, dim, seed=1) + 1
    assert nearest_codes(v, c).tolist() == slow_codes(v, c)


def test_of_equally_near_codes_the_first_is_taken():
    codebook = torch.tensor([[1.0], [-1.0], [1.0]])
    assert nearest_codes(torch.tensor([[0.0], [3.0], [-3.0]]), codebook).tolist() == [0, 0, 1]


def test_perplexity_counts_codes_that_are_chosen_equally_often():
    assert perplexity(torch.tensor([3.0, 3.0, 0.0, 3.0])).item() == pytest.approx(3)
    assert perplexity(torch.tensor([0.0, 5.0])).item() == pytest.approx(1)
    share = np.array([0.5, 0.25, 0.25])
    expected = math.exp(-sum(share * np.log(share)))
    assert perplexity(torch.tensor([2.0, 1.0, 1.0])).item() == pytest.approx(expected)


def test_code_means_are_means_where_there_is_no_smoothing():
    counts, sums = torch.tensor([2.0, 4.0]), torch.tensor([[2.0, 6.0], [4.0, -4.0]])
    assert code_means(counts, sums, 0.0).tolist() == [[1, 3], [1, -1]]


def test_forward_gives_codes_vectors_and_commitment():
    quantizer, vectors = build().eval(), draw(4, 5, 3)
    out = quantizer(vectors)
    expected = slow_codes(vectors.view(20, 3), quantizer.codebook)
    assert out.codes.shape == (4, 5)
    assert out.codes.flatten().tolist() == expected
    assert torch.equal(quantizer.codes(vectors), out.codes)
    assert len(set(expected)) > 2
    chosen = quantizer.lookup(out.codes)
    torch.testing.assert_close(out.vectors, chosen, rtol=0, atol=1e-6)
    squares = [
        (a - b) ** 2
        for a, b in zip(vectors.flatten().tolist(), chosen.flatten().tolist(), strict=True)
    ]
    assert out.commitment.item() == pytest.approx(sum(squares) / len(squares), rel=1e-5)
    counts = torch.tensor([float(expected.count(i)) for i in range(6)])
    assert out.perplexity == perplexity(counts)


def test_gradient_passes_straight_through():
    quantizer, vectors = build(), draw(4, 5, 3).requires_grad_()
    weight = draw(4, 5, 3, seed=1)
    (quantizer(vectors).vectors * weight).sum().backward()
    assert torch.equal(vectors.grad, weight)
    assert not list(quantizer.parameters())


def test_commitment_draws_vectors_to_their_codes():
    quantizer, vectors = build(), draw(4, 3).requires_grad_()
    out = quantizer(vectors)
    out.commitment.backward()
    expected = 2 * (vectors - quantizer.lookup(out.codes)).detach() / vectors.numel()
    torch.testing.assert_close(vectors.grad, expected)


def test_autocast_changes_nothing():
    quantizer, vectors = build().eval(), draw(40, 3).bfloat16()
    expected = quantizer(vectors.float())
    with torch.autocast("cpu", torch.bfloat16):
        got = quantizer(vectors)
        assert torch.equal(quantizer.codes(vectors), expected.codes)
    assert got.vectors.dtype == got.commitment.dtype == torch.float32
    assert all(map(torch.equal, got, expected))


def test_codebook_follows_the_equations():
    quantizer = build(decay=0.9, revive_below=0.0)
    for step in range(3):
        vectors = draw(30, 3, seed=step)
        expected = slow_step(quantizer, vectors)
        quantizer(vectors)
        quantizer.after_step(step)
        for got, wanted in zip(
            (quantizer.counts, quantizer.sums, quantizer.codebook), expected, strict=True
        ):
            np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


def test_several_batches_of_one_step_add_up():
    once, twice = build(), build()
    vectors = draw(10, 4, 3)
    once(vectors)
    for part in (vectors[:3], vectors[3:]):
        twice(part)
    for quantizer in (once, twice):
        quantizer.after_step(0)
    for name, tensor in once.named_buffers():
        torch.testing.assert_close(dict(twice.named_buffers())[name], tensor, rtol=1e-6, atol=1e-6)
    assert not once.new_vectors
    assert not once.new_counts.any()
    assert not once.new_sums.any()


def test_nothing_moves_before_after_step_nor_in_evaluation():
    quantizer = build()
    before = snapshot(quantizer)
    quantizer.eval()(draw(9, 3))
    assert unchanged(quantizer, before)
    assert not quantizer.new_vectors
    quantizer.train().codes(draw(9, 3))
    assert unchanged(quantizer, before)
    quantizer(draw(9, 3))
    assert all(torch.equal(t, before[name]) for name, t in quantizer.state_dict().items())
    assert not any("new" in name for name in quantizer.state_dict())
    quantizer.forget()
    assert unchanged(quantizer, before)
    assert not quantizer.new_vectors


def with_dead_codes(*places: int) -> tuple[VectorQuantizer, Tensor]:
    """A quantizer some of whose codes are never chosen, and 30 vectors that choose the others."""
    quantizer = build(num_codes=6)
    alive = [i for i in range(6) if i not in places]
    quantizer.counts.fill_(5.0)
    quantizer.counts[list(places)] = 0.01  # of a mean of 1.7 to 5
    quantizer.sums.copy_(quantizer.counts.unsqueeze(1) * quantizer.codebook)
    vectors = quantizer.codebook[alive].repeat(30, 1)[:30] + 0.01 * draw(30, 3)
    return quantizer, vectors


def test_dead_codes_become_vectors_of_the_batch():
    quantizer, vectors = with_dead_codes(1, 4)
    counts, _, codebook = slow_step(quantizer, vectors)
    quantizer(vectors[:10])
    quantizer(vectors[10:])
    quantizer.after_step(0)
    for i in (0, 2, 3, 5):
        np.testing.assert_allclose(quantizer.codebook[i], codebook[i], rtol=1e-5)
        np.testing.assert_allclose(quantizer.counts[i], counts[i], rtol=1e-5)
    for i in (1, 4):
        assert (quantizer.codebook[i] == vectors).all(1).any()
        assert quantizer.counts[i].item() == pytest.approx(counts.mean(), rel=1e-5)
        torch.testing.assert_close(quantizer.sums[i], quantizer.counts[i] * quantizer.codebook[i])
    assert not torch.equal(quantizer.codebook[1], quantizer.codebook[4])


def test_a_revived_code_has_time_to_be_chosen_before_it_dies_again():
    quantizer, vectors = with_dead_codes(1)
    quantizer(vectors)
    quantizer.after_step(0)
    quantizer.codebook[1] = 50  # out of reach: nothing will choose it
    quantizer.sums[1] = 50 * quantizer.counts[1]
    step = 0
    while (quantizer.codebook[1] > 40).all() and step < 400:
        step += 1
        quantizer(vectors)
        quantizer.after_step(step)
    # 0.99^n falls below 0.05 after 298 steps; the mean rises meanwhile, from 4 to 5
    assert 260 < step < 300


def test_revival_is_decided_by_the_saved_seed_and_the_step():
    found = []
    for step in (0, 0, 1, 2):
        quantizer, vectors = with_dead_codes(1)
        quantizer(vectors)
        before = torch.get_rng_state()
        quantizer.after_step(step)
        assert torch.equal(torch.get_rng_state(), before)
        found.append(tuple(quantizer.codebook[1].tolist()))
    assert found[0] == found[1]
    assert len(set(found)) == 3
    assert "seed" in build().state_dict()


def test_fewer_vectors_than_dead_codes_revive_as_many():
    quantizer, vectors = with_dead_codes(0, 1, 2, 3)
    before = quantizer.codebook.clone()
    quantizer(vectors[:2])
    quantizer.after_step(0)
    for i in (0, 1):
        assert (quantizer.codebook[i] == vectors[:2]).all(1).any()
    torch.testing.assert_close(quantizer.codebook[2:4], before[2:4], rtol=1e-3, atol=1e-3)


def test_revival_can_be_switched_off():
    quantizer, vectors = with_dead_codes(1)
    quantizer.revive_below = 0.0
    before = quantizer.codebook[1].clone()
    quantizer(vectors)
    quantizer.after_step(0)
    torch.testing.assert_close(quantizer.codebook[1], before, rtol=1e-3, atol=1e-3)


def test_usage_is_the_share_of_codes_chosen_within_the_window():
    quantizer, vectors = with_dead_codes(1, 4)
    quantizer.revive_below, quantizer.window = 0.0, 3
    quantizer.idle.fill_(3)
    assert quantizer.usage() == 0
    used = []
    for step in range(6):
        quantizer(vectors if step == 0 else quantizer.codebook[:1].clone())
        quantizer.after_step(step)
        used.append(quantizer.usage().item())
    assert used == pytest.approx([4 / 6, 4 / 6, 4 / 6, 1 / 6, 1 / 6, 1 / 6])
    assert build(decay=0.99).window == 100
    assert build().usage() == 0


def test_codes_begin_as_vectors_of_the_data():
    quantizer, vectors = build(), draw(50, 3)
    quantizer.counts.fill_(7)
    quantizer(vectors)
    quantizer.initialise(vectors, torch_generator(0, "first"))
    rows = {tuple(row) for row in vectors.tolist()}
    chosen = [tuple(row) for row in quantizer.codebook.tolist()]
    assert len(set(chosen)) == 6
    assert set(chosen) <= rows
    assert chosen != [tuple(row) for row in vectors[:6].tolist()]
    assert (quantizer.counts == 1).all()
    assert torch.equal(quantizer.sums, quantizer.codebook)
    assert not quantizer.new_counts.any()
    few = build()
    last = few.codebook[4:].clone()
    few.initialise(vectors[:4], torch_generator(0, "first"))
    assert {tuple(row) for row in few.codebook[:4].tolist()} < rows
    assert torch.equal(few.codebook[4:], last)


def test_a_copy_from_its_saved_state_goes_on_equally():
    quantizer, other = build(), build()
    other.codebook.normal_(generator=torch_generator(1, "other"))
    other.seed.zero_()
    for step in range(4):
        if step == 2:
            other.load_state_dict(copy.deepcopy(quantizer.state_dict()))
        for each in (quantizer, other):
            each(0.1 * draw(12, 3, seed=step))  # some codes die
            each.counts[3] = 0.0
            each.after_step(step)
    assert unchanged(other, snapshot(quantizer))


# ---- two ranks ----------------------------------------------------------------------------------


def after_steps(rows: slice) -> dict[str, Tensor]:
    """What one process holds that sees those rows of each batch of 12; codes die on the way."""
    quantizer = build()
    for step in range(3):
        quantizer(draw(12, 2, 3, seed=step)[rows])
        quantizer.counts[2] = 0.0
        quantizer.after_step(step)
    return snapshot(quantizer)


def one_rank(rank: int) -> dict[str, Tensor]:
    """What each of the two processes runs."""
    return after_steps(slice(6 * rank, 6 * rank + 6))


def test_the_codebook_is_equal_on_all_ranks_and_follows_the_vectors_of_all(on_two_ranks):
    first, second = on_two_ranks(one_rank)
    expected = after_steps(slice(None))
    for name, tensor in expected.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
