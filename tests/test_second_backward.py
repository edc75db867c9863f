"""Backward twice, after a change, and of a gradient: as torch does it, or refused."""

import pytest
import torch
import torch.nn.functional as F
from refusals import PATTERNS, make


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("sparse", [False, True])
def test_backward_twice(pattern, sparse):
    layer, x, y = make(pattern=pattern)
    layer.sparse = sparse
    layer.zero_grad()
    loss = F.cross_entropy(layer(x), y)
    loss.backward(retain_graph=True)
    once = layer.weight.grad.to_dense().clone()
    loss.backward()
    assert torch.equal(layer.weight.grad.to_dense(), 2 * once)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.parametrize("changed", ["weight", "input"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_changes_before_backward_are_noticed(pattern, changed):
    layer, x, y = make(pattern=pattern)
    layer.weight.grad = None
    loss = F.cross_entropy(layer(x), y)
    with torch.no_grad():
        (layer.weight if changed == "weight" else x).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert layer.weight.grad is None


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("wanted", ["weight", "bias", "input"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_second_derivatives_are_refused(pattern, wanted, sparse):
    layer, x, y = make(pattern=pattern)
    layer.sparse = sparse
    x.requires_grad_()
    of = {"weight": layer.weight, "bias": layer.bias, "input": x}[wanted]
    (grad,) = torch.autograd.grad(F.cross_entropy(layer(x), y), of, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        (grad.to_dense() ** 2).sum().backward()
