"""What is refused, by a message that says what to do, with nothing changed; and odd input that
is not."""

import math
import re

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F

from slide_torch import (
    HashTables,
    LSHFeedForward,
    LSHLinear,
    LSHOptions,
    RecallProbe,
    clip_grad_norm_,
    tune,
)
from slide_torch.active_set import SharedActiveSet
from slide_torch.functional import lsh_linear_cross_entropy
from slide_torch.sampling.draw import draw_active_set
from slide_torch.sampling.targets import as_labels

N, D, B = 50, 8, 6
SAMPLED = dict(budget=4, tail=5, K=2, L=3)
PATTERNS = ["shared", "per_sample"]


def make(**options):
    torch.set_num_threads(1)  # for such small problems two are slower
    layer = LSHLinear(D, N, options=LSHOptions(**{**SAMPLED, **options}))
    x = torch.randn(B, D)
    y = torch.randint(N, (B,))
    F.cross_entropy(layer(x), y).backward()  # tables, gradients and one step of the schedule
    return layer, x, y


def state(layer):
    """Everything a refused call must leave as it was."""
    tables = layer.tables
    tensors = [
        *layer.parameters(),
        *(p.grad for p in layer.parameters()),
        *tables.tensors().values(),
    ]
    tensors += [torch.get_rng_state()]
    counters = tables.schedule.counters()
    return [t.clone() for t in tensors], counters, tables.family, [t._version for t in tensors[:2]]


def refused(layer, call, error, message):
    before = state(layer)
    with pytest.raises(error, match=message):
        call()
    after = state(layer)
    for old, new in zip(before[0], after[0], strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0, equal_nan=True)
    assert before[1:] == after[1:]


X, Y = torch.zeros(B, D), torch.zeros(B, dtype=torch.int64)
WRONG_CALLS = [
    (dict(input=torch.zeros(B, D + 1)), ValueError, r"input: expected last dimension 8 .*\(6, 9\)"),
    (dict(input=torch.tensor(1.0)), ValueError, r"input: expected last dimension 8"),
    (dict(input=X.double()), ValueError, "input: expected torch.float32.*got torch.float64"),
    (dict(input=X.to("meta")), ValueError, "input: expected a CPU tensor, got meta"),
    (dict(target=Y + N), ValueError, r"target: .*\[0, 50\) or ignore_index, got 50 \(6 such"),
    (dict(target=Y - 1), ValueError, r"target: .*\[0, 50\) or ignore_index, got -1"),
    (dict(target=Y[:, None] - 7), ValueError, r"target: .*got -7"),
    (dict(target=Y[:3]), ValueError, r"target: expected shape \(6,\), or \(6, 'M'\).*got \(3,\)"),
    (dict(target=Y[:, None, None]), ValueError, "target: expected shape"),
    (dict(target=torch.zeros(B, N - 1)), ValueError, r"shape \(6, 50\).*got \(6, 49\)"),
    (dict(target=torch.zeros(B)), ValueError, "target: expected probabilities of shape"),
    (dict(target=Y.bool()), ValueError, "target: expected int64 class indices.*got torch.bool"),
    (dict(target=Y.to(torch.complex64)), ValueError, "target: .*got torch.complex64"),
    (dict(target=Y.to_sparse()), ValueError, "target: .*torch.sparse_coo"),
    (dict(target=[1, 2]), ValueError, "target: expected a CPU tensor, got list"),
    (dict(target=Y.to("meta")), ValueError, "target: expected a CPU tensor, got one on meta"),
    (dict(target=torch.zeros(B, N).requires_grad_()), ValueError, r"target.detach\(\)"),
    (dict(target=torch.zeros(B, N), ignore_index=3), ValueError, "ignore_index: expected a neg"),
    (dict(reduction="avg"), ValueError, "reduction: expected 'mean', 'sum' or 'none', got 'avg'"),
    (dict(label_smoothing=1.5), ValueError, "label_smoothing: expected a number from 0 to 1"),
    (dict(scale=0.0), ValueError, "scale: expected a positive finite number, got 0.0"),
    (dict(scale=-1.0), ValueError, "scale: expected a positive"),
    (dict(scale=math.inf), ValueError, "scale: expected a positive finite number, got inf"),
    (dict(scale=math.nan), ValueError, "scale: expected a positive finite number, got nan"),
    (dict(weight=torch.ones(N + 1)), ValueError, r" weight: expected .*\(50,\), got \(51,\)"),
    (dict(weight=2.0), ValueError, "weight: expected a tensor"),
    (dict(linear_bias=None), ValueError, r"linear_bias: expected shape .*50.*, got None"),
    (dict(linear_bias=torch.zeros(N + 1)), ValueError, r"linear_bias: .*got shape \(51,\)"),
    (dict(linear_bias=torch.zeros(N).double()), ValueError, "linear_bias: expected torch.float32"),
    (dict(linear_weight=torch.zeros(N + 1, D)), ValueError, r"linear_weight: .*\(50, 8\).*51, 8\)"),
    (dict(linear_weight=torch.zeros(N, D).half()), ValueError, "linear_weight: .*float16"),
    (dict(linear_weight=torch.zeros(D, N).T), ValueError, r"linear_weight: .*\.contiguous\(\)"),
    (dict(tables=None), ValueError, "tables: expected HashTables, got NoneType"),
]


@pytest.mark.parametrize(
    "wrong,error,message",
    WRONG_CALLS,
    ids=[f"{next(iter(call[0]))}-{i}" for i, call in enumerate(WRONG_CALLS)],
)
def test_wrong_arguments(wrong, error, message):
    layer, x, y = make()
    arguments = dict(
        input=x, target=y, linear_weight=layer.weight, linear_bias=layer.bias, tables=layer.tables
    )
    refused(layer, lambda: lsh_linear_cross_entropy(**{**arguments, **wrong}), error, message)


def test_bias_where_tables_have_none():
    layer = LSHLinear(D, N, bias=False)
    with pytest.raises(ValueError, match=r"linear_bias: expected None.*got shape \(50,\)"):
        lsh_linear_cross_entropy(
            X, layer.weight, Y, linear_bias=torch.zeros(N), tables=layer.tables
        )
    assert not layer.tables.built


def test_tables_of_another_shape():
    layer, x, y = make()
    other = HashTables(LSHOptions(), N, D + 1, has_bias=True)
    refused(
        layer,
        lambda: lsh_linear_cross_entropy(x, layer.weight, y, linear_bias=layer.bias, tables=other),
        ValueError,
        r"linear_weight: expected shape \(50, 9\), that of its tables, got \(50, 8\)",
    )
    assert not other.built


@pytest.mark.parametrize(
    "input,message",
    [
        (torch.zeros(B, D + 1), r"LSHLinear: input: expected last dimension 8 \(in_features\)"),
        (X.double(), "LSHLinear: input: expected torch.float32 on cpu.*torch.float64"),
        (X.to("meta"), "LSHLinear: input: expected torch.float32 on cpu.*on meta"),
    ],
)
def test_layer_refuses_input(input, message):
    layer, _, _ = make()
    refused(layer, lambda: layer(input), ValueError, message)


@pytest.mark.parametrize(
    "arguments,message",
    [
        (dict(in_features=0), "in_features: expected an int from 1 to .*, got 0"),
        (dict(in_features=2.0), "in_features: .*got 2.0"),
        (dict(out_features=0), "out_features: expected an int from 1 to .*, got 0"),
        (dict(out_features=-1), "out_features: .*got -1"),
        (dict(out_features=2**31), "out_features: expected an int from 1 to 2147483646"),
        (dict(out_features=True), "out_features: .*got True"),
        (dict(options={"K": 3}), "options: expected LSHOptions, got dict"),
        (dict(device="cuda"), "device: expected the CPU, got cuda"),
        (
            dict(dtype=torch.float16),
            "dtype: expected float32, float64 or bfloat16, got torch.float16",
        ),
    ],
)
def test_layer_arguments(arguments, message):
    with pytest.raises(ValueError, match="LSHLinear: " + message):
        LSHLinear(**{"in_features": 4, "out_features": 5, **arguments})


@pytest.mark.parametrize("wrong", [True, np.bool_(True), 2.0, np.float64(2), "2", None, [2], Y[0]])
def test_what_is_no_integer(wrong):
    layer, x, _ = make()
    shown = re.escape(repr(wrong))
    for call in (
        lambda: LSHLinear(wrong, N),
        lambda: LSHLinear(D, wrong),
        lambda: LSHFeedForward(wrong, N),
        lambda: LSHFeedForward(D, wrong),
        lambda: LSHOptions(budget=wrong),
        lambda: layer(x).topk(wrong),
        lambda: layer.recall(x, wrong),
        lambda: layer.predict(x, wrong),
        lambda: layer.calibrate(x, wrong),
        lambda: RecallProbe(layer, every=wrong),
        lambda: tune(layer, x, k=wrong),
        lambda: tune(layer, x, k=2, queries=wrong),
        lambda: tune(layer, x, k=2, seed=wrong),
    ):
        refused(layer, call, ValueError, f": expected an int.*, got {shown}")


@pytest.mark.parametrize(
    "arguments,message",
    [
        (dict(in_features=0), "in_features: expected an int from 1 to 16777216, got 0"),
        (dict(hidden_features=2.0), "hidden_features: expected an int.*got 2.0"),
        (dict(hidden_features=0), "hidden_features: expected an int.*got 0"),
        (dict(out_features=0), "out_features: expected an int of at least 1, got 0"),
        (dict(out_features=True), "out_features: expected an int.*got True"),
    ],
)
def test_feed_forward_blames_the_right_argument(arguments, message):
    with pytest.raises(ValueError, match="LSHFeedForward: " + message):
        LSHFeedForward(**{"in_features": 4, "hidden_features": 50, **arguments})


@pytest.mark.parametrize("method", ["recall", "predict", "calibrate"])
@pytest.mark.parametrize(
    "input,message",
    [
        (torch.zeros(B, D + 1), r"input: expected a tensor with last dimension 8 .*\(6, 9\)"),
        (torch.tensor(1.0), r"input: expected a tensor with last dimension 8 .*got \(\)"),
        (X.double(), "input: expected torch.float32 on cpu.*got torch.float64"),
        (X.long(), "input: expected torch.float32 on cpu.*got torch.int64"),
        (X.to("meta"), "input: expected torch.float32 on cpu.*on meta"),
        (X.numpy(), "input: expected a tensor .*got ndarray"),
        (None, "input: expected a tensor .*got NoneType"),
    ],
)
def test_looking_refuses_input(method, input, message):
    layer, _, _ = make()
    call = getattr(layer, method)
    refused(layer, lambda: call(input, 2), ValueError, f"LSHLinear.{method}: {message}")


def test_recall_of_odd_inputs():
    layer, x, _ = make()
    assert (
        layer.recall(x.reshape(2, 3, D), 4)
        == layer.recall(x, 4)
        == layer.recall(x.T.contiguous().T, 4)
    )
    assert layer.recall(x[0], 4) >= 0
    for wrong, message in ((x[:0], "at least one, got none"), (x * math.nan, "finite numbers")):
        refused(layer, lambda w=wrong: layer.recall(w), ValueError, f"recall: input: .*{message}")


def test_probe_refuses_input():
    layer, _, _ = make()
    probe = RecallProbe(layer)
    for wrong, got in ((torch.zeros(16, 9), r"\(16, 9\)"), (None, "NoneType")):
        with pytest.raises(
            ValueError, match=f"RecallProbe.measure: input: .*last dimension 8.*{got}"
        ):
            probe.measure(layer, wrong)


@pytest.mark.parametrize("norm_type", ["inf", math.inf, "2", np.float32(3), 0, torch.tensor(1.0)])
@pytest.mark.parametrize("max_norm", [0.5, "0.5", np.float64(0.5), torch.tensor(0.5), 0, math.inf])
@pytest.mark.parametrize("sparse", [False, True])
def test_clipping_takes_what_torch_takes(max_norm, norm_type, sparse):
    layer, _, _ = make()
    rows, values = torch.tensor([[1, 4]]), torch.randn(2, D)
    grad = torch.sparse_coo_tensor(rows, values.clone(), (N, D), is_coalesced=True)
    layer.weight.grad = grad if sparse else grad.to_dense()
    layer.bias.grad = None
    dense = torch.nn.Parameter(torch.zeros(N, D))
    dense.grad = grad.to_dense()
    expected = torch.nn.utils.clip_grad_norm_(dense, max_norm, norm_type)
    torch.testing.assert_close(clip_grad_norm_(layer.weight, max_norm, norm_type), expected)
    torch.testing.assert_close(layer.weight.grad.to_dense(), dense.grad)


@pytest.mark.parametrize("wrong", ["most", -1.0, math.nan, None, torch.ones(2)])
def test_clipping_refuses(wrong):
    layer, _, _ = make()
    for name in ("max_norm", "norm_type"):
        call = lambda name=name: clip_grad_norm_(layer.weight, **{"max_norm": 1.0, name: wrong})  # noqa: E731
        refused(
            layer, call, ValueError, f"clip_grad_norm_: {name}: expected a number of at least 0"
        )


def grown(layer, by=3):
    """What resizing by hand, or transformers' resize_token_embeddings, does to a layer, in several ways."""
    weight = torch.nn.Parameter(torch.randn(layer.out_features + by, layer.in_features))
    bias = torch.nn.Parameter(torch.randn(layer.out_features + by))
    return weight, bias


def grow_all(layer):
    layer.weight, layer.bias = grown(layer)


def grow_told(layer):  # transformers sets out_features too
    layer.weight, layer.bias = grown(layer)
    layer.out_features += 3


def grow_in_place(layer):
    layer.weight.data, layer.bias.data = (p.data for p in grown(layer))


def grow_weight(layer):
    layer.weight = grown(layer)[0]


def shrink(layer):
    layer.weight, layer.bias = grown(layer, -3)


def drop_bias(layer):
    layer.bias = None


RESIZED = [grow_all, grow_told, grow_in_place, grow_weight, shrink, drop_bias]
USES = {
    "forward": lambda layer: layer(X),
    "predict": lambda layer: layer.predict(X, 2),
    "calibrate": lambda layer: layer.calibrate(X + 1, 2),
    "log_prob": lambda layer: layer.log_prob(X),
    "recall": lambda layer: layer.recall(X + 1),
    "rehash": lambda layer: layer.rehash(),
    "rebuild": lambda layer: layer.rebuild(),
    "tune": lambda layer: tune(layer, X + 1, k=2),
}


@pytest.mark.parametrize("resize", RESIZED)
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("output", ["sampled", "dense"])
def test_resized_parameters_are_refused_with_advice(use, resize, output):
    layer = LSHLinear(D, N, options=LSHOptions(**SAMPLED), output=output)
    if output == "sampled":
        F.cross_entropy(layer(X), Y).backward()
    else:
        layer(X).sum().backward()
    resize(layer)
    layer.zero_grad()
    codes = layer.tables.codes.clone()
    random = torch.get_rng_state()
    advice = "of resized parameters make a new layer, LSHLinear.from_linear"
    with pytest.raises(
        ValueError, match=rf"weight: expected shape \(50, 8\) and bias \(50,\).*{advice}"
    ):
        USES[use](layer)
    assert torch.equal(layer.tables.codes, codes) and torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("resize", [r for r in RESIZED if r is not grow_weight])
def test_the_advice_for_resized_parameters_works(resize):
    layer, x, y = make(budget=1000)
    resize(layer)
    made = LSHLinear.from_linear(layer, options=layer.options, sparse=layer.sparse)
    assert made.weight is layer.weight and (made.out_features, D) == made.weight.shape
    expected = F.cross_entropy(F.linear(x, made.weight, made.bias), y)
    torch.testing.assert_close(F.cross_entropy(made(x), y), expected)
    linear = layer.to_linear()
    assert (linear.out_features, linear.in_features) == linear.weight.shape
    torch.testing.assert_close(F.cross_entropy(linear(x), y), expected)


def test_resized_feed_forward_is_refused():
    block = LSHFeedForward(D, N, sparse=True)
    grow_all(block.first)
    with pytest.raises(
        ValueError, match=r"LSHFeedForward: first: weight: expected shape \(50, 8\)"
    ):
        block(X)
    block = LSHFeedForward(D, N, sparse=True)
    block.second_weight = torch.nn.Parameter(torch.zeros(N + 1, D))
    for training in (True, False):
        with pytest.raises(
            ValueError, match=r"second_weight: expected shape .*\(50, out_features\)"
        ):
            block.train(training)(X)


HOOKED = {
    "weight_norm": torch.nn.utils.weight_norm,
    "spectral_norm": torch.nn.utils.spectral_norm,
    "pruning": lambda layer: torch.nn.utils.prune.random_unstructured(layer, "weight", 0.5),
}


@pytest.mark.parametrize("name", HOOKED)
def test_weights_that_only_a_forward_computes(name):
    """Training works as for nn.Linear; what is no forward would see an outdated weight."""
    layer = LSHLinear(D, N, options=LSHOptions(budget=N))
    HOOKED[name](layer)
    loss = F.cross_entropy(layer(X + 1), Y)
    expected = F.cross_entropy(F.linear(X + 1, layer.weight, layer.bias), Y)
    torch.testing.assert_close(loss, expected)
    for use in USES.keys() - {"forward"}:
        with pytest.raises(
            ValueError, match=f"got one that {name} computes anew at each forward only"
        ):
            USES[use](layer)
    block = LSHFeedForward(D, N)
    HOOKED[name](block.first)
    with pytest.raises(ValueError, match=f"LSHFeedForward: first: .*{name} computes anew"):
        block(X)


def test_parametrized_weights_are_not_calibrated():
    layer = torch.nn.utils.parametrizations.weight_norm(LSHLinear(D, N))
    values, _ = layer.predict(X + 1, 2)
    torch.testing.assert_close(values, F.linear(X + 1, layer.weight, layer.bias).topk(2).values)
    with pytest.raises(
        ValueError, match=r"calibrate: weight: expected a Parameter.*parametrization"
    ):
        layer.calibrate(X + 1, 2)


@pytest.mark.parametrize("shape", [(D, N + 1), (D + 1, N)])
def test_state_dict_of_another_shape(shape):
    """Named, and nothing is loaded: not even a bias that would fit."""
    layer, x, y = make()
    old = {name: value.clone() for name, value in layer.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"weight: expected shape .*, got .*the sizes"):
        layer.load_state_dict(torch.nn.Linear(*shape).state_dict())
    assert all(torch.equal(value, old[name]) for name, value in layer.state_dict().items())
    assert F.cross_entropy(layer(x), y).isfinite()


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


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_defective_input_spoils_its_own_row_only(pattern, everything, value):
    layer, x, y = make(pattern=pattern, **(dict(budget=N) if everything else {}))
    x[2, 3] = value
    x.requires_grad_()
    torch.manual_seed(5)
    losses = F.cross_entropy(layer(x), y, reduction="none")
    theirs = F.cross_entropy(F.linear(x, layer.weight, layer.bias), y, reduction="none")
    assert losses[2].isnan() and theirs[2].isnan()
    if not everything:
        torch.manual_seed(5)
        labels = as_labels(y, y.shape, N, x.dtype, -100)
        active = draw_active_set(layer.tables, x.detach(), labels)
        mask = torch.zeros(B, N, dtype=torch.bool)
        if isinstance(active, SharedActiveSet):
            mask[:, active.rows] = True
        else:
            sample = torch.arange(B).repeat_interleave(active.offsets.diff())
            mask[sample, active.active.long()] = True
        target = F.one_hot(y, N).to(x.dtype)
        theirs = reference.sampled_cross_entropy(x, layer.weight, layer.bias, mask, target)
    others = torch.arange(B) != 2
    torch.testing.assert_close(losses[others], theirs[others])
    (mine,) = torch.autograd.grad(losses.sum(), x)
    assert mine[others].isfinite().all() and mine[2].isnan().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("schedule", ["growing", "drift"])
def test_defective_weights_at_a_rehash(bad, schedule):
    layer, x, y = make(rehash_every=1, schedule=schedule, drift=0.0)
    if schedule == "drift":  # rows of the drift sample among them
        layer.tables.schedule.drift_sample_codes.add_(1)
    with torch.no_grad():
        layer.weight[[3, 41], 0] = bad
    message = r"weight: expected finite rows, got NaN or Inf in 2 of them \(3, 41\)"
    refused(layer, lambda: F.cross_entropy(layer(x), y), ValueError, message)
    refused(layer, layer.rehash, ValueError, message)
    fresh = LSHLinear.from_linear(layer.to_linear(), options=LSHOptions(**SAMPLED))
    with pytest.raises(ValueError, match=message):
        F.cross_entropy(fresh(x), y)
    assert not fresh.tables.built and fresh.tables.schedule.steps == 0


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("correction", ["none", "importance"])
def test_empty_batch(pattern, everything, correction):
    layer, _, _ = make(
        pattern=pattern, correction=correction, **(dict(budget=N) if everything else {})
    )
    x, y = torch.empty(0, D, requires_grad=True), torch.empty(0, dtype=torch.int64)
    for reduction in ("mean", "sum", "none"):
        layer.zero_grad(set_to_none=True)
        ours = F.cross_entropy(layer(x), y, reduction=reduction)
        theirs = F.cross_entropy(F.linear(x, layer.weight, layer.bias), y, reduction=reduction)
        torch.testing.assert_close(ours, theirs, equal_nan=True)
        ours.sum().backward()
        assert x.grad.shape == x.shape
        assert not layer.weight.grad.any() and not layer.bias.grad.any()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_rows_without_any_label(pattern):
    layer, x, _ = make(pattern=pattern)
    layer.zero_grad(set_to_none=True)
    x.requires_grad_()
    nothing = torch.empty(B, 0, dtype=torch.int64)
    assert F.cross_entropy(layer(x), nothing).isnan()
    losses = F.cross_entropy(layer(x), nothing, reduction="none")
    assert torch.equal(losses, torch.zeros(B))
    losses.sum().backward()
    assert not layer.weight.grad.any() and not layer.bias.grad.any() and not x.grad.any()


@pytest.mark.parametrize("family", ["simhash", "dwta"])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("neurons,budget,tail", [(n, b, t) for n in (1, 2, 3) for b, t in
                         [(0, 0), (0, 1), (1, 0), (1, 1), ("auto", "auto")]])  # fmt: skip
def test_tiny_layers(family, pattern, neurons, budget, tail):
    """Labels are active whatever the budget: losses lie between 0 and those of the full softmax."""
    options = LSHOptions(family=family, pattern=pattern, budget=budget, tail=tail)
    layer = LSHLinear(1, neurons, options=options)
    x, y = torch.randn(4, 1), torch.randint(neurons, (4,))
    losses = F.cross_entropy(layer(x), y, reduction="none")
    full = F.cross_entropy(layer.eval()(x), y, reduction="none")
    assert (losses >= -1e-6).all() and (losses <= full + 1e-6).all()
    losses.sum().backward()
    assert layer.weight.grad.isfinite().all()
