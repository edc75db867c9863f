"""Optimizers for models where some gradients are row-sparse: one optimizer for the whole model.

Row-sparse gradients (``torch.sparse_coo`` with one sparse dimension, as from ``nn.EmbeddingBag``
with ``sparse=True``) update the touched rows only, in one pass over their memory. Dense gradients
get torch's own update. State dicts load into, and from, the torch optimizer of the same name.

Parameters in bfloat16 (contiguous, on the CPU) are updated in float32 and, with their states, rounded
stochastically: up or down with the probability that makes the mean right, since rounded to nearest what
moves by less than 1/512 of itself would never move. The random bits are a hash of step and element: no
generator is drawn from, and the result is the same at any number of threads and on every replica.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Real
from typing import Any, ClassVar, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adagrad import adagrad
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from . import fused_backward, optim_ops
from .bfloat16 import DTYPES

__all__ = ["SGD", "Adagrad", "Adam"]

_NOT_TRACED = "optimizers of slide_torch.optim step outside compiled graphs"


class _RowGradient(NamedTuple):
    param: Tensor
    rows: Tensor | None  # None: all
    values: Tensor


def _refuse(where: str, expected: str, got: object, advice: str) -> NoReturn:
    raise ValueError(f"{where}: expected {expected}, got {got}: {advice}")


def _check_number(name: str, value: Any, below: float = math.inf) -> None:
    if isinstance(value, Tensor):
        _refuse(name, "a float", "a Tensor", "pass its .item()")
    if not isinstance(value, Real) or not 0.0 <= float(value) < below:
        limits = "0 or more" if below == math.inf else f"at least 0 and below {below:g}"
        _refuse(name, "a finite number", repr(value), f"it must be {limits}")


def _zeros_like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Optimizer state shaped like ``tensor``; under huge pages where they pay."""
    state = torch.empty_like(tensor, dtype=dtype, requires_grad=False)
    if state.device.type == "cpu" and state.is_contiguous():
        optim_ops.advise_hugepages_(state)
    return state.zero_()


def _rounds_stochastically(param: Tensor) -> bool:
    """Whether kernels update a parameter that has a dense gradient."""
    return param.dtype == torch.bfloat16 and param.device.type == "cpu" and param.is_contiguous()


def _row_gradient(where: str, param: Tensor, grad: Tensor) -> _RowGradient:
    """Distinct rows, increasing, and their values; ValueError for what no kernel takes."""
    if grad.layout != torch.sparse_coo:
        advice = "call to_dense() on it, or make it sparse_coo with one sparse dimension"
        _refuse(where, "a strided or sparse_coo gradient", grad.layout, advice)
    if param.dtype not in DTYPES or grad.dtype != param.dtype:
        advice = "keep this layer in float32, or give it a dense gradient (sparse=False)"
        dtypes = f"parameter {param.dtype}, gradient {grad.dtype}"
        _refuse(where, "float32, float64 or bfloat16 for a sparse gradient", dtypes, advice)
    if grad.shape != param.shape:
        advice = "set .grad to a gradient of this parameter"
        _refuse(where, f"a gradient of shape {tuple(param.shape)}", tuple(grad.shape), advice)
    if grad.sparse_dim() != 1:
        advice = (
            "only rows may be sparse, as nn.EmbeddingBag(sparse=True) has it; or call to_dense()"
        )
        _refuse(where, "a gradient with sparse_dim 1", grad.sparse_dim(), advice)
    if param.device.type != "cpu":
        advice = "move this layer to the CPU, or give it a dense gradient (sparse=False)"
        _refuse(where, "a CPU parameter for a sparse gradient", param.device, advice)
    if not param.is_contiguous():
        advice = "make it with nn.Parameter(tensor.contiguous())"
        strides = f"strides {param.stride()}"
        _refuse(where, "a contiguous parameter for a sparse gradient", strides, advice)
    rows, values = grad._indices()[0].contiguous(), grad._values().contiguous()
    if rows.numel() > 0 and (rows.min() < 0 or rows.max() >= len(param)):
        outside = f"{int(rows.min())} to {int(rows.max())}"
        _refuse(where, f"gradient rows in [0, {len(param)})", outside, "mend the indices")
    if not (rows[1:] > rows[:-1]).all():
        rows, values = optim_ops.coalesce_rows(rows, values, len(param))
    return _RowGradient(param, rows, values)


class _RowOptimizer(Optimizer):
    """What the three share: collect and check every gradient, then update."""

    # Options in state dicts of torch's optimizer that have one value here.
    _fixed: ClassVar[dict[str, Any]] = {"differentiable": False}
    # Options torch reads from our state dict; whatever they hold changes nothing here.
    _ignored: ClassVar[dict[str, Any]] = {"foreach": None, "fused": None}

    def __init__(self, params: Any, **defaults: Any) -> None:
        super().__init__(params, defaults | self._fixed | self._ignored)

    def _check_options(self, name: str, group: dict[str, Any]) -> None:
        raise NotImplementedError

    def _check_row_options(self, where: str, group: dict[str, Any], what: str) -> None:
        pass

    def _update_dense(self, group: dict[str, Any], params: list[Tensor], fused: bool) -> None:
        raise NotImplementedError

    def _update_rows(self, group: dict[str, Any], gradient: _RowGradient) -> None:
        raise NotImplementedError

    def _check_group(self, group: dict[str, Any]) -> None:
        name = f"slide_torch.optim.{type(self).__name__}"
        for key, value in self._fixed.items():
            if group.get(key, value) != value:
                _refuse(f"{name}: {key}", str(value), group[key], "it has no other value here")
        for key in ("lr", "weight_decay"):
            _check_number(f"{name}: {key}", group[key])
        self._check_options(name, group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict):
            self._check_group(self.defaults | param_group)
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this optimizer, or of the torch optimizer of the same name."""
        for saved in state_dict["param_groups"]:
            group = self.defaults | saved
            if isinstance(group["lr"], Tensor):
                group["lr"] = group["lr"].item()
            self._check_group(group)
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state.get(param, {})
                for key, value in state.items():
                    if key != "step" and isinstance(value, Tensor):
                        value = value.to_dense()  # torch's momentum of sparse gradients is sparse
                        dtype = self._state_dtype(group, param)
                        state[key] = _zeros_like(value, dtype).copy_(value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
            if isinstance(group["lr"], Tensor):
                group["lr"] = group["lr"].item()
        for of_param in self.state.values():
            if "step" in of_param:
                of_param["step"] = torch.tensor(float(of_param["step"]), dtype=torch.float32)

    @torch.compiler.disable(reason=_NOT_TRACED)
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Updates every parameter that has a gradient.

        All gradients are checked first: when one is refused, no parameter has changed.

        Args:
            closure: reevaluates the model and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        plans = [self._plan(index, group) for index, group in enumerate(self.param_groups)]
        for group, (dense, row_sparse) in zip(self.param_groups, plans, strict=True):
            alike = [self._can_fuse(param) for param in dense]
            for fused in (True, False):
                params = [param for param, can in zip(dense, alike, strict=True) if can is fused]
                if params:
                    self._update_dense(group, params, fused)
                if fused:  # torch's fused kernels do not count as in-place changes by themselves
                    torch.autograd.graph.increment_version(params)
            for gradient in row_sparse:
                self._update_rows(group, gradient)
        return loss

    def _plan(self, index: int, group: dict[str, Any]) -> tuple[list[Tensor], list[_RowGradient]]:
        """The parameters that torch updates, and the gradients that kernels take, all checked."""
        dense, row_sparse = [], []
        first = sum(len(earlier["params"]) for earlier in self.param_groups[:index])
        for i, param in enumerate(group["params"]):
            if param.grad is None:
                continue
            name = f" {group['param_names'][i]!r}" if "param_names" in group else ""
            where = f"slide_torch.optim.{type(self).__name__}: parameter {first + i}{name}"
            if not param.is_floating_point():
                _refuse(where, "a real floating-point dtype", param.dtype, "leave it out")
            self._check_state(where, group, param)
            if param.grad.layout != torch.strided:
                self._check_row_options(where, group, "a sparse gradient")
                row_sparse.append(_row_gradient(where, param, param.grad))
            elif _rounds_stochastically(param):
                self._check_row_options(where, group, "a parameter in bfloat16")
                row_sparse.append(_RowGradient(param, None, param.grad.contiguous()))
            else:
                dense.append(param)
        return dense, row_sparse

    def _state_dtype(self, group: dict[str, Any], param: Tensor) -> torch.dtype:
        """The dtype of all states of ``param`` but its step."""
        return param.dtype

    def _check_state(self, where: str, group: dict[str, Any], param: Tensor) -> None:
        dtype = self._state_dtype(group, param)
        for key, value in self.state.get(param, {}).items():
            if key == "step" or (value.shape == param.shape and value.dtype == dtype):
                continue
            advice = "load the state dict of this model, or make a new optimizer"
            got = f"{tuple(value.shape)} of {value.dtype}"
            _refuse(where, f"{key} {tuple(param.shape)} of {dtype}", got, advice)

    def _can_fuse(self, param: Tensor) -> bool:
        # torch's fused CPU kernels walk tensors in storage order, whatever their strides say.
        tensors = (param, param.grad, *self.state.get(param, {}).values())
        return param.device.type == "cpu" and all(tensor.is_contiguous() for tensor in tensors)

    def _buffer(self, group: dict[str, Any], param: Tensor, key: str, fill: float = 0.0) -> Tensor:
        """A tensor of the state of ``param``, made at the first use."""
        state = self.state[param]
        if key not in state:
            state[key] = _zeros_like(param, self._state_dtype(group, param))
            if fill != 0.0:
                state[key].fill_(fill)
        elif param.is_contiguous() and not state[key].is_contiguous():
            state[key] = state[key].contiguous()
        return state[key]

    def _rounding_step(self, param: Tensor) -> int:
        """What seeds the rounding of a bfloat16 parameter at this step; 0 for others, which count none."""
        return int(self._steps(param).add_(1)) if param.dtype == torch.bfloat16 else 0

    def _steps(self, param: Tensor) -> Tensor:
        return self.state[param].setdefault("step", torch.tensor(0.0, dtype=torch.float32))


class Adam(_RowOptimizer):
    r"""Adam with decoupled weight decay, for dense and row-sparse gradients.

    On dense gradients it is :class:`torch.optim.AdamW` (with ``weight_decay=0``,
    :class:`torch.optim.Adam`), on row-sparse ones :class:`torch.optim.SparseAdam`: the moments of
    rows that are not touched stand still, and bias correction counts the steps of the parameter.

    Args:
        params: parameters, named parameters or parameter groups to optimize.
        lr: learning rate.
        betas: decay of the running averages of the gradient and of its square.
        eps: added to the denominator.
        weight_decay: what is updated first shrinks by ``lr * weight_decay`` of itself; with a
            row-sparse gradient that is the touched rows.
        maximize: ascend instead of descend.
        fuse_backward: update the weight of a layer with ``sparse=True`` inside ``backward()``, where
            its gradient rows are still in the cache, instead of handing them over to :meth:`step`. The
            result is the same bit for bit; the gradient (``weight.grad``) is never there to see, clip,
            unscale or accumulate: hooks on the weight, ``create_graph=True`` and an enabled
            ``GradScaler`` are refused. It needs one backward between two steps, and the loss to be the
            weight's only use. A backward that is not asked for the weight's gradient
            (``torch.autograd.grad(loss, input)``, ``backward(inputs=[...])``) leaves the weight alone, and
            ``torch.autograd.grad(loss, weight)`` returns its gradient. Cross entropy without label
            smoothing (which is refused) does so; binary cross entropy hands its gradient to :meth:`step` as
            ever. Also an option of a parameter group.
        moments_dtype: ``torch.bfloat16`` keeps both moments of float32 parameters in half the memory and
            moves 16 instead of 24 bytes an element of an update. They are rounded stochastically: up or
            down with the probability that makes the mean right, since rounded to nearest the second
            moment would never move by less than 1/256 of itself, as ``1 - betas[1]`` asks. The random
            bits are a hash of step and element: no generator is drawn from, and the result is the same
            at any number of threads and on every replica of a model. Arithmetic and parameters stay
            float32. ``None``: the dtype of the parameter; of a bfloat16 one, rounded so too. Also an option
            of a parameter group.

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
    ) -> None:
        self._fused: set[int] = (
            set()
        )  # ids of the parameters updated by backward since the last step
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
        )

    def _check_options(self, name: str, group: dict[str, Any]) -> None:
        betas = group["betas"]
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            _refuse(f"{name}: betas", "two floats", repr(betas), "pass for example (0.9, 0.999)")
        for index, beta in enumerate(betas):
            _check_number(f"{name}: betas[{index}]", beta, below=1.0)
        _check_number(f"{name}: eps", group["eps"])
        if not group["decoupled_weight_decay"] and group["weight_decay"] != 0:
            got = f"the L2 penalty {group['weight_decay']} of torch.optim.Adam"
            _refuse(name, "decoupled weight decay", got, "set its weight_decay to 0 before loading")

        if not isinstance(group["fuse_backward"], bool):
            _refuse(
                f"{name}: fuse_backward",
                "a bool",
                repr(group["fuse_backward"]),
                "pass True or False",
            )
        if group["moments_dtype"] not in (None, torch.bfloat16):
            got = repr(group["moments_dtype"])
            _refuse(f"{name}: moments_dtype", "None or torch.bfloat16", got, "pass one of them")

    def _state_dtype(self, group: dict[str, Any], param: Tensor) -> torch.dtype:
        return group["moments_dtype"] or param.dtype

    def _check_state(self, where: str, group: dict[str, Any], param: Tensor) -> None:
        plain = param.dtype in (torch.float32, torch.bfloat16) and param.device.type == "cpu"
        if group["moments_dtype"] is not None and not (plain and param.is_contiguous()):
            layout = "contiguous" if param.is_contiguous() else "not contiguous"
            got = f"{param.dtype} on {param.device}, {layout}"
            advice = "put this parameter into a param group with moments_dtype=None"
            _refuse(
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
            fused_backward.register(param, self, fuse=group["fuse_backward"])

    @contextmanager
    def fused_step(self, param: Tensor) -> Iterator[dict[str, Any]]:
        """For backward: states and scalars of this step of ``param``; it counts unless the block raises.

        Raises:
            RuntimeError: a second backward before :meth:`step`, or hooks that wait for a gradient.
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

    def _plan(self, index: int, group: dict[str, Any]) -> tuple[list[Tensor], list[_RowGradient]]:
        for param in group["params"]:
            if param.grad is not None and id(param) in self._fused:
                raise RuntimeError(
                    "slide_torch.optim.Adam: fuse_backward: backward has updated a parameter of shape "
                    f"{tuple(param.shape)} that has a gradient from another use too, which would be a "
                    "second step: set fuse_backward=False for its group"
                )
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

    @torch.compiler.disable(reason=_NOT_TRACED)
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """As :meth:`_RowOptimizer.step`; ends what ``fuse_backward`` has begun."""
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

    def _update_dense(self, group: dict[str, Any], params: list[Tensor], fused: bool) -> None:
        if group["moments_dtype"] is not None:
            for param in params:
                assert param.grad is not None
                self._apply(group, param, None, param.grad.contiguous())
            return
        adam(
            params,
            [param.grad for param in params],  # type: ignore[misc]
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

    def _update_rows(self, group: dict[str, Any], gradient: _RowGradient) -> None:
        self._apply(group, *gradient)

    def _apply(
        self, group: dict[str, Any], param: Tensor, rows: Tensor | None, gradient: Tensor
    ) -> None:
        steps = int(self._steps(param).add_(1))
        scalars = self._scalars(group)
        if rows is None:  # the kernel adds SparseAdam's eps, before bias correction
            scalars["eps"] *= math.sqrt(1 - scalars["beta2"] ** steps)
        optim_ops.adam_rows_(
            param,
            self._buffer(group, param, "exp_avg"),
            self._buffer(group, param, "exp_avg_sq"),
            rows,
            gradient,
            step=steps,
            **scalars,
        )


class SGD(_RowOptimizer):
    r""":class:`torch.optim.SGD`, for dense and row-sparse gradients.

    On row-sparse gradients, rows that are not touched stay as they are, momentum included (torch
    goes on moving every row ever touched), and ``weight_decay`` is added to the gradient of the
    touched rows (torch refuses it). Without either, the result is torch's.

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
            _check_number(f"{name}: {key}", group[key])
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            got = f"momentum {group['momentum']} and dampening {group['dampening']}"
            _refuse(f"{name}: nesterov", "a momentum and no dampening", got, "set them so")

    def _check_row_options(self, where: str, group: dict[str, Any], what: str) -> None:
        if group["momentum"] != 0 and group["dampening"] != 0:
            advice = "put this parameter into a param group without it"
            _refuse(where, f"dampening 0 for {what}", group["dampening"], advice)

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
                [param.grad for param in part],  # type: ignore[misc]
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

    def _update_rows(self, group: dict[str, Any], gradient: _RowGradient) -> None:
        param, rows, values = gradient
        optim_ops.sgd_rows_(
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


class Adagrad(_RowOptimizer):
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
            _check_number(f"{name}: {key}", group[key])

    def _check_row_options(self, where: str, group: dict[str, Any], what: str) -> None:
        if group["weight_decay"] != 0:
            advice = "put this parameter into a param group without it"
            _refuse(where, f"weight_decay 0 for {what}", group["weight_decay"], advice)

    def _sum(self, group: dict[str, Any], param: Tensor) -> Tensor:
        return self._buffer(group, param, "sum", group["initial_accumulator_value"])

    def _update_dense(self, group: dict[str, Any], params: list[Tensor], fused: bool) -> None:
        adagrad(
            params,
            [param.grad for param in params],  # type: ignore[misc]
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

    def _update_rows(self, group: dict[str, Any], gradient: _RowGradient) -> None:
        param, rows, values = gradient
        steps = self._steps(param).add_(1)
        optim_ops.adagrad_rows_(
            param,
            self._sum(group, param),
            rows,
            values,
            lr=float(group["lr"]) / (1 + (float(steps) - 1) * group["lr_decay"]),
            eps=group["eps"],
            maximize=group["maximize"],
            step=int(steps),
        )
