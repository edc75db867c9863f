"""Tables, and the active sets that they give."""

from __future__ import annotations

import torch

from slide_torch import ops

from .case import Case, case
from .problem import Problem


@case
def build_tables(p: Problem) -> Case:
    codes = p.codes("simhash")()
    traffic = {"read": codes.nbytes, "write": 4 * codes.numel()}
    return Case(lambda: ops.build_tables(codes, 6), traffic)


@case
def update_codes_(p: Problem) -> Case:
    codes, rows = p.codes("simhash")(), p.sample.rows
    fresh = codes[:, rows].contiguous()
    traffic = {"read": fresh.nbytes, "update": 2 * fresh.nbytes}
    return Case(lambda: ops.update_codes_(codes, rows, fresh), traffic)


@case
def retrieve(p: Problem) -> Case:
    tables, labels = p.sample_tables, p.labels
    codes = tables.family.query_codes(p.input)
    ids, no_tail = labels.ids.int(), torch.empty(0, dtype=torch.int32)
    options = tables.options
    traffic = {"read": 4 * p.sample.ids_read, "write": p.sample.active.nbytes}
    return Case(
        lambda: ops.retrieve(
            codes, tables.offsets, tables.ids, labels.offsets, ids, no_tail,
            options.budget, options.bucket_cap, 0,
        ),
        traffic,
    )  # fmt: skip


@case
def transpose_active(p: Problem) -> Case:
    s = p.sample
    traffic = {"read": s.active.nbytes, "write": 2 * s.active.nbytes + 16 * s.rows.numel()}
    return Case(lambda: ops.transpose_active(s.offsets, s.active, p.neurons), traffic)


@case
def union_active(p: Problem) -> Case:
    tail = ops.sample_tail(min(1024, p.neurons // 4), p.neurons, 0)
    traffic = {"read": p.sample.active.nbytes, "write": 9 * p.sample.rows.numel()}
    return Case(lambda: ops.union_active(p.sample.active, tail, p.neurons), traffic)
