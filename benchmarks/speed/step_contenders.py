"""The contenders of step_time.py: a bag of features and an output layer each, with its loss and optimizer."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common.generated import FEATURES, HIDDEN, generate_batches
from benchmarks.common.relu_classifier import loss_of
from benchmarks.common.timing import median
from examples.common.machine import resident_gb
from slide_torch import LSHLinear, LSHOptions
from slide_torch.optim import Adam

__all__ = ["CONTENDERS", "NARROW", "NARROW_PARAMETERS", "PHASES", "Contender"]

CONTENDERS = (
    "dense_fp32",
    "dense_bf16",
    "dense_compile",
    "dense_linear_cross_entropy",
    "adaptive_log_softmax",
    "sampled_inbatch",
    "sampled_uniform_8192",
    "lsh_per_sample",
    "lsh_per_sample_bf16_moments",
    "lsh_shared",
    "lsh_shared_simhash",
    "lsh_shared_bf16_moments",
    "lsh_shared_bf16_parameters",
    "lsh_dense_grad",
)
NARROW = "_bf16_moments"  # of the head's Adam
NARROW_PARAMETERS = "_bf16_parameters"
PHASES = (
    "embedding",
    "forward",
    "backward",
    "embedding_backward",
    "embedding_optimizer",
    "head_optimizer",
)

Loss = Callable[[Tensor, Tensor], Tensor]  # of hidden vectors (B, HIDDEN) and labels (B, M)


class Contender:
    """A model that trains on generated batches and says what each part of a step took."""

    def __init__(self, name: str, batch: int, threads: int, seed: int, labels: int) -> None:
        torch.set_num_threads(threads)
        torch.manual_seed(seed)
        self.data = generate_batches(64, batch, seed=seed, labels=labels)
        gc.collect()
        self.base_gb = resident_gb()
        self.embedding = nn.EmbeddingBag(
            FEATURES, HIDDEN, mode="sum", include_last_offset=True, sparse=True
        )
        self.is_lsh = name.startswith("lsh")
        self.head, self.loss = make_head(name, labels)
        narrow_parameters = name.endswith(NARROW_PARAMETERS)
        fuse = name.startswith(("lsh_per_sample", "lsh_shared")) and not narrow_parameters
        narrow = torch.bfloat16 if name.endswith(NARROW) else None
        self.optimizers = [
            Adam(self.embedding.parameters(), lr=1e-3),
            Adam(self.head.parameters(), lr=1e-3, fuse_backward=fuse, moments_dtype=narrow),
        ]
        self.steps = 0

    def __call__(self, what: str, *arguments: Any) -> Any:
        return getattr(self, what)(*arguments)

    def run(self, steps: int) -> dict[str, Any]:
        """Milliseconds of each step and of its parts, and what the memory holds."""
        ms: list[float] = []
        phases: dict[str, list[float]] = {phase: [] for phase in PHASES}
        features = []
        for _ in range(steps):
            batch = self.data[self.steps % len(self.data)]
            self.steps += 1
            times = self.step(*batch)
            ms.append((times[-1] - times[0]) * 1e3)
            for phase, start, end in zip(PHASES, times[:-1], times[1:], strict=True):
                phases[phase].append((end - start) * 1e3)
            features.append(batch[0].unique().numel())
        answer = {"ms": ms, "phases": phases, "peak_gb": resident_gb("VmHWM") - self.base_gb}
        answer["features"] = median(features)
        answer["memory_gb"] = self.memory_held()
        if self.is_lsh:
            answer |= self.head.stats()
            settled = self.head.tables.options
            schedule = ("rehash_every", "rehash_growth", "rebuild_every")
            answer["schedule"] = {name: getattr(settled, name) for name in schedule}
        return answer

    def step(self, indices: Tensor, offsets: Tensor, values: Tensor, target: Tensor) -> list[float]:
        """When each of PHASES began, and when the last ended. Head and embedding are differentiated and
        updated one after the other, so that each is timed."""
        times = [time.perf_counter()]
        hidden = torch.relu(self.embedding(indices, offsets, per_sample_weights=values))
        leaf = hidden.detach().requires_grad_()
        times.append(time.perf_counter())
        loss = self.loss(leaf, target)
        times.append(time.perf_counter())
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        times.append(time.perf_counter())
        hidden.backward(leaf.grad)
        times.append(time.perf_counter())
        for optimizer in self.optimizers:
            optimizer.step()
            times.append(time.perf_counter())
        return times

    def memory_held(self) -> dict[str, float]:
        """Gigabytes that stay from step to step."""
        weights = [*self.embedding.parameters(), *self.head.parameters()]
        states = [
            value
            for optimizer in self.optimizers
            for state in optimizer.state.values()
            for value in state.values()
        ]
        held = {
            "weights": sum(weight.nbytes for weight in weights),
            "optimizer_state": sum(state.nbytes for state in states),
            "tables": self.head.tables.memory_bytes() if self.is_lsh else 0,
        }
        return {what: count / 2**30 for what, count in held.items()}

    def upkeep(self) -> tuple[float, float]:
        """Milliseconds of a rehash after one whole period of steps, and of a rebuild."""
        head = self.head
        head.rehash()
        self.run(head.tables.options.rehash_every)
        started = time.perf_counter()
        rows = head.tables.dirty.nonzero().flatten() if head.sparse else None
        head.tables.rehash(head.weight, head.bias, rows=rows)
        rehashed = time.perf_counter()
        head.rebuild()
        return (rehashed - started) * 1e3, (time.perf_counter() - rehashed) * 1e3


def make_head(name: str, labels: int) -> tuple[Any, Loss]:
    """The output layer of a contender, and its loss."""
    if name == "adaptive_log_softmax":
        cut = [labels * 3 // 100, labels * 18 // 100, labels * 48 // 100]
        adaptive = nn.AdaptiveLogSoftmaxWithLoss(HIDDEN, labels, cut)
        return adaptive, lambda hidden, target: adaptive(hidden, target[:, 0].contiguous()).loss
    if name.startswith("dense"):
        return dense_head(name, labels)
    if name.startswith("sampled"):
        return sampled_head(labels, drawn=8192 if name == "sampled_uniform_8192" else 0)
    return lsh_head(name, labels)


def dense_head(name: str, labels: int) -> tuple[nn.Linear, Loss]:
    head = nn.Linear(HIDDEN, labels)

    def loss(hidden: Tensor, target: Tensor) -> Tensor:
        return loss_of(head(hidden), target)

    def loss_under_autocast(hidden: Tensor, target: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss(hidden, target)

    def fused_loss(hidden: Tensor, target: Tensor) -> Tensor:
        first = target[:, 0].contiguous()
        return F.linear_cross_entropy(hidden, head.weight, first, linear_bias=head.bias)

    losses: dict[str, Callable[[], Loss]] = {
        "dense_fp32": lambda: loss,
        "dense_bf16": lambda: loss_under_autocast,
        "dense_compile": lambda: torch.compile(loss, dynamic=True),
        "dense_linear_cross_entropy": lambda: fused_loss,
    }
    return head, losses[name]()


def sampled_head(labels: int, drawn: int) -> tuple[nn.ModuleList, Loss]:
    """The batch's labels and ``drawn`` classes drawn uniformly, in plain torch with row-sparse gradients."""
    weight = nn.Embedding(labels, HIDDEN, sparse=True)
    bias = nn.Embedding(labels, 1, sparse=True)
    nn.init.uniform_(weight.weight, -(HIDDEN**-0.5), HIDDEN**-0.5)

    def loss(hidden: Tensor, target: Tensor) -> Tensor:
        kept = target >= 0
        own = target[kept]
        classes = torch.cat([own, torch.randint(labels, (drawn,))]).unique()
        place = torch.searchsorted(classes, target.clamp(min=0)) * kept
        scores = hidden @ weight(classes).T + bias(classes).T
        log_p = F.log_softmax(scores, 1).gather(1, place) * kept
        return -(log_p.sum(1) / kept.sum(1)).mean()

    return nn.ModuleList([weight, bias]), loss


def lsh_head(name: str, labels: int) -> tuple[LSHLinear, Loss]:
    options = {
        "lsh_shared": LSHOptions(),
        "lsh_shared_simhash": LSHOptions(family="simhash"),
        "lsh_per_sample": LSHOptions(pattern="per_sample", budget=3840, tail=0),
        "lsh_dense_grad": LSHOptions(),
    }[name.removesuffix(NARROW).removesuffix(NARROW_PARAMETERS)]
    sparse = name != "lsh_dense_grad"
    dtype = torch.bfloat16 if name.endswith(NARROW_PARAMETERS) else torch.float32
    head = LSHLinear(HIDDEN, labels, options=options, sparse=sparse, dtype=dtype)
    return head, lambda hidden, target: F.cross_entropy(head(hidden.to(dtype)), target)
