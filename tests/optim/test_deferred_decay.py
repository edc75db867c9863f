"""Adam(..., deferred_decay=True): rows catch up with the weight decay of the steps that they missed."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from slide_torch import LSHLinear, LSHOptions
from slide_torch.optim import Adam

BF16 = torch.bfloat16
N = 40
# lr * weight_decay is 0.03 at first: 60 steps leave a tenth
OPTIONS = {"lr": 0.1, "weight_decay": 0.3, "eps": 1e-8}
# v + (g^2 - v) is g^2 but for the rounding of a larger v
WITH_OTHER_MOMENTS = {"rtol": 1e-7, "atol": 1e-9}


def gradients_of(steps, dtype=torch.float32, shape=(N, 19), entries=6, seed=3):
    """Row-sparse, of a few rows each; row 0 never has one, and the third is of no row."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for step in range(steps):
        rows = torch.randint(1, shape[0], (entries * (step != 2),), generator=generator)
        values = torch.randn(len(rows), *shape[1:], generator=generator, dtype=torch.float64)
        found.append(
            torch.sparse_coo_tensor(rows[None], values.to(dtype), shape, check_invariants=True)
        )
    return found


def new(dtype=torch.float32, shape=(N, 19), **options):
    start = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    param = nn.Parameter(start.to(dtype))
    return param, Adam([param], **(OPTIONS | {"deferred_decay": True} | options))


def train(param, optimizer, grads, first=0):
    """The rate falls, and the decay changes half way."""
    for step, grad in enumerate(grads, first):
        for group in optimizer.param_groups:
            group["lr"] = OPTIONS["lr"] * 0.99**step
            group["weight_decay"] = OPTIONS["weight_decay"] * (1 if step < 30 else 0.5)
        param.grad = grad
        optimizer.step()


def decayed_by_hand(param, grads, **options):
    """torch's SparseAdam, every row being decayed before each step."""
    optimizer = torch.optim.SparseAdam([param], lr=OPTIONS["lr"], eps=OPTIONS["eps"], **options)
    for step, grad in enumerate(grads):
        lr = optimizer.param_groups[0]["lr"] = OPTIONS["lr"] * 0.99**step
        with torch.no_grad():
            param.mul_(1 - lr * OPTIONS["weight_decay"] * (1 if step < 30 else 0.5))
        param.grad = grad
        optimizer.step()
    return param


@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("shape", [(N,), (N, 19), (N, 3, 4)])
def test_all_rows_decay_as_in_dense_steps(dtype, rtol, shape):
    grads = gradients_of(60, dtype, shape)
    param, optimizer = new(dtype, shape)
    start = param.detach().clone()
    train(param, optimizer, grads)
    wanted = decayed_by_hand(nn.Parameter(start.clone()), grads).detach()
    assert torch.equal(param[0], start[0])  # not yet
    assert not torch.allclose(param, wanted, rtol=0.1)
    optimizer.apply_deferred_decay_()
    torch.testing.assert_close(param.detach(), wanted, rtol=rtol, atol=rtol / 100)
    assert (param[0] / start[0]).max() < 0.5  # what is compared is large
    same = param.detach().clone()
    optimizer.apply_deferred_decay_()
    assert torch.equal(param, same)
    assert optimizer.state[param]["log_decay"].shape == (N,)
    assert optimizer.state[param]["log_decay"].dtype == dtype


@pytest.mark.parametrize("maximize", [False, True])
def test_it_is_adamw_where_moments_move_no_rows(maximize):
    options = {"betas": (0.0, 0.0), "maximize": maximize}
    grads = gradients_of(60, torch.float64)
    param, optimizer = new(torch.float64, **options)
    other = nn.Parameter(param.detach().clone())
    train(param, optimizer, grads)
    optimizer.apply_deferred_decay_()
    train(other, torch.optim.AdamW([other], **OPTIONS, **options), [g.to_dense() for g in grads])
    torch.testing.assert_close(param, other, **WITH_OTHER_MOMENTS)


def test_errors_do_not_add_up_over_many_steps():
    """Of one row that is touched now and then, without an update, through 30,000 steps."""
    param = nn.Parameter(torch.ones(2, 1))
    optimizer = Adam([param], lr=1e-2, weight_decay=1e-3, deferred_decay=True)
    for step in range(30_000):
        rows = torch.tensor([[1] if step % 100 == 50 else []], dtype=torch.int64).view(1, -1)
        param.grad = torch.sparse_coo_tensor(
            rows, torch.zeros(rows.shape[1], 1), (2, 1), check_invariants=True
        )
        optimizer.step()
    optimizer.apply_deferred_decay_()
    wanted = (1 - 1e-5) ** 30_000
    # the row that was never touched is rounded once; the other, at 300 touches, twice each
    assert abs(param[0].item() / wanted - 1) < 2**-22
    assert abs(param[1].item() / wanted - 1) < 600 * 2**-24


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("moments_dtype", [None, BF16])
def test_rows_with_a_gradient_in_every_step_keep_their_bits(sparse, moments_dtype):
    grads = [torch.randn(N, 19, generator=torch.Generator().manual_seed(s)) for s in range(5)]
    grads = [g.to_sparse(1) for g in grads] if sparse else grads
    params = []
    for deferred in (False, True):
        param, optimizer = new(deferred_decay=deferred, moments_dtype=moments_dtype)
        train(param, optimizer, grads)
        if deferred:
            optimizer.apply_deferred_decay_()
        params.append(param)
    assert torch.equal(*params)


def test_a_dense_gradient_after_sparse_ones_catches_up():
    grads = gradients_of(9, torch.float64)
    grads[4] = torch.randn(N, 19, dtype=torch.float64).to_sparse(1)
    param, optimizer = new(torch.float64, betas=(0.0, 0.0))
    other = nn.Parameter(param.detach().clone())
    train(
        other,
        torch.optim.AdamW([other], **OPTIONS, betas=(0.0, 0.0)),
        [g.to_dense() for g in grads],
    )
    grads[4] = grads[4].to_dense()
    train(param, optimizer, grads)
    optimizer.apply_deferred_decay_()
    torch.testing.assert_close(param, other, **WITH_OTHER_MOMENTS)


def test_bfloat16_rows_catch_up_without_bias_by_other_bits_each_time():
    shape = (1000, 100)
    param = nn.Parameter(torch.ones(shape, dtype=BF16))
    optimizer = Adam([param], lr=2.0**-6, weight_decay=2.0**-6, deferred_decay=True)
    untouched = param[1:]
    for time in (1, 2):
        for _ in range(2):
            param.grad = torch.sparse_coo_tensor(
                torch.tensor([[0]]), torch.zeros(1, 100, dtype=BF16), shape, check_invariants=True
            )
            optimizer.step()
        if time == 1:
            assert untouched.eq(1).all()
        optimizer.apply_deferred_decay_()
        # the number below 1 is 1 - 2^-8; two steps of 2^-12 are an eighth of the way
        assert abs(untouched.eq(1).double().mean().item() - (7 / 8) ** time) < 0.006
        assert (untouched >= 1 - time * 2.0**-8).all()
    assert optimizer.state[param]["log_decay"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, BF16])
def test_same_bits_at_any_number_of_threads(dtype):
    def work(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        param, optimizer = new(dtype, (30_000, 19))
        train(param, optimizer, gradients_of(4, dtype, (30_000, 19), entries=9_000))
        optimizer.apply_deferred_decay_()
        torch.set_num_threads(before)
        return param, optimizer.state[param]["log_decay"]

    for one, many in zip(work(1), work(3), strict=True):
        assert torch.equal(one, many)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, BF16])
def test_a_state_dict_resumes_bit_for_bit(dtype):
    grads = gradients_of(20, dtype)
    param, optimizer = new(dtype)
    train(param, optimizer, grads[:10])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = nn.Parameter(param.detach().clone())
    following = Adam([other])
    following.load_state_dict(torch.load(file, weights_only=True))
    copied = copy.deepcopy((param, optimizer))
    for p, o in ((param, optimizer), (other, following), copied):
        train(p, o, grads[10:], first=10)
        o.apply_deferred_decay_()
        assert o.state[p]["log_decay_total"].dtype == torch.float64
        for key, value in o.state[p].items():
            assert torch.equal(value, optimizer.state[param][key]), key
        assert torch.equal(p, param)


def test_a_sampled_layer_trains_with_it():
    layer = LSHLinear(20, 500, options=LSHOptions(tail=30, K=4, L=8), sparse=True)
    optimizer = Adam([{"params": layer.parameters(), "deferred_decay": True}], **OPTIONS)
    before = layer.weight.detach().clone()
    for step in range(3):
        torch.manual_seed(step)
        optimizer.zero_grad()
        F.cross_entropy(layer(torch.randn(12, 20)), torch.randint(500, (12,))).backward()
        optimizer.step()
    kept = (layer.weight == before).all(1)
    assert kept.any()
    optimizer.apply_deferred_decay_()
    torch.testing.assert_close(layer.weight[kept].detach(), before[kept] * 0.97**3)


def test_what_it_is_not_for_is_refused_before_anything_changes():
    param = nn.Parameter(torch.ones(4, 3))
    with pytest.raises(ValueError, match="deferred_decay: expected a bool, got 1"):
        Adam([param], deferred_decay=1)
    with pytest.raises(ValueError, match="deferred_decay: expected fuse_backward=False, got"):
        Adam([param], deferred_decay=True, fuse_backward=True)
    with pytest.raises(ValueError, match="deferred_decay: expected fuse_backward=False, got"):
        Adam([{"params": [param], "fuse_backward": True}], deferred_decay=True)
    param.grad = torch.ones(4, 3)
    optimizer = Adam([param], lr=1.0, weight_decay=1.0, deferred_decay=True)
    with pytest.raises(ValueError, match=r"expected lr \* weight_decay below 1, got 1\.0 \* 1\.0"):
        optimizer.step()
    assert param.eq(1).all() and not optimizer.state
    Adam([param]).apply_deferred_decay_()  # nothing to do
    assert param.eq(1).all()
