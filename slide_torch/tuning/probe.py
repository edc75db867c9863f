"""RecallProbe: what the tables find, measured now and then while a layer trains."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..checks import checked_int
from ..nn.linear import LSHLinear
from ..precision import widened
from ..sampling.candidates import candidates
from ..sampling.draw import to_look_at
from ..sampling.recall import Exact, found_among, softmax_mass


@torch.no_grad()
def recall_and_mass(layer: LSHLinear, input: Tensor, k: int) -> tuple[float, float]:
    """Share of the exact k largest logits among the candidates within the budget, and the softmax probability
    of the candidates: means over the rows of ``input`` (B, d). Labels and tail do not count."""
    weight, bias = layer.weight, layer.bias
    input = widened(input)
    found = candidates(to_look_at(layer.tables, weight, bias), weight, bias, input)
    if found is None:
        return 1.0, 1.0
    exact = Exact.of(weight, bias, input, k)
    recall = found_among(exact.top, *found, weight.shape[0]).float().mean()
    mass = softmax_mass(weight, bias, input, exact.log_normalizer, *found).mean()
    return recall.item(), mass.item()


class RecallProbe:
    """Measures recall and softmax mass of a layer's tables at regular intervals during training.

    It hooks the layer's forward: at every ``every``-th training batch it compares what the tables return for
    a few rows with the exact logits. Training is bit for bit the same as without it, and no random number
    is drawn. A measurement computes the dense logits of ``rows`` inputs, 16 at a time; between measurements
    a forward is only counted.

    Args:
        layer: the layer whose tables to watch.
        every: training forwards from one measurement to the next. (A forward recomputed by activation
            checkpointing counts again.)
        k: number of largest logits to look for, from 1 to N.
        rows: number of inputs to measure: the first ones of the batch.

    Attributes:
        last: the last measurement: ``{"recall@<k>": share of the exact top k within the budget,
            "softmax_mass": probability of the candidates}``; empty before the first one. The first forward
            is never measured: its loss builds the tables.
        steps: training forwards seen.

    Raises:
        ValueError: an argument is out of its range.

    Examples:
        >>> with RecallProbe(head, every=100) as probe:
        ...     for x, y in (bar := tqdm(loader)):
        ...         loss = F.cross_entropy(head(body(x)), y)
        ...         ...
        ...         bar.set_postfix(probe.last)
        ...         for name, value in probe.last.items():
        ...             writer.add_scalar(f"lsh/{name}", value, probe.steps)
    """

    def __init__(self, layer: LSHLinear, *, every: int = 100, k: int = 10, rows: int = 16) -> None:
        if not isinstance(layer, LSHLinear):
            raise ValueError(
                f"RecallProbe: layer: expected an LSHLinear, got {type(layer).__name__}: give the output "
                "layer itself, not the model around it"
            )
        self.every = checked_int(every, 1, None, "RecallProbe: every")
        self.k = checked_int(k, 1, layer.out_features, "RecallProbe: k")
        self.rows = checked_int(rows, 1, None, "RecallProbe: rows")
        self.steps = 0
        self.last: dict[str, float] = {}
        self._hook = layer.register_forward_hook(self._look, with_kwargs=True)

    @torch.compiler.disable
    def _look(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if not isinstance(layer, LSHLinear) or not layer.training:  # to_linear() keeps hooks
            return
        self.steps += 1
        # the step builds the tables, with random numbers that no measurement may take
        ready = layer.tables.built or not layer.tables.uses_tables
        if self.steps % self.every == 0 and ready:
            self.measure(layer, args[0] if args else kwargs["input"])

    def measure(self, layer: LSHLinear, input: Tensor) -> dict[str, float]:
        r"""Measures now, on the first rows of ``input`` (\*, d); returns :attr:`last`.

        Raises:
            ValueError: ``input`` is not a tensor of that shape.
        """
        if not isinstance(input, Tensor) or input.dim() < 1 or input.shape[-1] != layer.in_features:
            got = tuple(input.shape) if isinstance(input, Tensor) else type(input).__name__
            raise ValueError(
                f"RecallProbe.measure: input: expected a tensor with last dimension {layer.in_features} "
                f"(in_features), got {got}"
            )
        some = input.detach().reshape(-1, layer.in_features)[: self.rows]
        some = some.to(layer.weight.dtype).contiguous()
        if some.shape[0] > 0:
            recall, mass = recall_and_mass(layer, some, self.k)
            self.last = {f"recall@{self.k}": recall, "softmax_mass": mass}
        return self.last

    def remove(self) -> None:
        """Removes the hook; :attr:`last` stays."""
        self._hook.remove()

    def __enter__(self) -> RecallProbe:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()
