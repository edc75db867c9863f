"""search_lists, which chooses the lists of topk_lists by their centers."""

import pytest
import torch
from helpers import coded_lists
from predicted_layers import DTYPES

from slide_torch import ops

N, D, LISTS, WEIGHT = 3000, 21, 200, 0.3


def problem(batch=9, dtype=torch.float32):
    """What is searched, and the codes of the lists' centers; some lists are short."""
    torch.manual_seed(0)
    x, weight = torch.randn(batch, D, dtype=dtype), torch.randn(N, D, dtype=dtype)
    bias = torch.randn(N, dtype=dtype)
    ends = torch.randperm(N - 1)[: LISTS - 1].sort().values + 1
    offsets, rows = torch.tensor([0, *ends.tolist(), N]), torch.randperm(N).int()
    centers, radius = ops.list_centers(weight, bias, offsets, rows)
    means, shift, radius = centers[None, :, :-1], centers[None, :, -1], radius[None]
    ranked = [t.float().contiguous() for t in (means, shift, radius)]
    searched = (weight, bias, offsets, rows, *coded_lists(weight, bias, offsets, rows)[:2])
    return x, searched, ops.code_centers(*ranked)


def ranked(x, centers, count):
    weight = (WEIGHT * (x.double().square().sum(1) + 1).sqrt()).float()
    return ops.rank_centers(x, weight, *centers, LISTS, count).T.long().contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [0, 1, 3, 70])
@pytest.mark.parametrize("probes", [1, 7, 60, LISTS])
def test_it_searches_the_lists_that_rank_best(probes, batch, dtype):
    x, searched, centers = problem(batch, dtype)
    expected = ops.topk_lists(x, *searched, ranked(x, centers, probes), 1, 40)
    found = ops.search_lists(x, *searched, *centers, WEIGHT, probes, 1, 1, 40)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_further_lists_until_there_are_k_rows():
    x, searched, centers = problem(50)
    probes = 5
    order = ranked(x, centers, LISTS)
    reached = searched[2].diff()[order].cumsum(1)
    rows = reached[:, probes - 1]
    k = int(rows.median())
    assert (rows < k).any() and not (rows < k).all()
    taken = ((reached < k).sum(1) + 1).clamp(min=probes).unsqueeze(1)
    probed = order.masked_fill(torch.arange(LISTS) >= taken, -1)
    expected = ops.topk_lists(x, *searched, probed, k, 2 * k)
    found = ops.search_lists(x, *searched, *centers, WEIGHT, probes, LISTS, k, 2 * k)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert (found[1] >= 0).all()
    _, fewer = ops.search_lists(x, *searched, *centers, WEIGHT, probes, 1, k, 2 * k)
    assert torch.equal((fewer >= 0).sum(1), rows.clamp(max=k))


def test_inputs_that_are_not_finite_have_nan_values():
    x, searched, centers = problem()
    alone = ops.search_lists(x, *searched, *centers, WEIGHT, 9, 9, 4, 8)
    x[2, 3], x[5, 0] = torch.nan, torch.inf
    values, ids = ops.search_lists(x, *searched, *centers, WEIGHT, 9, 9, 4, 8)
    finite = x.isfinite().all(1)
    assert not values[~finite].isfinite().any() and (ids >= 0).all()
    assert torch.equal(values[finite], alone[0][finite])


def test_results_are_the_same_at_any_number_of_threads():
    x, searched, centers = problem(101)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(ops.search_lists(x, *searched, *centers, WEIGHT, 90, 9, 4, 8))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_wrong_arguments_are_named():
    x, searched, (codes, terms) = problem()
    two = codes.repeat(2, 1, 1, 1, 1), terms.repeat(2, 1, 1, 1)
    for centers, numbers, message in (
        ((codes[:, :3].contiguous(), terms), (1, 1, 2, 2), "center_codes: expected shape"),
        ((codes, terms[:, :3].contiguous()), (1, 1, 2, 2), "center_terms: expected shape"),
        (two, (1, 1, 2, 2), "center_codes: expected those of one table, got 2"),
        ((codes, terms), (0, 1, 2, 2), "probes: expected 1 to 200, got 0"),
        ((codes, terms), (1, 201, 2, 2), "enough: expected 1 to 200, got 201"),
        ((codes, terms), (1, 1, 0, 2), "k: expected at least 1"),
        ((codes, terms), (1, 1, 2, 1), "rescored: expected at least k"),
    ):
        with pytest.raises(RuntimeError, match=f"search_lists: {message}"):
            ops.search_lists(x, *searched, *centers, WEIGHT, *numbers)
