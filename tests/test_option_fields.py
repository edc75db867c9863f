"""LSHOptions: fields that are refused, alone and together, and which numbers count as such."""

import math

import numpy as np
import pytest
import torch

from slide_torch import (
    LSHFeedForward,
    LSHLinear,
    LSHOptions,
    RecallProbe,
    tune,
)

N, D, B = 50, 8, 6


INT_FIELDS = dict(
    budget=-1, batch_budget=-1, tail=-1, K=0, L=255, bin_size=1, probes=0, rerank=-1, bucket_cap=0,
    rehash_every=0, rebuild_every=-1,
)  # fmt: skip


@pytest.mark.parametrize(
    "field,value,message",
    [
        *((name, bad, f"{name}: expected an int.*got {bad}") for name, bad in INT_FIELDS.items()),
        *((name, 1.5, f"{name}: expected an int.*got 1.5") for name in INT_FIELDS),
        *((name, True, f"{name}: expected an int.*got True") for name in INT_FIELDS),
        ("bin_size", 6, "bin_size: expected a power of two, got 6"),
        ("bin_size", "auto", "bin_size: expected an int"),
        ("pattern", "both", "pattern: expected one of .*'shared', 'per_sample'.*'both'"),
        ("correction", "yes", "correction: expected one of .*'importance'"),
        ("family", "faiss", "family: expected one of .*'dwta'"),
        ("projection", "dense", "projection: expected one of .*'gaussian'"),
        ("center", 1, "center: expected a bool, got 1"),
        ("augment_norms", 1, "augment_norms: expected a bool, got 1"),
        ("schedule", "fixed", "schedule: expected one of .*'drift'"),
        ("drift", 1.5, "drift: expected a number from 0 to 1, got 1.5"),
        ("drift", True, "drift: expected a number from 0 to 1, got True"),
        ("drift", float("nan"), "drift: expected a number from 0 to 1, got nan"),
        ("rehash_growth", 0.5, "rehash_growth: expected a number from 1 to 100 or 'auto', got 0.5"),
        ("rehash_growth", math.nan, "rehash_growth: expected a number"),
        ("rehash_growth", "2", "rehash_growth: expected a number"),
        ("rehash_growth", True, "rehash_growth: expected a number.*got True"),
        ("drift", np.float32(-1), "drift: expected a number.*got np.float32"),
        ("K", np.int64(0), "K: expected an int from 1 to .* or 'auto', got np.int64"),
        ("K", np.bool_(True), "K: expected an int.*got np.True_"),
        ("tail_distribution", "zipf", "tail_distribution: expected one of .*got 'zipf'"),
        ("tail_distribution", "quadratic_kernel", "tail_distribution: expected one of"),
        ("K", 25, "K: a table's code would have 25 bits, more than 24: expected K of at most 24"),
    ],
)
def test_options_fields(field, value, message):
    with pytest.raises(ValueError, match="LSHOptions: " + message):
        LSHOptions(**{field: value})


def test_options_together():
    with pytest.raises(ValueError, match="27 bits, more than 24: expected K of at most 8, got 9"):
        LSHOptions(family="dwta", K=9)
    for budget in ("auto", 5, 10**9):
        with pytest.raises(ValueError, match=r"'importance'.*expected tail of at least 1"):
            LSHOptions(correction="importance", tail=0, budget=budget)
    names = {f.name for f in LSHOptions.__dataclass_fields__.values()}
    tested = {
        *INT_FIELDS,
        "pattern",
        "correction",
        "family",
        "projection",
        "center",
        "augment_norms",
        "schedule",
        "drift",
        "rehash_growth",
        "tail_distribution",
    }
    assert names == tested, "a field without a test here"


INTEGERS = [np.int64, np.int32, np.uint8, np.array]


@pytest.mark.parametrize("integer", INTEGERS)
def test_integers_of_numpy(integer):
    """Taken wherever torch takes them, and kept as Python's: options are equal, and go into JSON."""
    sizes = dict(budget=4, tail=5, K=2, L=3, bin_size=8, probes=1, rerank=8, bucket_cap=9)
    sizes |= dict(rehash_every=7, rebuild_every=2, batch_budget=3)
    options = LSHOptions(**{name: integer(value) for name, value in sizes.items()})
    assert options == LSHOptions(**sizes) and hash(options) == hash(LSHOptions(**sizes))
    assert all(type(getattr(options, name)) is int for name in sizes)
    layer = LSHLinear(integer(D), integer(N), options=options)
    assert type(layer.in_features) is type(layer.out_features) is int
    block = LSHFeedForward(integer(D), integer(N), integer(3))
    assert (block.in_features, block.hidden_features, block.out_features) == (D, N, 3)
    assert LSHFeedForward(integer(D), 200).out_features == D
    x, k = torch.randn(4, D), integer(3)
    assert layer(x).topk(k).indices.shape == (4, 3)
    assert layer.recall(x, k) == layer.recall(x, 3)
    assert layer.calibrate(x, k, recall=np.float32(0.5)) >= 0.5
    for exact in (True, False):
        assert layer.predict(x, k, exact=exact)[1].shape == (4, 3)
    probe = RecallProbe(layer, every=integer(1), k=k, rows=integer(2))
    layer(x)
    assert "recall@3" in probe.measure(layer, x)
    settings = dict(settings=[options], queries=integer(8), batch=integer(2), seed=integer(1))
    assert tune(layer, x, np.float32(0.5), k=k, seconds=np.float32(9), **settings).k == 3


def test_numbers_of_numpy():
    options = LSHOptions(drift=np.float32(0.5), rehash_growth=np.int64(2))
    assert options == LSHOptions(drift=0.5, rehash_growth=2)
    assert all(type(v) in (int, float) for v in (options.drift, options.rehash_growth))
