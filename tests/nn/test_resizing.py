"""LSHLinear.extend_ and drop_: classes come and go, and training goes on."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from resized_layers import B, D, N, make, make_optimizer, train
from torch import nn

import slide_torch
from slide_torch import LSHLinear, load_sampler_state, sampler_state

DROPPED = [0, 17, 18, 60, N - 1]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)  # for such small problems two are slower
    torch.manual_seed(0)


def change(layer, how, optimizer=None):
    if how in ("drop", "both"):
        layer.drop_(DROPPED, optimizer=optimizer)
    if how in ("extend", "both"):
        layer.extend_(7, optimizer=optimizer)


def of_rows(optimizer, parameter):
    """The states of the parameter that have a value an element, dense."""
    states = optimizer.state[parameter].items()
    return {key: t.to_dense() for key, t in states if isinstance(t, torch.Tensor) and t.dim() > 0}


CASES = {
    "shared": {},
    "no_bias": {"bias": False},
    "per_sample": {"pattern": "per_sample", "correction": "importance"},
    "dwta": {"family": "dwta", "K": 1, "rebuild_every": 2},
    "simhash": {"family": "simhash", "probes": 2},
    "augment_norms": {"family": "simhash", "augment_norms": True},
    "kmeans": {"family": "kmeans", "L": 2, "probes": 2, "rerank": 20},
    "search": {"family": "kmeans", "L": 1, "probes": 3, "rerank": 20},
    "drift": {"schedule": "drift", "drift": 0.02, "rehash_every": 2},
    "drift_search": {"family": "kmeans", "L": 1, "schedule": "drift", "drift": 0.02},
    "frequencies": {"tail_distribution": "frequencies", "correction": "importance"},
    "no_tables": {"budget": 0},
    "every_neuron": {"budget": N + 50},
    "exact_candidates": {"family": "exact"},
    "bfloat16": {"dtype": torch.bfloat16},
    "bfloat16_search": {"dtype": torch.bfloat16, "family": "kmeans", "L": 1, "rerank": 20},
    "bfloat16_dense": {"dtype": torch.bfloat16, "sparse": False, "optimizer": "adagrad"},
    "float64": {"dtype": torch.float64, "pattern": "per_sample"},
    "fused": {"optimizer": "fused"},
    "small_moments": {"optimizer": "small_moments"},
    "sgd": {"optimizer": "sgd"},
    "adagrad": {"optimizer": "adagrad"},
    "dense_adam": {"sparse": False},
    "dense_small_moments": {"sparse": False, "optimizer": "small_moments"},
    "torch_adam": {"sparse": False, "optimizer": "torch_adam"},
    "torch_adamw": {"sparse": False, "optimizer": "torch_adamw"},
    "torch_rprop": {"sparse": False, "optimizer": "torch_rprop"},
    "torch_sparse_adam": {"optimizer": "torch_sparse_adam"},
    "torch_sgd": {"sparse": False, "optimizer": "torch_sgd"},
    "torch_sparse_sgd": {"optimizer": "torch_sgd"},
    "torch_sparse_adagrad": {"optimizer": "torch_adagrad"},
}


@pytest.mark.parametrize("how", ["extend", "drop", "both"])
@pytest.mark.parametrize("case", CASES)
def test_training_goes_on_as_of_a_layer_that_had_this_state_from_the_start(case, how):
    layer, optimizer = make(**CASES[case])
    train(layer, optimizer, range(5))
    change(layer, how, optimizer)
    assert layer.out_features == len(layer.weight) == N + {"extend": 7, "drop": -5, "both": 2}[how]
    saved = copy.deepcopy((layer.state_dict(), optimizer.state_dict(), sampler_state(layer)))
    random = torch.get_rng_state()
    losses = train(layer, optimizer, range(5, 14))
    assert losses.isfinite().all()

    other, other_optimizer = make(layer.out_features, **CASES[case])
    other.load_state_dict(saved[0])
    other_optimizer.load_state_dict(saved[1])
    load_sampler_state(other, {"": saved[2][""]})
    torch.set_rng_state(random)
    assert torch.equal(train(other, other_optimizer, range(5, 14)), losses)
    assert all(map(torch.equal, other.parameters(), layer.parameters()))
    tensors, expected = other.tables.tensors(), layer.tables.tensors()
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    for mine, theirs in zip(other.parameters(), layer.parameters(), strict=True):
        own, found = of_rows(other_optimizer, mine), of_rows(optimizer, theirs)
        assert own.keys() == found.keys() and all(torch.equal(own[key], found[key]) for key in own)


@pytest.mark.parametrize("case", CASES)
def test_old_rows_stay_and_new_ones_start_as_in_a_new_layer(case):
    layer, optimizer = make(**CASES[case])
    train(layer, optimizer, range(5))
    identities = [id(parameter) for parameter in layer.parameters()]
    old = copy.deepcopy(layer)
    states = [
        {key: t.clone() for key, t in of_rows(optimizer, p).items()} for p in layer.parameters()
    ]
    steps = [optimizer.state[p].get("step") for p in layer.parameters()]
    x = torch.randn(B, D).to(layer.weight.dtype)
    seed = torch.initial_seed() + 1
    torch.manual_seed(seed)
    assert layer.extend_(7, optimizer=optimizer) is layer
    torch.manual_seed(seed)
    new = nn.Linear(D, 7, layer.bias is not None, dtype=layer.weight.dtype)
    assert [id(parameter) for parameter in layer.parameters()] == identities
    for own, before, fresh in zip(
        layer.parameters(), old.parameters(), new.parameters(), strict=True
    ):
        assert torch.equal(own, torch.cat([before, fresh])) and own.requires_grad
    assert torch.equal(layer.eval()(x)[:, :N], old.eval()(x))
    assert [optimizer.state[p].get("step") for p in layer.parameters()] == steps
    for parameter, before in zip(layer.parameters(), states, strict=True):
        after = of_rows(optimizer, parameter)
        assert after.keys() == before.keys()
        for key in after:
            start = {"sum": 0.25, "step_size": 0.05}.get(key, 0.0)
            assert after[key].dtype == before[key].dtype
            assert torch.equal(after[key][:N], before[key]) and bool(
                (after[key][N:] == start).all()
            )
    if old.tables.built:
        tables = layer.tables
        assert torch.equal(tables.codes[:, :N], old.tables.codes)
        assert torch.equal(tables.dirty[:N], old.tables.dirty) and not tables.dirty[N:].any()
        added = torch.arange(N, N + 7)
        codes = old.tables.family.row_codes(layer.weight, layer.bias, added)
        assert torch.equal(tables.codes[:, N:], codes)


@pytest.mark.parametrize("case", CASES)
def test_dropped_rows_are_gone_and_later_ones_move_down(case):
    layer, optimizer = make(**CASES[case])
    train(layer, optimizer, range(5))
    old = copy.deepcopy(layer)
    states = [
        {key: t.clone() for key, t in of_rows(optimizer, p).items()} for p in layer.parameters()
    ]
    new_ids = layer.drop_(torch.tensor([*DROPPED[::-1], 17]), optimizer=optimizer)
    kept = [i for i in range(N) if i not in DROPPED]
    expected = [-1 if i in DROPPED else kept.index(i) for i in range(N)]
    assert new_ids.dtype == torch.int64 and new_ids.tolist() == expected
    for own, before in zip(layer.parameters(), old.parameters(), strict=True):
        assert torch.equal(own, before[kept])
    for parameter, before in zip(layer.parameters(), states, strict=True):
        after = of_rows(optimizer, parameter)
        assert after.keys() == before.keys()
        assert all(torch.equal(after[key], before[key][kept]) for key in after)
    if old.tables.built:
        assert torch.equal(layer.tables.codes, old.tables.codes[:, kept])
        assert torch.equal(layer.tables.dirty, old.tables.dirty[kept])


def test_given_rows_and_biases():
    layer, _ = make(counts=False)
    rows, bias = torch.randn(2, D, requires_grad=True), torch.tensor([1.0, 2.0])
    layer.extend_(rows).extend_(rows, bias=bias).extend_(2, bias=bias)
    assert torch.equal(layer.weight[N : N + 4], torch.cat([rows, rows]))
    assert layer.bias[N:].tolist() == [0, 0, 1, 2, 1, 2]
    assert layer.weight.is_leaf and rows.grad is None
    layer.extend_(layer.weight[:3])  # rows of its own
    assert torch.equal(layer.weight[-3:], layer.weight[:3])


def test_new_classes_are_as_frequent_as_the_rarest():
    layer, _ = make(tail_distribution="frequencies")
    layer.extend_(3)
    shares = layer.tables.tail.frequencies
    assert torch.equal(shares[N:], shares[:1].expand(3))  # of count 1
    layer.drop_(range(10))
    assert torch.equal(layer.tables.tail.frequencies, shares[10:])


def test_new_classes_are_found_in_the_tables():
    """Retrieval, not the tail, is what makes a row close to the input active."""
    layer, optimizer = make(tail=0, K=3, L=10)
    x = torch.randn(B, D)
    train(layer, optimizer, range(2))
    layer.extend_(5 * x, optimizer=optimizer)
    F.cross_entropy(layer(x), torch.zeros(B, dtype=torch.int64)).backward()
    active = layer.weight.grad.coalesce().indices()[0]
    assert len(set(active.tolist()) & set(range(N, N + B))) >= B // 2


def test_automatic_options_are_those_of_the_new_size():
    layer = LSHLinear(D, 250, sparse=True)
    optimizer = make_optimizer("adam", layer.parameters())
    train(layer, optimizer, range(3))
    layer.extend_(3, optimizer=optimizer)
    assert layer.tables.built and layer.tables.options.K == 5
    layer.extend_(10, optimizer=optimizer)
    assert layer.tables.options == layer.options.resolve(263, D)
    assert layer.tables.options.K == 6 and not layer.tables.built
    load_sampler_state(LSHLinear(D, 263, sparse=True), {"": sampler_state(layer)[""]})
    assert train(layer, optimizer, range(3)).isfinite().all() and layer.tables.built
    assert layer.tables.stats()["steps"] == 6


def test_a_layer_that_shrinks_until_every_neuron_is_active_and_grows_again():
    layer, optimizer = make(budget=60)
    train(layer, optimizer, range(2))
    layer.drop_(range(80), optimizer=optimizer)
    assert layer.tables.exact and train(layer, optimizer, range(3)).isfinite().all()
    layer.extend_(100, optimizer=optimizer)
    assert train(layer, optimizer, range(3)).isfinite().all() and layer.tables.built


def test_nothing_to_do():
    layer, optimizer = make()
    train(layer, optimizer, range(2))
    versions = [parameter._version for parameter in layer.parameters()]
    layer.extend_(0).extend_(torch.empty(0, D))
    assert torch.equal(layer.drop_([]), torch.arange(N))
    assert torch.equal(layer.drop_(torch.empty(0, dtype=torch.int32)), torch.arange(N))
    assert [parameter._version for parameter in layer.parameters()] == versions


def test_before_the_first_step_and_after_loading():
    layer, optimizer = make()
    layer.extend_(3, optimizer=optimizer)
    train(layer, optimizer, range(3))
    layer.load_state_dict(layer.state_dict())
    functions = layer.tables.family
    layer.extend_(3, optimizer=optimizer)
    assert not layer.tables.built and layer.tables.family.seed == functions.seed
    assert train(layer, optimizer, range(3)).isfinite().all()


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("how", ["extend", "drop"])
def test_graphs_of_the_old_size_raise_and_do_not_stand_in_the_way(how, sparse):
    layer, optimizer = make(sparse=sparse)
    hooked = []
    layer.weight.register_hook(lambda grad: hooked.append(grad.shape[0]))
    layer.weight.register_post_accumulate_grad_hook(lambda param: hooked.append(len(param)))
    x, y = torch.randn(B, D, requires_grad=True), torch.arange(B)
    loss = F.cross_entropy(layer(x), y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    logits, sampled = layer(x), F.cross_entropy(layer(x), y)
    exact = F.linear(x, layer.weight, layer.bias).sum()
    change(layer, how, optimizer)
    for old in (sampled, exact):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            old.backward()
    with pytest.raises((RuntimeError, ValueError), match=r"modified|changed|shape"):
        F.cross_entropy(logits, y).backward()
    optimizer.zero_grad()
    gc.collect()
    F.cross_entropy(layer(x), y).backward()
    assert layer.weight.grad.shape == layer.weight.shape
    F.cross_entropy(F.linear(x, layer.weight, layer.bias), y).backward()
    assert hooked == 2 * [N] + 4 * [layer.out_features]


def test_a_graph_of_the_old_size_does_not_update_inside_backward():
    layer, optimizer = make(optimizer="fused")
    train(layer, optimizer, range(2))
    old = F.cross_entropy(layer(torch.randn(B, D)), torch.arange(B))
    layer.extend_(7, optimizer=optimizer)
    weight = layer.weight.detach().clone()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        old.backward()
    assert torch.equal(layer.weight, weight)
    assert train(layer, optimizer, range(3)).isfinite().all()


def test_calibration_and_predictors_end():
    layer, _ = make()
    x = torch.randn(50, D)
    layer.calibrate(x, 3)
    predictor = layer.predictor()
    layer.extend_(3)
    with pytest.raises(RuntimeError, match="calibrate"):
        layer.predict(x, 3, exact=False)
    with pytest.raises((RuntimeError, ValueError), match=r"weight"):
        predictor(x)
    layer.calibrate(x, 3, recall=1.0)
    assert torch.equal(layer.predict(x, 3, exact=False)[1], layer.predict(x, 3)[1])


def test_inference_mode():
    layer, optimizer = make()
    train(layer, optimizer, range(2))
    with torch.inference_mode():
        layer.extend_(torch.randn(3, D), optimizer=optimizer)
        new_ids = layer.drop_([1], optimizer=optimizer)
    assert not layer.weight.is_inference() and not new_ids.is_inference()
    assert train(layer, optimizer, range(3)).isfinite().all()


@pytest.mark.parametrize("sparse", [False, True])
def test_a_tied_embedding_grows_too(sparse):
    embedding = nn.Embedding(N, D, sparse=sparse)
    layer, _ = make(bias=False, sparse=sparse)
    layer.tie(embedding)
    optimizer = slide_torch.optim.Adam(embedding.parameters(), lr=0.05)
    for _ in range(2):
        tokens = torch.randint(embedding.weight.shape[0], (B,))
        F.cross_entropy(layer(embedding(tokens)), tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        layer.extend_(4, optimizer=optimizer)
        assert layer.weight is embedding.weight
    F.cross_entropy(layer(embedding(torch.tensor([N + 7]))), torch.tensor([N + 6])).backward()
    assert layer.weight.grad.to_dense()[N + 7].any()
    assert layer.tables.dirty[N + 7] or not sparse


def test_a_compiled_layer_goes_on():
    layer, optimizer = make(counts=False)
    loss = torch.compile(lambda x, y: F.cross_entropy(layer(x), y), backend="eager", fullgraph=True)
    x = torch.randn(B, D)
    for how in ("extend", "drop", "extend"):
        y = torch.full((B,), layer.out_features - 1)
        random = torch.get_rng_state()
        found = loss(x, y)
        torch.set_rng_state(random)
        torch.testing.assert_close(found, F.cross_entropy(layer(x), y))
        found.backward()
        optimizer.step()
        optimizer.zero_grad()
        change(layer, how, optimizer)
    with pytest.raises(Exception, match=r"resized outside compiled graphs"):
        torch.compile(lambda: layer.extend_(1), backend="eager", fullgraph=True)()
    torch.compile(lambda: layer.extend_(1), backend="eager")()
    assert layer.out_features == len(layer.weight)
