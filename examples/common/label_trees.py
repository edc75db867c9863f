"""omikuji's label trees (Parabel: Prabhu et al. 2018) over sparse rows, by its defaults."""

from __future__ import annotations

import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slide_torch.data import SparseRows

__all__ = ["predict_by_trees", "train_trees"]


def train_trees(
    rows: SparseRows, num_features: int, num_labels: int, trees: int
) -> tuple[Any, float]:
    """omikuji's model, and the seconds of training, the reading of its file included."""
    import omikuji

    threads = torch.get_num_threads()
    hyper = omikuji.Model.default_hyper_param()
    hyper.n_trees = trees
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.txt"
        write_xmc(path, rows, num_features, num_labels)
        started = time.perf_counter()
        model = omikuji.Model.train_on_data(str(path), hyper, threads)
        seconds = time.perf_counter() - started
    model.init_prediction_thread_pool(threads)
    return model, seconds


def predict_by_trees(model: Any, rows: SparseRows, k: int) -> Tensor:
    """The best labels of each row, int64 (n, k), -1 where the trees find fewer."""

    def best(begin: int, end: int) -> list[int]:
        pairs = zip(
            rows.feature_indices[begin:end].tolist(),
            rows.feature_values[begin:end].tolist(),
            strict=True,
        )
        found = [label for label, _ in model.predict(pairs, beam_size=10, top_k=k)]
        return found + [-1] * (k - len(found))

    bounds = rows.feature_indptr.tolist()
    # omikuji takes a row a call, and leaves the interpreter's lock meanwhile
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        predicted = list(pool.map(best, bounds[:-1], bounds[1:]))
    return torch.tensor(predicted, dtype=torch.int64).reshape(len(rows), k)


def write_xmc(path: Path, rows: SparseRows, num_features: int, num_labels: int) -> None:
    """The rows in the format of the Extreme Classification Repository, but for those without features or
    labels, which omikuji does not read."""
    rows = rows.select(
        np.flatnonzero((np.diff(rows.feature_indptr) > 0) & (np.diff(rows.label_indptr) > 0))
    )
    features, labels = rows.feature_indptr.tolist(), rows.label_indptr.tolist()
    with open(path, "w") as file:
        file.write(f"{len(rows)} {num_features} {num_labels}\n")
        for row in range(len(rows)):
            own = slice(features[row], features[row + 1])
            names = rows.label_indices[labels[row] : labels[row + 1]].tolist()
            pairs = zip(
                rows.feature_indices[own].tolist(), rows.feature_values[own].tolist(), strict=True
            )
            text = " ".join(f"{index}:{value:.6g}" for index, value in pairs)
            file.write(f"{','.join(map(str, names))} {text}\n")
