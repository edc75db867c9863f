"""Training with parameters in bfloat16: updates are rounded up or down at random, without bias."""

import math

import pytest
import torch
import torch.nn.functional as F
from bfloat16_layers import (
    BF16,
    PATTERNS,
    B,
    D,
    N,
    backward,
    batch,
    cross_entropy,
    float_twin,
    make,
)
from torch import nn

from slide_torch import LSHLinear, ops
from slide_torch.optim import SGD, Adagrad, Adam

OPTIMIZERS = {
    "adam": lambda p: Adam(p, lr=0.01),
    "adam_decay": lambda p: Adam(p, lr=0.01, weight_decay=0.01, moments_dtype=BF16),
    "sgd": lambda p: SGD(p, lr=1.0),
    "momentum": lambda p: SGD(p, lr=0.5, momentum=0.5, nesterov=True),
    "adagrad": lambda p: Adagrad(p, lr=0.05),
}


def train(options, make_optimizer, *, sparse, threads=1, dtype=BF16, steps=60):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    layer = make(sparse=sparse, dtype=dtype, **options)
    optimizer = make_optimizer(layer.parameters())
    torch.manual_seed(5)
    x = torch.randn(64, D).to(dtype)
    y = torch.arange(64)
    losses = []
    for step in range(steps):
        torch.manual_seed(step)
        part = torch.randint(64, (B,))
        loss = F.cross_entropy(layer(x[part]), y[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    torch.set_num_threads(before)
    return layer, optimizer, losses


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_follows_float32(name, sparse):
    layer, optimizer, losses = train({}, OPTIMIZERS[name], sparse=sparse)
    _, _, exact = train({}, OPTIMIZERS[name], sparse=sparse, dtype=torch.float32)
    first, last = sum(losses[:5]) / 5, sum(losses[-5:]) / 5
    wanted = sum(exact[-5:]) / 5
    assert last < 0.7 * first and last < wanted + 0.1 * (first - wanted)
    assert all(p.dtype == BF16 for p in layer.parameters())
    for state in optimizer.state.values():
        assert all(v.dtype == BF16 for key, v in state.items() if key != "step")


@pytest.mark.parametrize("options", ["kmeans", "per_sample_reranked", "per_sample_log_uniform"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("sparse", [False, True])
def test_same_bits_at_any_number_of_threads(options, name, sparse):
    runs = [
        train(PATTERNS[options], OPTIMIZERS[name], sparse=sparse, threads=threads, steps=8)
        for threads in (1, 3)
    ]
    (one, states, losses), (other, other_states, other_losses) = runs
    assert losses == other_losses
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        for key, value in states.state[p].items():
            assert torch.equal(value, other_states.state[q][key])


def test_fuse_backward_hands_the_gradient_over():
    results = [
        train({}, lambda p, fuse=fuse: Adam(p, lr=0.01, fuse_backward=fuse), sparse=True, steps=8)
        for fuse in (False, True)
    ]
    for p, q in zip(results[0][0].parameters(), results[1][0].parameters(), strict=True):
        assert torch.equal(p, q)


def update(name, param, state, gradient, rows, step):
    if name == "sgd":
        options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0, "nesterov": False}
        ops.sgd_rows_(param, state, rows, gradient, maximize=False, step=step, **options)
    else:
        ops.adagrad_rows_(param, state, rows, gradient, lr=0.1, eps=1e-8, maximize=False, step=step)


@pytest.mark.parametrize("shape", [(40, 19), (300,), (9, 128), (2000, 3)])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("name", ["sgd", "adagrad"])
def test_updates_are_neighbours_of_the_exact_ones(name, shape, sparse):
    before = [torch.randn(shape).to(BF16), torch.rand(shape).to(BF16)]
    rows = torch.arange(0, shape[0], 2) if sparse else None
    part = slice(None) if rows is None else rows
    gradient = torch.randn(shape).to(BF16)
    param, state = (t.clone() for t in before)
    update(name, param, state, gradient[part].contiguous(), rows, step=7)
    exact, exact_state = (t.double() for t in before)
    g = gradient.double()
    if name == "sgd":
        exact_state = 0.9 * exact_state + g
        exact = exact - 0.1 * exact_state
    else:
        exact_state = exact_state + g * g
        exact = exact - 0.1 * g / (exact_state.sqrt() + 1e-8)
    for got, wanted in ((param, exact), (state, exact_state)):
        error = (got.double() - wanted)[part].abs()
        # a unit in the last place, and float32's error where numbers cancel
        assert (error <= wanted[part].abs() * 2.0**-7 + 1e-6).all()
        assert error.max() > 0
    if sparse:
        others = torch.ones(shape[0], dtype=torch.bool).index_fill(0, rows, False)
        for now, old in ((param, before[0]), (state, before[1])):
            assert torch.equal(now[others], old[others])


def test_parameters_are_rounded_without_bias_and_independently():
    count, chance = 200_000, 0.25
    ups = []
    for step in (1, 2):
        param = torch.ones(count, dtype=BF16)
        gradient = torch.full((count,), -chance * 2.0**-7, dtype=BF16)
        options = {"momentum": 0.0, "weight_decay": 0.0, "nesterov": False, "maximize": False}
        ops.sgd_rows_(param, None, None, gradient, lr=1.0, step=step, **options)
        up = param == 1 + 2**-7
        assert (up | (param == 1)).all()
        assert abs(up.double().mean().item() - chance) < 4 * math.sqrt(chance / count)
        ups.append(up.double() - chance)
    for other in (ups[1], ups[0].roll(1), ups[0].roll(16), ups[0].roll(1024)):
        assert abs((ups[0] * other).sum() / (ups[0].norm() * other.norm())) < 4 / math.sqrt(count)


def test_small_steps_are_not_lost():
    """The mean moves by what it should, where rounding to nearest never moves."""
    param = nn.Parameter(torch.ones(4096, dtype=BF16))
    optimizer = Adam([param], lr=1e-4)
    for _ in range(200):
        param.grad = torch.ones_like(param)
        optimizer.step()
    assert abs(param.double().mean().item() - (1 - 200e-4)) < 0.001
    nearest = torch.ones((), dtype=BF16)
    assert nearest - 1e-4 == nearest


def test_what_is_not_a_number_stays_so():
    param = torch.ones(27, dtype=BF16)
    gradient = torch.tensor([math.nan, math.inf, 1.0] * 9).to(BF16)
    options = {"momentum": 0.0, "weight_decay": 0.0, "nesterov": False, "maximize": False}
    ops.sgd_rows_(param, None, None, gradient, lr=1.0, **options)
    assert param[0::3].isnan().all() and param[1::3].isinf().all() and param[2::3].eq(0).all()


def test_accumulated_row_gradients_are_summed_in_float32():
    rows, values = torch.tensor([4, 1, 4]), torch.randn(3, 5).to(BF16)
    found, sums = ops.coalesce_rows(rows, values, 6)
    assert found.tolist() == [1, 4] and sums.dtype == BF16
    assert torch.equal(sums[1], (values[0].float() + values[2].float()).to(BF16))


@pytest.mark.parametrize(
    "optimizer,message",
    [
        (SGD([nn.Parameter(torch.ones(3))], momentum=0.5, dampening=0.1), "dampening 0"),
        (Adagrad([nn.Parameter(torch.ones(3))], weight_decay=0.1), "weight_decay 0"),
    ],
)
def test_options_that_no_kernel_has_are_refused_before_anything_changes(optimizer, message):
    (good,) = optimizer.param_groups[0]["params"]
    narrow = nn.Parameter(torch.ones(3, dtype=BF16))
    optimizer.add_param_group({"params": [narrow]})
    good.grad, narrow.grad = torch.ones(3), torch.ones(3, dtype=BF16)
    with pytest.raises(ValueError, match=f"parameter 1: expected {message} for a parameter in bf"):
        optimizer.step()
    assert good.eq(1).all() and narrow.eq(1).all() and not optimizer.state


def test_state_dicts_go_both_ways():
    layer, dense = make(), nn.Linear(D, N, dtype=BF16)
    dense.load_state_dict(layer.state_dict())
    x, _ = batch()
    assert torch.equal(layer.eval()(x), dense(x))
    other = make().train()
    with torch.no_grad():
        dense.weight.mul_(2)
    other.load_state_dict(dense.state_dict())
    assert torch.equal(other.weight, dense.weight) and other.weight.dtype == BF16
    assert LSHLinear.from_linear(dense).weight is dense.weight
    optimizer = Adam(layer.parameters())
    layer.train()
    backward(layer, x, batch()[1], cross_entropy)
    optimizer.step()
    theirs = torch.optim.AdamW(layer.parameters())
    theirs.load_state_dict(optimizer.state_dict())
    optimizer.load_state_dict(theirs.state_dict())
    assert optimizer.state[layer.weight]["exp_avg"].dtype == BF16


def test_a_layer_converted_in_training_goes_on():
    layer = make(dtype=torch.float32)
    x, y = batch()
    backward(layer, x.float(), y, cross_entropy)
    layer.to(BF16).zero_grad()
    loss, grads = backward(layer, x, y, cross_entropy)
    assert loss.isfinite() and all(g.dtype == BF16 for g in grads)
    layer.rehash()
    twin = float_twin(layer)
    assert torch.equal(layer.tables.codes, twin.tables.family.row_codes(twin.weight, twin.bias))
