"""Whole trainings for gpu.py, on real rows: dense torch on a device, LSHLinear on the CPU."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.accuracy.problems import SparseProblem
from benchmarks.accuracy.training import choose_rate
from examples.common.classifier import Classifier, loss_of
from examples.common.recipe import Recipe, train
from examples.common.run import Run
from slide_torch import LSHLinear
from slide_torch.data import batches

from .gpu_contenders import WAYS, DenseTrainer, Device, Way, on_device

__all__ = ["Dense", "Outcome", "chosen_run", "measure_accuracy", "seconds_to", "train_lsh"]

LSH = "LSHLinear"


@dataclass
class Outcome:
    """One training: ``curve`` of (seconds, step, P@1 on validation rows). Seconds include those of the start,
    but not the making of batches, nor evaluation."""

    curve: list[tuple[float, int, float]]
    start_seconds: float
    peak_gb: float
    model: Classifier  # on the CPU


def evaluate(problem: SparseProblem, model: Classifier, part: str) -> dict[str, float]:
    """By the exact logits, on the CPU for every contender."""
    return problem.evaluate(model.hidden, model.head.weight, model.head.bias, part)


def points_of(steps: int, evaluations: int) -> list[int]:
    """The steps after which a run is evaluated, the last one among them."""
    return sorted({math.ceil(steps * i / evaluations) for i in range(1, evaluations + 1)})


def train_lsh(problem: SparseProblem, recipe: Recipe, evaluations: int) -> Outcome:
    """LSHLinear by the recipe of the examples."""
    torch.manual_seed(recipe.seed)
    head = LSHLinear(problem.hidden, problem.num_labels, sparse=True)
    model = Classifier(problem.num_features, problem.hidden, head)
    rows, validation = problem.parts["train"], problem.parts["validation"]
    points = points_of(recipe.steps(len(rows)), evaluations)
    run = Run(LSH)
    train(run, model, rows, validation, recipe, evaluate_every=points.__contains__)
    if run.interrupted:
        raise KeyboardInterrupt
    return Outcome(run.curve, run.seconds - sum(run.step_ms) / 1e3, run.peak_gb, model)


class Dense:
    """Trains dense torch on a device, always from the start of the recipe.

    The start is made once, on the CPU, and its time counts in every run. Batches are on the device, and
    compiled code is made, before the clock runs.
    """

    def __init__(self, problem: SparseProblem, seed: int, device: Device) -> None:
        self.problem, self.device = problem, device
        started = time.perf_counter()
        self.start = problem.make_start(seed)
        self.start_seconds = time.perf_counter() - started
        self.width = int(np.diff(problem.parts["train"].label_indptr).max())

    def model(self) -> Classifier:
        problem = self.problem
        head = nn.Linear(problem.hidden, problem.num_labels)
        model = Classifier(problem.num_features, problem.hidden, head)
        model.load_state_dict(self.start)
        return model

    def train(self, way: Way, recipe: Recipe, evaluations: int) -> Outcome:
        self.device.forget_peak()
        trainer = DenseTrainer(
            self.model(), way, loss_of, self.device, lr=recipe.lr, decay=recipe.decay
        )
        steps = recipe.steps(self.problem.train_rows)
        stream, host = self._batches(recipe), self.model()
        outcome = Outcome([], self.start_seconds, math.nan, host)
        warm: set[int] = set()  # sizes of batches
        seconds, done = self.start_seconds, 0
        for point in points_of(steps, evaluations):
            ready = list(islice(stream, point - done))
            for batch in ready:
                if (size := len(batch[-1])) not in warm:
                    trainer.warm_up(batch)
                    warm.add(size)
            self.device.synchronize()
            started = time.perf_counter()
            for step, batch in enumerate(ready, done):
                loss = trainer.step(batch, 1 - step / steps)
            self.device.synchronize()
            seconds += time.perf_counter() - started
            done = point
            if not math.isfinite(loss.item()):
                raise ValueError(f"diverged before step {done}")
            outcome.peak_gb = self.device.peak_gb()
            host.load_state_dict(trainer.model.state_dict())
            outcome.curve.append((seconds, done, evaluate(self.problem, host, "validation")["P@1"]))
        self.device.release()
        return outcome

    def _batches(self, recipe: Recipe) -> Iterator[tuple[Tensor, ...]]:
        """Those of the recipe, without end."""
        rows, seed = self.problem.parts["train"], recipe.seed
        while True:
            for batch in batches(rows, recipe.batch, seed=seed):
                yield on_device(batch, self.width, self.device)
            seed += 1


def chosen_run(
    train: Callable[[Recipe], Outcome],
    recipe: Recipe,
    rates: list[float],
    decays: list[float],
    *,
    beyond: bool,
) -> tuple[tuple[Recipe, Outcome] | None, list[dict[str, Any]]]:
    """The run of the rate, and then of the decay, that ends best on validation rows, or None where no run
    came to its end; and what was tried. ``beyond`` as in :func:`choose_rate`."""
    outcomes: dict[Recipe, Outcome] = {}
    trials: dict[Recipe, dict[str, Any]] = {}

    def score(lr: float, decay: float) -> float:
        tried = replace(recipe, lr=lr, decay=decay)
        if tried not in trials:
            trials[tried] = {"lr": lr, "decay": decay}
            try:
                outcomes[tried] = train(tried)
                trials[tried]["P@1"] = outcomes[tried].curve[-1][2]
            except (RuntimeError, ValueError) as error:  # out of memory; NaN
                trials[tried]["failed"] = str(error).strip().partition("\n")[0]
            print(trials[tried], flush=True)
        return trials[tried].get("P@1", -math.inf)

    try:
        lr = choose_rate(lambda lr: score(lr, decays[0]), rates, beyond=beyond and len(rates) > 1)
    except SystemExit:  # no run came to its end
        return None, list(trials.values())
    best = replace(recipe, lr=lr, decay=max(decays, key=lambda decay: score(lr, decay)))
    return (best, outcomes[best]), list(trials.values())


def measure_accuracy(problem: SparseProblem, args: argparse.Namespace) -> dict[str, Any]:
    """The chosen run of each contender for each length of training, and why others have none."""
    evaluations = args.evaluations
    # first: dense torch sets the precision of products for the whole process
    contenders: dict[str, Callable[[Recipe], Outcome]] = {
        LSH: lambda recipe: train_lsh(problem, recipe, evaluations)
    }
    if args.trained:
        dense = Dense(problem, args.seed, Device(args.device))
        for name in args.trained:
            contenders[name] = partial(dense.train, WAYS[name], evaluations=evaluations)
    runs, failed = [], {}
    for name, train_one in contenders.items():
        lsh = name == LSH
        rates, decays = (args.lr_lsh, args.decay_lsh) if lsh else (args.lr_dense, args.decay_dense)
        for epochs in args.epochs:
            recipe = Recipe(args.batch, 0.0, 0.0, args.seed, epochs=epochs)
            print(f"{name}, {epochs:g} epochs", flush=True)
            found, trials = chosen_run(train_one, recipe, rates, decays, beyond=not args.quick)
            if found is None:
                failed[f"{name}, {epochs:g} epochs"] = trials
                continue
            recipe, outcome = found
            runs.append(
                {
                    "contender": name,
                    "on": "cpu" if lsh else args.device,
                    **{key: getattr(recipe, key) for key in ("epochs", "batch", "lr", "decay")},
                    "trials": trials,
                    "curve": [
                        dict(zip(("seconds", "step", "P@1"), point, strict=True))
                        for point in outcome.curve
                    ],
                    "start_seconds": outcome.start_seconds,
                    "peak_gb": outcome.peak_gb,
                    "test": evaluate(problem, outcome.model, "test"),
                }
            )
    return {
        "problem": problem.description(),
        "runs": runs,
        "failed_runs": failed,
        "equal_P@1": equal_precision(runs),
    }


def equal_precision(runs: list[dict[str, Any]]) -> float:
    """The best P@1 on validation rows that every contender reached, in whatever run."""
    best: dict[str, float] = {}
    for run in runs:
        own = max(point["P@1"] for point in run["curve"])
        best[run["contender"]] = max(own, best.get(run["contender"], 0.0))
    return min(best.values(), default=0.0)


def seconds_to(run: dict[str, Any], precision: float) -> float | None:
    """When the run was first seen with that P@1 on validation rows, or None."""
    reached = [point["seconds"] for point in run["curve"] if point["P@1"] >= precision]
    return reached[0] if reached else None
