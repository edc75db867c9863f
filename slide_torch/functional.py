"""Losses as functions."""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops
from .sampling import Labels, SharedActiveSet, draw_active_set
from .tables import HashTables

_NAME = "lsh_linear_cross_entropy"


def lsh_linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    tables: HashTables,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    scale: float = 1.0,
    sparse: bool = False,
    training: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Softmax cross entropy of a linear layer, over the neurons that matter for this batch.

    ``F.cross_entropy(F.linear(input, linear_weight, linear_bias), target)``, computed over an active set:
    the labels, the neurons that the hash ``tables`` return for the inputs, and a uniform tail (see
    :class:`slide_torch.LSHOptions`). With every neuron active it is the same function.

    Args:
        input: (\\*, d), float32 or float64.
        linear_weight: (N, d), the same dtype, contiguous.
        target: class indices, int64 (\\*); several labels a row, int64 (\\*, M) padded with
            ``ignore_index`` (the target is uniform over a row's labels); probabilities, a sparse CSR
            tensor (B, N) or a dense floating-point (B, N), for a two-dimensional input.
        linear_bias: (N) or None.
        tables: over ``linear_weight``; built at the first use and kept fresh as they are used.
        weight: (N), a factor for each class, as in ``F.cross_entropy``.
        ignore_index: class indices that count as no label.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``, as in ``F.cross_entropy``. The mean is over rows
            that have a label, weighted by ``weight`` (over all rows for probabilities).
        label_smoothing: must be 0: smoothing pulls on all N classes, which are not computed.
        scale: factor of the logits, positive (an inverse temperature).
        sparse: whether ``linear_weight`` and ``linear_bias`` get row-sparse gradients
            (``torch.sparse_coo``, coalesced) instead of dense ones.
        training: whether this call counts as a training step for the tables' schedule.
        generator: source of the tail and of ties; torch's global generator if None.

    Returns:
        A scalar, or (\\*) for ``reduction="none"``.

    Raises:
        ValueError: an argument's shape, dtype, device or value is wrong; nothing has been changed.
        NotImplementedError: something of ``F.cross_entropy`` that sampling cannot honour.

    The tables are discrete: no gradient flows through the choice of neurons. Differentiable once.
    """
    _check_layer(input, linear_weight, linear_bias, tables)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{_NAME}: reduction: expected 'mean', 'sum' or 'none', got {reduction!r}")
    if label_smoothing != 0.0:
        raise NotImplementedError(
            f"{_NAME}: label_smoothing: expected 0.0, got {label_smoothing}. Smoothing pulls on every "
            "class, and only active ones are computed: give smoothed targets as sparse CSR "
            "probabilities instead."
        )
    if not scale > 0 or scale == float("inf"):
        raise ValueError(f"{_NAME}: scale: expected a positive finite number, got {scale}")
    leading = input.shape[:-1]
    neurons = linear_weight.shape[0]
    flat = input.reshape(-1, input.shape[-1])
    labels, counts = as_labels(target, leading, neurons, input.dtype, ignore_index)
    if weight is not None:
        labels = _weighted(labels, weight, neurons)

    trained = linear_weight.requires_grad or (linear_bias is not None and linear_bias.requires_grad)
    moving = training and torch.is_grad_enabled() and trained
    if tables.uses_tables:
        with torch.no_grad():
            tables.maintain(
                linear_weight,
                linear_bias,
                advance=moving,
                all_rows_move=not sparse,
                generator=generator,
            )
    active = draw_active_set(
        tables, flat, labels, weight=linear_weight, bias=linear_bias, generator=generator
    )
    if moving:
        tables.mark_dirty(active.rows, linear_weight._version if sparse else None)
        tables.record(active)

    flat = flat.contiguous()
    if isinstance(active, SharedActiveSet):
        losses = ops.shared_cross_entropy(
            flat,
            linear_weight,
            linear_bias,
            active.rows,
            active.log_weight,
            labels.offsets,
            active.label_places,
            labels.probabilities,
            scale,
            sparse,
        )
    else:
        losses = ops.sample_cross_entropy(
            flat,
            linear_weight,
            linear_bias,
            active.rows,
            active.offsets,
            active.pair_offsets,
            active.pair_positions,
            active.pair_samples,
            active.log_weight,
            labels.offsets,
            active.label_places,
            labels.probabilities,
            scale,
            sparse,
        )
    if reduction == "none":
        return losses.reshape(leading)
    if reduction == "sum":
        return losses.sum()
    if not counts:
        return losses.mean()
    return losses.sum() / labels.probabilities.sum()


def _check_layer(input: Tensor, weight: Tensor, bias: Tensor | None, tables: HashTables) -> None:
    if not isinstance(tables, HashTables):
        raise ValueError(f"{_NAME}: tables: expected HashTables, got {type(tables).__name__}")
    shape = (tables.out_features, tables.in_features)
    if weight.dim() != 2 or tuple(weight.shape) != shape:
        raise ValueError(
            f"{_NAME}: linear_weight: expected shape {shape}, that of its tables, "
            f"got {tuple(weight.shape)}"
        )
    if weight.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{_NAME}: linear_weight: expected float32 or float64, got {weight.dtype}: "
            "convert the layer with .float()"
        )
    if input.dim() < 1 or input.shape[-1] != shape[1]:
        raise ValueError(
            f"{_NAME}: input: expected last dimension {shape[1]} (in_features), "
            f"got shape {tuple(input.shape)}"
        )
    for name, tensor in (("input", input), ("linear_weight", weight), ("linear_bias", bias)):
        if tensor is None:
            continue
        if tensor.device.type != "cpu":
            raise ValueError(f"{_NAME}: {name}: expected a CPU tensor, got {tensor.device}")
        if tensor.dtype != weight.dtype:
            raise ValueError(
                f"{_NAME}: {name}: expected {weight.dtype}, the weight's dtype, got {tensor.dtype}"
            )
        if tensor is not input and not tensor.is_contiguous():
            raise ValueError(f"{_NAME}: {name}: expected a contiguous tensor: call .contiguous()")
    if (bias is not None) != tables.has_bias or (bias is not None and bias.shape != shape[:1]):
        raise ValueError(
            f"{_NAME}: linear_bias: expected {'shape ' + str(shape[:1]) if tables.has_bias else None}"
            f", as its tables, got {None if bias is None else 'shape ' + str(tuple(bias.shape))}"
        )


def as_labels(
    target: Tensor, leading: torch.Size, neurons: int, dtype: torch.dtype, ignore_index: int
) -> tuple[Labels, bool]:
    """Any form of target as :class:`Labels`, and whether it consisted of class indices.

    Raises:
        ValueError: wrong shape, dtype or device, or a label outside [0, N) that is not ignored.
    """
    if not isinstance(target, Tensor) or target.device.type != "cpu":
        got = f"one on {target.device}" if isinstance(target, Tensor) else type(target).__name__
        raise ValueError(f"{_NAME}: target: expected a CPU tensor, got {got}")
    if target.requires_grad:
        raise ValueError(f"{_NAME}: target: expected no gradient: call target.detach()")
    shape = tuple(target.shape)
    rows = leading.numel()
    if target.layout == torch.sparse_csr or target.is_floating_point():
        if len(leading) != 1 or shape != (rows, neurons):
            raise ValueError(
                f"{_NAME}: target: expected probabilities of shape ({rows}, {neurons}) for an input "
                f"of shape (B, d), got {shape}"
            )
        if ignore_index >= 0:
            raise ValueError(
                f"{_NAME}: ignore_index: expected a negative value (no effect) where the target is "
                f"probabilities, got {ignore_index}"
            )
        if target.layout != torch.sparse_csr:
            target = target.to_sparse_csr()
        ids = target.col_indices().to(torch.int64)
        _check_range(ids, neurons)
        return Labels(
            target.crow_indices().to(torch.int64), ids, target.values().to(dtype).contiguous()
        ), False
    if target.layout != torch.strided or target.dtype not in (
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
    ):
        raise ValueError(
            f"{_NAME}: target: expected int64 class indices or floating-point probabilities, "
            f"got {target.dtype}, layout {target.layout}"
        )
    if target.shape == leading:
        padded = target.reshape(rows, 1)
    elif target.dim() == len(leading) + 1 and target.shape[:-1] == leading:
        padded = target.reshape(rows, shape[-1])
    else:
        raise ValueError(
            f"{_NAME}: target: expected shape {tuple(leading)}, or {(*leading, 'M')} for padded "
            f"lists of labels, for these logits, got {shape}"
        )
    padded = padded.to(torch.int64)
    kept = padded != ignore_index
    ids = padded[kept]
    _check_range(ids, neurons)
    count = kept.sum(1)
    offsets = torch.zeros(rows + 1, dtype=torch.int64)
    torch.cumsum(count, 0, out=offsets[1:])
    probabilities = count.to(dtype).reciprocal().repeat_interleave(count)
    return Labels(offsets, ids, probabilities), True


def _check_range(ids: Tensor, neurons: int) -> None:
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= neurons):
        wrong = ids[(ids < 0) | (ids >= neurons)]
        raise ValueError(
            f"{_NAME}: target: expected class indices in [0, {neurons}) or ignore_index, "
            f"got {int(wrong[0])} ({wrong.numel()} such labels)"
        )


def _weighted(labels: Labels, weight: Tensor, neurons: int) -> Labels:
    if not isinstance(weight, Tensor) or tuple(weight.shape) != (neurons,):
        got = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(f"{_NAME}: weight: expected a tensor of shape ({neurons},), got {got}")
    factor = weight.detach().to(labels.probabilities.dtype)[labels.ids]
    return Labels(labels.offsets, labels.ids, labels.probabilities * factor)
