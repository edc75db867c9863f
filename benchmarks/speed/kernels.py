"""Every operator against the bytes that it must move and the arithmetic that it must do.

    python -m benchmarks.speed.kernels --json benchmarks/results/kernels.json

Amazon-670K's shape: 670,091 neurons of width 128, a batch of 128. Rows lie around random centres, 64 to each;
inputs around centres drawn at random. The per-sample pattern takes 3,840 active neurons a sample from
tables over these rows; the shared one the layer's defaults. Codes and table build: K=6, L=50.

One process an instruction set (SLIDE_TORCH_ISA); in every round each level takes its turn with one
thread and with --threads. Medians. The bound of an operator is the longer of two times: its bytes at
the rates that the memory gives in the same rounds, and its arithmetic at the rate of torch's float32
matrix product. Where torch has the operation too, it is measured beside.

The operators are in benchmarks/speed/operators.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

from benchmarks.common.arguments import argument_parser, parse
from benchmarks.common.generated import HIDDEN, LABELS
from benchmarks.common.memory import Memory, best_rates, bound_ms, print_rates
from benchmarks.common.record import finish
from benchmarks.common.timing import median, milliseconds
from benchmarks.common.worker import Worker
from examples.common.output import print_table
from slide_torch import instruction_set

from .operators import CASES, Case, Problem

LEVELS = ("baseline", "avx2", "avx2_vnni", "avx512", "avx512_vnni")

Times = dict[tuple[str, int], list[float]]  # milliseconds by level (or "torch") and threads


def level_worker(neurons: int, active: int, seed: int):
    """One instruction set: describes and measures one case after another."""
    problem = Problem(neurons, HIDDEN, min(128, neurons), active, seed)
    now: dict[str, Case] = {}

    def command(what: str, name: str = "", threads: int = 1):
        if what == "level":
            return instruction_set()
        if what == "problem":
            return problem.describe()
        if what == "prepare":
            now.clear()  # its memory makes room
            now["case"] = made = CASES[name](problem)
            return made.traffic, made.flops, made.peer is not None
        torch.set_num_threads(threads)
        run = now["case"].run if what == "run" else now["case"].peer
        assert run is not None
        return milliseconds(run)

    return command


def meter(neurons: int, seed: int):
    """Measures the memory and torch's matrix product; GB/s and GFLOP/s."""
    torch.manual_seed(seed)
    memory = Memory(neurons)
    a, b = torch.randn(2, 1536, 1536)

    def turn(threads: int):
        torch.set_num_threads(threads)
        return memory.turn(), 2 * 1536**3 / milliseconds(lambda: a @ b) / 1e6

    return turn


def start_levels(levels: list[str], *arguments) -> tuple[dict[str, Worker], dict[str, str]]:
    """A worker for each level that this machine has, and why the others have none."""
    workers, missing = {}, {}
    for level in levels:
        try:
            workers[level] = Worker(
                level_worker, *arguments, environment={"SLIDE_TORCH_ISA": level}
            )
        except RuntimeError as error:
            missing[level] = str(error).strip().splitlines()[-1]
            print(f"{level}: {missing[level]}")
    return workers, missing


def main() -> None:
    parser = argument_parser(__doc__, "4,000 neurons, one round")
    parser.add_argument("--neurons", type=int, default=LABELS)
    parser.add_argument("--active", type=int, default=3_840, help="per sample")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--levels", nargs="*", default=list(LEVELS), choices=LEVELS)
    parser.add_argument("--only", nargs="*", default=list(CASES), choices=list(CASES))
    args = parse(parser)
    if args.quick:
        args.neurons, args.active, args.rounds = 4_000, 50, 1
    workers, missing = start_levels(args.levels, args.neurons, args.active, args.seed)
    if not workers:
        raise SystemExit("no level to measure")
    measure = Worker(meter, args.neurons, args.seed)
    machine = {threads: [] for threads in sorted({1, args.threads})}
    timed = {name: time_case(name, workers, measure, machine, args) for name in args.only}
    problem = next(reversed(workers.values())).run("problem")
    for worker in (measure, *workers.values()):
        worker.stop()
    rates = {n: best_rates(memory for memory, _ in turns) for n, turns in machine.items()}
    peak = {n: median(gflops for _, gflops in turns) for n, turns in machine.items()}
    results = [
        entry(name, level, *timed[name], rates, peak) for name in args.only for level in workers
    ]
    report(results, rates, peak, problem)
    finish(
        args,
        {"neurons": args.neurons, "width": HIDDEN, "batch": min(128, args.neurons)},
        {
            "problem": problem,
            "memory": rates,
            "matrix_product_gflops": peak,
            "operators": results,
            "missing_levels": missing,
        },
        lambda axes: paint(axes, results, list(workers), args.threads),
        (8, 8),
    )


def time_case(
    name: str,
    workers: dict[str, Worker],
    measure: Worker,
    machine: dict[int, list],
    args: argparse.Namespace,
) -> tuple[tuple, Times]:
    """One operator's traffic, flops and whether torch has it; and its milliseconds, level by level in turns.

    Every fourth round measures the memory and the matrix product, into ``machine``.
    """
    started = time.perf_counter()
    described = [worker.run("prepare", name) for worker in workers.values()][-1]
    best = next(reversed(workers))  # the widest: torch's peers run beside it
    times: Times = {(level, threads): [] for level in workers for threads in machine}
    if described[2]:
        times["torch", args.threads] = []
    for turn in range(args.rounds + 1):  # the first warms up
        for (level, threads), found in times.items():
            what, at = ("peer", best) if level == "torch" else ("run", level)
            found.append(workers[at].run(what, "", threads))
        for threads, turns in machine.items() if turn % 4 == 0 else ():
            turns.append(measure.run(threads))
    for found in times.values():
        del found[0]
    print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
    return described, times


def entry(name: str, level: str, described: tuple, times: Times, rates: dict, peak: dict) -> dict:
    """One line of the table."""
    traffic, flops, _ = described
    most = max(rates)
    ms = {threads: median(times[level, threads]) for threads in rates}
    memory, arithmetic = bound_ms(traffic, rates[most]), flops / peak[most] / 1e6
    bound = max(memory, arithmetic)
    found = {
        "operator": name,
        "level": level,
        "ms": ms,
        "speedup": ms[1] / ms[most],
        "megabytes": sum(traffic.values()) / 1e6,
        "gflop": flops / 1e9,
        "bound_ms": bound,
        "bound_by": "memory" if memory >= arithmetic else "arithmetic",
        "bound_share": bound / ms[most],
    }
    if ("torch", most) in times:
        found["torch_ms"] = median(times["torch", most])
    return found


def report(results: list[dict], rates: dict, peak: dict, problem: dict[str, float]) -> None:
    print()
    counts, most = list(rates), max(rates)
    print_table(
        ["operator", "level", *(f"ms, {n} threads" for n in counts), "speedup", "bound, ms", "bound by",
         "bound / ms", "torch, ms"],
        [
            [
                r["operator"],
                r["level"],
                *(f"{r['ms'][n]:.2f}" for n in counts),
                f"{r['speedup']:.2f}",
                f"{r['bound_ms']:.2f}",
                r["bound_by"],
                f"{r['bound_share']:.2f}",
                f"{r['torch_ms']:.2f}" if "torch_ms" in r else "",
            ]
            for r in results
        ],
    )  # fmt: skip
    print()
    print_rates(rates[most])
    print(f"\nmatrix product {peak[most]:.0f} GFLOP/s; bounds and torch: {most} threads")
    print(", ".join(f"{key} {value:,.0f}" for key, value in problem.items()))


def paint(axes: Any, results: list[dict], levels: list[str], threads: int) -> None:
    """The share that an operator's bound has of its time, a bar for each level."""
    for offset, level in enumerate(levels):
        own = [r for r in results if r["level"] == level][::-1]
        places = [i + 0.8 * (len(levels) - offset) / len(levels) for i in range(len(own))]
        axes.barh(places, [r["bound_share"] for r in own], 0.8 / len(levels), label=level)
        axes.set_yticks([i + 0.6 for i in range(len(own))], [r["operator"] for r in own])
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xlabel(f"bound / time, {threads} threads (1: at the bound)")
    axes.set_title("operators against the bytes and the arithmetic that they need")
    axes.legend()


if __name__ == "__main__":
    main()
