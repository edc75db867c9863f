"""A whole training step on Amazon-670K's shape (128 -> 670,091), beside all that a user could pick instead.

    python -m benchmarks.speed.step_time --batch 128 --json benchmarks/results/step_time.json

Every contender lives in a process of its own; they take turns, a few steps each, for several rounds, so
that a noisy neighbour meets all of them. Medians. The same batches for all, generated
(benchmarks/common/generated.py); losses that take one label a row get the first. LSH steps include the
tables' upkeep: the rehashes and rebuilds of the first 1,000 steps (periods grow from 25), each as long as one
measured after a whole first period, spread over those steps. Row-sparse LSH contenders update inside backward
(fuse_backward), so the head's Adam is in their backward time. Random data: speed only, no accuracy.

Those named ``_bf16_moments`` keep Adam's moments of the head in bfloat16, those named ``_bf16_parameters``
its parameters too, whose Adam is a step of its own.

One more contender measures the memory's bandwidth in the same rounds; a second table holds each part of
the LSH steps against the bytes that it must move, a third says what each contender's memory holds.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from benchmarks.common.arguments import argument_parser, parse
from benchmarks.common.generated import HIDDEN, LABELS
from benchmarks.common.memory import Memory, best_rates, bound_ms, print_rates
from benchmarks.common.record import finish
from benchmarks.common.worker import Worker
from examples.common.output import print_table

from .step_contenders import CONTENDERS, NARROW, NARROW_PARAMETERS
from .step_turns import start, summary, turn, upkeep_of

TOO_SLOW_MS = 10_000  # bf16 without hardware for it, say


def main() -> None:
    parser = argument_parser(__doc__, "4,000 labels, one round, without bf16 and compile")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--labels", type=int, default=LABELS)
    parser.add_argument("--only", nargs="*", default=CONTENDERS, choices=CONTENDERS)
    args = parse(parser)
    if args.quick:
        args.labels, args.rounds = 4_000, 1
        args.only = [name for name in args.only if name not in ("dense_bf16", "dense_compile")]
    results, failed, rates = measure(args)
    bounds = [
        {"contender": r["contender"], **part, "bound_ms": bound_ms(part["traffic"], rates)}
        for r in results
        if r["contender"].startswith("lsh")
        for part in byte_bounds(r, args.labels)
    ]
    print()
    report(results)
    print()
    print_rates(rates)
    print()
    report_bounds(bounds)
    print()
    report_memory(results)
    finish(
        args,
        {"batch": args.batch, "labels": args.labels},
        {"contenders": results, "failed": failed, "memory": rates, "byte_bounds": bounds},
        lambda axes: paint(axes, results, args),
    )


def measure(args: argparse.Namespace) -> tuple[list[dict], dict[str, str], dict[str, Any]]:
    """The contenders' results, why others have none, and the rates of the memory."""
    workers, failed, answers = {}, {}, {}
    for name in args.only:
        try:
            workers[name], first = start(name, args.batch, args)
            if name == "dense_bf16" and first["ms"][0] > TOO_SLOW_MS:
                answers[name] = [first]
                print(f"{name}: {first['ms'][0]:.0f} ms a step, measured once", flush=True)
                workers.pop(name).stop()
        except RuntimeError as error:
            failed[name] = str(error).strip().splitlines()[-1]
            workers.pop(name, None)
            print(f"{name}: {failed[name]}", flush=True)
    answers |= {name: [] for name in workers}
    meter, turns = Worker(meter_of, args.threads, args.labels), []
    for _ in range(args.rounds):
        turns.append(meter.run())
        for name, worker in workers.items():
            answers[name].append(turn(name, worker))
    upkeep = upkeep_of(workers)
    for worker in (meter, *workers.values()):
        worker.stop()
    results = [summary(name, answers[name], upkeep) for name in args.only if name in answers]
    dense = [r["ms_step"] for r in results if r["contender"].startswith("dense")]
    best = min(dense) if dense else None
    for result in results:
        result["times_best_dense"] = best / result["ms_step"] if best else None
    return results, failed, best_rates(turns)


def meter_of(threads: int, labels: int):
    """The contender that measures the memory itself."""
    torch.set_num_threads(threads)
    return Memory(labels).turn


def byte_bounds(result: dict, labels: int) -> list[dict]:
    """Bytes that each part of a step must move, by kind (see ``Memory``), and the part's time.

    With U active rows of width d: forward reads them, 4 d U bytes; their gradient and Adam read and write
    weight and two moments, 24 d U (16 d U with moments in bfloat16; of parameters in bfloat16 half as many,
    and the gradient is written and read between). A dense gradient touches all N rows, and is written and
    read between.
    Hashing, retrieval, arithmetic and the batch's logits are in the times, not in the bounds.
    """
    phases, row = result["phases"], 4 * HIDDEN
    active, features = result["union"] * row, result["features"] * row
    update = {"row_update": (4 if result["contender"].endswith(NARROW) else 6) * active}
    reading = {"row_read": active}
    if result["contender"].endswith(NARROW_PARAMETERS):
        reading = {"row_read": active / 2}
        update = {"row_update": 3 * active, "write": active / 2, "read": active / 2}
    if result["contender"] == "lsh_dense_grad":  # the gradient is written and read between
        whole = labels * row
        update = {"update": 6 * whole, "write": whole, "read": whole}
    of_embedding = {"row_update": 6 * features, "read": features}
    head = phases["backward"] + phases["head_optimizer"]
    return [
        {"part": "forward", "traffic": reading, "ms": phases["forward"]},
        {"part": "gradient + Adam", "traffic": update, "ms": head},
        {"part": "embedding's Adam", "traffic": of_embedding, "ms": phases["embedding_optimizer"]},
    ]


def report(results: list[dict]) -> None:
    print_table(
        ["contender", "ms/step", "best dense / it", "peak GB", "active/sample", "phases, ms"],
        [
            [
                r["contender"],
                f"{r['ms_step']:.1f}",
                f"{r['times_best_dense']:.1f}x" if r["times_best_dense"] else "",
                f"{r['peak_gb']:.2f}",
                f"{r['active_per_sample']:,.0f}" if "active_per_sample" in r else "",
                ", ".join(f"{phase} {ms:.1f}" for phase, ms in r["phases"].items()),
            ]
            for r in results
        ],
    )


def report_bounds(bounds: list[dict]) -> None:
    print_table(
        ["contender", "part of the step", "MB", "ms", "byte bound, ms", "ms / bound"],
        [
            [
                b["contender"],
                b["part"],
                f"{sum(b['traffic'].values()) / 1e6:.1f}",
                f"{b['ms']:.2f}",
                f"{b['bound_ms']:.2f}",
                f"{b['ms'] / b['bound_ms']:.1f}",
            ]
            for b in bounds
        ],
    )


def report_memory(results: list[dict]) -> None:
    kinds = ("weights", "optimizer_state", "tables", "other_at_peak")
    print_table(
        ["contender", *(f"{kind.replace('_', ' ')}, GB" for kind in kinds), "peak, GB"],
        [
            [
                r["contender"],
                *(f"{r['memory_gb'][kind]:.2f}" for kind in kinds),
                f"{r['peak_gb']:.2f}",
            ]
            for r in results
        ],
    )


def paint(axes: Any, results: list[dict], args: argparse.Namespace) -> None:
    names = [r["contender"] for r in results][::-1]
    bars = axes.barh(names, [r["ms_step"] for r in results][::-1])
    axes.bar_label(bars, [f"{r['ms_step']:,.1f}" for r in results][::-1], padding=3)
    axes.set_xscale("log")
    axes.margins(x=0.15)
    axes.set_xlabel("ms a step, logarithmic")
    axes.set_title(f"a training step, {HIDDEN} -> {args.labels:,}, batch {args.batch}")


if __name__ == "__main__":
    main()
