"""LSHLinear: a linear layer that trains only the neurons that matter for a batch."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..active_set import ActiveSet
from ..checks import as_number, checked_int
from ..functional.checks import autocast_input
from ..ops import fused_update
from ..ops.rows import advise_hugepages_
from ..options import LSHOptions
from ..precision import DTYPES, computed_dtype, topk_linear, widened
from ..prediction.calibration import Calibration, state_of
from ..prediction.calibration import calibrate as calibrated
from ..prediction.partition import RowPartition
from ..randomness import draw_seed
from ..sampling.candidates import candidates
from ..sampling.draw import to_look_at
from ..storage import check_in_memory
from ..tables import HashTables
from . import carry_over, hidden
from .linear_checks import check_arguments, options_of
from .sampled_logits import SampledLogits

# What an LSHLinear has, and an nn.Linear has not.
_OWN_ATTRIBUTES = frozenset(("options", "sparse", "output", "eval_active", "tables", "calibration"))


class LSHLinear(nn.Linear):
    """A drop-in for a huge ``nn.Linear`` output layer (SLIDE: Chen et al., MLSys 2020).

    In training, ``layer(x)`` returns a :class:`SampledLogits`; the loss computed from it touches only
    the labels' neurons, those that hash tables over the layer's own weight rows return for the batch,
    and a random tail. In eval, ``layer(x)`` is the exact dense result.

    With ``output="dense"`` it is a hidden layer, to stand before a ReLU: in training a tensor whose inactive
    neurons are exactly zero and get no gradient (adaptive dropout: Spring & Shrivastava, KDD 2017). What
    follows is then computed densely: :class:`LSHFeedForward` computes two layers over active neurons.

    Args:
        in_features: width d of an input, at least 1.
        out_features: number of neurons N, at least 1 and below 2^31 - 1.
        bias: whether there is a bias; it is hashed along with the weight.
        options: how active neurons are found, see :class:`LSHOptions`.
        sparse: whether ``weight`` and ``bias`` get row-sparse gradients, as in ``nn.Embedding``: the fast
            path, for :mod:`slide_torch.optim`, ``torch.optim.SparseAdam``, ``SGD`` and ``Adagrad``. With
            False they are dense tensors, for any optimizer.
        output: what training returns: ``"sampled"``, a SampledLogits, for a loss; or ``"dense"``, a tensor,
            for a hidden layer. There the ``"auto"`` options are those of
            :meth:`LSHOptions.for_hidden_layer`, and without ``options`` the pattern is ``"per_sample"``.
        eval_active: of a hidden layer, the neurons that are active in eval: ``"all"``, or ``"budget"``, those
            that the tables return, as in training (the tables are those of the last rehash).
        device: must be the CPU.
        dtype: float32 (default), float64 or bfloat16 (of which active rows are computed in float32, see
            docs/pytorch.md).

    Shape:
        - Input: (\\*, d)
        - Output: (\\*, N): a SampledLogits in training (with ``output="dense"`` a tensor), a tensor in eval.

    Attributes:
        weight: (N, d); bias: (N) or None; named, shaped and initialised as in ``nn.Linear``, whose state
            dict is interchangeable with this one's.
        tables: the :class:`HashTables`, built at the first training step and after loading.

    Limits: losses are softmax and binary cross entropies; tables follow changes made by optimizer steps, by
    ``load_state_dict`` and ``reset_parameters``: after writing to ``weight`` yourself call
    :meth:`rehash`. The sizes are fixed: of a weight that has grown make a new layer with :meth:`from_linear`.

    Examples:
        >>> head = LSHLinear(128, 670_091, sparse=True)
        >>> loss = F.cross_entropy(head(torch.randn(32, 128)), torch.randint(670_091, (32,)))
        >>> loss.backward()
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        options: LSHOptions | None = None,
        sparse: bool = False,
        output: Literal["sampled", "dense"] = "sampled",
        eval_active: Literal["all", "budget"] = "all",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        in_features, out_features = check_arguments(
            in_features, out_features, options, device, dtype
        )
        options = options_of(options, out_features, output, eval_active)
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._set_up(options, sparse, output, eval_active)

    def _set_up(self, options: LSHOptions, sparse: bool, output: str, eval_active: str) -> None:
        self.options = options
        self.sparse = sparse
        self.output = output
        self.eval_active = eval_active
        self.tables = HashTables(
            options, self.out_features, self.in_features, has_bias=self.bias is not None
        )
        self.calibration: Calibration | None = None
        self.register_load_state_dict_post_hook(_invalidate_tables)

    def reset_parameters(self) -> None:
        """Initialises as ``nn.Linear`` does; the tables follow at the next use."""
        if self.weight.device.type == "cpu":  # scattered rows on small pages cost a page walk each
            advise_hugepages_(self.weight.detach())
        super().reset_parameters()
        if hasattr(self, "tables"):
            self.tables.invalidate()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Loads nothing where a shape does not fit: no bias of a layer whose weight is another."""
        errors = args[-1]
        own = {prefix + name: param for name, param in self.named_parameters(recurse=False)}
        wrong = [
            f"LSHLinear.load_state_dict: {name}: expected shape {tuple(own[name].shape)}, got "
            f"{tuple(state_dict[name].shape)}: make the layer with the sizes that were saved"
            for name in own
            if name in state_dict and state_dict[name].shape != own[name].shape
        ]
        if wrong:
            errors.extend(wrong)
        else:
            super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, input: Tensor) -> SampledLogits | Tensor:  # type: ignore[override]
        if self.output == "dense":
            drawn = self.draw_active(input)
            if drawn is None:
                return F.linear(input, self.weight, self.bias)
            flat, active = drawn
            values = hidden.into_active(flat, self.weight, self.bias, active, sparse=self.sparse)
            dense = hidden.to_dense(values, active, flat.shape[0], self.out_features)
            return dense.reshape(*input.shape[:-1], self.out_features)
        if not self.training:
            return F.linear(input, self.weight, self.bias)
        logits = SampledLogits.of(self, self._checked(input))
        if logits.requires_grad:
            if self.sparse and fused_update.is_replica():
                fused_update.refuse_in_replicas("LSHLinear: weight", self.weight)
            _refuse_backward_hooks(self)
        return logits

    def draw_active(self, input: Tensor) -> tuple[Tensor, ActiveSet] | None:
        r"""What one call of a hidden layer computes: the input (\*, d) as contiguous (B, d), and the active
        set drawn for it, with the tables' upkeep; None for all neurons, exactly, as in eval."""
        if not self.training and self.eval_active == "all":
            return None
        flat = self._checked(input).reshape(-1, self.in_features).contiguous()
        active = hidden.draw(
            self.tables,
            flat,
            self.weight,
            self.bias,
            sparse=self.sparse,
            training=self.training,
        )
        return flat, active

    def _checked(self, input: Tensor) -> Tensor:
        """The input of a forward in training, in the weight's dtype under autocast."""
        self._check_parameters("LSHLinear")
        if input.dim() < 1 or input.shape[-1] != self.in_features:
            raise ValueError(
                f"LSHLinear: input: expected last dimension {self.in_features} (in_features), "
                f"got shape {tuple(input.shape)}"
            )
        input = autocast_input(input, self.weight)
        if input.dtype != self.weight.dtype or input.device != self.weight.device:
            raise ValueError(
                f"LSHLinear: input: expected {self.weight.dtype} on {self.weight.device}, the weight's, "
                f"got {input.dtype} on {input.device}"
            )
        return input

    def tie(self, embedding: nn.Embedding | nn.EmbeddingBag) -> LSHLinear:
        """Makes the weight of ``embedding`` this layer's weight too, and tells the tables of the rows that
        the embedding looks up in training: they move with it, whether they are active here or not.

        (Under ``sparse=False`` every row is rehashed anyway, and assigning ``layer.weight =
        embedding.weight`` does the same.)

        Raises:
            ValueError: it is no embedding of (out_features, in_features), or of another dtype.
        """
        shape = (self.out_features, self.in_features)
        weight: Any = getattr(embedding, "weight", None)
        if not isinstance(embedding, nn.Embedding | nn.EmbeddingBag) or (
            tuple(weight.shape) != shape or weight.dtype != self.weight.dtype
        ):
            got = "" if weight is None else f" of {tuple(weight.shape)}, {weight.dtype}"
            raise ValueError(
                f"LSHLinear.tie: embedding: expected an nn.Embedding of {shape}, {self.weight.dtype}, "
                f"got {type(embedding).__name__}{got}: make the layer with the embedding's sizes and dtype"
            )
        self.weight = embedding.weight
        self.tables.invalidate()
        if self.sparse:
            embedding.register_forward_hook(_MarkLookedUp(self.tables), with_kwargs=True)
        return self

    def set_frequencies(self, counts: Tensor, power: float = 0.75) -> None:
        """Says how frequent classes are, for ``tail_distribution="frequencies"``: the tail is drawn in
        proportion to ``counts ** power`` (Mikolov et al. 2013 found 0.75 best for words).

        It is no part of a state dict; :func:`sampler_state` keeps it.

        Args:
            counts: (N), positive: of the training data, say. A class that is never drawn could not be
                corrected for, so where counts are zero give ``counts.clamp(min=1)``.
            power: from 0 (uniform) to 1 (in proportion to the counts).

        Raises:
            ValueError: shape or values are wrong; nothing is changed.

        Examples:
            >>> counts = torch.bincount(targets, minlength=head.out_features).clamp(min=1)
            >>> head.set_frequencies(counts)
        """
        self.tables.set_frequencies(counts, power)

    def rehash(self) -> None:
        """Hashes every row anew with the present functions, as after writing to ``weight`` by hand.

        Raises:
            ValueError: rows hold NaN or Inf, or the weight is of another shape than the layer's; nothing is
                changed.
        """
        self._check_parameters("LSHLinear.rehash", called=False)
        check_in_memory("LSHLinear.rehash", weight=self.weight, bias=self.bias)
        self.tables.rehash(self.weight, self.bias)

    def rebuild(self) -> None:
        """Draws new hash functions and hashes every row.

        Raises:
            ValueError: rows hold NaN or Inf, or the weight is of another shape than the layer's; nothing is
                changed.
        """
        self._check_parameters("LSHLinear.rebuild", called=False)
        check_in_memory("LSHLinear.rebuild", weight=self.weight, bias=self.bias)
        self.tables.rebuild(self.weight, self.bias)

    def stats(self) -> dict[str, float]:
        """What tables and sampler are doing, see :meth:`HashTables.stats`."""
        return self.tables.stats()

    @torch.no_grad()
    def recall(self, input: Tensor, k: int = 10) -> float:
        r"""Share of the exact k largest logits of each input that the tables return within the budget; 1 if
        every neuron is active, 0 if nothing is retrieved. Costs a dense product with all neurons.

        It changes nothing: before the first training step, when there are no tables, each call builds
        some of its own, and throws them away.

        Args:
            input: (\*, d), at least one, finite.
            k: from 1 to N.

        Raises:
            ValueError: an argument is wrong.
        """
        k = self._checked_k("recall", k)
        input = self._some_inputs("recall", input)
        check_in_memory("LSHLinear.recall", weight=self.weight, bias=self.bias)
        tables = to_look_at(self.tables, self.weight, self.bias)
        found = candidates(tables, self.weight, self.bias, input)
        if found is None:
            return 1.0
        offsets, active = found
        best = topk_linear(input, *self._contiguous(), k)[1]
        sample = torch.arange(input.shape[0]).repeat_interleave(offsets.diff())
        keys = sample * self.out_features + active
        wanted = torch.arange(input.shape[0]).unsqueeze(1) * self.out_features + best
        return torch.isin(wanted, keys).float().mean().item()

    @torch.no_grad()
    def predict(self, input: Tensor, k: int, *, exact: bool = True) -> tuple[Tensor, Tensor]:
        r"""The k largest logits of each input and their neurons, without ever holding (\*, N).

        ``torch.topk(F.linear(input, weight, bias), k)``, faster and in memory that does not grow with N.
        The same in training and eval. No gradient: nothing is recorded for autograd.

        Args:
            input: (\*, d), of the weight's dtype; any floating-point one under autocast.
            k: from 1 to N.
            exact: False looks only among the neurons of the few lists that :meth:`calibrate` found
                to be enough for the recall asked of it, if need be of more lists to find k neurons. The
                logits of what is found are exact.

        Returns:
            ``(values, indices)``: (\*, k) each, the second int64; descending, equal values by smaller index,
            NaN first, as the largest, as in ``torch.topk``. Of bfloat16 parameters, float32 values.

        Raises:
            ValueError: shape or dtype of ``input``, or k, is wrong.
            RuntimeError: ``exact=False`` without :meth:`calibrate`, or after the weights have changed.
        """
        k = self._checked_k("predict", k)
        flat = self._inputs("predict", input)
        shape = (*input.shape[:-1], k)
        weight, bias = self._contiguous()
        if exact:
            values, indices = topk_linear(flat, weight, bias, k)
        else:
            calibration = self.calibration
            if calibration is None:
                raise RuntimeError(
                    "LSHLinear.predict: exact=False needs to know how far to look: call "
                    "layer.calibrate(inputs, k, recall=0.95) first"
                )
            if calibration.state != state_of(self.weight, self.bias):
                raise RuntimeError(
                    "LSHLinear.predict: the weights have changed since layer.calibrate, whose recall is "
                    "not known to hold any more: call it again, or predict(..., exact=True)"
                )
            values, indices = calibration.partition.topk(
                flat,
                weight,
                bias,
                k,
                calibration.probes,
                calibration.radius_weight,
                calibration.rescored,
            )
        return values.view(shape), indices.view(shape)

    @torch.no_grad()
    def calibrate(
        self,
        input: Tensor,
        k: int,
        recall: float = 0.95,
        *,
        generator: torch.Generator | None = None,
    ) -> float:
        r"""Prepares ``predict(exact=False)``: partitions the neurons into lists of neighbours (k-means on
        weight rows and bias; kept until the weights change) and finds the fewest lists in which
        ``recall`` of the exact k best neurons of ``input`` stand.

        Other inputs get that recall so far as ``input`` is like them: use some hundreds, held out. The
        partition takes d + 12 bytes a neuron, for a copy of the rows in int8, and some hundredths of
        that. It is no part of a state dict, nor of a copy or pickle of the layer: calibrate where the layer
        is used.

        Args:
            input: (\*, d), at least one.
            k: from 1 to N.
            recall: share to be found, above 0 and at most 1.
            generator: source of the seed of k-means; torch's global generator if None.

        Returns:
            The share found on ``input``, at least ``recall``.

        Raises:
            ValueError: an argument is wrong, or weights hold NaN or Inf; nothing is changed.
        """
        k = self._checked_k("calibrate", k)
        flat = self._some_inputs("calibrate", input)
        share = as_number(recall)
        if share is None or not 0 < share <= 1:
            raise ValueError(
                f"LSHLinear.calibrate: recall: expected a number above 0 and at most 1, got {recall!r}"
            )
        if parametrize.is_parametrized(self):
            raise ValueError(
                "LSHLinear.calibrate: weight: expected a Parameter, whose changes are noticed, got the "
                "result of a parametrization: call torch.nn.utils.parametrize.remove_parametrizations first"
            )
        weight, bias = self._contiguous()
        old = self.calibration
        if old is not None and old.state == state_of(self.weight, self.bias):
            partition = old.partition
        else:
            partition = RowPartition.build(weight, bias, seed=draw_seed(generator))
        state = state_of(self.weight, self.bias)
        self.calibration = calibrated(flat, weight, bias, k, share, partition, state)
        return self.calibration.recall

    def log_prob(self, input: Tensor) -> Tensor:
        r"""Log-probabilities of all neurons, as ``nn.AdaptiveLogSoftmaxWithLoss.log_prob``; differentiable.

        Exact under the model. Of a model trained with ``correction="none"`` they are not calibrated: see
        docs/prediction.md.

        Args:
            input: (\*, d), of the weight's dtype; bfloat16 also for a float32 weight, and any floating-point
                one under autocast.

        Returns:
            (\*, N), float32, also under autocast and of bfloat16 parameters (whose logits are
            ``F.linear``'s, in bfloat16), or float64. Twice that is held for a moment: 1.4 GB for 256 inputs
            and N = 670,091 in float32.

        Raises:
            ValueError: shape or dtype of ``input`` is wrong.
        """
        if isinstance(input, Tensor) and input.dtype == torch.bfloat16:
            input = input.to(self.weight.dtype)
        self._inputs("log_prob", input)
        with torch.autocast("cpu", enabled=False):
            logits = F.linear(input.to(self.weight.dtype), self.weight, self.bias)
            return F.log_softmax(logits, dim=-1, dtype=computed_dtype(logits.dtype))

    def _checked_k(self, method: str, k: Any) -> int:
        N = self.out_features
        return checked_int(k, 1, N, f"LSHLinear.{method}: k", " (out_features)")

    def _some_inputs(self, method: str, input: Tensor) -> Tensor:
        """As :meth:`_inputs`: at least one, and finite."""
        flat = self._inputs(method, input)
        if flat.shape[0] == 0:
            raise ValueError(f"LSHLinear.{method}: input: expected at least one, got none")
        if not bool(torch.isfinite(flat).all()):
            raise ValueError(f"LSHLinear.{method}: input: expected finite numbers, got NaN or Inf")
        return flat

    def _inputs(self, method: str, input: Tensor) -> Tensor:
        """Checks what prediction is given; returns inputs as contiguous (n, d), bfloat16 ones as float32."""
        self._check_parameters(f"LSHLinear.{method}", called=False)
        if not isinstance(input, Tensor) or input.dim() < 1 or input.shape[-1] != self.in_features:
            got = tuple(input.shape) if isinstance(input, Tensor) else type(input).__name__
            raise ValueError(
                f"LSHLinear.{method}: input: expected a tensor with last dimension {self.in_features} "
                f"(in_features), got {got}"
            )
        check_in_memory(f"LSHLinear.{method}", weight=self.weight, bias=self.bias)
        if self.weight.dtype not in DTYPES:
            raise ValueError(
                f"LSHLinear.{method}: weight: expected float32, float64 or bfloat16, got "
                f"{self.weight.dtype}: convert the layer with .float()"
            )
        input = autocast_input(input, self.weight)
        if input.dtype != self.weight.dtype or input.device != self.weight.device:
            raise ValueError(
                f"LSHLinear.{method}: input: expected {self.weight.dtype} on {self.weight.device}, the "
                f"weight's, got {input.dtype} on {input.device}"
            )
        return widened(input).reshape(-1, self.in_features).contiguous()

    def _check_parameters(self, where: str, *, called: bool = True) -> None:
        """Refuses parameters of other shapes than the layer was made with, and outside a forward
        (``called=False``) those that only a forward brings up to date."""
        tables, weight, bias = self.tables, self.weight, self.bias
        N, d = tables.out_features, tables.in_features
        sizes = (self.out_features, self.in_features)
        of_bias = None if bias is None else tuple(bias.shape)
        wanted = (N,) if tables.has_bias else None
        if tuple(weight.shape) != (N, d) or sizes != (N, d) or of_bias != wanted:
            dense = "" if self.output == "sampled" else ", output='dense'"
            raise ValueError(
                f"{where}: weight: expected shape {(N, d)} and bias {wanted}, which the layer was made with, "
                f"got {tuple(weight.shape)} and {of_bias}, (out_features, in_features) {sizes}: of resized "
                "parameters make a new layer, LSHLinear.from_linear(layer, options=layer.options, "
                f"sparse=layer.sparse{dense})"
            )
        computed = None if called else carry_over.computed_weight(self)
        if computed is not None:
            raise ValueError(
                f"{where}: weight: expected a Parameter, got one that {computed[0]} computes anew at each "
                f"forward only: call {computed[1]} first"
            )

    def _contiguous(self) -> tuple[Tensor, Tensor | None]:
        bias = self.bias
        return self.weight.contiguous(), None if bias is None else bias.contiguous()

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles go without the calibration: it belongs to the very memory of the weights."""
        return {**self.__dict__, "calibration": None}

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        options: LSHOptions | None = None,
        sparse: bool = False,
        output: Literal["sampled", "dense"] = "sampled",
        eval_active: Literal["all", "budget"] = "all",
    ) -> LSHLinear:
        """An LSHLinear that shares the very Parameters of ``linear``; other arguments as for the class.

        All else that hangs on ``linear`` is shared too: buffers, submodules and other parameters, attributes,
        and its hooks: forward hooks and pre-hooks (which see a :class:`SampledLogits` as the output in
        training), and those of state dicts. What cannot be taken along is refused.

        Args:
            linear: an nn.Linear or an LSHLinear. Sizes are those of its weight.

        Raises:
            ValueError: an argument is wrong; or ``linear`` is of a subclass, has a parametrization,
                weight_norm, spectral_norm, pruning, backward or load_state_dict hooks, or a forward of its
                own. The message says what to do; nothing is changed.
        """
        where = "LSHLinear.from_linear: linear"
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"{where}: expected nn.Linear, got {type(linear).__name__}")
        carry_over.check_carried(
            linear, where, classes=(nn.Linear, LSHLinear, cls), own_hooks=(_invalidate_tables,)
        )
        weight, bias = linear.weight, linear.bias
        if weight.dim() != 2:
            raise ValueError(
                f"{where}: expected a weight of 2 dimensions, got shape {tuple(weight.shape)}"
            )
        if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
            raise ValueError(
                f"{where}: expected a bias of shape {tuple(weight.shape[:1])}, {weight.dtype}, as the weight "
                f"has it, got {tuple(bias.shape)}, {bias.dtype}"
            )
        in_features, out_features = check_arguments(
            weight.shape[1], weight.shape[0], options, weight.device, weight.dtype
        )
        options = options_of(options, out_features, output, eval_active)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features = in_features
        layer.out_features = out_features
        layer.weight = weight
        layer.register_parameter("bias", bias)
        layer._set_up(options, sparse, output, eval_active)
        own = _OWN_ATTRIBUTES if isinstance(linear, LSHLinear) else frozenset[str]()
        carry_over.check_names(linear, layer, where, own)
        carry_over.carry_over(linear, layer, own)
        return layer

    def to_linear(self) -> nn.Linear:
        """An ``nn.Linear`` that shares this layer's Parameters, and all else that :meth:`from_linear` shares.

        Raises:
            ValueError: as :meth:`from_linear`.
        """
        where = "LSHLinear.to_linear: layer"
        carry_over.check_carried(
            self, where, classes=(type(self),), own_hooks=(_invalidate_tables,)
        )
        linear = nn.Linear.__new__(nn.Linear)
        nn.Module.__init__(linear)
        linear.out_features, linear.in_features = self.weight.shape
        carry_over.check_names(self, linear, where, _OWN_ATTRIBUTES)
        carry_over.carry_over(self, linear, _OWN_ATTRIBUTES)
        return linear

    def extra_repr(self) -> str:
        dense = f", output='dense', eval_active={self.eval_active!r}"
        return (
            f"{super().extra_repr()}, sparse={self.sparse}{dense if self.output == 'dense' else ''}, "
            f"options={self.options}, built={self.tables.built}"
        )


class _MarkLookedUp:
    """Forward hook of a tied embedding; an object, so that copies of a model mark their own tables."""

    def __init__(self, tables: HashTables) -> None:
        self.tables = tables

    @torch.compiler.disable
    def __call__(self, embedding: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        weight: Any = embedding.weight
        if weight.shape[0] != self.tables.out_features:  # resized: the layer refuses it itself
            return
        if embedding.training and torch.is_grad_enabled() and weight.requires_grad:
            rows = args[0] if args else kwargs.get("input")
            if not isinstance(rows, Tensor):
                raise ValueError(
                    "LSHLinear.tie: embedding: expected indices as its first argument or input=, got "
                    f"{[type(a).__name__ for a in args]} and {sorted(kwargs)}: call it as nn.Embedding"
                )
            self.tables.mark_dirty(rows.flatten().to(torch.int64), weight._version)


def _refuse_backward_hooks(layer: nn.Module) -> None:
    """Module backward hooks would not be called, as there is no gradient of N logits to call them with."""
    if layer._backward_hooks or layer._backward_pre_hooks or _any_global_backward_hook():
        raise NotImplementedError(
            "LSHLinear: backward hooks are not available in training, whose logits have no gradient tensor: "
            "use input.register_hook or weight.register_hook, or hook the modules before, or one whose "
            "forward returns the loss"
        )


def _any_global_backward_hook() -> bool:
    module = torch.nn.modules.module
    return bool(module._global_backward_hooks or module._global_backward_pre_hooks)


def _invalidate_tables(layer: nn.Module, incompatible_keys: Any) -> None:
    assert isinstance(layer, LSHLinear)
    layer.tables.invalidate()
