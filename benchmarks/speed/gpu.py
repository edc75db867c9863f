"""Dense torch on a GPU beside LSHLinear on the same machine's CPU: steps, and accuracy against seconds.

    python -m benchmarks.speed.gpu --json FILE
    python -m benchmarks.speed.gpu --parts steps --batches 128 --cpu lsh_shared dense_bf16 --json FILE
    python -m benchmarks.speed.gpu --parts accuracy --epochs 1 2 4 --json FILE
    python -m benchmarks.speed.gpu --quick --device cpu

The comparison that the SLIDE paper headlines. Without a CUDA device it says so and measures nothing.

Steps: a training step with the shape of Amazon-670K, on generated data (benchmarks/common/generated.py).
Dense contenders (gpu_contenders.py) have parameters, moments and gradients in float32. One fused Adam updates
all rows of both layers; of contenders with _sparse in their names it updates the output layer, and SparseAdam
updates the rows of the embedding that a batch touches. dense_linear_cross_entropy takes the first label of a
row, the others take all of them. A turn is a group of steps between two synchronizations, after some that
warm up. Contenders live in processes of their own and take turns for several rounds; medians. Those of the
CPU are timed as by speed.step_time, upkeep of the tables included. Peak memory is that of tensors on the GPU,
and what a process adds to its resident memory on the CPU.

Accuracy: the quickstart's data (234,908 places) and start (warm start, falling rate); all contenders see the
same batches. LSHLinear learns by the recipe of the examples, dense torch as in the steps. Each contender has
the rate, and then the decay, whose whole run ends best on validation rows, separately for each of --epochs.
Choosing does not count as time; the record keeps what was tried. Evaluation is exact, on the CPU for all of
them, and stops the clock. The table says when each run reached the best P@1 on validation rows that every
contender reached.

Making a batch counts for no contender. Moving it to the GPU and torch.compile do not count, which favours the
GPU. The start is made on the CPU and counts for all; its seconds have a column.
"""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy.load import load_problem
from benchmarks.accuracy.problems import SparseProblem
from benchmarks.accuracy.time_to_accuracy import TINY
from benchmarks.common.arguments import argument_parser, parse
from benchmarks.common.generated import LABELS
from benchmarks.common.record import finish
from examples.common.output import print_table
from examples.common.recipe import DECAYS, RATES

from .gpu_contenders import WAYS
from .gpu_steps import measure_steps
from .gpu_training import measure_accuracy, seconds_to
from .step_contenders import CONTENDERS

PARTS = ("steps", "accuracy")
TRAINED = ("dense_tf32", "dense_bf16_compile", "dense_bf16_compile_sparse")  # by default


def main() -> None:
    args = arguments()
    if args.device == "cuda" and not torch.cuda.is_available():
        print(
            f"nothing measured: torch {torch.__version__} finds no CUDA device here "
            "(--quick --device cpu checks the code)"
        )
        return
    content: dict[str, Any] = {}
    if "steps" in args.parts:
        content["labels"] = args.labels
        content["steps"], content["failed_steps"] = measure_steps(args)
        print()
        report_steps(content["steps"])
    if "accuracy" in args.parts:
        content |= measure_accuracy(load(args), args)
        print()
        report_accuracy(content["runs"], content["equal_P@1"])
    finish(args, gpu(args.device), content, lambda axes: paint(axes, content))


def arguments() -> argparse.Namespace:
    quick = "4,000 labels, the tiny files of examples/data, one round, without torch.compile"
    parser = argument_parser(__doc__, quick)
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to check the code")
    add("--parts", nargs="+", choices=PARTS, default=PARTS)
    names = ", ".join(TRAINED)
    add("--dense", nargs="*", choices=WAYS, help=f"default: all in steps, {names} in accuracy")
    add("--cpu", nargs="*", choices=CONTENDERS, default=["lsh_shared", "lsh_per_sample"])
    add("--batches", type=int, nargs="+", default=[128, 256, 1024], help="rows of a step, of steps")
    add("--labels", type=int, default=LABELS, help="of steps")
    add("--rounds", type=int, default=7)
    add("--steps", type=int, default=50, help="of a turn of dense torch")
    add("--epochs", type=float, nargs="+", default=[2.0], help="lengths of training, of accuracy")
    add("--batch", type=int, default=256, help="rows of a step, of accuracy")
    add("--evaluations", type=int, default=10, help="of a run")
    add("--lr-dense", type=float, nargs="+", default=[0.002, 0.005, 0.01, 0.02])
    add("--lr-lsh", type=float, nargs="+", default=list(RATES))
    add("--decay-dense", type=float, nargs="+", default=[0.0, 0.03], help="of all rows")
    add("--decay-lsh", type=float, nargs="+", default=list(DECAYS), help="of rows touched")
    add("--data-dir", type=Path)
    args = parse(parser)
    for name in ("batches", "labels", "rounds", "steps", "epochs", "batch", "evaluations"):
        value = getattr(args, name)
        if (min(value) if isinstance(value, list) else value) <= 0:
            parser.error(f"--{name}: expected a positive number, got {value}")
    if args.quick:
        args.labels, args.batches, args.rounds, args.steps = 4_000, [8], 1, 2
        args.epochs, args.batch, args.evaluations = [4.0], 8, 4
        args.lr_dense, args.lr_lsh = args.lr_dense[-2:], args.lr_lsh[-1:]
    trained = TRAINED if args.dense is None else args.dense
    args.trained = [name for name in trained if not WAYS[name].chunked]
    if args.dense is None:
        args.dense = list(WAYS)
        if args.quick:
            args.dense = [name for name in WAYS if not WAYS[name].compiled]
            args.trained = ["dense_tf32", "dense_bf16_sparse"]
    return args


def gpu(device: str) -> dict[str, Any]:
    """The GPU and what drives it."""
    if device != "cuda":
        return {"gpu": None}
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    return {"gpu": torch.cuda.get_device_name(), "driver": driver, "cuda": torch.version.cuda}


def load(args: argparse.Namespace) -> SparseProblem:
    name, files = "places", None
    if args.quick:
        name, files = "xmc", (TINY / "tiny_train.txt", TINY / "tiny_test.txt")
    options = {"data_dir": args.data_dir, "classes": 0, "validation_rows": 5_000}
    problem = load_problem(name, files=files, **options)
    print(", ".join(f"{key} {value}" for key, value in problem.description().items()), flush=True)
    return problem


def report_steps(results: list[dict[str, Any]]) -> None:
    columns = ["batch", "on", "contender", "ms/step", "best dense / it", "peak GB"]
    columns.append("active/sample")
    lines = [
        [
            str(r["batch"]),
            r["on"],
            r["contender"],
            f"{r['ms_step']:.2f}",
            f"{r['times_best_dense']:.2f}x" if r["times_best_dense"] else "",
            f"{r['peak_gb']:.2f}",
            f"{r['active_per_sample']:,.0f}" if "active_per_sample" in r else "",
        ]
        for r in results
    ]
    print_table(columns, lines)


def report_accuracy(runs: list[dict[str, Any]], equal: float) -> None:
    columns = ["contender", "on", "epochs", "rate", "decay"]
    columns += ["validation P@1", "test P@1", "test P@5"]
    columns += ["seconds", "of the start", f"s to P@1 {equal:.4f}", "peak GB"]
    lines = []
    for run in runs:
        reached = seconds_to(run, equal)
        lines.append(
            [
                run["contender"],
                run["on"],
                f"{run['epochs']:g}",
                f"{run['lr']:g}",
                f"{run['decay']:g}",
                f"{run['curve'][-1]['P@1']:.4f}",
                f"{run['test']['P@1']:.4f}",
                f"{run['test']['P@5']:.4f}",
                f"{run['curve'][-1]['seconds']:.1f}",
                f"{run['start_seconds']:.1f}",
                f"{reached:.1f}" if reached is not None else "",
                f"{run['peak_gb']:.2f}",
            ]
        )
    print_table(columns, lines)


def paint(axes: Any, content: dict[str, Any]) -> None:
    """The curves; without them, the bars of the steps."""
    for run in content.get("runs", ()):
        x, y = ([point[key] for point in run["curve"]] for key in ("seconds", "P@1"))
        label = f"{run['contender']}, {run['on']}, {run['epochs']:g} epochs"
        axes.plot(x, y, marker="o", markersize=3, label=label)
    if "runs" in content:
        axes.set_xlabel("seconds of training")
        axes.set_ylabel("P@1 on validation rows")
        axes.legend()
        return
    steps = content["steps"][::-1]
    bars = axes.barh(range(len(steps)), [r["ms_step"] for r in steps])
    names = [f"{r['contender']}, {r['on']}, {r['batch']}" for r in steps]
    axes.set_yticks(range(len(steps)), names)
    axes.bar_label(bars, [f"{r['ms_step']:,.1f}" for r in steps], padding=3)
    axes.set_xscale("log")
    axes.set_xlabel("ms a step, logarithmic")


if __name__ == "__main__":
    main()
