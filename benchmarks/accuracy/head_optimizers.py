"""The optimizer of a wide output layer: held-out accuracy after an epoch, bytes of state, time of a step.

    python -m benchmarks.accuracy.head_optimizers --json FILE --problem places --classes 20000
    python -m benchmarks.accuracy.head_optimizers --json FILE --problem lemmas

Model, data, batches, initialisation and the body's Adam are the same. LSHLinear, with its defaults, is
updated by Adam with moments in float32 or bfloat16, or by Adagrad with one number of state an element or a
row, each at the learning rate whose run ends best on a fixed subset of the validation rows; all rates fall
linearly to 0. P@1 and P@5 are by the exact logits of all classes. Every optimizer updates in ``step()``:
with ``fuse_backward=True``, which only Adam has, its steps would be shorter.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common.arguments import argument_parser, parse
from benchmarks.common.record import finish
from benchmarks.common.timing import median
from examples.common.output import print_table
from slide_torch import LSHLinear
from slide_torch.optim import Adagrad, Adam

from .load import load_problem
from .output_layers import loss_of
from .problems import Problem
from .training import choose_rate

TINY = Path(__file__).parents[2] / "examples" / "data"
# with the learning rates that are tried first
OPTIMIZERS: dict[str, tuple[Any, dict[str, Any], list[float]]] = {
    "Adam": (Adam, {}, [5e-3, 1e-2, 2e-2]),
    "Adam, bfloat16 moments": (Adam, {"moments_dtype": torch.bfloat16}, [5e-3, 1e-2, 2e-2]),
    "Adagrad": (Adagrad, {}, [2e-2, 5e-2, 1e-1]),
    "row-wise Adagrad": (Adagrad, {"row_wise": True}, [2e-2, 5e-2, 1e-1]),
}


def main() -> None:
    args = arguments()
    problem = load(args)
    steps = max(1, math.ceil(args.epochs * -(-problem.train_rows // args.batch)))
    found = [compare(args, problem, name, steps) for name in OPTIMIZERS]
    report(found)
    record = {"problem": problem.description(), "optimizers": found}
    setting = {"problem": problem.name, "batch": args.batch, "steps": steps}
    finish(args, setting, record, lambda axes: paint(axes, found))


def arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__, "the tiny files of examples/data, two rates of each")
    parser.add_argument("--problem", choices=("places", "lemmas"), default="places")
    parser.add_argument("--classes", type=int, default=0, help="only the first so many; 0: all")
    parser.add_argument("--validation-rows", type=int, default=5_000)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--body-lr", type=float, default=1e-2, help="of the body's Adam")
    args = parse(parser)
    for name in ("validation_rows", "epochs", "batch", "body_lr"):
        if getattr(args, name) <= 0:
            got = getattr(args, name)
            parser.error(f"--{name.replace('_', '-')}: expected a positive number, got {got}")
    if args.classes < 0:
        parser.error(f"--classes: must not be negative, got {args.classes}")
    return args


def load(args: argparse.Namespace) -> Problem:
    options = {"classes": args.classes, "validation_rows": args.validation_rows}
    if args.quick:
        args.batch = 8
        files = TINY / "tiny_train.txt", TINY / "tiny_test.txt"
        return load_problem("xmc", files=files, **options)
    return load_problem(args.problem, data_dir=args.data_dir, **options)


def compare(args: argparse.Namespace, problem: Problem, name: str, steps: int) -> dict[str, Any]:
    """The run of the optimizer ``name`` that ends best on validation rows, and what the others ended at."""
    _, _, rates = OPTIMIZERS[name]
    trials: dict[float, dict[str, Any]] = {}

    def score(lr: float) -> float:
        trials[lr] = train(args, problem, name, lr, steps)
        print(f"{name}, lr {lr:g}: {trials[lr]}", flush=True)
        return trials[lr].get("validation", {}).get(problem.metric, -math.inf)

    best = choose_rate(score, rates[:2] if args.quick else rates, beyond=not args.quick)
    return {
        "optimizer": name,
        "lr": best,
        "body_lr": args.body_lr,
        **trials[best],
        "trials": [
            {"lr": lr, problem.metric: run.get("validation", {}).get(problem.metric)}
            for lr, run in sorted(trials.items())
        ],
    }


def train(
    args: argparse.Namespace, problem: Problem, name: str, lr: float, steps: int
) -> dict[str, Any]:
    """A whole run; empty if it diverged."""
    torch.manual_seed(args.seed)
    body = problem.body()
    head = LSHLinear(problem.hidden, problem.num_labels, sparse=True)
    problem.start_(body, head, args.seed)
    make, options, _ = OPTIMIZERS[name]
    optimizer = make(head.parameters(), lr=lr, **options)
    optimizers = [Adam(body.parameters(), lr=args.body_lr), optimizer]
    schedules = [
        torch.optim.lr_scheduler.LinearLR(each, 1.0, 0.0, total_iters=steps) for each in optimizers
    ]
    step_ms: list[float] = []
    epoch = 0
    while len(step_ms) < steps:
        for features, labels in problem.batches(args.batch, seed=1_000 * args.seed + epoch):
            started = time.perf_counter()
            try:
                step(body, head, optimizers, features, labels)
            except ValueError as error:
                if "NaN or Inf" in str(error):  # hashing refuses such rows
                    return {}
                raise
            step_ms.append((time.perf_counter() - started) * 1e3)
            for schedule in schedules:
                schedule.step()
            if len(step_ms) == steps:
                break
        epoch += 1
    weight, bias = head.weight.detach(), head.bias.detach()
    if not weight.isfinite().all():
        return {}
    body.eval()
    parts = ("validation", "test")
    return {
        "ms_step": median(step_ms),
        "state_bytes_per_neuron": state_bytes(optimizer) / problem.num_labels,
        **{part: problem.evaluate(body, weight, bias, part) for part in parts},
    }


def step(
    body: nn.Module,
    head: LSHLinear,
    optimizers: list[torch.optim.Optimizer],
    features: tuple[Tensor, ...],
    labels: Tensor,
) -> None:
    loss = loss_of(head(body(*features)), labels)
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of all states that grow with the parameters."""
    states = [value for state in optimizer.state.values() for value in state.values()]
    return sum(value.nbytes for value in states if value.dim() > 0)


def report(found: list[dict[str, Any]]) -> None:
    print()
    print_table(
        ["optimizer of the head", "lr", "P@1", "P@5", "state, bytes a neuron", "ms/step"],
        [
            [
                run["optimizer"],
                f"{run['lr']:g}",
                f"{run['test']['P@1']:.4f}",
                f"{run['test']['P@5']:.4f}",
                f"{run['state_bytes_per_neuron']:.0f}",
                f"{run['ms_step']:.1f}",
            ]
            for run in found
        ],
    )


def paint(axes: Any, found: list[dict[str, Any]]) -> None:
    for run in found:
        axes.plot(
            run["state_bytes_per_neuron"], run["test"]["P@1"], marker="o", label=run["optimizer"]
        )
    axes.set_xlabel("state, bytes a neuron")
    axes.set_ylabel("P@1, all held-out rows")
    axes.legend()


if __name__ == "__main__":
    main()
