"""A case: one operator on the problem, the bytes that it must move, the arithmetic that it must do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from .problem import Problem

__all__ = ["CASES", "Case", "case"]


@dataclass
class Case:
    """One operator on the problem.

    Attributes:
        run: calls it.
        traffic: bytes that it must move, by kind (see ``Memory``); what a cache holds does not count.
        flops: arithmetic that it must do, a multiplication and an addition being two.
        peer: the same by torch, or None.
    """

    run: Callable[[], object]
    traffic: dict[str, float] = field(default_factory=dict)
    flops: float = 0.0
    peer: Callable[[], object] | None = None


CASES: dict[str, Callable[[Problem], Case]] = {}


def case(make: Callable[[Problem], Case]) -> Callable[[Problem], Case]:
    """Enters a function in :data:`CASES`, by its name."""
    CASES[make.__name__] = make
    return make
