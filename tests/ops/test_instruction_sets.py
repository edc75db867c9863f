"""Every float kernel at every instruction set of this machine, each level in its own process."""

import contextlib
import functools
import io

import pytest
import reference
import torch
from helpers import LEVELS, ROOT, in_fork, supported_levels

from slide_torch import ops

OPS = torch.ops.slide_torch

# sizes that are multiples of no vector width, of no tile, of no block of 64 or 256 rows
N, D, B, BINS = 301, 45, 21, 8
HIDDEN = ("output", "x", "weight", "bias", "second")
DTYPES = {"float32": torch.float32, "float64": torch.float64}


def inputs(dtype):
    """The same numbers in every process, those of float32 also in float64."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    offsets = torch.arange(B + 1)
    lists = [torch.randperm(N, generator=generator)[: 20 + 10 * b] for b in range(B)]
    return {
        "x": randn(B, D),
        "weight": randn(N, D) / 4,
        "bias": randn(N),
        "center": randn(D + 1) / 4,
        "signs": (torch.randint(2, (1, 3, 64), generator=generator) * 2 - 1).to(torch.int8),
        "extra_projection": torch.randn(2, 1, 64, generator=generator),
        "projection": torch.randn(60, D + 1, generator=generator),
        "coordinates": torch.randint(D + 1, (60, BINS), generator=generator, dtype=torch.int32),
        "centroids": torch.randn(2, 32, D + 2, generator=generator),
        "log_weight": randn(N),
        "label_offsets": offsets,
        "lists": lists,
        "labels": torch.stack([ids[-1] for ids in lists]),
    }


def codes(i, K):
    """Codes of all families: of 60 hashes, K a table. K = 20 (for DWTA 6) gives int32."""
    rows = (i["weight"], i["bias"], None, i["center"])
    L, wide = 60 // K, K > 15
    grouped = torch.cat([i["weight"][:16], -i["weight"][:16]]).float()
    grouped = torch.cat([grouped, torch.ones(32, 1)], 1)
    groups = (
        grouped,
        grouped[:5],
        torch.arange(6).mul(7).clamp(max=32),
        torch.arange(31, -1, -1).int(),
    )
    coded = ops.code_centers(i["centroids"][..., :-2].contiguous(), None, torch.ones(2, 32))
    return {
        f"hadamard{K}": ops.simhash_hadamard(*rows, i["signs"], i["extra_projection"], K, L),
        f"dense{K}": ops.simhash_dense(*rows, i["projection"], K, L),
        f"centroids{K}": ops.nearest_centroids(*rows, i["centroids"], 3.0, 4),
        f"grouped{K}": ops.nearest_in_groups(*rows, *groups, min(K, 4)),
        f"ranked{K}": ops.rank_centers(i["x"], torch.ones(len(i["x"])), *coded, 32, K),
        f"dwta{K}": ops.dwta(*rows, i["coordinates"], 6 if wide else K, 10 if wide else L),
    }


def active_sets(i):
    """Arguments of both loss operators after (x, weight, bias), and the mask (B, N) of each."""
    probabilities = torch.linspace(0.2, 1, B).to(i["x"].dtype)
    rows = torch.arange(0, N, 2).unique()
    labels = i["labels"] // 2 * 2
    shared_mask = torch.zeros(B, N, dtype=torch.bool)
    shared_mask[:, rows] = True
    shared = (rows, i["log_weight"][rows], i["label_offsets"], labels // 2, probabilities)
    lengths = torch.tensor([len(ids) for ids in i["lists"]])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    active = torch.cat(i["lists"])
    sample_mask = torch.zeros(B, N, dtype=torch.bool)
    sample_mask[torch.arange(B).repeat_interleave(lengths), active] = True
    rows, *pairs = ops.transpose_active(offsets, active.int(), N)
    per_sample = (
        rows, offsets, *pairs, i["log_weight"][active], i["label_offsets"], offsets[1:] - 1,
        probabilities,
    )  # fmt: skip
    return {
        "shared": (shared, shared_mask, labels, probabilities),
        "sample": (per_sample, sample_mask, i["labels"], probabilities),
    }


def leaves(i):
    return [i[name].clone().requires_grad_() for name in ("x", "weight", "bias")]


def losses_and_gradients(i):
    found = {}
    for pattern, (arguments, *_) in active_sets(i).items():
        layer = leaves(i)
        *active, log_weight, offsets, places, targets = arguments
        losses = {
            "": getattr(OPS, f"{pattern}_cross_entropy")(*layer, *arguments, 0.5, False, False)[0],
            "binary ": getattr(OPS, f"{pattern}_binary_cross_entropy")(
                *layer, *active, log_weight.abs(), offsets, places, targets, None, 0.5, False
            )[0],
        }
        for kind, loss in losses.items():
            values = (loss.detach(), *torch.autograd.grad(loss.sum(), layer))
            for name, value in zip(("loss", "x", "weight", "bias"), values, strict=True):
                found[f"{kind}{pattern} {name}"] = value
    return found


def hidden_layers(i):
    """A feed-forward with tanh over active neurons, the second matrix the first one's rows turned round."""
    found = {}
    for pattern, (arguments, *_) in active_sets(i).items():
        active = arguments[:1] if pattern == "shared" else arguments[:5]
        layer = [*leaves(i), i["weight"].flip(1).requires_grad_()]
        values = getattr(OPS, f"{pattern}_linear")(*layer[:3], *active, False)
        rows = getattr(OPS, f"{pattern}_weighted_rows")
        out = rows(values.tanh(), layer[3].contiguous(), *active, False)
        gradients = torch.autograd.grad((out * i["x"]).sum(), layer)
        for name, value in zip(HIDDEN, (out.detach(), *gradients), strict=True):
            found[f"hidden {pattern} {name}"] = value
    return found


def best(i):
    """The best 9 for batches that end in one sample, in part of a panel and in a whole one."""
    found = {}
    lists = (torch.tensor([0, 100, 100, N]), torch.arange(N - 1, -1, -1, dtype=torch.int32))
    probes = torch.tensor([[0, 2]] * B)
    for count in (1, 6, 16, B):
        layer = (i["x"][:count], i["weight"], i["bias"])
        found[f"best {count}"], _ = ops.topk_linear(*layer, 9)
        coded = ops.empty_codes(layer[1], lists[0], room=False)
        ops.code_lists_(*coded, *layer[1:], *lists)
        coded_center = ops.coded_centers(*coded[:2], lists[0], layer[1].shape[1], True)
        found[f"best of lists {count}"], _ = ops.topk_lists(
            *layer, *lists, *coded[:2], probes[:count], 9, 40
        )
        found[f"first look {count}"] = ops.topk_lists(
            *layer, *lists, *coded[:2], probes[:count], 9, 9
        )[1].sort(1)[0]
        found |= dict(zip(("codes", "scales"), coded, strict=False))
        found |= dict(zip(("centers", "radius"), ops.list_centers(*layer[1:], *lists), strict=True))
        found |= dict(zip(("coded centers", "coded radius"), coded_center, strict=True))
    return found


def compute():
    """What every kernel finds, as a file's bytes."""
    result = {"level": ops.instruction_set()}
    for name, dtype in DTYPES.items():
        i = inputs(dtype)
        result[name] = {**codes(i, 3), **codes(i, 20), **losses_and_gradients(i), **best(i)}
        result[name] |= hidden_layers(i)
    content = io.BytesIO()
    torch.save(result, content)
    return content.getvalue()


@functools.cache
def result_of(level):
    content = in_fork(compute, SLIDE_TORCH_ISA=level)
    return torch.load(io.BytesIO(content), weights_only=True)


@functools.cache
def truth():
    """Losses and gradients by the plain-torch reference in float64, from the float32 numbers."""
    i = inputs(torch.float32)
    i = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
         for k, v in i.items()}  # fmt: skip
    found, sizes = {}, {}
    for pattern, (_, mask, labels, probabilities) in active_sets(i).items():
        layer = leaves(i)
        target = torch.zeros(B, N, dtype=torch.float64)
        target[torch.arange(B), labels] = probabilities
        extra = i["log_weight"].expand(B, N)
        losses = {
            "": reference.sampled_cross_entropy(*layer, mask, target, extra, scale=0.5),
            "binary ": reference.sampled_binary_cross_entropy(
                *layer, mask, target, extra.abs(), scale=0.5
            ),
        }
        for kind, loss in losses.items():
            values = (loss.detach(), *torch.autograd.grad(loss.sum(), layer))
            for name, value in zip(("loss", "x", "weight", "bias"), values, strict=True):
                found[f"{kind}{pattern} {name}"] = value
                sizes[f"{kind}{pattern} {name}"] = value.abs().max()
        layer = [*leaves(i), i["weight"].flip(1).requires_grad_()]
        values = torch.nn.functional.linear(*layer[:3]).tanh().masked_fill(~mask, 0)
        out = values @ layer[3]
        gradients = torch.autograd.grad((out * i["x"]).sum(), layer)
        for name, value in zip(HIDDEN, (out.detach(), *gradients), strict=True):
            found[f"hidden {pattern} {name}"] = value
            sizes[f"hidden {pattern} {name}"] = value.abs().max()
    return found, sizes


@pytest.mark.parametrize("level", supported_levels())
def test_the_level_asked_for_is_used(level):
    assert result_of(level)["level"] == level


def test_the_best_level_is_the_default():
    assert in_fork(ops.instruction_set, SLIDE_TORCH_ISA="") == supported_levels()[-1]


@pytest.mark.parametrize("level", supported_levels())
@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_and_gradients(level, dtype):
    """Largest error over largest value, against the reference in float64. Logits are sums of 45
    products and gradients of at most 301: so many roundings of half a unit, of whose number the
    square root counts in practice: 9 units; exp adds 2 and log 1. 12 units: 1.4e-6 in float32."""
    found = result_of(level)[dtype]
    expected, sizes = truth()
    for name, value in expected.items():
        error = (found[name].double() - value).abs().max() / sizes[name]
        assert error < 12 * torch.finfo(DTYPES[dtype]).eps, (name, error)


@pytest.mark.parametrize("level", supported_levels())
@pytest.mark.parametrize("dtype", DTYPES)
def test_best(level, dtype):
    """Logits are sums of 45 products: 7 units by the reasoning of test_losses_and_gradients."""
    found = result_of(level)[dtype]
    i = {k: v.double() for k, v in inputs(torch.float32).items() if k in ("x", "weight", "bias")}
    expected = torch.nn.functional.linear(i["x"], i["weight"], i["bias"]).topk(9).values
    names = [name for name in found if name.startswith("best")]
    assert len(names) == 8
    for name in names:
        error = (found[name].double() - expected[: len(found[name])]).abs().max()
        assert error / expected.abs().max() < 7 * torch.finfo(DTYPES[dtype]).eps, name


def hash_values(i):
    """What SimHash takes the signs of, in the dtype of `i`: (N, hashes)."""
    center = i["center"]
    x, bias = i["weight"] - center[:-1], i["bias"] - center[-1]
    return {
        "hadamard": reference.simhash_hadamard_values(
            x, bias, i["signs"], i["extra_projection"][0]
        ),
        "dense": reference.simhash_dense_values(x, bias, i["projection"]),
    }


@pytest.mark.parametrize("level", supported_levels())
@pytest.mark.parametrize("dtype", DTYPES)
def test_simhash_codes(level, dtype):
    """Equal to the reference but for tables where a projection lies within 1e-5 of its typical size
    (1e-13 in float64) of zero, as rounding may turn it; those are few."""
    found = result_of(level)[dtype]
    near = 1e-5 if dtype == "float32" else 1e-13
    for family, values in hash_values(inputs(DTYPES[dtype])).items():
        unclear = values.abs() < near * values.abs().mean()
        for K in (3, 20):
            codes = found[f"{family}{K}"]
            assert codes.dtype == (torch.int16 if K == 3 else torch.int32)
            sure = reference.pack_bits(unclear[:, :60], K, 60 // K) == 0
            assert sure.float().mean() > 0.99
            expected = reference.pack_bits(values[:, :60] > 0, K, 60 // K)
            assert torch.equal(codes.long()[sure], expected[sure])


@pytest.mark.parametrize("level", supported_levels())
@pytest.mark.parametrize("dtype", DTYPES)
def test_dwta_codes(level, dtype):
    """Comparisons do not round: codes equal the reference exactly, and so at every level."""
    found = result_of(level)[dtype]
    i = inputs(DTYPES[dtype])
    x, bias = i["weight"] - i["center"][:-1], i["bias"] - i["center"][-1]
    places = reference.dwta_winners(x, bias, i["coordinates"])
    assert (places >= 0).all()
    for name, K in (("dwta3", 3), ("dwta20", 6)):
        shifted = places.view(N, 60 // K, K) << torch.arange(0, 3 * K, 3)
        assert found[name].dtype == (torch.int16 if K == 3 else torch.int32)
        assert torch.equal(found[name].long(), shifted.sum(2).T)


@pytest.mark.parametrize("level", supported_levels())
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_look_finds_the_same_rows(level, dtype):
    """It sums integers."""
    found, first = result_of(level)[dtype], result_of("baseline")[dtype]
    for count in (1, 6, 16, B):
        assert torch.equal(found[f"first look {count}"], first[f"first look {count}"])


@pytest.mark.parametrize("level", supported_levels())
@pytest.mark.parametrize("dtype", DTYPES)
def test_centroid_codes(level, dtype):
    """Products round, so that codes of centroids differ now and then, between float64 levels hardly ever."""
    found, first = result_of(level)[dtype], result_of(supported_levels()[0])[dtype]
    for name in ("centroids3", "centroids20", "ranked3", "ranked20"):
        assert found[name].shape == first[name].shape and found[name].dtype == first[name].dtype
        differ = (found[name] != first[name]).float().mean()
        assert differ < (1e-2 if dtype == "float32" else 1e-4)


@pytest.mark.parametrize("level", supported_levels())
@pytest.mark.parametrize("dtype", DTYPES)
def test_centroids_in_groups(level, dtype):
    """Integers do not round: rows without an augmented coordinate get the same codes at every level."""
    found, first = result_of(level)[dtype], result_of(supported_levels()[0])[dtype]
    for name in ("grouped3", "grouped20"):
        assert torch.equal(found[name], first[name]) and len(found[name].unique()) > 5


def run_bfloat16_tests():
    """pytest's exit code, and what it printed."""
    files = [
        ROOT / "tests" / name
        for name in ("test_bfloat16_training.py", "optim/test_bfloat16_moments.py")
    ]
    which = "neighbours or unbiased or without_bias or not_a_number"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = pytest.main(["-q", "-k", which, "-p", "no:cacheprovider", *map(str, files)])
    return int(code), printed.getvalue()


@pytest.mark.parametrize("level", supported_levels()[:-1])
def test_bfloat16_updates(level):
    """What is rounded stochastically: the tests of those kernels, which themselves run at the best level."""
    code, printed = in_fork(run_bfloat16_tests, SLIDE_TORCH_ISA=level)
    assert code == 0, printed


@pytest.mark.parametrize("level", ["avx3", *sorted(set(LEVELS) - set(supported_levels()))])
def test_unknown_and_unsupported_levels(level):
    usable = ", ".join(reversed(supported_levels()))
    message = f"SLIDE_TORCH_ISA: expected one of {usable} on this machine, got '{level}'. Unset it"
    with pytest.raises(RuntimeError, match=message):
        in_fork(ops.instruction_set, SLIDE_TORCH_ISA=level)
