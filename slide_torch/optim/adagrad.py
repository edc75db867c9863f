"""Adagrad for dense and row-sparse gradients."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.adagrad import adagrad

from .. import ops
from .base import RowGradient, RowOptimizer, check_number, gradients, refuse


class Adagrad(RowOptimizer):
    r""":class:`torch.optim.Adagrad`, for dense and row-sparse gradients.

    Args:
        params: parameters, named parameters or parameter groups to optimize.
        lr: learning rate.
        lr_decay: the t-th step uses ``lr / (1 + (t - 1) * lr_decay)``.
        weight_decay: L2 penalty; for dense gradients only, as in torch.
        initial_accumulator_value: where the sum of squares starts.
        eps: added to the denominator.
        maximize: ascend instead of descend.
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
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            lr_decay=lr_decay,
            weight_decay=weight_decay,
            initial_accumulator_value=initial_accumulator_value,
            eps=eps,
            maximize=maximize,
        )

    def _check_options(self, name: str, group: dict[str, Any]) -> None:
        for key in ("lr_decay", "initial_accumulator_value", "eps"):
            check_number(f"{name}: {key}", group[key])

    def _check_row_options(self, where: str, group: dict[str, Any], what: str) -> None:
        if group["weight_decay"] != 0:
            advice = "put this parameter into a param group without it"
            refuse(where, f"weight_decay 0 for {what}", group["weight_decay"], advice)

    def _sum(self, group: dict[str, Any], param: Tensor) -> Tensor:
        return self._buffer(group, param, "sum", group["initial_accumulator_value"])

    def _update_dense(self, group: dict[str, Any], params: list[Tensor], fused: bool) -> None:
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
        steps = self._steps(param).add_(1)
        ops.adagrad_rows_(
            param,
            self._sum(group, param),
            rows,
            values,
            lr=float(group["lr"]) / (1 + (float(steps) - 1) * group["lr_decay"]),
            eps=group["eps"],
            maximize=group["maximize"],
            step=int(steps),
        )
