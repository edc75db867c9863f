"""Layers to predict with."""

import torch

from slide_torch import LSHLinear

DTYPES = (torch.float32, torch.float64)


def layer_of(N, d, dtype=torch.float32, bias=True):
    return LSHLinear(d, N, bias=bias, dtype=dtype)


def clustered(N=4000, d=24, clusters=60):
    """A layer whose rows form clusters, and inputs near some of them."""
    layer = layer_of(N, d)
    centers = torch.randn(clusters, d) * 2
    with torch.no_grad():
        layer.weight.copy_(centers[torch.randint(clusters, (N,))] + 0.3 * torch.randn(N, d))
        layer.bias.normal_()
    return layer, centers[torch.randint(clusters, (300,))] + 0.5 * torch.randn(300, d)
