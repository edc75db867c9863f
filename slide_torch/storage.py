"""Whether the values of a parameter are in memory."""

from __future__ import annotations

import torch
from torch import Tensor


def check_in_memory(name: str, **tensors: Tensor | None) -> None:
    """Raises unless each of the parameters ``tensors`` can be read.

    Raises:
        RuntimeError: its memory has been freed, or holds but a shard of it, as ``fully_shard`` leaves it
            outside a module's forward.
    """
    for which, tensor in tensors.items():
        if tensor is None:
            continue
        if hasattr(tensor, "full_tensor"):
            got = "a DTensor, of which this process has a shard"
        elif (
            torch.compiler.is_compiling()
            or tensor.device.type != "cpu"
            or tensor.numel() == 0
            or not torch._C._has_storage(tensor)  # a functorch wrapper
            or tensor.untyped_storage().nbytes() > 0
        ):
            continue
        else:
            got = "one whose memory has been freed"
        raise RuntimeError(
            f"{name}: {which}: expected a whole tensor in memory, got {got}: under fully_shard leave the "
            "layer to a unit whose forward returns the loss, or give its unit reshard_after_forward=False; "
            "outside of forward call unshard() on the unit first"
        )
