"""Replaces the layers of a built model."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ..options import LSHOptions
from .linear import LSHLinear


def convert_(
    model: nn.Module,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    *,
    options: LSHOptions | None = None,
    sparse: bool = False,
    min_out_features: int = 100_000,
) -> nn.Module:
    """Replaces ``nn.Linear`` layers of ``model`` by :class:`LSHLinear`, in place.

    The Parameters are reused, so an optimizer made before stays valid; hooks, buffers and attributes of a
    layer are kept. A layer that appears in several places is replaced by a single new one. With
    ``sparse=True`` an ``nn.Embedding`` of the model that shares its weight is tied to it
    (:meth:`LSHLinear.tie`).

    Args:
        model: any module; may itself be the layer.
        filter_fn: called with each ``nn.Linear`` (except LSHLinears) and its qualified name; the layers for
            which it returns true are replaced. By default those with at least ``min_out_features`` outputs.
        options: passed to :meth:`LSHLinear.from_linear`.
        sparse: passed to :meth:`LSHLinear.from_linear`.
        min_out_features: smallest number of outputs that the default ``filter_fn`` replaces.

    Returns:
        ``model``, or its replacement where the model itself is the layer.

    Raises:
        ValueError: no layer matched, or a matching layer cannot be replaced without losing something, such as
            a parametrization (see :meth:`LSHLinear.from_linear`). The message names it; nothing was changed.
    """
    if filter_fn is None:

        def filter_fn(module: nn.Module, name: str) -> bool:
            return isinstance(module, nn.Linear) and module.out_features >= min_out_features

    # remove_duplicate=False: a layer that appears in two places is replaced in both
    linears = [
        (name, module)
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Linear) and not isinstance(module, LSHLinear)
    ]
    chosen = [(name, module) for name, module in linears if filter_fn(module, name)]
    if not chosen:
        sizes = [
            f"{name or 'the model'} ({module.in_features} -> {module.out_features})"
            for name, module in linears
        ]
        raise ValueError(
            "convert_: filter_fn: expected to match at least one nn.Linear, matched none of: "
            + (", ".join(sizes) or "(the model has none)")
        )
    made: dict[nn.Module, LSHLinear] = {}
    for name, module in chosen:
        if module not in made:
            try:
                made[module] = LSHLinear.from_linear(module, options=options, sparse=sparse)
            except ValueError as error:
                raise ValueError(f"convert_: {name or 'the model'}: {error}") from error
    for embedding in model.modules():
        if isinstance(embedding, nn.Embedding | nn.EmbeddingBag):
            for layer in made.values():
                if layer.weight is embedding.weight:
                    layer.tie(embedding)
    for name, module in chosen:
        if not name:
            return made[module]
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, made[module])
    return model
