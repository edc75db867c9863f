"""What the benchmarks share: the generated problem, the machine's description, contenders in processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import statistics
import time
import traceback
from pathlib import Path

import numpy as np
import torch

FEATURES, LABELS = 135_909, 670_091  # Amazon-670K's shape
HIDDEN = 128


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


def machine() -> dict:
    """What a figure must be quoted with."""
    import slide_torch

    cpu = platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": slide_torch.instruction_set(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "slide_torch": slide_torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def median(values) -> float:
    return statistics.median(values)


def resident_gb(key: str = "VmRSS") -> float:
    """Resident gigabytes (VmRSS) or their peak (VmHWM) of this process; Linux."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) / 2**20
    except OSError:
        pass
    return float("nan")


class Worker:
    """A contender in a process of its own: its memory is its own, and it rests while others run."""

    def __init__(self, target, *arguments) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, target, arguments), daemon=True
        )
        self._process.start()
        theirs.close()
        self.ready = self._answer()

    def run(self, steps: int):
        """What the contender's ``run(steps)`` returns."""
        self._pipe.send(steps)
        return self._answer()

    def stop(self) -> None:
        self._pipe.send(None)
        self._process.join()

    def _answer(self):
        try:
            kind, value = self._pipe.recv()
        except EOFError:
            raise RuntimeError("a contender's process died (out of memory?)") from None
        if kind == "error":
            raise RuntimeError(value)
        return value


def _serve(pipe, target, arguments) -> None:
    try:
        run = target(*arguments)
        pipe.send(("ok", None))
        while (steps := pipe.recv()) is not None:
            pipe.send(("ok", run(steps)))
    except Exception:
        pipe.send(("error", traceback.format_exc()))


def write_json(path: Path | None, result: dict) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def print_table(columns: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    lines = [columns, [("-" * w) for w in widths], *rows]
    for line in lines:
        print("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |")
