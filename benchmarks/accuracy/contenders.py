"""The contenders of time_to_accuracy.py by their names, and the output layer that stands behind each."""

from __future__ import annotations

import ast
import dataclasses
from typing import Any

from torch import nn

from slide_torch import LSHOptions

from .output_layers import DenseLayer, LSHLayer, SampledLayer

__all__ = [
    "CONTENDERS",
    "Contender",
    "make_output_layer",
    "parse_contender",
    "parse_options",
    "variants_of",
]


@dataclasses.dataclass(frozen=True)
class Contender:
    """A name for the table, what stands behind it, and that kind's options.

    ``kind``: "dense": ``bf16`` for autocast; "sampled": the batch's labels and what ``options`` adds (see
    :class:`SampledLayer`); "lsh": ``options`` are those of LSHOptions; "omikuji": ``trees``.
    """

    name: str
    kind: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    reference: bool = False  # too slow to be a rival: shows what better negatives would give


_SLIDE = {"family": "dwta", "pattern": "per_sample", "correction": "none"}
_WORDS = {"correction": "importance", "tail_distribution": "log_uniform"}

CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("dense", "dense"),
        Contender("dense_bf16", "dense", {"bf16": True}),
        Contender("inbatch", "sampled"),
        Contender("uniform_1024", "sampled", {"drawn": 1024}),
        Contender("importance_8192", "sampled", {"drawn": 8192, "corrected": True}),
        Contender("log_uniform_1024", "sampled", {"drawn": 1024, "log_uniform": True}),
        Contender("log_uniform_4096", "sampled", {"drawn": 4096, "log_uniform": True}),
        Contender("slide", "lsh", _SLIDE),
        Contender("tail_1024", "lsh", _WORDS | {"budget": 0, "tail": 1024}),
        Contender("tail_4096", "lsh", _WORDS | {"budget": 0, "tail": 4096}),
        Contender("lsh_corrected", "lsh", _WORDS | {"budget": 4, "tail": 1024}),
        Contender("lsh", "lsh"),
        Contender("exact_top10", "sampled", {"exact": 10}, reference=True),
        Contender("omikuji_1", "omikuji", {"trees": 1}),
        Contender("omikuji_3", "omikuji", {"trees": 3}),
    )
}


def parse_contender(text: str) -> Contender:
    """A name of :data:`CONTENDERS`, or an LSHLinear as ``name=option:value,option:value``.

    Raises:
        ValueError: neither, or an option that LSHOptions refuses.
    """
    name, equals, rest = text.partition("=")
    if not equals:
        if name not in CONTENDERS:
            raise ValueError(
                f"expected one of {', '.join(CONTENDERS)}, or name=option:value,..., got {text!r}"
            )
        return CONTENDERS[name]
    if name in CONTENDERS:
        raise ValueError(f"{name} is taken: give your options another name")
    return Contender(name, "lsh", parse_options(rest))


def parse_options(text: str) -> dict[str, Any]:
    """Options of LSHOptions, as ``option:value,option:value``.

    Raises:
        ValueError: there is no such option, or LSHOptions refuses them.
    """
    known = {field.name for field in dataclasses.fields(LSHOptions)}
    options: dict[str, Any] = {}
    for item in filter(None, text.split(",")):
        key, colon, value = item.partition(":")
        if not colon or key not in known:
            raise ValueError(f"expected option:value of {sorted(known)}, got {item!r} in {text!r}")
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key] = value
    LSHOptions(**options)
    return options


def make_output_layer(
    contender: Contender, linear: nn.Linear, variant: str | None = None
) -> DenseLayer | SampledLayer | LSHLayer:
    """The contender's output layer on the parameters of ``linear``; ``variant``: of :func:`variants_of`."""
    if contender.kind == "dense":
        return DenseLayer(linear, variant or "eager", **contender.options)
    if contender.kind == "sampled":
        return SampledLayer(linear, **contender.options)
    return LSHLayer(linear, LSHOptions(**contender.options))


def variants_of(
    kind: str, options: dict[str, Any], *, several_labels: bool
) -> tuple[str | None, ...]:
    """Ways to compute the same layer, of which the fastest counts."""
    if kind == "omikuji":
        return ()
    if kind == "dense":
        few = options.get("bf16") or several_labels
        return DenseLayer.FEW_VARIANTS if few else DenseLayer.VARIANTS
    return (None,)
