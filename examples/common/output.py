"""What a program leaves: a table, a picture, files."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .run import Run

__all__ = ["check_outputs", "draw", "plot", "print_table"]


def check_outputs(parser: argparse.ArgumentParser, *paths: Path | None) -> None:
    """Refuses, before any work, files that could not be written after it."""
    for path in paths:
        if path is not None and not path.absolute().parent.is_dir():
            parser.error(f"{path}: expected an existing folder, got {path.parent}: make it first")


def print_table(columns: list[str], lines: list[list[str]]) -> None:
    """A Markdown table with aligned columns."""
    widths = [max(len(row[i]) for row in [columns, *lines]) for i in range(len(columns))]
    for i, row in enumerate([columns, ["-" * w for w in widths], *lines]):
        cells = [
            c.ljust(w) if j == 0 else c.rjust(w)
            for j, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        if i == 1:
            cells = ["-" * widths[0], *["-" * (w - 1) + ":" for w in widths[1:]]]
        print("| " + " | ".join(cells) + " |")


def draw(path: Path, paint: Callable[[Any], None], size: tuple[float, float] = (7, 4.2)) -> None:
    """Lets ``paint`` fill the axes of a figure and saves it; without matplotlib, says that it did not."""
    try:
        import matplotlib
    except ImportError:
        print(
            f"{path}: not drawn, matplotlib is missing: "
            'pip install --no-build-isolation ".[examples]"'
        )
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=size, dpi=120)
    paint(axes)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
    print(f"picture: {path}")


def plot(runs: list[Run], title: str, path: Path) -> None:
    """P@1 on validation rows against seconds of training, one curve a contender,
    or a point where it has no steps."""

    def paint(axes: Any) -> None:
        for run in runs:
            if not run.step_ms:  # it has no steps
                axes.plot(*[[point[i] for point in run.curve] for i in (0, 2)], "*", label=run.name)
                continue
            seconds = [0.0, *[point[0] for point in run.curve]]
            scores = [0.0, *[point[2] for point in run.curve]]
            label = f"{run.name} ({run.ms_step:.0f} ms a step)"
            axes.plot(seconds, scores, marker="o", markersize=3, label=label)
        axes.set_xlabel("seconds of training")
        axes.set_ylabel("P@1 on validation rows")
        axes.set_title(title)
        axes.set_ylim(bottom=0)
        axes.legend()

    draw(path, paint)
