"""Backward passes of the operators over active sets: what is saved for them, and where gradients go."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from . import fused_update
from .library import argument_names, operators, result_names

# What backward needs too, but is no tensor.
MODES = ("decoupled",)


def register_backward(name: str, *, fusable: bool = False) -> None:
    """Makes ``slide_torch::{name}_backward`` the derivative of ``slide_torch::{name}``.

    Its schema says what is saved: its arguments bear the names of the inputs and results of the forward
    operator that it needs, tensors first. ``has_rows`` and ``has_bias`` tell it which gradients are wanted.
    Weight and input are saved as such, so that torch notices when they are changed in place before backward.

    Args:
        fusable: whether ``slide_torch::{name}_backward_adam_`` updates the weight inside backward, for an
            optimizer that is fused with it; the weight has no gradient then. Where the gradient is a
            result of ``torch.autograd.grad``, it is handed over all the same.
    """
    of_operator = Backward(name, fusable=fusable)

    def backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        return of_operator.gradients(ctx, ctx.needs_input_grad, grad)

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        ctx.mark_non_differentiable(*outputs[1:])
        of_operator.save(ctx, inputs, outputs)

    torch.library.register_autograd(f"slide_torch::{name}", backward, setup_context=save)
    # without this torch would warn and take the second derivative for zero
    torch.library.register_autograd(
        f"slide_torch::{name}_backward", _refuse_twice, setup_context=_save_nothing
    )


class Backward:
    """The backward of ``slide_torch::{name}`` as :func:`register_backward` describes it, for any node of the
    graph whose inputs begin with the operator's."""

    def __init__(self, name: str, *, fusable: bool) -> None:
        self.names, self.results = argument_names(name), result_names(name)
        arguments = argument_names(f"{name}_backward")
        self.modes = [n for n in MODES if n in arguments]
        self.needed = [n for n in arguments if n in {*self.names, *self.results} - {*self.modes}]
        flags = {"has_rows": "weight", "has_bias": "bias"}
        self.flags = {flag: of for flag, of in flags.items() if flag in arguments}
        self.operator: Any = getattr(operators, f"{name}_backward")
        self.fused: Any = getattr(operators, f"{name}_backward_adam_") if fusable else None

    def save(self, ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> None:
        """Keeps in ``ctx`` what :meth:`gradients` needs of a call of the operator."""
        named = dict(zip((*self.names, *self.results), (*inputs, *outputs), strict=True))
        ctx.scale, ctx.sparse = named.get("scale"), named["sparse"]
        ctx.modes = {n: named[n] for n in self.modes}
        ctx.save_for_backward(*(named[n] for n in self.needed))

    def gradients(
        self, ctx: Any, needed: tuple[bool, ...], grad: Tensor, **more: Tensor
    ) -> tuple[Tensor | None, ...]:
        """The gradients of the operator's inputs.

        Args:
            needed: which of them are needed, as torch sees it.
            grad: the derivative by the operator's first result.
            more: other derivatives that the backward operator takes, by their names.
        """
        # once: activation checkpointing recomputes for it, and only once
        tensors = ctx.saved_tensors
        saved = SimpleNamespace(**dict(zip(self.needed, tensors, strict=True)))
        wanted = dict(zip(self.names, needed, strict=True))
        if ctx.scale is not None:
            grad, more = grad * ctx.scale, {n: other * ctx.scale for n, other in more.items()}
        grad, more = grad.contiguous(), {n: other.contiguous() for n, other in more.items()}
        optimizer = None
        if self.fused and ctx.sparse and wanted["weight"]:
            optimizer = fused_update.optimizer_of(saved.weight)
        if optimizer is not None:
            # `needed` is of the forward; like torch, leave alone what is not asked for or frozen
            leaf = ctx.next_functions[self.names.index("weight")][0]
            accumulates = fused_update.accumulates(leaf) if saved.weight.requires_grad else False
            if not accumulates:
                optimizer = None
            wanted["weight"] = accumulates is not False
        if optimizer is None:
            flags = {flag: wanted[of] for flag, of in self.flags.items()}
            found = self.operator(grad, *tensors, **ctx.modes, **flags, **more)
            grad_input, grad_rows, grad_bias = (*found, None)[:3]
        else:
            if torch.is_grad_enabled():
                raise RuntimeError(
                    "slide_torch.optim.Adam: fuse_backward: expected create_graph=False, got True: gradients "
                    "of a backward that updates the weight cannot be differentiated: set fuse_backward=False"
                )
            grad_rows = None
            with torch.no_grad(), optimizer.fused_step(saved.weight) as step:
                grad_input, grad_bias = self.fused(
                    grad, *tensors, **ctx.modes, has_bias=wanted["bias"], **step, **more
                )
                torch.autograd.graph.increment_version(
                    (saved.weight, step["exp_avg"], step["exp_avg_sq"])
                )
        gradients = {self.names[0]: grad_input}
        for of, rows_of in (("weight", grad_rows), ("bias", grad_bias)):
            if rows_of is not None and wanted.get(of):
                gradients[of] = as_gradient(saved.rows, rows_of, saved.weight.shape[0], ctx.sparse)
        return tuple(gradients.get(n) if wanted[n] else None for n in self.names)


def as_gradient(rows: Tensor, values: Tensor, neurons: int, sparse: bool) -> Tensor:
    """Gradient rows as torch's optimizers take them: row-sparse, or dense with zeros elsewhere."""
    if sparse:
        shape = (neurons, *values.shape[1:])
        return torch.sparse_coo_tensor(
            rows.unsqueeze(0), values, shape, is_coalesced=True, check_invariants=False
        )
    if statically_known_true(rows.shape[0] == neurons):
        return values
    return operators.rows_to_dense(rows, values, neurons)


def _refuse_twice(ctx: Any, *grads: Tensor) -> NoReturn:
    raise RuntimeError(
        "slide_torch: what is computed over active sets is differentiable once; backward with "
        "create_graph=True cannot be differentiated again"
    )


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass
