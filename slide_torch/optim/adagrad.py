"""Adagrad for dense and row-sparse gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.adagrad import adagrad

from .. import ops
from .base import RowGradient, RowOptimizer, check_number, gradients, refuse, row_form


class Adagrad(RowOptimizer):
    r""":class:`torch.optim.Adagrad`, for dense and row-sparse gradients.

    Args:
        params: parameters, named parameters or parameter groups to optimize.
        lr: learning rate.
        lr_decay: the t-th step uses ``lr / (1 + (t - 1) * lr_decay)``.
        weight_decay: L2 penalty; for dense gradients only, as in torch. With ``row_wise`` it is decoupled, as
            in :class:`torch.optim.AdamW`: each updated row is first multiplied by ``1 - lr * weight_decay``,
            with the ``lr`` of that step. With a row-sparse gradient only the rows of the gradient decay.
        initial_accumulator_value: where the sum of squares starts.
        eps: added to the denominator.
        maximize: ascend instead of descend.
        row_wise: keep one number a row instead of one an element: a row of a parameter ``(N, ...)`` adds
            the mean of its squared gradients to its number, and all its elements are divided by the root
            of that one number. The state of a parameter ``(N, d)`` is then ``sum`` ``(N)``, in float32 for
            parameters of lower precision too. A parameter of one dimension has rows of one element. Can be
            set for each parameter group, and is part of the state dict. States of
            :class:`torch.optim.Adagrad` with one number an element raise an error in :meth:`step`.

    The row-wise sum is that of `FBGEMM <https://docs.pytorch.org/FBGEMM/>`_'s row-wise Adagrad, after
    `Duchi et al., Adaptive Subgradient Methods <https://jmlr.org/papers/v12/duchi11a.html>`_.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        *,
        maximize: bool = False,
        row_wise: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            lr_decay=lr_decay,
            weight_decay=weight_decay,
            initial_accumulator_value=initial_accumulator_value,
            eps=eps,
            maximize=maximize,
            row_wise=row_wise,
        )

    def _check_options(self, name: str, group: dict[str, Any]) -> None:
        for key in ("lr_decay", "initial_accumulator_value", "eps"):
            check_number(f"{name}: {key}", group[key])
        if not isinstance(group["row_wise"], bool):
            refuse(f"{name}: row_wise", "a bool", repr(group["row_wise"]), "pass True or False")

    def _check_row_options(self, where: str, group: dict[str, Any], what: str) -> None:
        if group["weight_decay"] != 0 and not group["row_wise"]:
            advice = "put this parameter into a param group without it, or set row_wise=True"
            refuse(where, f"weight_decay 0 for {what}", group["weight_decay"], advice)

    def _state_form(
        self, group: dict[str, Any], param: Tensor, key: str
    ) -> tuple[torch.Size, torch.dtype]:
        return row_form(param) if group["row_wise"] else super()._state_form(group, param, key)

    def _sum(self, group: dict[str, Any], param: Tensor) -> Tensor:
        return self._buffer(group, param, "sum", group["initial_accumulator_value"])

    def _decayed_rate(self, group: dict[str, Any], param: Tensor) -> tuple[float, int]:
        """Counts a step of ``param``; its learning rate and number."""
        steps = int(self._steps(param).add_(1))
        return float(group["lr"]) / (1 + (steps - 1) * group["lr_decay"]), steps

    def _update_dense(self, group: dict[str, Any], params: list[Tensor], fused: bool) -> None:
        if group["row_wise"]:
            for param, gradient in zip(params, gradients(params), strict=True):
                if group["maximize"]:
                    gradient = -gradient
                lr, _ = self._decayed_rate(group, param)
                if group["weight_decay"] != 0:
                    param.mul_(1 - lr * group["weight_decay"])
                # multiplied and subtracted apart: fused, they may round by where a thread begins
                param.sub_(self._over_row_sums(group, RowGradient(param, None, gradient)).mul_(lr))
            return
        adagrad(
            params,
            gradients(params),
            [self._sum(group, param) for param in params],
            [self._steps(param) for param in params],
            fused=fused,
            foreach=False,
            lr=float(group["lr"]),
            weight_decay=group["weight_decay"],
            lr_decay=group["lr_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )

    def _update_rows(self, group: dict[str, Any], gradient: RowGradient) -> None:
        param, rows, values = gradient
        lr, step = self._decayed_rate(group, param)
        if group["row_wise"]:
            # one number a row divides its gradient, and the step is then SGD's, whose L2 penalty is a
            # decoupled decay here; a bfloat16 gradient is rounded to nearest, of which nothing accumulates,
            # and the parameter stochastically
            scaled = self._over_row_sums(group, gradient).to(values.dtype)
            ops.sgd_rows_(
                param,
                None,
                rows,
                scaled,
                lr=lr,
                momentum=0.0,
                weight_decay=group["weight_decay"],
                nesterov=False,
                maximize=group["maximize"],
                step=step,
            )
            return
        ops.adagrad_rows_(
            param,
            self._sum(group, param),
            rows,
            values,
            lr=lr,
            eps=group["eps"],
            maximize=group["maximize"],
            step=step,
        )

    def _over_row_sums(self, group: dict[str, Any], gradient: RowGradient) -> Tensor:
        """Adds to the sum of each row of ``gradient``, and returns its values divided by the sums' roots."""
        param, rows, values = gradient
        sums = self._sum(group, param)
        mean = _mean_square_of_rows(values, sums.dtype)
        if rows is None:
            sums.add_(mean)
        else:
            sums = sums.index_add_(0, rows, mean)[rows]
        ones = (1,) * (values.dim() - sums.dim())
        return values / sums.sqrt().add_(group["eps"]).view(sums.shape + ones)


def _mean_square_of_rows(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The mean of the squares of each row of ``values`` (U, ...), (U)."""
    if values.dim() < 2:
        return values.to(dtype).square()
    norms: Tensor = torch.linalg.vector_norm(values, dim=tuple(range(1, values.dim())), dtype=dtype)
    return norms.square_().div_(max(1, values[:1].numel()))
