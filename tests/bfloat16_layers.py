"""A layer with parameters in bfloat16, and its losses."""

import copy

import torch
import torch.nn.functional as F

from slide_torch import LSHLinear, LSHOptions

BF16 = torch.bfloat16
N, D, B = 300, 24, 16
PATTERNS = {
    "shared": {},
    "importance": {"correction": "importance"},
    "kmeans": {"family": "kmeans", "K": 4, "L": 1, "probes": 2, "rerank": 40},
    "per_sample": {"pattern": "per_sample"},
    "per_sample_reranked": {"pattern": "per_sample", "rerank": 40, "correction": "importance"},
    "exact_candidates": {"family": "exact"},
    "per_sample_log_uniform": {
        "tail_distribution": "log_uniform",
        "correction": "importance",
        "pattern": "per_sample",
    },
    "augmented": {"augment_norms": True, "center": True},
}


def make(*, bias=True, sparse=False, dtype=BF16, budget=20, **options):
    torch.manual_seed(0)
    options = {"tail": 12, "K": 3, "L": 4, "family": "simhash", "rehash_every": 2, **options}
    return LSHLinear(
        D, N, bias, options=LSHOptions(budget=budget, **options), sparse=sparse, dtype=dtype
    )


def batch(seed=1, dtype=BF16):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(B, D, generator=generator).to(dtype)
    return x, torch.randint(N, (B,), generator=generator)


def float_twin(layer):
    """A float32 layer with the rounded weights."""
    return copy.deepcopy(layer).float()


def cross_entropy(logits, y):
    return F.cross_entropy(logits, y)


def backward(layer, x, y, loss_of):
    x = x.clone().requires_grad_()
    torch.manual_seed(3)
    loss = loss_of(layer(x), y)
    loss.backward()
    return loss.detach(), [x.grad, *(p.grad for p in layer.parameters())]
