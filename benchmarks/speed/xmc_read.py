"""How fast ``read_xmc`` reads a file: rows and megabytes a second, by one thread and by --threads.

    python -m benchmarks.speed.xmc_read --rows 1000000 --json benchmarks/results/xmc_read.json

The file is made for the purpose, with sorted features and values of six decimals; it is read once
beforehand, so that it comes from memory and not from the disk.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.common.arguments import argument_parser, parse
from benchmarks.common.generated import FEATURES, LABELS
from benchmarks.common.record import finish
from benchmarks.common.timing import median, milliseconds
from examples.common.machine import resident_gb
from examples.common.output import print_table
from slide_torch.data import read_xmc

LABELS_PER_ROW = 5
DISTINCT_LINES = 20_000  # the file repeats them in random order: enough that no cache holds them


def main() -> None:
    parser = argument_parser(__doc__, "2,000 rows")
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--features", type=int, default=76, help="mean number of a row")
    parser.add_argument("--repeats", type=int, default=5)
    args = parse(parser)
    if args.quick:
        args.rows, args.repeats = 2_000, 1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "made.txt"
        write_file(path, args.rows, args.features, args.seed)
        megabytes = path.stat().st_size / 1e6
        before = resident_gb("VmHWM")
        data = read_xmc(path)
        more = resident_gb("VmHWM") - before
        result = sum(array.nbytes for array in vars(data).values() if isinstance(array, np.ndarray))
        num_features = len(data.feature_indices)
        del data
        counts = sorted({1, args.threads})
        ms: dict[int, list[float]] = {threads: [] for threads in counts}
        for _ in range(args.repeats):
            for threads in counts:
                torch.set_num_threads(threads)
                ms[threads].append(milliseconds(lambda: read_xmc(path)))
    lines = [
        {
            "threads": threads,
            "ms": median(times),
            "rows_s": args.rows / median(times) * 1e3,
            "mb_s": megabytes / median(times) * 1e3,
        }
        for threads, times in ms.items()
    ]
    print(
        f"{args.rows:,} rows, {num_features:,} features, {megabytes:,.0f} MB; "
        f"{result / 1e6:,.0f} MB for the result, the peak grew by {more * 1.074e3:,.0f} MB\n"
    )
    print_table(
        ["threads", "ms", "rows/s", "MB/s"],
        [
            [str(r["threads"]), f"{r['ms']:,.0f}", f"{r['rows_s']:,.0f}", f"{r['mb_s']:,.0f}"]
            for r in lines
        ],
    )

    def paint(axes) -> None:
        axes.bar([str(r["threads"]) for r in lines], [r["mb_s"] for r in lines])
        axes.set_xlabel("threads")
        axes.set_ylabel("MB/s")

    finish(
        args,
        {"rows": args.rows},
        {"megabytes": megabytes, "result_mb": result / 1e6, "peak_gb": more, "threads": lines},
        paint,
    )


def write_file(path: Path, num_rows: int, mean_features: int, seed: int) -> None:
    """Writes a file of rows with random features and labels, in chunks."""
    generator = np.random.default_rng(seed)
    lines = []
    for count in generator.integers(1, 2 * mean_features, DISTINCT_LINES):
        features = np.sort(generator.choice(FEATURES, count, replace=False, shuffle=False))
        pairs = zip(features.tolist(), generator.random(count).tolist(), strict=True)
        labels = ",".join(map(str, generator.integers(0, LABELS, LABELS_PER_ROW).tolist()))
        lines.append(f"{labels} {' '.join([f'{f}:{value:.6f}' for f, value in pairs])}\n")
    with open(path, "w") as file:
        file.write(f"{num_rows} {FEATURES} {LABELS}\n")
        for start in range(0, num_rows, DISTINCT_LINES):
            order = generator.permutation(DISTINCT_LINES)[: num_rows - start]
            file.writelines(lines[line] for line in order.tolist())


if __name__ == "__main__":
    main()
