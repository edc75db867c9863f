"""Whole trainings for gpu.py, on real rows: dense torch on a device, LSHLinear on the CPU."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.accuracy.problems import SparseProblem
from examples.common.classifier import Classifier, loss_of
from examples.common.recipe import Recipe, train
from examples.common.run import Run
from slide_torch import LSHLinear
from slide_torch.data import batches

from .gpu_contenders import DenseTrainer, Device, Way, on_device

__all__ = ["Dense", "Outcome", "chosen_run", "evaluate", "train_lsh"]


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
    run = Run("LSHLinear")
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
        stream, host, warm = self._batches(recipe), self.model(), set()
        outcome = Outcome([], self.start_seconds, math.nan, host)
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
    train: Callable[[Recipe], Outcome], recipe: Recipe, rates: list[float], decays: list[float]
) -> tuple[Recipe, Outcome, list[dict[str, Any]]]:
    """The rate, and then the decay, whose whole run ends best on validation rows; with what was tried.

    Raises:
        RuntimeError: no run came to its end.
    """
    outcomes: dict[Recipe, Outcome] = {}
    trials: dict[Recipe, dict[str, Any]] = {}

    def score(tried: Recipe) -> float:
        if tried not in trials:
            trials[tried] = {"lr": tried.lr, "decay": tried.decay}
            try:
                outcomes[tried] = train(tried)
                trials[tried]["P@1"] = outcomes[tried].curve[-1][2]
            except (RuntimeError, ValueError) as error:  # out of memory; NaN
                trials[tried]["failed"] = str(error).strip().splitlines()[0]
            print(trials[tried], flush=True)
        return trials[tried].get("P@1", -math.inf)

    best = max((replace(recipe, lr=lr, decay=decays[0]) for lr in rates), key=score)
    best = max((replace(best, decay=decay) for decay in decays), key=score)
    if best not in outcomes:
        raise RuntimeError(trials[best]["failed"])
    return best, outcomes[best], list(trials.values())
