"""What a Predictor refuses: other weights, damaged files, wrong inputs; nothing is changed then."""

import copy

import pytest
import torch
import torch.nn.functional as F
from predictors import D, K, N, calibrated, same, tensors_of
from torch import nn

from slide_torch import LSHLinear, Predictor
from slide_torch.prediction.saved_index import INDEX, Settings


def test_a_layer_that_is_not_calibrated_or_has_changed():
    layer = LSHLinear(D, N)
    with pytest.raises(RuntimeError, match=r"LSHLinear\.predictor: .*call layer\.calibrate"):
        layer.predictor()
    layer, x = calibrated()
    predictor = layer.predictor()
    with torch.no_grad():
        layer.weight[N - 1, D - 1] += 1e-3
    with pytest.raises(RuntimeError, match=r"LSHLinear\.predictor: the weights have changed"):
        layer.predictor()
    with pytest.raises(RuntimeError, match=r"Predictor: weight: .*have changed since"):
        predictor(x)
    with pytest.raises(RuntimeError, match=r"Predictor: weight: .*have changed since"):
        copy.deepcopy(predictor)(x)
    layer.calibrate(x, K)
    assert same(layer.predictor()(x), layer.predict(x, K, exact=False))


def test_weights_written_to_and_set_back_are_right():
    layer, x = calibrated()
    predictor, expected = layer.predictor(), layer.predict(x, K, exact=False)
    old = layer.bias[3].item()
    for value in (9.0, old):
        with torch.no_grad():
            layer.bias[3] = value
    assert same(predictor(x), expected)


OTHERS = {
    "one element": lambda s: s["weight"][N // 2, 3].add_(1e-6),
    "one bias": lambda s: s["bias"][N - 1].mul_(2),
    "two rows exchanged": lambda s: s["weight"][:2].copy_(s["weight"][:2].flip(0)),
    "another training": lambda s: s["weight"].normal_(),
    "other bias": lambda s: s["bias"].zero_(),
    "another's index": lambda s: s.update(other_index()),
}


def other_index():
    state = calibrated()[0].predictor().state_dict()
    return {name: state[name] for name in INDEX}


@pytest.mark.parametrize("change", OTHERS)
@pytest.mark.parametrize("assign", [False, True])
def test_other_weights_than_those_of_the_index(change, assign):
    layer, x = calibrated()
    model = nn.ModuleDict({"head": copy.deepcopy(layer.predictor())})
    expected, before = model["head"](x), tensors_of(model)
    state = tensors_of(layer.predictor())
    OTHERS[change](state)
    state = {f"head.{name}": tensor for name, tensor in state.items()}
    message = (
        r"Predictor\.load_state_dict: head\.weight: expected the weights that the index was made"
    )
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(state, assign=assign)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert same(model["head"](x), expected)
    weights = {name: state[name] for name in ("head.weight", "head.bias")}
    if change != "another's index":
        with pytest.raises(RuntimeError, match=message):
            model.load_state_dict(weights, strict=False, assign=assign)
    assert same(model["head"](x), expected)


def with_settings(**changes):
    def change(state):
        settings = Settings.from_tensor(state["settings"])
        numbers = {**vars(settings), **changes}
        state["settings"] = torch.tensor(list(numbers.values()), dtype=torch.float64)

    return change


def with_value(name, place, value):
    def change(state):
        state[name][place] = value

    return change


DAMAGED = {
    "no rows": (lambda s: s.pop("rows"), "rows: expected it beside the rest of an index, got none"),
    "no bias": (lambda s: s.pop("bias"), "bias: expected one beside a weight, got none"),
    "no tensor": (lambda s: s.update(rows=[1]), "rows: expected a tensor on the CPU, got list"),
    "meta": (lambda s: s.update(codes=s["codes"].to("meta")), "codes: .*CPU, got meta"),
    "narrow": (
        lambda s: s.update(weight=s["weight"][:, 1:].clone()),
        r"weight: expected torch.float32 \(600, 12\), got torch.float32 \(600, 11\)",
    ),
    "double": (lambda s: s.update(weight=s["weight"].double()), "weight: .*got torch.float64"),
    "codes": (lambda s: s.update(codes=s["codes"][1:]), r"terms: expected torch.float32"),
    "blocks": (
        lambda s: s.update(codes=s["codes"][1:], terms=s["terms"][1:]),
        "codes: expected as many blocks",
    ),
    "dtype": (lambda s: s.update(rows=s["rows"].long()), "rows: expected torch.int32.*torch.int64"),
    "dimensions": (lambda s: s.update(offsets=s["offsets"][None]), "offsets: expected torch.int64"),
    "centers": (lambda s: s.update(centers=s["centers"].double()), "centers: expected torch.float"),
    "offsets": (
        with_value("offsets", 1, 10**9),
        "offsets: expected increasing numbers from 0 to 600",
    ),
    "twice": (lambda s: s["rows"].fill_(3), "rows: expected every number from 0 to 599 once"),
    "negative": (with_value("rows", 0, -1), "rows: expected every number"),
    "beyond": (with_value("rows", 0, N), "rows: expected every number"),
    "smallest": (with_value("rows_in_smallest", 0, 0), "rows_in_smallest: expected sums"),
    "format": (
        lambda s: (with_settings(format=1)(s), s.update(codes=s["codes"].to(torch.int8))),
        "settings: expected format 2, got 1: calibrate the layer again",
    ),
    "k": (with_settings(k=N + 1), "settings: expected those of a calibration of 600 rows"),
    "no k": (with_settings(k=0), "settings: expected those of"),
    "half": (with_settings(k=1.5), "settings: expected those of"),
    "probes": (with_settings(probes=10**6), "settings: expected those of"),
    "rescored": (with_settings(rescored=-1), "settings: expected those of"),
    "radius": (with_settings(radius_weight=float("nan")), "settings: expected those of"),
    "recall": (with_settings(recall=2.0), "settings: expected those of"),
    "checksum": (with_settings(fingerprint=5), "weight: expected the weights that the index was"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_files(damage):
    layer, x = calibrated()
    change, message = DAMAGED[damage]
    state = tensors_of(layer.predictor())
    change(state)
    for loaded in (Predictor(D, N), copy.deepcopy(layer.predictor())):
        before = tensors_of(loaded)
        for assign in (False, True):
            with pytest.raises(RuntimeError, match=f"load_state_dict: {message}"):
                loaded.load_state_dict(state, assign=assign)
        after = loaded.state_dict()
        assert before.keys() == after.keys()
        if loaded.search is not None:
            assert all(torch.equal(before[name], after[name]) for name in before)
            assert same(loaded(x), layer.predict(x, K, exact=False))


@pytest.mark.parametrize("name", ["codes", "terms", "centers", "center_bias"])
def test_what_is_not_checked_costs_recall_only(name):
    layer, x = calibrated()
    state = tensors_of(layer.predictor())
    for value in (float("nan"), float("inf"), 0.0, None):
        if name == "codes":
            state[name].random_(0, 256)
        elif value is None:
            state[name].normal_()
        else:
            state[name].fill_(value)
        values, indices = Predictor.from_state_dict(state)(x)
        assert indices.min() >= 0 and all(len(row.unique()) == K for row in indices)
        logits = F.linear(x, layer.weight, layer.bias)
        torch.testing.assert_close(values, logits.gather(1, indices))


def test_a_predictor_made_otherwise_than_the_file():
    layer, _ = calibrated()
    state = layer.predictor().state_dict()
    with pytest.raises(RuntimeError, match="bias: expected none, got one: make the predictor with"):
        Predictor(D, N, bias=False).load_state_dict(state)
    with pytest.raises(RuntimeError, match="weight: expected assign=True, as the predictor is on"):
        Predictor(D, N, device="meta").load_state_dict(state)
    index = {name: state[name] for name in INDEX}
    with pytest.raises(RuntimeError, match="weight: expected values, got a meta tensor"):
        Predictor(D, N, device="meta").load_state_dict(index, strict=False, assign=True)
    without = calibrated(bias=False)[0].predictor().state_dict()
    with pytest.raises(RuntimeError, match="bias: expected one beside a weight, got none"):
        Predictor(D, N).load_state_dict(without)
    for wrong in ({}, {"weight": torch.zeros(3)}, {"weight": torch.zeros(2, 2).long()}, [1]):
        with pytest.raises(RuntimeError, match="expected the state dict of a Predictor, got"):
            Predictor.from_state_dict(wrong)
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "offsets"'):
        Predictor.from_state_dict(layer.state_dict())
    with pytest.raises(
        RuntimeError, match="weight: expected the weights that the index was made for"
    ):
        Predictor(D, N).load_state_dict(index, strict=False)


def test_empty_ones_and_wrong_arguments():
    empty = Predictor(D, N)
    assert repr(empty) == f"Predictor(in_features={D}, out_features={N}, bias=True, empty)"
    with pytest.raises(RuntimeError, match="Predictor: expected one with an index, got an empty"):
        empty(torch.randn(2, D))
    for sizes, name in (((0, 3), "in_features"), ((3, 0), "out_features"), ((3, 2.0), "out_feat")):
        with pytest.raises(ValueError, match=f"Predictor: {name}.*expected an int"):
            Predictor(*sizes)
    with pytest.raises(ValueError, match="Predictor: dtype: expected float32"):
        Predictor(D, N, dtype=torch.float16)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.randn(3, D + 1), rf"input: expected a tensor with last dimension {D}.*\(3, 13\)"),
        (torch.randn(()), f"input: .*last dimension {D}"),
        ([1.0] * D, "input: .*got list"),
        (torch.randn(3, D).double(), "input: expected torch.float32 on cpu.*float64"),
        (torch.randn(3, D, device="meta"), "input: expected torch.float32 on cpu.*on meta"),
    ],
)
def test_wrong_inputs(x, message):
    predictor = calibrated()[0].predictor()
    with pytest.raises(ValueError, match=f"Predictor: {message}"):
        predictor(x)


def test_other_dtypes():
    predictor = calibrated()[0].predictor()
    before = tensors_of(predictor)
    for convert in (predictor.double, predictor.half, lambda: predictor.to(torch.bfloat16)):
        with pytest.raises(TypeError, match=r"dtype: expected to stay torch\.float32"):
            convert()
    after = predictor.state_dict()
    assert all(
        before[name].dtype == after[name].dtype and torch.equal(before[name], after[name])
        for name in before
    )


def test_inputs_without_numbers_do_no_harm():
    layer, x = calibrated()
    x[0, 0], x[1, 1] = float("nan"), float("inf")
    found = layer.predictor()(x)
    assert found.indices.min() >= 0 and found.indices.max() < N
    exact = F.linear(x[2:], layer.weight, layer.bias)
    torch.testing.assert_close(found.values[2:], exact.gather(1, found.indices[2:]))
