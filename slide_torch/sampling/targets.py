"""Every form of target as lists of labels."""

from __future__ import annotations

import torch
from torch import Tensor

from ..active_set import Labels

INDEX_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def class_factors(
    factors: Tensor, neurons: int, input: Tensor, name: str, argument: str = "weight"
) -> Tensor:
    if not isinstance(factors, Tensor) or tuple(factors.shape) != (neurons,):
        got = tuple(factors.shape) if isinstance(factors, Tensor) else type(factors).__name__
        raise ValueError(f"{name}: {argument}: expected a tensor of shape ({neurons},), got {got}")
    if factors.requires_grad:
        raise ValueError(f"{name}: {argument}: expected no gradient: call {argument}.detach()")
    return factors.detach().to(input.dtype)


def is_probabilities(target: Tensor) -> bool:
    """Whether a target holds probabilities, not class indices."""
    return target.layout == torch.sparse_csr or target.is_floating_point()


def as_labels(
    target: Tensor | Labels,
    leading: torch.Size,
    neurons: int,
    dtype: torch.dtype,
    ignore_index: int,
    name: str = "as_labels",
) -> Labels:
    """Any form of target as :class:`Labels`; those are returned as they are.

    Raises:
        ValueError: wrong shape, dtype or device, or a label outside [0, N) that is not ignored.
    """
    if isinstance(target, Labels):
        return target
    if not isinstance(target, Tensor) or target.device.type != "cpu":
        got = f"one on {target.device}" if isinstance(target, Tensor) else type(target).__name__
        raise ValueError(f"{name}: target: expected a CPU tensor, got {got}")
    if target.requires_grad:
        raise ValueError(f"{name}: target: expected no gradient: call target.detach()")
    shape = tuple(target.shape)
    rows = leading.numel()
    if is_probabilities(target):
        if len(leading) != 1 or shape != (rows, neurons):
            raise ValueError(
                f"{name}: target: expected probabilities of shape ({rows}, {neurons}) for an input "
                f"of shape (B, d), got {shape}"
            )
        if ignore_index >= 0:
            raise ValueError(
                f"{name}: ignore_index: expected a negative value (no effect) where the target is "
                f"probabilities, got {ignore_index}"
            )
        if target.layout != torch.sparse_csr:
            target = target.to_sparse_csr()
        ids = target.col_indices().to(torch.int64)
        _check_range(ids, neurons, name)
        return Labels(
            target.crow_indices().to(torch.int64), ids, target.values().to(dtype).contiguous()
        )
    if target.layout != torch.strided or target.dtype not in INDEX_DTYPES:
        raise ValueError(
            f"{name}: target: expected int64 class indices or floating-point probabilities, "
            f"got {target.dtype}, layout {target.layout}: convert it with .long() or .float()"
        )
    if target.shape == leading:
        padded = target.reshape(rows, 1)
    elif target.dim() == len(leading) + 1 and target.shape[:-1] == leading:
        if shape[-1] >= neurons:
            raise ValueError(
                f"{name}: target: expected integers to be class indices, fewer than {neurons} (the number of "
                f"classes) a row, got shape {shape} of {target.dtype}: pass target.float() for probabilities "
                "(one-hot, multi-hot), target.argmax(-1) for the index of a one-hot, or shorter lists"
            )
        padded = target.reshape(rows, shape[-1])
    else:
        raise ValueError(
            f"{name}: target: expected shape {tuple(leading)}, or {(*leading, 'M')} for padded "
            f"lists of labels, for these logits, got {shape}"
        )
    padded = padded.to(torch.int64)
    kept = padded != ignore_index
    ids = padded[kept]
    _check_range(ids, neurons, name)
    count = kept.sum(1)
    offsets = torch.zeros(rows + 1, dtype=torch.int64)
    torch.cumsum(count, 0, out=offsets[1:])
    probabilities = count.to(dtype).reciprocal().repeat_interleave(count)
    return Labels(offsets, ids, probabilities)


def _check_range(ids: Tensor, neurons: int, name: str) -> None:
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= neurons):
        wrong = ids[(ids < 0) | (ids >= neurons)]
        raise ValueError(
            f"{name}: target: expected class indices in [0, {neurons}) or ignore_index, "
            f"got {int(wrong[0])} ({wrong.numel()} such labels)"
        )


def weighted(labels: Labels, weight: Tensor, neurons: int, name: str) -> Labels:
    factor = class_factors(weight, neurons, labels.probabilities, name)[labels.ids]
    return Labels(labels.offsets, labels.ids, labels.probabilities * factor)
