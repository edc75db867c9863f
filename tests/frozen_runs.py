"""Training runs, the bits of which must not change by accident: see frozen.py.

Inputs and initial weights come from integer hashes, the same on every machine.
"""

import functools
import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import slide_torch
from slide_torch import LSHFeedForward, LSHLinear, LSHOptions
from slide_torch.functional import lsh_linear_binary_cross_entropy

# --- exact numbers ---------------------------------------------------------------------------------------

N, D, B = 800, 40, 16


def integers(count: int, salt: int) -> np.ndarray:
    """The same uint64 everywhere: splitmix64 of ``salt`` and the place."""
    with np.errstate(over="ignore"):
        z = np.arange(count, dtype=np.uint64) + np.uint64(salt << 32)
        z = (z + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


@functools.cache  # the same batches for every case
def numbers(*shape: int, salt: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    """Multiples of ``scale`` / 2^20 (of bfloat16, / 2^6) within about ``scale``, a power of two: exact."""
    bits = 7 if dtype == torch.bfloat16 else 21
    values = (integers(int(np.prod(shape)), salt) >> np.uint64(64 - bits)).astype(np.int64)
    centred = torch.from_numpy(values - (1 << (bits - 1))).view(shape)
    return (centred.double() * (scale / (1 << (bits - 1)))).to(dtype)


@functools.cache
def classes(*shape: int, salt: int, below: int = N) -> torch.Tensor:
    values = integers(int(np.prod(shape)), salt) % np.uint64(below)
    return torch.from_numpy(values.astype(np.int64)).view(shape)


def digest(tensors: Any) -> str:
    """SHA-256, its first 16 digits, of dtypes, shapes and bytes."""
    found = hashlib.sha256()
    for tensor in tensors:
        tensor = tensor.detach().contiguous()
        found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


# --- cases -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A training run: options of the layer, optimizer, loss; and what it needs to be exact beside torch."""

    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    way: str = "sparse"  # how gradients come: "dense", "sparse", "fused"
    steps: int = 20
    optimizer: str = "Adam"
    optimizer_options: dict[str, Any] = field(default_factory=dict)
    loss: str = "cross_entropy"
    layer: str = "LSHLinear"
    bias: bool = True
    uses_numpy: bool = False


# tables small enough to be rehashed and rebuilt several times; as many probes as "auto" meant at the record
SHARED = {
    **{"pattern": "shared", "budget": 8, "tail": 64, "rehash_every": 5, "rebuild_every": 2},
    **{"probes": 80},
}
PER_SAMPLE = {
    **{"pattern": "per_sample", "budget": 40, "tail": 32, "rehash_every": 5, "rebuild_every": 2},
    **{"K": 5, "L": 10},
}
PATTERNS = {"shared": SHARED, "per_sample": PER_SAMPLE}
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


def matrix() -> dict[str, Case]:
    return {
        f"{pattern}, {correction}, {dtype}, {way}": Case(
            {**options, "correction": correction}, DTYPES[dtype], way, steps=50
        )
        for pattern, options in PATTERNS.items()
        for correction in ("none", "importance")
        for dtype in DTYPES
        for way in ("dense", "sparse", "fused")
    }


def tails() -> dict[str, Case]:
    found = {}
    for pattern, options in PATTERNS.items():
        for tail in ("log_uniform", "frequencies"):
            own = {**options, "correction": "importance", "tail_distribution": tail}
            found[f"tail {tail}, {pattern}"] = Case(own, uses_numpy=True)
    return found


def families() -> dict[str, Case]:
    by_counts = {**SHARED, "budget": 20, "tail": 16, "K": 4, "L": 12, "probes": "auto"}
    own: dict[str, dict[str, Any]] = {
        "simhash hadamard": {},
        "simhash gaussian": {"projection": "gaussian"},
        "simhash, norms augmented": {"augment_norms": True},
        "simhash, not centered, int32 codes": {"center": False, "K": 17, "L": 3},
        "simhash, probes, rerank": {"probes": 3, "rerank": 60},
        "simhash, batch budget": {"batch_budget": 30},
        "dwta": {"family": "dwta", "K": 2},
        "dwta, probes": {"family": "dwta", "K": 2, "L": 4, "probes": 3},
        "kmeans, three tables": {"family": "kmeans", "L": 3, "rerank": 60},
        "kmeans, 1,024 centroids": {"family": "kmeans", "K": 10, "L": 1, "probes": 20},
        "kmeans, norms augmented": {"family": "kmeans", "L": 1, "probes": 6, "augment_norms": True},
        "exact": {"family": "exact"},
        "schedule by drift": {"schedule": "drift", "drift": 0.02},
    }
    # hashing knows no pattern, what follows does
    twice = {"simhash, probes, rerank", "kmeans, three tables", "exact", "schedule by drift"}
    return {
        f"{name}, {pattern}": Case(
            {"family": "simhash", **by_counts, **options} | {"pattern": pattern}
        )
        for name, options in own.items()
        for pattern in ("shared", "per_sample")
        if pattern == "shared" or name in twice
    }


def losses() -> dict[str, Case]:
    found = {}
    for pattern, options in PATTERNS.items():
        corrected = {**options, "correction": "importance"}
        for loss in (
            *("binary", "binary_weighted", "smoothing", "smoothing_weighted", "weighted_sum"),
            *("several_labels", "probabilities", "scaled"),
        ):
            found[f"{loss}, {pattern}"] = Case(corrected, loss=loss)
            if loss == "binary" or (loss == "smoothing" and pattern == "shared"):
                found[f"{loss}, {pattern}, none"] = Case(options, loss=loss)
    corrected = {**SHARED, "correction": "importance"}
    for name, dtype in DTYPES.items():
        for loss in ("binary", "smoothing"):
            for way in ("dense", "sparse"):
                if (name, way) != ("float32", "sparse"):  # stands above
                    found[f"{loss}, {name}, {way}"] = Case(corrected, dtype, way, loss=loss)
    return found


def hidden() -> dict[str, Case]:
    by_pattern = {
        "shared": {**SHARED, "budget": 10, "batch_budget": 100, "tail": 4, "K": 4, "L": 12}
        | {"probes": "auto"},
        "per_sample": PER_SAMPLE,
    }
    return {
        f"{layer}, {pattern}, {dtype}, {way}": Case(
            options, DTYPES[dtype], way, loss="squares", layer=layer
        )
        for layer in ("hidden", "feed_forward")
        for pattern, options in by_pattern.items()
        for dtype in DTYPES
        for way in ("dense", "sparse")
    }


def others() -> dict[str, Case]:
    found = {
        "no bias, shared": Case(SHARED, bias=False),
        "no bias, per_sample": Case(PER_SAMPLE, bias=False),
        "all neurons active": Case({"budget": N}),
        "labels and tail only": Case({**SHARED, "budget": 0, "correction": "importance"}),
        "bfloat16 moments": Case(SHARED, optimizer_options={"moments_dtype": torch.bfloat16}),
        "Adam, weight decay": Case(SHARED, optimizer_options={"weight_decay": 0.125}),
    }
    momentum = {"momentum": 0.875, "nesterov": True}
    for dtype in ("float32", "bfloat16"):
        for name, options in (("SGD", momentum), ("Adagrad", {})):
            for way in ("dense", "sparse"):
                found[f"{name}, {dtype}, {way}"] = Case(
                    SHARED, DTYPES[dtype], way, optimizer=name, optimizer_options=options
                )
    return found


CASES = matrix() | tails() | families() | losses() | hidden() | others()


# --- runs ------------------------------------------------------------------------------------------------


def fill_(module: nn.Module) -> None:
    with torch.no_grad():
        for salt, parameter in enumerate(module.parameters()):
            shape = parameter.shape
            parameter.copy_(numbers(*shape, salt=1 + salt, dtype=parameter.dtype, scale=0.25))


def frequencies() -> torch.Tensor:
    return classes(N, salt=90, below=1000).double() + 1


def make(case: Case) -> tuple[nn.Module, torch.optim.Optimizer]:
    common: dict[str, Any] = {"bias": case.bias, "sparse": case.way != "dense", "dtype": case.dtype}
    options = LSHOptions(**case.options)
    if case.layer == "feed_forward":
        module: Any = LSHFeedForward(D, N, 16, options=options, **common)
    else:
        output = "dense" if case.layer == "hidden" else "sampled"
        module = LSHLinear(D, N, options=options, output=output, **common)
        module.set_frequencies(frequencies())
    fill_(module)
    more = {"fuse_backward": True} if case.way == "fused" else {}
    rate = 2.0**-6
    optimizer = getattr(slide_torch.optim, case.optimizer)
    return module, optimizer(module.parameters(), lr=rate, **case.optimizer_options, **more)


def loss_of(case: Case, module: Any, x: torch.Tensor, step: int) -> torch.Tensor:
    y = classes(B, salt=5000 + step)
    factors = numbers(N, salt=91, dtype=torch.float64).abs().to(torch.float32) + 0.5
    output = module(x)
    if case.loss == "squares":
        # a sum of products, whose gradient is made of exact numbers
        return (output.float() * numbers(*output.shape, salt=92, dtype=torch.float32)).sum()
    if case.loss == "several_labels":
        many = classes(B, 3, salt=6000 + step).clone()
        many[::2, 1:] = -100
        return F.cross_entropy(output, many)
    if case.loss == "probabilities":
        target = torch.zeros(B, N).scatter_(1, y[:, None], 0.75)
        return F.cross_entropy(output, target.scatter_(1, ((y + 7) % N)[:, None], 0.25))
    if case.loss == "scaled":
        return F.cross_entropy(output * 0.5, y)
    if case.loss == "weighted_sum":
        y = torch.where(torch.arange(B) % 5 == 0, -100, y)
        return F.cross_entropy(output, y, weight=factors, reduction="sum")
    if case.loss.startswith("smoothing"):
        weight = factors if case.loss.endswith("weighted") else None
        return F.cross_entropy(output, y, weight=weight, label_smoothing=0.125)
    if case.loss.startswith("binary"):
        weights = {"weight": factors, "pos_weight": factors * 2}
        return lsh_linear_binary_cross_entropy(
            x,
            module.weight,
            classes(B, 2, salt=7000 + step),
            linear_bias=module.bias,
            tables=module.tables,
            reduction="sum",
            sparse=module.sparse,
            **(weights if case.loss.endswith("weighted") else {}),
        )
    return F.cross_entropy(output, y)


def train(case: Case, module: nn.Module, optimizer: Any, steps: range) -> list[torch.Tensor]:
    """Losses and input gradients."""
    seen = []
    for step in steps:
        x = numbers(B, D, salt=1000 + step, dtype=case.dtype).clone().requires_grad_()
        loss = loss_of(case, module, x, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert x.grad is not None
        seen += [loss, x.grad]
    return seen


def run(case: Case) -> list[str]:
    """Digests of the parameters, and of all else: losses, input gradients, the optimizer's states."""
    module, optimizer = make(case)
    torch.manual_seed(1)
    seen = train(case, module, optimizer, range(case.steps))
    for parameter in optimizer.param_groups[0]["params"]:
        state = optimizer.state[parameter]
        seen += [state[name] for name in sorted(state)]
    return [digest(module.parameters()), digest(seen)]
