"""Optimizer states of a parameter that gains or loses rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import ops

# Where torch starts the states that do not start at 0, by the option that holds the value.
_STARTS = {"sum": "initial_accumulator_value", "step_size": "lr"}


def check_resizable(where: str, optimizer: Any, parameters: list[Tensor]) -> None:
    """Checks that ``optimizer`` has the first of ``parameters``, and states of them that can be resized.

    Args:
        where: function and argument, for the message.

    Raises:
        ValueError: it is no optimizer of these, or a state is not one number or one value an element.
    """
    if not isinstance(optimizer, Optimizer):
        raise ValueError(f"{where}: expected a torch optimizer, got {type(optimizer).__name__}")
    held = {id(param) for group in optimizer.param_groups for param in group["params"]}
    if id(parameters[0]) not in held:
        raise ValueError(
            f"{where}: expected the one that updates the layer's weight, got a {type(optimizer).__name__} "
            "of other parameters: give that one, or None"
        )
    for param in parameters:
        for key, value in optimizer.state.get(param, {}).items():
            if not isinstance(value, Tensor) or value.dim() == 0:
                continue
            if value.shape != param.shape or key == "ax":  # ASGD's means of all steps of a row
                raise ValueError(
                    f"{where}: expected states with one value an element that start at a constant, got "
                    f"{key!r} {tuple(value.shape)} of {type(optimizer).__name__}: make a new optimizer after "
                    "resizing, and leave this one out"
                )


def resized_states(
    optimizer: Optimizer | None, param: Tensor, kept: Tensor, added: int
) -> dict[str, Any]:
    """The states of ``param`` after its rows ``kept`` stay (int64, increasing) and ``added`` rows follow,
    whose states are what a first step starts from. ``optimizer`` is not changed."""
    if optimizer is None or param not in optimizer.state:
        return {}
    group = next(g for g in optimizer.param_groups if any(p is param for p in g["params"]))

    def resized(key: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        start = float(group.get(_STARTS.get(key, ""), 0.0))
        if value.layout == torch.strided:
            return resized_rows(value, kept, value.new_full((added, *value.shape[1:]), start))
        # torch's momentum of row-sparse gradients
        stay = value.coalesce().index_select(0, kept).coalesce()
        shape = (len(kept) + added, *value.shape[1:])
        return torch.sparse_coo_tensor(
            stay.indices(), stay.values(), shape, check_invariants=True
        ).coalesce()

    return {key: resized(key, value) for key, value in optimizer.state[param].items()}


def resized_rows(old: Tensor, kept: Tensor, added: Tensor) -> Tensor:
    """The rows ``kept`` (int64) of ``old``, then those of ``added``, on huge pages where the CPU has them."""
    old = old.detach()
    new = old.new_empty((len(kept) + len(added), *old.shape[1:]))
    if new.device.type == "cpu":
        ops.advise_hugepages_(new)
    torch.index_select(old, 0, kept, out=new[: len(kept)])
    new[len(kept) :] = added
    return new
