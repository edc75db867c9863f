"""Small problems of the losses, and what their tests compare: losses, gradients, averages over draws."""

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from slide_torch import HashTables, LSHOptions, ops
from slide_torch.active_set import SharedActiveSet
from slide_torch.functional import lsh_linear_binary_cross_entropy, lsh_linear_cross_entropy

PATTERNS = ["shared", "per_sample"]
# options by which all 40 classes are active
ALL_ACTIVE = {
    "exact": dict(budget=40),
    "tail": dict(pattern="per_sample", correction="importance", budget=5, tail=40, K=2, L=3),
}
LISTS = [
    [1, 2, 3],
    [39],
    [],
    [7, 7],
    [0, 5, 9, 20],
    [4],
    [],
    [38, 0],
    [11, 12],
]  # of labels of 40 classes


def make(N=40, d=12, B=9, *, bias=True, dtype=torch.float64, seed=0, **options):
    """A layer, a batch and tables; every neuron is active unless ``options`` say otherwise."""
    torch.set_num_threads(1 if N < 1000 else 2)  # for small problems two are slower
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    options = LSHOptions(**(options or {"budget": N}))
    return SimpleNamespace(
        x=randn(B, d).requires_grad_(),
        weight=(randn(N, d) / 2).requires_grad_(),
        bias=randn(N).requires_grad_() if bias else None,
        y=torch.randint(N, (B,), generator=generator),
        tables=HashTables(options, N, d, has_bias=bias),
    )


def sampled(case, target, *, input=None, **options):
    input = case.x if input is None else input
    return lsh_linear_cross_entropy(
        input, case.weight, target, linear_bias=case.bias, tables=case.tables, **options
    )


def binary(case, target, *, input=None, **options):
    input = case.x if input is None else input
    return lsh_linear_binary_cross_entropy(
        input, case.weight, target, linear_bias=case.bias, tables=case.tables, **options
    )


def dense_binary(case, target, **options):
    logits = F.linear(case.x, case.weight, case.bias)
    return F.binary_cross_entropy_with_logits(logits, target, **options)


def gradients(loss, case):
    """Dense gradients of input, weight and bias."""
    wanted = [t for t in (case.x, case.weight, case.bias) if t is not None]
    found = torch.autograd.grad(loss.sum(), wanted, retain_graph=True)
    return [g.to_dense() if g.is_sparse else g for g in found]


def check_as_exact_as_torch(case, ours, dense):
    """The losses (B) of a float32 ``case`` and their gradients: largest error over largest value, against
    float64, is at most twice that of torch's own float32 layers, ``dense(case)``, or one unit of rounding."""
    exact = SimpleNamespace(**vars(case))
    for name in ("x", "weight", "bias"):
        setattr(exact, name, getattr(case, name).detach().double().requires_grad_())
    found = (
        [losses, *gradients(losses, of)]
        for losses, of in ((dense(exact), exact), (ours, case), (dense(case), case))
    )
    for name, right, mine, other in zip(("loss", "input", "weight", "bias"), *found, strict=True):
        error, allowed = ((x - right).abs().max() / right.abs().max() for x in (mine, other))
        assert error <= max(2 * allowed, torch.finfo(torch.float32).eps), name


def assert_same(ours, theirs, case, tolerance=1e-11):
    """Loss and gradients agree to rounding of float64: sums of some hundred terms near 1."""
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, equal_nan=True)
    for mine, other in zip(gradients(ours, case), gradients(theirs, case), strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance, equal_nan=True)


def uniform_over(lists, N):
    """Probabilities (B, N) uniform over each row's labels, zero for a row without."""
    dense = torch.zeros(len(lists), N, dtype=torch.float64)
    for b, labels in enumerate(lists):
        for label in labels:
            dense[b, label] += 1 / len(labels)
    return dense


def padded(lists, width, pad=-100):
    return torch.tensor([[*row, *[pad] * (width - len(row))] for row in lists])


def operator_sample(pattern, *, N=9, d=5, B=4, log_weight=True, dtype=torch.float64):
    """Arguments after (input, weight, bias) of a loss operator up to the scale, on a fixed active set with
    labels of several probabilities, one sample without labels."""
    offsets = torch.tensor([0, 2, 2, 3, 5])
    probabilities = torch.tensor([0.3, 0.9, 1.0, 0.5, 0.25], dtype=dtype)
    if pattern == "shared":
        rows = torch.tensor([0, 2, 3, 5, 8])
        extra = torch.randn(5, dtype=dtype) if log_weight else None
        places = torch.tensor([0, 4, 1, 3, 2])
        return rows, extra, offsets, places, probabilities, 0.7
    lists = [[2, 0, 8], [5], [3, 2], [8, 5, 0, 2]]
    sample_offsets = torch.tensor([0, *map(len, lists)]).cumsum(0)
    active = torch.tensor([i for ids in lists for i in ids], dtype=torch.int32)
    transposed = ops.transpose_active(sample_offsets, active, N)
    extra = torch.randn(10, dtype=dtype) if log_weight else None
    places = torch.tensor([0, 2, 5, 6, 9])
    pairs = (sample_offsets, *transposed[1:])
    return transposed[0], *pairs, extra, offsets, places, probabilities, 0.7


def dense_active_set(active, labels, B, N, dtype):
    """An active set as a mask, its log weights and the labels' probabilities, each (B, N)."""
    mask = torch.zeros(B, N, dtype=torch.bool)
    log_weight = torch.zeros(B, N, dtype=dtype)
    if isinstance(active, SharedActiveSet):
        mask[:, active.rows] = True
        if active.log_weight is not None:
            log_weight[:, active.rows] = active.log_weight
    else:
        sample = torch.arange(B).repeat_interleave(active.offsets.diff())
        mask[sample, active.active.long()] = True
        if active.log_weight is not None:
            log_weight[sample, active.active.long()] = active.log_weight
    target = torch.zeros(B, N, dtype=dtype)
    sample = torch.arange(B).repeat_interleave(labels.offsets.diff())
    target.index_put_((sample, labels.ids), labels.probabilities, accumulate=True)
    return mask, log_weight, target


def draws_of(case, count):
    """`count` independent draws: losses (count, B) and gradients of their sum, flattened."""
    losses, grads = [], []
    for seed in range(count):
        generator = torch.Generator().manual_seed(1000 + seed)
        loss = sampled(case, case.y, reduction="none", generator=generator)
        losses.append(loss.detach())
        grads.append(torch.cat([g.flatten() for g in gradients(loss, case)]))
    return torch.stack(losses), torch.stack(grads)


def losses_of(case, count):
    """The losses of :func:`draws_of`, where gradients do not matter."""
    generators = (torch.Generator().manual_seed(1000 + seed) for seed in range(count))
    losses = [sampled(case, case.y, reduction="none", generator=g).detach() for g in generators]
    return torch.stack(losses)


def z_scores(draws, truth):
    """How many standard errors the mean of the draws is away from the truth."""
    error = draws.std(0) / math.sqrt(draws.shape[0])
    return (draws.mean(0) - truth) / error


def small_layer(pattern, size, **options):
    """60 neurons whose logits vary by about `size`; a tail of half of them."""
    case = make(60, 8, 4, pattern=pattern, budget=6, tail=30, K=2, L=3, **options)
    with torch.no_grad():
        case.weight.mul_(2 * size / math.sqrt(8))
        case.bias.mul_(size)
    case.tables.rebuild(case.weight, case.bias)
    return case
