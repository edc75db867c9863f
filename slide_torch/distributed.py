"""Row-sparse gradients over several processes: what ``DistributedDataParallel`` does not reduce."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import ops
from .nn.linear import LSHLinear


def _row_sparse(model: nn.Module) -> dict[str, tuple[nn.Parameter, list[LSHLinear]]]:
    """Parameters that get row-sparse gradients, by name, and the layers whose tables hash them."""
    found: dict[str, tuple[nn.Parameter, list[LSHLinear]]] = {}
    names = {id(p): name for name, p in model.named_parameters()}
    for module in model.modules():
        if not isinstance(module, LSHLinear | nn.Embedding | nn.EmbeddingBag) or not module.sparse:
            continue
        for parameter in module.parameters(recurse=False):
            layers = found.setdefault(names[id(parameter)], (parameter, []))[1]
            if isinstance(module, LSHLinear):
                layers.append(module)
    return found


@torch.no_grad()
def prepare(model: nn.Module, group: dist.ProcessGroup | None = None) -> nn.Module:
    """Call before ``DistributedDataParallel(model)``: parameters of ``sparse=True`` layers (LSHLinear,
    ``nn.Embedding``, ``nn.EmbeddingBag``) are taken from rank 0 and left out of its reduction, which knows
    dense gradients only; :func:`allreduce_row_gradients` reduces theirs.

    Returns:
        ``model``.
    """
    ignored = _row_sparse(model)
    for parameter, layers in ignored.values():
        dist.broadcast(parameter.detach(), group_src=0, group=group)
        for layer in layers:
            layer.tables.invalidate()
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
        model, list(ignored)
    )
    return model


@torch.no_grad()
def allreduce_row_gradients(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Averages row-sparse gradients over all processes; call between backward and step, on every rank.

    Each rank sends its rows and their values only. Afterwards every rank has the same coalesced
    gradient, bit for bit, and its tables know of the rows that others touched. Sampling stays each
    rank's own: tables and active sets may differ.

    Raises:
        ValueError: a parameter of a ``sparse=True`` layer has a dense gradient.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    world = dist.get_world_size(group)
    for name, (parameter, layers) in _row_sparse(model).items():
        if not parameter.requires_grad:
            continue
        rows, values = _rows_of(name, parameter)
        counts = [torch.empty(1, dtype=torch.int64) for _ in range(world)]
        dist.all_gather(counts, torch.tensor([len(rows)]), group=group)
        most = int(torch.cat(counts).max())
        if most == 0:
            continue
        all_rows = _gather(rows, most, world, group)
        all_values = _gather(values, most, world, group)
        rows = torch.cat([r[: int(n)] for r, n in zip(all_rows, counts, strict=True)])
        values = torch.cat([v[: int(n)] for v, n in zip(all_values, counts, strict=True)])
        rows, values = ops.coalesce_rows(rows, values.div_(world), len(parameter))
        parameter.grad = torch.sparse_coo_tensor(
            rows.unsqueeze(0), values, parameter.shape, is_coalesced=True, check_invariants=False
        )
        for layer in layers:
            layer.tables.mark_dirty(rows, layer.weight._version)


def _rows_of(name: str, parameter: nn.Parameter) -> tuple[Tensor, Tensor]:
    grad = parameter.grad
    if grad is None:
        return torch.empty(0, dtype=torch.int64), parameter.new_empty((0, *parameter.shape[1:]))
    if grad.layout != torch.sparse_coo:
        raise ValueError(
            f"allreduce_row_gradients: {name}: expected a row-sparse gradient, got {grad.layout}: "
            "make every layer that shares this parameter sparse=True, or none"
        )
    grad = grad.coalesce()
    return grad.indices()[0], grad.values()


def _gather(
    tensor: Tensor, length: int, world: int, group: dist.ProcessGroup | None
) -> list[Tensor]:
    """Every rank's ``tensor``, padded to ``length`` entries."""
    padded = tensor.new_zeros((length, *tensor.shape[1:]))
    padded[: len(tensor)] = tensor
    found = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(found, padded, group=group)
    return found
