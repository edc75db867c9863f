"""Step times of run.py's blocks: contenders in processes of their own, in turns."""

from __future__ import annotations

import argparse

import torch

from benchmarks.common.generated import random_rows
from benchmarks.common.timing import median, milliseconds
from benchmarks.common.worker import Worker
from slide_torch import LSHLinear
from slide_torch.optim import Adam

from .task import LSH, hidden_layers

__all__ = ["crossovers", "step_times"]

SHARE = 0.05


def upkeep_ms(layer: LSHLinear) -> float:
    """Milliseconds a step of the tables' upkeep in the first period."""
    neurons, every = layer.out_features, layer.tables.options.rehash_every
    share = layer.stats()["union"] / neurons
    rows = random_rows(neurons, round(neurons * (1 - (1 - share) ** every)))
    rehash = median(
        milliseconds(lambda: layer.tables.rehash(layer.weight, layer.bias, rows=rows))
        for _ in range(3)
    )
    rare = 1 / layer.tables.options.rebuild_every
    return ((1 - rare) * rehash + rare * milliseconds(layer.rebuild)) / every


def block(
    kind: str,
    inputs: int,
    hidden: int,
    outputs: int,
    depth: int,
    batch: int,
    threads: int,
    seed: int,
):
    """Answers ``run(count)``: milliseconds of as many steps; ``run(0)``: those of upkeep, a step."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    layers = hidden_layers(kind, inputs, hidden, SHARE, depth, outputs)
    if kind == "dense":
        optimizer: torch.optim.Optimizer = torch.optim.Adam(
            layers.parameters(), lr=1e-3, fused=True
        )
    else:
        optimizer = Adam(layers.parameters(), lr=1e-3)
    x, gradient = torch.randn(batch, inputs, requires_grad=True), torch.randn(batch, outputs)

    def step() -> None:
        optimizer.zero_grad()
        layers(x).backward(gradient)
        optimizer.step()

    def upkeep() -> float:
        return sum(
            upkeep_ms(module) for module in layers.modules() if isinstance(module, LSHLinear)
        )

    step()  # makes states and tables
    return lambda count: [milliseconds(step) for _ in range(count)] if count else [upkeep()]


def step_times(args: argparse.Namespace, blocks: list[tuple[int, int, int, int]]) -> list[dict]:
    """A point for each of ``blocks`` (inputs, hidden, outputs, depth)."""
    found = []
    for inputs, hidden, outputs, depth in blocks:
        sizes = (inputs, hidden, outputs, depth, args.batch, args.threads, args.seed)
        workers = {kind: Worker(block, kind, *sizes) for kind in ("dense", *LSH)}
        ms: dict[str, list[float]] = {kind: [] for kind in workers}
        for _ in range(args.rounds):
            for kind, worker in workers.items():
                ms[kind] += worker.run(3)
        point = {"inputs": inputs, "hidden": hidden, "outputs": outputs, "depth": depth}
        point["ms"] = {kind: median(times) + workers[kind].run(0)[0] for kind, times in ms.items()}
        for worker in workers.values():
            worker.stop()
        found.append(point)
        print(
            f"{inputs} -> {depth} x {hidden:,} -> {outputs}: "
            + ", ".join(f"{kind} {value:.1f} ms" for kind, value in point["ms"].items()),
            flush=True,
        )
    return found


def crossovers(times: list[dict]) -> list[dict]:
    """For each shape, depth and pattern the smallest width from which on it is faster than dense."""
    found = []
    for shape in dict.fromkeys((t["inputs"], t["outputs"], t["depth"]) for t in times):
        along = [t for t in times if (t["inputs"], t["outputs"], t["depth"]) == shape]
        for kind in LSH:
            faster: int | None = None
            for t in reversed(along):
                if t["ms"][kind] >= t["ms"]["dense"]:
                    break
                faster = t["hidden"]
            sizes = dict(zip(("inputs", "outputs", "depth"), shape, strict=True))
            found.append(sizes | {"contender": kind, "hidden": faster})
    return found
