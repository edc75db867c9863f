"""What a contest shows: its table, its record, its plot."""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np
from torch import nn

from .contest import DENSE, LSH, Task
from .machine import machine_line
from .output import draw, print_table
from .run import Run

__all__ = ["show"]


def show(
    args: argparse.Namespace,
    task: Task,
    results: list[tuple[Run, nn.Module, list[str]]],
    note: str,
) -> None:
    """Prints the table, writes the record, draws validation against seconds."""
    columns = [
        "head",
        *task.columns,
        "learning rate",
        "ms/step",
        "steps",
        "seconds",
        "peak GB",
        "active neurons per sample",
    ]
    lines = []
    for run, model, cells in results:
        active = f"{model.head.out_features:,}"
        if hasattr(model.head, "stats"):
            active = f"{np.mean(run.active):,.0f}" if run.active else ""
        line = [run.name, *cells, f"{run.lr:g}", f"{run.ms_step:.1f}", f"{run.steps:,}"]
        lines.append([*line, f"{run.seconds:.0f}", f"{run.peak_gb:.2f}", active])
    kind = {"wall": "", "cpu": "; seconds are processor seconds of the process"}[args.clock]
    where = f"{note}{kind}; {machine_line(args.seed)}"
    print(f"\n{where}\n")
    print_table(columns, lines)
    runs = [run for run, _, _ in results]
    if args.json:
        settings = {
            key: getattr(args, key) for key in ("batch", "lr", "dense_lr", "equal", "clock")
        }
        record = {
            "machine": where,
            "settings": settings | task.settings | {"lsh": repr(args.lsh)},
            "columns": columns,
            "rows": lines,
            "curves": {run.name: run.curve for run in runs},
            "trials": {run.name: run.trials for run in runs},
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    if len(runs) > 1 and runs[-1].name == DENSE and runs[0].name == LSH:
        times = runs[-1].ms_step / runs[0].ms_step
        print(f"\na dense step takes {times:.1f} times as long as an LSHLinear step")

    def paint(axes: Any) -> None:
        for run in runs:
            label = f"{run.name} ({run.ms_step:.0f} ms a step)"
            points = [point[0] for point in run.curve], [point[2] for point in run.curve]
            axes.plot(*points, marker="o", markersize=3, label=label)
        axes.set_xlabel("seconds of training")
        axes.set_ylabel(task.measure)
        axes.set_title(task.title)
        axes.legend()

    draw(args.plot, paint)
