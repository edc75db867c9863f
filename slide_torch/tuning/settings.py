"""The settings that tune tries."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

from ..nn.linear import LSHLinear
from ..options import FAMILIES, MAX_TABLES, LSHOptions, ResolvedOptions
from ..tables import HashTables
from .arguments import refuse

_PROBES = (1, 2, 4, 8, 16, 32, 64, 128, MAX_TABLES)

# Ladders of settings of rising cost, all over the same tables.
Group: TypeAlias = list[list[ResolvedOptions]]


def settings_to_try(
    layer: LSHLinear,
    families: Sequence[str],
    settings: Sequence[LSHOptions] | None,
    k: int,
) -> list[Group]:
    """The groups that :func:`tune` tries: those of ``families``, or each of the ``settings``.

    Raises:
        ValueError: an argument is wrong, or a setting cannot be measured.
    """
    neurons, features = layer.out_features, layer.in_features
    unknown = [f for f in families if f not in FAMILIES] if settings is None else []
    if isinstance(families, str) or unknown or len(families) == 0:
        refuse("families", f"one or more of {FAMILIES}", repr(families))
    if settings is None:
        groups = [
            group
            for family in families
            for group in _ladders(layer.options, family, neurons, features)
        ]
    else:
        if len(settings) == 0 or not all(isinstance(o, LSHOptions) for o in settings):
            refuse("settings", "one or more LSHOptions", repr(settings))
        groups = [[[options.resolve(neurons, features)]] for options in settings]
    for group in groups:
        options = group[0][0]
        tables = HashTables(options, neurons, features, has_bias=layer.bias is not None)
        if not tables.uses_tables:
            refuse(
                "settings" if settings is not None else "layer",
                f"options that retrieve some of the {neurons} neurons from tables",
                f"family={options.family!r}, budget={options.budget}, tail={options.tail}: all or none, or "
                "without tables",
            )
        if k > options.budget:
            refuse("k", f"at most the budget, {options.budget}, or its recall cannot be had", k)
    return groups


def _ladders(base: LSHOptions, family: str, neurons: int, features: int) -> Iterator[Group]:
    """The settings of a family to try: a group for each that needs tables of its own."""
    free: dict[str, Any] = dict.fromkeys(
        ("K", "L", "probes", "rerank", "bucket_cap", "rebuild_every"), "auto"
    )
    free["family"] = family
    # resolved with all that depends on the family left to it
    auto = dataclasses.replace(base, augment_norms=False, **free).resolve(neurons, features)
    kmeans = family == "kmeans"
    rerank = max(4096, 4 * auto.budget)
    other_K = [{"K": auto.K + 1}, {"K": auto.K - 1}] if kmeans else []
    variants: list[dict[str, Any]] = [{}, *other_K, {"augment_norms": True}]
    for variant in variants:
        if not 1 <= variant.get("K", 1) <= 16:
            continue
        # the cap of buckets follows K
        own = auto.unresolved(bucket_cap="auto", **variant).resolve(neurons, features)
        probes = [p for p in _PROBES if p <= min(MAX_TABLES // auto.L, 1 << own.code_bits)]
        yield [
            [dataclasses.replace(own, probes=p, rerank=r) for p in probes]
            for r in ((rerank,) if kmeans else (0, rerank))
        ]
