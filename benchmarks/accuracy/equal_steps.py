"""Accuracy at equal steps: dense torch, and LSHLinear, on the quickstart's problem, however long it takes.

    python -m benchmarks.accuracy.equal_steps --head dense --json benchmarks/results/quickstart_dense.json
    python -m benchmarks.accuracy.equal_steps --head lsh --json benchmarks/results/quickstart_lsh.json \\
        --against benchmarks/results/quickstart_dense.json

    python -m benchmarks.accuracy.equal_steps --head lsh --steps 3406 --json fp32.json
    python -m benchmarks.accuracy.equal_steps --head lsh --steps 3406 --bf16-moments --against fp32.json

Model, data, batches, initialisation, learning rate and seed are the same; only the head differs:
nn.Linear with torch's fused Adam over every weight, or LSHLinear with its defaults, whose Adam keeps its
moments in bfloat16 if asked to (the second pair: one epoch). P@1 on the first
5,120 validation rows (they are ordered by place, so this is a curve to compare along, not an estimate)
against steps, and P@1 and P@5 on all held-out names at the end.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.common.arguments import argument_parser, parse
from benchmarks.common.generated import HIDDEN
from benchmarks.common.record import finish
from benchmarks.common.relu_classifier import ReLUClassifier, loss_of
from benchmarks.common.timing import median
from examples.common.classifier import labels_of, predict
from examples.common.output import print_table
from examples.data import places
from slide_torch import LSHLinear
from slide_torch.data import SparseRows, batches, read_xmc
from slide_torch.metrics import precision_at_k
from slide_torch.optim import Adam

NAMES = {"dense": "dense torch", "lsh": "LSHLinear"}
TINY = Path(__file__).parents[2] / "examples" / "data" / "tiny_train.txt"


def precision(model: ReLUClassifier, rows: SparseRows) -> tuple[float, float]:
    """P@1 and P@5, exact."""
    predicted, labels = predict(model, rows, 5), labels_of(rows)
    return precision_at_k(predicted, labels, 1), precision_at_k(predicted, labels, 5)


def main() -> None:
    parser = argument_parser(__doc__, "four steps on a tiny problem")
    parser.add_argument("--head", choices=NAMES, required=True)
    parser.add_argument("--bf16-moments", action="store_true", help="of LSHLinear's Adam")
    parser.add_argument("--against", type=Path, help="another record, to print beside")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--every", type=int, default=250, help="steps between validations")
    args = parse(parser)
    if args.bf16_moments and args.head != "lsh":
        parser.error("--bf16-moments: expected --head lsh, whose optimizer has them")
    if args.quick:
        args.steps, args.every, args.batch = 4, 2, 8
        data = rows = validation = test = read_xmc(TINY)
    else:
        data = places.load_places(args.data_dir)
        rows, validation, test = data.train, data.validation, data.test
    other = None if args.against is None else json.loads(args.against.read_text())
    model, optimizers = make_model(args, data.num_features, data.num_labels)
    part = validation.select(np.arange(min(5120, len(validation))))
    step_ms, curve = train(args, model, optimizers, rows, part)
    test_p1, test_p5 = precision(model, test)
    result = {
        "contender": NAMES[args.head] + (", bf16 moments" if args.bf16_moments else ""),
        **{key: getattr(args, key) for key in ("lr", "batch", "seed", "threads", "steps")},
        "torch": torch.__version__,
        "ms_step": median(step_ms),
        "curve": curve,
        "test_p1": test_p1,
        "test_p5": test_p5,
    }
    runs = [result] if other is None else [other, result]
    report(runs)
    finish(args, {"head": args.head}, result, lambda axes: paint(axes, runs))


def make_model(
    args: argparse.Namespace, num_features: int, num_labels: int
) -> tuple[ReLUClassifier, list[torch.optim.Optimizer]]:
    """The model with the head of --head, and its optimizers."""
    torch.manual_seed(args.seed)
    model = ReLUClassifier(num_features, HIDDEN, nn.Identity())
    if args.head == "dense":
        model.head = nn.Linear(HIDDEN, num_labels)
        return model, [
            torch.optim.SparseAdam(model.embedding.parameters(), lr=args.lr),
            torch.optim.Adam(model.head.parameters(), lr=args.lr, fused=True),
        ]
    model.head = LSHLinear(HIDDEN, num_labels, sparse=True)
    moments = torch.bfloat16 if args.bf16_moments else None
    return model, [Adam(model.parameters(), lr=args.lr, moments_dtype=moments)]


def train(
    args: argparse.Namespace,
    model: ReLUClassifier,
    optimizers: list[torch.optim.Optimizer],
    rows: SparseRows,
    validation: SparseRows,
) -> tuple[list[float], list[dict[str, float]]]:
    """Milliseconds of each step, and P@1 on the way."""
    step_ms: list[float] = []
    curve: list[dict[str, float]] = []
    epoch = 0
    while len(step_ms) < args.steps:
        for *features, labels in batches(rows, args.batch, seed=args.seed + epoch):
            started = time.perf_counter()
            loss = loss_of(model(*features), labels)
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            step_ms.append((time.perf_counter() - started) * 1e3)
            step = len(step_ms)
            if step % args.every == 0 or step == args.steps:
                point = {"step": step, "seconds": sum(step_ms) / 1e3}
                curve.append(point | {"validation_p1": precision(model, validation)[0]})
                print(f"step {step}, loss {loss.item():.3f}, {curve[-1]}", flush=True)
            if step == args.steps:
                break
        epoch += 1
    return step_ms, curve


def report(runs: list[dict[str, Any]]) -> None:
    print()
    print_table(
        ["head", "steps", "ms/step", "P@1, all held-out rows", "P@5", "P@1 on the way"],
        [
            [
                run["contender"],
                f"{run['steps']:,}",
                f"{run['ms_step']:.1f}",
                f"{run['test_p1']:.4f}",
                f"{run['test_p5']:.4f}",
                ", ".join(f"{p['step']}: {p['validation_p1']:.4f}" for p in run["curve"]),
            ]
            for run in runs
        ],
    )


def paint(axes: Any, runs: list[dict[str, Any]]) -> None:
    for run in runs:
        x, y = ([p[key] for p in run["curve"]] for key in ("step", "validation_p1"))
        axes.plot(x, y, marker="o", markersize=3, label=run["contender"])
    axes.set_xlabel("steps")
    axes.set_ylabel("P@1, first 5,120 validation rows")
    axes.legend()


if __name__ == "__main__":
    main()
