"""The problems of time_to_accuracy.py by their names.

A new problem is a subclass of :class:`Problem` and a line in :func:`load_problem`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from examples.data import lemmas, places, taxa, wikipedia
from examples.data.sparse_rows import split, with_unit_rows
from slide_torch import metrics
from slide_torch.data import read_xmc

from .next_word import NextWord
from .problems import Problem, SparseProblem

__all__ = ["PROBLEMS", "load_problem"]

_RANKING = ("dense", "dense_bf16", "inbatch", "uniform_1024", "importance_8192", "slide", "lsh")
_RANKING += ("exact_top10", "omikuji_1", "omikuji_3")
_LIKELIHOOD = ("dense", "dense_bf16", "importance_8192", "log_uniform_1024", "log_uniform_4096")
_LIKELIHOOD += ("tail_1024", "tail_4096", "lsh_corrected")

# With the contenders that each is for: perplexity is of no use without correction.
PROBLEMS = dict.fromkeys(("places", "lemmas", "taxa", "xmc"), _RANKING) | {"words": _LIKELIHOOD}
_LOAD: dict[str, Any] = {
    "places": places.load_places,
    "lemmas": lemmas.load_lemmas,
    "taxa": taxa.load_taxa,
}


def load_problem(
    name: str,
    *,
    files: tuple[Path, Path] | None = None,
    propensity: str | None = None,
    data_dir: Path | None = None,
    text: Path | None = None,
    **options: Any,
) -> Problem:
    """The problem ``name``, one of :data:`PROBLEMS`; ``files`` are training and test rows of "xmc",
    ``text`` is that of "words", Wikipedia's introductions if None."""
    if name == "xmc":
        assert files is not None
        return _load_xmc(*files, propensity, **options)
    if name == "words":
        return NextWord(wikipedia.load_corpus(text), **options)
    data = _LOAD[name](data_dir)
    parts = {part: getattr(data, part) for part in ("train", "validation", "test")}
    return SparseProblem(name, parts, data.num_features, data.num_labels, **options)


def _load_xmc(train: Path, test: Path, propensity: str | None, **options: Any) -> SparseProblem:
    """Files without validation rows of their own: some training rows, at most a fifth, are held out."""
    data = read_xmc(train)
    test_data = read_xmc(test, num_features=data.num_features, num_labels=data.num_labels)
    share = min(0.2, options["validation_rows"] / max(1, len(data)))
    train_rows, validation = split(with_unit_rows(data), share, 0)
    return SparseProblem(
        train.stem,
        {"train": train_rows, "validation": validation, "test": with_unit_rows(test_data)},
        data.num_features,
        data.num_labels,
        propensity=metrics.PROPENSITY_CONSTANTS.get(propensity or "", (0.55, 1.5)),
        **options,
    )
