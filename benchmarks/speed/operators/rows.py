"""Row-sparse gradients and the optimizers that read them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from slide_torch import ops, optim
from slide_torch.ops.rows import coalesce_rows as coalesce

from .case import Case, case
from .problem import Problem


def row_gradient(p: Problem) -> Tensor:
    rows, shape = p.sample.rows, p.weight.shape
    values = 1e-3 * torch.randn(rows.numel(), p.width)
    return torch.sparse_coo_tensor(
        rows[None], values, shape, is_coalesced=True, check_invariants=False
    )


def stepper(make: Callable, param: Tensor, grad: Tensor) -> Callable[[], object]:
    parameter = nn.Parameter(param)
    parameter.grad = grad
    return make([parameter], lr=1e-9).step


@case
def adam_rows_(p: Problem) -> Case:
    grad, touched = row_gradient(p), p.row_bytes(p.sample.rows)
    ours = stepper(optim.Adam, p.weight, grad)
    theirs = stepper(torch.optim.SparseAdam, p.weight.clone(), grad)
    return Case(ours, {"row_update": 6 * touched, "read": touched}, peer=theirs)


@case
def adam_rows_on_ordinary_pages(p: Problem) -> Case:
    param = nn.Parameter(torch.zeros_like(p.weight))
    param.grad = row_gradient(p)
    optimizer = optim.Adam([param], lr=1e-9)
    optimizer.state[param] |= {key: torch.zeros_like(param) for key in ("exp_avg", "exp_avg_sq")}
    touched = p.row_bytes(p.sample.rows)
    return Case(optimizer.step, {"row_update": 6 * touched, "read": touched})


@case
def sgd_rows_(p: Problem) -> Case:
    grad, touched = row_gradient(p), p.row_bytes(p.sample.rows)
    ours = stepper(optim.SGD, p.weight, grad)
    theirs = stepper(torch.optim.SGD, p.weight.clone(), grad)
    return Case(ours, {"row_update": 2 * touched, "read": touched}, peer=theirs)


@case
def adagrad_rows_(p: Problem) -> Case:
    grad, touched = row_gradient(p), p.row_bytes(p.sample.rows)
    ours = stepper(optim.Adagrad, p.weight, grad)
    theirs = stepper(torch.optim.Adagrad, p.weight.clone(), grad)
    return Case(ours, {"row_update": 4 * touched, "read": touched}, peer=theirs)


@case
def rows_to_dense(p: Problem) -> Case:
    grad = row_gradient(p)
    rows, values = grad._indices()[0], grad._values()
    traffic = {"read": values.nbytes, "write": p.weight.nbytes}
    return Case(lambda: ops.rows_to_dense(rows, values, p.neurons), traffic, peer=grad.to_dense)


@case
def coalesce_rows(p: Problem) -> Case:
    """As many entries as the active rows; a quarter of them are duplicates."""
    entries = p.sample.rows.numel()
    indices = torch.randint(p.neurons, (1, entries))
    indices[:, 1::4] = indices[:, :-1:4][:, : indices[:, 1::4].shape[1]]
    values = torch.randn(entries, p.width)
    distinct = indices.unique().numel()
    loose = torch.sparse_coo_tensor(indices, values, p.weight.shape, check_invariants=False)
    return Case(
        lambda: coalesce(indices[0], values, p.neurons),
        {"row_read": values.nbytes, "write": 4 * p.width * distinct},
        peer=loose.coalesce,
    )
