"""A layer in training, its SampledLogits, and the dense logits that they are compared with."""

import torch
import torch.nn.functional as F

from slide_torch import LSHLinear, LSHOptions

N, D = 30, 8


def make(leading=(6,), *, dtype=torch.float64, sparse=False, bias=True, **options):
    """A layer in training, an input, its SampledLogits and the dense logits; all neurons active
    unless ``options`` say otherwise."""
    torch.set_num_threads(1)  # for such small problems two are slower
    options = LSHOptions(**(options or {"budget": N}))
    layer = LSHLinear(D, N, bias, options=options, sparse=sparse, dtype=dtype)
    with torch.no_grad():
        layer.weight.mul_(3)
    x = torch.randn(*leading, D, dtype=dtype, requires_grad=True)
    return layer, x, layer(x), F.linear(x, layer.weight, layer.bias)


def same(ours, theirs, layer, x):
    """Values and gradients agree to rounding of float64."""
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    wanted = [p for p in (x, layer.weight, layer.bias) if p is not None]
    of = torch.randn_like(theirs)
    mine = torch.autograd.grad(ours, wanted, of, retain_graph=True)
    other = torch.autograd.grad(theirs, wanted, of, retain_graph=True)
    for one, two in zip(mine, other, strict=True):
        one = one.to_dense() if one.is_sparse else one
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-11)
