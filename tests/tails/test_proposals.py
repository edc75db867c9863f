"""Distributions of tails: each class is drawn as often as its inclusion probability says."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from slide_torch import LSHLinear, LSHOptions, ops
from slide_torch.tails.proposals import FixedProposal, kernel_sums, log_uniform_shares


def inclusion_by_strata(shares, count):
    """1 - product over strata of (1 - length of a row's interval in the stratum)."""
    ends = shares.double().cumsum(0) / shares.double().sum() * count
    begins = torch.cat([ends.new_zeros(1), ends[:-1]])
    strata = torch.arange(count)
    low = torch.maximum(begins[:, None], strata[None])
    high = torch.minimum(ends[:, None], strata[None] + 1.0)
    return 1 - (1 - (high - low).clamp(min=0)).prod(1)


def assert_drawn_as_said(sets, inclusion):
    """How often each row was drawn, against its probability; and no row that may not be."""
    drawn = torch.zeros(len(sets), len(inclusion), dtype=torch.float64)
    for i, ids in enumerate(sets):
        assert ids.dtype == torch.int32 and (ids.diff() > 0).all()
        drawn[i, ids.long()] = 1
    certain = inclusion == 1
    assert (drawn[:, certain] == 1).all()
    found, expected = drawn.mean(0)[~certain], inclusion[~certain]
    z = (found - expected) / (expected * (1 - expected) / len(sets)).sqrt()
    # rows that are expected once or less have no normal distribution
    z = z[expected * len(sets) > 5]
    assert len(z) > 20 and z.abs().max() < 4.5 and 0.5 < z.square().mean() < 1.5


# --- fixed distributions --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["log_uniform", "equal", "steep", "one_heavy", "random"])
@pytest.mark.parametrize("count", [1, 20, 150])
def test_fixed_proposal(name, count):
    shares = {
        "log_uniform": log_uniform_shares(200),
        "equal": np.ones(200),
        "steep": 0.97 ** np.arange(200.0),
        "one_heavy": np.where(np.arange(200) == 7, 1e6, 1.0),
        "random": np.random.default_rng(0).random(200) ** 3,
    }[name]
    proposal = FixedProposal.of_shares(shares, count)
    assert (proposal.inclusion > 0).all() and (proposal.inclusion <= 1).all()
    assert proposal.inclusion.sum() <= count * (1 + 1e-9)
    others = torch.ones(200, dtype=torch.bool)
    others[proposal.certain.long()] = False
    assert (proposal.inclusion[~others] == 1).all()
    if len(proposal.certain) < count:
        rest = torch.from_numpy(shares)[others]
        # of the others none is owed more than one draw, and a certain one is
        strata = count - len(proposal.certain)
        assert rest.max() / rest.sum() * strata <= 1 + 1e-9
        exact = inclusion_by_strata(rest, strata)
        torch.testing.assert_close(proposal.inclusion[others], exact, rtol=1e-9, atol=1e-12)
    sets = [proposal.draw(seed) for seed in range(1000)]
    assert max(map(len, sets)) <= count
    if 1 < count < 150 and name != "one_heavy":
        assert_drawn_as_said(sets, proposal.inclusion)
    if name == "equal":  # a boundary cuts a row now and then, not more
        assert np.mean([len(s) for s in sets]) > 0.75 * count
    assert torch.equal(proposal.draw(5), sets[5])
    if len(proposal.certain) < count and (name, count) != ("one_heavy", 1):
        assert len({tuple(own.tolist()) for own in sets}) > 1


def test_log_uniform_is_that_of_candidate_samplers():
    """log((i + 2) / (i + 1)) / log(N + 1)"""
    shares = log_uniform_shares(1000)
    i = np.arange(1000)
    np.testing.assert_allclose(
        shares / shares.sum(), np.log((i + 2) / (i + 1)) / np.log(1001), rtol=1e-12
    )


def test_frequencies_are_a_power_of_counts():
    counts = torch.tensor([1, 16, 81, 256])
    layer = LSHLinear(3, 4, options=LSHOptions(budget=0, tail=1, tail_distribution="frequencies"))
    for power, expected in ((0.75, [1, 8, 27, 64]), (1, [1, 16, 81, 256]), (0, [1, 1, 1, 1])):
        layer.set_frequencies(counts, power)
        inclusion = layer.tables.tail.fixed_proposal(1).inclusion
        torch.testing.assert_close(inclusion, torch.tensor(expected).double() / sum(expected))


# --- the quadratic kernel -------------------------------------------------------------------------


def kernel_problem(dtype, bias=True, N=203, d=7, B=5):
    generator = torch.Generator().manual_seed(1)
    parts = [
        torch.randn(s, generator=generator, dtype=torch.float64) for s in ((N, d), (N,), (B, d))
    ]
    weight, own_bias, queries = (p.to(dtype) for p in parts)
    return weight, own_bias if bias else None, queries


def kernel_shares(weight, bias, queries, alpha):
    """Mean over queries of alpha z^2 + 1, each normalised."""
    bias = None if bias is None else bias.double()
    kernel = alpha * F.linear(queries.double(), weight.double(), bias).square() + 1
    return (kernel / kernel.sum(1, keepdim=True)).mean(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("leaves", [1, 2, 16, 128])
@pytest.mark.parametrize("alpha", [0.1, 100.0])
def test_kernel_probabilities(dtype, bias, leaves, alpha):
    weight, b, queries = kernel_problem(dtype, bias)
    sums = ops.kernel_sums(weight, b, leaves)
    rows = weight if b is None else torch.cat([weight, b[:, None]], 1)
    upper = torch.triu_indices(rows.shape[1], rows.shape[1])
    tolerance = 2e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(
        sums[0], (rows.T @ rows)[upper[0], upper[1]], rtol=tolerance, atol=100 * tolerance
    )
    shares = kernel_shares(weight, b, queries, alpha)
    everything = torch.arange(203, dtype=torch.int32)
    for count in (1, 30):
        ids, inclusion, asked = ops.kernel_draw(
            sums, weight, b, queries, alpha, count, everything, 3
        )
        # what adds up to a row's two edges rounds; the edges reach up to `count`
        expected = inclusion_by_strata(shares, count)
        torch.testing.assert_close(asked, expected, rtol=100 * tolerance, atol=count * tolerance)
        assert torch.equal(inclusion, asked[ids.long()]) and 1 <= len(ids) <= count
        assert (ids.diff() > 0).all()


@pytest.mark.parametrize("stale", [False, True])
def test_kernel_draws_with_the_probabilities_that_it_tells(stale):
    """Also where the sums are of other rows than the present: the scores then differ from the kernel's, the
    probabilities do not differ from the draws'."""
    weight, bias, queries = kernel_problem(torch.float32)
    sums = ops.kernel_sums(weight, bias, 16)
    if stale:
        weight = weight.flip(0) * 1.5
    everything = torch.arange(203, dtype=torch.int32)
    draws = [
        ops.kernel_draw(sums, weight, bias, queries, 5.0, 30, everything, seed)
        for seed in range(2000)
    ]
    inclusion = draws[0][2]
    assert all(torch.equal(d[2], inclusion) for d in draws)
    assert_drawn_as_said([d[0] for d in draws], inclusion)
    one = ops.kernel_draw(sums, weight, bias, queries, 5.0, 1, everything, 0)[2]
    torch.testing.assert_close(one.sum(), torch.tensor(1.0).double(), rtol=1e-9, atol=0)
    near = (one / kernel_shares(weight, bias, queries, 5.0) - 1).abs().max() < 1e-3
    assert near != stale


def test_kernel_of_queries_that_say_nothing_is_uniform():
    weight, bias, _ = kernel_problem(torch.float32, bias=False)
    sums = kernel_sums(weight, bias)
    everything = torch.arange(203, dtype=torch.int32)
    for queries in (
        torch.zeros(2, 7),
        torch.zeros(0, 7),
        torch.full((1, 7), torch.nan),
        torch.full((1, 7), 1e30),
    ):
        asked = ops.kernel_draw(sums, weight, bias, queries, 100.0, 1, everything, 0)[2]
        torch.testing.assert_close(asked, torch.full((203,), 1 / 203).double())
    broken = weight.clone()
    broken[5, 3] = torch.nan
    with pytest.raises(ValueError, match="weight: expected finite rows, got NaN or Inf"):
        kernel_sums(broken, None)
