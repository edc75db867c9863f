"""Row-sparse gradients over several processes: what ``DistributedDataParallel`` does not reduce."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import ops
from ..nn.feed_forward import LSHFeedForward
from ..nn.linear import LSHLinear
from ..ops import fused_update
from ..shards import shard_of


class _RowSparse(NamedTuple):
    """A parameter that gets row-sparse gradients.

    Attributes:
        parameter: itself.
        names: its names in the model; a tied parameter has several.
        layers: whose tables hash its rows.
    """

    parameter: nn.Parameter
    names: list[str]
    layers: list[LSHLinear]


def _row_sparse_of(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of ``module`` itself, not of its children, that get row-sparse gradients."""
    if isinstance(module, LSHFeedForward):
        return [module.second_weight] if module.first.sparse else []
    if any(shard_of(p) is not None for p in module.parameters(recurse=False)):
        return list(module.parameters(recurse=False))  # of this rank, whatever their gradient
    if isinstance(module, LSHLinear | nn.Embedding | nn.EmbeddingBag) and module.sparse:
        return list(module.parameters(recurse=False))
    return []


def _row_sparse(model: nn.Module) -> list[_RowSparse]:
    """All parameters of ``model`` that get row-sparse gradients."""
    found: dict[int, _RowSparse] = {}
    for module in model.modules():
        for parameter in _row_sparse_of(module):
            entry = found.setdefault(id(parameter), _RowSparse(parameter, [], []))
            if isinstance(module, LSHLinear):
                entry.layers.append(module)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in found:
            found[id(parameter)].names.append(name)
    return list(found.values())


def _check_optimizers(function: str, parameters: list[_RowSparse]) -> None:
    for parameter, names, layers in parameters:
        shard = shard_of(parameter)
        if shard is not None and shard.replicas is None:
            continue
        if any(layer.output == "sampled" for layer in layers):  # hidden layers hand gradients over
            fused_update.refuse_in_replicas(f"{function}: {names[0]}", parameter)


@torch.no_grad()
def prepare(model: nn.Module, group: dist.ProcessGroup | None = None) -> nn.Module:
    """Prepares a model for ``DistributedDataParallel``; call it before wrapping the model.

    The parameters of ``sparse=True`` layers (LSHLinear, LSHFeedForward, ``nn.Embedding``,
    ``nn.EmbeddingBag``) are copied from rank 0 and excluded from its reduction, which supports dense
    gradients only. :func:`allreduce_row_gradients` reduces their gradients. The parameters of sharded layers
    are excluded, and not copied.

    Returns:
        ``model``.

    Raises:
        RuntimeError: an optimizer with ``fuse_backward=True`` updates one of them; nothing is changed.
    """
    ignored = _row_sparse(model)
    _check_optimizers("prepare", ignored)
    for parameter, _, layers in ignored:
        if (
            shard_of(parameter) is not None
        ):  # no other rank has these rows, or shard_ has copied them
            continue
        dist.broadcast(parameter.detach(), group_src=0, group=group)
        for layer in layers:
            layer.tables.invalidate()
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
        model, [name for entry in ignored for name in entry.names]
    )
    return model


@torch.no_grad()
def allreduce_row_gradients(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Averages row-sparse gradients over all processes; call between backward and step, on every rank.

    Each rank sends only its rows and their values. Afterwards every rank has the same coalesced gradient,
    bit for bit, and its tables rehash the rows that other ranks changed. Each rank samples on its own:
    tables and active sets may differ. The gradient of a sharded layer is averaged over the replicas of its
    rows, those on the first dimension of its mesh, and left alone where there are none.

    Raises:
        ValueError: a parameter of a ``sparse=True`` layer has a dense gradient.
        RuntimeError: an optimizer with ``fuse_backward=True`` updates it inside backward, with the gradient
            of this rank alone.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    parameters = _row_sparse(model)
    _check_optimizers("allreduce_row_gradients", parameters)
    for entry in parameters:
        shard = shard_of(entry.parameter)
        own_group = group if shard is None else shard.replicas
        if not entry.parameter.requires_grad or (shard is not None and own_group is None):
            continue
        if shard is not None and not any(layer.sparse for layer in entry.layers):
            if entry.parameter.grad is not None:
                dist.all_reduce(entry.parameter.grad, group=own_group)
                entry.parameter.grad.div_(dist.get_world_size(own_group))
        else:
            _average_rows(entry, own_group)


def _average_rows(entry: _RowSparse, group: dist.ProcessGroup | None) -> None:
    world, (parameter, names, layers) = dist.get_world_size(group), entry
    rows, values = _rows_of(names[0], parameter)
    counts = [torch.empty(1, dtype=torch.int64) for _ in range(world)]
    dist.all_gather(counts, torch.tensor([len(rows)]), group=group)
    most = int(torch.cat(counts).max())
    if most == 0:
        return
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
