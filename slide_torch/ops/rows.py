"""Operators on some rows of a parameter: gradients, optimizer steps, copies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .library import operators, register_fake
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
    torch.ops.slide_torch.adam_rows_(
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
    torch.ops.slide_torch.sgd_rows_(
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
    torch.ops.slide_torch.adagrad_rows_(param, sum, rows, grad_rows, lr, eps, maximize, step)
    torch.autograd.graph.increment_version((param, sum))


def coalesce_rows(indices: Tensor, values: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Sums the ``values (n, ...)`` of equal ``indices (n)``: distinct rows and their sums.

    Each sum is taken in the order of the entries: the same bit for bit at any number of threads. That of
    bfloat16 values is taken in float32.
    """
    wide = values.float() if values.dtype == torch.bfloat16 else values
    rows, sums = torch.ops.slide_torch.coalesce_rows(indices, wide, num_rows)
    return rows, sums.to(values.dtype)


def advise_hugepages_(tensor: Tensor) -> Tensor:
    """Asks the system for huge pages under a contiguous CPU tensor of 4 MiB or more (Linux).

    Worth most between :func:`torch.empty` and the first write.
    """
    torch.ops.slide_torch.advise_hugepages_(tensor)
    return tensor


def touch_rows_(tensor: Tensor, rows: Tensor, *, write: bool) -> Tensor:
    """Reads ``rows (U)``, increasing, of ``tensor (N, d)``, or inverts every bit of them (twice is as
    before), and does nothing else: the memory bound of operators on the same rows.

    Returns the exclusive or of the bits of all numbers read, int64 (1).
    """
    seen = torch.ops.slide_torch.touch_rows_(tensor, rows, write)
    if write:
        torch.autograd.graph.increment_version(tensor)
    return seen


@torch.library.register_fake("slide_torch::adam_rows_")
def _adam_rows_fake(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    rows: Tensor | None,
    grad_rows: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    maximize: bool,
) -> None:
    return None


@torch.library.register_fake("slide_torch::sgd_rows_")
def _sgd_rows_fake(
    param: Tensor,
    momentum_buffer: Tensor | None,
    rows: Tensor | None,
    grad_rows: Tensor,
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    step: int = 0,
) -> None:
    return None


@torch.library.register_fake("slide_torch::adagrad_rows_")
def _adagrad_rows_fake(
    param: Tensor,
    sum: Tensor,
    rows: Tensor | None,
    grad_rows: Tensor,
    lr: float,
    eps: float,
    maximize: bool,
    step: int = 0,
) -> None:
    return None


@torch.library.register_fake("slide_torch::coalesce_rows")
def _coalesce_rows_fake(indices: Tensor, values: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    count = torch.library.get_ctx().new_dynamic_size(min=0)
    return indices.new_empty(count), values.new_empty((count, *values.shape[1:]))


@torch.library.register_fake("slide_torch::advise_hugepages_")
def _advise_hugepages_fake(t: Tensor) -> None:
    return None


@torch.library.register_fake("slide_torch::touch_rows_")
def _touch_rows_fake(t: Tensor, rows: Tensor, write: bool) -> Tensor:
    return rows.new_empty((1,))


def rows_to_dense(rows: Tensor, values: Tensor, neurons: int) -> Tensor:
    """A zero (neurons, ...) tensor whose ``rows`` are ``values`` (U, ...)."""
    return operators.rows_to_dense(rows, values, neurons)


@register_fake("slide_torch::rows_to_dense")
def _(rows: Any, values: Any, neurons: Any) -> Any:
    return values.new_empty((neurons, *values.shape[1:]))


def as_gradient(rows: Tensor, values: Tensor, neurons: int, sparse: bool) -> Tensor:
    """Gradient rows as torch's optimizers take them: row-sparse, or dense with zeros elsewhere."""
    if sparse:
        shape = (neurons, *values.shape[1:])
        return torch.sparse_coo_tensor(
            rows.unsqueeze(0), values, shape, is_coalesced=True, check_invariants=False
        )
    if statically_known_true(rows.shape[0] == neurons):
        return values
    return rows_to_dense(rows, values, neurons)


def _save_rows(ctx: Any, inputs: tuple, output: Tensor) -> None:
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


@torch.library.impl("slide_torch::widened_rows", "CPU")
def _(parameter: Tensor, rows: Tensor, sparse: bool) -> Tensor:
    return parameter.index_select(0, rows).float()


@register_fake("slide_torch::widened_rows")
def _(parameter: Any, rows: Any, sparse: Any) -> Any:
    return parameter.new_empty((rows.shape[0], *parameter.shape[1:]), dtype=torch.float32)


def _save_widened(ctx: Any, inputs: tuple, output: Tensor) -> None:
    parameter, rows, ctx.sparse = inputs
    ctx.neurons = parameter.shape[0]
    ctx.save_for_backward(rows)


def _widened_backward(ctx: Any, grad: Tensor) -> tuple:
    (rows,) = ctx.saved_tensors
    return as_gradient(rows, grad.to(torch.bfloat16), ctx.neurons, ctx.sparse), None, None


torch.library.register_autograd(
    "slide_torch::widened_rows", _widened_backward, setup_context=_save_widened
)
