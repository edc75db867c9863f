"""What the optimizers share: checks, states and row gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any, ClassVar, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .. import ops
from ..precision import DTYPES
from ..shards import loaded_state, saved_state

NOT_TRACED = "optimizers of slide_torch.optim step outside compiled graphs"


class RowGradient(NamedTuple):
    """A gradient of some rows of a parameter.

    Attributes:
        param: the parameter.
        rows: int64 (rows), increasing; None for all rows.
        values: their gradients, (rows, ...).
    """

    param: Tensor
    rows: Tensor | None
    values: Tensor


def refuse(where: str, expected: str, got: object, advice: str) -> NoReturn:
    raise ValueError(f"{where}: expected {expected}, got {got}: {advice}")


def check_number(name: str, value: Any, below: float = math.inf) -> None:
    if isinstance(value, Tensor):
        refuse(name, "a float", "a Tensor", "pass its .item()")
    if not isinstance(value, Real) or not 0.0 <= float(value) < below:
        limits = "0 or more" if below == math.inf else f"at least 0 and below {below:g}"
        refuse(name, "a finite number", repr(value), f"it must be {limits}")


def gradients(params: list[Tensor]) -> list[Tensor]:
    """The gradients of ``params``, each of which has one."""
    return [param.grad for param in params if param.grad is not None]


def _zeros_like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Optimizer state shaped like ``tensor``, on huge pages where the CPU has them."""
    state = torch.empty_like(tensor, dtype=dtype, requires_grad=False)
    sharded = is_traceable_wrapper_subclass(state)  # a DTensor
    if state.device.type == "cpu" and state.is_contiguous() and not sharded:
        ops.advise_hugepages_(state)
    return state.zero_()


def row_form(param: Tensor) -> tuple[torch.Size, torch.dtype]:
    """Shape and dtype of a state with one number a row, in float32 at least."""
    return param.shape[:1], torch.promote_types(param.dtype, torch.float32)


def _rounds_stochastically(param: Tensor) -> bool:
    """Whether kernels update a parameter that has a dense gradient."""
    return param.dtype == torch.bfloat16 and param.device.type == "cpu" and param.is_contiguous()


def _row_gradient(where: str, param: Tensor, grad: Tensor) -> RowGradient:
    """The distinct rows of a sparse gradient in increasing order, and their values.

    Raises:
        ValueError: no kernel supports such a gradient or parameter.
    """
    if grad.layout != torch.sparse_coo:
        advice = "call to_dense() on it, or make it sparse_coo with one sparse dimension"
        refuse(where, "a strided or sparse_coo gradient", grad.layout, advice)
    if param.dtype not in DTYPES or grad.dtype != param.dtype:
        advice = "keep this layer in float32, or give it a dense gradient (sparse=False)"
        dtypes = f"parameter {param.dtype}, gradient {grad.dtype}"
        refuse(where, "float32, float64 or bfloat16 for a sparse gradient", dtypes, advice)
    if grad.shape != param.shape:
        advice = "set .grad to a gradient of this parameter"
        refuse(where, f"a gradient of shape {tuple(param.shape)}", tuple(grad.shape), advice)
    if grad.sparse_dim() != 1:
        advice = (
            "only rows may be sparse, as nn.EmbeddingBag(sparse=True) has it; or call to_dense()"
        )
        refuse(where, "a gradient with sparse_dim 1", grad.sparse_dim(), advice)
    if param.device.type != "cpu":
        advice = "move this layer to the CPU, or give it a dense gradient (sparse=False)"
        refuse(where, "a CPU parameter for a sparse gradient", param.device, advice)
    if not param.is_contiguous():
        advice = "make it with nn.Parameter(tensor.contiguous())"
        strides = f"strides {param.stride()}"
        refuse(where, "a contiguous parameter for a sparse gradient", strides, advice)
    rows, values = grad._indices()[0].contiguous(), grad._values().contiguous()
    if rows.numel() > 0 and (rows.min() < 0 or rows.max() >= len(param)):
        outside = f"{int(rows.min())} to {int(rows.max())}"
        refuse(where, f"gradient rows in [0, {len(param)})", outside, "mend the indices")
    if not (rows[1:] > rows[:-1]).all():
        rows, values = ops.coalesce_rows(rows, values, len(param))
    return RowGradient(param, rows, values)


class RowOptimizer(Optimizer):
    """Base of the optimizers: a step collects and checks every gradient, then updates."""

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

    def _update_rows(self, group: dict[str, Any], gradient: RowGradient) -> None:
        raise NotImplementedError

    def _check_group(self, group: dict[str, Any]) -> None:
        name = f"slide_torch.optim.{type(self).__name__}"
        for key, value in self._fixed.items():
            if group.get(key, value) != value:
                refuse(f"{name}: {key}", str(value), group[key], "it has no other value here")
        for key in ("lr", "weight_decay"):
            check_number(f"{name}: {key}", group[key])
        self._check_options(name, group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict):
            self._check_group(self.defaults | param_group)
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """As torch's; the state of a sharded layer's rows as DTensors, like its parameters."""
        return saved_state(super().state_dict(), self.param_groups)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this optimizer, or of the torch optimizer of the same name."""
        state_dict = loaded_state(state_dict, self.param_groups)
        for saved in state_dict["param_groups"]:
            group = self.defaults | saved
            if isinstance(group["lr"], Tensor):
                group["lr"] = group["lr"].item()
            self._check_group(group)
        super().load_state_dict(state_dict)
        numbers = [number for saved in state_dict["param_groups"] for number in saved["params"]]
        owners = [(group, param) for group in self.param_groups for param in group["params"]]
        for number, (group, param) in zip(numbers, owners, strict=True):
            state, saved = self.state.get(param, {}), state_dict["state"].get(number, {})
            for key, value in state.items():
                if key != "step" and isinstance(value, Tensor):
                    value = value.to_dense()  # torch's momentum of sparse gradients is sparse
                    _, dtype = self._state_form(group, param, key)
                    # torch has cast it to the parameter's dtype, which may be narrower
                    exact = value if value.dtype == dtype else saved.get(key, value).to_dense()
                    state[key] = _zeros_like(value, dtype).copy_(exact)

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

    @torch.compiler.disable(reason=NOT_TRACED)
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient.

        All gradients are checked first: an error leaves every parameter unchanged.

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

    def _plan(self, index: int, group: dict[str, Any]) -> tuple[list[Tensor], list[RowGradient]]:
        """The parameters that torch updates, and the gradients that kernels take, all checked."""
        dense, row_sparse = [], []
        first = sum(len(earlier["params"]) for earlier in self.param_groups[:index])
        for i, param in enumerate(group["params"]):
            if param.grad is None:
                continue
            name = f" {group['param_names'][i]!r}" if "param_names" in group else ""
            where = f"slide_torch.optim.{type(self).__name__}: parameter {first + i}{name}"
            if not param.is_floating_point():
                refuse(where, "a real floating-point dtype", param.dtype, "leave it out")
            self._check_state(where, group, param)
            if param.grad.layout != torch.strided:
                self._check_row_options(where, group, "a sparse gradient")
                row_sparse.append(_row_gradient(where, param, param.grad))
            elif _rounds_stochastically(param):
                self._check_row_options(where, group, "a parameter in bfloat16")
                row_sparse.append(RowGradient(param, None, param.grad.contiguous()))
            else:
                dense.append(param)
        return dense, row_sparse

    def _state_form(
        self, group: dict[str, Any], param: Tensor, key: str
    ) -> tuple[torch.Size, torch.dtype]:
        """Shape and dtype of a state of ``param``, its step excepted."""
        return param.shape, param.dtype

    def _check_state(self, where: str, group: dict[str, Any], param: Tensor) -> None:
        for key, value in self.state.get(param, {}).items():
            if key == "step":
                continue
            shape, dtype = self._state_form(group, param, key)
            if value.shape != shape or value.dtype != dtype:
                advice = "load the state dict of this model, or make a new optimizer"
                got = f"{tuple(value.shape)} of {value.dtype}"
                refuse(where, f"{key} {tuple(shape)} of {dtype}", got, advice)

    def _can_fuse(self, param: Tensor) -> bool:
        # torch's fused CPU kernels walk tensors in storage order, whatever their strides say.
        tensors = (param, param.grad, *self.state.get(param, {}).values())
        return param.device.type == "cpu" and all(tensor.is_contiguous() for tensor in tensors)

    def _buffer(self, group: dict[str, Any], param: Tensor, key: str, fill: float = 0.0) -> Tensor:
        """A tensor of the state of ``param``, made at the first use."""
        state: dict[str, Tensor] = self.state[param]
        if key not in state:
            shape, dtype = self._state_form(group, param, key)
            alike = shape == param.shape
            state[key] = _zeros_like(param, dtype) if alike else param.new_zeros(shape, dtype=dtype)
            if fill != 0.0:
                state[key].fill_(fill)
        elif param.is_contiguous() and not state[key].is_contiguous():
            state[key] = state[key].contiguous()
        return state[key]

    def _rounding_step(self, param: Tensor) -> int:
        """Counts a step of a bfloat16 parameter and returns its number, which seeds the rounding; 0 for other
        parameters, which count no steps here."""
        return int(self._steps(param).add_(1)) if param.dtype == torch.bfloat16 else 0

    def _steps(self, param: Tensor) -> Tensor:
        state: dict[str, Tensor] = self.state[param]
        return state.setdefault("step", torch.tensor(0.0, dtype=torch.float32))
