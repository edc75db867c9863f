"""Binary cross entropy and label smoothing: dense torch where every neuron is active, the reference on
any active set, unbiased where corrected."""

import dataclasses
import math

import pytest
import reference
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from loss_problems import (
    LISTS,
    assert_same,
    binary,
    dense_active_set,
    dense_binary,
    gradients,
    make,
    operator_sample,
    padded,
    sampled,
    small_layer,
    z_scores,
)
from torch import nn
from torch.autograd import forward_ad, gradcheck

from slide_torch import LSHFeedForward, LSHLinear, LSHOptions
from slide_torch.sampling.draw import draw_active_set
from slide_torch.sampling.targets import as_labels

PATTERNS = ["shared", "per_sample"]
MULTI_HOT = torch.zeros(len(LISTS), 40, dtype=torch.float64)
for _b, _labels in enumerate(LISTS):
    MULTI_HOT[_b, _labels] = 1


# --- binary cross entropy -------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("form", ["lists", "dense", "csr"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("positive", ["no", "one", "each"])
def test_binary_equals_torch(reduction, form, weighted, positive):
    case = make()
    weight = torch.rand(40, dtype=torch.float64) if weighted else None
    pos_weight = {"no": None, "one": torch.tensor([3.0]).double(), "each": torch.rand(40).double()}
    dense = MULTI_HOT
    if form != "lists":  # targets between 0 and 1, too
        dense = MULTI_HOT * torch.rand_like(MULTI_HOT)
    target = {"lists": padded(LISTS, 5), "dense": dense, "csr": dense.to_sparse_csr()}[form]
    options = dict(reduction=reduction, weight=weight, pos_weight=pos_weight[positive])
    assert_same(binary(case, target, **options), dense_binary(case, dense, **options), case)


def test_binary_of_classes_and_leading_dimensions():
    case = make(B=12)
    dense = F.one_hot(case.y, 40).double()
    assert_same(binary(case, case.y), dense_binary(case, dense), case)
    ours = binary(case, case.y.view(3, 4), input=case.x.view(3, 4, -1), reduction="sum")
    assert_same(ours, dense_binary(case, dense, reduction="sum"), case)
    theirs = F.binary_cross_entropy_with_logits(
        F.linear(case.x, case.weight, case.bias) * 0.3, dense
    )
    assert_same(binary(case, case.y, scale=0.3), theirs, case)


def test_binary_of_extreme_logits():
    """No overflow, and the small side keeps its digits: float32 against float64."""
    for factor in (1e-3, 1.0, 30.0, 1e3):
        case = make(dtype=torch.float32)
        with torch.no_grad():
            case.weight.mul_(factor)
            case.bias.mul_(factor).sub_(5)
        exact = make()
        with torch.no_grad():
            exact.weight.copy_(case.weight)
            exact.bias.copy_(case.bias)
            exact.x.copy_(case.x)
        ours, truth = (binary(c, MULTI_HOT.to(c.x.dtype), reduction="sum") for c in (case, exact))
        torch.testing.assert_close(ours.double(), truth, rtol=2e-6, atol=0)
        for mine, right in zip(gradients(ours, case), gradients(truth, exact), strict=True):
            assert (mine - right).abs().max() <= 3e-6 * right.abs().max()


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("extra", [False, True])
def test_binary_operators_gradcheck(pattern, extra):
    case = make(N=9, d=5, B=4)
    op = getattr(
        torch.ops.slide_torch,
        f"{'shared' if pattern == 'shared' else 'sample'}_binary_cross_entropy",
    )
    *active, log_weight, offsets, places, values, scale = operator_sample(pattern)
    row_weight = log_weight.exp() if extra else None
    of_labels = (offsets, places, values, values * 2 if extra else None)

    def run(x, w, b):
        return op(x, w, b, *active, row_weight, *of_labels, scale, False)[0]

    assert gradcheck(run, (case.x, case.weight, case.bias))
    assert gradcheck(lambda x, w: run(x, w, None), (case.x, case.weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("correction", ["none", "importance"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_sampled_binary_equals_reference(pattern, correction, dtype):
    N, B = 300, 21
    case = make(
        N, 16, B, dtype=dtype, pattern=pattern, correction=correction, budget=12, tail=30, K=3, L=6
    )
    target = torch.stack([case.y, case.y.flip(0), torch.full((B,), -100)], 1)
    target[5] = -100
    case.tables.rebuild(case.weight, case.bias)
    lists = target.clone()
    lists[lists[:, 0] == lists[:, 1], 1] = -100
    labels = as_labels(lists, torch.Size([B]), N, dtype, -100)
    active = draw_active_set(
        case.tables, case.x, labels, generator=torch.Generator().manual_seed(7)
    )
    mask, log_weight, probabilities = dense_active_set(active, labels, B, N, dtype)
    multi_hot = (probabilities > 0).to(dtype)
    ours = binary(
        case, target, reduction="sum", scale=0.8, generator=torch.Generator().manual_seed(7)
    )
    theirs = reference.sampled_binary_cross_entropy(
        case.x, case.weight, case.bias, mask, multi_hot, log_weight.exp(), scale=0.8
    ).sum()
    assert_same(ours, theirs, case, tolerance=1e-11 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_binary_is_unbiased(pattern):
    """Loss and gradients are linear in the tail: exactly unbiased, however much the logits vary."""
    case = small_layer(pattern, 1.5, correction="importance")
    target = padded([[1, 2], [40], [], [7, 50]], 2)
    dense = torch.zeros(4, 60, dtype=torch.float64)
    for b, own in enumerate([[1, 2], [40], [], [7, 50]]):
        dense[b, own] = 1
    found = []
    for seed in range(800):
        generator = torch.Generator().manual_seed(seed)
        loss = binary(case, target, reduction="sum", generator=generator)
        grads = torch.cat([g.flatten() for g in gradients(loss, case)])
        found.append(torch.cat([loss.detach()[None], grads]))
    truth = dense_binary(case, dense, reduction="sum")
    exact = torch.cat([g.flatten() for g in gradients(truth, case)])
    found, expected = torch.stack(found), torch.cat([truth.detach()[None], exact])
    certain = found.std(0) < 1e-12  # rows that are active in every draw
    torch.testing.assert_close(found[0, certain], expected[certain])
    z = z_scores(found[:, ~certain], expected[~certain])
    assert len(z) > 100 and abs(z[0]) < 3.5
    assert (z[1:].abs() > 3).float().mean() < 0.03 and 0.2 < (z[1:] ** 2).mean() < 2
    plain = small_layer(pattern, 1.5)
    assert binary(plain, target, reduction="sum") < 0.95 * truth


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_binary_through_torch_functions(pattern, sparse):
    options = LSHOptions(pattern=pattern, budget=10, tail=20, K=3, L=6)
    layer = LSHLinear(16, 300, options=options, sparse=sparse)
    x = torch.randn(6, 16, requires_grad=True)
    dense = torch.zeros(6, 300)
    dense[torch.arange(6), torch.arange(6) * 7] = 1
    losses = []
    for run in (
        lambda z: F.binary_cross_entropy_with_logits(z, dense, reduction="sum"),
        lambda z: nn.BCEWithLogitsLoss(reduction="sum")(z, dense.to_sparse_csr()),
        lambda z: z.binary_cross_entropy_with_logits(torch.arange(6) * 7, reduction="sum"),
    ):
        layer.rehash()
        torch.manual_seed(5)
        losses.append(run(layer(x)))
    assert losses[0] == losses[1] == losses[2]
    losses[0].backward()
    assert layer.weight.grad.is_sparse == sparse and x.grad.abs().sum() > 0
    exact = LSHLinear(16, 300, options=LSHOptions(budget=300))
    exact.load_state_dict(layer.state_dict())
    assert_close = torch.testing.assert_close
    expected = F.binary_cross_entropy_with_logits(F.linear(x, layer.weight, layer.bias), dense)
    assert_close(F.binary_cross_entropy_with_logits(exact(x), dense), expected)


@pytest.mark.parametrize(
    "change,error,message",
    [
        (dict(reduction="none"), NotImplementedError, "reduction: expected 'mean' or 'sum'"),
        (dict(reduction="max"), ValueError, "reduction: expected 'mean' or 'sum', got 'max'"),
        (dict(weight=torch.ones(3)), ValueError, r"weight: expected a tensor of shape \(40,\)"),
        (dict(pos_weight=torch.ones(3)), ValueError, r"pos_weight: expected a tensor of shape"),
        (dict(scale=0.0), ValueError, "scale: expected a positive"),
    ],
)
def test_binary_refuses(change, error, message):
    case = make()
    with pytest.raises(error, match="lsh_linear_binary_cross_entropy: " + message):
        binary(case, case.y, **change)
    with pytest.raises(ValueError, match="lsh_linear_binary_cross_entropy: target: expected class"):
        binary(case, case.y + 40)


# --- label smoothing ------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_smoothing_equals_torch(reduction, weighted, bias):
    case = make(bias=bias)
    weight = torch.rand(40, dtype=torch.float64) + 0.1 if weighted else None
    target = case.y.clone()
    target[3] = -100
    logits = F.linear(case.x, case.weight, case.bias)
    options = dict(weight=weight, reduction=reduction, label_smoothing=0.2)
    assert_same(sampled(case, target, **options), F.cross_entropy(logits, target, **options), case)
    dense = torch.rand(9, 40, dtype=torch.float64)  # rows need not sum to one
    dense[dense < 0.7] = 0
    assert_same(sampled(case, dense, **options), F.cross_entropy(logits, dense, **options), case)
    ours = sampled(case, case.y, scale=0.3, label_smoothing=1.0)
    assert_same(ours, F.cross_entropy(logits * 0.3, case.y, label_smoothing=1.0), case)


ALL_ACTIVE = {
    "exact": dict(budget=40),
    "tail": dict(pattern="per_sample", correction="importance", budget=5, tail=40, K=2, L=3),
}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("weights", ["some", "all"])
@pytest.mark.parametrize("pattern", ALL_ACTIVE)
def test_labels_of_weight_zero_equal_torch(pattern, weights, smoothing, reduction):
    """They have no term of their own, and that of the smoothing like any other."""
    case = make(**ALL_ACTIVE[pattern])
    weight = torch.rand(40, dtype=torch.float64)
    weight[:20] = 0
    target = case.y.clone()
    target[3] = -100
    if weights == "all":
        target = target.clamp(max=19)
    assert (weight[target[target >= 0]] == 0).any()
    logits = F.linear(case.x, case.weight, case.bias)
    options = dict(weight=weight, reduction=reduction, label_smoothing=smoothing)
    theirs = F.cross_entropy(logits, target, **options)
    assert_same(sampled(case, target, **options), theirs, case)
    dense = torch.zeros(9, 40, dtype=torch.float64)
    dense[:, 5], dense[:, 25] = 0.7, 0.4
    dense[2, 25] = dense[3, 5] = 0
    assert_same(sampled(case, dense, **options), F.cross_entropy(logits, dense, **options), case)
    # several labels: torch's probabilities, but for the mean, which is over the labels' weights
    lists = padded([[2, 30], [1], [39], [3, 4], [5], [6], [7], [8, 20], [9]], 2)
    shares = torch.zeros(9, 40, dtype=torch.float64)
    for row, labels in zip(shares, lists, strict=True):
        row[labels[labels >= 0]] = 1 / (labels >= 0).sum().double()
    rows = F.cross_entropy(logits, shares, **options | dict(reduction="none"))
    theirs = {"none": rows, "sum": rows.sum(), "mean": rows.sum() / (shares * weight).sum()}
    assert_same(sampled(case, lists, **options), theirs[reduction], case)


def test_stored_zeros_of_probabilities_are_smoothed_as_in_torch():
    case = make()
    dense = torch.zeros(9, 40, dtype=torch.float64)
    ids = torch.arange(9)
    target = torch.sparse_csr_tensor(torch.arange(10), ids, torch.zeros(9).double(), (9, 40))
    logits = F.linear(case.x, case.weight, case.bias)
    theirs = F.cross_entropy(logits, dense, label_smoothing=0.3)
    assert_same(sampled(case, target, label_smoothing=0.3), theirs, case)


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("pattern", ALL_ACTIVE)
def test_binary_with_weights_of_zero_equals_torch(pattern, positive):
    case = make(**ALL_ACTIVE[pattern])
    weight = torch.rand(40, dtype=torch.float64)
    weight[:20] = 0
    options = {"pos_weight" if positive else "weight": weight}
    ours = binary(case, padded(LISTS, 5), **options)
    assert_same(ours, dense_binary(case, MULTI_HOT, **options), case)


def test_smoothing_without_correction_is_that_of_the_active_set():
    case = make(300, 16, 6, budget=10, tail=20, K=3, L=6)
    case.tables.rebuild(case.weight, case.bias)
    labels = as_labels(case.y, case.y.shape, 300, torch.float64, -100)
    active = draw_active_set(
        case.tables, case.x, labels, generator=torch.Generator().manual_seed(1)
    )
    logits = F.linear(case.x, case.weight[active.rows], case.bias[active.rows])
    theirs = F.cross_entropy(logits, active.label_places, label_smoothing=0.1)
    for sparse in (False, True):
        generator = torch.Generator().manual_seed(1)
        ours = sampled(case, case.y, label_smoothing=0.1, sparse=sparse, generator=generator)
        assert_same(ours, theirs, case)
    other = make(300, 16, 6, pattern="per_sample", budget=10, tail=20, K=3, L=6)
    with pytest.raises(NotImplementedError, match=r"label_smoothing: expected 0\.0 with pattern"):
        sampled(other, other.y, label_smoothing=0.1)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_smoothing_is_unbiased(pattern):
    """All but the normaliser is linear in the tail; its logarithm is biased by half its relative variance,
    so logits vary by little here, and smoothing is strong."""
    case = small_layer(pattern, 0.025, correction="importance")
    losses = []
    for seed in range(600):
        generator = torch.Generator().manual_seed(seed)
        loss = sampled(case, case.y, reduction="none", label_smoothing=0.9, generator=generator)
        losses.append(loss.detach())
    losses = torch.stack(losses)
    logits = F.linear(case.x, case.weight, case.bias)
    truth = F.cross_entropy(logits, case.y, reduction="none", label_smoothing=0.9).detach()
    assert (losses.var(0) / 2 < losses.std(0) / math.sqrt(600) / 5).all()
    z = z_scores(losses, truth)
    assert (z.abs() < 3.5).all()


# --- no samples, or none with a label -----------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("loss", ["plain", "smoothed", "binary"])
@pytest.mark.parametrize("tail", ["uniform", "quadratic_kernel"])
@pytest.mark.parametrize("correction", ["none", "importance", "exact"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_empty_batches_and_ignored_rows_equal_torch(pattern, correction, tail, loss, reduction):
    if correction == "exact":
        options = dict(pattern=pattern, budget=40)
    else:
        options = dict(pattern=pattern, correction=correction, budget=6, tail=6, K=2, L=2)
        options["tail_distribution"] = tail
    refused = loss == "smoothed" and pattern == "per_sample" and correction == "none"
    if refused or (loss == "binary" and reduction == "none"):
        return
    if tail == "quadratic_kernel" and correction != "importance":
        return
    extra = dict(label_smoothing=0.1) if loss == "smoothed" else {}
    for batch in (0, 3):
        case = make(B=batch, **options)
        nothing = torch.full((batch,), -100)
        targets = [nothing, nothing[:, None].expand(batch, 2), nothing.new_empty((batch, 0))]
        if batch == 0:
            no_row = torch.empty(0, 40, dtype=torch.float64)
            targets += [no_row, no_row.to_sparse_csr()]
        logits = F.linear(case.x, case.weight, case.bias)
        for target in targets:
            if loss == "binary":
                ours = binary(case, target, reduction=reduction)
                theirs = dense_binary(case, torch.zeros_like(logits), reduction=reduction)
            else:
                ours = sampled(case, target, reduction=reduction, **extra)
                theirs = F.cross_entropy(logits, nothing, reduction=reduction, **extra)
            if batch == 0 or loss != "binary":
                torch.testing.assert_close(ours, theirs, equal_nan=True)
            else:  # only the active neurons count
                assert ours.isfinite()
            found = gradients(ours, case)
            if reduction != "mean" and loss != "binary":
                assert not any(gradient.any() for gradient in found)


# --- other ways to differentiate ----------------------------------------------------------------------

_Y = torch.tensor([2, 5, 7, 2])
_SAMPLED = {
    "exact": LSHOptions(budget=40),
    "shared": LSHOptions(budget=6, tail=6, K=2, L=2),
    "per_sample": LSHOptions(
        pattern="per_sample", correction="importance", budget=6, tail=6, K=2, L=2
    ),
}
_COMPUTED = {
    "cross_entropy": lambda layer, block, x: F.cross_entropy(layer(x), _Y),
    "smoothed": lambda layer, block, x: F.cross_entropy(layer(x), _Y, label_smoothing=0.1),
    "binary": lambda layer, block, x: layer(x).binary_cross_entropy_with_logits(_Y),
    "hidden": lambda layer, block, x: block.first(x).square().sum(),
    "feed_forward": lambda layer, block, x: block(x).square().sum(),
}


def _dual(f, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def _twice(f, x):
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(f(x), x, create_graph=True)
    return torch.autograd.grad(gradient.sum(), x)[0]


_TRANSFORMS = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
    "jacfwd": lambda f, x: torch.func.jacfwd(f, randomness="same")(x),
    "grad": lambda f, x: torch.func.grad(f)(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](torch.tensor(1.0)),
    "vmap": lambda f, x: torch.func.vmap(f, randomness="same")(torch.stack([x, x])),
    "dual": _dual,
    "dual_without_grad": lambda f, x: torch.no_grad()(_dual)(f, x),
}


def layers(options):
    torch.manual_seed(0)
    layer = LSHLinear(8, 40, options=options)
    return layer, LSHFeedForward(8, 40, options=dataclasses.replace(options, correction="none"))


@pytest.mark.parametrize("transform", _TRANSFORMS)
@pytest.mark.parametrize("computed", _COMPUTED)
@pytest.mark.parametrize("options", _SAMPLED)
def test_transforms_are_refused_before_anything_changes(options, computed, transform):
    layer, block = layers(_SAMPLED[options])
    x = torch.randn(4, 8)
    state = torch.get_rng_state()
    with pytest.raises(
        NotImplementedError, match=r"expected backward\(\) or torch\.autograd\.grad"
    ):
        _TRANSFORMS[transform](lambda x: _COMPUTED[computed](layer, block, x), x)
    assert torch.equal(torch.get_rng_state(), state)
    assert layer.stats()["steps"] == block.first.stats()["steps"] == 0
    assert _COMPUTED[computed](layer, block, x).isfinite()  # nothing stays behind


@pytest.mark.parametrize("computed", _COMPUTED)
@pytest.mark.parametrize("options", _SAMPLED)
def test_a_second_derivative_is_refused(options, computed):
    layer, block = layers(_SAMPLED[options])
    f = lambda x: _COMPUTED[computed](layer, block, x)  # noqa: E731
    with pytest.raises(RuntimeError, match="differentiable once"):
        _twice(f, torch.randn(4, 8))
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.functional.hessian(f, torch.randn(4, 8))


@pytest.mark.parametrize("name", ["weight", "bias", "second_weight"])
def test_tangents_of_parameters_are_refused(name):
    layer, block = layers(_SAMPLED["shared"])
    module = block if name == "second_weight" else layer
    own = dict(module.named_parameters())
    x = torch.randn(4, 8)
    with forward_ad.dual_level(), torch.no_grad():
        given = own | {name: forward_ad.make_dual(own[name], torch.ones_like(own[name]))}
        with pytest.raises(NotImplementedError, match="forward-mode tangent"):
            output = torch.func.functional_call(module, given, (x,))
            F.cross_entropy(output, _Y)


@pytest.mark.parametrize("transform", _TRANSFORMS)
def test_all_logits_know_every_transform(transform):
    """Those of a layer in eval mode, and to_dense() of an exact one."""
    layer, _ = layers(_SAMPLED["exact"])
    linear = layer.to_linear()
    x = torch.randn(4, 8)
    wanted = _TRANSFORMS[transform](lambda x: F.cross_entropy(linear(x), _Y), x)
    dense = _TRANSFORMS[transform](lambda x: F.cross_entropy(layer(x).to_dense(), _Y), x)
    layer.eval()
    ours = _TRANSFORMS[transform](lambda x: F.cross_entropy(layer(x), _Y), x)
    torch.testing.assert_close(dense, wanted)
    torch.testing.assert_close(ours, wanted)


# --- both, with the rest of torch -----------------------------------------------------------------

LOSSES = {
    "binary": lambda z, y: z.binary_cross_entropy_with_logits(y),
    "smoothed": lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("family", ["simhash", "kmeans"])
def test_checkpointing_recomputes_the_same_step(loss, family):
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        own = dict(rerank=20, rebuild_every=1) if family == "kmeans" else {}
        options = LSHOptions(family=family, budget=10, tail=20, K=3, L=2, rehash_every=2, **own)
        layer = LSHLinear(16, 300, options=options, sparse=True)
        step = lambda x, y, layer=layer: LOSSES[loss](layer(x), y)  # noqa: E731
        x, y = torch.randn(6, 16, requires_grad=True), torch.arange(6)
        for _ in range(5):
            layer.weight.grad = None
            if checkpointed:
                value = torch.utils.checkpoint.checkpoint(step, x, y, use_reentrant=False)
            else:
                value = step(x, y)
            value.backward()
        stats = layer.stats()
        stats.pop("upkeep_seconds")
        results.append((value, layer.weight.grad.to_dense(), x.grad, stats))
    (*plain, plain_stats), (*again, again_stats) = results
    assert all(map(torch.equal, plain, again)) and plain_stats == again_stats
    assert plain_stats["steps"] == 5


@pytest.mark.parametrize("loss", LOSSES)
def test_autocast_computes_at_full_precision(loss):
    layer = LSHLinear(16, 40, options=LSHOptions(budget=40))
    x, y = torch.randn(6, 16).bfloat16().requires_grad_(), torch.arange(6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = LOSSES[loss](layer(x), y)
    assert value.dtype == torch.float32
    assert torch.equal(value, LOSSES[loss](layer(x.float()), y))
    value.backward()
    assert x.grad.dtype == torch.bfloat16 and layer.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("loss", LOSSES)
def test_parametrized_weights_need_dense_gradients(loss):
    layer = LSHLinear(16, 40, options=LSHOptions(budget=10, tail=5, K=2, L=3), sparse=True)
    torch.nn.utils.parametrizations.weight_norm(layer)
    x, y = torch.randn(6, 16), torch.arange(6)
    with pytest.raises(ValueError, match=r"linear_weight: expected a leaf"):
        LOSSES[loss](layer(x), y)
    layer.sparse = False
    LOSSES[loss](layer(x), y).backward()
    assert layer.parametrizations.weight.original1.grad.abs().sum() > 0


def test_what_no_list_of_classes_is():
    case = make()
    for target in (torch.zeros(9, 2, dtype=torch.bool), torch.zeros(9, 2, dtype=torch.complex64)):
        with pytest.raises(ValueError, match="target: expected int64 class indices or"):
            binary(case, target)
