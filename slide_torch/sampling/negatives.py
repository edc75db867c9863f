"""Neurons that a caller names: lists of ids, and an active set with negatives of the caller's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from .candidates import no_tables

PADDING = -100


def check_lists(
    ids: Any, leading: torch.Size, name: str, argument: str, *, whole_batch: bool
) -> None:
    """Checks type, dtype and shape of lists of neurons; :func:`padded_lists` checks the values too.

    Args:
        leading: shape of the samples.
        whole_batch: whether one list (M) for all samples may stand for (\\*leading, M).

    Raises:
        ValueError: they are no such lists.
    """
    if not isinstance(ids, Tensor) or ids.device.type != "cpu" or ids.layout != torch.strided:
        got = type(ids).__name__
        if isinstance(ids, Tensor):
            got = f"one on {ids.device}, layout {ids.layout}"
        raise ValueError(f"{name}: {argument}: expected a strided CPU tensor, got {got}")
    if ids.dtype != torch.int64:
        raise ValueError(
            f"{name}: {argument}: expected int64 class indices, got {ids.dtype}: convert it with .long()"
        )
    by_row = ids.dim() == len(leading) + 1 and ids.shape[:-1] == leading
    if not by_row and not (whole_batch and ids.dim() == 1):
        one = "(M,) for the whole batch, or " if whole_batch else ""
        raise ValueError(
            f"{name}: {argument}: expected shape {one}{(*leading, 'M')} padded with {PADDING}, got "
            f"{tuple(ids.shape)}"
        )


def padded_lists(
    ids: Tensor,
    leading: torch.Size,
    neurons: int,
    name: str,
    argument: str,
    *,
    whole_batch: bool = False,
) -> Tensor:
    """Lists of neurons as (B, M), or (1, M) where the whole batch shares one, padded with :data:`PADDING`.

    Raises:
        ValueError: wrong type, shape or dtype, or an id outside [0, N) that is no padding.
    """
    check_lists(ids, leading, name, argument, whole_batch=whole_batch)
    wrong = ids[((ids < 0) & (ids != PADDING)) | (ids >= neurons)]
    if wrong.numel():
        raise ValueError(
            f"{name}: {argument}: expected class indices in [0, {neurons}) or {PADDING} (padding), got "
            f"{int(wrong[0])} ({wrong.numel()} such ids)"
        )
    rows = leading.numel() if ids.shape[:-1] == leading else 1
    return ids.detach().reshape(rows, ids.shape[-1])


def with_negatives(
    offsets: Tensor, active: Tensor, negatives: Tensor, tail: Tensor, neurons: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Active sets of samples, int64 offsets (B + 1) into ids int32, with each one's negatives (B or 1, M) and
    then the tail, int32, added: offsets and ids, and where in each sample the tail begins, int64 (B). What is
    there already keeps its place."""
    batch = offsets.shape[0] - 1
    negatives = negatives.expand(batch, -1)
    lengths, given = offsets.diff(), negatives != PADDING
    both = torch.zeros(batch + 1, dtype=torch.int64)
    torch.cumsum(lengths + given.sum(1), 0, out=both[1:])
    certain = torch.empty(int(both[-1]), dtype=torch.int32)
    shift = (both - offsets)[:-1].repeat_interleave(lengths)
    certain[torch.arange(active.shape[0]) + shift] = active
    places = (both[:-1] + lengths).unsqueeze(1) + given.cumsum(1) - 1
    certain[places[given]] = negatives[given].to(torch.int32)
    # as labels of a search without tables: each counts once
    codes, table_offsets, table_ids = no_tables(batch, neurons)
    offsets, active, tail_starts, _, _ = ops.retrieve(
        codes, table_offsets, table_ids, both, certain, tail, 0, 0, 0
    )
    return offsets, active, tail_starts
