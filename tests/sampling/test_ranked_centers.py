"""Lists ranked by coded centers: against the products of what the codes stand for."""

import pytest
import torch

from slide_torch import ops


def problem(tables=2, lists=50, d=13, batch=9, dtype=torch.float32):
    torch.manual_seed(0)
    layer = torch.randn(tables, lists, d), torch.randn(tables, lists), torch.rand(tables, lists)
    return layer, torch.randn(batch, d, dtype=dtype), torch.rand(batch)


def decoded(codes, terms, lists, d):
    """Centers (tables, lists, d) that the codes stand for, and bias and spread."""
    by_list = codes.permute(0, 1, 3, 2, 4).flatten(3).flatten(1, 2)[:, :lists, :d]
    scale, bias, spread = terms.transpose(1, 2).flatten(2)[:, :, :lists].unbind(1)
    return (by_list.double() - 64) * scale.double().unsqueeze(2), bias, spread


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lists, d", [(50, 13), (16, 12), (1, 1), (40000, 2)])
def test_ranks_are_those_of_the_decoded_centers(lists, d, bias, dtype):
    (centers, own_bias, spread), x, weight = problem(lists=lists, d=d, dtype=dtype)
    codes, terms = ops.code_centers(centers, own_bias if bias else None, spread)
    kept, kept_bias, kept_spread = decoded(codes, terms, lists, d)
    assert torch.equal(kept_spread, spread)
    assert torch.equal(kept_bias, own_bias if bias else torch.zeros_like(own_bias))
    step = centers.abs().amax(2, keepdim=True).double() / 63
    assert ((kept - centers).abs() <= 0.500001 * step).all()
    step = x.abs().amax(1, keepdim=True).double() / 63
    scores = torch.einsum("tld,bd->tbl", kept, (x / step).round() * step) + kept_bias.unsqueeze(1)
    scores += weight.unsqueeze(1) * spread.unsqueeze(1)
    probes = min(lists, 7)
    ranks = ops.rank_centers(x, weight, codes, terms, lists, probes)
    assert ranks.dtype == (torch.int16 if lists <= 1 << 15 else torch.int32)
    found = scores.gather(2, ranks.view(2, probes, 9).transpose(1, 2).long())
    torch.testing.assert_close(found, scores.topk(probes).values, rtol=1e-5, atol=1e-5)


def test_ranks_without_lists_or_numbers():
    """-1 where a table has fewer lists than probes, and for inputs that hold NaN or Inf; ties by number."""
    (centers, bias, spread), x, weight = problem(tables=1, lists=3)
    x[1, 2], x[4, 0] = torch.nan, torch.inf
    ranks = ops.rank_centers(x, weight, *ops.code_centers(centers, bias, spread), 3, 5)
    assert (ranks[:, [1, 4]] == -1).all() and (ranks[3:] == -1).all()
    others = ranks[:3, [0, 2, 3, 5, 6, 7, 8]]
    assert torch.equal(others.sort(0).values, torch.arange(3).short().unsqueeze(1).expand(3, 7))
    same = ops.code_centers(centers[:, :1].expand(1, 40, 13).contiguous(), None, torch.ones(1, 40))
    assert ops.rank_centers(x, weight, *same, 40, 4)[:, 0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("special", [0, 1e30, -1e30, torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("spread", [3, 10**6])
@pytest.mark.parametrize("probes", [1, 30, 299])
@pytest.mark.parametrize("lists", [299, 5003])
def test_ranks_of_scores_that_are_equal_or_far_apart(lists, probes, spread, special):
    """Equal ones by number; NaN, larger than any number, first. Of many lists a part is looked at first."""
    bias = torch.randint(-spread, spread, (1, lists)).float()
    bias[0, ::7] = special
    zeros = torch.zeros(1, lists, 8), bias, torch.zeros(1, lists)
    ranks = ops.rank_centers(
        torch.randn(5, 8), torch.zeros(5), *ops.code_centers(*zeros), lists, probes
    )
    expected = bias[0].sort(descending=True, stable=True).indices[:probes]
    assert torch.equal(ranks, expected.short().unsqueeze(1).expand(-1, 5))


def test_ranks_are_the_same_at_any_number_of_threads():
    (centers, bias, spread), x, weight = problem(lists=300, batch=101)
    coded = ops.code_centers(centers, bias, spread)
    torch.set_num_threads(1)
    alone = ops.rank_centers(x, weight, *coded, 300, 20)
    torch.set_num_threads(3)
    assert torch.equal(ops.rank_centers(x, weight, *coded, 300, 20), alone)


def test_wrong_arguments_are_named():
    (centers, bias, spread), x, weight = problem()
    codes, terms = ops.code_centers(centers, bias, spread)
    with pytest.raises(RuntimeError, match=r"code_centers: spread: expected shape \(2, 50\)"):
        ops.code_centers(centers, bias, spread[:, :4])
    with pytest.raises(RuntimeError, match=r"rank_centers: codes: expected shape"):
        ops.rank_centers(x[:, :5].contiguous(), weight, codes, terms, 50, 3)
    with pytest.raises(RuntimeError, match=r"rank_centers: codes: expected shape"):
        ops.rank_centers(x, weight, codes, terms, 80, 3)
    with pytest.raises(RuntimeError, match=r"rank_centers: spread_weight: expected shape"):
        ops.rank_centers(x, weight[:3], codes, terms, 50, 3)
    with pytest.raises(RuntimeError, match="rank_centers: lists: expected 1 to 2"):
        ops.rank_centers(x, weight, codes, terms, 0, 3)
    with pytest.raises(RuntimeError, match="probes: expected at least 1 and at most 254 of all 2"):
        ops.rank_centers(x, weight, codes, terms, 50, 128)
