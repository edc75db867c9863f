"""Odd input that is no mistake: NaN and Inf, empty batches, rows without a label, tiny layers."""

import math

import pytest
import reference
import torch
import torch.nn.functional as F
from refusals import PATTERNS, SAMPLED, B, D, N, make, refused

from slide_torch import LSHLinear, LSHOptions
from slide_torch.active_set import SharedActiveSet
from slide_torch.sampling.draw import draw_active_set
from slide_torch.sampling.targets import as_labels


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_defective_input_spoils_its_own_row_only(pattern, everything, value):
    layer, x, y = make(pattern=pattern, **(dict(budget=N) if everything else {}))
    x[2, 3] = value
    x.requires_grad_()
    torch.manual_seed(5)
    losses = F.cross_entropy(layer(x), y, reduction="none")
    theirs = F.cross_entropy(F.linear(x, layer.weight, layer.bias), y, reduction="none")
    assert losses[2].isnan() and theirs[2].isnan()
    if not everything:
        torch.manual_seed(5)
        labels = as_labels(y, y.shape, N, x.dtype, -100)
        active = draw_active_set(layer.tables, x.detach(), labels)
        mask = torch.zeros(B, N, dtype=torch.bool)
        if isinstance(active, SharedActiveSet):
            mask[:, active.rows] = True
        else:
            sample = torch.arange(B).repeat_interleave(active.offsets.diff())
            mask[sample, active.active.long()] = True
        target = F.one_hot(y, N).to(x.dtype)
        theirs = reference.sampled_cross_entropy(x, layer.weight, layer.bias, mask, target)
    others = torch.arange(B) != 2
    torch.testing.assert_close(losses[others], theirs[others])
    (mine,) = torch.autograd.grad(losses.sum(), x)
    assert mine[others].isfinite().all() and mine[2].isnan().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("schedule", ["growing", "drift"])
def test_defective_weights_at_a_rehash(bad, schedule):
    layer, x, y = make(rehash_every=1, schedule=schedule, drift=0.0)
    if schedule == "drift":  # rows of the drift sample among them
        layer.tables.schedule.drift_sample_codes.add_(1)
    with torch.no_grad():
        layer.weight[[3, 41], 0] = bad
    message = r"weight: expected finite rows, got NaN or Inf in 2 of them \(3, 41\)"
    refused(layer, lambda: F.cross_entropy(layer(x), y), ValueError, message)
    refused(layer, layer.rehash, ValueError, message)
    fresh = LSHLinear.from_linear(layer.to_linear(), options=LSHOptions(**SAMPLED))
    with pytest.raises(ValueError, match=message):
        F.cross_entropy(fresh(x), y)
    assert not fresh.tables.built and fresh.tables.schedule.steps == 0


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("correction", ["none", "importance"])
def test_empty_batch(pattern, everything, correction):
    layer, _, _ = make(
        pattern=pattern, correction=correction, **(dict(budget=N) if everything else {})
    )
    x, y = torch.empty(0, D, requires_grad=True), torch.empty(0, dtype=torch.int64)
    for reduction in ("mean", "sum", "none"):
        layer.zero_grad(set_to_none=True)
        ours = F.cross_entropy(layer(x), y, reduction=reduction)
        theirs = F.cross_entropy(F.linear(x, layer.weight, layer.bias), y, reduction=reduction)
        torch.testing.assert_close(ours, theirs, equal_nan=True)
        ours.sum().backward()
        assert x.grad.shape == x.shape
        assert not layer.weight.grad.any() and not layer.bias.grad.any()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_rows_without_any_label(pattern):
    layer, x, _ = make(pattern=pattern)
    layer.zero_grad(set_to_none=True)
    x.requires_grad_()
    nothing = torch.empty(B, 0, dtype=torch.int64)
    assert F.cross_entropy(layer(x), nothing).isnan()
    losses = F.cross_entropy(layer(x), nothing, reduction="none")
    assert torch.equal(losses, torch.zeros(B))
    losses.sum().backward()
    assert not layer.weight.grad.any() and not layer.bias.grad.any() and not x.grad.any()


@pytest.mark.parametrize("family", ["simhash", "dwta"])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("neurons,budget,tail", [(n, b, t) for n in (1, 2, 3) for b, t in
                         [(0, 0), (0, 1), (1, 0), (1, 1), ("auto", "auto")]])  # fmt: skip
def test_tiny_layers(family, pattern, neurons, budget, tail):
    """Labels are active whatever the budget: losses lie between 0 and those of the full softmax."""
    options = LSHOptions(family=family, pattern=pattern, budget=budget, tail=tail)
    layer = LSHLinear(1, neurons, options=options)
    x, y = torch.randn(4, 1), torch.randint(neurons, (4,))
    losses = F.cross_entropy(layer(x), y, reduction="none")
    full = F.cross_entropy(layer.eval()(x), y, reduction="none")
    assert (losses >= -1e-6).all() and (losses <= full + 1e-6).all()
    losses.sum().backward()
    assert layer.weight.grad.isfinite().all()
