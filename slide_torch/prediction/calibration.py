"""Calibration of approximate prediction: how many lists to search for a given recall."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..inference_mode import version_of
from ..precision import topk_linear
from .partition import INPUTS_AT_ONCE, RowPartition

# How much a list's spread, as against its mean row, may say for probing it: calibration takes the best.
# Too small a weight hides the few long rows of a wide list behind lists of long rows: what is best differs by
# the weights' history, and reading three times the rows is the price of a wrong one.
RADIUS_WEIGHTS = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4)
RESCORED_PER_K = 2  # rows scored exactly to find k, at first


@dataclass(frozen=True)
class Calibration:
    """The parameters of ``predict(exact=False)``, and the weights that they are valid for.

    Attributes:
        partition: the lists.
        k: number of the best neurons that the recall is about.
        probes: number of lists to search for each input.
        radius_weight: weight of a list's spread in the choice of lists.
        rescored: number of the best rows by int8 codes that are scored exactly.
        recall: share of the exact top k found on the inputs of the calibration.
        state: address and version of weight and bias at the calibration.
    """

    partition: RowPartition
    k: int
    probes: int
    radius_weight: float
    rescored: int
    recall: float
    state: tuple[int, ...]


def state_of(weight: Tensor, bias: Tensor | None) -> tuple[int, ...]:
    """Changes whenever torch records a write to weight or bias, or either is replaced."""
    state = weight.data_ptr(), version_of(weight)
    return state if bias is None else (*state, bias.data_ptr(), version_of(bias))


def calibrate(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    recall: float,
    partition: RowPartition,
    state: tuple[int, ...],
) -> Calibration:
    """The smallest number of probes that find the share ``recall`` of the exact top k of ``input`` (n, d),
    with the radius weight that leads to the fewest rows.

    The number of lists that hold this share is counted without a search. What rounding to int8 codes loses is
    measured by searches: enough rows are rescored to keep it below a tenth of what the recall may miss.
    """
    _, best = topk_linear(input, weight, bias, k)

    def fewest(held: Tensor, share: float) -> int:
        # the division rounds: a share that is the target exactly must not be missed by half a unit
        return min(int((held < share - 1e-6).sum()) + 1, partition.lists)

    def rows_read(of: tuple[Tensor, Tensor]) -> float:
        return of[1][fewest(of[0], recall) - 1].item()

    choices = {w: partition.held(input, best, w) for w in RADIUS_WEIGHTS}
    radius_weight = min(choices, key=lambda w: rows_read(choices[w]))
    held, _ = choices[radius_weight]

    def found(probes: int, rescored: int) -> float:
        hits = 0
        for x, rows in zip(input.split(INPUTS_AT_ONCE), best.split(INPUTS_AT_ONCE), strict=True):
            mine = partition.topk(x, weight, bias, k, probes, radius_weight, rescored)[1]
            hits += int((mine.unsqueeze(2) == rows.unsqueeze(1)).sum())
        return hits / best.numel()

    probes, rescored = fewest(held, recall), min(RESCORED_PER_K * k, weight.shape[0])
    while (measured := found(probes, rescored)) < recall - 1e-6:
        lost = held[probes - 1].item() - measured
        if lost > (1 - recall) / 10 and rescored < weight.shape[0]:
            rescored = min(2 * rescored, weight.shape[0])
        else:
            probes = min(max(probes + 1, fewest(held, recall + lost)), partition.lists)
    return Calibration(partition, k, probes, radius_weight, rescored, measured, state)
