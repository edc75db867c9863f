"""The decoupled softmax: each label of a row against the row's negatives, not against its other labels."""

import math
from types import SimpleNamespace

import pytest
import reference
import torch
import torch.nn.functional as F
from loss_problems import (
    ALL_ACTIVE,
    LISTS,
    PATTERNS,
    assert_same,
    check_as_exact_as_torch,
    dense_active_set,
    gradients,
    make,
    padded,
    sampled,
    small_layer,
    uniform_over,
    z_scores,
)
from torch.autograd import gradcheck

from slide_torch import LSHLinear, LSHOptions
from slide_torch.sampling.draw import draw_active_set
from slide_torch.sampling.targets import as_labels

CORRECTIONS = ["none", "importance"]


def dense(case, target, positive=None, weight=None, scale=1.0):
    """Losses (B) with every neuron active; the classes with a positive target are the labels."""
    positive = target > 0 if positive is None else positive
    logits = F.linear(case.x, case.weight, case.bias) * scale
    shares = target if weight is None else target * weight
    return reference.decoupled_cross_entropy(logits, shares.to(logits.dtype), positive)


def reduced(losses, reduction, total):
    return {"none": losses, "sum": losses.sum(), "mean": losses.sum() / total}[reduction]


# --- every neuron active ------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("pattern", ALL_ACTIVE)
def test_label_lists(pattern, weighted, reduction):
    case = make(**ALL_ACTIVE[pattern])
    weight = torch.rand(40, dtype=torch.float64) if weighted else None
    target = uniform_over(LISTS, 40)
    total = (target if weight is None else target * weight).sum()
    theirs = reduced(dense(case, target, weight=weight, scale=0.7), reduction, total)
    options = dict(weight=weight, reduction=reduction, scale=0.7, decoupled=True)
    assert_same(sampled(case, padded(LISTS, 5), **options), theirs, case)
    flipped = padded(LISTS, 5, pad=-1).flip(1)
    assert_same(sampled(case, flipped, ignore_index=-1, **options), theirs, case)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("form", ["dense", "csr"])
@pytest.mark.parametrize("pattern", ALL_ACTIVE)
def test_probabilities(pattern, form, weighted, reduction):
    case = make(**ALL_ACTIVE[pattern])
    weight = torch.rand(40, dtype=torch.float64) if weighted else None
    target = torch.rand(9, 40, dtype=torch.float64)
    target[torch.rand(9, 40) < 0.8] = 0  # rows need not sum to one
    target[4] = 0
    theirs = reduced(dense(case, target, weight=weight), reduction, 9)
    given = target.to_sparse_csr() if form == "csr" else target
    options = dict(weight=weight, reduction=reduction, decoupled=True)
    assert_same(sampled(case, given, **options), theirs, case)


def test_it_is_another_loss_where_a_row_has_several_labels():
    case = make()
    losses = [sampled(case, padded(LISTS, 5), reduction="none", decoupled=d) for d in (True, False)]
    several = torch.tensor([len(set(labels)) > 1 for labels in LISTS])
    torch.testing.assert_close(losses[0][~several], losses[1][~several])
    assert (losses[0][several] < losses[1][several] - 1e-3).all()


@pytest.mark.parametrize("pattern", ALL_ACTIVE)
def test_stored_classes_are_labels_whatever_their_share(pattern):
    """A probability or a class weight of 0 does not make a label a negative."""
    case = make(**ALL_ACTIVE[pattern])
    ids = torch.tensor([[b, b + 10] for b in range(9)])
    positive = torch.zeros(9, 40, dtype=torch.bool).scatter(1, ids, True)
    target = torch.zeros(9, 40, dtype=torch.float64).scatter(1, ids[:, :1], 1.0)
    csr = torch.sparse_csr_tensor(
        torch.arange(0, 20, 2), ids.flatten(), target.gather(1, ids).flatten(), (9, 40)
    )
    theirs = dense(case, target, positive)
    assert_same(sampled(case, csr, reduction="none", decoupled=True), theirs, case)
    weight = torch.ones(40, dtype=torch.float64).index_fill(0, ids[:, 1], 0)
    ours = sampled(case, ids[:2], input=case.x[:2], weight=weight, reduction="none", decoupled=True)
    assert_same(ours, theirs[:2] / 2, case)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_without_negatives_have_no_loss(dtype, pattern):
    case = make(4, 5, 3, dtype=dtype)
    target = torch.tensor([[0, 1, 2, 3], [2, 3, 0, 1], [3, 2, 1, 1]])
    csr = torch.ones(3, 4).to_sparse_csr()
    for given in (csr, target[:, :3]):
        loss = sampled(case, given, reduction="none", decoupled=True)
        assert (loss == 0).all() == (given is csr)
        assert all(g.isfinite().all() for g in gradients(loss, case))
    assert not any(g.any() for g in gradients(sampled(case, csr, decoupled=True), case))
    # the active set is what the batch needs: here its labels alone
    alone = make(300, 8, 1, dtype=dtype, pattern=pattern, budget=0, tail=0)
    loss = sampled(alone, torch.tensor([[5, 17, 200]]), decoupled=True)
    assert loss == 0 and not any(g.any() for g in gradients(loss, alone))


@pytest.mark.parametrize("size", [1e2, 1e5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pattern", ALL_ACTIVE)
def test_large_logits(pattern, dtype, size):
    case = make(dtype=dtype, **ALL_ACTIVE[pattern])
    with torch.no_grad():
        case.weight.mul_(size)
    target = uniform_over(LISTS, 40)
    ours = sampled(case, padded(LISTS, 5), reduction="none", decoupled=True)
    found = [ours, *gradients(ours, case)]
    for tensor in (case.x, case.weight, case.bias):
        tensor.data = tensor.data.double()
    theirs = dense(case, target)
    for mine, right in zip(found, [theirs, *gradients(theirs, case)], strict=True):
        assert mine.isfinite().all()
        # losses near 0 and slopes near 0 or 1 change with the rounding of logits of this size
        error = (mine.double() - right).abs().max() / right.abs().max()
        assert error <= 200 * size * torch.finfo(dtype).eps


def test_not_finite_logits_are_not_hidden():
    case = make()
    with torch.no_grad():
        case.x[0] = math.nan
    losses = sampled(case, padded(LISTS, 5), reduction="none", decoupled=True)
    assert losses[0].isnan() and losses[1:].isfinite().all()


def test_leading_dimensions():
    case = make(B=12)
    lists = torch.stack([case.y, case.y.flip(0)], 1)
    target = uniform_over(lists.tolist(), 40)
    ours = sampled(
        case,
        lists.view(3, 4, 2),
        input=case.x.view(3, 4, -1),
        reduction="none",
        decoupled=True,
    )
    assert ours.shape == (3, 4)
    assert_same(ours.flatten(), dense(case, target), case)


def test_gradcheck_in_float64():
    case = make(N=7, d=5, B=4)
    target = padded([[0, 6, 3], [1], [], [2, 5]], 3)

    def loss(x, weight, bias):
        own = SimpleNamespace(x=x, weight=weight, bias=bias, tables=case.tables)
        return sampled(own, target, reduction="none", decoupled=True)

    assert gradcheck(loss, (case.x, case.weight, case.bias))


@pytest.mark.parametrize("seed", range(3))
def test_float32_is_as_exact_as_torch(seed):
    case = make(N=5000, d=96, B=64, dtype=torch.float32, seed=seed)
    lists = torch.stack([case.y, case.y.roll(1), (case.y + 1) % 5000], 1)
    target = uniform_over(lists.tolist(), 5000)
    ours = sampled(case, lists, reduction="none", decoupled=True)
    check_as_exact_as_torch(case, ours, lambda case: dense(case, target))


# --- one label a row: the softmax ---------------------------------------------------------------------


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_one_label_a_row_has_the_bits_of_the_softmax(pattern, correction, dtype, sparse):
    case = make(
        300, 16, 20, dtype=dtype, pattern=pattern, correction=correction, budget=12, tail=30, K=3, L=6
    )  # fmt: skip
    case.tables.rebuild(case.weight, case.bias)
    target = torch.stack([case.y, torch.full_like(case.y, -100)], 1)
    target[5] = -100
    found = []
    for decoupled in (False, True):
        generator = torch.Generator().manual_seed(7)
        loss = sampled(case, target, sparse=sparse, decoupled=decoupled, generator=generator)
        found.append([loss, *gradients(loss, case)])
    assert all(map(torch.equal, *found))


# --- sampled ------------------------------------------------------------------------------------------


def drawn(pattern, correction, *, dtype=torch.float64, bias=True, B=20):
    """A layer with tables, lists of up to three labels, and the active set that seed 7 draws."""
    N = 300
    case = make(
        N, 16, B, bias=bias, dtype=dtype, pattern=pattern, correction=correction,
        budget=12, tail=30, K=3, L=6,
    )  # fmt: skip
    target = torch.stack([case.y, case.y.flip(0), (case.y + 1) % N], 1)
    target[3, 1:] = target[5] = -100
    case.tables.rebuild(case.weight, case.bias)
    labels = as_labels(target, torch.Size([B]), N, dtype, -100)
    active = draw_active_set(
        case.tables, case.x, labels, generator=torch.Generator().manual_seed(7)
    )
    mask, log_weight, probabilities = dense_active_set(active, labels, B, N, dtype)
    assert 0.05 < mask.float().mean() < 0.95
    return case, target, mask, log_weight, probabilities


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_sampled_equals_reference(pattern, correction, bias, dtype):
    case, target, mask, log_weight, probabilities = drawn(
        pattern, correction, dtype=dtype, bias=bias
    )
    logits = F.linear(case.x, case.weight, case.bias) * 0.8 + log_weight
    logits = logits.masked_fill(~mask, -math.inf)
    theirs = reference.decoupled_cross_entropy(logits, probabilities, probabilities > 0)
    generator = torch.Generator().manual_seed(7)
    ours = sampled(case, target, reduction="none", scale=0.8, decoupled=True, generator=generator)
    # float32: sums of 16 products and of at most 300 exponentials, a few units of rounding each
    assert_same(ours, theirs, case, tolerance=1e-11 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_row_sparse_gradients_are_those_of_dense_ones(pattern):
    case, target, *_ = drawn(pattern, "importance")
    found = []
    for sparse in (False, True):
        generator = torch.Generator().manual_seed(7)
        loss = sampled(case, target, sparse=sparse, decoupled=True, generator=generator)
        of_weight = torch.autograd.grad(loss, case.weight, retain_graph=True)[0]
        assert of_weight.is_sparse == sparse
        found.append([loss, *gradients(loss, case)])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_same_bits_at_any_number_of_threads(pattern):
    case, target, *_ = drawn(pattern, "importance", dtype=torch.float32, B=70)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        generator = torch.Generator().manual_seed(7)
        loss = sampled(case, target, reduction="none", decoupled=True, generator=generator)
        found.append([loss, *gradients(loss, case)])
    assert all(map(torch.equal, found[0], found[1])) and all(map(torch.equal, found[0], found[2]))


# --- importance correction ----------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS)
def test_importance_estimates_the_sum_over_negatives(pattern):
    """With all of the target on one of two labels, exp(loss) - 1 is the negatives' sum over exp(z) of that
    label. The estimate of the sum is unbiased exactly, however the logits vary: by about 1.5 here."""
    case = small_layer(pattern, 1.5, correction="importance")
    ids = torch.stack([case.y, (case.y + 7) % 60], 1)
    csr = torch.sparse_csr_tensor(
        torch.arange(0, 10, 2), ids.flatten(), torch.tensor([1.0, 0.0] * 4).double(), (4, 60)
    )
    losses = []
    for seed in range(1000):
        generator = torch.Generator().manual_seed(seed)
        loss = sampled(case, csr, reduction="none", decoupled=True, generator=generator)
        losses.append(loss.detach())
    logits = F.linear(case.x, case.weight, case.bias).detach()
    negatives = logits.scatter(1, ids, -math.inf).logsumexp(1)
    z = z_scores(torch.stack(losses).expm1(), (negatives - logits.gather(1, ids)[:, 0]).exp())
    assert (z.abs() < 3.5).all() and (z**2).mean() < 3


@pytest.mark.parametrize("pattern", PATTERNS)
def test_importance_estimates_loss_and_gradients(pattern):
    """Biased by about half the relative variance of the sum, which small logits keep below a tenth of the
    standard error of 1,000 draws, as the first lines check; the uncorrected loss is far off."""
    case = small_layer(pattern, 0.025, correction="importance")
    lists = torch.stack([case.y, (case.y + 7) % 60], 1)

    def draws(case, count):
        losses, grads = [], []
        for seed in range(count):
            generator = torch.Generator().manual_seed(1000 + seed)
            loss = sampled(case, lists, reduction="none", decoupled=True, generator=generator)
            losses.append(loss.detach())
            grads.append(torch.cat([g.flatten() for g in gradients(loss, case)]))
        return torch.stack(losses), torch.stack(grads)

    losses, grads = draws(case, 1000)
    assert (losses.var(0) / 2 < losses.std(0) / math.sqrt(1000) / 10).all()
    truth = dense(case, uniform_over(lists.tolist(), 60))
    assert abs(z_scores(losses.sum(1), truth.detach().sum())) < 3
    z = z_scores(grads, torch.cat([g.flatten() for g in gradients(truth, case)]))
    assert z.isfinite().all()
    for part in z.split([case.x.numel(), case.weight.numel(), case.bias.numel()]):
        # z^2 has mean 1; coordinates share the draws' randomness, so their mean scatters widely
        assert (part.abs() > 3).float().mean() < 0.03 and 0.2 < (part**2).mean() < 2
    plain = small_layer(pattern, 0.025)
    assert abs(z_scores(draws(plain, 50)[0].sum(1), truth.detach().sum())) > 30


# --- with a layer -------------------------------------------------------------------------------------


def test_training_logits_have_the_value_of_dense_ones():
    layer = LSHLinear(16, 40, options=LSHOptions(budget=40), dtype=torch.float64)
    x = torch.randn(9, 16, dtype=torch.float64)
    target = uniform_over(LISTS, 40)
    logits = layer(x)
    ours = logits.cross_entropy(padded(LISTS, 5), reduction="none", decoupled=True)
    for tensor in (logits.to_dense(), layer.eval()(x)):
        theirs = reference.decoupled_cross_entropy(tensor, target, target > 0)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_label_smoothing_is_refused():
    case = make(budget=6, tail=6, K=2, L=2)
    state = torch.get_rng_state()
    with pytest.raises(NotImplementedError, match=r"label_smoothing: expected 0\.0 with decoupled"):
        sampled(case, case.y, label_smoothing=0.1, decoupled=True)
    assert torch.equal(torch.get_rng_state(), state) and not case.tables.built
