"""Binary cross entropy: dense torch where every neuron is active, the reference on any active set, unbiased
where corrected."""

import pytest
import reference
import torch
import torch.nn.functional as F
from loss_problems import (
    ALL_ACTIVE,
    LISTS,
    PATTERNS,
    assert_same,
    binary,
    dense_active_set,
    dense_binary,
    gradients,
    make,
    operator_sample,
    padded,
    small_layer,
    z_scores,
)
from torch import nn
from torch.autograd import gradcheck

from slide_torch import LSHLinear, LSHOptions
from slide_torch.sampling.draw import draw_active_set
from slide_torch.sampling.targets import as_labels

MULTI_HOT = torch.zeros(len(LISTS), 40, dtype=torch.float64)
for _b, _labels in enumerate(LISTS):
    MULTI_HOT[_b, _labels] = 1


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


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("pattern", ALL_ACTIVE)
def test_binary_with_weights_of_zero_equals_torch(pattern, positive):
    case = make(**ALL_ACTIVE[pattern])
    weight = torch.rand(40, dtype=torch.float64)
    weight[:20] = 0
    options = {"pos_weight" if positive else "weight": weight}
    ours = binary(case, padded(LISTS, 5), **options)
    assert_same(ours, dense_binary(case, MULTI_HOT, **options), case)
