"""Tables of docs/distributed.md: measured steps of sharded layers, and what follows for many machines."""

from __future__ import annotations

from .records import machine_of, markdown, read

__all__ = ["sharded", "sharded_projection", "sharded_runs"]

RUNS = ("sharded_places_1", "sharded_places_2", "sharded_20_million")
MACHINES = (8, 32, 128, 256)
CLASSES = (100_000_000, 1_000_000_000)
GBIT_S, LATENCY_US = 25.0, 50.0


def sharded() -> str:
    record = read("sharded")
    rows = [
        [
            f"`{p['contender']}`",
            f"{p['ranks']}",
            f"{p['ms']:,.1f}",
            f"{p['mean_ms']:,.1f}",
            f"{p['bytes_sent'] / 1e3:,.0f}",
            f"{p['gb']:.2f}",
        ]
        for p in record["points"]
    ]
    columns = [
        "contender",
        "processes",
        "ms/step, median",
        "mean",
        "kB sent a step",
        "GB a process",
    ]
    return f"{markdown(columns, rows)}\n\n{machine_of(record)}."


def sharded_runs() -> str:
    """Runs of examples/sharded.py."""
    runs = [read(name) for name in RUNS]
    rows = [
        [
            f"{run['classes']:,} classes, {run['dtype']}",
            f"{run['ranks']}",
            f"{run['steps']:,}",
            f"{run['P@1']:.4f}",
            f"{run['ms_per_step']:.0f}",
            f"{run['peak_gb']:.1f}",
        ]
        for run in runs
    ]
    columns = ["layer", "processes", "steps", "P@1, held out", "ms/step", "peak GB a process"]
    return f"{markdown(columns, rows)}\n\n{machine_of(runs[-1])}."


def sharded_projection() -> str:
    """Step time and memory on many machines, from the steps of ``sharded`` on one rank and on two.

    A step has a part that each rank does with its share of active and searched rows, a part that every rank
    does for the whole batch, and a part for the network. With one thread a rank, t1 and t2 milliseconds on
    one rank and on two, the second part is 2 t2 - t1, which includes the messages of two ranks on one
    machine; the first is the rest of t1. Means are taken, so that upkeep counts.
    """
    record = read("sharded")
    step = {p["ranks"]: p["mean_ms"] for p in record["points"] if p["contender"] == "sharded"}
    batch, width = record["machine"]["batch"], record["machine"]["width"]
    fixed = min(max(0.0, 2 * step[2] - step[1]), step[1])
    rows = []
    for classes in CLASSES:
        for ranks in MACHINES:
            compute = fixed + (step[1] - fixed) / ranks
            network = _network_ms(batch, width, ranks)
            memory = [_gigabytes(classes, width, ranks, size) for size in (2, 4)]
            rows.append(
                [
                    f"{classes:,}",
                    f"{ranks}",
                    *(f"{gb:,.1f}" for gb in memory),
                    *(f"{ms:.1f}" for ms in (compute, network, compute + network)),
                ]
            )
    columns = ["classes", "machines", "GB a machine, bfloat16", "float32"]
    columns += ["ms compute", "ms network", "ms a step"]
    measured = (
        f"From {step[1]:.1f} ms a step on one process and {step[2]:.1f} on two, with one thread each: "
        f"{fixed:.1f} ms on any number of them, {step[1] - fixed:.1f} divided among them. "
        f"{GBIT_S:g} Gbit/s, {LATENCY_US:g} microseconds a message."
    )
    return f"{markdown(columns, rows)}\n\n{measured}"


def _bytes_sent(batch: int, width: int, ranks: int) -> float:
    """By each rank in a step: the gradient of the input and three numbers a sample, all-reduced in rings,
    and the gathered header."""
    ring = 2 * (ranks - 1) / ranks
    return 4 * ring * (batch * width + 3 * batch) + (ranks - 1) * 24


def _network_ms(batch: int, width: int, ranks: int) -> float:
    """Three short all-reduces of 2 log2 R messages, one after the other, and a long one of 2 (R - 1)."""
    rounds = 3 * 2 * (ranks - 1).bit_length() + 2 * (ranks - 1)
    return rounds * LATENCY_US * 1e-3 + _bytes_sent(batch, width, ranks) * 8 / (GBIT_S * 1e6)


def _gigabytes(classes: int, width: int, ranks: int, bytes_a_number: int) -> float:
    """A rank's weight and two moments, and its tables with the copies in one byte a number."""
    tables = width + 12 + 4 + 2 + 1
    return classes / ranks * (3 * bytes_a_number * width + tables) / 2**30
