"""Active sets, and the operators that make them: against brute force."""

import time

import pytest
import reference
import torch
from helpers import make_tables

from slide_torch import HashTables, LSHOptions, ops
from slide_torch.active_set import Labels, SampleActiveSets, SharedActiveSet
from slide_torch.sampling.draw import draw_active_set

EMPTY = torch.empty(0, dtype=torch.int32)


def labels_of(lists):
    offsets = torch.tensor([0, *[len(x) for x in lists]]).cumsum(0)
    return offsets, torch.tensor([i for x in lists for i in x], dtype=torch.int32)


def brute_force(row_codes, query_codes, lists, tail, budget):
    """Each sample's active set by full counting; candidates that tie at the budget's edge are a pool."""
    result = []
    counts = reference.collision_counts(row_codes.long(), query_codes.long())
    for b, labels in enumerate(lists):
        own = list(dict.fromkeys(labels))
        room = max(0, budget - len(own))
        candidates = [i for i in counts[b].argsort(descending=True).tolist()]
        candidates = [i for i in candidates if counts[b, i] > 0 and i not in own]
        edge = counts[b, candidates[room - 1]] if 0 < room <= len(candidates) else 0
        surely = [i for i in candidates if counts[b, i] > edge] if room else []
        pool = [i for i in candidates if counts[b, i] == edge] if room else []
        result.append((set(own), set(surely), set(pool), min(room, len(candidates)), set(tail)))
    return result


@pytest.mark.parametrize("budget", [0, 1, 5, 12, 200])
@pytest.mark.parametrize("with_tail", [False, True])
def test_retrieve_equals_brute_force(budget, with_tail):
    N, B, L, bits = 120, 23, 6, 3
    codes = torch.randint(1 << bits, (L, N)).to(torch.int16)
    queries = torch.randint(1 << bits, (L, B)).to(torch.int16)
    lists = [torch.randint(N, (i % 4,)).tolist() + ([5, 5] if i == 7 else []) for i in range(B)]
    tail = torch.tensor([0, 5, 33, 70, 119], dtype=torch.int32) if with_tail else EMPTY
    label_offsets, label_ids = labels_of(lists)
    offsets, ids = ops.build_tables(codes, bits)
    start, active, tail_starts, positions, _ = ops.retrieve(
        queries, offsets, ids, label_offsets, label_ids, tail, budget, 10**6, 0
    )
    expected = brute_force(codes, queries, lists, tail.tolist(), budget)
    for b, (own, surely, pool, room, tail_set) in enumerate(expected):
        mine = active[start[b] : start[b + 1]].tolist()
        assert len(set(mine)) == len(mine)
        head, rest = mine[: tail_starts[b]], mine[tail_starts[b] :]
        assert set(head[: len(own)]) == own
        candidates = set(head[len(own) :])
        assert len(candidates) == room and surely <= candidates <= surely | pool
        assert set(rest) == tail_set - set(head)
        for i in range(label_offsets[b], label_offsets[b + 1]):
            assert mine[positions[i]] == label_ids[i]


def test_bucket_cap_bounds_what_is_read_and_favours_no_id():
    N, B = 1000, 400
    codes = torch.zeros(1, N, dtype=torch.int16)
    queries = torch.zeros(1, B, dtype=torch.int16)
    offsets, ids = ops.build_tables(codes, 1)
    none = torch.zeros(B + 1, dtype=torch.int64)
    _, active, _, _, ids_read = ops.retrieve(queries, offsets, ids, none, EMPTY, EMPTY, 10, 10, 123)
    assert ids_read.item() == 10 * B
    thirds = torch.bincount(active.long() // 334, minlength=3)
    assert (thirds > 0.25 * 10 * B).all()


def test_defective_query_finds_nothing():
    codes = torch.zeros(2, 5, dtype=torch.int16)
    offsets, ids = ops.build_tables(codes, 1)
    queries = torch.tensor([[0, -1], [0, -1]], dtype=torch.int16)
    none = torch.zeros(3, dtype=torch.int64)
    start, *_ = ops.retrieve(queries, offsets, ids, none, EMPTY, EMPTY, 9, 9, 0)
    assert start.tolist() == [0, 5, 5]


@pytest.mark.parametrize(
    "neurons,batch,mean",
    [(1, 3, 1), (7, 5, 3), (256, 9, 60), (1000, 17, 60), (100_000, 9, 500), (70_001, 60, 1200)],
)
def test_transpose_active(neurons, batch, mean):
    lists = [torch.randperm(neurons)[: min(neurons, mean + b) * (b != 4)] for b in range(batch)]
    offsets = torch.tensor([0, *[len(x) for x in lists]]).cumsum(0)
    active = torch.cat(lists).to(torch.int32)
    rows, pair_offsets, positions, samples = ops.transpose_active(offsets, active, neurons)
    assert torch.equal(rows, active.long().unique())
    sample_of = torch.arange(batch).repeat_interleave(offsets.diff())
    assert torch.equal(sample_of[positions.long()].int(), samples)
    owner = torch.arange(len(rows)).repeat_interleave(pair_offsets.diff())
    assert torch.equal(active[positions.long()].long(), rows[owner])
    assert torch.equal(positions.sort().values.long(), torch.arange(len(active)))
    assert (positions.diff()[owner.diff() == 0] > 0).all()  # a neuron's pairs by sample


def test_union_active():
    certain = torch.tensor([5, 3, 5, 129, 64], dtype=torch.int32)
    tail = torch.tensor([0, 3, 63, 129], dtype=torch.int32)
    rows, from_tail = ops.union_active(certain, tail, 130)
    assert rows.tolist() == [0, 3, 5, 63, 64, 129]
    assert from_tail.tolist() == [True, False, False, True, False, False]
    assert ops.union_active(EMPTY, EMPTY, 5)[0].numel() == 0


def test_sample_tail_is_uniform():
    """All ids equally often, all distinct, increasing; every id when all are asked for."""
    N, n, draws = 50, 20, 3000
    counts = torch.zeros(N)
    pairs = torch.zeros(N, N)
    for seed in range(draws):
        ids = ops.sample_tail(n, N, seed).long()
        assert len(ids) == n and (ids.diff() > 0).all() and ids[0] >= 0 and ids[-1] < N
        counts[ids] += 1
        pairs[ids[:, None], ids] += 1
    p = n / N
    assert ((counts / draws - p).abs() < 5 * (p * (1 - p) / draws) ** 0.5).all()
    q = n * (n - 1) / (N * (N - 1))
    off = ~torch.eye(N, dtype=torch.bool)
    assert ((pairs[off] / draws - q).abs() < 6 * (q * (1 - q) / draws) ** 0.5).all()
    assert torch.equal(ops.sample_tail(N, N, 1), torch.arange(N, dtype=torch.int32))
    assert ops.sample_tail(0, N, 1).numel() == 0


@pytest.mark.parametrize("pattern", ["shared", "per_sample"])
@pytest.mark.parametrize("family", ["simhash", "dwta"])
def test_active_sets_do_not_depend_on_threads(pattern, family, both_thread_counts):
    options = LSHOptions(pattern=pattern, family=family, budget=20, tail=50, K=3, L=10)

    def run():
        weight, x = torch.randn(3000, 40), torch.randn(70, 40)
        tables = HashTables(options, 3000, 40, has_bias=False)
        tables.rebuild(weight, None)
        labels = Labels(torch.arange(71), torch.arange(70), torch.ones(70))
        return draw_active_set(tables, x, labels)

    one, two = both_thread_counts(run)
    for name in one.__dataclass_fields__:
        a, b = getattr(one, name), getattr(two, name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_importance_weights_count_the_unseen():
    """exp(log_weight) summed over a sample's active set is N: each inactive class is stood for."""
    N, B = 400, 8
    labels = Labels(torch.arange(B + 1), torch.arange(B), torch.ones(B))
    for pattern in ("shared", "per_sample"):
        options = LSHOptions(pattern=pattern, correction="importance", budget=10, tail=30, K=4, L=6)
        tables, _ = make_tables(options)
        active = draw_active_set(tables, torch.randn(B, 16), labels)
        if isinstance(active, SharedActiveSet):
            totals = active.log_weight.exp().sum().expand(B)
        else:
            assert isinstance(active, SampleActiveSets)
            sample = torch.arange(B).repeat_interleave(active.offsets.diff())
            totals = torch.zeros(B).index_add(0, sample, active.log_weight.exp())
        assert torch.allclose(totals, torch.full((B,), float(N)), rtol=1e-5)
        # labels are included for certain
        assert (active.log_weight[active.label_places] == 0).all()


def test_retrieve_takes_many_labels_in_linear_time():
    """Every class a label: positions are found without searching. Of 16 times as many labels a search, even
    a vectorised one, would take 256 times as long."""
    fastest = []
    for N in (25_000, 400_000):
        codes = torch.zeros(1, 1, dtype=torch.int16)
        offsets, ids = ops.build_tables(torch.zeros(1, N, dtype=torch.int16), 1)
        labels, of_sample = torch.arange(N, dtype=torch.int32), torch.tensor([0, N])
        times = []
        for _ in range(7):
            started = time.perf_counter()
            _, active, _, positions, _ = ops.retrieve(
                codes, offsets, ids, of_sample, labels, EMPTY, 5, 5, 0
            )
            times.append(time.perf_counter() - started)
        assert torch.equal(active, labels) and torch.equal(positions, labels)
        fastest.append(min(times))
    assert fastest[1] < 80 * fastest[0]


@pytest.mark.parametrize("options", [dict(K=4, L=6), dict(K=4, L=1, rerank=20)])
def test_tables_that_are_not_built_are_not_drawn_from(options):
    tables = HashTables(LSHOptions(budget=5, **options), 400, 16, has_bias=False)
    x = torch.randn(3, 16)
    with pytest.raises(RuntimeError, match="expected built tables, got none: call rebuild"):
        draw_active_set(tables, x, Labels.none(3, x.dtype), weight=torch.randn(400, 16))
