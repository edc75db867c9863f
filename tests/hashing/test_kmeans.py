"""k-means: its centroids, alone and in groups, and what its tables find."""

import math

import pytest
import reference
import torch
import torch.nn.functional as F
from helpers import rounded_rows

from slide_torch import HashTables, LSHLinear, LSHOptions, ops
from slide_torch.hashing import kmeans
from slide_torch.hashing.kmeans import KMeans


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
    """A rehash: centroids become the means of the rows of their buckets, as these were coded at the last one;
    dirty rows get the nearest, the others stay where they are."""
    options = LSHOptions(family="kmeans", K=4, rebuild_every=0, augment_norms=False)
    tables = HashTables(options, 300, 16, has_bias=False)
    w = torch.randn(300, 16)
    tables.rebuild(w, None)

    def rounded():
        return rounded_rows(*tables.sq8, 16)

    def check_centroids(w, codes):
        family = tables.family
        torch.testing.assert_close(family.mean_row, w.mean(0), rtol=1e-5, atol=1e-5)
        for code in range(16):
            mean = w[codes[0] == code].mean(0) - w.mean(0)
            expected = F.normalize(mean, dim=0)
            torch.testing.assert_close(family.centroids[0, code], expected, rtol=1e-5, atol=1e-5)

    before, old = rounded(), tables.codes.clone()
    dirty = torch.arange(50)
    w[dirty] = torch.randn(50, 16)
    tables.rehash(w, None, rows=dirty)
    check_centroids(before, old)
    assert torch.equal(tables.codes[:, dirty], tables.family.row_codes(w, None, dirty))
    assert torch.equal(tables.codes[:, 50:], old[:, 50:])

    before, old = rounded(), tables.codes.clone()
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


def grouped(n=3000, d=24, dtype=torch.float32):
    """Rows (n, d), 512 centroids, their groups and the centroids of these, one of them without members."""
    torch.manual_seed(0)
    clusters = torch.randn(32, d)
    centroids = F.normalize(clusters.repeat(16, 1) + 0.7 * torch.randn(512, d), dim=1)
    x = (clusters.repeat(n // 32 + 1, 1)[:n] + 0.7 * torch.randn(n, d)).to(dtype)
    offsets, members = kmeans.group_centroids(centroids)
    assert members.sort().values.tolist() == list(range(512)) and offsets[0] == 0
    means = F.normalize(ops.list_centers(centroids, None, offsets, members)[0], dim=1)
    offsets = torch.cat([offsets[:3], offsets[2:]])
    return x, (centroids, torch.cat([means[:2], 9 * means[:1], means[2:]]), offsets, members)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("d", [1, 3, 24, 37, 130])
def test_centroids_in_groups_equal_the_reference(d, dtype):
    """All widths, numbers of groups looked into, rows with a bias far larger than their features; ties."""
    x, groups = grouped(301, d, dtype)
    groups[0][7] = groups[0][3]
    for looked in (1, 4, 10**6):
        found = ops.nearest_in_groups(x, None, None, None, *groups, looked)
        assert found.dtype == torch.int16
        expected = reference.nearest_in_groups(x, 0, *groups, looked)
        assert torch.equal(found[0].long(), expected)
    x, groups = grouped(301, d + 1, dtype)
    x[:, -1] *= 10.0 ** torch.randint(-3, 7, (301,))
    rows, center = torch.randperm(301)[:200], x[0]
    hashed = ops.hashed_rows(x[:, :-1].contiguous(), x[:, -1].contiguous(), rows, center)
    of = (x[:, :-1].contiguous(), x[:, -1].contiguous(), rows, center)
    for looked in (1, 4, 10**6):
        found = ops.nearest_in_groups(*of, *groups, looked)
        assert torch.equal(found[0].long(), reference.nearest_in_groups(hashed, 1, *groups, looked))


def test_centroids_in_groups_are_the_nearest():
    """Nearly always: rows that lie between two centroids may get the other."""
    x, groups = grouped()
    exact = ops.nearest_centroids(x, None, None, None, groups[0].unsqueeze(0))
    for looked, share in ((10**6, 0.95), (4, 0.9)):
        found = ops.nearest_in_groups(x, None, None, None, *groups, looked)
        assert (found == exact).float().mean() >= share


@pytest.mark.parametrize("norm_bound", [None, 40.0])
def test_centroids_in_groups_are_nearly_as_near_as_the_nearest(norm_bound):
    """Rounding to seven bits costs less than 3e-4 of the inner products with the nearest centroids, also of
    rows with a large augmented coordinate."""
    x, groups = grouped()
    of = (x[:, 1:].contiguous(), x[:, 0].contiguous(), None, x[0])
    if norm_bound is not None:
        groups = (*(F.pad(part, (0, 1), value=1.0) for part in groups[:2]), *groups[2:])
    exact = ops.nearest_centroids(*of, groups[0].unsqueeze(0), norm_bound)[0].long()
    found = ops.nearest_in_groups(*of, *groups, 10**6, norm_bound)[0].long()
    products = ops.hashed_rows(*of) @ groups[0][:, :24].T
    nearest, near = (products.gather(1, codes[:, None]).mean() for codes in (exact, found))
    assert near > (1 - 3e-4) * nearest


def test_centroids_in_groups_of_odd_rows():
    """Rows with NaN or Inf have no centroid, rows of zeros and of the smallest numbers the first."""
    x, groups = grouped(100)
    clean = ops.nearest_in_groups(x, None, None, None, *groups, 4)
    for place, value in ((5, math.nan), (6, math.inf), (7, -math.inf)):
        x[place, 3] = value
    found = ops.nearest_in_groups(x, None, None, None, *groups, 4)
    assert found[0, 5:8].tolist() == [-1] * 3
    assert torch.equal(found[0, 8:], clean[0, 8:]) and torch.equal(found[0, :5], clean[0, :5])
    bias = torch.zeros(100)
    bias[9] = math.nan
    with_bias = (*(F.pad(part, (0, 1)) for part in groups[:2]), *groups[2:])
    found = ops.nearest_in_groups(x, bias, None, None, *with_bias, 4)
    assert found[0, [5, 9]].tolist() == [-1] * 2
    assert torch.equal(found[0, 10:], clean[0, 10:])
    for small in (0.0, 1e-42):
        nothing = torch.full((2, 24), small)
        found = ops.nearest_in_groups(nothing, None, None, None, *groups, 10**6)
        assert found.tolist() == [[0, 0]]
    center = torch.full((24,), -3e38)  # the difference is Inf
    assert (ops.nearest_in_groups(x.abs() * 3e38, None, None, center, *groups, 4) == -1).all()


def test_centroids_that_are_not_finite_are_nobodys():
    x, groups = grouped(100)
    groups[0][::2] = math.nan
    groups[1][::2] = math.inf
    found = ops.nearest_in_groups(x, None, None, None, *groups, 10**6)
    assert (found % 2 == 1).all()
    groups[0].fill_(math.nan)
    assert (ops.nearest_in_groups(x, None, None, None, *groups, 10**6) == -1).all()


def test_centroids_in_groups_at_any_number_of_threads():
    x, groups = grouped(9001)
    found = ops.nearest_in_groups(x, None, None, None, *groups, 4)
    threads = torch.get_num_threads()
    try:
        for other in (1, 3):
            torch.set_num_threads(other)
            assert torch.equal(ops.nearest_in_groups(x, None, None, None, *groups, 4), found)
    finally:
        torch.set_num_threads(threads)


def test_wrong_groups():
    x, groups = grouped(10)
    for place, wrong, message in (
        (0, groups[0][:500], "members: expected shape"),
        (2, groups[2] + 1, "offsets: expected non-decreasing"),
        (3, groups[3] + 1, r"members: expected values in \[0, 512\)"),
        (4, 0, "looked: expected at least 1"),
    ):
        arguments = [*groups, 3]
        arguments[place] = wrong
        with pytest.raises(RuntimeError, match=message):
            ops.nearest_in_groups(x, None, None, None, *arguments)


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


def test_auto_options_of_kmeans():
    options = LSHOptions(family="kmeans").resolve(234_908, 128)
    assert (options.K, options.L, options.probes, options.augment_norms) == (13, 1, 160, False)
    assert options.rerank >= 4 * options.budget and options.rehash_every == 25
    assert (options.budget, options.tail) == (10, 0)
    assert LSHOptions().resolve(234_908, 128) == options
    # fewer where candidates are not searched
    assert LSHOptions(family="kmeans", L=3).resolve(234_908, 128).probes == 80
    assert LSHOptions(family="kmeans", pattern="per_sample").resolve(234_908, 128).probes == 80
    # importance needs a tail; SLIDE's pattern, and options of other families, get SimHash
    assert LSHOptions(correction="importance").resolve(234_908, 128).tail == 1024
    for own in (LSHOptions(pattern="per_sample"), LSHOptions(K=9), LSHOptions(L=50)):
        options = own.resolve(234_908, 128)
        assert (options.family, options.probes, options.rerank) == ("simhash", 1, 0)
        assert (options.tail, options.rehash_every, options.rehash_growth) == (1024, 50, 1.1)
