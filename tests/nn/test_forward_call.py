"""Training logits belong to the autograd graph as nn.Linear's output does: what was recorded at the forward,
what may not change before the loss, what walks a module's output, and weights whose memory is gone."""

import dataclasses
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree

import slide_torch
from slide_torch import LSHFeedForward, LSHLinear, LSHOptions
from slide_torch.functional import lsh_linear_cross_entropy

N, D, B = 60, 8, 5
EXACT = LSHOptions(budget=N)
SAMPLED = LSHOptions(budget=5, tail=6, K=2, L=3)

USES = {
    "cross_entropy": lambda logits: F.cross_entropy(logits, torch.arange(B)),
    "nll_loss": lambda logits: F.nll_loss(F.log_softmax(logits, -1), torch.arange(B)),
    "binary_cross_entropy": lambda logits: F.binary_cross_entropy_with_logits(
        logits, F.one_hot(torch.arange(B), N).to(logits.dtype)
    ),
    "to_dense": lambda logits: logits.to_dense(0.0).sum(),
    "topk": lambda logits: logits.topk(2).values.sum(),
    "argmax": lambda logits: logits.argmax(-1),
    "softmax": lambda logits: logits.softmax(-1).square().sum(),
}
DIFFERENTIABLE = [name for name in USES if name != "argmax"]


def make(options=SAMPLED, **arguments):
    torch.manual_seed(0)
    layer = LSHLinear(D, N, options=options, **arguments)
    return layer, torch.randn(B, D, requires_grad=True)


# --- recorded at the forward ----------------------------------------------------------------------


@pytest.mark.parametrize("use", DIFFERENTIABLE)
def test_logits_outlive_their_layer(use):
    """They hold what the loss needs, not the module."""
    layer, x = make()
    weight, logits, alive = layer.weight, layer(x), weakref.ref(layer)
    del layer
    gc.collect()
    assert alive() is None
    USES[use](logits).backward()
    if use != "topk":
        assert weight.grad.abs().sum() > 0 and x.grad.abs().sum() > 0


def test_gradients_are_sparse_or_dense_as_the_layer_was_when_called():
    layer, x = make(sparse=True)
    logits = layer(x)
    layer.sparse = False
    USES["cross_entropy"](logits).backward()
    assert layer.weight.grad.layout == torch.sparse_coo


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_no_grad_at_forward(context, sparse, use):
    layer, x = make(sparse=sparse)
    with torch.no_grad():
        layer.rehash()
    with context():
        logits = layer(x)
    result = USES[use](logits)
    assert not logits.requires_grad and not result.requires_grad
    assert layer.tables.stats()["steps"] == 0  # no training step


@pytest.mark.parametrize("use", DIFFERENTIABLE)
@pytest.mark.parametrize("frozen", ["input", "weight", "bias"])
def test_frozen_at_forward(frozen, use):
    layer, x = make(EXACT)
    tensors = {"input": x, "weight": layer.weight, "bias": layer.bias}
    tensors[frozen].requires_grad_(False)
    logits, dense = layer(x), F.linear(x, layer.weight, layer.bias)
    tensors[frozen].requires_grad_(True)
    found = torch.autograd.grad(USES[use](logits), list(tensors.values()), allow_unused=True)
    if use == "to_dense":
        reference = dense.sum()
    elif use == "topk":
        reference = dense.topk(2).values.sum()
    else:
        reference = USES[use](dense)
    expected = torch.autograd.grad(reference, list(tensors.values()), allow_unused=True)
    for name, one, other in zip(tensors, found, expected, strict=True):
        assert (one is None) == (other is None) == (name == frozen), name
        if one is not None:
            torch.testing.assert_close(one, other)


def test_grad_mode_of_the_loss_counts_too():
    layer, x = make()
    logits = layer(x)
    with torch.no_grad():
        assert not F.cross_entropy(logits, torch.arange(B)).requires_grad
    assert F.cross_entropy(logits, torch.arange(B)).requires_grad
    assert not F.cross_entropy(logits.detach(), torch.arange(B)).requires_grad
    loss = F.cross_entropy(logits, torch.arange(B))
    loss /= 2  # it is no view
    loss.backward()


# --- changed before the loss ----------------------------------------------------------------------


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("which", ["input", "layer.weight", "layer.bias"])
def test_changed_before_the_loss(which, use):
    layer, x = make()
    tensor = {"input": x, "layer.weight": layer.weight, "layer.bias": layer.bias}[which]
    for context in (torch.enable_grad, torch.no_grad):
        with context():
            logits = layer(x)
        view = logits.reshape(1, B, N)[0]
        with torch.no_grad():
            tensor.mul_(2)
        for one in (logits, view):
            with pytest.raises(
                RuntimeError, match=rf"SampledLogits: {which}: .* modified in place"
            ):
                USES[use](one)
    assert layer.tables.stats()["steps"] == 0


def test_a_view_of_changed_input_is_refused():
    layer, x = make()
    logits = layer(x)
    with torch.no_grad():
        x.zero_()
    with pytest.raises(RuntimeError, match="modified in place"):
        logits[torch.tensor([0, 2])]  # a copy of what is no longer the input


def test_step_between_logits_and_loss():
    layer, x = make(sparse=True)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    logits = layer(x)
    F.cross_entropy(logits, torch.arange(B)).backward()
    assert logits.argmax(-1).shape == (B,)  # before the step
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"layer\.weight: .*optimizer\.step\(\)"):
        logits.argmax(-1)


@pytest.mark.parametrize("kind", ["dense", "feed_forward", "functional"])
@pytest.mark.parametrize("which", ["input", "weight"])
def test_changed_before_backward(which, kind):
    """What is computed at once saves its tensors: torch notices."""
    x = torch.randn(B, D, requires_grad=True)
    if kind == "feed_forward":
        layer = LSHFeedForward(D, N, options=LSHOptions(pattern="per_sample", budget=9, tail=3))
        weight, result = layer.first.weight, layer(x).sum()
    elif kind == "dense":
        layer = LSHLinear(D, N, options=LSHOptions(budget=9, tail=3), output="dense")
        weight, result = layer.weight, layer(x).sum()
    else:
        layer = LSHLinear(D, N, options=SAMPLED)
        weight = layer.weight
        result = lsh_linear_cross_entropy(
            x, weight, torch.arange(B), linear_bias=layer.bias, tables=layer.tables
        )
    with torch.no_grad():
        (x if which == "input" else weight).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.backward()


# --- what walks a module's output -----------------------------------------------------------------


@pytest.mark.parametrize("sparse", [False, True])
def test_a_node_of_pytree(sparse):
    layer, x = make(EXACT, sparse=sparse)
    logits = layer(x) * 2
    (leaf,), spec = _pytree.tree_flatten({"logits": logits})
    assert leaf.requires_grad and leaf.numel() == 0
    first, _ = dataclasses.fields(logits)  # which a walk of dataclasses finds
    assert getattr(logits, first.name) is leaf
    seen = []
    leaf.register_hook(lambda grad: seen.append(tuple(grad.shape)))
    found = _pytree.tree_unflatten([leaf.clone()], spec)["logits"]
    own = torch.autograd.grad(F.cross_entropy(found, torch.arange(B)), (x, *layer.parameters()))
    assert seen == [(0,)]
    dense = F.linear(x, layer.weight, layer.bias) * 2
    expected = torch.autograd.grad(
        F.cross_entropy(dense, torch.arange(B)), (x, *layer.parameters())
    )
    for one, other in zip(own, expected, strict=True):
        torch.testing.assert_close(one.to_dense(), other)
    detached = _pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, logits)
    assert not F.cross_entropy(detached, torch.arange(B)).requires_grad


@pytest.mark.parametrize("requires_grad", [False, True])
def test_hooks_on_the_leaf_fire_whatever_gets_a_gradient(requires_grad):
    layer, x = make()
    for use in DIFFERENTIABLE:
        logits = layer(x.detach().requires_grad_(requires_grad))
        seen = []
        (leaf,), _ = _pytree.tree_flatten(logits)
        leaf.register_hook(seen.append)
        USES[use](logits[1:] if use == "softmax" else logits).backward()
        assert len(seen) == 1, use


def test_module_backward_hooks_are_refused():
    registered = (
        lambda layer: layer.register_full_backward_hook(lambda *_: None),
        lambda layer: layer.register_full_backward_pre_hook(lambda *_: None),
        lambda layer: layer.register_backward_hook(lambda *_: None),
        lambda _: nn.modules.module.register_module_full_backward_hook(lambda *_: None),
    )
    for register in registered:
        layer, x = make()
        handle = register(layer)
        try:
            with pytest.raises(NotImplementedError, match=r"input\.register_hook"):
                layer(x)
            if layer._is_full_backward_hook is not False:
                with torch.no_grad():
                    layer(x)  # none would be called for nn.Linear either
            assert layer.eval()(x).shape == (B, N)
        finally:
            handle.remove()
    model = nn.Sequential(make()[0])
    model.register_backward_hook(lambda *_: None)
    with pytest.raises(NotImplementedError, match="let that module return the loss"):
        model(x)


# --- weights that are not in memory ---------------------------------------------------------------


@pytest.mark.parametrize("use", USES)
def test_freed_memory(use):
    layer, x = make()
    logits = layer(x)
    layer.weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"weight: .* memory has been freed: under fully_shard"):
        USES[use](logits)


def test_freed_memory_of_other_methods():
    layer, x = make()
    feed_forward, hidden = LSHFeedForward(D, N), LSHLinear(D, N, output="dense")
    second = LSHFeedForward(D, N)
    second.second_weight.untyped_storage().resize_(0)
    for weight in (layer.weight, feed_forward.first.weight, hidden.weight):
        weight.untyped_storage().resize_(0)
    for call in (
        lambda: lsh_linear_cross_entropy(
            x, layer.weight, torch.arange(B), linear_bias=layer.bias, tables=layer.tables
        ),
        lambda: layer.predict(x, 3),
        lambda: layer.log_prob(x),
        lambda: layer.calibrate(x, 3, recall=0.9),
        lambda: layer.recall(x),
        lambda: layer.rehash(),
        lambda: layer.rebuild(),
        lambda: feed_forward(x),
        lambda: second(x),
        lambda: hidden(x),
    ):
        with pytest.raises(RuntimeError, match=r"memory has been freed: under fully_shard"):
            call()


def test_operators_refuse_freed_memory():
    weight = torch.randn(N, D)
    weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="topk_linear: weight: its memory has been freed"):
        slide_torch.ops.topk_linear(torch.randn(B, D), weight, None, 3)


def integers_alive():
    """How many elements all tensors of int64 have together."""
    gc.collect()
    found = (o for o in gc.get_objects() if type(o) is torch.Tensor and o.dtype == torch.int64)
    return sum(tensor.numel() for tensor in found)


def test_marks_of_a_weight_whose_version_stays():
    """fully_shard keeps it: marks of many steps take no more memory than the rows they name."""
    layer, _ = make(sparse=True)
    layer.rehash()
    before = integers_alive()
    for step in range(1000):
        layer.tables.mark_dirty(torch.tensor([step % N]), version=7)
    assert layer.tables.dirty.all() and integers_alive() - before < 2 * 64
    layer.rehash()
    assert layer.tables.dirty.all()  # the marks still wait for the version to change
