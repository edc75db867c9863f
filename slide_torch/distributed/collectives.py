"""What ranks that hold different rows tell each other, differentiable.

Each rank computes on the same inputs with its own rows. What is summed over ranks is then the same on all of
them, and so is what is computed from it (Megatron-LM: Shoeybi et al. 2019, section 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup


def gather(tensor: Tensor, group: Group) -> Tensor:
    """Every rank's ``tensor``, of one shape: (R, \\*)."""
    shape = (dist.get_world_size(group), *tensor.shape)
    found = tensor.new_empty(shape)
    dist.all_gather(list(found), tensor.contiguous(), group=group)
    return found


def gather_ragged(tensor: Tensor, counts: Sequence[int], group: Group) -> Tensor:
    """Every rank's ``tensor`` (counts[rank], \\*), one after the other."""
    most = max(counts)
    padded = tensor.new_zeros((most, *tensor.shape[1:]))
    padded[: len(tensor)] = tensor
    found = gather(padded, group)
    return torch.cat([part[:count] for part, count in zip(found, counts, strict=True)])


def largest(tensor: Tensor, group: Group) -> Tensor:
    """The elementwise maximum over ranks; not differentiable."""
    found = tensor.detach().clone()
    dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
    return found


def summed(tensor: Tensor, group: Group) -> Tensor:
    """The sum over ranks, from which all ranks compute the same."""
    function: Any = _Summed
    found: Tensor = function.apply(tensor, group)
    return found


def entering(input: Tensor, group: Group) -> Tensor:
    """``input``, the same on all ranks; its gradient is the sum of what each rank's rows contribute."""
    function: Any = _Entering
    found: Tensor = function.apply(input, group)
    return found


def joined_rows(input: Tensor, counts: Sequence[int], group: Group) -> Tensor:
    """Every rank's own ``input`` (counts[rank], d), one after the other. The gradient is that of the *sum* of
    the ranks' losses, of which :func:`own_rows` takes the mean."""
    function: Any = _JoinedRows
    found: Tensor = function.apply(input, counts, group)
    return found


def own_rows(values: Tensor, counts: Sequence[int], group: Group) -> Tensor:
    """This rank's of all ranks' rows, whose values every rank has. Parameters get the gradient of the *mean*
    of the ranks' losses, as with ``DistributedDataParallel``."""
    function: Any = _OwnRows
    found: Tensor = function.apply(values, counts, group)
    return found


def joined_classes(logits: Tensor, sizes: Sequence[int], group: Group) -> Tensor:
    """Logits (B, N) of all classes from each rank's (B, sizes[rank])."""
    function: Any = _JoinedClasses
    found: Tensor = function.apply(logits, sizes, group)
    return found


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group) -> Tensor:
        found = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(found, group=group)
        return found

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad[0], None


class _Entering(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return input.view_as(input)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, ...]:
        found = grad[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(found, group=ctx.group)
        return found, None


def _before(counts: Sequence[int], group: Group) -> slice:
    rank = dist.get_rank(group)
    first = sum(counts[:rank])
    return slice(first, first + counts[rank])


class _JoinedRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, counts: Sequence[int], group: Group) -> Tensor:
        ctx.counts, ctx.group = counts, group
        return gather_ragged(input, counts, group)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, ...]:
        # a reduce-scatter of ragged parts, which gloo has not: the parts are sent and summed here, in order
        counts, ranks, own = ctx.counts, len(ctx.counts), ctx.counts[dist.get_rank(ctx.group)]
        parts = grad[0].new_empty((ranks * own, *grad[0].shape[1:]))
        dist.all_to_all_single(
            parts, grad[0].contiguous(), [own] * ranks, list(counts), group=ctx.group
        )
        total = parts[:own].clone()
        for r in range(1, ranks):
            total += parts[r * own : (r + 1) * own]
        return total * ranks, None, None


class _OwnRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, counts: Sequence[int], group: Group) -> Tensor:
        ctx.counts, ctx.group = counts, group
        return values[_before(counts, group)].clone()

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, ...]:
        found = gather_ragged(grad[0], ctx.counts, ctx.group)
        return found / len(ctx.counts), None, None


class _JoinedClasses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, sizes: Sequence[int], group: Group) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        return gather_ragged(logits.T, sizes, group).T.contiguous()

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad[0][:, _before(ctx.sizes, ctx.group)], None, None
