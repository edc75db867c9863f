"""The loss as a function: equal to dense torch where everything is active, to the reference on any
active set, unbiased where corrected."""

import math

import pytest
import reference
import torch
import torch.nn.functional as F
from loss_problems import (
    LISTS,
    assert_same,
    check_as_exact_as_torch,
    dense_active_set,
    draws_of,
    gradients,
    losses_of,
    make,
    operator_sample,
    padded,
    sampled,
    small_layer,
    uniform_over,
    z_scores,
)
from torch.autograd import gradcheck

from slide_torch.active_set import SharedActiveSet
from slide_torch.functional import lsh_linear_binary_cross_entropy, lsh_linear_cross_entropy
from slide_torch.sampling.draw import draw_active_set
from slide_torch.sampling.targets import as_labels

PATTERNS = ["shared", "per_sample"]
DTYPES = [torch.float32, torch.float64]


# --- every neuron active: dense torch -------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ignored", ["none", "some", "all"])
@pytest.mark.parametrize("bias", [False, True])
def test_class_indices_equal_torch(reduction, weighted, ignored, bias):
    case = make(bias=bias)
    target, ignore_index = case.y.clone(), 3
    target[target == ignore_index] = 4
    if ignored != "none":
        target[slice(None, None, 2) if ignored == "some" else slice(None)] = ignore_index
    weight = torch.rand(40, dtype=torch.float64) if weighted else None
    options = dict(weight=weight, reduction=reduction, ignore_index=ignore_index)
    ours = sampled(case, target, **options)
    theirs = F.cross_entropy(F.linear(case.x, case.weight, case.bias), target, **options)
    assert ours.shape == theirs.shape
    assert ours.isnan().any() == (ignored == "all" and reduction == "mean")
    assert_same(ours, theirs, case)


@pytest.mark.parametrize("budget,tail", [(40, 0), (1000, 5), (3, 40), (0, 1000)])
def test_budget_or_tail_of_all_is_exact(budget, tail):
    case = make(budget=budget, tail=tail, K=2, L=3)
    theirs = F.cross_entropy(F.linear(case.x, case.weight, case.bias), case.y)
    assert_same(sampled(case, case.y), theirs, case)
    assert not case.tables.built


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_label_lists_are_uniform_probabilities(reduction, weighted):
    case = make()
    weight = torch.rand(40, dtype=torch.float64) if weighted else None
    probabilities = uniform_over(LISTS, 40)
    rows = F.cross_entropy(
        F.linear(case.x, case.weight, case.bias), probabilities, weight=weight, reduction="none"
    )
    shares = probabilities if weight is None else probabilities * weight
    theirs = {"none": rows, "sum": rows.sum(), "mean": rows.sum() / shares.sum()}[reduction]
    options = dict(weight=weight, reduction=reduction)
    assert_same(sampled(case, padded(LISTS, 5), **options), theirs, case)
    # the padding may stand anywhere, and have any value that ignore_index names
    flipped = padded(LISTS, 5, pad=-1).flip(1)
    assert_same(sampled(case, flipped, ignore_index=-1, **options), theirs, case)


@pytest.mark.parametrize("form", ["dense", "csr", "csr_int32"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_probabilities_equal_torch(form, reduction, weighted):
    case = make()
    weight = torch.rand(40, dtype=torch.float64) if weighted else None
    dense = torch.rand(9, 40, dtype=torch.float64).softmax(1)
    dense[torch.rand(9, 40) < 0.8] = 0  # rows need not sum to one
    dense[4] = 0
    target = dense
    if form != "dense":
        target = dense.to_sparse_csr()
    if form == "csr_int32":
        target = torch.sparse_csr_tensor(
            target.crow_indices().int(), target.col_indices().int(), target.values(), (9, 40)
        )
    options = dict(weight=weight, reduction=reduction)
    theirs = F.cross_entropy(F.linear(case.x, case.weight, case.bias), dense, **options)
    assert_same(sampled(case, target, **options), theirs, case)


def test_leading_dimensions():
    case = make(B=12)
    logits = F.linear(case.x, case.weight, case.bias)
    theirs = F.cross_entropy(logits, case.y, reduction="none")
    ours = sampled(case, case.y.view(3, 4), input=case.x.view(3, 4, -1), reduction="none")
    assert ours.shape == (3, 4)
    assert_same(ours.flatten(), theirs, case)
    lists = case.y.view(3, 4, 1).repeat(1, 1, 2)
    assert_same(sampled(case, lists, input=case.x.view(3, 4, -1)), theirs.mean(), case)
    # an input that is not contiguous, as hidden[:, :-1] is
    ours = sampled(case, case.y.view(3, 4).T, input=case.x.view(3, 4, -1).transpose(0, 1))
    assert_same(ours, theirs.mean(), case)


def test_unbatched_input():
    case = make()
    ours = sampled(case, case.y[0], input=case.x[0])
    theirs = F.cross_entropy(F.linear(case.x[0], case.weight, case.bias), case.y[0])
    assert ours.shape == ()
    assert_same(ours, theirs, case)
    ours = sampled(case, torch.tensor([1, 2]), input=case.x[0])
    logits = F.linear(case.x[:1], case.weight, case.bias)
    assert_same(ours, F.cross_entropy(logits, uniform_over([[1, 2]], 40)), case)


@pytest.mark.parametrize("scale", [0.07, 3.0])
def test_scale_multiplies_logits(scale):
    case = make()
    theirs = F.cross_entropy(F.linear(case.x, case.weight, case.bias) * scale, case.y)
    assert_same(sampled(case, case.y, scale=scale), theirs, case)


def test_int32_and_small_integer_targets():
    case = make()
    expected = sampled(case, case.y)
    for dtype in (torch.int32, torch.int16, torch.int8, torch.uint8):
        assert torch.equal(sampled(case, case.y.to(dtype)), expected)


@pytest.mark.parametrize("options", [{"budget": 40}, dict(budget=5, tail=5, K=2, L=2)])
@pytest.mark.parametrize("loss", [lsh_linear_cross_entropy, lsh_linear_binary_cross_entropy])
def test_a_one_hot_of_integers_is_no_list_of_labels(loss, options):
    """torch refuses it; as a list it would be the labels 0, ..., 0, 1."""
    case = make(**options)
    one_hot = F.one_hot(case.y, 40)

    def of(target, input=case.x):
        return loss(input, case.weight, target, linear_bias=case.bias, tables=case.tables)

    state = torch.get_rng_state()
    name = loss.__name__
    for target in (
        *(one_hot.to(dtype) for dtype in (torch.int64, torch.int32, torch.int8, torch.uint8)),
        torch.zeros(9, 40, dtype=torch.int64),
        F.one_hot(case.y, 41),  # of more classes than there are
    ):
        with pytest.raises(ValueError, match=rf"{name}: target: .* pass target\.float\(\)"):
            of(target)
    with pytest.raises(ValueError, match=rf"{name}: target: .* pass target\.float\(\)"):
        of(one_hot[0], case.x[0])
    with pytest.raises(ValueError, match=rf"{name}: target: .*torch.bool.* or \.float\(\)"):
        of(one_hot.bool())
    assert torch.equal(torch.get_rng_state(), state) and not case.tables.built
    for target in (one_hot.float(), one_hot.argmax(-1), one_hot.to_sparse_csr()):
        torch.manual_seed(0)
        torch.testing.assert_close(
            of(target), of(case.y), rtol=0 if case.tables.exact else 1, atol=0
        )
    assert of(case.y[:, None].expand(9, 39)).isfinite()  # a list may repeat a label
    single = make(1, 4, 3)
    with pytest.raises(ValueError, match=r"fewer than 1 .* a row, got shape \(3, 1\)"):
        loss(
            single.x,
            single.weight,
            single.y[:, None],
            linear_bias=single.bias,
            tables=single.tables,
        )


def test_class_weights_with_a_gradient_are_refused():
    case = make()
    weight = torch.rand(40, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match=r"weight: expected no gradient: call weight\.detach\(\)"):
        sampled(case, case.y, weight=weight)
    for argument in ("weight", "pos_weight"):
        with pytest.raises(ValueError, match=rf"{argument}: expected no gradient"):
            lsh_linear_binary_cross_entropy(
                case.x,
                case.weight,
                case.y,
                linear_bias=case.bias,
                tables=case.tables,
                **{argument: weight},
            )


def test_gradcheck_in_float64():
    case = make(N=7, d=5, B=4)

    def loss(x, weight, bias):
        return lsh_linear_cross_entropy(
            x, weight, case.y, linear_bias=bias, tables=case.tables, reduction="none"
        )

    assert gradcheck(loss, (case.x, case.weight, case.bias))


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("log_weight", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_operators_gradcheck(pattern, log_weight, decoupled):
    case = make(N=9, d=5, B=4)
    operators = torch.ops.slide_torch
    op = operators.shared_cross_entropy if pattern == "shared" else operators.sample_cross_entropy
    rest = *operator_sample(pattern, log_weight=log_weight), decoupled, False
    assert gradcheck(lambda x, w, b: op(x, w, b, *rest)[0], (case.x, case.weight, case.bias))
    assert gradcheck(lambda x, w: op(x, w, None, *rest)[0], (case.x, case.weight))


@pytest.mark.parametrize("seed", range(3))
def test_float32_is_as_exact_as_torch(seed):
    case = make(N=5000, d=96, B=64, dtype=torch.float32, seed=seed)

    def dense(case):
        return F.cross_entropy(F.linear(case.x, case.weight, case.bias), case.y, reduction="none")

    check_as_exact_as_torch(case, sampled(case, case.y, reduction="none"), dense)


# --- sampled: the reference -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("family", ["simhash", "dwta"])
@pytest.mark.parametrize("correction", ["none", "importance"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_sampled_equals_reference(pattern, correction, family, bias, dtype):
    N, B = 300, 20
    case = make(
        N, 16, B, bias=bias, dtype=dtype, pattern=pattern, correction=correction, family=family,
        budget=12, tail=30, K=3, L=6,
    )  # fmt: skip
    target = torch.stack([case.y, case.y.flip(0), torch.full((B,), -100)], 1)
    target[5] = -100
    case.tables.rebuild(case.weight, case.bias)
    labels = as_labels(target, torch.Size([B]), N, dtype, -100)
    active = draw_active_set(
        case.tables, case.x, labels, generator=torch.Generator().manual_seed(7)
    )
    mask, log_weight, probabilities = dense_active_set(active, labels, B, N, dtype)
    assert isinstance(active, SharedActiveSet) == (pattern == "shared")
    assert 0.05 < mask.float().mean() < 0.9 and (mask | (probabilities == 0)).all()
    assert (log_weight != 0).any() == (correction == "importance")
    ours = sampled(
        case, target, reduction="none", scale=0.8, generator=torch.Generator().manual_seed(7)
    )
    theirs = reference.sampled_cross_entropy(
        case.x, case.weight, case.bias, mask, probabilities, log_weight, scale=0.8
    )
    # float32: sums of 16 products and of at most 300 exponentials, a few units of rounding each
    assert_same(ours, theirs, case, tolerance=1e-11 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_sparse_gradients(pattern):
    case = make(300, 16, 6, pattern=pattern, budget=10, tail=20, K=3, L=6)
    case.tables.rebuild(case.weight, case.bias)
    found = {}
    for sparse in (False, True):
        loss = sampled(case, case.y, sparse=sparse, generator=torch.Generator().manual_seed(1))
        found[sparse] = torch.autograd.grad(loss, (case.x, case.weight, case.bias))
    labels = as_labels(case.y, case.y.shape, 300, torch.float64, -100)
    active = draw_active_set(
        case.tables, case.x, labels, generator=torch.Generator().manual_seed(1)
    )
    assert torch.equal(found[True][0], found[False][0])
    for sparse, dense in zip(found[True][1:], found[False][1:], strict=True):
        assert sparse.is_sparse and sparse.is_coalesced() and sparse.shape == dense.shape
        assert torch.equal(sparse.indices()[0], active.rows)
        assert torch.equal(sparse.to_dense(), dense)
        # the flag is true: coalescing anew finds nothing to do
        again = torch.sparse_coo_tensor(sparse.indices(), sparse.values(), sparse.shape).coalesce()
        assert torch.equal(again.indices(), sparse.indices())
        unseen = torch.ones(300, dtype=torch.bool)
        unseen[active.rows] = False
        assert unseen.any() and not dense[unseen].any()


# --- importance correction: the full softmax on average -------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS)
def test_importance_estimates_the_normaliser(pattern):
    """exp(loss) = Z / exp(z_label), and the estimate of Z is unbiased exactly, however the logits
    vary: they vary by about 1.5 here."""
    case = small_layer(pattern, 1.5, correction="importance")
    losses = losses_of(case, 1000)
    truth = F.cross_entropy(F.linear(case.x, case.weight, case.bias), case.y, reduction="none")
    z = z_scores(losses.exp(), truth.detach().exp())
    assert (z.abs() < 3.5).all() and (z**2).mean() < 3
    total = z_scores(losses.exp().sum(1), truth.detach().exp().sum())
    assert abs(total) < 3


@pytest.mark.parametrize("pattern", PATTERNS)
def test_importance_estimates_loss_and_gradients(pattern):
    """Loss and gradients take the logarithm of the estimate, and a quotient by it: biased by about
    half its relative variance (Jensen). With logits that vary by 0.025 and a tail of 30 of 60 that
    is about 1e-5, less than a tenth of the standard error of 1,000 draws, as the first lines check.
    The uncorrected loss is off by tens of standard errors, as the last ones check."""
    case = small_layer(pattern, 0.025, correction="importance")
    losses, grads = draws_of(case, 1000)
    bias, standard_error = losses.var(0) / 2, losses.std(0) / math.sqrt(1000)
    assert (bias < standard_error / 10).all()

    truth = F.cross_entropy(F.linear(case.x, case.weight, case.bias), case.y, reduction="none")
    assert abs(z_scores(losses.sum(1), truth.detach().sum())) < 3
    exact = torch.cat([g.flatten() for g in gradients(truth, case)])
    z = z_scores(grads, exact)
    assert z.isfinite().all()
    parts = z.split([case.x.numel(), case.weight.numel(), case.bias.numel()])
    for part in parts:
        # z^2 has mean 1; coordinates share the draws' randomness, so their mean scatters widely
        assert (part.abs() > 3).float().mean() < 0.03 and 0.2 < (part**2).mean() < 2

    plain = small_layer(pattern, 0.025)
    assert abs(z_scores(draws_of(plain, 50)[0].sum(1), truth.detach().sum())) > 30
