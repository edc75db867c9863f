"""Cutting a layer's rows over ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel.style import ParallelStyle
from torch.distributed.tensor.placement_types import Placement, Replicate
from torch.distributed.tensor.placement_types import Shard as ShardOf
from torch.optim import Optimizer

from ..nn.carry_over import computed_weight
from ..nn.linear import LSHLinear
from ..nn.linear_checks import check_not_parametrized, check_parameters
from ..shards import Shard, loaded_state, saved_state
from ..storage import check_in_memory
from .sharded_linear import ShardedLSHLinear, make_sharded


@torch.no_grad()
def shard_(
    layer: LSHLinear, mesh: DeviceMesh, *, input_layouts: Placement | None = None
) -> ShardedLSHLinear:
    """Cuts the rows of an output layer over the ranks of ``mesh``, in place (vocabulary parallelism: Shoeybi
    et al. 2019; PartialFC: An et al. 2021, here with negatives that are found, not random).

    Each rank keeps a range of rows, as long as N / R rounded up, with tables, tail and optimizer state of its
    own, and its share of budget, tail and probes, rounded up. The training loop stays as it is; every rank
    must run it. A step sends each input once and its gradient once, and three numbers a sample, whatever N.

    Call it on every rank, before the optimizer is made and after whatever looks at all parameters.
    A layer made with ``device="meta"`` never exists as a whole: each rank draws its rows.

    Args:
        layer: an LSHLinear, the same on every rank.
        mesh: of one dimension, over which rows are cut; or of two, (data, classes), the second for the rows,
            the first for replicas. The gradients of replicas are averaged by :func:`allreduce_row_gradients`.
        input_layouts: as of ``ColwiseParallel``. ``Replicate()``, the default: every rank brings the same
            inputs and targets (a step checks it). ``Shard(0)``: each brings its own, of any number, and gets
            the loss of these; parameters get the gradient of the mean of the ranks' losses, as with
            ``DistributedDataParallel``.

    Returns:
        ``layer``, now a :class:`ShardedLSHLinear`.

    Raises:
        ValueError: layer, mesh or layout is none that is supported, or a rank would have no rows; nothing is
            changed.
    """
    where = "shard_"
    if type(layer) is not LSHLinear or layer.output != "sampled":
        got = type(layer).__name__
        if isinstance(layer, LSHLinear):
            got += f" with output={layer.output!r}"
        raise ValueError(
            f"{where}: layer: expected an LSHLinear with output='sampled', got {got}: make one with "
            "LSHLinear.from_linear, and shard it once"
        )
    if layer._tied:
        raise ValueError(
            f"{where}: layer: expected a weight of its own, got one tied to an embedding, which would keep "
            "all rows and no longer share them: leave the layer untied"
        )
    check_not_parametrized(where, layer)
    computed = computed_weight(layer)
    if computed is not None:
        raise ValueError(
            f"{where}: layer: expected Parameters, got {computed[0]}: call {computed[1]}"
        )
    check_in_memory(where, weight=layer.weight, bias=layer.bias)
    check_parameters(where, layer, layer.tables)
    if not isinstance(mesh, DeviceMesh) or mesh.ndim > 2 or mesh.device_type != "cpu":
        got = f"one of {mesh}" if isinstance(mesh, DeviceMesh) else type(mesh).__name__
        raise ValueError(
            f"{where}: mesh: expected a DeviceMesh of CPUs with one or two dimensions, got {got}: make it "
            "with init_device_mesh('cpu', (ranks,))"
        )
    layout = Replicate() if input_layouts is None else input_layouts
    if layout not in (Replicate(), ShardOf(0)):
        raise ValueError(
            f"{where}: input_layouts: expected Replicate() or Shard(0), got {layout!r}: bring whole inputs"
        )
    shard = Shard(mesh, layer.out_features, layout == ShardOf(0))
    if min(shard.sizes) < 1:
        raise ValueError(
            f"{where}: mesh: expected no more ranks than leave each some of {shard.neurons} rows, "
            f"{shard.chunk} a rank, got {shard.ranks} ranks: take fewer"
        )
    sharded = make_sharded(layer, shard)
    if shard.replicas is not None:
        for parameter in sharded.parameters(recurse=False):
            dist.broadcast(parameter.detach(), group_src=0, group=shard.replicas)
        sharded.tables.invalidate()
    return sharded


class VocabParallel(ParallelStyle):
    """:func:`shard_` as a style for ``torch.distributed.tensor.parallel.parallelize_module``.

    Args:
        input_layouts: as for :func:`shard_`.

    Examples:
        >>> mesh = init_device_mesh("cpu", (2,))
        >>> parallelize_module(model, mesh, {"head": VocabParallel()})
    """

    def __init__(self, *, input_layouts: Placement | None = None) -> None:
        super().__init__()
        self.input_layouts = input_layouts

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        layer: Any = module
        return shard_(layer, device_mesh, input_layouts=self.input_layouts)


def prepare_optimizer(optimizer: Optimizer) -> Optimizer:
    """Makes the state dicts of one of torch's optimizers hold the state of shards as DTensors, as those of
    :mod:`slide_torch.optim` do; without it a checkpoint would keep the state of one rank only.

    Returns:
        ``optimizer``.
    """
    optimizer.register_state_dict_post_hook(lambda o, state: saved_state(state, o.param_groups))
    optimizer.register_load_state_dict_pre_hook(
        lambda o, state: loaded_state(state, o.param_groups)
    )
    return optimizer
