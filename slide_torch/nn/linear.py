"""LSHLinear: a linear layer that trains only the neurons that matter for a batch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..active_set import ActiveSet
from ..ops import fused_update
from ..ops.rows import advise_hugepages_
from ..options import LSHOptions
from ..prediction.calibration import Calibration
from ..prediction.module import Predictor
from ..prediction.topk import TopK
from ..storage import check_in_memory
from ..tables import HashTables
from . import hidden, replicas, resizing
from . import linear_checks as checks
from . import linear_conversion as conversion
from . import linear_prediction as prediction
from .class_means import init_from_class_means_
from .sampled_logits import SampledLogits
from .tying import MarkLookedUp, check_tied


class LSHLinear(nn.Linear):
    """A drop-in for a huge ``nn.Linear`` output layer (SLIDE: Chen et al., MLSys 2020).

    In training, ``layer(x)`` returns a :class:`SampledLogits`. The loss computed from it reads only the
    neurons of the labels, those that hash tables over the weight rows return for the batch, and a random
    tail. In eval, ``layer(x)`` is the exact dense result.

    With ``output="dense"`` it is a hidden layer, used before a ReLU: in training it returns a tensor in which
    inactive neurons are exactly zero and get no gradient (adaptive dropout: Spring & Shrivastava, KDD 2017).
    Later layers compute densely; :class:`LSHFeedForward` computes two layers over the active neurons.

    Args:
        in_features: width d of an input, at least 1.
        out_features: number of neurons N, at least 1 and below 2^31 - 1.
        bias: whether there is a bias; it is hashed along with the weight.
        options: how active neurons are found, see :class:`LSHOptions`.
        sparse: whether ``weight`` and ``bias`` get row-sparse gradients, as in ``nn.Embedding``: the fast
            path, for :mod:`slide_torch.optim`, ``torch.optim.SparseAdam``, ``SGD`` and ``Adagrad``. With
            False gradients are dense, for any optimizer.
        output: what training returns: ``"sampled"``, a SampledLogits, for a loss; or ``"dense"``, a tensor,
            for a hidden layer, whose ``"auto"`` options are those of :meth:`LSHOptions.for_hidden_layer`
            and whose default pattern is ``"per_sample"``.
        eval_active: the active neurons of a hidden layer in eval: ``"all"``, or ``"budget"``, those that the
            tables return, as in training (with the tables of the last rehash).
        device: must be the CPU.
        dtype: float32 (default), float64 or bfloat16 (active rows are then computed in float32, see
            docs/pytorch.md).

    Shape:
        - Input: (\\*, d)
        - Output: (\\*, N): a SampledLogits in training (with ``output="dense"`` a tensor), a tensor in eval.

    Attributes:
        weight: (N, d), named, shaped and initialised as in ``nn.Linear``. State dicts of the two layers are
            interchangeable.
        bias: (N), or None.
        tables: the :class:`HashTables`, built at the first training step and after loading.

    Limits: the losses are softmax and binary cross entropy. The tables follow changes made by optimizer
    steps, ``load_state_dict`` and ``reset_parameters``; after any other write to ``weight`` call
    :meth:`rehash`. Classes come and go by :meth:`extend_` and :meth:`drop_`; for a weight that was resized
    otherwise make a new layer with :meth:`from_linear`.

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
        in_features, out_features = checks.check_arguments(
            in_features, out_features, options, device, dtype
        )
        options = checks.options_of(options, out_features, output, eval_active)
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
        self._tied = False  # by tie()
        nn.Module.register_load_state_dict_post_hook(self, _invalidate_tables)

    def reset_parameters(self) -> None:
        """Initialises as ``nn.Linear`` does; the tables are rebuilt at the next use."""
        if self.weight.device.type == "cpu":  # scattered rows on small pages cost a page walk each
            advise_hugepages_(self.weight.detach())
        super().reset_parameters()
        if hasattr(self, "tables"):
            self.tables.invalidate()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Loads either all parameters or, where a shape does not fit, none."""
        wrong = checks.wrong_shapes(self, state_dict, prefix)
        if wrong:
            args[-1].extend(wrong)  # the list of errors
        else:
            super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(  # type: ignore[override]
        self, input: Tensor, *, negatives: Tensor | None = None, exclude: Tensor | None = None
    ) -> SampledLogits | Tensor:
        r"""The logits of ``input`` (\*, d): in training a :class:`SampledLogits`, in eval a tensor (\*, N).

        Args:
            negatives: neurons that are always active in training, beside labels and on top of what the tables
                find: int64 (M), for the whole batch, or (\*, M), a list a row, padded with -100. With
                ``pattern="shared"`` every row competes with the union of the lists, with ``"per_sample"``
                each with its own list. In eval every neuron is active anyway.
            exclude: known false negatives in training, int64 (\*, M), a list a row, padded with -100: they do
                not compete in the loss of that row. A label of the row cannot be excluded, and softmax cross
                entropy with several labels a row needs ``decoupled=True``. Eval returns all logits.

        Raises:
            ValueError: shape or dtype is wrong. (Values are checked by the loss, before it changes anything.)
            NotImplementedError: either of a hidden layer, or of a sharded one.
        """
        checks.check_lists_of(input, self.output, negatives=negatives, exclude=exclude)
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
        input = checks.checked_input(input, self, self.tables)
        logits = SampledLogits.of(
            input,
            self.weight,
            self.bias,
            self.tables,
            sparse=self.sparse,
            negatives=negatives,
            exclude=exclude,
        )
        if logits.requires_grad:
            replicas.refuse_outgrown(self.weight)
            if self.sparse and fused_update.is_replica():
                fused_update.refuse_in_replicas("LSHLinear: weight", self.weight)
            checks.refuse_backward_hooks(self)
        return logits

    def draw_active(self, input: Tensor) -> tuple[Tensor, ActiveSet] | None:
        r"""The input (\*, d) of a hidden layer as contiguous (B, d), and the active set drawn for it, with
        the upkeep of the tables; None where every neuron is active, as in eval."""
        if not self.training and self.eval_active == "all":
            return None
        input = checks.checked_input(input, self, self.tables)
        flat = input.reshape(-1, self.in_features).contiguous()
        active = hidden.draw(
            self.tables, flat, self.weight, self.bias, sparse=self.sparse, training=self.training
        )
        return flat, active

    def tie(self, embedding: nn.Embedding | nn.EmbeddingBag) -> LSHLinear:
        """Uses the weight of ``embedding`` as this layer's weight. The rows that the embedding looks up in
        training change whether they are active here or not, so the tables are told to rehash them.

        (With ``sparse=False`` every row is rehashed anyway, and assigning ``layer.weight =
        embedding.weight`` is enough.)

        Raises:
            ValueError: ``embedding`` is not an embedding of (out_features, in_features) in the layer's dtype.
        """
        check_tied(embedding, self.weight, (self.out_features, self.in_features))
        self.weight = embedding.weight
        self._tied = True
        self.tables.invalidate()
        if self.sparse:
            embedding.register_forward_hook(MarkLookedUp(self.tables), with_kwargs=True)
        return self

    @torch.no_grad()
    def init_from_class_means_(
        self,
        batches: Iterable[tuple[Tensor, Tensor]],
        scale: float = 2.0,
        *,
        ignore_index: int = -100,
        progress: bool = False,
    ) -> LSHLinear:
        r"""Starts the layer from examples: each weight row points to the mean input of its class (weight
        imprinting: Qi et al., CVPR 2018; SiameseXML and NGAME start from labels' vectors likewise).

        With :math:`\mu` the mean of all inputs and :math:`\mu_c` that of a class, its row is
        :math:`w_c = s (\mu_c - \mu) / \|\mu_c - \mu\|` and its bias :math:`-\langle w_c, \mu \rangle`.
        The length s is ``scale`` over the root mean square distance of inputs from :math:`\mu`, so that the
        result does not depend on the size of the inputs. A class without an example keeps its row and its
        bias. Then the tables are built, with new hash functions.

        The batches are read once and not kept; the only extra memory is one copy of the weight. The result
        is the same, bit for bit, at any number of threads. Call it before the first step of an optimizer,
        whose state it does not change.

        Args:
            batches: pairs of inputs, (\*, d) as :meth:`forward` takes them, of the encoder as it is before
                training, and targets, in every form that the loss takes. Each label of a row counts in
                full; probabilities count in proportion.
            scale: logit of an input at the root mean square distance from the mean, in the direction of its
                class.
            ignore_index: class index that counts as no label.
            progress: whether to show a progress bar.

        Returns:
            The layer.

        Raises:
            ValueError: an argument is wrong, a batch is no such pair, inputs are not finite or do not differ,
                or there is no label; nothing is changed.

        Examples:
            >>> head.init_from_class_means_((encoder(x), y) for x, y in loader)
        """
        init_from_class_means_(self, batches, scale, ignore_index, progress)
        return self

    def extend_(
        self,
        count_or_rows: int | Tensor,
        *,
        bias: Tensor | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> LSHLinear:
        """Adds classes behind the present ones, whose logits stay as they are, in place: ``weight`` and
        ``bias`` remain the same Parameters, in new memory.

        Tables keep their hash functions and codes; the new rows are hashed and inserted, in time proportional
        to N, so add many classes in one call. ``"auto"`` options are those of the new N; where that changes
        the functions (``K``), the next step builds new tables. Frequencies (:meth:`set_frequencies`) of new
        classes are the smallest one. :meth:`calibrate` again.

        Args:
            count_or_rows: number n of classes, initialised as in ``nn.Linear``, from torch's global
                generator; or their rows (n, d), of the weight's dtype.
            bias: (n), of new classes; by default 0 with given rows, else initialised as in ``nn.Linear``.
            optimizer: the one that updates the weight, of :mod:`slide_torch.optim` or torch; its states get
                rows as before a first step. Another one with states raises an error at its next step.

        Returns:
            The layer.

        Raises:
            ValueError: an argument is wrong, there are gradients, an optimizer has states of other shapes,
                or the layer is a hidden one, parametrized, sharded, in shared memory or not on the CPU;
                nothing is changed.

        Examples:
            >>> optimizer.zero_grad()
            >>> head.extend_(10, optimizer=optimizer)
        """
        resizing.extend_(self, count_or_rows, bias, optimizer)
        return self

    def drop_(
        self, ids: Tensor | Iterable[int], *, optimizer: torch.optim.Optimizer | None = None
    ) -> Tensor:
        """Removes classes in place, as :meth:`extend_` adds them; later ids move down.

        Args:
            ids: the classes, int64 (n) or a list, in any order; at least one class must stay.
            optimizer: as of :meth:`extend_`.

        Returns:
            int64 (N before): the new id of each class, -1 for removed ones.

        Raises:
            ValueError: as :meth:`extend_`.

        Examples:
            >>> new_ids = head.drop_([3, 17], optimizer=optimizer)
            >>> targets = new_ids[targets]
        """
        new_ids: Tensor = resizing.drop_(self, ids, optimizer)
        return new_ids

    def set_frequencies(self, counts: Tensor, power: float = 0.75) -> None:
        """Sets the class counts for ``tail_distribution="frequencies"``: the tail is drawn in proportion to
        ``counts ** power`` (Mikolov et al. 2013 found 0.75 best for words).

        They are not part of a state dict; :func:`sampler_state` saves them.

        Args:
            counts: (N), positive, for example the class counts of the training data. Correction needs every
                class to be drawn sometimes, so replace zeros: ``counts.clamp(min=1)``.
            power: from 0 (uniform) to 1 (in proportion to the counts).

        Raises:
            ValueError: shape or values are wrong; nothing is changed.

        Examples:
            >>> counts = torch.bincount(targets, minlength=head.out_features).clamp(min=1)
            >>> head.set_frequencies(counts)
        """
        self.tables.set_frequencies(counts, power)

    def rehash(self) -> None:
        """Hashes every row again with the current functions, for example after writing to ``weight``.

        Raises:
            ValueError: rows hold NaN or Inf, or the weight has been resized; nothing is changed.
        """
        checks.check_parameters("LSHLinear.rehash", self, self.tables, called=False)
        check_in_memory("LSHLinear.rehash", weight=self.weight, bias=self.bias)
        self.tables.rehash(self.weight, self.bias)

    def rebuild(self) -> None:
        """Draws new hash functions and hashes every row.

        Raises:
            ValueError: rows hold NaN or Inf, or the weight has been resized; nothing is changed.
        """
        checks.check_parameters("LSHLinear.rebuild", self, self.tables, called=False)
        check_in_memory("LSHLinear.rebuild", weight=self.weight, bias=self.bias)
        self.tables.rebuild(self.weight, self.bias)

    def stats(self) -> dict[str, float]:
        """Statistics of tables and sampler, see :meth:`HashTables.stats`."""
        return self.tables.stats()

    @torch.no_grad()
    def recall(self, input: Tensor, k: int = 10) -> float:
        r"""Share of the exact k largest logits of each input that the tables return within the budget; 1 if
        every neuron is active, 0 if nothing is retrieved. Costs a dense product with all neurons.

        It changes nothing. Before the first training step there are no tables yet, so each call builds its
        own and discards them.

        Args:
            input: (\*, d), at least one, finite.
            k: from 1 to N.

        Raises:
            ValueError: an argument is wrong.
        """
        return prediction.recall(self, input, k)

    @torch.no_grad()
    def predict(self, input: Tensor, k: int, *, exact: bool = True) -> TopK:
        r"""The k largest logits of each input and their neurons, without materialising all (\*, N) logits.

        ``torch.topk(F.linear(input, weight, bias), k)``, but faster, and in memory that does not grow with N.
        Training and eval mode give the same result. Nothing is recorded for autograd.

        Args:
            input: (\*, d), of the weight's dtype; of any floating-point dtype under autocast.
            k: from 1 to N.
            exact: False searches only the lists of neurons that :meth:`calibrate` found to be enough for its
                recall, and more lists where these hold fewer than k neurons. Returned logits are exact.

        Returns:
            A named tuple ``(values, indices)``, (\*, k) each, as of ``torch.topk``: indices int64; values in
            descending order, equal ones by smaller index, NaN first; float32 for bfloat16 parameters.

        Raises:
            ValueError: shape or dtype of ``input``, or k, is wrong.
            RuntimeError: ``exact=False`` without :meth:`calibrate`, or after the weights have changed.
        """
        return prediction.predict(self, input, k, exact=exact)

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
        weight rows and bias; kept until the weights change) and finds the smallest number of lists that
        hold the share ``recall`` of the exact k best neurons of ``input``.

        Recall on other inputs depends on how similar they are to ``input``: use a few hundred held-out
        inputs. The partition takes d + 12 bytes a neuron, for a copy of the rows in int8, and a few percent
        more. It is not part of state dicts, copies or pickles of the layer: save :meth:`predictor`.

        Args:
            input: (\*, d), at least one.
            k: from 1 to N.
            recall: share to find, above 0 and at most 1.
            generator: random generator for the seed of k-means; torch's global generator if None.

        Returns:
            The share found on ``input``, at least ``recall``.

        Raises:
            ValueError: an argument is wrong, or weights hold NaN or Inf; nothing is changed.
        """
        self.calibration = prediction.calibrated(self, input, k, recall, generator)
        return self.calibration.recall

    def predictor(self) -> Predictor:
        """The approximate prediction of this layer, as :meth:`calibrate` has prepared it, as a module to save
        and serve. It shares weight, bias and the calibration's partition: nothing is copied, all weights are
        read once.

        Raises:
            RuntimeError: without :meth:`calibrate`, or after the weights have changed.
        """
        return prediction.predictor_of(self)

    def log_prob(self, input: Tensor) -> Tensor:
        r"""Log-probabilities of all neurons, as ``nn.AdaptiveLogSoftmaxWithLoss.log_prob``; differentiable.

        They are exact for the layer's weights. A model trained with ``correction="none"`` is not calibrated,
        see docs/prediction.md.

        Args:
            input: (\*, d), of the weight's dtype, or bfloat16; of any floating-point dtype under autocast.

        Returns:
            (\*, N), float32 or float64; float32 also under autocast and for bfloat16 parameters (whose logits
            are computed by ``F.linear`` in bfloat16). Peak memory is twice that: 1.4 GB for 256 inputs and
            N = 670,091 in float32.

        Raises:
            ValueError: shape or dtype of ``input`` is wrong.
        """
        return prediction.log_prob(self, input)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave out the calibration, which is valid only for these weights in memory."""
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
        """An LSHLinear that shares the Parameters of ``linear``; the other arguments are those of the class.

        Buffers, submodules, other parameters, attributes and hooks are shared too: forward hooks and
        pre-hooks (whose output in training is a :class:`SampledLogits`), and those of state dicts.

        Args:
            linear: an nn.Linear or an LSHLinear; the sizes are those of its weight.

        Raises:
            ValueError: an argument is wrong; or ``linear`` has something that the new layer would lose: it is
                of a subclass, or has a parametrization, weight_norm, spectral_norm, pruning, backward or
                load_state_dict hooks, or its own forward. The message says what to do; nothing is changed.
        """
        settings = conversion.Settings(options, sparse, output, eval_active)
        classes, own_hooks = (nn.Linear, LSHLinear, cls), (_invalidate_tables,)
        return conversion.from_linear(linear, cls, settings, classes=classes, own_hooks=own_hooks)

    def to_linear(self) -> nn.Linear:
        """An ``nn.Linear`` that shares this layer's Parameters and whatever :meth:`from_linear` shares.

        Raises:
            ValueError: as :meth:`from_linear`.
        """
        return conversion.to_linear(self, own_hooks=(_invalidate_tables,))

    def extra_repr(self) -> str:
        dense = f", output='dense', eval_active={self.eval_active!r}"
        return (
            f"{super().extra_repr()}, sparse={self.sparse}{dense if self.output == 'dense' else ''}, "
            f"options={self.options}, built={self.tables.built}"
        )


def _invalidate_tables(layer: nn.Module, incompatible_keys: Any) -> None:
    assert isinstance(layer, LSHLinear)
    layer.tables.invalidate()
