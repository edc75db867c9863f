"""Where LSHLinear starts to pay: the output layer alone, against dense torch, over N, d, batch and threads.

    python -m benchmarks.speed.scaling --json benchmarks/results/scaling.json

One size varies at a time around N = 100,000, d = 128, batch 128. A step is forward, loss, backward and
the optimizer's update of the layer. Contenders: LSHLinear with row-sparse gradients and
slide_torch.optim.Adam (fuse_backward), ``lsh_shared`` (the defaults) and ``lsh_per_sample``; dense torch
with its fused Adam, ``dense`` (F.linear and F.cross_entropy) and ``dense_linear_cross_entropy``
(F.linear_cross_entropy, which keeps no (B, N) matrix).
LSH steps bear the tables' upkeep: a rehash of as many rows as a first period's steps touch, and now and
then a rebuild, measured, divided by the period's 25 steps. Inputs, labels and weights are random: active
sets overlap less than on real data, which is in dense's favour; speed only, no accuracy.

Contenders take turns where all fit into memory, else come one after the other; what would not fit alone is
left out and says so. Then, for each width and batch, N is doubled from 1,000 until an LSH step is
faster than the better dense one: the crossover.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.common.arguments import argument_parser, parse
from benchmarks.common.generated import random_rows
from benchmarks.common.memory import available_gb
from benchmarks.common.record import finish
from benchmarks.common.timing import median, milliseconds
from benchmarks.common.worker import Worker
from examples.common.output import print_table
from slide_torch import LSHLinear, LSHOptions
from slide_torch.optim import Adam

CONTENDERS = ("dense", "dense_linear_cross_entropy", "lsh_shared", "lsh_per_sample")
PATTERNS = {"lsh_shared": "shared", "lsh_per_sample": "per_sample"}


@dataclass(frozen=True)
class Point:
    neurons: int = 100_000
    width: int = 128
    batch: int = 128
    threads: int = 2

    def gigabytes(self, contender: str) -> float:
        """What a contender holds at its peak, roughly."""
        weights = 4 * self.neurons * self.width
        if contender in PATTERNS:
            # weight, moments; tables and int8 codes, some again in the making
            tables = self.neurons * (self.width + 24)
            pairs = self.batch * 2048 if contender == "lsh_per_sample" else 0
            rows = min(self.neurons, pairs or 1024 + 17 * self.batch)
            logits = 40 * pairs or 8 * rows * self.batch
            return (3 * weights + 1.5 * tables + 16 * self.width * rows + logits) / 2**30
        logits = 12 * self.batch * self.neurons if contender == "dense" else 0
        return (4 * weights + logits) / 2**30


def contender(name: str, seed: int):
    """Answers set_up(point), steps(count), upkeep() and drop(); one layer at a time."""
    state: dict = {}

    def set_up(point: Point) -> None:
        torch.set_num_threads(point.threads)
        torch.manual_seed(seed)
        if name in PATTERNS:
            options = LSHOptions(pattern=PATTERNS[name])
            head = LSHLinear(point.width, point.neurons, options=options, sparse=True)
            optimizer = Adam(head.parameters(), lr=1e-3, fuse_backward=True)
        else:
            head = nn.Linear(point.width, point.neurons)
            optimizer = torch.optim.Adam(head.parameters(), lr=1e-3, fused=True)
        state.update(point=point, head=head, optimizer=optimizer)

    def step() -> None:
        point, head, optimizer = state["point"], state["head"], state["optimizer"]
        x = torch.randn(point.batch, point.width, requires_grad=True)
        target = torch.randint(point.neurons, (point.batch,))
        if name == "dense_linear_cross_entropy":
            loss = F.linear_cross_entropy(x, head.weight, target, linear_bias=head.bias)
        else:
            loss = F.cross_entropy(head(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def steps(count: int) -> dict:
        found = {"ms": [milliseconds(step) for _ in range(count)]}
        if name in PATTERNS:
            found["union"] = state["head"].stats()["union"]
        return found

    def upkeep() -> float:
        """Milliseconds a step."""
        head, neurons = state["head"], state["point"].neurons
        options = head.tables.options
        if not head.tables.uses_tables:
            return 0.0
        every = options.rehash_every
        share = head.stats()["union"] / neurons
        touched = random_rows(neurons, round(neurons * (1 - (1 - share) ** every)))
        weight, bias = head.weight, head.bias
        rehash = median(
            milliseconds(lambda: head.tables.rehash(weight, bias, rows=touched)) for _ in range(3)
        )
        rebuild = milliseconds(head.rebuild)
        rare = 1 / options.rebuild_every
        return ((1 - rare) * rehash + rare * rebuild) / every

    commands = {"set_up": set_up, "steps": steps, "upkeep": upkeep, "drop": state.clear}
    return lambda what, *arguments: commands[what](*arguments)


class Suite:
    """The contenders' processes, and how a point is measured."""

    def __init__(self, seed: int, rounds: int, seconds: float) -> None:
        self.workers = {name: Worker(contender, name, seed) for name in CONTENDERS}
        self.rounds, self.seconds = rounds, seconds

    def measure(self, point: Point, names: tuple[str, ...] = CONTENDERS) -> dict:
        """Median ms a step of each contender, upkeep included; None for one that does not fit."""
        room = 0.8 * available_gb()
        fitting = [name for name in names if point.gigabytes(name) <= room]
        result = dataclasses.asdict(point)
        result["ms"] = {name: None for name in names}
        together = sum(point.gigabytes(name) for name in fitting) <= room
        result["took_turns"] = together
        for group in [fitting] if together else [[name] for name in fitting]:
            self._measure_group(point, group, result)
        return result

    def _measure_group(self, point: Point, names: list[str], result: dict) -> None:
        counts, ms = {}, {name: [] for name in names}
        for name in names:
            worker = self.workers[name]
            worker.run("set_up", point)
            worker.run("steps", 1)  # makes states and tables
            second = worker.run("steps", 1)["ms"][0]
            counts[name] = max(1, min(20, int(self.seconds * 1e3 / self.rounds / second)))
        for _ in range(self.rounds):
            for name in names:
                if sum(ms[name]) < self.seconds * 1e3:
                    ms[name] += self.workers[name].run("steps", counts[name])["ms"]
        for name in names:
            result["ms"][name] = median(ms[name])
            if name in PATTERNS:
                result.setdefault("union", {})[name] = self.workers[name].run("steps", 1)["union"]
                upkeep = self.workers[name].run("upkeep")
                result.setdefault("upkeep_ms", {})[name] = upkeep
                result["ms"][name] += upkeep
            self.workers[name].run("drop")

    def stop(self) -> None:
        for worker in self.workers.values():
            worker.stop()


def best(result: dict, kind: str) -> tuple[float, str] | None:
    """The faster of the dense or of the LSH contenders."""
    measured = [(ms, n) for n, ms in result["ms"].items() if ms and n.startswith(kind)]
    return min(measured) if measured else None


def crossover(suite: Suite, point: Point, largest: int) -> dict:
    """The smallest N of 1,000, 2,000, 4,000, ... from which on LSH is faster, tried twice in a row."""
    neurons, faster = 1_000, []
    tried = []
    while neurons <= largest and len(faster) < 2:
        result = suite.measure(dataclasses.replace(point, neurons=neurons))
        dense, lsh = best(result, "dense"), best(result, "lsh")
        if dense is None or lsh is None:
            break
        faster = [*faster, result] if lsh[0] < dense[0] else []
        tried.append(result)
        neurons *= 2
    found = faster[0] if faster else None
    return {
        "width": point.width,
        "batch": point.batch,
        "threads": point.threads,
        "neurons": found["neurons"] if found else None,
        "largest_tried": tried[-1]["neurons"] if tried else 0,
        "dense_ms": best(found, "dense")[0] if found else None,
        "lsh_ms": best(found, "lsh")[0] if found else None,
        "lsh": best(found, "lsh")[1] if found else None,
        "tried": tried,
    }


def main() -> None:
    parser = argument_parser(__doc__, "tiny sizes, one round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="most for a contender at a point"
    )
    parser.add_argument("--largest", type=int, default=10_000_000, help="N of the largest point")
    args = parse(parser)
    base = Point(threads=args.threads)
    neurons = (10_000, 30_000, 100_000, 300_000, 1_000_000, 3_000_000, 10_000_000)
    widths, batches = (64, 128, 256, 512, 1024), (16, 128, 512, 4096)
    largest = 512_000
    if args.quick:
        base = dataclasses.replace(base, neurons=3_000)
        args.rounds, args.seconds, largest = 1, 0.05, 2_000
        neurons, widths, batches = (3_000, 10_000), (128,), (16,)
    variants = [
        *(dataclasses.replace(base, neurons=n) for n in neurons if n <= args.largest),
        *(dataclasses.replace(base, width=d) for d in widths),
        *(dataclasses.replace(base, batch=b) for b in batches),
        *(dataclasses.replace(base, threads=t) for t in (1, args.threads)),
    ]
    suite = Suite(args.seed, args.rounds, args.seconds)
    started, points, crossovers = time.perf_counter(), [], []

    def tell(text: str) -> None:
        print(f"{time.perf_counter() - started:4.0f} s: {text}", flush=True)

    for point in dict.fromkeys(variants):
        points.append(suite.measure(point))
        tell(line(points[-1]))
    pairs = [(d, base.batch) for d in widths] + [(base.width, b) for b in batches]
    for width, batch in dict.fromkeys(pairs):
        at = dataclasses.replace(base, width=width, batch=batch)
        crossovers.append(crossover(suite, at, largest))
        found = crossovers[-1]["neurons"]
        where = f"N = {found:,}" if found else f"none up to {crossovers[-1]['largest_tried']:,}"
        tell(f"crossover, d {width}, batch {batch}: {where}")
    suite.stop()
    report(points, crossovers)
    record = {"points": points, "crossovers": crossovers}
    finish(args, {}, record, lambda axes: paint(axes, points, base))


def paint(axes: Any, points: list[dict], base: Point) -> None:
    """Milliseconds of a step along N."""
    at = (base.width, base.batch, base.threads)
    along = [p for p in points if (p["width"], p["batch"], p["threads"]) == at]
    for name in CONTENDERS:
        found = [(p["neurons"], p["ms"][name]) for p in along if p["ms"][name]]
        if found:
            axes.plot(*zip(*sorted(found), strict=True), marker="o", markersize=3, label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("neurons N")
    axes.set_ylabel("ms a step")
    axes.set_title(f"output layer, d {base.width}, batch {base.batch}, {base.threads} threads")
    axes.legend()


def line(result: dict) -> str:
    where = f"N {result['neurons']:,}, d {result['width']}, batch {result['batch']}"
    where += f", threads {result['threads']}"
    ms = (f"{n} {'does not fit' if v is None else f'{v:.1f} ms'}" for n, v in result["ms"].items())
    return f"{where}: {', '.join(ms)}"


def report(points: list[dict], crossovers: list[dict]) -> None:
    rows = []
    for p in points:
        dense, lsh = best(p, "dense"), best(p, "lsh")
        ratio = dense[0] / lsh[0] if dense and lsh else None
        rows.append(
            [
                f"{p['neurons']:,}",
                str(p["width"]),
                str(p["batch"]),
                str(p["threads"]),
                *("does not fit" if ms is None else f"{ms:.1f}" for ms in p["ms"].values()),
                "" if ratio is None else f"{ratio:.1f}x",
                "" if ratio is None else ("dense" if ratio < 1 else "LSH"),
            ]
        )
    print()
    print_table(["N", "d", "batch", "threads", *CONTENDERS, "dense / LSH", "faster"], rows)
    print()
    print_table(
        ["d", "batch", "LSH is faster from N =", "dense, ms", "LSH, ms", "which"],
        [
            [
                str(c["width"]),
                str(c["batch"]),
                f"{c['neurons']:,}" if c["neurons"] else f"over {c['largest_tried']:,}",
                f"{c['dense_ms']:.1f}" if c["neurons"] else "",
                f"{c['lsh_ms']:.1f}" if c["neurons"] else "",
                c["lsh"] or "",
            ]
            for c in crossovers
        ],
    )


if __name__ == "__main__":
    main()
