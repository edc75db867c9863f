"""Training steps for gpu.py, on generated batches: dense torch on a device, other contenders on the CPU."""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch import nn

from benchmarks.common.generated import FEATURES, HIDDEN, generate_batches
from benchmarks.common.relu_classifier import ReLUClassifier, loss_of
from benchmarks.common.timing import median
from benchmarks.common.worker import Worker

from .gpu_contenders import WAYS, DenseTrainer, Device, on_device
from .step_turns import start, summary, turn, upkeep_of

__all__ = ["StepTimer", "measure_steps"]


class StepTimer:
    """A way on generated batches, which are on the device before any clock runs; for a process of its own."""

    def __init__(
        self, name: str, batch: int, threads: int, seed: int, labels: int, kind: str
    ) -> None:
        torch.set_num_threads(threads)
        torch.manual_seed(seed)
        self.device = Device(kind)
        made = generate_batches(64, batch, seed=seed, labels=labels)
        width = max(own.shape[1] for *_, own in made)
        self.batches = [on_device(one, width, self.device) for one in made]
        self.device.forget_peak()
        model = ReLUClassifier(FEATURES, HIDDEN, nn.Linear(HIDDEN, labels))
        self.trainer = DenseTrainer(model, WAYS[name], loss_of, self.device, lr=1e-3)
        self.steps = 0

    def __call__(self, steps: int) -> dict[str, float]:
        """Mean milliseconds of ``steps`` steps in a row, after some that warm up, and the peak of memory."""
        self._train(max(1, steps // 5))
        started = time.perf_counter()
        self._train(steps)
        milliseconds = (time.perf_counter() - started) * 1e3
        self.device.release()
        return {"ms": milliseconds / steps, "peak_gb": self.device.peak_gb()}

    def _train(self, steps: int) -> None:
        for _ in range(steps):
            self.trainer.step(self.batches[self.steps % len(self.batches)])
            self.steps += 1
        self.device.synchronize()


class OnDevice:
    """One of WAYS in a process of its own."""

    def __init__(self, name: str, batch: int, args: argparse.Namespace) -> None:
        self.name, self.steps = name, args.steps
        self.device = args.device
        self.worker = Worker(
            StepTimer, name, batch, args.threads, args.seed, args.labels, args.device
        )
        self.worker.run(1)
        self.turns: list[dict[str, float]] = []

    def turn(self) -> None:
        self.turns.append(self.worker.run(self.steps))

    def result(self) -> dict[str, Any]:
        ms = median([turn["ms"] for turn in self.turns])
        return {"contender": self.name, "ms_step": ms, "peak_gb": self.turns[-1]["peak_gb"]}


class OnCPU:
    """A contender of step_contenders.py, timed as step_time.py does."""

    device = "cpu"

    def __init__(self, name: str, batch: int, args: argparse.Namespace) -> None:
        self.name = name
        self.worker, _ = start(name, batch, args)
        self.turns: list[dict[str, Any]] = []

    def turn(self) -> None:
        self.turns.append(turn(self.name, self.worker))

    def result(self) -> dict[str, Any]:
        return summary(self.name, self.turns, upkeep_of({self.name: self.worker}))


def measure_steps(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Results at every batch size, and why others have none."""
    results: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    for batch in args.batches:
        found = steps_at(batch, args, failed)
        dense = [r["ms_step"] for r in found if r["contender"] in WAYS and r["on"] == args.device]
        for result in found:
            result["times_best_dense"] = min(dense) / result["ms_step"] if dense else None
        results += found
    return results, failed


def steps_at(batch: int, args: argparse.Namespace, failed: dict[str, str]) -> list[dict[str, Any]]:
    """Results at a batch size; who runs out of memory or does not compile goes to ``failed``."""
    running: list[OnDevice | OnCPU] = []
    results: list[dict[str, Any]] = []

    def fail(name: str, device: str, error: RuntimeError) -> None:
        key = f"{name}, {device}, batch {batch}"
        failed[key] = str(error).strip().splitlines()[-1]
        print(f"{key}: {failed[key]}", flush=True)

    for kind, device, names in ((OnDevice, args.device, args.dense), (OnCPU, "cpu", args.cpu)):
        for name in names:
            try:
                running.append(kind(name, batch, args))
            except RuntimeError as error:
                fail(name, device, error)
    for _ in range(args.rounds):
        for contender in list(running):
            try:
                contender.turn()
            except RuntimeError as error:
                fail(contender.name, contender.device, error)
                running.remove(contender)
    for contender in running:
        results.append({"batch": batch, "on": contender.device, **contender.result()})
        contender.worker.stop()
    return results
