"""How long a saved Predictor takes to load: memory-mapped and not, and its parts.

    python -m benchmarks.speed.predictor_loading --json loading.json

Random weights of Amazon-670K's shape; what a load reads does not depend on their values. The file was
written just before, so that it comes from memory and not from the disk. Medians of --rounds turns. A
load ends with the first prediction of one input, which reads what a memory-mapped load has left in
the file.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.arguments import argument_parser, parse
from benchmarks.common.generated import HIDDEN, LABELS
from benchmarks.common.record import write_record
from benchmarks.common.timing import median
from examples.common.machine import machine
from examples.common.output import print_table
from slide_torch import LSHLinear, Predictor
from slide_torch.prediction.saved_index import fingerprint

COLUMNS = ("load", "load_state_dict", "of it, checksum of the weights", "first prediction")


def main() -> None:
    parser = argument_parser(__doc__, "2,000 rows, one round")
    parser.add_argument("--rounds", type=int, default=7)
    args = parse(parser)
    neurons = 2_000 if args.quick else LABELS
    rounds = 1 if args.quick else args.rounds
    layer = LSHLinear(HIDDEN, neurons)
    inputs = torch.randn(64, HIDDEN)
    started = time.perf_counter()
    layer.calibrate(inputs, 10, 0.5)
    calibration = time.perf_counter() - started
    expected = layer.predict(inputs[:1], 10, exact=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "predictor.pt"
        torch.save(layer.predictor().state_dict(), path)
        megabytes = path.stat().st_size / 1e6
        seconds = measure(path, inputs[:1], expected, neurons, rounds)
    report(args, neurons, megabytes, calibration, seconds)


def measure(
    path: Path, x: Tensor, expected: Any, neurons: int, rounds: int
) -> dict[str, dict[str, float]]:
    """Median seconds of each part, by way of loading; both ways take turns."""
    taken: dict[str, list[list[float]]] = {"memory-mapped, assign=True": [], "copied": []}
    for _ in range(rounds):
        for name, runs in taken.items():
            mapped = name != "copied"
            with torch.device("meta" if mapped else "cpu"):
                predictor = Predictor(HIDDEN, neurons)
            clock = [time.perf_counter()]
            state = torch.load(path, mmap=mapped, weights_only=True)
            clock.append(time.perf_counter())
            predictor.load_state_dict(state, assign=mapped)
            clock.append(time.perf_counter())
            found = predictor(x)
            clock.append(time.perf_counter())
            assert all(map(torch.equal, found, expected))
            fingerprint(predictor.weight, predictor.bias)
            clock.append(time.perf_counter())
            load, into, first, checksum = (b - a for a, b in itertools.pairwise(clock))
            runs.append([load, into, checksum, first])
    return {
        name: {"seconds": median([sum(run) - run[2] for run in runs])}
        | dict(zip(COLUMNS, map(median, zip(*runs, strict=True)), strict=True))
        for name, runs in taken.items()
    }


def report(
    args: argparse.Namespace,
    neurons: int,
    megabytes: float,
    calibration: float,
    seconds: dict[str, dict[str, float]],
) -> None:
    print(f"{neurons:,} x {HIDDEN}, {megabytes:,.0f} MB; calibration took {calibration:.1f} s\n")
    print_table(
        ["way", "seconds in all", *COLUMNS],
        [[name, *(f"{value:.3f}" for value in own.values())] for name, own in seconds.items()],
    )
    where = machine() | {"threads": args.threads, "seed": args.seed}
    print("\n" + ", ".join(f"{key} {value}" for key, value in where.items()))
    record = {"machine": where, "neurons": neurons, "megabytes": megabytes}
    write_record(args.json, record | {"calibration_seconds": calibration, "ways": seconds})


if __name__ == "__main__":
    main()
