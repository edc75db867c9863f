"""Predictor: what a calibrated layer predicts, from a file, compiled and exported."""

import copy
import io
import pickle

import pytest
import torch
from predictors import D, K, N, calibrated, same, tensors_of
from torch import nn

from slide_torch import Predictor
from slide_torch.prediction.saved_index import INDEX, PARTITION


def saved(module, path):
    torch.save(module.state_dict(), path)
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_results_are_those_of_the_layer(bias, dtype, tmp_path):
    layer, x = calibrated(bias, dtype)
    expected = layer.predict(x, K, exact=False)
    predictor = layer.predictor()
    state = saved(predictor, tmp_path / "predictor.pt")
    loaded = Predictor(D, N, bias, dtype=dtype)
    loaded.load_state_dict(state)
    for each in (predictor, loaded, Predictor.from_state_dict(state)):
        assert same(each(x), expected)
    leading = loaded(x.view(5, 10, D))
    assert leading.values.shape == leading.indices.shape == (5, 10, K)
    assert torch.equal(leading.indices.view(50, K), expected.indices)
    assert loaded(x[0]).indices.shape == (K,) and loaded(x[:0]).indices.shape == (0, K)


@pytest.mark.parametrize("d", [1, 3, 13])
def test_any_width(d, tmp_path):
    layer, x = calibrated(d=d)
    loaded = Predictor.from_state_dict(saved(layer.predictor(), tmp_path / "p.pt"))
    assert same(loaded(x), layer.predict(x, K, exact=False))


def test_inputs_whose_lists_are_short_of_rows():
    """They get further lists, the others do not."""
    layer, x = calibrated()
    c = layer.calibration
    sizes = c.partition.offsets.diff()
    probed = c.partition.probes(x, c.probes, c.radius_weight)
    rows = sizes[probed].sum(1)
    k = int(rows.median())
    short = rows < k
    assert short.any() and not short.all()
    arguments = (layer.weight, layer.bias, k, c.probes, c.radius_weight, N)
    found = c.partition.topk(x, *arguments)
    assert found[1].min() >= 0 and all(len(row.unique()) == k for row in found[1])
    list_of = torch.empty(N, dtype=torch.int64)
    list_of[c.partition.rows.long()] = torch.arange(len(sizes)).repeat_interleave(sizes)
    for own, lists, is_short in zip(list_of[found[1]], probed, short, strict=True):
        assert torch.isin(own, lists).all() != is_short
    for i in range(0, 50, 5):  # whatever the others of a batch are
        alone = c.partition.topk(x[i : i + 1], *arguments)
        assert torch.equal(alone[1][0], found[1][i])


def test_it_shares_the_layers_memory_and_its_file_has_the_weights_once(tmp_path):
    layer, _ = calibrated()
    predictor = layer.predictor()
    assert predictor.weight is layer.weight and predictor.bias is layer.bias
    partition = layer.calibration.partition
    assert all(getattr(predictor, name) is getattr(partition, name) for name in PARTITION)
    assert set(predictor.state_dict()) == {*layer.state_dict(), *INDEX}
    both = nn.ModuleDict({"head": layer, "predictor": predictor})
    torch.save(both.state_dict(), tmp_path / "both.pt")
    torch.save(predictor.state_dict(), tmp_path / "one.pt")
    sizes = [(tmp_path / name).stat().st_size for name in ("both.pt", "one.pt")]
    assert sizes[0] - sizes[1] < layer.weight.nbytes / 4


def test_in_place_of_the_layer_in_a_model(tmp_path):
    layer, _ = calibrated()
    model, x = nn.Sequential(nn.Linear(5, D), layer), torch.randn(9, 5)
    expected = layer.predict(model[0](x), K, exact=False)
    model[1] = layer.predictor()
    assert same(model(x), expected)
    state = saved(model, tmp_path / "model.pt")
    with torch.device("meta"):
        other = nn.Sequential(nn.Linear(5, D), Predictor(D, N))
    other.load_state_dict(state, assign=True)
    assert same(other(x), expected)


def test_an_index_for_weights_that_are_there_already():
    layer, x = calibrated()
    expected = layer.predict(x, K, exact=False)
    state = layer.predictor().state_dict()
    index = {name: state[name].clone() for name in INDEX}
    twin = copy.deepcopy(layer)
    loaded = Predictor(D, N, device="meta")
    loaded.weight, loaded.bias = twin.weight, twin.bias
    loaded.load_state_dict(index, strict=False)
    assert same(loaded(x), expected) and loaded.weight is twin.weight


def test_memory_mapped(tmp_path):
    layer, x = calibrated()
    path = tmp_path / "predictor.pt"
    torch.save(layer.predictor().state_dict(), path)
    state = torch.load(path, mmap=True, weights_only=True)
    with torch.device("meta"):
        loaded = Predictor(D, N)
    loaded.load_state_dict(state, assign=True)
    for each in (loaded, Predictor.from_state_dict(state)):
        assert same(each(x), layer.predict(x, K, exact=False))
        own = each.state_dict()
        assert all(own[name].data_ptr() == state[name].data_ptr() for name in state)
        assert not any(p.requires_grad for p in Predictor.from_state_dict(state).parameters())


def test_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    layer, x = calibrated()
    safetensors.save_file(layer.predictor().state_dict(), tmp_path / "p.safetensors")
    loaded = Predictor.from_state_dict(safetensors.load_file(tmp_path / "p.safetensors"))
    assert same(loaded(x), layer.predict(x, K, exact=False))


def test_copies_and_pickles():
    layer, x = calibrated()
    predictor, buffer = layer.predictor(), io.BytesIO()
    torch.save(predictor, buffer)
    buffer.seek(0)
    copies = (
        copy.deepcopy(predictor),
        pickle.loads(pickle.dumps(predictor)),
        torch.load(buffer, weights_only=False),
        copy.deepcopy(predictor).share_memory(),
        copy.deepcopy(predictor).float().to("cpu"),
    )
    assert len({id(each.weight) for each in copies}) == len(copies)
    for each in copies:
        assert same(each(x), layer.predict(x, K, exact=False)) and repr(each) == repr(predictor)


def test_state_dicts_of_a_loaded_one_are_those_that_it_loaded():
    state = calibrated()[0].predictor().state_dict()
    again = Predictor.from_state_dict(state).state_dict()
    assert state.keys() == again.keys()
    assert all(torch.equal(state[name], again[name]) for name in state)


def test_autocast_inference_mode_and_no_gradient():
    layer, x = calibrated()
    predictor = layer.predictor()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = x.bfloat16()
        assert same(predictor(low), layer.predict(low, K, exact=False))
    with torch.inference_mode():
        assert same(predictor(x), layer.predict(x, K, exact=False))
        loaded = Predictor.from_state_dict(predictor.state_dict())
    assert same(loaded(x), layer.predict(x, K, exact=False))
    assert not predictor(x.requires_grad_()).values.requires_grad


def test_at_any_number_of_threads(both_thread_counts):
    def run():
        layer, x = calibrated()
        return layer.predictor()(x)

    one, two = both_thread_counts(run)
    assert all(map(torch.equal, one, two))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_conversion_to_its_own_dtype_changes_nothing(dtype):
    layer, x = calibrated(dtype=dtype)
    predictor = layer.predictor()
    before = tensors_of(predictor)
    after = predictor.to(dtype).state_dict()
    assert all(before[name].dtype == after[name].dtype for name in before)
    assert same(predictor(x), layer.predict(x, K, exact=False))


# --- compiled and exported ------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("recall", [0.05, 0.95])  # of the first, some inputs' lists are short
def test_export(recall, strict):
    layer, x = calibrated(recall=recall, k=60)
    predictor = layer.predictor()
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(predictor, (x[:6],), dynamic_shapes=({0: batch},), strict=strict)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    for module in (program.module(), torch.export.load(buffer).module()):
        for size in (2, 7, 50):
            assert same(module(x[:size]), predictor(x[:size]))
    fixed = torch.export.export(predictor, (x[0],), strict=strict).module()
    assert same(fixed(x[0]), predictor(x[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recall", [0.05, 0.95])
def test_compile(recall, dtype):
    layer, x = calibrated(recall=recall, k=60, dtype=dtype)
    predictor = layer.predictor()
    compiled = torch.compile(predictor, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in (50, 3):
        assert same(compiled(x[:size]), predictor(x[:size]))
