"""What run.py trains: a place's country from a spelling, and the hidden layers that read it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from examples.data import places
from slide_torch import LSHFeedForward, LSHLinear, LSHOptions
from slide_torch.data import SparseRows

__all__ = ["LSH", "WIDTH", "Model", "hidden_layers", "load"]

WIDTH = 64
LSH = ("per_sample", "shared")
HELD_OUT = {"validation": 5_000, "test": 20_000}


def task_of(rows: SparseRows, countries: np.ndarray) -> SparseRows:
    """Rows whose label is their country; ``countries`` gives each feature's, -1 for other features."""
    of_feature = countries[rows.feature_indices]
    row_of = np.repeat(np.arange(len(rows)), np.diff(rows.feature_indptr))
    label = np.full(len(rows), -1, dtype=np.int32)
    label[row_of[of_feature >= 0]] = of_feature[of_feature >= 0]
    kept = of_feature < 0
    counts = np.bincount(row_of[kept], minlength=len(rows))
    return SparseRows(
        np.concatenate([[0], counts.cumsum()]),
        rows.feature_indices[kept],
        rows.feature_values[kept],
        np.arange(len(rows) + 1),
        label,
    )


def load(quick: bool) -> tuple[dict[str, SparseRows], int, int]:
    """Training, validation and test rows, how many features, how many countries."""
    if quick:  # two features say it all
        random = np.random.default_rng(0)
        labels = random.integers(0, 4, 400).astype(np.int32)
        features = np.stack([labels * 2, labels * 2 + 1], 1).ravel().astype(np.int32)
        values = np.ones(800, np.float32)
        rows = SparseRows(np.arange(0, 801, 2), features, values, np.arange(401), labels)
        return dict.fromkeys(("train", "validation", "test"), rows), 8, 4
    data = places.load_places()
    names = [name for name in data.feature_names if name.startswith("country:")]
    countries = np.full(data.num_features, -1, dtype=np.int32)
    countries[[data.feature_names[name] for name in names]] = np.arange(len(names))
    splits = {"train": data.train}
    for part, count in HELD_OUT.items():
        # Any so many, and in random order: they are ordered by place, and a batch of neighbours would tell
        # a shared active set which country it is.
        rows = getattr(data, part)
        splits[part] = rows.select(np.random.default_rng(0).permutation(len(rows))[:count])
    made = {key: task_of(rows, countries) for key, rows in splits.items()}
    return made, data.num_features, len(names)


class Top(nn.Module):
    """Keeps the ``budget`` largest of each row, in training and eval."""

    def __init__(self, budget: int) -> None:
        super().__init__()
        self.budget = budget

    def forward(self, values: Tensor) -> Tensor:
        kept = values.topk(self.budget, dim=-1)
        return torch.zeros_like(values).scatter(-1, kept.indices, kept.values)


class BatchDropout(nn.Module):
    """Dropout that draws the same neurons for the whole batch."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, values: Tensor) -> Tensor:
        if not self.training:
            return values
        return values * (torch.rand(values.shape[-1]) < self.share) / self.share


def hidden_layers(
    kind: str, inputs: int, hidden: int, share: float, depth: int, outputs: int
) -> nn.Module:
    """``depth`` hidden layers and the output layer."""
    budget = max(1, round(share * hidden))
    if kind in LSH:
        options = LSHOptions(pattern=kind, budget=budget)
        if depth == 1:
            return LSHFeedForward(inputs, hidden, outputs, options=options, sparse=True)
    layers: list[nn.Module] = []
    for i in range(depth):
        width = hidden if i else inputs
        if kind in LSH:
            first = LSHLinear(width, hidden, options=options, sparse=True, output="dense")
        else:
            first = nn.Linear(width, hidden)
        layers += [first, *([Top(budget)] if kind == "top" else []), nn.ReLU()]
        layers += [nn.Dropout(1 - share)] if kind == "dropout" else []
        layers += [BatchDropout(share)] if kind == "batch_dropout" else []
    return nn.Sequential(*layers, nn.Linear(hidden, outputs))


class Model(nn.Module):
    """Bag of features -> hidden layers -> logits."""

    def __init__(self, num_features: int, layers: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(
            num_features, WIDTH, mode="sum", include_last_offset=True, sparse=True
        )
        nn.init.normal_(self.embedding.weight, std=0.3)
        self.layers = layers

    def forward(self, indices: Tensor, offsets: Tensor, values: Tensor) -> Tensor:
        return self.layers(self.embedding(indices, offsets, per_sample_weights=values))
