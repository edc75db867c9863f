"""What a forward in training leaves for the loss, and what stands for it in the autograd graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..storage import check_in_memory

if TYPE_CHECKING:
    from .linear import LSHLinear


class ForwardCall:
    """One call ``layer(input)`` in training.

    The input, and the parameters of then (``torch.func.functional_call`` takes its own away again), are
    without gradient where that call would have given them none. It is no tuple and no dataclass: what walks
    a module's output must not find weights in it.
    """

    def __init__(self, layer: LSHLinear, input: Tensor) -> None:
        self.layer = layer
        records = torch.is_grad_enabled()
        given = {"input": input, "weight": layer.weight, "bias": layer.bias}
        self.input, self.weight, self.bias = (
            t if t is None or (records and t.requires_grad) else t.detach() for t in given.values()
        )
        self.scale = 1.0
        self.normalised = False
        # (name, tensor, version); inference tensors have no version, and compiled graphs look after theirs
        self._versions: tuple[tuple[str, Tensor, int], ...] = ()
        if not torch.compiler.is_compiling():
            self._versions = tuple(
                (name, tensor, tensor._version)
                for name, tensor in given.items()
                if tensor is not None and not tensor.is_inference()
            )

    def replaced(self, **changes: Any) -> ForwardCall:
        """A copy with other attributes."""
        copy = ForwardCall.__new__(ForwardCall)
        copy.__dict__.update(self.__dict__)
        copy.__dict__.update(changes)
        return copy

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
            RuntimeError: one has been written to, or its memory is gone.
        """
        check_in_memory(name, weight=self.weight, bias=self.bias)
        self.check_unchanged()
        found = self.input, self.weight, self.bias
        if with_graph:
            return found
        return tuple(None if t is None else t.detach() for t in found)  # type: ignore[return-value]


class _StandIn(torch.autograd.Function):
    """No numbers, that depend on tensors: a place in the graph after these."""

    @staticmethod
    def forward(*inputs: Tensor | None) -> Tensor:
        first = inputs[0]
        assert first is not None
        return first.new_empty((0,))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.count = len(inputs)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[None, ...]:
        return (None,) * ctx.count


class _DualStandIn(_StandIn):
    """With a rule for forward-mode differentiation, whose presence torch.compile refuses: what follows says
    whether it has one."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        given = next(tangent for tangent in tangents if tangent is not None)
        return given.new_empty((0,))


def stand_in(call: ForwardCall) -> Tensor | None:
    """An empty tensor in the graph where the output of ``call`` would be; None where it would have no
    gradient."""
    given = (call.input, call.weight, call.bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given):
        function = _StandIn if torch.compiler.is_compiling() else _DualStandIn
        return function.apply(*given)
    return None


def joined(values: Tensor, graph: Tensor | None) -> Tensor:
    """``values``, whose backward also passes through the stand-in: hooks on it fire."""
    if graph is None or not (torch.is_grad_enabled() and values.requires_grad):
        return values
    return values + graph.sum().to(values.dtype)
