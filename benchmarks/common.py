"""What the benchmarks share: arguments, the generated problem, contenders in processes of their own, the
memory's bandwidth, and the record: a table, JSON with the machine, a picture."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from classifier import (
    Classifier,
    check_outputs,
    draw,
    labels_of,
    loss_of,
    machine,
    predict,
    print_table,
    reset_peak_memory,
    resident_gb,
    save_checkpoint,
)

from slide_torch.ops.rows import advise_hugepages_, touch_rows_

__all__ = [
    "FEATURES",
    "HIDDEN",
    "LABELS",
    "Classifier",
    "Memory",
    "Worker",
    "argument_parser",
    "available_gb",
    "best_rates",
    "bound_ms",
    "finish",
    "generate_batches",
    "labels_of",
    "loss_of",
    "machine",
    "median",
    "milliseconds",
    "parse",
    "predict",
    "print_rates",
    "print_table",
    "random_rows",
    "read_record",
    "reset_peak_memory",
    "resident_gb",
    "save_checkpoint",
    "write_record",
]

FEATURES, LABELS = 135_909, 670_091  # Amazon-670K's shape
HIDDEN = 128

median = statistics.median


def argument_parser(description: str | None, quick: str) -> argparse.ArgumentParser:
    """The options that every benchmark has; ``quick`` says what --quick does."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--json", type=Path, help="where the record goes; the picture, beside it")
    return parser


def parse(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """Parsed arguments; threads and seed are set."""
    args = parser.parse_args(argv)
    if args.threads < 1:
        parser.error(f"--threads: expected at least 1, got {args.threads}")
    check_outputs(parser, args.json)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    return args


def finish(
    args: argparse.Namespace,
    setting: dict[str, Any],
    content: dict[str, Any],
    paint: Callable[[Any], None],
    size: tuple[float, float] = (7, 4.2),
) -> None:
    """Prints the machine and the setting; with --json writes the record and draws the picture."""
    where = machine() | {"threads": args.threads} | setting | {"seed": args.seed}
    print("\n" + ", ".join(f"{key} {value}" for key, value in where.items()))
    if args.json is not None:
        args.json.write_text(json.dumps({"machine": where, **content}, indent=1) + "\n")
        draw(args.json.with_suffix(".png"), paint, size)


def read_record(
    path: Path | None, problem: dict[str, Any], empty: dict[str, Any]
) -> dict[str, Any]:
    """The record at ``path`` that grows over several calls: ``problem``, and what ``empty`` names.

    Raises:
        SystemExit: it is of another problem.
    """
    if path is None or not path.exists():
        return {"problem": problem, **empty}
    record = json.loads(path.read_text())
    if record.get("problem") != problem:
        raise SystemExit(
            f"{path}: expected a record of {problem}, got {record.get('problem')}: give it another name"
        )
    return {key: record[key] for key in ("problem", *empty)}


def write_record(path: Path | None, record: dict[str, Any]) -> None:
    """In one piece: a call that is killed leaves the old one."""
    if path is not None:
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(record, indent=1) + "\n")
        os.replace(part, path)


def milliseconds(work: Callable[[], object]) -> float:
    """How long one call takes; freeing its result counts, as it would in a training step."""
    started = time.perf_counter()
    work()
    return (time.perf_counter() - started) * 1e3


def available_gb() -> float:
    """Gigabytes that new processes could have; infinite where the system does not tell."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) / 2**20
    except OSError:
        pass
    return float("inf")


def generate_batches(count: int, batch: int, *, seed: int, labels: int = LABELS):
    """Batches of Amazon-670K's shape: about 76 of 135,909 features and 5.5 labels a row.

    Labels fall into clusters of 64 neighbours; clusters and the labels within them follow a long
    tail (rank ^ -0.8), features are drawn by cluster for two thirds, else by the tail alone. Each is
    (indices int64, offsets int64 (B + 1), values float32, labels (B, M) int64 padded with -100).
    """
    random = np.random.default_rng(seed)
    clusters = max(1, labels // 64)

    def by_rank(limit: int, size: int) -> np.ndarray:  # density ~ rank^-0.8 by inversion
        return np.minimum((limit * random.random(size) ** 5).astype(np.int64), limit - 1)

    scatter = np.random.default_rng(0).permutation(labels)
    made = []
    for _ in range(count):
        cluster = by_rank(clusters, batch)
        number = np.maximum(1, random.poisson(5.5, batch))
        padded = np.full((batch, number.max()), -100, dtype=np.int64)
        for row in range(batch):
            own = np.unique(cluster[row] * 64 + by_rank(64, number[row]))
            padded[row, : len(own)] = scatter[np.minimum(own, labels - 1)]
        length = np.maximum(1, random.poisson(76, batch))
        total = int(length.sum())
        of_cluster = np.repeat(cluster, length) * 31 + by_rank(400, total)
        features = np.where(random.random(total) < 2 / 3, of_cluster, by_rank(FEATURES, total))
        values = random.random(total).astype(np.float32) + 0.1
        row_of = np.repeat(np.arange(batch), length)
        values /= np.sqrt(np.bincount(row_of, values**2))[row_of]
        made.append(
            (
                torch.from_numpy(features % FEATURES),
                torch.from_numpy(np.concatenate([[0], length.cumsum()])),
                torch.from_numpy(values.astype(np.float32)),
                torch.from_numpy(padded),
            )
        )
    return made


class Memory:
    """What the memory gives, by several ways of using it.

    Kinds: ``read``, ``update`` (read and write) and ``write`` of a buffer from end to end; ``row_read`` and
    ``row_update`` of ``count`` random rows of the (neurons, width) buffer, other rows at every turn, so
    that no cache holds them. What is written counts once: a write that first reads its cache line
    is slower for it.
    """

    def __init__(self, neurons: int = LABELS, width: int = HIDDEN, count: int = 300_000) -> None:
        self._buffer = advise_hugepages_(torch.empty(neurons, width)).fill_(1.0)
        self._rows = [
            rows.sort().values for rows in torch.randperm(neurons).split(min(count, neurons // 2))
        ][:-1]
        self._turn = 0

    def turn(self) -> dict[str, dict[str, float]]:
        """GB/s of every way of every kind, measured once."""
        flat, table = self._buffer.view(-1), self._buffer
        rows = self._rows[self._turn % len(self._rows)]
        self._turn += 1
        all_bytes, row_bytes = flat.nbytes, rows.numel() * table.shape[1] * 4
        bags = torch.arange(0, rows.numel(), 64)
        ways: dict[str, tuple[float, dict[str, Callable[[], object]]]] = {
            "read": (
                all_bytes,
                {"sum": flat.sum, "amax": flat.amax, "dot": lambda: flat.dot(flat)},
            ),
            "update": (2 * all_bytes, {"add_": lambda: flat.add_(0), "mul_": lambda: flat.mul_(1)}),
            "write": (all_bytes, {"fill_": lambda: flat.fill_(1.0)}),
            "row_read": (
                row_bytes,
                {
                    "touch_rows_": lambda: touch_rows_(table, rows, write=False),
                    "embedding_bag": lambda: F.embedding_bag(rows, table, bags, mode="sum"),
                },
            ),
            "row_update": (
                2 * row_bytes,
                {"touch_rows_": lambda: touch_rows_(table, rows, write=True)},
            ),
        }
        return {
            kind: {way: count / milliseconds(work) / 1e6 for way, work in of.items()}
            for kind, (count, of) in ways.items()
        }


def best_rates(turns: Iterable[dict[str, dict[str, float]]]) -> dict[str, dict[str, Any]]:
    """Of :meth:`Memory.turn`'s results, for each kind the way with the best median: its GB/s and name."""
    turns = list(turns)
    found = {}
    for kind, ways in turns[0].items():
        medians = {way: median(turn[kind][way] for turn in turns) for way in ways}
        best = max(medians, key=medians.__getitem__)
        found[kind] = {"gb_s": medians[best], "by": best}
    return found


def print_rates(rates: dict[str, dict[str, Any]]) -> None:
    rows = [
        [kind.replace("_", " "), f"{rate['gb_s']:.1f}", rate["by"]] for kind, rate in rates.items()
    ]
    print_table(["memory", "GB/s", "by"], rows)


def bound_ms(traffic: dict[str, float], rates: dict[str, dict[str, Any]]) -> float:
    """Milliseconds that the memory needs for ``traffic``, bytes by kind of use."""
    return sum(count / rates[kind]["gb_s"] / 1e6 for kind, count in traffic.items())


class Worker:
    """A contender in a process of its own: its memory is its own, and it rests while others run.

    ``target(*arguments)``, run there, returns the function that :meth:`run` calls.
    """

    def __init__(
        self, target: Callable, *arguments: Any, environment: dict[str, str] | None = None
    ) -> None:
        # a server that has imported torch once and never computed: forks of it start at once and are clean
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "slide_torch"])
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, environment or {}, target, arguments), daemon=True
        )
        self._process.start()
        theirs.close()
        self._answer()

    def run(self, *arguments: Any) -> Any:
        """What the contender's function returns for ``arguments``."""
        self._pipe.send(arguments)
        return self._answer()

    def stop(self) -> None:
        self._pipe.send(None)
        self._process.join()

    def _answer(self) -> Any:
        try:
            kind, value = self._pipe.recv()
        except EOFError:
            raise RuntimeError("a contender's process died (out of memory?)") from None
        if kind == "error":
            raise RuntimeError(value)
        return value


def _serve(pipe: Any, environment: dict[str, str], target: Callable, arguments: tuple) -> None:
    os.environ.update(environment)
    try:
        run = target(*arguments)
        pipe.send(("ok", None))
        while (message := pipe.recv()) is not None:
            pipe.send(("ok", run(*message)))
    except Exception:
        pipe.send(("error", traceback.format_exc()))


def random_rows(neurons: int, count: int) -> Tensor:
    """``count`` random rows, increasing."""
    return torch.randperm(neurons)[:count].sort().values
