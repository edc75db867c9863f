"""The lists that a query probes, the best of their rows, and how lists follow their rows."""

from __future__ import annotations

import itertools

import torch

from slide_torch import LSHOptions, ops
from slide_torch.prediction.partition import RowPartition, Search

from .case import Case, case
from .problem import Problem


@case
def rank_centers(p: Problem) -> Case:
    """Its arithmetic is of small integers: more than a bound by float32's rate allows."""
    tables = p.tables(LSHOptions())
    buckets = tables.family.buckets
    return Case(
        lambda: tables.family.query_codes(p.input, tables.options.probes),
        {"read": buckets.numel()},
        2 * p.batch * buckets.numel(),
    )


@case
def topk_lists(p: Problem) -> Case:
    tables = p.tables(LSHOptions())
    options, offsets = tables.options, tables.offsets[0].long()
    probes = tables.family.query_codes(p.input, options.probes).T.long().contiguous()
    sizes = offsets.diff()
    return Case(
        lambda: ops.topk_lists(
            p.input, p.weight, p.bias, offsets, tables.ids[0], tables.sq8.codes, tables.sq8.terms,
            probes, options.budget, 2 * options.budget,
        ),
        {"row_read": (p.width + 8) * sizes[probes.unique()].sum().item()},
        2 * p.width * sizes[probes].sum().item(),
    )  # fmt: skip


@case
def search_lists(p: Problem) -> Case:
    """Approximate prediction of the best 10 of 32 lists."""
    lists = RowPartition.build(p.weight, p.bias, seed=0)
    search = Search(k=10, probes=32, enough=lists.lists_holding(10), radius_weight=0.2, rescored=40)
    probed = lists.probes(p.input, 32, search.radius_weight)
    sizes = lists.offsets.diff()
    return Case(
        lambda: lists.best(p.input, p.weight, p.bias, search),
        {"row_read": (p.width + 8) * sizes[probed.unique()].sum().item()},
        2 * p.width * (p.batch * lists.lists + sizes[probed].sum().item()),
    )


@case
def move_codes_(p: Problem) -> Case:
    """A twentieth of the rows goes to the next bucket, or back."""
    tables = p.tables(LSHOptions())
    rows, codes = torch.arange(0, p.neurons, 20), tables.codes
    elsewhere = codes.index_copy(1, rows, (codes[:, rows] + 1) % (1 << tables.options.K))
    here, there = (ops.build_tables(own, tables.options.K) for own in (codes, elsewhere))
    turns = itertools.cycle([(here, there), (there, here)])

    def run() -> None:
        (old, _), (offsets, ids) = next(turns)
        ops.move_codes_(*tables.sq8, old[0].long(), offsets[0].long(), ids[0], rows)

    size = (p.width + 8) * p.neurons
    return Case(run, {"read": size, "write": size})


@case
def recode_rows_(p: Problem) -> Case:
    """Rows that a step changed."""
    tables = p.tables(LSHOptions())
    rows = p.shared.rows
    return Case(
        lambda: ops.recode_rows_(*tables.sq8, p.weight, p.bias, rows),
        {"row_read": p.row_bytes(rows), "row_update": (p.width + 8) * rows.numel()},
    )


@case
def coded_centers(p: Problem) -> Case:
    tables = p.tables(LSHOptions())
    codes, terms, _ = tables.sq8
    offsets = tables.offsets[0].long()
    return Case(
        lambda: ops.coded_centers(codes, terms, offsets, p.width, True),
        {"read": (p.width + 8) * p.neurons},
    )
