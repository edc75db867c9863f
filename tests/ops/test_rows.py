"""Operators on some rows: coalesced gradients, refused arguments, memory."""

import numpy as np
import pytest
import torch

from slide_torch import ops

OPS = torch.ops.slide_torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("row", [(), (19,), (3, 4), (64,)])
@pytest.mark.parametrize(
    "num_rows, entries",
    [(1, 9), (7, 500), (50_000, 3_000), (3_000_000, 40_000), (300, 20_000), (9, 0)],
)
def test_coalesce(dtype, row, num_rows, entries):
    generator = torch.Generator().manual_seed(num_rows)
    indices = torch.randint(num_rows, (entries,), generator=generator)
    values = torch.randn(entries, *row, generator=generator, dtype=dtype)
    rows, summed = ops.coalesce_rows(indices, values, num_rows)
    expected, inverse = indices.unique(return_inverse=True)
    assert torch.equal(rows, expected)
    # index_add_ adds in the order of the entries too.
    reference = torch.zeros(len(expected), *row, dtype=dtype).index_add_(0, inverse, values)
    assert torch.equal(summed, reference)


def test_operators_check_their_arguments():
    param, rows, grad = torch.ones(4, 3), torch.tensor([1, 2]), torch.ones(2, 3)
    cases = [
        (
            lambda: OPS.adagrad_rows_(param, torch.ones(4, 2), rows, grad, 0.1, 0.1, False),
            "sum: expected shape",
        ),
        (
            lambda: OPS.adagrad_rows_(param, param.double(), rows, grad, 0.1, 0.1, False),
            "sum: expected dtype",
        ),
        (
            lambda: OPS.adagrad_rows_(param, torch.ones(4, 3), rows.flip(0), grad, 0.1, 0.1, False),
            "strictly increasing",
        ),
        (
            lambda: OPS.adagrad_rows_(param, torch.ones(4, 3), rows + 2, grad, 0.1, 0.1, False),
            r"in \[0, 4\)",
        ),
        (
            lambda: OPS.adagrad_rows_(param, torch.ones(4, 3), rows, grad[:1], 0.1, 0.1, False),
            "grad_rows: expected 2 rows",
        ),
        (
            lambda: OPS.sgd_rows_(param, None, rows, grad, 0.1, 0.9, 0.0, False, False),
            "momentum_buffer",
        ),
        (
            lambda: OPS.adam_rows_(
                param, param, param, rows, grad, 0.1, 0.9, 0.9, 0.1, 0.0, 0, False
            ),
            "step",
        ),
        (lambda: OPS.coalesce_rows(rows, grad, 2), r"indices: expected values in \[0, 2\)"),
        (lambda: OPS.coalesce_rows(rows, grad[:1], 4), "values: expected shape"),
        (lambda: OPS.coalesce_rows(rows, grad.half(), 4), "Float or Double"),
        (lambda: OPS.advise_hugepages_(param.t()), "contiguous"),
    ]
    for call, message in cases:
        with pytest.raises(RuntimeError, match=message):
            call()
    assert param.eq(1).all()


def test_advise_hugepages_on_large_memory():
    tensor = torch.empty(3_000_001)
    assert ops.advise_hugepages_(tensor) is tensor
    assert ops.advise_hugepages_(torch.ones(3, 1000, 1000)[1:]).eq(1).all()


@pytest.mark.parametrize("width", [1, 7, 128, 131])
@pytest.mark.parametrize("dtype,bits", [(torch.float32, torch.int32), (torch.float64, torch.int64)])
def test_touch_rows(width, dtype, bits):
    tensor = torch.randn(4000, width, dtype=dtype)
    before, rows = tensor.clone().view(bits), torch.randperm(4000)[:3000].sort().values
    expected = np.bitwise_xor.reduce(before[rows].numpy(), axis=None)
    version = tensor._version
    assert ops.touch_rows_(tensor, rows, write=False).item() == expected
    assert tensor._version == version and torch.equal(tensor.view(bits), before)
    assert ops.touch_rows_(tensor, rows, write=True).item() == expected
    assert tensor._version > version
    inverted = before.clone()
    inverted[rows] = ~inverted[rows]
    assert torch.equal(tensor.view(bits), inverted)
