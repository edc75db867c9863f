"""How fast ``read_xmc`` reads a file: rows and megabytes a second.

    python benchmarks/xmc_read.py --rows 1000000 --threads 1

The file is made for the purpose, with sorted features and values of six decimals; it is read once
beforehand, so that it comes from memory and not from the disk.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from slide_torch.data import read_xmc

NUM_FEATURES, NUM_LABELS = 135_909, 670_091  # those of Amazon-670K
LABELS_PER_ROW = 5
DISTINCT_LINES = 20_000  # the file repeats them in random order: enough that no cache holds them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--features", type=int, default=76, help="mean number of a row")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "made.txt"
        write_file(path, options.rows, options.features)
        megabytes = path.stat().st_size / 1e6
        before = peak_megabytes()
        data = read_xmc(path)
        more = peak_megabytes() - before
        result = sum(array.nbytes for array in vars(data).values() if isinstance(array, np.ndarray))
        num_features = len(data.feature_indices)
        del data
        seconds = np.sort([time_read(path) for _ in range(options.repeats)])
    print(f"machine   {cpu_name()}, {os.cpu_count()} cores, {options.threads} threads")
    print(f"versions  Python {platform.python_version()}, torch {torch.__version__}, ", end="")
    print(f"numpy {np.__version__}")
    print(f"file      {options.rows:,} rows, {num_features:,} features, {megabytes:,.0f} MB")
    for name, share in (("best", 0.0), ("median", 0.5), ("worst", 1.0)):
        taken = float(np.quantile(seconds, share))
        print(f"{name:<9} {taken:.3f} s, ", end="")
        print(f"{options.rows / taken:,.0f} rows/s, {megabytes / taken:,.0f} MB/s")
    print(f"memory    {result / 1e6:,.0f} MB for the result, the peak grew by {more:,.0f} MB")


def write_file(path: Path, num_rows: int, mean_features: int) -> None:
    """Writes a file of rows with random features and labels, in chunks."""
    generator = np.random.default_rng(0)
    lines = []
    for count in generator.integers(1, 2 * mean_features, DISTINCT_LINES):
        features = np.sort(generator.choice(NUM_FEATURES, count, replace=False, shuffle=False))
        pairs = zip(features.tolist(), generator.random(count).tolist(), strict=True)
        labels = ",".join(map(str, generator.integers(0, NUM_LABELS, LABELS_PER_ROW).tolist()))
        lines.append(f"{labels} {' '.join([f'{f}:{value:.6f}' for f, value in pairs])}\n")
    with open(path, "w") as file:
        file.write(f"{num_rows} {NUM_FEATURES} {NUM_LABELS}\n")
        for start in range(0, num_rows, DISTINCT_LINES):
            order = generator.permutation(DISTINCT_LINES)[: num_rows - start]
            file.writelines(lines[line] for line in order.tolist())


def time_read(path: Path) -> float:
    start = time.perf_counter()
    read_xmc(path)
    return time.perf_counter() - start


def peak_megabytes() -> float:
    """The most memory this process has held so far (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


if __name__ == "__main__":
    main()
