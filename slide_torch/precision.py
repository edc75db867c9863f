"""Computing with bfloat16 parameters: in float32, from copies of some rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import overload

import torch
from torch import Tensor

from . import ops
from .active_set import ActiveLayer

# Rows that are copied at a time where all are read.
ROWS_AT_ONCE = 65536

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def computed_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a layer with parameters of ``dtype`` computes in."""
    return torch.float32 if dtype == torch.bfloat16 else dtype


@overload
def widened(tensor: Tensor) -> Tensor: ...


@overload
def widened(tensor: None) -> None: ...


def widened(tensor: Tensor | None) -> Tensor | None:
    """A bfloat16 tensor as float32, others as they are."""
    return tensor if tensor is None or tensor.dtype != torch.bfloat16 else tensor.float()


def some_rows(
    weight: Tensor, bias: Tensor | None, rows: Tensor | slice
) -> tuple[Tensor, Tensor | None]:
    """Copies of some rows of ``weight`` (N, d) and of ``bias`` (N), in the dtype that is computed in."""
    return widened(weight[rows]), None if bias is None else widened(bias[rows])


def blocks(neurons: int) -> Iterator[slice]:
    """All rows, as many at a time as are copied at once."""
    for begin in range(0, neurons, ROWS_AT_ONCE):
        yield slice(begin, min(begin + ROWS_AT_ONCE, neurons))


def active_layer(weight: Tensor, bias: Tensor | None, rows: Tensor, sparse: bool) -> ActiveLayer:
    """What the operators over active sets, which know no bfloat16, are given for ``weight`` (N, d), ``bias``
    (N) and the active ``rows`` int64 (U).

    Of bfloat16 parameters, float32 copies of the active rows, as a layer of U neurons that are all active,
    whose gradient goes back to the parameters in bfloat16, row-sparse if ``sparse``; others as they are.
    """
    if weight.dtype != torch.bfloat16:
        return ActiveLayer(weight, bias, rows, sparse)
    own_bias = None if bias is None else ops.widened_rows(bias, rows, sparse)
    own_weight = ops.widened_rows(weight, rows, sparse)
    return ActiveLayer(own_weight, own_bias, torch.arange(rows.shape[0]), False)


def topk_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, k: int
) -> tuple[Tensor, Tensor]:
    """As :func:`slide_torch.ops.topk_linear`; ``weight`` and ``bias`` may be bfloat16 beside a float32
    ``input``."""
    if weight.dtype != torch.bfloat16:
        return ops.topk_linear(input, weight, bias, k)
    values = input.new_empty((input.shape[0], 0))
    indices = torch.empty((input.shape[0], 0), dtype=torch.int64)
    for block in blocks(weight.shape[0]):
        own = some_rows(weight, bias, block)
        best, rows = ops.topk_linear(input, *own, min(k, own[0].shape[0]))
        # stable: of equal values those of earlier blocks, the smaller ids, stay first
        values, order = torch.cat([values, best], 1).sort(dim=1, descending=True, stable=True)
        indices = torch.cat([indices, rows + block.start], 1).gather(1, order)
        values, indices = values[:, :k], indices[:, :k]
    return values, indices


def _some_lists(
    weight: Tensor, bias: Tensor | None, offsets: Tensor, rows: Tensor
) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor | None, Tensor, Tensor]]]:
    """Of some lists at a time, by ``offsets`` int64 (lists + 1) into ``rows`` int32: their rows, and weight,
    bias, offsets and rows as of copies of these."""
    first, lists = 0, offsets.shape[0] - 1
    while first < lists:
        begin = int(offsets[first])
        fitting = int(torch.searchsorted(offsets, begin + ROWS_AT_ONCE, right=True)) - 1
        last = max(first + 1, min(fitting, lists))
        own = rows[begin : int(offsets[last])].long()
        places = torch.arange(own.shape[0], dtype=torch.int32)
        yield own, (*some_rows(weight, bias, own), offsets[first : last + 1] - begin, places)
        first = last


def list_centers(
    weight: Tensor, bias: Tensor | None, offsets: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """As :func:`slide_torch.ops.list_centers`, of bfloat16 parameters too."""
    if weight.dtype != torch.bfloat16:
        return ops.list_centers(weight, bias, offsets, rows)
    parts = [ops.list_centers(*own) for _, own in _some_lists(weight, bias, offsets, rows)]
    return torch.cat([center for center, _ in parts]), torch.cat([radius for _, radius in parts])


def code_lists_(
    codes: Tensor,
    terms: Tensor,
    places: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    rows: Tensor,
) -> None:
    """As :func:`slide_torch.ops.code_lists_`, of bfloat16 parameters too."""
    if weight.dtype != torch.bfloat16:
        return ops.code_lists_(codes, terms, places, weight, bias, offsets, rows)
    places.fill_(-1)
    block = 0
    for some, own in _some_lists(weight, bias, offsets, rows):
        found = torch.empty(some.shape[0], dtype=torch.int32)
        ops.code_lists_(codes[block:], terms[block:], found, *own)
        places[some] = found + 16 * block
        block += int(own[2].diff().add_(15).div_(16, rounding_mode="floor").sum())


def recode_rows_(
    codes: Tensor, terms: Tensor, places: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor
) -> None:
    """As :func:`slide_torch.ops.recode_rows_`, of bfloat16 parameters too."""
    if weight.dtype != torch.bfloat16:
        return ops.recode_rows_(codes, terms, places, weight, bias, rows)
    own = torch.arange(rows.shape[0])
    ops.recode_rows_(codes, terms, places[rows], *some_rows(weight, bias, rows), own)
