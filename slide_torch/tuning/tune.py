"""tune: the options that find the largest logits of a layer's own inputs at the least cost."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..nn.linear import LSHLinear
from ..options import LSHOptions, ResolvedOptions
from ..sampling.recall import Exact
from ..tables import HashTables
from .arguments import TuneCall, checked_call
from .measure import BuiltTables, build, measure
from .result import Measurement, TuneResult
from .settings import Group, settings_to_try

_ENOUGH = 32  # with fewer inputs than twice this, none are held out


@torch.no_grad()
def tune(
    layer: LSHLinear,
    inputs: Tensor,
    recall: float = 0.9,
    *,
    k: int = 10,
    families: Sequence[str] = ("kmeans", "simhash", "dwta"),
    settings: Sequence[LSHOptions] | None = None,
    queries: int = 256,
    batch: int = 256,
    seconds: float = 60.0,
    seed: int = 0,
) -> TuneResult:
    r"""Measures candidate settings on a layer and inputs of yours, and returns that of least cost that finds
    the share ``recall`` of the exact k largest logits within the layer's budget.

    Use trained weights, or weights from the middle of training: random ones have no structure to find. Recall
    is not all that matters in training, see docs/choosing.md. Neither the layer nor torch's random state
    changes. To use the result, make a layer with it: ``LSHLinear.from_linear(layer.to_linear(),
    options=result.options)``.

    Recall and softmax mass depend only on ``seed``; times, and so the choice among settings that
    reach the recall, also depend on the machine and its load. Settings are tried from few probes to many
    until one reaches the recall. The choice is made on half of the inputs, up to ``queries``, and confirmed
    on as many others: a setting that misses the recall there gives way to the next in cost. With fewer than
    64 inputs none are held out.

    Memory: the tables of one setting, and the logits of 16 inputs over all neurons.

    Args:
        layer: an LSHLinear; pattern, budget, tail, correction and schedule are taken from its options.
        inputs: (\*, d), inputs of the layer, of its dtype; best from the validation data.
        recall: share to find, above 0 and at most 1.
        k: number of largest logits, from 1 to N, and at most the budget.
        families: hash families to try, in this order.
        settings: options to try, instead of those of the families; used as they are, ``"auto"`` resolved.
        queries: largest number of inputs to choose on, and largest number to confirm on.
        batch: inputs of a training step, which share the cost of a rehash.
        seconds: no further setting is begun after this time; the first one always is. One may take some
            seconds.
        seed: seed of the hash functions and of the choice of inputs.

    Raises:
        ValueError: an argument is wrong, weights hold NaN or Inf, or a setting has every neuron active or
            none retrieved.
    """
    call = checked_call(layer, inputs, recall, k, queries, batch, seconds, seed)
    groups = settings_to_try(layer, families, settings, call.k)
    search = _Search(layer, call)
    for group in groups:
        search.try_group(group)
    return search.result()


class _Confirmed(NamedTuple):
    """A measured setting, with its recall and softmax mass on held-out inputs (if there are any)."""

    measurement: Measurement
    recall: float
    softmax_mass: float


class _Search:
    """What :func:`tune` has measured so far."""

    def __init__(self, layer: LSHLinear, call: TuneCall) -> None:
        self.began = time.perf_counter()
        self.call = call
        self.weight = layer.weight.detach().contiguous()
        self.bias = None if layer.bias is None else layer.bias.detach().contiguous()
        self.generator = torch.Generator().manual_seed(call.seed)
        self.inputs, self.held_out = self._halves()
        self.exact = Exact.of(self.weight, self.bias, self.inputs, call.k)
        self.exact_held_out = Exact.of(self.weight, self.bias, self.held_out, call.k)
        self.measured: list[Measurement] = []
        self.confirmed: list[_Confirmed] = []
        self.untried = 0

    def _halves(self) -> tuple[Tensor, Tensor]:
        """The inputs to choose on and the inputs to confirm on, the latter empty where there are few."""
        inputs, most = self.call.inputs, self.call.queries
        count = inputs.shape[0]
        order = torch.randperm(count, generator=self.generator)
        half = count // 2 if count >= 2 * _ENOUGH else count
        return inputs[order[:half][:most]], inputs[order[half:][:most]]

    def try_group(self, group: Group) -> None:
        """Measures the settings of each ladder until one reaches the recall or time is up."""
        built = None
        for ladder in group:
            for place, setting in enumerate(ladder):
                elapsed = time.perf_counter() - self.began
                if self.measured and elapsed > self.call.seconds:
                    self.untried += len(ladder) - place
                    break
                if built is None:
                    built = build(setting, self.weight, self.bias, self.generator)
                if self._reaches(built, setting):
                    break

    def _reaches(self, built: BuiltTables, setting: ResolvedOptions) -> bool:
        """Measures a setting over tables that are built for it; whether it reaches the recall."""
        tables = built.tables.read_with(setting)
        found = measure(tables, self.weight, self.bias, self.inputs, self.exact)
        upkeep = built.rehash_seconds * 1e6 / (setting.rehash_every * self.call.batch)
        measurement = Measurement(
            setting,
            **found,
            build_seconds=built.build_seconds,
            rehash_seconds=built.rehash_seconds,
            cost=found["us_query"] + upkeep,
        )
        best = max((earlier.recall for earlier in self.measured), default=-1.0)
        self.measured.append(measurement)
        reached = measurement.recall >= self.call.recall
        if reached or measurement.recall > best:
            self.confirmed.append(self._confirm(measurement, tables))
        return reached

    def _confirm(self, measurement: Measurement, tables: HashTables) -> _Confirmed:
        if self.held_out.shape[0] == 0:
            return _Confirmed(measurement, measurement.recall, measurement.softmax_mass)
        found = measure(tables, self.weight, self.bias, self.held_out, self.exact_held_out)
        return _Confirmed(measurement, found["recall"], found["softmax_mass"])

    def result(self) -> TuneResult:
        """The cheapest setting that reaches the recall on both halves, else that of the highest recall."""
        target = self.call.recall
        good = [c for c in self.confirmed if c.measurement.recall >= target and c.recall >= target]
        if good:
            chosen = min(good, key=lambda c: c.measurement.cost)
        else:
            chosen = max(self.confirmed, key=lambda c: c.recall)
        return TuneResult(
            options=chosen.measurement.options.unresolved(),
            reached=bool(good),
            recall=chosen.recall,
            softmax_mass=chosen.softmax_mass,
            held_out=self.held_out.shape[0],
            target=target,
            k=self.call.k,
            measured=self.measured,
            untried=self.untried,
            seconds=time.perf_counter() - self.began,
        )
