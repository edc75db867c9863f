"""An output layer's start: each weight row in the direction of its class's mean input."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from .. import ops
from ..active_set import Labels
from ..checks import as_number
from ..precision import blocks, computed_dtype
from ..sampling.targets import as_labels, is_probabilities
from . import linear_checks as checks

if TYPE_CHECKING:
    from .linear import LSHLinear

_NAME = "LSHLinear.init_from_class_means_"


class ClassSums:
    """Sums over inputs, each in the order of the inputs: the same at any number of threads.

    Attributes:
        rows: (N, d), each class's inputs.
        weights: float64 (N), how many they are; of probabilities their sum.
        mean: float64 (d), of all inputs with a label.
        distance: root mean square distance of these from ``mean``.
    """

    def __init__(self, neurons: int, width: int, dtype: torch.dtype) -> None:
        self.rows = torch.zeros(neurons, width, dtype=dtype)
        self.weights = torch.zeros(neurons, dtype=torch.float64)
        self._sum = torch.zeros(1, width + 1, dtype=torch.float64)  # and squared lengths
        self._count = 0

    def add(self, inputs: Tensor, labels: Labels) -> None:
        """Adds inputs (B, d) of the dtype of ``rows``; a label counts by its share in ``labels``."""
        counts = labels.offsets.diff()
        own = inputs.repeat_interleave(counts, 0) * labels.probabilities[:, None]
        for target, values in ((self.rows, own), (self.weights, labels.probabilities.double())):
            classes, sums = ops.coalesce_rows(labels.ids, values, len(target))
            target.index_add_(0, classes, sums)
        labelled = inputs[counts > 0].double()
        squares = labelled.square().sum(1, keepdim=True)
        nowhere = torch.zeros(len(labelled), dtype=torch.int64)
        _, sums = ops.coalesce_rows(nowhere, torch.cat([labelled, squares], 1), 1)
        self._sum[: len(sums)] += sums
        self._count += len(labelled)

    @property
    def mean(self) -> Tensor:
        return self._sum[0, :-1] / max(1, self._count)

    @property
    def distance(self) -> float:
        mean = self.mean
        return math.sqrt(max(0.0, float(self._sum[0, -1]) / max(1, self._count) - _square(mean)))

    def into_weight_rows_(self, length: float) -> tuple[Tensor, Tensor]:
        """Turns ``rows``, in place, into weight rows of this length, and returns them and the biases (N). The
        row of a class whose mean is that of all inputs is 0."""
        mean = self.mean.to(self.rows.dtype)
        # shorter than this, a difference is rounding
        least = 16 * torch.finfo(mean.dtype).eps * math.sqrt(_square(self.mean))
        bias = torch.empty_like(self.rows[:, 0])
        for block in blocks(len(self.rows)):
            rows, counts = self.rows[block], self.weights[block, None].to(mean.dtype)
            rows.div_(counts.where(counts > 0, 1)).sub_(mean)
            norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
            rows.mul_(torch.where(norms > least, length / norms, 0))
            bias[block] = -(rows * mean).sum(1)
        return self.rows, bias


def init_from_class_means_(
    layer: LSHLinear,
    batches: Iterable[tuple[Tensor, Tensor]],
    scale: float,
    ignore_index: int,
    progress: bool,
) -> None:
    """Does what :meth:`LSHLinear.init_from_class_means_` says, all of it or, with an error, nothing."""
    if layer.output == "dense":
        raise ValueError(
            f"{_NAME}: output: expected 'sampled', whose neurons are classes, got 'dense'"
        )
    size = as_number(scale)
    if size is None or not 0 < size < math.inf:
        raise ValueError(f"{_NAME}: scale: expected a positive finite number, got {scale!r}")
    checks.check_not_parametrized(_NAME, layer)
    dtype = computed_dtype(layer.weight.dtype)
    sums = ClassSums(layer.out_features, layer.in_features, dtype)
    for inputs, labels in _checked(layer, batches, ignore_index, progress):
        sums.add(inputs, labels)
    seen = sums.weights > 0
    if not seen.any():
        raise ValueError(f"{_NAME}: batches: expected inputs with labels, got none")
    distance = sums.distance
    if not 0 < distance < math.inf:
        got = "equal ones" if distance == 0 else "numbers too large to add up"
        raise ValueError(f"{_NAME}: batches: expected inputs that differ, got {got}")
    rows, bias = sums.into_weight_rows_(size / distance)
    parameters = [(layer.weight, rows)] + ([] if layer.bias is None else [(layer.bias, bias)])
    for parameter, values in parameters:
        values[~seen] = parameter[~seen].to(values.dtype)
        if not bool(torch.isfinite(values).all()):
            raise ValueError(
                f"{_NAME}: weight: expected finite numbers, got NaN or Inf: inputs too large to add up, or "
                "the present values of classes without an example"
            )
    for parameter, values in parameters:
        parameter.copy_(values)
    layer.tables.clear()
    if layer.tables.uses_tables:
        layer.tables.rebuild(layer.weight, layer.bias)


def _checked(
    layer: LSHLinear,
    batches: Any,
    ignore_index: int,
    progress: bool,
) -> Iterator[tuple[Tensor, Labels]]:
    """The batches' inputs (B, d) in the dtype to compute in, and their labels, each of share 1 if the target
    is class indices."""
    if not isinstance(batches, Iterable):
        raise ValueError(f"{_NAME}: batches: expected an iterable, got {type(batches).__name__}")
    for batch in tqdm(batches, desc="Class means", unit=" batches", disable=not progress):
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            length = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
            raise ValueError(
                f"{_NAME}: batches: expected pairs (inputs, target), got {type(batch).__name__}{length}: "
                "give what the layer is called with, and what its loss is"
            )
        inputs = checks.flat_inputs(_NAME, batch[0], layer, layer.tables)
        if not bool(torch.isfinite(inputs).all()):
            raise ValueError(f"{_NAME}: inputs: expected finite numbers, got NaN or Inf")
        target, leading = batch[1], batch[0].shape[:-1]
        labels = as_labels(target, leading, layer.out_features, inputs.dtype, ignore_index, _NAME)
        if not is_probabilities(target):
            labels = Labels(labels.offsets, labels.ids, torch.ones_like(labels.probabilities))
        elif not bool(((labels.probabilities >= 0) & (labels.probabilities < math.inf)).all()):
            raise ValueError(
                f"{_NAME}: target: expected probabilities, got negative ones, NaN or Inf"
            )
        yield inputs, labels


def _square(vector: Tensor) -> float:
    """The squared length; Python's sum knows no threads."""
    return math.fsum(value * value for value in vector.tolist())
