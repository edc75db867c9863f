"""Wrong arguments are refused, by a message that says what to do, with nothing changed."""

import math
import re

import numpy as np
import pytest
import torch
from refusals import B, D, N, X, Y, make, refused

from slide_torch import (
    HashTables,
    LSHFeedForward,
    LSHLinear,
    LSHOptions,
    RecallProbe,
    clip_grad_norm_,
    tune,
)
from slide_torch.functional import lsh_linear_cross_entropy

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
