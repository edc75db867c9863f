"""Integers, sizes and contents that a direct call of an operator may be given: refused by name, before
anything is multiplied, reserved or written."""

import pytest
import torch

from slide_torch import ops

op = torch.ops.slide_torch
HUGE = (2**31, 2**32 + 1, 2**53, 2**61, 2**62 + 1, 2**63 - 1)
N, D, B = 6, 4, 3


def hadamard():
    return torch.ones(4, 3, 4, dtype=torch.int8), torch.zeros(2, 4, 4)


def searched():
    """topk_lists' arguments up to its integers."""
    torch.manual_seed(0)
    offsets, rows = torch.tensor([0, 2, N]), torch.arange(N).int()
    weight = torch.randn(N, D)
    codes, terms, places = ops.empty_codes(weight, offsets, room=False)
    ops.code_lists_(codes, terms, places, weight, None, offsets, rows)
    probes = torch.tensor([[0, 1]] * B)
    return torch.randn(B, D), weight, None, offsets, rows, codes, terms, probes


def probed():
    """search_lists' arguments up to its integers."""
    *rest, _ = searched()
    centers = ops.list_centers(rest[1], None, *rest[3:5])
    coded = ops.code_centers(centers[0][None], None, centers[1][None])
    return *rest, *coded, 0.2


def retrieved():
    tables = ops.build_tables(torch.zeros(2, N).short(), 3)
    none = torch.empty(0).int()
    return torch.zeros(2, B).short(), *tables, torch.zeros(B + 1).long(), none, none


X, ROWS, NONE = torch.randn(B, D), torch.tensor([0, 2]), (None, None, None)
IDS = torch.tensor([0, 2, 5]).int()
# the argument that is huge, and a call with it
CALLS = {
    "simhash_hadamard K": lambda n: op.simhash_hadamard(X, *NONE, *hadamard(), n, 2),
    "simhash_hadamard L": lambda n: op.simhash_hadamard(X, *NONE, *hadamard(), 2, n),
    "simhash_hadamard probes": lambda n: op.simhash_hadamard(X, *NONE, *hadamard(), 2, 2, None, n),
    "simhash_dense K": lambda n: op.simhash_dense(X, *NONE, torch.ones(4, D), n, 2),
    "simhash_dense L": lambda n: op.simhash_dense(X, *NONE, torch.ones(4, D), 2, n),
    "simhash_dense probes": lambda n: op.simhash_dense(X, *NONE, torch.ones(4, D), 2, 2, None, n),
    "dwta K": lambda n: op.dwta(X, *NONE, torch.zeros(4, 2).int(), n, 2),
    "dwta L": lambda n: op.dwta(X, *NONE, torch.zeros(4, 2).int(), 2, n),
    "dwta probes": lambda n: op.dwta(X, *NONE, torch.zeros(4, 2).int(), 2, 2, None, n),
    "nearest_centroids probes": lambda n: op.nearest_centroids(
        X, *NONE, torch.ones(2, 4, D), None, n
    ),
    "group_means count": lambda n: op.group_means(X, torch.zeros(B).long(), n),
    "build_tables bits": lambda n: op.build_tables(torch.zeros(2, N).short(), n),
    "transpose_active neurons": lambda n: op.transpose_active(torch.tensor([0, 3]), IDS, n),
    "union_active neurons": lambda n: op.union_active(IDS, IDS, n),
    "sample_tail neurons": lambda n: op.sample_tail(3, n, 0),
    "sample_tail count": lambda n: op.sample_tail(n, N, 0),
    "topk_linear k": lambda n: op.topk_linear(X, torch.randn(N, D), None, n),
    "topk_lists k": lambda n: op.topk_lists(*searched(), n, n, 9, 0),
    "search_lists probes": lambda n: op.search_lists(*probed(), n, 1, 2, 3),
    "search_lists enough": lambda n: op.search_lists(*probed(), 1, n, 2, 3),
    "search_lists k": lambda n: op.search_lists(*probed(), 1, 1, n, n),
    "coalesce_rows num_rows": lambda n: op.coalesce_rows(ROWS, torch.ones(2, D), n),
    "rows_to_dense neurons": lambda n: op.rows_to_dense(ROWS, torch.ones(2, D), n << 20),
}
# these are limits: any number is one
UNBOUNDED = {
    "nearest_in_groups looked": lambda n: op.nearest_in_groups(
        *(X, *NONE, torch.ones(4, D), torch.ones(2, D)),
        *(torch.tensor([0, 2, 4]), torch.arange(4).int(), n),
    ),
    "mean_row most": lambda n: op.mean_row(X, None, n),
    "retrieve budget": lambda n: op.retrieve(*retrieved(), n, 9, 0),
    "retrieve bucket_cap": lambda n: op.retrieve(*retrieved(), 9, n, 0),
    "topk_lists rescored": lambda n: op.topk_lists(*searched(), 2, n, 9, 0),
    "search_lists rescored": lambda n: op.search_lists(*probed(), 1, 1, 2, n),
    "topk_lists list_cap": lambda n: op.topk_lists(*searched(), 2, 3, n, 0),
}


@pytest.mark.parametrize("huge", HUGE)
@pytest.mark.parametrize("name", CALLS)
def test_huge_integers(name, huge):
    operator, argument = name.split()
    if argument == "neurons" and operator == "rows_to_dense":
        huge = min(huge, 2**43 - 1)  # shifted in the call
    said = {"rows_to_dense": "not enough memory"}
    with pytest.raises(RuntimeError, match=said.get(operator, f"{operator}: {argument}: expected")):
        CALLS[name](huge)


@pytest.mark.parametrize("name", CALLS)
def test_negative_integers(name):
    operator = name.split()[0]
    for low in (-1, -(2**63)):
        with pytest.raises(RuntimeError, match=f"{operator}: .*expected"):
            CALLS[name](low if operator != "rows_to_dense" else -1)


@pytest.mark.parametrize("name", UNBOUNDED)
def test_limits_may_be_any_number(name):
    expected = UNBOUNDED[name](1000)
    for huge in HUGE:
        torch.testing.assert_close(UNBOUNDED[name](huge), expected, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match=f"{name.replace(' ', ': ')}: expected at least"):
        UNBOUNDED[name](-1)


def test_the_first_fault_of_a_parallel_loop_is_reported():
    """Its message reaches the caller, the same at any number of threads."""
    codes, *rest = retrieved()
    codes = codes[:, :1].repeat(1, 4000)
    offsets = torch.zeros(4001).long()
    codes[1, 3000], codes[0, 1234] = 17, 8
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with pytest.raises(
                RuntimeError,
                match=r"^slide_torch::retrieve: codes: expected values below 8, got 8 for sample 1234",
            ):
                op.retrieve(codes, *rest[:2], offsets, *rest[3:], 4, 9, 0)
    finally:
        torch.set_num_threads(threads)


def test_what_memory_does_not_hold():
    with pytest.raises(
        RuntimeError, match=r"not enough memory for a tensor of shape \(1099511627776, 1024\)"
    ):
        op.rows_to_dense(ROWS, torch.ones(2, 1024), 2**40)


def test_no_features():
    """All logits are biases; heaps, tiles and packed panels are of no numbers."""
    weight, bias = torch.empty(20, 0), torch.arange(20.0)
    for batch in (1, 8, 40):
        values, indices = op.topk_linear(torch.empty(batch, 0), weight, bias, 3)
        assert values.tolist() == [[19.0, 18.0, 17.0]] * batch
        assert indices.tolist() == [[19, 18, 17]] * batch


def test_sizes_of_tensors_without_elements():
    """They take no memory, whatever they are, but loops and buffers would be made for them."""
    for call in (
        lambda n: op.topk_linear(torch.empty(0, n), torch.empty(0, n), None, 1),
        lambda n: op.hashed_rows(torch.empty(n, 0), None, None, None, None),
        lambda n: op.build_tables(torch.empty(n, 0).short(), 3),
        lambda n: op.list_centers(torch.empty(0, n), None, torch.zeros(2).long(), IDS[:0]),
    ):
        for n in (2**31, 2**40, 2**61):
            with pytest.raises(
                RuntimeError, match="expected sizes up to 16777216 of a tensor without"
            ):
                call(n)
