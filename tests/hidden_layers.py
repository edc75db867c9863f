"""Small hidden layers, and what their tests share."""

import torch

from slide_torch import LSHFeedForward, LSHLinear, LSHOptions

N, D, OUT, B = 60, 8, 5, 7
PATTERNS = ["shared", "per_sample"]
OPTIONS = {pattern: LSHOptions(pattern=pattern, budget=9, K=2, L=6) for pattern in PATTERNS}


def linear(pattern="per_sample", **arguments):
    return LSHLinear(D, N, output="dense", **{"options": OPTIONS[pattern], **arguments})


def feed_forward(pattern="per_sample", **arguments):
    return LSHFeedForward(D, N, OUT, **{"options": OPTIONS[pattern], **arguments})


def gradients(loss, tensors):
    return [g.to_dense() for g in torch.autograd.grad(loss, tensors)]


def close(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
