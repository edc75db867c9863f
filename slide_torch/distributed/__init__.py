"""Several processes: layers whose rows are cut over ranks, and row-sparse gradients of replicas."""

from .data_parallel import allreduce_row_gradients, prepare
from .parallelize import VocabParallel, prepare_optimizer, shard_
from .sharded_linear import ShardedLSHLinear

__all__ = [
    "ShardedLSHLinear",
    "VocabParallel",
    "allreduce_row_gradients",
    "prepare",
    "prepare_optimizer",
    "shard_",
]
