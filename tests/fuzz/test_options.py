"""Options of any values: refused by name, or a layer that trains, in memory that its neurons account for."""

import pytest
import torch
import torch.nn.functional as F

from slide_torch import LSHLinear, LSHOptions, optim
from slide_torch.options import FAMILIES, TAIL_DISTRIBUTIONS

CHOICES = {
    "pattern": ["shared", "per_sample"],
    "correction": ["none", "importance"],
    "family": ["auto", "exact", *FAMILIES],
    "projection": ["auto", "hadamard", "gaussian"],
    "center": [True, False],
    "augment_norms": [True, False],
    "schedule": ["growing", "drift"],
    "tail_distribution": [*TAIL_DISTRIBUTIONS, TAIL_DISTRIBUTIONS, TAIL_DISTRIBUTIONS[1:3]],
    "budget": [0, 1, 5, 30, 10**9],
    "batch_budget": [0, 1, 5, 10**9],
    "tail": [0, 1, 5, 10**9],
    "K": [1, 2, 3, 5, 8, 12, 16, 20, 24],
    "L": [1, 2, 5, 50, 254],
    "bin_size": [2, 4, 8, 64, 2**16],
    "probes": [1, 2, 10, 254],
    "rerank": [0, 1, 8, 64, 10**9],
    "bucket_cap": [1, 3, 100, 10**12],
    "rehash_every": [1, 2, 10**9],
    "rehash_growth": [1, 1.5, 100],
    "rebuild_every": [0, 1, 2, 10**9],
    "drift": [0, 0.5, 1],
}
WRONG = [
    None,
    -1,
    0,
    0.5,
    1e300,
    float("nan"),
    float("inf"),
    2**63,
    True,
    "text",
    (),
    [1],
    object(),
]
# a bucket's offset is read each step: more of them than this make cases slow, not wrong
MOST_BUCKETS = 1 << 22


def test_options(fuzz):
    trained = refused = 0

    def check(draw):
        nonlocal trained, refused
        given = {}
        for name in draw.sample(sorted(CHOICES), draw.randrange(8)):
            wrong = draw.random() < 0.05
            given[name] = draw.choice(WRONG if wrong else CHOICES[name])
        neurons = draw.choice([1, 2, 3, 17, 100, 1000])
        features = draw.choice([1, 2, 3, 8, 33])
        try:
            options = LSHOptions(**given)
            if draw.random() < 0.3 and options.correction == "none":
                options = options.for_hidden_layer(neurons)
            settled = options.resolve(neurons, features)
            if settled.family != "exact" and settled.L << settled.code_bits > MOST_BUCKETS:
                refused += 1
                if settled.L << settled.code_bits > 1 << 29:
                    with pytest.raises(ValueError, match=r"HashTables: options\.K"):
                        LSHLinear(features, neurons, options=options).rebuild()
                return
            layer = LSHLinear(features, neurons, options=options, sparse=draw.random() < 0.5)
        except ValueError as error:
            assert "LSHOptions" in str(error) and "expected" in str(error), str(error)
            refused += 1
            return
        if "frequencies" in options.tail_parts:
            layer.set_frequencies(torch.rand(neurons) + 0.01)
        optimizer = optim.SGD(layer.parameters(), lr=0.01)
        for _ in range(3):
            batch = draw.choice([1, 2, 5])
            loss = F.cross_entropy(
                layer(torch.randn(batch, features)), torch.randint(neurons, (batch,))
            )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            assert loss.isfinite()
        layer.recall(torch.randn(2, features), 1)
        stats = layer.stats()
        assert stats["steps"] == 3 or not layer.tables.uses_tables
        trained += 1

    fuzz(check)
    assert trained > 0 and trained + refused > 20
