"""Arguments that are integers or real numbers: Python's, and others that torch takes too, such as numpy's."""

from __future__ import annotations

import math
import operator
from numbers import Real
from typing import Any

import numpy as np
from torch import Tensor


def as_int(value: Any) -> int | None:
    """An integer of any kind (numpy's too) as an int; None for anything else, a bool included."""
    if type(value) is int:
        return value
    if isinstance(value, bool | np.bool_ | Tensor):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def as_number(value: Any) -> float | None:
    """A real number of any kind (numpy's too) as an int or a float; None for anything else, a bool and NaN
    included."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, Real):
        return None
    if not isinstance(value, int | float):
        value = float(value) if as_int(value) is None else as_int(value)
    return None if math.isnan(value) else value


def checked_int(value: Any, low: int, high: int | None, name: str, note: str = "") -> int:
    """``value`` as an int from ``low`` to ``high`` (None for no limit).

    Args:
        name: of function and argument, ``"function: argument"``.
        note: what to say about the range.

    Raises:
        ValueError: it is none.
    """
    number = as_int(value)
    if number is None or number < low or (high is not None and number > high):
        limits = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name}: expected an int {limits}{note}, got {value!r}")
    return number
