"""Step time and memory of a sharded layer on many machines, from measured parts: the tables of
docs/distributed.md.

    python -m benchmarks.speed.sharded --ranks 1 2 --json benchmarks/results/sharded.json
    python docs/sharded_projection.py benchmarks/results/sharded.json

A step has a part that each rank does with its own share of active and searched rows, a part that every rank
does for the whole batch, and a part for the network. With one thread a rank, t1 and t2 milliseconds on one
rank and on two, the second part is 2 t2 - t1 (the messages of two ranks on one machine included), the first
is the rest of t1. Means are taken, so that upkeep counts. Messages are those of ``slide_torch.distributed``.
"""

import argparse
import json
from pathlib import Path

RANKS = (8, 32, 128, 256)
CLASSES = (100_000_000, 1_000_000_000)


def bytes_sent(batch: int, width: int, ranks: int) -> float:
    """By each rank in a step: the gradient of the input and three numbers a sample, all-reduced in rings,
    and the gathered header."""
    ring = 2 * (ranks - 1) / ranks
    return 4 * ring * (batch * width + 3 * batch) + (ranks - 1) * 24


def network_ms(batch: int, width: int, ranks: int, gbit_s: float, latency_us: float) -> float:
    """Three all-reduces and a gather; each takes 2 (R - 1) messages, one after the other, in a ring, or
    2 log2 R where messages are short."""
    rounds = 2 * (ranks - 1).bit_length()
    short = 3 * rounds * latency_us * 1e-3  # header, maximum, sum
    long = 2 * (ranks - 1) * latency_us * 1e-3
    return short + long + bytes_sent(batch, width, ranks) * 8 / (gbit_s * 1e6)


def gigabytes(classes: int, width: int, ranks: int, bytes_a_number: int) -> float:
    """A rank's weight and two moments, and its tables with the int8 copies."""
    tables = width + 12 + 4 + 2 + 1
    return classes / ranks * (3 * bytes_a_number * width + tables) / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("record", type=Path, help="of benchmarks.speed.sharded with --ranks 1 2")
    parser.add_argument("--gbit-s", type=float, default=25.0)
    parser.add_argument("--latency-us", type=float, default=50.0)
    args = parser.parse_args()
    record = json.loads(args.record.read_text())
    points = [p for p in record["points"] if p["contender"] == "sharded"]
    step = {point["ranks"]: point["mean_ms"] for point in points}
    batch, width = (record["machine"][name] for name in ("batch", "width"))
    fixed = max(0.0, 2 * step[2] - step[1])
    print(f"{step[1]:.1f} ms on one rank, {step[2]:.1f} on two: {fixed:.1f} on any number")
    print(
        "| classes | machines | GB a machine, bfloat16 | float32 | ms compute | ms network | ms a step |"
    )
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for classes in CLASSES:
        for ranks in RANKS:
            network = network_ms(batch, width, ranks, args.gbit_s, args.latency_us)
            compute = fixed + (step[1] - fixed) / ranks
            memory = [gigabytes(classes, width, ranks, size) for size in (2, 4)]
            cells = (f"{classes:,}", f"{ranks}", *(f"{m:,.1f}" for m in memory))
            times = (f"{t:.1f}" for t in (compute, network, compute + network))
            print(f"| {' | '.join((*cells, *times))} |")


if __name__ == "__main__":
    main()
