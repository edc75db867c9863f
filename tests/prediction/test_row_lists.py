"""The operators of approximate prediction: rows coded in lists, and the search of these."""

import pytest
import torch
import torch.nn.functional as F
from helpers import coded_lists, rounded_rows
from predicted_layers import DTYPES

from slide_torch import ops


def test_refusals_of_the_operators():
    x, w, b = torch.randn(2, 4), torch.randn(9, 4), torch.randn(9)
    offsets, rows = torch.tensor([0, 4, 9]), torch.arange(9, dtype=torch.int32)
    probes = torch.tensor([[0], [1]])
    for k in (0, 10):
        with pytest.raises(RuntimeError, match="k: expected 1 to 9"):
            ops.topk_linear(x, w, b, k)
    with pytest.raises(RuntimeError, match="bias: expected shape"):
        ops.topk_linear(x, w, b[:3], 1)
    coded = coded_lists(w, b, offsets, rows)[:2]

    def search(offsets=offsets, rows=rows, coded=coded, probes=probes, k=1, rescored=5):
        return ops.topk_lists(x, w, b, offsets, rows, *coded, probes, k, rescored)

    assert search()[1].tolist() == search(k=4)[1][:, :1].tolist()
    for wrong, message in (
        ({"k": 0}, "k: expected at least 1"),
        ({"k": 3, "rescored": 2}, "rescored: expected at least k"),
        ({"probes": probes + 1}, r"probes: expected values in \[-1, 2\), got 2"),
        ({"probes": probes - 2}, r"probes: expected values in \[-1, 2\), got -2"),
        ({"offsets": offsets + 1}, "list_offsets: expected non-decreasing"),
        ({"rows": rows + 1}, r"list_rows: expected values in \[0, 9\)"),
        ({"rows": rows - 1}, r"list_rows: expected values in \[0, 9\)"),
        ({"coded": (coded[0][:1], coded[1])}, "codes: expected at least 2 blocks"),
        ({"coded": (coded[0], coded[1][:1])}, "terms: expected shape"),
    ):
        with pytest.raises(RuntimeError, match=message):
            search(**wrong)
    with pytest.raises(RuntimeError, match="list_rows: expected values in"):
        coded_lists(w, b, offsets, rows + 1)
    with pytest.raises(RuntimeError, match="list_rows: expected values in"):
        ops.list_centers(w, b, offsets, rows + 1)


def by_rows(codes):
    """The integers (16 blocks, features) of codes (blocks, quads, 16, 4)."""
    return codes.int().transpose(1, 2).reshape(16 * len(codes), -1) - 64


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "bias"), [(1, True), (7, False), (128, True), (701, True)])
def test_codes_of_rows(d, bias, dtype):
    """Rows are within half a code's unit of what was coded."""
    weight = torch.randn(60, d, dtype=dtype) * torch.rand(60, 1, dtype=dtype)
    weight[3] = 0
    shift = torch.randn(60, dtype=dtype) if bias else None
    rows = torch.randperm(60).int()
    offsets = torch.tensor([0, 16, 16, 33, 60])
    codes, terms, place = coded_lists(weight, shift, offsets, rows)
    codes, terms = codes[:5], terms[:5]
    assert codes.shape == (5, (d + 7) // 8 * 2, 16, 4)
    places = torch.cat([torch.arange(16), torch.arange(16, 33), torch.arange(48, 75)])
    coded = by_rows(codes)
    assert coded.abs().max() == 63 and not coded[:, d:].any()
    missing = torch.ones(80, dtype=torch.bool).index_fill(0, places, False)
    assert not coded[missing].any() and not terms.transpose(1, 2).reshape(80, 2)[missing].any()
    coded = coded[places, :d]
    scale, found = terms.transpose(0, 1).reshape(2, 80)[:, places]
    error = (coded * scale.unsqueeze(1) - weight[rows.long()]).abs()
    assert (error <= 0.51 * scale.unsqueeze(1)).all()
    torch.testing.assert_close(found, shift[rows.long()].float() if bias else torch.zeros(60))
    assert torch.equal(place[rows.long()].long(), places)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_recoded_rows_are_as_if_coded_anew(bias, dtype):
    weight, rows = torch.randn(50, 9, dtype=dtype), torch.randperm(50)[:45].int()
    shift = torch.randn(50, dtype=dtype) if bias else None
    offsets = torch.tensor([0, 20, 45])
    coded = coded_lists(weight, shift, offsets, rows)
    changed = rows[:12].long().sort().values
    weight[changed] *= -3
    if bias:
        shift[changed] += 1
    ops.recode_rows_(*coded, weight, shift, changed)
    for own, fresh in zip(coded, coded_lists(weight, shift, offsets, rows), strict=True):
        assert torch.equal(own, fresh)
    stray = (coded[2] < 0).nonzero().flatten()[:1]
    for wrong, message in ((stray, "places: expected values in"), (changed.flip(0), "increasing")):
        with pytest.raises(RuntimeError, match=message):
            ops.recode_rows_(*coded, weight, shift, wrong)


def lists_of(where, lists):
    """Offsets and rows of the lists that rows are in, ``where`` (N), each list in the order of its rows."""
    offsets = F.pad(torch.bincount(where, minlength=lists).cumsum(0), (1, 0))
    return offsets, where.argsort(stable=True).int()


@pytest.mark.parametrize("d", [1, 9, 128])
@pytest.mark.parametrize("change", ["none", "few", "most", "left", "right", "swap"])
def test_moved_codes_are_as_if_coded_anew(change, d):
    """Lists that grow, shrink, empty and fill, so that blocks go left, right and both."""
    N, lists = 3000, 60
    weight, bias = torch.randn(N, d), torch.randn(N)
    where = torch.randint(lists - 2, (N,)) + 1  # some lists are empty
    old, rows = lists_of(where, lists)
    coded = coded_lists(weight, bias, old, rows)
    # what a row's code is made of is not read
    rehashed = torch.rand(N) < {"none": 0.0, "few": 0.01, "most": 0.9}.get(change, 0.5)
    where = torch.where(
        rehashed,
        {
            "left": torch.zeros(N, dtype=torch.int64),
            "right": torch.full((N,), lists - 1),
            "swap": lists - 1 - where,
        }.get(change, torch.randint(lists, (N,))),
        where,
    )
    changed = rehashed.nonzero().flatten()
    weight[changed] += 1
    new, rows = lists_of(where, lists)
    ops.move_codes_(*coded, old, new, rows, changed)
    ops.recode_rows_(*coded, weight, bias, changed)
    for moved, anew in zip(coded, coded_lists(weight, bias, new, rows), strict=True):
        assert torch.equal(moved, anew)


def test_refusals_of_moved_codes():
    weight, offsets, rows = torch.randn(40, 6), torch.tensor([0, 20, 40]), torch.arange(40).int()
    coded = coded_lists(weight, None, offsets, rows)
    before = [tensor.clone() for tensor in coded]
    none = rows[:0].long()
    stray = coded[2].clone()
    stray[5] = -1
    for arguments, message in (
        (
            (*coded, offsets, torch.tensor([0, 19, 40]), rows, none),
            "rows: expected all rows .* got no 19,",
        ),
        ((*coded[:2], stray, offsets, offsets, rows, none), "rows: expected all rows .* got no 5,"),
        ((*coded, offsets[[0, 2]], offsets, rows, none), "old_offsets: expected 3 of them, got 2"),
        ((*coded, offsets.flip(0), offsets, rows, none), "old_offsets: expected non-decreasing"),
        ((*coded, 9 * offsets, offsets, rows, none), "old_offsets: expected at most 64 rows"),
        ((*coded, torch.tensor([0, 2, 2**63 - 1]), offsets, rows, none), "at most 64 rows"),
        (
            (*coded, torch.tensor([0, 1, 64]), offsets, rows, none),
            "codes: expected at least 5 blocks",
        ),
        ((*coded, offsets, offsets, rows + 1, none), r"list_rows: expected values in \[0, 40\)"),
        ((*coded, offsets, offsets, rows, torch.tensor([3, 3])), "strictly increasing"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.move_codes_(*arguments)
    assert all(map(torch.equal, coded, before))


@pytest.mark.parametrize(("d", "bias"), [(1, True), (7, False), (128, True)])
def test_centers_of_coded_rows(d, bias):
    """As of the rows that the codes stand for, empty lists and those of part of a block included."""
    weight, shift = torch.randn(70, d) + 1, 5 + torch.randn(70) if bias else None
    offsets, rows = torch.tensor([0, 16, 16, 19, 70]), torch.randperm(70).int()
    codes, terms, places = coded_lists(weight, shift, offsets, rows)
    rounded = rounded_rows(codes, terms, places, d)
    centers, radius = ops.coded_centers(codes, terms, offsets, d, bias)
    assert centers.dtype == radius.dtype == torch.float32
    expected = ops.list_centers(rounded, shift, offsets, rows)
    torch.testing.assert_close(centers, expected[0])
    rounding = 1e-6 * expected[0].square().sum(1).max().item()
    torch.testing.assert_close(radius.square(), expected[1].square(), rtol=1e-5, atol=rounding)
    with pytest.raises(RuntimeError, match="codes: expected at least 6 blocks"):
        ops.coded_centers(codes[:5], terms[:5], offsets, d, bias)
    with pytest.raises(RuntimeError, match="features: expected 1 to"):
        ops.coded_centers(codes, terms, offsets, 0, bias)


def test_lists_that_are_short_or_capped():
    """Where a sample's lists hold fewer than k rows the rest is -1; of a list longer than the cap only whole
    blocks are looked at, from any of them on, around the end."""
    weight, x = torch.randn(90, 6), torch.randn(3, 6)
    rows, offsets = torch.randperm(90).int(), torch.tensor([0, 3, 3, 90])
    coded = coded_lists(weight, None, offsets, rows)[:2]
    probes = torch.tensor([[0, 1], [1, -1], [-1, 0]])
    values, ids = ops.topk_lists(x, weight, None, offsets, rows, *coded, probes, 5, 9)
    assert (ids >= 0).sum(1).tolist() == [3, 0, 3] and (ids[:, 3:] == -1).all()
    assert (values[ids < 0] == -float("inf")).all()
    place = torch.empty(90, dtype=torch.int64)
    place[rows.long()] = torch.arange(90) - 3
    seen = set()
    for seed in range(30):
        lists = (offsets, rows, *coded, torch.full((3, 1), 2))
        _, ids = ops.topk_lists(x, weight, None, *lists, 90, 90, 20, seed)
        assert ((ids >= 0) == (ids[:1] >= 0)).all()
        blocks = place[ids[0][ids[0] >= 0]] // 16
        first = tuple(blocks.unique().tolist())
        assert len(first) == 2 and (first[1] - first[0]) in (1, 5)
        assert len(blocks) == sum(min(16, 87 - 16 * b) for b in first)
        seen.add(first)
    assert len(seen) == 6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 2, 3, 9, 70])
def test_best_of_lists_where_all_are_rescored(batch, dtype):
    """Then codes decide nothing: the exact best of the lists' rows, in any list length."""
    N, d, k = 700, 33, 6
    weight, bias = torch.randn(N, d, dtype=dtype), torch.randn(N, dtype=dtype)
    x = torch.randn(batch, d, dtype=dtype)
    rows = torch.randperm(N).int()
    offsets = torch.tensor([0, 5, 5, 37, 100, N])  # the last is longer than what a thread takes
    probes = torch.stack([torch.randperm(5)[:4] for _ in range(batch)])
    coded = coded_lists(weight, bias, offsets, rows)[:2]
    values, indices = ops.topk_lists(x, weight, bias, offsets, rows, *coded, probes, k, N)
    list_of = torch.empty(N, dtype=torch.int64)
    list_of[rows.long()] = torch.arange(5).repeat_interleave(offsets.diff())
    allowed = (list_of.unsqueeze(0).unsqueeze(2) == probes.unsqueeze(1)).any(2)
    logits = F.linear(x, weight, bias).masked_fill(~allowed, -float("inf"))
    expected = logits.topk(k)
    torch.testing.assert_close(values, expected.values)
    assert torch.equal(indices, expected.indices)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 6, 7, 9])  # every number of samples at a time
@pytest.mark.parametrize("d", [1, 6, 8, 33, 128])
def test_the_first_look_is_by_products_of_integers(d, batch, dtype):
    """Where as many rows are rescored as are wanted, those that plain torch's integers find."""
    torch.manual_seed(d)
    N, k = 500, 12
    weight, bias = torch.randn(N, d, dtype=dtype), torch.randn(N, dtype=dtype)
    x = torch.randn(batch, d, dtype=dtype) * 3
    offsets, rows = torch.tensor([0, 7, 24, 24, 313, N]), torch.randperm(N).int()
    codes, terms, place = coded_lists(weight, bias, offsets, rows)
    probes = torch.arange(5).expand(batch, 5).contiguous()
    _, ids = ops.topk_lists(x, weight, bias, offsets, rows, codes, terms, probes, k, k)
    place = place.long()
    coded, (scale, shift) = (
        by_rows(codes)[place, :d],
        terms.transpose(0, 1).reshape(2, -1)[:, place],
    )
    largest = x.abs().amax(1, keepdim=True)
    rounded = (x * (63 / largest)).round().int()
    sums = (rounded.unsqueeze(1) * coded).sum(2)
    scores = sums * (scale * (largest / 63).float()).double() + shift
    expected = scores.topk(k + 1)
    apart = expected.values[:, k - 1] - expected.values[:, k] > 1e-5  # else rounding decides
    assert apart.any() or d == 1
    found, wanted = ids.sort(1).values, expected.indices[:, :k].sort(1).values
    assert torch.equal(found[apart], wanted[apart])


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_scores_do_not_depend_on_what_else_is_scored(weight_dtype):
    """Which of the rescored rows stands where is left to chance between threads: the same bits, however
    many there are."""
    torch.manual_seed(0)
    N, d, B = 300, 37, 20
    dtype = torch.float64 if weight_dtype == torch.float64 else torch.float32
    x, weight = torch.randn(B, d, dtype=dtype), torch.randn(N, d).to(weight_dtype)
    offsets, rows = torch.tensor([0, N]), torch.randperm(N).int()
    codes, terms, _ = coded_lists(weight.to(dtype), None, offsets, rows)
    probes = torch.zeros(B, 1, dtype=torch.int64)
    arguments = (x, weight, None, offsets, rows, codes, terms, probes)
    values, ids = ops.topk_lists(*arguments, 4, N)
    for rescored in (29, 30, 31, 32, 33):  # all find the best four
        more, same = ops.topk_lists(*arguments, 4, rescored)
        assert torch.equal(same, ids) and torch.equal(more, values)
