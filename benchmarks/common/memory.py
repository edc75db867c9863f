"""The memory: how much is free, how fast it is, how long given bytes take."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from examples.common.output import print_table
from slide_torch.ops.rows import advise_hugepages_, touch_rows_

from .generated import HIDDEN, LABELS
from .timing import median, milliseconds

__all__ = ["Memory", "available_gb", "best_rates", "bound_ms", "print_rates"]


def available_gb() -> float:
    """Gigabytes that new processes could have; infinite where the system does not tell."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) / 2**20
    except OSError:
        pass
    return float("inf")


class Memory:
    """What the memory gives, by several ways of using it.

    Kinds: ``read``, ``update`` (read and write) and ``write`` of a buffer from end to end; ``row_read`` and
    ``row_update`` of ``count`` random rows of the (neurons, width) buffer, other rows at every turn, so
    that no cache holds them. What is written counts once: a write that first reads its cache line
    is slower for it.
    """

    def __init__(self, neurons: int = LABELS, width: int = HIDDEN, count: int = 300_000) -> None:
        self._buffer = advise_hugepages_(torch.empty(neurons, width)).fill_(1.0)
        self._rows = [
            rows.sort().values for rows in torch.randperm(neurons).split(min(count, neurons // 2))
        ][:-1]
        self._turn = 0

    def turn(self) -> dict[str, dict[str, float]]:
        """GB/s of every way of every kind, measured once."""
        flat, table = self._buffer.view(-1), self._buffer
        rows = self._rows[self._turn % len(self._rows)]
        self._turn += 1
        all_bytes, row_bytes = flat.nbytes, rows.numel() * table.shape[1] * 4
        bags = torch.arange(0, rows.numel(), 64)
        ways: dict[str, tuple[float, dict[str, Callable[[], object]]]] = {
            "read": (
                all_bytes,
                {"sum": flat.sum, "amax": flat.amax, "dot": lambda: flat.dot(flat)},
            ),
            "update": (2 * all_bytes, {"add_": lambda: flat.add_(0), "mul_": lambda: flat.mul_(1)}),
            "write": (all_bytes, {"fill_": lambda: flat.fill_(1.0)}),
            "row_read": (
                row_bytes,
                {
                    "touch_rows_": lambda: touch_rows_(table, rows, write=False),
                    "embedding_bag": lambda: F.embedding_bag(rows, table, bags, mode="sum"),
                },
            ),
            "row_update": (
                2 * row_bytes,
                {"touch_rows_": lambda: touch_rows_(table, rows, write=True)},
            ),
        }
        return {
            kind: {way: count / milliseconds(work) / 1e6 for way, work in of.items()}
            for kind, (count, of) in ways.items()
        }


def best_rates(turns: Iterable[dict[str, dict[str, float]]]) -> dict[str, dict[str, Any]]:
    """Of :meth:`Memory.turn`'s results, for each kind the way with the best median: its GB/s and name."""
    turns = list(turns)
    found = {}
    for kind, ways in turns[0].items():
        medians = {way: median(turn[kind][way] for turn in turns) for way in ways}
        best = max(medians, key=medians.__getitem__)
        found[kind] = {"gb_s": medians[best], "by": best}
    return found


def print_rates(rates: dict[str, dict[str, Any]]) -> None:
    rows = [
        [kind.replace("_", " "), f"{rate['gb_s']:.1f}", rate["by"]] for kind, rate in rates.items()
    ]
    print_table(["memory", "GB/s", "by"], rows)


def bound_ms(traffic: dict[str, float], rates: dict[str, dict[str, Any]]) -> float:
    """Milliseconds that the memory needs for ``traffic``, bytes by kind of use."""
    return sum(count / rates[kind]["gb_s"] / 1e6 for kind, count in traffic.items())
