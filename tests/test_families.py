"""All hash families behind one interface: their laws of collision, probes, norms, re-ranking."""

import itertools
import math

import pytest
import reference
import torch
import torch.nn.functional as F

from slide_torch import HashTables, LSHLinear, LSHOptions, ops
from slide_torch.active_set import Labels
from slide_torch.hashing import kmeans
from slide_torch.hashing.bins import MinHash
from slide_torch.hashing.cross_polytope import CrossPolytope
from slide_torch.hashing.kmeans import KMeans
from slide_torch.hashing.make import make_family
from slide_torch.options import FAMILIES
from slide_torch.sampling.draw import draw_active_set

PROBING = [f for f in FAMILIES if f != "minhash"]
EMPTY = torch.empty(0, dtype=torch.int32)


def make(family, *, d=40, has_bias=True, seed=0, **options):
    options = LSHOptions(family=family, **{"K": 3, "L": 5, **options}).resolve(1000, d)
    return make_family(options, d, has_bias=has_bias, seed=seed)


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
    assert torch.equal(made.query_codes(x), made._codes(x, x.new_ones(9)))
    made.mean_row = None
    assert torch.equal(made.query_codes(x), made.row_codes(x, x.new_ones(9)))
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
    probes = 1 if family == "minhash" else 4
    queries = made.query_codes(w, probes)
    assert (queries[:, 3] == -1).all() and (queries[::probes, 4] >= 0).all()
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


@pytest.mark.parametrize("family", PROBING)
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


# --- cross-polytope -------------------------------------------------------------------------------


def cross_polytope_values(family, x):
    """Rotated coordinates (n, L, K, bin)."""
    values = reference.simhash_hadamard_values(x, None, family.signs, family.extra_projection[0])
    used = family.K * family.L * family.bin_size
    return values[:, :used].view(len(x), family.L, family.K, family.bin_size)


@pytest.mark.parametrize("d,bin_size,K", [(40, 8, 3), (64, 64, 2), (5, 2, 4), (100, 16, 4)])
def test_cross_polytope_equals_reference(d, bin_size, K):
    family = CrossPolytope(d, K, 6, has_bias=False, seed=0, bin_size=bin_size)
    x = torch.randn(41, d, dtype=torch.float64)
    values = cross_polytope_values(family, x)
    place = values.abs().argmax(3)
    negative = values.gather(3, place[..., None])[..., 0] < 0
    bits = bin_size.bit_length()
    expected = ((2 * place + negative) << (torch.arange(K) * bits)).sum(2).T
    codes = family.row_codes(x)
    assert family.bits == K * bits and codes.dtype == (
        torch.int16 if family.bits <= 15 else torch.int32
    )
    assert torch.equal(codes.long(), expected)
    # the second probe of one hash is the vertex with the next largest value
    single = CrossPolytope(d, 1, 6, has_bias=False, seed=0, bin_size=bin_size)
    values = cross_polytope_values(single, x)[:, :, 0]
    vertices = torch.stack([values, -values], 3).flatten(2)
    ranked = vertices.argsort(dim=2, descending=True)[:, :, :3].permute(1, 2, 0)
    assert torch.equal(single.query_codes(x, 3).view(6, 3, 41).long(), ranked)


def test_cross_polytope_law():
    """Collisions as often as with true Gaussian projections, which are simulated here; for small angles
    rather more often than hashes of as many sign bits, (1 - t / pi)^bits (Andoni et al. 2015)."""
    d, size, pairs, draws = 64, 16, 20, 8
    torch.manual_seed(0)
    for angle in (0.3, 0.8):
        a = F.normalize(torch.randn(pairs, d), dim=1)
        c = torch.randn(pairs, d)
        c = F.normalize(c - (c * a).sum(1, keepdim=True) * a, dim=1)
        b = math.cos(angle) * a + math.sin(angle) * c
        share = 0.0
        for seed in range(draws):
            family = CrossPolytope(d, 1, 200, has_bias=False, seed=seed, bin_size=size)
            share += (family.row_codes(a) == family.row_codes(b)).float().mean().item() / draws
        g = torch.randn(40_000, size)
        h = math.cos(angle) * g + math.sin(angle) * torch.randn(40_000, size)
        same = (g.abs().argmax(1) == h.abs().argmax(1)) & (
            g.gather(1, g.abs().argmax(1)[:, None]) * h.gather(1, g.abs().argmax(1)[:, None]) > 0
        )[:, 0]
        law = same.float().mean().item()
        # 32,000 hashes of pairs, 40,000 of the simulation
        assert abs(share - law) < 4 * math.sqrt(0.25 / 32_000 + 0.25 / 40_000)
        assert law > (1 - angle / math.pi) ** 5


# --- MinHash --------------------------------------------------------------------------------------


def test_minhash_law_is_jaccard():
    """P[agree] = |A & B| / |A | B| where no bin is empty; only positive coordinates count."""
    d, bin_size, tables = 256, 16, 250
    torch.manual_seed(1)
    for shared in (0.2, 0.5, 0.9):
        a = torch.rand(60, d) < 0.6
        b = torch.where(torch.rand(60, d) < shared, a, torch.rand(60, d) < 0.6)
        jaccard = (a & b).sum(1) / (a | b).sum(1)
        share = torch.zeros(60)
        for seed in range(8):
            family = MinHash(d, 1, tables, has_bias=False, seed=seed, bin_size=bin_size)
            values = [torch.where(s, torch.rand(60, d) + 0.1, -torch.rand(60, d)) for s in (a, b)]
            codes = [family.row_codes(v) for v in values]
            share += (codes[0] == codes[1]).float().mean(0) / 8
        # 120,000 hashes
        assert abs((share - jaccard).mean().item()) < 4 * math.sqrt(0.25 / 120_000)


def test_minhash_densifies():
    """Very sparse sets: bins are empty, and agreement is Jaccard's and an accident's of 1 / bin."""
    d, bin_size = 1024, 8
    a = torch.zeros(200, d)
    b = torch.zeros(200, d)
    for i in range(200):
        places = torch.randperm(d)[:30]
        a[i, places[:20]] = 1.0
        b[i, places[10:]] = 1.0
    family = MinHash(d, 1, 128, has_bias=False, seed=0, bin_size=bin_size)
    same = torch.stack([a, a * 7]).flatten(0, 1)
    codes = family.row_codes(same).view(128, 2, 200)
    assert torch.equal(codes[:, 0], codes[:, 1])
    share = (family.row_codes(a) == family.row_codes(b)).float().mean().item()
    law = 1 / 3 + (2 / 3) / bin_size  # sets of 20 that share 10
    assert abs(share - law) < 0.03
    assert (family.row_codes(torch.zeros(3, d)) == 0).all()
    assert (family.row_codes(-torch.rand(3, d)) == 0).all()
    with pytest.raises(ValueError, match="one probe"):
        family.query_codes(a, 2)


# --- k-means --------------------------------------------------------------------------------------


def clouds(clusters=16, each=40, d=32):
    """Rows about `clusters` directions, of lengths from 1 to 3, in random order, and whose they are."""
    heads = F.normalize(torch.randn(clusters, d), dim=1)
    whose = torch.arange(clusters).repeat_interleave(each)[torch.randperm(clusters * each)]
    rows = heads[whose] + 0.05 * torch.randn(clusters * each, d)
    return rows * (1 + 2 * torch.rand(clusters * each, 1)), whose


def test_kmeans_equals_reference():
    """Codes are the argmax of inner products, probes the next ones, in any table; ties to the first."""
    family = KMeans(20, 6, 3, has_bias=True, seed=0)
    w, b = torch.randn(301, 20), torch.randn(301)
    family.fit(w, b)
    assert torch.allclose(family.centroids.norm(dim=2), torch.ones(3, 64))
    scores = torch.cat([w, b[:, None]], 1) @ family.centroids.transpose(1, 2)
    assert torch.equal(family.row_codes(w, b).long(), scores.argmax(2))
    x = torch.randn(37, 20)
    scores = torch.cat([x, torch.ones(37, 1)], 1) @ family.centroids.transpose(1, 2)
    expected = scores.topk(5, dim=2).indices.transpose(1, 2).reshape(15, 37)
    assert torch.equal(family.query_codes(x, 5).long(), expected)
    family.centroids[:, 1] = family.centroids[:, 0]
    assert (family.row_codes(w, b) != 1).all()


def test_kmeans_finds_clusters():
    """With twice as many centroids as there are clusters, no bucket mixes two of them."""
    rows, whose = clouds()
    family = KMeans(32, 5, 1, has_bias=False, seed=0)
    family.fit(rows, None)
    codes = family.row_codes(rows)[0].long()
    mixed = sum(len(whose[codes == c].unique()) > 1 for c in range(32))
    assert mixed <= 2  # k-means ends in a local optimum


def test_kmeans_follows_its_rows_and_assigns_the_dirty_ones():
    """A rehash: centroids become the means of the rows of their buckets, as these were at the last one; dirty
    rows get the nearest, the others stay where they are."""
    options = LSHOptions(family="kmeans", K=4, rebuild_every=0, augment_norms=False)
    tables = HashTables(options, 300, 16, has_bias=False)
    w = torch.randn(300, 16)
    tables.rebuild(w, None)

    def check_centroids(w, codes):
        family = tables.family
        torch.testing.assert_close(family.mean_row, w.mean(0))
        for code in range(16):
            mean = w[codes[0] == code].mean(0) - w.mean(0)
            torch.testing.assert_close(family.centroids[0, code], F.normalize(mean, dim=0))

    before, old = w.clone(), tables.codes.clone()
    dirty = torch.arange(50)
    w[dirty] = torch.randn(50, 16)
    tables.rehash(w, None, rows=dirty)
    check_centroids(before, old)
    assert torch.equal(tables.codes[:, dirty], tables.family.row_codes(w, None, dirty))
    assert torch.equal(tables.codes[:, 50:], old[:, 50:])

    before, old = w.clone(), tables.codes.clone()
    tables.rehash(w, None)  # of all rows
    check_centroids(before, old)
    assert torch.equal(tables.codes, tables.family.row_codes(w, None))

    family = tables.family
    centroids, mean_row = family.centroids.clone(), family.mean_row.clone()
    w[7, 3] = float("nan")
    with pytest.raises(ValueError, match="7"):
        tables.rehash(w, None, rows=torch.tensor([7]))
    assert tables.family is family
    assert torch.equal(family.centroids, centroids) and torch.equal(family.mean_row, mean_row)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_centroids_in_groups(dtype):
    """Rows that look into all groups get the nearest of all; into few, nearly always."""
    torch.manual_seed(0)
    clusters = torch.randn(32, 24)
    centroids = F.normalize(clusters.repeat(16, 1) + 0.7 * torch.randn(512, 24), dim=1)
    x = (clusters.repeat(94, 1)[:3000] + 0.7 * torch.randn(3000, 24)).to(dtype)
    x[5, 3] = math.nan
    groups = kmeans.group_centroids(centroids)
    assert groups[1].sort().values.tolist() == list(range(512)) and groups[0][-1] == 512
    exact = ops.nearest_centroids(x, None, None, None, centroids.unsqueeze(0))
    means = F.normalize(ops.list_centers(centroids, None, *groups)[0], dim=1)
    for looked, share in ((len(means), 1), (4, 0.9)):
        found = ops.nearest_in_groups(x, None, None, None, centroids, means, *groups, looked)
        assert found.dtype == torch.int16 and found[0, 5] == -1
        assert (found == exact).float().mean() >= share
    rows, center, bias = torch.randperm(3000)[:700], x[0], x[:, 0].contiguous()
    of = (x[:, 1:].contiguous(), bias, rows, center)
    exact = ops.nearest_centroids(*of, centroids.unsqueeze(0))
    empty = torch.cat([groups[0], groups[0][-1:]])  # one group without centroids
    means = torch.cat([means, torch.full((1, 24), 9.0)])
    found = ops.nearest_in_groups(*of, centroids, means, empty, groups[1], 10**6)
    assert torch.equal(found, exact)
    for place, wrong, message in (
        (4, centroids[:500], "members: expected shape"),
        (6, groups[0] + 1, "offsets: expected non-decreasing"),
        (7, groups[1] + 1, r"members: expected values in \[0, 512\)"),
        (8, 0, "looked: expected at least 1"),
    ):
        arguments = [x, None, None, None, centroids, means, empty, groups[1], 3]
        arguments[place] = wrong if place != 6 else torch.cat([wrong, wrong[-1:]])
        with pytest.raises(RuntimeError, match=message):
            ops.nearest_in_groups(*arguments)


def test_kmeans_rebuilds_from_its_old_centroids():
    """One round from where it was is better than one from random rows."""
    rows, _ = clouds(32, 60)

    def spread(family):
        hashed = F.normalize(rows - family.mean_row, dim=1)
        return (hashed @ family.centroids[0].T).max(1).values.mean()

    cold, warm = (
        KMeans(32, 5, 1, has_bias=False, seed=seed, center=True, iterations=1) for seed in (0, 1)
    )
    cold.fit(rows, None)
    warm.fit(rows, None, cold)
    assert spread(warm) > spread(cold) + 0.005


@pytest.mark.parametrize("neurons", [1, 2, 5, 33])
def test_kmeans_of_few_rows(neurons):
    """Fewer rows than centroids, or rows all alike, or all zero."""
    for w in (torch.randn(neurons, 6), torch.ones(neurons, 6), torch.zeros(neurons, 6)):
        tables = HashTables(LSHOptions(family="kmeans", K=4), neurons, 6, has_bias=False)
        tables.rebuild(w, None)
        assert tables.codes.min() >= 0 and tables.codes.max() < 16


def test_kmeans_finds_the_largest_logits_where_little_is_read():
    """Rows of structure, of unequal length and with a bias: most of the exact top 10 within a tenth."""
    N, d = 4000, 32
    rows, _ = clouds(100, 40, d)
    layer = LSHLinear(d, N, options=LSHOptions(family="kmeans", budget=16, tail=0, probes=6))
    with torch.no_grad():
        layer.weight.copy_(rows + 0.3)
        layer.bias.copy_(torch.randn(N) * 0.1)
    x = rows[torch.randperm(N)[:50]] + 0.1 * torch.randn(50, d)
    assert layer.recall(x, 10) > 0.9
    F.cross_entropy(layer(x), torch.arange(50)).backward()
    assert layer.stats()["ids_read"] < 0.1 * N * 50


def test_group_means():
    values = torch.randn(50, 7, dtype=torch.float64)
    groups = torch.randint(-1, 5, (50,))
    groups[groups == 3] = 2
    means, counts = ops.group_means(values, groups, 5)
    assert counts.tolist() == [int((groups == g).sum()) for g in range(5)] and counts[3] == 0
    for g in (0, 1, 2, 4):
        torch.testing.assert_close(means[g], values[groups == g].mean(0))
    assert not means[3].any()


# --- retrieval with probes, and re-ranking --------------------------------------------------------


def test_retrieve_counts_over_all_probes():
    N, B, L, probes, bits = 200, 9, 3, 4, 4
    codes = torch.randint(1 << bits, (L, N)).to(torch.int16)
    queries = torch.stack([torch.randperm(1 << bits)[:probes] for _ in range(L * B)])
    queries = queries.view(L, B, probes).transpose(1, 2).reshape(L * probes, B).to(torch.int16)
    queries[5, 2] = -1  # no such bucket
    offsets, ids = ops.build_tables(codes, bits)
    none = torch.zeros(B + 1, dtype=torch.int64)
    start, active, *_ = ops.retrieve(queries, offsets, ids, none, EMPTY, EMPTY, N, 10**6, 0)
    by_table = queries.view(L, probes, B).permute(2, 0, 1)
    for b in range(B):
        met = (codes[None] == by_table[b].T[:, :, None]).any(0).any(0)
        assert set(active[start[b] : start[b + 1]].tolist()) == set(met.nonzero()[:, 0].tolist())
    with pytest.raises(RuntimeError, match="each probe"):
        ops.retrieve(queries[:5], offsets, ids, none, EMPTY, EMPTY, N, 10**6, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("budget", [0, 3, 10, 1000])
def test_rerank_keeps_the_largest_logits(dtype, bias, budget):
    N, B, d = 120, 13, 21
    w, x = torch.randn(N, d, dtype=dtype), torch.randn(B, d, dtype=dtype)
    b = torch.randn(N, dtype=dtype) if bias else None
    logits = F.linear(x, w, b)
    candidates = [torch.randperm(N)[: 5 * i].tolist() for i in range(B)]
    count = [min(i % 4, len(c)) for i, c in enumerate(candidates)]
    labels = [c[:n] for c, n in zip(candidates, count, strict=True)]
    offsets = torch.tensor([0, *map(len, candidates)]).cumsum(0)
    active = torch.tensor([i for ids in candidates for i in ids], dtype=torch.int32)
    label_offsets = torch.tensor([0, *count]).cumsum(0)
    positions = torch.tensor([i for n in count for i in range(n)], dtype=torch.int32)
    tail = torch.tensor([0, 5, 77, 119], dtype=torch.int32)
    start, kept, tail_starts = ops.rerank(
        offsets, active, label_offsets, positions, tail, x, w, b, budget
    )
    for i in range(B):
        mine = kept[start[i] : start[i + 1]].tolist()
        head, rest = mine[: tail_starts[i]], mine[tail_starts[i] :]
        others = sorted(candidates[i][count[i] :], key=lambda n: -logits[i, n])
        assert head == labels[i] + others[: max(0, budget - count[i])]
        assert rest == [n for n in tail.tolist() if n not in head]


@pytest.mark.parametrize("pattern", ["shared", "per_sample"])
def test_rerank_raises_recall_and_trains(pattern):
    torch.manual_seed(3)
    x, y = torch.randn(20, 16), torch.arange(20)
    recall = {}
    for rerank in (0, 400):
        options = LSHOptions(pattern=pattern, budget=20, tail=8, K=4, L=10, rerank=rerank)
        torch.manual_seed(0)
        layer = LSHLinear(16, 2000, options=options)
        recall[rerank] = layer.recall(x, 5)
        loss = F.cross_entropy(layer(x), y)
        loss.backward()
        assert loss.isfinite() and layer.weight.grad[y].any(1).all()
    assert recall[400] > recall[0] + 0.1


def test_rerank_puts_nan_last_and_refuses_bad_input():
    w, x = torch.randn(10, 4), torch.randn(1, 4)
    w[3] = math.nan
    none, active = torch.tensor([0, 0]), torch.arange(10, dtype=torch.int32)
    arguments = [torch.tensor([0, 10]), active, none, EMPTY, EMPTY, x, w, None, 9]
    _, kept, _ = ops.rerank(*arguments)
    assert 3 not in kept.tolist() and len(kept) == 9
    for place, wrong, message in (
        (1, active + 1, "active: expected values"),
        (4, active.flip(0), "increasing"),
        (5, x.double(), "dtype"),
        (0, torch.tensor([0, 9]), "offsets"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.rerank(*arguments[:place], wrong, *arguments[place + 1 :])


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(family="lsh"), "family: expected one of"),
        (dict(probes=0), "probes: expected an int from 1 to 254 or 'auto', got 0"),
        (dict(L=50, probes=6), r"L \* probes of at most 254, got 50 \* 6 = 300"),
        (dict(family="minhash", probes=2), "expected 1 with family='minhash'"),
        (dict(family="minhash", augment_norms=True), "expected False with family='minhash'"),
        (dict(family="kmeans", K=17), "more than 16: expected K of at most 16"),
        (dict(family="cross_polytope", K=7), "28 bits, more than 24: expected K of at most 6"),
        (dict(rerank=-1), "rerank: expected an int of at least 0"),
        (dict(budget=100, rerank=99), "rerank: expected 0 or at least the budget, 100, got 99"),
        (dict(augment_norms=1.5), "augment_norms: expected a bool"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        LSHOptions(**options)


def test_auto_options_of_kmeans():
    options = LSHOptions(family="kmeans").resolve(234_908, 128)
    assert (options.K, options.L, options.probes, options.augment_norms) == (13, 1, 80, False)
    assert options.rerank >= 4 * options.budget and options.rehash_every == 25
    assert (options.budget, options.tail) == (10, 0)
    assert LSHOptions().resolve(234_908, 128) == options
    # importance needs a tail; SLIDE's pattern, and options of other families, get SimHash
    assert LSHOptions(correction="importance").resolve(234_908, 128).tail == 1024
    for own in (LSHOptions(pattern="per_sample"), LSHOptions(K=9), LSHOptions(L=50)):
        options = own.resolve(234_908, 128)
        assert (options.family, options.probes, options.rerank) == ("simhash", 1, 0)
        assert (options.tail, options.rehash_every, options.rehash_growth) == (1024, 50, 1.1)


@pytest.mark.parametrize("sparse", [False, True])
def test_a_search_sees_rows_as_the_last_step_left_them(sparse):
    """The int8 codes of rows that a step changed are renewed before the next search, also where gradients of
    several batches were accumulated, and those of all rows at a rehash."""
    torch.manual_seed(0)
    layer = LSHLinear(16, 400, sparse=sparse, options=LSHOptions(budget=3, rehash_every=4))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    tables = layer.tables
    for _ in range(6):
        for _ in range(2):
            loss = torch.nn.functional.cross_entropy(layer(torch.randn(5, 16)), torch.arange(5))
            loss.backward()
            lists = (tables.offsets[0].long(), tables.ids[0])
            codes, terms, places = ops.empty_codes(layer.weight, lists[0], room=True)
            ops.code_lists_(codes, terms, places, layer.weight, layer.bias, *lists)
            assert torch.equal(tables.sq8.places, places)
            assert torch.equal(tables.sq8.codes, codes) and torch.equal(tables.sq8.terms, terms)
        optimizer.step()
        optimizer.zero_grad()
    assert tables.rehashes >= 1


def test_a_shared_set_holds_the_best_of_the_buckets():
    """The default: as many probes as there are buckets find the exact top k, and the set has just these."""
    torch.manual_seed(0)
    layer = LSHLinear(16, 400, options=LSHOptions(budget=6, probes=64))
    assert layer.tables.options.family == "kmeans" and layer.tables.options.K == 6
    x = torch.randn(5, 16)
    assert layer.recall(x, 6) == 1.0
    labels = torch.tensor([1, 2, 3, 4, 5])
    torch.nn.functional.cross_entropy(layer(x), labels).backward()
    best = torch.nn.functional.linear(x, layer.weight, layer.bias).topk(6).indices
    wanted = set(best.flatten().tolist()) | set(labels.tolist())
    assert set(layer.weight.grad.abs().sum(1).nonzero().flatten().tolist()) == wanted


def test_queries_rank_buckets_by_mean_and_spread():
    torch.manual_seed(0)
    weight, bias = torch.randn(500, 12), torch.randn(500)
    tables = HashTables(LSHOptions(family="kmeans", K=3, probes=8), 500, 12, has_bias=True)
    tables.rebuild(weight, bias)
    rows, x = torch.cat([weight, bias[:, None]], 1), torch.randn(4, 12)
    query = torch.cat([x, torch.ones(4, 1)], 1)
    scores = torch.full((4, 8), -math.inf)
    for c in range(8):
        own = rows[tables.codes[0] == c]
        if len(own):
            spread = (own - own.mean(0)).square().sum(1).mean().sqrt()
            scores[:, c] = query @ own.mean(0) + 0.2 * query.norm(dim=1) * spread
    ranked = tables.family.query_codes(x, 8).T.long()
    assert ranked.tolist() == scores.argsort(1, descending=True).tolist()


def test_operators_refuse_bad_input():
    x = torch.randn(4, 8)
    with pytest.raises(RuntimeError, match="probes: expected at least 1 and at most 254"):
        ops.simhash_dense(x, None, None, None, torch.randn(200, 8), 2, 100, None, 3)
    with pytest.raises(RuntimeError, match=r"centroids: expected 2, 4, 8"):
        ops.nearest_centroids(x, None, None, None, torch.randn(1, 3, 8))
    with pytest.raises(RuntimeError, match=r"centroids: expected shape"):
        ops.nearest_centroids(x, None, None, None, torch.randn(1, 4, 8), 1.0)
    with pytest.raises(RuntimeError, match="groups: expected values"):
        ops.group_means(x, torch.tensor([0, 1, 2, 3]), 3)
