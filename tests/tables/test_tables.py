"""Hash tables: buckets, the schedule of rehashes and rebuilds, sizes."""

import pytest
import reference
import torch
import torch.nn.functional as F
from helpers import make_tables

from slide_torch import HashTables, LSHLinear, LSHOptions, ops
from slide_torch.active_set import Labels
from slide_torch.sampling.draw import draw_active_set


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
@pytest.mark.parametrize("neurons,bits", [(1, 1), (50, 3), (5000, 9)])
def test_build_tables_holds_every_neuron_once(dtype, neurons, bits):
    codes = torch.randint(1 << bits, (4, neurons)).to(dtype)
    offsets, ids = ops.build_tables(codes, bits)
    assert ids.dtype == torch.int32 and ids.numel() == 4 * neurons
    for t, table in enumerate(reference.buckets(codes)):
        for c in range(1 << bits):
            found = ids[t, offsets[t, c] : offsets[t, c + 1]].tolist()
            assert found == table.get(c, [])


def test_build_tables_refuses_codes_out_of_range():
    for wrong in (-1, 8):
        codes = torch.zeros(2, 10, dtype=torch.int16)
        codes[1, 7] = wrong
        with pytest.raises(RuntimeError, match=r"\[0, 8\).*neuron 7"):
            ops.build_tables(codes, 3)


def test_update_codes():
    codes = torch.randint(8, (3, 20)).to(torch.int16)
    expected = codes.clone()
    rows = torch.tensor([3, 19, 4])
    fresh = torch.randint(8, (3, 3)).to(torch.int16)
    expected[:, rows] = fresh
    changed = (codes != expected).sum(1)
    moved = ops.update_codes_(codes, rows, fresh)
    assert torch.equal(codes, expected) and torch.equal(moved, changed)


def test_finds_near_neighbours():
    """A query that is a row finds that row, and high inner products far above chance."""
    options = LSHOptions(K=6, L=40, budget=64, tail=1)
    N, d = 4000, 32
    weight = torch.nn.functional.normalize(torch.randn(N, d), dim=1)
    tables = HashTables(options, N, d, has_bias=False)
    tables.rebuild(weight, None)
    x = weight[:100] + 0.05 * torch.randn(100, d)
    active = draw_active_set(tables, x, Labels.none(100, x.dtype))
    assert torch.isin(torch.arange(100), active.rows).all()


def test_schedule_and_dirty_rows():
    options = LSHOptions(K=4, L=6, rehash_every=3, rehash_growth=2.0, rebuild_every=2)
    tables, weight = make_tables(options)
    built = tables.family.seed
    happened = []
    for step in range(22):
        before = (tables.schedule.rehashes, tables.schedule.rebuilds)
        tables.maintain(weight, None, advance=True, all_rows_move=False)
        if (tables.schedule.rehashes, tables.schedule.rebuilds) != before:
            happened.append((step, tables.schedule.rebuilds))
    # after 3 steps, then 6 more (a rebuild), then 12 more
    assert happened == [(3, 1), (9, 2), (21, 2)]
    assert tables.family.seed != built

    rows = torch.tensor([5, 100])
    weight[rows] = -weight[rows]
    weight[200] = -weight[200]  # changed, but nobody was told
    tables.mark_dirty(rows)
    assert tables.stats()["dirty_share"] == pytest.approx(2 / 400)
    old = tables.codes.clone()
    tables.rehash(weight, None, rows=tables.dirty.nonzero().flatten())
    fresh = tables.family.row_codes(weight, None)
    assert torch.equal(tables.codes[:, rows], fresh[:, rows])
    assert torch.equal(tables.codes[:, 200], old[:, 200])
    assert not tables.dirty.any()
    for t, table in enumerate(reference.buckets(tables.codes)):
        for code, ids in table.items():
            found = tables.ids[t, tables.offsets[t, code] : tables.offsets[t, code + 1]]
            assert found.tolist() == ids


def test_rehash_refuses_nan_and_changes_nothing():
    tables, weight = make_tables(LSHOptions(K=4, L=6))
    before = {n: b.clone() for n, b in tables.tensors().items()}
    seed = tables.family.seed
    weight[7, 3] = float("nan")
    weight[300, 0] = float("inf")
    for action in (
        lambda: tables.rehash(weight, None),
        lambda: tables.rebuild(weight, None),
        lambda: tables.rehash(weight, None, rows=torch.tensor([6, 7, 300])),
    ):
        with pytest.raises(ValueError, match=r"2 of them \(7, 300\)"):
            action()
        after = tables.tensors()
        assert all(torch.equal(after[n], before[n]) for n in before)
        assert tables.family.seed == seed


def test_partial_rehash_keeps_other_marks():
    tables, weight = make_tables(LSHOptions(K=4, L=6))
    tables.mark_dirty(torch.tensor([1, 2, 3]))
    tables.rehash(weight, None, rows=torch.tensor([2]))
    assert tables.dirty.nonzero().flatten().tolist() == [1, 3]


@pytest.mark.parametrize("share", [0.7, 0.8])
def test_rehash_of_most_rows(share):
    """Whether these are gathered, or all are hashed, their codes and buckets are the same."""
    tables, weight = make_tables(LSHOptions(K=4, L=6))
    rows = torch.randperm(400)[: int(share * 400)].sort().values
    tables.mark_dirty(rows)
    weight[rows] = torch.randn(len(rows), weight.shape[1])
    mean_row = tables.family.mean_row.clone()
    tables.rehash(weight, None, rows=rows)
    assert torch.equal(tables.family.mean_row, mean_row)
    assert torch.equal(tables.codes, tables.family.row_codes(weight, None))
    offsets, ids = ops.build_tables(tables.codes, tables.family.bits)
    assert torch.equal(tables.offsets, offsets) and torch.equal(tables.ids, ids)
    assert not tables.dirty.any()


def test_marks_outlive_a_rehash_that_comes_before_the_change():
    """Gradients accumulated over two batches: the rehash falls between the marks and the update."""
    tables, weight = make_tables(LSHOptions(K=4, L=6, rehash_every=1, rehash_growth=1.0))
    tables.maintain(weight, None, advance=True, all_rows_move=False)
    tables.mark_dirty(torch.tensor([5]), weight._version)
    tables.maintain(weight, None, advance=True, all_rows_move=False)  # rehashes
    assert tables.dirty.nonzero().flatten().tolist() == [5]
    tables.mark_dirty(torch.tensor([7]), weight._version)
    weight[torch.tensor([5, 7])] *= -1.0  # the optimizer's step
    tables.maintain(weight, None, advance=True, all_rows_move=False)
    assert not tables.dirty.any()
    assert torch.equal(tables.codes, tables.family.row_codes(weight, None))


@pytest.mark.parametrize("family", ["simhash", "kmeans"])
def test_drift_schedule_rehashes_when_codes_have_moved(family):
    options = LSHOptions(family=family, K=4, L=1, schedule="drift", drift=0.2, rehash_every=3)
    tables, weight = make_tables(options)

    def steps(count):
        for _ in range(count):
            tables.maintain(weight, None, advance=True, all_rows_move=False)
        return tables.schedule.rehashes

    assert steps(20) == 0 and tables.stats()["drift_checks"] == 6
    assert tables.stats()["drift"] == 0
    moved = torch.arange(40)  # a tenth: too few
    weight[moved] *= -1
    tables.mark_dirty(moved)
    assert steps(3) == 0 and 0.01 < tables.stats()["drift"] <= 0.2
    assert tables.dirty.sum() == 40
    moved = torch.arange(40, 200)
    weight[moved] *= -1
    tables.mark_dirty(moved)
    assert steps(3) == 1 and tables.stats()["drift"] > 0.2
    assert not tables.dirty.any()
    # measured anew from there: the period does not grow, and what has moved before does not count
    checks = tables.stats()["drift_checks"]
    assert steps(31) == 1 and tables.stats()["drift_checks"] - checks >= 10
    assert tables.stats()["drift"] == 0


def test_drift_schedule_draws_nothing_and_is_off_by_default():
    plain, weight = make_tables(LSHOptions(K=4, L=6))
    assert "drift" not in plain.stats()
    tables, weight = make_tables(LSHOptions(K=4, L=6, schedule="drift", rehash_every=1))
    before = torch.get_rng_state()
    for _ in range(5):
        tables.maintain(weight, None, advance=True, all_rows_move=False)
    assert tables.schedule.drift_checks == 4 and torch.equal(torch.get_rng_state(), before)


def test_stats_tell_the_memory():
    tables, _ = make_tables(LSHOptions(K=4, L=6))
    sizes = [t.nbytes for t in tables.tensors().values()]
    assert tables.stats()["memory_bytes"] == sum(sizes) > 6 * 400 * 6


def test_memory_follows_the_neurons_where_buckets_are_many():
    options = LSHOptions(family="simhash", K=20, L=1, rerank=64, budget=5, tail=0, center=False)
    tables, weight = make_tables(options)
    offsets = 4 * ((1 << 20) + 1)
    blocks = 400 // 16 + 400  # a bucket's rows begin a block of 16
    row_copies = blocks * (16 * 16 + 2 * 16 * 4) + 400 * 4
    assert tables.memory_bytes() < offsets + row_copies + 20_000
    active = draw_active_set(tables, weight[:9], Labels.none(9, weight.dtype), weight=weight)
    assert torch.isin(torch.arange(9), active.rows).all()
    # wherever rows go, there is room
    weight.normal_()
    tables.rehash(weight, None)
    active = draw_active_set(tables, weight[:9], Labels.none(9, weight.dtype), weight=weight)
    assert torch.isin(torch.arange(9), active.rows).all()


@pytest.mark.parametrize(
    "given, most",
    [
        ({"family": "dwta", "K": 8}, 7),
        ({"family": "simhash", "K": 24, "L": 50}, 22),
        ({"family": "kmeans", "K": 16, "L": 254, "probes": 1}, 12),
    ],
)
def test_tables_of_absurd_size_are_refused(given, most):
    options = LSHOptions(budget=1, tail=0, **given)
    expected = rf"options\.K: expected at most {most} for 3 neurons .* bytes for all tables"
    with pytest.raises(ValueError, match=expected):
        HashTables(options, 3, 64, has_bias=True)
    HashTables(LSHOptions(budget=1, tail=0, **{**given, "K": most}), 3, 64, has_bias=True)
    # where every neuron is active there are none, unless they are called for
    tables = HashTables(LSHOptions(budget=3, **given), 3, 64, has_bias=False)
    with pytest.raises(ValueError, match=expected):
        tables.rebuild(torch.randn(3, 64), None)
    # with neurons enough for them, as many as one likes
    HashTables(options, 1 << 20, 64, has_bias=True)


@pytest.mark.parametrize("name", ["budget", "batch_budget", "tail", "rerank", "bucket_cap"])
def test_counts_beyond_the_operators_integers_are_refused(name):
    with pytest.raises(ValueError, match=rf"LSHOptions: {name}: expected .* got {2**62}"):
        LSHOptions(**{name: 2**62})
    layer = LSHLinear(8, 100, options=LSHOptions(**{name: 2**40}))
    assert F.cross_entropy(layer(torch.randn(4, 8)), torch.arange(4)).isfinite()
