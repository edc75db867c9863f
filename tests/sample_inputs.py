"""Samples of the arguments of every operator, for every test of all operators."""

import torch
from helpers import coded_lists

from slide_torch import HashTables, LSHOptions, ops

N, D, B, K, L = 40, 12, 5, 3, 4
DTYPES = (torch.float32, torch.float64)


def randn(*shape, dtype=torch.float32, grad=False):
    return torch.randn(*shape, dtype=dtype, requires_grad=grad)


def hash_samples(functions):
    """With and without bias, center and a choice of rows, in both dtypes."""
    rows = torch.tensor([3, 0, 3])
    for dtype in DTYPES:
        x, bias = randn(N, D, dtype=dtype), randn(N, dtype=dtype)
        yield (x, None, None, None, *functions(False))
        yield (x, bias, rows, randn(D + 1, dtype=dtype), *functions(True))


def hadamard(bias):
    return torch.randint(2, (1, 3, 16)).mul(2).sub(1).to(torch.int8), randn(2, 1, 16), K, L


def dense(bias):
    return randn(K * L, D + bias), K, L


def winners(bias):
    return torch.randint(D + bias, (K * L, 8), dtype=torch.int32), K, L


def wide_winners(bias):  # 18 bits: codes of int32
    return torch.randint(D + bias, (6 * L, 8), dtype=torch.int32), 6, L


def probing(functions):
    """The samples of a family, then with norms augmented (one more coordinate) and three probes."""
    yield from hash_samples(functions)
    for x, bias, rows, center, *rest in hash_samples(lambda bias: functions(bias + 1)):
        yield (x, bias, rows, center, *rest, 2.0, 3)


def retrieved():
    """Arguments of rerank before the layer: five samples, the first two with labels."""
    offsets, active = lists()
    label_offsets = torch.tensor([0, 1, 2, 2, 2, 2])
    return offsets, active, label_offsets, torch.zeros(2).int(), torch.tensor([1, 8]).int()


def binary_samples(pattern):
    for dtype in DTYPES:
        for extra in (False, True):
            x, weight = randn(B, D, dtype=dtype, grad=True), randn(N, D, dtype=dtype, grad=True)
            bias = randn(N, dtype=dtype, grad=True) if extra else None
            active, count = active_arguments(pattern)
            row_weight = torch.rand(count, dtype=dtype) if extra else None
            offsets, places, values = labels(dtype)
            of_labels = (offsets, places, values, values / 2 if extra else None)
            yield (x, weight, bias, *active, row_weight, *of_labels, 0.5, False)


def binary_backward_samples(pattern):
    forward = getattr(torch.ops.slide_torch, f"{pattern}_binary_cross_entropy")
    for arguments in binary_samples(pattern):
        x, weight, bias, *rest = (
            a.detach() if isinstance(a, torch.Tensor) else a for a in arguments
        )
        _, logits = forward(x, weight, bias, *rest)
        for has_rows in (True, False):
            yield (
                randn(B, dtype=x.dtype),
                x,
                weight,
                *rest[:-2],
                logits,
                has_rows,
                bias is not None,
            )


def codes(count=N, dtype=torch.int16):
    return torch.randint(1 << K, (L, count)).to(dtype)


def lists():
    """Five samples' active sets, sample-major, one of them empty."""
    offsets = torch.tensor([0, 3, 4, 4, 8, 10])
    return offsets, torch.tensor([2, 0, 8, 5, 39, 3, 2, 5, 0, 8], dtype=torch.int32)


def labels(dtype):
    """Offsets, places (valid in either pattern) and probabilities."""
    offsets = torch.tensor([0, 2, 3, 3, 4, 5])
    return offsets, torch.tensor([0, 2, 3, 4, 5]), torch.rand(5, dtype=dtype)


def loss_samples(pattern):
    for dtype in DTYPES:
        for extra in (False, True):
            x, weight = randn(B, D, dtype=dtype, grad=True), randn(N, D, dtype=dtype, grad=True)
            bias = randn(N, dtype=dtype, grad=True) if extra else None
            active, pairs = active_arguments(pattern)
            log_weight = randn(pairs, dtype=dtype) if extra else None
            for decoupled in (False, True):
                yield (x, weight, bias, *active, log_weight, *labels(dtype), 0.5, decoupled, False)


def active_arguments(pattern):
    offsets, active = lists()
    rows, *pair = ops.transpose_active(offsets, active, N)
    if pattern == "shared":
        return (rows,), len(rows)
    return (rows, offsets, *pair), len(active)


def backward_samples(pattern):
    forward = getattr(torch.ops.slide_torch, f"{pattern}_cross_entropy")
    for arguments in loss_samples(pattern):
        x, weight, bias, *rest = (
            a.detach() if isinstance(a, torch.Tensor) else a for a in arguments
        )
        _, logits, log_normalizer = forward(x, weight, bias, *rest)
        active, tail = rest[:-7], rest[-6:-3]  # without log_weight, scale, decoupled, sparse
        grad = randn(B, dtype=x.dtype)
        for has_rows in (True, False):
            yield (
                grad,
                x,
                weight,
                *active,
                *tail,
                logits,
                log_normalizer,
                rest[-2],
                has_rows,
                bias is not None,
            )


def with_grad_log_normalizer(samples):
    """Samples of a backward, without and (not decoupled) with the log normaliser's derivative."""
    for arguments in samples:
        yield arguments
        decoupled = next(a for a in arguments if isinstance(a, bool))
        if not decoupled:
            yield *arguments, torch.randn_like(arguments[0])


def fused_samples(pattern):
    for *arguments, has_rows, has_bias in backward_samples(pattern):
        if not has_rows:
            continue
        weight = arguments[2]
        moments = randn(*weight.shape, dtype=weight.dtype), torch.rand_like(weight)
        yield (*arguments, has_bias, *moments, 0.1, 0.9, 0.99, 1e-8, 0.01, 3, False)


def retrieve_samples():
    table_offsets, table_ids = ops.build_tables(codes(), K)
    tail = torch.tensor([1, 30], dtype=torch.int32)
    offsets, active = torch.tensor([0, 1, 1, 2, 4, 4]), torch.tensor([7, 7, 0, 39]).int()
    for dtype in (torch.int16, torch.int32):
        for end in (tail, tail[:0]):
            yield codes(B, dtype), table_offsets, table_ids, offsets, active, end, 6, 100, 3


def predict_samples(kind):
    offsets, rows = torch.tensor([0, 9, 9, N]), torch.randperm(N).int()
    for dtype in DTYPES:
        for bias in (None, randn(N, dtype=dtype)):
            x, weight = randn(B, D, dtype=dtype), randn(N, D, dtype=dtype)
            if kind == "linear":
                yield x, weight, bias, 3
            elif kind == "search":
                coded = coded_lists(weight, bias, offsets, rows)[:2]
                found = ops.list_centers(weight, None, offsets, rows)
                centers, radius = (t[None].float() for t in found)
                ranked = ops.code_centers(centers, None, radius)
                yield x, weight, bias, offsets, rows, *coded, *ranked, 0.2, 1, 2, 3, 5
            elif kind == "lists":
                coded = coded_lists(weight, bias, offsets, rows)[:2]
                for cap in (2, 100):
                    probes = torch.tensor([[0, 1, -1]] * B)
                    yield x, weight, bias, offsets, rows, *coded, probes, 3, 5, cap, 7
            elif kind == "codes":
                yield *ops.empty_codes(weight, offsets, room=False), weight, bias, offsets, rows
            elif kind == "recode":
                coded = coded_lists(weight, bias, offsets, rows)
                yield *coded, randn(N, D, dtype=dtype), bias, torch.tensor([0, 7])
            elif kind == "move":
                coded = coded_lists(weight, bias, offsets, rows)
                moved = torch.cat([offsets[:1], offsets[1:-1] - 1, offsets[-1:]])
                yield *coded, offsets, moved, rows, rows[8:9].long()
            elif kind == "coded centers":
                codes, terms, _ = coded_lists(weight, bias, offsets, rows)
                yield codes, terms, offsets, D, bias is not None
            else:
                yield weight, bias, offsets, rows


def linear_samples(pattern, grad=True):
    for dtype in DTYPES:
        for bias in (None, randn(N, dtype=dtype, grad=grad)):
            x, weight = randn(B, D, dtype=dtype, grad=grad), randn(N, D, dtype=dtype, grad=grad)
            yield (x, weight, bias, *active_arguments(pattern)[0], False)


def linear_backward_samples(pattern):
    forward = getattr(torch.ops.slide_torch, f"{pattern}_linear")
    for x, weight, bias, *active, sparse in linear_samples(pattern, grad=False):
        values = forward(x, weight, bias, *active, sparse)
        yield (torch.randn_like(values), x, weight, *active, bias is not None)


def weighted_rows_samples(pattern, grad=True):
    for x, weight, bias, *active, sparse in linear_samples(pattern, grad=False):
        values = getattr(torch.ops.slide_torch, f"{pattern}_linear")(
            x, weight, bias, *active, sparse
        )
        yield (values.requires_grad_(grad), weight.requires_grad_(grad), *active, sparse)


def weighted_rows_backward_samples(pattern):
    for values, weight, *active, _ in weighted_rows_samples(pattern, grad=False):
        yield (randn(B, D, dtype=values.dtype), values, weight, *active)


def both_ways(samples):
    """As they are, and with row-sparse gradients: operators' last argument."""
    for *arguments, sparse in samples:
        yield (*arguments, sparse)
        yield (*arguments, not sparse)


def widened_samples():
    for rest in ((), (D,)):
        parameter = randn(N, *rest).bfloat16().requires_grad_()
        yield parameter, torch.tensor([0, 3, 39]), False


def adam_samples():
    scalars = (0.1, 0.9, 0.99, 1e-8, 0.1, 3, False)
    rows = torch.tensor([0, 3])
    for dtype, moments in (
        *((torch.float32, torch.float32), (torch.float64, torch.float64)),
        *((torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)),
    ):
        for some in (rows, None):
            count = N if some is None else len(some)
            parameter, grad = randn(N, D).to(dtype), randn(count, D).to(dtype)
            yield (
                parameter,
                randn(N, D).to(moments),
                torch.rand(N, D).to(moments),
                some,
                grad,
                *scalars,
            )


def sgd_samples():
    for dtype in (*DTYPES, torch.bfloat16):
        for rows in (torch.tensor([0, 3]), None):
            grad = randn(N if rows is None else 2, D).to(dtype)
            own = (randn(N, D).to(dtype), randn(N, D).to(dtype), rows, grad)
            yield *own, 0.1, 0.9, 0.1, True, False, 3
            yield own[0].clone(), None, *own[2:], 0.1, 0.0, 0.1, False, True, 0


def adagrad_samples():
    for dtype in (*DTYPES, torch.bfloat16):
        for rows in (torch.tensor([0, 3]), None):
            grad = randn(N if rows is None else 2, D).to(dtype)
            yield randn(N, D).to(dtype), torch.rand(N, D).to(dtype), rows, grad, 0.1, 1e-8, False, 3


def xmc_samples():
    text = torch.frombuffer(bytearray(b"1,2 3:0.5 4:1\n\n 1:2"), dtype=torch.uint8)
    return [(text, 5, 3), (text[:0], 5, 3, 7)]


SMALL = {"budget": 4, "tail": 6, "K": 2, "L": 3}
# those that draw_step's arguments name by their handles: weakly held elsewhere
DRAWN_FROM = [
    HashTables(LSHOptions(**options), N, D, has_bias=True)
    for options in (
        {"budget": N},
        {"budget": 0, "tail": 6},
        SMALL,
        {**SMALL, "correction": "importance"},
        {**SMALL, "pattern": "per_sample"},
        {**SMALL, "pattern": "per_sample", "correction": "importance"},
        {**SMALL, "family": "kmeans", "K": 3, "L": 1, "probes": 2, "rerank": 20},
        {**SMALL, "tail_distribution": "log_uniform", "correction": "importance"},
        {
            **SMALL,
            "tail_distribution": "log_uniform",
            "correction": "importance",
            "pattern": "per_sample",
        },
        {"budget": 4, "tail": 6, "family": "exact"},
    )
]


def draw_samples():
    """Of a set of all neurons, and of drawn ones by every kind of table, correction and tail."""
    indices = torch.tensor([3, 0, 39, -100, 7])
    lists = torch.tensor([[3, 5], [0, -100], [-100, 39], [-100, -100], [7, 7]])
    for tables in DRAWN_FROM:
        for target in (indices, lists):
            layer = (randn(B, D), randn(N, D), randn(N))
            negatives = torch.tensor([5, -100, 38]) if target is indices else lists.flip(0)
            ticket = torch.zeros((), dtype=torch.int64)
            for named in (None, negatives):
                how = ([B], named, None, -100, True, True)
                yield *layer, target, *how, tables.handle, ticket, "lsh_linear_cross_entropy"


def sample_inputs():
    """For each operator's name, a function that makes its samples: tuples of arguments."""
    return SAMPLES


SAMPLES = {
    "simhash_hadamard": lambda: probing(hadamard),
    "simhash_dense": lambda: probing(dense),
    "dwta": lambda: [*probing(winners), *hash_samples(wide_winners)],
    "nearest_centroids": lambda: probing(lambda bias: (randn(L, 8, D + bias),)),
    "hashed_rows": lambda: [
        (randn(N, D), None, None, None, None),
        (randn(N, D), randn(N), torch.tensor([3, 0]), randn(D + 1), 2.0),
    ],
    "nearest_in_groups": lambda: [
        (
            *(randn(N, D, dtype=t), bias, rows, None, randn(8, D + (bias is not None))),
            *(randn(2, D + (bias is not None)), torch.tensor([0, 3, 8]), torch.arange(8).int(), 1),
        )
        for t in DTYPES
        for bias in (None, randn(N, dtype=t))
        for rows in (None, torch.tensor([3, 0]))
    ],
    "group_means": lambda: [(randn(N, D, dtype=t), torch.arange(N) % 4 - 1, 5) for t in DTYPES],
    "mean_row": lambda: [(randn(N, D), None, 8), (randn(N, D).double(), randn(N).double(), 100)],
    "build_tables": lambda: [(codes(), K), (codes(dtype=torch.int32), K)],
    "update_codes_": lambda: [(codes(), torch.tensor([5, 39]), codes(2))],
    "retrieve": retrieve_samples,
    "transpose_active": lambda: [(*lists(), N)],
    "rerank": lambda: [
        (*retrieved(), randn(B, D, dtype=t), randn(N, D, dtype=t), bias, 2)
        for t in DTYPES
        for bias in (None, randn(N, dtype=t))
    ],
    "union_active": lambda: [(lists()[1], torch.tensor([1, 2]).int(), N)],
    "sample_tail": lambda: [(7, N, 3), (N, N, 2**62)],
    "shared_cross_entropy": lambda: both_ways(loss_samples("shared")),
    "shared_cross_entropy_backward": lambda: with_grad_log_normalizer(backward_samples("shared")),
    "shared_cross_entropy_backward_adam_": lambda: with_grad_log_normalizer(
        fused_samples("shared")
    ),
    "sample_cross_entropy": lambda: both_ways(loss_samples("sample")),
    "sample_cross_entropy_backward": lambda: with_grad_log_normalizer(backward_samples("sample")),
    "sample_cross_entropy_backward_adam_": lambda: with_grad_log_normalizer(
        fused_samples("sample")
    ),
    "shared_binary_cross_entropy": lambda: both_ways(binary_samples("shared")),
    "shared_binary_cross_entropy_backward": lambda: binary_backward_samples("shared"),
    "sample_binary_cross_entropy": lambda: both_ways(binary_samples("sample")),
    "sample_binary_cross_entropy_backward": lambda: binary_backward_samples("sample"),
    "shared_linear": lambda: both_ways(linear_samples("shared")),
    "shared_linear_backward": lambda: linear_backward_samples("shared"),
    "shared_weighted_rows": lambda: both_ways(weighted_rows_samples("shared")),
    "shared_weighted_rows_backward": lambda: weighted_rows_backward_samples("shared"),
    "sample_linear": lambda: both_ways(linear_samples("sample")),
    "sample_linear_backward": lambda: linear_backward_samples("sample"),
    "sample_weighted_rows": lambda: both_ways(weighted_rows_samples("sample")),
    "sample_weighted_rows_backward": lambda: weighted_rows_backward_samples("sample"),
    "rows_to_dense": lambda: [
        (torch.tensor([0, 3, 39]), randn(3, *rest).to(dtype), N)
        for rest in ((), (D,))
        for dtype in (*DTYPES, torch.bfloat16)
    ],
    "topk_linear": lambda: predict_samples("linear"),
    "code_lists_": lambda: predict_samples("codes"),
    "recode_rows_": lambda: predict_samples("recode"),
    "topk_lists": lambda: predict_samples("lists"),
    "search_lists": lambda: predict_samples("search"),
    "move_codes_": lambda: predict_samples("move"),
    "coded_centers": lambda: predict_samples("coded centers"),
    "list_centers": lambda: predict_samples("centers"),
    "code_centers": lambda: [
        (randn(L, 20, D), bias, randn(L, 20)) for bias in (None, randn(L, 20))
    ],
    "rank_centers": lambda: [
        (
            randn(B, D, dtype=t),
            randn(B),
            *ops.code_centers(randn(L, 20, D), None, randn(L, 20)),
            20,
            3,
        )
        for t in DTYPES
    ],
    "instruction_set": lambda: [()],
    "widened_rows": lambda: both_ways(widened_samples()),
    "draw_step": draw_samples,
    "adam_rows_": adam_samples,
    "sgd_rows_": sgd_samples,
    "adagrad_rows_": adagrad_samples,
    "coalesce_rows": lambda: [
        (torch.tensor([4, 1, 4]), randn(3, *rest, dtype=t), N)
        for rest in ((), (D,), (D, 2))
        for t in DTYPES
    ],
    "advise_hugepages_": lambda: [(randn(N, D),)],
    "touch_rows_": lambda: [
        (randn(N, D, dtype=t), torch.tensor([0, 3]), write)
        for t in DTYPES
        for write in (False, True)
    ],
    "parse_xmc": xmc_samples,
}
