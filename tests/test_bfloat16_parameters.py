"""LSHLinear with parameters in bfloat16: computed in float32, its results and gradients rounded."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from bfloat16_layers import BF16, PATTERNS, D, N, backward, batch, cross_entropy, float_twin, make
from torch import nn

import slide_torch
from slide_torch import LSHLinear, LSHOptions, precision
from slide_torch.hashing import base


def smoothed(logits, y):
    return F.cross_entropy(logits, y, label_smoothing=0.2)


def weighted(logits, y):
    return F.cross_entropy(logits * 0.5, y, weight=torch.linspace(0.5, 2, N))


def decoupled(logits, y):
    return logits.cross_entropy(torch.stack([y, y.flip(0)], 1), decoupled=True)


def binary(logits, y):
    return F.binary_cross_entropy_with_logits(logits, F.one_hot(y, N).float())


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
