"""Small layers and optimizers whose layers gain or lose classes."""

import torch
import torch.nn.functional as F

import slide_torch
from slide_torch import LSHLinear, LSHOptions

N, D, B = 120, 8, 6
OPTIONS = {"budget": 5, "tail": 6, "K": 2, "L": 3, "rehash_every": 3}


def make_optimizer(name, parameters):
    slide, plain = slide_torch.optim, torch.optim
    return {
        "adam": lambda p: slide.Adam(p, lr=0.05),
        "fused": lambda p: slide.Adam(p, lr=0.05, fuse_backward=True),
        "small_moments": lambda p: slide.Adam(p, lr=0.05, moments_dtype=torch.bfloat16),
        "sgd": lambda p: slide.SGD(p, lr=0.05, momentum=0.9),
        "adagrad": lambda p: slide.Adagrad(p, lr=0.05, initial_accumulator_value=0.25),
        "torch_adam": lambda p: plain.Adam(p, lr=0.05, amsgrad=True),
        "torch_adamw": lambda p: plain.AdamW(p, lr=0.05),
        "torch_rprop": lambda p: plain.Rprop(p, lr=0.05),
        "torch_sparse_adam": lambda p: plain.SparseAdam(list(p), lr=0.05),
        "torch_sgd": lambda p: plain.SGD(p, lr=0.05, momentum=0.9),
        "torch_adagrad": lambda p: plain.Adagrad(p, lr=0.05, initial_accumulator_value=0.25),
    }[name](parameters)


def make(
    neurons=N,
    *,
    optimizer="adam",
    sparse=True,
    bias=True,
    dtype=torch.float32,
    counts=True,
    **options,
):
    options = LSHOptions(**{**OPTIONS, **options})
    layer = LSHLinear(D, neurons, bias, options=options, sparse=sparse, dtype=dtype)
    if counts:
        layer.set_frequencies(torch.arange(1.0, neurons + 1))
    return layer, make_optimizer(optimizer, layer.parameters())


def train(layer, optimizer, steps):
    """Losses; class ids of the data are of those that the layer has."""
    data, losses = torch.Generator(), []
    for step in steps:
        data.manual_seed(step)
        x = torch.randn(B, D, generator=data).to(layer.weight.dtype)
        loss = F.cross_entropy(layer(x), torch.randint(layer.out_features, (B,), generator=data))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)
