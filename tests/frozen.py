"""What must not change by accident: public names and signatures, keys of states, bits of training runs.

    python tests/frozen.py             # prints what it finds as JSON
    python tests/frozen.py --write     # records it in frozen.json; says whose bits changed

The bits are those of the library's own kernels: inputs and initial weights come from integer hashes, and
torch is told to use its plainest kernels (``PINNED``). A record holds for one architecture and instruction
set, and where that has fused multiply-adds for one compiler, as compilers contract a * b + c differently
(``level_key``). torch and numpy may still round differently on another machine, in the system's exp and log
say: digests of some of their own results (``surroundings``) stand beside.
"""

import functools
import hashlib
import importlib
import inspect
import json
import platform
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# before torch and numpy are imported: no instruction set beyond the architecture's first
PINNED = {"ATEN_CPU_CAPABILITY": "default", "OMP_WAIT_POLICY": "passive"}

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from helpers import LEVELS, run_at_level  # noqa: E402
from torch import nn  # noqa: E402

import slide_torch  # noqa: E402
from slide_torch import LSHFeedForward, LSHLinear, LSHOptions  # noqa: E402
from slide_torch.functional import lsh_linear_binary_cross_entropy  # noqa: E402

RECORD = Path(__file__).with_name("frozen.json")
# checkpoints in each format of sampler states
SAVED_STATES = {
    format: Path(__file__).parent / "data" / f"sampler_state_{format}.pt" for format in (1, 2)
}

# --- names and signatures --------------------------------------------------------------------------------

# None: all that the module's __all__ names
PUBLIC: dict[str, tuple[str, ...] | None] = {
    "slide_torch": None,
    "slide_torch.optim": None,
    "slide_torch.functional": ("lsh_linear_binary_cross_entropy", "lsh_linear_cross_entropy"),
    "slide_torch.metrics": (
        *("ndcg_at_k", "precision_at_k", "propensities", "psp_at_k", "recall_at_k"),
    ),
    "slide_torch.data": ("SparseRows", "XMCData", "batches", "label_embedding", "read_xmc"),
    "slide_torch.distributed": None,
}

# what stands in public classes for the library itself
INTERNAL = {
    "HashTables": {
        *(
            *("check_tail", "maintain", "mark_dirty", "meet"),
            *("read_with", "record", "require_built", "searches", "take_up"),
        ),
        *("codes", "dirty", "ids", "offsets", "sq8"),
    },
    "LSHLinear": {"draw_active"},
    "ShardedLSHLinear": {"draw_active"},
    "SampledLogits": {"__init__", "of"},
    "Adam": {"fused_step"},
}


def signature(function: Any) -> str:
    """Names, kinds and defaults of the parameters, without annotations."""
    parameters = []
    found = inspect.signature(function).parameters.values()
    for parameter in found:
        if parameter.name == "self":
            continue
        default = parameter.default
        if callable(default) and default is not parameter.empty:
            default = _Named(f"<{default.__name__}>")
        parameters.append(parameter.replace(annotation=parameter.empty, default=default))
    return str(inspect.Signature(parameters))


class _Named(str):
    __repr__ = str.__str__


def members(cls: type) -> dict[str, str]:
    """Public methods and properties that slide_torch, not torch, gives a class; and its constructor."""
    hidden = INTERNAL.get(cls.__name__, set())
    found = {} if "__init__" in hidden else {"": signature(cls)}
    for name in dir(cls):
        owner = next((base for base in cls.__mro__ if name in vars(base)), object)
        ours = owner.__module__.startswith("slide_torch")
        if name.startswith("_") or name in hidden or not ours:
            continue
        value = inspect.getattr_static(cls, name)
        if isinstance(value, property):
            found[f".{name}"] = " (property)"
        elif callable(getattr(cls, name)):
            kind = {classmethod: " (classmethod)", staticmethod: " (staticmethod)"}
            found[f".{name}"] = signature(getattr(cls, name)) + kind.get(type(value), "")
    return found


def names() -> list[str]:
    """One line each public module, function, class, method and property."""
    lines = []
    for module_name, listed in PUBLIC.items():
        module = importlib.import_module(module_name)
        for name in sorted(module.__all__ if listed is None else listed):
            value = getattr(module, name)
            where = f"{module_name}.{name}"
            if inspect.ismodule(value):
                lines.append(f"{where} (module)")
            elif inspect.isclass(value):
                lines += [f"{where}{member}{rest}" for member, rest in members(value).items()]
            else:
                lines.append(where + signature(value))
    return lines


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


# tables small enough to be rehashed and rebuilt several times
SHARED = {"pattern": "shared", "budget": 8, "tail": 64, "rehash_every": 5, "rebuild_every": 2}
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
    by_counts = {**SHARED, "budget": 20, "tail": 16, "K": 4, "L": 12}
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
        "shared": {**SHARED, "budget": 10, "batch_budget": 100, "tail": 4, "K": 4, "L": 12},
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


# --- states ----------------------------------------------------------------------------------------------

# whose checkpoints are kept: one that searches rows in int8, one with all else that is saved
SAVED = {
    "search": Case(
        {"budget": 4, "tail": 8, "K": 3, "rehash_every": 3, "correction": "importance"},
    ),
    "drift": Case(
        {
            **{"budget": 6, "tail": 8, "K": 3, "L": 4, "rehash_every": 3, "schedule": "drift"},
            **{"tail_distribution": ("uniform", "frequencies"), "drift": 0.01},
            **{"correction": "importance", "augment_norms": True},
        },
        uses_numpy=True,
    ),
}
SAVED_N, SAVED_D, SAVED_B, SAVED_STEPS = 64, 8, 6, 7


def small(case: Case) -> tuple[LSHLinear, Any]:
    layer = LSHLinear(SAVED_D, SAVED_N, options=LSHOptions(**case.options), sparse=True)
    fill_(layer)
    layer.set_frequencies(classes(SAVED_N, salt=90, below=100).double() + 1)
    return layer, slide_torch.optim.Adam(layer.parameters(), lr=2.0**-5)


def train_small(layer: LSHLinear, optimizer: Any, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        x = numbers(SAVED_B, SAVED_D, salt=1000 + step, dtype=torch.float32)
        loss = F.cross_entropy(layer(x), classes(SAVED_B, salt=5000 + step, below=SAVED_N))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def save_states() -> None:
    """Writes the checkpoints of format 1 in the present format, into a file beside theirs."""
    found = {}
    for name in SAVED:
        layer, _, saved = resumed(name)
        found[name] = {**saved, "sampler": slide_torch.sampler_state(layer)}
    torch.save(found, SAVED_STATES[max(SAVED_STATES)])


def resumed(name: str, format: int = 1) -> tuple[LSHLinear, Any, dict[str, Any]]:
    """The layer and the optimizer that take up a kept checkpoint, and the checkpoint."""
    saved = torch.load(SAVED_STATES[format], weights_only=True)[name]
    layer, optimizer = small(SAVED[name])
    layer.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    slide_torch.load_sampler_state(layer, saved["sampler"])
    return layer, optimizer, saved


def resume(name: str, format: int = 1) -> list[str]:
    layer, optimizer, _ = resumed(name, format)
    train_small(layer, optimizer, range(SAVED_STEPS, SAVED_STEPS + 12))
    return [digest(layer.parameters()), digest(layer.tables.tensors().values())]


def described(value: Any) -> Any:
    """Dtypes and shapes of tensors, the kinds of all else."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, dict):
        return {str(key): described(each) for key, each in value.items()}
    return None if value is None else type(value).__name__


def keys() -> dict[str, Any]:
    """Keys of state dicts, of the optimizers' states and of sampler states, with dtypes and shapes."""
    found: dict[str, Any] = {
        "LSHLinear": described(LSHLinear(8, 64).state_dict()),
        "LSHLinear without bias": described(LSHLinear(8, 64, bias=False).state_dict()),
        "LSHFeedForward": described(LSHFeedForward(8, 64, 4).state_dict()),
    }
    for name, options in (("Adam", {}), ("SGD", {"momentum": 0.9}), ("Adagrad", {})):
        layer = LSHLinear(8, 64, sparse=True)
        optimizer = getattr(slide_torch.optim, name)(layer.parameters(), **options)
        F.cross_entropy(layer(torch.zeros(2, 8)), torch.tensor([1, 2])).backward()
        optimizer.step()
        state = optimizer.state_dict()
        found[name] = {
            "state": described(state["state"]),
            "param_groups": sorted(state["param_groups"][0]),
        }
    for name, case in SAVED.items():
        layer, optimizer = small(case)
        found[f"sampler state before training, {name}"] = described(
            slide_torch.sampler_state(layer)
        )
        train_small(layer, optimizer, range(SAVED_STEPS))
        found[f"sampler state, {name}"] = described(slide_torch.sampler_state(layer))
    return found


# --- what the digests hold for ---------------------------------------------------------------------------


def surroundings() -> dict[str, str]:
    """Digests of what torch and numpy compute here of what the library leaves to them."""
    x = numbers(300, 41, salt=93, dtype=torch.float32)
    generator = torch.Generator().manual_seed(5)
    param, grad = x.clone(), x.flip(0)
    moments = [torch.zeros_like(x), torch.zeros_like(x), torch.tensor(0.0)]
    optimizer = torch.optim.Adam([nn.Parameter(param)], fused=True)
    optimizer.param_groups[0]["params"][0].grad = grad
    optimizer.step()
    found = [torch.randn(33, 40, generator=generator), torch.rand(100, generator=generator)]
    for y in (x, x.double()):
        found += [y.exp(), (y.square() + 1).log(), F.normalize(y, dim=1), y.sum(0), y.mean(1)]
        found += [y.square().sum(1).sqrt(), y.double().norm(dim=1).quantile(0.9), y.sum()]
    found += [*moments, optimizer.param_groups[0]["params"][0]]
    shares = x.double().square().flatten().numpy() + 0.5
    of_numpy = [np.log(shares), np.log1p(1 / shares), shares**0.75, shares.cumsum(), shares.sum()]
    return {
        "torch": digest(found),
        "numpy": digest(torch.as_tensor(each) for each in of_numpy),
    }


@functools.cache
def compiler() -> str:
    """The compiler of the extension, as it notes in the file: "GCC 12" or "clang 14"."""
    content = Path(slide_torch._C.__file__).read_bytes()
    clang = re.search(rb"clang version (\d+)", content)
    gcc = re.search(rb"GCC: \([^)]*\) (\d+)", content)
    if clang:
        return f"clang {clang[1].decode()}"
    return f"GCC {gcc[1].decode()}" if gcc else "unknown compiler"


def level_key(level: str) -> str:
    """What a record holds for. GCC and clang agree at x86's baseline, which has no fused multiply-add."""
    contracts = (platform.machine(), level) != ("x86_64", "baseline")
    return f"{platform.machine()} {level}" + (f", {compiler()}" if contracts else "")


def bits(turn: int | None = None) -> dict[str, Any]:
    """Digests of all cases, once if they are the same with one thread and with two, else both.

    With a ``turn``, 0 or 1, cases outside the matrix run with one thread and with two by turns.
    """
    found: dict[str, Any] = {"level": slide_torch.instruction_set(), **surroundings()}
    runs = {name: functools.partial(run, case) for name, case in CASES.items()}
    runs |= {f"resumed, {name}": functools.partial(resume, name) for name in SAVED}
    in_full = matrix()
    for place, (name, make_digests) in enumerate(runs.items()):
        whole = turn is None or name in in_full
        by_threads = {}
        for threads in (1, 2) if whole else ((place + turn) % 2 + 1,):
            torch.set_num_threads(threads)
            by_threads[f"threads: {threads}"] = " ".join(make_digests())
        same = len(set(by_threads.values())) == 1
        found[name] = next(iter(by_threads.values())) if same else by_threads
    return found


def bits_at(level: str, turn: int | None = None) -> dict[str, Any]:
    """:func:`bits` in a process of its own, at an instruction set."""
    turns = [] if turn is None else [turn]
    done = run_at_level(level, __file__, "--bits", *turns, timeout=600, **PINNED)
    if done.returncode != 0:
        raise RuntimeError(done.stderr.decode())
    return json.loads(done.stdout)


def supported_levels() -> list[str]:
    """The levels up to the best one of this machine."""
    return list(LEVELS[: LEVELS.index(slide_torch.instruction_set()) + 1])


def record() -> dict[str, Any]:
    return json.loads(RECORD.read_text())


def write() -> None:
    """Writes the record; what it has for other machines and compilers is kept unless bits changed."""
    old = record()["bits"] if RECORD.exists() else {}
    own = {level_key(level): bits_at(level) for level in supported_levels()}
    changed = False
    for key, found in own.items():
        before = old.get(key, found)
        names_changed = [name for name in found if name in before and before[name] != found[name]]
        changed = changed or bool(names_changed)
        print(f"{key}: {len(names_changed)} of {len(found)} changed", *names_changed, sep="\n  ")
    new = {"names": names(), "keys": keys(), "bits": ({} if changed else old) | own}
    RECORD.write_text(json.dumps(new, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--bits"]:
        print(json.dumps(bits(*map(int, sys.argv[2:]))))
    elif sys.argv[1:] == ["--write"]:
        if not SAVED_STATES[max(SAVED_STATES)].exists():
            save_states()
        write()
    else:
        print(json.dumps({"names": names(), "keys": keys()}, indent=1))
