"""What the operators work on: a layer of Amazon-670K's shape, a batch, its active sets."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from slide_torch import HashTables, LSHOptions
from slide_torch.active_set import SampleActiveSets, SharedActiveSet
from slide_torch.ops.rows import advise_hugepages_
from slide_torch.sampling.draw import draw_active_set
from slide_torch.sampling.targets import as_labels

__all__ = ["Problem"]


class Problem:
    """What the operators work on, made from a seed."""

    def __init__(self, neurons: int, width: int, batch: int, active: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.neurons, self.width, self.batch = neurons, width, batch
        centres = torch.randn(max(1, neurons // 64), width)
        self.weight = advise_hugepages_(torch.empty(neurons, width)).normal_()
        self.weight.mul_(0.7).add_(centres[torch.arange(neurons) * len(centres) // neurons])
        self.weight.mul_(width**-0.5)
        self.bias = torch.zeros(neurons)
        cluster = torch.randint(len(centres), (batch,))
        self.input = centres[cluster] + 0.7 * torch.randn(batch, width)
        first = (cluster * neurons) // len(centres)
        target = (first[:, None] + torch.randint(64, (batch, 5))).clamp(max=neurons - 1)
        self.labels = as_labels(
            target, torch.Size([batch]), neurons, torch.float32, ignore_index=-100
        )
        budget = min(active, neurons // 2)
        self.sample_tables = self.tables(
            LSHOptions(pattern="per_sample", budget=budget, tail=0, L=50)
        )
        self.sample = draw_active_set(self.sample_tables, self.input, self.labels)
        self.shared = draw_active_set(
            self.tables(LSHOptions(family="simhash")), self.input, self.labels
        )
        assert isinstance(self.sample, SampleActiveSets) and isinstance(
            self.shared, SharedActiveSet
        )

    def tables(self, options: LSHOptions) -> HashTables:
        tables = HashTables(options, self.neurons, self.width, has_bias=True)
        tables.rebuild(self.weight, self.bias)
        return tables

    def row_bytes(self, rows: Tensor) -> int:
        return 4 * self.width * rows.numel()

    def codes(self, family: str, **options) -> Callable[[], Tensor]:
        """Hashes every row with the bias, centred, K=6 L=50."""
        chosen = LSHOptions(family=family, K=6, L=50, **options)
        tables = HashTables(chosen, self.neurons, self.width, has_bias=True)
        tables.rebuild(self.weight, self.bias)
        return lambda: tables.family.row_codes(self.weight, self.bias)

    def describe(self) -> dict[str, float]:
        return {
            "active_per_sample": self.sample.active_per_sample,
            "union": self.sample.rows.numel(),
            "ids_read_per_sample": self.sample.ids_read / self.batch,
            "shared_union": self.shared.rows.numel(),
        }
