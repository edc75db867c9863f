"""Which replicas of a model were made before one of its weights got new memory."""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ..ops import fused_update

# The DistributedDataParallel modules in whose forward a weight was used, and those of before a resizing.
_seen: Any = WeakIdKeyDictionary()
_outgrown: Any = WeakIdKeyDictionary()


def outgrow(weight: Tensor) -> None:
    """Says that ``weight`` has got new memory, perhaps of another size."""
    _outgrown.setdefault(weight, WeakSet()).update(_seen.pop(weight, ()))


def refuse_outgrown(weight: Tensor) -> None:
    """Raises a RuntimeError in the forward of a ``DistributedDataParallel`` that was made before ``weight``
    was resized: it would leave the gradients as they are on each rank, instead of averaging them."""
    if not fused_update.is_replica():
        return
    module: Any = nn.parallel.DistributedDataParallel._get_active_ddp_module()
    outgrown = _outgrown.get(weight)
    averages = outgrown is not None and any(p is weight for p in module._module_parameters)
    if averages and (module in outgrown or not _has_its_sizes(module)):
        raise RuntimeError(
            "LSHLinear: weight: expected the one that DistributedDataParallel was made with, got it resized "
            "by extend_ or drop_: wrap the model anew, after every process has resized it alike"
        )
    _seen.setdefault(weight, WeakSet()).add(module)


def _has_its_sizes(module: Any) -> bool:
    trained = sum(param.nbytes for param in module._module_parameters if param.requires_grad)
    return bool(trained == module._get_ddp_logging_data()["total_parameter_size_bytes"])
