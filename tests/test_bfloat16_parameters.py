"""LSHLinear with parameters in bfloat16: computed in float32, their gradients and updates rounded."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import slide_torch
from slide_torch import LSHLinear, LSHOptions, ops, precision
from slide_torch.hashing import base
from slide_torch.optim import SGD, Adagrad, Adam

BF16 = torch.bfloat16
N, D, B = 300, 24, 16
PATTERNS = {
    "shared": {},
    "importance": {"correction": "importance"},
    "kmeans": {"family": "kmeans", "K": 4, "L": 1, "probes": 2, "rerank": 40},
    "per_sample": {"pattern": "per_sample"},
    "per_sample_reranked": {"pattern": "per_sample", "rerank": 40, "correction": "importance"},
    "exact_candidates": {"family": "exact"},
    "per_sample_log_uniform": {
        "tail_distribution": "log_uniform",
        "correction": "importance",
        "pattern": "per_sample",
    },
    "augmented": {"augment_norms": True, "center": True},
}


def make(*, bias=True, sparse=False, dtype=BF16, budget=20, **options):
    torch.manual_seed(0)
    options = {"tail": 12, "K": 3, "L": 4, "family": "simhash", "rehash_every": 2, **options}
    return LSHLinear(
        D, N, bias, options=LSHOptions(budget=budget, **options), sparse=sparse, dtype=dtype
    )


def batch(seed=1, dtype=BF16):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(B, D, generator=generator).to(dtype)
    return x, torch.randint(N, (B,), generator=generator)


def float_twin(layer):
    """A float32 layer with the rounded weights."""
    return copy.deepcopy(layer).float()


def cross_entropy(logits, y):
    return F.cross_entropy(logits, y)


def smoothed(logits, y):
    return F.cross_entropy(logits, y, label_smoothing=0.2)


def weighted(logits, y):
    return F.cross_entropy(logits * 0.5, y, weight=torch.linspace(0.5, 2, N))


def decoupled(logits, y):
    return logits.cross_entropy(torch.stack([y, y.flip(0)], 1), decoupled=True)


def binary(logits, y):
    return F.binary_cross_entropy_with_logits(logits, F.one_hot(y, N).float())


def backward(layer, x, y, loss_of):
    x = x.clone().requires_grad_()
    torch.manual_seed(3)
    loss = loss_of(layer(x), y)
    loss.backward()
    return loss.detach(), [x.grad, *(p.grad for p in layer.parameters())]


def check_rounded(grads, exact):
    """Each number is the float32 one, rounded to nearest."""
    for got, wanted in zip(grads, exact, strict=True):
        assert got.dtype == BF16 and got.layout == wanted.layout
        assert torch.equal(got.to_dense(), wanted.to_dense().to(BF16))


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("options", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("loss_of", [cross_entropy, weighted, decoupled, binary])
def test_loss_and_gradients_are_those_of_float32_rounded(options, sparse, loss_of):
    layer = make(sparse=sparse, **options)
    twin = float_twin(layer)
    x, y = batch()
    loss, grads = backward(layer, x, y, loss_of)
    expected, exact = backward(twin, x.float(), y, loss_of)
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)
    check_rounded(grads, exact)
    if layer.tables.built:
        assert torch.equal(layer.tables.codes, twin.tables.codes)


@pytest.mark.parametrize("loss_of", [cross_entropy, smoothed, binary])
def test_no_worse_than_torch_at_the_same_dtype(loss_of):
    """With every neuron active, against float64 of the same weights."""
    layer = make(budget=N)
    dense = layer.to_linear()
    exact_layer = copy.deepcopy(dense).double()
    x, y = batch()
    loss, grads = backward(layer, x, y, loss_of)
    for p in dense.parameters():
        p.grad = None
    torch_loss, torch_grads = backward(dense, x, y, loss_of)
    exact_loss, exact = backward(exact_layer, x.double(), y, loss_of)
    assert (loss - exact_loss).abs() <= (torch_loss - exact_loss).abs() + 1e-6
    for ours, theirs, wanted in zip(grads, torch_grads, exact, strict=True):
        error, torch_error = ((g.double() - wanted).norm() for g in (ours, theirs))
        assert error <= 1.05 * torch_error
        assert error <= 2**-8 * wanted.norm()


def test_label_smoothing_over_an_active_set():
    layer = make()
    twin = float_twin(layer)
    x, y = batch()
    loss, grads = backward(layer, x, y, smoothed)
    expected, exact = backward(twin, x.float(), y, smoothed)
    torch.testing.assert_close(loss, expected)
    for got, wanted in zip(grads, exact, strict=True):
        assert (got.float() - wanted).norm() <= 2**-8 * wanted.norm()


def test_logits_of_training_are_float32():
    layer = make()
    twin = float_twin(layer)
    x, _ = batch()
    values = []
    for each, input in ((layer, x), (twin, x.float())):
        torch.manual_seed(3)
        logits = each(input)
        assert logits.dtype == torch.float32
        values.append(logits.to_dense())
        values[-1].masked_fill(values[-1] == -math.inf, 0).sum().backward()
    assert torch.equal(*values) and layer.weight.grad.dtype == BF16
    check_rounded([p.grad for p in layer.parameters()], [p.grad for p in twin.parameters()])


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


@pytest.mark.parametrize(
    "loss_of,options,sparse,backend",
    [
        (cross_entropy, "importance", False, "inductor"),
        (cross_entropy, "kmeans", True, "aot_eager"),
        (cross_entropy, "per_sample", False, "aot_eager"),
        (cross_entropy, "per_sample_log_uniform", True, "aot_eager"),
        (binary, "importance", True, "aot_eager"),
        (binary, "kmeans", False, "aot_eager"),
        (binary, "per_sample", True, "aot_eager"),
        (binary, "per_sample_log_uniform", False, "aot_eager"),
        (smoothed, "importance", False, "aot_eager"),
        (smoothed, "kmeans", False, "aot_eager"),
    ],
)
def test_compiled(loss_of, options, sparse, backend):
    torch._dynamo.reset()
    torch.set_num_threads(1)
    layer = make(sparse=sparse, **PATTERNS[options])
    eager = copy.deepcopy(layer)

    def of(each):
        return lambda x, y: loss_of(each(x), y)

    compiled = torch.compile(of(layer), fullgraph=True, backend=backend)
    for step in range(3):
        x, y = batch(step)
        losses = []
        for each, loss_of_each in ((layer, compiled), (eager, of(eager))):
            torch.manual_seed(step)
            each.zero_grad()
            losses.append(loss_of_each(x, y))
            losses[-1].backward()
        torch.testing.assert_close(*losses)
        for p, q in zip(layer.parameters(), eager.parameters(), strict=True):
            assert p.grad.dtype == BF16 and p.grad.layout == q.grad.layout
            torch.testing.assert_close(p.grad.to_dense(), q.grad.to_dense())
    torch._dynamo.reset()


@pytest.mark.parametrize("bias", [False, True])
def test_exact_prediction_is_topk_of_float32_logits(bias, monkeypatch):
    monkeypatch.setattr(precision, "ROWS_AT_ONCE", 64)
    layer = make(bias=bias)
    with torch.no_grad():
        layer.weight[100:103] = layer.weight[5]  # equal logits, in several blocks
        if bias:
            layer.bias[100:103] = layer.bias[5]
    x, _ = batch()
    values, indices = layer.predict(x, 200)
    twin = float_twin(layer)
    expected, expected_indices = twin.predict(x.float(), 200)
    assert values.dtype == torch.float32 and torch.equal(values, expected)
    assert torch.equal(indices, expected_indices)
    torch.testing.assert_close(values, twin.eval()(x.float()).topk(200).values)
    with torch.no_grad():
        layer.weight[70] = math.nan
    assert (layer.predict(x, 3)[1][:, 0] == 70).all()


@pytest.mark.parametrize("bias", [False, True])
def test_approximate_prediction_is_that_of_float32(bias, monkeypatch):
    monkeypatch.setattr(precision, "ROWS_AT_ONCE", 64)
    layer = make(bias=bias)
    twin = float_twin(layer)
    x, _ = batch()
    results = []
    for each, input in ((layer, x), (twin, x.float())):
        torch.manual_seed(2)
        recall = each.calibrate(input, 5, recall=0.8)
        results.append((recall, *each.predict(input, 5, exact=False)))
    assert results[0][0] == results[1][0] >= 0.8
    for got, wanted in zip(results[0][1:], results[1][1:], strict=True):
        torch.testing.assert_close(got, wanted)


def test_upkeep_copies_some_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(precision, "ROWS_AT_ONCE", 64)
    monkeypatch.setattr(base, "ROWS_AT_ONCE", 64)
    monkeypatch.setattr(base, "SAMPLED_ROWS", 64)
    layer = make()
    most = 0

    def watched(weight, bias, rows, some_rows=precision.some_rows):
        nonlocal most
        found = some_rows(weight, bias, rows)
        most = max(most, len(found[0]))
        return found

    monkeypatch.setattr(base, "some_rows", watched)
    layer.rebuild()
    assert 0 < most <= 64
    family = layer.tables.family
    rows = torch.arange(0, N, 2)
    fresh = family.row_codes(layer.weight, layer.bias, rows)
    assert torch.equal(fresh, layer.tables.codes[:, rows])


def test_recall_and_probe():
    layer = make(budget=60)
    x, y = batch()
    backward(layer, x, y, cross_entropy)
    twin = float_twin(layer)
    assert layer.recall(x, 5) == twin.recall(x.float(), 5) > 0
    with slide_torch.RecallProbe(layer, every=1, k=5) as probe:
        layer(x)
    assert 0 < probe.last["recall@5"] <= 1


def hidden_layers(kind, **options):
    torch.manual_seed(0)
    options = LSHOptions(**{"tail": 12, "K": 3, "L": 4, "family": "simhash", **options})
    common = {"options": options, "dtype": BF16}
    if kind == "linear":
        return LSHLinear(D, N, output="dense", **common)
    return slide_torch.LSHFeedForward(D, N, 10, activation=nn.PReLU(dtype=BF16), **common)


def squares(layer, x):
    x = x.clone().requires_grad_()
    torch.manual_seed(3)
    y = layer(x)
    y.float().square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.parametrize("pattern", ["shared", "per_sample"])
@pytest.mark.parametrize("kind", ["linear", "feed_forward"])
def test_hidden_layers_are_no_worse_than_torch(kind, pattern):
    """With every neuron active, against float64 of the same weights."""
    x, _ = batch()
    layer = hidden_layers(kind, pattern=pattern, budget=N)
    exact = squares(copy.deepcopy(layer).double(), x.double())
    theirs = squares(copy.deepcopy(layer).eval(), x)
    for ours, torch_one, wanted in zip(squares(layer, x), theirs, exact, strict=True):
        assert ours.dtype == BF16
        error, torch_error = ((t.double() - wanted).norm() for t in (ours, torch_one))
        assert error <= 1.1 * torch_error + 2**-9 * wanted.norm()


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("pattern", ["shared", "per_sample"])
@pytest.mark.parametrize("kind", ["linear", "feed_forward"])
def test_hidden_layers_over_an_active_set(kind, pattern, sparse):
    x, _ = batch()
    layer = hidden_layers(kind, pattern=pattern, budget=20)
    for module in layer.modules():
        if isinstance(module, LSHLinear):
            module.sparse = sparse
    found, exact = squares(layer, x), squares(float_twin(layer), x.float())
    for ours, wanted in zip(found, exact, strict=True):
        assert ours.dtype == BF16 and ours.layout == wanted.layout
        ours, wanted = ours.to_dense().float(), wanted.to_dense()
        if kind == "linear":
            assert torch.equal(ours == 0, wanted == 0)
        assert 0 < (ours - wanted).norm() <= 2**-7 * wanted.norm()


def test_what_is_not_there_is_refused_before_anything_changes():
    x, _ = batch()
    layer = make()
    with pytest.raises(ValueError, match=r"tune: layer: .* got torch\.bfloat16: tune a copy"):
        slide_torch.tune(layer, x)
    with pytest.raises(ValueError, match=r"input: expected torch\.bfloat16"):
        layer(x.float())
    with pytest.raises(NotImplementedError, match=r"to\(torch\.bfloat16\)"):
        layer(x).to(BF16)
    assert layer.tables.schedule.steps == 0
