"""The operators in Python: typed calls, fake (shape-only) versions, autograd.

Shapes: N neurons of width d, a batch of B inputs, U active neurons ("rows", strictly increasing).
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.symbolic_shapes import statically_known_true

from . import _C, fused_backward  # type: ignore[attr-defined]  # noqa: F401  (importing _C registers the operators)
from .optim_ops import advise_hugepages_

_ops = torch.ops.slide_torch
_fake = torch.library.register_fake


def refuse_transforms(name: str, *tensors: Tensor | None) -> None:
    """Refuses what differentiates in other ways than backward.

    Operators with a backward of their own drop forward-mode tangents without a word, and know no transform
    of ``torch.func``.

    Raises:
        NotImplementedError: inside such a transform, or where one of ``tensors`` has a tangent.
    """
    if torch.compiler.is_compiling():
        return
    if torch._C._are_functorch_transforms_active():  # type: ignore[attr-defined]
        got = "a transform of torch.func (grad, jvp, vmap, ...)"
    elif any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        got = "a tensor with a forward-mode tangent (torch.autograd.forward_ad)"
    else:
        return
    raise NotImplementedError(
        f"{name}: expected backward() or torch.autograd.grad, got {got}: what is computed over active sets "
        "is differentiable by these only; the output of a layer in eval mode, all logits, by every other"
    )


# --- hashing -----------------------------------------------------------------------------------------


# Of all families: `bias` appends one more coordinate; `rows` int64 picks and orders rows; `center` (d, or
# d + 1 with bias) is subtracted; `norm_bound` appends a coordinate that brings each row's norm up to it, None
# appends none; `probes` gives the best codes of each row and table: row t * probes + p of the result is table
# t's p-th best, -1 where there are fewer. Codes are int16 up to 15 bits, else int32; that of a row with NaN
# or Inf is -1.


def simhash_hadamard(
    input: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    center: Tensor | None,
    signs: Tensor,
    extra_projection: Tensor,
    K: int,
    L: int,
    norm_bound: float | None = None,
    probes: int = 1,
) -> Tensor:
    """SimHash codes (L * probes, n) by rotations H S3 H S2 H S1; ``signs`` int8 (rotations, 3, 2^k >= d),
    ``extra_projection`` float32 (2, rotations, 2^k) of the bias and the norm's coordinate."""
    return _ops.simhash_hadamard(
        input, bias, rows, center, signs, extra_projection, K, L, norm_bound, probes
    )


def simhash_dense(
    input: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    center: Tensor | None,
    projection: Tensor,
    K: int,
    L: int,
    norm_bound: float | None = None,
    probes: int = 1,
) -> Tensor:
    """SimHash codes (L * probes, n) by an explicit float32 ``projection`` (K * L, width)."""
    return _ops.simhash_dense(input, bias, rows, center, projection, K, L, norm_bound, probes)


def dwta(
    input: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    center: Tensor | None,
    coordinates: Tensor,
    K: int,
    L: int,
    norm_bound: float | None = None,
    probes: int = 1,
) -> Tensor:
    """Winner-take-all codes (L * probes, n); ``coordinates`` int32 (K * L, bin), bin a power of two."""
    return _ops.dwta(input, bias, rows, center, coordinates, K, L, norm_bound, probes)


def minhash(
    input: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    center: Tensor | None,
    coordinates: Tensor,
    K: int,
    L: int,
) -> Tensor:
    """MinHash codes (L, n) of the sets of positive coordinates; ``coordinates`` as for :func:`dwta`."""
    return _ops.minhash(input, bias, rows, center, coordinates, K, L)


def cross_polytope(
    input: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    center: Tensor | None,
    signs: Tensor,
    extra_projection: Tensor,
    bin: int,
    K: int,
    L: int,
    norm_bound: float | None = None,
    probes: int = 1,
) -> Tensor:
    """Cross-polytope codes (L * probes, n), each hash of ``bin`` (a power of two) rotated coordinates;
    ``signs`` and ``extra_projection`` as for :func:`simhash_hadamard`."""
    return _ops.cross_polytope(
        input, bias, rows, center, signs, extra_projection, bin, K, L, norm_bound, probes
    )


def nearest_centroids(
    input: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    center: Tensor | None,
    centroids: Tensor,
    norm_bound: float | None = None,
    probes: int = 1,
) -> Tensor:
    """Places (L * probes, n) of the centroids with the largest inner products; ``centroids`` float32
    (L, 2^bits, width)."""
    return _ops.nearest_centroids(input, bias, rows, center, centroids, norm_bound, probes)


def nearest_in_groups(
    input: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    center: Tensor | None,
    centroids: Tensor,
    group_centroids: Tensor,
    offsets: Tensor,
    members: Tensor,
    looked: int,
    norm_bound: float | None = None,
) -> Tensor:
    """As :func:`nearest_centroids` for one table, (1, n), among the centroids of each row's nearest groups.

    Args:
        centroids: float32 (2^bits, width).
        group_centroids: float32 (groups, width).
        offsets, members: int64 (groups + 1) into int32 (2^bits), the centroids of each group, at least one.
        looked: groups that a row looks into.
    """
    return _ops.nearest_in_groups(
        input,
        bias,
        rows,
        center,
        centroids,
        group_centroids,
        offsets,
        members,
        looked,
        norm_bound,
    )


def hashed_rows(
    input: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    center: Tensor | None,
    norm_bound: float | None = None,
) -> Tensor:
    """What the families hash of each row, as a matrix (n, width)."""
    return _ops.hashed_rows(input, bias, rows, center, norm_bound)


def group_means(values: Tensor, groups: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Means (count, width) of the rows of ``values`` (n, width) by ``groups`` int64 (n), -1 for none; zero
    where a group is empty; and their sizes int64 (count)."""
    return _ops.group_means(values, groups, count)


def mean_row(weight: Tensor, bias: Tensor | None, most: int) -> Tensor:
    """Mean (d, or d + 1 with the bias appended) of at most ``most`` evenly spaced rows."""
    return _ops.mean_row(weight, bias, most)


@_fake("slide_torch::mean_row")
def _(weight: Any, bias: Any, most: Any) -> Any:
    return weight.new_empty((weight.shape[1] + int(bias is not None),))


@_fake("slide_torch::nearest_in_groups")
def _(input: Any, bias: Any, rows: Any, center: Any, centroids: Any, *rest: Any) -> Any:
    return _fake_codes(input, rows, centroids.shape[0].bit_length() - 1, 1)


def _fake_codes(input: Tensor, rows: Tensor | None, bits: int, L: int, probes: int = 1) -> Tensor:
    count = input.shape[0] if rows is None else rows.shape[0]
    return input.new_empty((L * probes, count), dtype=torch.int16 if bits <= 15 else torch.int32)


@_fake("slide_torch::simhash_hadamard")
def _(
    input: Any,
    bias: Any,
    rows: Any,
    center: Any,
    signs: Any,
    extra_projection: Any,
    K: Any,
    L: Any,
    norm_bound: Any = None,
    probes: Any = 1,
) -> Any:
    return _fake_codes(input, rows, K, L, probes)


@_fake("slide_torch::simhash_dense")
def _(
    input: Any,
    bias: Any,
    rows: Any,
    center: Any,
    projection: Any,
    K: Any,
    L: Any,
    norm_bound: Any = None,
    probes: Any = 1,
) -> Any:
    return _fake_codes(input, rows, K, L, probes)


@_fake("slide_torch::minhash")
@_fake("slide_torch::dwta")
def _(
    input: Any,
    bias: Any,
    rows: Any,
    center: Any,
    coordinates: Any,
    K: Any,
    L: Any,
    norm_bound: Any = None,
    probes: Any = 1,
) -> Any:
    return _fake_codes(input, rows, K * (coordinates.shape[1].bit_length() - 1), L, probes)


@_fake("slide_torch::cross_polytope")
def _(
    input: Any,
    bias: Any,
    rows: Any,
    center: Any,
    signs: Any,
    extra_projection: Any,
    bin: Any,
    K: Any,
    L: Any,
    norm_bound: Any = None,
    probes: Any = 1,
) -> Any:
    return _fake_codes(input, rows, K * bin.bit_length(), L, probes)


@_fake("slide_torch::nearest_centroids")
def _(
    input: Any,
    bias: Any,
    rows: Any,
    center: Any,
    centroids: Any,
    norm_bound: Any = None,
    probes: Any = 1,
) -> Any:
    tables, size, _ = centroids.shape
    return _fake_codes(input, rows, size.bit_length() - 1, tables, probes)


@_fake("slide_torch::hashed_rows")
def _(input: Any, bias: Any, rows: Any, center: Any, norm_bound: Any) -> Any:
    count = input.shape[0] if rows is None else rows.shape[0]
    extras = (bias is not None) + (norm_bound is not None)
    return input.new_empty((count, input.shape[1] + extras))


@_fake("slide_torch::group_means")
def _(values: Any, groups: Any, count: Any) -> Any:
    return values.new_empty((count, values.shape[1])), groups.new_empty((count,))


# --- tables and active sets --------------------------------------------------------------------------


def build_tables(codes: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes (L, N) -> packed buckets: offsets int32 (L, 2^bits + 1), ids int32 (L, N)."""
    return _ops.build_tables(codes, bits)


@_fake("slide_torch::build_tables")
def _(codes: Any, bits: Any) -> Any:
    L, N = codes.shape
    return (
        codes.new_empty((L, (1 << bits) + 1), dtype=torch.int32),
        codes.new_empty((L, N), dtype=torch.int32),
    )


def update_codes_(codes: Tensor, rows: Tensor, fresh: Tensor) -> Tensor:
    """``codes[:, rows] = fresh`` in place; returns how many codes of each table changed, int64 (L)."""
    return _ops.update_codes_(codes, rows, fresh)


@_fake("slide_torch::update_codes_")
def _(codes: Any, rows: Any, fresh: Any) -> Any:
    return codes.new_empty((codes.shape[0],), dtype=torch.int64)


def retrieve(
    codes: Tensor,
    table_offsets: Tensor,
    table_ids: Tensor,
    label_offsets: Tensor,
    label_ids: Tensor,
    tail: Tensor,
    budget: int,
    bucket_cap: int,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Each sample's active set: its labels, the neurons that collide with it most often (both together
    up to ``budget``), then the tail. ``codes`` (L * probes, B) may ask each table more than once.

    Returns:
        offsets int64 (B + 1) into ``active``; active int32 (pairs); tail_starts int64 (B), where the
        tail's part of each sample begins, counted from the sample's start; label_positions int32
        (labels), likewise; ids_read int64 (1).
    """
    return _ops.retrieve(
        codes, table_offsets, table_ids, label_offsets, label_ids, tail, budget, bucket_cap, seed
    )


@_fake("slide_torch::retrieve")
def _(
    codes: Any,
    table_offsets: Any,
    table_ids: Any,
    label_offsets: Any,
    label_ids: Any,
    tail: Any,
    budget: Any,
    bucket_cap: Any,
    seed: Any,
) -> Any:
    batch = codes.shape[1]
    pairs = torch.library.get_ctx().new_dynamic_size()
    return (
        codes.new_empty((batch + 1,), dtype=torch.int64),
        codes.new_empty((pairs,), dtype=torch.int32),
        codes.new_empty((batch,), dtype=torch.int64),
        codes.new_empty((label_ids.shape[0],), dtype=torch.int32),
        codes.new_empty((1,), dtype=torch.int64),
    )


def rerank(
    offsets: Tensor,
    active: Tensor,
    label_offsets: Tensor,
    label_positions: Tensor,
    tail: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    budget: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the candidates that :func:`retrieve` found without a tail, keeps those with the largest logits
    ``input @ weight.T + bias`` (labels and they up to ``budget``), largest first; then the tail. ``weight``
    may be bfloat16 beside float32 ``input`` and ``bias``.

    Returns:
        offsets int64 (B + 1), active int32 (pairs), tail_starts int64 (B), as :func:`retrieve`; labels keep
        their positions.
    """
    return _ops.rerank(
        offsets, active, label_offsets, label_positions, tail, input, weight, bias, budget
    )


@_fake("slide_torch::rerank")
def _(offsets: Any, active: Any, *rest: Any) -> Any:
    pairs = torch.library.get_ctx().new_dynamic_size()
    return (
        torch.empty_like(offsets),
        active.new_empty((pairs,)),
        offsets.new_empty((offsets.shape[0] - 1,)),
    )


def transpose_active(
    offsets: Tensor, active: Tensor, neurons: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sample-major active sets -> neuron-major: rows int64 (U), pair_offsets int64 (U + 1), and for each
    pair its position in ``active`` and its sample, int32 (pairs)."""
    return _ops.transpose_active(offsets, active, neurons)


@_fake("slide_torch::transpose_active")
def _(offsets: Any, active: Any, neurons: Any) -> Any:
    count = torch.library.get_ctx().new_dynamic_size()
    return (
        active.new_empty((count,), dtype=torch.int64),
        active.new_empty((count + 1,), dtype=torch.int64),
        torch.empty_like(active),
        torch.empty_like(active),
    )


def union_active(certain: Tensor, tail: Tensor, neurons: int) -> tuple[Tensor, Tensor]:
    """Distinct ids of both int32 lists, increasing: rows int64 (U), from_tail bool (U) where only the
    tail has it."""
    return _ops.union_active(certain, tail, neurons)


@_fake("slide_torch::union_active")
def _(certain: Any, tail: Any, neurons: Any) -> Any:
    count = torch.library.get_ctx().new_dynamic_size()
    return (
        certain.new_empty((count,), dtype=torch.int64),
        certain.new_empty((count,), dtype=torch.bool),
    )


def sample_tail(count: int, neurons: int, seed: int) -> Tensor:
    """``count`` distinct ids of [0, neurons), uniform, increasing; int32 (count)."""
    return _ops.sample_tail(count, neurons, seed)


@_fake("slide_torch::sample_tail")
def _(count: Any, neurons: Any, seed: Any) -> Any:
    return torch.empty((count,), dtype=torch.int32)


def kernel_sums(weight: Tensor, bias: Tensor | None, leaves: int) -> Tensor:
    """Sums of outer products of rows (bias appended), for drawing from a quadratic kernel.

    The rows are cut into ``leaves`` (a power of two, at most N) ranges, the leaves of a binary tree.
    ``weight`` may be bfloat16 beside a float32 ``bias``.

    Returns:
        (leaves, D (D + 1) / 2), D = d or d + 1: the upper triangles of all rows' sum, then of the left half
        of each inner node, nodes in the order of a heap.
    """
    return _ops.kernel_sums(weight, bias, leaves)


@_fake("slide_torch::kernel_sums")
def _(weight: Any, bias: Any, leaves: Any) -> Any:
    width = weight.shape[1] + int(bias is not None)
    dtype = torch.float32 if weight.dtype == torch.bfloat16 else weight.dtype
    return weight.new_empty((leaves, width * (width + 1) // 2), dtype=dtype)


def kernel_draw(
    sums: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    queries: Tensor,
    alpha: float,
    count: int,
    asked: Tensor,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """``count`` draws, one from each of as many strata of equal probability, of rows with shares of the mean
    over ``queries`` (any, d) of ``alpha z^2 + 1``, z the logit. Ranges of rows are chosen by ``sums``,
    which may be older than ``weight``: the probabilities are of what is drawn. ``weight`` may be bfloat16,
    all else then float32.

    Returns:
        distinct ids int32 (n), increasing; their inclusion probabilities float64 (n); and those of the rows
        ``asked``, increasing int32 (m), whether drawn or not: float64 (m).
    """
    return _ops.kernel_draw(sums, weight, bias, queries, alpha, count, asked, seed)


@_fake("slide_torch::kernel_draw")
def _(
    sums: Any,
    weight: Any,
    bias: Any,
    queries: Any,
    alpha: Any,
    count: Any,
    asked: Any,
    seed: Any,
) -> Any:
    found = torch.library.get_ctx().new_dynamic_size()
    return (
        asked.new_empty((found,)),
        asked.new_empty((found,), dtype=torch.float64),
        asked.new_empty(asked.shape, dtype=torch.float64),
    )


def rows_to_dense(rows: Tensor, values: Tensor, neurons: int) -> Tensor:
    """A zero (neurons, ...) tensor whose ``rows`` are ``values`` (U, ...)."""
    return _ops.rows_to_dense(rows, values, neurons)


@_fake("slide_torch::rows_to_dense")
def _(rows: Any, values: Any, neurons: Any) -> Any:
    return values.new_empty((neurons, *values.shape[1:]))


# --- prediction --------------------------------------------------------------------------------------


def topk_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, k: int
) -> tuple[Tensor, Tensor]:
    """The k largest of ``input @ weight.T + bias`` for each row of ``input`` (B, d), in blocks.

    Returns:
        values (B, k), descending, equal ones by index, NaN first; indices int64 (B, k).
    """
    return _ops.topk_linear(input, weight, bias, k)


@_fake("slide_torch::topk_linear")
def _(input: Any, weight: Any, bias: Any, k: Any) -> Any:
    shape = (input.shape[0], k)
    return input.new_empty(shape), input.new_empty(shape, dtype=torch.int64)


def code_lists_(
    codes: Tensor,
    terms: Tensor,
    places: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    list_offsets: Tensor,
    list_rows: Tensor,
) -> tuple[Tensor, Tensor]:
    """The rows of some lists as int8 codes, each row scaled by its largest magnitude, for
    :func:`topk_lists`. Blocks of 16 rows belong to one list; missing ones are zero.

    Args:
        codes: int8 (any, (d + 1) // 2, 16, 2), receives two features next to each other.
        terms: float32 (any, 2, 16), receives the scale and the bias of each row.
        places: int32 (N), receives that of each row among the rows of all blocks, -1 for those in no list.
        list_offsets: int64 (lists + 1) into ``list_rows``, int32.

    Returns:
        centers and radius as of :func:`list_centers`.
    """
    return _ops.code_lists_(codes, terms, places, weight, bias, list_offsets, list_rows)


@_fake("slide_torch::code_lists_")
def _(
    codes: Any, terms: Any, places: Any, weight: Any, bias: Any, list_offsets: Any, list_rows: Any
) -> Any:
    return _fake_centers(weight, bias, list_offsets)


def empty_codes(
    weight: Tensor, list_offsets: Tensor, *, room: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, terms and places for :func:`code_lists_` to write to, of rows of ``weight`` (N, d).

    ``room``: for as many lists of any lengths.
    """
    neurons, d = weight.shape
    if room:
        blocks = neurons // 16 + min(neurons, list_offsets.shape[0] - 1)
    else:
        blocks = int(list_offsets.diff().add_(15).div_(16, rounding_mode="floor").sum())
    codes = torch.empty((blocks, (d + 1) // 2, 16, 2), dtype=torch.int8)
    terms = torch.empty((blocks, 2, 16), dtype=torch.float32)
    places = torch.empty(neurons, dtype=torch.int32)
    for tensor in (codes, terms, places):  # zeros: what lists do not fill may be saved with them
        advise_hugepages_(tensor).zero_()
    return codes, terms, places


def recode_rows_(
    codes: Tensor,
    terms: Tensor,
    places: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
) -> None:
    """Renews what :func:`code_lists_` wrote of ``rows``, int64 (n), strictly increasing, that have changed
    since."""
    _ops.recode_rows_(codes, terms, places, weight, bias, rows)


@_fake("slide_torch::recode_rows_")
def _(*arguments: Any) -> None:
    return None


def topk_lists(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    list_offsets: Tensor,
    list_rows: Tensor,
    codes: Tensor,
    terms: Tensor,
    probes: Tensor,
    k: int,
    rescored: int,
    list_cap: int = 2**31 - 1,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """As :func:`topk_linear`, among the rows of some lists only: the k best, scored exactly, of the
    ``rescored`` rows that score best by their codes. Where a sample's lists hold fewer than k rows, the last
    values are -inf and their indices -1.

    Args:
        list_offsets: int64 (lists + 1) into ``list_rows``, int32, in which no row stands twice.
        codes, terms: of :func:`code_lists_`.
        probes: int64 (B, any), distinct lists of each sample; -1 is none.
        rescored: at least k.
        list_cap: most rows looked at of a list, rounded up to blocks of 16, from a block on that ``seed``
            determines.
        weight: may be bfloat16 beside float32 ``input`` and ``bias``.
    """
    return _ops.topk_lists(
        input,
        weight,
        bias,
        list_offsets,
        list_rows,
        codes,
        terms,
        probes,
        k,
        rescored,
        list_cap,
        seed,
    )


@_fake("slide_torch::topk_lists")
def _(
    input: Any,
    weight: Any,
    bias: Any,
    list_offsets: Any,
    list_rows: Any,
    codes: Any,
    terms: Any,
    probes: Any,
    k: Any,
    *rest: Any,
) -> Any:
    shape = (input.shape[0], k)
    return input.new_empty(shape), input.new_empty(shape, dtype=torch.int64)


def list_centers(
    weight: Tensor, bias: Tensor | None, list_offsets: Tensor, list_rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean row of each list, (lists, d, or d + 1 with the bias appended), and the root mean square
    distance (lists) of its rows from it; zeros for an empty list."""
    return _ops.list_centers(weight, bias, list_offsets, list_rows)


@_fake("slide_torch::list_centers")
def _(weight: Any, bias: Any, list_offsets: Any, list_rows: Any) -> Any:
    return _fake_centers(weight, bias, list_offsets)


def _fake_centers(weight: Tensor, bias: Tensor | None, offsets: Tensor) -> tuple[Tensor, Tensor]:
    lists, width = offsets.shape[0] - 1, weight.shape[1] + int(bias is not None)
    return weight.new_empty((lists, width)), weight.new_empty((lists,))


# --- cross entropy -----------------------------------------------------------------------------------


def shared_cross_entropy(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    log_weight: Tensor | None,
    label_offsets: Tensor,
    label_places: Tensor,
    label_probabilities: Tensor,
    scale: float,
    sparse: bool,
) -> Tensor:
    """Losses (B) of a softmax over one active set for the whole batch; differentiable.

    Args:
        input: (B, d); weight: (N, d); bias: (N) or None; one dtype, float32 or float64.
        rows: int64 (U).
        log_weight: (U), added to the logits, or None.
        label_offsets: int64 (B + 1) into the two next.
        label_places: int64, a label's place in ``rows``; label_probabilities: its share of the target.
        scale: what logits (not ``log_weight``) are multiplied by.
        sparse: whether backward gives ``weight`` and ``bias`` row-sparse gradients.
    """
    refuse_transforms("shared_cross_entropy", input, weight, bias)
    return _ops.shared_cross_entropy(
        input,
        weight,
        bias,
        rows,
        log_weight,
        label_offsets,
        label_places,
        label_probabilities,
        scale,
        sparse,
    )[0]


def sample_cross_entropy(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    offsets: Tensor,
    pair_offsets: Tensor,
    pair_positions: Tensor,
    pair_samples: Tensor,
    log_weight: Tensor | None,
    label_offsets: Tensor,
    label_places: Tensor,
    label_probabilities: Tensor,
    scale: float,
    sparse: bool,
) -> Tensor:
    """Losses (B) of a softmax over each sample's own active set; differentiable.

    As :func:`shared_cross_entropy`, with ``rows`` to ``pair_samples`` as :func:`transpose_active` gives
    them; ``log_weight`` (pairs) and ``label_places`` refer to the sample-major list of pairs.
    """
    refuse_transforms("sample_cross_entropy", input, weight, bias)
    return _ops.sample_cross_entropy(
        input,
        weight,
        bias,
        rows,
        offsets,
        pair_offsets,
        pair_positions,
        pair_samples,
        log_weight,
        label_offsets,
        label_places,
        label_probabilities,
        scale,
        sparse,
    )[0]


@_fake("slide_torch::shared_cross_entropy")
def _(
    input: Any,
    weight: Any,
    bias: Any,
    rows: Any,
    log_weight: Any,
    offsets: Any,
    places: Any,
    probabilities: Any,
    scale: Any,
    sparse: Any,
) -> Any:
    batch = input.shape[0]
    return (
        input.new_empty((batch,)),
        input.new_empty((rows.shape[0], batch)),
        input.new_empty((batch,)),
    )


@_fake("slide_torch::sample_cross_entropy")
def _(
    input: Any,
    weight: Any,
    bias: Any,
    rows: Any,
    offsets: Any,
    pair_offsets: Any,
    pair_positions: Any,
    pair_samples: Any,
    *rest: Any,
) -> Any:
    batch = input.shape[0]
    return (
        input.new_empty((batch,)),
        input.new_empty((pair_positions.shape[0],)),
        input.new_empty((batch,)),
    )


@_fake("slide_torch::shared_cross_entropy_backward")
@_fake("slide_torch::sample_cross_entropy_backward")
def _(grad_loss: Any, input: Any, weight: Any, rows: Any, *rest: Any) -> Any:
    has_rows, has_bias = rest[-2:]
    return (
        torch.empty_like(input),
        input.new_empty((rows.shape[0] if has_rows else 0, input.shape[1])),
        input.new_empty((rows.shape[0] if has_bias else 0,)),
    )


@_fake("slide_torch::shared_cross_entropy_backward_adam_")
@_fake("slide_torch::sample_cross_entropy_backward_adam_")
def _(grad_loss: Any, input: Any, weight: Any, rows: Any, *rest: Any) -> Any:
    has_bias = rest[-10]
    return torch.empty_like(input), input.new_empty((rows.shape[0] if has_bias else 0,))


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.scale, ctx.sparse = inputs
    _, logits, log_normalizer = output
    ctx.mark_non_differentiable(logits, log_normalizer)
    # weight and input are saved as such, so that torch notices in-place changes before backward
    del tensors[2]
    ctx.save_for_backward(*tensors, logits, log_normalizer)


def _hand_over(rows: Tensor, values: Tensor, neurons: int, sparse: bool) -> Tensor:
    """Gradient rows as torch's optimizers take them: row-sparse, or dense with zeros elsewhere."""
    if sparse:
        shape = (neurons, *values.shape[1:])
        return torch.sparse_coo_tensor(
            rows.unsqueeze(0), values, shape, is_coalesced=True, check_invariants=False
        )
    if statically_known_true(rows.shape[0] == neurons):
        return values
    return rows_to_dense(rows, values, neurons)


def _gradients(
    ctx: Any, op: Any, fused_op: Any, grad_loss: Tensor, saved: tuple, *between: Tensor
) -> tuple:
    """Gradients of input, weight and bias. What an optimizer fuses with backward is updated at once, and
    has no gradient then; where the loss has no ``fused_op``, or the gradient is a result of
    ``torch.autograd.grad``, it is handed over all the same."""
    input, weight, rows = saved[:3]
    grad_loss = (grad_loss * ctx.scale).contiguous()
    need_input, need_weight, need_bias = ctx.needs_input_grad[:3]
    neurons = weight.shape[0]
    optimizer = (
        fused_backward.optimizer_of(weight) if fused_op and ctx.sparse and need_weight else None
    )
    if optimizer is not None:
        # needs_input_grad is of the forward; like torch, do not train what is not asked for or frozen since
        accumulates = fused_backward.accumulates(ctx.next_functions[1][0])
        if accumulates is False or not weight.requires_grad:
            need_weight = False
        if not accumulates or not weight.requires_grad:
            optimizer = None
    if optimizer is None:
        grad_input, grad_rows, grad_bias = op(
            grad_loss, input, weight, rows, *between, need_weight, need_bias
        )
        grad_weight = _hand_over(rows, grad_rows, neurons, ctx.sparse) if need_weight else None
    else:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "slide_torch.optim.Adam: fuse_backward: expected create_graph=False, got True: gradients of "
                "a backward that updates the weight cannot be differentiated: set fuse_backward=False"
            )
        grad_weight = None
        with torch.no_grad(), optimizer.fused_step(weight) as step:
            grad_input, grad_bias = fused_op(
                grad_loss, input, weight, rows, *between, need_bias, **step
            )
            torch.autograd.graph.increment_version((weight, step["exp_avg"], step["exp_avg_sq"]))
    return (
        grad_input if need_input else None,
        grad_weight,
        _hand_over(rows, grad_bias, neurons, ctx.sparse) if need_bias else None,
    )


def _shared_backward(ctx: Any, grad_loss: Tensor, *unused: Tensor) -> tuple:
    # saved: input, weight, rows, log_weight, label_*(3), logits, log_normalizer
    saved = ctx.saved_tensors  # once: activation checkpointing recomputes for it, and only once
    found = _gradients(
        ctx,
        _ops.shared_cross_entropy_backward,
        _ops.shared_cross_entropy_backward_adam_,
        grad_loss,
        saved,
        *saved[4:],
    )
    return (*found, *[None] * 7)


def _sample_backward(ctx: Any, grad_loss: Tensor, *unused: Tensor) -> tuple:
    # saved: input, weight, rows, offsets, pair_*(3), log_weight, label_*(3), logits, log_normalizer
    saved = ctx.saved_tensors
    found = _gradients(
        ctx,
        _ops.sample_cross_entropy_backward,
        _ops.sample_cross_entropy_backward_adam_,
        grad_loss,
        saved,
        *saved[3:7],
        *saved[8:],
    )
    return (*found, *[None] * 11)


torch.library.register_autograd(
    "slide_torch::shared_cross_entropy", _shared_backward, setup_context=_save
)
torch.library.register_autograd(
    "slide_torch::sample_cross_entropy", _sample_backward, setup_context=_save
)


# --- binary cross entropy ----------------------------------------------------------------------------


def shared_binary_cross_entropy(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    row_weight: Tensor | None,
    label_offsets: Tensor,
    label_places: Tensor,
    label_values: Tensor,
    label_extra: Tensor | None,
    scale: float,
    sparse: bool,
) -> Tensor:
    """Losses (B): over one active set for the whole batch the sum of ``row_weight * softplus(logit)``, over
    a sample's labels that of ``label_extra * softplus(logit) - label_values * logit``; differentiable.

    Args:
        row_weight: (U), what an active neuron counts, or None for 1.
        label_values: (labels), targets; label_extra: (labels) or None for 0.
        input, weight, bias, rows, label_offsets, label_places, scale, sparse: as for
            :func:`shared_cross_entropy`.
    """
    refuse_transforms("shared_binary_cross_entropy", input, weight, bias)
    return _ops.shared_binary_cross_entropy(
        input,
        weight,
        bias,
        rows,
        row_weight,
        label_offsets,
        label_places,
        label_values,
        label_extra,
        scale,
        sparse,
    )[0]


def sample_binary_cross_entropy(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    offsets: Tensor,
    pair_offsets: Tensor,
    pair_positions: Tensor,
    pair_samples: Tensor,
    row_weight: Tensor | None,
    label_offsets: Tensor,
    label_places: Tensor,
    label_values: Tensor,
    label_extra: Tensor | None,
    scale: float,
    sparse: bool,
) -> Tensor:
    """As :func:`shared_binary_cross_entropy`, over each sample's own active set; ``row_weight`` (pairs) and
    ``label_places`` refer to the sample-major list of pairs, as in :func:`sample_cross_entropy`."""
    refuse_transforms("sample_binary_cross_entropy", input, weight, bias)
    return _ops.sample_binary_cross_entropy(
        input,
        weight,
        bias,
        rows,
        offsets,
        pair_offsets,
        pair_positions,
        pair_samples,
        row_weight,
        label_offsets,
        label_places,
        label_values,
        label_extra,
        scale,
        sparse,
    )[0]


@_fake("slide_torch::shared_binary_cross_entropy")
def _(input: Any, weight: Any, bias: Any, rows: Any, *rest: Any) -> Any:
    batch = input.shape[0]
    return input.new_empty((batch,)), input.new_empty((rows.shape[0], batch))


@_fake("slide_torch::sample_binary_cross_entropy")
def _(
    input: Any,
    weight: Any,
    bias: Any,
    rows: Any,
    offsets: Any,
    pair_offsets: Any,
    pair_positions: Any,
    *rest: Any,
) -> Any:
    return input.new_empty((input.shape[0],)), input.new_empty((pair_positions.shape[0],))


@_fake("slide_torch::shared_binary_cross_entropy_backward")
@_fake("slide_torch::sample_binary_cross_entropy_backward")
def _(grad_loss: Any, input: Any, weight: Any, rows: Any, *rest: Any) -> Any:
    has_rows, has_bias = rest[-2:]
    return (
        torch.empty_like(input),
        input.new_empty((rows.shape[0] if has_rows else 0, input.shape[1])),
        input.new_empty((rows.shape[0] if has_bias else 0,)),
    )


def _save_binary(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.scale, ctx.sparse = inputs
    _, logits = output
    ctx.mark_non_differentiable(logits)
    del tensors[2]
    ctx.save_for_backward(*tensors, logits)


def _binary_backward(ctx: Any, op: Any, grad_loss: Tensor) -> tuple:
    # saved: input, weight, rows, (per-sample: offsets, pair_*(3),) row_weight, label_*(4), logits
    saved = ctx.saved_tensors
    between = saved[3:]
    found = _gradients(ctx, op, None, grad_loss, saved, *between)
    return (*found, *[None] * (len(between) + 2))


def _shared_binary_backward(ctx: Any, grad_loss: Tensor, *unused: Tensor) -> tuple:
    return _binary_backward(ctx, _ops.shared_binary_cross_entropy_backward, grad_loss)


def _sample_binary_backward(ctx: Any, grad_loss: Tensor, *unused: Tensor) -> tuple:
    return _binary_backward(ctx, _ops.sample_binary_cross_entropy_backward, grad_loss)


torch.library.register_autograd(
    "slide_torch::shared_binary_cross_entropy", _shared_binary_backward, setup_context=_save_binary
)
torch.library.register_autograd(
    "slide_torch::sample_binary_cross_entropy", _sample_binary_backward, setup_context=_save_binary
)


# --- linear maps into and out of active neurons --------------------------------------------------------


def shared_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, sparse: bool
) -> Tensor:
    """``(input @ weight[rows].T + bias[rows]).T``: values (U, B) of one active set for the whole batch;
    differentiable.

    Args:
        input: (B, d); weight: (N, d); bias: (N) or None; one dtype, float32 or float64.
        rows: int64 (U).
        sparse: whether backward gives ``weight`` and ``bias`` row-sparse gradients.
    """
    refuse_transforms("shared_linear", input, weight, bias)
    return _ops.shared_linear(input, weight, bias, rows, sparse)


def shared_weighted_rows(values: Tensor, weight: Tensor, rows: Tensor, sparse: bool) -> Tensor:
    """``values.T @ weight[rows]``, (B, d), of ``values`` (U, B) as :func:`shared_linear` gives them;
    differentiable."""
    refuse_transforms("shared_weighted_rows", values, weight)
    return _ops.shared_weighted_rows(values, weight, rows, sparse)


def sample_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    offsets: Tensor,
    pair_offsets: Tensor,
    pair_positions: Tensor,
    pair_samples: Tensor,
    sparse: bool,
) -> Tensor:
    """Values (pairs), sample-major, of each sample's own active set; differentiable.

    As :func:`shared_linear`, with ``rows`` to ``pair_samples`` as :func:`transpose_active` gives them.
    """
    refuse_transforms("sample_linear", input, weight, bias)
    return _ops.sample_linear(
        input,
        weight,
        bias,
        rows,
        offsets,
        pair_offsets,
        pair_positions,
        pair_samples,
        sparse,
    )


def sample_weighted_rows(
    values: Tensor,
    weight: Tensor,
    rows: Tensor,
    offsets: Tensor,
    pair_offsets: Tensor,
    pair_positions: Tensor,
    pair_samples: Tensor,
    sparse: bool,
) -> Tensor:
    """For each sample the sum of its active neurons' rows of ``weight`` (N, d), each times its value of
    ``values`` (pairs), as :func:`sample_linear` gives them: (B, d); differentiable."""
    refuse_transforms("sample_weighted_rows", values, weight)
    return _ops.sample_weighted_rows(
        values, weight, rows, offsets, pair_offsets, pair_positions, pair_samples, sparse
    )


@_fake("slide_torch::shared_linear")
def _(input: Any, weight: Any, bias: Any, rows: Any, sparse: Any) -> Any:
    return input.new_empty((rows.shape[0], input.shape[0]))


@_fake("slide_torch::shared_weighted_rows")
def _(values: Any, weight: Any, rows: Any, sparse: Any) -> Any:
    return values.new_empty((values.shape[1], weight.shape[1]))


@_fake("slide_torch::sample_linear")
def _(
    input: Any,
    weight: Any,
    bias: Any,
    rows: Any,
    offsets: Any,
    pair_offsets: Any,
    pair_positions: Any,
    pair_samples: Any,
    sparse: Any,
) -> Any:
    return input.new_empty((pair_positions.shape[0],))


@_fake("slide_torch::sample_weighted_rows")
def _(values: Any, weight: Any, rows: Any, offsets: Any, *rest: Any) -> Any:
    return values.new_empty((offsets.shape[0] - 1, weight.shape[1]))


@_fake("slide_torch::shared_linear_backward")
@_fake("slide_torch::sample_linear_backward")
def _(grad_values: Any, input: Any, weight: Any, rows: Any, *rest: Any) -> Any:
    has_bias = rest[-1]
    return (
        torch.empty_like(input),
        input.new_empty((rows.shape[0], input.shape[1])),
        input.new_empty((rows.shape[0] if has_bias else 0,)),
    )


@_fake("slide_torch::shared_weighted_rows_backward")
@_fake("slide_torch::sample_weighted_rows_backward")
def _(grad_output: Any, values: Any, weight: Any, rows: Any, *rest: Any) -> Any:
    return torch.empty_like(values), values.new_empty((rows.shape[0], weight.shape[1]))


def _save_linear(ctx: Any, inputs: tuple, output: Tensor) -> None:
    input, weight, _, *active, ctx.sparse = inputs
    ctx.save_for_backward(input, weight, *active)


def _linear_backward(op: Any) -> Any:
    def backward(ctx: Any, grad_values: Tensor) -> tuple:
        input, weight, *active = ctx.saved_tensors
        need_input, need_weight, need_bias = ctx.needs_input_grad[:3]
        neurons, rows = weight.shape[0], active[0]
        grad_input, grad_rows, grad_bias = op(
            grad_values.contiguous(), input, weight, *active, need_bias
        )
        return (
            grad_input if need_input else None,
            _hand_over(rows, grad_rows, neurons, ctx.sparse) if need_weight else None,
            _hand_over(rows, grad_bias, neurons, ctx.sparse) if need_bias else None,
            *[None] * (len(active) + 1),
        )

    return backward


def _save_weighted_rows(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.sparse = inputs
    ctx.save_for_backward(*tensors)


def _weighted_rows_backward(op: Any) -> Any:
    def backward(ctx: Any, grad_output: Tensor) -> tuple:
        values, weight, *active = ctx.saved_tensors
        need_values, need_weight = ctx.needs_input_grad[:2]
        grad_values, grad_rows = op(grad_output.contiguous(), values, weight, *active)
        grad_weight = _hand_over(active[0], grad_rows, weight.shape[0], ctx.sparse)
        return (
            grad_values if need_values else None,
            grad_weight if need_weight else None,
            *[None] * (len(active) + 1),
        )

    return backward


for _pattern in ("shared", "sample"):
    for _name, _backward, _setup in (
        ("linear", _linear_backward, _save_linear),
        ("weighted_rows", _weighted_rows_backward, _save_weighted_rows),
    ):
        torch.library.register_autograd(
            f"slide_torch::{_pattern}_{_name}",
            _backward(getattr(_ops, f"{_pattern}_{_name}_backward")),
            setup_context=_setup,
        )


def _refuse_twice(ctx: Any, *grads: Tensor) -> NoReturn:
    raise RuntimeError(
        "slide_torch: what is computed over active sets is differentiable once; backward with "
        "create_graph=True cannot be differentiated again"
    )


def _save_nothing(ctx: Any, inputs: tuple, output: tuple) -> None:
    pass


# without these torch would warn and take the second derivative for zero
for _name in ("cross_entropy", "binary_cross_entropy", "linear", "weighted_rows"):
    for _pattern in ("shared", "sample"):
        torch.library.register_autograd(
            f"slide_torch::{_pattern}_{_name}_backward", _refuse_twice, setup_context=_save_nothing
        )


def _save_rows(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


torch.library.register_autograd(
    "slide_torch::rows_to_dense",
    lambda ctx, grad: (None, grad.index_select(0, ctx.saved_tensors[0]), None),
    setup_context=_save_rows,
)


# --- parameters in bfloat16 ----------------------------------------------------------------------------

torch.library.define(
    "slide_torch::widened_rows",
    "(Tensor parameter, Tensor rows, bool sparse) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def widened_rows(parameter: Tensor, rows: Tensor, sparse: bool) -> Tensor:
    """``parameter[rows]`` in float32, (U, ...), of a bfloat16 ``parameter`` (N, ...) and ``rows`` int64 (U),
    strictly increasing. Differentiable: the gradient is bfloat16, row-sparse if ``sparse``."""
    refuse_transforms("widened_rows", parameter)
    return _ops.widened_rows(parameter, rows, sparse)


@torch.library.impl("slide_torch::widened_rows", "CPU")
def _(parameter: Tensor, rows: Tensor, sparse: bool) -> Tensor:
    return parameter.index_select(0, rows).float()


@_fake("slide_torch::widened_rows")
def _(parameter: Any, rows: Any, sparse: Any) -> Any:
    return parameter.new_empty((rows.shape[0], *parameter.shape[1:]), dtype=torch.float32)


def _save_widened(ctx: Any, inputs: tuple, output: Tensor) -> None:
    parameter, rows, ctx.sparse = inputs
    ctx.neurons = parameter.shape[0]
    ctx.save_for_backward(rows)


def _widened_backward(ctx: Any, grad: Tensor) -> tuple:
    (rows,) = ctx.saved_tensors
    return _hand_over(rows, grad.to(torch.bfloat16), ctx.neurons, ctx.sparse), None, None


torch.library.register_autograd(
    "slide_torch::widened_rows", _widened_backward, setup_context=_save_widened
)


def instruction_set() -> str:
    """The level of the kernels in use: ``"baseline"``, ``"avx2"`` or ``"avx512"``.

    It is the best of this machine unless the environment variable ``SLIDE_TORCH_ISA`` names another
    before the first use.
    """
    return _ops.instruction_set()
