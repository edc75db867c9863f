"""Hash families: codes against the plain-torch reference, and against their laws of collision."""

import math

import pytest
import reference
import torch

from slide_torch import LSHOptions, ops
from slide_torch.hashing.dwta import DWTA
from slide_torch.hashing.make import make_family
from slide_torch.hashing.simhash import SimHash

DTYPES = [torch.float32, torch.float64]


def agree_but_for_rounding(codes, values, K, L):
    """Codes equal the signs of `values` wherever these are clear of zero."""
    expected = reference.pack_bits(values > 0, K, L)
    tiny = values.abs() < 1e-4 * values.abs().mean()
    unsure = reference.pack_bits(tiny, K, L) != 0
    assert unsure.float().mean() < 0.02
    assert torch.equal(codes.long()[~unsure], expected[~unsure])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "n,d,K,L,bias", [(37, 32, 4, 9, True), (5, 100, 7, 40, False), (1, 3, 2, 3, True)]
)
@pytest.mark.parametrize("projection", ["hadamard", "gaussian"])
def test_simhash_equals_reference(dtype, n, d, K, L, bias, projection):
    x = torch.randn(n, d, dtype=dtype)
    b = torch.randn(n, dtype=dtype) if bias else None
    family = SimHash(d, K, L, has_bias=bias, seed=3, projection=projection)
    if projection == "hadamard":
        values = reference.simhash_hadamard_values(x, b, family.signs, family.extra_projection[0])
    else:
        values = reference.simhash_dense_values(x, b, family.matrix)
    codes = family.row_codes(x, b)
    assert codes.shape == (L, n) and codes.dtype == torch.int16
    agree_but_for_rounding(codes, values, K, L)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bin_size,K", [(8, 3), (2, 5), (16, 4)])
def test_dwta_equals_reference(dtype, bin_size, K):
    n, d, L = 41, 50, 11
    x = torch.randn(n, d, dtype=dtype)
    b = torch.randn(n, dtype=dtype)
    family = DWTA(d, K, L, has_bias=True, seed=1, bin_size=bin_size)
    winners = reference.dwta_winners(x, b, family.coordinates)
    assert (winners >= 0).all()
    bits = bin_size.bit_length() - 1
    expected = (winners.view(n, L, K) << (torch.arange(K) * bits)).sum(2).T
    codes = family.row_codes(x, b)
    assert codes.dtype == (torch.int16 if K * bits <= 15 else torch.int32)
    assert torch.equal(codes.long(), expected)


def test_dwta_uses_every_code():
    """All 2^bits values of a hash occur, each about equally often: codes are packed exactly."""
    family = DWTA(64, 2, 20, has_bias=False, seed=0)
    codes = family.row_codes(torch.randn(20_000, 64)).long()
    counts = torch.bincount(codes.flatten(), minlength=64)
    assert family.bits == 6 and codes.max() == 63 and codes.min() == 0
    assert counts.min() > 0.8 * counts.float().mean()


def test_dwta_borrows_for_empty_bins():
    """Sparse vectors: full bins as the reference, empty ones borrow a code that only the vector's support
    and the functions determine; an all-zero vector has code 0."""
    d, K, L = 64, 2, 8
    family = DWTA(d, K, L, has_bias=False, seed=0)
    x = torch.zeros(30, d)
    for i in range(1, 30):
        support = torch.randperm(d)[:3]
        x[i, support] = torch.randn(3)
    winners = reference.dwta_winners(x, None, family.coordinates)
    assert (winners < 0).any() and (winners >= 0).any()
    codes = family.row_codes(x).long()
    hashes = torch.stack([codes & 7, codes >> 3]).permute(2, 1, 0).reshape(30, L * K)
    full = winners >= 0
    assert torch.equal(hashes[full], winners[full])
    assert (hashes[0] == 0).all()
    for i in range(1, 30):
        assert set(hashes[i].tolist()) <= set(winners[i][full[i]].tolist())
    assert torch.equal(
        family.row_codes(x * 5.0).long(), codes
    )  # only the order of coordinates matters


@pytest.mark.parametrize("projection", ["hadamard", "gaussian"])
def test_simhash_collision_law(projection):
    """P[two vectors at angle t agree in a bit] = 1 - t / pi (Charikar 2002), the bias included."""
    d, hashes, pairs = 64, 4000, 20
    family = SimHash(d, 1, 250, has_bias=True, seed=0, projection=projection)
    for angle in (0.3, 1.0, 2.0):
        agree = torch.zeros(pairs)
        for seed in range(hashes // 250):
            family.draw(seed)
            torch.manual_seed(0)
            a = torch.nn.functional.normalize(torch.randn(pairs, d + 1), dim=1)
            c = torch.randn(pairs, d + 1)
            c = torch.nn.functional.normalize(c - (c * a).sum(1, keepdim=True) * a, dim=1)
            b = math.cos(angle) * a + math.sin(angle) * c
            ca = family.row_codes(a[:, :d].contiguous(), a[:, d].contiguous())
            cb = family.row_codes(b[:, :d].contiguous(), b[:, d].contiguous())
            agree += (ca == cb).float().mean(0) / (hashes // 250)
        error = math.sqrt(0.25 / hashes)
        assert abs(agree.mean().item() - (1 - angle / math.pi)) < 4 * error


def test_dwta_collision_law_is_of_order_only():
    """Hashes depend on the order of coordinates: monotone maps of a vector collide always, independent
    vectors with probability 1 / bin_size."""
    family = DWTA(64, 1, 200, has_bias=False, seed=0)
    x, y = torch.rand(100, 64) + 0.1, torch.rand(100, 64) + 0.1
    assert torch.equal(family.row_codes(x), family.row_codes(x.exp()))
    share = (family.row_codes(x) == family.row_codes(y)).float().mean().item()
    assert abs(share - 1 / 8) < 0.02


def test_queries_meet_rows_with_their_bias():
    """A query is hashed with 1 appended: as the row with the same weights and bias 1."""
    for options in (LSHOptions(K=4, L=8), LSHOptions(K=2, L=8, family="dwta")):
        family = make_family(options.resolve(1000, 32), 32, has_bias=True, seed=0)
        x = torch.randn(9, 32)
        assert torch.equal(family.query_codes(x), family.row_codes(x, torch.ones(9)))


@pytest.mark.parametrize("family", ["simhash", "dwta"])
def test_centering_is_subtracting_the_mean_row(family):
    made = make_family(
        LSHOptions(family=family, K=3, L=5).resolve(1000, 40), 40, has_bias=True, seed=0
    )
    w, b = torch.randn(60, 40, dtype=torch.float64) + 3, torch.randn(60, dtype=torch.float64) - 1
    expected = made.row_codes(w - w.mean(0), b - b.mean())
    made.fit(w, b)
    assert torch.allclose(made.mean_row, torch.cat([w.mean(0), b.mean()[None]]))
    assert torch.equal(made.row_codes(w, b), expected)
    queries = made.query_codes(w)
    made.mean_row = None
    assert torch.equal(made.query_codes(w), queries)  # they are not centered


def test_operators_refuse_bad_input():
    x = torch.randn(4, 8)
    signs = torch.ones(1, 3, 8, dtype=torch.int8)
    gauss = torch.ones(2, 1, 8)
    with pytest.raises(RuntimeError, match="input: expected shape"):
        ops.simhash_hadamard(x[0], None, None, None, signs, gauss, 2, 2)
    with pytest.raises(RuntimeError, match="power of two"):
        ops.simhash_hadamard(torch.randn(4, 9), None, None, None, signs, gauss, 2, 2)
    with pytest.raises(RuntimeError, match="give fewer than the 9"):
        ops.simhash_hadamard(x, None, None, None, signs, gauss, 3, 3)
    with pytest.raises(RuntimeError, match="rows: expected values"):
        ops.simhash_hadamard(x, None, torch.tensor([4]), None, signs, gauss, 2, 2)
    with pytest.raises(RuntimeError, match="dtype"):
        ops.simhash_hadamard(x.half(), None, None, None, signs, gauss, 2, 2)
    with pytest.raises(RuntimeError, match="coordinates: expected values"):
        ops.dwta(x, None, None, None, torch.full((4, 2), 8, dtype=torch.int32), 2, 2)
    with pytest.raises(RuntimeError, match="bits"):
        ops.simhash_dense(x, None, None, None, torch.randn(25, 8), 25, 1)
