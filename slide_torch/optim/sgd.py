"""SGD for dense and row-sparse gradients."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.sgd import sgd

from .. import ops
from .base import RowGradient, RowOptimizer, check_number, gradients, refuse


class SGD(RowOptimizer):
    r""":class:`torch.optim.SGD`, for dense and row-sparse gradients.

    With a row-sparse gradient, rows without a gradient keep their values and their momentum (torch keeps
    moving every row that ever had one), and ``weight_decay`` is added to the rows of the gradient (torch
    raises an error). Without momentum and weight decay the result is torch's.

    Args:
        params: parameters, named parameters or parameter groups to optimize.
        lr: learning rate.
        momentum: momentum factor.
        dampening: dampening of the momentum; for dense gradients only.
        weight_decay: L2 penalty.
        nesterov: Nesterov momentum; needs momentum and no dampening.
        maximize: ascend instead of descend.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            maximize=maximize,
        )

    def _check_options(self, name: str, group: dict[str, Any]) -> None:
        for key in ("momentum", "dampening"):
            check_number(f"{name}: {key}", group[key])
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            got = f"momentum {group['momentum']} and dampening {group['dampening']}"
            refuse(f"{name}: nesterov", "a momentum and no dampening", got, "set them so")

    def _check_row_options(self, where: str, group: dict[str, Any], what: str) -> None:
        if group["momentum"] != 0 and group["dampening"] != 0:
            advice = "put this parameter into a param group without it"
            refuse(where, f"dampening 0 for {what}", group["dampening"], advice)

    def _update_dense(self, group: dict[str, Any], params: list[Tensor], fused: bool) -> None:
        # A first step starts the buffer from the gradient; the fused kernel takes only first
        # steps, or none, in one call.
        parts: tuple[list[Tensor], list[Tensor]] = ([], [])
        for param in params:
            parts["momentum_buffer" in self.state.get(param, {})].append(param)
        for part in filter(None, parts):
            buffers = [self.state.get(param, {}).get("momentum_buffer") for param in part]
            sgd(
                part,
                gradients(part),
                buffers,
                fused=fused,
                foreach=False,
                lr=float(group["lr"]),
                momentum=group["momentum"],
                dampening=group["dampening"],
                weight_decay=group["weight_decay"],
                nesterov=group["nesterov"],
                maximize=group["maximize"],
            )
            if group["momentum"] != 0:
                for param, buffer in zip(part, buffers, strict=True):
                    self.state[param]["momentum_buffer"] = buffer

    def _update_rows(self, group: dict[str, Any], gradient: RowGradient) -> None:
        param, rows, values = gradient
        ops.sgd_rows_(
            param,
            self._buffer(group, param, "momentum_buffer") if group["momentum"] != 0 else None,
            rows,
            values,
            lr=float(group["lr"]),
            momentum=group["momentum"],
            weight_decay=group["weight_decay"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            step=self._rounding_step(param),
        )
