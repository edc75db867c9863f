"""Losses as functions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import fused_backward, graph, ops
from .bfloat16 import DTYPES, active_rows, widened
from .inference_mode import version_of
from .sampling import ActiveSet, Labels, SharedActiveSet, draw_active_set
from .storage import check_in_memory
from .tables import HashTables, draw_seed

_NAME = "lsh_linear_cross_entropy"
_INDEX_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


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
    the labels, the neurons that the hash ``tables`` return for the inputs, and a random tail (see
    :class:`slide_torch.LSHOptions`). With every neuron active it is the same function.

    Args:
        input: (\\*, d), float32, float64 or bfloat16.
        linear_weight: (N, d), the same dtype, contiguous.
        target: class indices, int64 (\\*); several labels a row, int64 (\\*, M), M < N, padded with
            ``ignore_index`` (the target is uniform over a row's labels); probabilities, a sparse CSR
            tensor (B, N) or a dense floating-point (B, N), for a two-dimensional input.
        linear_bias: (N) or None.
        tables: over ``linear_weight``; built at the first use and kept fresh as they are used.
        weight: (N), a factor for each class, as in ``F.cross_entropy``.
        ignore_index: class indices that count as no label.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``, as in ``F.cross_entropy``. The mean is over rows
            that have a label, weighted by ``weight`` (over all rows for probabilities).
        label_smoothing: share of each target that is spread evenly over the classes, 0 to 1. The mean of
            all N logits, which it pulls on, is estimated without bias from active rows and tail with
            ``correction="importance"``; with ``"none"`` it is that of the active set, over which the softmax
            is taken (refused for ``pattern="per_sample"``). A row without a label (of probabilities, with
            zeros only) stays without loss.
        scale: factor of the logits, positive (an inverse temperature).
        sparse: whether ``linear_weight`` and ``linear_bias`` get row-sparse gradients
            (``torch.sparse_coo``, coalesced) instead of dense ones.
        training: whether this call counts as a training step for the tables' schedule.
        generator: source of the tail and of ties; torch's global generator if None.

    Returns:
        A scalar, or (\\*) for ``reduction="none"``; float32 where parameters are bfloat16: of these the
        active rows are computed in float32, and their gradient rounded to bfloat16.

    Raises:
        ValueError: an argument's shape, dtype, device or value is wrong; nothing has been changed.
        NotImplementedError: something of ``F.cross_entropy`` that sampling cannot honour.

    The tables are discrete: no gradient flows through the choice of neurons. Differentiable once, by
    backward: forward-mode differentiation and the transforms of ``torch.func`` are refused.
    """
    input = autocast_input(input, linear_weight)
    check_layer(input, linear_weight, linear_bias, tables)
    if sparse:
        check_leaves(linear_weight, linear_bias)
        if fused_backward.is_replica():
            fused_backward.refuse_in_replicas(f"{_NAME}: linear_weight", linear_weight)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{_NAME}: reduction: expected 'mean', 'sum' or 'none', got {reduction!r}")
    _check_smoothing(label_smoothing, tables, linear_weight, sparse)
    if not scale > 0 or scale == float("inf"):
        raise ValueError(f"{_NAME}: scale: expected a positive finite number, got {scale}")
    leading = input.shape[:-1]
    input = widened(input)
    flat = input.reshape(-1, input.shape[-1])
    labels, active = draw_for(
        tables,
        flat,
        linear_weight,
        linear_bias,
        target,
        leading,
        weight,
        ignore_index,
        training=training,
        sparse=sparse,
        generator=generator,
        name=_NAME,
    )
    flat = flat.contiguous()
    total = labels.probabilities.sum()
    own_weight, own_bias, rows, sparse = active_rows(
        linear_weight, linear_bias, active.rows, sparse
    )
    smoothed = None
    if label_smoothing > 0:
        total = torch.where(total == 0, torch.nan, total)  # as torch has it, not inf
        labels, smoothed = _smooth(
            labels,
            label_smoothing,
            active,
            flat,
            own_weight,
            own_bias,
            weight,
            scale,
            sparse,
            neurons=linear_weight.shape[0],
            copied=own_weight is not linear_weight,
            tail_varies=active.log_weight is not None and tables.options.tail_parts != ("uniform",),
        )
    if isinstance(active, SharedActiveSet):
        losses = ops.shared_cross_entropy(
            flat,
            own_weight,
            own_bias,
            rows,
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
            own_weight,
            own_bias,
            rows,
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
    if smoothed is not None:
        losses = losses + smoothed
    if reduction == "none":
        return losses.reshape(leading)
    if reduction == "sum":
        return losses.sum()
    return losses.mean() if is_probabilities(target) else losses.sum() / total


def _check_smoothing(
    label_smoothing: float, tables: HashTables, weight: Tensor, sparse: bool
) -> None:
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(
            f"{_NAME}: label_smoothing: expected a number from 0 to 1, got {label_smoothing}"
        )
    options = tables.options
    own_sets = options.pattern == "per_sample" and options.correction == "none"
    if label_smoothing > 0 and own_sets and options.budget < tables.out_features:  # type: ignore[operator]
        raise NotImplementedError(
            f"{_NAME}: label_smoothing: expected 0.0 with pattern='per_sample' and correction='none', got "
            f"{label_smoothing}: use correction='importance', or pattern='shared'"
        )
    if label_smoothing == 0:
        return
    if torch.compiler.is_compiling():
        if sparse or (options.pattern == "per_sample" and not tables.exact):
            raise NotImplementedError(
                f"{_NAME}: label_smoothing: expected 0.0 under torch.compile with sparse=True or "
                f"pattern='per_sample', got {label_smoothing}: use sparse=False and pattern='shared', or "
                "leave the loss out of the graph"
            )
    elif sparse and weight.requires_grad and fused_backward.optimizer_of(weight) is not None:
        raise NotImplementedError(
            f"{_NAME}: label_smoothing: expected 0.0 with an optimizer that updates the weight inside "
            f"backward, got {label_smoothing}: smoothing has a gradient of its own, which would be a second "
            "step: set fuse_backward=False"
        )


def _smooth(
    labels: Labels,
    smoothing: float,
    active: ActiveSet,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    scale: float,
    sparse: bool,
    *,
    neurons: int,
    copied: bool,
    tail_varies: bool,
) -> tuple[Labels, Tensor]:
    """Labels and an addition to the losses (B) that make these label-smoothed.

    With p the probabilities of a sample's labels (weighted, any sum), c the classes' mean weight, n the log
    normaliser, and s the smoothing, the loss is ``(1 - s) sum p (n - z) + s mean over classes of c (n - z)``.
    Labels of ``(1 - s) p + s c q``, q one over their number, bring in all of n, and too much of their own
    logits: what is left to add, ``s c sum q z - s mean(c z)``, is linear in the input, so that the mean takes
    one vector.

    ``copied`` says that ``weight`` and ``bias`` are copies of the active rows, not of all ``neurons``.
    """
    batch, dtype = input.shape[0], input.dtype
    count = labels.offsets.diff()
    sample = torch.arange(batch).repeat_interleave(count, output_size=labels.ids.shape[0])
    has_label = count > 0
    mean_weight = 1.0 if class_weight is None else class_weight.to(dtype).mean()
    own = (smoothing * mean_weight / count.to(dtype))[sample]
    scaled = labels.probabilities * (1 - smoothing) + own

    # what each active row counts in the mean over classes; any one sample's set estimates that mean
    if isinstance(active, SharedActiveSet):
        rows, log_weight = active.rows, active.log_weight
    else:
        first = slice(int(active.offsets[:2][-1]))  # of an empty batch: none
        rows, log_weight = active.active[first].long(), active.log_weight
        log_weight = None if log_weight is None else log_weight[first]
    share = torch.ones(rows.shape[0], dtype=dtype) if log_weight is None else log_weight.exp()
    # for a uniform tail the shares sum to N exactly; others are unbiased with N, not with their sum
    share = share / (neurons if tail_varies else share.sum())
    if class_weight is not None:
        share = share * class_weight.detach().to(dtype)[rows]

    def logits(ids: Tensor, factors: Tensor) -> tuple[Tensor, Tensor | float]:
        """factors * (weight rows, biases) of ids."""
        if copied:
            places = torch.searchsorted(active.rows, ids)
            of_bias = 0.0 if bias is None else bias.index_select(0, places) * factors
            return weight.index_select(0, places) * factors[:, None], of_bias
        of_bias = 0.0 if bias is None else bias.gather(0, ids, sparse_grad=sparse) * factors
        return F.embedding(ids, weight, sparse=sparse) * factors[:, None], of_bias

    # products and sums, no matrix products: their order must not depend on the number of threads
    label_rows, label_bias = logits(labels.ids, own)
    pulls = (label_rows * input[sample]).sum(1) + label_bias
    mean_rows, mean_bias = logits(rows, share)
    mean = (input * mean_rows.sum(0)).sum(1)
    mean = mean + (mean_bias.sum() if isinstance(mean_bias, Tensor) else mean_bias)
    addition = torch.zeros(batch, dtype=dtype).index_add(0, sample, pulls) - smoothing * mean
    addition = torch.where(has_label, addition, 0.0) * scale
    return Labels(labels.offsets, labels.ids, scaled), addition


def lsh_linear_binary_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    tables: HashTables,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    scale: float = 1.0,
    sparse: bool = False,
    training: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Binary cross entropy of a linear layer's logits, over the neurons that matter for this batch.

    ``F.binary_cross_entropy_with_logits(F.linear(input, linear_weight, linear_bias), target)``, computed over
    an active set (see :func:`lsh_linear_cross_entropy`). With ``correction="importance"`` each neuron of the
    tail counts the inverse of its inclusion probability (``(N - |S|) / n`` for n uniform ones, |S| active for
    certain), so that loss and gradients are unbiased estimates of the dense ones. With ``"none"``
    neurons that are not active count 0.
    With every neuron active it is the same function.

    Args:
        input: (\\*, d), float32, float64 or bfloat16.
        linear_weight: (N, d), the same dtype, contiguous.
        target: targets, a sparse CSR tensor (B, N) or a dense floating-point (B, N), for a
            two-dimensional input; classes whose target is 1, int64 (\\*, M), M < N, padded with
            ``ignore_index``, or one each, int64 (\\*).
        weight: (N), a factor of each class's loss.
        pos_weight: (N), or a tensor of one number, a factor of the positive targets.
        reduction: ``"mean"``, over all B N elements, or ``"sum"``.
        linear_bias, tables, ignore_index, scale, sparse, training, generator: as for
            :func:`lsh_linear_cross_entropy`.

    Returns:
        A scalar; of bfloat16 parameters as :func:`lsh_linear_cross_entropy` has it.

    Raises:
        ValueError: an argument's shape, dtype, device or value is wrong; nothing has been changed.
        NotImplementedError: ``reduction="none"``, whose result would have N columns.
    """
    name = "lsh_linear_binary_cross_entropy"
    input = autocast_input(input, linear_weight)
    check_layer(input, linear_weight, linear_bias, tables, name)
    if sparse:
        check_leaves(linear_weight, linear_bias, name)
    if reduction == "none":
        raise NotImplementedError(
            f"{name}: reduction: expected 'mean' or 'sum', got 'none', which is a loss for each of all "
            "classes; only those of active ones are computed"
        )
    if reduction not in ("mean", "sum"):
        raise ValueError(f"{name}: reduction: expected 'mean' or 'sum', got {reduction!r}")
    if not scale > 0 or scale == float("inf"):
        raise ValueError(f"{name}: scale: expected a positive finite number, got {scale}")
    leading, neurons = input.shape[:-1], linear_weight.shape[0]
    input = widened(input)
    flat = input.reshape(-1, input.shape[-1])
    class_weight = None if weight is None else _class_factors(weight, neurons, input, name)
    positive = None
    if pos_weight is not None:
        if isinstance(pos_weight, Tensor) and pos_weight.numel() == 1:
            pos_weight = pos_weight.reshape(1).expand(neurons)
        positive = _class_factors(pos_weight, neurons, input, name, "pos_weight")
    if isinstance(target, Tensor) and target.dim() == len(leading) + 1:
        target = _without_repeats(target, ignore_index)
    labels, active = draw_for(
        tables,
        flat,
        linear_weight,
        linear_bias,
        target,
        leading,
        None,
        ignore_index,
        training=training,
        sparse=sparse,
        generator=generator,
        name=name,
    )
    values = labels.probabilities
    if not is_probabilities(target):
        values = torch.ones_like(values)
    extra = None
    if positive is not None:
        factor = positive[labels.ids]
        extra, values = values * (factor - 1), values * factor
    if class_weight is not None:
        values = values * class_weight[labels.ids]
        extra = None if extra is None else extra * class_weight[labels.ids]
    row_weight = None if active.log_weight is None else active.log_weight.exp()
    if class_weight is not None:
        classes = active.rows if isinstance(active, SharedActiveSet) else active.active.long()
        own = class_weight[classes]
        row_weight = own if row_weight is None else row_weight * own
    flat = flat.contiguous()
    own_weight, own_bias, rows, sparse = active_rows(
        linear_weight, linear_bias, active.rows, sparse
    )
    if isinstance(active, SharedActiveSet):
        losses = ops.shared_binary_cross_entropy(
            flat,
            own_weight,
            own_bias,
            rows,
            row_weight,
            labels.offsets,
            active.label_places,
            values,
            extra,
            scale,
            sparse,
        )
    else:
        losses = ops.sample_binary_cross_entropy(
            flat,
            own_weight,
            own_bias,
            rows,
            active.offsets,
            active.pair_offsets,
            active.pair_positions,
            active.pair_samples,
            row_weight,
            labels.offsets,
            active.label_places,
            values,
            extra,
            scale,
            sparse,
        )
    # as torch, the mean over no elements is NaN
    return losses.sum() if reduction == "sum" else losses.sum() / (losses.shape[0] * neurons)


def draw_for(
    tables: HashTables,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    leading: torch.Size,
    weight: Tensor | None,
    ignore_index: int,
    *,
    training: bool,
    sparse: bool,
    generator: torch.Generator | None,
    name: str,
) -> tuple[Labels, ActiveSet]:
    """:func:`draw_step` of one training step, or its operator where a compiler traces."""
    trained = linear_weight.requires_grad or (linear_bias is not None and linear_bias.requires_grad)
    draw = draw_step
    if torch.compiler.is_compiling():
        _check_traceable(target, generator, name)
        draw = graph.draw_step
    return draw(
        tables,
        input.detach(),
        linear_weight.detach(),
        None if linear_bias is None else linear_bias.detach(),
        target,
        leading,
        weight,
        ignore_index,
        moving=training and torch.is_grad_enabled() and trained,
        sparse=sparse,
        generator=generator,
        name=name,
    )


@torch.compiler.disable
def draw_step(
    tables: HashTables,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    leading: torch.Size,
    weight: Tensor | None,
    ignore_index: int,
    *,
    moving: bool,
    sparse: bool,
    generator: torch.Generator | None,
    name: str = _NAME,
) -> tuple[Labels, ActiveSet]:
    """What one step of the loss ``name`` decides before it computes: labels from ``target``, upkeep of the
    tables, the active set of ``input`` (B, d); ``moving`` says that its rows are about to change."""
    neurons = linear_weight.shape[0]
    labels = as_labels(target, leading, neurons, input.dtype, ignore_index, name)
    if weight is not None:
        labels = _weighted(labels, weight, neurons)
    tables.check_tail(name)
    # One draw a step, whatever upkeep it brings: a recomputation (activation checkpointing) then finds the
    # random state in step, draws the same set, and is known by its seed.
    source = torch.default_generator if generator is None else generator
    before = source.get_state()
    seed = 0 if tables.exact else draw_seed(source)
    upkeep = None
    if tables.has_upkeep:
        upkeep = tables.meet(seed, version_of(linear_weight), moving=moving)

    def maintain() -> None:
        try:
            tables.maintain(
                linear_weight,
                linear_bias,
                advance=moving,
                all_rows_move=not sparse,
                generator=torch.Generator().manual_seed(seed ^ 1),
            )
        except ValueError:
            source.set_state(before)
            raise

    if upkeep == "before":
        maintain()
    active = draw_active_set(
        tables, input, labels, weight=linear_weight, bias=linear_bias, seed=seed
    )
    if moving:
        tables.mark_dirty(active.rows, version_of(linear_weight))
        tables.record(active)
    if upkeep == "after":
        maintain()
    return labels, active


def autocast_input(input: Tensor, weight: Tensor) -> Tensor:
    """Under autocast ``input`` in the dtype of ``weight``: earlier layers give it in bfloat16, and sampled
    losses are computed at full precision. The cast's own gradient goes back in bfloat16."""
    if torch.is_autocast_enabled("cpu") and input.is_floating_point():
        return input.to(weight.dtype)
    return input


def check_leaves(weight: Tensor, bias: Tensor | None, name: str = _NAME) -> None:
    for which, tensor in (("linear_weight", weight), ("linear_bias", bias)):
        if tensor is not None and tensor.requires_grad and not tensor.is_leaf:
            raise ValueError(
                f"{name}: {which}: expected a leaf (a Parameter) for sparse=True, got the result of a "
                "computation (a parametrization?), through which row-sparse gradients do not flow: use "
                "sparse=False"
            )


def _check_traceable(target: Tensor, generator: torch.Generator | None, name: str) -> None:
    if generator is not None:
        raise NotImplementedError(
            f"{name}: generator: expected None under torch.compile, whose graphs take no generator"
        )
    if target.layout != torch.strided:
        raise NotImplementedError(
            f"{name}: target: expected a strided tensor under torch.compile, got {target.layout}: "
            "give lists of labels, (B, M) padded with ignore_index"
        )


def _without_repeats(target: Tensor, ignore_index: int) -> Tensor:
    """Padded lists of classes (\\*, M) with a class that is listed again ignored; other targets as such."""
    if target.layout != torch.strided or target.dtype not in _INDEX_DTYPES or target.shape[-1] < 2:
        return target
    ordered = target.to(torch.int64).sort(dim=-1).values
    again = ordered[..., 1:] == ordered[..., :-1]
    return torch.cat([ordered[..., :1], ordered[..., 1:].masked_fill(again, ignore_index)], -1)


def _class_factors(
    factors: Tensor, neurons: int, input: Tensor, name: str, argument: str = "weight"
) -> Tensor:
    if not isinstance(factors, Tensor) or tuple(factors.shape) != (neurons,):
        got = tuple(factors.shape) if isinstance(factors, Tensor) else type(factors).__name__
        raise ValueError(f"{name}: {argument}: expected a tensor of shape ({neurons},), got {got}")
    if factors.requires_grad:
        raise ValueError(f"{name}: {argument}: expected no gradient: call {argument}.detach()")
    return factors.detach().to(input.dtype)


def check_layer(
    input: Tensor, weight: Tensor, bias: Tensor | None, tables: HashTables, name: str = _NAME
) -> None:
    if not isinstance(tables, HashTables):
        raise ValueError(f"{name}: tables: expected HashTables, got {type(tables).__name__}")
    check_in_memory(name, linear_weight=weight, linear_bias=bias)
    shape = (tables.out_features, tables.in_features)
    if weight.dim() != 2 or tuple(weight.shape) != shape:
        raise ValueError(
            f"{name}: linear_weight: expected shape {shape}, that of its tables, "
            f"got {tuple(weight.shape)}"
        )
    if weight.dtype not in DTYPES:
        raise ValueError(
            f"{name}: linear_weight: expected float32, float64 or bfloat16, got {weight.dtype}: "
            "convert the layer with .float()"
        )
    if input.dim() < 1 or input.shape[-1] != shape[1]:
        raise ValueError(
            f"{name}: input: expected last dimension {shape[1]} (in_features), "
            f"got shape {tuple(input.shape)}"
        )
    given = (input, weight) if bias is None else (input, weight, bias)
    records = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
    for which, tensor in (("input", input), ("linear_weight", weight), ("linear_bias", bias)):
        if tensor is None:
            continue
        if records and not torch.compiler.is_compiling() and tensor.is_inference():
            raise ValueError(
                f"{name}: {which}: expected a normal tensor, got one made in torch.inference_mode(), which "
                "autograd cannot save for backward: make it outside, or give tensor.clone()"
            )
        if tensor.device.type != "cpu":
            raise ValueError(f"{name}: {which}: expected a CPU tensor, got {tensor.device}")
        if tensor.dtype != weight.dtype:
            raise ValueError(
                f"{name}: {which}: expected {weight.dtype}, the weight's dtype, got {tensor.dtype}"
            )
        if tensor is not input and not tensor.is_contiguous():
            raise ValueError(f"{name}: {which}: expected a contiguous tensor: call .contiguous()")
    ops.refuse_transforms(name, input, weight, bias)
    if (bias is not None) != tables.has_bias or (bias is not None and bias.shape != shape[:1]):
        raise ValueError(
            f"{name}: linear_bias: expected {'shape ' + str(shape[:1]) if tables.has_bias else None}"
            f", as its tables, got {None if bias is None else 'shape ' + str(tuple(bias.shape))}"
        )


def is_probabilities(target: Tensor) -> bool:
    """Whether a target holds probabilities, not class indices."""
    return target.layout == torch.sparse_csr or target.is_floating_point()


def as_labels(
    target: Tensor,
    leading: torch.Size,
    neurons: int,
    dtype: torch.dtype,
    ignore_index: int,
    name: str = _NAME,
) -> Labels:
    """Any form of target as :class:`Labels`.

    Raises:
        ValueError: wrong shape, dtype or device, or a label outside [0, N) that is not ignored.
    """
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
    if target.layout != torch.strided or target.dtype not in _INDEX_DTYPES:
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


def _weighted(labels: Labels, weight: Tensor, neurons: int) -> Labels:
    factor = _class_factors(weight, neurons, labels.probabilities, _NAME)[labels.ids]
    return Labels(labels.offsets, labels.ids, labels.probabilities * factor)
