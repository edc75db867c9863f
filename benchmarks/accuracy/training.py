"""Trains a contender of time_to_accuracy.py and judges it on held-out rows, in steps: no clock runs here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from examples.common.checkpoint import save_checkpoint
from examples.common.machine import reset_peak_memory, resident_gb
from slide_torch import load_sampler_state, sampler_state

from .contenders import Contender, make_output_layer
from .problems import Problem

__all__ = ["THIRDS", "Training", "choose_rate", "train"]

# The middles of a run's thirds, at which the clock measures what a step takes.
THIRDS = (1 / 6, 1 / 2, 5 / 6)

Batch = tuple[tuple[Tensor, ...], Tensor]


class Training:
    """One contender's model, optimizers and place in its run.

    Args:
        problem: the rows and the model's body.
        contender: what the output layer is.
        settings: ``steps`` of the whole run, ``batch``, ``lr``, the rate, which falls linearly to 0, and
            ``decay`` of the output layer's rows that a step touches (0 where it is not given).
        seed: of initial weights and batches, which are the same for every contender.
        variant: of dense torch, see :class:`DenseLayer`.
    """

    def __init__(
        self,
        problem: Problem,
        contender: Contender,
        settings: dict[str, Any],
        seed: int,
        variant: str | None = None,
    ) -> None:
        self.problem, self.settings, self.seed = problem, settings, seed
        torch.manual_seed(seed)
        self.body = problem.body()
        linear = nn.Linear(problem.hidden, problem.num_labels)
        problem.start_(self.body, linear, seed)
        self.output = make_output_layer(contender, linear, variant)
        self.optimizers = self.output.optimizers(
            self.body,
            settings["lr"],
            settings.get("decay", 0.0),
            row_wise=problem.start != "random",
        )
        self.steps = 0

    def batches(self) -> Iterator[Batch]:
        """From where the training stands, without end."""
        size = self.settings["batch"]
        epoch_steps = -(-self.problem.train_rows // size)
        epoch, skip = divmod(self.steps, epoch_steps)
        while True:
            yield from self.problem.batches(size, seed=1_000 * self.seed + epoch, skip=skip)
            epoch, skip = epoch + 1, 0

    def step(self, features: tuple[Tensor, ...], labels: Tensor) -> Tensor:
        """One training step; returns the loss."""
        left = max(0.0, 1 - self.steps / self.settings["steps"])
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = optimizer.defaults["lr"] * left
            optimizer.zero_grad()
        loss = self.output.loss(self.body(*features), labels)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        self.steps += 1
        return loss.detach()

    @torch.no_grad()
    def evaluate(self, part: str) -> dict[str, float]:
        """By the exact logits of all classes."""
        linear = self.output.linear
        self.body.eval()
        answer = self.problem.evaluate(self.body, linear.weight, linear.bias, part)
        self.body.train()
        return answer

    def save(self, path: Path) -> None:
        """Keeps all that the rest of the run depends on."""
        state = {
            "steps": self.steps,
            "body": self.body.state_dict(),
            "head": self.output.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "sampler": sampler_state(self.output),
            "rng": torch.get_rng_state(),
        }
        save_checkpoint(path, state)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.steps = state["steps"]
        self.body.load_state_dict(state["body"])
        self.output.load_state_dict(state["head"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        load_sampler_state(self.output, state["sampler"])
        torch.set_rng_state(state["rng"])


def train(
    problem: Problem,
    contender: Contender,
    settings: dict[str, Any],
    seed: int,
    states: list[Path] | None,
) -> dict[str, Any] | None:
    """A whole run: accuracy on a fixed subset of the validation rows on the way, on the test rows at the end.

    ``states`` are files for the training's state in the middle of each third. None if the run diverged.
    """
    if problem.start != "random":  # made now: its memory is not the contender's
        problem.start_(problem.body(), nn.Linear(problem.hidden, problem.num_labels), seed)
    base = reset_peak_memory()
    training = Training(problem, contender, settings, seed)
    steps, count = settings["steps"], settings["evaluations"]
    # early ones close
    points = {math.ceil(steps * (i / count) ** 1.5) for i in range(1, count + 1)}
    keep_at = {math.ceil(steps * at): path for at, path in zip(THIRDS, states or (), strict=False)}
    curve, active, peak = [], [], 0.0
    if problem.start != "random":
        curve.append({"step": 0, **training.evaluate("validation")})
        reset_peak_memory()
    for features, labels in training.batches():
        try:
            loss = training.step(features, labels)
        except ValueError as error:
            if "NaN or Inf" in str(error):  # hashing refuses such rows
                return None
            raise
        if training.steps % 20 == 1:
            active.append(training.output.classes())
            if not math.isfinite(loss.item()):
                return None
        if training.steps in points:
            peak = max(peak, resident_gb("VmHWM") - base)
            found = training.evaluate("validation")
            curve.append({"step": training.steps, **found})
            measured = ", ".join(f"{key} {value:.4f}" for key, value in found.items())
            print(
                f"{contender.name}, lr {settings['lr']:g}, decay {settings.get('decay', 0):g}, seed {seed}: "
                f"step {training.steps:,} of {steps:,}, loss {loss.item():.3f}, {measured}",
                flush=True,
            )
            reset_peak_memory()
        if training.steps in keep_at:
            training.save(keep_at[training.steps])
        if training.steps == steps:
            break
    union, per_sample = np.mean(active, axis=0)
    return {
        "seed": seed,
        "classes_a_step": union,
        "classes_a_sample": per_sample,
        "peak_gb": peak,
        "curve": curve,
        "test": training.evaluate("test"),
    }


def choose_rate(score: Callable[[float], float], rates: list[float], *, beyond: bool) -> float:
    """The learning rate with the largest ``score``. With ``beyond``, where that is the first or last of
    ``rates``, the next on that side is tried too.

    Raises:
        SystemExit: every rate diverged, which a score of minus infinity says.
    """
    found = {lr: score(lr) for lr in sorted(rates)}
    while True:
        best = max(found, key=found.__getitem__)
        if found[best] == -math.inf:
            raise SystemExit("every trial diverged: give smaller --lr")
        side = (best == max(found)) - (best == min(found))
        if not beyond or side == 0 or not 1e-5 < best < 1:
            return best
        found[next_rate(best, side)] = score(next_rate(best, side))


def next_rate(lr: float, side: int) -> float:
    """The next of 1, 2, 5, 10, ... times a power of ten, above (1) or below (-1)."""
    grid = [float(f"{digit}e{power}") for power in range(-7, 3) for digit in (1, 2, 5)]
    others = [x for x in grid if (x - lr) * side > 1e-3 * lr]
    return min(others) if side > 0 else max(others)
