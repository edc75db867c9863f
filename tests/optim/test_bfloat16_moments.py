"""Adam(..., moments_dtype=torch.bfloat16): what its rounding does, on every path."""

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from slide_torch import LSHLinear, LSHOptions, ops
from slide_torch.optim import Adam

BF16 = torch.bfloat16
ADAM = {"lr": 0.1, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}


def step_rows(gradient, moments, *, step=1, rows=None, param=None, **options):
    """One update; the bfloat16 moments before and after."""
    param = torch.zeros_like(gradient) if param is None else param
    ops.adam_rows_(param, *moments, rows, gradient, step=step, maximize=False, **(ADAM | options))
    return param


def neighbours(exact):
    """The two bfloat16 numbers between which ``exact`` lies."""
    nearest = exact.to(BF16)
    bits = nearest.view(torch.int16)
    other = torch.where(nearest.double().abs() < exact.abs(), bits + 1, bits - 1)
    return nearest, other.view(BF16)


@pytest.mark.parametrize("shape", [(40, 19), (300,), (7, 3, 5), (9, 128), (2000, 3)])
@pytest.mark.parametrize("sparse", [False, True])
def test_moments_are_neighbours_of_the_exact_ones_and_the_parameter_uses_the_exact(shape, sparse):
    generator = torch.Generator().manual_seed(1)
    rows = torch.arange(0, shape[0], 2) if sparse else None
    gradient = torch.randn(shape, generator=generator)
    moments = [torch.randn(shape, generator=generator).to(BF16) for _ in range(2)]
    moments[1] = moments[1].abs()
    before = [m.clone() for m in moments]
    part = slice(None) if rows is None else rows
    param = step_rows(
        gradient[part].contiguous(), moments, rows=rows, step=7, param=torch.zeros(shape)
    )
    g = gradient.double()
    exact = [
        before[0].double() + (g - before[0].double()) * 0.1,
        before[1].double() + (g * g - before[1].double()) * 0.001,
    ]
    for moment, wanted in zip(moments, exact, strict=True):
        # float32's own error is far below a bfloat16 step
        low, high = neighbours(wanted[part])
        got = moment[part]
        close = (got.double() - wanted[part]).abs() <= wanted[part].abs() * 2.0**-7 + 1e-37
        assert close.all() and ((got == low) | (got == high)).float().mean() > 0.999
    if sparse:
        others = torch.ones(shape[0], dtype=torch.bool).index_fill(0, rows, False)
        for moment, old in zip(moments, before, strict=True):
            assert torch.equal(moment[others], old[others])
        assert param[others].eq(0).all()
    size = 0.1 * math.sqrt(1 - 0.999**7) / (1 - 0.9**7)
    expected = -size * exact[0] / (exact[1].sqrt() + 1e-8)
    torch.testing.assert_close(param[part].double(), expected[part], rtol=2e-5, atol=1e-7)


def test_rounding_is_unbiased_and_independent_between_moments_elements_and_steps():
    count = 200_000
    gradient = torch.full((count,), 1.003)
    ups = []
    for step in (1, 2):
        moments = [torch.full((count,), 1.0, dtype=BF16) for _ in range(2)]
        step_rows(gradient, moments, step=step)
        for moment, rate, moved in ((moments[0], 0.1, 0.003), (moments[1], 0.001, 1.003**2 - 1)):
            chance = rate * moved * 128  # of a step of 2^-7 upwards
            up = moment == 1 + 2**-7
            assert (up | (moment == 1)).all()
            error = abs(up.double().mean().item() - chance)
            assert error < 4 * math.sqrt(chance / count)
            ups.append(up.double() - up.double().mean())
    for i, a in enumerate(ups):
        for b in (*ups[:i], a.roll(1), a.roll(8), a.roll(1024)):
            assert abs((a * b).sum() / (a.norm() * b.norm())) < 4 / math.sqrt(count)


def test_the_second_moment_does_not_stall():
    """It goes to where the squared gradient is, which rounding to nearest never does."""
    count, steps = 512, 4000
    gradient = torch.full((count,), 2.0)
    moments = [torch.ones(count, dtype=BF16) for _ in range(2)]
    nearest = torch.ones((), dtype=BF16)
    param = torch.zeros(count)
    for step in range(1, steps + 1):
        step_rows(gradient, moments, step=step, param=param)
        nearest = (nearest.float() + (4 - nearest.float()) * 0.001).to(BF16)
    exact = 4 - 3 * 0.999**steps
    assert nearest == 1
    assert abs(moments[1].double().mean().item() - exact) < 0.01 * exact
    assert abs(moments[0].double().mean().item() - 2) < 0.01


def quadratic(moments_dtype, dtype, sparse, steps=1500):
    """Distance from the minimum of a noisy quadratic, a few rows of it at a time."""
    generator = torch.Generator().manual_seed(3)
    target = torch.randn(20, 33, generator=generator, dtype=torch.float64)
    param = nn.Parameter(torch.zeros(20, 33, dtype=dtype))
    optimizer = Adam([param], lr=0.02, moments_dtype=moments_dtype)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * (1 - step / steps)
        noise = torch.randn(target.shape, generator=generator, dtype=torch.float64)
        grad = (param.detach() - target + noise).to(dtype)
        if sparse:
            rows = torch.randperm(20, generator=generator)[:12].sort().values
            param.grad = torch.sparse_coo_tensor(rows[None], grad[rows], grad.shape)
        else:
            param.grad = grad
        optimizer.step()
    return (param.detach() - target).square().mean().sqrt().item()


@pytest.mark.parametrize("sparse", [False, True])
def test_converges_as_float64_does(sparse):
    reference = quadratic(None, torch.float64, sparse)
    assert quadratic(BF16, torch.float32, sparse) < 1.1 * reference


def test_dense_gradients_give_adamw():
    """Against torch's with float32 moments: the first step is alike, as moments begin at zero."""
    values = torch.randn(5, 7)
    results = []
    for make in (
        lambda p: Adam(p, lr=0.1, weight_decay=0.1, eps=1e-2, moments_dtype=BF16),
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, eps=1e-2),
    ):
        param = nn.Parameter(values.clone())
        param.grad = values.sin().t().contiguous().t()  # another layout
        make([param]).step()
        results.append(param.detach())
    torch.testing.assert_close(*results)


OPTIONS = {
    "shared": LSHOptions(tail=30, K=4, L=8),
    "sample": LSHOptions(pattern="per_sample", budget=40, tail=9, K=4, L=8),
}


def train(options, steps=5, fuse=False, threads=2, sparse=True):
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    layer = LSHLinear(20, 500, options=options, sparse=sparse)
    optimizer = Adam(layer.parameters(), lr=0.02, fuse_backward=fuse, moments_dtype=BF16)
    for step in range(steps):
        torch.manual_seed(step)
        x, y = torch.randn(12, 20), torch.randint(500, (12,))
        optimizer.zero_grad()
        F.cross_entropy(layer(x), y).backward()
        optimizer.step()
    torch.set_num_threads(before)
    return layer, optimizer


def assert_same(one, two):
    for a, b in zip(one[0].parameters(), two[0].parameters(), strict=True):
        assert torch.equal(a, b)
        for key, value in one[1].state[a].items():
            assert torch.equal(value, two[1].state[b][key])
            assert key == "step" or value.dtype == BF16


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_same_bits_fused_or_not_at_any_number_of_threads(options):
    one = train(options, threads=1)
    assert_same(one, train(options, threads=3))
    for threads in (1, 2):
        assert_same(one, train(options, threads=threads, fuse=True))


def test_dense_gradients_same_bits_at_any_number_of_threads():
    assert_same(
        train(OPTIONS["shared"], threads=1, sparse=False),
        train(OPTIONS["shared"], threads=3, sparse=False),
    )


def test_a_round_trip_through_a_state_dict_changes_nothing():
    layer, optimizer = train(OPTIONS["shared"])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = copy.deepcopy(layer)
    following = Adam(other.parameters(), lr=0.5)
    following.load_state_dict(saved)
    assert following.param_groups[0]["moments_dtype"] == BF16
    assert_same((layer, optimizer), (other, following))


def test_states_load_from_torch_and_into_torch():
    param = nn.Parameter(torch.randn(30, 4))
    param.grad = torch.randn(30, 4)
    theirs = torch.optim.AdamW([param])
    theirs.step()
    ours = Adam([param], moments_dtype=BF16)
    ours.load_state_dict(theirs.state_dict())
    moment = theirs.state[param]["exp_avg"]
    assert torch.equal(ours.state[param]["exp_avg"], moment.to(BF16))
    ours.step()
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(theirs.state[param]["exp_avg"], ours.state[param]["exp_avg"].float())
    theirs.step()


def test_what_is_not_a_number_stays_so():
    gradient = torch.tensor([math.nan, math.inf, 1.0] * 9)
    gradient[0] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    moments = [torch.zeros(27, dtype=BF16) for _ in range(2)]
    step_rows(gradient, moments)
    for moment in moments:
        for first, wanted in ((0, torch.isnan), (1, torch.isinf), (2, torch.isfinite)):
            assert wanted(moment[first::3]).all()


def test_what_it_is_not_for_is_refused_before_anything_changes():
    with pytest.raises(ValueError, match=r"moments_dtype: expected None or torch\.bfloat16, got"):
        Adam([nn.Parameter(torch.ones(3))], moments_dtype=torch.float16)
    good = nn.Parameter(torch.ones(3))
    for bad in (torch.ones(3, dtype=torch.float64), torch.ones(3, 4).t()):
        param = nn.Parameter(bad)
        good.grad, param.grad = torch.ones(3), torch.ones_like(bad)
        optimizer = Adam([good, param], moments_dtype=BF16)
        with pytest.raises(
            ValueError, match="parameter 1: expected a contiguous float32 or bfloat16 CPU param"
        ):
            optimizer.step()
        assert good.eq(1).all() and not optimizer.state
        Adam(
            [{"params": [good]}, {"params": [param], "moments_dtype": None}], moments_dtype=BF16
        ).step()
        good.data.fill_(1)


def test_the_operator_checks_moments():
    param, rows, grad = torch.ones(4, 3), torch.tensor([1]), torch.ones(1, 3)
    narrow, wide = torch.zeros(4, 3, dtype=BF16), torch.zeros(4, 3)
    for moments, message in (
        ((narrow, wide), "exp_avg_sq: expected dtype BFloat16"),
        ((wide, narrow), "exp_avg_sq: expected dtype Float"),
        ((narrow[:3], narrow), "exp_avg: expected shape"),
    ):
        with pytest.raises(RuntimeError, match=message):
            step_rows(grad, moments, rows=rows, param=param)
    with pytest.raises(RuntimeError, match="exp_avg: expected dtype Double"):
        step_rows(grad.double(), (narrow, narrow), rows=rows, param=param.double())
    with pytest.raises(RuntimeError, match="grad_rows: expected shape"):
        step_rows(grad, (narrow, narrow), param=param)
    assert param.eq(1).all()
