"""Draws the README's picture, accuracy against seconds of training, from a record of time_to_accuracy.py.

python -m benchmarks.readme.picture  # into docs/images/
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.accuracy.record import mean_curve, seconds_at

from .records import RESULTS, ROOT

# contender: label, colour, position of the label relative to the last point in points
LINES = {
    "lsh": ("LSHLinear", "#c1272d", (8, -3)),
    "uniform_1024": ("sampled softmax", "#1f6fb2", (-92, 8)),
    "inbatch": ("in-batch negatives", "#6aa7d8", (-104, 5)),
    "dense": ("dense torch", "#444444", (8, -3)),
    "dense_bf16": ("dense torch, bf16", "#444444", (8, -3)),
    "omikuji_1": ("label trees (1)", "#2e8b57", (-84, 4)),
    "omikuji_3": ("label trees (3)", "#2e8b57", (9, -8)),
}


def paint(axes: Any, record: dict[str, Any]) -> None:
    """The validation curves of every length of training; the longest one of a contender is solid. Contenders
    that the record lacks are left out."""
    for name, (label, color, shift) in LINES.items():
        entries = [e for e in record["contenders"] if e["contender"] == name]
        if not entries:
            continue
        entries.sort(key=lambda entry: entry["epochs"] or 0)
        for entry in entries:
            curve = mean_curve(entry, record["problem"]["metric"])
            seconds = [seconds_at(entry, step) for step, _ in curve]
            accuracy = [value for _, value in curve]
            longest = entry is entries[-1]
            axes.plot(
                seconds,
                accuracy,
                color=color,
                linewidth=2.2 if name == "lsh" else 1.6,
                alpha=1 if longest else 0.4,
                marker="*" if len(curve) == 1 else None,
                markersize=11,
            )
        end = (seconds[-1], accuracy[-1])
        axes.annotate(label, end, shift, textcoords="offset points", color=color, fontsize=9)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--record", type=Path, default=RESULTS / "time_to_accuracy_places_60000.json"
    )
    parser.add_argument(
        "--output", type=Path, default=ROOT / "docs" / "images" / "accuracy_against_seconds.png"
    )
    args = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    record = json.loads(args.record.read_text())
    problem, machine = record["problem"], record["machine"]
    figure, axes = plt.subplots(figsize=(7.2, 3.9), layout="constrained")
    paint(axes, record)
    axes.set_xscale("log")
    ticks = [3, 10, 30, 100, 300, 1000]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(1.7, 1500)
    axes.set_ylim(0, 0.75)
    axes.set_xlabel(f"seconds of training on {machine['cores']} CPU cores (logarithmic)")
    axes.set_ylabel(f"{problem['metric']} on held-out names")
    axes.set_title(f"Place names, {problem['num_labels']:,} classes", fontsize=11)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=150, metadata={"Software": None})


if __name__ == "__main__":
    main()
