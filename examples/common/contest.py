"""A contest of output layers on one task: a training loop for every contender, which goes on where it was
killed, and the choice of the learning rate."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from slide_torch import LSHLinear, LSHOptions
from slide_torch.optim import Adam

from .checkpoint import checkpoint_of, load_checkpoint, save_checkpoint
from .machine import reset_peak_memory, resident_gb
from .run import Run

__all__ = ["CLOCKS", "DENSE", "LSH", "Task", "compete"]

LSH = "LSHLinear"
DENSE = "dense torch"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
MakeHead = Callable[[int, int], nn.Module]  # of (width, classes)
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
    samples = hasattr(head, "stats")  # all but dense torch
    settings = {"batch": args.batch, "lr": lr, "seed": args.seed, "clock": args.clock}
    settings |= {"head": repr(getattr(head, "options", None)), **task.settings}
    path = None
    if args.checkpoint is not None:
        name = f"{args.checkpoint.name}.{run.name.replace(' ', '-')}"
        if len(rates_of(args, run.name)) > 1:
            name += f".{lr:g}"
        path = args.checkpoint.with_name(name)
        if path.exists():
            load_checkpoint(path, run, model, [optimizer], settings)

    def save() -> None:
        if path is not None:
            state = checkpoint_of(run, model, [optimizer], settings)
            save_checkpoint(path, state)

    def progress() -> float:
        shares = [run.steps / steps] if steps is not None else []
        return max([*shares, run.seconds / seconds] if seconds is not None else shares)

    def evaluate() -> None:
        run.peak_gb = max(run.peak_gb, resident_gb("VmHWM") - base)
        model.eval()
        run.curve.append((run.seconds, run.steps, task.validate(model)))
        model.train()
        reset_peak_memory()

    base = reset_peak_memory()
    saved_at = run.steps
    bar = tqdm(
        total=steps if seconds is None else None, initial=run.steps, desc=run.name, unit=" steps"
    )
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
            if run.steps % 20 == 0 and samples:
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
    make_model: Callable[[MakeHead], nn.Module],
    sampled: dict[str, LSHOptions | MakeHead],
) -> list[tuple[Run, nn.Module, list[str]]]:
    """Trains and tests the LSH head, other sampled heads, and the dense head, each from the same seed, at the
    learning rate that does best on validation data.

    Args:
        make_model: makes the model around a head that it calls for with (width, classes).
        sampled: the sampled contenders by their names, the LSH head first: options of an LSHLinear, or what
            makes another head, which has ``stats()`` as an LSHLinear has.

    Returns:
        For each: the run, its model, its cells of the table.
    """
    heads: dict[str, MakeHead] = {}
    if args.head != "dense":
        for name, how in sampled.items():
            if isinstance(how, LSHOptions):
                heads[name] = partial(LSHLinear, options=how, sparse=True)
            else:
                heads[name] = how
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
            save_checkpoint(args.save, {"model": model.state_dict()})
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
