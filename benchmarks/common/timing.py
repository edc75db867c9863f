"""Milliseconds of a call, medians of several."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

__all__ = ["alternate", "median", "milliseconds"]

median = statistics.median


def milliseconds(work: Callable[[], object]) -> float:
    """How long one call takes; freeing its result counts, as it would in a training step."""
    started = time.perf_counter()
    work()
    return (time.perf_counter() - started) * 1e3


def alternate(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each; after a call of each to warm up, they take turns."""
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        run()
    for _ in range(rounds):
        for name, run in contenders.items():
            taken[name].append(milliseconds(run))
    return {name: median(times) for name, times in taken.items()}
