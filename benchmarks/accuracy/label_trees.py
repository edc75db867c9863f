"""omikuji's label trees (Parabel: Prabhu et al. 2018): time_to_accuracy.py's contender without neurons."""

from __future__ import annotations

import itertools
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from examples.common.machine import reset_peak_memory, resident_gb

from .problems import Problem, SparseProblem

__all__ = ["train_trees"]


def train_trees(problem: Problem, trees: int) -> dict[str, Any]:
    """A run by omikuji's defaults; ``seconds`` are those of training, the reading of its file included."""
    import omikuji

    if not isinstance(problem, SparseProblem):
        raise SystemExit("omikuji: expected a problem of sparse rows")
    threads = torch.get_num_threads()
    hyper = omikuji.Model.default_hyper_param()
    hyper.n_trees = trees
    base = reset_peak_memory()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.txt"
        write_xmc(path, problem)
        started = time.perf_counter()
        model = omikuji.Model.train_on_data(str(path), hyper, threads)
        seconds = time.perf_counter() - started
    peak = resident_gb("VmHWM") - base
    model.init_prediction_thread_pool(threads)
    measured = {part: judge(problem, model, part) for part in ("validation", "test")}
    return {
        "seed": None,  # it takes none
        "seconds": seconds,
        "peak_gb": peak,
        "curve": [{"step": 1, **measured["validation"]}],
        "test": measured["test"],
    }


def judge(problem: SparseProblem, model: Any, part: str) -> dict[str, float]:
    rows, predicted = problem.parts[part], []
    for start, end in itertools.pairwise(rows.feature_indptr.tolist()):
        pairs = zip(
            rows.feature_indices[start:end].tolist(),
            rows.feature_values[start:end].tolist(),
            strict=True,
        )
        found = [label for label, _ in model.predict(pairs, beam_size=10, top_k=5)]
        predicted.append(found + [-1] * (5 - len(found)))
    return problem.score(torch.tensor(predicted), part)


def write_xmc(path: Path, problem: SparseProblem) -> None:
    """The training rows in the format of the Extreme Classification Repository, but for those without
    features or labels, which omikuji does not read."""
    rows = problem.parts["train"]
    rows = rows.select(
        np.flatnonzero((np.diff(rows.feature_indptr) > 0) & (np.diff(rows.label_indptr) > 0))
    )
    features, labels = rows.feature_indptr.tolist(), rows.label_indptr.tolist()
    with open(path, "w") as file:
        file.write(f"{len(rows)} {problem.num_features} {problem.num_labels}\n")
        for row in range(len(rows)):
            own = slice(features[row], features[row + 1])
            names = rows.label_indices[labels[row] : labels[row + 1]].tolist()
            pairs = zip(
                rows.feature_indices[own].tolist(), rows.feature_values[own].tolist(), strict=True
            )
            text = " ".join(f"{index}:{value:.6g}" for index, value in pairs)
            file.write(f"{','.join(map(str, names))} {text}\n")
