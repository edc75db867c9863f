"""A small layer in training, of which a refused call must change nothing."""

import pytest
import torch
import torch.nn.functional as F

from slide_torch import LSHLinear, LSHOptions

N, D, B = 50, 8, 6
X, Y = torch.zeros(B, D), torch.zeros(B, dtype=torch.int64)
SAMPLED = dict(budget=4, tail=5, K=2, L=3)
PATTERNS = ["shared", "per_sample"]


def make(**options):
    torch.set_num_threads(1)  # for such small problems two are slower
    layer = LSHLinear(D, N, options=LSHOptions(**{**SAMPLED, **options}))
    x = torch.randn(B, D)
    y = torch.randint(N, (B,))
    F.cross_entropy(layer(x), y).backward()  # tables, gradients and one step of the schedule
    return layer, x, y


def state(layer):
    """Everything a refused call must leave as it was."""
    tables = layer.tables
    tensors = [
        *layer.parameters(),
        *(p.grad for p in layer.parameters() if p.grad is not None),
        *tables.tensors().values(),
    ]
    tensors += [torch.get_rng_state()]
    counters = tables.schedule.counters()
    return [t.clone() for t in tensors], counters, tables.family, [t._version for t in tensors[:2]]


def refused(layer, call, error, message):
    before = state(layer)
    with pytest.raises(error, match=message):
        call()
    after = state(layer)
    for old, new in zip(before[0], after[0], strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0, equal_nan=True)
    assert before[1:] == after[1:]
