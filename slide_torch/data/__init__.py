"""Sparse rows with several labels each: files of the Extreme Classification Repository, batches, and a start
for the embedding of their features.

    train = read_xmc("train.txt")
    for indices, offsets, values, labels in batches(train, 256, seed=0):
        hidden = embedding_bag(indices, offsets, per_sample_weights=values)
        ...
"""

from .label_embedding import label_embedding
from .sparse_rows import IGNORE_INDEX, SparseRows, XMCData, batches
from .xmc import read_xmc

__all__ = ["IGNORE_INDEX", "SparseRows", "XMCData", "batches", "label_embedding", "read_xmc"]
