"""The batch that all ranks of a sharded layer compute together."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..active_set import Labels
from ..shards import Shard
from . import collectives


class Batch(NamedTuple):
    """Inputs and labels of a step, the same on every rank.

    Attributes:
        shard: of the layer.
        input: (B, d), of all ranks where each brings its own.
        labels: of these B samples, over all N classes.
        counts: how many samples each rank has brought; None where all have brought the same.
    """

    shard: Shard
    input: Tensor
    labels: Labels
    counts: list[int] | None

    @staticmethod
    def of(name: str, shard: Shard, input: Tensor, labels: Labels | None = None) -> Batch:
        """The batch of which this rank has ``input`` (b, d) and their ``labels``. Every rank must call it.

        Raises:
            ValueError: ranks that should have brought the same batch have not; all of them raise it.
        """
        if labels is None:
            labels = Labels.none(input.shape[0], input.dtype)
        group = shard.group
        header = torch.tensor([input.shape[0], labels.ids.shape[0], _checksum(input, labels)])
        headers = collectives.gather(header, group)
        counts = headers[:, 0].tolist()
        if not shard.own_batches:
            if bool((headers != headers[0]).any()):
                differ = f"{counts} rows" if len(set(counts)) > 1 else "other inputs or targets"
                raise ValueError(
                    f"{name}: input: expected the same inputs and targets on every rank of the layer, got "
                    f"{differ}: seed ranks alike, or shard the layer with input_layouts=Shard(0), with which "
                    "each rank brings its own batch"
                )
            return Batch(shard, collectives.entering(input, group), labels, None)
        return Batch(
            shard,
            collectives.joined_rows(input, counts, group),
            _joined_labels(labels, counts, headers[:, 1].tolist(), group),
            counts,
        )

    def own(self, values: Tensor) -> Tensor:
        """This rank's part of what all ranks have computed for the B samples."""
        if self.counts is None:
            return values
        return collectives.own_rows(values, self.counts, self.shard.group)

    def own_labels(self) -> Labels:
        """The labels of this rank's classes, by their places among its rows."""
        first, last = self.shard.first, self.shard.last
        offsets, ids, probabilities = (
            self.labels.offsets,
            self.labels.ids,
            self.labels.probabilities,
        )
        own = (ids >= first) & (ids < last)
        before = torch.zeros(len(ids) + 1, dtype=torch.int64)
        torch.cumsum(own, 0, out=before[1:])
        return Labels(before[offsets], ids[own] - first, probabilities[own])

    def totals(self) -> Tensor:
        """The sum (B) of each sample's label probabilities."""
        sample = torch.arange(self.input.shape[0]).repeat_interleave(self.labels.offsets.diff())
        zeros = torch.zeros(self.input.shape[0], dtype=self.labels.probabilities.dtype)
        return zeros.index_add_(0, sample, self.labels.probabilities)


def _checksum(input: Tensor, labels: Labels) -> int:
    """A number that inputs and labels of other bits hardly share."""
    bits = torch.int64 if input.dtype == torch.float64 else torch.int32
    of_input = input.detach().contiguous().view(bits).sum(dtype=torch.int64)
    places = torch.arange(1, len(labels.ids) + 1)
    # sums of int64 wrap around, in any order
    return int(of_input + (labels.ids * places).sum() + labels.offsets.sum() * 3)


def _joined_labels(
    labels: Labels, counts: list[int], label_counts: list[int], group: collectives.Group
) -> Labels:
    """Labels of all ranks' samples, one rank after the other."""
    together = [rows + ids for rows, ids in zip(counts, label_counts, strict=True)]
    own = torch.cat([labels.offsets.diff(), labels.ids])
    found = collectives.gather_ragged(own, together, group).split(together)
    lengths = torch.cat([part[:rows] for part, rows in zip(found, counts, strict=True)])
    ids = torch.cat([part[rows:] for part, rows in zip(found, counts, strict=True)])
    offsets = torch.zeros(len(lengths) + 1, dtype=torch.int64)
    torch.cumsum(lengths, 0, out=offsets[1:])
    probabilities = collectives.gather_ragged(labels.probabilities, label_counts, group)
    return Labels(offsets, ids, probabilities)
