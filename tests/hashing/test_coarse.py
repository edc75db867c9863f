"""Buckets in groups: what a query finds in the best groups, beside what it finds among all buckets."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from slide_torch import HashTables, LSHOptions, ops
from slide_torch.hashing.coarse import CoarseLists
from slide_torch.hashing.kmeans import CentroidGroups, group_centroids

PROBES = 8


def clustered(rows=6000, heads=60, d=24):
    means = F.normalize(torch.randn(heads, d), dim=1)
    return means[torch.arange(rows) % heads] + 0.3 * torch.randn(rows, d)


def built(L=1, dtype=torch.float32):
    """Tables with 512 buckets, in groups, over clustered rows, and the rows."""
    options = LSHOptions(family="kmeans", K=9, L=L, probes=PROBES, budget=10)
    weight = clustered().to(dtype)
    tables = HashTables(options, weight.shape[0], weight.shape[1], has_bias=False)
    tables.rebuild(weight, None, generator=torch.Generator().manual_seed(1))
    return tables, weight


def among_all(family, input, probes):
    """The codes of an input compared with every bucket."""
    query = torch.cat([input, 0.2 * input.norm(dim=1, keepdim=True)], 1)
    return ops.nearest_centroids(query, None, None, None, family.buckets, None, probes)


@pytest.mark.parametrize("L", [1, 2])
def test_queries_find_nearly_the_best_of_all_buckets(L):
    tables, weight = built(L)
    queries = weight[::40] + 0.1 * torch.randn(150, 24)
    found = tables.family.query_codes(queries, PROBES)
    best = among_all(tables.family, queries, PROBES)
    assert found.dtype == best.dtype and found.shape == best.shape
    for table in range(L):
        own = slice(table * PROBES, (table + 1) * PROBES)
        assert (found[own].sort(0).values.diff(dim=0) > 0).all()  # all different
        shared = (found[own].T[:, :, None] == best[own].T[:, None, :]).any(2)
        assert shared.float().mean() > 0.8  # a quarter of all buckets: at random, 0.25
        assert (found[own][0] == best[own][0]).float().mean() > 0.95


def test_looking_into_all_groups_finds_the_best():
    """The best lie in the groups looked at, and are ordered by exact scores."""
    tables, _ = built()
    buckets = tables.family.buckets
    groups = group_centroids(tables.family.centroids[0])
    lists = CoarseLists.of(buckets, buckets[0], *groups)
    queries = torch.randn(33, 24)
    length = queries.norm(dim=1, keepdim=True)
    probes = 130  # as many as need all groups
    assert lists.looked_at(probes) == lists.groups
    found = lists.best(torch.cat([queries, 0.2 * length], 1), length, probes)
    best = among_all(tables.family, queries, probes).long()
    shared = (found.T[:, :, None] == best.T[:, None, :]).any(2)
    assert shared.float().mean() > 0.98  # int8 scores decide which are the last
    assert torch.equal(found[:60], best[:60])


def test_empty_buckets_come_last():
    buckets = torch.randn(512, 9)
    buckets[::2, -1] = -1e9
    groups = CentroidGroups(torch.arange(0, 513, 16), torch.arange(512, dtype=torch.int32))
    lists = CoarseLists.of(buckets[None], buckets, *groups)
    queries = torch.randn(20, 8)
    length = queries.norm(dim=1, keepdim=True)
    found = lists.best(torch.cat([queries, 0.2 * length], 1), length, 20)
    assert (found % 2 == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_broken_inputs_have_no_codes(dtype):
    tables, _ = built(dtype=dtype)
    queries = torch.randn(9, 24, dtype=dtype)
    whole = tables.family.query_codes(queries, PROBES)
    queries[3, 5], queries[7, 0] = torch.nan, torch.inf
    found = tables.family.query_codes(queries, PROBES)
    assert (found[:, [3, 7]] == -1).all()
    others = [0, 1, 2, 4, 5, 6, 8]
    assert torch.equal(found[:, others], whole[:, others])


def test_lists_follow_the_buckets():
    """After a rehash they are those of the new buckets, as they are in tables that are made anew, and in
    copies."""
    tables, weight = built()
    queries = torch.randn(20, 24)
    tables.family.query_codes(queries, PROBES)
    weight[::3] = weight[::3].flip(0)
    tables.mark_dirty(torch.arange(0, weight.shape[0], 3), weight._version)
    tables.rehash(weight, None)
    found = tables.family.query_codes(queries, PROBES)
    fresh = CoarseLists.of(
        tables.family.buckets,
        tables.family.buckets[0],
        tables.family.group_offsets[0],
        tables.family.group_members[0],
    )
    length = queries.norm(dim=1, keepdim=True)
    expected = fresh.best(torch.cat([queries, length * 0.2], 1), length, PROBES)
    assert torch.equal(found.long(), expected)
    for other in (copy.deepcopy(tables), pickle.loads(pickle.dumps(tables))):
        assert torch.equal(other.family.query_codes(queries, PROBES), found)


def test_the_same_at_any_number_of_threads():
    tables, _ = built()
    queries = torch.randn(200, 24)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = tables.family.query_codes(queries, PROBES)
        torch.set_num_threads(4)
        assert torch.equal(tables.family.query_codes(queries, PROBES), one)
    finally:
        torch.set_num_threads(threads)
