"""Hidden layers, LSHLinear(output="dense") and LSHFeedForward: active sets, training, states, refusals."""

import copy
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT
from hidden_layers import OPTIONS, OUT, PATTERNS, B, D, N, close, feed_forward, gradients, linear
from torch import nn
from torch.utils.checkpoint import checkpoint

from slide_torch import LSHFeedForward, LSHLinear, LSHOptions, load_sampler_state, sampler_state
from slide_torch.optim import Adam
from slide_torch.sampling.candidates import candidates

pytestmark = pytest.mark.usefixtures("one_thread")

EXACT = LSHOptions(budget=N)


# --- what is active -------------------------------------------------------------------------------


def test_per_sample_sets_are_those_of_the_tables():
    options = LSHOptions(
        pattern="per_sample", budget=40, K=4, L=3
    )  # all that collide: no ties to break
    layer, x = linear(options=options), torch.randn(B, D)
    y = layer(x)
    assert type(y) is torch.Tensor and y.shape == (B, N) and y.is_contiguous()
    offsets, ids = candidates(layer.tables, layer.weight, layer.bias, x)
    mask = torch.zeros(B, N, dtype=torch.bool)
    mask[torch.arange(B).repeat_interleave(offsets.diff()), ids] = True
    assert 0 < mask.sum(1).max() < 40 and len(mask.unique(dim=0)) > 1
    assert torch.equal(y != 0, mask)
    close([y], [F.linear(x, layer.weight, layer.bias) * mask])
    assert layer.stats()["active_per_sample"] == mask.sum() / B


def test_a_shared_set_is_the_most_retrieved():
    options = LSHOptions(budget=40, batch_budget=9, K=4, L=3)
    layer, x = linear(options=options), torch.randn(B, D)
    y = layer(x)
    _, ids = candidates(layer.tables, layer.weight, layer.bias, x)
    times = ids.bincount(minlength=N)
    ranked = sorted(range(N), key=lambda row: (-int(times[row]), row))
    mask = torch.zeros(N, dtype=torch.bool)
    mask[ranked[:9]] = True
    assert int((times > 0).sum()) > 9
    assert torch.equal(y != 0, mask.expand(B, N))
    close([y], [F.linear(x, layer.weight, layer.bias) * mask])


def test_batch_budget_in_an_output_layer_leaves_labels_and_tail():
    options = LSHOptions(budget=9, batch_budget=4, tail=3, K=2, L=6)
    layer = LSHLinear(D, N, options=options)
    labels = torch.arange(B)
    F.cross_entropy(layer(torch.randn(B, D)), labels).backward()
    active = layer.weight.grad.abs().sum(1) > 0
    assert active[labels].all() and B < active.sum() <= B + 4 + 3


def test_budget_0_with_a_tail_is_a_random_set():
    layer = linear(options=LSHOptions(budget=0, tail=11, pattern="per_sample"))
    sets = [layer(torch.randn(B, D)) != 0 for _ in range(2)]
    assert all((s == s[0]).all() and s[0].sum() == 11 for s in sets)
    assert not torch.equal(*sets) and not layer.tables.built


def test_defaults():
    for layer in (LSHLinear(D, 1000, output="dense"), LSHFeedForward(D, 1000).first):
        options = layer.tables.options
        assert (options.pattern, options.budget, options.tail) == ("per_sample", 50, 0)
    shared = LSHOptions().for_hidden_layer(1001)
    assert (shared.budget, shared.batch_budget, shared.tail) == (51, 51, 0)
    assert LSHLinear(D, N).output == "sampled"


# --- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS)
def test_tables_follow(pattern):
    options = LSHOptions(pattern=pattern, budget=9, K=2, L=6, rehash_every=3)
    layer = feed_forward(options=options, sparse=True)
    tables = layer.first.tables
    optimizer = Adam(layer.parameters(), lr=0.5)
    touched = torch.zeros(N, dtype=torch.bool)
    for step in range(4):
        before = tables.schedule.rehashes
        loss = layer(torch.randn(B, D)).pow(2).sum()
        optimizer.zero_grad()
        loss.backward()
        rows = layer.first.weight.grad._indices()[0]
        assert torch.equal(rows, layer.second_weight.grad._indices()[0])
        touched[rows] = True
        if tables.schedule.rehashes > before:
            touched.fill_(False)[rows] = True
        assert torch.equal(tables.dirty, touched), step
        optimizer.step()
    assert tables.schedule.steps == 4 and tables.schedule.rehashes == 1


@pytest.mark.parametrize("moments_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_it_learns(pattern, moments_dtype):
    """A disc in a ring: no linear map tells them apart."""
    x = torch.randn(400, 2)
    y = (x.norm(dim=1) > 1.18).long()
    options = LSHOptions(pattern=pattern, budget=64)
    model = nn.Sequential(nn.Linear(2, D), LSHFeedForward(D, 256, 2, options=options, sparse=True))
    optimizer = Adam(model.parameters(), lr=0.01, moments_dtype=moments_dtype)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    model[-1].first.eval_active = "budget"
    accuracy = (model.eval()(x).argmax(1) == y).float().mean()
    assert accuracy > 0.8 > (y == y.mode().values).float().mean() + 0.1


def test_eval():
    x = torch.randn(B, D)
    layer = feed_forward().eval()
    hidden = F.linear(x, layer.first.weight, layer.first.bias).relu()
    close([layer(x)], [F.linear(hidden, layer.second_weight.T, layer.second_bias)])
    alone = linear().eval()
    assert torch.equal(alone(x), F.linear(x, alone.weight, alone.bias))
    assert not alone.tables.built


@pytest.mark.parametrize("pattern", PATTERNS)
def test_eval_within_the_budget(pattern):
    x = torch.randn(B, D)
    layer = linear(pattern, eval_active="budget")
    layer(x)
    state, steps = torch.get_rng_state(), layer.tables.schedule.steps
    with torch.no_grad():
        found = [layer.eval()(x) for _ in range(3)]
    assert torch.equal(state, torch.get_rng_state()) and layer.tables.schedule.steps == steps
    assert all(torch.equal(found[0], other) for other in found)
    assert 0 < (found[0] != 0).sum(1).max() <= 9


# --- with the rest of PyTorch ---------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(D,), (0, D), (2, 0, D), (2, 3, D)])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_shapes(pattern, shape):
    x = torch.randn(shape, requires_grad=True)
    for layer, width in ((linear(pattern), N), (feed_forward(pattern), OUT)):
        y = layer(x)
        assert y.shape == (*shape[:-1], width) and y.isfinite().all()
        y.sum().backward()
        assert x.grad.shape == shape


def test_state_dicts():
    layer = linear()
    layer(torch.randn(B, D))
    nn.Linear(D, N).load_state_dict(layer.state_dict(), strict=True)
    other = nn.Linear(D, N)
    layer.load_state_dict(other.state_dict(), strict=True)
    assert not layer.tables.built and torch.equal(layer.weight, other.weight)
    pair, copied = feed_forward(), feed_forward()
    copied.load_state_dict(pair.state_dict(), strict=True)
    assert all(map(torch.equal, pair.parameters(), copied.parameters()))
    assert list(pair.state_dict()) == [
        "second_weight",
        "second_bias",
        "first.weight",
        "first.bias",
    ]


@pytest.mark.parametrize("bias", [False, True])
def test_from_and_to_linears(bias):
    first, second = nn.Linear(D, N, bias), nn.Linear(N, OUT, bias)
    layer = LSHFeedForward.from_linears(first, second, activation=F.gelu, sparse=True)
    x = torch.randn(B, D)
    expected = second(F.gelu(first(x)))
    assert layer.first.weight is first.weight and layer.second_bias is second.bias
    assert layer.first.sparse and layer.first.output == "dense" and layer.training
    close([layer.eval()(x)], [expected])
    one, two = layer.to_linears()
    assert type(one) is type(two) is nn.Linear and one.weight is first.weight
    assert repr(two) == repr(second)
    assert torch.equal(two(F.gelu(one(x))), expected)


def test_initialised_as_two_linears():
    torch.manual_seed(3)
    layer = feed_forward()
    first = (layer.first.weight.clone(), layer.second_weight.clone())
    torch.manual_seed(3)
    linears = nn.Linear(D, N), nn.Linear(N, OUT)
    assert torch.equal(first[0], linears[0].weight)
    for mine, theirs in ((first[1], linears[1].weight), (layer.second_bias, linears[1].bias)):
        assert mine.abs().max() <= N**-0.5 and 0.7 < mine.std() / theirs.std() < 1.4
    torch.manual_seed(3)
    layer.reset_parameters()
    assert torch.equal(layer.first.weight, first[0]) and torch.equal(layer.second_weight, first[1])


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_go_on_alike(how):
    layer = feed_forward(eval_active="budget")
    x = torch.randn(B, D)
    layer(x)
    other = how(layer)
    assert repr(other) == repr(layer) and "eval_active='budget'" in repr(layer)
    outputs = []
    for one in (layer, other):
        torch.manual_seed(1)
        outputs.append(one(x))
    assert torch.equal(*outputs) and other.first.tables is not layer.first.tables


def test_sampler_state():
    model = nn.Sequential(feed_forward(), LSHLinear(OUT, N, output="dense"))
    x = torch.randn(B, D)
    model(x)
    other = nn.Sequential(feed_forward(), LSHLinear(OUT, N, output="dense"))
    other.load_state_dict(model.state_dict())
    saved = sampler_state(model)
    assert saved.keys() == {"0.first", "1"}
    load_sampler_state(other, saved)
    outputs = []
    for one in (model, other):
        torch.manual_seed(1)
        outputs.append(one(x))
    assert torch.equal(*outputs)


def test_autocast():
    body = nn.Sequential(nn.Linear(D, D), feed_forward(), nn.Linear(OUT, D), linear())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = body(torch.randn(B, D))
        y.sum().backward()
    assert y.dtype == torch.float32
    assert all(p.grad is not None and p.grad.isfinite().all() for p in body.parameters())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_activation_checkpointing_draws_the_same_set(pattern):
    found = []
    for recompute in (False, True):
        torch.manual_seed(2)
        layer = feed_forward(pattern)
        x = torch.randn(B, D, requires_grad=True)
        y = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        y.pow(2).sum().backward()
        found.append([y, x.grad, *(p.grad for p in layer.parameters())])
        assert layer.first.tables.schedule.steps == 1
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("pattern,sparse", [("shared", True), ("per_sample", False)])
def test_compile(pattern, sparse):
    last = LSHLinear(OUT, N, options=OPTIONS[pattern], sparse=sparse, output="dense")
    model = nn.Sequential(feed_forward(pattern, sparse=sparse), last)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    for count in (B, B + 2):
        x = torch.randn(count, D)
        found = []
        for one in (model, compiled):
            torch.manual_seed(1)
            loss = one(x).pow(2).sum()
            loss.backward()
            found.append([loss.detach(), *(p.grad.to_dense() for p in one.parameters())])
            for p in one.parameters():
                p.grad = None
        close(*found)


def test_pointwise_convolution_of_the_docs():
    """docs/hidden.md's recipe is nn.Conv2d(..., kernel_size=1)."""
    text = (ROOT / "docs" / "hidden.md").read_text()
    (code,) = re.findall(r"```python\n(class PointwiseConv.*?)```", text, re.S)
    namespace = {"nn": nn, "LSHLinear": LSHLinear, "LSHOptions": LSHOptions}
    exec(code, namespace)
    conv, x = nn.Conv2d(D, N, 1), torch.randn(2, D, 3, 4, requires_grad=True)
    layer = namespace["PointwiseConv"](D, N, options=EXACT)
    conv_state = conv.state_dict()
    layer.linear.load_state_dict(conv_state | {"weight": conv_state["weight"].flatten(1)})
    weights = torch.randn(2, N, 3, 4)
    found, expected = ((m(x) * weights).sum() for m in (layer, conv))
    close(gradients(found, [x, layer.linear.bias]), gradients(expected, [x, conv.bias]))
    few = namespace["PointwiseConv"](D, N, options=OPTIONS["per_sample"])(x)
    assert few.shape == (2, N, 3, 4) and (few != 0).sum(1).max() == 9


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"output": "sparse"}, "output: expected 'sampled' or 'dense', got 'sparse'"),
        ({"eval_active": "some"}, "eval_active: expected 'all' or 'budget', got 'some'"),
        ({"output": "sampled", "eval_active": "budget"}, "eval_active: expected 'all' with output"),
        ({"options": LSHOptions(correction="importance")}, "correction: expected 'none', got"),
        ({"options": LSHOptions(budget=0)}, "budget: expected at least 1 without a tail, got 0"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        LSHLinear(D, N, **{"output": "dense", **arguments})
    with pytest.raises(ValueError, match=message):
        LSHLinear.from_linear(nn.Linear(D, N), **{"output": "dense", **arguments})


def test_feed_forward_refuses():
    with pytest.raises(ValueError, match="activation: expected a callable, got 'relu'"):
        feed_forward(activation="relu")
    with pytest.raises(ValueError, match=r"expected nn.PReLU\(num_parameters=1\), got 60"):
        feed_forward(activation=nn.PReLU(N))
    with pytest.raises(ValueError, match="out_features: expected an int of at least 1, got 0"):
        LSHFeedForward(D, N, 0)
    with pytest.raises(ValueError, match="activation: expected an elementwise function, got one"):
        feed_forward(activation=lambda z: z[:1])(torch.randn(B, D))
    with pytest.raises(ValueError, match=r"second: expected in_features 60, .*, got 61"):
        LSHFeedForward.from_linears(nn.Linear(D, N), nn.Linear(N + 1, D))
    with pytest.raises(ValueError, match=r"first: expected nn\.Linear, got ReLU"):
        LSHFeedForward.from_linears(nn.ReLU(), nn.Linear(N, D))
    with pytest.raises(ValueError, match="batch_budget: expected 'auto' or 0 with pattern"):
        LSHOptions(pattern="per_sample", batch_budget=3)


def test_wrong_inputs_change_nothing():
    for layer in (linear(), feed_forward()):
        inputs = torch.randn(B, D + 1), torch.randn(B, D).double()
        state = torch.get_rng_state()
        for wrong in inputs:
            with pytest.raises(ValueError, match="input: expected"):
                layer(wrong)
        tables = layer.tables if isinstance(layer, LSHLinear) else layer.first.tables
        assert torch.equal(state, torch.get_rng_state()) and not tables.built
