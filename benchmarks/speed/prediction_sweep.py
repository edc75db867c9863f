"""The constants of approximate prediction, one at a time: lists, probes, recall, speed.

    python -m benchmarks.speed.prediction_sweep --json prediction_sweep.json

The layer is the one of prediction.py. Calibrated on one half of the validation names, measured on the other
half; test names take no part in it.
"""

from __future__ import annotations

import argparse
import itertools
import time
from types import ModuleType
from typing import Any

import torch

from benchmarks.common.arguments import argument_parser, parse
from benchmarks.common.places_model import draw_rows, hidden_of, kept_model
from benchmarks.common.record import finish
from benchmarks.common.timing import alternate
from examples.common.output import print_table
from examples.data import places
from slide_torch.prediction import calibration, partition

from .prediction import recall_of

SWEPT = {
    "LISTS_PER_ROOT": (1, 2, 4, 8),
    "RADIUS_WEIGHTS": ((0.1,), (0.2,), (0.3,), (0.4,)),
    "ITERATIONS": (5, 10, 20),
    "SAMPLE_PER_LIST": (64, 256),
    "RESCORED_PER_K": (1, 2, 4),
}


def home_of(name: str) -> ModuleType:
    """The module that reads the constant."""
    return partition if hasattr(partition, name) else calibration


def main() -> None:
    parser = argument_parser(__doc__, "50 steps, 256 queries, one round")
    parser.add_argument("--steps", type=int, default=3000, help="training steps of the layer")
    parser.add_argument("--queries", type=int, default=2048)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 256])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--recall", type=float, default=0.95, help="to calibrate for")
    args = parse(parser)
    if args.quick:
        args.steps, args.queries, args.rounds = 50, 256, 1
    results = sweep(args)
    report(args, results)
    setting = {"steps": args.steps, "k": args.k, "asked for": args.recall}
    batch = args.batches[-1]
    finish(args, setting, {"settings": results}, lambda axes: paint(axes, results, batch))


def sweep(args: argparse.Namespace) -> list[dict]:
    """Each constant at its other values, the rest as they are: build, recall and speed at --recall."""
    data = places.load_places()
    head = (model := kept_model(data, args.steps, args.seed)).head
    names, _ = hidden_of(model, draw_rows(data.validation, args.queries, args.seed))
    ours, queries = names.chunk(2)
    best = head.predict(queries, args.k)[1]
    settings, results = [], []
    for name, values in SWEPT.items():
        home = home_of(name)
        default = getattr(home, name)
        for value in values:
            if value == default and any(r["default"] for r in results):
                continue  # the defaults once
            setattr(home, name, value)
            head.calibration = None
            started = time.perf_counter()
            generator = torch.Generator().manual_seed(args.seed)
            head.calibrate(ours, args.k, args.recall, generator=generator)
            seconds = time.perf_counter() - started
            setattr(home, name, default)
            found = head.predict(queries, args.k, exact=False)[1]
            settings.append(head.calibration)
            results.append(
                {"constant": name, "value": value, "default": value == default}
                | {"lists": head.calibration.partition.lists, "probes": head.calibration.probes}
                | {"rescored": head.calibration.rescored, "build_seconds": seconds}
                | {"recall": recall_of(found, best)}
            )
    for batch in args.batches:
        blocks = itertools.cycle(queries.split(batch)[: len(queries) // batch])

        def run(calibration: Any, blocks: Any = blocks) -> None:
            head.calibration = calibration
            head.predict(next(blocks), args.k, exact=False)

        turns = {str(i): (lambda c=c: run(c)) for i, c in enumerate(settings)}
        times = alternate(turns, args.rounds * (20 if batch < 16 else 3))
        for i, result in enumerate(results):
            result[f"queries_per_second_{batch}"] = batch / times[str(i)] * 1e3
    return results


def report(args: argparse.Namespace, results: list[dict]) -> None:
    columns = ["constant", "value", "lists", "probes", "rescored", "recall", "build s"]
    columns += [f"queries/s, batch {batch}" for batch in args.batches]
    rows = [
        [
            r["constant"] + (" (default)" if r["default"] else ""),
            str(r["value"]),
            *(str(r[key]) for key in ("lists", "probes", "rescored")),
            f"{r['recall']:.3f}",
            f"{r['build_seconds']:.0f}",
            *(f"{r[f'queries_per_second_{batch}']:,.0f}" for batch in args.batches),
        ]
        for r in results
    ]
    print_table(columns, rows)


def paint(axes: Any, results: list[dict], batch: int) -> None:
    """Queries per second along each constant's values."""
    for name in SWEPT:
        own = [r for r in results if r["constant"] == name or r["default"]]
        own.sort(
            key=lambda r: r["value"] if r["constant"] == name else getattr(home_of(name), name)
        )
        speed = [r[f"queries_per_second_{batch}"] for r in own]
        axes.plot(range(len(own)), speed, marker="o", label=name)
    axes.set_ylabel(f"queries per second, batch {batch}")
    axes.set_xlabel("its values, increasing")
    axes.legend(fontsize=6)


if __name__ == "__main__":
    main()
