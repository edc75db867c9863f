"""What the examples with a body of their own share: their options, one training loop for every contender that
goes on where it was killed, the table, the record and the plot."""

from __future__ import annotations

import argparse
import ast
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import classifier
import numpy as np
import torch
from classifier import Run
from torch import Tensor, nn
from tqdm import tqdm

from slide_torch import LSHLinear, LSHOptions
from slide_torch.optim import Adam

LSH = "LSHLinear"
DENSE = "dense torch"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
EVALUATIONS = 5  # on validation data, in the course of a run


class Task(Protocol):
    """What a contest is about. Batches follow from the step alone, so that a resumed run sees the same ones.

    Attributes:
        title: of the plot.
        measure: what ``validate`` returns, for the plot's axis.
        larger_is_better: whether that is the better the larger it is.
        columns: names of what ``test`` returns.
        settings: all that a checkpoint must agree in, beside the options every example has.
        rows: predictions that a training step learns from.
    """

    title: str
    measure: str
    larger_is_better: bool
    columns: list[str]
    settings: dict[str, Any]
    rows: int

    def batch(self, step: int) -> Any: ...
    def loss(self, model: nn.Module, batch: Any) -> Tensor: ...
    def validate(self, model: nn.Module) -> float: ...
    def test(self, model: nn.Module, run: Run) -> list[str]: ...


# --- options ----------------------------------------------------------------------------------------


def parser_of(
    doc: str | None, *, steps: int, batch: int, lr: float, lsh: dict[str, Any], plot: str
) -> argparse.ArgumentParser:
    """The options that these examples have in common, with an example's own defaults."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--head", choices=("lsh", "dense", "both"), default="both")
    parser.add_argument("--steps", type=int, default=steps, help="most steps of the LSH model")
    parser.add_argument("--seconds", type=float, help="most seconds of the LSH model's training")
    parser.add_argument(
        "--dense-seconds", type=float, default=60.0, help="of the dense model's training"
    )
    parser.add_argument(
        "--equal",
        choices=("steps", "time", "none"),
        default="none",
        help="the dense model gets the steps, or the seconds, that the LSH model took; none: "
        "--dense-seconds",
    )
    parser.add_argument(
        "--clock",
        choices=tuple(CLOCKS),
        default="wall",
        help="what seconds are: cpu counts this process's own, on a machine shared with other work",
    )
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument(
        "--lr",
        type=float,
        nargs="+",
        default=[lr],
        help="several: each is a whole run, of which the best on validation data counts",
    )
    parser.add_argument(
        "--dense-lr", type=float, nargs="+", help="of the dense model, in place of --lr"
    )
    parser.add_argument(
        "--lsh",
        nargs="*",
        default=[f"{name}={value}" for name, value in lsh.items()],
        metavar="NAME=VALUE",
        help="LSHOptions, in place of " + (" ".join(f"{n}={v}" for n, v in lsh.items()) or "none"),
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, metavar="FILE", help="where the LSH model is kept")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="keep the training's state here, one file a model; where it exists, go on from it",
    )
    parser.add_argument("--checkpoint-every", type=int, default=500, metavar="STEPS")
    parser.add_argument("--json", type=Path, help="where the table goes, too")
    parser.add_argument("--plot", type=Path, default=Path(plot))
    return parser


def parse(parser: argparse.ArgumentParser, *positive: str) -> argparse.Namespace:
    """Parsed and checked arguments, ``args.lsh`` as LSHOptions; ``positive``: an example's own counts."""
    args = parser.parse_args()
    for name in ("steps", "batch", "threads", "checkpoint_every", *positive):
        if getattr(args, name) < 1:
            parser.error(
                f"--{name.replace('_', '-')}: expected at least 1, got {getattr(args, name)}"
            )
    for name in ("lr", "dense_lr", "dense_seconds", "seconds"):
        value = getattr(args, name)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and not number > 0:
                parser.error(f"--{name.replace('_', '-')}: expected more than 0, got {number}")
    if args.head == "dense" and args.equal == "time" and args.seconds is None:
        parser.error(
            "--equal time --head dense: expected --seconds, as no LSH model gives the time"
        )
    try:
        args.lsh = LSHOptions(**dict(_option(text) for text in args.lsh))
    except (TypeError, ValueError) as error:
        parser.error(f"--lsh: {error}")
    classifier.check_outputs(parser, args.save, args.checkpoint, args.json, args.plot)
    torch.set_num_threads(args.threads)
    return args


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"expected NAME=VALUE, as in tail=1024, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value


# --- training ---------------------------------------------------------------------------------------


def train(
    run: Run,
    model: nn.Module,
    task: Task,
    args: argparse.Namespace,
    *,
    lr: float,
    steps: int | None,
    seconds: float | None,
) -> None:
    """Trains until the first limit; evaluation does not count as time. Ctrl-C ends the training, not the
    program. Where a checkpoint exists, training goes on from it."""
    optimizer = Adam(model.parameters(), lr=lr)
    clock = CLOCKS[args.clock]
    head = model.head
    settings = {"batch": args.batch, "lr": lr, "seed": args.seed, "clock": args.clock}
    settings |= {"head": repr(getattr(head, "options", None)), **task.settings}
    path = None
    if args.checkpoint is not None:
        name = f"{args.checkpoint.name}.{run.name.replace(' ', '-')}"
        if len(rates_of(args, run.name)) > 1:
            name += f".{lr:g}"
        path = args.checkpoint.with_name(name)
        if path.exists():
            classifier.load_checkpoint(path, run, model, optimizer, settings)

    def save() -> None:
        if path is not None:
            state = classifier.checkpoint_of(run, model, optimizer, settings)
            classifier.save_checkpoint(path, state)

    def progress() -> float:
        shares = [run.steps / steps] if steps is not None else []
        return max([*shares, run.seconds / seconds] if seconds is not None else shares)

    def evaluate() -> None:
        run.peak_gb = max(run.peak_gb, classifier.resident_gb("VmHWM") - base)
        model.eval()
        run.curve.append((run.seconds, run.steps, task.validate(model)))
        model.train()
        classifier.reset_peak_memory()

    base = classifier.reset_peak_memory()
    saved_at = run.steps
    bar = tqdm(total=steps, initial=run.steps, desc=run.name, unit=" steps")
    try:
        while progress() < 1:
            due = int(progress() * EVALUATIONS) + 1
            batch = task.batch(run.steps)
            started, begun = clock(), time.perf_counter()
            loss = task.loss(model, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            spent = clock() - started
            run.step_ms.append(spent * 1e3)
            run.seconds += spent
            run.steps += 1
            bar.update()
            slow = time.perf_counter() - begun > 0.1
            if run.steps % 20 == 0 or slow:
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            if run.steps % 20 == 0 and isinstance(head, LSHLinear):
                run.active.append(head.stats()["active_per_sample"])
            if progress() * EVALUATIONS >= due:
                evaluate()
            if run.steps % args.checkpoint_every == 0:
                save()
                saved_at = run.steps
    except KeyboardInterrupt:
        run.interrupted = True
        print(f"\n{run.name}: interrupted after {run.steps:,} steps; evaluating what it has learnt")
    bar.close()
    if not run.curve or run.curve[-1][1] != run.steps:
        evaluate()
    if run.steps != saved_at and not run.interrupted:
        save()


def rates_of(args: argparse.Namespace, name: str) -> list[float]:
    """The learning rates that the contender ``name`` is to choose from."""
    return args.dense_lr if name == DENSE and args.dense_lr is not None else args.lr


def compete(
    args: argparse.Namespace,
    task: Task,
    make_model: Callable[[Callable[[int, int], nn.Module]], nn.Module],
    sampled: dict[str, LSHOptions],
) -> list[tuple[Run, nn.Module, list[str]]]:
    """Trains and tests the LSH head, other sampled heads, and the dense head, each from the same seed, at the
    learning rate that does best on validation data.

    Args:
        make_model: makes the model around a head that it calls for with (width, classes).
        sampled: options of the sampled contenders by their names, the LSH head's first.

    Returns:
        For each: the run, its model, its cells of the table.
    """
    heads: dict[str, Callable[[int, int], nn.Module]] = {}
    if args.head != "dense":
        for name, options in sampled.items():
            heads[name] = lambda width, classes, options=options: LSHLinear(
                width, classes, options=options, sparse=True
            )
    if args.head != "lsh":
        heads[DENSE] = nn.Linear
    results: list[tuple[Run, nn.Module, list[str]]] = []
    for name, make_head in heads.items():
        steps, seconds = args.steps, args.seconds
        if name == DENSE:
            lsh = (
                results[0][0]
                if results
                else Run(LSH, steps=args.steps, seconds=args.seconds or 0.0)
            )
            steps = lsh.steps if args.equal == "steps" else None
            seconds = {"steps": None, "time": lsh.seconds, "none": args.dense_seconds}[args.equal]
        try:
            run, model = best_run(args, task, name, partial(make_model, make_head), steps, seconds)
            model.eval()
            results.append((run, model, task.test(model, run)))
        except KeyboardInterrupt:  # in an evaluation
            print(f"\n{name}: left out")
            break
        if name == LSH and args.save:
            classifier.save_checkpoint(args.save, {"model": model.state_dict()})
        if run.interrupted:
            break
    return results


def best_run(
    args: argparse.Namespace,
    task: Task,
    name: str,
    make_model: Callable[[], nn.Module],
    steps: int | None,
    seconds: float | None,
) -> tuple[Run, nn.Module]:
    """A run at each of the contender's learning rates; the one that ends best on validation data."""
    best: tuple[Run, nn.Module] | None = None
    trials: list[tuple[float, float]] = []
    sign = 1 if task.larger_is_better else -1
    for lr in rates_of(args, name):
        torch.manual_seed(args.seed)
        run, model = Run(name, lr=lr), make_model()
        train(run, model, task, args, lr=lr, steps=steps, seconds=seconds)
        trials.append((lr, run.curve[-1][2]))
        if best is None or sign * (trials[-1][1] - best[0].curve[-1][2]) > 0:
            best = run, model
        best[0].interrupted |= run.interrupted
        if run.interrupted:
            break
    assert best is not None  # there is at least one rate
    best[0].trials = trials
    return best


# --- what is shown ----------------------------------------------------------------------------------


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
        if isinstance(model.head, LSHLinear):
            active = f"{np.mean(run.active):,.0f}" if run.active else ""
        line = [run.name, *cells, f"{run.lr:g}", f"{run.ms_step:.1f}", f"{run.steps:,}"]
        lines.append([*line, f"{run.seconds:.0f}", f"{run.peak_gb:.2f}", active])
    kind = {"wall": "", "cpu": "; seconds are processor seconds of the process"}[args.clock]
    where = f"{note}{kind}; {classifier.machine_line(args.seed)}"
    print(f"\n{where}\n")
    classifier.print_table(columns, lines)
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

    classifier.draw(args.plot, paint)
