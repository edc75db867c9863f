"""Retrieval with several probes, re-ranking, and the search that one table does."""

import math

import pytest
import torch
import torch.nn.functional as F

from slide_torch import HashTables, LSHLinear, LSHOptions, ops

EMPTY = torch.empty(0, dtype=torch.int32)


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
    assert tables.schedule.rehashes >= 1


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
