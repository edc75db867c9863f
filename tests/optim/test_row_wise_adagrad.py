"""Adagrad(..., row_wise=True): one number of state a row."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from slide_torch import LSHLinear, LSHOptions
from slide_torch.optim import Adagrad

BF16 = torch.bfloat16
SHAPES = [(40,), (40, 1), (40, 19), (40, 64), (40, 3, 4), ()]
TOLERANCE = {
    torch.float32: {"rtol": 2e-6, "atol": 2e-7},
    torch.float64: {"rtol": 1e-13, "atol": 1e-15},
}


def gradient_of(shape, generator, dtype, sparse, entries=25):
    """With duplicates of rows where it is sparse."""
    if not sparse:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    rows = torch.randint(shape[0], (entries,), generator=generator)
    values = torch.randn(entries, *shape[1:], generator=generator, dtype=torch.float64)
    return torch.sparse_coo_tensor(rows[None], values.to(dtype), shape, check_invariants=True)


def run(options, shape=(40, 19), dtype=torch.float32, sparse=True, steps=4, entries=25, threads=1):
    """Parameter, optimizer and the gradients of a few steps."""
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(shape, generator=generator, dtype=torch.float64)
    param, grads = nn.Parameter(start.to(dtype, copy=True)), []
    optimizer = Adagrad([param], row_wise=True, **options)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    for _ in range(steps):
        param.grad = gradient_of(shape, generator, dtype, sparse, entries)
        grads.append(param.grad.clone())
        optimizer.step()
    torch.set_num_threads(before)
    return param, optimizer, grads, start.to(dtype)


def reference(start, grads, lr=1e-2, lr_decay=0.0, initial=0.0, eps=1e-10, decay=0.0, sign=1.0):
    """The definition, in float64 on dense gradients: parameter and sums. Rows of a gradient decay first."""
    param = start.double().clone()
    sums = torch.full(param.shape[:1], initial, dtype=torch.float64)
    for t, grad in enumerate(grads):
        rate = lr / (1 + t * lr_decay)
        rows = grad.coalesce().indices()[0] if grad.is_sparse else ...
        param[rows] *= 1 - rate * decay
        grad = sign * grad.to_dense().double()
        square = grad.square()
        sums += square if grad.dim() < 2 else square.flatten(1).mean(1)
        denominator = (sums.sqrt() + eps).reshape(sums.shape + (1,) * (grad.dim() - sums.dim()))
        param = param - rate * grad / denominator
    return param, sums


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.7])
def test_it_is_the_definition(dtype, shape, sparse, maximize, decay):
    if sparse and not shape:
        return  # a number has no rows
    common = {"lr": 0.05, "lr_decay": 0.1, "eps": 1e-3}
    options = common | {
        "initial_accumulator_value": 0.2,
        "maximize": maximize,
        "weight_decay": decay,
    }
    param, optimizer, grads, start = run(options, shape, dtype, sparse)
    # a repeated row counts by the sum of its gradients, as in a dense gradient
    sign = -1.0 if maximize else 1.0
    wanted, sums = reference(start, grads, initial=0.2, sign=sign, decay=decay, **common)
    state = optimizer.state[param]
    assert state["sum"].shape == shape[:1] and state["sum"].dtype == dtype
    torch.testing.assert_close(state["sum"], sums.to(dtype), **TOLERANCE[dtype])
    torch.testing.assert_close(param.detach(), wanted.to(dtype), **TOLERANCE[dtype])


def test_rows_without_a_gradient_stay():
    param = nn.Parameter(torch.randn(10, 4))
    optimizer = Adagrad([param], lr=0.1, weight_decay=0.1, row_wise=True)
    before = param.detach().clone()
    param.grad = torch.sparse_coo_tensor(torch.tensor([[1, 4]]), torch.ones(2, 4), (10, 4))
    optimizer.step()
    assert (param != before).any(1).nonzero().flatten().tolist() == [1, 4]
    assert optimizer.state[param]["sum"].tolist() == [0, 1, 0, 0, 1, 0, 0, 0, 0, 0]


def test_rows_of_one_element_are_adagrad():
    row_wise, _, grads, start = run({"lr": 0.1}, (40, 1))
    param = nn.Parameter(start.clone())
    optimizer = torch.optim.Adagrad([param], lr=0.1)
    for grad in grads:
        param.grad = grad
        optimizer.step()
    torch.testing.assert_close(row_wise, param)


def test_weight_decay_and_other_layouts_of_dense_gradients():
    start = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    grad = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    wanted, _ = reference(start, [grad, grad], decay=0.1)
    for layout in (torch.channels_last, torch.contiguous_format):
        param = nn.Parameter(start.clone().to(memory_format=layout))
        optimizer = Adagrad([param], weight_decay=0.1, row_wise=True)
        for _ in range(2):
            param.grad = grad.to(memory_format=layout)
            optimizer.step()
        torch.testing.assert_close(param.detach(), wanted)


@pytest.mark.parametrize("sparse", [False, True])
def test_bfloat16_keeps_exact_sums_and_rounds_without_bias(sparse):
    count = 100_000
    param = nn.Parameter(torch.ones(count // 100, 100, dtype=BF16))
    optimizer = Adagrad([param], lr=2.0**-12, row_wise=True)
    grad = torch.full(param.shape, 2.0, dtype=BF16)
    param.grad = grad.to_sparse(1) if sparse else grad
    optimizer.step()
    assert optimizer.state[param]["sum"].eq(4).all()
    assert optimizer.state[param]["sum"].dtype == torch.float32
    # a sixteenth of the way to the number below 1: rounding to nearest would stay
    below = 1 - 2.0**-8
    assert ((param == 1) | (param == below)).all()
    assert abs((param == below).double().mean().item() - 1 / 16) < 0.004
    before = param.detach().clone()
    optimizer.step()
    # other bits in the second step
    assert abs((param < before).double().mean().item() - 1 / 16 / 2**0.5) < 0.004


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, BF16])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("shape", [(20_000, 19), (1, 200_001), (3, 50_000)])
def test_same_bits_at_any_number_of_threads(dtype, sparse, shape):
    work = {"options": {"lr": 0.1}, "shape": shape, "dtype": dtype, "sparse": sparse}
    work |= {"steps": 2, "entries": min(10 * shape[0], 10_000)}
    one, many = run(**work, threads=1), run(**work, threads=3)
    assert torch.equal(one[0], many[0])
    assert torch.equal(one[1].state[one[0]]["sum"], many[1].state[many[0]]["sum"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, BF16])
def test_a_state_dict_resumes_bit_for_bit(dtype):
    param, optimizer, grads, _ = run({"lr": 0.1, "lr_decay": 0.1}, dtype=dtype)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = nn.Parameter(param.detach().clone())
    following = Adagrad([other])
    following.load_state_dict(torch.load(file, weights_only=True))
    assert following.param_groups[0]["row_wise"]
    sums = optimizer.state[param]["sum"]
    assert not torch.equal(sums, sums.to(BF16).float())  # what the parameter's dtype would lose
    for p, o in ((param, optimizer), (other, following), (param, copy.deepcopy(optimizer))):
        assert torch.equal(o.state[o.param_groups[0]["params"][0]]["sum"], sums)
        p.grad = grads[0]
    optimizer.step()
    following.step()
    assert torch.equal(param, other)
    assert torch.equal(optimizer.state[param]["sum"], following.state[other]["sum"])


def test_groups_choose_for_themselves():
    torch.manual_seed(0)
    layer = LSHLinear(20, 500, options=LSHOptions(tail=30, K=4, L=8), sparse=True)
    body = nn.Linear(20, 20)
    optimizer = Adagrad(body.parameters(), lr=0.1)
    optimizer.add_param_group({"params": layer.parameters(), "row_wise": True})
    losses = []
    for _ in range(8):
        torch.manual_seed(1)
        x, y = torch.randn(12, 20), torch.randint(500, (12,))
        optimizer.zero_grad()
        loss = F.cross_entropy(layer(body(x)), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert optimizer.state[layer.weight]["sum"].shape == (500,)
    assert optimizer.state[body.weight]["sum"].shape == (20, 20)


def test_bad_arguments_and_states_are_refused_before_anything_changes():
    param = nn.Parameter(torch.ones(4, 3))
    with pytest.raises(ValueError, match="Adagrad: row_wise: expected a bool, got 1"):
        Adagrad([param], row_wise=1)
    param.grad = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.ones(1, 3), (4, 3))
    with pytest.raises(ValueError, match="parameter 0: expected weight_decay 0"):
        Adagrad([param], weight_decay=0.1).step()
    theirs = torch.optim.Adagrad([param])
    ours = Adagrad([param], row_wise=True)
    ours.load_state_dict(theirs.state_dict())
    with pytest.raises(ValueError, match=r"sum \(4,\) of torch.float32, got \(4, 3\)"):
        ours.step()
    assert param.eq(1).all()
    # a saved option outlives the constructor's
    plain = Adagrad([param])
    plain.step()
    ours.load_state_dict(plain.state_dict())
    ours.step()
    assert ours.state[param]["sum"].shape == (4, 3)
