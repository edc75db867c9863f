"""Parameters that are resized or computed by hooks are refused, with advice."""

import pytest
import torch
import torch.nn.functional as F
from refusals import SAMPLED, D, N, X, Y, make

from slide_torch import LSHFeedForward, LSHLinear, LSHOptions, tune


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
