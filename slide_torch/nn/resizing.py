"""Classes that come and go: rows of an output layer are added or removed, in place."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..checks import as_int, checked_int
from ..inference_mode import keeps_normal_tensors
from ..ops import fused_update
from ..optim.resizing import check_resizable, resized_rows, resized_states
from ..shards import shard_of
from ..storage import check_in_memory
from ..tables.resizing import resized
from . import linear_checks as checks
from . import replicas

if TYPE_CHECKING:
    from .linear import LSHLinear


class NewRows(NamedTuple):
    """Rows (n, d) of a weight, and their biases (n) where the layer has a bias."""

    weight: Tensor
    bias: Tensor | None


@torch.compiler.disable(reason="layers are resized outside compiled graphs")
@keeps_normal_tensors
@torch.no_grad()
def extend_(layer: LSHLinear, count_or_rows: Any, bias: Any, optimizer: Any) -> None:
    """Does what :meth:`LSHLinear.extend_` says, all of it or, with an error, nothing."""
    where = "LSHLinear.extend_"
    _check_layer(where, layer, optimizer)
    added = _new_rows(where, layer, count_or_rows, bias)
    if len(added.weight):
        _resize(layer, torch.arange(layer.out_features), added, optimizer)


@torch.compiler.disable(reason="layers are resized outside compiled graphs")
@keeps_normal_tensors
@torch.no_grad()
def drop_(layer: LSHLinear, ids: Any, optimizer: Any) -> Tensor:
    """Does what :meth:`LSHLinear.drop_` says, all of it or, with an error, nothing."""
    where = "LSHLinear.drop_"
    _check_layer(where, layer, optimizer)
    stays = torch.ones(layer.out_features, dtype=torch.bool)
    stays[_checked_ids(where, ids, layer.out_features)] = False
    kept = stays.nonzero().flatten()
    if len(kept) == 0:
        _refuse(f"{where}: ids", "at least one class that stays", "all of them", "make a new layer")
    if len(kept) < layer.out_features:
        none = NewRows(layer.weight[:0], None if layer.bias is None else layer.bias[:0])
        _resize(layer, kept, none, optimizer)
    return torch.where(stays, stays.cumsum(0) - 1, -1)


def _resize(layer: LSHLinear, kept: Tensor, added: NewRows, optimizer: Any) -> None:
    """Makes the rows ``kept`` (int64, increasing), then those ``added``, the rows of ``layer``."""
    parameters = [(layer.weight, added.weight)]
    if added.bias is not None:
        parameters.append((layer.bias, added.bias))
    values = [resized_rows(parameter, kept, rows) for parameter, rows in parameters]
    states = [resized_states(optimizer, param, kept, len(rows)) for param, rows in parameters]
    weight, bias = values if added.bias is not None else (values[0], None)
    tables = resized(layer.tables, layer.options, kept, weight, bias)
    # everything is made: from here on nothing can fail
    for (parameter, _), value, state in zip(parameters, values, states, strict=True):
        _replace_values(parameter, value)
        if state:
            optimizer.state[parameter].update(state)
    replicas.outgrow(layer.weight)
    layer.tables.become(tables)
    layer.out_features = layer.weight.shape[0]
    layer.calibration = None


def _replace_values(parameter: Tensor, value: Tensor) -> None:
    """Gives ``parameter`` the memory of ``value``, which may have another shape.

    Graphs that saved the old values must not run backward any more, which the version tells them. They may
    still live, as that of the last loss does, and keep the node that adds to the gradient, which only takes
    the old shape: torch makes a new one where the dtype changes, so that it does so for a moment.
    """
    parameter.data = torch.empty(0, dtype=torch.float16)
    parameter.data = value
    torch.autograd.graph.increment_version(parameter)


def _check_layer(where: str, layer: LSHLinear, optimizer: Any) -> None:
    """Checks that ``layer`` and the states of ``optimizer`` can be resized."""
    if layer.output == "dense":
        _refuse(
            f"{where}: output",
            "'sampled', whose neurons are classes",
            "'dense'",
            "make a new hidden layer",
        )
    checks.check_not_parametrized(where, layer)
    checks.check_parameters(where, layer, layer.tables, called=False)
    check_in_memory(where, weight=layer.weight, bias=layer.bias)
    parameters = {"weight": layer.weight, "bias": layer.bias}
    for name, parameter in parameters.items():
        if parameter is not None:
            _check_parameter(f"{where}: {name}", parameter)
    if optimizer is not None:
        present = [parameter for parameter in parameters.values() if parameter is not None]
        check_resizable(f"{where}: optimizer", optimizer, present)


def _check_parameter(where: str, parameter: Tensor) -> None:
    def refuse(got: str, advice: str) -> NoReturn:
        _refuse(where, "a whole Parameter of this process on the CPU", got, advice)

    if shard_of(parameter) is not None:
        refuse("this rank's rows of a sharded layer", "resize the layer before shard_")
    if is_traceable_wrapper_subclass(parameter) or getattr(parameter, "_fsdp_flattened", False):
        refuse(f"a sharded or quantised {type(parameter).__name__}", "resize the layer before that")
    if not isinstance(parameter, nn.Parameter) or parameter.is_inference():
        kind = "an inference tensor" if parameter.is_inference() else type(parameter).__name__
        refuse(kind, "assign an nn.Parameter made outside of inference mode")
    if parameter.device.type != "cpu":
        refuse(f"one on {parameter.device}", "move the layer to the CPU first")
    if parameter.is_shared():
        refuse("one in shared memory", "resize the layer before share_memory() and new processes")
    if parameter.grad is not None:
        _refuse(
            where,
            "no gradient",
            "one of the old shape",
            "call optimizer.step() if it is still to count, then optimizer.zero_grad()",
        )
    fusing = fused_update.optimizer_of(parameter)
    if fusing is not None and fusing.awaits_step(parameter):
        _refuse(where, "finished steps", "one that backward has begun", "call optimizer.step()")


def _new_rows(where: str, layer: LSHLinear, count_or_rows: Any, bias: Any) -> NewRows:
    """The rows to add, and biases for a layer that has them."""
    most = checks.MOST_NEURONS - layer.out_features
    dtype, d = layer.weight.dtype, layer.in_features
    if isinstance(count_or_rows, Tensor):
        _check_rows(f"{where}: count_or_rows", count_or_rows, (None, d), dtype)
        count = checked_int(len(count_or_rows), 0, most, f"{where}: count_or_rows", " rows")
    else:
        name = f"{where}: count_or_rows"
        count = checked_int(count_or_rows, 0, most, name, f", or a tensor (n, {d})")
    if bias is not None:
        if layer.bias is None:
            _refuse(f"{where}: bias", "None, as the layer has no bias", "some", "leave it out")
        _check_rows(f"{where}: bias", bias, (count,), dtype)
    if isinstance(count_or_rows, Tensor):
        rows = NewRows(count_or_rows, None if layer.bias is None else layer.bias.new_zeros(count))
    else:
        fresh = nn.Linear(d, count, layer.bias is not None, "cpu", dtype) if count else layer
        rows = NewRows(fresh.weight[:count], None if layer.bias is None else fresh.bias[:count])
    return rows if bias is None else rows._replace(bias=bias)


def _check_rows(where: str, rows: Any, shape: tuple[int | None, ...], dtype: torch.dtype) -> None:
    shown = str(shape).replace("None", "n")
    expected = f"a CPU tensor {shown} of {dtype}, as the layer's parameters are"
    if not isinstance(rows, Tensor) or rows.layout != torch.strided or rows.device.type != "cpu":
        got = f"{rows.layout} on {rows.device}" if isinstance(rows, Tensor) else type(rows).__name__
        _refuse(where, expected, got, "convert it")
    fits = rows.dim() == len(shape) and all(
        size is None or size == given for size, given in zip(shape, rows.shape, strict=True)
    )
    if not fits or rows.dtype != dtype:
        _refuse(where, expected, f"{tuple(rows.shape)} of {rows.dtype}", "give one row a new class")
    if not bool(torch.isfinite(rows).all()):
        _refuse(where, "finite numbers", "NaN or Inf", "leave classes without a start to a count")


def _checked_ids(where: str, ids: Any, neurons: int) -> Tensor:
    """``ids`` as int64 (n)."""
    name = f"{where}: ids"
    expected = "a tensor (n) of integers, or a list of them"
    if isinstance(ids, Tensor):
        if ids.dim() != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            advice = "of a mask give mask.nonzero().flatten()"
            _refuse(name, expected, f"{tuple(ids.shape)} of {ids.dtype}", advice)
        found = ids.detach().to("cpu", torch.int64)
    else:
        numbers = [as_int(one) for one in ids] if isinstance(ids, Iterable) else [None]
        if None in numbers:
            got = f"{type(ids).__name__}" if not isinstance(ids, Iterable) else "other values"
            _refuse(name, expected, got, "give class indices")
        found = torch.tensor(numbers, dtype=torch.int64)
    if len(found) and not 0 <= int(found.min()) <= int(found.max()) < neurons:
        got = f"{int(found.min())} to {int(found.max())}"
        _refuse(name, f"class indices from 0 to {neurons - 1}", got, "give present classes")
    return found


def _refuse(where: str, expected: str, got: str, advice: str) -> NoReturn:
    raise ValueError(f"{where}: expected {expected}, got {got}: {advice}")
