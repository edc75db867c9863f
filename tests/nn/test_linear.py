"""LSHLinear: nn.Linear in everything but training, where it learns the same from fewer neurons."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from slide_torch import LSHLinear, LSHOptions, SampledLogits, ops

N, D, B = 60, 8, 7
OPTIONS = LSHOptions(budget=5, tail=6, K=2, L=3)
PATTERNS = ["shared", "per_sample"]


def make(**arguments):
    torch.set_num_threads(1)  # for such small problems two are slower
    layer = LSHLinear(D, N, **{"options": OPTIONS, **arguments})
    dtype = layer.weight.dtype
    return layer, torch.randn(B, D, dtype=dtype), torch.randint(N, (B,))


def step(layer, x, y, *, lr=0.1):
    loss = F.cross_entropy(layer(x), y)
    loss.backward()
    with torch.no_grad():
        for p in layer.parameters():
            if p.grad is not None:
                p.sub_(lr * p.grad)
                p.grad = None
    return loss.detach()


def tables_fit(layer):
    """Whether the tables hold the codes that the weights have now."""
    fresh = layer.tables.family.row_codes(layer.weight, layer.bias)
    return layer.tables.codes is not None and torch.equal(layer.tables.codes, fresh)


# --- as nn.Linear ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [False, True])
def test_initial_parameters_and_eval_equal_linear(bias, dtype):
    torch.manual_seed(4)
    linear = nn.Linear(D, N, bias, dtype=dtype)
    torch.manual_seed(4)
    layer = LSHLinear(D, N, bias, dtype=dtype)
    assert isinstance(layer, nn.Linear)
    assert list(layer.state_dict()) == list(linear.state_dict())
    assert all(map(torch.equal, layer.parameters(), linear.parameters()))
    layer.eval()
    for shape in ((D,), (B, D), (2, 3, D), (0, D)):
        x = torch.randn(shape, dtype=dtype)
        found = layer(x)
        assert type(found) is torch.Tensor and torch.equal(found, linear(x))


def test_state_dicts_are_interchangeable():
    layer, x, y = make()
    step(layer, x, y)  # tables leave no trace in it
    linear = nn.Linear(D, N)
    linear.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(linear(x), layer.eval()(x))
    other = nn.Linear(D, N)
    layer.load_state_dict(other.state_dict(), strict=True)
    assert torch.equal(layer(x), other(x))


def test_train_and_eval():
    layer, x, _ = make()
    assert layer.training and isinstance(layer(x), SampledLogits)
    model = nn.Sequential(layer).eval()
    assert not layer.training and type(model(x)) is torch.Tensor
    assert isinstance(model.train()(x), SampledLogits)


def test_reset_parameters_draws_as_linear():
    layer, x, y = make()
    step(layer, x, y)
    torch.manual_seed(9)
    layer.reset_parameters()
    torch.manual_seed(9)
    linear = nn.Linear(D, N)
    assert all(map(torch.equal, layer.parameters(), linear.parameters()))


def test_extra_repr():
    layer, _, _ = make(sparse=True)
    text = repr(layer)
    assert "in_features=8, out_features=60, bias=True, sparse=True, options=LSHOptions(" in text
    assert "budget=5" in text and "built=False" in text


def test_from_and_to_linear_share_parameters():
    linear = nn.Linear(D, N).eval()
    layer = LSHLinear.from_linear(linear, options=OPTIONS, sparse=True)
    assert layer.weight is linear.weight and layer.bias is linear.bias
    assert not layer.training and layer.sparse and layer.options is OPTIONS
    back = layer.train().to_linear()
    assert type(back) is nn.Linear and back.training
    assert back.weight is linear.weight and back.bias is linear.bias
    x = torch.randn(B, D)
    assert torch.equal(back(x), linear(x))
    assert repr(back) == repr(linear)
    bare = LSHLinear.from_linear(nn.Linear(D, N, bias=False))
    assert bare.bias is None and bare.to_linear().bias is None
    with pytest.raises(ValueError, match=r"linear: expected nn\.Linear, got Conv1d"):
        LSHLinear.from_linear(nn.Conv1d(1, 1, 1))


# --- copies ---------------------------------------------------------------------------------------


def through_torch_save(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "torch.save": through_torch_save,
}


@pytest.mark.parametrize("family", ["simhash", "dwta"])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("how", COPIES)
def test_copies_go_on_alike(how, trained, family):
    layer, x, y = make(
        options=LSHOptions(budget=5, tail=6, K=2, L=3, family=family, rehash_every=2), sparse=True
    )
    for _ in range(5 * trained):
        step(layer, x, y)
    other = COPIES[how](layer)
    assert other.stats() == layer.stats() and other.sparse
    losses = []
    for one in (layer, other):
        torch.manual_seed(1)
        losses.append(torch.stack([step(one, x, y) for _ in range(6)]))
    assert torch.equal(*losses)
    assert all(map(torch.equal, layer.parameters(), other.parameters()))
    tensors, others = layer.tables.tensors(), other.tables.tensors()
    assert tensors.keys() == others.keys()
    assert all(torch.equal(value, others[name]) for name, value in tensors.items())
    assert layer.weight.data_ptr() != other.weight.data_ptr()
    # the copy's hook refreshes the copy's tables, not those of the original
    other.load_state_dict(nn.Linear(D, N).state_dict())
    assert not other.tables.built and layer.tables.built


def test_state_dict_through_a_file():
    layer, x, y = make()
    step(layer, x, y)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other, _, _ = make()
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert torch.equal(other.eval()(x), layer.eval()(x))


@pytest.mark.parametrize("dwta", [False, True])
def test_meta_device_and_to_empty(dwta):
    options = LSHOptions(budget=5, tail=6, family="dwta") if dwta else OPTIONS
    with torch.device("meta"):
        layer = LSHLinear(D, N, options=options)
    also = LSHLinear(D, N, device="meta", options=options)
    for one in (layer, also):
        assert one.weight.is_meta
        one.to_empty(device="cpu")
        torch.manual_seed(2)
        one.reset_parameters()
        x, y = torch.randn(B, D), torch.randint(N, (B,))
        assert step(one, x, y).isfinite() and tables_fit_before_step(one)


def tables_fit_before_step(layer):
    layer.rehash()
    return tables_fit(layer)


@pytest.mark.parametrize("family", ["simhash", "dwta"])
@pytest.mark.parametrize("projection", ["gaussian", "hadamard"])
@pytest.mark.parametrize("built", [False, True])
def test_double(built, family, projection):
    """Halfway through training too: tables and functions go on."""
    options = LSHOptions(
        budget=5, tail=6, K=2, L=3, family=family, projection=projection, rehash_every=2
    )
    layer, x, y = make(options=options)
    for _ in range(3 * built):
        step(layer, x, y)
    layer.double()
    assert layer.weight.dtype == torch.float64
    for _ in range(5):
        assert step(layer, x.double(), y).dtype == torch.float64
    assert layer.tables.family.mean_row.dtype == torch.float64
    layer.rehash()
    assert tables_fit(layer)


# --- tables follow the weights --------------------------------------------------------------------


def test_tables_are_built_at_the_first_training_step():
    layer, x, y = make()
    assert not layer.tables.built and layer.stats()["steps"] == 0
    layer.eval()(x)
    layer.train()(x)
    assert not layer.tables.built
    F.cross_entropy(layer(x), y)
    assert layer.tables.built and tables_fit(layer) and layer.stats()["steps"] == 1


REFRESHERS = ["reset_parameters", "load_state_dict", "rehash", "rebuild", "whole_model"]


@pytest.mark.parametrize("how", REFRESHERS)
def test_tables_are_refreshed(how):
    layer, x, y = make()
    step(layer, x, y)
    with torch.no_grad():
        layer.weight.normal_()
    assert not tables_fit(layer)
    if how == "reset_parameters":
        layer.reset_parameters()
    elif how == "load_state_dict":
        layer.load_state_dict(nn.Linear(D, N).state_dict())
    elif how == "whole_model":
        nn.Sequential(layer).load_state_dict(nn.Sequential(nn.Linear(D, N)).state_dict())
    else:
        seed = layer.tables.family.seed
        getattr(layer, how)()
        assert (layer.tables.family.seed == seed) == (how == "rehash")
    F.cross_entropy(layer(x), y)
    assert tables_fit(layer)


@pytest.mark.parametrize("sparse", [False, True])
def test_schedule_keeps_tables_fresh(sparse):
    """After each rehash the tables fit weights that only training has moved."""
    layer, x, y = make(
        options=LSHOptions(budget=5, tail=6, K=3, L=4, rehash_every=3, rehash_growth=1.0),
        sparse=sparse,
    )
    # momentum under dense gradients moves rows that are no longer active
    optimizer = torch.optim.SGD(layer.parameters(), lr=2.0, momentum=0.0 if sparse else 0.9)
    moved = 0
    for i in range(13):
        loss = F.cross_entropy(layer(x), y)
        assert layer.stats()["rehashes"] == i // 3
        if i % 3 == 0:
            assert tables_fit(layer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        moved += not tables_fit(layer)
    assert moved > 4 and layer.stats()["steps"] == 13


def test_no_schedule_step_without_gradients():
    layer, x, y = make()
    with torch.no_grad():
        for _ in range(3):
            assert not F.cross_entropy(layer(x), y).requires_grad
    assert layer.tables.built and layer.stats()["steps"] == 0
    assert layer.stats()["dirty_share"] == 0 and "union" not in layer.stats()
    layer.requires_grad_(False)
    F.cross_entropy(layer(x.requires_grad_()), y).backward()
    assert layer.stats()["steps"] == 0 and x.grad.any()


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_frozen_parameter(frozen, pattern, sparse):
    """The other one learns, and counts: a trained bias moves neurons between buckets too."""
    layer, x, y = make(
        options=LSHOptions(budget=5, tail=6, K=2, L=3, pattern=pattern), sparse=sparse
    )
    getattr(layer, frozen).requires_grad_(False)
    old = copy.deepcopy(layer.state_dict())
    F.cross_entropy(layer(x), y).backward()
    trained = {"weight": layer.bias, "bias": layer.weight}[frozen]
    assert getattr(layer, frozen).grad is None and trained.grad.to_dense().any()
    assert layer.stats()["steps"] == 1 and layer.stats()["dirty_share"] > 0
    assert torch.equal(getattr(layer, frozen), old[frozen])


@pytest.mark.parametrize("loss", ["cross_entropy", "binary_cross_entropy"])
@pytest.mark.parametrize("pattern", ["shared", "sample"])
def test_frozen_weight_has_no_gradient_rows(pattern, loss):
    """What is not asked for is not made; the rest is what it is beside it."""
    N, D, B = 40, 13, 5
    rows = torch.arange(0, N, 3)
    x, weight, bias = torch.randn(B, D), torch.randn(N, D), torch.randn(N)
    offsets, places, numbers = torch.arange(B + 1), torch.arange(B), torch.rand(B)
    pairs = ()
    if pattern == "sample":
        starts = torch.arange(B + 1) * 6
        active = torch.cat([rows[torch.randperm(len(rows))[:6]].sort().values for _ in range(B)])
        rows, *transposed = ops.transpose_active(starts, active.int(), N)
        pairs, places = (starts, *transposed), places * 6
    labels = (offsets, places, numbers)
    if loss == "cross_entropy":
        extra, modes = (None, *labels), (False,)  # decoupled
        between = labels
    else:
        extra, modes = (None, *labels, None), ()
        between = extra
    forward = getattr(torch.ops.slide_torch, f"{pattern}_{loss}")
    backward = getattr(torch.ops.slide_torch, f"{pattern}_{loss}_backward")
    _, *kept = forward(x, weight, bias, rows, *pairs, *extra, 1.0, *modes, False)
    arguments = (torch.rand(B), x, weight, rows, *pairs, *between, *kept, *modes)
    grad_input, grad_rows, grad_bias = backward(*arguments, True, True)
    assert grad_rows.shape == (len(rows), D) and grad_rows.any()
    for has_bias in (False, True):
        found = backward(*arguments, False, has_bias)
        torch.testing.assert_close(found[0], grad_input)
        assert found[1].shape == (0, D)
        assert torch.equal(found[2], grad_bias if has_bias else grad_bias[:0])


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_gradient_accumulation(pattern, sparse):
    layer, x, y = make(
        options=LSHOptions(budget=5, tail=6, K=2, L=3, pattern=pattern), sparse=sparse,
        dtype=torch.float64,
    )  # fmt: skip
    layer.rebuild()
    single = []
    for i in range(2):
        torch.manual_seed(i)
        F.cross_entropy(layer(x * (i + 1)), y).backward()
        single.append([p.grad.to_dense() for p in layer.parameters()])
        layer.zero_grad(set_to_none=True)
    for i in range(2):
        torch.manual_seed(i)
        F.cross_entropy(layer(x * (i + 1)), y).backward()
    for p, one, two in zip(layer.parameters(), *single, strict=True):
        torch.testing.assert_close(p.grad.to_dense(), one + two, rtol=1e-12, atol=1e-12)


# --- learning -------------------------------------------------------------------------------------


@pytest.mark.parametrize("correction", ["none", "importance"])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_learns_a_classification_problem(pattern, sparse, correction):
    """200 classes, each a direction with noise: more than 95% right among all classes, exactly."""
    torch.set_num_threads(1)
    classes, width = 200, 16
    centers = F.normalize(torch.randn(classes, width), dim=1) * 4

    def batch(size):
        y = torch.randint(classes, (size,))
        return centers[y] + 0.25 * torch.randn(size, width), y

    options = LSHOptions(
        pattern=pattern, correction=correction, budget=8, tail=16, K=4, L=10, rehash_every=20
    )
    head = LSHLinear(32, classes, options=options, sparse=sparse)
    model = nn.Sequential(nn.Linear(width, 32), nn.ReLU(), head)
    if sparse:
        body = torch.optim.Adam(model[0].parameters(), lr=0.01)
        optimizers = [body, torch.optim.SparseAdam(list(head.parameters()), lr=0.03)]
    else:
        optimizers = [torch.optim.Adam(model.parameters(), lr=0.02)]
    criterion = nn.CrossEntropyLoss()
    for _ in range(250):
        x, y = batch(64)
        for optimizer in optimizers:
            optimizer.zero_grad()
        criterion(model(x), y).backward()
        for optimizer in optimizers:
            optimizer.step()
    x, y = batch(2000)
    with torch.no_grad():
        accuracy = (model.eval()(x).argmax(1) == y).float().mean().item()
    assert accuracy > 0.95
    assert head.stats()["union"] < classes and head.stats()["rehashes"] > 3


@pytest.mark.parametrize("pattern", PATTERNS)
def test_training_is_the_same_at_any_number_of_threads(pattern, both_thread_counts):
    """100 steps of SparseAdam end in the same bits with one and with two threads."""
    options = LSHOptions(
        pattern=pattern, correction="importance", budget=10, tail=120, K=5, L=10, rehash_every=10
    )

    def train():
        layer = LSHLinear(24, 2000, options=options, sparse=True)
        optimizer = torch.optim.SparseAdam(list(layer.parameters()), lr=0.01)
        for _ in range(100):
            x = torch.randn(32, 24, requires_grad=True)
            optimizer.zero_grad()
            F.cross_entropy(layer(x), torch.randint(2000, (32,))).backward()
            optimizer.step()
        return [*layer.parameters(), x.grad, layer.tables.codes]

    one, two = both_thread_counts(train)
    assert all(map(torch.equal, one, two))
