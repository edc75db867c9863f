"""Label smoothing and labels of weight zero: dense torch where every neuron is active, else unbiased."""

import math

import pytest
import torch
import torch.nn.functional as F
from loss_problems import (
    ALL_ACTIVE,
    PATTERNS,
    assert_same,
    make,
    padded,
    sampled,
    small_layer,
    z_scores,
)

from slide_torch.sampling.draw import draw_active_set
from slide_torch.sampling.targets import as_labels


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
