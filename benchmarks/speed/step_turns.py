"""Turns of the contenders of step_contenders.py, each in a process of its own, and what they amount to."""

from __future__ import annotations

import argparse
import math

from benchmarks.common.timing import median
from benchmarks.common.worker import Worker

from .step_contenders import PHASES, Contender

__all__ = ["start", "summary", "turn", "upkeep_of"]

UPKEEP_STEPS = 1000
STEPS_A_TURN = {"dense": 1, "adaptive": 3, "sampled": 10, "lsh": 10}


def start(name: str, batch: int, args: argparse.Namespace) -> tuple[Worker, dict]:
    """The contender, and its first step, which warms up: first touches, compilation, table build.

    Raises:
        RuntimeError: it does not run here.
    """
    worker = Worker(Contender, name, batch, args.threads, args.seed, args.labels)
    return worker, worker.run("run", 1)


def turn(name: str, worker: Worker) -> dict:
    """A few steps, fewer where they are slow."""
    return worker.run("run", STEPS_A_TURN[name.split("_")[0]])


def upkeep_of(workers: dict[str, Worker]) -> dict[str, tuple[float, float]]:
    """Milliseconds of a rehash and of a rebuild of the contenders that have tables."""
    return {name: workers[name].run("upkeep") for name in workers if name.startswith("lsh")}


def summary(name: str, turns: list[dict], upkeep: dict[str, tuple[float, float]]) -> dict:
    """Medians of a contender's turns; the tables' upkeep added to LSH steps."""
    ms = median([m for turn in turns for m in turn["ms"]])
    phases = {
        phase: median([m for turn in turns for m in turn["phases"][phase]]) for phase in PHASES
    }
    result = {"contender": name, "peak_gb": turns[-1]["peak_gb"], "phases": phases}
    result["features"] = turns[-1]["features"]
    held = turns[-1]["memory_gb"]
    result["memory_gb"] = held | {"other_at_peak": result["peak_gb"] - sum(held.values())}
    if name in upkeep:
        schedule = turns[-1]["schedule"]
        result["rehash_ms"], result["rebuild_ms"] = upkeep[name]
        rehashes = rehashes_within(UPKEEP_STEPS, schedule)
        rebuilds = rehashes // schedule["rebuild_every"]
        spent = (rehashes - rebuilds) * result["rehash_ms"] + rebuilds * result["rebuild_ms"]
        phases["upkeep"] = spent / UPKEEP_STEPS
        result["upkeep_first_period"] = result["rehash_ms"] / schedule["rehash_every"]
        ms += phases["upkeep"]
        for key in ("active_per_sample", "union", "ids_read"):
            result[key] = median([turn[key] for turn in turns])
    result["ms_step"] = ms
    return result


def rehashes_within(steps: int, schedule: dict[str, float]) -> int:
    """Rehashes that the schedule does in the first ``steps`` training steps."""
    count, period, at = 0, float(schedule["rehash_every"]), 0.0
    while (at := at + math.ceil(period)) < steps:
        count, period = count + 1, period * schedule["rehash_growth"]
    return count
