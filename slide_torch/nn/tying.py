"""An embedding whose weight is also the weight of an LSHLinear."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..tables import HashTables


def check_tied(embedding: Any, weight: Tensor, shape: tuple[int, int]) -> None:
    """Checks that the weight of ``embedding`` can replace ``weight``, that of a layer of sizes ``shape``."""
    own: Any = getattr(embedding, "weight", None)
    if not isinstance(embedding, nn.Embedding | nn.EmbeddingBag) or (
        tuple(own.shape) != shape or own.dtype != weight.dtype
    ):
        got = "" if own is None else f" of {tuple(own.shape)}, {own.dtype}"
        raise ValueError(
            f"LSHLinear.tie: embedding: expected an nn.Embedding of {shape}, {weight.dtype}, "
            f"got {type(embedding).__name__}{got}: make the layer with the embedding's sizes and dtype"
        )


class MarkLookedUp:
    """Forward hook of a tied embedding: marks the rows that it looks up in training as changed. An object, so
    that the copy of a model marks rows in its own tables."""

    def __init__(self, tables: HashTables) -> None:
        self.tables = tables

    @torch.compiler.disable
    def __call__(
        self, embedding: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        weight: Any = embedding.weight
        if (
            weight.shape[0] != self.tables.out_features
        ):  # resized: the layer itself raises the error
            return
        if embedding.training and torch.is_grad_enabled() and weight.requires_grad:
            rows = args[0] if args else kwargs.get("input")
            if not isinstance(rows, Tensor):
                raise ValueError(
                    "LSHLinear.tie: embedding: expected indices as its first argument or input=, got "
                    f"{[type(a).__name__ for a in args]} and {sorted(kwargs)}: call it as nn.Embedding"
                )
            self.tables.mark_dirty(rows.flatten().to(torch.int64), weight._version)
