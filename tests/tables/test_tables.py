"""Hash tables, retrieval, active sets: against brute force."""

import time

import pytest
import reference
import torch
import torch.nn.functional as F

import slide_torch
from slide_torch import HashTables, LSHFeedForward, LSHLinear, LSHOptions, RecallProbe, ops
from slide_torch.active_set import Labels, SampleActiveSets, SharedActiveSet
from slide_torch.sampling.draw import draw_active_set

EMPTY = torch.empty(0, dtype=torch.int32)


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


def make_tables(options, N=400, d=16):
    weight = torch.randn(N, d)
    tables = HashTables(options, N, d, has_bias=False)
    tables.rebuild(weight, None)
    return tables, weight


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


@pytest.mark.parametrize("options", [dict(K=4, L=6), dict(K=4, L=1, rerank=20)])
def test_tables_that_are_not_built_are_not_drawn_from(options):
    tables = HashTables(LSHOptions(budget=5, **options), 400, 16, has_bias=False)
    x = torch.randn(3, 16)
    with pytest.raises(RuntimeError, match="expected built tables, got none: call rebuild"):
        draw_active_set(tables, x, Labels.none(3, x.dtype), weight=torch.randn(400, 16))


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


INFERENCE_CASES = {
    "default": {},
    "kmeans": {"family": "kmeans", "K": 3, "L": 2, "probes": 2},
    "groups": {"family": "kmeans", "K": 9, "L": 1, "probes": 4},
    "simhash": {"family": "simhash", "K": 3, "L": 4, "rebuild_every": 2},
    "searched": {"family": "simhash", "K": 3, "L": 1, "rerank": 50},
    "per_sample": {"pattern": "per_sample", "K": 3, "L": 4, "budget": 5},
    "augment_norms": {"K": 3, "L": 4, "augment_norms": True},
    "drift": {"K": 3, "L": 4, "schedule": "drift", "drift": 0.0},
    "frequencies": {"tail_distribution": "frequencies", "correction": "importance"},
    "log_uniform": {"tail_distribution": ("uniform", "log_uniform")},
    "exact": {"family": "exact"},
}


def train(layer, steps=4):
    optimizer = slide_torch.optim.Adam(layer.parameters(), lr=0.1)
    for step in range(steps):
        torch.manual_seed(step)
        loss = F.cross_entropy(layer(torch.randn(8, 16)), torch.randint(400, (8,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.detach()


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("case", INFERENCE_CASES)
def test_what_is_built_in_inference_mode_trains_on(case, sparse):
    """As what is built under no_grad, bit for bit."""

    def run(mode):
        torch.manual_seed(0)
        options = LSHOptions(**{"tail": 6, "rehash_every": 1, **INFERENCE_CASES[case]})
        layer = LSHLinear(16, 400, options=options, sparse=sparse)
        x = torch.randn(8, 16)
        with mode():
            layer.set_frequencies(torch.rand(400) + 0.1)
            layer.recall(x.clone())
            layer.calibrate(x.clone(), 3)
            layer(x.clone()).topk(3)
            F.cross_entropy(layer(x.clone()), torch.arange(8))
        result = [train(layer)]
        with mode():
            layer.rehash()
            F.cross_entropy(layer(x.clone()), torch.arange(8))
            layer.rebuild()
            state = layer.tables.sampler_state(layer.weight, layer.bias)
            layer.tables.load_sampler_state(state, layer.weight)
        assert not any(tensor.is_inference() for tensor in layer.tables.tensors().values())
        result.append(train(layer))
        with mode():
            layer.calibrate(x.clone(), 3)
        return torch.stack([*result, layer.weight.sum().detach()]), layer.predict(x, 3, exact=False)

    (found, (values, indices)), (expected, best) = run(torch.inference_mode), run(torch.no_grad)
    assert torch.equal(found, expected) and found.isfinite().all()
    assert torch.equal(values, best[0]) and torch.equal(indices, best[1])


def test_hidden_layers_and_probes_in_inference_mode():
    options = LSHOptions(pattern="shared", K=3, L=4, rehash_every=1)
    body = LSHFeedForward(16, 300, options=options, eval_active="budget")
    head = LSHLinear(16, 400)
    probe = RecallProbe(head, every=1)
    x = torch.randn(8, 16)
    with torch.inference_mode():
        body.eval()(x.clone())
        probe.measure(head, x.clone())
    model = torch.nn.Sequential(body, head).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(4):
        F.cross_entropy(model(x), torch.arange(8)).backward()
        optimizer.step()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_a_layer_made_in_inference_mode_predicts_and_says_why_it_does_not_train():
    with torch.inference_mode():
        layer = LSHLinear(16, 400)
        hidden = LSHLinear(16, 400, output="dense", eval_active="budget")
        x = torch.randn(8, 16)
        assert hidden.eval()(x).shape == (8, 400)
        assert layer.calibrate(x, 3) >= 0.95 and 0 <= layer.recall(x) <= 1
        assert F.cross_entropy(layer(x), torch.arange(8)).isfinite()
    x = torch.randn(8, 16)
    assert layer.predict(x, 3)[0].shape == (8, 3)
    advice = r"linear_weight: expected a normal tensor, got one made in torch.inference_mode\(\)"
    for call in (
        lambda: F.cross_entropy(layer(x), torch.arange(8)),
        lambda: F.binary_cross_entropy_with_logits(layer(x), torch.zeros(8, 400)),
        lambda: hidden.train()(x),
    ):
        with pytest.raises(ValueError, match=advice):
            call()
    with torch.inference_mode():
        made = torch.randn(8, 16)
    with pytest.raises(ValueError, match="input: expected a normal tensor"):
        F.cross_entropy(LSHLinear(16, 400)(made), torch.arange(8))


@pytest.mark.parametrize("name", ["budget", "batch_budget", "tail", "rerank", "bucket_cap"])
def test_counts_beyond_the_operators_integers_are_refused(name):
    with pytest.raises(ValueError, match=rf"LSHOptions: {name}: expected .* got {2**62}"):
        LSHOptions(**{name: 2**62})
    layer = LSHLinear(8, 100, options=LSHOptions(**{name: 2**40}))
    assert F.cross_entropy(layer(torch.randn(4, 8)), torch.arange(4)).isfinite()
