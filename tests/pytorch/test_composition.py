"""Inside the rest of PyTorch: clipping, autocast, checkpointing, parametrizations, averaged models."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import small_model as make
from small_batches import PATTERNS, B, D, N, batch, loss_of, stale_unmarked
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import slide_torch
from slide_torch import LSHLinear

pytestmark = pytest.mark.usefixtures("one_thread")


def grads_of(model):
    return [p.grad.to_dense().clone() for p in model.parameters()]


# --- gradients --------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
@pytest.mark.parametrize("max_norm", [0.1, 100.0])
@pytest.mark.parametrize("batches", [1, 2])
def test_clipping_of_sparse_gradients_is_that_of_dense_ones(batches, max_norm, norm_type):
    dense, sparse = make(), make(sparse=True)
    for model in (dense, sparse):
        for seed in range(batches):
            loss_of(model, seed).backward()
    expected = nn.utils.clip_grad_norm_(dense.parameters(), max_norm, norm_type)
    found = slide_torch.clip_grad_norm_(sparse.parameters(), max_norm, norm_type)
    torch.testing.assert_close(found, expected)
    for one, other in zip(grads_of(sparse), grads_of(dense), strict=True):
        torch.testing.assert_close(one, other)
    assert sparse[-1].weight.grad.layout == torch.sparse_coo
    again = slide_torch.clip_grad_norm_(sparse.parameters(), max_norm, norm_type)
    torch.testing.assert_close(again, found.clamp(max=max_norm))


def test_clipping_refuses_and_spares():
    model = make(sparse=True)
    assert slide_torch.clip_grad_norm_(model.parameters(), 1.0) == 0
    loss_of(model).backward()
    with pytest.raises(NotImplementedError):  # what docs/pytorch.md says of torch's own
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    before = grads_of(model)
    model[0].bias.grad[0] = float("nan")
    with pytest.raises(RuntimeError, match="expected gradients of a finite norm, got nan"):
        slide_torch.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
    assert torch.equal(model[-1].weight.grad.to_dense(), before[2])
    assert slide_torch.clip_grad_norm_(model[-1].weight, 1e9) > 0  # a single tensor


@pytest.mark.parametrize("sparse", [False, True])
def test_grad_scaler(sparse):
    plain, scaled = make(sparse=sparse), make(sparse=sparse)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizers = [slide_torch.optim.SGD(m.parameters(), lr=0.1) for m in (plain, scaled)]
    for seed in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss_of(plain, seed).backward()
        optimizers[0].step()
        scaler.scale(loss_of(scaled, seed)).backward()
        scaler.step(optimizers[1])
        scaler.update()
    for p, q in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    # a step with Inf is left out and lowers the scale
    before = scaled[-1].weight.detach().clone()
    scaler.scale(loss_of(scaled) * float("inf")).backward()
    scaler.step(optimizers[1])
    scaler.update()
    assert torch.equal(scaled[-1].weight, before) and scaler.get_scale() == 512.0


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_autocast(pattern, sparse):
    """Earlier layers give bfloat16; the head computes in float32, and so does its gradient."""
    model = make(pattern=pattern, sparse=sparse)
    reference = copy.deepcopy(model)
    x, y = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model[:2](x)
        assert hidden.dtype == torch.bfloat16
        hidden.retain_grad()
        torch.manual_seed(1)
        logits = model[-1](hidden)
        assert logits.dtype == torch.float32
        loss = F.cross_entropy(logits, y)
    loss.backward()
    exact = hidden.detach().float().requires_grad_()
    torch.manual_seed(1)
    expected = F.cross_entropy(reference[-1](exact), y)
    expected.backward()
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)
    assert hidden.grad.dtype == torch.bfloat16 and torch.equal(hidden.grad, exact.grad.bfloat16())
    assert torch.equal(model[-1].weight.grad.to_dense(), reference[-1].weight.grad.to_dense())
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model[-1](hidden).topk(2).values.dtype == torch.float32
        assert model.eval()(x).dtype == torch.bfloat16  # as nn.Linear
    with pytest.raises(ValueError, match=r"input: expected torch.float32"):
        model.train()[-1](hidden)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_activation_checkpointing(pattern, sparse, use_reentrant):
    """The recomputation draws the active set of the forward, and is no second step of the schedule, also
    where the forward has built, rehashed or rebuilt tables."""
    plain = make(pattern=pattern, sparse=sparse, rebuild_every=2)
    saving = copy.deepcopy(plain)
    optimizers = [slide_torch.optim.Adam(m.parameters(), lr=0.1) for m in (plain, saving)]
    drawn = []
    for one, optimizer in zip((plain, saving), optimizers, strict=True):
        torch.manual_seed(7)
        for seed in range(8):
            x, y = batch(seed)
            x.requires_grad_()

            def forward(x, y, one=one):
                return F.cross_entropy(one(x), y)

            saved = one is saving
            loss = (
                checkpoint(forward, x, y, use_reentrant=use_reentrant) if saved else forward(x, y)
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            drawn.append((loss.detach(), x.grad, *grads_of(one)))
    for one, other in zip(drawn[:8], drawn[8:], strict=True):
        # reentrant: a first pass without gradients brings no rehash
        assert use_reentrant or all(map(torch.equal, one, other))
    expected, found = plain[-1].stats(), saving[-1].stats()
    assert found["steps"] == expected["steps"] == 8
    assert abs(found["rehashes"] - expected["rehashes"]) <= use_reentrant and found["rehashes"] > 1
    assert sparse is False or not stale_unmarked(saving[-1]).any()


def test_reentrant_checkpointing_recomputes_the_same_set():
    model = make(sparse=True)
    loss_of(model)
    plain = copy.deepcopy(model)
    x, y = batch()
    x.requires_grad_()
    torch.manual_seed(3)
    checkpoint(lambda x: F.cross_entropy(model(x), y), x, use_reentrant=True).backward()
    grad, x.grad = x.grad, None
    torch.manual_seed(3)
    F.cross_entropy(plain(x), y).backward()
    assert torch.equal(x.grad, grad)


def test_the_same_seed_again_after_a_step_is_a_new_step():
    model = make(sparse=True)
    optimizer = slide_torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(6):
        optimizer.zero_grad()
        loss_of(model, seed=1).backward()  # a caller who sets the seed anew in every step
        optimizer.step()
    assert model[-1].stats()["steps"] == 6 and model[-1].stats()["rehashes"] == 2


# --- parameters that are not just Parameters --------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS)
def test_functional_call(pattern):
    """Loss and gradients are those of the parameters given, though the loss comes after the call."""
    model, other = make(pattern=pattern), make(pattern=pattern)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(-1.5)
    given = {name: p.detach().clone().requires_grad_() for name, p in other.named_parameters()}
    x, y = batch()
    torch.manual_seed(1)
    loss = F.cross_entropy(torch.func.functional_call(model, given, (x,)), y)
    loss.backward()
    expected = loss_of(other)
    expected.backward()
    assert torch.equal(loss, expected)
    for p, (name, q) in zip(other.parameters(), given.items(), strict=True):
        assert torch.equal(p.grad, q.grad), name
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("how", ["weight_norm", "spectral_norm"])
def test_parametrizations(how):
    model = make()
    reference = make(budget=N)
    for one in (model, reference):
        getattr(nn.utils.parametrizations, how)(one[-1], "weight")
    model[-1].tables.options = reference[-1].tables.options  # all neurons active: exact
    x, y = batch()
    with nn.utils.parametrize.cached():  # one weight: spectral_norm's iteration goes on in training
        logits = F.linear(model[:2](x), model[-1].weight, model[-1].bias)
        losses = [F.cross_entropy(logits, y), F.cross_entropy(model(x), y)]
    parameters = list(model.parameters())
    expected, found = (torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses)
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(found, expected)
    assert all(gradient.any() for gradient in found)


def test_parametrization_with_sparse_gradients_is_refused():
    model = make(sparse=True)
    nn.utils.parametrizations.weight_norm(model[-1], "weight")
    with pytest.raises(ValueError, match=r"expected a leaf .* use sparse=False"):
        loss_of(model)
    assert model[-1].stats()["steps"] == 0


def test_float16_parameters_are_refused():
    with pytest.raises(ValueError, match=r"float64 or bfloat16, got torch.float16"):
        LSHLinear.from_linear(nn.Linear(D, N).half())
    model = make().half()
    with pytest.raises(ValueError, match=r"float64 or bfloat16, got torch.float16"):
        F.cross_entropy(model[-1](torch.zeros(2, D).half()), torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize("use_buffers", [False, True])
def test_averaged_model(use_buffers):
    model = make()
    averaged = AveragedModel(model, use_buffers=use_buffers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    total = torch.zeros(N, D)
    for seed in range(4):
        optimizer.zero_grad()
        loss_of(model, seed).backward()
        optimizer.step()
        averaged.update_parameters(model)
        total += model[-1].weight.detach()
    x, _ = batch()
    torch.testing.assert_close(averaged.module[-1].weight, total / 4)
    assert averaged.eval()(x).shape == (B, N)
    assert loss_of(averaged.train()).isfinite()
    assert model[-1].stats()["steps"] == 4 and not list(model.buffers())
