"""ShardedLSHLinear: an LSHLinear whose rows lie on several ranks."""

from __future__ import annotations

import dataclasses
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import init

from ..nn import linear_checks as checks
from ..nn.linear import LSHLinear
from ..ops import fused_update
from ..options import LSHOptions
from ..precision import computed_dtype, widened
from ..prediction.topk import TopK
from ..randomness import draw_seed
from ..sampling.candidates import candidates
from ..sampling.draw import to_look_at
from ..sampling.recall import found_among
from ..shards import Shard, register, shard_of
from ..tables import HashTables
from ..tails.proposals import log_uniform_shares
from . import collectives
from .batch import Batch
from .sharded_logits import ShardedLogits


class ShardedLSHLinear(LSHLinear):
    """What :func:`shard_` makes of an :class:`LSHLinear`: this rank holds some of its rows, as Parameters of
    the old names, with tables, tail and optimizer state of their own.

    Everything that returns something about all classes (the loss, ``predict``, ``recall``, ``calibrate``,
    ``log_prob``, the output in eval mode, ``to_linear``) is a collective: every rank must call it.
    ``stats``, ``rehash``, ``rebuild`` and :func:`slide_torch.sampler_state` are about this rank's rows.

    Attributes:
        weight: (n, d), this rank's rows; in a state dict a DTensor (N, d) with placement ``Shard(0)``.
        bias: (n), or None; likewise.
        out_features: N, of all ranks together.
        shard: which rows of all N these are.
        local: this rank's rows as an LSHLinear of n classes, which shares Parameters and tables.
    """

    shard: Shard
    _local: LSHLinear

    def __init__(self, *arguments: Any, **options: Any) -> None:
        raise TypeError(
            "ShardedLSHLinear: expected to be made by shard_(layer, mesh) of an LSHLinear, got called"
        )

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options: Any) -> NoReturn:
        raise TypeError(
            "ShardedLSHLinear.from_linear: expected LSHLinear.from_linear, then shard_(layer, mesh)"
        )

    @property
    def local(self) -> LSHLinear:
        local = self._local
        local.weight, local.bias, local.training = self.weight, self.bias, self.training
        return local

    def _check(self, where: str) -> None:
        if torch.compiler.is_compiling():
            raise NotImplementedError(
                f"{where}: a sharded layer: expected a call outside of torch.compile: leave the layer and "
                "its loss out of the graph"
            )
        if shard_of(self.weight) is not self.shard:
            raise RuntimeError(
                f"{where}: weight: expected the Parameter that shard_ made, got another one: leave a sharded "
                "layer out of fully_shard (ignored_params=set(layer.parameters())), and do not assign it"
            )
        if fused_update.is_replica():
            module: Any = nn.parallel.DistributedDataParallel._get_active_ddp_module()
            if any(p is self.weight for p in module._module_parameters):
                raise RuntimeError(
                    f"{where}: weight: expected it left out of DistributedDataParallel, which gives all "
                    "ranks the rows of rank 0: call slide_torch.distributed.prepare(model) before wrapping it"
                )

    def forward(  # type: ignore[override]
        self, input: Tensor, *, negatives: Tensor | None = None, exclude: Tensor | None = None
    ) -> ShardedLogits | Tensor:
        self._check("LSHLinear")
        for argument, lists in (("negatives", negatives), ("exclude", exclude)):
            if lists is not None:
                raise NotImplementedError(
                    f"LSHLinear: {argument}: expected None for a sharded layer, got "
                    f"{type(lists).__name__}: use a layer that is whole"
                )
        if not self.training:
            return self._all_logits(input)
        logits = ShardedLogits.of_shard(
            checks.checked_input(input, self.local, self.tables),
            self.weight,
            self.bias,
            self.tables,
            sparse=self.sparse,
            shard=self.shard,
        )
        if logits.requires_grad:
            checks.refuse_backward_hooks(self)
        return logits

    def _all_logits(self, input: Tensor) -> Tensor:
        """The exact logits (\\*, N), on every rank those of its input; differentiable."""
        input = checks.checked_input(input, self.local, self.tables)
        batch = Batch.of("LSHLinear", self.shard, widened(input).reshape(-1, input.shape[-1]))
        logits = F.linear(batch.input.to(self.weight.dtype), self.weight, self.bias)
        own = batch.own(
            collectives.joined_classes(widened(logits), self.shard.sizes, self.shard.group)
        )
        return own.reshape(*input.shape[:-1], self.out_features).to(logits.dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialises as ``nn.Linear`` does, each rank its rows from a seed of their own."""
        generator = torch.Generator().manual_seed((draw_seed() + self.shard.rank) % 2**63)
        bound = self.in_features**-0.5
        for parameter in self.parameters(recurse=False):
            init.uniform_(parameter, -bound, bound, generator=generator)
        self.tables.invalidate()

    # --- prediction -----------------------------------------------------------------------------------

    @torch.no_grad()
    def predict(self, input: Tensor, k: int, *, exact: bool = True) -> TopK:
        r"""As :meth:`LSHLinear.predict`, the best of all ranks' classes, on every rank for its input."""
        self._check("LSHLinear.predict")
        k = checks.checked_k("LSHLinear.predict", k, self.out_features)
        flat = checks.flat_inputs("LSHLinear.predict", input, self.local, self.tables)
        batch = Batch.of("LSHLinear.predict", self.shard, flat)
        values, indices = (batch.own(t) for t in self._best(batch.input, k, exact=exact))
        shape = (*input.shape[:-1], k)
        return TopK(values.view(shape), indices.view(shape))

    def _best(self, flat: Tensor, k: int, *, exact: bool) -> tuple[Tensor, Tensor]:
        """The k best of all classes for inputs (B, d) that all ranks have."""
        counts = [min(k, size) for size in self.shard.sizes]
        rows = flat.to(self.weight.dtype)
        values, indices = self.local.predict(rows, counts[self.shard.rank], exact=exact)
        values = collectives.gather_ragged(values.T, counts, self.shard.group).T
        ids = indices + self.shard.first
        ids = collectives.gather_ragged(ids.T, counts, self.shard.group).T
        # stable: of equal values those of earlier ranks, the smaller ids, stay first
        values, order = values.sort(dim=1, descending=True, stable=True)
        return values[:, :k].contiguous(), ids.gather(1, order)[:, :k].contiguous()

    @torch.no_grad()
    def calibrate(
        self,
        input: Tensor,
        k: int,
        recall: float = 0.95,
        *,
        generator: torch.Generator | None = None,
    ) -> float:
        r"""As :meth:`LSHLinear.calibrate`: each rank partitions its rows, and looks as far in them as finds
        the share ``recall`` of its own best k, and further if the best k of all ranks need it.

        Returns:
            The share found of the best k of all ranks, at least ``recall``.
        """
        where = "LSHLinear.calibrate"
        self._check(where)
        k = checks.checked_k(where, k, self.out_features)
        flat = checks.some_inputs(where, input, self.local, self.tables)
        recall = checks.checked_share(f"{where}: recall", recall)
        batch = Batch.of(where, self.shard, flat)
        inputs, own_k = batch.input.to(self.weight.dtype), min(k, self.weight.shape[0])
        _, best = self._best(batch.input, k, exact=True)
        share = recall
        while True:
            self.local.calibrate(inputs, own_k, share, generator=generator)
            _, found = self._best(batch.input, k, exact=False)
            measured = (found.unsqueeze(2) == best.unsqueeze(1)).any(1).float().mean().item()
            if measured >= recall - 1e-6 or share == 1.0:
                return measured
            share = (1 + share) / 2 if share < 0.999 else 1.0

    def predictor(self) -> NoReturn:
        raise NotImplementedError(
            "LSHLinear.predictor: expected a layer that is whole, got a sharded one: make one of "
            "LSHLinear.from_linear(layer.to_linear()), after calibrating that"
        )

    @torch.no_grad()
    def recall(self, input: Tensor, k: int = 10) -> float:
        r"""As :meth:`LSHLinear.recall`, of the best k of all ranks' classes."""
        where, weight, bias = "LSHLinear.recall", self.weight, self.bias
        self._check(where)
        k = checks.checked_k(where, k, self.out_features)
        flat = checks.some_inputs(where, input, self.local, self.tables)
        batch = Batch.of(where, self.shard, flat)
        _, best = self._best(batch.input, k, exact=True)
        own = (best >= self.shard.first) & (best < self.shard.last)
        found = candidates(to_look_at(self.tables, weight, bias), weight, bias, batch.input)
        if found is not None:
            places = (best - self.shard.first).clamp(0, weight.shape[0] - 1)
            own &= found_among(places, *found, weight.shape[0])
        total = collectives.summed(own.sum(), self.shard.group)
        return total.item() / best.numel()

    def log_prob(self, input: Tensor) -> Tensor:
        r"""As :meth:`LSHLinear.log_prob`: (\*, N), on every rank for its input."""
        self._check("LSHLinear.log_prob")
        if isinstance(input, Tensor) and input.dtype == torch.bfloat16:
            input = input.to(self.weight.dtype)
        checks.flat_inputs("LSHLinear.log_prob", input, self.local, self.tables)
        with torch.autocast("cpu", enabled=False):
            logits = self._all_logits(input.to(self.weight.dtype))
            return F.log_softmax(logits, dim=-1, dtype=computed_dtype(logits.dtype))

    # --- upkeep ---------------------------------------------------------------------------------------

    def rehash(self) -> None:
        """As :meth:`LSHLinear.rehash`, of this rank's rows."""
        self.local.rehash()

    def rebuild(self) -> None:
        """As :meth:`LSHLinear.rebuild`, of this rank's rows."""
        self.local.rebuild()

    def set_frequencies(self, counts: Tensor, power: float = 0.75) -> None:
        """As :meth:`LSHLinear.set_frequencies`; ``counts`` (N) are of all classes."""
        if isinstance(counts, Tensor) and tuple(counts.shape) == (self.out_features,):
            counts = counts[self.shard.first : self.shard.last]
        elif isinstance(counts, Tensor):  # the message must name N
            raise ValueError(
                f"LSHLinear.set_frequencies: counts: expected a tensor of shape ({self.out_features},), got "
                f"{tuple(counts.shape)}"
            )
        self.tables.set_frequencies(counts, power)

    def tie(self, embedding: Any) -> NoReturn:
        raise NotImplementedError(
            "LSHLinear.tie: expected a layer that is whole, got a sharded one: an embedding needs all rows "
            "on every rank, so leave its weight untied"
        )

    def init_from_class_means_(self, *arguments: Any, **options: Any) -> NoReturn:
        raise NotImplementedError(
            "LSHLinear.init_from_class_means_: expected a layer that is whole, got a sharded one: call it "
            "before shard_"
        )

    def extend_(self, *arguments: Any, **options: Any) -> NoReturn:
        raise NotImplementedError(
            "LSHLinear.extend_: expected a layer that is whole, got a sharded one: call it before shard_"
        )

    def drop_(self, *arguments: Any, **options: Any) -> NoReturn:
        raise NotImplementedError(
            "LSHLinear.drop_: expected a layer that is whole, got a sharded one: call it before shard_"
        )

    def draw_active(self, input: Tensor) -> NoReturn:
        raise NotImplementedError("LSHLinear.draw_active: a sharded layer is no hidden layer")

    # --- state ----------------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, parameter in self._parameters.items():
            if parameter is not None:
                destination[prefix + name] = self.shard.as_dtensor(parameter.detach())

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Loads this rank's rows of DTensors, or of whole tensors, as of an nn.Linear."""
        own = {prefix + name for name in self._parameters}
        local = {k: self.shard.own_rows(v) if k in own else v for k, v in state_dict.items()}
        super()._load_from_state_dict(local, prefix, *args)

    def to_linear(self) -> nn.Linear:
        """An ``nn.Linear`` with copies of all N rows, on every rank."""
        weight = self.shard.as_dtensor(self.weight.detach()).full_tensor()  # type: ignore[attr-defined]
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, "meta")
        linear.weight = nn.Parameter(weight)
        if self.bias is not None:
            whole = self.shard.as_dtensor(self.bias.detach()).full_tensor()  # type: ignore[attr-defined]
            linear.bias = nn.Parameter(whole)
        return linear.train(self.training)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._register()

    def _register(self) -> None:
        for parameter in self.parameters(recurse=False):
            register(parameter, self.shard)

    def extra_repr(self) -> str:
        shard = self.shard
        return f"{super().extra_repr()}, rows={shard.first}:{shard.last}"


def make_sharded(layer: LSHLinear, shard: Shard) -> ShardedLSHLinear:
    """Makes ``layer`` hold the rows of ``shard`` only, in place. All is checked."""
    options = _options_of_share(layer, shard)
    sizes = (shard.last - shard.first, layer.in_features)
    HashTables(options, *sizes, has_bias=layer.bias is not None)  # may refuse the options
    drawn = layer.weight.device.type == "meta"
    for name, parameter in list(layer._parameters.items()):
        if parameter is None:
            continue
        if drawn:
            shape = (shard.last - shard.first, *parameter.shape[1:])
            own = torch.empty(shape, dtype=parameter.dtype, device="cpu")
            layer._parameters[name] = nn.Parameter(own, parameter.requires_grad)
        else:  # an optimizer that was made before keeps its Parameter
            parameter.data = parameter.data[shard.first : shard.last].clone()
    local = _local_layer(layer, shard, options)
    layer.tables, layer.calibration = local.tables, None
    layer.__class__ = ShardedLSHLinear
    assert isinstance(layer, ShardedLSHLinear)
    layer.__dict__.update(shard=shard, _local=local)  # no submodule: its Parameters are these
    layer._register()
    if drawn:
        layer.reset_parameters()
    return layer


def _options_of_share(layer: LSHLinear, shard: Shard) -> LSHOptions:
    """The options of this rank's rows: its share of budget, tail, probes, and the tail's distribution."""
    options = layer.options
    resolved = options.resolve(shard.neurons, layer.in_features)

    def share(count: int) -> int:
        return -(-count // shard.ranks)

    shared = ("budget", "tail", "probes")
    changes: dict[str, Any] = {name: share(getattr(resolved, name)) for name in shared}
    if options.rerank != "auto" and options.rerank > 0:
        changes["rerank"] = max(share(options.rerank), changes["budget"])
    parts = resolved.tail_parts
    if "log_uniform" in parts:
        if "frequencies" in parts:
            raise ValueError(
                "shard_: layer: expected one of 'log_uniform' and 'frequencies' in tail_distribution, got "
                f"{parts}: give set_frequencies the mean of both"
            )
        # the distribution over all classes, within these rows
        own = tuple("frequencies" if part == "log_uniform" else part for part in parts)
        changes["tail_distribution"] = own if len(own) > 1 else own[0]
    return dataclasses.replace(options, **changes)


def _local_layer(layer: LSHLinear, shard: Shard, options: LSHOptions) -> LSHLinear:
    """This rank's rows as a layer of their own."""
    linear = nn.Linear(1, 1, device="meta")
    linear.weight, linear.bias = layer.weight, layer.bias
    local = LSHLinear.from_linear(linear, options=options, sparse=layer.sparse)
    if "log_uniform" in layer.options.tail_parts:
        shares = log_uniform_shares(shard.neurons)[shard.first : shard.last]
        local.tables.tail.frequencies = torch.from_numpy(shares.copy())
    elif layer.tables.tail.frequencies is not None:
        own = layer.tables.tail.frequencies[shard.first : shard.last]
        local.tables.tail.frequencies = own.clone()
    return local
