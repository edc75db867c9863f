"""Prepared rows in a file of the cache: training, validation and test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from slide_torch.data import SparseRows

from .cache import replacing

__all__ = ["SPLITS", "load_splits", "save_splits"]

SPLITS = ("train", "validation", "test")


def save_splits(
    path: Path, description: dict[str, Any], splits: dict[str, SparseRows], rest: dict[str, Any]
) -> None:
    """Keeps the ``splits``, and ``rest``, whatever ``torch.load(weights_only=True)`` reads, under the
    ``description`` of what they were made from."""
    arrays = {
        f"{split}_{field}": torch.from_numpy(array)
        for split, rows in splits.items()
        for field, array in vars(rows).items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        content = {"description": json.dumps(description, sort_keys=True), "rest": rest, **arrays}
        torch.save(content, file)


def load_splits(
    path: Path, description: dict[str, Any]
) -> tuple[dict[str, SparseRows], dict[str, Any]] | None:
    """What was kept under the same description, or None if there is no such."""
    if not path.exists():
        return None
    content = torch.load(path, weights_only=True)
    if content["description"] != json.dumps(description, sort_keys=True):
        return None
    splits = {
        split: SparseRows(
            *(content[f"{split}_{field}"].numpy() for field in SparseRows.__dataclass_fields__)
        )
        for split in SPLITS
    }
    return splits, content["rest"]
