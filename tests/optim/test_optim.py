import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from slide_torch import optim

OPS = torch.ops.slide_torch
WIDTHS = ((), (1,), (5,), (19,), (64,), (3, 4))  # row shapes: a bias, tails, whole vectors, n-D
TOLERANCE = {
    torch.float32: {"rtol": 1e-6, "atol": 1e-7},
    torch.float64: {"rtol": 1e-13, "atol": 1e-15},
}


def sparse_gradient(shape, entries, generator, dtype=torch.float32, coalesced=False):
    """Row-sparse, with duplicates unless coalesced."""
    rows = torch.randint(shape[0], (entries,), generator=generator)
    values = torch.randn(entries, *shape[1:], generator=generator, dtype=dtype)
    grad = torch.sparse_coo_tensor(rows[None], values, shape, check_invariants=True)
    return grad.coalesce() if coalesced else grad


def run(make, steps=5, shape=(40, 19), dtype=torch.float32, dense=False, entries=25):
    """Parameters after every step of an optimizer on gradients that depend on the step alone."""
    generator = torch.Generator().manual_seed(3)
    param = nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype))
    optimizer = make([param])
    trace = []
    for step in range(steps):
        grad = sparse_gradient(
            shape, entries * (step != 2), generator, dtype, coalesced=step % 2 == 0
        )
        param.grad = grad.to_dense() if dense else grad
        optimizer.step()
        trace.append(param.detach().clone())
    return trace, optimizer, param


def assert_same_run(ours, theirs, dtype=torch.float32, **options):
    mine, _, my_param = run(ours, dtype=dtype, **options)
    other, _, _ = run(theirs, dtype=dtype, **options)
    for step, (a, b) in enumerate(zip(mine, other, strict=True)):
        torch.testing.assert_close(a, b, **TOLERANCE[dtype], msg=lambda m, s=step: f"step {s}: {m}")
    assert my_param._version > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("row", WIDTHS)
@pytest.mark.parametrize("maximize", [False, True])
def test_sparse_adam(dtype, row, maximize):
    options = {"lr": 0.05, "betas": (0.8, 0.97), "eps": 1e-6, "maximize": maximize}
    assert_same_run(
        lambda p: optim.Adam(p, **options),
        lambda p: torch.optim.SparseAdam(p, **options),
        dtype,
        shape=(40, *row),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("row", WIDTHS)
@pytest.mark.parametrize("maximize", [False, True])
def test_sparse_sgd(dtype, row, maximize):
    options = {"lr": 0.05, "maximize": maximize}
    assert_same_run(
        lambda p: optim.SGD(p, **options),
        lambda p: torch.optim.SGD(p, **options),
        dtype,
        shape=(40, *row),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("row", WIDTHS)
@pytest.mark.parametrize("maximize", [False, True])
def test_sparse_adagrad(dtype, row, maximize):
    options = {
        "lr": 0.05,
        "lr_decay": 0.1,
        "initial_accumulator_value": 0.2,
        "eps": 1e-6,
        "maximize": maximize,
    }
    assert_same_run(
        lambda p: optim.Adagrad(p, **options),
        lambda p: torch.optim.Adagrad(p, **options),
        dtype,
        shape=(40, *row),
    )


def touch_all(make, steps=4, dtype=torch.float64):
    """Every row is touched every step, so that the lazy update and the dense one must agree."""
    generator = torch.Generator().manual_seed(5)
    param = nn.Parameter(torch.randn(12, 19, generator=generator, dtype=dtype))
    grads = [torch.randn(12, 19, generator=generator, dtype=dtype) for _ in range(steps)]
    optimizer, sparse = make([param])
    for grad in grads:
        param.grad = (
            torch.sparse_coo_tensor(torch.arange(12)[None], grad, grad.shape) if sparse else grad
        )
        optimizer.step()
    return param.detach()


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_sgd_momentum_and_decay_on_touched_rows(nesterov, weight_decay, maximize):
    options = {
        "lr": 0.1,
        "momentum": 0.9,
        "nesterov": nesterov,
        "weight_decay": weight_decay,
        "maximize": maximize,
    }
    ours = touch_all(lambda p: (optim.SGD(p, **options), True))
    torch.testing.assert_close(ours, touch_all(lambda p: (torch.optim.SGD(p, **options), False)))


@pytest.mark.parametrize("maximize", [False, True])
def test_adam_decay_is_adamw_on_touched_rows(maximize):
    options = {"lr": 0.1, "eps": 1e-12, "weight_decay": 0.1, "maximize": maximize}
    ours = touch_all(lambda p: (optim.Adam(p, **options), True))
    # SparseAdam's eps is added before bias correction, AdamW's after: tiny here.
    torch.testing.assert_close(
        ours, touch_all(lambda p: (torch.optim.AdamW(p, **options), False)), rtol=1e-7, atol=0
    )


@pytest.mark.parametrize("name", ["Adam", "SGD", "Adagrad"])
def test_untouched_rows_stay(name):
    param = nn.Parameter(torch.randn(10, 4))
    optimizer = getattr(optim, name)(
        [param], lr=0.1, **({"momentum": 0.9, "weight_decay": 0.1} if name == "SGD" else {})
    )
    for rows in ([1, 4], [4, 7]):
        before = param.detach().clone()
        param.grad = torch.sparse_coo_tensor(torch.tensor([rows]), torch.ones(2, 4), (10, 4))
        optimizer.step()
        changed = (param.detach() != before).any(1).nonzero().flatten().tolist()
        assert changed == rows


DENSE = {
    "adam": (optim.Adam, torch.optim.Adam, {"lr": 0.05, "betas": (0.8, 0.9)}),
    "adamw": (optim.Adam, torch.optim.AdamW, {"lr": 0.05, "weight_decay": 0.1}),
    "adamw maximize": (optim.Adam, torch.optim.AdamW, {"weight_decay": 0.1, "maximize": True}),
    "sgd": (optim.SGD, torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.1}),
    "momentum": (
        optim.SGD,
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "maximize": True},
    ),
    "nesterov": (
        optim.SGD,
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    ),
    "adagrad": (
        optim.Adagrad,
        torch.optim.Adagrad,
        {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1},
    ),
    "adagrad sum": (
        optim.Adagrad,
        torch.optim.Adagrad,
        {"initial_accumulator_value": 0.3, "maximize": True},
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", DENSE)
def test_dense(name, dtype):
    ours, theirs, options = DENSE[name]
    assert_same_run(lambda p: ours(p, **options), lambda p: theirs(p, **options), dtype, dense=True)


@pytest.mark.parametrize("name", DENSE)
def test_dense_in_other_layouts(name):
    ours, theirs, options = DENSE[name]
    values = torch.randn(4, 3, 5, 5, dtype=torch.float64).to(memory_format=torch.channels_last)
    results = []
    for make in (ours, theirs):
        torch.manual_seed(0)
        params = [
            nn.Parameter(values.clone()),
            nn.Parameter(values.contiguous()),
            nn.Parameter(values[0, 0].contiguous()),
        ]
        optimizer = make(params, **options)
        for _ in range(3):
            params[0].grad = torch.randn(values.shape, dtype=torch.float64)
            params[1].grad = torch.randn(values.shape, dtype=torch.float64).to(
                memory_format=torch.channels_last
            )
            params[2].grad = torch.randn(5, 5, dtype=torch.float64)
            optimizer.step()
        results.append(params)
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, **TOLERANCE[torch.float64])


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag = nn.EmbeddingBag(50, 16, mode="sum", sparse=True)
        self.head = nn.Linear(16, 7)

    def forward(self, x):
        return self.head(self.bag(x))


@pytest.mark.parametrize("name", ["Adam", "SGD", "Adagrad"])
def test_one_optimizer_for_a_mixed_model(name):
    torch.manual_seed(0)
    ours, theirs = Model(), Model()
    theirs.load_state_dict(ours.state_dict())
    sparse = {"Adam": "SparseAdam"}.get(name, name)
    mine = getattr(optim, name)(ours.parameters(), lr=0.05)
    others = [
        getattr(torch.optim, sparse)(theirs.bag.parameters(), lr=0.05),
        getattr(torch.optim, name)(theirs.head.parameters(), lr=0.05),
    ]
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.8) for o in (mine, *others)]
    for _ in range(6):
        x, y = torch.randint(50, (9, 4)), torch.randint(7, (9,))
        for model in (ours, theirs):
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()
        assert ours.bag.weight.grad.is_sparse
        for optimizer in (mine, *others):
            optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    for mine_p, other_p in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine_p, other_p, rtol=1e-5, atol=1e-6)


def test_step_after_forward_invalidates_backward():
    weight = nn.Parameter(torch.randn(6, 3))
    loss = (weight * weight).sum()
    weight.grad = torch.sparse_coo_tensor(torch.tensor([[2]]), torch.ones(1, 3), (6, 3))
    optim.Adam([weight]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_closure_groups_and_missing_gradients():
    a, b, c = (nn.Parameter(torch.ones(4, 2)) for _ in range(3))
    optimizer = optim.SGD([("a", a), ("b", b)], lr=1.0)
    optimizer.add_param_group({"params": [("c", c)], "lr": 0.5})

    def closure():
        optimizer.zero_grad()
        loss = a.sum() + F.embedding(torch.tensor([1, 1, 3]), c, sparse=True).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 14
    assert a.tolist() == [[0, 0]] * 4
    assert b.tolist() == [[1, 1]] * 4
    assert c.tolist() == [[1, 1], [0, 0], [1, 1], [0.5, 0.5]]


STATES = [
    (optim.Adam, torch.optim.AdamW, {}, True),
    (optim.Adam, torch.optim.Adam, {}, True),
    (optim.Adam, torch.optim.SparseAdam, {}, False),
    (optim.SGD, torch.optim.SGD, {"momentum": 0.9}, True),
    (optim.SGD, torch.optim.SGD, {}, False),
    (optim.Adagrad, torch.optim.Adagrad, {}, True),
    (optim.Adagrad, torch.optim.Adagrad, {}, False),
]


@pytest.mark.parametrize("ours, theirs, options, dense", STATES)
@pytest.mark.parametrize("swap", [False, True])
def test_state_dict_loads_both_ways(ours, theirs, options, dense, swap):
    first, second = (theirs, ours) if swap else (ours, theirs)

    def continued(make):
        trace, optimizer, param = run(lambda p: first(p, lr=0.1, **options), dense=dense)
        following = make([param])
        saved = copy.deepcopy(optimizer.state_dict())
        following.load_state_dict(saved)
        generator = torch.Generator().manual_seed(9)
        for _ in range(3):
            grad = sparse_gradient(param.shape, 25, generator)
            param.grad = grad.to_dense() if dense else grad
            following.step()
        return trace[-1], param, saved, following.state_dict()

    start, same, _, _ = continued(lambda p: first(p, lr=0.3, **options))
    _, other, saved, later = continued(lambda p: second(p, lr=0.3, **options))
    assert not torch.equal(start, same)
    # SparseAdam corrects the bias in float32 when the step it loads is a tensor.
    loose = theirs is torch.optim.SparseAdam and not swap
    tolerance = {"rtol": 1e-3, "atol": 1e-5} if loose else TOLERANCE[torch.float32]
    torch.testing.assert_close(same, other, **tolerance)
    shapes = [
        {k: getattr(v, "shape", ()) for k, v in d["state"].get(0, {}).items()}
        for d in (saved, later)
    ]
    assert shapes[0] == shapes[1]
    assert later["param_groups"][0]["lr"] == 0.1


def test_loads_sparse_momentum_and_does_not_share_memory():
    _, theirs, param = run(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
    assert theirs.state[param]["momentum_buffer"].is_sparse
    ours = optim.SGD([param], momentum=0.9)
    ours.load_state_dict(theirs.state_dict())
    expected = theirs.state[param]["momentum_buffer"].to_dense()
    torch.testing.assert_close(ours.state[param]["momentum_buffer"], expected)
    again = optim.SGD([param])
    again.load_state_dict(ours.state_dict())
    assert again.state[param]["momentum_buffer"] is not ours.state[param]["momentum_buffer"]
    copy.deepcopy(ours).step()


def test_load_state_dict_refuses_other_mathematics():
    param = nn.Parameter(torch.ones(3))
    optimizer = optim.Adam([param])
    with pytest.raises(ValueError, match="L2 penalty"):
        optimizer.load_state_dict(torch.optim.Adam([param], weight_decay=0.1).state_dict())
    with pytest.raises(ValueError, match="amsgrad"):
        optimizer.load_state_dict(torch.optim.AdamW([param], amsgrad=True).state_dict())


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: optim.Adam(p, lr=-1.0), "Adam: lr: expected a finite number, got -1.0"),
        (lambda p: optim.Adam(p, lr=torch.tensor(0.1)), "lr: expected a float, got a Tensor"),
        (lambda p: optim.Adam(p, betas=(0.9, 1.0)), r"betas\[1\]"),
        (lambda p: optim.Adam(p, betas=0.9), "betas: expected two floats"),
        (lambda p: optim.Adam(p, eps=float("nan")), "eps"),
        (lambda p: optim.Adam([{"params": p, "weight_decay": -1}]), "weight_decay"),
        (lambda p: optim.SGD(p, nesterov=True), "nesterov"),
        (lambda p: optim.SGD(p, momentum=-0.1), "momentum"),
        (lambda p: optim.Adagrad(p, lr_decay=-0.1), "lr_decay"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(ValueError, match=message):
        make([nn.Parameter(torch.ones(3))])


def row_gradient(shape=(4, 3), rows=(1,), dtype=torch.float32):
    values = torch.ones(len(rows), *shape[1:], dtype=dtype)
    return torch.sparse_coo_tensor(torch.tensor([rows]), values, shape, check_invariants=True)


def transposed():
    return nn.Parameter(torch.ones(3, 4).t())


@pytest.mark.parametrize(
    "param, grad, message",
    [
        (
            nn.Parameter(torch.ones(4, 3).half()),
            row_gradient(dtype=torch.half),
            "float64 or bfloat16 .*torch.float16.*sparse=False",
        ),
        (
            nn.Parameter(torch.ones(4, 3)),
            torch.eye(4, 3).to_sparse(2),
            "sparse_dim 1, got 2.*to_dense",
        ),
        (transposed(), row_gradient(), r"contiguous parameter .*got strides \(1, 4\)"),
        (
            nn.Parameter(torch.ones(4, 3) + 0j),
            torch.ones(4, 3) + 0j,
            "real floating-point dtype, got torch.complex64",
        ),
    ],
)
@pytest.mark.parametrize("name", ["Adam", "SGD", "Adagrad"])
def test_a_bad_gradient_changes_nothing(name, param, grad, message):
    good, sparse = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(4, 3))
    good.grad, sparse.grad, param.grad = torch.ones(2), row_gradient(), grad
    optimizer = getattr(optim, name)([{"params": [good, sparse]}, {"params": [param]}])
    with pytest.raises(ValueError, match=f"{name}: parameter 2: expected .*{message}"):
        optimizer.step()
    assert good.tolist() == [1, 1]
    assert sparse.eq(1).all()
    assert not optimizer.state


def test_rows_outside_and_options_for_dense_only():
    param = nn.Parameter(torch.ones(4, 3))
    for rows in ((1, 4), (-1, 1), (5, 5)):
        values = torch.ones(2, 3)
        param.grad = torch.sparse_coo_tensor(
            torch.tensor([rows]), values, (4, 3), check_invariants=False
        )
        with pytest.raises(ValueError, match=r"gradient rows in \[0, 4\), got"):
            optim.Adam([("w", param)]).step()
    param.grad = row_gradient()
    with pytest.raises(ValueError, match="parameter 0: expected weight_decay 0"):
        optim.Adagrad([param], weight_decay=0.1).step()
    with pytest.raises(ValueError, match="parameter 0 'w': expected dampening 0"):
        optim.SGD([("w", param)], momentum=0.9, dampening=0.1).step()
    optimizer = optim.Adam([param])
    optimizer.step()
    param.data = param.data.double()
    param.grad = row_gradient(dtype=torch.float64)
    with pytest.raises(ValueError, match="exp_avg"):
        optimizer.step()


def at_threads(count, work):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return work()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: optim.Adam(p, weight_decay=0.1),
        lambda p: optim.SGD(p, momentum=0.9, nesterov=True),
        optim.Adagrad,
    ],
)
def test_same_bits_at_any_number_of_threads(make):
    def work():
        return run(make, shape=(30_000, 19), entries=20_000, steps=3)[0]

    for one, two in zip(at_threads(1, work), at_threads(2, work), strict=True):
        assert torch.equal(one, two)
