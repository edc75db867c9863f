"""What a training step of time_to_accuracy.py's contenders takes, measured in turns on a machine at rest."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.timing import median
from examples.common.machine import machine

from .contenders import Contender, variants_of
from .label_trees import run_of_trees
from .problems import Problem, SparseProblem
from .training import THIRDS, Training

__all__ = ["measure"]

STEPS = 20  # of a turn of a contender without tables, or 5 and as many more as fit into SECONDS
SECONDS = 3.0
MOST_STEPS = 1_000  # of one with tables: under schedule="drift" there may be no rehash


class Clocked:
    """A training that goes on from a state, timed."""

    def __init__(
        self, problem: Problem, entry: dict[str, Any], variant: str | None, state: Path
    ) -> None:
        contender = Contender(entry["contender"], entry["kind"], entry["options"])
        self.training = Training(problem, contender, entry["settings"], entry["seed"], variant)
        self.training.load(state)
        self.batches = self.training.batches()
        tables = getattr(self.training.output.linear, "tables", None)
        self.tables = tables if tables is not None and tables.uses_tables else None
        self.turn()  # warm, and with tables at the beginning of a period
        self.turns: list[float] = []

    def turn(self) -> float:
        """Mean milliseconds of a step, the making of its batch included. A turn of a layer with tables lasts
        from one rehash to the next, whatever that takes; one that meets a rebuild is done again."""
        before, count = self._upkeep(), 0
        started = time.perf_counter()

        def over() -> bool:
            if before is not None:
                return count == MOST_STEPS or self._upkeep() != before
            return count == STEPS or (count >= 5 and time.perf_counter() - started > SECONDS)

        while not over():
            self.training.step(*next(self.batches))
            count += 1
        milliseconds = (time.perf_counter() - started) * 1e3
        after = self._upkeep()
        if before is not None and after is not None and after[1] > before[1]:
            return self.turn()
        self.turn_steps = count
        return milliseconds / count

    def _upkeep(self) -> tuple[int, int] | None:
        schedule = self.tables and self.tables.schedule
        return schedule and (schedule.rehashes, schedule.rebuilds)

    def rebuild_ms(self) -> float:
        """Milliseconds of building the tables anew; 0 without tables."""
        if self.tables is None:
            return 0.0
        linear = self.training.output.linear
        started = time.perf_counter()
        self.tables.rebuild(linear.weight, linear.bias)
        return (time.perf_counter() - started) * 1e3

    def ms_step(self, rebuild_ms: float) -> float:
        """Of the median turn, with the share that a step bears of a rebuild."""
        every = self.tables.options.rebuild_every if self.tables else 0
        return median(self.turns) + (rebuild_ms / (every * self.turn_steps) if every else 0.0)


def measure(
    problem: Problem, entries: list[dict[str, Any]], states: list[list[Path]], turns: int
) -> list[dict[str, Any]]:
    """The clocks of ``entries``, which take turns; ``states`` are theirs in the middle of each third.

    A clock has ``ms_step`` for each third, of dense torch's fastest variant, and ``start_ms``, which the warm
    start, the same for all, and the first tables take; that of label trees has ``seconds``, of the whole
    training.
    """
    keys = [
        (place, variant)
        for place, entry in enumerate(entries)
        for variant in variants_of(
            entry["kind"], entry["options"], several_labels=problem.several_labels
        )
    ]
    of_thirds: dict[tuple[int, str | None], list[float]] = {key: [] for key in keys}
    start_ms = [warm_start_ms(problem, turns)] * len(entries)
    for third in range(len(THIRDS)):
        for (place, variant), (ms, rebuild_ms) in _turns(
            problem, entries, states, keys, third, turns
        ):
            of_thirds[place, variant].append(ms)
            if third == 0:
                start_ms[place] += rebuild_ms
    clocks = []
    for place, entry in enumerate(entries):
        clock = {"machine": machine() | {"threads": torch.get_num_threads()}}
        if entry["kind"] == "omikuji":
            trees = entry["options"]["trees"]
            clock["seconds"] = median(run_of_trees(problem, trees)["seconds"] for _ in range(turns))
        else:
            ms = {v: of_thirds[place, v] for p, v in keys if p == place}
            fastest = min(ms, key=lambda variant: sum(ms[variant]))
            clock |= {"ms_step": ms[fastest], "start_ms": start_ms[place]}
            if len(ms) > 1:
                clock["variants_ms"] = ms
        clocks.append(clock)
    return clocks


def _turns(
    problem: Problem,
    entries: list[dict[str, Any]],
    states: list[list[Path]],
    keys: list[tuple[int, str | None]],
    third: int,
    turns: int,
) -> list[tuple[tuple[int, str | None], tuple[float, float]]]:
    """Milliseconds of a step in that third and of a rebuild, by ``keys``; all of it is in memory at once."""
    clocked = {
        (place, variant): Clocked(problem, entries[place], variant, states[place][third])
        for place, variant in keys
    }
    for _ in range(turns):
        for contender in clocked.values():
            contender.turns.append(contender.turn())
    found = []
    for key, contender in clocked.items():
        rebuild_ms = contender.rebuild_ms()
        found.append((key, (contender.ms_step(rebuild_ms), rebuild_ms)))
    return found


def warm_start_ms(problem: Problem, turns: int) -> float:
    """Milliseconds of the start from training rows, the median of ``turns``; 0 of a random one."""
    if not isinstance(problem, SparseProblem):
        return 0.0
    found = []
    for seed in range(turns):
        started = time.perf_counter()
        problem.make_start(seed)
        found.append((time.perf_counter() - started) * 1e3)
    return median(found)
