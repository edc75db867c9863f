"""Operators that build tables, read them, and make active sets."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .library import fake, operators


def build_tables(codes: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes (L, N) -> packed buckets: offsets int32 (L, 2^bits + 1), ids int32 (L, N)."""
    return operators.build_tables(codes, bits)


@fake("build_tables")
def _(a: SimpleNamespace) -> Any:
    L, N = a.codes.shape
    offsets = a.codes.new_empty((L, (1 << a.bits) + 1), dtype=torch.int32)
    return offsets, a.codes.new_empty((L, N), dtype=torch.int32)


def update_codes_(codes: Tensor, rows: Tensor, fresh: Tensor) -> Tensor:
    """``codes[:, rows] = fresh`` in place; returns how many codes of each table changed, int64 (L)."""
    return operators.update_codes_(codes, rows, fresh)


@fake("update_codes_")
def _(a: SimpleNamespace) -> Any:
    return a.codes.new_empty((a.codes.shape[0],), dtype=torch.int64)


def retrieve(
    codes: Tensor,
    table_offsets: Tensor,
    table_ids: Tensor,
    label_offsets: Tensor,
    label_ids: Tensor,
    tail: Tensor,
    budget: int,
    bucket_cap: int,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Each sample's active set: its labels, the neurons that collide with it most often (both together
    up to ``budget``), then the tail. ``codes`` (L * probes, B) may ask each table more than once.

    Returns:
        offsets int64 (B + 1) into ``active``; active int32 (pairs); tail_starts int64 (B), where the
        tail's part of each sample begins, counted from the sample's start; label_positions int32
        (labels), likewise; ids_read int64 (1).
    """
    return operators.retrieve(
        codes, table_offsets, table_ids, label_offsets, label_ids, tail, budget, bucket_cap, seed
    )


@fake("retrieve")
def _(a: SimpleNamespace) -> Any:
    batch, pairs = a.codes.shape[1], torch.library.get_ctx().new_dynamic_size()
    return (
        a.codes.new_empty((batch + 1,), dtype=torch.int64),
        a.codes.new_empty((pairs,), dtype=torch.int32),
        a.codes.new_empty((batch,), dtype=torch.int64),
        a.codes.new_empty((a.label_ids.shape[0],), dtype=torch.int32),
        a.codes.new_empty((1,), dtype=torch.int64),
    )


def rerank(
    offsets: Tensor,
    active: Tensor,
    label_offsets: Tensor,
    label_positions: Tensor,
    tail: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    budget: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the candidates that :func:`retrieve` found without a tail, keeps those with the largest logits
    ``input @ weight.T + bias`` (labels and they up to ``budget``), largest first; then the tail. ``weight``
    may be bfloat16 beside float32 ``input`` and ``bias``.

    Returns:
        offsets int64 (B + 1), active int32 (pairs), tail_starts int64 (B), as :func:`retrieve`; labels keep
        their positions.
    """
    return operators.rerank(
        offsets, active, label_offsets, label_positions, tail, input, weight, bias, budget
    )


@fake("rerank")
def _(a: SimpleNamespace) -> Any:
    pairs = torch.library.get_ctx().new_dynamic_size()
    starts = a.offsets.new_empty((a.offsets.shape[0] - 1,))
    return torch.empty_like(a.offsets), a.active.new_empty((pairs,)), starts


def transpose_active(
    offsets: Tensor, active: Tensor, neurons: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sample-major active sets -> neuron-major: rows int64 (U), pair_offsets int64 (U + 1), and for each
    pair its position in ``active`` and its sample, int32 (pairs)."""
    return operators.transpose_active(offsets, active, neurons)


@fake("transpose_active")
def _(a: SimpleNamespace) -> Any:
    count = torch.library.get_ctx().new_dynamic_size()
    return (
        a.active.new_empty((count,), dtype=torch.int64),
        a.active.new_empty((count + 1,), dtype=torch.int64),
        torch.empty_like(a.active),
        torch.empty_like(a.active),
    )


def union_active(certain: Tensor, tail: Tensor, neurons: int) -> tuple[Tensor, Tensor]:
    """Distinct ids of both int32 lists, increasing: rows int64 (U), from_tail bool (U) where only the
    tail has it."""
    return operators.union_active(certain, tail, neurons)


@fake("union_active")
def _(a: SimpleNamespace) -> Any:
    count = torch.library.get_ctx().new_dynamic_size()
    rows = a.certain.new_empty((count,), dtype=torch.int64)
    return rows, a.certain.new_empty((count,), dtype=torch.bool)


def sample_tail(count: int, neurons: int, seed: int) -> Tensor:
    """``count`` distinct ids of [0, neurons), uniform, increasing; int32 (count)."""
    return operators.sample_tail(count, neurons, seed)


@fake("sample_tail")
def _(a: SimpleNamespace) -> Any:
    return torch.empty((a.count,), dtype=torch.int32)
