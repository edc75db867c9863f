"""Which parameters hold the rows of one rank only, and how their rows lie over the ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Placement


@dataclass(frozen=True, eq=False)
class Shard:
    """This rank's rows of the N rows of a layer, cut as ``torch.chunk`` and DTensor's ``Shard(0)`` cut them.

    Attributes:
        mesh: of one dimension, over which the rows are cut, or of several, the last of which it is.
        neurons: number N of all rows.
        own_batches: whether each rank brings its own inputs, which all ranks then compute together.
    """

    mesh: DeviceMesh
    neurons: int
    own_batches: bool

    @property
    def group(self) -> ProcessGroup:
        """The ranks that hold the other rows."""
        return self.mesh.get_group(self.mesh.ndim - 1)

    @property
    def replicas(self) -> ProcessGroup | None:
        """The ranks that hold the same rows, on a mesh of two dimensions."""
        return None if self.mesh.ndim == 1 else self.mesh.get_group(0)

    @property
    def rank(self) -> int:
        return self.mesh.get_local_rank(self.mesh.ndim - 1)

    @property
    def ranks(self) -> int:
        return self.mesh.size(self.mesh.ndim - 1)

    @property
    def chunk(self) -> int:
        """Rows of each rank but the last, which may have fewer."""
        return -(-self.neurons // self.ranks)

    @property
    def first(self) -> int:
        return self.rank * self.chunk

    @property
    def last(self) -> int:
        """One past the last row."""
        return min(self.first + self.chunk, self.neurons)

    @property
    def sizes(self) -> list[int]:
        """The number of rows of each rank."""
        ends = [min((r + 1) * self.chunk, self.neurons) for r in range(self.ranks)]
        return [end - r * self.chunk for r, end in enumerate(ends)]

    @property
    def placements(self) -> tuple[Placement, ...]:
        """How DTensors lie on the mesh that hold the rows."""
        from torch.distributed.tensor import Replicate
        from torch.distributed.tensor import Shard as ShardOf

        return (*[Replicate()] * (self.mesh.ndim - 1), ShardOf(0))

    def as_dtensor(self, rows: Tensor) -> Tensor:
        """This rank's ``rows`` (n, ...) as a DTensor (N, ...), whose memory they are."""
        from torch.distributed.tensor import DTensor

        whole = torch.Size((self.neurons, *rows.shape[1:]))
        found: Tensor = DTensor.from_local(
            rows,
            self.mesh,
            self.placements,
            run_check=False,
            shape=whole,
            stride=torch.empty(whole, device="meta").stride(),
        )
        return found

    def own_rows(self, tensor: Any) -> Any:
        """This rank's rows of ``tensor``: a DTensor, or a whole tensor (N, ...); others as they are."""
        if not isinstance(tensor, Tensor) or tensor.dim() == 0 or len(tensor) != self.neurons:
            return tensor
        dtensor: Any = tensor
        if hasattr(tensor, "to_local"):
            if dtensor.placements == self.placements and dtensor.device_mesh == self.mesh:
                return dtensor.to_local()
            tensor = dtensor.full_tensor()
        return tensor[self.first : self.last]

    def __deepcopy__(self, memo: Any) -> Shard:
        return self  # groups of processes are not copied

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "slide_torch: a sharded layer: expected to be saved by torch.distributed.checkpoint, got "
            "pickled: save its state dict, whose tensors are DTensors, or that of layer.to_linear()"
        )


_shards: Any = WeakIdKeyDictionary()  # parameter -> Shard


def register(parameter: Tensor, shard: Shard) -> None:
    """Says that ``parameter`` holds this rank's rows of ``shard``."""
    _shards[parameter] = shard


def shard_of(parameter: Tensor) -> Shard | None:
    """What ``parameter`` is a part of, if it is one."""
    found: Shard | None = _shards.get(parameter)
    return found


def saved_state(state_dict: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """An optimizer's state dict whose rows of shards are DTensors, so that
    ``torch.distributed.checkpoint`` knows which of all rows they are."""

    def save(shard: Shard, param: Tensor, value: Any) -> Any:
        return shard.as_dtensor(value) if _is_like(value, param) else value

    return _mapped(state_dict, groups, save)


def loaded_state(state_dict: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """The inverse of :func:`saved_state`; takes whole tensors (N, ...) too."""

    def load(shard: Shard, param: Tensor, value: Any) -> Any:
        return shard.own_rows(value)

    return _mapped(state_dict, groups, load)


def _is_like(value: Any, param: Tensor) -> bool:
    """Whether ``value`` has the parameter's shape, or one number for each of its rows."""
    return (
        isinstance(value, Tensor)
        and value.dim() > 0
        and value.shape in (param.shape, param.shape[:1])
    )


def _mapped(
    state_dict: dict[str, Any],
    groups: list[dict[str, Any]],
    function: Callable[[Shard, Tensor, Any], Any],
) -> dict[str, Any]:
    # in the order of the groups; torch.distributed.checkpoint has names where others have numbers
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    params = [param for group in groups for param in group["params"]]
    state = dict(state_dict["state"])
    for key, param in zip(keys, params, strict=False):  # torch refuses groups of other lengths
        shard = shard_of(param)
        if shard is not None and key in state:
            state[key] = {name: function(shard, param, v) for name, v in state[key].items()}
    return {**state_dict, "state": state}
