"""Distributions of tails: each class is drawn as often as its inclusion probability says."""

import numpy as np
import pytest
import torch

from slide_torch import LSHLinear, LSHOptions
from slide_torch.tails.proposals import FixedProposal, log_uniform_shares


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
