"""SampledLogits: what an LSHLinear returns in training."""

from __future__ import annotations

import builtins
import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree

from ..checks import checked_int
from ..functional.binary_cross_entropy import lsh_linear_binary_cross_entropy
from ..functional.cross_entropy import lsh_linear_cross_entropy
from ..precision import computed_dtype
from ..tables import HashTables
from .active_logits import active_logits
from .forward_call import ForwardCall, joined, stand_in
from .torch_functions import HANDLERS


@dataclass(eq=False, repr=False)
class SampledLogits:
    """The logits ``layer(input)`` of shape (\\*, N), computed by the loss: which of them matter depends on
    the labels.

    It is not a tensor, but functions of torch accept it: ``F.cross_entropy(logits, target)`` and
    ``nn.CrossEntropyLoss`` (for the forms of target see
    :func:`slide_torch.functional.lsh_linear_cross_entropy`), ``F.binary_cross_entropy_with_logits`` and
    ``nn.BCEWithLogitsLoss``, ``F.nll_loss(F.log_softmax(logits, -1), target)``, ``topk``, ``argmax``,
    ``softmax``. Leading dimensions can be reshaped and sliced, and the logits scaled by a positive number.
    Functions without labels (``topk``, ``to_dense``, ...) see only the neurons that the tables return, the
    tail, and the call's ``negatives``, less what it excludes; ``layer.eval()(input)`` gives all N logits.

    It is part of the autograd graph as the output of an ``nn.Linear`` is. Gradients are recorded according to
    the mode in which ``layer(input)`` was called: under ``torch.no_grad()`` there are none, wherever the loss
    is computed. Code that looks for tensors in a module's output, such as ``DistributedDataParallel`` and
    ``fully_shard``, finds one (it is a dataclass, and a node of ``torch.utils._pytree``). The loss reads
    input, weight and bias; modifying one of them in place before raises a RuntimeError.

    Attributes:
        shape: the shape (\\*, N).
        ndim: the number of dimensions.
        dtype: the dtype of the logits; float32 for bfloat16 parameters.
        device: the device of the input.
    """

    # The one tensor that such code finds, and may replace; None where nothing gets a gradient.
    _graph: Tensor | None
    _call: ForwardCall

    @classmethod
    def of(
        cls,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tables: HashTables,
        *,
        sparse: bool,
        negatives: Tensor | None = None,
        exclude: Tensor | None = None,
    ) -> SampledLogits:
        """The logits of ``input`` (\\*, d) for a layer of these parameters and tables, all checked."""
        call = ForwardCall(
            input, weight, bias, tables, sparse=sparse, negatives=negatives, exclude=exclude
        )
        return cls(stand_in(call), call)

    # --- what it looks like ---------------------------------------------------------------------------

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self._call.input.shape[:-1], self._call.out_features))

    @property
    def ndim(self) -> int:
        return self._call.input.ndim

    @property
    def dtype(self) -> torch.dtype:
        return computed_dtype(self._call.input.dtype)

    @property
    def device(self) -> torch.device:
        return self._call.input.device

    @property
    def requires_grad(self) -> bool:
        return self._graph is not None and self._graph.requires_grad

    def detach(self) -> SampledLogits:
        """The same logits without gradient."""
        return type(self)(None, self._call)

    def dim(self) -> int:
        return self.ndim

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        return self.shape.numel()

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"SampledLogits(shape={tuple(self.shape)}, dtype={self.dtype})"

    # --- views of leading dimensions ------------------------------------------------------------------

    def _with(self, **changes: Any) -> SampledLogits:
        return type(self)(self._graph, self._call.replaced(**changes))

    def _viewed(self, view: Callable[[Tensor], Tensor]) -> SampledLogits:
        return type(self)(self._graph, self._call.viewed(view))

    def reshape(self, *sizes: Any, shape: Any = None) -> SampledLogits:
        """Reshapes the leading dimensions; the last must stay N (or -1 for it)."""
        if shape is not None or (len(sizes) == 1 and not isinstance(sizes[0], int)):
            sizes = tuple(shape if shape is not None else sizes[0])
        N = self._call.out_features
        leading = self.shape[:-1].numel()
        known = math.prod([size for size in sizes[:-1] if size != -1])
        free = sizes[:-1].count(-1)
        fits = known == leading if not free else free == 1 and known and leading % known == 0
        if not sizes or not fits or not (sizes[-1] == N or (sizes[-1] == -1 and not free)):
            raise ValueError(
                f"SampledLogits: reshape: expected a shape for {leading} rows that keeps the last "
                f"dimension {N}, got {tuple(sizes)}: only leading dimensions can be reshaped"
            )
        return self._viewed(lambda rows: rows.reshape(*sizes[:-1], rows.shape[-1]))

    def view(self, *shape: Any) -> SampledLogits:
        """As :meth:`reshape`."""
        if len(shape) == 1 and isinstance(shape[0], torch.dtype):
            self._refuse("view(dtype)", "use layer.eval()(input) for a tensor of logits")
        return self.reshape(*shape)

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> SampledLogits:
        """Flattens leading dimensions; the last one cannot be flattened into others."""
        start, end = start_dim % self.ndim, end_dim % self.ndim
        if end == self.ndim - 1 and start != end:
            self._refuse(
                "flattening the last dimension", "flatten leading dimensions only, with end_dim=-2"
            )
        return self._viewed(lambda rows: rows.flatten(start, end))

    def __getitem__(self, index: Any) -> SampledLogits:
        items = index if isinstance(index, tuple) else (index,)
        used = sum(map(_dimensions_taken, items))
        if used > self.ndim:
            raise IndexError(f"SampledLogits: too many indices for {self.ndim} dimensions")
        has_ellipsis = any(item is Ellipsis for item in items)
        if items and (has_ellipsis or used == self.ndim):
            last = items[-1]
            whole = isinstance(last, slice) and last == slice(None)
            if not whole and (last is not Ellipsis or used == self.ndim):
                self._refuse(
                    "indexing the last dimension",
                    "use layer.eval()(input) for logits by class (where a module's backward hook looks for a "
                    "tensor, let that module return the loss)",
                )
        return self._viewed(lambda rows: rows[index])

    def unsqueeze(self, dim: int) -> SampledLogits:
        position = dim if dim >= 0 else dim + self.ndim + 1
        if position == self.ndim:
            self._refuse("unsqueeze after the last dimension", "classes must stay last")
        return self._viewed(lambda rows: rows.unsqueeze(position))

    def contiguous(self) -> SampledLogits:
        return self

    def float(self) -> SampledLogits:
        """Itself: logits are float32 or float64."""
        return self

    def to(self, *args: Any, **kwargs: Any) -> SampledLogits:
        wanted = [a for a in (*args, *kwargs.values()) if not isinstance(a, bool)]
        for item in wanted:
            if isinstance(item, Tensor):
                self.to(item.dtype, item.device)
            elif item not in (self.dtype, self.device, str(self.device), None):
                self._refuse(f"to({item})", "convert the layer and its input instead")
        return self

    def __mul__(self, factor: Any) -> SampledLogits:
        factor = _as_number(factor)
        if factor is None:
            self._refuse(
                "multiplication by a tensor", "multiply by a number, or scale the layer's input"
            )
        if not 0 < factor < math.inf:
            raise ValueError(
                f"SampledLogits: multiplication: expected a positive finite number, got {factor}"
            )
        if self._call.normalised:
            self._refuse("scaling of log-probabilities", "scale before log_softmax")
        return self._with(scale=self._call.scale * factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> SampledLogits:
        divisor = _as_number(divisor)
        if not divisor:
            self._refuse(
                "division by anything but a positive number", "scale the layer's input instead"
            )
        scaled: SampledLogits = self * (1.0 / divisor)
        return scaled

    __array_ufunc__ = None  # numpy's scalars leave the arithmetic to us

    # --- computed over the active set -----------------------------------------------------------------

    def log_softmax(self, dim: int = -1, dtype: torch.dtype | None = None) -> SampledLogits:
        """Log-probabilities over the active set, computed later like the logits: for ``F.nll_loss``,
        ``topk``, ``to_dense``. With importance correction they estimate those over all classes."""
        self._check_class_dim("log_softmax", dim)
        if dtype is not None:
            self.to(dtype)
        return self._with(normalised=True)

    def softmax(self, dim: int = -1, dtype: torch.dtype | None = None) -> Tensor:
        """``log_softmax().exp()`` as a dense tensor, zero where not active."""
        self._check_class_dim("softmax", dim)
        return self.log_softmax(dim, dtype).to_dense().exp()

    def topk(
        self, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
    ) -> torch.return_types.topk:
        """The k largest active logits of each row and their classes; -inf and -1 where fewer are active.

        Unlike ``to_dense`` it does not count as a training step of the tables, and leaves torch's random
        state alone: ties and tail are always the same. (Before the first training step there are no tables
        yet, so each call builds its own and discards them.)"""
        self._check_class_dim("topk", dim)
        if not largest:
            self._refuse("topk(largest=False)", "tables find large logits only")
        N = self._call.out_features
        k = checked_int(k, 0, N, "SampledLogits: topk: k")
        rows, values = self._active(trains=False)
        found, place = values.topk(min(k, rows.shape[0]), dim=1)
        classes = rows[place].masked_fill(found == -math.inf, -1)
        found = F.pad(found, (0, k - found.shape[1]), value=-math.inf)
        classes = F.pad(classes, (0, k - classes.shape[1]), value=-1)
        leading = self.shape[:-1]
        return torch.return_types.topk((found.reshape(*leading, k), classes.reshape(*leading, k)))

    def argmax(self, dim: int | None = None, keepdim: bool = False) -> Tensor:
        """The class of the largest active logit of each row."""
        if dim is None and self.ndim > 1:
            self._refuse("argmax() over all dimensions", "argmax(-1)")
        self._check_class_dim("argmax", -1 if dim is None else dim)
        best: Tensor = self.topk(1).indices
        return best if keepdim else best.squeeze(-1)

    def to_dense(self, fill: builtins.float = -math.inf) -> Tensor:
        """A tensor (\\*, N) of the active logits, ``fill`` elsewhere; differentiable. It holds all N columns,
        which the losses avoid."""
        rows, values = self._active(trains=True)
        values = values.masked_fill(values == -math.inf, fill)
        dense = values.new_full((values.shape[0], self._call.out_features), fill)
        return dense.index_copy(1, rows, values).reshape(self.shape)

    def _active(self, *, trains: bool) -> tuple[Tensor, Tensor]:
        rows, values = active_logits(
            self._call, self._graph, with_graph=self.requires_grad, trains=trains
        )
        return rows, values

    def cross_entropy(self, target: Tensor, **options: Any) -> Tensor:
        """As ``F.cross_entropy``; options as in :func:`lsh_linear_cross_entropy`, ``decoupled`` included."""
        call = self._call
        input, weight, bias = call.tensors("SampledLogits", with_graph=self.requires_grad)
        loss = lsh_linear_cross_entropy(
            input,
            weight,
            target,
            linear_bias=bias,
            tables=call.tables,
            negatives=call.negatives,
            exclude=call.exclude,
            scale=call.scale,
            sparse=call.sparse,
            **options,
        )
        return joined(loss, self._graph)

    def binary_cross_entropy_with_logits(self, target: Tensor, **options: Any) -> Tensor:
        """As ``F.binary_cross_entropy_with_logits``; options as in
        :func:`lsh_linear_binary_cross_entropy`."""
        if self._call.normalised:
            self._refuse("binary_cross_entropy of log-probabilities", "call it on the logits")
        call = self._call
        input, weight, bias = call.tensors("SampledLogits", with_graph=self.requires_grad)
        loss = lsh_linear_binary_cross_entropy(
            input,
            weight,
            target,
            linear_bias=bias,
            tables=call.tables,
            negatives=call.negatives,
            exclude=call.exclude,
            scale=call.scale,
            sparse=call.sparse,
            **options,
        )
        return joined(loss, self._graph)

    # --- torch's functions ----------------------------------------------------------------------------

    def _check_class_dim(self, name: str, dim: int | None) -> None:
        if dim not in (-1, self.ndim - 1):
            self._refuse(f"{name}(dim={dim})", "classes are the last dimension: dim=-1")

    def _check_normalised(self, name: str) -> None:
        if not self._call.normalised:
            self._refuse(
                f"{name} of logits", "call F.log_softmax(logits, -1) first, or F.cross_entropy"
            )

    def _refuse(self, what: str, instead: str) -> NoReturn:
        raise NotImplementedError(
            f"SampledLogits: {what} is not available, as only active logits are ever computed; "
            f"{instead}."
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if hasattr(Tensor, name):
            raise AttributeError(
                f"SampledLogits has no {name!r}, as only active logits are ever computed; use a loss, "
                "topk, argmax or to_dense, or layer.eval()(input) for a tensor of all logits"
            )
        raise AttributeError(f"'SampledLogits' object has no attribute {name!r}")

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.mul, Tensor.mul) and args and isinstance(args[-1], SampledLogits):
            return args[-1] * args[0]
        handler = HANDLERS.get(func)
        name = getattr(func, "__name__", str(func))
        if handler is None or not args or not isinstance(args[0], SampledLogits):
            raise NotImplementedError(
                f"SampledLogits: torch function {name} is not available, as only active logits are ever "
                "computed; use F.cross_entropy, topk, argmax or to_dense(), or layer.eval()(input) for "
                "a tensor of all logits."
            )
        if isinstance(handler, str):  # a method's name
            return getattr(args[0], handler)(*args[1:], **kwargs)
        return handler(*args, **kwargs)


def _as_number(value: Any) -> float | None:
    """A number, or a tensor of one without gradient, as a float."""
    if isinstance(value, Tensor) and value.numel() == 1 and not value.requires_grad:
        return float(value)
    return float(value) if isinstance(value, Real) else None


def _dimensions_taken(item: Any) -> int:
    """How many dimensions one item of an index consumes."""
    if item is None or item is Ellipsis or isinstance(item, bool):
        return 0
    if getattr(item, "dtype", None) in (torch.bool, torch.uint8, bool):
        return int(item.ndim)
    return 1


def _refused_operator(name: str) -> Any:
    def refuse(self: SampledLogits, *other: Any) -> NoReturn:
        self._refuse(f"operator {name}", "use a loss, topk, argmax or to_dense()")

    return refuse


for _name in (
    *("add", "radd", "iadd", "sub", "rsub", "isub", "rtruediv", "matmul", "rmatmul", "pow", "rpow"),
    *("mod", "floordiv", "neg", "pos", "abs", "eq", "ne", "lt", "le", "gt", "ge"),
    *("and", "or", "xor", "invert", "bool", "setitem", "array"),
):
    setattr(SampledLogits, f"__{_name}__", _refused_operator(f"__{_name}__"))


def register_node(logits: type[SampledLogits]) -> None:
    """Makes ``logits`` a node of ``torch.utils._pytree``, whose leaf hangs on the tensors of the graph."""
    _pytree.register_pytree_node(
        logits,
        lambda node: ([node._graph], node._call),
        lambda leaves, call: logits(next(iter(leaves)), call),
        serialized_type_name=f"slide_torch.{logits.__name__}",
    )


register_node(SampledLogits)
