"""Step time and memory of a sharded layer on many machines, from measured parts: the tables of
docs/distributed.md.

    python docs/sharded_projection.py --step-ms 25 --step-classes 670091

A step has a part that each rank does with its own active rows, measured on one machine, and a part for the
network. Budget and tail are shared among ranks, so that the first is divided by R, down to what a batch
costs whatever its active rows: ``--fixed-ms``. Messages are those of ``slide_torch.distributed``.
"""

import argparse

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
    parser.add_argument("--step-ms", type=float, required=True, help="measured, one process")
    parser.add_argument("--fixed-ms", type=float, default=2.0, help="of it, whatever the rows")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--gbit-s", type=float, default=25.0)
    parser.add_argument("--latency-us", type=float, default=50.0)
    args = parser.parse_args()
    print(
        "| classes | machines | GB a machine, bfloat16 | float32 | ms compute | ms network | ms a step |"
    )
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for classes in CLASSES:
        for ranks in RANKS:
            network = network_ms(args.batch, args.width, ranks, args.gbit_s, args.latency_us)
            compute = args.fixed_ms + (args.step_ms - args.fixed_ms) / ranks
            memory = [gigabytes(classes, args.width, ranks, size) for size in (2, 4)]
            cells = (f"{classes:,}", f"{ranks}", *(f"{m:,.1f}" for m in memory))
            times = (f"{t:.1f}" for t in (compute, network, compute + network))
            print(f"| {' | '.join((*cells, *times))} |")


if __name__ == "__main__":
    main()
