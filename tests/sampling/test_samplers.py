"""Tails from every distribution: corrected losses are right on average, for every distribution, certain part
and pattern."""

import copy
import dataclasses
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers import in_format_1
from loss_problems import (
    PATTERNS,
    binary,
    dense_binary,
    draws_of,
    gradients,
    losses_of,
    make,
    padded,
    small_layer,
    z_scores,
)

from slide_torch import LSHLinear, LSHOptions, load_sampler_state, ops, sampler_state
from slide_torch.active_set import Labels
from slide_torch.functional import lsh_linear_cross_entropy
from slide_torch.sampling.draw import draw_active_set
from slide_torch.sampling.targets import as_labels

DISTRIBUTIONS = {
    "log_uniform": "log_uniform",
    "frequencies": "frequencies",
    "two_fixed": ("uniform", "frequencies"),
    "three": ("log_uniform", "uniform", "frequencies"),
}


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
@pytest.mark.parametrize("name", ["frequencies", "three"])
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


@pytest.mark.parametrize("name", ["log_uniform", "frequencies"])
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
    if layer.tables.uses_tables:
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
    del state[""]["frequencies"], state[""]["options"]["tail_distribution"]
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
