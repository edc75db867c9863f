"""LSHLinear.init_from_class_means_: rows in the direction of their classes' mean inputs."""

import math

import pytest
import torch
from torch import nn

from slide_torch import LSHLinear, LSHOptions

N, D, B = 40, 8, 30
OPTIONS = LSHOptions(budget=5, tail=6, K=2, L=3)
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)  # for such small problems two are slower
    torch.manual_seed(0)


def make(**arguments):
    return LSHLinear(D, N, **{"options": OPTIONS, **arguments})


def some_batches(dtype=torch.float32, count=3):
    """Batches of one class a row, of N - 2 classes at most."""
    return [(torch.randn(B, D, dtype=dtype) + 1, torch.randint(N - 2, (B,))) for _ in range(count)]


def expected(layer, inputs, weights, scale=2.0):
    """The same in plain torch and float64; ``weights`` (rows, N) say how much a row counts for a class."""
    inputs, weights = inputs.double(), weights.double()
    used = inputs[weights.sum(1) > 0]
    mean = used.mean(0)
    distance = (used - mean).square().sum(1).mean().sqrt()
    counts = weights.sum(0)
    centred = weights.T @ inputs / counts[:, None] - mean
    rows = nn.functional.normalize(centred, dim=1) * scale / distance
    seen = counts > 0
    weight, bias = layer.weight.detach().double().clone(), layer.bias.detach().double().clone()
    weight[seen], bias[seen] = rows[seen], -(rows @ mean)[seen]
    return weight, bias


def one_hot(targets):
    return nn.functional.one_hot(targets, N)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_point_to_the_means_of_their_classes(dtype):
    layer, batches = make(dtype=dtype), some_batches(dtype)
    inputs = torch.cat([x for x, _ in batches])
    targets = torch.cat([y for _, y in batches])
    weight, bias = expected(layer, inputs, one_hot(targets), scale=3.0)
    assert layer.init_from_class_means_(iter(batches), 3.0) is layer
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(layer.weight.double(), weight, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(layer.bias.double(), bias, rtol=tolerance, atol=tolerance)
    assert layer.weight.dtype == dtype and layer.weight.requires_grad
    # the logit of an input at the mean distance, in its class's direction, is the scale
    mean = inputs.double().mean(0)
    distance = (inputs.double() - mean).square().sum(1).mean().sqrt()
    row = layer.weight[targets[0]].double()
    logit = row @ (mean + distance * row / row.norm()) + layer.bias[targets[0]].double()
    assert logit.item() == pytest.approx(3.0, rel=max(tolerance, 1e-6) * 3)


def test_neither_the_size_of_inputs_nor_their_mean_matters():
    layer, other, batches = make(dtype=torch.float64), make(dtype=torch.float64), some_batches()
    layer.init_from_class_means_((x.double(), y) for x, y in batches)
    other.init_from_class_means_((100 * x.double() + 5, y) for x, y in batches)
    seen = torch.cat([y for _, y in batches]).unique()
    torch.testing.assert_close(100 * other.weight[seen], layer.weight[seen])
    x = batches[0][0].double()
    mine, theirs = layer.eval()(x), other.eval()(100 * x + 5)
    torch.testing.assert_close(theirs[:, seen], mine[:, seen])


def labels_of(form, targets):
    """The target in one of the forms that the loss takes, and how much each row counts for each class."""
    several = torch.stack([targets, (targets + 3) % N, torch.full_like(targets, -100)], 1)
    several[0, 1] = -100
    weights = one_hot(targets) + one_hot((targets + 3) % N)
    weights[0] = one_hot(targets)[0]
    share = weights / weights.sum(1, keepdim=True)
    return {
        "indices": (targets, one_hot(targets)),
        "int32": (targets.int(), one_hot(targets)),
        "lists": (several, weights),
        "probabilities": (share, share),
        "sparse": (share.to_sparse_csr(), share),
    }[form]


@pytest.mark.parametrize("form", ["indices", "int32", "lists", "probabilities", "sparse"])
def test_every_form_of_target(form):
    layer = make(dtype=torch.float64)
    inputs, targets = torch.randn(B, D, dtype=torch.float64), torch.randint(N, (B,))
    target, weights = labels_of(form, targets)
    weight, bias = expected(layer, inputs, weights)
    layer.init_from_class_means_([(inputs, target)])
    torch.testing.assert_close(layer.weight, weight)
    torch.testing.assert_close(layer.bias, bias)


def test_rows_without_a_label_do_not_count():
    layer, other = make(), make()
    other.load_state_dict(layer.state_dict())
    (x, y), *_ = some_batches()
    y[::3] = 7
    layer.init_from_class_means_([(x.view(5, 6, D), y.view(5, 6))], ignore_index=7)
    other.init_from_class_means_([(x[y != 7], y[y != 7]), (x[:0], y[:0])])
    assert all(map(torch.equal, layer.parameters(), other.parameters()))
    assert 7 not in y[y != 7]


def test_a_class_without_example_keeps_its_row():
    layer, batches = make(), some_batches()
    before = layer.weight.detach().clone(), layer.bias.detach().clone()
    layer.init_from_class_means_(batches)
    seen = torch.zeros(N, dtype=torch.bool).index_fill(0, torch.cat([y for _, y in batches]), True)
    assert not seen.all()
    assert torch.equal(layer.weight[~seen], before[0][~seen])
    assert torch.equal(layer.bias[~seen], before[1][~seen])
    assert (layer.weight[seen] != before[0][seen]).all()


def test_a_class_at_the_mean_gets_a_row_of_zeros():
    layer, x = make(), torch.randn(10, D)
    mean = x.mean(0)
    layer.init_from_class_means_([(torch.cat([x, mean[None]]), torch.arange(11))])
    assert layer.weight[10].abs().max() == 0 == layer.bias[10]


def test_without_bias():
    layer, (batch, *_) = make(bias=False), some_batches()
    layer.init_from_class_means_([batch])
    assert layer.bias is None and layer.tables.built


def test_tables_are_those_of_the_new_rows():
    layer, batches = make(sparse=True), some_batches()
    for _ in range(3):
        nn.functional.cross_entropy(layer(batches[0][0]), batches[0][1])
    assert layer.tables.schedule.steps == 3
    layer.init_from_class_means_(batches)
    codes = layer.tables.family.row_codes(layer.weight, layer.bias)
    assert torch.equal(layer.tables.codes, codes) and layer.tables.schedule.steps == 0
    plain = make(options=LSHOptions(budget=0, tail=6)).init_from_class_means_(batches)
    assert not plain.tables.built


def test_a_class_is_found_by_its_inputs():
    """What the start is for: far above chance before the first step."""
    centres = torch.randn(N, D)
    layer, targets = make(), torch.arange(N).repeat(4)
    layer.init_from_class_means_([(centres[targets] + 0.1 * torch.randn(4 * N, D), targets)])
    assert (layer.predict(centres, 1)[1][:, 0] == torch.arange(N)).float().mean() > 0.9


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_at_any_number_of_threads(dtype, both_thread_counts):
    inputs = torch.randn(4, 5_000, 64, dtype=dtype)
    targets = torch.randint(3_000, (4, 5_000, 2))

    def run():
        torch.manual_seed(1)
        layer = LSHLinear(64, 3_000, dtype=dtype)
        layer.init_from_class_means_(zip(inputs, targets, strict=True))
        return torch.cat([layer.weight.flatten(), layer.bias, layer.tables.codes.flatten()])

    one, two = both_thread_counts(run)
    assert torch.equal(one, two)


def test_progress_counts_batches(capsys):
    make().init_from_class_means_(some_batches(), progress=True)
    assert "Class means: 100%" in capsys.readouterr().err


def broken(batches, error):
    yield from batches
    raise error


X, Y = torch.ones(2, D), torch.tensor([1, 2])
REFUSED = [
    (dict(scale=0), [(X, Y)], "scale: expected a positive finite number, got 0"),
    (dict(scale="auto"), [(X, Y)], "scale: expected a positive finite number, got 'auto'"),
    ({}, 3, "batches: expected an iterable, got int"),
    ({}, [(X, X, X, Y)], r"expected pairs \(inputs, target\), got tuple of 4"),
    ({}, [X], r"expected pairs \(inputs, target\), got Tensor"),
    ({}, [], "expected inputs with labels, got none"),
    ({}, [(X, torch.tensor([-100, -100]))], "expected inputs with labels, got none"),
    ({}, [(X, Y)], "expected inputs that differ, got equal ones"),
    ({}, [(torch.ones(2, D + 1), Y)], "expected a tensor with last dimension 8"),
    ({}, [(X.double(), Y)], "expected torch.float32"),
    ({}, [(X / 0, Y)], "inputs: expected finite numbers"),
    ({}, [(torch.full((9, D), 1e38), torch.full((9,), 3))], "too large to add up"),
    ({}, [(X, torch.tensor([1, N]))], r"expected class indices in \[0, 40\)"),
    ({}, [(X, torch.ones(2, 3, 4))], "expected probabilities of shape"),
    ({}, [(X, -torch.ones(2, N))], "expected probabilities, got negative"),
]


@pytest.mark.parametrize(("arguments", "batches", "message"), REFUSED)
def test_refused_before_anything_changes(arguments, batches, message):
    layer = make()
    nn.functional.cross_entropy(layer(torch.randn(B, D)), torch.randint(N, (B,)))
    before = [p.detach().clone() for p in layer.parameters()], layer.tables.codes.clone()
    rng = torch.get_rng_state()
    if isinstance(batches, list):  # the fault comes after batches without one
        batches = [*([] if "expected inputs" in message else some_batches()), *batches]
        rng = torch.get_rng_state()
    with pytest.raises(ValueError, match=f"LSHLinear.init_from_class_means_: .*{message}"):
        layer.init_from_class_means_(batches, **arguments)
    assert all(map(torch.equal, before[0], layer.parameters()))
    assert torch.equal(before[1], layer.tables.codes) and torch.equal(rng, torch.get_rng_state())


def test_nothing_changes_where_an_encoder_fails():
    layer = make()
    before = layer.weight.detach().clone()
    with pytest.raises(RuntimeError, match="mine"):
        layer.init_from_class_means_(broken(some_batches(), RuntimeError("mine")))
    assert torch.equal(before, layer.weight)


def test_layers_that_it_is_not_for():
    hidden = LSHLinear(D, N, output="dense")
    with pytest.raises(ValueError, match="expected 'sampled', whose neurons are classes"):
        hidden.init_from_class_means_(some_batches())
    layer = make()
    with torch.no_grad():
        layer.weight[N - 1] = math.nan
    with pytest.raises(ValueError, match="classes without an example"):
        layer.init_from_class_means_(some_batches())
    assert not layer.tables.built
    nn.utils.parametrizations.orthogonal(layer := make())
    with pytest.raises(ValueError, match="expected a Parameter"):
        layer.init_from_class_means_(some_batches())
