"""All hash families behind one interface: their laws of collision, probes, norms."""

import itertools
import math

import pytest
import reference
import torch
from helpers import hash_family as make

from slide_torch import HashTables, LSHOptions, ops
from slide_torch.active_set import Labels
from slide_torch.options import FAMILIES
from slide_torch.sampling.draw import draw_active_set

# --- what holds for every family ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", FAMILIES)
def test_interface(family, dtype):
    """Shapes, dtypes, range; the same from the same seed; rows picked; length plays no part."""
    w, b = torch.randn(70, 40, dtype=dtype), torch.randn(70, dtype=dtype)
    made, twin, other = (make(family, augment_norms=False, seed=s) for s in (5, 5, 6))
    for one in (made, twin, other):
        one.fit(w, b)
    codes = made.row_codes(w, b)
    assert codes.shape == (5, 70) and codes.dtype == torch.int16
    assert codes.min() >= 0 and codes.max() < 1 << made.bits
    assert torch.equal(codes, twin.row_codes(w, b))
    assert not torch.equal(codes, other.row_codes(w, b))
    rows = torch.tensor([69, 0, 7, 7])
    assert torch.equal(made.row_codes(w, b, rows), codes[:, rows])
    assert made.row_codes(w, b, rows[:0]).shape == (5, 0)
    x = torch.randn(9, 40, dtype=dtype)
    queries = made.query_codes(x)
    made.mean_row = None
    assert torch.equal(made.query_codes(x), queries)  # they are not centered
    assert torch.equal(queries, made.row_codes(x, x.new_ones(9)))
    assert torch.equal(made.row_codes(w, b), made.row_codes(w * 4, b * 4))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_defective_rows_and_queries(family, value):
    made = make(family)
    w, b = torch.randn(37, 40), torch.randn(37)
    made.fit(w, b)
    expected = made.row_codes(w, b)
    w[3, 17] = value
    b[11] = value
    codes = made.row_codes(w, b)
    broken = torch.zeros(37, dtype=torch.bool)
    broken[[3, 11]] = True
    assert (codes[:, broken] == -1).all()
    assert torch.equal(codes[:, ~broken], expected[:, ~broken])
    queries = made.query_codes(w, 4)
    assert (queries[:, 3] == -1).all() and (queries[::4, 4] >= 0).all()
    tables = HashTables(LSHOptions(family=family, K=3, L=5), 37, 40, has_bias=True)
    with pytest.raises(ValueError, match=r"2 of them \(3, 11\)"):
        tables.rebuild(w, b)
    assert not tables.built


@pytest.mark.parametrize("family", FAMILIES)
def test_independent_of_threads(family, both_thread_counts):
    options = LSHOptions(family=family, budget=8, tail=4, rerank=100, K=4, L=3)

    def run():
        w, b, x = torch.randn(3000, 40), torch.randn(3000), torch.randn(70, 40)
        tables = HashTables(options, 3000, 40, has_bias=True)
        tables.rebuild(w, b)
        active = draw_active_set(tables, x, Labels.none(70, x.dtype), weight=w, bias=b)
        return tables.codes, tables.family.query_codes(x), active.rows

    for one, two in zip(*both_thread_counts(run), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("family", FAMILIES)
def test_probes_are_distinct_and_start_with_the_own_bucket(family):
    made = make(family, L=7)
    made.fit(torch.randn(200, 40), torch.randn(200))
    x = torch.randn(37, 40)
    for probes in (1, 2, 6, 30):
        codes = made.query_codes(x, probes)
        assert codes.shape == (7 * probes, 37)
        assert torch.equal(codes[::probes], made.query_codes(x))
        by_table = codes.view(7, probes, 37)
        if probes > 1:  # a shorter search is the beginning of a longer one
            assert torch.equal(by_table[:, :2], made.query_codes(x, 2).view(7, 2, 37))
        for table, query in itertools.product(range(7), range(37)):
            own = by_table[table, :, query]
            there = own[own >= 0]
            assert len(there.unique()) == len(there) <= min(probes, 1 << made.bits)
            assert (own[len(there) :] == -1).all()
            if family != "dwta":  # a DWTA hash knows a runner-up only
                assert len(there) == min(probes, 1 << made.bits)


@pytest.mark.parametrize("family", ["simhash", "kmeans"])
def test_norm_augmentation_is_one_more_coordinate(family):
    """Rows get sqrt(M^2 - norm^2) behind their bias, queries 0: as hashed_rows says."""
    own = dict(projection="gaussian") if family == "simhash" else {}
    made = make(family, augment_norms=True, **own)
    w, b = torch.randn(90, 40, dtype=torch.float64) + 1, torch.randn(90, dtype=torch.float64)
    made.fit(w, b)
    rows = torch.cat([w, b[:, None]], 1)
    rows = rows - rows.mean(0)
    bound = rows.norm(dim=1).quantile(0.9)
    torch.testing.assert_close(made.norm_bound, bound)
    last = (bound**2 - rows.norm(dim=1) ** 2).clamp(min=0).sqrt()
    expected = torch.cat([rows, last[:, None]], 1)
    torch.testing.assert_close(ops.hashed_rows(w, b, None, made.mean_row, bound.item()), expected)
    functions = made.centroids if family == "kmeans" else made.matrix
    if family == "kmeans":
        of_rows = (expected @ functions.double().transpose(1, 2)).argmax(2)
    else:
        of_rows = reference.pack_bits(expected @ functions.double().T > 0, 3, 5)
    assert torch.equal(made.row_codes(w, b).long(), of_rows)
    x = torch.randn(9, 40, dtype=torch.float64)
    query = torch.cat([x, torch.ones(9, 1), torch.zeros(9, 1)], 1)
    if family == "kmeans":
        of_queries = (query @ functions.double().transpose(1, 2)).argmax(2)
    else:
        of_queries = reference.pack_bits(query @ functions.double().T > 0, 3, 5)
    assert torch.equal(made.query_codes(x).long(), of_queries)


# --- SimHash probes: Lv et al. 2007 ---------------------------------------------------------------


def test_simhash_probes_by_rising_cost():
    """Against all subsets of bits, by the sum of their squared projections."""
    made = make("simhash", K=5, L=4, projection="gaussian", has_bias=False)
    x = torch.randn(11, 40, dtype=torch.float64)
    values = reference.simhash_dense_values(x, None, made.matrix).view(11, 4, 5)
    subsets = torch.tensor(list(itertools.product([0, 1], repeat=5)))
    costs = (values[:, :, None] ** 2 * subsets).sum(3)
    flips = (subsets << torch.arange(5)).sum(1)
    base = made.query_codes(x).long()
    expected = base.T[:, :, None] ^ flips[costs.argsort(dim=2)]
    found = made.query_codes(x, 32).view(4, 32, 11).long().permute(2, 0, 1)
    assert torch.equal(found, expected)


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(family="lsh"), "family: expected one of"),
        (dict(probes=0), "probes: expected an int from 1 to 254 or 'auto', got 0"),
        (dict(L=50, probes=6), r"L \* probes of at most 254, got 50 \* 6 = 300"),
        (dict(family="kmeans", K=17), "more than 16: expected K of at most 16"),
        (dict(family="cross_polytope"), "family: expected one of .*got 'cross_polytope'"),
        (dict(family="dwta", K=9), "27 bits, more than 24: expected K of at most 8"),
        (dict(rerank=-1), "rerank: expected an int from 0"),
        (dict(budget=100, rerank=99), "rerank: expected 0 or at least the budget, 100, got 99"),
        (dict(augment_norms=1.5), "augment_norms: expected a bool"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        LSHOptions(**options)
