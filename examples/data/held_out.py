"""Which rows are held out as validation and as test."""

from __future__ import annotations

import numpy as np

__all__ = ["hold_out"]


def hold_out(
    label_indptr: np.ndarray,
    label_indices: np.ndarray,
    seed: int,
    test_fraction: float,
    validation_fraction: float,
) -> np.ndarray:
    """The part of each row, ``(n)`` int8: 0 training, 1 validation, 2 test."""
    num_rows = len(label_indptr) - 1
    part = np.zeros(num_rows, dtype=np.int8)
    left = np.bincount(label_indices).tolist()  # training rows of each place
    test_rows = round(num_rows * test_fraction)
    wanted = {2: test_rows, 1: round((num_rows - test_rows) * validation_fraction)}
    order = iter(np.random.default_rng(seed).permutation(num_rows).tolist())
    # A row that may not be held out now never may later, for places only lose rows: one pass does.
    starts, labels = label_indptr.tolist(), label_indices.tolist()
    for which, missing in wanted.items():
        while missing > 0 and (row := next(order, None)) is not None:
            places = labels[starts[row] : starts[row + 1]]
            if all(left[place] >= 2 for place in places):
                for place in places:
                    left[place] -= 1
                part[row] = which
                missing -= 1
    return part
