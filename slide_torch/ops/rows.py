"""Operators on some rows of a parameter: gradients, optimizer steps, copies."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .autograd import as_gradient
from .library import fake, operators
from .transforms import refuse_transforms


def adam_rows_(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    rows: Tensor | None,
    grad_rows: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    maximize: bool,
) -> None:
    """One step of :class:`torch.optim.SparseAdam` on ``param[rows]``.

    ``rows (U)`` increases strictly, ``grad_rows (U, ...)`` holds their gradients. Before the step
    these rows shrink by ``lr * weight_decay`` of themselves. Without ``rows``, ``grad_rows`` is the gradient
    of all. The moments of a float32 ``param`` may be bfloat16, rounded stochastically. A bfloat16 ``param``,
    whose gradient and moments are bfloat16, is too.
    """
    operators.adam_rows_(
        param,
        exp_avg,
        exp_avg_sq,
        rows,
        grad_rows,
        lr,
        beta1,
        beta2,
        eps,
        weight_decay,
        step,
        maximize,
    )
    torch.autograd.graph.increment_version((param, exp_avg, exp_avg_sq))


@fake("adam_rows_")
def _(a: SimpleNamespace) -> Any:
    return None


def sgd_rows_(
    param: Tensor,
    momentum_buffer: Tensor | None,
    rows: Tensor | None,
    grad_rows: Tensor,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    step: int = 0,
) -> None:
    """One step of :class:`torch.optim.SGD` on ``param[rows]``; untouched rows stand still.

    Without ``rows``, ``grad_rows`` is the gradient of all. All may be bfloat16, rounded stochastically by
    random bits that ``step`` seeds.
    """
    operators.sgd_rows_(
        param,
        momentum_buffer,
        rows,
        grad_rows,
        lr,
        momentum,
        weight_decay,
        nesterov,
        maximize,
        step,
    )
    changed = (param,) if momentum_buffer is None else (param, momentum_buffer)
    torch.autograd.graph.increment_version(changed)


@fake("sgd_rows_")
def _(a: SimpleNamespace) -> Any:
    return None


def adagrad_rows_(
    param: Tensor,
    sum: Tensor,
    rows: Tensor | None,
    grad_rows: Tensor,
    *,
    lr: float,
    eps: float,
    maximize: bool,
    step: int = 0,
) -> None:
    """One step of :class:`torch.optim.Adagrad` on ``param[rows]``; ``lr`` is the decayed one; ``rows`` and
    bfloat16 as for :func:`sgd_rows_`."""
    operators.adagrad_rows_(param, sum, rows, grad_rows, lr, eps, maximize, step)
    torch.autograd.graph.increment_version((param, sum))


@fake("adagrad_rows_")
def _(a: SimpleNamespace) -> Any:
    return None


def coalesce_rows(indices: Tensor, values: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Sums the ``values (n, ...)`` of equal ``indices (n)``: distinct rows and their sums.

    Each sum is taken in the order of the entries: the same bit for bit at any number of threads. That of
    bfloat16 values is taken in float32.
    """
    wide = values.float() if values.dtype == torch.bfloat16 else values
    rows, sums = operators.coalesce_rows(indices, wide, num_rows)
    return rows, sums.to(values.dtype)


@fake("coalesce_rows")
def _(a: SimpleNamespace) -> Any:
    count = torch.library.get_ctx().new_dynamic_size(min=0)
    return a.indices.new_empty(count), a.values.new_empty((count, *a.values.shape[1:]))


def advise_hugepages_(tensor: Tensor) -> Tensor:
    """Asks the system for huge pages under a contiguous CPU tensor of 4 MiB or more (Linux).

    Worth most between :func:`torch.empty` and the first write.
    """
    operators.advise_hugepages_(tensor)
    return tensor


@fake("advise_hugepages_")
def _(a: SimpleNamespace) -> Any:
    return None


def touch_rows_(tensor: Tensor, rows: Tensor, *, write: bool) -> Tensor:
    """Reads ``rows (U)``, increasing, of ``tensor (N, d)``, or inverts every bit of them (twice is as
    before), and does nothing else: the memory bound of operators on the same rows.

    Returns the exclusive or of the bits of all numbers read, int64 (1).
    """
    seen = operators.touch_rows_(tensor, rows, write)
    if write:
        torch.autograd.graph.increment_version(tensor)
    return seen


@fake("touch_rows_")
def _(a: SimpleNamespace) -> Any:
    return a.rows.new_empty((1,))


def rows_to_dense(rows: Tensor, values: Tensor, neurons: int) -> Tensor:
    """A zero (neurons, ...) tensor whose ``rows`` are ``values`` (U, ...)."""
    return operators.rows_to_dense(rows, values, neurons)


@fake("rows_to_dense")
def _(a: SimpleNamespace) -> Any:
    return a.values.new_empty((a.neurons, *a.values.shape[1:]))


def _save_rows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


torch.library.register_autograd(
    "slide_torch::rows_to_dense",
    lambda ctx, grad: (None, grad.index_select(0, ctx.saved_tensors[0]), None),
    setup_context=_save_rows,
)


torch.library.define(
    "slide_torch::widened_rows",
    "(Tensor parameter, Tensor rows, bool sparse) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def widened_rows(parameter: Tensor, rows: Tensor, sparse: bool) -> Tensor:
    """``parameter[rows]`` in float32, (U, ...), of a bfloat16 ``parameter`` (N, ...) and ``rows`` int64 (U),
    strictly increasing. Differentiable: the gradient is bfloat16, row-sparse if ``sparse``."""
    refuse_transforms("widened_rows", parameter)
    return operators.widened_rows(parameter, rows, sparse)


@fake("widened_rows")
def _(a: SimpleNamespace) -> Any:
    shape = (a.rows.shape[0], *a.parameter.shape[1:])
    return a.parameter.new_empty(shape, dtype=torch.float32)


@torch.library.impl("slide_torch::widened_rows", "CPU")
def _(parameter: Tensor, rows: Tensor, sparse: bool) -> Tensor:
    return parameter.index_select(0, rows).float()


def _save_widened(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    parameter, rows, ctx.sparse = inputs
    ctx.neurons = parameter.shape[0]
    ctx.save_for_backward(rows)


def _widened_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (rows,) = ctx.saved_tensors
    return as_gradient(rows, grad.to(torch.bfloat16), ctx.neurons, ctx.sparse), None, None


torch.library.register_autograd(
    "slide_torch::widened_rows", _widened_backward, setup_context=_save_widened
)
