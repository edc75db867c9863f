"""What is known of one contender's training."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

__all__ = ["Run"]


@dataclass
class Run:
    """One contender's training: what the table and the plot show."""

    name: str
    steps: int = 0
    seconds: float = 0.0
    step_ms: list[float] = field(default_factory=list)
    curve: list[tuple[float, int, float]] = field(default_factory=list)  # seconds, step, P@1
    peak_gb: float = 0.0
    active: list[float] = field(default_factory=list)
    recall: float = float("nan")
    predicted: Tensor | None = None
    interrupted: bool = False
    lr: float = float("nan")
    trials: list[tuple[float, float]] = field(default_factory=list)  # rate, validation measure

    @property
    def ms_step(self) -> float:
        return float(np.median(self.step_ms or [float("nan")]))
