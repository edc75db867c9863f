"""Adam and AdamW for dense and row-sparse gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.adam import adam

from .. import ops
from ..ops import fused_update
from .base import NOT_TRACED, RowGradient, RowOptimizer, check_number, gradients, refuse, row_form
from .deferred_decay import DeferredDecay


class Adam(RowOptimizer):
    r"""Adam with decoupled weight decay, for dense and row-sparse gradients.

    For dense gradients it is :class:`torch.optim.AdamW` (with ``weight_decay=0``,
    :class:`torch.optim.Adam`), for row-sparse ones :class:`torch.optim.SparseAdam`: rows without a
    gradient keep their values and moments, and bias correction counts the parameter's steps.

    Args:
        params: parameters, named parameters or parameter groups to optimize.
        lr: learning rate.
        betas: decay rates of the running averages of the gradient and of its square.
        eps: added to the denominator.
        weight_decay: decoupled weight decay: each updated row is first multiplied by
            ``1 - lr * weight_decay``. With a row-sparse gradient only the rows of the gradient decay, unless
            ``deferred_decay``.
        maximize: ascend instead of descend.
        fuse_backward: update the weight of a layer with ``sparse=True`` inside ``backward()``, while its
            gradient rows are still in the cache, instead of in :meth:`step`. The result is identical, bit
            for bit. There is no ``weight.grad`` to inspect, clip, unscale or accumulate, so hooks on the
            weight, ``create_graph=True`` and an enabled ``GradScaler`` raise an error. Each step takes
            exactly one backward, and the loss must be the only use of the weight. A backward that does not
            compute the weight's gradient (``torch.autograd.grad(loss, input)``,
            ``backward(inputs=[...])``) leaves the weight unchanged, and
            ``torch.autograd.grad(loss, weight)`` returns the gradient. Supported for cross entropy without
            label smoothing (with smoothing it raises an error); binary cross entropy still updates in
            :meth:`step`. Can be set for each parameter group.
        moments_dtype: ``torch.bfloat16`` stores both moments of float32 parameters in half the memory; an
            update then moves 16 bytes an element instead of 24. The moments are rounded stochastically, up
            or down with probabilities that keep their mean exact: with rounding to nearest, the second
            moment would stop moving, because ``1 - betas[1]`` is below bfloat16's resolution of 1/256. The
            random bits are a hash of step and element: no generator is used, and the result is the same at
            any number of threads and on every replica of a model. Arithmetic and parameters stay float32.
            ``None`` uses the parameter's dtype; moments of bfloat16 parameters are always rounded
            stochastically. Can be set for each parameter group.
        deferred_decay: rows without a gradient decay too, but later: a row that missed steps is multiplied by
            their product of ``1 - lr * weight_decay``, with the ``lr`` and ``weight_decay`` of each, when it
            next has a gradient, before its update. :meth:`apply_deferred_decay_` catches up all rows.
            Parameters are then those of a dense decay: for the same gradients, they are the result of steps
            of :class:`torch.optim.SparseAdam` before each of which *all* rows are multiplied by
            ``1 - lr * weight_decay``, as :class:`torch.optim.AdamW` does. (AdamW also moves rows without a
            gradient by their moments, unless ``betas=(0.0, 0.0)``.) They are equal up to rounding: a row is
            rounded once whenever it catches up, and the sum of logarithms that is kept for it has a relative
            error of 2^-24 (2^-53 for float64 parameters), whatever the number of steps. If a row has a
            gradient in every step, its bits are those without ``deferred_decay``. Between its steps a row is
            read as it was left, so catch up before evaluating or saving a model. The state is one number a
            row (float32, or float64 for float64 parameters) and one a parameter. Not with ``fuse_backward``,
            which updates rows while backward reads them. Can be set for each parameter group.

    Example::

        >>> optimizer = slide_torch.optim.Adam(model.parameters(), lr=1e-3)
        >>> F.cross_entropy(model(x), y).backward()
        >>> optimizer.step()
    """

    _fixed: ClassVar[dict[str, Any]] = {
        "differentiable": False,
        "amsgrad": False,
        "capturable": False,
    }

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        fuse_backward: bool = False,
        moments_dtype: torch.dtype | None = None,
        deferred_decay: bool = False,
    ) -> None:
        # ids of the parameters that backward has updated since the last step
        self._fused: set[int] = set()
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            maximize=maximize,
            decoupled_weight_decay=True,
            fuse_backward=fuse_backward,
            moments_dtype=moments_dtype,
            deferred_decay=deferred_decay,
        )

    def _check_options(self, name: str, group: dict[str, Any]) -> None:
        betas = group["betas"]
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            refuse(f"{name}: betas", "two floats", repr(betas), "pass for example (0.9, 0.999)")
        for index, beta in enumerate(betas):
            check_number(f"{name}: betas[{index}]", beta, below=1.0)
        check_number(f"{name}: eps", group["eps"])
        if not group["decoupled_weight_decay"] and group["weight_decay"] != 0:
            got = f"the L2 penalty {group['weight_decay']} of torch.optim.Adam"
            refuse(name, "decoupled weight decay", got, "set its weight_decay to 0 before loading")
        for key in ("fuse_backward", "deferred_decay"):
            if not isinstance(group[key], bool):
                refuse(f"{name}: {key}", "a bool", repr(group[key]), "pass True or False")
        if group["fuse_backward"] and group["deferred_decay"]:
            advice = "set one of them to False in this param group"
            got = "fuse_backward=True, which updates rows while backward reads them"
            refuse(f"{name}: deferred_decay", "fuse_backward=False", got, advice)
        if group["moments_dtype"] not in (None, torch.bfloat16):
            got = repr(group["moments_dtype"])
            refuse(f"{name}: moments_dtype", "None or torch.bfloat16", got, "pass one of them")

    def _state_form(
        self, group: dict[str, Any], param: Tensor, key: str
    ) -> tuple[torch.Size, torch.dtype]:
        if key == "log_decay":
            return row_form(param)
        if key == "log_decay_total":
            return torch.Size(()), torch.float64
        return param.shape, group["moments_dtype"] or param.dtype

    def _check_state(self, where: str, group: dict[str, Any], param: Tensor) -> None:
        plain = param.dtype in (torch.float32, torch.bfloat16) and param.device.type == "cpu"
        if group["moments_dtype"] is not None and not (plain and param.is_contiguous()):
            layout = "contiguous" if param.is_contiguous() else "not contiguous"
            got = f"{param.dtype} on {param.device}, {layout}"
            advice = "put this parameter into a param group with moments_dtype=None"
            refuse(
                where,
                "a contiguous float32 or bfloat16 CPU parameter for moments_dtype",
                got,
                advice,
            )
        super()._check_state(where, group, param)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self._register(self.param_groups[-1])

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._fused = set()
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True
            self._register(group)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # GradScaler asks: if true it calls step(), with `found_inf` set here, even where it would skip it
        return bool(self._fused)

    def _register(self, group: dict[str, Any]) -> None:
        for param in group["params"]:
            fused_update.register(param, self, fuse=group["fuse_backward"])

    def awaits_step(self, param: Tensor) -> bool:
        """Whether backward has updated ``param`` since the last step."""
        return id(param) in self._fused

    @contextmanager
    def fused_step(self, param: Tensor) -> Iterator[dict[str, Any]]:
        """Called by backward: the states and scalars of this step of ``param``. The step counts unless the
        block raises.

        Raises:
            RuntimeError: this is a second backward before :meth:`step`, or ``param`` has hooks.
        """
        name = "slide_torch.optim.Adam: fuse_backward"
        if param._backward_hooks or param._post_accumulate_grad_hooks:
            raise RuntimeError(
                f"{name}: expected a parameter without hooks, got one of shape {tuple(param.shape)} whose "
                "hooks wait for a gradient that is never there: remove them, or set fuse_backward=False"
            )
        if id(param) in self._fused:
            raise RuntimeError(
                f"{name}: expected one backward between two steps, got a second one: it would update "
                "the weight again instead of adding to its gradient. Call step() after each "
                "backward(), or set fuse_backward=False to accumulate gradients or to skip steps."
            )
        group = next(g for g in self.param_groups if any(p is param for p in g["params"]))
        self._check_state(name, group, param)
        steps = self._steps(param)
        yield {
            "exp_avg": self._buffer(group, param, "exp_avg"),
            "exp_avg_sq": self._buffer(group, param, "exp_avg_sq"),
            **self._scalars(group),
            "step": int(steps) + 1,
        }
        steps.add_(1)
        self._fused.add(id(param))

    def _plan(self, index: int, group: dict[str, Any]) -> tuple[list[Tensor], list[RowGradient]]:
        for param in group["params"]:
            if param.grad is not None and id(param) in self._fused:
                raise RuntimeError(
                    "slide_torch.optim.Adam: fuse_backward: backward has updated a parameter of shape "
                    f"{tuple(param.shape)} that has a gradient from another use too, which would be a "
                    "second step: set fuse_backward=False for its group"
                )
        lr, weight_decay = group["lr"], group["weight_decay"]
        if group["deferred_decay"] and not lr * weight_decay < 1:
            where = f"slide_torch.optim.Adam: deferred_decay: parameter group {index}"
            got = f"{lr} * {weight_decay}"
            refuse(where, "lr * weight_decay below 1", got, "decrease one of them")
        return super()._plan(index, group)

    @staticmethod
    def _scalars(group: dict[str, Any]) -> dict[str, Any]:
        return {
            "lr": float(group["lr"]),
            "beta1": group["betas"][0],
            "beta2": group["betas"][1],
            "eps": group["eps"],
            "weight_decay": group["weight_decay"],
            "maximize": group["maximize"],
        }

    @torch.compiler.disable(reason=NOT_TRACED)
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """As :meth:`RowOptimizer.step`; it also completes the step that ``fuse_backward`` began."""
        found_inf, _ = vars(self).pop("found_inf", None), vars(self).pop("grad_scale", None)
        if found_inf is not None:
            raise RuntimeError(
                "slide_torch.optim.Adam: fuse_backward: expected no GradScaler, got one that scales the "
                "loss: backward has updated the weight by the scaled gradient, and cannot skip a step: set "
                "fuse_backward=False, or pass enabled=False to the GradScaler (bfloat16 needs none)"
            )
        loss = super().step(closure)
        self._fused.clear()
        return loss

    @torch.no_grad()
    def apply_deferred_decay_(self) -> None:
        """Brings all rows of the parameter groups with ``deferred_decay`` up to date, in place.

        Before evaluating or saving a model. Training may go on after it: rows then decay from there, with
        other roundings than without the call. Call :meth:`slide_torch.LSHLinear.rehash` too if it does, as
        after other changes of all rows.
        """
        for group in self.param_groups:
            for param in group["params"]:
                if group["deferred_decay"] and "log_decay" in self.state.get(param, {}):
                    decay = self._deferred(group, param)
                    decay.catch_up_(None, int(self._steps(param)))
                    decay.mark_(None)

    def _deferred(self, group: dict[str, Any], param: Tensor) -> DeferredDecay:
        total = self._buffer(group, param, "log_decay_total")
        return DeferredDecay(param, total, self._buffer(group, param, "log_decay"))

    @contextmanager
    def _decaying(
        self, group: dict[str, Any], params: list[Tensor], rows: Tensor | None
    ) -> Iterator[None]:
        """Around a step of ``rows`` (None: all) of ``params``: they first catch up with their decay, and have
        that of the step after it."""
        decays = [self._deferred(group, param) for param in params if group["deferred_decay"]]
        for decay in decays:
            decay.catch_up_(rows, int(self._steps(decay.param)))
        yield
        for decay in decays:
            decay.count_(float(group["lr"]), group["weight_decay"])
            decay.mark_(rows)

    def _update_dense(self, group: dict[str, Any], params: list[Tensor], fused: bool) -> None:
        with self._decaying(group, params, None):
            self._step_dense(group, params, fused)

    def _step_dense(self, group: dict[str, Any], params: list[Tensor], fused: bool) -> None:
        if group["moments_dtype"] is not None:
            for param in params:
                assert param.grad is not None
                self._apply(group, param, None, param.grad.contiguous())
            return
        adam(
            params,
            gradients(params),
            [self._buffer(group, param, "exp_avg") for param in params],
            [self._buffer(group, param, "exp_avg_sq") for param in params],
            [],
            [self._steps(param) for param in params],
            fused=fused,
            foreach=False,
            decoupled_weight_decay=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=float(group["lr"]),
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )

    def _update_rows(self, group: dict[str, Any], gradient: RowGradient) -> None:
        with self._decaying(group, [gradient.param], gradient.rows):
            self._apply(group, *gradient)

    def _apply(
        self, group: dict[str, Any], param: Tensor, rows: Tensor | None, gradient: Tensor
    ) -> None:
        steps = int(self._steps(param).add_(1))
        scalars = self._scalars(group)
        if rows is None:  # the kernel adds SparseAdam's eps, before bias correction
            scalars["eps"] *= math.sqrt(1 - scalars["beta2"] ** steps)
        ops.adam_rows_(
            param,
            self._buffer(group, param, "exp_avg"),
            self._buffer(group, param, "exp_avg_sq"),
            rows,
            gradient,
            step=steps,
            **scalars,
        )
