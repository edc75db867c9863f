"""ShardedLogits: what a layer whose rows lie on several ranks returns in training."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor

from ..nn.forward_call import ForwardCall, joined, stand_in
from ..nn.sampled_logits import SampledLogits, register_node
from ..shards import Shard
from ..tables import HashTables
from .losses import Rows, sharded_binary_cross_entropy, sharded_cross_entropy


class ShardedCall(ForwardCall):
    """A call of a sharded layer, with the parameters of this rank.

    Attributes:
        shard: which rows they are.
    """

    shard: Shard

    @property
    def out_features(self) -> int:
        return self.shard.neurons


class ShardedLogits(SampledLogits):
    """The logits (\\*, N) of a sharded layer, computed by the loss on all ranks together.

    It is a :class:`slide_torch.SampledLogits` for the losses. What needs active logits without labels
    (``topk``, ``softmax``, ``to_dense``) raises an error: ``layer.predict`` returns the exact top k.
    """

    _call: ShardedCall

    @classmethod
    def of_shard(
        cls,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tables: HashTables,
        *,
        sparse: bool,
        shard: Shard,
    ) -> ShardedLogits:
        """As :meth:`SampledLogits.of`, of the rows of ``shard``."""
        call = ShardedCall(input, weight, bias, tables, sparse=sparse)
        call.shard = shard
        return cls(stand_in(call), call)

    def _rows(self) -> tuple[Tensor, Rows]:
        call = self._call
        input, weight, bias = call.tensors("SampledLogits", with_graph=self.requires_grad)
        return input, Rows(weight, bias, call.tables, call.sparse, call.shard)

    def cross_entropy(self, target: Tensor, **options: Any) -> Tensor:
        """As ``F.cross_entropy``; every rank must call it, and backward."""
        loss = sharded_cross_entropy(*self._rows(), target, scale=self._call.scale, **options)
        return joined(loss, self._graph)

    def binary_cross_entropy_with_logits(self, target: Tensor, **options: Any) -> Tensor:
        """As ``F.binary_cross_entropy_with_logits``; every rank must call it, and backward."""
        if self._call.normalised:
            self._refuse("binary_cross_entropy of log-probabilities", "call it on the logits")
        loss = sharded_binary_cross_entropy(
            *self._rows(), target, scale=self._call.scale, **options
        )
        return joined(loss, self._graph)

    def _active(self, *, trains: bool) -> NoReturn:
        self._refuse(
            "what needs logits without labels (topk, argmax, softmax, to_dense) on a sharded layer",
            "call layer.predict(input, k) on every rank, or layer.eval()(input)",
        )


register_node(ShardedLogits)
