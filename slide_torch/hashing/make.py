"""Hash families by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..options import ResolvedOptions
from .base import HashFamily
from .dwta import DWTA
from .kmeans import KMeans
from .simhash import SimHash


def make_family(
    options: ResolvedOptions, in_features: int, *, has_bias: bool, seed: int
) -> HashFamily:
    """The family that ``options`` name."""
    own: dict[str, Any] = {}
    if options.family == "simhash":
        own["projection"] = options.projection
    elif options.family == "dwta":
        own["bin_size"] = options.bin_size
    return _FAMILIES[options.family](
        in_features,
        options.K,
        options.L,
        has_bias=has_bias,
        seed=seed,
        center=options.center,
        augment_norms=options.augment_norms,
        **own,
    )


_FAMILIES: dict[str, Callable[..., HashFamily]] = {
    "simhash": SimHash,
    "dwta": DWTA,
    "kmeans": KMeans,
}
