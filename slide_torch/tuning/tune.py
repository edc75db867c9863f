"""tune: which options find the largest logits of a layer's own inputs for the least cost."""

from __future__ import annotations

import dataclasses
import operator
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import as_int, as_number
from ..nn.linear import LSHLinear
from ..options import FAMILIES, MAX_TABLES, LSHOptions, ResolvedOptions
from ..tables import HashTables
from .recall import Exact, build, measure
from .result import Measurement, TuneResult

_ENOUGH = 32  # with fewer inputs than twice this, none are held out


_PROBES = (1, 2, 4, 8, 16, 32, 64, 128)


@torch.no_grad()
def tune(
    layer: LSHLinear,
    inputs: Tensor,
    recall: float = 0.9,
    *,
    k: int = 10,
    families: Sequence[str] = ("kmeans", "simhash", "cross_polytope", "dwta"),
    settings: Sequence[LSHOptions] | None = None,
    queries: int = 256,
    batch: int = 256,
    seconds: float = 60.0,
    seed: int = 0,
) -> TuneResult:
    r"""Measures candidate settings on a layer and inputs of yours, and returns that of least cost that finds
    the share ``recall`` of the exact k largest logits within the layer's budget.

    Give trained weights, or weights in the middle of training: random ones have no structure to find. Recall
    is not all that training needs, see docs/tuning.md. The layer is not changed, nor torch's random state:
    to use what is found, make a layer with it, ``LSHLinear.from_linear(layer.to_linear(),
    options=result.options)``.

    Recall and softmax mass depend on ``seed`` alone; times, and so the choice among settings that
    reach the recall, also on the machine and what else it does. Settings are tried from few probes to many
    until one reaches the recall. The choice is made on half of the inputs, up to ``queries``, and confirmed
    on as many others: a setting that misses the recall there gives way to the next in cost. With fewer than
    64 inputs none are held out.

    Memory: one setting's tables, and the logits of 16 inputs over all neurons.

    Args:
        layer: an LSHLinear; its options give pattern, budget, tail, correction and schedule.
        inputs: (\*, d), what the layer is fed, of its dtype; best of the validation data.
        recall: share to be found, above 0 and at most 1.
        k: how many of the largest logits, from 1 to N; and at most the budget.
        families: hash families to try, in this order.
        settings: options to try, instead of those of the families; used as they are, ``"auto"`` resolved.
        queries: most inputs to choose on, and most to confirm on.
        batch: inputs of a training step, which share the cost of a rehash.
        seconds: no further setting is begun after so long; the first always is. One may take some
            seconds.
        seed: of hash functions and of the choice of inputs.

    Raises:
        ValueError: an argument is wrong, weights hold NaN or Inf, or a setting has every neuron active or
            none retrieved.
    """
    flat, groups = _checked(
        layer,
        inputs,
        recall,
        k,
        families,
        settings,
        {"queries": queries, "batch": batch, "seconds": seconds, "seed": seed},
    )
    k, queries, batch, seed = map(operator.index, (k, queries, batch, seed))
    recall, seconds = float(recall), float(seconds)
    began = time.perf_counter()
    weight = layer.weight.detach().contiguous()
    bias = None if layer.bias is None else layer.bias.detach().contiguous()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(flat.shape[0], generator=generator)
    half = flat.shape[0] // 2 if flat.shape[0] >= 2 * _ENOUGH else flat.shape[0]
    own, others = flat[order[:half][:queries]], flat[order[half:][:queries]]
    exact, exact_of_others = (Exact(weight, bias, some, k) for some in (own, others))

    measured: list[Measurement] = []
    confirmed: list[tuple[Measurement, float, float]] = []  # with recall and mass on the others
    untried = 0
    best = -1.0
    for group in groups:
        tables = None
        for ladder in group:
            for place, setting in enumerate(ladder):
                if measured and time.perf_counter() - began > seconds:
                    untried += len(ladder) - place
                    break
                if tables is None:
                    tables, built, rehashed = build(setting, weight, bias, generator)
                tables = tables.read_with(setting)
                found = measure(tables, weight, bias, own, exact)
                upkeep = rehashed * 1e6 / (setting.rehash_every * batch)
                cost = found["us_query"] + upkeep
                line = Measurement(
                    setting, **found, build_seconds=built, rehash_seconds=rehashed, cost=cost
                )
                measured.append(line)
                if line.recall >= recall or line.recall > best:
                    there = found
                    if others.shape[0]:
                        there = measure(tables, weight, bias, others, exact_of_others)
                    confirmed.append((line, there["recall"], there["softmax_mass"]))
                best = max(best, line.recall)
                if line.recall >= recall:
                    break
    good = [c for c in confirmed if c[0].recall >= recall and c[1] >= recall]
    if good:
        chosen, share, mass = min(good, key=lambda c: c[0].cost)
    else:
        chosen, share, mass = max(confirmed, key=lambda c: c[1])
    return TuneResult(
        chosen.options.unresolved(),
        bool(good),
        share,
        mass,
        others.shape[0],
        recall,
        k,
        measured,
        untried,
        time.perf_counter() - began,
    )


def _ladders(
    base: LSHOptions, family: str, neurons: int, features: int
) -> Iterator[list[list[ResolvedOptions]]]:
    """The settings of a family that :func:`tune` tries: for each that needs tables of its own, ladders of
    rising cost over the same tables."""
    free: dict[str, Any] = dict.fromkeys(
        ("K", "L", "probes", "rerank", "bucket_cap", "rebuild_every"), "auto"
    )
    free["family"] = family
    # resolved with all that depends on the family left to it
    auto = dataclasses.replace(base, augment_norms=False, **free).resolve(neurons, features)
    kmeans = family == "kmeans"
    rerank = max(4096, 4 * auto.budget)
    variants: list[dict[str, Any]] = [{}]
    if kmeans:
        variants += [{"K": auto.K + 1}, {"K": auto.K - 1}]
    if family != "minhash":
        variants += [{"augment_norms": True}]
    most = 1 if family == "minhash" else MAX_TABLES // auto.L
    for variant in variants:
        if not 1 <= variant.get("K", 1) <= 16:
            continue
        # the cap of buckets follows K
        own = auto.unresolved(bucket_cap="auto", **variant).resolve(neurons, features)
        probes = [p for p in _PROBES if p <= min(most, 1 << own.code_bits)]
        yield [
            [dataclasses.replace(own, probes=p, rerank=r) for p in probes]
            for r in ((rerank,) if kmeans else (0, rerank))
        ]


def _checked(
    layer: LSHLinear,
    inputs: Tensor,
    recall: float,
    k: int,
    families: Sequence[str],
    settings: Sequence[LSHOptions] | None,
    numbers: dict[str, float],
) -> tuple[Tensor, list[list[list[ResolvedOptions]]]]:
    """Refuses what :func:`tune` cannot do; returns inputs (n, d) and the groups of ladders to try."""

    def refuse(name: str, expected: str, got: object) -> None:
        raise ValueError(f"tune: {name}: expected {expected}, got {got}")

    if not isinstance(layer, LSHLinear):
        refuse("layer", "an LSHLinear (the output layer itself)", type(layer).__name__)
    layer._check_parameters("tune: layer", called=False)
    neurons, features = layer.out_features, layer.in_features
    if not isinstance(inputs, Tensor) or inputs.dim() < 1 or inputs.shape[-1] != features:
        got = tuple(inputs.shape) if isinstance(inputs, Tensor) else type(inputs).__name__
        refuse("inputs", f"a tensor with last dimension {features} (in_features)", got)
    if layer.weight.dtype == torch.bfloat16:
        refuse(
            "layer", "float32 or float64 parameters", f"{layer.weight.dtype}: tune a copy.float()"
        )
    if inputs.dtype != layer.weight.dtype:
        refuse("inputs", f"{layer.weight.dtype}, the weight's dtype", inputs.dtype)
    if inputs.numel() == 0:
        refuse("inputs", "at least one", "none")
    if not bool(torch.isfinite(inputs).all()):
        refuse("inputs", "finite numbers", "NaN or Inf")
    share = as_number(recall)
    if share is None or not 0 < share <= 1:
        refuse("recall", "a number above 0 and at most 1", repr(recall))
    if not 1 <= (as_int(k) or 0) <= neurons:
        refuse("k", f"an int from 1 to {neurons} (out_features)", repr(k))
    for name, value in numbers.items():
        if name == "seconds" and not (as_number(value) or 0) > 0:
            refuse(name, "a number above 0", repr(value))
        if name == "seed" and as_int(value) is None:
            refuse(name, "an int", repr(value))
        if name not in ("seconds", "seed") and not (as_int(value) or 0) >= 1:
            refuse(name, "an int of at least 1", repr(value))
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
    return inputs.detach().reshape(-1, features).contiguous(), groups
