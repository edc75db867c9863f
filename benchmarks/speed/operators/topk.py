"""The lists that a query probes, and the best of their rows."""

from __future__ import annotations

from slide_torch import LSHOptions, ops

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
