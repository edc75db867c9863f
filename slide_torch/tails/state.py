"""What a layer's tail is drawn from: the names of its distributions, and class frequencies."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from .proposals import FixedProposal, log_uniform_shares, power_of_counts


class TailState:
    """What the tail's distributions need to know of N classes.

    Args:
        parts: names of the distributions, see ``LSHOptions.tail_distribution``.
        neurons: N.

    Attributes:
        frequencies: float64 (N), shares of ``"frequencies"`` up to a factor, or None.
    """

    def __init__(self, parts: tuple[str, ...], neurons: int) -> None:
        self.parts = parts
        self.neurons = neurons
        self._frequencies: Tensor | None = None
        self._fixed: FixedProposal | None = None

    @property
    def frequencies(self) -> Tensor | None:
        return self._frequencies

    @frequencies.setter
    def frequencies(self, frequencies: Tensor | None) -> None:
        self._frequencies = frequencies
        self._fixed = None

    def set_frequencies(self, counts: Tensor, power: float) -> None:
        """Makes ``counts ** power`` the frequencies.

        Raises:
            ValueError: shape or values are wrong.
        """
        self.frequencies = power_of_counts(counts, power, self.neurons)

    @property
    def lacks_frequencies(self) -> bool:
        return self._frequencies is None and "frequencies" in self.parts

    def fixed_proposal(self, count: int) -> FixedProposal:
        """The mean of the distributions, for ``count`` draws."""
        if self._fixed is None or self._fixed.count != count:
            shares = [self._shares(part) for part in self.parts]
            mixed = np.mean([share / share.sum() for share in shares], axis=0)
            self._fixed = FixedProposal.of_shares(mixed, count)
        return self._fixed

    def _shares(self, part: str) -> np.ndarray:
        if part == "uniform":
            return np.ones(self.neurons)
        if part == "log_uniform":
            return log_uniform_shares(self.neurons)
        if self._frequencies is None:
            raise RuntimeError(
                "TailState.fixed_proposal: frequencies: expected class frequencies, got none: call "
                "set_frequencies first"
            )
        return self._frequencies.numpy()
