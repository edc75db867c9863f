"""When tables are rehashed and rebuilt, and what has been done so far."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..hashing.base import HashFamily
from ..options import ResolvedOptions

# Rows whose codes tell how far all rows have drifted: a share is known to about 0.01.
DRIFT_SAMPLE_ROWS = 512

# Steps that are remembered, to recognise their recomputation: as many as may lie between a forward and its
# backward.
REMEMBERED_STEPS = 64

COUNTERS = (
    *("steps", "rehashes", "rebuilds", "upkeep_seconds", "drift_checks", "drift"),
    *("period", "since_rehash"),
)


class Schedule:
    """Counts training steps and says when the tables are due.

    Args:
        options: ``schedule``, ``rehash_every``, ``rehash_growth``, ``rebuild_every`` and ``drift`` are read.

    Attributes:
        steps: training steps seen.
        rehashes, rebuilds: how often the tables were made anew.
        upkeep_seconds: time that this took.
        drift_checks: under ``schedule="drift"`` how often the drift sample was looked at.
        drift: share of its codes that had changed at the last look.
        period: steps from the last rehash to the next, or to the next look.
        since_rehash: steps since the last rehash.
        drift_sample_codes: (L, 512), codes of the drift sample at the last rehash, or None.
    """

    def __init__(self, options: ResolvedOptions) -> None:
        self.options = options
        self.steps = 0
        self.rehashes = 0
        self.rebuilds = 0
        self.upkeep_seconds = 0.0
        self.drift_checks = 0
        self.drift = 0.0
        self.period = float(options.rehash_every)
        self.since_rehash = 0
        self.drift_sample_codes: Tensor | None = None
        self._in_upkeep = False

    @property
    def is_over(self) -> bool:
        """Whether the present period is over."""
        return self.since_rehash >= self.period

    @property
    def rebuilds_next(self) -> bool:
        """Whether the next rehash is a rebuild."""
        every = self.options.rebuild_every
        return every > 0 and (self.rehashes + 1) % every == 0

    @contextmanager
    def upkeep(self) -> Iterator[None]:
        """Adds the time of what is done inside to ``upkeep_seconds``, unless it raises. Inside of another one
        it counts nothing itself."""
        if self._in_upkeep:
            yield
            return
        self._in_upkeep = True
        started = time.perf_counter()
        try:
            yield
            self.upkeep_seconds += time.perf_counter() - started
        finally:
            self._in_upkeep = False

    def advance(self, steps: int) -> None:
        self.steps += steps
        self.since_rehash += steps

    def begin_next_period(self) -> None:
        if self.options.schedule == "drift":
            self.period = float(self.options.rehash_every)
        else:
            self.period *= self.options.rehash_growth

    def look_at_drift(
        self, family: HashFamily, weight: Tensor, bias: Tensor | None
    ) -> float | None:
        """The share of the drift sample's codes that have changed since the last rehash; None where there is
        nothing to compare with: under ``schedule="growing"``, or after a run with it was resumed."""
        if self.options.schedule == "growing" or self.drift_sample_codes is None:
            return None
        codes = codes_of_drift_sample(family, weight, bias)
        return (codes != self.drift_sample_codes).float().mean().item()

    def count_drift_check(self, drift: float) -> None:
        self.drift = drift
        self.drift_checks += 1

    def restart(self, family: HashFamily, weight: Tensor, bias: Tensor | None) -> None:
        """Counts from now on, when ``family`` has just hashed the rows of ``weight``."""
        self.since_rehash = 0
        if self.options.schedule == "drift":
            self.drift_sample_codes = codes_of_drift_sample(family, weight, bias)

    def counters(self) -> dict[str, int | float]:
        return {name: getattr(self, name) for name in COUNTERS}

    def take_up(self, counters: dict[str, int | float], drift_sample_codes: Tensor | None) -> None:
        """Goes on from what another schedule counted."""
        for name in COUNTERS:
            setattr(self, name, counters[name])
        self.drift_sample_codes = drift_sample_codes


class SeenSteps:
    """The last steps, by seed and version of the weight, so that their recomputation is recognised."""

    def __init__(self) -> None:
        self._moving: dict[tuple[int, int], bool] = {}

    def see(self, seed: int, version: int, *, moving: bool) -> bool | None:
        """Whether that step was seen before as one that trains, and None if it was not seen at all."""
        before = self._moving.pop((seed, version), None)
        self._moving[seed, version] = moving or bool(before)
        if len(self._moving) > REMEMBERED_STEPS:
            del self._moving[next(iter(self._moving))]
        return before


def codes_of_drift_sample(family: HashFamily, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Present codes (L, 512) of the drift sample: the same rows as long as the functions have one seed."""
    return family.row_codes(weight, bias, drift_sample(family, weight.shape[0]))


def drift_sample(family: HashFamily, neurons: int) -> Tensor:
    """The rows (512) of the drift sample of ``neurons`` rows."""
    generator = torch.Generator().manual_seed(family.seed)
    return torch.randint(neurons, (DRIFT_SAMPLE_ROWS,), generator=generator)
