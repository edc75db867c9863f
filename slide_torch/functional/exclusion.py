"""False negatives, that a caller names or that score above a label: neurons that do not compete in a row.

The operators take them as labels of that row. In the softmax they have probability 0, and a decoupled loss
leaves them out of the normaliser: of a row with one label, what is left is the softmax over the others. In
binary cross entropy they take back what their logit adds to the loss.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..active_set import ActiveSet, Labels, SharedActiveSet
from ..checks import as_number
from ..precision import computed_dtype
from ..sampling.negatives import PADDING, padded_lists
from ..sampling.targets import as_labels
from .step import DrawnStep


class Excluded(NamedTuple):
    """Pairs of a sample and a neuron, in this order, each once; none is a label.

    Attributes:
        sample: int64 (n).
        ids: int64 (n).
        neurons: number N of all neurons.
    """

    sample: Tensor
    ids: Tensor
    neurons: int

    @staticmethod
    def of(
        name: str, exclude: Tensor, labels: Labels, leading: torch.Size, neurons: int
    ) -> Excluded:
        """Those that lists (\\*leading, M) exclude.

        Raises:
            ValueError: they are no such lists, or hold a label of their row.
        """
        lists = padded_lists(exclude, leading, neurons, name, "exclude")
        row, place = (lists != PADDING).nonzero(as_tuple=True)
        keys = (row * neurons + lists[row, place]).unique()
        wrong = keys[torch.isin(keys, _samples(labels.offsets) * neurons + labels.ids)]
        if wrong.numel():
            at, label = divmod(int(wrong[0]), neurons)
            raise ValueError(
                f"{name}: exclude: expected no label of the row itself, got class {label}, a label of row "
                f"{at} ({wrong.numel()} such ids): replace it by {PADDING}"
            )
        return Excluded(keys // neurons, keys % neurons, neurons)

    @staticmethod
    def above_labels(step: DrawnStep, scale: float, margin: float, neurons: int) -> Excluded:
        """Active neurons whose logit is above that of their row's best label by more than ``margin``; none in
        rows without a label."""
        labels, active = step.labels, step.active
        with torch.no_grad():
            logits = ops.into_active(step.input, step.layer, active) * scale
        of_label = _samples(labels.offsets)
        best = logits.new_full((labels.offsets.shape[0] - 1,), -torch.inf)

        def limits(own: Tensor) -> Tensor:
            best.scatter_reduce_(0, of_label, own, "amax")
            return torch.where(best == -torch.inf, torch.inf, best + margin)

        if isinstance(active, SharedActiveSet):
            logits = logits.T
            limit = limits(logits[of_label, active.label_places])
            above = logits > limit.unsqueeze(1)
            above[of_label, active.label_places] = False
            sample, places = above.nonzero(as_tuple=True)
            return Excluded(sample, active.rows[places], neurons)
        sample = _samples(active.offsets)
        above = logits > limits(logits[active.label_places])[sample]
        above[active.label_places] = False
        return Excluded(sample[above], active.active[above].to(torch.int64), neurons)

    def joined(self, other: Excluded) -> Excluded:
        keys = (self.sample * self.neurons + self.ids, other.sample * self.neurons + other.ids)
        both = torch.cat(keys).unique()
        return Excluded(both // self.neurons, both % self.neurons, self.neurons)

    def of_rows(self, rows: Tensor) -> Excluded:
        """Those in samples that ``rows``, bool (B), marks."""
        kept = rows[self.sample]
        return self._replace(sample=self.sample[kept], ids=self.ids[kept])

    def active(self, active: ActiveSet) -> tuple[Excluded, Tensor]:
        """Those that are active for their sample, and their places in the active set, int64."""
        order = None
        if isinstance(active, SharedActiveSet):
            held, wanted = active.rows, self.ids
        else:
            pairs = _samples(active.offsets) * self.neurons + active.active
            held, order = pairs.sort()
            wanted = self.sample * self.neurons + self.ids
        found = torch.isin(wanted, held)
        places = torch.searchsorted(held, wanted[found])
        mine = self._replace(sample=self.sample[found], ids=self.ids[found])
        return mine, places if order is None else order[places]


def labels_and_excluded(
    name: str,
    target: Tensor,
    exclude: Tensor | None,
    input: Tensor,
    neurons: int,
    ignore_index: int,
) -> tuple[Labels, Excluded]:
    """The labels of ``input`` (\\*, d), from any form of target, and what is excluded.

    Raises:
        ValueError: wrong lists of either, or a label is excluded.
        NotImplementedError: under torch.compile.
    """
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            f"{name}: {'margin' if exclude is None else 'exclude'}: expected None under torch.compile, got "
            "a value: leave the loss out of the graph"
        )
    leading = input.shape[:-1]
    labels = as_labels(target, leading, neurons, computed_dtype(input.dtype), ignore_index, name)
    if exclude is None:
        none = labels.ids.new_empty(0, dtype=torch.int64)
        return labels, Excluded(none, none, neurons)
    return labels, Excluded.of(name, exclude, labels, leading, neurons)


class LeftOut(NamedTuple):
    """Labels of a step with its excluded neurons among them.

    Attributes:
        labels: those, and the excluded ones with probability 0.
        active: the active set, with the places of all these.
        places: int64 (n), where the excluded ones are in the active set.
        order: int64 (labels): each one's index among the labels, followed by the excluded ones.
    """

    labels: Labels
    active: ActiveSet
    places: Tensor
    order: Tensor

    @staticmethod
    def of(labels: Labels, active: ActiveSet, excluded: Excluded) -> LeftOut:
        excluded, places = excluded.active(active)
        order = torch.cat([_samples(labels.offsets), excluded.sample]).argsort(stable=True)
        counts = torch.bincount(excluded.sample, minlength=labels.offsets.shape[0] - 1)
        offsets = torch.zeros_like(labels.offsets)
        torch.cumsum(labels.offsets.diff() + counts, 0, out=offsets[1:])
        none = labels.probabilities.new_zeros(places.shape)
        joined = Labels(
            offsets,
            torch.cat([labels.ids, excluded.ids])[order],
            torch.cat([labels.probabilities, none])[order],
        )
        at = torch.cat([active.label_places, places])[order]
        return LeftOut(joined, dataclasses.replace(active, label_places=at), places, order)


def check_margin(name: str, margin: float | None) -> None:
    number = None if margin is None else as_number(margin)
    if margin is not None and (number is None or not math.isfinite(number)):
        raise ValueError(f"{name}: margin: expected a finite number or None, got {margin!r}")


def check_exclusion(name: str, labels: Labels, label_smoothing: float, *, decoupled: bool) -> None:
    """Checks that the softmax cross entropy of these ``labels`` can leave neurons out."""
    if label_smoothing > 0:
        raise NotImplementedError(
            f"{name}: label_smoothing: expected 0.0 with exclude or margin, got {label_smoothing}: the mean "
            "of all classes' logits would include the excluded ones"
        )
    if decoupled:
        return
    most = int(labels.offsets.diff().max()) if labels.offsets.shape[0] > 1 else 0
    if most > 1:
        raise NotImplementedError(
            f"{name}: exclude, margin: expected at most one label a row with decoupled=False, got {most}: "
            "use decoupled=True"
        )


def _samples(offsets: Tensor) -> Tensor:
    return torch.arange(offsets.shape[0] - 1).repeat_interleave(offsets.diff())
