"""Losses under other ways to differentiate: refused before anything changes where they have no rule."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from slide_torch import LSHFeedForward, LSHLinear, LSHOptions

_Y = torch.tensor([2, 5, 7, 2])
_SAMPLED = {
    "exact": LSHOptions(budget=40),
    "shared": LSHOptions(budget=6, tail=6, K=2, L=2),
    "per_sample": LSHOptions(
        pattern="per_sample", correction="importance", budget=6, tail=6, K=2, L=2
    ),
}
_COMPUTED = {
    "cross_entropy": lambda layer, block, x: F.cross_entropy(layer(x), _Y),
    "smoothed": lambda layer, block, x: F.cross_entropy(layer(x), _Y, label_smoothing=0.1),
    "binary": lambda layer, block, x: layer(x).binary_cross_entropy_with_logits(_Y),
    "hidden": lambda layer, block, x: block.first(x).square().sum(),
    "feed_forward": lambda layer, block, x: block(x).square().sum(),
}


def _dual(f, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def _twice(f, x):
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(f(x), x, create_graph=True)
    return torch.autograd.grad(gradient.sum(), x)[0]


_TRANSFORMS = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
    "jacfwd": lambda f, x: torch.func.jacfwd(f, randomness="same")(x),
    "grad": lambda f, x: torch.func.grad(f)(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](torch.tensor(1.0)),
    "vmap": lambda f, x: torch.func.vmap(f, randomness="same")(torch.stack([x, x])),
    "dual": _dual,
    "dual_without_grad": lambda f, x: torch.no_grad()(_dual)(f, x),
}


def layers(options):
    torch.manual_seed(0)
    layer = LSHLinear(8, 40, options=options)
    return layer, LSHFeedForward(8, 40, options=dataclasses.replace(options, correction="none"))


@pytest.mark.parametrize("transform", _TRANSFORMS)
@pytest.mark.parametrize("computed", _COMPUTED)
@pytest.mark.parametrize("options", _SAMPLED)
def test_transforms_are_refused_before_anything_changes(options, computed, transform):
    layer, block = layers(_SAMPLED[options])
    x = torch.randn(4, 8)
    state = torch.get_rng_state()
    with pytest.raises(
        NotImplementedError, match=r"expected backward\(\) or torch\.autograd\.grad"
    ):
        _TRANSFORMS[transform](lambda x: _COMPUTED[computed](layer, block, x), x)
    assert torch.equal(torch.get_rng_state(), state)
    assert layer.stats()["steps"] == block.first.stats()["steps"] == 0
    assert _COMPUTED[computed](layer, block, x).isfinite()  # nothing stays behind


@pytest.mark.parametrize("computed", _COMPUTED)
@pytest.mark.parametrize("options", _SAMPLED)
def test_a_second_derivative_is_refused(options, computed):
    layer, block = layers(_SAMPLED[options])
    f = lambda x: _COMPUTED[computed](layer, block, x)  # noqa: E731
    with pytest.raises(RuntimeError, match="differentiable once"):
        _twice(f, torch.randn(4, 8))
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.functional.hessian(f, torch.randn(4, 8))


@pytest.mark.parametrize("name", ["weight", "bias", "second_weight"])
def test_tangents_of_parameters_are_refused(name):
    layer, block = layers(_SAMPLED["shared"])
    module = block if name == "second_weight" else layer
    own = dict(module.named_parameters())
    x = torch.randn(4, 8)
    with forward_ad.dual_level(), torch.no_grad():
        given = own | {name: forward_ad.make_dual(own[name], torch.ones_like(own[name]))}
        with pytest.raises(NotImplementedError, match="forward-mode tangent"):
            output = torch.func.functional_call(module, given, (x,))
            F.cross_entropy(output, _Y)


@pytest.mark.parametrize("transform", _TRANSFORMS)
def test_all_logits_know_every_transform(transform):
    """Those of a layer in eval mode, and to_dense() of an exact one."""
    layer, _ = layers(_SAMPLED["exact"])
    linear = layer.to_linear()
    x = torch.randn(4, 8)
    wanted = _TRANSFORMS[transform](lambda x: F.cross_entropy(linear(x), _Y), x)
    dense = _TRANSFORMS[transform](lambda x: F.cross_entropy(layer(x).to_dense(), _Y), x)
    layer.eval()
    ours = _TRANSFORMS[transform](lambda x: F.cross_entropy(layer(x), _Y), x)
    torch.testing.assert_close(dense, wanted)
    torch.testing.assert_close(ours, wanted)
