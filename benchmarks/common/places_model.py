"""The quickstart's model after a number of training steps, kept in the user's cache folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.common.relu_classifier import ReLUClassifier, loss_of
from examples.common.checkpoint import save_checkpoint
from examples.common.classifier import labels_of
from examples.data.cache import cache_folder
from examples.data.places import Places
from slide_torch import LSHLinear, LSHOptions
from slide_torch.data import SparseRows, batches
from slide_torch.optim import Adam

from .generated import HIDDEN

__all__ = ["cached_file", "draw_rows", "hidden_of", "kept_model", "train_places"]


def train_places(
    data: Places, steps: int, seed: int, options: LSHOptions | None = None
) -> ReLUClassifier:
    """The quickstart's model after ``steps`` steps with batches of 256 at a learning rate of 0.01."""
    torch.manual_seed(seed)
    head = LSHLinear(HIDDEN, data.num_labels, options=options, sparse=True)
    model = ReLUClassifier(data.num_features, HIDDEN, head)
    optimizer = Adam(model.parameters(), lr=1e-2)
    epoch = 0
    with tqdm(total=steps, desc="training", unit=" steps") as bar:
        while bar.n < steps:
            for *features, labels in batches(data.train, 256, seed=seed + epoch):
                loss = loss_of(model(*features), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                bar.update()
                if bar.n == steps:
                    break
            epoch += 1
    return model


def kept_model(data: Places, steps: int, seed: int) -> ReLUClassifier:
    """:func:`train_places` with the layer's defaults, from the cache folder if it is there."""
    path = cached_file(f"prediction-{steps}-{seed}.pt")
    if not path.exists():
        model = train_places(data, steps, seed)
        save_checkpoint(path, model.state_dict())
        return model
    torch.manual_seed(seed)
    head = LSHLinear(HIDDEN, data.num_labels, sparse=True)
    model = ReLUClassifier(data.num_features, HIDDEN, head)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


def cached_file(name: str) -> Path:
    """A file of the user's cache folder, which is made if it is not there."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name


def draw_rows(rows: SparseRows, count: int, seed: int) -> SparseRows:
    """``count`` of the rows, in random order."""
    return rows.select(np.random.default_rng(seed).permutation(len(rows))[:count])


@torch.no_grad()
def hidden_of(model: ReLUClassifier, rows: SparseRows) -> tuple[Tensor, Tensor]:
    """Hidden vectors (n, HIDDEN) of the rows, and their labels, padded."""
    parts = [model.hidden(*features) for *features, _ in batches(rows, 256)]
    return torch.cat(parts), labels_of(rows)
