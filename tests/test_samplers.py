"""Tails from every distribution: each class is in as often as its inclusion probability says, and corrected
losses are right on average, for every distribution, certain part and pattern."""

import copy
import dataclasses
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import in_format_1
from test_functional import (
    PATTERNS,
    draws_of,
    gradients,
    losses_of,
    make,
    padded,
    small_layer,
    z_scores,
)
from test_losses import binary, dense_binary

from slide_torch import LSHLinear, LSHOptions, load_sampler_state, ops, sampler_state
from slide_torch.active_set import Labels
from slide_torch.functional import lsh_linear_cross_entropy
from slide_torch.sampling.draw import draw_active_set
from slide_torch.sampling.targets import as_labels
from slide_torch.tails.proposals import FixedProposal, kernel_sums, log_uniform_shares

DISTRIBUTIONS = {
    "log_uniform": "log_uniform",
    "frequencies": "frequencies",
    "quadratic_kernel": "quadratic_kernel",
    "two_fixed": ("uniform", "frequencies"),
    "three": ("log_uniform", "uniform", "quadratic_kernel"),
}


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


# --- unbiased ----------------------------------------------------------------------------------------


def corrected(pattern, size, distribution, **options):
    case = small_layer(
        pattern, size, correction="importance", tail_distribution=distribution, **options
    )
    generator = torch.Generator().manual_seed(9)
    case.tables.set_frequencies(torch.rand(60, generator=generator) * 20 + 1, 1.0)
    return case


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_estimates_of_the_normaliser_are_unbiased(pattern, name):
    """exp(loss) = Z / exp(z_label), and the estimate of Z is unbiased exactly, however the logits
    vary: they vary by about 1.5 here."""
    case = corrected(pattern, 1.5, DISTRIBUTIONS[name])
    losses = losses_of(case, 800)
    truth = F.cross_entropy(F.linear(case.x, case.weight, case.bias), case.y, reduction="none")
    z = z_scores(losses.exp(), truth.detach().exp())
    assert (z.abs() < 3.5).all() and (z**2).mean() < 3
    # without the correction a part of the sum is taken for it all: every sample's estimate is too small, in
    # each draw, and by more than twice what is let pass above
    case.tables.options = dataclasses.replace(case.tables.options, correction="none")
    plain = losses_of(case, 200)
    exact = truth.detach().exp()
    assert (plain.exp() <= exact * (1 + 1e-9)).all()
    assert (z_scores(plain.exp(), exact) < -7).all()


@pytest.mark.parametrize("family", ["exact", "none"])
def test_unbiased_with_other_certain_parts(family):
    """Labels and the exact best, or nothing but the batch's labels."""
    certain = {"family": "exact"} if family == "exact" else {}
    case = corrected("shared", 1.5, "log_uniform", **certain)
    if family == "none":
        case.tables.options = dataclasses.replace(case.tables.options, budget=0)
    losses = losses_of(case, 800)
    truth = F.cross_entropy(F.linear(case.x, case.weight, case.bias), case.y, reduction="none")
    z = z_scores(losses.exp(), truth.detach().exp())
    assert (z.abs() < 3.5).all()


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", ["frequencies", "quadratic_kernel", "three"])
def test_binary_loss_and_gradients_are_unbiased(pattern, name):
    case = corrected(pattern, 1.5, DISTRIBUTIONS[name])
    lists = [[1, 2], [40], [], [7, 50]]
    target, dense = padded(lists, 2), torch.zeros(4, 60, dtype=torch.float64)
    for b, own in enumerate(lists):
        dense[b, own] = 1
    found = []
    for seed in range(600):
        generator = torch.Generator().manual_seed(seed)
        loss = binary(case, target, reduction="sum", generator=generator)
        grads = torch.cat([g.flatten() for g in gradients(loss, case)])
        found.append(torch.cat([loss.detach()[None], grads]))
    truth = dense_binary(case, dense, reduction="sum")
    exact = torch.cat([g.flatten() for g in gradients(truth, case)])
    found, expected = torch.stack(found), torch.cat([truth.detach()[None], exact])
    varies = found.std(0) > 1e-12
    torch.testing.assert_close(found[0, ~varies], expected[~varies])
    z = z_scores(found[:, varies], expected[varies])
    assert len(z) > 100 and abs(z[0]) < 3.5
    assert (z[1:].abs() > 3).float().mean() < 0.03 and 0.2 < (z[1:] ** 2).mean() < 2


@pytest.mark.parametrize("name", ["log_uniform", "quadratic_kernel"])
def test_gradients_of_cross_entropy(name):
    """As test_importance_estimates_loss_and_gradients: where logits hardly vary, so that the bias of a
    quotient is below the noise. (Weights vary more than with a uniform tail, so the loss of the
    logarithm is looked at no closer than its bias, half the variance.)"""
    case = corrected("shared", 0.025, DISTRIBUTIONS[name])
    losses, grads = draws_of(case, 600)
    truth = F.cross_entropy(F.linear(case.x, case.weight, case.bias), case.y, reduction="none")
    bias = -losses.var(0).sum() / 2
    error = losses.sum(1).std() / 600**0.5
    assert abs(losses.sum(1).mean() - truth.sum() - bias) < 4 * error + bias.abs()
    exact = torch.cat([g.flatten() for g in gradients(truth, case)])
    assert (grads.mean(0) - exact).norm() < 0.1 * exact.norm()


def test_label_smoothing_is_unbiased():
    """The mean of all logits is a sum over rows with the same weights, divided by N."""
    case = corrected("shared", 1.5, "log_uniform")
    found = []
    for seed in range(800):
        both = [
            lsh_linear_cross_entropy(
                case.x, case.weight, case.y, linear_bias=case.bias, tables=case.tables,
                reduction="none", label_smoothing=s, generator=torch.Generator().manual_seed(seed),
            ).detach()
            for s in (0.0, 0.9)
        ]  # fmt: skip
        # the loss is log Z - (1 - s) z_label - s mean(z): log Z, which has a bias, cancels
        found.append(both[1] - both[0])
    logits = F.linear(case.x, case.weight, case.bias)
    truth = [
        F.cross_entropy(logits, case.y, reduction="none", label_smoothing=s).detach()
        for s in (0.0, 0.9)
    ]
    assert (z_scores(torch.stack(found), truth[1] - truth[0]).abs() < 3.5).all()


# --- what is certain ---------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("budget", [1, 5, 20])
def test_exact_candidates_are_the_largest_logits(pattern, budget):
    case = make(80, 6, 9, pattern=pattern, family="exact", budget=budget, tail=3)
    target = torch.stack([case.y, case.y.flip(0), torch.full((9,), -100)], 1)
    target[4] = -100
    labels = as_labels(target, torch.Size([9]), 80, torch.float64, -100)
    active = draw_active_set(
        case.tables, case.x, labels, weight=case.weight, bias=case.bias, seed=5
    )
    logits = F.linear(case.x, case.weight, case.bias)
    tail = ops.sample_tail(3, 80, 5).tolist()
    expected = []
    for b in range(9):
        own = {int(i) for i in target[b] if i >= 0}
        order = logits[b].argsort(descending=True).tolist()
        best = [i for i in order if i not in own]
        expected.append(own | set(best[: max(0, budget - len(own))]))
    if pattern == "shared":
        assert active.rows.tolist() == sorted(set.union(*expected, set(tail)))
        assert torch.equal(active.rows[active.label_places], labels.ids)
    else:
        for b, own in enumerate(expected):
            part = active.active[active.offsets[b] : active.offsets[b + 1]].tolist()
            assert len(set(part)) == len(part) and set(part) == own | set(tail)
        assert torch.equal(active.active[active.label_places].long(), labels.ids)
    assert not case.tables.built


def test_exact_candidates_have_recall_one():
    layer = LSHLinear(6, 80, options=LSHOptions(family="exact", budget=10, tail=3))
    assert layer.recall(torch.randn(5, 6)) == 1.0
    loss = F.cross_entropy(layer(torch.randn(5, 6)), torch.arange(5))
    loss.backward()
    assert not layer.tables.built and layer.stats()["rehashes"] == 0


# --- as everything else ------------------------------------------------------------------------------

OPTIONS = {
    "log_uniform": dict(budget=0, tail_distribution="log_uniform"),
    "frequencies": dict(budget=4, tail_distribution="frequencies", K=3, L=4),
    "kernel": dict(budget=0, tail_distribution="quadratic_kernel"),
    "mixture": dict(budget=4, family="exact", tail_distribution=DISTRIBUTIONS["three"]),
}


def layer_of(name, N=3000, **options):
    torch.manual_seed(0)
    chosen = LSHOptions(**{"tail": 200, "correction": "importance", **OPTIONS[name], **options})
    layer = LSHLinear(20, N, options=chosen, sparse=True)
    layer.set_frequencies(torch.arange(N, 0, -1))
    return layer


def drawn(layer, seed=3):
    x = torch.randn(40, 20, generator=torch.Generator().manual_seed(1))
    layer.tables.maintain(
        layer.weight, layer.bias, advance=False, all_rows_move=False,
        generator=torch.Generator().manual_seed(2),
    )  # fmt: skip
    return draw_active_set(
        layer.tables, x, Labels.none(40, x.dtype), weight=layer.weight, bias=layer.bias, seed=seed
    )


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", OPTIONS)
def test_same_seed_same_draw_at_any_number_of_threads(name, pattern):
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        layer = layer_of(name, pattern=pattern)
        found.append(drawn(layer))
    torch.set_num_threads(1)
    for other in found[1:]:
        assert torch.equal(other.rows, found[0].rows)
        assert torch.equal(other.log_weight, found[0].log_weight)
    again = drawn(layer, seed=4)
    assert not torch.equal(again.rows, found[0].rows)
    assert torch.isfinite(again.log_weight).all() and again.log_weight.max() > 0


@pytest.mark.parametrize("name", OPTIONS)
def test_copies_draw_alike(name):
    layer = layer_of(name, N=300, tail=50)
    expected = drawn(layer)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(drawn(other).rows, expected.rows)
    other = layer_of(name, N=300, tail=50)
    other.set_frequencies(torch.ones(300))
    load_sampler_state(other, sampler_state(layer))
    found = drawn(other)
    assert torch.equal(found.rows, expected.rows)
    assert torch.equal(found.log_weight, expected.log_weight)


def test_states_from_before_there_were_distributions():
    layer = LSHLinear(6, 60, options=LSHOptions(budget=3, tail=5, K=2, L=2))
    F.cross_entropy(layer(torch.randn(5, 6)), torch.arange(5)).backward()
    state = {"": in_format_1(sampler_state(layer)[""])}
    for new in ("kernel_sums", "frequencies"):
        del state[""][new]
    for new in ("tail_distribution", "kernel_alpha"):
        del state[""]["options"][new]
    other = LSHLinear(6, 60, options=layer.options)
    load_sampler_state(other, state)
    found, expected = other.tables.tensors(), layer.tables.tensors()
    assert found.keys() == expected.keys() >= {"codes", "ids"}
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_a_uniform_tail_is_as_before():
    """Rows without replacement by Floyd's algorithm, weighted by how many they stand for."""
    layer = LSHLinear(
        6, 90, options=LSHOptions(budget=0, tail=20, correction="importance"), dtype=torch.float64
    )
    x, y = torch.randn(4, 6, dtype=torch.float64), torch.tensor([3, 80, 3, 11])
    labels = as_labels(y, y.shape, 90, torch.float64, -100)
    active = draw_active_set(layer.tables, x, labels, seed=7)
    tail = set(ops.sample_tail(20, 90, 7).tolist())
    assert active.rows.tolist() == sorted(tail | {3, 80, 11})
    own = len(tail - {3, 80, 11})
    for row, weight in zip(active.rows.tolist(), active.log_weight.exp().tolist(), strict=True):
        assert weight == (1 if row in (3, 80, 11) else pytest.approx((90 - 3) / own))


def test_kernel_sums_follow_the_schedule():
    options = LSHOptions(budget=0, tail=20, tail_distribution="quadratic_kernel", rehash_every=3)
    layer = LSHLinear(8, 200, options=options, sparse=True)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    kept = []
    for _ in range(8):
        loss = F.cross_entropy(layer(torch.randn(16, 8)), torch.randint(200, (16,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        kept.append(layer.tables.tail.kernel_sums)
    assert [kept[i] is kept[i - 1] for i in range(1, 8)] == [
        True,
        True,
        False,
        True,
        True,
        True,
        False,
    ]
    assert layer.stats()["rehashes"] == 2 and layer.tables.memory_bytes() >= kept[-1].nbytes
    layer.rehash()
    assert layer.tables.tail.kernel_sums is None


# --- refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(tail_distribution="zipf"), "tail_distribution: expected one of .*got 'zipf'"),
        (dict(tail_distribution=()), r"tail_distribution: expected one of .*got \(\)"),
        (dict(tail_distribution=("uniform", "uniform")), "tail_distribution: expected"),
        (dict(tail_distribution=["uniform"]), "tail_distribution: expected .*got \\['uniform'\\]"),
        (dict(tail_distribution=None), "tail_distribution: expected"),
        (dict(tail=0, tail_distribution="log_uniform"), "tail: expected at least 1 with"),
        (
            dict(tail=1, tail_distribution=("uniform", "log_uniform")),
            "tail: expected at least 2 with",
        ),
        (dict(kernel_alpha=0), "kernel_alpha: expected a number above 0 and at most 1e6, got 0"),
        (dict(kernel_alpha="1"), "kernel_alpha: expected a number"),
        (dict(kernel_alpha=float("nan")), "kernel_alpha: expected a number"),
        (dict(family="exact", rerank=100), "rerank: expected 0 with family='exact'"),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises(ValueError, match=f"LSHOptions: {message}"):
        LSHOptions(**options)


@pytest.mark.parametrize(
    "counts,power,message",
    [
        (torch.ones(59), 1, r"counts: expected a tensor of shape \(60,\), got \(59,\)"),
        ([1] * 60, 1, "counts: expected a tensor .*got list"),
        (torch.arange(60), 1, r"counts: .*got 0.0 for class 0 \(1 such\).*counts.clamp\(min=1\)"),
        (torch.full((60,), torch.inf), 1, r"counts: .*got inf for class 0 \(60 such\)"),
        (torch.ones(60), 1.5, "power: expected a number from 0 to 1, got 1.5"),
        (torch.ones(60), "1", "power: expected a number"),
    ],
)
def test_counts_that_are_refused(counts, power, message):
    options = LSHOptions(budget=0, tail=5, tail_distribution="frequencies")
    layer = LSHLinear(4, 60, options=options)
    with pytest.raises(ValueError, match=f"LSHLinear.set_frequencies: {message}"):
        layer.set_frequencies(counts, power)
    assert layer.tables.tail.frequencies is None


def test_counts_that_are_missing():
    layer = LSHLinear(4, 60, options=LSHOptions(tail=5, tail_distribution="frequencies"))
    state = torch.get_rng_state()
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    for call in (lambda z: F.cross_entropy(z, torch.arange(3)), lambda z: z.topk(2)):
        with pytest.raises(ValueError, match=r"call layer.set_frequencies\(counts\) first"):
            call(layer(x))
        assert not layer.tables.built and torch.equal(torch.get_rng_state(), state)
