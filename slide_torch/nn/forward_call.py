"""A forward in training, kept for the loss, and its stand-in in the autograd graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..storage import check_in_memory
from ..tables import HashTables


class ForwardCall:
    """One call ``layer(input)`` in training: what a loss needs to compute its logits later.

    It holds the input and parameters of the call (``torch.func.functional_call`` takes its own away again),
    detached where the call itself would record no gradient for them. It is neither a tuple nor a dataclass,
    so that code that walks a module's output for tensors finds no weights in it.

    Attributes:
        input: (\\*, d).
        weight: (N, d).
        bias: (N), or None.
        tables: hash tables over the weight.
        sparse: whether weight and bias get row-sparse gradients.
        negatives: int64 (M) for the whole batch, or (\\*, M): neurons that are active beside labels; a copy.
        exclude: int64 (\\*, M), neurons that do not compete in a row, or None; a copy.
        transformed: whether this is differentiated in other ways than backward, without a stand-in.
        scale: factor of the logits.
        normalised: whether these are log-probabilities, not logits.
    """

    def __init__(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tables: HashTables,
        *,
        sparse: bool,
        negatives: Tensor | None = None,
        exclude: Tensor | None = None,
    ) -> None:
        self.tables = tables
        self.sparse = sparse
        self.negatives, self.exclude = _copied(negatives), _copied(exclude)
        # other ways to differentiate go by the tensors themselves; losses refuse them
        self.transformed = ops.transform_of(input, weight, bias) is not None
        records = torch.is_grad_enabled()

        def kept(tensor: Tensor) -> Tensor:
            recorded = records and tensor.requires_grad
            return tensor if recorded or self.transformed else tensor.detach()

        self.input, self.weight = kept(input), kept(weight)
        self.bias = None if bias is None else kept(bias)
        self.scale = 1.0
        self.normalised = False
        # (name, tensor, version); inference tensors have no version, and compiled graphs look after theirs
        self._versions: tuple[tuple[str, Tensor, int], ...] = ()
        if not self.transformed and not torch.compiler.is_compiling():
            self._versions = tuple(
                (name, tensor, tensor._version)
                for name, tensor in (("input", input), ("weight", weight), ("bias", bias))
                if tensor is not None and not tensor.is_inference()
            )

    @property
    def out_features(self) -> int:
        return self.tables.out_features

    def replaced(self, **changes: Any) -> ForwardCall:
        """A copy with other attributes."""
        copy = type(self).__new__(type(self))
        copy.__dict__.update(self.__dict__)
        copy.__dict__.update(changes)
        return copy

    def viewed(self, view: Callable[[Tensor], Tensor]) -> ForwardCall:
        """A copy whose rows are those of ``view``, which keeps the last dimension, whatever its size."""
        self.check_unchanged()  # the new input may be a copy
        negatives = self.negatives
        if negatives is not None and negatives.dim() > 1:
            negatives = view(negatives)
        exclude = None if self.exclude is None else view(self.exclude)
        return self.replaced(input=view(self.input), negatives=negatives, exclude=exclude)

    def check_unchanged(self) -> None:
        """Raises a RuntimeError if anything has been written to since the forward."""
        for name, tensor, version in self._versions:
            if tensor._version != version:
                what = "input" if name == "input" else f"layer.{name}"
                raise RuntimeError(
                    f"SampledLogits: {what}: expected it as layer(input) was given it, at version {version}, "
                    f"got it modified in place, at version {tensor._version}: logits are computed with the "
                    "loss, so compute the loss (and topk, argmax, to_dense) before changing it, as by "
                    "optimizer.step(), or call layer(input) again"
                )

    def tensors(self, name: str, *, with_graph: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Input, weight and bias for a computation; without gradients unless ``with_graph``.

        Raises:
            RuntimeError: one has been modified in place, or its memory has been freed.
        """
        check_in_memory(name, weight=self.weight, bias=self.bias)
        self.check_unchanged()
        if with_graph or self.transformed:
            return self.input, self.weight, self.bias
        bias = None if self.bias is None else self.bias.detach()
        return self.input.detach(), self.weight.detach(), bias


def _copied(lists: Tensor | None) -> Tensor | None:
    """None also for empty lists, (\\*, 0), which have no reshape to (-1, 0)."""
    return None if lists is None or lists.shape[-1] == 0 else lists.detach().clone()


class _StandIn(torch.autograd.Function):
    """An empty tensor that depends on the inputs: a node in the graph after them. Without ``setup_context``,
    for which torch would look up this function's signature at every call."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor | None) -> Tensor:
        ctx.count = len(inputs)
        first = inputs[0]
        assert first is not None
        return first.new_empty((0,))

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[None, ...]:
        count: int = ctx.count
        return (None,) * count


def stand_in(call: ForwardCall) -> Tensor | None:
    """An empty tensor in the graph where the output of ``call`` would be; None where it would have no
    gradient."""
    given = (call.input, call.weight, call.bias)
    if call.transformed:
        return None
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given):
        function: Any = _StandIn
        output: Tensor = function.apply(*given)
        return output
    return None


def joined(values: Tensor, graph: Tensor | None) -> Tensor:
    """``values``, whose backward also passes through the stand-in, so that its hooks fire."""
    if graph is None or not (torch.is_grad_enabled() and values.requires_grad):
        return values
    return values + graph.sum().to(values.dtype)
