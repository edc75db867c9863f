"""omikuji's label trees as time_to_accuracy.py's contender without neurons."""

from __future__ import annotations

from typing import Any

from examples.common.label_trees import predict_by_trees, train_trees
from examples.common.machine import reset_peak_memory, resident_gb

from .problems import Problem, SparseProblem

__all__ = ["run_of_trees"]


def run_of_trees(problem: Problem, trees: int) -> dict[str, Any]:
    """A run by omikuji's defaults; ``seconds`` are those of training, the reading of its file included."""
    if not isinstance(problem, SparseProblem):
        raise SystemExit("omikuji: expected a problem of sparse rows")
    base = reset_peak_memory()
    sizes = (problem.num_features, problem.num_labels)
    model, seconds = train_trees(problem.parts["train"], *sizes, trees)
    peak = resident_gb("VmHWM") - base
    measured = {
        part: problem.score(predict_by_trees(model, problem.parts[part], 5), part)
        for part in ("validation", "test")
    }
    return {
        "seed": None,  # it takes none
        "seconds": seconds,
        "peak_gb": peak,
        "curve": [{"step": 1, **measured["validation"]}],
        "test": measured["test"],
    }
